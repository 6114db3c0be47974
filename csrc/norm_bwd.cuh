#pragma once
// Backward of LayerNorm (CENTER) and RMSNorm on CUDA: see norm.cuh.
#include "norm.cuh"

namespace fastpeft {

template <class T>
struct NormBwd {
  const T *dy, *h, *dh;  // dh may be null
  int64_t dy_stride, h_stride, dh_stride, rows, n;
  Param<T> weight;
  const acc_t<T> *mean, *rstd;
  T* dx;           // null: not wanted
  acc_t<T>* part;  // [gridDim.x, 2, n] sums of dweight and dbias; null: not wanted
  acc_t<T> inverse;  // 1 / n
};

// Rows of IN tensors on their way into shared memory, AHEAD of them at a time. A thread asks for its own K Packs of each and alone reads
// them: no barrier guards them. Packs beyond the end of a row are zeros.
template <int AHEAD, int IN, int K, class T>
class Ring {
  static constexpr int V = 16 / sizeof(T);
  using P = Pack<T, V>;

 public:
  static constexpr unsigned bytes(unsigned threads) { return AHEAD * IN * K * threads * 16; }
  __device__ Ring(const Group& group, unsigned packs) : group_(group), packs_(packs) {}
  // Tensor i from row r on, whose rows are walked over in steps.
  __device__ void walk(int i, const T* from, int64_t stride, int64_t r, int64_t step) {
    next_[i] = from + r * stride + group_.lane * V;
    step_[i] = step * stride;
  }
  __device__ void ask(bool there) {  // for one row more, where there is one
    if (there) {
#pragma unroll
      for (int i = 0; i < IN; ++i) {
#pragma unroll
        for (int k = 0; k < K; ++k) {
          const unsigned at = k * group_.size;
          copy_async(place(i, k), next_[i] + at * V, group_.lane + at < packs_);
        }
        next_[i] += step_[i];
      }
    }
    close_copies();
    stage_ = stage_ + 1 == AHEAD ? 0 : stage_ + 1;
  }
  __device__ void await() const { await_copies<AHEAD - 1>(); }  // the oldest row
  __device__ void take(int i, P (&to)[K]) const {               // its Packs of tensor i; then ask may take their place
#pragma unroll
    for (int k = 0; k < K; ++k) to[k] = *place(i, k);
  }

