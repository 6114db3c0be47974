"""What every op must do, over the rows of _table.py: any width, hard rows, strides, no rows, subsets of gradients, fakes, no waiting."""

import os
import re
from functools import partial

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from fastpeft import _library, ops

INTERPRETED = _library.FORCED == "triton"
only_once = pytest.mark.skipif(_library.FORCED != "" or "FASTPEFT_LIBRARY" in os.environ, reason="the same in every mode")
SLACK = {torch.float32: 2**-20, torch.bfloat16: 2**-7, torch.float16: 2**-10}  # where PyTorch's own error is luck


def compare(check, row, inputs, needs=None, floor=1e-30):
    """At most four times as far from float64 as the definition in the same dtype is, outputs and gradients: enough to catch a fault at
    every size. Each op's own file compares with PyTorch without that room."""
    needs = row.needs(inputs) if needs is None else needs
    wide = [t.double() if t.is_floating_point() else t for t in inputs]
    runs = [check.run(fn, given, needs) for fn, given in ((row.call, inputs), (row.reference, inputs), (row.reference, wide))]
    for value, other, exact in zip(*(outputs + grads for outputs, grads in runs)):
        assert (value is None) == (exact is None)
        if value is not None:
            error, own = check.error(value, exact, floor), check.error(other, exact, floor)
            assert error <= 4 * own + SLACK.get(inputs[0].dtype, 2**-45), f"{error:.1e}, and PyTorch's own is {own:.1e}"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("n", [1, 65] if INTERPRETED else [1, 7, 252, 257, 768, 901])
def test_widths(check, row, n, dtype):
    inputs = row.inputs(3, n, dtype)
    compare(check, row, inputs, floor=row.lone if n == 1 else 1e-30)


@pytest.mark.parametrize("hard", ["large", "constant", "zero", "tiny"])
def test_hard_rows(check, row, hard):
    x, *rest = row.inputs(3, 33, torch.float32)
    x = {"large": x * 1e4, "constant": torch.full_like(x, 3.0), "zero": torch.zeros_like(x), "tiny": x * 1e-4}[hard]
    compare(check, row, [x, *rest], floor=row.terms if hard == "large" else 1e-6)


def test_strides(check, row):
    """Every second element of wider storage, the last two dimensions exchanged in memory: the numbers of dense inputs."""
    inputs = row.inputs(4, 24, torch.float32)
    want = check.run(row.call, inputs, row.needs(inputs))

    def spaced(t):
        return torch.stack([t, t], -1).flatten(-2)[..., ::2]

    def turned(t):
        return t.mT.contiguous().mT if t.dim() > 1 else spaced(t)

    for layout in (spaced, turned):
        views = [layout(t) for t in inputs]
        assert not all(t.is_contiguous() for t in views)
        got = check.run(row.call, views, row.needs(inputs))
        for value, exact in zip(got[0] + got[1], want[0] + want[1]):
            assert value is exact is None or check.error(value, exact) <= 1e-5


def test_broadcast(check, row):
    """Each input in turn expanded from one row or one sample, stride 0."""
    inputs = row.inputs(4, 24, torch.float32)
    for i, t in enumerate(inputs[: len(inputs) - row.constants]):
        views = [*inputs[:i], t[:1].expand_as(t), *inputs[i + 1 :]]
        compare(check, row, views, floor=1.0)  # equal keys: what a softmax hands back cancels


def test_no_rows(check, row):
    inputs = row.inputs(0, 8, torch.float32)
    outputs, grads = check.run(row.call, inputs, row.needs(inputs))
    assert all(o.numel() == 0 or not o.any() or o.isnan().all() for o in outputs)  # the mean of no losses is nan
    for grad, source in zip(grads, inputs):
        assert grad is None or (grad.shape == source.shape and not grad.any())


EXAMPLES = {"max_examples": 2 if INTERPRETED else 8, "deadline": None, "derandomize": True}


