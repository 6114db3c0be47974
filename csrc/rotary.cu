// CUDA twin of rotary.cpp: a thread per Pack of channels and its partner, or per Pack that passes through.
#include "cuda.cuh"

namespace fastpeft::rotary {

template <class T>
struct Args {
  const T* x;
  Param<T> cos, sin;
  T* y;
  Walk x_at, table_at, y_at;
  int64_t rows, n, rot;
  acc_t<T> sign;  // -1 forward, +1 transposed
};

template <int V, class I, class T>
__global__ void rotary_kernel(Args<T> a) {
  using A = acc_t<T>;
  using P = Pack<T, V>;
  const int64_t half = a.rot / 2;
  const I per_row = I((half + a.n - a.rot) / V), i = I(blockIdx.x) * blockDim.x + threadIdx.x;
  if (i >= I(a.rows) * per_row) return;
  const I r = i / per_row;
  const int64_t j = int64_t(i - r * per_row) * V;
  const T* from = a.x + a.x_at(r) + j;
  T* to = a.y + a.y_at(r) + j;
  if (j >= half) return P::load(from + half).store(to + half);
  const int64_t at = a.table_at(r) + j;
  P x1 = P::load(from), x2 = P::load(from + half);
  A c1[V], c2[V], s1[V], s2[V];
  a.cos.template load<V>(at, c1);
  a.cos.template load<V>(at + half, c2);
  a.sin.template load<V>(at, s1);
  a.sin.template load<V>(at + half, s2);
#pragma unroll
  for (int e = 0; e < V; ++e) {
    // forward: y1 = x1 c1 - x2 s1, y2 = x2 c2 + x1 s2; transposed: the sines change place and sign
    const A one = static_cast<A>(x1.v[e]), two = static_cast<A>(x2.v[e]);
    x1.v[e] = static_cast<T>(one * c1[e] + a.sign * two * (a.sign < 0 ? s1[e] : s2[e]));
    x2.v[e] = static_cast<T>(two * c2[e] - a.sign * one * (a.sign < 0 ? s2[e] : s1[e]));
  }
  x1.store(to);
  x2.store(to + half);
}

template <int V, class T>
void run(const Args<T>& a, const Launch& launch) {
  const int64_t threads = a.rows * (a.n - a.rot / 2) / V;
  auto kernel = threads < int64_t(1) << 31 ? rotary_kernel<V, uint32_t, T> : rotary_kernel<V, uint64_t, T>;
  launch(kernel, Grid{(threads + 255) / 256}, 256, a);
}

Tensor apply_cuda(const Tensor& x, const Tensor& cos, const Tensor& sin, bool transpose) {
  const int64_t n = x.size(x.dim() - 1), rot = cos.size(cos.dim() - 1);
  STD_TORCH_CHECK(rot <= n && rot % 2 == 0, "rotary: tables wider than x");
  const bool unit = x.stride(x.dim() - 1) == 1;
  const Tensor in = unit ? x : torch::stable::contiguous(x);
  Tensor y = unit ? torch::stable::empty_like(x) : output_like(x);
  if (x.numel() == 0) return y;
  Tensor c, s;
  const Launch launch(x, cos, sin);
  dispatch(x.scalar_type(), "rotary", [&](auto t) {
    using T = typename decltype(t)::type;
    constexpr int V = 16 / sizeof(T);
    const Param<T> cosine = param<T>(cos, c, x, 0), sine = param<T>(sin, s, x, 0);
    const Args<T> a{read<T>(in), cosine, sine, write<T>(y), Walk(x, in), Walk(x, c), Walk(x, y), x.numel() / n, n, rot,
                    acc_t<T>(transpose ? 1 : -1)};
    const bool whole = rot % (2 * V) == 0 && n % V == 0 && packs<T, V>(a.x, 0) && packs<T, V>(a.y, 0) && cosine.packs() && sine.packs() &&
                       a.x_at.strides_are_multiples_of(V) && a.y_at.strides_are_multiples_of(V);
    if (whole) run<V>(a, launch);
    else run<1>(a, launch);
  });
  return y;
}

}  // namespace fastpeft::rotary

STABLE_TORCH_LIBRARY_IMPL(fastpeft, FASTPEFT_CUDA_KEY, m) { m.impl("rotary", TORCH_BOX(&fastpeft::rotary::apply_cuda)); }
