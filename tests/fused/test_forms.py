"""Every form that is recognised by its code, on an example class: the same values and gradients as the class's own forward in float64, the
same dtypes, no worse in 16 bit, and no more bytes kept."""

import copy
import importlib

import pytest
import torch
from double import Double
from torch import nn
from transformers.activations import ACT2FN
from transformers.pytorch_utils import Conv1D

from fastpeft import registry
from fastpeft.forms import digest
from fastpeft.fused.layers.mlp import _Chain, _Gated
from fastpeft.fused.layers.norms import FusedCohereLayerNorm, _RMSNorm, add_norm
from fastpeft.registry import exchange, form_of, recorded

N, HIDDEN = 12, 20
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def class_at(path):
    home, _, name = path.rpartition(".")
    return getattr(importlib.import_module(home), name, None)


def examples(*kinds):
    return [path for path, form in registry._FORMS.items() if form.code and issubclass(form.fused, kinds)]


@pytest.mark.parametrize("path", recorded())
def test_recorded_digests_are_those_of_the_installed_version(path):
    cls = class_at(path)
    assert cls is not None and digest(cls) in recorded()[path] and registry.form_of_class(cls).code == recorded()[path]


def assembled(cls, **parts):
    """A module of ``cls`` with these attributes, whatever its own constructor would take."""
    module = cls.__new__(cls)
    nn.Module.__init__(module)
    for name, part in parts.items():
        setattr(module, name, part)
    return module


def norm(path, weight=True, width=N):
    torch.manual_seed(0)
    cls = class_at(path)
    parts = {"eps": 1e-3, "variance_epsilon": 1e-3, "with_scale": weight}
    if weight:
        parts["weight"] = nn.Parameter(torch.randn(width))
    return assembled(cls, **parts)


def linear(cls, name, inputs, outputs):
    return Conv1D(outputs, inputs) if name in ("c_fc", "c_proj") else nn.Linear(inputs, outputs)


def mlp(path, act="gelu_pytorch_tanh", dropout=0.0):
    """Of any kind, its layers under its class's names."""
    torch.manual_seed(0)
    fused, parts = registry._FORMS[path].fused, {}
    if issubclass(fused, _Gated):
        names = fused.gated_by
        widths = {names.joint: (N, 2 * HIDDEN)} if names.joint else {names.gate: (N, HIDDEN), names.up: (N, HIDDEN)}
        widths[names.down] = (HIDDEN, N)
        parts |= {names.act: ACT2FN[act], names.drop: nn.Dropout(dropout)}
    else:
        steps = [step for step in fused.chained if "act" not in step and "drop" not in step]
        widths = dict(zip(steps, [(N, HIDDEN), (HIDDEN, N)]))
        for step in fused.chained:
            if step.startswith("("):
                parts[step[1:-1]] = dropout
            elif step not in widths:
                parts[step] = nn.Dropout(dropout) if "drop" in step else ACT2FN[act]
    parts |= {name: linear(class_at(path), name, *width) for name, width in widths.items()}
    return assembled(class_at(path), **{name: part for name, part in parts.items() if name})


def step(module, x, trained=True):
    x = x.clone().requires_grad_()
    module.zero_grad()
    kept = []

    def keep(t):
        kept.append((t.untyped_storage().data_ptr(), t.untyped_storage().nbytes()))
        return t

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        y = module(x)
    (y.float() if y.dtype in DTYPES else y).square().sum().backward()
    return y.detach(), [x.grad, *(p.grad for p in module.parameters())], sum(dict(kept).values())


def assert_same(mine, theirs, **close):
    torch.testing.assert_close(mine[0], theirs[0], **close)
    for found, want in zip(mine[1], theirs[1], strict=True):
        assert (found is None) == (want is None)
        if want is not None:
            torch.testing.assert_close(found, want, **close)


def both(module):
    twin = copy.deepcopy(module)
    for child in reversed(list(twin.modules())):
        if form_of(child) is not None and not form_of(child).why_not(child):
            exchange(child)
    assert type(twin) is not type(module) and type(twin).__name__ == type(module).__name__
    return twin, module


NORMS = examples(_RMSNorm, FusedCohereLayerNorm)
EXACT = {"rtol": 1e-10, "atol": 1e-10}


def weights(path):
    """Whether an example may have a weight, and may have none."""
    return {"Gemma3nRMSNorm": (True, False), "NanoChatRMSNorm": (False,), "DeepseekV4UnweightedRMSNorm": (False,)}.get(
        path.rpartition(".")[2], (True,)
    )


@pytest.mark.parametrize("path", NORMS)
def test_norms(path):
    for weight in weights(path):
        ours, theirs = (m.double() for m in both(norm(path, weight)))
        x = 3 * torch.randn(2, 5, N, dtype=torch.float64) + 1
        with Double():
            assert_same(step(ours, x), step(theirs, x), **EXACT)
            assert_same(step(ours, x[:, ::2]), step(theirs, x[:, ::2]), **EXACT)


