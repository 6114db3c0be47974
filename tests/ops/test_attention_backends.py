"""attention around SDPA, flash-attn and xformers: what arrives at stand-ins with the published signatures, and which package serves."""

import itertools
import sys
import types

import pytest
import torch
from attention_cases import calling, make, padding, pick, written_out

from fastpeft.ops import attention_backends as backends
from fastpeft.ops.attention import attention_reference


@pytest.mark.parametrize("prefix", [False, True])
def test_around_sdpa(check, prefix):
    """CUDA's path, here on CPU tensors."""
    for causal, padded in itertools.product((False, True), repeat=2):
        mask = padding(2, 7) if padded else None
        around = lambda q, k, v, *p: backends.around_sdpa(q, k, v, causal, mask, 8**-0.5, tuple(p) or None, 0.0)  # noqa: B023, E731
        options = {"causal": causal, "mask": mask, "prefix": prefix, "rescale": False}
        inputs = pick(make(), prefix, False)
        check.no_worse(around, calling(attention_reference, **options), calling(written_out, **options), inputs)


class FlashAttn(types.ModuleType):
    """flash-attn's functions as published: [B, M, H, d] or, of samples that lie end to end, [T, H, d]; grouped heads; causality from the
    last query and key; 0 for a query without a key."""

    asked_for_determinism: list

    def __init__(self, name):
        super().__init__(name)
        self.asked_for_determinism = []

    def flash_attn_func(
        self, q, k, v, dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0, alibi_slopes=None,
        deterministic=False, return_attn_probs=False,
    ):  # fmt: skip
        self.asked_for_determinism.append(deterministic)
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        return attention_reference(q, k, v, causal=causal, scale=softmax_scale).transpose(1, 2)

    def flash_attn_varlen_func(
        self, q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p=0.0, softmax_scale=None, causal=False,
        window_size=(-1, -1), softcap=0.0, alibi_slopes=None, deterministic=False, return_attn_probs=False, block_table=None,
    ):  # fmt: skip
        assert cu_seqlens_q.dtype == cu_seqlens_k.dtype == torch.int32 and type(max_seqlen_q) is type(max_seqlen_k) is int
        self.asked_for_determinism.append(deterministic)
        for t in (k, v):  # its backward allocates dk and dv, and writes as far as the samples reach
            if t.requires_grad:
                t.register_hook(lambda g: g.masked_fill((torch.arange(len(g)) >= cu_seqlens_k[-1])[:, None, None], torch.nan))
        out = torch.full_like(q, torch.nan)
        for i in range(len(cu_seqlens_q) - 1):
            rows, keys = (slice(*ends[i : i + 2].tolist()) for ends in (cu_seqlens_q, cu_seqlens_k))
            assert rows.stop - rows.start <= max_seqlen_q and keys.stop - keys.start <= max_seqlen_k
            if keys.start == keys.stop:
                continue  # whatever it leaves there
            parts = (t.transpose(0, 1)[None] for t in (q[rows], k[keys], v[keys]))
            out = out.index_put((torch.arange(rows.start, rows.stop),), attention_reference(*parts, scale=softmax_scale)[0].transpose(0, 1))
        return out


class FlashAttn4(types.ModuleType):
    """flash_attn.cute's function: no dropout, and the log-sum-exp beside the output."""

    def flash_attn_func(self, q, k, v, softmax_scale=None, causal=False, window_size=(None, None), softcap=0.0, deterministic=False):
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        return attention_reference(q, k, v, causal=causal, scale=softmax_scale).transpose(1, 2), None


class XFormers(types.ModuleType):
    """memory_efficient_attention as published: [B, M, H, K], or [B, M, G, H, K] with k and v expanded over H, forward only."""

    class LowerTriangularMask:
        pass

    @staticmethod
    def memory_efficient_attention(query, key, value, attn_bias=None, p=0.0, scale=None, *, op=None, output_dtype=None):
        assert query.dim() == key.dim() == value.dim() and query.shape[2:] == key.shape[2:]
        assert attn_bias is None or isinstance(attn_bias, XFormers.LowerTriangularMask)
        assert attn_bias is None or query.shape[1] == key.shape[1]
        grouped = query.dim() == 5
        q, k, v = ((t.flatten(2, 3) if grouped else t).transpose(1, 2) for t in (query, key, value))
        assert not (grouped and any(t.requires_grad for t in (q, k, v))), "no backward for five dimensions"
        o = attention_reference(q, k, v, causal=attn_bias is not None, scale=scale).transpose(1, 2)
        return o.unflatten(2, query.shape[2:4]) if grouped else o


