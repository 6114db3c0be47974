#pragma once
// LayerNorm (CENTER) and RMSNorm on CUDA. A row of whole Packs is read once, into the registers of a group of threads: three warps for 768
// elements of 16 bit, up to 16 for wider rows. Backward's groups walk over rows, keep the parameters' sums in registers, and read the next row
// while they compute this one. Any other row (odd width or stride, float64, too wide) belongs to one block, which reads it more than once.
#include "cuda.cuh"

namespace fastpeft {

template <class T>
struct NormFwd {
  const T *x, *residual;  // residual may be null
  int64_t x_stride, residual_stride, rows, n;
  Param<T> weight, bias;
  acc_t<T> eps;
  T *y, *h;             // h: written where there is a residual
  acc_t<T> *mean, *rstd;  // null: not kept
};

template <class T>
struct NormBwd {
  const T *dy, *h, *dh;  // dh may be null
  int64_t dy_stride, h_stride, dh_stride, rows, n;
  Param<T> weight;
  const acc_t<T> *mean, *rstd;
  T* dx;           // null: not wanted
  acc_t<T>* part;  // [gridDim.x, 2, n] sums of dweight and dbias; null: not wanted
};

template <bool CENTER, class T>
__device__ void keep_statistics(const NormFwd<T>& a, int64_t r, acc_t<T> mean, acc_t<T> rstd, const Group& group) {
  if (group.lane || !a.rstd) return;
  a.rstd[r] = rstd;
  if (CENTER) a.mean[r] = mean;
}

// From the sums of v - mean and its square: rstd, and the first mean without its rounding error, as on the CPU.
template <bool CENTER, class A>
__device__ A statistics(Two<A> sums, int64_t n, A eps, A& mean) {
  if (CENTER) {
    const A left = sums.a / n;
    sums.b -= n * left * left;
    mean += left;
  }
  return A(1) / sqrt(max(sums.b / n, A(0)) + eps);
}

template <class T>
constexpr int kThreads = sizeof(T) == 2 ? 384 : 512;  // of a block at most: what backward's registers allow, two blocks a multiprocessor for K = 1

// K Packs of a row in each thread of a group of `per_row`.
template <bool CENTER, int K, class T>
__global__ void __launch_bounds__(kThreads<T>) norm_fwd_kernel(NormFwd<T> a, unsigned per_row) {
  using A = acc_t<T>;
  constexpr int V = 16 / sizeof(T);
  using P = Pack<T, V>;
  const Group group(per_row);
  const int64_t r = int64_t(blockIdx.x) * group.count + group.index, packs = a.n / V;
  if (r >= a.rows) return;  // the whole group
  P x[K], other[K];
#pragma unroll
  for (int k = 0; k < K; ++k) {
    const int64_t i = group.lane + k * per_row;
    if (i < packs) x[k] = P::load(a.x + r * a.x_stride + i * V);
    if (i < packs && a.residual) other[k] = P::load(a.residual + r * a.residual_stride + i * V);
  }
  A v[K][V];
  Two<A> sums{0, 0};
#pragma unroll
  for (int k = 0; k < K; ++k) {
    const int64_t i = group.lane + k * per_row;
    if (i < packs && a.residual) {
#pragma unroll
      for (int e = 0; e < V; ++e) x[k].v[e] = static_cast<T>(static_cast<A>(x[k].v[e]) + static_cast<A>(other[k].v[e]));
      x[k].store(a.h + r * a.n + i * V);
    }
#pragma unroll
    for (int e = 0; e < V; ++e) {
      v[k][e] = i < packs ? static_cast<A>(x[k].v[e]) : A(0);
      sums.a += v[k][e];
    }
  }
  A mean = CENTER ? group_sum(sums, group).a / a.n : A(0);
  sums = {0, 0};
#pragma unroll
  for (int k = 0; k < K; ++k) {
#pragma unroll
    for (int e = 0; e < V; ++e) {
      const A d = group.lane + k * per_row < packs ? v[k][e] - mean : A(0);
      sums.a += d;
      sums.b += d * d;
    }
  }
  const A rstd = statistics<CENTER>(group_sum(sums, group), a.n, a.eps, mean);
#pragma unroll
  for (int k = 0; k < K; ++k) {
    const int64_t i = group.lane + k * per_row;
    if (i >= packs) continue;
    A weight[V], bias[V];
    a.weight.template load<V>(i * V, weight);
    a.bias.template load<V>(i * V, bias);
#pragma unroll
    for (int e = 0; e < V; ++e) x[k].v[e] = static_cast<T>((v[k][e] - mean) * rstd * weight[e] + bias[e]);
    x[k].store(a.y + r * a.n + i * V);
  }
  keep_statistics<CENTER>(a, r, mean, rstd, group);
}

template <bool CENTER, class T>
__global__ void norm_fwd_any_kernel(NormFwd<T> a) {
  using A = acc_t<T>;
  const Group group(blockDim.x);
  const int64_t r = blockIdx.x, n = a.n;
  const T* row = a.x + r * a.x_stride;
  Two<A> sums{0, 0};
  for (int64_t j = threadIdx.x; j < n; j += blockDim.x) {
    A v = static_cast<A>(row[j]);
    if (a.residual) {
      const T rounded = static_cast<T>(v + static_cast<A>(a.residual[r * a.residual_stride + j]));
      a.h[r * n + j] = rounded;  // read back below by this same thread
      v = static_cast<A>(rounded);
    }
    sums.a += v;
  }
  if (a.residual) row = a.h + r * n;
  A mean = CENTER ? group_sum(sums, group).a / n : A(0);
  sums = {0, 0};
  for (int64_t j = threadIdx.x; j < n; j += blockDim.x) {
    const A d = static_cast<A>(row[j]) - mean;
    sums.a += d;
    sums.b += d * d;
  }
  const A rstd = statistics<CENTER>(group_sum(sums, group), n, a.eps, mean);
  for (int64_t j = threadIdx.x; j < n; j += blockDim.x)
    a.y[r * n + j] = static_cast<T>((static_cast<A>(row[j]) - mean) * rstd * a.weight[j] + a.bias[j]);
  keep_statistics<CENTER>(a, r, mean, rstd, group);
}

// Two blocks a multiprocessor, so that one reads while the other waits: of 384 threads where K = 1, of 256 where K = 2, which 16 bit takes up
// to 4096 elements (WIDE: more threads, one block).
template <bool CENTER, int K, bool DX, bool PARAMS, bool WIDE, class T>
__global__ void __launch_bounds__(K == 1 || WIDE ? kThreads<T> : 256, K == 2 && WIDE ? 1 : 2) norm_bwd_kernel(NormBwd<T> a, unsigned per_row) {
  using A = acc_t<T>;
  constexpr int V = 16 / sizeof(T);
  constexpr bool early = K == 1 || WIDE;  // dh is read with the row; where registers are few, when it is added
  using P = Pack<T, V>;
  const Group group(per_row);
  const unsigned packs = a.n / V;  // 32 bit within a row: registers are few
  const int64_t step = int64_t(gridDim.x) * group.count;
  A dweight[K][V] = {}, dbias[K][V] = {};
  P dy[K], h[K], dh[K];
  auto read = [&](int64_t r) {
#pragma unroll
    for (int k = 0; k < K; ++k) {
      const unsigned i = group.lane + k * per_row;
      if (i >= packs) continue;
      dy[k] = P::load(a.dy + r * a.dy_stride + i * V);
      h[k] = P::load(a.h + r * a.h_stride + i * V);
    }
  };
  int64_t r = int64_t(blockIdx.x) * group.count + group.index;
  if (r < a.rows) read(r);
  for (; r < a.rows; r += step) {
    const A rstd = a.rstd[r], mean = CENTER ? a.mean[r] : A(0);
    A d[K][V], x_hat[K][V];
    Two<A> sums{0, 0};
#pragma unroll
    for (int k = 0; k < K; ++k) {
      const unsigned i = group.lane + k * per_row;
      if (DX && early && a.dh && i < packs) dh[k] = P::load(a.dh + r * a.dh_stride + i * V);
#pragma unroll
      for (int e = 0; e < V; ++e) {
        d[k][e] = i < packs ? static_cast<A>(dy[k].v[e]) : A(0);
        x_hat[k][e] = i < packs ? (static_cast<A>(h[k].v[e]) - mean) * rstd : A(0);
      }
    }
    if (r + step < a.rows) read(r + step);  // under way while this row is computed
#pragma unroll
    for (int k = 0; k < K; ++k) {
      const unsigned i = group.lane + k * per_row;
#pragma unroll
      for (int e = 0; e < V; ++e) {
        if (PARAMS) dweight[k][e] += d[k][e] * x_hat[k][e];
        if (PARAMS && CENTER) dbias[k][e] += d[k][e];
      }
      if (!DX || i >= packs) continue;
      A weight[V];
      a.weight.template load<V>(i * V, weight);
#pragma unroll
      for (int e = 0; e < V; ++e) {
        d[k][e] *= weight[e];
        if (CENTER) sums.a += d[k][e];
        sums.b += d[k][e] * x_hat[k][e];
      }
    }
    if constexpr (DX) {
      sums = group_sum(sums, group);
      const A c1 = sums.a / a.n, c2 = sums.b / a.n;
#pragma unroll
      for (int k = 0; k < K; ++k) {
        const unsigned i = group.lane + k * per_row;
        if (i >= packs) continue;
        P out;
        if (!early && a.dh) dh[k] = P::load(a.dh + r * a.dh_stride + i * V);
#pragma unroll
        for (int e = 0; e < V; ++e) {
          A dx = rstd * (d[k][e] - c1 - x_hat[k][e] * c2);
          if (a.dh) dx += static_cast<A>(dh[k].v[e]);
          out.v[e] = static_cast<T>(dx);
        }
        out.store(a.dx + r * a.n + i * V);
      }
    }
  }
  if constexpr (PARAMS) {  // the groups' sums, added by the first in their order
    __shared__ Two<A> others[kThreads<T>];
#pragma unroll
    for (int k = 0; k < K; ++k) {
      const unsigned i = group.lane + k * per_row;
#pragma unroll
      for (int e = 0; e < V; ++e) {
        Two<A> sum{dweight[k][e], dbias[k][e]};
        if (group.count > 1) {
          __syncthreads();
          others[threadIdx.x] = sum;
          __syncthreads();
        }
        if (group.index > 0 || i >= packs) continue;
        for (unsigned g = 1; g < group.count; ++g) sum.a += others[g * per_row + group.lane].a, sum.b += others[g * per_row + group.lane].b;
        A* part = a.part + int64_t(blockIdx.x) * 2 * a.n + i * V + e;
        part[0] = sum.a;
        if (CENTER) part[a.n] = sum.b;
      }
    }
  }
}

template <bool CENTER, class T>
__global__ void norm_bwd_any_kernel(NormBwd<T> a) {
  using A = acc_t<T>;
  const Group group(blockDim.x);
  const int64_t n = a.n;
  A* part = a.part ? a.part + int64_t(blockIdx.x) * 2 * n : nullptr;
  for (int64_t r = blockIdx.x; r < a.rows; r += gridDim.x) {
    const A rstd = a.rstd[r], mean = CENTER ? a.mean[r] : A(0);
    Two<A> sums{0, 0};
    for (int64_t j = threadIdx.x; j < n; j += blockDim.x) {
      const A d = static_cast<A>(a.dy[r * a.dy_stride + j]), x_hat = (static_cast<A>(a.h[r * a.h_stride + j]) - mean) * rstd;
      const A wd = d * a.weight[j];
      if (CENTER) sums.a += wd;
      sums.b += wd * x_hat;
      if (!part) continue;
      const bool first = r == blockIdx.x;  // an element of part belongs to one thread
      part[j] = d * x_hat + (first ? A(0) : part[j]);
      if (CENTER) part[n + j] = d + (first ? A(0) : part[n + j]);
    }
    if (!a.dx) continue;
    sums = group_sum(sums, group);
    const A c1 = sums.a / n, c2 = sums.b / n;
    for (int64_t j = threadIdx.x; j < n; j += blockDim.x) {
      const A x_hat = (static_cast<A>(a.h[r * a.h_stride + j]) - mean) * rstd;
      A dx = rstd * (static_cast<A>(a.dy[r * a.dy_stride + j]) * a.weight[j] - c1 - x_hat * c2);
      if (a.dh) dx += static_cast<A>(a.dh[r * a.dh_stride + j]);
      a.dx[r * n + j] = static_cast<T>(dx);
    }
  }
}

// How a row of n elements is dealt out: K Packs to each of `per_row` threads, one where 256 threads suffice; K = 0 where it does not fit.
struct Deal {
  int K = 0;
  unsigned per_row = 256, groups = 1;
};
template <class T>
Deal deal(int64_t n, bool packs) {
  constexpr int V = 16 / sizeof(T);
  const int64_t count = std::is_same_v<T, double> || !packs || n % V ? 0 : n / V;
  for (int K : {1, 2}) {
    const int threads = int(std::min<int64_t>((count + 32 * K - 1) / (32 * K), 1000) * 32);
    if (count && threads <= (K == 1 ? 256 : kThreads<T>)) return {K, unsigned(threads), K == 1 ? unsigned(std::min(kThreads<T> / threads, 15)) : 1u};
  }
  return {};
}

// Blocks that sum `rounds` rounds of rows. A partial sum is written and read in float32, 16 bytes a column of both parameters, where a row of
// 16 bit moves 6: two blocks a multiprocessor from 16 rounds each on, else one, and of few rows four rounds at least (modelled, not measured).
inline unsigned parts_of(unsigned rounds) {
  return rounds >= 16u * kParts ? kParts : std::max(1u, std::min(unsigned(kParts / 2), (rounds + 3) / 4));
}

inline unsigned blocks_of(int64_t rows, unsigned groups) { return unsigned((rows + groups - 1) / groups); }

template <bool CENTER>
void norm_fwd_cuda(
    const Tensor& x, const Maybe& residual, const Maybe& weight, const Maybe& bias, double eps, bool keep, const Tensor& y, const Tensor& h,
    const Tensor& mean, const Tensor& rstd) {
  const Rows in = rows_of(x), other = residual ? rows_of(*residual) : in;
  if (in.count == 0) return;
  const Launch launch(x);
  dispatch(x.scalar_type(), "norm", [&](auto t) {
    using T = typename decltype(t)::type;
    using A = acc_t<T>;
    constexpr int V = 16 / sizeof(T);
    Tensor own_weight, own_bias;
    const NormFwd<T> a{read<T>(in.own), residual ? read<T>(other.own) : nullptr, in.stride, other.stride, in.count, in.n,
                       param<T>(weight, own_weight, x, 1), param<T>(bias, own_bias, x, 0), A(eps), write<T>(y),
                       residual ? write<T>(h) : nullptr, keep && CENTER ? write<A>(mean) : nullptr, keep ? write<A>(rstd) : nullptr};
    const bool whole = packs<T, V>(a.x, a.x_stride) && packs<T, V>(a.residual, a.residual_stride) && a.weight.packs() && a.bias.packs();
    const Deal d = deal<T>(in.n, whole);
    if constexpr (!std::is_same_v<T, double>) {
      if (d.K) {
        auto kernel = d.K == 1 ? norm_fwd_kernel<CENTER, 1, T> : norm_fwd_kernel<CENTER, 2, T>;
        return launch(kernel, blocks_of(in.count, d.groups), d.per_row * d.groups, a, d.per_row);
      }
    }
    launch(norm_fwd_any_kernel<CENTER, T>, unsigned(in.count), d.per_row, a);
  });
}

template <bool CENTER, bool DX, bool PARAMS, class T>
void norm_bwd_packs(const NormBwd<T>& a, const Deal& d, unsigned blocks, const Launch& launch) {
  auto kernel = d.K == 1              ? norm_bwd_kernel<CENTER, 1, DX, PARAMS, false, T>
                : d.per_row * d.groups <= 256 ? norm_bwd_kernel<CENTER, 2, DX, PARAMS, false, T>
                                              : norm_bwd_kernel<CENTER, 2, DX, PARAMS, true, T>;
  launch(kernel, blocks, d.per_row * d.groups, a, d.per_row);
}

template <bool CENTER>
void norm_bwd_cuda(
    const Tensor& dy, const Tensor& h, const Maybe& weight, const Maybe& mean, const Tensor& rstd, const Maybe& dh, bool need_dx,
    const Tensor& dx, const Tensor& dweight, const Tensor& dbias) {
  const Rows in = rows_of(h), up = rows_of(dy), carry = dh ? rows_of(*dh) : in;
  const bool params = dweight.numel() > 0 || dbias.numel() > 0;
  if (in.count == 0) {
    for (Tensor sum : {dweight, dbias})
      if (sum.numel()) torch::stable::zero_(sum);
    return;
  }
  const Launch launch(h);
  dispatch(h.scalar_type(), "norm", [&](auto t) {
    using T = typename decltype(t)::type;
    using A = acc_t<T>;
    constexpr int V = 16 / sizeof(T);
    Tensor own_weight;
    NormBwd<T> a{read<T>(up.own), read<T>(in.own), dh ? read<T>(carry.own) : nullptr, up.stride, in.stride, carry.stride, in.count, in.n,
                 param<T>(weight, own_weight, h, 1), CENTER ? read<A>(*mean) : nullptr, read<A>(rstd), need_dx ? write<T>(dx) : nullptr,
                 nullptr};
    const bool whole = packs<T, V>(a.dy, a.dy_stride) && packs<T, V>(a.h, a.h_stride) && packs<T, V>(a.dh, a.dh_stride) && a.weight.packs();
    const Deal d = deal<T>(in.n, whole);
    const unsigned most = blocks_of(in.count, d.groups);
    const unsigned blocks = std::min(most, params ? parts_of(most) : 4 * kParts);  // with nothing to sum up eight for a multiprocessor
    const Tensor part = make_empty(h, {params ? blocks * 2 * in.n : 0}, acc_type(h));
    if (params) a.part = write<A>(part);
    bool done = false;
    if constexpr (!std::is_same_v<T, double>) {
      if (d.K && need_dx && params) norm_bwd_packs<CENTER, true, true>(a, d, blocks, launch);
      else if (d.K && need_dx) norm_bwd_packs<CENTER, true, false>(a, d, blocks, launch);
      else if (d.K) norm_bwd_packs<CENTER, false, true>(a, d, blocks, launch);
      done = d.K;
    }
    if (!done) launch(norm_bwd_any_kernel<CENTER, T>, blocks, d.per_row, a);
    if (params) sum_parts(read<A>(part), blocks, 2 * in.n, dweight, launch, &dbias);
  });
}

}  // namespace fastpeft
