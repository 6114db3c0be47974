#pragma once
// CUDA side, without libtorch_cuda at link time: the current stream comes from a weak symbol, so that the library loads anywhere.
// Compiled for sm_80, sm_90, sm_100; tested against the CPU twins where there is a GPU, and everywhere through tests/cuda/cuda_runtime.h,
// which runs these sources on a CPU (EMULATED).
//
// Every op here moves memory and computes little. To keep a GPU's memory busy, tensors are read 16 bytes a thread at a time (Pack), several
// such reads before the first is used.
#include <cuda_runtime.h>

#include "common.h"
#include <torch/csrc/stable/accelerator.h>

#ifdef FASTPEFT_EMULATED
#define FASTPEFT_CUDA_KEY CPU
#else
#define FASTPEFT_CUDA_KEY CUDA
extern "C" __attribute__((weak)) AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device_index, void** stream);
#endif

namespace fastpeft {

// x's device made current, for as long as this lives; called, it launches a kernel on the current stream.
#ifdef FASTPEFT_EMULATED
struct Launch {
  explicit Launch(const Tensor&) {}
  bool captured() const { return false; }
  template <class... P, class... Args>
  void operator()(void (*kernel)(P...), dim3 grid, unsigned threads, Args... args) const {
    emulated::run(grid, threads, [=] { kernel(args...); });
  }
};
#else
class Launch {
 public:
  explicit Launch(const Tensor& x) : guard_(x.get_device_index()) {
    STD_TORCH_CHECK(aoti_torch_get_current_cuda_stream != nullptr, "fastpeft: this build of torch has no CUDA");
    void* found = nullptr;
    STD_TORCH_CHECK(aoti_torch_get_current_cuda_stream(x.get_device_index(), &found) == 0, "fastpeft: no current CUDA stream");
    stream_ = static_cast<cudaStream_t>(found);
  }
  // Whether a CUDA graph records what is launched: host memory that is read now would be so for every replay.
  bool captured() const {
    cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
    return cudaStreamIsCapturing(stream_, &status) == cudaSuccess && status != cudaStreamCaptureStatusNone;
  }
  template <class... P, class... Args>
  void operator()(void (*kernel)(P...), dim3 grid, unsigned threads, Args... args) const {
    kernel<<<grid, threads, 0, stream_>>>(args...);
    const cudaError_t error = cudaGetLastError();
    STD_TORCH_CHECK(error == cudaSuccess, "fastpeft: CUDA error: ", cudaGetErrorString(error));
  }

 private:
  cudaStream_t stream_;
  torch::stable::accelerator::DeviceGuard guard_;
};
#endif

// Waits for `threads` threads of the block, whole warps, at its barrier `id`, 1 to 15.
__device__ inline void barrier(unsigned id, unsigned threads) {
#ifdef FASTPEFT_EMULATED
  emulated::wait(id, threads);
#else
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
#endif
}

// V neighbouring elements, in one instruction for each 16 bytes.
template <class T, int V>
struct alignas(sizeof(T) * V < 16 ? sizeof(T) * V : 16) Pack {
  T v[V];
  __device__ static Pack load(const T* from) { return *reinterpret_cast<const Pack*>(from); }
  __device__ void store(T* to) const {
#ifndef FASTPEFT_EMULATED
    if constexpr (sizeof(Pack) == 16) {  // said to the assembler: left to itself, nvcc writes 16-bit Packs in four or eight pieces
      uint32_t w[4];
      memcpy(w, v, 16);
      asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(to), "r"(w[0]), "r"(w[1]), "r"(w[2]), "r"(w[3]) : "memory");
      return;
    }
#endif
    *reinterpret_cast<Pack*>(to) = *this;
  }
};

// Whether every row of these begins where a Pack of V elements can: else kernels go one element at a time.
template <class T, int V>
bool packs(const T* p, int64_t stride) { return reinterpret_cast<uintptr_t>(p) % 16 == 0 && stride % V == 0; }

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
  template <int V>
  __device__ void load(int64_t j, acc_t<T> (&out)[V]) const {
    if (data && wide) {
      const auto p = Pack<acc_t<T>, V>::load(static_cast<const acc_t<T>*>(data) + j);
#pragma unroll
      for (int i = 0; i < V; ++i) out[i] = p.v[i];
    } else if (data) {
      const auto p = Pack<T, V>::load(static_cast<const T*>(data) + j);
#pragma unroll
      for (int i = 0; i < V; ++i) out[i] = static_cast<acc_t<T>>(p.v[i]);
    } else {
#pragma unroll
      for (int i = 0; i < V; ++i) out[i] = absent;
    }
  }
  bool packs() const { return reinterpret_cast<uintptr_t>(data) % 16 == 0; }
};

