// CUDA twin of layer_norm.cpp.
#include "norm_bwd.cuh"

namespace fastpeft::layer_norm {

std::tuple<Tensor, Tensor, Tensor, Tensor> forward_cuda(
    const Tensor& x, const Maybe& residual, const Maybe& weight, const Maybe& bias, double eps, bool keep) {
  const int64_t rows = keep ? row_count(x) : 0;
  Tensor y = output_like(x), h = output_like(x, residual.has_value());
  Tensor mean = make_empty(x, {rows}, acc_type(x)), rstd = make_empty(x, {rows}, acc_type(x));
  norm_fwd_cuda<true>(x, residual, weight, bias, eps, keep, y, h, mean, rstd);
  return {y, h, mean, rstd};
}

std::tuple<Tensor, Tensor, Tensor> backward_cuda(
    const Tensor& dy, const Tensor& h, const Maybe& weight, const Tensor& mean, const Tensor& rstd, const Maybe& dh, bool need_dx,
    bool need_dweight, bool need_dbias) {
  const Tensor& like = weight ? *weight : h;
  const int64_t n = h.size(h.dim() - 1);
  Tensor dx = output_like(h, need_dx), dweight = make_empty(like, {need_dweight ? n : 0});
  Tensor dbias = make_empty(like, {need_dbias ? n : 0});
  norm_bwd_cuda<true>(dy, h, weight, mean, rstd, dh, need_dx, dx, dweight, dbias);
  return {dx, dweight, dbias};
}

}  // namespace fastpeft::layer_norm

STABLE_TORCH_LIBRARY_IMPL(fastpeft, FASTPEFT_CUDA_KEY, m) {
  m.impl("layer_norm_fwd", TORCH_BOX(&fastpeft::layer_norm::forward_cuda));
  m.impl("layer_norm_bwd", TORCH_BOX(&fastpeft::layer_norm::backward_cuda));
}
