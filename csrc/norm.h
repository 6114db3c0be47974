#pragma once
// LayerNorm (CENTER) and RMSNorm are one pair of row loops. Equations: fastpeft/ops/layer_norm.py, fastpeft/ops/rms_norm.py.
//
// Sums keep several vectors in flight: one would wait 4 cycles for each addition to itself. float16 rows are widened once, into buffers
// that stay in the first-level cache, by the instructions that exist for it; bfloat16 is a shift, cheaper where it is read.
#include <cmath>

#include "cpu.h"

#pragma GCC diagnostic ignored "-Wpsabi"  // vectors are passed between inlined functions only

namespace fastpeft {

template <class T>
struct NormFwd {
  using A = acc_t<T>;
  const T *x, *residual;  // residual may be null
  int64_t x_stride, residual_stride, n;
  const A *weight, *bias;
  A eps;
  T *y, *h;       // h: written where there is a residual
  A *mean, *rstd;  // null: not kept
};

template <class T>
struct NormBwd {
  using A = acc_t<T>;
  const T *dy, *h, *dh;  // dh may be null
  int64_t dy_stride, h_stride, dh_stride, n;
  const A *weight, *mean, *rstd;
  T* dx;                // null: not wanted
  A *dweight, *dbias;   // null: not wanted; else sums of this part, zeroed
};

// B bytes of A: a register of the instruction set that a loop is compiled for (with wider ones, accumulators would live in memory).
template <class A, int B>
struct Vec {
  typedef A type __attribute__((vector_size(B)));
  static constexpr int64_t width = B / sizeof(A);
};
template <int B, class E>
FASTPEFT_INLINE typename Vec<acc_t<E>, B>::type load(const E* p) {
  typename Vec<acc_t<E>, B>::type out;
  if constexpr (std::is_same_v<E, bf16>) {
    typename Vec<uint16_t, B / 2>::type v;
    std::memcpy(&v, p, B / 2);
    const auto word = __builtin_convertvector(v, typename Vec<uint32_t, B>::type) << 16;
    std::memcpy(&out, &word, B);
  } else {
    std::memcpy(&out, p, B);
  }
  return out;
}
template <class V, class A>
FASTPEFT_INLINE void add_to(A* p, const V& more) {
  const V v = load<sizeof(V)>(p) + more;
  std::memcpy(p, &v, sizeof v);
}
template <class V>
FASTPEFT_INLINE auto lanes(const V& v) {
  auto total = v[0];
  for (int i = 1; i < int(sizeof v / sizeof v[0]); ++i) total += v[i];
  return total;
}

// What row loops read: the tensor's own elements, or floats where they are float16.
template <class T>
using direct_t = std::conditional_t<std::is_same_v<T, half>, float, T>;
template <class T>
FASTPEFT_INLINE const direct_t<T>* direct_row(const T* row, acc_t<T>* buffer, int64_t n) {
  if constexpr (std::is_same_v<T, direct_t<T>>) return row;
  else return widen_row(row, buffer, n), buffer;
}

// Sums of d = v - shift and of its square over a row.
template <int B, class A>
FASTPEFT_INLINE void moments(const A* v, int64_t n, A shift, A& sum, A& square) {
  using V = typename Vec<A, B>::type;
  constexpr int64_t W = Vec<A, B>::width;
  V s[4]{}, q[4]{};
  int64_t j = 0;
  for (; j + 4 * W <= n; j += 4 * W) {
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      const V d = load<B>(v + j + i * W) - shift;
      s[i] += d;
      q[i] += d * d;
    }
  }
  sum = lanes((s[0] + s[1]) + (s[2] + s[3]));
  square = lanes((q[0] + q[1]) + (q[2] + q[3]));
  for (; j < n; ++j) {
    const A d = v[j] - shift;
    sum += d;
    square += d * d;
  }
}

template <int B, bool CENTER, class T>
FASTPEFT_INLINE void norm_fwd_rows(const NormFwd<T>& a, int64_t begin, int64_t end) {
  using A = acc_t<T>;
  const int64_t n = a.n;
  const A *__restrict weight = a.weight, *__restrict bias = a.bias;
  std::vector<A> wide(2 * n);
  A *row = wide.data(), *other = row + n;
  for (int64_t r = begin; r < end; ++r) {
    const A* v = wide_row(a.x + r * a.x_stride, row, n);
    if (a.residual) {
      const A* w = wide_row(a.residual + r * a.residual_stride, other, n);
      T* h = a.h + r * n;
#pragma omp simd
      for (int64_t j = 0; j < n; ++j) row[j] = v[j] + w[j];
      narrow_row(row, h, n);
      v = wide_row(h, row, n);  // statistics of the rounded sum: backward sees no other
    }
    A mean = 0, left, square;
    if (CENTER) {
      moments<B>(v, n, A(0), mean, square);
      mean /= n;
    }
    moments<B>(v, n, mean, left, square);
    if (CENTER) {  // the first mean's rounding error, which matters for rows of large constant offset
      left /= n;
      square -= n * left * left;
      mean += left;
    }
    const A rstd = A(1) / std::sqrt(std::max(square / n, A(0)) + a.eps);
    T* y = a.y + r * n;
    direct_t<T>* __restrict out;
    if constexpr (std::is_same_v<T, half>) out = other;
    else out = y;
#pragma omp simd
    for (int64_t j = 0; j < n; ++j) put(out + j, (v[j] - mean) * rstd * weight[j] + bias[j]);
    if constexpr (std::is_same_v<T, half>) narrow_row(other, y, n);
    if (a.rstd) a.rstd[r] = rstd;
    if (CENTER && a.mean) a.mean[r] = mean;
  }
}

