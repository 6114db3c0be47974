// CUDA twin of rotary.cpp: a thread per pair of channels.
#include "cuda.cuh"

namespace fastpeft::rotary {

template <class P, class A>
__device__ A table(const void* p, int64_t at) { return static_cast<A>(static_cast<const P*>(p)[at]); }

template <class T>
__global__ void rotary_kernel(
    const T* __restrict__ x, Walk x_at, const void* cos, const void* sin, bool wide, Walk table_at, T* __restrict__ y, Walk y_at,
    int64_t rows, int64_t n, int64_t rot, acc_t<T> sign) {
  using A = acc_t<T>;
  const int64_t half = rot / 2, width = half + (n - rot);  // pairs, then the channels that pass through
  const int64_t i = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  if (i >= rows * width) return;
  const int64_t r = i / width, j = i - r * width;
  const T* from = x + x_at(r);
  T* to = y + y_at(r);
  if (j >= half) {
    to[j + half] = from[j + half];
    return;
  }
  const int64_t at = table_at(r) + j;
  const A x1 = static_cast<A>(from[j]), x2 = static_cast<A>(from[j + half]);
  const A c1 = wide ? table<A, A>(cos, at) : table<T, A>(cos, at), c2 = wide ? table<A, A>(cos, at + half) : table<T, A>(cos, at + half);
  const A s1 = wide ? table<A, A>(sin, at) : table<T, A>(sin, at), s2 = wide ? table<A, A>(sin, at + half) : table<T, A>(sin, at + half);
  // forward: y1 = x1 c1 - x2 s1, y2 = x2 c2 + x1 s2; transposed: the sines change place and sign
  to[j] = static_cast<T>(x1 * c1 + sign * x2 * (sign < 0 ? s1 : s2));
  to[j + half] = static_cast<T>(x2 * c2 - sign * x1 * (sign < 0 ? s2 : s1));
}

Tensor apply_cuda(const Tensor& x, const Tensor& cos, const Tensor& sin, bool transpose) {
  const int64_t n = x.size(x.dim() - 1), rot = cos.size(cos.dim() - 1);
  STD_TORCH_CHECK(rot <= n && rot % 2 == 0, "rotary: tables wider than x");
  const bool unit = x.stride(x.dim() - 1) == 1;
  const Tensor in = unit ? x : torch::stable::contiguous(x);
  Tensor y = unit ? torch::stable::empty_like(x) : output_like(x);
  if (x.numel() == 0) return y;
  const Tensor c = torch::stable::contiguous(cos), s = torch::stable::contiguous(sin);
  const Launch launch(x);
  const int64_t rows = x.numel() / n, work = rows * (n - rot / 2);
  dispatch(x.scalar_type(), "rotary", [&](auto t) {
    using T = typename decltype(t)::type;
    rotary_kernel<T><<<unsigned((work + 255) / 256), 256, 0, launch.stream>>>(
        read<T>(in), Walk(x, in), c.const_data_ptr(), s.const_data_ptr(), c.scalar_type() != x.scalar_type(), Walk(x, c), write<T>(y),
        Walk(x, y), rows, n, rot, acc_t<T>(transpose ? 1 : -1));
  });
  check(cudaGetLastError());
  return y;
}

}  // namespace fastpeft::rotary

STABLE_TORCH_LIBRARY_IMPL(fastpeft, CUDA, m) { m.impl("rotary", TORCH_BOX(&fastpeft::rotary::apply_cuda)); }
