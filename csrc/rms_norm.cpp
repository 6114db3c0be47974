// RMSNorm for CPU tensors: fastpeft::rms_norm_fwd, fastpeft::rms_norm_bwd (schemas in fastpeft/ops/rms_norm.py).
#include "norm.h"

namespace fastpeft::rms_norm {

template <int B, class T>
FASTPEFT_INLINE void fwd(const NormFwd<T>& a, int64_t begin, int64_t end) { norm_fwd_rows<B, false>(a, begin, end); }
template <int B, class T>
FASTPEFT_INLINE void bwd(const NormBwd<T>& a, int64_t begin, int64_t end) { norm_bwd_rows<B, false>(a, begin, end); }
FASTPEFT_WIDE_PER_DTYPE(fwd_rows, NormFwd, fwd)
FASTPEFT_WIDE_PER_DTYPE(bwd_rows, NormBwd, bwd)

std::tuple<Tensor, Tensor, Tensor> forward(const Tensor& x, const Maybe& residual, const Maybe& weight, double eps, bool keep) {
  const Rows in = rows_of(x), other = residual ? rows_of(*residual) : in;
  STD_TORCH_CHECK(other.count == in.count && other.n == in.n, "rms_norm_fwd: shapes differ");
  Tensor y = output_like(x), h = output_like(x, residual.has_value());
  Tensor rstd = make_empty(x, {keep ? in.count : 0}, acc_type(x));
  dispatch(x.scalar_type(), "rms_norm", [&](auto t) {
    using T = typename decltype(t)::type;
    using A = acc_t<T>;
    const auto w = widen<A>(weight, in.n, 1), zero = Aligned<A>(in.n, A(0));
    const NormFwd<T> a{read<T>(in.own), residual ? read<T>(other.own) : nullptr, in.stride, other.stride, in.n, w.data(),
                       zero.data(), A(eps), write<T>(y), write<T>(h), nullptr, keep ? write<A>(rstd) : nullptr};
    parallel_rows(in.count, in.n, [&](int64_t begin, int64_t end) { fwd_rows(a, begin, end); });
  });
  return {y, h, rstd};
}

std::tuple<Tensor, Tensor> backward(
    const Tensor& dy, const Tensor& h, const Maybe& weight, const Tensor& rstd, const Maybe& dh, bool need_dx, bool need_dweight) {
  const Rows in = rows_of(h), up = rows_of(dy), carry = dh ? rows_of(*dh) : in;
  STD_TORCH_CHECK(up.count == in.count && up.n == in.n && carry.count == in.count && carry.n == in.n, "rms_norm_bwd: shapes differ");
  STD_TORCH_CHECK(rstd.numel() == in.count, "rms_norm_bwd: statistics were not kept");
  Tensor dx = output_like(h, need_dx), dweight = make_empty(weight ? *weight : h, {need_dweight ? in.n : 0});
  dispatch(h.scalar_type(), "rms_norm", [&](auto t) {
    using T = typename decltype(t)::type;
    using A = acc_t<T>;
    const auto w = widen<A>(weight, in.n, 1);
    const int64_t parts = row_parts(in.count, in.n);
    Aligned<A> sums(need_dweight ? parts * in.n : 0, A(0));  // per part: dweight
    parallel_parts(in.count, parts, [&](int64_t p, int64_t begin, int64_t end) {
      A* sum = need_dweight ? sums.data() + p * in.n : nullptr;
      const NormBwd<T> a{read<T>(up.own), read<T>(in.own), dh ? read<T>(carry.own) : nullptr, up.stride, in.stride, carry.stride,
                         in.n, w.data(), nullptr, read<A>(rstd), need_dx ? write<T>(dx) : nullptr,
                         need_dx && past_caches(dx), sum, nullptr};
      bwd_rows(a, begin, end);
    });
    if (need_dweight) narrow_sum(sums.data(), parts, in.n, dweight);
  });
  return {dx, dweight};
}

}  // namespace fastpeft::rms_norm

STABLE_TORCH_LIBRARY_IMPL(fastpeft, CPU, m) {
  m.impl("rms_norm_fwd", TORCH_BOX(&fastpeft::rms_norm::forward));
  m.impl("rms_norm_bwd", TORCH_BOX(&fastpeft::rms_norm::backward));
}
