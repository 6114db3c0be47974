#pragma once
// CUDA side, without libtorch_cuda at link time: the current stream comes from a weak symbol, so that the library loads anywhere.
// Compiled for sm_80, sm_90, sm_100; tested against the CPU twins where there is a GPU, and everywhere through tests/cuda/cuda_runtime.h,
// which runs these sources on a CPU (EMULATED).
//
// Every op here moves memory and computes little. To keep a GPU's memory busy, tensors are read 16 bytes a thread at a time (Pack), several
// such reads before the first is used.
#include <cuda_runtime.h>

#include <map>
#include <mutex>

#include "common.h"
#include <torch/csrc/stable/accelerator.h>

#ifdef FASTPEFT_EMULATED
#define FASTPEFT_CUDA_KEY CPU
#else
#define FASTPEFT_CUDA_KEY CUDA
extern "C" __attribute__((weak)) AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device_index, void** stream);
#endif

namespace fastpeft {

// Blocks of a launch. `y` is kGridY at most, so few in tests on a CPU that they exceed it.
#ifdef FASTPEFT_EMULATED
constexpr int64_t kGridY = 7;
#else
constexpr int64_t kGridY = 65535;
#endif
struct Grid {
  int64_t x, y = 1;
};

// x's device made current, for as long as this lives; called, it launches a kernel on the current stream. All tensors must lie there: a
// kernel that reads the host's memory, or another card's, ends CUDA for the whole process.
class Launch {
 public:
  template <class... Others>
  explicit Launch(const Tensor& x, const Others&... others) : Launch(x) {
    STD_TORCH_CHECK((same_device(x, others) && ...), "fastpeft: tensors of one call lie on several devices; move them to the first one's");
  }
#ifdef FASTPEFT_EMULATED
  explicit Launch(const Tensor& x) : device_(x.get_device_index()) {}
#else
  explicit Launch(const Tensor& x) : device_(x.get_device_index()), guard_(device_) {
    STD_TORCH_CHECK(aoti_torch_get_current_cuda_stream != nullptr, "fastpeft: this build of torch has no CUDA");
    void* found = nullptr;
    STD_TORCH_CHECK(aoti_torch_get_current_cuda_stream(device_, &found) == 0, "fastpeft: no current CUDA stream");
    stream_ = static_cast<cudaStream_t>(found);
  }
#endif
  // Whether a CUDA graph records what is launched: host memory that is read now would be so for every replay.
  bool captured() const {
    cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
    return cudaStreamIsCapturing(stream_, &status) == cudaSuccess && status != cudaStreamCaptureStatusNone;
  }
  template <class... P, class... Args>
  void operator()(void (*kernel)(P...), Grid grid, unsigned threads, Args... args) const {
    with_shared(0, kernel, grid, threads, args...);
  }
  // With so many bytes of dynamic_shared().
  template <class... P, class... Args>
  void with_shared(unsigned bytes, void (*kernel)(P...), Grid grid, unsigned threads, Args... args) const {
    STD_TORCH_CHECK(grid.x < int64_t(1) << 31 && grid.y <= kGridY, "fastpeft: a tensor of more rows than one launch takes: call it on parts");
    allow(kernel, bytes);
    const dim3 blocks(unsigned(grid.x), unsigned(grid.y));
#ifdef FASTPEFT_EMULATED
    emulated::launch(kernel, blocks, threads, bytes, args...);
#else
    kernel<<<blocks, threads, bytes, stream_>>>(args...);
#endif
    check(cudaGetLastError());
  }
  int multiprocessors() const {
    return asked_once(device_, [&] {
      int count;
      check(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device_));
      return count;
    });
  }
  // Blocks that run at the same time on a multiprocessor.
  template <class Kernel>
  int resident(Kernel kernel, unsigned threads, unsigned bytes) const {
    return asked_once(std::tuple(kernel, device_, threads, bytes), [&] {
      int blocks;
      allow(kernel, bytes);
      check(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, kernel, int(threads), bytes));
      return std::max(blocks, 1);
    });
  }

 private:
  static constexpr unsigned kShared = 32 << 10;  // 48 KB need no asking, those that a kernel declares among them
  static void check(cudaError_t error) { STD_TORCH_CHECK(error == cudaSuccess, "fastpeft: CUDA error: ", cudaGetErrorString(error)); }

  // ask(), whose answer stays: it takes the host some microseconds.
  template <class Key, class F>
  static int asked_once(const Key& key, F&& ask) {
    static std::mutex mutex;
    static std::map<Key, int> answers;
    const std::lock_guard<std::mutex> lock(mutex);
    const auto found = answers.find(key);
    return found != answers.end() ? found->second : answers[key] = ask();
  }
  // So much dynamic shared memory to a kernel on this device, or what it was allowed before where that is more.
  template <class Kernel>
  void allow(Kernel kernel, unsigned bytes) const {
    if (bytes <= kShared) return;
    static std::mutex mutex;
    static std::map<std::tuple<Kernel, int32_t>, unsigned> allowed;
    const std::lock_guard<std::mutex> lock(mutex);
    unsigned& most = allowed[{kernel, device_}];
    if (bytes <= most) return;
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(bytes)));
    most = bytes;
  }

  const int32_t device_;
  cudaStream_t stream_ = nullptr;