@pytest.mark.parametrize("path", NORMS)
@pytest.mark.parametrize("autocast", [False, True])
def test_norms_have_the_dtypes_of_theirs(path, autocast):
    """Whatever the weight's and the input's are: a float32 weight in a bfloat16 model, and under autocast."""
    exact = norm(path, weights(path)[0]).double()
    for dtype in DTYPES:
        for weight_dtype in DTYPES:
            ours, theirs = both(copy.deepcopy(exact).to(weight_dtype))
            x = torch.randn(40, N).to(dtype)
            with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
                mine, want = ours(x), theirs(x)
                with torch.autocast("cpu", enabled=False):
                    truth = copy.deepcopy(theirs).double()(x.double())
            assert mine.dtype == want.dtype
            assert (mine.double() - truth).norm() <= 1.05 * (want.double() - truth).norm() + 1e-6 * truth.norm()


@pytest.mark.parametrize("path", NORMS)
def test_residual_sums_inside_norms(path):
    a, b = torch.randn(2, 7, N, dtype=torch.float64)
    with Double():
        for weight in weights(path):
            ours, theirs = (m.double() for m in both(norm(path, weight)))
            for module in (ours, theirs):
                y, total = add_norm(a, b, module)
                torch.testing.assert_close(total, a + b)
                torch.testing.assert_close(y, theirs(a + b), **EXACT)
    for dtype in (torch.float32, torch.bfloat16):
        theirs = norm(path, weights(path)[0]).to(dtype)
        x = a.bfloat16()
        assert add_norm(x, x, theirs)[0].dtype == theirs(x + x).dtype


MLPS = examples(_Gated, _Chain)


OFTEN = ("transformers.models.llama.modeling_llama.LlamaMLP", "transformers.models.clip.modeling_clip.CLIPMLP")
ACTS = [(path, act) for path in MLPS for act in ("gelu_pytorch_tanh", "silu")]
ACTS += [(path, act) for path in OFTEN for act in ("relu", "quick_gelu", "gelu_new")]


@pytest.mark.parametrize("path, act", ACTS)
def test_feed_forwards(path, act):
    ours, theirs = (m.double().train() for m in both(mlp(path, act)))
    x = torch.randn(3, 5, N, dtype=torch.float64)
    mine, want = step(ours, x), step(theirs, x)
    assert_same(mine, want, **EXACT)
    assert mine[2] <= want[2]
    for p in (*ours.parameters(), *theirs.parameters()):
        p.requires_grad_(False)
    mine, want = step(ours, x), step(theirs, x)
    assert_same(mine, want, **EXACT)
    assert mine[2] <= want[2]
    name = theirs.forward.__code__.co_varnames[1]
    torch.testing.assert_close(ours(**{name: x}), theirs(x), **EXACT)  # by the name that theirs gives it


@pytest.mark.parametrize("path", MLPS)
def test_feed_forwards_recompute_and_drop(path):
    """With their projections formed again in backward; in evaluation dropout does nothing, in training something."""
    ours, theirs = (m.double().eval() for m in both(mlp(path, dropout=0.5)))
    x = torch.randn(3, 5, N, dtype=torch.float64)
    before = step(ours, x)
    ours.recompute = True
    again = step(ours, x)
    assert_same(again, step(theirs, x), **EXACT)
    assert again[2] <= before[2]
    ours.train(), theirs.train()
    for p in ours.parameters():
        p.data.fill_(0.25)
    dropped = [not torch.equal(m(x.abs() + 1)[0, 0], m(x.abs() + 1)[0, 0]) for m in (ours, theirs)]
    assert dropped[0] == dropped[1]


def test_t5s_last_layer_in_float32():
    path = "transformers.models.t5.modeling_t5.T5DenseGatedActDense"
    ours, theirs = (m.bfloat16() for m in both(mlp(path, "gelu_new")))
    ours.wo.float(), theirs.wo.float()
    x = torch.randn(3, N).bfloat16()
    assert ours(x).dtype == theirs(x).dtype == torch.float32
    torch.testing.assert_close(ours(x), theirs(x), rtol=0.02, atol=0.02)


def test_a_gate_that_is_watched_runs_as_it_did():
    path = "transformers.models.llama.modeling_llama.LlamaMLP"
    ours, theirs = both(mlp(path, "silu"))
    seen = []
    for child in ours.children():
        child.register_forward_hook(lambda module, args, out: seen.append(type(module).__name__) or out * 1.5)
    for child in theirs.children():
        child.register_forward_hook(lambda module, args, out: out * 1.5)
    x = torch.randn(4, N)
    torch.testing.assert_close(ours(x), theirs(x))
    assert seen == ["Linear", "SiLUActivation", "Linear", "Linear"]