// `own` keeps a dense copy alive until the launches are queued.
template <class T>
Param<T> param(const Maybe& p, Tensor& own, const Tensor& x, double absent) {
  if (!p) return {nullptr, false, acc_t<T>(absent)};
  own = torch::stable::contiguous(*p);
  return {own.const_data_ptr(), own.scalar_type() != x.scalar_type(), acc_t<T>(absent)};
}

// The threads of a block that share a row: whole warps; a block has several such groups.
struct Group {
  unsigned size, index, lane, count;
  __device__ explicit Group(unsigned size)
      : size(size), index(threadIdx.x / size), lane(threadIdx.x % size), count(blockDim.x / size) {}
};

// Sum over a group of two values; every thread gets both. In a fixed order: deterministic.
template <class A>
struct Two {
  A a, b;
};
template <class A>
__device__ Two<A> group_sum(Two<A> v, const Group& group) {
#pragma unroll
  for (int lane = 16; lane; lane >>= 1) {
    v.a += __shfl_xor_sync(~0u, v.a, lane);
    v.b += __shfl_xor_sync(~0u, v.b, lane);
  }
  if (group.size == 32) return v;
  __shared__ Two<A> warps[32];
  if ((threadIdx.x & 31) == 0) warps[threadIdx.x >> 5] = v;
  barrier(1 + group.index, group.size);
  v = {0, 0};
  for (unsigned w = 0, first = group.index * (group.size >> 5); w < group.size >> 5; ++w) v.a += warps[first + w].a, v.b += warps[first + w].b;
  barrier(1 + group.index, group.size);  // before the next row's sums lie here
  return v;
}

// first[j] = sum over parts of part[p][j] and, in the same launch, second[j] that of part[p][n + j]; either may be null: not wanted. In a
// fixed order, in their dtype. A block owns 32 columns of one of the two; each of its warps adds up every 16th part, so that many reads are
// under way, and the first warp adds their sums.
template <class A, class P>
__global__ void sum_parts_kernel(
    const A* __restrict__ part, int parts, int64_t stride, int64_t n, P* __restrict__ first, P* __restrict__ second) {
  __shared__ A sums[16][32];
  P* out = blockIdx.y ? second : first;
  if (!out) return;
  part += blockIdx.y * n;
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
  const int64_t j = int64_t(blockIdx.x) * 32 + lane;
  A sum = 0;
  if (j < n) {
#pragma unroll 4
    for (int p = warp; p < parts; p += 16) sum += part[p * stride + j];
  }
  sums[warp][lane] = sum;
  __syncthreads();
  if (warp > 0 || j >= n) return;
  for (int w = 1; w < 16; ++w) sum += sums[w][lane];
  out[j] = static_cast<P>(sum);
}

// Parts lie `stride` elements apart: of each the first n go into `first`, the next n into `second`, which has first's dtype. Empty ones are
// not wanted.
template <class A>
void sum_parts(const A* part, int parts, int64_t stride, const Tensor& first, const Launch& launch, const Tensor* second = nullptr) {
  const bool both = second && second->numel();
  const int64_t n = both ? second->numel() : first.numel();
  if (n == 0) return;
  dispatch(first.scalar_type(), "parameter gradient", [&](auto t) {
    using P = typename decltype(t)::type;
    const dim3 grid(unsigned((n + 31) / 32), both ? 2 : 1);
    P *into = first.numel() ? write<P>(first) : nullptr, *then = both ? write<P>(*second) : nullptr;
    launch(sum_parts_kernel<A, P>, grid, 512, part, parts, stride, n, into, then);
  });
}

constexpr int kParts = 264;  // partial sums over rows: two blocks for each of 132 multiprocessors

}  // namespace fastpeft
