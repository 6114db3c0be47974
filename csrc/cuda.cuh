#pragma once
// CUDA side, without libtorch_cuda at link time: the current stream comes from a weak symbol, so that the library loads anywhere.
// Compiled for sm_80, sm_90, sm_100 and tested against the CPU twins where there is a GPU.
#include <cuda_runtime.h>

#include "common.h"
#include <torch/csrc/stable/accelerator.h>

extern "C" __attribute__((weak)) AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device_index, void** stream);

namespace fastpeft {

inline void check(cudaError_t error) {
  STD_TORCH_CHECK(error == cudaSuccess, "fastpeft: CUDA error: ", cudaGetErrorString(error));
}

// The device made current and its stream, for as long as this lives.
class Launch {
 public:
  explicit Launch(const Tensor& x) : guard_(x.get_device_index()) {
    STD_TORCH_CHECK(aoti_torch_get_current_cuda_stream != nullptr, "fastpeft: this build of torch has no CUDA");
    void* found = nullptr;
    STD_TORCH_CHECK(aoti_torch_get_current_cuda_stream(x.get_device_index(), &found) == 0, "fastpeft: no current CUDA stream");
    stream = static_cast<cudaStream_t>(found);
  }
  cudaStream_t stream;

 private:
  torch::stable::accelerator::DeviceGuard guard_;
};

// A parameter [n] in x's dtype or the accumulator's, or absent.
template <class T>
struct Param {
  const void* data;
  bool wide;
  acc_t<T> absent;
  __device__ acc_t<T> operator[](int64_t j) const {
    if (!data) return absent;
    return wide ? static_cast<const acc_t<T>*>(data)[j] : static_cast<acc_t<T>>(static_cast<const T*>(data)[j]);
  }
};

// `own` keeps a dense copy alive until the launches are queued.
template <class T>
Param<T> param(const Maybe& p, Tensor& own, const Tensor& x, double absent) {
  if (!p) return {nullptr, false, acc_t<T>(absent)};
  own = torch::stable::contiguous(*p);
  return {own.const_data_ptr(), own.scalar_type() != x.scalar_type(), acc_t<T>(absent)};
}

// Sum over a block of two values; every thread gets both.
template <class A>
struct Two {
  A a, b;
};
template <class A>
__device__ Two<A> block_sum(Two<A> v) {
  __shared__ Two<A> warps[32];
  for (int lane = 16; lane; lane >>= 1) {
    v.a += __shfl_xor_sync(~0u, v.a, lane);
    v.b += __shfl_xor_sync(~0u, v.b, lane);
  }
  if ((threadIdx.x & 31) == 0) warps[threadIdx.x >> 5] = v;
  __syncthreads();
  v = {0, 0};
  for (unsigned w = 0; w < blockDim.x >> 5; ++w) v.a += warps[w].a, v.b += warps[w].b;  // in order: deterministic
  __syncthreads();
  return v;
}

// out[j] = sum over parts of part[p][j], in order, in out's dtype.
template <class A, class P>
__global__ void sum_parts_kernel(const A* __restrict__ part, int parts, int64_t stride, int64_t n, P* __restrict__ out) {
  const int64_t j = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  if (j >= n) return;
  A sum = 0;
  for (int p = 0; p < parts; ++p) sum += part[p * stride + j];
  out[j] = static_cast<P>(sum);
}

template <class A>
void sum_parts(const A* part, int parts, int64_t stride, const Tensor& out, cudaStream_t stream) {
  const int64_t n = out.numel();
  if (n == 0) return;
  dispatch(out.scalar_type(), "parameter gradient", [&](auto t) {
    using P = typename decltype(t)::type;
    sum_parts_kernel<A, P><<<unsigned((n + 255) / 256), 256, 0, stream>>>(part, parts, stride, n, write<P>(out));
  });
  check(cudaGetLastError());
}

constexpr int kParts = 264;  // partial sums over rows: two blocks for each of 132 multiprocessors

}  // namespace fastpeft
