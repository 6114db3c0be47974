#pragma once
// CUDA's device language for a CPU, as far as csrc/*.cu use it: found in place of the toolkit's header, it makes the CUDA sources
// compile with a C++ compiler and run on CPU tensors, so that their indexing, barriers and reductions are tested where there is no GPU.
// emulator.cpp runs blocks of threads; sanitizer.cpp looks at each access that they make to memory, where a test asks for it.
#include <math.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <tuple>
#include <type_traits>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __shared__ static
#define __launch_bounds__(...)
#define __grid_constant__

using std::max;
using std::min;

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

namespace emulated {

struct Indices {
  dim3 thread, block, block_size, grid;
};
extern Indices indices;

// A launch: `call` runs the kernel for one thread, on the parameters that lie in `parameters`.
struct Launched {
  void (*call)(const void* parameters);
  const void* parameters;
  size_t bytes;  // of them
};
// Throws std::runtime_error for what a GPU would not do, or not do the same every time.
void run(const void* kernel, dim3 grid, unsigned threads, unsigned shared, Launched launched);
void wait(unsigned barrier, unsigned threads);
uint64_t shuffle(uint64_t value, int lane, unsigned size);
char* dynamic();  // shared memory, of the size that the launch gives
void copy_async(void* to, const void* from, bool wanted);
void close_copies();
void await_copies(size_t under_way);
[[noreturn]] void stop(const char* why);  // of a thread

template <class... P, class... Args>
void launch(void (*kernel)(P...), dim3 grid, unsigned threads, unsigned shared, Args... args) {
  const std::tuple<void (*)(P...), P...> all{kernel, args...};
  const auto call = [](const void* parameters) {
    std::apply([](auto kernel, const P&... args) { kernel(args...); }, *static_cast<decltype(&all)>(parameters));
  };
  run(reinterpret_cast<const void*>(kernel), grid, threads, shared, {call, &all, sizeof all});
}

inline float flushed(float x) { return fabsf(x) < 0x1p-126f ? copysignf(0.0f, x) : x; }

}  // namespace emulated

#define threadIdx (emulated::indices.thread)
#define blockIdx (emulated::indices.block)
#define blockDim (emulated::indices.block_size)
#define gridDim (emulated::indices.grid)

inline void __syncthreads() { emulated::wait(0, blockDim.x); }

template <class V>
V __shfl_xor_sync(unsigned mask, V value, int lane) {
  static_assert(sizeof(V) <= 8);
  if (mask != ~0u) emulated::stop("shuffles of a whole warp only");
  uint64_t word = 0;
  std::memcpy(&word, &value, sizeof value);
  word = emulated::shuffle(word, lane, sizeof value);
  std::memcpy(&value, &word, sizeof value);
  return value;
}

// The runtime's functions that csrc/cuda.cuh calls: of a device with three multiprocessors, two blocks of any kernel on each.
enum cudaError_t { cudaSuccess, cudaErrorInvalidValue };
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize };
enum cudaDeviceAttr { cudaDevAttrMultiProcessorCount };
enum cudaStreamCaptureStatus { cudaStreamCaptureStatusNone };
using cudaStream_t = void*;
inline const char* cudaGetErrorString(cudaError_t) { return "an invalid value"; }
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline cudaError_t cudaStreamIsCapturing(cudaStream_t, cudaStreamCaptureStatus*) { return cudaSuccess; }
namespace emulated {
cudaError_t allow_shared(const void* kernel, int bytes);
cudaError_t multiprocessors(int* count);
cudaError_t resident(int* blocks);
}
template <class Kernel>
cudaError_t cudaFuncSetAttribute(Kernel kernel, cudaFuncAttribute, int bytes) { return emulated::allow_shared((const void*)kernel, bytes); }
inline cudaError_t cudaDeviceGetAttribute(int* count, cudaDeviceAttr, int) { return emulated::multiprocessors(count); }
template <class Kernel>
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, Kernel, int, size_t) { return emulated::resident(blocks); }
