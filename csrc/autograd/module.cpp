// The Python module. Its functions return None for calls that are not plain: the Functions in Python take those, and say what is wrong.
#include "lora_linear.h"
#include "norms.h"

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  m.attr("made_from") = FASTPEFT_BUILD;
  fastpeft::bind_norms(m);
  fastpeft::bind_lora_linear(m);
}
