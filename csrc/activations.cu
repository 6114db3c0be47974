// SwiGLU and GELU with an optional (IA)^3 scale on CUDA (schemas and equations in fastpeft/ops/activations.py).
// A thread owns a Pack of columns and walks rows: the sums for dscale stay in its registers.
#include "cuda.cuh"

namespace fastpeft::cuda_activations {

// Each gives the activation of g, and its slope where that is asked for: the forms of activations.cpp, whose tails keep their digits.
// APPROXIMATE, for 16 bit: exp and division by the GPU's own instructions, within 2^-21 or so, and the normal distribution as on the CPU;
// erfc takes 952 instructions for 8 elements.
template <bool APPROXIMATE, class A>
__device__ A exponential(A x) {
  if constexpr (APPROXIMATE) return approximate_exp2(x * 1.44269504088896340736f);
  else return exp(x);
}
template <bool APPROXIMATE, class A>
__device__ A reciprocal(A x) {
  if constexpr (APPROXIMATE) return approximate_reciprocal(x);
  else return A(1) / x;
}

template <bool APPROXIMATE, class A>
__device__ A silu(A g, A* slope) {
  const A e = exponential<APPROXIMATE>(-g), sigma = reciprocal<APPROXIMATE>(A(1) + e);
  if (slope && APPROXIMATE) {
    const A side = sigma * (e * sigma);  // 1 - sigma, of an approximate quotient, times a gate of 1e38; nan where e is inf
    *slope = sigma + (side > A(1e-37) ? g * side : A(0));
  } else if (slope) {
    *slope = sigma * (1 + g * (1 - sigma));
  }
  return g * sigma;
}
template <bool APPROXIMATE, class A>
__device__ A gelu(A g, A* slope) {
  A cdf, bell;
  if constexpr (APPROXIMATE) {  // the tail exp(-g^2 / 2) t P(t), t = 1 / (1 + |g| / 4): see activations.cpp
    const float z = fabsf(g), t = reciprocal<true>(1.0f + 0.25f * z);
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
    bell = exponential<true>(-0.5f * z * z);
    const float tail = bell * t * p;
    cdf = g < 0 ? tail : 1.0f - tail;
  } else {
    cdf = A(0.5) * erfc(-g * A(0.70710678118654752440));
    if (slope) bell = exp(A(-0.5) * g * g);
  }
  if (slope) *slope = cdf + (bell > A(1e-37) ? g * A(0.39894228040143267794) * bell : A(0));
  return g * cdf;
}
template <bool APPROXIMATE, class A>
__device__ A gelu_tanh(A g, A* slope) {  // (1 + tanh u) / 2 is the sigmoid of 2 u
  const A beta = A(1.59576912160573071176), kappa = A(0.044715);  // 2 sqrt(2 / pi)
  const A e = exponential<APPROXIMATE>(-beta * (g + kappa * g * g * g)), sigma = reciprocal<APPROXIMATE>(A(1) + e);
  if (slope) {
    const A side = sigma * (e * sigma);  // 1 - sigma would cancel; nan where e is inf
    *slope = sigma + (side > A(1e-37) ? g * side * beta * (1 + 3 * kappa * g * g) : A(0));
  }
  return g * sigma;
}

enum Kind { kSwiGLU, kGELU, kGELUTanh };
template <Kind KIND, class T>
__device__ acc_t<T> act(acc_t<T> g, acc_t<T>* slope) {
  constexpr bool approximate = sizeof(T) == 2;
  if constexpr (KIND == kSwiGLU) return silu<approximate>(g, slope);
  else if constexpr (KIND == kGELU) return gelu<approximate>(g, slope);
  else return gelu_tanh<approximate>(g, slope);
}

template <class T>
struct Args {
  const T *dy, *gate, *up;  // up: null for GELU
  int64_t dy_stride, gate_stride, up_stride, rows, n;
  Param<T> scale;
  T *y, *dgate, *dup;  // null: not wanted
  acc_t<T>* part;      // [gridDim.x, n] sums of dscale; null: not wanted
  int64_t before = 0;  // columns of other launches
};

// The V columns of a thread.
template <int V, class T>
__device__ int64_t columns(const Args<T>& a) { return a.before + (int64_t(blockIdx.y) * blockDim.x + threadIdx.x) * V; }

constexpr int kAtOnce = 2;  // rows that a thread reads before it uses the first

template <Kind KIND, int V, int U, class T>
__global__ void forward_kernel(Args<T> a) {
  using A = acc_t<T>;
  using P = Pack<T, V>;
  const int64_t j = columns<V>(a);
  if (j >= a.n) return;
  A scale[V];
  a.scale.template load<V>(j, scale);
  for (int64_t first = int64_t(blockIdx.x) * U; first < a.rows; first += int64_t(gridDim.x) * U) {
    P gate[U], up[U];
#pragma unroll
    for (int u = 0; u < U; ++u) {
      const int64_t r = first + u;
      gate[u] = P::load_where(r < a.rows, a.gate + r * a.gate_stride + j);
      if (a.up) up[u] = P::load_where(r < a.rows, a.up + r * a.up_stride + j);
    }
#pragma unroll
    for (int u = 0; u < U; ++u) {
      A g[V], other[V];
      widen(gate[u], g);
      if (a.up) widen(up[u], other);
#pragma unroll
      for (int e = 0; e < V; ++e) {
        const A y = act<KIND, T>(g[e], nullptr) * scale[e];
        g[e] = a.up ? y * other[e] : y;
      }
      if (first + u < a.rows) store_as<T>(g, a.y + (first + u) * a.n + j);
    }
  }
}

template <Kind KIND, int V, int U, class T>
__global__ void backward_kernel(Args<T> a) {
  using A = acc_t<T>;
  using P = Pack<T, V>;
  const int64_t j = columns<V>(a);
  if (j >= a.n) return;
  A scale[V], sum[V] = {};
  a.scale.template load<V>(j, scale);
  for (int64_t first = int64_t(blockIdx.x) * U; first < a.rows; first += int64_t(gridDim.x) * U) {
    P dy[U], gate[U], up[U];
#pragma unroll
    for (int u = 0; u < U; ++u) {
      const int64_t r = first + u;
      dy[u] = P::load_where(r < a.rows, a.dy + r * a.dy_stride + j);
      gate[u] = P::load_where(r < a.rows, a.gate + r * a.gate_stride + j);
      if (a.up) up[u] = P::load_where(r < a.rows, a.up + r * a.up_stride + j);
    }
#pragma unroll
    for (int u = 0; u < U; ++u) {
      const int64_t r = first + u;
      if (r >= a.rows) continue;
      A d[V], g[V], other[V];
      widen(dy[u], d);
      widen(gate[u], g);
      if (a.up) widen(up[u], other);
#pragma unroll
      for (int e = 0; e < V; ++e) {
        A slope;
        const A y = act<KIND, T>(g[e], &slope), o = a.up ? other[e] : A(1);
        sum[e] += d[e] * y * o;
        g[e] = d[e] * scale[e] * o * slope;
        d[e] *= scale[e] * y;
      }
      if (a.dgate) store_as<T>(g, a.dgate + r * a.n + j);
      if (a.dup) store_as<T>(d, a.dup + r * a.n + j);
    }
  }
#pragma unroll
  for (int e = 0; e < V; ++e)
    if (a.part) a.part[int64_t(blockIdx.x) * a.n + j + e] = sum[e];
}

// kernel(std::integral_constant<int, V>) is the kernel for V columns a thread; `blocks` of rows.
template <class T, class F>
void run(Args<T> a, int64_t blocks, const Launch& launch, F&& kernel) {
  constexpr int V = 16 / sizeof(T);
  const bool whole = a.n % V == 0 && a.scale.packs() && packs<T, V>(a.dy, a.dy_stride) && packs<T, V>(a.gate, a.gate_stride) &&
                     packs<T, V>(a.up, a.up_stride);
  const int64_t threads = whole ? a.n / V : a.n;
  const unsigned block = unsigned(std::min<int64_t>(256, (threads + 31) / 32 * 32));
  const int64_t across = (threads + block - 1) / block;
  for (int64_t done = 0; done < across; done += kGridY) {
    const Grid grid{blocks, std::min(kGridY, across - done)};
    a.before = done * block * (whole ? V : 1);
    if (whole) launch(kernel(std::integral_constant<int, V>{}), grid, block, a);
    else launch(kernel(std::integral_constant<int, 1>{}), grid, block, a);
  }
}

template <Kind KIND>
Tensor run_forward(const Tensor& gate, const Maybe& up, const Maybe& scale) {
  const Rows g = rows_of(gate), u = up ? rows_of(*up) : g;
  Tensor y = output_like(gate), own;
  if (gate.numel() == 0) return y;
  STD_TORCH_CHECK(u.count == g.count && u.n == g.n, "activation: shapes differ");
  const Launch launch(gate, up, scale);
  dispatch(gate.scalar_type(), "activation", [&](auto t) {
    using T = typename decltype(t)::type;
    const Args<T> a{nullptr, read<T>(g.own), up ? read<T>(u.own) : nullptr, 0, g.stride, u.stride, g.count, g.n,
                    param<T>(scale, own, gate, 1, g.n), write<T>(y), nullptr, nullptr, nullptr};
    run(a, (g.count + kAtOnce - 1) / kAtOnce, launch, [](auto v) { return forward_kernel<KIND, decltype(v)::value, kAtOnce, T>; });
  });
  return y;
}

template <Kind KIND>
std::tuple<Tensor, Tensor, Tensor> run_backward(
    bool gated, const Tensor& dy, const Tensor& gate, const Maybe& up, const Maybe& scale, bool need_dgate, bool need_dup, bool need_dscale) {
  const Rows d = rows_of(dy), g = rows_of(gate), u = up ? rows_of(*up) : g;
  Tensor dgate = output_like(gate, need_dgate), dup = output_like(gate, need_dup), own;
  Tensor dscale = make_empty(scale ? *scale : gate, {need_dscale ? g.n : 0});
  if (gate.numel() == 0) {
    if (need_dscale) torch::stable::zero_(dscale);
    return {dgate, dup, dscale};
  }
  STD_TORCH_CHECK(d.count == g.count && d.n == g.n && u.count == g.count && u.n == g.n, "activation backward: shapes differ");
  STD_TORCH_CHECK(up || !gated || !(need_dgate || need_dscale), "activation backward: up was not kept");
  const Launch launch(gate, dy, up, scale);
  const int parts = int(std::min<int64_t>(g.count, kParts));
  dispatch(gate.scalar_type(), "activation", [&](auto t) {
    using T = typename decltype(t)::type;
    using A = acc_t<T>;
    const Tensor part = make_empty(gate, {need_dscale ? parts * g.n : 0}, acc_type(gate));
    const Args<T> a{read<T>(d.own), read<T>(g.own), up ? read<T>(u.own) : nullptr, d.stride, g.stride, u.stride, g.count, g.n,
                    param<T>(scale, own, gate, 1, g.n), nullptr, need_dgate ? write<T>(dgate) : nullptr,
                    need_dup ? write<T>(dup) : nullptr, need_dscale ? write<A>(part) : nullptr};
    run(a, need_dscale ? parts : (g.count + kAtOnce - 1) / kAtOnce, launch, [](auto v) { return backward_kernel<KIND, decltype(v)::value, kAtOnce, T>; });
    sum_parts(read<A>(part), parts, g.n, dscale, launch);
  });
  return {dgate, dup, dscale};
}

Tensor swiglu_forward(const Tensor& gate, const Tensor& up, const Maybe& scale) { return run_forward<kSwiGLU>(gate, up, scale); }
Tensor gelu_forward(const Tensor& x, const Maybe& scale, std::string approximate) {
  return approximate == "tanh" ? run_forward<kGELUTanh>(x, std::nullopt, scale) : run_forward<kGELU>(x, std::nullopt, scale);
}
Tensor geglu_forward(const Tensor& gate, const Tensor& up, const Maybe& scale, std::string approximate) {
  return approximate == "tanh" ? run_forward<kGELUTanh>(gate, up, scale) : run_forward<kGELU>(gate, up, scale);
}
std::tuple<Tensor, Tensor, Tensor> swiglu_backward(
    const Tensor& dy, const Tensor& gate, const Maybe& up, const Maybe& scale, bool need_dgate, bool need_dup, bool need_dscale) {
  return run_backward<kSwiGLU>(true, dy, gate, up, scale, need_dgate, need_dup, need_dscale);
}
std::tuple<Tensor, Tensor, Tensor> geglu_backward(
    const Tensor& dy, const Tensor& gate, const Maybe& up, const Maybe& scale, std::string approximate, bool need_dgate, bool need_dup,
    bool need_dscale) {
  auto run = approximate == "tanh" ? run_backward<kGELUTanh> : run_backward<kGELU>;
  return run(true, dy, gate, up, scale, need_dgate, need_dup, need_dscale);
}
std::tuple<Tensor, Tensor> gelu_backward(
    const Tensor& dy, const Tensor& x, const Maybe& scale, std::string approximate, bool need_dx, bool need_dscale) {
  auto run = approximate == "tanh" ? run_backward<kGELUTanh> : run_backward<kGELU>;
  auto [dx, none, dscale] = run(false, dy, x, std::nullopt, scale, need_dx, false, need_dscale);
  return {dx, dscale};
}

}  // namespace fastpeft::cuda_activations

STABLE_TORCH_LIBRARY_IMPL(fastpeft, FASTPEFT_CUDA_KEY, m) {
  m.impl("swiglu_fwd", TORCH_BOX(&fastpeft::cuda_activations::swiglu_forward));
  m.impl("swiglu_bwd", TORCH_BOX(&fastpeft::cuda_activations::swiglu_backward));
  m.impl("geglu_fwd", TORCH_BOX(&fastpeft::cuda_activations::geglu_forward));
  m.impl("geglu_bwd", TORCH_BOX(&fastpeft::cuda_activations::geglu_backward));
  m.impl("gelu_fwd", TORCH_BOX(&fastpeft::cuda_activations::gelu_forward));
  m.impl("gelu_bwd", TORCH_BOX(&fastpeft::cuda_activations::gelu_backward));
}
