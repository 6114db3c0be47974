#pragma once
// Shared by every row-wise op, on CPU and CUDA. LibTorch's stable ABI only (no ATen, no c10): one binary serves torch >= 2.10.
// Schemas, shapes and dtype rules live in fastpeft/ops/*.py; what is checked here guards memory, not users.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Exception.h>
#include <torch/headeronly/util/Half.h>

#include <algorithm>
#include <cstdint>
#include <functional>
#include <numeric>
#include <optional>
#include <tuple>
#include <type_traits>
#include <vector>

namespace fastpeft {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Maybe = std::optional<Tensor>;
using bf16 = torch::headeronly::BFloat16;
using half = torch::headeronly::Half;

// Statistics and sums: double for double, float for everything else.
template <class T>
using acc_t = std::conditional_t<std::is_same_v<T, double>, double, float>;

inline ScalarType acc_type(const Tensor& x) {
  return x.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

template <class T>
struct tag {
  using type = T;
};

// Calls f(tag<T>{}) for the element type; f is a generic lambda.
template <class F>
auto dispatch(ScalarType dtype, const char* op, F&& f) {
  switch (dtype) {
    case ScalarType::Double: return f(tag<double>{});
    case ScalarType::Float: return f(tag<float>{});
    case ScalarType::BFloat16: return f(tag<bf16>{});
    case ScalarType::Half: return f(tag<half>{});
    default: STD_TORCH_CHECK(false, op, ": float64, float32, bfloat16 or float16 expected");
  }
}

template <class T>
const T* read(const Tensor& t) { return static_cast<const T*>(t.const_data_ptr()); }
template <class T>
const T* read(const Maybe& t) { return t ? read<T>(*t) : nullptr; }
template <class T>
T* write(const Tensor& t) { return static_cast<T*>(t.mutable_data_ptr()); }

inline bool same_device(const Tensor& x, const Tensor& t) {
  int32_t type, other;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(x.get(), &type));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(t.get(), &other));
  return type == other && x.get_device_index() == t.get_device_index();
}
inline bool same_device(const Tensor& x, const Maybe& t) { return !t || same_device(x, *t); }

// A contiguous tensor on x's device, of x's dtype unless another is given. Allocated at once: torch::stable::new_empty looks the operator
// up by its name, which costs the host more than all else that a norm of a few rows does.
inline Tensor make_empty(const Tensor& x, torch::headeronly::IntHeaderOnlyArrayRef sizes, std::optional<ScalarType> dtype = std::nullopt) {
  std::vector<int64_t> strides(sizes.size());
  int64_t stride = 1;
  for (size_t i = sizes.size(); i-- > 0; stride *= std::max<int64_t>(sizes[i], 1)) strides[i] = stride;
  int32_t type, device, index;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(x.get(), &device));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(x.get(), &index));
  if (dtype) type = torch::stable::detail::to<int32_t>(torch::stable::detail::from(*dtype));
  else TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(x.get(), &type));
  AtenTensorHandle made;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(sizes.size(), sizes.data(), strides.data(), type, device, index, &made));
  return Tensor(made);
}

// An output of x's dtype and shape, contiguous; or of no element where it is not wanted.
inline Tensor output_like(const Tensor& x, bool wanted = true) {
  return wanted ? make_empty(x, x.sizes()) : make_empty(x, {0});
}

// x as rows of its last dimension: unit stride inside a row, one stride between rows. Views that are such rows are read in place
// (slices of a fused projection, broadcast rows); others are copied once. `own` keeps the copy alive.
struct Rows {
  Tensor own;
  int64_t count, n, stride;
};

inline int64_t row_count(const Tensor& x) {
  const int64_t n = x.size(x.dim() - 1);
  return n ? x.numel() / n : 0;
}

