#pragma once
// LayerNorm (CENTER) and RMSNorm on CUDA. A row of whole Packs is read once, K of them into the registers of each thread of a group, and kept
// there as it came: 16-bit numbers are widened at each pass over them. Backward's groups walk over rows, the next two of which are under way
// into shared memory meanwhile, and keep the parameters' sums in registers. Any other row (odd width or stride, float64, too wide) belongs to
// one block, which reads it more than once.
//
// Why: an H200 took 62 and 107 us for LayerNorm's forward in bfloat16 (8192 x 4096, 65536 x 768) and 104 and 133 us for dx where three to eight
// warps with a Pack or two a thread shared a row, 1.1 to 1.4 times as long as PyTorch at 4096; a copy of as many bytes as that first forward
// takes 37. Each row of dx was 868 instructions in each of 8 warps, and 517 in each of 3; it is 410, and 531 in one (machine code, sm_90, all
// branches), nothing of the row is waited for any more when it comes to it, and 96 KB are under way in a multiprocessor where it was 32. This
// form has not been timed: python -m bench ops layer_norm rms_norm --device cuda, where a copy of the same bytes runs beside it.
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

template <bool CENTER, class T>
__device__ void keep_statistics(const NormFwd<T>& a, int64_t r, acc_t<T> mean, acc_t<T> rstd, const Group& group) {
  if (group.lane || !a.rstd) return;
  a.rstd[r] = rstd;
  if (CENTER) a.mean[r] = mean;
}

