// CUDA twin of rescale.cpp. Rows that meet the same row of `scale` are a regular set: a block takes a chunk of one such set, some columns
// of it, and sums its part of dscale in registers, then over its threads in a fixed order.
#include "cuda.cuh"

namespace fastpeft::rescale {

constexpr int kThreads = 256, kAtOnce = 4;  // rows that a thread reads before it uses the first

// Row i of those that meet row k of scale begins at own(k) + shared(i).
struct RowAt {
  Walk own, shared;
};

template <class T>
struct Args {
  const T *from, *x;  // from: x in forward, dy in backward; x: null where dscale is not wanted
  T* to;              // y or dx; null: not wanted
  RowAt from_at, x_at, to_at;
  Param<T> scale;
  acc_t<T>* part;  // sums of dscale, [chunks, K, n] where scale has columns, [chunks * column_blocks, K] elsewhere
  bool column;     // scale has x's last dimension; else one value a row
  int64_t n;
  unsigned K, rows, chunks, chunk;  // K rows of scale, each met by `rows` rows, which chunks of so many divide
  unsigned across, column_blocks;  // threads along a row
};

// STRAIGHT: the rows that meet one row of scale lie one stride apart in all tensors. SUM: with the code for dscale, whose second input and sums
// take registers; without, five blocks share a multiprocessor.
template <int V, bool STRAIGHT, bool SUM, class T>
__global__ void __launch_bounds__(kThreads, SUM ? 2 : 5) rescale_kernel(const __grid_constant__ Args<T> a) {
  using A = acc_t<T>;
  using P = Pack<T, V>;
  const unsigned column_block = blockIdx.x % a.column_blocks, block = blockIdx.x / a.column_blocks;
  const unsigned k = block % a.K, chunk = block / a.K;  // neighbouring blocks take the heads of the same tokens, which lie together
  const unsigned down = kThreads / a.across, x = threadIdx.x % a.across, y = threadIdx.x / a.across;
  const int64_t j = (int64_t(column_block) * a.across + x) * V;
  const bool mine = y < down && j < a.n;
  A scale[V] = {}, sum[V] = {};
  if (mine && a.column) a.scale.template load<V>(k * a.n + j, scale);
#pragma unroll
  for (int e = 0; e < V; ++e) scale[e] = a.column ? scale[e] : a.scale[k];
  const T *from_row = a.from + a.from_at.own(k) + j, *x_row = SUM && a.x ? a.x + a.x_at.own(k) + j : nullptr;
  T* to_row = a.to ? a.to + a.to_at.own(k) + j : nullptr;
  const int64_t end = mine ? min(int64_t(a.rows), (int64_t(chunk) + 1) * a.chunk) : 0;
  for (int64_t first = int64_t(chunk) * a.chunk + y; first < end; first += kAtOnce * down) {
    P from[kAtOnce], other[kAtOnce];
#pragma unroll
    for (int u = 0; u < kAtOnce; ++u) {
      const int64_t i = first + u * down;
      if (i < end) from[u] = P::load(from_row + a.from_at.shared.template operator()<STRAIGHT>(uint32_t(i)));
      if (i < end && x_row) other[u] = P::load(x_row + a.x_at.shared.template operator()<STRAIGHT>(uint32_t(i)));
    }
#pragma unroll
    for (int u = 0; u < kAtOnce; ++u) {
      const int64_t i = first + u * down;
      if (i >= end) continue;
      A v[V], w[V];
      widen(from[u], v);
      if (x_row) widen(other[u], w);
#pragma unroll
      for (int e = 0; e < V; ++e) {
        if (x_row) sum[e] += v[e] * w[e];
        v[e] *= scale[e];
      }
      if (to_row) store_as<T>(v, to_row + a.to_at.shared.template operator()<STRAIGHT>(uint32_t(i)));
    }
  }
  if (!SUM || !a.x) return;
  if (!a.column) {
    double total = 0;  // of very many elements where one number scales all
#pragma unroll
    for (int e = 0; e < V; ++e) total += sum[e];
    total = group_sum(total, Group(kThreads), 0);
    if (threadIdx.x == 0) a.part[(int64_t(chunk) * a.column_blocks + column_block) * a.K + k] = A(total);
    return;
  }
  __shared__ A sums[V][kThreads];
#pragma unroll
  for (int e = 0; e < V; ++e) sums[e][threadIdx.x] = sum[e];
  __syncthreads();
  if (y > 0 || j >= a.n) return;
#pragma unroll
  for (int e = 0; e < V; ++e) {
    for (unsigned other = 1; other < down; ++other) sum[e] += sums[e][other * a.across + x];
    a.part[(int64_t(chunk) * a.K + k) * a.n + j + e] = sum[e];
  }
}

// to = from * scale and dscale = sum of from * x; any of x, to and dscale may be absent.
void run(const Tensor& from, const Maybe& x, const Tensor& scale, const Tensor* to, const Tensor* dscale) {
  const int64_t dim = from.dim(), n = from.size(dim - 1), pad = dim - scale.dim();
  const bool column = scale.dim() > 0 && scale.size(scale.dim() - 1) == n;
  auto own = [&](int64_t i) { return i >= pad && scale.size(i - pad) != 1; };
  auto at = [&](const Tensor& t) { return RowAt{Walk(from, t, own), Walk(from, t, [&](int64_t i) { return !own(i); })}; };
  auto rows_along = [](const Tensor& t) { return t.stride(t.dim() - 1) == 1 ? t : torch::stable::contiguous(t); };
  const Tensor in = rows_along(from), other = x ? rows_along(*x) : in;
  const Launch launch(from, x, scale);
  dispatch(from.scalar_type(), "rescale", [&](auto t) {
    using T = typename decltype(t)::type;
    using A = acc_t<T>;
    constexpr int V = 16 / sizeof(T);
    Tensor dense;
    Args<T> a{read<T>(in), x ? read<T>(other) : nullptr, to ? write<T>(*to) : nullptr, at(in), at(other), at(to ? *to : in),
              param<T>(scale, dense, from, 1), nullptr, column, n};
    const int64_t K = a.from_at.own.rows(), rows = a.from_at.shared.rows();
    STD_TORCH_CHECK(K < int64_t(1) << 32 && rows < int64_t(1) << 32, "rescale: more than 2^32 rows of scale, or that meet one of them");
    a.K = unsigned(K), a.rows = unsigned(rows);
    auto in_packs = [&](const T* p, const RowAt& where) {
      return packs<T, V>(p, 0) && where.own.strides_are_multiples_of(V) && where.shared.strides_are_multiples_of(V);
    };
    const bool whole = n % V == 0 && a.scale.packs() && in_packs(a.from, a.from_at) && in_packs(a.x, a.x_at) && in_packs(a.to, a.to_at);
    const int64_t wide = whole ? n / V : n;
    a.across = unsigned(std::min<int64_t>(wide, kThreads));
    a.column_blocks = unsigned((wide + a.across - 1) / a.across);
    const int64_t down = kThreads / a.across, deep = (rows + down - 1) / down, sets = K * a.column_blocks;  // deep: rounds of a block over rows
    const int64_t most = dscale ? 4 * kParts / sets : std::max((deep + kAtOnce - 1) / kAtOnce, 8 * kParts / sets);
    const int64_t rounds = (deep + std::max<int64_t>(1, most) - 1) / std::max<int64_t>(1, most);
    a.chunk = unsigned(std::min(rounds * down, rows));
    a.chunks = unsigned((rows + a.chunk - 1) / a.chunk);
    const int64_t parts = column ? a.chunks : int64_t(a.chunks) * a.column_blocks, size = column ? K * n : K;
    const Tensor part = make_empty(from, {dscale ? parts * size : 0}, acc_type(from));
    a.part = write<A>(part);
    const Grid grid{sets * a.chunks};
    const bool straight = a.from_at.shared.straight() && a.x_at.shared.straight() && a.to_at.shared.straight();
    const auto kernel = !whole      ? rescale_kernel<1, false, true, T>
                        : !straight ? rescale_kernel<V, false, true, T>
                        : dscale    ? rescale_kernel<V, true, true, T>
                                    : rescale_kernel<V, true, false, T>;
    launch(kernel, grid, kThreads, a);
    if (dscale) sum_parts(read<A>(part), int(parts), size, *dscale, launch);
  });
}

Tensor forward_cuda(const Tensor& x, const Tensor& scale) {
  Tensor y = output_like(x);
  if (x.numel()) run(x, std::nullopt, scale, &y, nullptr);
  return y;
}

std::tuple<Tensor, Tensor> backward_cuda(const Tensor& dy, const Maybe& x, const Tensor& scale, bool need_dx, bool need_dscale) {
  Tensor dx = output_like(dy, need_dx), dscale = output_like(scale, need_dscale);
  if (dy.numel()) run(dy, need_dscale ? x : std::nullopt, scale, need_dx ? &dx : nullptr, need_dscale ? &dscale : nullptr);
  else if (need_dscale) torch::stable::zero_(dscale);
  return {dx, dscale};
}

}  // namespace fastpeft::rescale

STABLE_TORCH_LIBRARY_IMPL(fastpeft, FASTPEFT_CUDA_KEY, m) {
  m.impl("rescale_fwd", TORCH_BOX(&fastpeft::rescale::forward_cuda));
  m.impl("rescale_bwd", TORCH_BOX(&fastpeft::rescale::backward_cuda));
}