#ifndef FASTPEFT_EMULATED
  torch::stable::accelerator::DeviceGuard guard_;
#endif
};

// Waits for `threads` threads of the block, whole warps, at its barrier `id`, 1 to 15.
__device__ inline void barrier(unsigned id, unsigned threads) {
#ifdef FASTPEFT_EMULATED
  emulated::wait(id, threads);
#else
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
#endif
}

// The block's shared memory whose size its launch gives.
__device__ inline char* dynamic_shared() {
#ifdef FASTPEFT_EMULATED
  return emulated::dynamic();
#else
  extern __shared__ __align__(16) char dynamic[];
  return dynamic;
#endif
}

// 16 bytes on their way from memory into shared memory, without registers; zeros where they are not wanted. A thread's copies form groups:
// close_copies() ends one, await_copies<N>() waits until at most the N youngest of its own are still under way.
__device__ inline void copy_async(void* to, const void* from, bool wanted) {
#ifdef FASTPEFT_EMULATED
  emulated::copy_async(to, from, wanted);
#else
  const unsigned at = unsigned(__cvta_generic_to_shared(to));
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(at), "l"(from), "r"(wanted ? 16 : 0) : "memory");
#endif
}
__device__ inline void close_copies() {
#ifdef FASTPEFT_EMULATED
  emulated::close_copies();
#else
  asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}
template <int N>
__device__ inline void await_copies() {
#ifdef FASTPEFT_EMULATED
  emulated::await_copies(N);
#else
  asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
#endif
}

// 2^x and 1 / x by the GPU's own instructions, within 2^-22 or so; what would be below float32's normal numbers is zero.
__device__ inline float approximate_exp2(float x) {
#ifdef FASTPEFT_EMULATED
  return emulated::flushed(exp2f(x) * (1.0f + 0x1p-21f));
#else
  asm("ex2.approx.ftz.f32 %0, %0;" : "+f"(x));
  return x;
#endif
}
__device__ inline float approximate_reciprocal(float x) {
#ifdef FASTPEFT_EMULATED
  return emulated::flushed(1.0f / emulated::flushed(x) * (1.0f - 0x1p-22f));
#else
  asm("rcp.approx.ftz.f32 %0, %0;" : "+f"(x));
  return x;
#endif
}

// V neighbouring elements, in one instruction for each 16 bytes.
template <class T, int V>
struct alignas(sizeof(T) * V < 16 ? sizeof(T) * V : 16) Pack {
  T v[V];
  __device__ static Pack load(const T* from) { return *reinterpret_cast<const Pack*>(from); }
  // Zeros where it is not wanted. In words and by one predicated instruction: of a Pack that is read in a branch, nvcc merges 16-bit elements
  // with the zeros one by one. ONCE: nobody reads it again and no kernel writes it meanwhile; it leaves the first-level cache to parameters.
  template <bool ONCE = false>
  __device__ static Pack load_where(bool wanted, const T* from) {
#ifndef FASTPEFT_EMULATED
    if constexpr (sizeof(Pack) == 16) {
      uint32_t w[4];
      if constexpr (ONCE)
        asm volatile(
            "{.reg .pred p; setp.ne.u32 p, %5, 0; mov.b32 %0, 0; mov.b32 %1, 0; mov.b32 %2, 0; mov.b32 %3, 0;"
            "@p ld.global.nc.L1::no_allocate.v4.b32 {%0, %1, %2, %3}, [%4];}"
            : "=r"(w[0]), "=r"(w[1]), "=r"(w[2]), "=r"(w[3]) : "l"(from), "r"(unsigned(wanted)));
      else
        asm volatile(
            "{.reg .pred p; setp.ne.u32 p, %5, 0; mov.b32 %0, 0; mov.b32 %1, 0; mov.b32 %2, 0; mov.b32 %3, 0;"
            "@p ld.global.v4.b32 {%0, %1, %2, %3}, [%4];}"
            : "=r"(w[0]), "=r"(w[1]), "=r"(w[2]), "=r"(w[3]) : "l"(from), "r"(unsigned(wanted)) : "memory");
      Pack p;
      memcpy(p.v, w, 16);
      return p;
    }
#endif
    return wanted ? load(from) : Pack{};
  }
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
  // From here on the compiler keeps the elements as they are in registers, not what was computed from them: 16-bit ones take half the room.
  __device__ void keep() {
#ifndef FASTPEFT_EMULATED
    static_assert(sizeof(Pack) == 16);
    uint32_t w[4];
    memcpy(w, v, 16);
    asm volatile("" : "+r"(w[0]), "+r"(w[1]), "+r"(w[2]), "+r"(w[3]));
    memcpy(v, w, 16);
#endif
  }
};