// A row's part of the parameters' sums, onto g and b, and dx's two means. One row at a time, from first to last: a stream that the CPU
// fetches ahead. Four rows side by side read and wrote g and b less often, and took 1.4x as long beyond the caches (AMD, 768 wide).
template <int B, bool CENTER, bool PARAMS, bool DX, class E, class A>
FASTPEFT_INLINE void norm_bwd_sums(
    const E* dy, const E* h, A mean, A rstd, const A* weight, int64_t n, A* g, A* b, A& c1, A& c2) {
  using V = typename Vec<A, B>::type;
  constexpr int64_t W = Vec<A, B>::width;
  V s1[2]{}, s2[2]{};
  int64_t j = 0;
  for (; j + 2 * W <= n; j += 2 * W) {
#pragma GCC unroll 2
    for (int i = 0; i < 2; ++i) {
      const int64_t at = j + i * W;
      const V d = load<B>(dy + at), x_hat = (load<B>(h + at) - mean) * rstd;
      if (DX) {
        const V wd = d * load<B>(weight + at);
        if (CENTER) s1[i] += wd;
        s2[i] += wd * x_hat;
      }
      if (PARAMS) add_to(g + at, d * x_hat);
      if (PARAMS && CENTER) add_to(b + at, d);
    }
  }
  A t1 = lanes(s1[0] + s1[1]), t2 = lanes(s2[0] + s2[1]);
  for (; j < n; ++j) {
    const A d = get(dy[j]), x_hat = (get(h[j]) - mean) * rstd, wd = d * weight[j];
    t1 += wd;
    t2 += wd * x_hat;
    if (PARAMS) g[j] += d * x_hat;
    if (PARAMS && CENTER) b[j] += d;
  }
  c1 = CENTER ? t1 / n : A(0);
  c2 = t2 / n;
}

template <class E, class A>
FASTPEFT_INLINE void norm_bwd_dx(const E* __restrict dy, const E* __restrict h, const E* __restrict dh, const A* __restrict weight,
                                 A mean, A rstd, A c1, A c2, int64_t n, E* __restrict dx) {
  if (dh) {
#pragma omp simd
    for (int64_t j = 0; j < n; ++j)
      put(dx + j, rstd * (get(dy[j]) * weight[j] - c1 - (get(h[j]) - mean) * rstd * c2) + get(dh[j]));
  } else {
#pragma omp simd
    for (int64_t j = 0; j < n; ++j) put(dx + j, rstd * (get(dy[j]) * weight[j] - c1 - (get(h[j]) - mean) * rstd * c2));
  }
}

// wide: four rows of buffer where rows are float16
template <int B, bool CENTER, bool PARAMS, bool DX, class T>
FASTPEFT_INLINE void norm_bwd_block(const NormBwd<T>& a, int64_t begin, int64_t end, acc_t<T>* g, acc_t<T>* b, acc_t<T>* wide) {
  using A = acc_t<T>;
  using E = direct_t<T>;
  const int64_t n = a.n;
  for (int64_t r = begin; r < end; ++r) {
    const E *dy = direct_row(a.dy + r * a.dy_stride, wide, n), *h = direct_row(a.h + r * a.h_stride, wide + n, n);
    const A mean = CENTER ? a.mean[r] : A(0), rstd = a.rstd[r];
    A c1, c2;
    norm_bwd_sums<B, CENTER, PARAMS, DX>(dy, h, mean, rstd, a.weight, n, g, b, c1, c2);
    if (!DX) continue;
    const E* dh = a.dh ? direct_row(a.dh + r * a.dh_stride, wide + 2 * n, n) : nullptr;
    T* dx = a.dx + r * n;
    if constexpr (std::is_same_v<T, E>) {
      norm_bwd_dx(dy, h, dh, a.weight, mean, rstd, c1, c2, n, dx);
    } else {
      norm_bwd_dx(dy, h, dh, a.weight, mean, rstd, c1, c2, n, wide + 3 * n);
      narrow_row(wide + 3 * n, dx, n);
    }
  }
}

// Parameter sums go through a block of few rows before the part's total: the error of a float sum grows with its length.
template <int B, bool CENTER, class T>
FASTPEFT_INLINE void norm_bwd_rows(const NormBwd<T>& a, int64_t begin, int64_t end) {
  using A = acc_t<T>;
  constexpr int64_t kBlock = 64;
  const bool several = a.dweight && end - begin > kBlock;
  const int64_t wide_size = std::is_same_v<T, direct_t<T>> ? 0 : 4 * a.n;
  std::vector<A> buffer(wide_size + (several ? 2 * a.n : 0));
  A *wide = buffer.data(), *g = several ? wide + wide_size : a.dweight, *b = several ? g + a.n : a.dbias;
  if (!a.dweight) return norm_bwd_block<B, CENTER, false, true>(a, begin, end, wide, wide, wide);
  for (int64_t r = begin; r < end; r += kBlock) {
    if (several) std::fill(g, g + 2 * a.n, A(0));
    if (a.dx) norm_bwd_block<B, CENTER, true, true>(a, r, std::min(r + kBlock, end), g, b, wide);
    else norm_bwd_block<B, CENTER, true, false>(a, r, std::min(r + kBlock, end), g, b, wide);
    for (int64_t j = 0; several && j < a.n; ++j) a.dweight[j] += g[j];
    for (int64_t j = 0; several && CENTER && j < a.n; ++j) a.dbias[j] += b[j];
  }
}

}  // namespace fastpeft
