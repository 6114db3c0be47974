// LayerNorm and RMSNorm, each with or without the addition before it: fastpeft/ops/layer_norm.py and rms_norm.py say what is saved and why.
#pragma once
#include "common.h"

namespace fastpeft {
namespace {

enum Need : int64_t { X = 1, RESIDUAL = 2, WEIGHT = 4, BIAS = 8 };

int64_t needs_of(const Tensor& x, const Maybe& residual, const Maybe& weight, const Maybe& bias) {
  return X * x.requires_grad() | RESIDUAL * wants(residual) | WEIGHT * wants(weight) | BIAS * wants(bias);
}

struct LayerNorm : Function<LayerNorm> {
  using Forward = std::tuple<Tensor, Tensor, Tensor, Tensor>(const Tensor&, const Maybe&, const Maybe&, const Maybe&, double, bool);
  using Backward = std::tuple<Tensor, Tensor, Tensor>(
      const Tensor&, const Tensor&, const Maybe&, const Tensor&, const Tensor&, const Maybe&, bool, bool, bool);

  static variable_list forward(
      AutogradContext* ctx, const Tensor& x, const Maybe& residual, const Maybe& weight, const Maybe& bias, double eps) {
    static const auto op = find_op<Forward>("fastpeft::layer_norm_fwd");
    const int64_t needs = needs_of(x, residual, weight, bias);
    const bool keep = needs & (X | RESIDUAL | WEIGHT);
    ctx->set_materialize_grads(false);
    ctx->saved_data["needs"] = needs;
    ctx->saved_data["param_dtype"] = int64_t(bias ? bias->scalar_type() : x.scalar_type());
    const at::AutoDispatchBelowADInplaceOrView below;
    auto [y, h, mean, rstd] = op.call(x, residual, weight, bias, eps, keep);
    if (keep) ctx->save_for_backward({residual ? h : x, or_undefined(weight), mean, rstd});
    if (!residual) return {y};
    if (!(needs & (X | RESIDUAL))) ctx->mark_non_differentiable({h});
    return {y, h};
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& dys) {
    static const auto op = find_op<Backward>("fastpeft::layer_norm_bwd");
    const int64_t needs = ctx->saved_data["needs"].toInt();
    const Tensor &dy = dys[0], dh = dys.size() > 1 ? dys[1] : Tensor();
    const variable_list saved = ctx->get_saved_variables();
    return first_order("LayerNorm", dys, saved, [&]() -> variable_list {
      if (!dy.defined()) return {if_wanted(dh, needs & X), if_wanted(dh, needs & RESIDUAL), {}, {}, {}};  // only the sum was used
      if (!(needs & ~BIAS)) {
        const auto sums = dy.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
        const auto dtype = at::ScalarType(ctx->saved_data["param_dtype"].toInt());
        return {{}, {}, {}, dy.reshape({-1, dy.size(-1)}).sum(at::IntArrayRef{0}, false, sums).to(dtype), {}};
      }
      auto [dx, dweight, dbias] = op.call(
          dy, saved[0], or_none(saved[1]), saved[2], saved[3], or_none(dh), needs & (X | RESIDUAL), needs & WEIGHT, needs & BIAS);
      return {if_wanted(dx, needs & X), if_wanted(dx, needs & RESIDUAL), if_wanted(dweight, needs & WEIGHT),
              if_wanted(dbias, needs & BIAS), {}};
    });
  }
};

struct RMSNorm : Function<RMSNorm> {
  using Forward = std::tuple<Tensor, Tensor, Tensor>(const Tensor&, const Maybe&, const Maybe&, double, bool);
  using Backward = std::tuple<Tensor, Tensor>(const Tensor&, const Tensor&, const Maybe&, const Tensor&, const Maybe&, bool, bool);

