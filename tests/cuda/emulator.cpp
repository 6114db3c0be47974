// Runs CUDA kernels on the CPU: cuda_runtime.h.
//
// A block's threads are fibers of one thread of the system. A fiber runs until it meets a barrier (a shuffle is one, of a warp) or ends, a
// warp as far as it gets before the next one runs; the order of blocks, warps and lanes is reversed in every other launch, or drawn: code
// that lacks a barrier then reads what is not there yet or not there any more. What no GPU does stops the launch with a message: a barrier
// that some of its threads never reach, lanes of a warp in different shuffles. An asynchronous copy is made when it is waited for and not
// before, so a missing wait shows.
#include "cuda_runtime.h"

#include <cstdio>
#include <deque>
#include <map>
#include <mutex>
#include <numeric>
#include <stdexcept>
#include <string>

#include "sanitizer.h"

#define EXPORTED extern "C" __attribute__((visibility("default"), used))

namespace emulated {

Indices indices;

namespace {

// Puts the running code's registers on its stack and the stack's top into *leave, and goes on where `enter` was left.
__attribute__((naked, noinline)) void change_stack([[maybe_unused]] void** leave, [[maybe_unused]] void* enter) {
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
  std::deque<std::vector<Copy>> copies;  // asynchronous ones, by group
};
struct Barrier {
  unsigned arrived = 0, times = 0, threads = 0;
  std::shared_ptr<Clock> clock;
};
struct Shuffle {  // what the lanes of a warp must agree on
  int lane = 0;
  unsigned size = 0;
};
// i of 0 to n - 1 in another order.
struct Order {
  uint64_t first, step;
  uint64_t operator()(uint64_t i, uint64_t n) const { return (first + i * step) % n; }
};

constexpr unsigned kShuffles = 1000;  // barriers from this number on are those of warps
constexpr int64_t kMostBlocks = 0x7fffffff, kMostBlocksDown = 7;  // a GPU's own: 65535; so few that tests exceed it
constexpr unsigned kUnasked = 48 << 10, kShared = 227 << 10;      // bytes of shared memory: of any kernel, and at most

alignas(16) char shared_memory[kShared];
std::mutex one_launch;
std::vector<std::unique_ptr<Fiber>> fibers;
std::map<unsigned, Barrier> barriers;
std::vector<uint64_t> slots;
std::vector<Shuffle> agreed;
std::map<const void*, unsigned> allowed;  // dynamic shared memory, by kernel
Launched body;
void* scheduler;
Fiber* current;
std::string fault;
bool progress, backwards;
uint64_t drawn;  // the order's seed; 0: forward and backward in turn
int64_t launches, asked;  // so far; questions to the driver

uint64_t next_number() { return drawn = drawn * 6364136223846793005u + 1442695040888963407u; }

Order order(uint64_t n) {
  if (!drawn) return backwards ? Order{n - 1, n - 1} : Order{0, 1};
  Order order{(next_number() >> 33) % n, 0};
  do order.step = (next_number() >> 33) % n;
  while (std::gcd(order.step, n) != 1);
  return order;
}

std::string where() {
  char text[80];
  std::snprintf(text, sizeof text, "emulated CUDA: block %u, %u, thread %u: ", blockIdx.x, blockIdx.y, threadIdx.x);
  return text;
}

void enter() {
  body.call(body.parameters);
  for (const auto& group : current->copies)
    if (!group.empty()) stop("ends with asynchronous copies under way");
  current->ended = progress = true;
  change_stack(&current->top, scheduler);
}

void run_block(unsigned threads) {
  barriers.clear();
  slots.assign(2 * threads, 0);
  agreed.assign(threads / 32, {});
  if (checking) begin_block(threads);
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
    const Order warps = order(threads / 32), lanes = order(32);
    for (unsigned w = 0; w < threads / 32; ++w) {
      const unsigned warp = warps(w, threads / 32);
      for (progress = true; progress; any |= progress) {  // as far as it gets
        progress = false;
        for (unsigned i = 0; i < 32; ++i) {
          current = fibers[32 * warp + lanes(i, 32)].get();
          if (current->ended) continue;
          alive = true;
          threadIdx = dim3(current->index);
          change_stack(&scheduler, current->top);
          if (!fault.empty()) return;
        }
      }
    }
    if (alive && !any) {
      fault = where() + "waits at a barrier that others do not reach";
      return;
    }
  }
}

}  // namespace

unsigned thread() { return current->index; }
const char* stack() { return current ? current->stack.get() : nullptr; }

void stop(const char* why) {
  fault = where() + why;
  change_stack(&current->top, scheduler);
  __builtin_unreachable();
}

