// Rotary position embedding for CPU tensors (schema and equations in fastpeft/ops/rotary.py).
#include "cpu.h"

namespace fastpeft::rotary {

template <class T>
struct Args {
  const T* x;
  const acc_t<T> *cos, *sin;
  T* y;
  Walk x_at, table_at, y_at;
  int64_t n, rot;
  acc_t<T> sign;  // -1 forward, +1 transposed
};

template <class T>
FASTPEFT_INLINE void loop(const Args<T>& a, int64_t begin, int64_t end) {
  const int64_t half = a.rot / 2;
  const auto sign = a.sign;
  for (int64_t r = begin; r < end; ++r) {
    const T *__restrict x1 = a.x + a.x_at(r), *__restrict x2 = x1 + half;
    const auto *__restrict c1 = a.cos + a.table_at(r), *__restrict s1 = a.sin + a.table_at(r);
    T *__restrict y1 = a.y + a.y_at(r), *__restrict y2 = y1 + half;
    const auto *__restrict c2 = c1 + half, *__restrict s2 = s1 + half;
    if (sign < 0) {
#pragma omp simd
      for (int64_t j = 0; j < half; ++j) {
        put(y1 + j, get(x1[j]) * c1[j] - get(x2[j]) * s1[j]);
        put(y2 + j, get(x2[j]) * c2[j] + get(x1[j]) * s2[j]);
      }
    } else {
#pragma omp simd
      for (int64_t j = 0; j < half; ++j) {
        put(y1 + j, get(x1[j]) * c1[j] + get(x2[j]) * s2[j]);
        put(y2 + j, get(x2[j]) * c2[j] - get(x1[j]) * s1[j]);
      }
    }
    for (int64_t j = a.rot; j < a.n; ++j) y1[j] = x1[j];
  }
}
FASTPEFT_PER_DTYPE(rows, Args, loop)

Tensor apply(const Tensor& x, const Tensor& cos, const Tensor& sin, bool transpose) {
  const int64_t n = x.size(x.dim() - 1), rot = cos.size(cos.dim() - 1);
  STD_TORCH_CHECK(rot <= n && rot % 2 == 0, "rotary: tables wider than x");
  const bool unit = x.stride(x.dim() - 1) == 1;
  const Tensor in = unit ? x : torch::stable::contiguous(x);
  Tensor y = unit ? torch::stable::empty_like(x) : output_like(x);
  if (x.numel() == 0) return y;
  const Tensor c = torch::stable::contiguous(cos), s = torch::stable::contiguous(sin);
  dispatch(x.scalar_type(), "rotary", [&](auto t) {
    using T = typename decltype(t)::type;
    using A = acc_t<T>;
    const auto wide_c = widen<A>(c, c.numel(), 0), wide_s = widen<A>(s, s.numel(), 0);
    const Args<T> a{read<T>(in), wide_c.data(), wide_s.data(), write<T>(y), Walk(x, in), Walk(x, c), Walk(x, y), n, rot,
                    A(transpose ? 1 : -1)};
    parallel_rows(x.numel() / n, n, [&](int64_t begin, int64_t end) { rows(a, begin, end); });
  });
  return y;
}

}  // namespace fastpeft::rotary

STABLE_TORCH_LIBRARY_IMPL(fastpeft, CPU, m) { m.impl("rotary", TORCH_BOX(&fastpeft::rotary::apply)); }