@settings(**EXAMPLES, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(m=st.integers(1, 9), n=st.integers(1, 40), chosen=st.integers(0, 2**11 - 1), seed=st.integers(0, 99))
def test_any_shape_and_any_gradients(check, row, m, n, chosen, seed):
    torch.manual_seed(seed)
    inputs = row.inputs(m, n, torch.float32 if INTERPRETED else torch.float64)
    needs = [bool(chosen >> i & 1) and may for i, may in enumerate(row.needs(inputs))]
    compare(check, row, inputs, needs, floor=row.lone)


def test_deterministic(check, row):
    inputs = row.inputs(8 if INTERPRETED else 40, 33, torch.float32)
    check.deterministic(row.call, inputs, row.needs(inputs))


@only_once
def test_gradcheck(row):
    inputs = [t.requires_grad_(need) for t, need in zip(row.inputs(2, 3), row.needs(row.make(2, 3)))]
    assert torch.autograd.gradcheck(row.call, inputs, fast_mode=True)
    assert torch.autograd.gradcheck(row.reference, inputs, fast_mode=True)


@only_once
def test_nothing_is_kept_without_a_gradient(check, row):
    inputs = row.inputs(3, 8, torch.float32)
    assert check.saved_bytes(row.call, inputs) == 0
    with torch.no_grad():
        inputs = [t.requires_grad_(need) for t, need in zip(inputs, row.needs(inputs))]
        assert check.saved_bytes(row.call, inputs) == 0


@only_once
def test_other_derivatives_are_refused(row):
    """Neither torch.func nor forward mode finds a tangent of zero: an error says what to do, or PyTorch's own operators served and the
    answer is right. (vmap without derivatives runs.)"""
    x, *rest = row.inputs(3, 8, torch.float32)

    def loss(call, x):
        outputs = call(x, *rest)
        return sum(o.square().sum() for o in ([outputs] if isinstance(outputs, torch.Tensor) else outputs))

    for asked in (lambda f: torch.func.grad(f)(x), lambda f: torch.func.jvp(f, (x,), (x,))[1]):
        try:
            got = asked(partial(loss, row.call))
        except RuntimeError as error:
            assert re.search(r"autograd only.*fastpeft\.restore|use forward AD", str(error))  # ours, or PyTorch's own
        else:
            torch.testing.assert_close(got, asked(partial(loss, row.reference)))


class Calls(TorchDispatchMode):
    """Notes the arguments of fastpeft's operators as they are called."""

    def __init__(self):
        super().__init__()
        self.seen = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "fastpeft":
            self.seen.setdefault(func, []).append(args)
        return func(*args, **kwargs or {})


def test_operators_of_every_row(check, row):
    """torch.library's checks of schema, aliasing and fakes, on the very calls an op makes, forward and backward."""
    inputs = row.inputs(3, 8, torch.float32)
    with Calls() as calls:
        check.run(row.call, inputs, row.needs(inputs))
        check.run(row.call, inputs, (True,) + (False,) * (len(inputs) - 1))
    for func, several in calls.seen.items():
        for args in several:
            torch.library.opcheck(func, args, test_utils=("test_schema", "test_faketensor"))


@only_once
def test_every_operator_is_some_rows(table, check):
    """No operator of the library escapes the test above; no public op escapes the table."""
    with Calls() as calls:
        ops.rescale(torch.ones(2, 3, dtype=torch.bfloat16), torch.ones(3))  # dtypes alike are ATen's
        for row in table.values():
            inputs = row.inputs(3, 8, torch.float32)
            check.run(row.call, inputs, row.needs(inputs))
    seen = {func._schema.name.split("::")[1] for func in calls.seen}
    apart = {"prefix_attention_fwd", "prefix_attention_bwd"}  # small calls go to SDPA: test_prefix_attention.py has these two
    apart |= {"low_rank_grads"}  # of many rows: test_low_rank_grads.py has it
    apart |= {"relu_pack", "relu_again"}  # for a layer behind it: test_relu.py has these two
    apart |= {"expert_linear_fwd", "expert_linear_bwd"}  # of no shape, where an expert ends: test_expert_linear.py has them
    apart |= {"excitor_turn_fwd"}  # served by Triton alone, in 16 bit: test_excitor_turn.py has it
    assert seen | apart == set(_library.backend_of())
    of_trees = {"PrefixTree", "tree_attention"}  # a tree is no shape: test_tree_attention.py has them
    of_others = {"lora_attention"}  # five rows' ops in turn: test_lora_attention.py has it
    assert {name.split()[0] for name in table} == set(ops.__all__) - {"Projection"} - of_trees - of_others


@only_once
def test_no_op_waits_for_a_device(row):
    """A training step on tensors without values: asking for one (item, nonzero, a branch on a tensor) raises. Labels lie on the host."""
    drawn = row.inputs(4, 8, torch.float32)
    inputs = [t.to("meta").requires_grad_(need) if t.is_floating_point() else t for t, need in zip(drawn, row.needs(drawn))]
    outputs = row.call(*inputs)
    outputs, leaves = [outputs] if isinstance(outputs, torch.Tensor) else list(outputs), [t for t in inputs if t.requires_grad]
    grads = torch.autograd.grad(outputs, leaves, [torch.empty_like(o) for o in outputs])
    assert [g.shape for g in grads] == [t.shape for t in leaves]


@only_once
def test_compiles_once_for_any_length(check, row):
    """One graph without breaks, forward and backward, serves another number of rows: nothing is made anew, nothing specialised."""
    if row.random:
        pytest.skip("torch.compile cannot look into manual_seed; test_compiles_with_dropout has these")
    torch._dynamo.reset()
    compiled = torch.compile(row.call, fullgraph=True, dynamic=True, backend="aot_eager")
    for m in (13, 17, 19):  # no other size of the table's: sizes that are equal at first count as one
        inputs = row.inputs(m, 8, torch.float32)
        with torch._dynamo.config.patch(error_on_recompile=m > 13):
            got, want = (check.run(fn, inputs, row.needs(inputs)) for fn in (compiled, row.call))
        for value, exact in zip(got[0] + got[1], want[0] + want[1]):
            assert value is exact is None or check.error(value, exact, 1e-6) <= 1e-5


@only_once
@pytest.mark.parametrize("name", ["absorbed_attention", "linear_cross_entropy none"])
def test_compiles(check, table, name):
    """Those that are compiled in no other file."""
    inputs = table[name].inputs(3, 8, torch.float32)
    check.compiles(table[name].call, inputs, table[name].needs(inputs))


NEVER = 1e-12  # a probability at which nothing is dropped, and everything that dropping takes is done


@only_once
@pytest.mark.parametrize("name", ["dropout", "attention", "attention prefix", "lora_linear", "mm_adapter"])
def test_compiles_with_dropout(check, table, name):
    inputs = table[name].inputs(3, 8, torch.float32)
    calls = {
        "dropout": lambda x: ops.dropout(x, NEVER),
        "attention": lambda q, k, v: ops.attention(q, k, v, dropout_p=NEVER),
        "attention prefix": lambda q, k, v, *prefix: ops.attention(q, k, v, prefix=prefix, dropout_p=NEVER),
        "lora_linear": lambda *args: ops.lora_linear(*args, 0.5, NEVER),
        "mm_adapter": lambda *args: ops.mm_adapter(*args, 0.7, 1, NEVER),
    }
    check.compiles(calls[name], inputs)


@only_once
def test_outputs_changed_in_place(row, request):
    """As those of PyTorch's own layers. Only an output that an op keeps for backward may be refused, by its version, as PyTorch's is."""

    def gradients(change):
        torch.manual_seed(0)
        inputs = row.inputs(3, 8)
        trained = [t.requires_grad_() for t in inputs[: len(inputs) - row.constants]]
        outputs = row.call(*inputs)
        loss = sum(change(y).square().sum() for y in ([outputs] if torch.is_tensor(outputs) else outputs))
        return torch.autograd.grad(loss, trained)

    want = gradients(lambda y: y * 1.5)
    name = request.node.callspec.id
    try:
        got = gradients(lambda y: y.mul_(1.5))
    except RuntimeError as error:
        if not name.startswith(("attention", "prefix_attention", "add_")) or "modified by an inplace operation" not in str(error):
            raise
    else:
        for a, b in zip(got, want, strict=True):
            torch.testing.assert_close(a, b)


@pytest.mark.skipif(_library.backend_of()["layer_norm_fwd"]["CPU"] != "native", reason="the same in every mode")
def test_what_does_not_fit_is_refused():
    """csrc reads past the end of no tensor, whoever calls it."""
    op, x, one = torch.ops.fastpeft, torch.randn(3, 8), torch.ones(3)
    for message, call, *args in (
        ("wrong size", op.layer_norm_fwd, x, None, torch.ones(7), None, 1e-5, True),
        ("shapes differ", op.layer_norm_fwd, x, x[:2], None, None, 1e-5, True),
        ("shapes differ", op.layer_norm_bwd, x[:2], x, None, one, one, None, True, False, False),
        ("not kept", op.layer_norm_bwd, x, x, None, one[:0], one[:0], None, True, False, False),
        ("not kept", op.rms_norm_bwd, x, x, None, one[:2], None, True, False),
        ("shapes differ", op.swiglu_fwd, x, x[:, :4], None),
        ("wrong size", op.gelu_fwd, x, torch.ones(9), "none"),
        ("not kept", op.swiglu_bwd, x, x, None, None, True, False, False),
    ):
        with pytest.raises(RuntimeError, match=message):
            call(*args)
    y, _, mean, _ = op.layer_norm_fwd(torch.empty(3, 0), None, None, None, 1e-5, True)
    assert y.shape == (3, 0) and mean.numel() == 0
