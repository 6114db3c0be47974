#pragma once
// CPU side: one binary for several instruction sets, ATen's thread pool, and parameters widened once per call.
#include <cstring>
#include <new>

#include "common.h"

// GCC picks the clone at load time. Plain functions only (no templates), so each op overloads `rows` per element type by hand.
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define FASTPEFT_CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define FASTPEFT_CLONES
#endif
#define FASTPEFT_INLINE __attribute__((always_inline)) inline
// `f` (a template over T) as a cloned function per element type, taking one argument struct and a range of rows
#define FASTPEFT_PER_DTYPE(name, Args, f)                                                          \
  FASTPEFT_CLONES void name(const Args<double>& a, int64_t begin, int64_t end) { f(a, begin, end); } \
  FASTPEFT_CLONES void name(const Args<float>& a, int64_t begin, int64_t end) { f(a, begin, end); }  \
  FASTPEFT_CLONES void name(const Args<bf16>& a, int64_t begin, int64_t end) { f(a, begin, end); }   \
  FASTPEFT_CLONES void name(const Args<half>& a, int64_t begin, int64_t end) { f(a, begin, end); }

// The same for an `f<B, T>` whose loops name their vectors: B bytes, as the instruction set has them. Here the choice is made by hand.
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define FASTPEFT_AS(set) __attribute__((target("arch=x86-64-" set)))
#define FASTPEFT_WIDE(name, Args, f, T)                                                                           \
  FASTPEFT_AS("v4") static void name##_64(const Args<T>& a, int64_t begin, int64_t end) { f<64>(a, begin, end); } \
  FASTPEFT_AS("v3") static void name##_32(const Args<T>& a, int64_t begin, int64_t end) { f<32>(a, begin, end); } \
  static void name##_16(const Args<T>& a, int64_t begin, int64_t end) { f<16>(a, begin, end); }                   \
  void name(const Args<T>& a, int64_t begin, int64_t end) {                                                       \
    if (kVector == 64) name##_64(a, begin, end);                                                                  \
    else if (kVector == 32) name##_32(a, begin, end);                                                             \
    else name##_16(a, begin, end);                                                                                \
  }
#else
#define FASTPEFT_WIDE(name, Args, f, T) \
  void name(const Args<T>& a, int64_t begin, int64_t end) { f<16>(a, begin, end); }
#endif
#define FASTPEFT_WIDE_PER_DTYPE(name, Args, f) \
  FASTPEFT_WIDE(name, Args, f, double)         \
  FASTPEFT_WIDE(name, Args, f, float)          \
  FASTPEFT_WIDE(name, Args, f, bf16)           \
  FASTPEFT_WIDE(name, Args, f, half)