// V values, 16 bytes at a time.
template <int V, class A>
__device__ inline void store(const A (&v)[V], A* to) {
  constexpr int each = 16 / sizeof(A);
#pragma unroll
  for (int i = 0; i < V; i += each) {
    Pack<A, each> some;
#pragma unroll
    for (int e = 0; e < each; ++e) some.v[e] = v[i + e];
    *reinterpret_cast<Pack<A, each>*>(to + i) = some;
  }
}

// V accumulators rounded to T, in one instruction for each 16 bytes.
template <class T, int V>
__device__ inline void store_as(const acc_t<T> (&v)[V], T* to) {
  Pack<T, V> out;
#pragma unroll
  for (int e = 0; e < V; ++e) out.v[e] = static_cast<T>(v[e]);
  out.store(to);
}

// A Pack's elements in the accumulator's type. Of bfloat16 both halves of a word in one instruction each: nvcc takes two for the upper one.
template <class T, int V>
__device__ inline void widen(const Pack<T, V>& p, acc_t<T> (&out)[V]) {
#ifdef FASTPEFT_EMULATED
  constexpr bool words = false;
#else
  constexpr bool words = std::is_same_v<T, bf16> && V % 2 == 0;
#endif
  if constexpr (words) {
    uint32_t w[V / 2];
    memcpy(w, p.v, sizeof w);
#pragma unroll
    for (int i = 0; i < V / 2; ++i) {
      const uint32_t halves[2] = {w[i] << 16, w[i] & 0xffff0000u};
      memcpy(out + 2 * i, halves, 8);
    }
  } else {
#pragma unroll
    for (int e = 0; e < V; ++e) out[e] = static_cast<acc_t<T>>(p.v[e]);
  }
}

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
      widen(Pack<T, V>::load(static_cast<const T*>(data) + j), out);
    } else {
#pragma unroll
      for (int i = 0; i < V; ++i) out[i] = absent;
    }
  }
  bool packs() const { return reinterpret_cast<uintptr_t>(data) % 16 == 0; }
};

// `own` keeps a dense copy alive until the launches are queued. `n`: the elements it must have, where that is known.
template <class T>
Param<T> param(const Maybe& p, Tensor& own, const Tensor& x, double absent, int64_t n = -1) {
  if (!p) return {nullptr, false, acc_t<T>(absent)};
  own = torch::stable::contiguous(*p);
  STD_TORCH_CHECK(n < 0 || own.numel() == n, "fastpeft: parameter of the wrong size");
  return {own.const_data_ptr(), own.scalar_type() != x.scalar_type(), acc_t<T>(absent)};
}

// The threads of a block that share a row: whole warps; a block has several such groups. The usual ones without a division, which would
// take some 100 cycles before the first read is asked for.
struct Group {
  unsigned size, index, lane, count;
  __device__ explicit Group(unsigned size) : size(size), index(0), lane(threadIdx.x), count(1) {
    if (size == blockDim.x) return;
    if (size == 32) index = threadIdx.x >> 5, lane = threadIdx.x & 31, count = blockDim.x >> 5;
    else index = threadIdx.x / size, lane = threadIdx.x % size, count = blockDim.x / size;
  }
};

template <class A>
struct Two {
  A a, b;
  __device__ Two& operator+=(const Two& other) { return a += other.a, b += other.b, *this; }
};
template <class A>
__device__ inline A from_lane(A v, int xor_) { return __shfl_xor_sync(~0u, v, xor_); }
template <class A>
__device__ inline Two<A> from_lane(Two<A> v, int xor_) { return {from_lane(v.a, xor_), from_lane(v.b, xor_)}; }

// Sum over a group, of a number or Two; every thread gets it. In a fixed order: deterministic. `slot`, 0 or 1: another one at the next sum,
// which then waits for nobody who still reads this one's parts.
template <class V>
__device__ inline V group_sum(V v, const Group& group, unsigned slot) {
#pragma unroll
  for (int lane = 16; lane; lane >>= 1) v += from_lane(v, lane);
  if (group.size == 32) return v;
  __shared__ V warps[2][32];
  if ((threadIdx.x & 31) == 0) warps[slot][threadIdx.x >> 5] = v;
  barrier(1 + group.index, group.size);
  const V* mine = warps[slot] + group.index * (group.size >> 5);
  v = mine[0];
#pragma unroll 4
  for (unsigned w = 1; w < group.size >> 5; ++w) v += mine[w];
  return v;
}

// Sum of a thread's V values, in log2 V steps that wait for each other.
template <class A, int V>
__device__ inline A tree_sum(A (&v)[V]) {
#pragma unroll
  for (int half = V / 2; half; half /= 2)
#pragma unroll
    for (int e = 0; e < half; ++e) v[e] += v[e + half];
  return v[0];
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
    const Grid grid{(n + 31) / 32, both ? 2 : 1};
    P *into = first.numel() ? write<P>(first) : nullptr, *then = both ? write<P>(*second) : nullptr;
    launch(sum_parts_kernel<A, P>, grid, 512, part, parts, stride, n, into, then);
  });
}

constexpr int kParts = 264;  // partial sums over rows: two blocks for each of 132 multiprocessors

}  // namespace fastpeft
