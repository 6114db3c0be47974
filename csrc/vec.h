#pragma once
// Vectors of the accumulator's dtype, read from and written to rows of any dtype: what loops are made of that name their vectors.
// They are B bytes, a register of the instruction set that a loop is compiled for (FASTPEFT_WIDE; with wider ones, accumulators would
// live in memory), or one element at the end of a row. The 16-bit conversions are those of get and put in cpu.h. float16's
// instructions are in x86-64-v3 and v4, so wherever B is 32 or 64; intrinsics would need the target attribute all the way up.
#if defined(__x86_64__)
#include <cpuid.h>
#endif

#include "cpu.h"

#pragma GCC diagnostic ignored "-Wpsabi"  // vectors are passed between inlined functions only

namespace fastpeft {

template <class A, int B>
struct Vec {
  typedef A type __attribute__((vector_size(B)));
  static constexpr int64_t width = B / sizeof(A);
};
template <class E, int B>  // the elements of E that B bytes of its accumulator stand for
using packed_t = typename Vec<std::conditional_t<std::is_same_v<E, acc_t<E>>, E, uint16_t>, int(B * sizeof(E) / sizeof(acc_t<E>))>::type;

template <class To, class From>
FASTPEFT_INLINE To as(const From& from) {  // the same bits
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof to);
  return to;
}

template <int B, class E>
FASTPEFT_INLINE typename Vec<acc_t<E>, B>::type load(const E* p) {
  typename Vec<acc_t<E>, B>::type out;
  packed_t<E, B> from;
  std::memcpy(&from, p, sizeof from);
  if constexpr (std::is_same_v<E, acc_t<E>>) {
    out = from;
  } else if constexpr (std::is_same_v<E, bf16>) {
    out = as<decltype(out)>(__builtin_convertvector(from, typename Vec<uint32_t, B>::type) << 16);
  } else if constexpr (B >= 32) {
    asm("vcvtph2ps %1, %0" : "=v"(out) : "v"(from));
  } else if constexpr (B == sizeof(float)) {
    out[0] = get(*p);
  } else {  // as get, by vectors
    using U = typename Vec<uint32_t, B>::type;
    const U word = __builtin_convertvector(from, U), magnitude = (word & 0x7fffu) << 13, sign = (word & 0x8000u) << 16;
    const U normal = magnitude + (112u << 23) + (U(magnitude >= (31u << 23)) & (112u << 23));
    const U subnormal = as<U>(as<decltype(out)>(magnitude + (113u << 23)) - from_bits(113u << 23));
    out = as<decltype(out)>(sign | (magnitude < (1u << 23) ? subnormal : normal));
  }
  return out;
}

// STREAM: past the caches, to an address that is a multiple of the size (see past_caches); whole lines only, half ones take longer.
template <int B, bool STREAM = false, class E, class V>
FASTPEFT_INLINE void store(E* p, const V& v) {
  static_assert(sizeof(V) == B);
  packed_t<E, B> to;
  if constexpr (std::is_same_v<E, acc_t<E>>) {
    to = v;
  } else if constexpr (std::is_same_v<E, bf16>) {
    const auto u = as<typename Vec<uint32_t, B>::type>(v);
    const auto rounded = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
    to = __builtin_convertvector((u & 0x7fffffffu) > 0x7f800000u ? 0x7fc0u : rounded, packed_t<E, B>);
  } else if constexpr (B >= 32) {
    asm("vcvtps2ph $0, %1, %0" : "=v"(to) : "v"(v));
  } else if constexpr (B == sizeof(float)) {
    return put(p, v[0]);
  } else {  // as put, by vectors
    using U = typename Vec<uint32_t, B>::type;
    const U u = as<U>(v), magnitude = u & 0x7fffffffu;
    const U normal = (magnitude + 0xfffu + ((magnitude >> 13) & 1u) - (112u << 23)) >> 13;
    const U subnormal = as<U>(as<V>(magnitude) + 0.5f) - bits(0.5f);
    const U finite = magnitude >= 0x477ff000u ? U{} + 0x7c00u : magnitude < (113u << 23) ? subnormal : normal;
    to = __builtin_convertvector(((u >> 16) & 0x8000u) | (magnitude > 0x7f800000u ? U{} + 0x7e00u : finite), packed_t<E, B>);
  }
  if constexpr (STREAM && sizeof to == 64) asm volatile("vmovntps %1, %0" : "=m"(*reinterpret_cast<packed_t<E, B>*>(p)) : "v"(to));
  else std::memcpy(p, &to, sizeof to);
}

template <class V>
FASTPEFT_INLINE auto lanes(const V& v) {
  auto total = v[0];
  for (int i = 1; i < int(sizeof v / sizeof v[0]); ++i) total += v[i];
  return total;
}
// A running sum of whole vectors and of what is left at the end of a row.
template <class V, class U>
FASTPEFT_INLINE void accumulate(V& sum, const U& v) {
  if constexpr (sizeof(V) == sizeof(U)) sum += v;
  else sum[0] += v[0];
}

// f(bytes, j) for every vector of a row of n elements, then for every element left.
template <int B, class A, class F>
FASTPEFT_INLINE void each(int64_t n, const F& f) {
  int64_t j = 0;
  for (; j + Vec<A, B>::width <= n; j += Vec<A, B>::width) f(std::integral_constant<int, B>{}, j);
  for (; j < n; ++j) f(std::integral_constant<int, sizeof(A)>{}, j);
}

// Bytes of the last-level cache, 0 where it is not known. sysconf's answer is the whole socket's on AMD, ten times what a core sees.
inline int64_t last_cache() {
#if defined(__x86_64__)
  unsigned a, b, c, d;
  for (unsigned leaf : {4u, 0x8000001du})  // Intel's, AMD's
    if (__get_cpuid_count(leaf, 3, &a, &b, &c, &d) && (a & 31))
      return int64_t((b >> 22) + 1) * (((b >> 12) & 1023) + 1) * ((b & 4095) + 1) * (int64_t(c) + 1);
#endif
  return 0;
}
// Whether an output goes past the caches: where it and two inputs of its size fill three quarters of the last of them, a store that reads
// its line first is traffic for nothing, and evicts what is still to be read. LayerNorm's backward with what reads dx next, a sum, an
// addition or a product, took 0.80-0.98 of the time from 28 MB on, 0.9-1.1 of it below 20 (AMD, 32 MiB, fp32).
inline bool past_caches(const Tensor& out) {
  static const int64_t last = last_cache();
  const int64_t size = out.numel() * out.element_size(), row = out.size(out.dim() - 1) * out.element_size();
  return last > 0 && 4 * size > last && row % 64 == 0 && reinterpret_cast<uintptr_t>(out.const_data_ptr()) % 64 == 0;
}
FASTPEFT_INLINE void stream_end() {
#if defined(__x86_64__)
  asm volatile("sfence" ::: "memory");
#endif
}

}  // namespace fastpeft
