#pragma once
// Autograd of the ops whose Python costs more than a small call of them: the same Functions as in fastpeft/ops/*.py, in C++.
//
// libtorch's stable ABI has no autograd. This is therefore a library of its own, for one torch and one Python, beside the one for all;
// where it is missing, the Functions in Python serve. What is computed is the operators' own, reached through PyTorch's dispatcher.
#include <ATen/ATen.h>
#include <ATen/PythonTorchFunctionTLS.h>
#include <ATen/autocast_mode.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/utils/pybind.h>

namespace fastpeft {

namespace py = pybind11;
using at::Tensor;
using torch::autograd::AutogradContext;
using torch::autograd::Function;
using torch::autograd::variable_list;
using Maybe = std::optional<Tensor>;
using MaybeList = c10::List<std::optional<Tensor>>;

template <class F>
auto find_op(const char* name) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<F>();
}

inline Tensor or_undefined(const Maybe& t) { return t ? *t : Tensor(); }
inline Maybe or_none(const Tensor& t) { return t.defined() ? Maybe(t) : std::nullopt; }
inline bool wants(const Maybe& t) { return t && t->requires_grad(); }
inline Tensor if_wanted(Tensor t, bool wanted) { return wanted ? std::move(t) : Tensor(); }

inline bool under_autocast(at::DeviceType device) { return device != at::kMeta && at::autocast::is_autocast_enabled(device); }

// A call's tensors as Python hands them over. `plain`: whether a Function in C++ sees all that Python's would: none is of
// a subclass, which may have a say, or has a forward-mode tangent; no mode is at work, and no autocast to cast for.
class Arguments {
 public:
  bool plain = at::GradMode::is_enabled() && !at::impl::torch_function_mode_enabled();
  bool needs_grad = false;

  Maybe operator()(py::handle object) {
    if (object.is_none()) return std::nullopt;
    if (!THPVariable_CheckExact(object.ptr())) {
      plain = false;
      return std::nullopt;
    }
    const Tensor& t = THPVariable_Unpack(object.ptr());
    plain = plain && !t._fw_grad(0).defined() && !under_autocast(t.device().type());
    needs_grad |= t.requires_grad();
    return t;
  }
};

// compute() while other threads may run Python.
template <class F>
auto released(F&& compute) {
  const py::gil_scoped_release release;
  return compute();
}

// Backward runs as forward did: without autocast.
class WithoutAutocast {
 public:
  explicit WithoutAutocast(at::DeviceType device) : device_(device), was_(under_autocast(device)) {
    if (was_) at::autocast::set_autocast_enabled(device_, false);
  }
  ~WithoutAutocast() {
    if (was_) at::autocast::set_autocast_enabled(device_, true);
  }
  WithoutAutocast(const WithoutAutocast&) = delete;
  WithoutAutocast& operator=(const WithoutAutocast&) = delete;

 private:
  at::DeviceType device_;
  bool was_;
};

// A gradient's own gradient is an error (fastpeft/ops/_autocast.py's _OnceOnly).
struct OnceOnly : Function<OnceOnly> {
  static variable_list forward(AutogradContext* ctx, const std::string& op, int64_t sources, at::TensorList tensors) {
    ctx->saved_data["op"] = op;
    variable_list grads;
    for (const Tensor& grad : tensors.slice(sources)) grads.push_back(grad.view_as(grad));
    return grads;
  }
  static variable_list backward(AutogradContext* ctx, const variable_list&) {
    TORCH_CHECK(
        false, "fastpeft: ", ctx->saved_data["op"].toStringRef(), " has no second derivative; call fastpeft.restore(model), or the op's ",
        "*_reference, where a gradient is differentiated again");
  }
};

// `grads` as they are, refusing to be differentiated; `sources` are what they were computed of.
inline variable_list once_only(const char* op, const variable_list& sources, const variable_list& grads) {
  variable_list tensors;
  for (const Tensor& t : sources)
    if (t.defined() && t.requires_grad()) tensors.push_back(t);
  const int64_t count = tensors.size();
  for (const Tensor& grad : grads)
    if (grad.defined()) tensors.push_back(grad.detach().requires_grad_());
  const variable_list live = OnceOnly::apply(std::string(op), count, at::TensorList(tensors));
  variable_list out;
  auto next = live.begin();
  for (const Tensor& grad : grads) out.push_back(grad.defined() ? *next++ : Tensor());
  return out;
}

// The gradients that `compute()` returns. Under create_graph=True they refuse to be differentiated: left alone they would look like
// constants, and second derivatives be silently wrong.
template <class F>
variable_list first_order(const char* op, const variable_list& dys, const variable_list& saved, F&& compute) {
  const auto dy = std::find_if(dys.begin(), dys.end(), [](const Tensor& t) { return t.defined(); });
  const WithoutAutocast outside(dy == dys.end() ? at::kCPU : dy->device().type());
  const auto computed = [&] {
    const at::AutoDispatchBelowADInplaceOrView below;
    return compute();
  };
  if (!at::GradMode::is_enabled()) return computed();
  variable_list grads;
  {
    const at::NoGradGuard no_grad;
    grads = computed();
  }
  variable_list sources = dys;
  sources.insert(sources.end(), saved.begin(), saved.end());
  return once_only(op, sources, grads);
}

}  // namespace fastpeft
