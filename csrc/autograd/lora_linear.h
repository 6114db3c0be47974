// Linear layers with LoRA branches: their Function, and their products on CPU tensors. Equations, what is saved and why, and the same in
// Python: fastpeft/ops/lora_linear.py.
#pragma once
#include <torch/custom_class.h>
#include <torch/library.h>

#include "common.h"

namespace fastpeft {
namespace {

enum Grads : int64_t { DW = 1, DB = 2, DLA = 4, DLB = 8 };

using Forward = std::vector<Tensor>(
    const Tensor&, at::TensorList, const MaybeList&, const MaybeList&, const MaybeList&, at::ArrayRef<double>, double, const Maybe&);
using Backward = std::vector<Tensor>(
    const MaybeList&, const Maybe&, at::TensorList, const MaybeList&, const MaybeList&, const Maybe&, at::ArrayRef<double>, double,
    const Maybe&, bool, at::IntArrayRef);
using LowRankGrads = std::tuple<Tensor, Tensor>(const Tensor&, const Maybe&, const Maybe&, double);

// A Python object that any thread may let go.
struct Held {
  explicit Held(py::object object) : object(std::move(object)) {}
  ~Held() {
    if (!Py_IsInitialized()) {
      object.release();
      return;
    }
    const py::gil_scoped_acquire acquire;
    object = py::object();
  }
  Held(const Held&) = delete;
  Held& operator=(const Held&) = delete;
  py::object object;
};

// What a call is besides tensors that have gradients. `places`: where a projection's weight, bias, lora_A and lora_B are among the
// tensors, -1 for None.
struct Call : torch::CustomClassHolder {
  std::vector<std::array<int64_t, 4>> places;
  std::vector<double> scalings;
  std::vector<int64_t> needs;
  double p = 0;
  Maybe seed;
  bool need_dx = false, need_x = false, need_s = false;
  std::unique_ptr<Held> recompute;  // of tensors that backward has anyway, x; null: x itself is saved
  variable_list kept;               // those tensors, until they are saved
};
using CallPtr = c10::intrusive_ptr<Call>;

MaybeList at_place(const Call& call, int place, at::TensorList params) {
  MaybeList out;
  out.reserve(call.places.size());
  for (const auto& places : call.places) out.push_back(places[place] < 0 ? Maybe() : Maybe(params[places[place]]));
  return out;
}

variable_list weights_of(const Call& call, at::TensorList params) {
  variable_list out;
  for (const auto& places : call.places) out.push_back(params[places[0]]);
  return out;
}

struct LoRALinears : Function<LoRALinears> {
  static variable_list forward(AutogradContext* ctx, const CallPtr& call, const Tensor& x, at::TensorList params) {
    static const auto op = find_op<Forward>("fastpeft::lora_linears_fwd");
    ctx->set_materialize_grads(false);
    const variable_list weights = weights_of(*call, params);
    const MaybeList As = at_place(*call, 2, params), Bs = at_place(*call, 3, params);
    const at::AutoDispatchBelowADInplaceOrView below;
    variable_list ys = op.call(x, weights, at_place(*call, 1, params), As, Bs, call->scalings, call->p, call->seed);
    variable_list saved{call->need_s ? ys.back() : Tensor(), or_undefined(call->seed)};
    ys.pop_back();
    saved.insert(saved.end(), weights.begin(), weights.end());
    for (const MaybeList* list : {&As, &Bs})
      for (size_t i = 0; i < list->size(); ++i) saved.push_back(or_undefined(list->get(i)));
    if (call->recompute) {
      saved.insert(saved.end(), call->kept.begin(), call->kept.end());
      call->kept.clear();
    } else if (call->need_x) {
      saved.push_back(x);
    }
    ctx->save_for_backward(std::move(saved));
    ctx->saved_data["call"] = c10::IValue::make_capsule(call);
    return ys;
  }

