// Both gradients of a low-rank branch from one reading of dy, for CPU tensors (schema and equations in fastpeft/ops/low_rank_grads.py).
#include "vec.h"

namespace fastpeft::low_rank {

template <class T>
struct Args {
  const T* dy;  // rows of n elements, `stride` apart
  int64_t stride, n, count, rank;  // rank: a multiple of 8, what is missing is zero
  const T* up;    // s B^T [rank, n]; null: dlow is not wanted
  const T* low;   // s S^T [count, rank]; null: dup is not wanted
  T* dlow;        // [rank, count]
  T* dup;         // [rank, n], this part's sum
  int64_t block;  // rows that stay in a core's cache between the two products
};

template <int B, class V>
FASTPEFT_INLINE auto total(const V& v) {
  if constexpr (B <= 16) {
    return lanes(v);
  } else {
    using Half = typename Vec<std::decay_t<decltype(v[0])>, B / 2>::type;
    Half half[2];
    std::memcpy(half, &v, sizeof v);
    return total<B / 2>(half[0] + half[1]);
  }
}

// dlow of ROWS rows from m on and RANKS ranks from k on: dot products over a row, whose vectors are read once for all ranks.
template <int ROWS, int RANKS, int B, class T>
FASTPEFT_INLINE void dots(const Args<T>& a, int64_t m, int64_t k) {
  using V = typename Vec<T, B>::type;
  const T *row = a.dy + m * a.stride, *up = a.up + k * a.n;
  V sum[ROWS][RANKS] = {};
  int64_t j = 0;
  for (; j + Vec<T, B>::width <= a.n; j += Vec<T, B>::width) {
    V v[ROWS];
#pragma GCC unroll 8
    for (int i = 0; i < ROWS; ++i) v[i] = load<B>(row + i * a.stride + j);
#pragma GCC unroll 8
    for (int r = 0; r < RANKS; ++r) {
      const V u = load<B>(up + r * a.n + j);
#pragma GCC unroll 8
      for (int i = 0; i < ROWS; ++i) sum[i][r] += v[i] * u;
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < ROWS; ++i)
#pragma GCC unroll 8
    for (int r = 0; r < RANKS; ++r) {
      T dot = total<B>(sum[i][r]);
      for (int64_t t = j; t < a.n; ++t) dot += row[i * a.stride + t] * up[r * a.n + t];
      a.dlow[(k + r) * a.count + m + i] = dot;
    }
}

// dup of COLS vectors from column j on and RANKS ranks from k on, summed over rows begin to end.
template <int COLS, int RANKS, int B, class T>
FASTPEFT_INLINE void sums(const Args<T>& a, int64_t begin, int64_t end, int64_t j, int64_t k) {
  using V = typename Vec<T, B>::type;
  constexpr int64_t width = Vec<T, B>::width;
  V sum[COLS][RANKS] = {};
  for (int64_t m = begin; m < end; ++m) {
    const T *row = a.dy + m * a.stride + j, *low = a.low + m * a.rank + k;
    V v[COLS];
#pragma GCC unroll 8
    for (int c = 0; c < COLS; ++c) {
      v[c] = load<B>(row + c * width);
      __builtin_prefetch(row + 8 * a.stride + c * width);  // rows lie far apart: no cache guesses the next ones
    }
#pragma GCC unroll 8
    for (int r = 0; r < RANKS; ++r)
#pragma GCC unroll 8
      for (int c = 0; c < COLS; ++c) sum[c][r] += v[c] * low[r];
  }
#pragma GCC unroll 8
  for (int c = 0; c < COLS; ++c)
#pragma GCC unroll 8
    for (int r = 0; r < RANKS; ++r) {
      T* to = a.dup + (k + r) * a.n + j + c * width;
      store<B>(to, load<B>(to) + sum[c][r]);
    }
}

template <int B, class T>
FASTPEFT_INLINE void loop(const Args<T>& a, int64_t begin, int64_t end) {
  constexpr int ranks = B == 64 ? 8 : 4;  // three rows or vectors of so many sums fill the registers
  constexpr int64_t width = Vec<T, B>::width;
  for (int64_t from = begin; from < end; from += a.block) {
    const int64_t to = std::min(from + a.block, end);
    for (int64_t k = 0; a.up && k < a.rank; k += ranks) {
      int64_t m = from;
      for (; m + 3 <= to; m += 3) dots<3, ranks, B>(a, m, k);
      for (; m < to; ++m) dots<1, ranks, B>(a, m, k);
    }
    for (int64_t k = 0; a.low && k < a.rank; k += ranks) {
      int64_t j = 0;
      for (; j + 3 * width <= a.n; j += 3 * width) sums<3, ranks, B>(a, from, to, j, k);
      for (; j + width <= a.n; j += width) sums<1, ranks, B>(a, from, to, j, k);
      for (; j < a.n; ++j) sums<1, ranks, int(sizeof(T))>(a, from, to, j, k);
    }
  }
}
FASTPEFT_WIDE(rows, Args, loop, double)
FASTPEFT_WIDE(rows, Args, loop, float)

std::tuple<Tensor, Tensor> grads(const Tensor& dy, const Maybe& up, const Maybe& low, double scaling) {
  const Rows in = rows_of(dy);
  const int64_t r = up ? up->size(1) : low->size(0), rank = (r + 7) / 8 * 8, n = in.n, count = in.count;
  STD_TORCH_CHECK(!up || (up->dim() == 2 && up->size(0) == n), "low_rank_grads: up does not fit dy");
  STD_TORCH_CHECK(!low || (low->dim() == 2 && low->size(0) == r && low->size(1) == count), "low_rank_grads: low does not fit dy");
  Tensor dlow = make_empty(dy, {up ? r : 0, count}), dup = make_empty(dy, {low ? n : 0, r});
  dispatch(dy.scalar_type(), "low_rank_grads", [&](auto t) {
    using T = typename decltype(t)::type;
    if constexpr (std::is_same_v<T, acc_t<T>>) {
      Aligned<T> ups(up ? rank * n : 0, T(0)), lows(low ? count * rank : 0, T(0)), dlows(up ? rank * count : 0);
      const T s = T(scaling);
      if (up)
        for (int64_t k = 0; k < r; ++k)
          for (int64_t j = 0; j < n; ++j) ups[k * n + j] = s * read<T>(*up)[j * up->stride(0) + k * up->stride(1)];
      if (low)
        for (int64_t m = 0; m < count; ++m)
          for (int64_t k = 0; k < r; ++k) lows[m * rank + k] = s * read<T>(*low)[k * low->stride(0) + m * low->stride(1)];
      const int64_t parts = std::clamp<int64_t>(count * n >> 20, 1, std::min<int64_t>(16, std::max<int64_t>(1, count)));
      Aligned<T> sums(low ? parts * rank * n : 0, T(0));
      const int64_t block = std::clamp<int64_t>((1 << 19) / std::max<int64_t>(1, n * int64_t(sizeof(T))), 3, 63);
      parallel_parts(count, parts, [&](int64_t p, int64_t begin, int64_t end) {
        rows(Args<T>{read<T>(in.own), in.stride, n, count, rank, up ? ups.data() : nullptr, low ? lows.data() : nullptr,
                     up ? dlows.data() : nullptr, low ? sums.data() + p * rank * n : nullptr, block}, begin, end);
      });
      if (up) std::copy(dlows.begin(), dlows.begin() + r * count, write<T>(dlow));
      for (int64_t p = 1; p < parts; ++p)
        for (int64_t i = 0; i < int64_t(sums.size()) / parts; ++i) sums[i] += sums[p * rank * n + i];
      for (int64_t j = 0; low && j < n; ++j)
        for (int64_t k = 0; k < r; ++k) write<T>(dup)[j * r + k] = sums[k * n + j];
    } else {
      STD_TORCH_CHECK(false, "low_rank_grads: float64 or float32 expected");
    }
  });
  return {dlow, dup};
}

}  // namespace fastpeft::low_rank

STABLE_TORCH_LIBRARY_IMPL(fastpeft, CPU, m) { m.impl("low_rank_grads", TORCH_BOX(&fastpeft::low_rank::grads)); }
