"""`fastpeft estimate --plain`: the step of plain(), to the FLOP and the byte, for every family; and what plain() is held against."""

import copy
import json
import sys
from importlib.util import find_spec

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import fastpeft as fp
from fastpeft import cli
from fastpeft.cost import estimate as module
from fastpeft.cost.batches import AskedStep, inputs_for
from fastpeft.cost.profile import measure
from fastpeft.registry import is_fused
from fastpeft.verify import compare as verifying
from fastpeft.verify.baseline import plain, scatter_adapters, with_peft, without_dropout

pytestmark = pytest.mark.usefixtures("one_thread")
CASES = [
    ("miss-tiny", "LoRA/LoRA/LoRA", {"questions_per_image": 2}),
    ("miss-tiny", "F/Prefix/PTv2", {}),
    ("miss-tiny", "LoRA+LayerNorm/LoRA+IA3/IA3+Prefix", {}),
    *(("llama-tiny", plan, {}) for plan in ("LoRA", "T", "PTv2", "Excitor+LoRA", "AdaptionPrompt", "RepAdapter")),
    *(("llava-med-tiny", plan, {}) for plan in ("F/T/LoRA/T", "LoRA/T/Prefix/F", "F/F/Excitor/F")),
    *(("excitor-tiny", plan, {}) for plan in ("F/Excitor", "LoRA/PTv2")),
    *(("lavin-tiny", plan, {}) for plan in ("MMAdapter/T/MMAdapter", "F/T/LoRA", "RepAdapter/F/AdaptionPrompt")),
]
DTYPES = [(*case, "fp32") for case in CASES] + [(*case, "bf16") for case in CASES[::5]]


class Ours(TorchDispatchMode):
    """The operators of fastpeft that run inside."""

    def __init__(self):
        super().__init__()
        self.seen = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "fastpeft":
            self.seen.add(str(func))
        return func(*args, **(kwargs or {}))


def step_inputs(model, name, how, dtype, batch=4):
    told = {"seq_len": None, "answer_len": None, "questions_per_image": 1, "feature_cache": True, "cache_layers": False}
    told |= {"batch_size": batch, "dtype": dtype, "gradient_accumulation": 1, "optimized": True, "quantize": None}
    inputs = inputs_for(model, AskedStep(**told | {k: v for k, v in how.items() if k in told}), module.DTYPES[dtype])
    return {key: torch.randn_like(t) if t.is_floating_point() else t for key, t in inputs.items()}


def lengths(name, how):
    return how if name == "miss-tiny" else how | {"seq_len": 20 if name != "lavin-tiny" else 24}


@pytest.mark.parametrize("name, plan, how, dtype", DTYPES)
def test_the_step_of_the_plain_model(name, plan, how, dtype):
    how = lengths(name, how)
    e = fp.estimate(name, plan, batch_size=4, dtype=dtype, optimized=False, **how)
    model = plain(fp.adapt(fp.build(name, dtype=module.DTYPES[dtype]), plan), attention="eager").train()
    assert not any(is_fused(m) for m in model.modules())
    inputs = step_inputs(model, name, how, dtype)
    with Ours() as ours, FlopCounterMode(display=False) as counter:
        model(**inputs).loss.backward()
    with measure(model) as cost:  # alone: the counter's tracker of modules asks outputs for their gradient's function
        model(**inputs).loss.backward()
    assert not ours.seen
    assert e.flops_per_sample * 4 == counter.get_total_flops()
    assert e.saved_bytes == cost.saved_bytes
    assert e.peak_bytes - e.process_bytes >= e.weight_bytes + e.optimizer_bytes + 0.99 * e.saved_bytes
    assert e.weight_bytes == sum(t.nbytes for t in {id(t): t for t in (*model.parameters(), *model.buffers())}.values())
    assert e.plan == plan