  static Maybe input(const Call& call, const variable_list& saved, size_t from) {
    if (!call.need_x) return std::nullopt;
    if (!call.recompute) return saved[from];
    const py::gil_scoped_acquire acquire;
    py::tuple tensors(saved.size() - from);
    for (size_t i = from; i < saved.size(); ++i) tensors[i - from] = saved[i].defined() ? py::cast(saved[i]) : py::none();
    const at::NoGradGuard no_grad;  // also where backward itself runs with a graph
    const auto keys = c10::impl::tls_local_dispatch_key_set();  // a recipe may take derivatives of its own
    const c10::impl::ForceDispatchKeyGuard above(keys.included_, keys.excluded_ - c10::autograd_dispatch_keyset_with_ADInplaceOrView);
    return call.recompute->object(*tensors).cast<Tensor>();
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& dys) {
    static const auto op = find_op<Backward>("fastpeft::lora_linears_bwd");
    const auto holder = ctx->saved_data["call"].toCapsule();
    const Call& call = static_cast<const Call&>(*holder);
    const size_t n = dys.size(), tensors = std::accumulate(call.places.begin(), call.places.end(), size_t(0), [](size_t sum, auto& places) {
      return sum + std::count_if(places.begin(), places.end(), [](int64_t place) { return place >= 0; });
    });
    variable_list out(2 + tensors);
    if (std::none_of(dys.begin(), dys.end(), [](const Tensor& dy) { return dy.defined(); })) return out;
    const variable_list saved = ctx->get_saved_variables();
    return first_order("LoRALinears", dys, saved, [&] {
      MaybeList grads_out, As, Bs;
      for (size_t i = 0; i < n; ++i) {
        grads_out.push_back(or_none(dys[i]));
        As.push_back(or_none(saved[2 + n + i]));
        Bs.push_back(or_none(saved[2 + 2 * n + i]));
      }
      const variable_list grads = op.call(
          grads_out, input(call, saved, 2 + 3 * n), at::TensorList(saved).slice(2, n), As, Bs, or_none(saved[0]), call.scalings, call.p,
          or_none(saved[1]), call.need_dx, call.needs);
      auto next = grads.begin();
      if (call.need_dx) out[1] = *next++;
      for (size_t i = 0; i < n; ++i)
        for (int bit = 0; bit < 4; ++bit)
          if (dys[i].defined() && call.needs[i] & (1 << bit)) out[2 + call.places[i][bit]] = *next++;
      return out;
    });
  }
};

py::object lora_linears(
    py::handle x_, const std::vector<py::object>& params, std::vector<double> scalings, double p, const Maybe& seed,
    const py::object& recipe, const std::vector<Maybe>& kept) {
  Arguments tensor;
  const Maybe x = tensor(x_);
  auto call = c10::make_intrusive<Call>();
  call->scalings = std::move(scalings);
  call->p = p;
  call->seed = seed;
  variable_list tensors;
  for (size_t i = 0; i < params.size(); i += 4) {
    auto& places = call->places.emplace_back();
    int64_t need = 0;
    for (int bit = 0; bit < 4; ++bit) {
      const Maybe t = tensor(params[i + bit]);
      places[bit] = t ? int64_t(tensors.size()) : -1;
      if (t) tensors.push_back(*t);
      need |= int64_t(wants(t)) << bit;
    }
    call->needs.push_back(need);
    call->need_x |= bool(need & (DW | DLA));
    call->need_s |= bool(need & DLB);
  }
  if (!tensor.plain) return py::none();
  call->need_dx = x->requires_grad();
  if (call->need_x && !recipe.is_none()) {
    call->recompute = std::make_unique<Held>(recipe);
    for (const Maybe& t : kept) call->kept.push_back(or_undefined(t));
  }
  return py::cast(released([&] { return LoRALinears::apply(call, *x, at::TensorList(tensors)); }));
}

// The products, as fastpeft/ops/lora_linear.py's _fwd and _bwd form them on CPU tensors, and on a GPU by cuBLAS. What is not plain here is
// handed to Python: its _fwd and _bwd, or Triton's launchers.
struct InPython {
  py::object *fwd = nullptr, *bwd = nullptr;
};
InPython on_cpu, on_cuda;

// Whether they are formed here on a GPU; if not, float64's and those with dropout are all the same: Triton's kernels accumulate in float32.
bool products_on_cuda = true;

// Whether weights, biases and gradients have x's dtype, one that the device multiplies in. Branches may have another on a GPU, where they
// are cast; on a CPU they have the same, and no dropout.
template <class... Lists>
bool plain(const Tensor& x, double p, bool gpu, at::TensorList weights, const MaybeList& As, const MaybeList& Bs, const Lists&... lists) {
  const auto dtype = x.scalar_type();
  if ((p != 0.0 && !gpu) || !(dtype == at::kFloat || dtype == at::kDouble || (gpu && (dtype == at::kBFloat16 || dtype == at::kHalf)))) return false;
  const auto same = [&](const Maybe& t) { return !t || t->scalar_type() == dtype; };
  const auto all = [&](const MaybeList& list) {
    for (size_t i = 0; i < list.size(); ++i)
      if (!same(list.get(i))) return false;
    return true;
  };
  return std::all_of(weights.begin(), weights.end(), same) && (gpu || (all(As) && all(Bs))) && (all(lists) && ...);
}

bool formed_here(const Tensor& x, double p, bool gpu) { return !gpu || products_on_cuda || p > 0.0 || x.scalar_type() == at::kDouble; }

std::vector<int64_t> ranks_of(const MaybeList& As) {
  std::vector<int64_t> ranks;
  for (size_t i = 0; i < As.size(); ++i) ranks.push_back(As.get(i) ? As.get(i)->size(0) : 0);
  return ranks;
}

Tensor stacked(const variable_list& parts) { return parts.size() == 1 ? parts[0] : at::cat(parts); }

Tensor rows_of(const Tensor& x) { return x.reshape({-1, x.size(-1)}); }

// scaling a b, rounded once: in a product's own epilogue, where a pass over the result is a launch more.
Tensor scaled_product(const Tensor& a, const Tensor& b, double scaling) {
  return at::empty({a.size(0), b.size(1)}, a.options()).addmm_(a, b, 0, scaling);
}

// x W^T + b + s S B^T. On a CPU the bias is one more rank, whose S is one: nothing but the product with W passes over y. On a GPU it is
// in the epilogue of cuBLAS, behind which the branch is added.
Tensor with_branch(const Tensor& x2, const Tensor& W, const Maybe& bias, Tensor rows, const Tensor& B, double scaling, bool gpu) {
  if (gpu) {
    if (bias) return at::linear(x2, W, bias).addmm_(rows.t(), B.t(), 1, scaling);
    return scaled_product(rows.t(), B.t(), scaling).addmm_(x2, W.t());
  }
  Tensor up = B.t().mul(scaling);
  if (bias) {
    rows = at::cat({rows, at::ones({1, rows.size(1)}, rows.options())});
    up = at::cat({up, bias->unsqueeze(0)});
  }
  return at::mm(rows.t(), up).addmm_(x2, W.t());
}

// t under the mask that dropout draws for branch i: the same in both directions.
Tensor masked(const Tensor& t, double p, const Maybe& seed, size_t i) {
  static const auto op = find_op<Tensor(const Tensor&, double, const Tensor&, int64_t)>("fastpeft::dropout");
  return op.call(t, p, *seed, int64_t(i));
}

std::vector<Tensor> forward(
    const Tensor& x, at::TensorList weights, const MaybeList& biases, const MaybeList& As, const MaybeList& Bs,
    at::ArrayRef<double> scalings, double p, const Maybe& seed, bool gpu) {
  const Tensor x2 = rows_of(x);
  const std::vector<int64_t> ranks = ranks_of(As);
  Tensor s = at::empty({std::accumulate(ranks.begin(), ranks.end(), int64_t(0)), x2.size(0)}, x2.options());
  if (s.size(0) && p == 0.0) {
    variable_list images;
    for (size_t i = 0; i < As.size(); ++i)
      if (As.get(i)) images.push_back(As.get(i)->to(x.scalar_type()));
    at::mm_out(s, stacked(images), x2.t());
  }
  std::vector<int64_t> sizes = x.sizes().vec();
  std::vector<Tensor> out;
  for (size_t i = 0, row = 0; i < weights.size(); row += ranks[i++]) {
    Tensor y;
    if (As.get(i)) {
      const Tensor B = Bs.get(i)->to(x.scalar_type());
      Tensor low = s.narrow(0, row, ranks[i]);
      if (p > 0.0) at::mm_out(low, As.get(i)->to(x.scalar_type()), masked(x2, p, seed, i).t());
      y = with_branch(x2, weights[i], biases.get(i), low, B, scalings[i], gpu);
    } else {
      y = at::linear(x2, weights[i], biases.get(i));
    }
    sizes.back() = weights[i].size(0);
    out.push_back(y.view(sizes));
  }
  out.push_back(s);
  return out;
}

// Up to this rank csrc's form serves (fastpeft/ops/low_rank_grads.py has the figures).
constexpr int64_t kLowRank = 16;

// (dS, dB), each where B or S is given; in dy's dtype.
std::tuple<Tensor, Tensor> low_rank_grads(const Tensor& dy, const Maybe& B, const Maybe& S, double scaling, bool gpu) {
  static const auto op = find_op<LowRankGrads>("fastpeft::low_rank_grads");
  if (!B && !S) return {};
  if (gpu) {
    return {B ? scaled_product(B->t(), dy.t(), scaling) : Tensor(), S ? scaled_product(dy.t(), S->t(), scaling) : Tensor()};
  }
  const int64_t rank = B ? B->size(1) : S->size(0);
  if (rank <= kLowRank) {
    auto [dS, dB] = op.call(dy, B, S, scaling);
    return {if_wanted(dS, B.has_value()), if_wanted(dB, S.has_value())};
  }
  Tensor dS, dB;
  if (B) {
    dS = at::empty({rank, dy.size(0)}, dy.options());
    at::mm_out(dS, B->t().contiguous(), dy.t()).mul_(scaling);
  }
  if (S) dB = at::empty({dy.size(1), rank}, dy.options()).copy_(at::mm(*S, dy).t()).mul_(scaling);
  return {dS, dB};
}

std::vector<size_t> given(const MaybeList& dys) {
  std::vector<size_t> live;
  for (size_t i = 0; i < dys.size(); ++i)
    if (dys.get(i)) live.push_back(i);
  return live;
}

std::vector<Tensor> backward(
    const MaybeList& dys, const Maybe& x, at::TensorList weights, const MaybeList& As, const MaybeList& Bs, const Maybe& s,
    at::ArrayRef<double> scalings, double p, const Maybe& seed, bool need_dx, at::IntArrayRef needs, bool gpu) {
  const std::vector<size_t> live = given(dys);
  const Tensor& like = *dys.get(live.at(0));
  const auto dtype = like.scalar_type();
  const size_t n = dys.size();
  const std::vector<int64_t> ranks = ranks_of(As);
  const Tensor x2 = x ? rows_of(*x) : Tensor();
  variable_list flat(n), ds(n), dBs(n), parts;
  if (s) parts = s->split_with_sizes(ranks);

  std::vector<size_t> branches;  // those with dS
  variable_list rows, images;
  for (size_t i : live) {
    flat[i] = rows_of(*dys.get(i));
    const bool branch = ranks[i] && (need_dx || needs[i] & DLA);
    const Maybe up = branch ? Maybe(Bs.get(i)->to(dtype)) : std::nullopt, low = needs[i] & DLB ? Maybe(parts[i]) : std::nullopt;
    std::tie(ds[i], dBs[i]) = low_rank_grads(flat[i], up, low, scalings[i], gpu);
    if (!branch) continue;
    branches.push_back(i);
    rows.push_back(ds[i]);
    if (need_dx) images.push_back(As.get(i)->to(dtype));
  }
  // without dropout the dS lie together: dx and dA take one product each
  const Tensor stack = branches.empty() || p > 0.0 ? Tensor() : stacked(rows);

  std::vector<Tensor> grads;
  if (need_dx) {
    const size_t first = live[0];
    Tensor dx = stack.defined() ? at::mm(stack.t(), stacked(images)) : Tensor();
    for (size_t k = 0; p > 0.0 && k < branches.size(); ++k) {
      const Tensor part = masked(at::mm(rows[k].t(), images[k]), p, seed, branches[k]);
      dx = dx.defined() ? dx.add_(part) : part;
    }
    dx = dx.defined() ? dx.addmm_(flat[first], weights[first]) : at::mm(flat[first], weights[first]);
    for (size_t k = 1; k < live.size(); ++k) dx.addmm_(flat[live[k]], weights[live[k]]);
    std::vector<int64_t> sizes = like.sizes().vec();
    sizes.back() = dx.size(1);
    grads.push_back(dx.view(sizes));
  }
  variable_list dAs(n), trained;
  std::vector<int64_t> trained_ranks;
  for (size_t i : live)
    if (needs[i] & DLA) {
      trained.push_back(ds[i]);
      trained_ranks.push_back(ranks[i]);
    }
  for (size_t i : live)
    if (p > 0.0 && needs[i] & DLA) dAs[i] = at::mm(ds[i], masked(x2, p, seed, i)).to(As.get(i)->scalar_type());
  if (!trained.empty() && p == 0.0) {
    const Tensor together = at::mm(trained.size() == branches.size() ? stack : at::cat(trained), x2);
    const variable_list split = together.split_with_sizes(trained_ranks);
    auto next = split.begin();
    for (size_t i : live) {
      if (!(needs[i] & DLA)) continue;
      const auto own = As.get(i)->scalar_type();
      // an op's outputs share no storage
      dAs[i] = split.size() == 1 || own != dtype ? (*next++).to(own) : (next++)->clone();
    }
  }
  for (size_t i : live) {
    if (needs[i] & DW) grads.push_back(at::mm(flat[i].t(), x2));
    if (needs[i] & DB) grads.push_back(flat[i].sum(0));
    if (needs[i] & DLA) grads.push_back(dAs[i]);
    if (needs[i] & DLB) grads.push_back(dBs[i].to(Bs.get(i)->scalar_type()));
  }
  return grads;
}

// A device's operators: the products here, or in Python.
template <bool GPU>
std::vector<Tensor> forward_on(
    const Tensor& x, at::TensorList weights, const MaybeList& biases, const MaybeList& As, const MaybeList& Bs,
    at::ArrayRef<double> scalings, double p, const Maybe& seed) {
  if (plain(x, p, GPU, weights, As, Bs, biases) && formed_here(x, p, GPU)) {
    return forward(x, weights, biases, As, Bs, scalings, p, seed, GPU);
  }
  const py::gil_scoped_acquire acquire;
  return (*(GPU ? on_cuda : on_cpu).fwd)(x, weights.vec(), biases.vec(), As.vec(), Bs.vec(), scalings.vec(), p, seed)
      .template cast<std::vector<Tensor>>();
}

template <bool GPU>
std::vector<Tensor> backward_on(
    const MaybeList& dys, const Maybe& x, at::TensorList weights, const MaybeList& As, const MaybeList& Bs, const Maybe& s,
    at::ArrayRef<double> scalings, double p, const Maybe& seed, bool need_dx, at::IntArrayRef needs) {
  const Tensor& like = *dys.get(given(dys).at(0));
  const bool same = !x || x->scalar_type() == like.scalar_type();
  if (same && plain(like, p, GPU, weights, As, Bs, dys) && formed_here(like, p, GPU)) {
    return backward(dys, x, weights, As, Bs, s, scalings, p, seed, need_dx, needs, GPU);
  }
  const py::gil_scoped_acquire acquire;
  return (*(GPU ? on_cuda : on_cpu)
               .bwd)(dys.vec(), x, weights.vec(), As.vec(), Bs.vec(), s, scalings.vec(), p, seed, need_dx, needs.vec())
      .template cast<std::vector<Tensor>>();
}

}  // namespace

inline void bind_lora_linear(py::module_& m) {
  m.def("lora_linears", &lora_linears);
  m.def("serve_lora_linears", [](const py::object& fwd, const py::object& bwd, const py::object& cuda_fwd, const py::object& cuda_bwd) {
    const auto keep = [](const py::object& object) { return new py::object(object); };  // as long as the process
    on_cpu = {keep(fwd), keep(bwd)};
    on_cuda = {keep(cuda_fwd), keep(cuda_bwd)};
  });
  // of tests and benchmarks: whether a GPU's products are formed here, and those products on tensors of any device
  m.def("set_products_on_cuda", [](bool here) { return std::exchange(products_on_cuda, here); });
  m.def("lora_linears_fwd_on_gpu", [](const Tensor& x, const variable_list& weights, const std::vector<Maybe>& biases,
                                      const std::vector<Maybe>& As, const std::vector<Maybe>& Bs, const std::vector<double>& scalings, double p,
                                      const Maybe& seed) {
    const at::AutoDispatchBelowADInplaceOrView below;
    return forward(x, weights, MaybeList(biases), MaybeList(As), MaybeList(Bs), scalings, p, seed, true);
  });
  m.def("lora_linears_bwd_on_gpu", [](const std::vector<Maybe>& dys, const Maybe& x, const variable_list& weights,
                                      const std::vector<Maybe>& As, const std::vector<Maybe>& Bs, const Maybe& s,
                                      const std::vector<double>& scalings, double p, const Maybe& seed, bool need_dx,
                                      const std::vector<int64_t>& needs) {
    const at::AutoDispatchBelowADInplaceOrView below;
    return backward(MaybeList(dys), x, weights, MaybeList(As), MaybeList(Bs), s, scalings, p, seed, need_dx, needs, true);
  });
}

}  // namespace fastpeft

TORCH_LIBRARY_IMPL(fastpeft, CPU, m) {
  m.impl("lora_linears_fwd", fastpeft::forward_on<false>);
  m.impl("lora_linears_bwd", fastpeft::backward_on<false>);
}

TORCH_LIBRARY_IMPL(fastpeft, CUDA, m) {
  m.impl("lora_linears_fwd", fastpeft::forward_on<true>);
  m.impl("lora_linears_bwd", fastpeft::backward_on<true>);
}
