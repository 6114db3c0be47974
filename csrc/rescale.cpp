// y = x * scale with its backward in one pass, for CPU tensors (schemas in fastpeft/ops/rescale.py).
#include "cpu.h"

namespace fastpeft::rescale {

template <class T>
struct Args {
  using A = acc_t<T>;
  const T *from, *x;  // from: x in forward, dy in backward; x: null where dscale is not wanted
  int64_t from_stride, x_stride, n;
  const A* scale;
  Walk at;      // row -> offset into scale
  bool column;  // scale has x's last dimension; else one value a row
  T* to;        // y or dx; null: not wanted
  A *dscale, *block;  // this part's sum, and a block's: few rows at a time, as in norm.h
  int64_t numel;
};

template <class T>
FASTPEFT_INLINE void scale_row(const T* __restrict from, const acc_t<T>* __restrict scale, bool column, T* __restrict to, int64_t n) {
  const acc_t<T> s = scale[0];
  if (column) {
#pragma omp simd
    for (int64_t j = 0; j < n; ++j) put(to + j, get(from[j]) * scale[j]);
  } else {
#pragma omp simd
    for (int64_t j = 0; j < n; ++j) put(to + j, get(from[j]) * s);
  }
}

template <class T>
FASTPEFT_INLINE void reduce_row(const T* __restrict dy, const T* __restrict x, bool column, acc_t<T>* __restrict sum, int64_t n) {
  if (column) {
#pragma omp simd
    for (int64_t j = 0; j < n; ++j) sum[j] += get(dy[j]) * get(x[j]);
  } else {
    acc_t<T> dot = 0;
#pragma omp simd reduction(+ : dot)
    for (int64_t j = 0; j < n; ++j) dot += get(dy[j]) * get(x[j]);
    sum[0] += dot;
  }
}

template <class T>
FASTPEFT_INLINE void loop(const Args<T>& a, int64_t begin, int64_t end) {
  for (int64_t block = begin; block < end; block += 64) {
    auto* sum = a.block ? a.block : a.dscale;
    for (int64_t r = block; r < std::min(block + 64, end); ++r) {
      const int64_t at = a.at(r);
      const T* from = a.from + r * a.from_stride;
      if (a.to) scale_row(from, a.scale + at, a.column, a.to + r * a.n, a.n);
      if (a.x) reduce_row(from, a.x + r * a.x_stride, a.column, sum + at, a.n);
    }
    if (!a.block) continue;
    for (int64_t j = 0; j < a.numel; ++j) a.dscale[j] += a.block[j], a.block[j] = 0;
  }
}
FASTPEFT_PER_DTYPE(rows, Args, loop)

Tensor forward(const Tensor& x, const Tensor& scale) {
  const Rows in = rows_of(x);
  const Tensor dense = torch::stable::contiguous(scale);
  Tensor y = output_like(x);
  dispatch(x.scalar_type(), "rescale", [&](auto t) {
    using T = typename decltype(t)::type;
    const auto wide = widen<acc_t<T>>(dense, dense.numel(), 1);
    const Args<T> a{read<T>(in.own), nullptr, in.stride, 0, in.n, wide.data(), Walk(x, dense),
                    dense.dim() > 0 && dense.size(dense.dim() - 1) == in.n, write<T>(y), nullptr, nullptr, dense.numel()};
    parallel_rows(in.count, in.n, [&](int64_t begin, int64_t end) { rows(a, begin, end); });
  });
  return y;
}

std::tuple<Tensor, Tensor> backward(const Tensor& dy, const Maybe& x, const Tensor& scale, bool need_dx, bool need_dscale) {
  const Rows up = rows_of(dy), in = need_dscale ? rows_of(*x) : up;
  const Tensor dense = torch::stable::contiguous(scale);
  Tensor dx = output_like(dy, need_dx), dscale = output_like(dense, need_dscale);
  dispatch(dy.scalar_type(), "rescale", [&](auto t) {
    using T = typename decltype(t)::type;
    using A = acc_t<T>;
    const int64_t numel = dense.numel();
    const auto wide = widen<A>(dense, numel, 1);
    const bool fold = numel <= 64 * up.n;  // a longer scale has few rows per element: nothing to gain, and a copy to lose
    const int64_t parts = std::min(row_parts(up.count, up.n), std::max<int64_t>(1, dy.numel() / std::max<int64_t>(1, 4 * numel)));
    Aligned<A> sums(need_dscale ? parts * 2 * numel : 0, A(0));
    parallel_parts(up.count, parts, [&](int64_t p, int64_t begin, int64_t end) {
      A* sum = need_dscale ? sums.data() + p * 2 * numel : nullptr;
      const Args<T> a{read<T>(up.own), need_dscale ? read<T>(in.own) : nullptr, up.stride, in.stride, up.n, wide.data(),
                      Walk(dy, dense), dense.dim() > 0 && dense.size(dense.dim() - 1) == up.n, need_dx ? write<T>(dx) : nullptr, sum,
                      need_dscale && fold ? sum + numel : nullptr, numel};
      rows(a, begin, end);
    });
    if (need_dscale) narrow_sum(sums.data(), parts, 2 * numel, dscale);
  });
  return {dx, dscale};
}

}  // namespace fastpeft::rescale

STABLE_TORCH_LIBRARY_IMPL(fastpeft, CPU, m) {
  m.impl("rescale_fwd", TORCH_BOX(&fastpeft::rescale::forward));
  m.impl("rescale_bwd", TORCH_BOX(&fastpeft::rescale::backward));
}
