#pragma once
// LayerNorm (CENTER) and RMSNorm on CUDA. A row of whole Packs is read once, K of them into the registers of each thread of a group, and kept
// there as it came: 16-bit numbers are widened at each pass over them. Backward (norm_bwd.cuh) walks over rows, the next two of which are under
// way into shared memory meanwhile, and keeps the parameters' sums in registers. Any other row (odd width or stride, float64, too wide) belongs
// to one block, which reads it more than once.
//
// Why: an H200 took 62 and 107 us for LayerNorm's forward in bfloat16 (8192 x 4096, 65536 x 768) and 104 and 133 us for dx where three to eight
// warps with a Pack or two a thread shared a row, 1.1 to 1.4 times as long as PyTorch at 4096; a copy of as many bytes as that first forward
// takes 37. Each row of dx was 868 instructions in each of 8 warps, and 517 in each of 3; it is 415 in 8, and 534 in one (machine code, sm_90, all
// branches), nothing of the row is waited for any more when it comes to it, and 96 KB are under way in a multiprocessor where it was 32. This
// form has not been timed: python -m bench ops layer_norm rms_norm --device cuda, where a copy of the same bytes runs beside it.
// Forward, counted: of LayerNorm's row of 4096 each of 4 warps runs some 720 instructions, where it was 880 while each pass widened its numbers
// anew: 90 for 16 bytes read or written, of the 113 that the schedulers issue in the time of a copy. 64 registers leave 8 such rows of 8 KB under
// way in a multiprocessor, RMSNorm's 32 leave 16.
#include "cuda.cuh"

