"""attention_inputs, in one pass and in parts, against its definition in float64; and the keys of a prefix before those of the tokens."""

import importlib
import itertools

import pytest
import torch

from fastpeft import _library
from fastpeft.ops import attention, attention_inputs
from fastpeft.ops.attention import attention_reference

module = importlib.import_module("fastpeft.ops.attention_inputs")  # fastpeft.ops has the function under that name
reserved = importlib.import_module("fastpeft.ops.reserved_prefix")
whole = importlib.import_module("fastpeft.ops.attention")
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
EPS = 1e-6
NAMES = module._How._fields
CONSTANTS = ("cos", "sin")


def make(d=64, rot=64, *, B=2, M=5, H=4, G=2, n=3, norms=True, factors=True, prefix=True, tables=1, dtype=torch.float32):
    """[q, k, v, *how]: parts of one projection's output, [B, M, heads, d]."""
    joint = torch.randn(B, M, (H + 2 * G) * d, dtype=torch.float64)
    q, k, v = (t.unflatten(-1, (-1, d)) for t in joint.split([H * d, G * d, G * d], -1))
    how = dict.fromkeys(NAMES)
    if rot:
        angle = torch.rand(tables, M, rot // 2, dtype=torch.float64).repeat(1, 1, 2) * 6
        how |= {"cos": angle.cos(), "sin": angle.sin()}
    how |= dict(zip(("q_norm", "k_norm"), torch.randn(2, d, dtype=torch.float64))) if norms else {}
    how |= dict(zip(("l_k", "l_v"), torch.randn(2, G, d, dtype=torch.float64))) if factors else {}
    how |= dict(zip(("p_k", "p_v"), torch.randn(2, G, n, d, dtype=torch.float64))) if prefix else {}
    return [q.to(dtype), k.to(dtype), v.to(dtype), *(t if t is None else t.to(dtype) for t in how.values())]


def calls(offset=0.0, form=None):
    """(ours, the definition), of the tensors that are there; ``form``: one pass or parts, by the rule if None."""

    def ours(*tensors):
        return (form or module._together)(*tensors[:3], module._How(*tensors[3:]), module._Form(EPS, offset))

    return ours, lambda *tensors: module.attention_inputs_reference(*tensors[:3], module._How(*tensors[3:]), EPS, offset)


def compare(check, tensors, offset=0.0, form=None, needs=None):
    present = [t for t in tensors if t is not None]
    places = [i for i, t in enumerate(tensors) if t is not None]

    def of(fn):
        def call(*given):
            spread = [None] * len(tensors)
            for place, t in zip(places, given):
                spread[place] = t
            return fn(*spread)

        return call

    ours, definition = map(of, calls(offset, form))
    trained = [i < 3 or NAMES[i - 3] not in CONSTANTS for i in places]
    return check.no_worse(ours, definition, definition, present, trained if needs is None else needs)


def test_backend():
    for name in ("attention_inputs_fwd", "attention_inputs_bwd"):
        assert not _library.backend_of()[name]["CPU"].startswith("triton")
    assert module._devices("native") == {"cuda"}
    assert module._devices("composite (csrc has no CUDA form here)") == ({"cuda"} if _library.FORCED == "composite" else set())
    assert module._devices(_library.backend_of()["attention_inputs_fwd"]["CUDA"]) == module.ONE_PASS


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("d, rot", [(64, 64), (128, 32), (80, 20), (256, 256), (72, 72), (6, 2), (64, 0)])
def test_against_float64(check, dtype, d, rot):
    """Whole Packs and single elements, channels that pass through, no tables; tables of every sample."""
    for norms, factors, prefix in itertools.product((False, True), repeat=3):
        tensors = make(d, rot, norms=norms, factors=factors, prefix=prefix, tables=1 + norms, dtype=dtype)
        compare(check, tensors, offset=float(norms))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_parts(check, dtype):
    for norms, factors, prefix in itertools.product((False, True), repeat=3):
        tensors = make(norms=norms, factors=factors, prefix=prefix, dtype=dtype)
        present = [t for t in tensors if t is not None]
        needs = [i < 3 or NAMES[i - 3] not in CONSTANTS for i, t in enumerate(tensors) if t is not None]
        assert len(needs) == len(present)
        got = compare(check, tensors, 1.0, module._in_parts, needs)
        assert all(torch.isfinite(t).all() for t in got[0])


def test_every_gradient_subset(check):
    tensors = make(d=8, rot=4, M=3)
    trained = [i < 3 or NAMES[i - 3] not in CONSTANTS for i in range(len(tensors))]
    for chosen in itertools.product((False, True), repeat=sum(trained)):
        rest = iter(chosen)
        needs = [next(rest) if may else False for may in trained]
        if sum(needs) not in (0, 1, 2, len(chosen) - 1):
            continue
        ours, definition = calls()
        got, want = check.run(_only(ours, needs), tensors, needs), check.run(_only(definition, needs), tensors, needs)
        for value, exact in zip(got[1], want[1]):
            assert (value is None) == (exact is None)
            assert value is None or check.error(value, exact) < 1e-5


def _only(fn, needs):
    """Outputs that depend on what needs a gradient: the others must not require one."""
    q, k, v, _, _, q_norm, k_norm, l_k, l_v, p_k, p_v = needs
    live = (q or q_norm, k or k_norm or l_k or p_k, v or l_v or p_v)

    def call(*tensors):
        outputs = fn(*tensors)
        assert [o.requires_grad for o in outputs] == list(live)
        return outputs

    return call


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_float32_parameters_and_tables(check, dtype):
    tensors = make(dtype=dtype)
    wide = [t if i < 3 or NAMES[i - 3].startswith("p_") else t.float() for i, t in enumerate(tensors)]
    ours, definition = calls(1.0)
    got = check.run(ours, wide, [i < 3 or NAMES[i - 3] not in CONSTANTS for i in range(len(wide))])
    exact = check.run(definition, [t.double() for t in wide], [i < 3 or NAMES[i - 3] not in CONSTANTS for i in range(len(wide))])
    for value, want, given in zip((*got[0], *got[1]), (*exact[0], *exact[1]), [None] * 3 + wide):
        assert value is None or check.error(value, want) <= 2 ** -(7 if dtype == torch.bfloat16 else 10)
        assert value is None or given is None or value.dtype == given.dtype


def test_views(check):
    """Heads before tokens, one sample for all, channels that are no neighbours; gradients of any layout."""
    q, k, v, *how = make(B=3)
    layouts = [
        lambda t: t.transpose(1, 2).contiguous().transpose(1, 2),
        lambda t: t[:1].expand_as(t),
        lambda t: t.mT.contiguous().mT,
        lambda t: torch.stack([t, t], -1).flatten(-2)[..., ::2],
    ]
    for layout in layouts:
        compare(check, [layout(q), layout(k), layout(v), *how])
    ours, _ = calls()
    leaves = [t.requires_grad_() for t in make(B=3)[:3]]
    outputs = ours(*leaves, *how)
    dense = torch.autograd.grad(outputs, leaves, [torch.ones_like(o) for o in outputs], retain_graph=True)
    broadcast = torch.autograd.grad(outputs, leaves, [torch.ones(()).expand(o.shape) for o in outputs])
    assert all(torch.allclose(a, b, rtol=1e-5, atol=1e-6) for a, b in zip(dense, broadcast))


def test_many_tokens(check):
    """More rows than backward's groups: sums over several rounds, of heads that do not divide a warp's groups."""
    compare(check, make(d=16, rot=16, B=2, M=701, H=5, G=1, prefix=False))
    compare(check, make(d=16, rot=8, B=1, M=1201, H=6, G=3, norms=False, prefix=False))


def test_what_is_saved(check):
    """q and k where a norm stands before them, k and v for a factor's gradient; of rotations and prefixes nothing."""
    q, k, v, *how = make(dtype=torch.float32)
    q, k, v = (t.contiguous() for t in (q, k, v))
    how = dict(zip(NAMES, how))
    parameters = list(how.values())

    def saved(needs=("q", "k", "v"), **given):
        tensors = dict(zip("qkv", (t.detach() for t in (q, k, v)))) | {name: how[name].detach() for name in given["given"]}
        tensors = {name: t.requires_grad_(name in needs) for name, t in tensors.items()}
        chosen = module._How(**{name: tensors.get(name) for name in NAMES})
        free = [*parameters, *(t for name, t in tensors.items() if name in NAMES)]
        return check.saved_bytes(lambda: module._together(*(tensors[name] for name in "qkv"), chosen, module._Form(EPS)), (), free=free)

    tables = ["cos", "sin"]
    assert saved(given=tables) == 0
    assert saved(given=[*tables, "p_k", "p_v"], needs=("q", "k", "v", "p_k", "p_v")) == 0
    assert saved(given=[*tables, "l_k", "l_v"]) == 0
    assert saved(given=[*tables, "l_k", "l_v"], needs=("q", "k", "v", "l_k")) == k.nbytes
    assert saved(given=[*tables, "l_k", "l_v"], needs=("q", "k", "v", "l_k", "l_v")) == k.nbytes + v.nbytes
    assert saved(given=[*tables, "q_norm", "k_norm"]) == q.nbytes + k.nbytes
    assert saved(given=[*tables, "q_norm", "k_norm"], needs=("k",)) == k.nbytes


def test_compiler_and_operators(check):
    tensors = make(d=16, rot=8)
    needs = [i < 3 or NAMES[i - 3] not in CONSTANTS for i in range(len(tensors))]
    ours, _ = calls(1.0)
    check.compiles(ours, tensors, needs, rtol=1e-5)
    check.deterministic(ours, tensors, needs)
    forward = torch.ops.fastpeft.attention_inputs_fwd
    q, k, v, cos, sin, q_norm, k_norm, l_k, l_v, p_k, p_v = tensors
    tests = ("test_schema", "test_faketensor")
    torch.library.opcheck(forward, (q, k, v, cos, sin, q_norm, k_norm, 1.0, EPS, l_k, l_v, p_k, p_v, 0, 3), test_utils=tests)
    torch.library.opcheck(forward, (None, k, v, None, None, None, None, 0.0, EPS, None, None, p_k, p_v, 0, 3), test_utils=tests)
    torch.library.opcheck(forward, (q, k, None, cos, sin, None, None, 0.0, EPS, l_k, None, None, None, 3, 0), test_utils=tests)
    backward, given = torch.ops.fastpeft.attention_inputs_bwd, (q, k, v, cos, sin, q_norm, k_norm, 1.0, EPS, l_k, l_v)
    for wanted in (127, module.DK, module.DQ_NORM | module.DL_V):
        torch.library.opcheck(backward, (q, k, v, *given, wanted), test_utils=tests)


def test_the_rule(monkeypatch):
    """Parts where the rule says no, heads are too wide or odd, or nothing is there; v as it is where nothing changes it."""
    taken = []
    monkeypatch.setattr(module, "_together", lambda *a: taken.append("one pass"))
    monkeypatch.setattr(module, "_in_parts", lambda *a: taken.append("parts"))
    shapes = [(2, 3, 4, 64), (2, 3, 4, 1024), (2, 3, 4, 7), (2, 0, 4, 64), (0, 3, 4, 64)]
    for devices in (set(), {"cpu"}):
        monkeypatch.setattr(module, "ONE_PASS", devices)
        for shape in shapes:
            x = torch.randn(shape)
            attention_inputs(x, x, x)
    assert taken == ["parts"] * 5 + ["one pass"] + ["parts"] * 4


def test_nothing_to_do(check, monkeypatch):
    q, k, v, *_ = make()
    for devices in (set(), {"cpu"}):
        monkeypatch.setattr(module, "ONE_PASS", devices)
        outputs = attention_inputs(q, k, v)
        assert all(torch.equal(o, t.transpose(1, 2)) for o, t in zip(outputs, (q, k, v)))
        assert outputs[2].data_ptr() == v.data_ptr()


def test_errors_say_what_to_do():
    q, k, v, cos, sin, q_norm, _, l_k, _, p_k, p_v = make()
    for given, told in (
        (lambda: attention_inputs(q[0], k, v), "pass q"),
        (lambda: attention_inputs(q, k, v[:, :2]), "pass q"),
        (lambda: attention_inputs(q, k, v, rotary=(cos, sin[:, :2])), "must match"),
        (lambda: attention_inputs(q, k, v, rotary=(cos[0], sin[0])), "rot even"),
        (lambda: attention_inputs(q, k, v, rotary=(cos[:, :2], sin[:, :2])), "rot even"),
        (lambda: attention_inputs(q, k, v, rotary=(cos.clone().requires_grad_(), sin)), "detach"),
        (lambda: attention_inputs(q, k, v, q_norm=q_norm[:3]), "last dimension"),
        (lambda: attention_inputs(q, k, v, ia3=(l_k[:1], None)), "H_kv"),
        (lambda: attention_inputs(q, k, v, prefix=(p_k[:1], p_v[:1])), "H_kv"),
    ):
        with pytest.raises(ValueError, match=told):
            given()
    with pytest.raises(TypeError, match="one dtype"):
        attention_inputs(q, k.double(), v.double())


def test_autocast():
    q, k, v, cos, sin, q_norm, k_norm, *_ = make()
    with torch.autocast("cpu", torch.bfloat16):
        outputs = attention_inputs(q.bfloat16(), k.bfloat16(), v.bfloat16(), rotary=(cos, sin), q_norm=q_norm, k_norm=k_norm)
    assert {o.dtype for o in outputs} == {torch.float32}  # as norms and rotary: the widest


@pytest.fixture
def in_rows(monkeypatch):
    """One pass on the CPU, whose kernels stand in for CUDA's; what is said of those counts."""
    said = {"kernel": "flash", "cudnn": True}
    monkeypatch.setattr(module, "ONE_PASS", {"cpu"})
    monkeypatch.setattr(reserved, "kernel_of", lambda *a: said["kernel"])
    monkeypatch.setattr(reserved, "takes_cudnn", lambda *a: said["cudnn"])
    return said


@pytest.mark.parametrize("causal, M, N", [(True, 6, 6), (True, 1, 1), (False, 6, 6), (False, 8, 4)])
def test_prefix_in_rows(check, monkeypatch, in_rows, causal, M, N):
    """Through attention: subsets of gradients, with grouped heads, against float64."""
    monkeypatch.setattr(whole, "_strategy", lambda q, k, v, causal, padding, prefix, p: "rows" if prefix is not None else "plain")
    q, k, v = (torch.randn(2, m, h, 16, dtype=torch.float64).transpose(1, 2) for m, h in ((M, 4), (N, 2), (N, 2)))
    prefix = torch.randn(2, 2, 3, 16, dtype=torch.float64).unbind(0)
    assert reserved.reserved_pays(q, k, v, causal, None)
    how = {"causal": causal, "scale": 0.3}
    for needs in list(check.subsets(5))[::3]:
        runs = [
            check.run(lambda q, k, v, *p, fn=fn: fn(q, k, v, prefix=p, **how), (q, k, v, *prefix), needs)
            for fn in (attention, attention_reference)
        ]
        for value, exact in zip(*(outputs + grads for outputs, grads in runs)):
            assert (value is None) == (exact is None)
            assert value is None or check.error(value, exact) < 1e-12


def test_which_prefix_goes_where(monkeypatch, in_rows):
    """By causality, by how many queries meet a key, and by the kernel that would take it; the merge serves the others."""

    def pays(M, N, causal=False, padded=False, G=4):
        q, k = torch.empty(2, 4, M, 16), torch.empty(2, G, N, 16)
        return reserved.reserved_pays(q, k, k, causal, torch.ones(2, N, dtype=torch.bool) if padded else None)

    assert pays(5, 5, True) and pays(5, 5) and pays(7, 5) and pays(5, 9, G=2)
    assert not pays(5, 5, padded=True) and not pays(3, 5) and not pays(3, 5, True, G=1) and not pays(7, 5, True)
    in_rows["cudnn"] = False
    assert not pays(5, 5, True) and pays(5, 5) and pays(1, 1, True)
    in_rows["kernel"] = "efficient"
    assert not pays(5, 5)
    in_rows["kernel"] = "flash"
    monkeypatch.setattr(module, "ONE_PASS", set())
    assert not pays(5, 5)


def test_who_is_asked_for_cudnn(monkeypatch):
    flash = importlib.import_module("fastpeft.ops._flash")

    class Cuda(torch.Tensor):
        """A tensor that says it is on a GPU."""

        device = torch.device("cuda")

    monkeypatch.setattr(flash, "can_use_cudnn_attention", lambda params: True)
    x = torch.empty(2, 4, 5, 64, dtype=torch.bfloat16)
    assert not flash.takes_cudnn(x, x, x)
    for capability, taken in (((8, 0), False), ((9, 0), True), ((10, 0), True)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, capability=capability: capability)
        assert flash.takes_cudnn(*[x.as_subclass(Cuda)] * 3) == taken


@pytest.mark.parametrize("square", [False, True])
def test_rotary_writes_behind_the_prefix(check, monkeypatch, square):
    """Keys turned into the rows behind a prefix's: the same as a prefix given to attention."""
    q, k, v, cos, sin, *_, p_k, p_v = make(norms=False, factors=False, dtype=torch.float64)

    def in_rows(q, k, v, *p):
        o = attention(*attention_inputs(q, k, v, rotary=(cos, sin), prefix=p, rows_for_queries=square), causal=True)
        return module.without_rows(o, p[0].shape[1]) if square else o

    def given(q, k, v, *p):
        return attention(*attention_inputs(q, k, v, rotary=(cos, sin)), causal=True, prefix=p)

    for devices in (set(), {"cpu"}):
        monkeypatch.setattr(module, "ONE_PASS", devices)
        (got, got_grads), (want, grads) = (check.run(fn, (q, k, v, p_k, p_v)) for fn in (in_rows, given))
        assert all(check.error(value, exact) < 1e-12 for value, exact in zip((*got, *got_grads), (*want, *grads)))


def test_factors_in_one_pass(check, monkeypatch):
    """(IA)^3 where attention is someone else's: keys and values by one pass, in place of queries and outputs."""
    monkeypatch.setattr(whole, "_strategy", lambda *a: "sdpa")
    monkeypatch.setattr(module, "ONE_PASS", {"cpu"})
    tensors = [*(torch.randn(2, 5, h, 16, dtype=torch.float64).transpose(1, 2) for h in (4, 2, 2)), *torch.randn(2, 2, 16)]
    for needs in check.subsets(5):
        runs = [
            check.run(lambda q, k, v, *l, fn=fn: fn(q, k, v, causal=True, rescale=l), tensors, needs)
            for fn in (attention, attention_reference)
        ]
        for value, exact in zip(*(outputs + grads for outputs, grads in runs)):
            assert value is exact is None or check.error(value, exact) < 1e-12


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("causal, M, N", [(True, 257, 257), (False, 257, 33), (False, 33, 33)])
@pytest.mark.parametrize("H, G, d", [(4, 4, 64), (4, 2, 128), (4, 1, 72)])
def test_prefix_in_rows_on_cuda(check, dtype, causal, M, N, H, G, d):
    """CUDA's own kernels, and csrc's rows before the tokens: all gradients against float64. Without cuDNN, the merge."""
    q, k, v = (torch.randn(2, m, h, d).to(dtype).transpose(1, 2) for m, h in ((M, H), (N, G), (N, G)))
    prefix = torch.randn(2, G, 10, d).to(dtype).unbind(0)
    on_gpu = [t.cuda() for t in (q, k, v, *prefix)]
    rows = not causal or reserved.takes_cudnn(*on_gpu[:3])
    assert whole._strategy(*on_gpu[:3], causal, None, prefix, 0.0) == ("rows" if rows else "split")
    wide = [t.double() for t in (q, k, v, *prefix)]
    exact = check.run(lambda q, k, v, *p: attention_reference(q, k, v, causal=causal, prefix=p), wide)
    got = check.run(lambda q, k, v, *p: attention(q, k, v, causal=causal, prefix=p), on_gpu)
    for value, want in zip((*got[0], *got[1]), (*exact[0], *exact[1])):
        assert check.error(value.cpu(), want, floor=0.1) <= (3e-2 if dtype == torch.bfloat16 else 6e-3)