  static variable_list forward(AutogradContext* ctx, const Tensor& x, const Maybe& residual, const Maybe& weight, double eps) {
    static const auto op = find_op<Forward>("fastpeft::rms_norm_fwd");
    const int64_t needs = needs_of(x, residual, weight, std::nullopt);
    ctx->set_materialize_grads(false);
    ctx->saved_data["needs"] = needs;
    const at::AutoDispatchBelowADInplaceOrView below;
    auto [y, h, rstd] = op.call(x, residual, weight, eps, true);
    ctx->save_for_backward({residual ? h : x, or_undefined(weight), rstd});
    if (!residual) return {y};
    if (!(needs & (X | RESIDUAL))) ctx->mark_non_differentiable({h});
    return {y, h};
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& dys) {
    static const auto op = find_op<Backward>("fastpeft::rms_norm_bwd");
    const int64_t needs = ctx->saved_data["needs"].toInt();
    const Tensor &dy = dys[0], dh = dys.size() > 1 ? dys[1] : Tensor();
    const variable_list saved = ctx->get_saved_variables();
    return first_order("RMSNorm", dys, saved, [&]() -> variable_list {
      if (!dy.defined()) return {if_wanted(dh, needs & X), if_wanted(dh, needs & RESIDUAL), {}, {}};  // only the sum was used
      auto [dx, dweight] = op.call(dy, saved[0], or_none(saved[1]), saved[2], or_none(dh), needs & (X | RESIDUAL), needs & WEIGHT);
      return {if_wanted(dx, needs & X), if_wanted(dx, needs & RESIDUAL), if_wanted(dweight, needs & WEIGHT), {}};
    });
  }
};

// Whether a call fits, as fastpeft/ops/_common.py's check_norm demands it, and has a gradient.
bool fits(const Arguments& arguments, const Maybe& x, const Maybe& residual, const Maybe& weight, const Maybe& bias, double eps) {
  if (!arguments.plain || !arguments.needs_grad || !x || !(eps >= 0)) return false;
  const auto dtype = x->scalar_type();
  const auto sums = dtype == at::kDouble ? at::kDouble : at::kFloat;
  if (dtype != sums && dtype != at::kBFloat16 && dtype != at::kHalf) return false;
  if (x->dim() == 0 || x->size(-1) == 0) return false;
  const auto affine = [&](const Maybe& p) {
    return !p || (p->dim() == 1 && p->size(0) == x->size(-1) && (p->scalar_type() == dtype || p->scalar_type() == sums));
  };
  if (!affine(weight) || !affine(bias) || (weight && bias && weight->scalar_type() != bias->scalar_type())) return false;
  return !residual || (residual->scalar_type() == dtype && residual->sizes() == x->sizes());
}

py::object wrapped(const variable_list& out) {
  if (out.size() == 1) return py::cast(out[0]);
  return py::make_tuple(out[0], out[1]);
}

}  // namespace

// (x, residual or None, parameters, eps) -> y, or (y, h) where there is a residual.
inline void bind_norms(py::module_& m) {
  m.def("layer_norm", [](py::handle x_, py::handle residual_, py::handle weight_, py::handle bias_, double eps) -> py::object {
    Arguments tensor;
    const Maybe x = tensor(x_), residual = tensor(residual_), weight = tensor(weight_), bias = tensor(bias_);
    if (!fits(tensor, x, residual, weight, bias, eps)) return py::none();
    return wrapped(released([&] { return LayerNorm::apply(*x, residual, weight, bias, eps); }));
  });
  m.def("rms_norm", [](py::handle x_, py::handle residual_, py::handle weight_, double eps) -> py::object {
    Arguments tensor;
    const Maybe x = tensor(x_), residual = tensor(residual_), weight = tensor(weight_);
    if (!fits(tensor, x, residual, weight, std::nullopt, eps)) return py::none();
    return wrapped(released([&] { return RMSNorm::apply(*x, residual, weight, eps); }));
  });
}

}  // namespace fastpeft
