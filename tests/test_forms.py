"""Digests of code: what makes two classes compute the same, and what does not."""

import importlib.util
import subprocess
import sys

import pytest
import torch
import transformers as T
from torch import nn
from transformers.models.gemma import modeling_gemma
from transformers.models.llama import modeling_llama
from transformers.models.mistral import modeling_mistral
from transformers.models.qwen2 import modeling_qwen2

import fastpeft as fp
from fastpeft.forms import code_of, digest
from fastpeft.registry import form_of, form_of_class, is_fused

BASE = '''
import torch
import torch.nn.functional as F
from torch import nn

LIMIT = 3

def helper(x):
    return x + LIMIT

def deprecated(function):
    return function

class Base(nn.Module):
    """What it is."""
    kind = "plain"

    def scaled(self, x):
        return x * 2

    @property
    def factor(self):
        return 3

    def forward(self, x, mask=None):
        """Arguments."""
        y = helper(self.scaled(x)) * self.factor  # a comment
        if self.kind == "plain":
            y = F.silu(y)
        return y.sum(dim=-1)
'''


@pytest.fixture
def written(tmp_path):
    """A class of a file with these replacements in BASE."""

    def write(*replacements, name="Base", text=BASE):
        for old, new in replacements:
            assert old in text
            text = text.replace(old, new)
        path = tmp_path / f"written_{len(list(tmp_path.iterdir()))}.py"
        path.write_text(text)
        spec = importlib.util.spec_from_file_location(path.stem, path)
        module = importlib.util.module_from_spec(spec)
        sys.modules[path.stem] = module
        spec.loader.exec_module(module)
        return getattr(module, name)

    yield write
    for name in [name for name in sys.modules if name.startswith("written_")]:
        del sys.modules[name]


SAME = {
    "comments, docstrings": [('"""Arguments."""\n', "# nothing\n"), ("  # a comment", ""), ('"""What it is."""', '"""Else."""')],
    "annotations": [("x, mask=None):", "x: 'Tensor', mask: int | None = None) -> 'Tensor':"), ("y = ", "y: int = ")],
    "names of variables": [
        ("self, x, mask", "self, hidden, mask"),
        ("(x)) *", "(hidden)) *"),
        (" y = ", " z = "),
        ("silu(y)", "silu(z)"),
        ("y.sum", "z.sum"),
    ],
    "the class's name": [("class Base", "class Base_2")],
    "the way to a function": [("F.silu", "nn.functional.silu")],
    "what is not read": [("    def scaled", "    def unused(self):\n        pass\n\n    def scaled"), ("LIMIT = 3", "LIMIT, MORE = 3, 4")],
    "a module's other name": [("import torch.nn.functional as F", "import torch.nn.functional as functional"), ("F.", "functional.")],
}
OTHER = {
    "a number": [("x * 2", "x * 2.5")],
    "an operator": [("x * 2", "x + 2")],
    "a property": [("return 3", "return 4")],
    "a constant of the class": [('kind = "plain"', 'kind = "odd"')],
    "a constant of the module": [("LIMIT = 3", "LIMIT = 4")],
    "a function": [("return x + LIMIT", "return x - LIMIT")],
    "PyTorch's function": [("F.silu", "F.gelu")],
    "the functional module": [("import torch.nn.functional as F", "class F:\n    silu = staticmethod(torch.tanh)")],
    "a default": [("mask=None", "mask=1")],
    "a decorator": [("    def forward", "    @torch.no_grad()\n    def forward")],
    "an argument": [("dim=-1", "dim=-1, keepdim=True")],
    "the order": [("helper(self.scaled(x))", "self.scaled(helper(x))")],
    "an attribute's name": [("self.scaled", "self.doubled"), ("def scaled", "def doubled")],
}


@pytest.mark.parametrize("change", SAME)
def test_what_computes_nothing_is_not_in_it(written, change):
    name = "Base_2" if change == "the class's name" else "Base"
    assert digest(written(*SAME[change], name=name)) == digest(written()) is not None


@pytest.mark.parametrize("change", OTHER)
def test_what_computes_something_is(written, change):
    assert digest(written(*OTHER[change])) not in (digest(written()), None)


DECORATED = ("    def forward", "    @deprecated\n    def forward")
SUBCLASSES = """
class Silent(Base):
    def extra_repr(self):
        return ""

class Loud(Base):
    def scaled(self, x):
        return x * 5

class Calls(Base):
    def forward(self, x):
        return super().forward(x) + 1

class CallsLoud(Loud):
    def forward(self, x):
        return super().forward(x) + 1

class Settled(Base):
    factor = 3
"""


def test_subclasses(written):
    text = BASE + SUBCLASSES
    base, silent, loud, calls, calls_loud, settled = (
        digest(written(text=text, name=name)) for name in ("Base", "Silent", "Loud", "Calls", "CallsLoud", "Settled")
    )
    assert base == silent and len({base, loud, calls, calls_loud, settled}) == 5


