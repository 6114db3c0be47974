"""lora_attention against its definition, with float64 as the truth; what it saves for each subset of gradients; what it refuses."""

import importlib
import itertools

import pytest
import torch

from fastpeft import _library
from fastpeft.ops import layer_norm, lora_attention
from fastpeft.ops.lora_attention import lora_attention_reference

if _library.FORCED not in ("", "native"):  # its operators' own files run in all of them
    pytest.skip("the same in every mode", allow_module_level=True)

B, M, C, H, HKV, D, OUT, R, N = 2, 7, 20, 4, 2, 8, 12, 3, 5
BRANCHES = ("q", "k", "v", "o")
PAIRS = {"rotary": ("cos", "sin"), "ia3": ("l_k", "l_v"), "prefix": ("P_k", "P_v"), "excitor": ("w_down", "w_up", "prompt", "gate")}


def drawn(dtype=torch.float32, **more):
    """x, the four projections' tensors, and what ``more`` asks for, by name."""
    torch.manual_seed(0)
    rows, cols = {"q": H * D, "k": HKV * D, "v": HKV * D, "o": OUT}, {"q": C, "k": C, "v": C, "o": H * D}
    tensors = {"x": torch.randn(B, M, C)}
    for name in BRANCHES:
        tensors |= {f"W_{name}": torch.randn(rows[name], cols[name]) * cols[name] ** -0.5, f"b_{name}": torch.randn(rows[name])}
        tensors |= {f"A_{name}": torch.randn(R, cols[name]) * cols[name] ** -0.5, f"B_{name}": torch.randn(rows[name], R)}
    extra = {
        "norms": lambda: {"q_norm": torch.rand(D) + 0.5, "k_norm": torch.rand(D) + 0.5},
        "rotary": lambda: {"cos": torch.randn(1, M, D), "sin": torch.randn(1, M, D)},
        "ia3": lambda: {"l_k": torch.rand(HKV * D) + 0.5, "l_v": torch.rand(HKV * D) + 0.5},
        "prefix": lambda: {"P_k": torch.randn(HKV, N, D), "P_v": torch.randn(HKV, N, D)},
        "excitor": lambda: dict(zip(PAIRS["excitor"], map(torch.randn, [(R, C), (H * D, R), (6, H * D), (H,)]))),
    }
    for name in more:
        tensors |= extra[name]()
    return {name: t.to(dtype) for name, t in tensors.items()}


def called(function, names, lora=BRANCHES, **options):
    """``function`` of tensors in the order of ``names``."""

    def call(*tensors):
        t = dict(zip(names, tensors))
        projections = [
            (t[f"W_{n}"], t[f"b_{n}"], *((t[f"A_{n}"], t[f"B_{n}"], 0.5 + i) if n in lora else ())) for i, n in enumerate(BRANCHES)
        ]
        given = {key: t.get(key) for key in ("q_norm", "k_norm")}
        given |= {key: tuple(t[n] for n in members) for key, members in PAIRS.items() if members[0] in t}
        return function(t["x"], *projections, H, **given, **options)

    return call


EXTRAS = {
    "plain": (),
    "norms": ("norms",),
    "rotary": ("rotary",),
    "ia3": ("ia3",),
    "prefix": ("prefix",),
    "ia3 and rotary": ("ia3", "rotary"),
    "ia3 and prefix": ("ia3", "prefix"),
    "all": ("norms", "rotary", "ia3", "prefix"),
}


