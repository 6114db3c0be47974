#pragma once
// LayerNorm (CENTER) and RMSNorm are one pair of row loops. Equations: fastpeft/ops/layer_norm.py, fastpeft/ops/rms_norm.py.
//
// Rows are read where they lie, twice or three times from the first-level cache: converting 16 bit there costs less than a buffer.
#include <cmath>

#include "vec.h"

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
  bool stream;          // dx goes past the caches
  A *dweight, *dbias;   // null: not wanted; else sums of this part, zeroed
};

// Sums of d = v - shift and of its square over a row. Four vectors in flight: one would wait 4 cycles for each addition to itself. They go
// into the row's sums after 16 additions: in a row of equal elements every one errs to the same side.
template <int B, class E, class A>
FASTPEFT_INLINE void moments(const E* v, int64_t n, A shift, A& sum, A& square) {
  using V = typename Vec<A, B>::type;
  constexpr int64_t W = Vec<A, B>::width;
  V total{}, total_square{};
  int64_t j = 0;
  while (j + 4 * W <= n) {
    V s[4]{}, q[4]{};
    for (const int64_t stop = std::min(n, j + 64 * W); j + 4 * W <= stop; j += 4 * W) {
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) {
        const V d = load<B>(v + j + i * W) - shift;
        s[i] += d;
        q[i] += d * d;
      }
    }
    total += (s[0] + s[1]) + (s[2] + s[3]);
    total_square += (q[0] + q[1]) + (q[2] + q[3]);
  }
  each<B, A>(n - j, [&](auto bytes, int64_t i) __attribute__((always_inline)) {
    const auto d = load<bytes>(v + j + i) - shift;
    accumulate(total, d);
    accumulate(total_square, d * d);
  });
  sum = lanes(total);
  square = lanes(total_square);
}

