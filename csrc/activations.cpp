// SwiGLU, GEGLU, and GELU with an (IA)^3 scale, for CPU tensors (schemas and equations in fastpeft/ops/activations.py).
#include "exp.h"

namespace fastpeft::activations {

// Standard normal distribution function, and exp(-x^2 / 2) besides: the tail exp(-x^2 / 2) t P(t), t = 1 / (1 + x / 4), P fitted to a
// relative 1e-8 up to x = 13.5, so that GELU keeps its digits where 1 + erf has lost them.
FASTPEFT_INLINE float normal_cdf(float x, float* bell) {
  const float z = std::abs(x), t = 1.0f / (1.0f + 0.25f * z);
  float p = 1.65063304e-2f;
  p = p * t - 6.23418503e-2f;
  p = p * t + 5.04533325e-2f;
  p = p * t + 3.02492756e-2f;
  p = p * t + 1.09982192e-2f;
  p = p * t + 8.77039373e-2f;
  p = p * t + 7.15866040e-2f;
  p = p * t + 9.56167923e-2f;
  p = p * t + 9.94786355e-2f;
  p = p * t + 9.97487236e-2f;
  *bell = exponential(-0.5f * z * z);
  const float tail = *bell * t * p;
  return x < 0 ? tail : 1.0f - tail;
}
FASTPEFT_INLINE double normal_cdf(double x, double* bell) {
  *bell = std::exp(-0.5 * x * x);
  return 0.5 * std::erfc(-x * 0.70710678118654752440);
}

// The activation of g, and its slope.
struct SwiGLU {
  template <class A>
  static FASTPEFT_INLINE A of(A g, A* slope) {
    const A sigma = sigmoid(g);
    *slope = sigma * (1 + g * (1 - sigma));
    return g * sigma;
  }
};
struct GELU {
  template <class A>
  static FASTPEFT_INLINE A of(A g, A* slope) {
    A bell;
    const A cdf = normal_cdf(g, &bell);
    *slope = cdf + (bell > A(1e-37) ? g * A(0.39894228040143267794) * bell : A(0));
    return g * cdf;
  }
};
struct GELUTanh {  // (1 + tanh u) / 2 is the sigmoid of 2 u
  template <class A>
  static FASTPEFT_INLINE A of(A g, A* slope) {
    const A beta = A(1.59576912160573071176), kappa = A(0.044715);  // 2 sqrt(2 / pi)
    const A e = exponential(-beta * (g + kappa * g * g * g)), sigma = 1 / (1 + e), side = sigma * (e * sigma);  // 1 - sigma would cancel
    *slope = sigma + (side > A(1e-37) ? g * side * beta * (1 + 3 * kappa * g * g) : A(0));  // not where e is inf, or at its clamp
    return g * sigma;
  }
};

template <class T>
struct Args {
  using A = acc_t<T>;
  const T *dy, *gate, *up;  // dy: null in forward; up: null for GELU and where only dup is wanted
  int64_t dy_stride, gate_stride, up_stride, n;
  const A* scale;
  T *y, *dgate, *dup;  // null: not wanted
  A *dscale, *block;   // this part's sum and a block's, as in norm.h
};

template <class Act, bool UP, class T>
FASTPEFT_INLINE void forward_rows(const Args<T>& a, int64_t begin, int64_t end) {
  const auto* __restrict scale = a.scale;
  for (int64_t r = begin; r < end; ++r) {
    const T *__restrict gate = a.gate + r * a.gate_stride, *__restrict up = UP ? a.up + r * a.up_stride : nullptr;
    T* __restrict y = a.y + r * a.n;
    const auto at = [&](int64_t j) __attribute__((always_inline)) {
      acc_t<T> slope, value = Act::of(get(gate[j]), &slope);
      if (UP) value *= get(up[j]);
      return value * scale[j];
    };
    if constexpr (std::is_same_v<T, half>) {  // rounded in a loop of its own: in one, GCC finds no vectors, and it takes ten times as long
      float block[256];
      for (int64_t start = 0; start < a.n; start += 256) {
        const int64_t size = std::min<int64_t>(256, a.n - start);
#pragma omp simd
        for (int64_t j = 0; j < size; ++j) block[j] = at(start + j);
#pragma omp simd
        for (int64_t j = 0; j < size; ++j) put(y + start + j, block[j]);
      }
    } else {
#pragma omp simd
      for (int64_t j = 0; j < a.n; ++j) put(y + j, at(j));
    }
  }
}

template <class Act, bool UP, bool DGATE, bool DUP, bool DSCALE, class T>
FASTPEFT_INLINE void backward_row(const Args<T>& a, int64_t r) {
  const T *__restrict gate = a.gate + r * a.gate_stride, *__restrict dy = a.dy + r * a.dy_stride;
  const T* __restrict up = UP && (DGATE || DSCALE) ? a.up + r * a.up_stride : nullptr;
  T *__restrict dgate = DGATE ? a.dgate + r * a.n : nullptr, *__restrict dup = DUP ? a.dup + r * a.n : nullptr;
  const auto* __restrict scale = a.scale;
  auto* __restrict sum = a.block;
#pragma omp simd
  for (int64_t j = 0; j < a.n; ++j) {
    acc_t<T> slope;
    const acc_t<T> value = Act::of(get(gate[j]), &slope), d = get(dy[j]), u = UP && (DGATE || DSCALE) ? get(up[j]) : acc_t<T>(1);
    if (DUP) put(dup + j, d * scale[j] * value);
    if (DGATE) put(dgate + j, d * scale[j] * u * slope);
    if (DSCALE) sum[j] += d * value * u;
  }
}

// The sets of gradients a plan asks for in one pass each; rarer ones an output at a time.
template <class Act, bool UP, class T>
FASTPEFT_INLINE void backward_rows(const Args<T>& a, int64_t begin, int64_t end) {
  for (int64_t block = begin; block < end; block += 64) {
    for (int64_t r = block; r < std::min(block + 64, end); ++r) {
      if (a.dgate && !a.dup && !a.dscale) backward_row<Act, UP, true, false, false>(a, r);
      else if (UP && a.dgate && a.dup && !a.dscale) backward_row<Act, UP, true, true, false>(a, r);
      else if (!UP && a.dgate && a.dscale) backward_row<Act, UP, true, false, true>(a, r);
      else {
        if (a.dgate) backward_row<Act, UP, true, false, false>(a, r);
        if (UP && a.dup) backward_row<Act, UP, false, true, false>(a, r);
        if (a.dscale) backward_row<Act, UP, false, false, true>(a, r);
      }
    }
    for (int64_t j = 0; a.dscale && j < a.n; ++j) a.dscale[j] += a.block[j], a.block[j] = 0;
  }
}

FASTPEFT_PER_DTYPE(swiglu_fwd_rows, Args, (forward_rows<SwiGLU, true>))
FASTPEFT_PER_DTYPE(swiglu_bwd_rows, Args, (backward_rows<SwiGLU, true>))
FASTPEFT_PER_DTYPE(geglu_fwd_rows, Args, (forward_rows<GELU, true>))
FASTPEFT_PER_DTYPE(geglu_bwd_rows, Args, (backward_rows<GELU, true>))
FASTPEFT_PER_DTYPE(tanh_geglu_fwd_rows, Args, (forward_rows<GELUTanh, true>))
FASTPEFT_PER_DTYPE(tanh_geglu_bwd_rows, Args, (backward_rows<GELUTanh, true>))
FASTPEFT_PER_DTYPE(gelu_fwd_rows, Args, (forward_rows<GELU, false>))
FASTPEFT_PER_DTYPE(gelu_bwd_rows, Args, (backward_rows<GELU, false>))
FASTPEFT_PER_DTYPE(tanh_fwd_rows, Args, (forward_rows<GELUTanh, false>))
FASTPEFT_PER_DTYPE(tanh_bwd_rows, Args, (backward_rows<GELUTanh, false>))

enum Kind { kSwiGLU, kGELU, kGELUTanh };

Tensor run_forward(Kind kind, const Tensor& gate, const Maybe& up, const Maybe& scale) {
  const Rows g = rows_of(gate), u = up ? rows_of(*up) : g;
  Tensor y = output_like(gate);
  dispatch(gate.scalar_type(), "activation", [&](auto t) {
    using T = typename decltype(t)::type;
    const auto wide = widen<acc_t<T>>(scale, g.n, 1);
    const Args<T> a{nullptr, read<T>(g.own), up ? read<T>(u.own) : nullptr, 0, g.stride, u.stride, g.n, wide.data(), write<T>(y),
                    nullptr, nullptr, nullptr, nullptr};
    parallel_rows(g.count, g.n, [&](int64_t begin, int64_t end) {
      if (kind == kSwiGLU) swiglu_fwd_rows(a, begin, end);
      else if (up && kind == kGELU) geglu_fwd_rows(a, begin, end);
      else if (up) tanh_geglu_fwd_rows(a, begin, end);
      else if (kind == kGELU) gelu_fwd_rows(a, begin, end);
      else tanh_fwd_rows(a, begin, end);
    });
  });
  return y;
}

std::tuple<Tensor, Tensor, Tensor> run_backward(
    Kind kind, bool gated, const Tensor& dy, const Tensor& gate, const Maybe& up, const Maybe& scale, bool need_dgate, bool need_dup,
    bool need_dscale) {
  const Rows d = rows_of(dy), g = rows_of(gate), u = up ? rows_of(*up) : g;
  STD_TORCH_CHECK(d.count == g.count && d.n == g.n && u.count == g.count, "activation backward: shapes differ");
  STD_TORCH_CHECK(up || !gated || !(need_dgate || need_dscale), "activation backward: up was not kept");
  Tensor dgate = output_like(gate, need_dgate), dup = output_like(gate, need_dup);
  Tensor dscale = make_empty(scale ? *scale : gate, {need_dscale ? g.n : 0});
  dispatch(gate.scalar_type(), "activation", [&](auto t) {
    using T = typename decltype(t)::type;
    using A = acc_t<T>;
    const auto wide = widen<A>(scale, g.n, 1);
    const int64_t parts = row_parts(g.count, g.n);
    Aligned<A> sums(need_dscale ? parts * 2 * g.n : 0, A(0));
    parallel_parts(g.count, parts, [&](int64_t p, int64_t begin, int64_t end) {
      A* sum = need_dscale ? sums.data() + p * 2 * g.n : nullptr;
      const Args<T> a{read<T>(d.own), read<T>(g.own), up ? read<T>(u.own) : nullptr, d.stride, g.stride, u.stride, g.n, wide.data(),
                      nullptr, need_dgate ? write<T>(dgate) : nullptr, need_dup ? write<T>(dup) : nullptr, sum,
                      need_dscale ? sum + g.n : nullptr};
      if (kind == kSwiGLU) swiglu_bwd_rows(a, begin, end);
      else if (gated && kind == kGELU) geglu_bwd_rows(a, begin, end);
      else if (gated) tanh_geglu_bwd_rows(a, begin, end);
      else if (kind == kGELU) gelu_bwd_rows(a, begin, end);
      else tanh_bwd_rows(a, begin, end);
    });
    if (need_dscale) narrow_sum(sums.data(), parts, 2 * g.n, dscale);
  });
  return {dgate, dup, dscale};
}

Kind gelu_kind(const std::string& approximate) { return approximate == "tanh" ? kGELUTanh : kGELU; }

Tensor swiglu_forward(const Tensor& gate, const Tensor& up, const Maybe& scale) { return run_forward(kSwiGLU, gate, up, scale); }
Tensor gelu_forward(const Tensor& x, const Maybe& scale, std::string approximate) {
  return run_forward(gelu_kind(approximate), x, std::nullopt, scale);
}
std::tuple<Tensor, Tensor, Tensor> swiglu_backward(
    const Tensor& dy, const Tensor& gate, const Maybe& up, const Maybe& scale, bool need_dgate, bool need_dup, bool need_dscale) {
  return run_backward(kSwiGLU, true, dy, gate, up, scale, need_dgate, need_dup, need_dscale);
}
Tensor geglu_forward(const Tensor& gate, const Tensor& up, const Maybe& scale, std::string approximate) {
  return run_forward(gelu_kind(approximate), gate, up, scale);
}
std::tuple<Tensor, Tensor, Tensor> geglu_backward(
    const Tensor& dy, const Tensor& gate, const Maybe& up, const Maybe& scale, std::string approximate, bool need_dgate, bool need_dup,
    bool need_dscale) {
  return run_backward(gelu_kind(approximate), true, dy, gate, up, scale, need_dgate, need_dup, need_dscale);
}
std::tuple<Tensor, Tensor> gelu_backward(
    const Tensor& dy, const Tensor& x, const Maybe& scale, std::string approximate, bool need_dx, bool need_dscale) {
  auto [dx, none, dscale] = run_backward(gelu_kind(approximate), false, dy, x, std::nullopt, scale, need_dx, false, need_dscale);
  return {dx, dscale};
}

}  // namespace fastpeft::activations

STABLE_TORCH_LIBRARY_IMPL(fastpeft, CPU, m) {
  m.impl("swiglu_fwd", TORCH_BOX(&fastpeft::activations::swiglu_forward));
  m.impl("swiglu_bwd", TORCH_BOX(&fastpeft::activations::swiglu_backward));
  m.impl("geglu_fwd", TORCH_BOX(&fastpeft::activations::geglu_forward));
  m.impl("geglu_bwd", TORCH_BOX(&fastpeft::activations::geglu_backward));
  m.impl("gelu_fwd", TORCH_BOX(&fastpeft::activations::gelu_forward));
  m.impl("gelu_bwd", TORCH_BOX(&fastpeft::activations::gelu_backward));
}