@pytest.fixture
def optional_backend(monkeypatch):
    """Puts a stand-in where a package would be."""

    def install(name, module, stand_in):
        for there in ("flash_attn", "flash_attn.cute", "xformers", "xformers.ops", "mslk.attention.fmha"):
            monkeypatch.setitem(sys.modules, there, None)
        parent = module.partition(".")[0]
        monkeypatch.setitem(sys.modules, parent, types.ModuleType(parent))  # without functions, as a namespace package
        monkeypatch.setitem(sys.modules, module, package := stand_in(module))
        backends._module.cache_clear()
        monkeypatch.setattr(backends, "fits", lambda q, k: name)
        return package

    yield install
    monkeypatch.undo()
    backends._module.cache_clear()


BACKENDS = [
    ("flash-attn", "flash_attn", FlashAttn),
    ("flash-attn", "flash_attn.cute", FlashAttn4),
    ("xformers", "xformers.ops", XFormers),
    ("xformers", "mslk.attention.fmha", XFormers),
]


@pytest.mark.parametrize("backend", BACKENDS, ids=lambda backend: backend[1])
def test_optional_backends(check, optional_backend, backend):
    """Against stand-ins with the published signatures: layouts, grouped heads, lengths, scale and causality arrive as they should."""
    optional_backend(*backend)
    for M, heads, causal, padded, prefix in itertools.product((1, 5, 9), (2, 4), *[(False, True)] * 3):
        mask = padding(3, 9) if padded else None
        inputs = [t.double() for t in pick(make(3, 4, heads, M, 9), prefix, False)]
        around = lambda q, k, v, *p: backends.around_sdpa(q, k, v, causal, mask, 8**-0.5, tuple(p) or None, 0.0)  # noqa: B023, E731
        reference = calling(attention_reference, causal, mask, prefix, rescale=False)
        for needs in ([True] * len(inputs), [False] * len(inputs)):
            got, want = (check.run(fn, inputs, needs) for fn in (around, reference))
            for value, exact in zip(got[0] + got[1], want[0] + want[1]):
                assert value is exact is None or check.error(value, exact) < 1e-12


def test_which_calls_flash_attn_takes(optional_backend):
    """Everything but padding under causality; its backward is asked to be deterministic where PyTorch is."""
    asked = optional_backend(*BACKENDS[0]).asked_for_determinism
    q, k, v, pk, pv = make(3, 4, 2, 5, 9)[:5]
    mask = padding(3, 9)
    for causal, hidden, prefix in itertools.product((False, True), (None, mask), (None, (pk, pv))):
        before = len(asked)
        backends.around_sdpa(q, k, v, causal, hidden, 0.4, prefix, 0.0)
        assert len(asked) - before == (0 if causal and hidden is not None else 1)
    assert set(asked) == {True}  # tests run so
    torch.use_deterministic_algorithms(False)
    backends.around_sdpa(q, k, v, False, None, 0.4, None, 0.0)
    assert asked[-1] is False


