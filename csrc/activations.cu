// SwiGLU and GELU with an optional (IA)^3 scale on CUDA (schemas and equations in fastpeft/ops/activations.py).
// A thread owns a column and walks rows: neighbouring threads read neighbouring addresses, and the sum for dscale stays in a register.
#include "cuda.cuh"

namespace fastpeft::cuda_activations {

template <class A>
__device__ A sigmoid(A x) { return A(1) / (A(1) + exp(-x)); }
template <class A>
__device__ A normal_cdf(A x) { return A(0.5) * (A(1) + erf(x * A(0.70710678118654752440))); }

constexpr double kBeta = 0.79788456080286535588, kKappa = 0.044715;  // sqrt(2 / pi), and the tanh form's cubic term

// a = act(g) [* u] and its derivative in g
template <class A>
__device__ A gelu(A g, bool tanh_form, A* slope) {
  if (!tanh_form) {
    const A cdf = normal_cdf(g);
    if (slope) *slope = cdf + g * A(0.39894228040143267794) * exp(A(-0.5) * g * g);
    return g * cdf;
  }
  const A inner = A(kBeta) * (g + A(kKappa) * g * g * g), t = tanh(inner);
  if (slope) *slope = A(0.5) * (1 + t) + A(0.5) * g * (1 - t * t) * A(kBeta) * (1 + 3 * A(kKappa) * g * g);
  return A(0.5) * g * (1 + t);
}
template <class A>
__device__ A silu(A g, A* slope) {
  const A sigma = sigmoid(g);
  if (slope) *slope = sigma * (1 + g * (1 - sigma));
  return g * sigma;
}

enum Kind { kSwiGLU, kGELU, kGELUTanh };
template <Kind KIND, class A>
__device__ A act(A g, A* slope) {
  if constexpr (KIND == kSwiGLU) return silu(g, slope);
  else return gelu(g, KIND == kGELUTanh, slope);
}

template <Kind KIND, class T>
__global__ void forward_kernel(
    const T* __restrict__ gate, int64_t gate_stride, const T* __restrict__ up, int64_t up_stride, int64_t rows, int64_t n, Param<T> scale,
    T* __restrict__ y) {
  using A = acc_t<T>;
  const int64_t j = int64_t(blockIdx.y) * blockDim.x + threadIdx.x;
  if (j >= n) return;
  const A factor = scale[j];
  for (int64_t r = blockIdx.x; r < rows; r += gridDim.x) {
    A a = act<KIND, A>(static_cast<A>(gate[r * gate_stride + j]), nullptr);
    if (up) a *= static_cast<A>(up[r * up_stride + j]);
    y[r * n + j] = static_cast<T>(a * factor);
  }
}

template <Kind KIND, class T>
__global__ void backward_kernel(
    const T* __restrict__ dy, int64_t dy_stride, const T* __restrict__ gate, int64_t gate_stride, const T* __restrict__ up,
    int64_t up_stride, int64_t rows, int64_t n, Param<T> scale, T* __restrict__ dgate, T* __restrict__ dup, acc_t<T>* __restrict__ part) {
  using A = acc_t<T>;
  const int64_t j = int64_t(blockIdx.y) * blockDim.x + threadIdx.x;
  if (j >= n) return;
  const A factor = scale[j];
  A sum = 0;
  for (int64_t r = blockIdx.x; r < rows; r += gridDim.x) {
    A slope;
    const A d = static_cast<A>(dy[r * dy_stride + j]), a = act<KIND, A>(static_cast<A>(gate[r * gate_stride + j]), &slope);
    const A u = up ? static_cast<A>(up[r * up_stride + j]) : A(1);
    sum += d * a * u;
    if (dgate) dgate[r * n + j] = static_cast<T>(d * factor * u * slope);
    if (dup) dup[r * n + j] = static_cast<T>(d * factor * a);
  }
  if (part) part[int64_t(blockIdx.x) * n + j] = sum;
}

template <Kind KIND>
Tensor run_forward(const Tensor& gate, const Maybe& up, const Maybe& scale) {
  const Rows g = rows_of(gate), u = up ? rows_of(*up) : g;
  Tensor y = output_like(gate), own;
  if (gate.numel() == 0) return y;
  const Launch launch(gate);
  const dim3 grid(unsigned(std::min<int64_t>(g.count, 65535)), unsigned((g.n + 255) / 256));
  dispatch(gate.scalar_type(), "activation", [&](auto t) {
    using T = typename decltype(t)::type;
    forward_kernel<KIND, T><<<grid, 256, 0, launch.stream>>>(
        read<T>(g.own), g.stride, up ? read<T>(u.own) : nullptr, u.stride, g.count, g.n, param<T>(scale, own, gate, 1), write<T>(y));
  });
  check(cudaGetLastError());
  return y;
}

template <Kind KIND>
std::tuple<Tensor, Tensor, Tensor> run_backward(
    const Tensor& dy, const Tensor& gate, const Maybe& up, const Maybe& scale, bool need_dgate, bool need_dup, bool need_dscale) {
  const Rows d = rows_of(dy), g = rows_of(gate), u = up ? rows_of(*up) : g;
  Tensor dgate = output_like(gate, need_dgate), dup = output_like(gate, need_dup), own;
  Tensor dscale = torch::stable::new_empty(scale ? *scale : gate, {need_dscale ? g.n : 0});
  if (gate.numel() == 0) {
    if (need_dscale) torch::stable::zero_(dscale);
    return {dgate, dup, dscale};
  }
  const Launch launch(gate);
  const int parts = int(std::min<int64_t>(g.count, need_dscale ? kParts : 65535));
  const dim3 grid(parts, unsigned((g.n + 255) / 256));
  dispatch(gate.scalar_type(), "activation", [&](auto t) {
    using T = typename decltype(t)::type;
    using A = acc_t<T>;
    Tensor part = torch::stable::new_empty(gate, {need_dscale ? parts * g.n : 0}, acc_type(gate));
    backward_kernel<KIND, T><<<grid, 256, 0, launch.stream>>>(
        read<T>(d.own), d.stride, read<T>(g.own), g.stride, up ? read<T>(u.own) : nullptr, u.stride, g.count, g.n,
        param<T>(scale, own, gate, 1), need_dgate ? write<T>(dgate) : nullptr, need_dup ? write<T>(dup) : nullptr,
        need_dscale ? write<A>(part) : nullptr);
    check(cudaGetLastError());
    sum_parts(read<A>(part), parts, g.n, dscale, launch.stream);
  });
  return {dgate, dup, dscale};
}

Tensor swiglu_forward(const Tensor& gate, const Tensor& up, const Maybe& scale) { return run_forward<kSwiGLU>(gate, up, scale); }
Tensor gelu_forward(const Tensor& x, const Maybe& scale, std::string approximate) {
  return approximate == "tanh" ? run_forward<kGELUTanh>(x, std::nullopt, scale) : run_forward<kGELU>(x, std::nullopt, scale);
}
std::tuple<Tensor, Tensor> gelu_backward(
    const Tensor& dy, const Tensor& x, const Maybe& scale, std::string approximate, bool need_dx, bool need_dscale) {
  auto run = approximate == "tanh" ? run_backward<kGELUTanh> : run_backward<kGELU>;
  auto [dx, none, dscale] = run(dy, x, std::nullopt, scale, need_dx, false, need_dscale);
  return {dx, dscale};
}

}  // namespace fastpeft::cuda_activations

STABLE_TORCH_LIBRARY_IMPL(fastpeft, CUDA, m) {
  m.impl("swiglu_fwd", TORCH_BOX(&fastpeft::cuda_activations::swiglu_forward));
  m.impl("swiglu_bwd", TORCH_BOX(&fastpeft::cuda_activations::run_backward<fastpeft::cuda_activations::kSwiGLU>));
  m.impl("gelu_fwd", TORCH_BOX(&fastpeft::cuda_activations::gelu_forward));
  m.impl("gelu_bwd", TORCH_BOX(&fastpeft::cuda_activations::gelu_backward));
}