@pytest.mark.parametrize("recompute", [False, True], ids=["kept", "recomputed"])
@pytest.mark.parametrize("causal", [False, True], ids=["bidirectional", "causal"])
@pytest.mark.parametrize("extras", EXTRAS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_against_the_definition(check, dtype, extras, causal, recompute):
    tensors = drawn(dtype, **dict.fromkeys(EXTRAS[extras]))
    mask = torch.ones(B, M, dtype=torch.bool)
    mask[0, -2:] = False
    options = {"causal": causal, "key_padding_mask": mask}
    reference = called(lora_attention_reference, list(tensors), **options)
    ours = called(lora_attention, list(tensors), **options, recompute=recompute)
    needs = [name not in ("cos", "sin") for name in tensors]
    close(check, ours, reference, list(tensors.values()), needs)


def close(check, ours, reference, inputs, needs=None):
    """Five operators in turn, each no worse than PyTorch in its own file: here at most four times as far from float64 as the definition is,
    and a few units. The gradient of k's bias is zero where nothing turns or scales it: 1 is the size of what cancels."""
    wide = [t.double() for t in inputs]
    runs = [check.run(fn, given, needs) for fn, given in ((ours, inputs), (reference, inputs), (reference, wide))]
    for value, other, exact in zip(*(outputs + grads for outputs, grads in runs)):
        assert (value is None) == (exact is None)
        if value is not None:
            slack = {torch.float64: 2**-42, torch.float32: 2**-19}[value.dtype]
            assert check.error(value, exact, 1.0) <= 4 * check.error(other, exact, 1.0) + slack


@pytest.mark.parametrize("recompute", [False, True], ids=["kept", "recomputed"])
@pytest.mark.parametrize("extras", [("prefix",), ("norms", "rotary", "ia3", "prefix")], ids=["prefix", "all"])
def test_prefix_in_rows_of_one_pass(check, monkeypatch, extras, recompute):
    """As on CUDA: queries, keys and values behind a prefix's rows, made with norms, rotary embedding and factors."""
    inputs, reserved = (importlib.import_module(f"fastpeft.ops.{name}") for name in ("attention_inputs", "reserved_prefix"))
    monkeypatch.setattr(inputs, "ONE_PASS", {"cpu"})
    monkeypatch.setattr(reserved, "kernel_of", lambda *a: "flash")
    monkeypatch.setattr(reserved, "takes_cudnn", lambda *a: True)
    made, count = [], inputs._made
    monkeypatch.setattr(inputs, "_made", lambda *a: made.append(a[3].p_k is not None) or count(*a))
    tensors = drawn(torch.float64, **dict.fromkeys(extras))
    ours = called(lora_attention, list(tensors), causal=True, recompute=recompute)
    reference = called(lora_attention_reference, list(tensors), causal=True)
    close(check, ours, reference, list(tensors.values()), [name not in PAIRS["rotary"] for name in tensors])
    assert made and all(made)


def test_excitor(check):
    """Its prompts have the width of the hidden states: C = H d."""
    global C
    wide, C = C, H * D
    try:
        tensors = drawn(torch.float64, rotary=True, excitor=True)
    finally:
        C = wide
    reference, ours = (called(f, list(tensors), causal=True) for f in (lora_attention_reference, lora_attention))
    close(check, ours, reference, list(tensors.values()), [name not in ("cos", "sin") for name in tensors])


FLOAT = 4
WIDE, NARROW, LSE = B * M * H * D * FLOAT, B * M * HKV * D * FLOAT, B * H * M * FLOAT
X, S = B * M * C * FLOAT, B * M * R * FLOAT
QKV = WIDE + 2 * NARROW
TRAINED = ("x", "A_q", "B_v", "W_k", "b_v", "A_o", "B_o")  # one of a kind: the others of q, k and v are saved for alike


def saved(trained: set, extras: tuple) -> int:
    """What the docstring's table says, beside parameters and tables."""
    projected = bool(trained & {"x", "A_q", "B_v", "W_k", "b_v"})
    own = {"norms": {"q_norm", "k_norm"}, "ia3": {"l_k", "l_v"} if "rotary" in extras else {"l_k"}}
    scored = projected or any(trained & own[name] for name in extras if name in own)
    total = X * bool(trained & {"A_q", "W_k"}) + 3 * S * ("B_v" in trained) + S * ("B_o" in trained) + scored * (QKV + WIDE + LSE)
    if "norms" in extras:  # the reciprocal of the root of each row's mean square; q and k are kept as the norms read them
        total += sum((projected or name in trained) * B * M * heads * FLOAT for name, heads in (("q_norm", H), ("k_norm", HKV)))
    folded = extras == ("ia3",)  # what attention gives is not yet what o reads
    if "ia3" in extras and not folded:  # a factor's gradient asks for what it multiplied
        total += NARROW * len(trained & {"l_k", "l_v"})
    total += WIDE * (folded and "l_v" in trained and not scored)
    return total + WIDE * ("A_o" in trained and (folded or not scored))


@pytest.mark.parametrize("extras", [(), ("rotary",), ("norms",), ("norms", "rotary"), ("ia3",), ("ia3", "rotary")], ids=" and ".join)
def test_what_is_saved(check, extras):
    """Every subset of gradients, one of a kind."""
    own = [name for extra, names in (("norms", ("q_norm", "k_norm")), ("ia3", PAIRS["ia3"])) if extra in extras for name in names]
    names = (*(("x", "A_q", "A_o", "B_o") if own else TRAINED), *own)
    tensors = drawn(**dict.fromkeys(extras))
    call, free = called(lora_attention, list(tensors), causal=True), [t for name, t in tensors.items() if name != "x"]
    for needs in itertools.product((False, True), repeat=len(names)):
        trained = {name for name, need in zip(names, needs) if need}
        for name, t in tensors.items():
            t.requires_grad_(name in trained)
        assert check.saved_bytes(call, list(tensors.values()), free) == saved(trained, extras), trained


def test_x_has_a_recipe(check):
    """After a norm, lora_A keeps nothing of x: the norm's own input is there."""
    tensors = drawn()
    x = tensors["x"].requires_grad_()
    tensors["A_q"].requires_grad_()
    weight = torch.rand(C)

    def call(x, *rest):
        return called(lora_attention, list(tensors), causal=True)(layer_norm(x, weight, None), *rest)

    free = [weight, *(t for name, t in tensors.items() if name != "x")]
    statistics = 2 * B * M * FLOAT
    assert check.saved_bytes(call, [x, *list(tensors.values())[1:]], free) == X + statistics + QKV + WIDE + LSE


def test_recomputed_it_keeps_x_and_the_context(check):
    tensors = drawn(rotary=True)
    for name in ("x", "A_q", "A_v", "A_o"):
        tensors[name].requires_grad_()
    free = [t for name, t in tensors.items() if name != "x"]
    names, values = list(tensors), list(tensors.values())
    assert check.saved_bytes(called(lora_attention, names, causal=True, recompute=True), values, free) == X + WIDE + LSE
    # dropout on the branches is drawn again
    call = called(lora_attention, names, causal=True, lora_dropout_p=0.5)
    again = called(lora_attention, names, causal=True, lora_dropout_p=0.5, recompute=True)
    needs, results = [t.requires_grad for t in values], []
    for function in (call, again):
        torch.manual_seed(3)
        results.append(check.run(function, values, needs))
    for a, b in zip(results[0][0] + results[0][1], results[1][0] + results[1][1]):
        assert a is b is None or torch.equal(a, b)


def test_layers_without_lora_and_dtypes(check):
    """Any of the four may be without a branch; in bfloat16 with float32 adapters gradients have the adapters' dtype."""
    tensors = drawn(torch.float64)
    for lora in ((), ("q", "v"), ("o",)):
        names = [n for n in tensors if n[0] not in "AB" or n[-1] in lora]
        ours, reference = (called(f, names, lora=lora) for f in (lora_attention, lora_attention_reference))
        close(check, ours, reference, [tensors[n] for n in names])
    low = {name: t.to(torch.float32 if name[0] in "AB" else torch.bfloat16) for name, t in tensors.items()}
    outputs, grads = check.run(called(lora_attention, list(low)), list(low.values()))
    assert outputs[0].dtype == torch.bfloat16 and [g.dtype for g in grads] == [t.dtype for t in low.values()]


def test_refusals():
    t = drawn(ia3=True)
    q, k, v, o = ([t[f"W_{n}"]] for n in BRANCHES)
    for arguments, options, error in (
        ((t["x"][0], q, k, v, o, H), {}, r"pass \[B, M, C\]"),
        ((t["x"], q, k, v, o, 5), {}, "5 heads do not divide"),
        ((t["x"], q, k, [v[0][:8]], o, H), {}, "must be a divisor of 4 times 8, and alike"),
        ((t["x"], q, k, v, [o[0][:, :8]], H), {}, "reads another width"),
        ((t["x"], q, k, v, o, H), {"ia3": (t["l_k"][:3], t["l_v"])}, r"pass \(l_k, l_v\), each \[16\]"),
        ((t["x"], q, k, v, o, H), {"dropout_p": 1.0}, "dropout_p is 1.0"),
        ((t["x"], q, k, v, o, H), {"lora_dropout_p": 1.0}, "dropout_p is 1.0"),
    ):
        with pytest.raises(ValueError, match=error):
            lora_attention(*arguments, **options)
    with pytest.raises(TypeError, match="int64; cast it"):
        lora_attention(torch.ones(1, 2, C, dtype=torch.int64), q, k, v, o, H)
