"""Every public op as one row: how to call it, its definition, and inputs of any size. What all ops must do is then tested over all rows.

m: rows (tokens), n: the width that is summed, normalised or looped over. Random affine parameters throughout.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from fastpeft import ops
from fastpeft.ops._common import to_device_async
from fastpeft.ops.absorbed_attention import absorbed_attention_reference
from fastpeft.ops.activations import geglu_reference, gelu_reference, swiglu_reference
from fastpeft.ops.attention import attention_reference
from fastpeft.ops.clamped_swiglu import clamped_swiglu_reference
from fastpeft.ops.excitor_keys import excitor_keys_reference
from fastpeft.ops.layer_norm import layer_norm_reference
from fastpeft.ops.linear_cross_entropy import linear_cross_entropy_reference
from fastpeft.ops.lora_linear import Projection, lora_linear_reference
from fastpeft.ops.mm_adapter import mm_adapter_reference
from fastpeft.ops.norm_mm_adapter import norm_mm_adapter_reference
from fastpeft.ops.relu import relu_reference
from fastpeft.ops.rescale import rescale_reference
from fastpeft.ops.rms_norm import rms_norm_reference
from fastpeft.ops.rotary import rotary_reference

EPS = 1e-5
CLAMPED = {"limit": 1.1, "alpha": 1.702, "one": 1.0, "interleaved": True}
inputs_of = importlib.import_module("fastpeft.ops.attention_inputs")  # fastpeft.ops has the function under that name


@dataclass(frozen=True)
class Op:
    """``call`` and ``reference`` take what ``make(m, n)`` draws, in float64; the last ``constants`` of it get no gradient.

    ``terms``, ``lone``: the size of what cancels in a gradient, so that the truth is no measure: of hard rows, and at width 1.
    """

    call: Callable
    reference: Callable
    make: Callable[[int, int], list[Tensor]]
    constants: int = 0
    tile: bool = False  # has a Triton kernel
    terms: float = 1e-6
    lone: float = 1.0
    random: bool = False  # another mask on another device

    def inputs(self, m: int, n: int, dtype: torch.dtype = torch.float64) -> list[Tensor]:
        return [t.to(dtype) if t.is_floating_point() else t for t in self.make(m, n)]

    def needs(self, inputs: list[Tensor]) -> tuple[bool, ...]:
        trained = len(inputs) - self.constants
        return (True,) * trained + (False,) * self.constants


def draw(*shape: int, fan: int = 1) -> Tensor:
    return torch.randn(shape, dtype=torch.float64) * fan**-0.5


def seeded(fn: Callable) -> Callable:
    """The same dropout at every call."""

    @functools.wraps(fn)
    def call(*args):
        torch.manual_seed(5)
        return fn(*args)

    return call


def _summed(norm: Callable) -> Callable:
    return lambda x, residual, *params: (norm(x + residual, *params, EPS), x + residual)


def _turn(m, n):
    angle = torch.rand(m, (n + 1) // 2, dtype=torch.float64).repeat(1, 2) * 6
    return [draw(2, 3, m, 2 * ((n + 1) // 2)), angle.cos(), angle.sin()]


def _heads(m, n, *more):
    return [draw(2, 2, m, n, fan=n), draw(2, 1, m + 2, n), draw(2, 1, m + 2, n), *more]


def _padded(m: int, samples: int) -> Tensor:
    mask = torch.ones(samples, m + 2, dtype=torch.bool)
    mask[0, -1], mask[-1, 0] = False, False
    return mask


def _attention(fn, causal=False, padded=False, extra=""):
    def call(q, k, v, *more):
        mask = _padded(q.shape[2], q.shape[0]) if padded else None
        mask = mask if mask is None else to_device_async(mask, q.device)
        return fn(q, k, v, causal=causal, key_padding_mask=mask, **({extra: tuple(more)} if extra else {}))

    return call


def _attention_op(causal=False, padded=False, extra="", shape=None):
    def make(m, n):
        return _heads(m, n, *(draw(*shape(n)) for _ in range(2) if shape))

    return Op(_attention(ops.attention, causal, padded, extra), _attention(attention_reference, causal, padded, extra), make, terms=1e4)


def _frozen_keys(fn):
    return lambda q, k, v: fn(q, k.detach(), v.detach(), causal=True)


def _dropped(q, k, v):
    """Dropout drawn for [B, H, M, N] as attention draws it, on the probabilities of the definition."""
    probs = (q @ k.repeat_interleave(2, 1).mT * q.shape[-1] ** -0.5).softmax(-1)
    keep = ops.dropout(torch.ones_like(probs), 0.3)
    return (probs * keep) @ v.repeat_interleave(2, 1)


def _absorb(fn):
    def call(q, states, wk, bk, ak, lk, wv, bv, av, lv):
        return fn(q, states, Projection(wk, bk, ak, lk, 0.7), Projection(wv, bv, av, lv, 1.3), 0.5)

    return call


def _absorbed_inputs(m, n):
    projection = [draw(6, n, fan=n), draw(6), draw(2, n, fan=n), draw(6, 2)]
    return [draw(2 * m, 2, 3), draw(2, 4, n), *projection, *(t.flip(0) + 0.1 for t in projection)]


def _excitor(fn):
    return lambda k, hidden, wd, wu, prompt, gate, *visual: fn(k, hidden, wd, wu, prompt, gate, visual or None)


def _excitor_inputs(image):
    def make(m, n):
        C = 2 * n
        tensors = [draw(2, 2, m, n), draw(2, m, C), draw(3, C, fan=C), draw(C, 3, fan=3), draw(4, C), draw(2)]
        return tensors + [draw(2, 5, 6), draw(3, 6, fan=6), draw(C, 3, fan=3), draw(3, 6, fan=6), draw(C, 3, fan=3)] * image

    return make


def _one_pass(q, k, v, q_norm, k_norm, l_k, l_v, cos, sin):
    """Whatever the rule: by the parts where the one pass is not made for such heads."""
    form = inputs_of._together if q.shape[3] <= inputs_of.WIDEST and q.numel() else inputs_of._in_parts
    return form(q, k, v, inputs_of._How(cos, sin, q_norm, k_norm, l_k, l_v), inputs_of._Form(EPS, 1.0))


def _parts(q, k, v, q_norm, k_norm, l_k, l_v, cos, sin):
    options = {"rotary": (cos, sin), "q_norm": q_norm, "k_norm": k_norm, "ia3": (l_k, l_v), "norm_eps": EPS, "norm_offset": 1.0}
    return ops.attention_inputs(q, k, v, **options)


def _inputs_reference(q, k, v, q_norm, k_norm, l_k, l_v, cos, sin):
    return inputs_of.attention_inputs_reference(q, k, v, inputs_of._How(cos, sin, q_norm, k_norm, l_k, l_v), EPS, 1.0)


def _heads_of_tokens(m, n):
    d = 2 * ((n + 1) // 2)
    angle = torch.rand(1, m, d // 2, dtype=torch.float64).repeat(1, 1, 2) * 6
    factors = [draw(*shape) for shape in ((d,), (d,), (2, d), (2, d))]
    return [draw(2, m, 4, d), draw(2, m, 2, d), draw(2, m, 2, d), *factors, angle.cos(), angle.sin()]


def _lora_inputs(m, n):
    return [draw(m, n), draw(9, n, fan=n), draw(9), draw(3, n, fan=n), draw(9, 3)]


def _lora(fn):
    return lambda x, w, b, A, B: fn(x, w, b, A, B, 0.5)


def _projections(fn):
    return lambda x, w, b, A, B, w2, A2, B2: fn(x, [Projection(w, b, A, B, 0.5), Projection(w2, None, A2, B2, 2.0)])


def _each_projection(x, projections):
    return tuple(lora_linear_reference(x, *p) for p in projections)


def _adapter_inputs(norm, per_token):
    def make(m, n):
        routing = torch.rand(*((2, m, 2) if per_token else (2, 2)), dtype=torch.float64)
        return [draw(2, m, n), *[draw(n)] * norm, draw(4, n, fan=n), draw(4), draw(2, n, 4), draw(2, n), routing]

    return make


def _adapter(fn):
    return lambda x, *params: fn(x, *params, 0.7, 1)


def _normed_adapter(fn):
    return lambda x, gamma, *params: fn(x, gamma, EPS, *params, 0.7, 1)


def _loss(fn, **options):
    return lambda hidden, weight, bias, labels: fn(hidden, weight, bias, labels, **options)


def _loss_inputs(m, n):
    labels = torch.randint(0, 11, (m,))
    labels[1::3] = -100
    return [draw(m, n), draw(11, n, fan=n), draw(11), labels]


def _loss_op(**options):
    return Op(_loss(ops.linear_cross_entropy, **options), _loss(linear_cross_entropy_reference, **options), _loss_inputs, 1, tile=True)


def _norm(fn):
    return lambda *a: fn(*a, EPS)


TABLE = {
    "layer_norm": Op(_norm(ops.layer_norm), _norm(layer_norm_reference), lambda m, n: [draw(m, n), draw(n) + 1, draw(n)], lone=EPS**-0.5),
    "add_layer_norm": Op(
        _norm(ops.add_layer_norm), _summed(layer_norm_reference), lambda m, n: [draw(m, n), draw(m, n), draw(n) + 1, draw(n)],
        lone=EPS**-0.5,
    ),
    "rms_norm": Op(_norm(ops.rms_norm), _norm(rms_norm_reference), lambda m, n: [draw(m, n), draw(n) + 1]),
    "add_rms_norm": Op(_norm(ops.add_rms_norm), _summed(rms_norm_reference), lambda m, n: [draw(m, n), draw(m, n), draw(n) + 1]),
    "relu": Op(ops.relu, relu_reference, lambda m, n: [draw(m, n)]),
    "gelu": Op(ops.gelu, gelu_reference, lambda m, n: [draw(m, n), draw(n)]),
    "swiglu": Op(ops.swiglu, swiglu_reference, lambda m, n: [draw(m, n), draw(m, n), draw(n)]),
    "geglu": Op(ops.geglu, geglu_reference, lambda m, n: [draw(m, n), draw(m, n), draw(n)]),
    "clamped_swiglu": Op(
        partial(ops.clamped_swiglu, **CLAMPED), partial(clamped_swiglu_reference, **CLAMPED), lambda m, n: [draw(m, 2 * n)],
    ),
    "clamped_swiglu halves": Op(
        partial(ops.clamped_swiglu, limit=0.8), partial(clamped_swiglu_reference, limit=0.8), lambda m, n: [draw(m, 2 * n)],
    ),
    "rescale": Op(ops.rescale, rescale_reference, lambda m, n: [draw(m, n), draw(n)]),
    "rotary": Op(ops.rotary, rotary_reference, _turn, constants=2),
    "dropout": Op(
        seeded(lambda x: ops.dropout(x, 0.3)), seeded(lambda x: x * ops.dropout(torch.ones_like(x), 0.3)), lambda m, n: [draw(m, n)],
        random=True,
    ),
    "attention_inputs": Op(_one_pass, _inputs_reference, _heads_of_tokens, constants=2),
    "attention_inputs parts": Op(_parts, _inputs_reference, _heads_of_tokens, constants=2),
    "attention": _attention_op(),
    "attention causal padded": _attention_op(causal=True, padded=True),
    "attention prefix": _attention_op(padded=True, extra="prefix", shape=lambda n: (1, 3, n)),
    "attention rescale": _attention_op(causal=True, extra="rescale", shape=lambda n: (1, n)),
    "attention frozen keys": Op(
        _frozen_keys(ops.attention), _frozen_keys(attention_reference), lambda m, n: [draw(2, 2, m, 128 + n, fan=n) for _ in range(3)],
        constants=2, terms=1e4,
    ),
    "attention dropout": Op(seeded(lambda *a: ops.attention(*a, dropout_p=0.3)), seeded(_dropped), _heads, random=True),
    "absorbed_attention": Op(_absorb(ops.absorbed_attention), _absorb(absorbed_attention_reference), _absorbed_inputs),
    "excitor_keys": Op(_excitor(ops.excitor_keys), _excitor(excitor_keys_reference), _excitor_inputs(False), tile=True),
    "excitor_keys image": Op(_excitor(ops.excitor_keys), _excitor(excitor_keys_reference), _excitor_inputs(True), tile=True),
    "lora_linear": Op(_lora(ops.lora_linear), _lora(lora_linear_reference), _lora_inputs, tile=True),
    "lora_linears": Op(
        _projections(ops.lora_linears), _projections(_each_projection),
        lambda m, n: [*_lora_inputs(m, n), draw(5, n), draw(2, n), draw(5, 2)], tile=True,
    ),
    "mm_adapter": Op(_adapter(ops.mm_adapter), _adapter(mm_adapter_reference), _adapter_inputs(False, False), tile=True),
    "mm_adapter token": Op(_adapter(ops.mm_adapter), _adapter(mm_adapter_reference), _adapter_inputs(False, True), tile=True),
    "norm_mm_adapter": Op(
        _normed_adapter(ops.norm_mm_adapter), _normed_adapter(norm_mm_adapter_reference), _adapter_inputs(True, False), tile=True
    ),
    "linear_cross_entropy": _loss_op(label_smoothing=0.1),
    "linear_cross_entropy none": _loss_op(reduction="none"),
}  # fmt: skip
