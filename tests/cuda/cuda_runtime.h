#pragma once
// CUDA's device language for a CPU, as far as csrc/*.cu use it: found in place of the toolkit's header, it makes the CUDA sources
// compile with a C++ compiler and run on CPU tensors, so that their indexing, barriers and reductions are tested where there is no GPU.
//
// A block's threads are fibers of one thread of the system. A fiber runs until it meets a barrier (a shuffle is one, of a warp) or ends, a
// warp as far as it gets before the next one runs, and in every other launch the order is reversed: code that lacks a barrier then reads
// what is not there yet or not there any more, and a barrier that some of its threads never reach ends the process with a message.
// Blocks run one after another. An asynchronous copy is made when it is waited for and not before, so a missing wait shows.
#include <math.h>

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
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
inline dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace emulated {

constexpr size_t kStack = 64 << 10;

// Puts the running code's registers on its stack and the stack's top into *leave, and goes on where `enter` was left.
__attribute__((naked, noinline)) inline void change_stack([[maybe_unused]] void** leave, [[maybe_unused]] void* enter) {
#if !defined(__x86_64__)
#error "the emulator of CUDA blocks changes stacks on x86-64 only"
#endif
  asm("pushq %rbp\n pushq %rbx\n pushq %r12\n pushq %r13\n pushq %r14\n pushq %r15\n"
      "movq %rsp, (%rdi)\n movq %rsi, %rsp\n"
      "popq %r15\n popq %r14\n popq %r13\n popq %r12\n popq %rbx\n popq %rbp\n ret");
}

struct Copy {
  void* to;
  const void* from;
  bool wanted;
};
struct Fiber {
  void* top;
  std::unique_ptr<char[]> stack{new char[kStack]};
  unsigned index;
  bool ended;
  unsigned shuffles;  // so far: a warp's slots alternate, and one barrier a shuffle suffices
  std::deque<std::vector<Copy>> copies;  // asynchronous ones, by group: made when they are waited for, never before
};
struct Barrier {
  unsigned arrived = 0, times = 0;
};

inline std::mutex one_launch;
inline std::vector<std::unique_ptr<Fiber>> fibers;
inline std::map<unsigned, Barrier> barriers;
inline std::vector<uint64_t> slots;
inline std::function<void()> body;
inline void* scheduler;
inline Fiber* current;
inline bool progress, backwards;
inline int64_t launches = 0;  // so far

[[noreturn]] inline void stop(const char* why) {
  std::fprintf(stderr, "emulated CUDA: block %u, %u, thread %u: %s\n", blockIdx.x, blockIdx.y, threadIdx.x, why);
  std::abort();
}

// Waits until `count` threads have come to this barrier.
inline void wait(unsigned id, unsigned count) {
  Barrier& barrier = barriers[id];
  const unsigned times = barrier.times;
  if (++barrier.arrived > count) stop("more threads at a barrier than it is for");
  if (barrier.arrived == count) {
    barrier = {0, times + 1};
    progress = true;
    return;
  }
  Fiber* self = current;
  while (barrier.times == times) change_stack(&self->top, scheduler);
}

alignas(16) inline char dynamic[227 << 10];  // shared memory

inline void copy_async(void* to, const void* from, bool wanted) {
  if (uintptr_t(to) % 16 || (wanted && uintptr_t(from) % 16)) stop("an asynchronous copy that is not aligned to 16 bytes");
  current->copies.back().push_back({to, from, wanted});
}
inline void close_copies() { current->copies.emplace_back(); }
inline void await_copies(size_t under_way) {
  for (auto& copies = current->copies; copies.size() > under_way + 1; copies.pop_front())
    for (const Copy& copy : copies.front()) copy.wanted ? std::memcpy(copy.to, copy.from, 16) : std::memset(copy.to, 0, 16);
}

inline void enter() {
  body();
  current->ended = progress = true;
  change_stack(&current->top, scheduler);
}

inline void run_block(unsigned threads) {
  barriers.clear();
  slots.assign(2 * threads, 0);
  while (fibers.size() < threads) fibers.emplace_back(new Fiber);
  for (unsigned i = 0; i < threads; ++i) {
    Fiber& fiber = *fibers[i];
    fiber.index = i, fiber.ended = false, fiber.shuffles = 0, fiber.copies.assign(1, {});
    void** top = reinterpret_cast<void**>(reinterpret_cast<uintptr_t>(fiber.stack.get() + kStack) & ~uintptr_t(15)) - 1;  // as after a call
    *--top = reinterpret_cast<void*>(enter);  // where the first change of stacks returns to; below it six registers
    fiber.top = top - 6;
  }
  for (bool alive = true; alive;) {
    bool any = alive = false;
    for (unsigned w = 0; w < threads / 32; ++w) {
      const unsigned warp = backwards ? threads / 32 - 1 - w : w;
      for (progress = true; progress; any |= progress) {  // as far as it gets
        progress = false;
        for (unsigned i = 0; i < 32; ++i) {
          current = fibers[32 * warp + (backwards ? 31 - i : i)].get();
          if (current->ended) continue;
          alive = true;
          threadIdx = dim3(current->index);
          change_stack(&scheduler, current->top);
        }
      }
    }
    if (alive && !any) stop("waits at a barrier that others do not reach");
  }
}

inline void run(dim3 grid, unsigned threads, std::function<void()> kernel) {
  const std::lock_guard<std::mutex> lock(one_launch);
  if (threads == 0 || threads > 1024 || threads % 32) stop("a block needs 32 to 1024 threads, a multiple of 32");
  body = std::move(kernel);
  gridDim = grid, blockDim = dim3(threads);
  for (unsigned y = 0; y < grid.y; ++y)
    for (unsigned x = 0; x < grid.x; ++x) {
      blockIdx = dim3(x, y);
      run_block(threads);
    }
  backwards = !backwards;
  ++launches;
}

inline float flushed(float x) { return fabsf(x) < 0x1p-126f ? copysignf(0.0f, x) : x; }

}  // namespace emulated

extern "C" __attribute__((visibility("default"), used)) inline int64_t emulated_launches() { return emulated::launches; }

inline void __syncthreads() { emulated::wait(0, blockDim.x); }

template <class V>
V __shfl_xor_sync(unsigned mask, V value, int lane) {
  static_assert(sizeof(V) <= 8);
  if (mask != ~0u) emulated::stop("shuffles of a whole warp only");
  const unsigned threads = blockDim.x, thread = threadIdx.x;
  uint64_t* row = emulated::slots.data() + (emulated::current->shuffles++ % 2) * threads;
  std::memcpy(row + thread, &value, sizeof value);
  emulated::wait(1000 + thread / 32, 32);
  std::memcpy(&value, row + (thread ^ lane), sizeof value);
  return value;
}
