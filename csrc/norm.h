#pragma once
// LayerNorm (CENTER) and RMSNorm are one pair of row loops. Equations: fastpeft/ops/layer_norm.py, fastpeft/ops/rms_norm.py.
#include <cmath>

#include "cpu.h"

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
  A* scratch;           // 2 n, beside dweight
};

template <bool CENTER, class T>
FASTPEFT_INLINE void norm_fwd_rows(const NormFwd<T>& a, int64_t begin, int64_t end) {
  using A = acc_t<T>;
  const int64_t n = a.n;
  const A *__restrict weight = a.weight, *__restrict bias = a.bias;
  std::vector<A> wide(n);  // the row in the accumulator's dtype
  for (int64_t r = begin; r < end; ++r) {
    const T* __restrict x = a.x + r * a.x_stride;
    T* __restrict y = a.y + r * n;
    const A* v = wide.data();
    A* __restrict w = wide.data();
    A sum = 0;
    if (a.residual) {
      const T* __restrict other = a.residual + r * a.residual_stride;
      T* __restrict h = a.h + r * n;
#pragma omp simd reduction(+ : sum)
      for (int64_t j = 0; j < n; ++j) {
        put(h + j, get(x[j]) + get(other[j]));
        w[j] = get(h[j]);  // statistics of the rounded sum: backward sees no other
        sum += w[j];
      }
    } else if constexpr (std::is_same_v<T, A>) {
      v = x;
#pragma omp simd reduction(+ : sum)
      for (int64_t j = 0; j < n; ++j) sum += x[j];
    } else {
#pragma omp simd reduction(+ : sum)
      for (int64_t j = 0; j < n; ++j) {
        w[j] = get(x[j]);
        sum += w[j];
      }
    }
    A mean = CENTER ? sum / n : A(0), left = 0, square = 0;
#pragma omp simd reduction(+ : left, square)
    for (int64_t j = 0; j < n; ++j) {
      const A d = v[j] - mean;
      left += d;
      square += d * d;
    }
    if (CENTER) {  // the first mean's rounding error, which matters for rows of large constant offset
      left /= n;
      square -= n * left * left;
      mean += left;
    }
    const A rstd = A(1) / std::sqrt(std::max(square / n, A(0)) + a.eps);
#pragma omp simd
    for (int64_t j = 0; j < n; ++j) put(y + j, (v[j] - mean) * rstd * weight[j] + bias[j]);
    if (a.rstd) a.rstd[r] = rstd;
    if (CENTER && a.mean) a.mean[r] = mean;
  }
}

template <bool CENTER, bool PARAMS, bool DX, class T>
FASTPEFT_INLINE void norm_bwd_block(const NormBwd<T>& a, int64_t begin, int64_t end, acc_t<T>* dw, acc_t<T>* db) {
  using A = acc_t<T>;
  const int64_t n = a.n;
  const A* __restrict weight = a.weight;
  A *__restrict g = dw, *__restrict b = db;
  for (int64_t r = begin; r < end; ++r) {
    const T *__restrict dy = a.dy + r * a.dy_stride, *__restrict h = a.h + r * a.h_stride;
    const A rstd = a.rstd[r], mean = CENTER ? a.mean[r] : A(0);
    A s1 = 0, s2 = 0;
#pragma omp simd reduction(+ : s1, s2)
    for (int64_t j = 0; j < n; ++j) {
      const A d = get(dy[j]), x_hat = (get(h[j]) - mean) * rstd, wd = d * weight[j];
      if (DX && CENTER) s1 += wd;
      if (DX) s2 += wd * x_hat;
      if (PARAMS) {
        g[j] += d * x_hat;
        if (CENTER) b[j] += d;
      }
    }
    if (!DX) continue;
    const A c1 = s1 / n, c2 = s2 / n;
    T* __restrict dx = a.dx + r * n;
    if (a.dh) {
      const T* __restrict dh = a.dh + r * a.dh_stride;
#pragma omp simd
      for (int64_t j = 0; j < n; ++j) {
        const A x_hat = (get(h[j]) - mean) * rstd;
        put(dx + j, rstd * (get(dy[j]) * weight[j] - c1 - x_hat * c2) + get(dh[j]));
      }
    } else {
#pragma omp simd
      for (int64_t j = 0; j < n; ++j) {
        const A x_hat = (get(h[j]) - mean) * rstd;
        put(dx + j, rstd * (get(dy[j]) * weight[j] - c1 - x_hat * c2));
      }
    }
  }
}

// Parameter sums go through a block of few rows before the part's total: the error of a float sum grows with its length.
template <bool CENTER, class T>
FASTPEFT_INLINE void norm_bwd_rows(const NormBwd<T>& a, int64_t begin, int64_t end) {
  using A = acc_t<T>;
  if (!a.dweight) return norm_bwd_block<CENTER, false, true>(a, begin, end, nullptr, nullptr);
  A *g = a.scratch, *b = a.scratch + a.n;
  for (int64_t r = begin; r < end; r += 64) {
    std::fill(g, g + 2 * a.n, A(0));
    if (a.dx) norm_bwd_block<CENTER, true, true>(a, r, std::min(r + 64, end), g, b);
    else norm_bwd_block<CENTER, true, false>(a, r, std::min(r + 64, end), g, b);
    for (int64_t j = 0; j < a.n; ++j) a.dweight[j] += g[j];
    for (int64_t j = 0; CENTER && j < a.n; ++j) a.dbias[j] += b[j];
  }
}

}  // namespace fastpeft