template <int B, bool CENTER, class T>
FASTPEFT_INLINE void norm_fwd_rows(const NormFwd<T>& a, int64_t begin, int64_t end) {
  using A = acc_t<T>;
  const int64_t n = a.n;
  for (int64_t r = begin; r < end; ++r) {
    const T* v = a.x + r * a.x_stride;
    if (a.residual) {
      const T *x = v, *residual = a.residual + r * a.residual_stride;
      T* h = a.h + r * n;
      each<B, A>(n, [&](auto bytes, int64_t j) __attribute__((always_inline)) {
        store<bytes>(h + j, load<bytes>(x + j) + load<bytes>(residual + j));
      });
      v = h;  // statistics of the rounded sum: backward sees no other
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
    each<B, A>(n, [&](auto bytes, int64_t j) __attribute__((always_inline)) {
      store<bytes>(y + j, (load<bytes>(v + j) - mean) * rstd * load<bytes>(a.weight + j) + load<bytes>(a.bias + j));
    });
    if (a.rstd) a.rstd[r] = rstd;
    if (CENTER && a.mean) a.mean[r] = mean;
  }
}

// R rows from r on: their part of the parameters' sums, onto g and b, with dx's two means; then dx.
template <int B, int R, bool CENTER, bool PARAMS, bool DX, class T>
FASTPEFT_INLINE void norm_bwd_few(const NormBwd<T>& a, int64_t r, acc_t<T>* g, acc_t<T>* b) {
  using A = acc_t<T>;
  const int64_t n = a.n;
  const T *dy[R], *h[R];
  A mean[R], rstd[R], c1[R], c2[R];
  typename Vec<A, B>::type s1[R]{}, s2[R]{};
  for (int i = 0; i < R; ++i) {
    dy[i] = a.dy + (r + i) * a.dy_stride, h[i] = a.h + (r + i) * a.h_stride;
    mean[i] = CENTER ? a.mean[r + i] : A(0), rstd[i] = a.rstd[r + i];
  }
  each<B, A>(n, [&](auto bytes, int64_t j) __attribute__((always_inline)) {
    using V = typename Vec<A, bytes>::type;
    V dweight{}, dbias{}, weight{};
    if (PARAMS) dweight = load<bytes>(g + j);
    if (PARAMS && CENTER) dbias = load<bytes>(b + j);
    if (DX) weight = load<bytes>(a.weight + j);
#pragma GCC unroll 4
    for (int i = 0; i < R; ++i) {
      const V d = load<bytes>(dy[i] + j), x_hat = (load<bytes>(h[i] + j) - mean[i]) * rstd[i], wd = d * weight;
      if (PARAMS) dweight += d * x_hat;
      if (PARAMS && CENTER) dbias += d;
      if (DX && CENTER) accumulate(s1[i], wd);
      if (DX) accumulate(s2[i], wd * x_hat);
    }
    if (PARAMS) store<bytes>(g + j, dweight);
    if (PARAMS && CENTER) store<bytes>(b + j, dbias);
  });
  if (!DX) return;
  for (int i = 0; i < R; ++i) c1[i] = CENTER ? lanes(s1[i]) / n : A(0), c2[i] = lanes(s2[i]) / n;
  const A* weight = a.weight;
  const auto finish = [&](auto carry, auto stream) __attribute__((always_inline)) {  // loops without questions inside
    const T* dh = a.dh + r * a.dh_stride;
    const int64_t dh_stride = a.dh_stride;
    T* dx = a.dx + r * n;
    each<B, A>(n, [&](auto bytes, int64_t j) __attribute__((always_inline)) {
      const auto w = load<bytes>(weight + j);
#pragma GCC unroll 4
      for (int i = 0; i < R; ++i) {
        auto out = rstd[i] * (load<bytes>(dy[i] + j) * w - c1[i] - (load<bytes>(h[i] + j) - mean[i]) * rstd[i] * c2[i]);
        if constexpr (carry) out += load<bytes>(dh + i * dh_stride + j);
        store<bytes, stream && bytes == B>(dx + i * n + j, out);
      }
    });
  };
  if (a.dh) a.stream ? finish(std::true_type{}, std::true_type{}) : finish(std::true_type{}, std::false_type{});
  else a.stream ? finish(std::false_type{}, std::true_type{}) : finish(std::false_type{}, std::false_type{});
}

// Rows one by one are streams that the CPU fetches ahead, and a narrow row is still in the first-level cache, beside the parameters and
// their sums, for its second reading. Wide ones are not: there four rows share each reading of the parameters and each writing of their
// sums. AMD (32 KiB), ms one by one and by fours: fp32 4096x768 1.6, 2.8; 2048x2048 3.7, 3.0; 1024x4096 4.1, 2.7.
template <int B, bool CENTER, bool PARAMS, bool DX, class T>
FASTPEFT_INLINE void norm_bwd_block(const NormBwd<T>& a, int64_t begin, int64_t end, acc_t<T>* g, acc_t<T>* b) {
  constexpr int64_t kNarrow = 24 << 10, column = 2 * sizeof(T) + (DX + PARAMS * (1 + CENTER)) * sizeof(acc_t<T>);
  int64_t r = begin;
  if (a.n * column > kNarrow)
    for (; r + 4 <= end; r += 4) norm_bwd_few<B, 4, CENTER, PARAMS, DX>(a, r, g, b);
  for (; r < end; ++r) norm_bwd_few<B, 1, CENTER, PARAMS, DX>(a, r, g, b);
}

// Parameter sums go through a block of few rows before the part's total: the error of a float sum grows with its length.
template <int B, bool CENTER, class T>
FASTPEFT_INLINE void norm_bwd_rows(const NormBwd<T>& a, int64_t begin, int64_t end) {
  using A = acc_t<T>;
  constexpr int64_t kBlock = 64;
  const bool several = a.dweight && end - begin > kBlock;
  Aligned<A> buffer(several ? 2 * a.n : 0);
  A *g = several ? buffer.data() : a.dweight, *b = several ? g + a.n : a.dbias;
  for (int64_t r = begin; r < end; r += kBlock) {
    const int64_t stop = std::min(r + kBlock, end);
    if (several) std::fill(g, g + 2 * a.n, A(0));
    if (!a.dweight) norm_bwd_block<B, CENTER, false, true>(a, r, stop, g, b);
    else if (a.dx) norm_bwd_block<B, CENTER, true, true>(a, r, stop, g, b);
    else norm_bwd_block<B, CENTER, true, false>(a, r, stop, g, b);
    for (int64_t j = 0; several && j < a.n; ++j) a.dweight[j] += g[j];
    for (int64_t j = 0; several && CENTER && j < a.n; ++j) a.dbias[j] += b[j];
  }
  if (a.stream) stream_end();
}

}  // namespace fastpeft
