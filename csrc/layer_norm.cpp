// LayerNorm for CPU tensors: fastpeft::layer_norm_fwd, fastpeft::layer_norm_bwd (schemas in fastpeft/ops/layer_norm.py).
#include "norm.h"

namespace fastpeft::layer_norm {

template <int B, class T>
FASTPEFT_INLINE void fwd(const NormFwd<T>& a, int64_t begin, int64_t end) { norm_fwd_rows<B, true>(a, begin, end); }
template <int B, class T>
FASTPEFT_INLINE void bwd(const NormBwd<T>& a, int64_t begin, int64_t end) { norm_bwd_rows<B, true>(a, begin, end); }
FASTPEFT_WIDE_PER_DTYPE(fwd_rows, NormFwd, fwd)
FASTPEFT_WIDE_PER_DTYPE(bwd_rows, NormBwd, bwd)

std::tuple<Tensor, Tensor, Tensor, Tensor> forward(
    const Tensor& x, const Maybe& residual, const Maybe& weight, const Maybe& bias, double eps, bool keep) {
  const Rows in = rows_of(x), other = residual ? rows_of(*residual) : in;
  STD_TORCH_CHECK(other.count == in.count && other.n == in.n, "layer_norm_fwd: shapes differ");
  Tensor y = output_like(x), h = output_like(x, residual.has_value());
  Tensor mean = make_empty(x, {keep ? in.count : 0}, acc_type(x));
  Tensor rstd = make_empty(x, {keep ? in.count : 0}, acc_type(x));
  dispatch(x.scalar_type(), "layer_norm", [&](auto t) {
    using T = typename decltype(t)::type;
    using A = acc_t<T>;
    const auto w = widen<A>(weight, in.n, 1), b = widen<A>(bias, in.n, 0);
    const NormFwd<T> a{read<T>(in.own), residual ? read<T>(other.own) : nullptr, in.stride, other.stride, in.n, w.data(), b.data(),
                       A(eps), write<T>(y), write<T>(h), keep ? write<A>(mean) : nullptr, keep ? write<A>(rstd) : nullptr};
    parallel_rows(in.count, in.n, [&](int64_t begin, int64_t end) { fwd_rows(a, begin, end); });
  });
  return {y, h, mean, rstd};
}

std::tuple<Tensor, Tensor, Tensor> backward(
    const Tensor& dy, const Tensor& h, const Maybe& weight, const Tensor& mean, const Tensor& rstd, const Maybe& dh, bool need_dx,
    bool need_dweight, bool need_dbias) {
  const Rows in = rows_of(h), up = rows_of(dy), carry = dh ? rows_of(*dh) : in;
  STD_TORCH_CHECK(up.count == in.count && up.n == in.n && carry.count == in.count && carry.n == in.n, "layer_norm_bwd: shapes differ");
  STD_TORCH_CHECK(mean.numel() == in.count && rstd.numel() == in.count, "layer_norm_bwd: statistics were not kept");
  const Tensor& like = weight ? *weight : h;
  Tensor dx = output_like(h, need_dx), dweight = make_empty(like, {need_dweight ? in.n : 0});
  Tensor dbias = make_empty(like, {need_dbias ? in.n : 0});
  dispatch(h.scalar_type(), "layer_norm", [&](auto t) {
    using T = typename decltype(t)::type;
    using A = acc_t<T>;
    const auto w = widen<A>(weight, in.n, 1);
    const int64_t parts = row_parts(in.count, in.n);
    const bool params = need_dweight || need_dbias;
    Aligned<A> sums(params ? parts * 2 * in.n : 0, A(0));  // per part: dweight, dbias
    parallel_parts(in.count, parts, [&](int64_t p, int64_t begin, int64_t end) {
      A* sum = params ? sums.data() + p * 2 * in.n : nullptr;
      const NormBwd<T> a{read<T>(up.own), read<T>(in.own), dh ? read<T>(carry.own) : nullptr, up.stride, in.stride, carry.stride,
                         in.n, w.data(), read<A>(mean), read<A>(rstd), need_dx ? write<T>(dx) : nullptr,
                         need_dx && past_caches(dx), sum, params ? sum + in.n : nullptr};
      bwd_rows(a, begin, end);
    });
    if (need_dweight) narrow_sum(sums.data(), parts, 2 * in.n, dweight);
    if (need_dbias) narrow_sum(sums.data() + in.n, parts, 2 * in.n, dbias);
  });
  return {dx, dweight, dbias};
}

}  // namespace fastpeft::layer_norm

STABLE_TORCH_LIBRARY_IMPL(fastpeft, CPU, m) {
  m.impl("layer_norm_fwd", TORCH_BOX(&fastpeft::layer_norm::forward));
  m.impl("layer_norm_bwd", TORCH_BOX(&fastpeft::layer_norm::backward));
}