def test_no_source_no_digest(written, tmp_path):
    scope = {"nn": nn, "__name__": "prompt"}
    exec("class Typed(nn.Module):\n    def forward(self, x):\n        return x", scope)

    def made(factor):
        class Inner(nn.Module):
            def forward(self, x):
                return x * factor

        return Inner

    class Lambda(nn.Module):
        forward = lambda self, x: x  # noqa: E731

    assert [digest(cls) for cls in (scope["Typed"], made(2), Lambda, nn.Module)] == [None] * 4
    path = tmp_path / "compiled.py"
    path.write_text(BASE)
    code = "import os, py_compile; py_compile.compile('compiled.py', cfile='compiled.pyc'); os.remove('compiled.py'); import compiled;"
    code += " from fastpeft.forms import digest; print(digest(compiled.Base))"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.stdout.split()[-1:] == ["None"], done.stderr


def test_a_function_that_someone_replaces(written, monkeypatch):
    """Kept digests follow the class: a patched forward, helper or module-level function is another computation."""
    cls = written()
    before = digest(cls)
    module = sys.modules[cls.__module__]
    for where, name in ((cls, "forward"), (cls, "scaled"), (module, "helper")):
        with monkeypatch.context() as patch:
            patch.setattr(where, name, lambda *args: args[-1])
            assert digest(cls) != before
        assert digest(cls) == before
    with monkeypatch.context() as patch:
        patch.setattr(module, "LIMIT", 4)
        assert digest(cls) != before


def test_a_wrapper_around_forward_is_another_computation(monkeypatch):
    import functools

    old = modeling_llama.LlamaMLP.forward

    @functools.wraps(old)
    def twice(self, x):
        return 2 * old(self, x)

    monkeypatch.setattr(modeling_llama.LlamaMLP, "forward", twice)
    assert digest(modeling_llama.LlamaMLP) is None and form_of_class(modeling_llama.LlamaMLP) is None
    mlp = modeling_llama.LlamaMLP(T.LlamaConfig(hidden_size=32, intermediate_size=8))
    want = mlp(torch.ones(1, 32))
    report = fp.optimize(mlp)
    assert ("", "its code has changed since the releases of transformers that fastpeft knows") in report.skipped
    torch.testing.assert_close(mlp(torch.ones(1, 32)), want)


def test_known_texts_under_other_names():
    llama, gemma = digest(modeling_llama.LlamaRMSNorm), digest(modeling_gemma.GemmaRMSNorm)
    assert digest(modeling_mistral.MistralRMSNorm) == digest(modeling_qwen2.Qwen2RMSNorm) == llama != gemma
    assert "variance_epsilon" in code_of(modeling_llama.LlamaRMSNorm).reads and "eps" in code_of(modeling_gemma.GemmaRMSNorm).reads


def test_an_instance_with_a_method_of_its_own(written):
    norm = modeling_gemma.GemmaRMSNorm(4)
    norm._norm = lambda x: x
    want = norm(torch.ones(2, 4) * 3)
    report = fp.optimize(norm)
    assert report.skipped == [("", "has a _norm of its own over its class's")] and torch.equal(norm(torch.ones(2, 4) * 3), want)


def test_a_class_of_ones_own(written):
    """Code copied into a user's file, as many do, is recognised; a child that goes by a name of the fused module's own is not."""
    text = BASE.split("LIMIT")[0] + '''
class MyMLP(nn.Module):
    def __init__(self):
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = nn.Linear(6, 8), nn.Linear(6, 8), nn.Linear(8, 6)
        self.act_fn = nn.SiLU()

    def forward(self, states):
        return self.down_proj(self.act_fn(self.gate_proj(states)) * self.up_proj(states))
'''
    mlp = written(text=text, name="MyMLP")()
    x = torch.randn(3, 6)
    want = mlp(x)
    assert dict(fp.optimize(mlp).swapped)[""] == "MyMLP" and is_fused(mlp)
    torch.testing.assert_close(mlp(states=x), want)
    fp.restore(mlp)
    mlp.gated_by = nn.Linear(2, 2)
    assert fp.optimize(mlp).skipped == [("", "its gated_by has a name of the fused module's own")]


def test_a_call_of_its_own():
    """A module around reads weights where it may: what a subclass does in __call__ would be lost."""

    class Doubled(modeling_mistral.MistralRMSNorm):
        def __call__(self, hidden_states):
            return 2 * super().__call__(hidden_states)

    class Renamed(modeling_mistral.MistralRMSNorm):
        pass

    assert digest(Doubled) == digest(Renamed) == digest(modeling_llama.LlamaRMSNorm)
    assert form_of(Doubled(4)) is None and form_of(Renamed(4)) is form_of(modeling_llama.LlamaRMSNorm(4))
    assert [reason for _, reason in fp.optimize(Doubled(4)).skipped] == ["a subclass of MistralRMSNorm that overrides __call__"]


def test_a_sharded_class_has_no_form():
    sharded = type("FSDPLlamaRMSNorm", (modeling_llama.LlamaRMSNorm,), {"__module__": "torch.distributed.fsdp._fully_shard._fully_shard"})
    module = sharded(4)
    assert form_of(module) is None
    assert dict(fp.optimize(module).skipped)[""] == "sharded by fully_shard before optimize; call optimize first"