 private:
  __device__ P* place(int i, int k) const {
    return reinterpret_cast<P*>(dynamic_shared()) + ((stage_ * IN + i) * K + k) * blockDim.x + threadIdx.x;
  }
  const Group& group_;
  const unsigned packs_;
  unsigned stage_ = 0;
  const T* next_[IN];
  int64_t step_[IN];
};

// Rows under way, threads of a block at most, and blocks of so many that a multiprocessor's registers must hold.
constexpr int kAhead = 2;
constexpr int bwd_threads(int K) { return K == 3 ? 128 : 256; }
constexpr int bwd_blocks(bool dx, bool params, bool carry, int K) {
  if (K == 3) return dx && params ? 3 : 4;
  if (K == 4) return params || carry ? 1 : 2;
  return (dx && params) || carry ? 2 : 3;
}

// Groups walk over rows.
template <bool CENTER, bool DX, bool PARAMS, bool CARRY, int K, class T>
__global__ void __launch_bounds__(bwd_threads(K), bwd_blocks(DX, PARAMS, CARRY, K)) norm_bwd_kernel(NormBwd<T> a, unsigned per_row) {
  using A = acc_t<T>;
  constexpr int V = 16 / sizeof(T);
  constexpr bool late = PARAMS && CARRY;  // registers are few: dh stays in shared memory until it is added
  using P = Pack<T, V>;
  const Group group(per_row);
  const unsigned packs = unsigned(a.n) / V;
  const int64_t step = int64_t(gridDim.x) * group.count;
  int64_t r = int64_t(blockIdx.x) * group.count + group.index;
  A next_rstd = 0, next_mean = 0;
  auto read_statistics = [&](int64_t row) {  // a row before they are needed
    if (row >= a.rows) return;
    next_rstd = a.rstd[row];
    if (CENTER) next_mean = a.mean[row];
  };
  read_statistics(r);
  Ring<kAhead, 2 + CARRY, K, T> ring(group, packs);
  ring.walk(0, a.dy, a.dy_stride, r, step);
  ring.walk(1, a.h, a.h_stride, r, step);
  if (CARRY) ring.walk(2, a.dh, a.dh_stride, r, step);
#pragma unroll
  for (int ahead = 0; ahead < kAhead; ++ahead) ring.ask(r + ahead * step < a.rows);
  A weight[K][V] = {}, dweight[K][V] = {}, dbias[K][V] = {};
#pragma unroll
  for (int k = 0; k < K; ++k) {
    const unsigned i = group.lane + k * per_row;
    if (DX && i < packs) a.weight.template load<V>(i * V, weight[k]);
  }
  T* to = DX ? a.dx + r * a.n + group.lane * V : nullptr;
  for (unsigned slot = 0; r < a.rows; r += step, slot ^= 1) {
    P dy[K], h[K], dh[K];
    const A rstd = next_rstd, mean = next_mean;
    read_statistics(r + step);
    ring.await();
    ring.take(0, dy);
    ring.take(1, h);
    if constexpr (CARRY && !late) ring.take(2, dh);
    A sum[V] = {}, dot[V] = {};  // of wd and of wd x_hat
#pragma unroll
    for (int k = 0; k < K; ++k) {
      A d[V], x[V];
      widen(dy[k], d);
      widen(h[k], x);
#pragma unroll
      for (int e = 0; e < V; ++e) {
        const A x_hat = (x[e] - mean) * rstd, wd = d[e] * weight[k][e];
        if (PARAMS) dweight[k][e] += d[e] * x_hat;
        if (PARAMS && CENTER) dbias[k][e] += d[e];
        if (DX && CENTER) sum[e] += wd;
        if (DX) dot[e] += wd * x_hat;
      }
    }
    if constexpr (!late) ring.ask(r + kAhead * step < a.rows);
    if constexpr (DX) {
      Two<A> sums{0, 0};
      if constexpr (CENTER) sums = group_sum(Two<A>{tree_sum(sum), tree_sum(dot)}, group, slot);
      else sums.b = group_sum(tree_sum(dot), group, slot);
      const A c1 = -rstd * (sums.a * a.inverse), c2 = -rstd * rstd * (sums.b * a.inverse);  // dx = rstd wd + c1 + c2 (h - mean)
      if constexpr (late) {
        ring.take(2, dh);
        ring.ask(r + kAhead * step < a.rows);
      }
#pragma unroll
      for (int k = 0; k < K; ++k) {
        dy[k].keep(), h[k].keep();
        if (group.lane + k * per_row >= packs) continue;
        A d[V], x[V], add[V];
        widen(dy[k], d);
        widen(h[k], x);
        if (CARRY) widen(dh[k], add);
#pragma unroll
        for (int e = 0; e < V; ++e) {
          const A dx = d[e] * weight[k][e] * rstd + c1 + (x[e] - mean) * c2;
          d[e] = CARRY ? dx + add[e] : dx;
        }
        store_as<T>(d, to + k * per_row * V);
      }
      to += step * a.n;
    }
  }
  if constexpr (PARAMS) {  // the groups' sums, added in their order
    A *sums = reinterpret_cast<A*>(dynamic_shared()), *part = a.part + int64_t(blockIdx.x) * 2 * a.n;
    await_copies<0>();
#pragma unroll
    for (int p = 0; p < 1 + CENTER; ++p, part += a.n) {
      __syncthreads();
#pragma unroll
      for (int k = 0; k < K; ++k) {
        const unsigned i = group.lane + k * per_row;
        if (i < packs) store(p ? dbias[k] : dweight[k], (group.count > 1 ? sums + group.index * a.n : part) + i * V);
      }
      if (group.count == 1) continue;
      __syncthreads();
      for (unsigned j = threadIdx.x; j < a.n; j += blockDim.x) {
        A sum = sums[j];
        for (unsigned g = 1; g < group.count; ++g) sum += sums[g * a.n + j];
        part[j] = sum;
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
  unsigned slot = 0;
  for (int64_t r = blockIdx.x; r < a.rows; r += gridDim.x, slot ^= 1) {
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
    sums = group_sum(sums, group, slot);
    const A c1 = sums.a * a.inverse, c2 = sums.b * a.inverse;
    for (int64_t j = threadIdx.x; j < n; j += blockDim.x) {
      const A x_hat = (static_cast<A>(a.h[r * a.h_stride + j]) - mean) * rstd;
      A dx = rstd * (static_cast<A>(a.dy[r * a.dy_stride + j]) * a.weight[j] - c1 - x_hat * c2);
      if (a.dh) dx += static_cast<A>(a.dh[r * a.dh_stride + j]);
      a.dx[r * n + j] = static_cast<T>(dx);
    }
  }
}

// Backward has two rows and the parameters' sums in registers besides: a warp up to 3, else 2, and 4 where 256 threads need them.
inline Deal deal_backward(int64_t packs) {
  if (packs == 0 || packs > 4 * 256) return {};
  const int K = packs <= 96 ? int((packs + 31) / 32) : packs <= 2 * 256 ? 2 : 4;
  return deal(packs, K, bwd_threads(K));
}

// Returns the number of blocks, whose partial sums it puts into `part`: as many as run at the same time, fewer where they would sum over less
// than four rounds of rows, for a partial sum is written and read in float32, 16 bytes a column of both parameters.
template <bool CENTER, bool DX, bool PARAMS, bool CARRY, class T>
unsigned norm_bwd_packs(NormBwd<T>& a, const Deal& d, const Tensor& h, Tensor& part, const Launch& launch) {
  unsigned blocks = 0;
  with_packs(d.K, [&](auto k) {
    constexpr int K = decltype(k)::value;
    const auto kernel = norm_bwd_kernel<CENTER, DX, PARAMS, CARRY, K, T>;
    const unsigned sums = PARAMS && d.groups > 1 ? unsigned(d.groups * a.n * sizeof(acc_t<T>)) : 0;
    const unsigned shared = std::max(Ring<kAhead, 2 + CARRY, K, T>::bytes(d.threads()), sums);
    const int64_t rounds = blocks_of(a.rows, d.groups), resident = launch.multiprocessors() * launch.resident(kernel, d.threads(), shared);
    blocks = unsigned(std::min(PARAMS ? (rounds + 3) / 4 : rounds, resident));
    if (PARAMS) part = make_empty(h, {blocks * 2 * a.n}, acc_type(h)), a.part = write<acc_t<T>>(part);
    launch.with_shared(shared, kernel, Grid{blocks}, d.threads(), a, d.per_row);
  });
  return blocks;
}

template <bool CENTER>
void norm_bwd_cuda(
    const Tensor& dy, const Tensor& h, const Maybe& weight, const Maybe& mean, const Tensor& rstd, const Maybe& dh, bool need_dx,
    const Tensor& dx, const Tensor& dweight, const Tensor& dbias) {
  const Rows in = rows_of(h), up = rows_of(dy), carry = dh && need_dx ? rows_of(*dh) : in;
  const bool params = dweight.numel() > 0 || dbias.numel() > 0;
  if (in.count == 0) {
    for (Tensor sum : {dweight, dbias})
      if (sum.numel()) torch::stable::zero_(sum);
    return;
  }
  STD_TORCH_CHECK(up.count == in.count && up.n == in.n && carry.count == in.count && carry.n == in.n, "norm backward: shapes differ");
  STD_TORCH_CHECK((!mean || mean->numel() == in.count) && rstd.numel() == in.count, "norm backward: statistics were not kept");
  const Launch launch(h, dy, weight, mean, rstd, dh);
  dispatch(h.scalar_type(), "norm", [&](auto t) {
    using T = typename decltype(t)::type;
    using A = acc_t<T>;
    constexpr int V = 16 / sizeof(T);
    Tensor own_weight, part;
    NormBwd<T> a{read<T>(up.own), read<T>(in.own), dh && need_dx ? read<T>(carry.own) : nullptr, up.stride, in.stride, carry.stride, in.count,
                 in.n, param<T>(weight, own_weight, h, 1, in.n), CENTER ? read<A>(*mean) : nullptr, read<A>(rstd),
                 need_dx ? write<T>(dx) : nullptr, nullptr, A(1) / A(in.n)};
    const bool whole = packs<T, V>(a.dy, a.dy_stride) && packs<T, V>(a.h, a.h_stride) && packs<T, V>(a.dh, a.dh_stride) && a.weight.packs();
    const Deal d = deal_backward(packs_of<T>(in.n, whole));
    unsigned blocks = 0;
    if constexpr (!std::is_same_v<T, double>) {
      if (d.K) {
        auto run = !need_dx             ? norm_bwd_packs<CENTER, false, true, false, T>
                   : params && a.dh     ? norm_bwd_packs<CENTER, true, true, true, T>
                   : params             ? norm_bwd_packs<CENTER, true, true, false, T>
                   : a.dh               ? norm_bwd_packs<CENTER, true, false, true, T>
                                        : norm_bwd_packs<CENTER, true, false, false, T>;
        blocks = run(a, d, h, part, launch);
      }
    }
    if (blocks == 0) {
      const int64_t most = params ? std::min<int64_t>(2 * launch.multiprocessors(), (in.count + 3) / 4) : 8 * launch.multiprocessors();
      blocks = unsigned(std::min(in.count, most));
      if (params) part = make_empty(h, {blocks * 2 * in.n}, acc_type(h)), a.part = write<A>(part);
      launch(norm_bwd_any_kernel<CENTER, T>, Grid{blocks}, d.per_row, a);
    }
    if (params) sum_parts(read<A>(part), int(blocks), 2 * in.n, dweight, launch, &dbias);
  });
}

}  // namespace fastpeft
