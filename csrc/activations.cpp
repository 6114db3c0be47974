// SwiGLU for CPU tensors (schemas and equations in fastpeft/ops/activations.py). GELU stays with ATen, whose vector erf is good.
#include <cmath>

#include "cpu.h"

namespace fastpeft::swiglu {

// exp without a library call, so that the loop vectorises; within 2 ulp. From 88.4 on it is inf: a gate of -1e38 needs a sigmoid of 0.
FASTPEFT_INLINE float exponential(float x) {
  x = std::min(std::max(x, -87.0f), 89.0f);
  const float shifted = x * 1.44269504f + 12582912.0f;  // 1.5 * 2^23: the integer part sits in the low bits
  const float k = shifted - 12582912.0f;
  const float r = (x - k * 0.693145752f) - k * 1.42860677e-6f;
  float p = 1.0f / 5040;
  p = p * r + 1.0f / 720;
  p = p * r + 1.0f / 120;
  p = p * r + 1.0f / 24;
  p = p * r + 1.0f / 6;
  p = p * r + 0.5f;
  p = p * r + 1.0f;
  p = p * r + 1.0f;
  return p * from_bits((bits(shifted) << 23) + (127u << 23));
}
FASTPEFT_INLINE double exponential(double x) { return std::exp(x); }
template <class A>
FASTPEFT_INLINE A sigmoid(A x) { return A(1) / (A(1) + exponential(-x)); }

template <class T>
struct Args {
  using A = acc_t<T>;
  const T *dy, *gate, *up;  // dy: null in forward; up: null where only dup is wanted
  int64_t dy_stride, gate_stride, up_stride, n;
  const A* scale;
  T *y, *dgate, *dup;  // null: not wanted
  A *dscale, *block;   // this part's sum and a block's, as in norm.h
};

template <class T>
FASTPEFT_INLINE void forward_rows(const Args<T>& a, int64_t begin, int64_t end) {
  const auto* __restrict scale = a.scale;
  for (int64_t r = begin; r < end; ++r) {
    const T *__restrict gate = a.gate + r * a.gate_stride, *__restrict up = a.up + r * a.up_stride;
    T* __restrict y = a.y + r * a.n;
#pragma omp simd
    for (int64_t j = 0; j < a.n; ++j) {
      const auto g = get(gate[j]);
      put(y + j, g * sigmoid(g) * get(up[j]) * scale[j]);
    }
  }
}

template <bool DGATE, bool DUP, bool DSCALE, class T>
FASTPEFT_INLINE void backward_row(const Args<T>& a, int64_t r) {
  const T *__restrict gate = a.gate + r * a.gate_stride, *__restrict dy = a.dy + r * a.dy_stride;
  const T* __restrict up = DGATE || DSCALE ? a.up + r * a.up_stride : nullptr;
  T *__restrict dgate = DGATE ? a.dgate + r * a.n : nullptr, *__restrict dup = DUP ? a.dup + r * a.n : nullptr;
  const auto* __restrict scale = a.scale;
  auto* __restrict sum = a.block;
#pragma omp simd
  for (int64_t j = 0; j < a.n; ++j) {
    const auto g = get(gate[j]), d = get(dy[j]), sigma = sigmoid(g), silu = g * sigma, da = d * scale[j];
    if (DUP) put(dup + j, da * silu);
    if (DGATE) put(dgate + j, da * get(up[j]) * (sigma * (1 + g * (1 - sigma))));
    if (DSCALE) sum[j] += d * silu * get(up[j]);
  }
}

template <class T>
FASTPEFT_INLINE void backward_rows(const Args<T>& a, int64_t begin, int64_t end) {
  for (int64_t block = begin; block < end; block += 64) {
    const int64_t stop = std::min(block + 64, end);
    if (a.dgate && a.dup && !a.dscale) {
      for (int64_t r = block; r < stop; ++r) backward_row<true, true, false>(a, r);
      continue;
    }
    for (int64_t r = block; r < stop; ++r) {  // the rarer subsets, an output at a time
      if (a.dgate) backward_row<true, false, false>(a, r);
      if (a.dup) backward_row<false, true, false>(a, r);
      if (a.dscale) backward_row<false, false, true>(a, r);
    }
    for (int64_t j = 0; a.dscale && j < a.n; ++j) a.dscale[j] += a.block[j], a.block[j] = 0;
  }
}
FASTPEFT_PER_DTYPE(fwd_rows, Args, forward_rows)
FASTPEFT_PER_DTYPE(bwd_rows, Args, backward_rows)

Tensor forward(const Tensor& gate, const Tensor& up, const Maybe& scale) {
  const Rows g = rows_of(gate), u = rows_of(up);
  Tensor y = output_like(gate);
  dispatch(gate.scalar_type(), "swiglu", [&](auto t) {
    using T = typename decltype(t)::type;
    const auto wide = widen<acc_t<T>>(scale, g.n, 1);
    const Args<T> a{nullptr, read<T>(g.own), read<T>(u.own), 0, g.stride, u.stride, g.n, wide.data(), write<T>(y), nullptr, nullptr,
                    nullptr, nullptr};
    parallel_rows(g.count, g.n, [&](int64_t begin, int64_t end) { fwd_rows(a, begin, end); });
  });
  return y;
}

std::tuple<Tensor, Tensor, Tensor> backward(
    const Tensor& dy, const Tensor& gate, const Maybe& up, const Maybe& scale, bool need_dgate, bool need_dup, bool need_dscale) {
  const Rows d = rows_of(dy), g = rows_of(gate), u = up ? rows_of(*up) : g;
  STD_TORCH_CHECK(d.count == g.count && d.n == g.n && u.count == g.count, "swiglu_bwd: shapes differ");
  STD_TORCH_CHECK(up || !(need_dgate || need_dscale), "swiglu_bwd: up was not kept");
  Tensor dgate = output_like(gate, need_dgate), dup = output_like(gate, need_dup);
  Tensor dscale = torch::stable::new_empty(scale ? *scale : gate, {need_dscale ? g.n : 0});
  dispatch(gate.scalar_type(), "swiglu", [&](auto t) {
    using T = typename decltype(t)::type;
    using A = acc_t<T>;
    const auto wide = widen<A>(scale, g.n, 1);
    const int64_t parts = row_parts(g.count, g.n);
    std::vector<A> sums(need_dscale ? parts * 2 * g.n : 0, A(0));
    parallel_parts(g.count, parts, [&](int64_t p, int64_t begin, int64_t end) {
      A* sum = need_dscale ? sums.data() + p * 2 * g.n : nullptr;
      const Args<T> a{read<T>(d.own), read<T>(g.own), up ? read<T>(u.own) : nullptr, d.stride, g.stride, u.stride, g.n, wide.data(),
                      nullptr, need_dgate ? write<T>(dgate) : nullptr, need_dup ? write<T>(dup) : nullptr, sum,
                      need_dscale ? sum + g.n : nullptr};
      bwd_rows(a, begin, end);
    });
    if (need_dscale) narrow_sum(sums.data(), parts, 2 * g.n, dscale);
  });
  return {dgate, dup, dscale};
}

}  // namespace fastpeft::swiglu

STABLE_TORCH_LIBRARY_IMPL(fastpeft, CPU, m) {
  m.impl("swiglu_fwd", TORCH_BOX(&fastpeft::swiglu::forward));
  m.impl("swiglu_bwd", TORCH_BOX(&fastpeft::swiglu::backward));
}
