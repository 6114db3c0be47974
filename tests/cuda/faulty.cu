// Kernels with one fault each, which the emulator or its sanitizer must find: tests/ops/test_cuda_sanitizer.py.
#include "cuda.cuh"

#include <string>

namespace fastpeft::faulty {

constexpr unsigned kThreads = 96;

// In the test's order; the first two have none.
enum Fault {
  kSound, kSoundCopies, kNoBarrier, kWritesWhatOthersRead, kBarrierOfAWarp, kShuffleForABarrier, kTwoCounts, kOddCount, kEarlyReturn,
  kBarrierInABranch, kLanesInTwoShuffles, kHalfAWarp, kPastTensor, kBeforeTensor, kGap, kWritesInput, kPastShared, kPastDynamic,
  kUnwrittenShared, kUnwrittenTensor, kOneWord, kSumWithoutAtomics, kBlocksWriteOneWord, kReadsOfAnotherBlock, kNoWait, kNoBarrierAfterWait,
  kCopyOverReads, kCopyLeft, kUnaskedShared
};

__global__ void kernel(Fault fault, const float* x, float* y, float* other, int n) {
  __shared__ float shared[2][kThreads];
  float* dynamic = reinterpret_cast<float*>(dynamic_shared());
  const unsigned thread = threadIdx.x, next = (thread + 32) % kThreads, warp = thread / 32;
  const int i = int(blockIdx.x * kThreads + thread);
  shared[0][thread] = float(thread);
  if (fault == kEarlyReturn && thread == 5) return;
  if (fault == kBarrierOfAWarp) barrier(1 + warp, 32);
  else if (fault == kShuffleForABarrier) __shfl_xor_sync(~0u, 1.0f, 1);
  else if (fault == kTwoCounts) barrier(1, thread < 48 ? 64 : 96);
  else if (fault == kOddCount) barrier(1, 90);
  else if (fault != kNoBarrier) __syncthreads();
  float value = shared[fault == kUnwrittenShared][next];
  if (fault == kWritesWhatOthersRead) shared[0][thread] = value;
  if (fault == kLanesInTwoShuffles) value += __shfl_xor_sync(~0u, value, thread % 32 < 7 ? 1 : 2);
  if (fault == kHalfAWarp && thread % 32 < 16) value += __shfl_xor_sync(~0u, value, 1);
  if (fault == kBarrierInABranch && warp == 0) __syncthreads();
  if (i < n || fault == kPastTensor) value += x[2 * i];
  if (fault == kBeforeTensor && i == 0) value += x[-1];
  if (fault == kGap && i == 0) value += x[1];
  if (fault == kWritesInput && i == 0) const_cast<float*>(x)[0] = value;
  if (fault == kPastShared) value += shared[0][2 * kThreads + thread];
  if (fault == kPastDynamic) dynamic[thread] = value;
  if (fault == kUnwrittenTensor && i < n) value += other[i];
  if (fault == kOneWord) other[blockIdx.x] = value;
  if (fault == kSumWithoutAtomics && thread % 32 == 0) y[blockIdx.x] += value;
  if (fault == kBlocksWriteOneWord) other[thread] = value;
  if (fault == kReadsOfAnotherBlock && i < n) other[i] = value, value += blockIdx.x ? other[0] : 0;
  if ((fault >= kNoWait && fault <= kCopyLeft) || fault == kSoundCopies) {
    if (fault != kCopyOverReads) __syncthreads();
    if (thread % 4 == 0) copy_async(&shared[0][thread], x + 8 * thread / 4, true);
    close_copies();
    if (fault == kCopyLeft) return;
    if (fault != kNoWait) await_copies<0>();
    if (fault == kSoundCopies) __syncthreads();
    if (fault == kSoundCopies || fault == kNoBarrierAfterWait) value += shared[0][next];
    else if (thread % 4 == 0) value += shared[0][thread];
    await_copies<0>();
  }
  if (i < n) y[i] = value;
}

}  // namespace fastpeft::faulty

// '' or what was found. x: every second of 2 n numbers, but for copies, which take all; y [n], other [n].
extern "C" __attribute__((visibility("default"), used)) const char* emulated_fault(int fault, const float* x, float* y, float* other, int n) {
  using namespace fastpeft::faulty;
  static std::string found;
  try {
    emulated::launch(kernel, dim3((n + kThreads - 1) / kThreads), kThreads, fault == kUnaskedShared ? 64 << 10 : 256, Fault(fault), x, y, other, n);
    found.clear();
  } catch (const std::exception& error) {
    found = error.what();
  }
  return found.c_str();
}