void wait(unsigned id, unsigned threads) {
  if (id < kShuffles && (id > 15 || threads % 32 || threads > blockDim.x)) stop("a barrier that no block has: 0 to 15, of whole warps");
  Barrier& barrier = barriers[id];
  const unsigned times = barrier.times;
  if (barrier.arrived++ == 0) barrier.threads = threads;
  if (barrier.threads != threads) stop("threads at one barrier that wait for different numbers of threads");
  std::shared_ptr<Clock> clock;
  if (checking && id < kShuffles) arrive(barrier.clock), clock = barrier.clock;  // a shuffle orders no accesses to memory
  if (barrier.arrived == threads) {
    barrier = {0, times + 1};
    progress = true;
  } else {
    Fiber* self = current;
    while (barrier.times == times) change_stack(&self->top, scheduler);
  }
  if (clock) leave(*clock);
}

uint64_t shuffle(uint64_t value, int lane, unsigned size) {
  const unsigned threads = blockDim.x, thread = threadIdx.x;
  if (lane < 0 || lane > 31) stop("a shuffle across warps");
  Shuffle& warp = agreed[thread / 32];
  if (barriers[kShuffles + thread / 32].arrived == 0) warp = {lane, size};
  if (warp.lane != lane || warp.size != size) stop("lanes of a warp in different shuffles");
  uint64_t* row = slots.data() + (current->shuffles++ % 2) * threads;
  row[thread] = value;
  wait(kShuffles + thread / 32, 32);
  return row[thread ^ unsigned(lane)];
}

char* dynamic() { return shared_memory; }

void copy_async(void* to, const void* from, bool wanted) {
  if (uintptr_t(to) % 16 || (wanted && uintptr_t(from) % 16)) stop("an asynchronous copy that is not aligned to 16 bytes");
  if (checking) begin_copy(to, from, wanted);
  current->copies.back().push_back({to, from, wanted});
}
void close_copies() { current->copies.emplace_back(); }
void await_copies(size_t under_way) {
  for (auto& copies = current->copies; copies.size() > under_way + 1; copies.pop_front())
    for (const Copy& copy : copies.front()) {
      copy.wanted ? std::memcpy(copy.to, copy.from, 16) : std::memset(copy.to, 0, 16);
      if (checking) end_copy(copy.to);
    }
}

void run(const void* kernel, dim3 grid, unsigned threads, unsigned shared, Launched launched) {
  const std::lock_guard<std::mutex> lock(one_launch);
  const auto unfit = [](const char* why) { throw std::runtime_error(std::string("emulated CUDA: ") + why); };
  if (threads == 0 || threads > 1024 || threads % 32) unfit("a block needs 32 to 1024 threads, a multiple of 32");
  if (grid.x == 0 || grid.y == 0 || grid.x > kMostBlocks || grid.y > kMostBlocksDown) unfit("a grid of no block, or of too many");
  if (shared > kShared || shared > std::max(kUnasked, allowed[kernel])) unfit("more shared memory than was asked for");
  body = launched, fault.clear();
  gridDim = grid, blockDim = dim3(threads);
  if (checking) begin_launch(shared_memory, shared, launched.parameters, launched.bytes);
  const uint64_t count = uint64_t(grid.x) * grid.y;
  const Order blocks = order(count);
  for (uint64_t i = 0; i < count && fault.empty(); ++i) {
    const uint64_t block = blocks(i, count);
    blockIdx = dim3(unsigned(block % grid.x), unsigned(block / grid.x));
    run_block(threads);
  }
  current = nullptr;
  end_launch();
  backwards = !backwards;
  ++launches;
  if (!fault.empty()) throw std::runtime_error(fault);
}

cudaError_t allow_shared(const void* kernel, int bytes) {
  ++asked;
  if (bytes < 0 || unsigned(bytes) > kShared) return cudaErrorInvalidValue;
  allowed[kernel] = unsigned(bytes);
  return cudaSuccess;
}
cudaError_t multiprocessors(int* count) { return ++asked, *count = 3, cudaSuccess; }
cudaError_t resident(int* blocks) { return ++asked, *blocks = 2, cudaSuccess; }

}  // namespace emulated

EXPORTED int64_t emulated_launches() { return emulated::launches; }
EXPORTED int64_t emulated_asked() { return emulated::asked; }
// The order of blocks, warps and lanes: drawn from a seed; 0: forward and backward in turn, the next launch forward.
EXPORTED void emulated_order(uint64_t seed) { emulated::drawn = seed, emulated::backwards = false; }