inline Rows rows_of(const Tensor& x) {
  const int64_t dim = x.dim(), n = x.size(dim - 1), count = row_count(x);
  if (x.is_contiguous()) return {x, count, n, n};
  bool ok = x.stride(dim - 1) == 1 || n == 1;
  int64_t stride = n, next = -1;  // next: the stride the dimension outside must have
  for (int64_t i = dim - 2; ok && i >= 0; --i) {
    if (x.size(i) == 1) continue;
    if (next < 0) stride = x.stride(i);
    else ok = x.stride(i) == next;
    next = x.stride(i) * x.size(i);
  }
  if (ok) return {x, count, n, stride};
  return {torch::stable::contiguous(x), count, n, n};
}

#ifdef __CUDACC__
#define FASTPEFT_BOTH __host__ __device__
#else
#define FASTPEFT_BOTH
#endif

// What rows are divided by: 32-bit ones by a multiplication, where a GPU's division takes some 20 instructions (Granlund, Montgomery,
// "Division by invariant integers using multiplication", 1994, figure 4.1).
struct Divisor {
  int64_t size = 1;
  uint32_t factor = 1, first = 0, then = 0;
  Divisor() = default;
  explicit Divisor(int64_t n) : size(n) {
    uint32_t bits = 0;
    while (bits < 32 && int64_t(1) << bits < n) ++bits;
    if (n > 0 && n <= int64_t(1) << 32) factor = uint32_t(((((uint64_t(1) << bits) - n) << 32) / n) + 1);
    first = std::min(bits, 1u), then = bits - first;
  }
  FASTPEFT_BOTH uint32_t under(uint32_t row) const {
    const uint32_t high = uint32_t((uint64_t(row) * factor) >> 32);
    return (high + ((row - high) >> first)) >> then;
  }
  template <class I>
  FASTPEFT_BOTH I under(I row) const { return row / I(size); }
};

// Where row r of a tensor begins, for a tensor that broadcasts against x: its leading dimensions walk with x's, size 1 stands still.
// `over(i)`: whether rows are counted along dimension i; along the others the walk stays at their beginning.
class Walk {
 public:
  Walk(const Tensor& x, const Tensor& t) : Walk(x, t, [](int64_t) { return true; }) {}
  template <class F>
  Walk(const Tensor& x, const Tensor& t, F over) {
    STD_TORCH_CHECK(x.dim() - 1 <= kMax && t.dim() <= x.dim(), "fastpeft: at most ", kMax + 1, " dimensions");
    const int64_t pad = x.dim() - t.dim();
    for (int64_t i = 0; i < x.dim() - 1; ++i) {
      const int64_t size = over(i) ? x.size(i) : 1, stride = i < pad || t.size(i - pad) == 1 ? 0 : t.stride(i - pad);
      if (size == 1) continue;
      if (dims_ && stride_[dims_ - 1] == size * stride) {  // one dimension with the one outside: a division less at every row
        size_[dims_ - 1] = Divisor(size_[dims_ - 1].size * size), stride_[dims_ - 1] = stride;
      } else {
        size_[dims_] = Divisor(size), stride_[dims_++] = stride;
      }
    }
  }
  // STRAIGHT: rows are known to lie one stride apart.
  template <bool STRAIGHT = false, class I>
  FASTPEFT_BOTH int64_t operator()(I row) const {  // I: uint32_t where rows fit
    int64_t offset = 0;
    for (int64_t i = dims_ - 1; !STRAIGHT && i > 0; --i) {
      const I q = size_[i].under(row);
      offset += int64_t(row - q * I(size_[i].size)) * stride_[i];
      row = q;
    }
    return offset + int64_t(row) * stride_[0];
  }
  bool straight() const { return dims_ <= 1; }
  int64_t rows() const {
    return std::accumulate(size_, size_ + dims_, int64_t(1), [](int64_t rows, const Divisor& d) { return rows * d.size; });
  }
  bool strides_are_multiples_of(int64_t n) const {
    return std::all_of(stride_, stride_ + dims_, [n](int64_t stride) { return stride % n == 0; });
  }

 private:
  static constexpr int64_t kMax = 7;
  int64_t dims_ = 0, stride_[kMax] = {};
  Divisor size_[kMax];
};

}  // namespace fastpeft