namespace fastpeft {

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
inline const int kVector = (__builtin_cpu_init(), __builtin_cpu_supports("x86-64-v4")) ? 64 : __builtin_cpu_supports("x86-64-v3") ? 32 : 16;
#endif

// Conversions without branches, so that loops over them vectorise: with the header types' own, the bfloat16 backward took 3x as long.
FASTPEFT_INLINE uint32_t bits(float f) { uint32_t u; std::memcpy(&u, &f, 4); return u; }
FASTPEFT_INLINE float from_bits(uint32_t u) { float f; std::memcpy(&f, &u, 4); return f; }

FASTPEFT_INLINE double get(double v) { return v; }
FASTPEFT_INLINE float get(float v) { return v; }
FASTPEFT_INLINE float get(bf16 v) { return from_bits(uint32_t(v.x) << 16); }
FASTPEFT_INLINE float get(half v) {
  const uint32_t magnitude = uint32_t(v.x & 0x7fffu) << 13, sign = uint32_t(v.x & 0x8000u) << 16;
  const uint32_t normal = magnitude + (112u << 23) + (magnitude >= (31u << 23) ? 112u << 23 : 0u);
  const uint32_t subnormal = bits(from_bits(magnitude + (113u << 23)) - from_bits(113u << 23));
  return from_bits(sign | (magnitude < (1u << 23) ? subnormal : normal));
}

// Round to nearest, ties to even.
FASTPEFT_INLINE void put(double* p, double v) { *p = v; }
FASTPEFT_INLINE void put(float* p, float v) { *p = v; }
FASTPEFT_INLINE void put(bf16* p, float v) {
  const uint32_t u = bits(v), rounded = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
  p->x = uint16_t((u & 0x7fffffffu) > 0x7f800000u ? 0x7fc0u : rounded);
}
FASTPEFT_INLINE void put(half* p, float v) {
  const uint32_t u = bits(v), sign = (u >> 16) & 0x8000u, magnitude = u & 0x7fffffffu;
  const uint32_t normal = (magnitude + 0xfffu + ((magnitude >> 13) & 1u) - (112u << 23)) >> 13;
  const uint32_t subnormal = bits(from_bits(magnitude) + 0.5f) - bits(0.5f);  // the adder rounds at 2^-24
  uint32_t out = magnitude < (113u << 23) ? subnormal : normal;
  out = magnitude >= 0x477ff000u ? 0x7c00u : out;  // from 65520 on
  p->x = uint16_t(sign | (magnitude > 0x7f800000u ? 0x7e00u : out));
}

// Buffers that start at a cache line: a vector of 64 bytes that crosses one is two accesses (LayerNorm's backward took 1.9x as long in
// the caches with its sums at malloc's multiples of 16).
template <class A>
struct LineAllocator {
  using value_type = A;
  A* allocate(size_t n) { return static_cast<A*>(::operator new(n * sizeof(A), std::align_val_t(64))); }
  void deallocate(A* p, size_t) { ::operator delete(p, std::align_val_t(64)); }
  bool operator==(const LineAllocator&) const { return true; }
  bool operator!=(const LineAllocator&) const { return false; }
};
template <class A>
using Aligned = std::vector<A, LineAllocator<A>>;

constexpr int64_t kGrain = 16384;  // elements below which a second thread costs more than it brings

template <class F>
void parallel_rows(int64_t rows, int64_t n, const F& f) {
  const int64_t grain = std::max<int64_t>(1, kGrain / std::max<int64_t>(1, n));
  if (rows <= grain) {
    if (rows > 0) f(0, rows);
  } else {
    torch::stable::parallel_for(0, rows, grain, f);
  }
}

// Sums over rows: rows are cut into parts by shape alone, never by thread count, so results are the same on any machine.
// f(part, begin, end) runs once per part.
inline int64_t row_parts(int64_t rows, int64_t n) {
  return std::max<int64_t>(1, std::min<int64_t>({rows, rows * n / (2 * kGrain), 32}));
}

template <class F>
void parallel_parts(int64_t rows, int64_t parts, const F& f) {
  auto body = [&](int64_t begin, int64_t end) {
    for (int64_t p = begin; p < end; ++p) f(p, rows * p / parts, rows * (p + 1) / parts);
  };
  if (parts == 1) body(0, 1);
  else torch::stable::parallel_for(0, parts, 1, body);
}

// A parameter [n] in the accumulator's dtype: float32 masters over a bfloat16 trunk need no second kernel.
template <class A>
Aligned<A> widen(const Maybe& p, int64_t n, A absent) {
  Aligned<A> out(n, absent);
  if (!p) return out;
  const Tensor dense = torch::stable::contiguous(*p);
  STD_TORCH_CHECK(dense.numel() == n, "fastpeft: parameter of the wrong size");
  dispatch(dense.scalar_type(), "parameter", [&](auto t) {
    using T = typename decltype(t)::type;
    const T* from = read<T>(dense);
    for (int64_t j = 0; j < n; ++j) out[j] = get(from[j]);
  });
  return out;
}

// Sum of `parts` vectors lying `stride` apart, into `out` of any dtype.
template <class A>
void narrow_sum(const A* part, int64_t parts, int64_t stride, const Tensor& out) {
  const int64_t n = out.numel();
  std::vector<A> sum(part, part + n);
  for (int64_t p = 1; p < parts; ++p)
    for (int64_t j = 0; j < n; ++j) sum[j] += part[p * stride + j];
  dispatch(out.scalar_type(), "parameter gradient", [&](auto t) {
    using T = typename decltype(t)::type;
    T* to = write<T>(out);
    for (int64_t j = 0; j < n; ++j) put(to + j, sum[j]);
  });
}

}  // namespace fastpeft