LAYOUTS = {
    "nothing": ({}, "sdpa", "sdpa"),
    "a namespace package": ({"flash_attn/flash_attn_interface.py": ""}, "sdpa", "sdpa"),
    "version 4 alone": ({"flash_attn/cute/__init__.py": "flash_attn_func"}, "sdpa", "flash-attn"),
    "version 2": ({"flash_attn/__init__.py": "flash_attn_func flash_attn_varlen_func"}, "flash-attn", "flash-attn"),
    "version 2, built for another torch": ({"flash_attn/__init__.py": "!undefined symbol"}, "sdpa", "sdpa"),
    "versions 2 and 4": (
        {"flash_attn/__init__.py": "flash_attn_func", "flash_attn/cute/__init__.py": "flash_attn_func"},
        "flash-attn",
        "flash-attn",
    ),
    "version 3 alone": ({"flash_attn_interface.py": "flash_attn_func flash_attn_varlen_func"}, "sdpa", "sdpa"),
    "xformers without its attention": ({"xformers/ops/__init__.py": ""}, "sdpa", "sdpa"),
    "attention without its masks": ({"mslk/attention/fmha/__init__.py": "memory_efficient_attention"}, "sdpa", "sdpa"),
    "xformers and mslk": (
        {"xformers/ops/__init__.py": "", "mslk/attention/fmha/__init__.py": "memory_efficient_attention LowerTriangularMask"},
        "xformers",
        "xformers",
    ),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_package_counts_where_its_functions_are(layout, monkeypatch, tmp_path):
    """On sm_80 and on sm_90, as the packages lie in site-packages."""
    files, on_80, on_90 = LAYOUTS[layout]
    for path, names in files.items():
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        text = f"raise ImportError({names!r})" if names.startswith("!") else "\n".join(f"def {name}(*args): ..." for name in names.split())
        (tmp_path / path).write_text(text)
    for name in [name for name in sys.modules if name.partition(".")[0] in ("flash_attn", "xformers", "mslk", "flash_attn_interface")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.syspath_prepend(tmp_path)
    backends._module.cache_clear()
    q = types.SimpleNamespace(device=types.SimpleNamespace(type="cuda"), dtype=torch.bfloat16, shape=(1, 2, 4, 64))
    try:
        for capability, serving in (((7, 5), "xformers" if on_80 == "xformers" else "sdpa"), ((8, 0), on_80), ((9, 0), on_90)):
            monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, c=capability: c)
            assert backends.fits(q, q) == serving
    finally:
        for name in [name for name in sys.modules if name.partition(".")[0] in ("flash_attn", "xformers", "mslk")]:
            del sys.modules[name]
        backends._module.cache_clear()


def test_what_version_2_leaves_to_sdpa(optional_backend, monkeypatch):
    """Padding where it has no function for it, and what cuDNN takes, unless it is asked for by name."""
    package = optional_backend(*BACKENDS[0])
    (q, k, v, pk, pv), mask = make(3, 4, 2, 9, 9)[:5], padding(3, 9)

    def calls(causal=False, hidden=None, prefix=None) -> int:
        before = len(package.asked_for_determinism)
        backends.around_sdpa(q, k, v, causal, hidden, 0.4, prefix, 0.0)
        return len(package.asked_for_determinism) - before

    monkeypatch.setattr(backends, "takes_cudnn", lambda q, k, v, causal: not causal)
    assert (calls(), calls(causal=True), calls(prefix=(pk, pv)), calls(hidden=mask)) == (0, 1, 1, 1)
    monkeypatch.setattr(backends, "CHOICE", "flash-attn")
    assert calls() == 1
    monkeypatch.delattr(FlashAttn, "flash_attn_varlen_func")
    want = attention_reference(q, k, v, key_padding_mask=mask, scale=0.4)
    torch.testing.assert_close(backends.around_sdpa(q, k, v, False, mask, 0.4, None, 0.0), want)


def test_backend_fits(monkeypatch, optional_backend):
    """A package counts where its functions are: FlashAttention-4 alone leaves a namespace package, and serves from sm_90 on."""
    fits = backends.fits
    cpu = torch.randn(1, 2, 4, 64, dtype=torch.bfloat16)
    cuda = types.SimpleNamespace(device=types.SimpleNamespace(type="cuda"), dtype=torch.bfloat16, shape=(1, 2, 4, 64))
    wide = types.SimpleNamespace(device=cuda.device, dtype=torch.float32, shape=cuda.shape)
    large = types.SimpleNamespace(device=cuda.device, dtype=torch.bfloat16, shape=(1, 2, 4, 256))
    capability = [(9, 0)]
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability[0])
    for name, module, stand_in in BACKENDS:
        optional_backend(name, module, stand_in)
        assert fits(cpu, cpu) == fits(wide, wide) == "sdpa" and fits(cuda, cuda) == name
        assert backends.serving() == f"{name} in 16 bit, sdpa elsewhere"
        assert fits(large, large) == ("sdpa" if stand_in is FlashAttn4 else name)
    optional_backend(*BACKENDS[1])
    capability[0] = (8, 0)
    assert fits(cuda, cuda) == "sdpa"
    optional_backend("flash-attn", "flash_attn.none", types.ModuleType)
    capability[0] = (9, 0)
    assert fits(cuda, cuda) == "sdpa" and "are not installed" in backends.serving()
    monkeypatch.setattr(backends, "CHOICE", "xformers")
    assert fits(cuda, cuda) == "sdpa" and "not installed" in backends.serving()
    optional_backend(*BACKENDS[0])
    monkeypatch.setattr(backends, "CHOICE", "sdpa")
    assert fits(cuda, cuda) == "sdpa" and backends.serving() == "sdpa (FASTPEFT_ATTENTION=sdpa)"