namespace fastpeft {

template <class T>
struct NormFwd {
  const T *x, *residual;  // residual may be null
  int64_t x_stride, residual_stride, rows, n;
  Param<T> weight, bias;
  acc_t<T> eps, inverse;  // 1 / n
  T *y, *h;             // h: written where there is a residual
  acc_t<T> *mean, *rstd;  // null: not kept
};

template <bool CENTER, class T>
__device__ void keep_statistics(const NormFwd<T>& a, int64_t r, acc_t<T> mean, acc_t<T> rstd, const Group& group) {
  if (group.lane || !a.rstd) return;
  a.rstd[r] = rstd;
  if (CENTER) a.mean[r] = mean;
}

// From a thread's sums of v - mean and its square, and 1 / n: rstd, and the mean without its rounding error `off`, as on the CPU.
template <bool CENTER, class A>
__device__ A statistics(A left, A square, const Group& group, unsigned slot, A inverse, A eps, A& mean, A& off) {
  if constexpr (CENTER) {
    const Two<A> sums = group_sum(Two<A>{left, square}, group, slot);
    off = sums.a * inverse;
    square = max(sums.b - sums.a * off, A(0));
    mean += off;
  } else {
    square = group_sum(square, group, slot);
  }
  return A(1) / sqrt(square * inverse + eps);
}

// A group has one row, and many groups share a multiprocessor: while one sums, others read. The parameters are read where they are needed.
template <bool CENTER, bool RESIDUAL, int K, class T>
__global__ void __launch_bounds__(512) norm_fwd_kernel(NormFwd<T> a, unsigned per_row) {
  using A = acc_t<T>;
  constexpr int V = 16 / sizeof(T);
  using P = Pack<T, V>;
  const Group group(per_row);
  const unsigned packs = unsigned(a.n) / V;
  const int64_t r = int64_t(blockIdx.x) * group.count + group.index;
  if (r >= a.rows) return;  // the whole group
  auto mine = [&](int k) { return group.lane + k * per_row < packs; };
  const unsigned first = group.lane * V, each = per_row * V;
  P x[K], other[K];
  const T *from = a.x + r * a.x_stride + first, *add_from = RESIDUAL ? a.residual + r * a.residual_stride + first : nullptr;
#pragma unroll
  for (int k = 0; k < K; ++k) x[k] = P::template load_where<true>(mine(k), from + k * each);
  if constexpr (RESIDUAL) {
#pragma unroll
    for (int k = 0; k < K; ++k) other[k] = P::template load_where<true>(mine(k), add_from + k * each);
  }
  A sum[V] = {};
#pragma unroll
  for (int k = 0; k < K; ++k) {
    A v[V], add[V];
    widen(x[k], v);
    if constexpr (RESIDUAL) {
      widen(other[k], add);
      P sum_of_both;
#pragma unroll
      for (int e = 0; e < V; ++e) sum_of_both.v[e] = static_cast<T>(v[e] + add[e]);
      x[k] = sum_of_both;
      if (mine(k)) x[k].store(a.h + r * a.n + first + k * each);
      widen(x[k], v);
    }
#pragma unroll
    for (int e = 0; e < V; ++e) sum[e] += v[e];
  }
  A mean = CENTER ? group_sum(tree_sum(sum), group, 0) * a.inverse : A(0);
  A left[V] = {}, square[V] = {}, off = 0;
  A d[CENTER ? K : 1][V];  // v - mean, in place of v: to widen and to subtract again would be two more instructions an element
#pragma unroll
  for (int k = 0; k < K; ++k) {
    x[k].keep();
    if (CENTER && !mine(k)) continue;
    A v[V];
    widen(x[k], v);
#pragma unroll
    for (int e = 0; e < V; ++e) {
      if constexpr (CENTER) {
        d[k][e] = v[e] - mean;
        left[e] += d[k][e];
        square[e] += d[k][e] * d[k][e];
      } else {
        square[e] += v[e] * v[e];
      }
    }
  }
  const A rstd = statistics<CENTER>(tree_sum(left), tree_sum(square), group, 1, a.inverse, a.eps, mean, off), shift = -off * rstd;
#pragma unroll
  for (int k = 0; k < K; ++k) {
    if (!CENTER) x[k].keep();
    if (!mine(k)) continue;
    A v[V], weight[V], bias[V];
    if (!CENTER) widen(x[k], v);
    a.weight.template load<V>(first + k * each, weight);
    if (CENTER) a.bias.template load<V>(first + k * each, bias);
#pragma unroll
    for (int e = 0; e < V; ++e) {
      if constexpr (CENTER) v[e] = (d[k][e] * rstd + shift) * weight[e] + bias[e];
      else v[e] = v[e] * rstd * weight[e];
    }
    store_as<T>(v, a.y + r * a.n + first + k * each);
  }
  keep_statistics<CENTER>(a, r, mean, rstd, group);
}

template <bool CENTER, class T>
__global__ void norm_fwd_any_kernel(NormFwd<T> a) {
  using A = acc_t<T>;
  const Group group(blockDim.x);
  const int64_t r = blockIdx.x, n = a.n;
  const T* row = a.x + r * a.x_stride;
  A sum = 0;
  for (int64_t j = threadIdx.x; j < n; j += blockDim.x) {
    A v = static_cast<A>(row[j]);
    if (a.residual) {
      const T rounded = static_cast<T>(v + static_cast<A>(a.residual[r * a.residual_stride + j]));
      a.h[r * n + j] = rounded;  // read back below by this same thread
      v = static_cast<A>(rounded);
    }
    sum += v;
  }
  if (a.residual) row = a.h + r * n;
  A mean = CENTER ? group_sum(sum, group, 0) * a.inverse : A(0), left = 0, square = 0, off;
  for (int64_t j = threadIdx.x; j < n; j += blockDim.x) {
    const A d = static_cast<A>(row[j]) - mean;
    left += d;
    square += d * d;
  }
  const A rstd = statistics<CENTER>(left, square, group, 1, a.inverse, a.eps, mean, off);
  for (int64_t j = threadIdx.x; j < n; j += blockDim.x)
    a.y[r * n + j] = static_cast<T>((static_cast<A>(row[j]) - mean) * rstd * a.weight[j] + a.bias[j]);
  keep_statistics<CENTER>(a, r, mean, rstd, group);
}

// How a row of n elements is dealt out: K Packs to each of `per_row` threads, `groups` rows to a block; K = 0 where it does not fit.
struct Deal {
  int K = 0;
  unsigned per_row = 256, groups = 1;
  unsigned threads() const { return per_row * groups; }
};
template <class T>
int64_t packs_of(int64_t n, bool whole) {
  constexpr int V = 16 / sizeof(T);
  return std::is_same_v<T, double> || !whole || n % V ? 0 : n / V;
}
inline Deal deal(int64_t packs, int K, unsigned threads) {
  const unsigned per_row = unsigned((packs + 32 * K - 1) / (32 * K) * 32);
  return {K, per_row, std::max(1u, std::min(threads / per_row, 15u))};
}
// Each instruction that is not an element's (addresses, sums over the group, loops) counts less, the more Packs a thread has, and a group of one
// warp needs no barrier: up to 4, and of those with the fewest idle places the most.
inline Deal deal_forward(int64_t packs) {
  if (packs == 0 || packs > 4 * 512) return {};
  if (packs <= 128) return deal(packs, int((packs + 31) / 32), 128);
  const Deal four = deal(packs, 4, 128), three = deal(packs, 3, 128);
  return 4 * four.per_row > 3 * three.per_row && three.per_row <= 512 ? three : four;
}
// f(K as a constant).
template <class F>
void with_packs(int K, F&& f) {
  if (K == 1) f(std::integral_constant<int, 1>{});
  else if (K == 2) f(std::integral_constant<int, 2>{});
  else if (K == 3) f(std::integral_constant<int, 3>{});
  else f(std::integral_constant<int, 4>{});
}

inline int64_t blocks_of(int64_t rows, unsigned groups) { return (rows + groups - 1) / groups; }

template <bool CENTER>
void norm_fwd_cuda(
    const Tensor& x, const Maybe& residual, const Maybe& weight, const Maybe& bias, double eps, bool keep, const Tensor& y, const Tensor& h,
    const Tensor& mean, const Tensor& rstd) {
  const Rows in = rows_of(x), other = residual ? rows_of(*residual) : in;
  if (in.count == 0) return;
  STD_TORCH_CHECK(other.count == in.count && other.n == in.n, "norm: shapes differ");
  const Launch launch(x, residual, weight, bias);
  dispatch(x.scalar_type(), "norm", [&](auto t) {
    using T = typename decltype(t)::type;
    using A = acc_t<T>;
    constexpr int V = 16 / sizeof(T);
    Tensor own_weight, own_bias;
    const NormFwd<T> a{read<T>(in.own), residual ? read<T>(other.own) : nullptr, in.stride, other.stride, in.count, in.n,
                       param<T>(weight, own_weight, x, 1, in.n), param<T>(bias, own_bias, x, 0, in.n), A(eps), A(1) / A(in.n), write<T>(y),
                       residual ? write<T>(h) : nullptr, keep && CENTER ? write<A>(mean) : nullptr, keep ? write<A>(rstd) : nullptr};
    const bool whole = packs<T, V>(a.x, a.x_stride) && packs<T, V>(a.residual, a.residual_stride) && a.weight.packs() && a.bias.packs();
    const Deal d = deal_forward(packs_of<T>(in.n, whole));
    if constexpr (!std::is_same_v<T, double>) {
      if (d.K)
        return with_packs(d.K, [&](auto k) {
          constexpr int K = decltype(k)::value;
          const auto kernel = residual ? norm_fwd_kernel<CENTER, true, K, T> : norm_fwd_kernel<CENTER, false, K, T>;
          launch(kernel, Grid{blocks_of(in.count, d.groups)}, d.threads(), a, d.per_row);
        });
    }
    launch(norm_fwd_any_kernel<CENTER, T>, Grid{in.count}, d.per_row, a);
  });
}

}  // namespace fastpeft