@pytest.mark.parametrize(
    "name, plan", [("llama-tiny", "LoRA"), ("llama-tiny", "IA3"), ("miss-tiny", "LoRA/LoRA/IA3"), ("llava-med-tiny", "F/T/LoRA/F")]
)
def test_flops_are_those_of_transformers_and_peft(name, plan):
    pytest.importorskip("peft")
    how = lengths(name, {"feature_cache": False})
    e = fp.estimate(name, plan, batch_size=4, optimized=False, **how)
    model, _ = with_peft(fp.adapt(fp.build(name), plan).train())
    for part in model.modules():
        if hasattr(getattr(part, "config", None), "_attn_implementation"):
            part.config._attn_implementation = "eager"
    inputs = step_inputs(fp.build(name), name, how, "fp32")
    with FlopCounterMode(display=False) as counter:
        model(**inputs).loss.backward()
    assert e.flops_per_sample * 4 == counter.get_total_flops()


@pytest.mark.parametrize("plan", ["F/T/LoRA/T", "LoRA/T/PTv2/F", "F/F/Excitor/LoRA"])
def test_plain_llava_med_computes_the_same(plan):
    """The family that `verify` does not know: loss and gradients of ours and of plain()."""
    model = fp.adapt(fp.build("llava-med-tiny", dtype=torch.float64), plan)
    model = scatter_adapters(without_dropout(model))
    inputs = step_inputs(model, "llava-med-tiny", {"seq_len": 20}, "fp32")
    own, truth = (verifying.step_of(m, inputs) for m in (model, plain(model)))
    errors, worst = verifying.deviation(own, truth)
    assert max(errors.values()) < 1e-5, worst  # transformers' LlamaRMSNorm is float32 in a float64 model too


def test_attention_is_the_models_own_unless_asked():
    model = fp.adapt(fp.build("excitor-tiny"), "F/LoRA")
    chosen = model.config.text_config._attn_implementation
    assert plain(model).llm.config._attn_implementation == chosen
    eager = plain(model, attention="eager")
    assert eager.llm.config._attn_implementation == eager.vision.config._attn_implementation == "eager"
    assert model.llm.config._attn_implementation == chosen  # the model itself is left as it is


def test_a_model_as_given():
    model = fp.adapt(fp.build("llama-tiny"), "LoRA")
    before = copy.deepcopy(model.state_dict())
    given, named = (fp.estimate(m, "LoRA", batch_size=2, seq_len=20, optimized=False) for m in (model, "llama-tiny"))
    assert (given.flops_per_sample, given.saved_bytes) == (named.flops_per_sample, named.saved_bytes)
    assert all(torch.equal(before[name], t) for name, t in model.state_dict().items())


@pytest.fixture
def command(monkeypatch, capfd):
    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["fastpeft", "estimate", *arguments])
        capfd.readouterr()
        with pytest.raises(SystemExit) as stop:
            cli.main()
        return stop.value.code, *capfd.readouterr()

    return call


@pytest.mark.parametrize(
    "name, plan",
    [("llama-tiny", "Excitor"), ("llava-med-tiny", "F/T/PTv2/F"), ("excitor-tiny", "F/Excitor"), ("lavin-tiny", "F/F/MMAdapter")],
)
def test_the_command(command, name, plan):
    size = ["--batch-size", "2", "--seq-len", "24"]
    code, out, err = command("--model", name, "--plan", plan, *size, "--plain", "--json")
    assert (code, err) == (0, "")
    told, ours = json.loads(out.splitlines()[-1]), fp.estimate(name, plan, batch_size=2, seq_len=24)
    assert told["saved_bytes"] > ours.saved_bytes and told["flops_per_sample"] > ours.flops_per_sample


def test_what_has_no_plain_counterpart(command):
    if find_spec("bitsandbytes") is None:
        pytest.skip("bitsandbytes is not installed")
    code, out, err = command("--model", "llama-tiny", "--plan", "LoRA", "--seq-len", "8", "--plain", "--quantize", "4bit")
    assert (code, out) == (2, "") and err.count("\n") == 1 and "quantize='4bit' has no plain counterpart" in err
