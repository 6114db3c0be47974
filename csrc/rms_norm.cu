// CUDA twin of rms_norm.cpp.
#include "norm_bwd.cuh"

namespace fastpeft::rms_norm {

std::tuple<Tensor, Tensor, Tensor> forward_cuda(const Tensor& x, const Maybe& residual, const Maybe& weight, double eps, bool keep) {
  const int64_t rows = keep ? row_count(x) : 0;
  Tensor y = output_like(x), h = output_like(x, residual.has_value()), rstd = make_empty(x, {rows}, acc_type(x));
  norm_fwd_cuda<false>(x, residual, weight, std::nullopt, eps, keep, y, h, rstd, rstd);
  return {y, h, rstd};
}

std::tuple<Tensor, Tensor> backward_cuda(
    const Tensor& dy, const Tensor& h, const Maybe& weight, const Tensor& rstd, const Maybe& dh, bool need_dx, bool need_dweight) {
  const int64_t n = h.size(h.dim() - 1);
  Tensor dx = output_like(h, need_dx), none = output_like(h, false);
  Tensor dweight = make_empty(weight ? *weight : h, {need_dweight ? n : 0});
  norm_bwd_cuda<false>(dy, h, weight, std::nullopt, rstd, dh, need_dx, dx, dweight, none);
  return {dx, dweight};
}

}  // namespace fastpeft::rms_norm

STABLE_TORCH_LIBRARY_IMPL(fastpeft, FASTPEFT_CUDA_KEY, m) {
  m.impl("rms_norm_fwd", TORCH_BOX(&fastpeft::rms_norm::forward_cuda));
  m.impl("rms_norm_bwd", TORCH_BOX(&fastpeft::rms_norm::backward_cuda));
}
