// fastpeft::attention_inputs_fwd, fastpeft::attention_inputs_bwd on CUDA (schemas and equations in fastpeft/ops/attention_inputs.py).
//
// A row is one head of one token: a group of threads, a power of two within a warp, holds it in registers, in pairs of Packs that a rotation
// turns into each other. Queries, keys and values are three sides of one launch, blockIdx.y. Forward's groups have two neighbouring heads of a
// token each, which share the tables and a norm's weight; backward's walk over the rows of one head, so that the sums of a factor of that
// head stay in registers, as those of a norm's weight do.
//
// Why two: with one, an H200 took 111 us for a rotation of 8192 tokens' 64 heads of 128 in bfloat16, whose bytes it copies in 70. For each Pack a
// thread ran some 150 instructions, half of them divisions, addresses and the tables' loads, and four blocks of 8 KB shared a
// multiprocessor; now 88 (machine code, sm_90, a rotation by float32 tables), and five of 8 KB. Not timed since.
#include "cuda.cuh"

namespace fastpeft::attention_inputs {

constexpr unsigned kThreads = 256, kForward = 128;  // of a block

// Where the row of head h of token m of sample b begins.
struct At {
  int64_t b, m, h;
  __device__ int64_t operator()(uint32_t sample, uint32_t token, uint32_t head) const { return sample * b + token * m + head * h; }
};

// The tables of a rotation, [B or 1, M, rot]; none: rot is 0.
template <class T>
struct Tables {
  Param<T> cos, sin;
  int64_t b, m;
  uint32_t rot;
};

template <class T>
struct Side {
  const T *x, *dy;  // dy: backward's
  T* y;             // or dx; null: not wanted
  At x_at, dy_at;
  uint32_t rows;  // of y
  // of a token; what forward's groups take of one: kHeads neighbours each, the last what is left; tokens of a sample, with a prefix's
  Divisor heads, units, length;
  Param<T> norm, factor;  // absent where there is none
  const T* prefix;        // [heads, n, d], before the tokens; null: zeros there
  At prefix_at;
  uint32_t n;
  bool turns;
  // backward's sums, null: not wanted. [blocks, d]; [walks / heads, heads, d], of `walks` groups, each with rows of one head
  acc_t<T> *dnorm, *dfactor;
  uint32_t walks, blocks;
};

template <class T>
struct Args {
  Side<T> side[3];
  Tables<T> tables;
  uint32_t M, d, lanes, log_lanes;  // lanes: threads of a row, 2^log_lanes
  acc_t<T> offset, eps;
  bool transpose;  // the first kernel as the backward of rotations and factors
};

// The columns of a thread's pair of Packs: those that turn into each other, or two of those that pass through.
struct Pair {
  uint32_t one, two;
  bool mine, turns;
  template <class T>
  __device__ Pair(const Args<T>& a, uint32_t p) {
    const uint32_t half = a.tables.rot / 2;
    mine = p < a.d / 2, turns = p < half;
    one = turns ? p : p + half, two = turns ? p + half : p + a.d / 2;
  }
};

// The threads of a row: a warp, or a part of it.
struct Few {
  uint32_t lane, index, count;
  template <class T>
  __device__ explicit Few(const Args<T>& a)
      : lane(threadIdx.x & (a.lanes - 1)), index(threadIdx.x >> a.log_lanes), count(blockDim.x >> a.log_lanes) {}
};

template <class A>
__device__ Two<A> lane_sum(Two<A> v, unsigned lanes) {
  for (unsigned lane = lanes / 2; lane; lane >>= 1) {
    v.a += __shfl_xor_sync(~0u, v.a, lane);
    v.b += __shfl_xor_sync(~0u, v.b, lane);
  }
  return v;
}

// What turns a pair, or, transposed, turns it back.
template <int V, class T>
struct Rotation {
  using A = acc_t<T>;
  A c1[V], c2[V], s1[V], s2[V];
  __device__ void load(const Tables<T>& tables, int64_t at, const Pair& pair, bool transpose) {
    tables.cos.template load<V>(at + pair.one, c1);
    tables.cos.template load<V>(at + pair.two, c2);
    tables.sin.template load<V>(at + (transpose ? pair.two : pair.one), s1);
    tables.sin.template load<V>(at + (transpose ? pair.one : pair.two), s2);
#pragma unroll
    for (int e = 0; e < V; ++e) s1[e] = transpose ? s1[e] : -s1[e], s2[e] = transpose ? -s2[e] : s2[e];
  }
  __device__ void turn(A (&one)[V], A (&two)[V]) const {
#pragma unroll
    for (int e = 0; e < V; ++e) {
      const A x1 = one[e], x2 = two[e];
      one[e] = x1 * c1[e] + x2 * s1[e];
      two[e] = x2 * c2[e] + x1 * s2[e];
    }
  }
};

template <int V, class T>
__device__ void times(const Param<T>& factor, int64_t at, acc_t<T> (&v)[V]) {
  acc_t<T> f[V];
  factor.template load<V>(at, f);
#pragma unroll
  for (int e = 0; e < V; ++e) v[e] *= f[e];
}

// What a norm multiplies a pair by, beside rstd.
template <int V, class T>
struct Weights {
  acc_t<T> one[V], two[V];
  __device__ void load(const Args<T>& a, const Side<T>& s, const Pair& pair) {
    s.norm.template load<V>(pair.one, one);
    s.norm.template load<V>(pair.two, two);
#pragma unroll
    for (int e = 0; e < V; ++e) one[e] += a.offset, two[e] += a.offset;
  }
};

// A pair in the accumulator's type, times its head's factor where there is one.
template <int V, class T>
struct Wide {
  acc_t<T> one[V], two[V];
  __device__ Wide(const Pack<T, V>& first, const Pack<T, V>& second) { widen(first, one), widen(second, two); }
  __device__ void scale(const Args<T>& a, const Side<T>& s, uint32_t head, const Pair& pair) {
    times<V, T>(s.factor, head * a.d + pair.one, one), times<V, T>(s.factor, head * a.d + pair.two, two);
  }
};

// K pairs of Packs of each head in each thread.
template <int K>
constexpr uint32_t kHeads = K == 1 ? 2 : 1;  // of a token, which a group takes together

template <int V, int K, class T>
__global__ void __launch_bounds__(kForward, K == 1 ? 5 : 4) attention_inputs_fwd_kernel(const __grid_constant__ Args<T> a) {
  using A = acc_t<T>;
  using P = Pack<T, V>;
  constexpr uint32_t U = kHeads<K>;
  const Side<T>& s = a.side[blockIdx.y];
  const Few group(a);
  const uint32_t unit = blockIdx.x * group.count + group.index, t = s.units.under(unit), h = (unit - t * uint32_t(s.units.size)) * U;
  const uint32_t heads = uint32_t(s.heads.size), r = t * heads + h;
  // the whole block: warps stay together, for their sums
  if (s.units.under(blockIdx.x * group.count) * heads >= s.rows) return;
  const uint32_t b = s.length.under(t), m = t - b * uint32_t(s.length.size);
  const bool here = r < s.rows, token = here && m >= s.n;
  const T* from = token ? s.x + s.x_at(b, m - s.n, h) : here && s.prefix ? s.prefix + s.prefix_at(0, m, h) : nullptr;
  const int64_t step = token ? s.x_at.h : s.prefix_at.h, table = b * a.tables.b + (token ? m - s.n : 0) * a.tables.m;
  P one[U][K], two[U][K];
#pragma unroll
  for (int k = 0; k < K; ++k) {
    const Pair pair(a, (group.lane + k * a.lanes) * V);
#pragma unroll
    for (uint32_t u = 0; u < U; ++u) {
      const bool wanted = pair.mine && from && h + u < heads;
      one[u][k] = P::load_where(wanted, from + u * step + pair.one), two[u][k] = P::load_where(wanted, from + u * step + pair.two);
    }
  }
  Rotation<V, T> rotation;
  auto look_up = [&](const Pair& pair) {
    if (s.turns && token && pair.turns) rotation.load(a.tables, table, pair, a.transpose);
  };
  if constexpr (K == 1) look_up(Pair(a, group.lane * V));  // while they come
  A rstd[U] = {};
  if (s.norm.data) {  // of the whole block
#pragma unroll
    for (uint32_t u = 0; u < U; ++u) {
      Two<A> sums{0, 0};
#pragma unroll
      for (int k = 0; k < K; ++k) {
        const Pair pair(a, (group.lane + k * a.lanes) * V);
        Wide<V, T> x(one[u][k], two[u][k]);
        if (s.factor.data && pair.mine && token && !a.transpose && h + u < heads) x.scale(a, s, h + u, pair);
#pragma unroll
        for (int e = 0; e < V; ++e) sums.a += x.one[e] * x.one[e], sums.b += x.two[e] * x.two[e];
        if constexpr (sizeof(P) == 16) one[u][k].keep(), two[u][k].keep();
      }
      sums = lane_sum(sums, a.lanes);
      rstd[u] = A(1) / sqrt((sums.a + sums.b) / a.d + a.eps);
    }
  }
  if (!here) return;
  T* to = s.y + int64_t(r) * a.d;
#pragma unroll
  for (int k = 0; k < K; ++k) {
    const Pair pair(a, (group.lane + k * a.lanes) * V);
    if (!pair.mine) continue;
    if constexpr (K > 1) look_up(pair);
    Weights<V, T> weights;
    if (s.norm.data) weights.load(a, s, pair);
#pragma unroll
    for (uint32_t u = 0; u < U; ++u) {
      if (h + u >= heads) continue;
      Wide<V, T> x(one[u][k], two[u][k]);
      if (s.factor.data && token && !a.transpose) x.scale(a, s, h + u, pair);
      if (s.norm.data && token) {
#pragma unroll
        for (int e = 0; e < V; ++e) x.one[e] *= rstd[u] * weights.one[e], x.two[e] *= rstd[u] * weights.two[e];
      }
      if (s.turns && token && pair.turns) rotation.turn(x.one, x.two);
      if (s.factor.data && token && a.transpose) x.scale(a, s, h + u, pair);
      store_as<T>(x.one, to + u * a.d + pair.one);
      store_as<T>(x.two, to + u * a.d + pair.two);
    }
  }
}

// What backward is asked for: with NORM, DNORM, DFACTOR the code for a norm on some side, and for the sums of its weight and of a factor, is
// there. Without sums a group has one row, and three blocks share a multiprocessor.
template <int V, int K, bool NORM, bool DNORM, bool DFACTOR, class T>
__global__ void __launch_bounds__(kThreads, K > 1 && sizeof(T) == 8 ? 1 : DNORM || DFACTOR ? 2 : 3)
    attention_inputs_bwd_kernel(const __grid_constant__ Args<T> a) {
  using A = acc_t<T>;
  using P = Pack<T, V>;
  constexpr unsigned warps = kThreads / 32;
  const Side<T>& s = a.side[blockIdx.y];
  if (blockIdx.x >= s.blocks) return;
  const Few group(a);
  const uint32_t walk = blockIdx.x * group.count + group.index, head = walk - s.heads.under(walk) * uint32_t(s.heads.size);
  A dnorm1[K][V] = {}, dnorm2[K][V] = {}, dfactor1[K][V] = {}, dfactor2[K][V] = {};
  Weights<V, T> weights;
  auto weigh = [&](const Pair& pair) {
    if (NORM && s.norm.data && pair.mine) weights.load(a, s, pair);
  };
  if constexpr (K == 1 && DNORM) weigh(Pair(a, group.lane * V));
  const uint32_t rounds = (s.rows + s.walks - 1) / s.walks;  // of the whole block: warps stay together
  for (uint32_t i = 0; i < rounds; ++i) {
    const uint32_t r = walk + i * s.walks;
    const bool here = walk < s.walks && r < s.rows;
    const uint32_t t = s.heads.under(r), b = s.length.under(t), m = t - b * uint32_t(s.length.size);
    const T *dy = s.dy + s.dy_at(b, m, head), *x = s.x ? s.x + s.x_at(b, m, head) : nullptr;
    const int64_t table = b * a.tables.b + m * a.tables.m;
    P x1[K], x2[K];
    A g1[K][V], g2[K][V];
    Two<A> sums{0, 0};  // of (x l)^2, and of x l times its cotangent
#pragma unroll
    for (int k = 0; k < K; ++k) {
      const Pair pair(a, (group.lane + k * a.lanes) * V);
      if (!here || !pair.mine) continue;
      if (x) x1[k] = P::load(x + pair.one), x2[k] = P::load(x + pair.two);
      widen(P::load(dy + pair.one), g1[k]);
      widen(P::load(dy + pair.two), g2[k]);
      if (s.turns && pair.turns) {
        Rotation<V, T> rotation;
        rotation.load(a.tables, table, pair, true);
        rotation.turn(g1[k], g2[k]);
      }
      if (!NORM || !s.norm.data) continue;
      if constexpr (K > 1 || !DNORM) weigh(pair);
      Wide<V, T> v(x1[k], x2[k]);
      if (s.factor.data) v.scale(a, s, head, pair);
#pragma unroll
      for (int e = 0; e < V; ++e) {
        sums.a += v.one[e] * v.one[e] + v.two[e] * v.two[e];
        const A gw1 = g1[k][e] * weights.one[e], gw2 = g2[k][e] * weights.two[e];
        sums.b += gw1 * v.one[e] + gw2 * v.two[e];
        if (!DNORM) g1[k][e] = gw1, g2[k][e] = gw2;  // all that dx asks for
      }
    }
    A rstd = 1, mean = 0;
    if (NORM && s.norm.data) {
      sums = lane_sum(sums, a.lanes);
      rstd = A(1) / sqrt(sums.a / a.d + a.eps);
      mean = sums.b * rstd / a.d;
    }
    if (!here) continue;
#pragma unroll
    for (int k = 0; k < K; ++k) {
      const Pair pair(a, (group.lane + k * a.lanes) * V);
      if (!pair.mine) continue;
      if (NORM && s.norm.data) {
        if constexpr (K > 1) weigh(pair);
        Wide<V, T> v(x1[k], x2[k]);
        if (s.factor.data) v.scale(a, s, head, pair);
#pragma unroll
        for (int e = 0; e < V; ++e) {
          v.one[e] *= rstd, v.two[e] *= rstd;
          if (DNORM) dnorm1[k][e] += g1[k][e] * v.one[e], dnorm2[k][e] += g2[k][e] * v.two[e];
          g1[k][e] = rstd * (g1[k][e] * (DNORM ? weights.one[e] : A(1)) - v.one[e] * mean);
          g2[k][e] = rstd * (g2[k][e] * (DNORM ? weights.two[e] : A(1)) - v.two[e] * mean);
        }
      }
      if (DFACTOR && s.dfactor) {
#pragma unroll
        for (int e = 0; e < V; ++e) {
          dfactor1[k][e] += g1[k][e] * static_cast<A>(x1[k].v[e]);
          dfactor2[k][e] += g2[k][e] * static_cast<A>(x2[k].v[e]);
        }
      }
      if (!s.y) continue;
      if (s.factor.data) times<V, T>(s.factor, head * a.d + pair.one, g1[k]), times<V, T>(s.factor, head * a.d + pair.two, g2[k]);
      T* to = s.y + int64_t(r) * a.d;
      store_as<T>(g1[k], to + pair.one);
      store_as<T>(g2[k], to + pair.two);
    }
  }
  if (DFACTOR && s.dfactor && walk < s.walks) {
#pragma unroll
    for (int k = 0; k < K; ++k) {
      const Pair pair(a, (group.lane + k * a.lanes) * V);
      if (!pair.mine) continue;
      A* part = s.dfactor + int64_t(walk) * a.d;
#pragma unroll
      for (int e = 0; e < V; ++e) part[pair.one + e] = dfactor1[k][e], part[pair.two + e] = dfactor2[k][e];
    }
  }
  if constexpr (!DNORM) return;
  if (!s.dnorm) return;
  __shared__ A sums[warps][512];  // the groups of a warp by shuffles, then the warps in their order
#pragma unroll
  for (int k = 0; k < K; ++k) {
    const Pair pair(a, (group.lane + k * a.lanes) * V);
#pragma unroll
    for (int e = 0; e < V; ++e) {
      Two<A> sum{dnorm1[k][e], dnorm2[k][e]};
      for (unsigned lane = a.lanes; lane < 32; lane <<= 1) {
        sum.a += __shfl_xor_sync(~0u, sum.a, lane);
        sum.b += __shfl_xor_sync(~0u, sum.b, lane);
      }
      if (!pair.mine || (threadIdx.x & 31) >= a.lanes) continue;
      sums[threadIdx.x / 32][pair.one + e] = sum.a;
      sums[threadIdx.x / 32][pair.two + e] = sum.b;
    }
  }
  __syncthreads();
  for (uint32_t j = threadIdx.x; j < a.d; j += kThreads) {
    A sum = 0;
#pragma unroll
    for (unsigned w = 0; w < warps; ++w) sum += sums[w][j];
    s.dnorm[int64_t(blockIdx.x) * a.d + j] = sum;
  }
}

constexpr uint32_t kWidest = 512;  // channels of a head

unsigned blocks_of(uint32_t rows, unsigned groups) { return (rows + groups - 1) / groups; }

// x [B, M, heads, d], or by heads, as it lies; with channels that are not neighbours it is copied.
Tensor by_rows(const Tensor& x) { return x.stride(3) == 1 ? x : torch::stable::contiguous(x); }
At at(const Tensor& x) { return {x.stride(0), x.stride(1), x.stride(2)}; }
template <int V>
bool in_packs(const void* p, const At& at) {
  return reinterpret_cast<uintptr_t>(p) % 16 == 0 && at.b % V == 0 && at.m % V == 0 && at.h % V == 0;
}

// What a side is given, each absent where there is none; and keeps alive until the launches are queued.
struct Given {
  Maybe x, dy, norm, factor, prefix;
  int64_t n;
  bool turns;
  Tensor own_x, own_dy, own_norm, own_factor, own_prefix;
};

template <class T>
struct Tabled {
  Tensor cos, sin;
  Tables<T> tables;
  template <int V>
  bool packs() const {
    return tables.rot == 0 || (tables.rot % (2 * V) == 0 && tables.cos.packs() && tables.sin.packs() && tables.b % V == 0 && tables.m % V == 0);
  }
};
template <class T>
Tabled<T> tabled(const Maybe& cos, const Maybe& sin, const Tensor& like) {
  Tabled<T> out{like, like, {{nullptr, false, 0}, {nullptr, false, 0}, 0, 0, 0}};
  if (!cos) return out;
  STD_TORCH_CHECK(cos->dim() == 3 && cos->size(2) % 2 == 0 && cos->size(2) <= like.size(3), "attention_inputs: tables are [B or 1, M, rot]");
  const Param<T> c = param<T>(cos, out.cos, like, 0), s = param<T>(sin, out.sin, like, 0);
  out.tables = {c, s, out.cos.size(0) == 1 ? 0 : out.cos.stride(0), out.cos.size(1) == 1 ? 0 : out.cos.stride(1), uint32_t(cos->size(2))};
  return out;
}

template <class T>
Side<T> side(Given& given, const Tensor& like, const Tensor* y) {
  Side<T> s{};
  if (given.x) given.own_x = by_rows(*given.x), s.x = read<T>(given.own_x), s.x_at = at(given.own_x);
  if (given.dy) given.own_dy = by_rows(*given.dy), s.dy = read<T>(given.own_dy), s.dy_at = at(given.own_dy);
  if (given.prefix) {
    given.own_prefix = torch::stable::contiguous(*given.prefix);
    STD_TORCH_CHECK(given.prefix->size(1) == given.n, "attention_inputs: a prefix of another length than is reserved");
    s.prefix = read<T>(given.own_prefix);
    s.prefix_at = {0, given.own_prefix.stride(1), given.own_prefix.stride(0)};
  }
  s.n = uint32_t(given.n);
  const Tensor& rows = given.x ? *given.x : *given.dy;
  s.heads = Divisor(rows.size(2)), s.length = Divisor(s.n + rows.size(1));
  const int64_t count = rows.size(0) * s.length.size * s.heads.size;
  STD_TORCH_CHECK(count < int64_t(1) << 31, "attention_inputs: more than 2^31 heads of tokens");
  s.rows = uint32_t(count);
  s.norm = param<T>(given.norm, given.own_norm, like, 0);
  s.factor = param<T>(given.factor, given.own_factor, like, 0);
  s.turns = given.turns;
  if (y && y->numel()) s.y = write<T>(*y);
  return s;
}

// f(V, K) for the widest Packs that every row of these sides is made of; sets lanes.
template <class T, class F>
void by_packs(Args<T>& a, const Tabled<T>& tables, unsigned sides, F&& f) {
  constexpr int V = 16 / sizeof(T);
  STD_TORCH_CHECK(a.d % 2 == 0 && a.d <= kWidest, "attention_inputs: heads of an even number of channels, 512 at most");
  bool whole = a.d / 2 % V == 0 && a.d / 2 / V <= 32 && tables.template packs<V>();
  for (unsigned i = 0; whole && i < sides; ++i) {
    const Side<T>& s = a.side[i];
    whole = in_packs<V>(s.x, s.x_at) && in_packs<V>(s.dy, s.dy_at) && in_packs<V>(s.prefix, s.prefix_at) && s.norm.packs() && s.factor.packs();
  }
  if (whole) {
    for (a.lanes = 1, a.log_lanes = 0; a.lanes * V < a.d / 2; ++a.log_lanes) a.lanes *= 2;
    f(std::integral_constant<int, V>{}, std::integral_constant<int, 1>{});
  } else {
    a.lanes = 32, a.log_lanes = 5;
    f(std::integral_constant<int, 1>{}, std::integral_constant<int, kWidest / 64>{});
  }
}

template <class T>
void launch_fwd(Args<T>& a, const Tabled<T>& tables, unsigned sides, const Launch& launch) {
  by_packs(a, tables, sides, [&](auto v, auto k) {
    constexpr uint32_t each = kHeads<decltype(k)::value>;
    uint32_t units = 0;
    for (unsigned i = 0; i < sides; ++i) {
      Side<T>& s = a.side[i];
      s.units = Divisor((s.heads.size + each - 1) / each);
      if (s.rows) units = std::max(units, s.rows / uint32_t(s.heads.size) * uint32_t(s.units.size));
    }
    if (units == 0) return;
    const Grid grid{blocks_of(units, kForward / a.lanes), sides};
    launch(attention_inputs_fwd_kernel<decltype(v)::value, decltype(k)::value, T>, grid, kForward, a);
  });
}

std::tuple<Tensor, Tensor, Tensor> forward_cuda(
    const Maybe& q, const Tensor& k, const Maybe& v, const Maybe& cos, const Maybe& sin, const Maybe& q_norm, const Maybe& k_norm, double offset,
    double eps, const Maybe& l_k, const Maybe& l_v, const Maybe& p_k, const Maybe& p_v, int64_t n_q, int64_t n) {
  const int64_t B = k.size(0), M = k.size(1), heads = k.size(2), d = k.size(3);
  Tensor y[3] = {make_empty(k, {0}), make_empty(k, {B, n + M, heads, d}), make_empty(k, {0})};
  if (q) y[0] = make_empty(k, {B, n_q + M, q->size(2), d});
  if (v) y[2] = make_empty(k, {B, n + M, heads, d});
  const Launch launch(k, q, v, cos, sin, q_norm, k_norm, l_k, l_v, p_k, p_v);
  dispatch(k.scalar_type(), "attention_inputs", [&](auto t) {
    using T = typename decltype(t)::type;
    Given given[3] = {{q, {}, q_norm, {}, {}, n_q, bool(cos), k, k, k, k, k},
                      {k, {}, k_norm, l_k, p_k, n, bool(cos), k, k, k, k, k},
                      {v, {}, {}, l_v, p_v, n, false, k, k, k, k, k}};
    const Tabled<T> tables = tabled<T>(cos, sin, k);
    Args<T> a{{}, tables.tables, uint32_t(M), uint32_t(d), 0, 0, acc_t<T>(offset), acc_t<T>(eps), false};
    unsigned sides = 0;
    for (unsigned i = 0; i < 3; ++i)
      if (given[i].x) a.side[sides++] = side<T>(given[i], k, &y[i]);
    launch_fwd(a, tables, sides, launch);
  });
  return {y[0], y[1], y[2]};
}

enum Wanted { DQ = 1, DK = 2, DV = 4, DQ_NORM = 8, DK_NORM = 16, DL_K = 32, DL_V = 64 };

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> backward_cuda(
    const Maybe& dq, const Tensor& dk, const Maybe& dv, const Maybe& q, const Maybe& k, const Maybe& v, const Maybe& cos, const Maybe& sin,
    const Maybe& q_norm, const Maybe& k_norm, double offset, double eps, const Maybe& l_k, const Maybe& l_v, int64_t wanted) {
  const int64_t M = dk.size(1), d = dk.size(3);
  auto like = [&](const Maybe& p, int bit) { return p && (wanted & bit) ? output_like(*p) : make_empty(dk, {0}); };
  const Tensor none = make_empty(dk, {0});
  Tensor out[3] = {like(dq, DQ), like(dk, DK), like(dv, DV)}, dnorm[3] = {like(q_norm, DQ_NORM), like(k_norm, DK_NORM), none};
  Tensor dfactor[3] = {none, like(l_k, DL_K), like(l_v, DL_V)}, norm_part[3] = {none, none, none}, factor_part[3] = {none, none, none};
  const Launch launch(dk, dq, dv, q, k, v, cos, sin, q_norm, k_norm, l_k, l_v);
  dispatch(dk.scalar_type(), "attention_inputs", [&](auto t) {
    using T = typename decltype(t)::type;
    using A = acc_t<T>;
    Given given[3] = {{q, dq, q_norm, {}, {}, 0, bool(cos), dk, dk, dk, dk, dk},
                      {k, dk, k_norm, l_k, {}, 0, bool(cos), dk, dk, dk, dk, dk},
                      {v, dv, {}, l_v, {}, 0, false, dk, dk, dk, dk, dk}};
    const Tabled<T> tables = tabled<T>(cos, sin, dk);
    Args<T> a{{}, tables.tables, uint32_t(M), uint32_t(d), 0, 0, A(offset), A(eps), true};
    unsigned sides = 0, of[3];
    bool sums = false;
    for (unsigned i = 0; i < 3; ++i) {
      if (!given[i].dy || !(out[i].numel() || dnorm[i].numel() || dfactor[i].numel())) continue;
      const bool sum = given[i].norm || dfactor[i].numel();
      STD_TORCH_CHECK(given[i].x || !sum, "attention_inputs_bwd: what came before a norm or a factor was not kept");
      if (!sum) given[i].x = std::nullopt;
      sums |= sum, of[sides] = i;
      a.side[sides++] = side<T>(given[i], dk, &out[i]);
    }
    if (sides == 0) return;
    if (!sums) {  // rotations and factors undone: forward's kernel, of dy in place of x
      for (unsigned i = 0; i < sides; ++i) a.side[i].x = a.side[i].dy, a.side[i].x_at = a.side[i].dy_at;
      return launch_fwd(a, tables, sides, launch);
    }
    by_packs(a, tables, sides, [&](auto v, auto k) {
      unsigned most = 0;
      bool norm = false, dnorms = false, dfactors = false;
      const unsigned groups = kThreads / a.lanes;
      for (unsigned i = 0; i < sides; ++i) {
        Side<T>& s = a.side[i];
        const uint32_t heads = uint32_t(s.heads.size);
        STD_TORCH_CHECK(heads > 0, "attention_inputs_bwd: no heads");
        const bool walks = dnorm[of[i]].numel() || dfactor[of[i]].numel();
        norm |= s.norm.data != nullptr, dnorms |= dnorm[of[i]].numel() > 0, dfactors |= dfactor[of[i]].numel() > 0;
        s.blocks = blocks_of(s.rows, groups);
        if (walks) s.blocks = std::max(std::min(unsigned(kParts), s.blocks), blocks_of(heads, groups));
        s.walks = s.blocks * groups / heads * heads;
        if (!walks) s.walks = std::max(s.walks, s.rows);
        most = std::max(most, s.blocks);
        if (dnorm[of[i]].numel()) norm_part[i] = make_empty(dk, {s.blocks * d}, acc_type(dk)), s.dnorm = write<A>(norm_part[i]);
        if (dfactor[of[i]].numel()) factor_part[i] = make_empty(dk, {s.walks * d}, acc_type(dk)), s.dfactor = write<A>(factor_part[i]);
      }
      const auto run = [&](auto norm, auto dnorm, auto dfactor) {
        auto kernel = attention_inputs_bwd_kernel<decltype(v)::value, decltype(k)::value, norm, dnorm, dfactor, T>;
        launch(kernel, Grid{most, sides}, kThreads, a);
      };
      const std::true_type yes;
      const std::false_type no;
      if constexpr (decltype(k)::value == 1 && !std::is_same_v<T, double>) {
        if (norm && dfactors) run(yes, yes, yes);
        else if (dfactors) run(no, no, yes);
        else if (dnorms) run(yes, yes, no);
        else run(yes, no, no);
      } else {
        run(yes, yes, yes);  // serves any: few kernels for what is rare
      }
      for (unsigned i = 0; i < sides; ++i) {
        const Side<T>& s = a.side[i];
        if (s.dnorm) sum_parts<A>(s.dnorm, int(s.blocks), d, dnorm[of[i]], launch);
        if (s.dfactor) sum_parts<A>(s.dfactor, int(s.walks / s.heads.size), s.heads.size * d, dfactor[of[i]], launch);
      }
    });
  });
  return {out[0], out[1], out[2], dnorm[0], dnorm[1], dfactor[1], dfactor[2]};
}

}  // namespace fastpeft::attention_inputs

STABLE_TORCH_LIBRARY_IMPL(fastpeft, FASTPEFT_CUDA_KEY, m) {
  m.impl("attention_inputs_fwd", TORCH_BOX(&fastpeft::attention_inputs::forward_cuda));
  m.impl("attention_inputs_bwd", TORCH_BOX(&fastpeft::attention_inputs::backward_cuda));
}