// From a thread's sums of v - mean and its square, and 1 / n: rstd, and the mean without its rounding error, as on the CPU.
template <bool CENTER, class A>
__device__ A statistics(A left, A square, const Group& group, unsigned slot, A inverse, A eps, A& mean) {
  if constexpr (CENTER) {
    const Two<A> sums = group_sum(Two<A>{left, square}, group, slot);
    const A off = sums.a * inverse;
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
  P x[K] = {}, other[K] = {};
  const T *from = a.x + r * a.x_stride + first, *add_from = RESIDUAL ? a.residual + r * a.residual_stride + first : nullptr;
#pragma unroll
  for (int k = 0; k < K; ++k)
    if (mine(k)) x[k] = P::load_once(from + k * each);
#pragma unroll
  for (int k = 0; k < K; ++k)
    if (RESIDUAL && mine(k)) other[k] = P::load_once(add_from + k * each);
  A sum[V] = {};
#pragma unroll
  for (int k = 0; k < K; ++k) {
    A v[V], add[V];
    widen(x[k], v);
    if constexpr (RESIDUAL) {
      widen(other[k], add);
#pragma unroll
      for (int e = 0; e < V; ++e) x[k].v[e] = static_cast<T>(v[e] + add[e]);
      if (mine(k)) x[k].store(a.h + r * a.n + first + k * each);
      widen(x[k], v);
    }
#pragma unroll
    for (int e = 0; e < V; ++e) sum[e] += v[e];
  }
  A mean = CENTER ? group_sum(tree_sum(sum), group, 0) * a.inverse : A(0);
  A left[V] = {}, square[V] = {};
#pragma unroll
  for (int k = 0; k < K; ++k) {
    x[k].keep();
    if (CENTER && !mine(k)) continue;
    A v[V];
    widen(x[k], v);
#pragma unroll
    for (int e = 0; e < V; ++e) {
      const A d = v[e] - mean;
      left[e] += d;
      square[e] += d * d;
    }
  }
  const A rstd = statistics<CENTER>(tree_sum(left), tree_sum(square), group, 1, a.inverse, a.eps, mean);
#pragma unroll
  for (int k = 0; k < K; ++k) {
    x[k].keep();
    if (!mine(k)) continue;
    A v[V], weight[V], bias[V];
    widen(x[k], v);
    a.weight.template load<V>(first + k * each, weight);
    if (CENTER) a.bias.template load<V>(first + k * each, bias);
#pragma unroll
    for (int e = 0; e < V; ++e) {
      const A x_hat = (v[e] - mean) * rstd;
      x[k].v[e] = static_cast<T>(CENTER ? x_hat * weight[e] + bias[e] : x_hat * weight[e]);
    }
    x[k].store(a.y + r * a.n + first + k * each);
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
  A mean = CENTER ? group_sum(sum, group, 0) * a.inverse : A(0), left = 0, square = 0;
  for (int64_t j = threadIdx.x; j < n; j += blockDim.x) {
    const A d = static_cast<A>(row[j]) - mean;
    left += d;
    square += d * d;
  }
  const A rstd = statistics<CENTER>(left, square, group, 1, a.inverse, a.eps, mean);
  for (int64_t j = threadIdx.x; j < n; j += blockDim.x)
    a.y[r * n + j] = static_cast<T>((static_cast<A>(row[j]) - mean) * rstd * a.weight[j] + a.bias[j]);
  keep_statistics<CENTER>(a, r, mean, rstd, group);
}

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
// Of backward: rows under way, threads of a block at most, and blocks of so many that a multiprocessor's registers must hold.
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
    if constexpr (CARRY) ring.take(2, dh);
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
    ring.ask(r + kAhead * step < a.rows);
    if constexpr (DX) {
      Two<A> sums{0, 0};
      if constexpr (CENTER) sums = group_sum(Two<A>{tree_sum(sum), tree_sum(dot)}, group, slot);
      else sums.b = group_sum(tree_sum(dot), group, slot);
      const A c1 = -rstd * (sums.a * a.inverse), c2 = -rstd * rstd * (sums.b * a.inverse);  // dx = rstd wd + c1 + c2 (h - mean)
#pragma unroll
      for (int k = 0; k < K; ++k) {
        dy[k].keep(), h[k].keep();
        if (group.lane + k * per_row >= packs) continue;
        A d[V], x[V], add[V];
        widen(dy[k], d);
        widen(h[k], x);
        if (CARRY) widen(dh[k], add);
        P out;
#pragma unroll
        for (int e = 0; e < V; ++e) {
          const A dx = d[e] * weight[k][e] * rstd + c1 + (x[e] - mean) * c2;
          out.v[e] = static_cast<T>(CARRY ? dx + add[e] : dx);
        }
        out.store(to + k * per_row * V);
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
// Backward has two rows and the parameters' sums in registers besides: a warp up to 3, else 2, and 4 where 256 threads need them.
inline Deal deal_backward(int64_t packs) {
  if (packs == 0 || packs > 4 * 256) return {};
  const int K = packs <= 96 ? int((packs + 31) / 32) : packs <= 2 * 256 ? 2 : 4;
  return deal(packs, K, bwd_threads(K));
}

// f(K as a constant).
template <class F>
void with_packs(int K, F&& f) {
  if (K == 1) f(std::integral_constant<int, 1>{});
  else if (K == 2) f(std::integral_constant<int, 2>{});
  else if (K == 3) f(std::integral_constant<int, 3>{});
  else f(std::integral_constant<int, 4>{});
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
                       param<T>(weight, own_weight, x, 1), param<T>(bias, own_bias, x, 0), A(eps), A(1) / A(in.n), write<T>(y),
                       residual ? write<T>(h) : nullptr, keep && CENTER ? write<A>(mean) : nullptr, keep ? write<A>(rstd) : nullptr};
    const bool whole = packs<T, V>(a.x, a.x_stride) && packs<T, V>(a.residual, a.residual_stride) && a.weight.packs() && a.bias.packs();
    const Deal d = deal_forward(packs_of<T>(in.n, whole));
    if constexpr (!std::is_same_v<T, double>) {
      if (d.K)
        return with_packs(d.K, [&](auto k) {
          constexpr int K = decltype(k)::value;
          const auto kernel = residual ? norm_fwd_kernel<CENTER, true, K, T> : norm_fwd_kernel<CENTER, false, K, T>;
          launch(kernel, blocks_of(in.count, d.groups), d.threads(), a, d.per_row);
        });
    }
    launch(norm_fwd_any_kernel<CENTER, T>, unsigned(in.count), d.per_row, a);
  });
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
    const unsigned rounds = blocks_of(a.rows, d.groups), resident = unsigned(launch.multiprocessors() * launch.resident(kernel, d.threads(), shared));
    blocks = std::min(PARAMS ? (rounds + 3) / 4 : rounds, resident);
    if (PARAMS) part = make_empty(h, {blocks * 2 * a.n}, acc_type(h)), a.part = write<acc_t<T>>(part);
    launch.with_shared(shared, kernel, blocks, d.threads(), a, d.per_row);
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
  const Launch launch(h);
  dispatch(h.scalar_type(), "norm", [&](auto t) {
    using T = typename decltype(t)::type;
    using A = acc_t<T>;
    constexpr int V = 16 / sizeof(T);
    Tensor own_weight, part;
    NormBwd<T> a{read<T>(up.own), read<T>(in.own), dh && need_dx ? read<T>(carry.own) : nullptr, up.stride, in.stride, carry.stride, in.count,
                 in.n, param<T>(weight, own_weight, h, 1), CENTER ? read<A>(*mean) : nullptr, read<A>(rstd),
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
      blocks = unsigned(std::min<int64_t>(in.count, 2 * launch.multiprocessors()));
      if (params) part = make_empty(h, {blocks * 2 * in.n}, acc_type(h)), a.part = write<A>(part);
      launch(norm_bwd_any_kernel<CENTER, T>, blocks, d.per_row, a);
    }
    if (params) sum_parts(read<A>(part), int(blocks), 2 * in.n, dweight, launch, &dbias);
  });
}

}  // namespace fastpeft
