"""verify(): it passes what is right, in every dtype and method, and fails whatever is broken, by name. And plain(), the truth it uses."""

import copy
import json
import sys
from importlib.util import find_spec

import pytest
import torch
from torch import nn

import fastpeft as fp
from fastpeft import cli
from fastpeft.fused.attention import blip_text as attention_text
from fastpeft.fused.attention import llama as attention_llama
from fastpeft.fused.layers import projections
from fastpeft.fused.stack import blip as stack_blip
from fastpeft.methods import adaption_prompt, excitor
from fastpeft.models.vision_language import VisionLanguageModel
from fastpeft.registry import is_fused
from fastpeft.verify import baseline as plain
from fastpeft.verify import compare as verifying
from fastpeft.verify.compare import DTYPES, Check, Result, tolerance, verify

pytestmark = pytest.mark.usefixtures("one_thread")
FORMS = ["samples alone", "one padded batch", "questions grouped by image", "attention to states, absorbed", "attention to keys and values"]
PEFT = "transformers + PEFT (float64)"


def failed(result):
    return list(dict.fromkeys(check.check for check in result.checks if not check.ok))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("plan", ["T/T/T", "LoRA/LoRA/LoRA", "F/IA3/Prefix", "LayerNorm/Attention/FFN"])
def test_what_is_right_passes(miss, plan, dtype):
    model = miss.build(plan, dtype=DTYPES[dtype], scatter=0)
    before = copy.deepcopy(model.state_dict())
    result = verify(model)
    assert result.ok, result.lines()
    names = list(dict.fromkeys(check.check for check in result.checks))
    skipped = dict(result.skipped)
    expected = FORMS + (["image features kept"] if plan.startswith("F/") else [])
    if "Prefix" in plan:
        assert "PEFT's prefix in 'dec'" in skipped["transformers + PEFT"]
    elif pytest.importorskip("peft"):
        expected.append(PEFT)
    assert names == expected
    assert ("image features kept" in skipped) != plan.startswith("F/")
    assert all(torch.equal(before[name], t) for name, t in model.state_dict().items())  # it works on a copy


def faulty(function, spoil):
    def call(*args, **kwargs):
        return spoil(function(*args, **kwargs))

    return call


def in_backward(outputs):
    for out in outputs:
        if out.requires_grad:
            out.register_hook(lambda gradient: 1.001 * gradient)
    return outputs


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "plan", ["T", "LoRA", "IA3", "LayerNorm", "Prefix", "LoRA+LayerNorm", "Excitor", "AdaptionPrompt", "RepAdapter", "PTv2+Excitor+IA3"]
)
def test_a_llama_padded_and_packed(plan, dtype):
    model = fp.adapt(fp.build("llama-tiny", dtype=DTYPES[dtype], num_hidden_layers=3, num_key_value_heads=2), plan)
    result = verify(model)
    assert result.ok, result.lines()
    names = {check.check for check in result.checks}
    assert {"samples alone", "one padded batch", "packed into one row"} <= names
    assert (PEFT in names) == (plan in ("T", "LoRA", "IA3", "LayerNorm", "AdaptionPrompt") and bool(find_spec("peft")))


SEEING = [
    ("llava-med-v1.5-tiny", "F/T/LoRA/LoRA"),
    ("excitor-tiny", "F/Excitor"),
    ("excitor-tiny", "LoRA/AdaptionPrompt"),
    ("lavin-tiny", "MMAdapter/T/MMAdapter"),
    ("lavin-tiny", "MMAdapter(position=block)/T/MMAdapter(position=block)"),
    ("lavin-tiny", "F/F/LoRA"),
]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name, plan", SEEING)
def test_images_in_a_language_model(name, plan, dtype):
    result = verify(fp.adapt(fp.build(name, dtype=DTYPES[dtype]), plan))
    assert result.ok, result.lines()
    names = {check.check for check in result.checks}
    assert {"samples alone", "one padded batch", "packed into one row"} <= names
    assert ("image features kept" in names) == plan.startswith("F/")
    if "LoRA" in plan and find_spec("peft"):
        assert PEFT in names  # LLaMA-Adapter too


@pytest.mark.parametrize("gate", ["head", "layer"])
def test_an_excitors_options(gate):
    method = fp.Excitor(gate=gate, excitor_scale="head", rotary=True)
    result = verify(fp.adapt(fp.build("llama-tiny", num_key_value_heads=2), llm=method))
    assert result.ok, result.lines()


ALL_FORMS = ["samples alone", "one padded batch", "packed into one row", "a common beginning once"]


def test_faults_of_excitors_and_adapters(monkeypatch):
    def checked(name, plan):
        return failed(verify(fp.adapt(fp.build(name), plan), peft=False))

    with monkeypatch.context() as patch:  # S_excitor on another scale
        right = excitor.merge_keys
        patch.setattr(excitor, "merge_keys", lambda k, u, *rest, **more: right(k, 1.01 * u, *rest, **more))
        assert checked("llama-tiny", "Excitor") == ALL_FORMS
    with monkeypatch.context() as patch:  # samples see each other's images: not where a sample is alone
        right = VisionLanguageModel.index_of

        def exchanged(*given):
            index = right(*given)
            return index.where(index < 0, index.max() - index)

        patch.setattr(VisionLanguageModel, "index_of", staticmethod(exchanged))
        assert checked("excitor-tiny", "F/Excitor") == [*ALL_FORMS[1:], "image features kept"]
    with monkeypatch.context() as patch:  # a prompt's keys on another scale
        right = adaption_prompt.attend_prompt
        patch.setattr(attention_llama, "attend_prompt", lambda context, q, keys, *rest: right(context, q, 1.01 * keys, *rest))
        assert checked("llama-tiny", "AdaptionPrompt") == ALL_FORMS
    with monkeypatch.context() as patch:  # the other expert
        right = fp.ops.norm_mm_adapter
        patch.setattr(fp.ops, "norm_mm_adapter", lambda *given: right(*given[:7], given[7].flip(-1), *given[8:]))
        assert checked("lavin-tiny", "F/T/MMAdapter") == [*ALL_FORMS, "image features kept"]
    assert not checked("lavin-tiny", "F/T/MMAdapter") and not checked("llama-tiny", "Excitor")


def test_a_fault_in_llamas_attention_fails(monkeypatch):
    right = fp.ops.rotary
    monkeypatch.setattr(fp.ops, "rotary", lambda x, cos, sin: right(x, cos, 1.01 * sin))
    assert not verify(fp.adapt(fp.build("llama-tiny", num_hidden_layers=2), "LoRA")).ok


def test_a_fault_in_an_operator_fails_everywhere(miss, monkeypatch):
    model = miss.build("F/LoRA/LoRA")
    monkeypatch.setattr(fp.ops, "add_layer_norm", faulty(fp.ops.add_layer_norm, lambda out: (out[0] * (1 + 1e-6), *out[1:])))
    assert failed(verify(model)) == [*FORMS, "image features kept"]


def test_a_fault_in_a_backward_alone_fails(miss, monkeypatch):
    monkeypatch.setattr(projections, "lora_linears", faulty(projections.lora_linears, in_backward))
    result = verify(miss.build("F/LoRA/LoRA"))
    wrong = [check for check in result.checks if not check.ok]
    assert {check.quantity for check in wrong} == {"gradients", "worst gradient"} and failed(result) == [*FORMS, "image features kept"]
    assert any("lora" in check.worst for check in wrong)


def test_faults_of_single_forms(miss, monkeypatch):
    model = miss.build("F/LoRA/LoRA", dtype=torch.float32)
    with monkeypatch.context() as patch:  # a question's padding leaks into the decoder
        patch.setattr(stack_blip, "as_key_mask", lambda mask: None)
        assert failed(verify(model, peft=False)) == [*FORMS[1:], "image features kept"]
    with monkeypatch.context() as patch:  # questions see each other's images
        real = stack_blip.image_layout
        patch.setattr(stack_blip, "image_layout", lambda tokens, index, *rest: real(tokens, index.roll(1), *rest))
        assert failed(verify(model, peft=False)) == [*FORMS[2:], "image features kept"]
    with monkeypatch.context() as patch:
        patch.setattr(attention_text, "absorbed_attention", faulty(attention_text.absorbed_attention, lambda out: 1.01 * out))
        assert FORMS[3] in failed(verify(model, peft=False)) and FORMS[4] not in failed(verify(model, peft=False))
    assert verify(model, peft=False).ok


def test_a_wrong_truth_is_noticed(miss, monkeypatch):
    """Plain PyTorch and PEFT are independent: they hold each other to account."""
    pytest.importorskip("peft")
    branch = plain._PlainLinear._branch
    monkeypatch.setattr(plain._PlainLinear, "_branch", lambda self, x: 1.001 * branch(self, x))
    assert PEFT in failed(verify(miss.build("F/F/LoRA")))


def test_nan_and_nothing_are_no_success():
    assert not Check("", "", float("nan"), None, 1.0).ok and not Result().ok
    assert Check("", "", 1.0, None, 1.0).ok and not Result([Check("", "", 1.0, None, 1.0), Check("", "", 1.1, None, 1.0)]).ok
    step = (1.0, {"a": torch.tensor([1.0]), "b": torch.tensor([float("nan")])})
    errors, worst = verifying.deviation(step, (1.0, {"a": torch.tensor([2.0]), "b": torch.tensor([1.0])}))
    assert worst == "b" and errors["worst gradient"] != errors["worst gradient"] and errors["gradients"] != errors["gradients"]


def test_deviation_by_hand():
    step = (1.1, {"a": torch.tensor([3.0, 4.5]), "key.bias": torch.tensor([1e-4])})
    truth = (1.0, {"a": torch.tensor([3.0, 4.0]).double(), "key.bias": torch.zeros(1).double()})
    errors, worst = verifying.deviation(step, truth)
    assert errors == pytest.approx({"loss": 0.1, "gradients": 0.1, "worst gradient": 0.1}, rel=1e-5) and worst == "a"
    assert tolerance(0.0, torch.float64) < 1e-12 and tolerance(0.0, torch.bfloat16) < 0.04 and tolerance(1.0, torch.float32) == 4.0


def test_what_cannot_be_verified(miss):
    with pytest.raises(ValueError, match="Linear cannot be verified; known: Blip"):
        verify(nn.Linear(2, 2))
    no_plan = verify(miss.build().requires_grad_(True))
    assert no_plan.ok and dict(no_plan.skipped)["transformers + PEFT"] == "the model has no plan"


@pytest.mark.parametrize("plan", ["LoRA/LoRA/IA3", "F/Prefix/PTv2", "LoRA+LayerNorm/LoRA+IA3/IA3+Prefix"])
def test_plain_runs_nothing_of_ours(miss, plan, monkeypatch):
    model, inputs = miss.without_dropout(miss.build(plan)), miss.batch(padded=True)
    twin = plain.plain(model)
    assert not any(is_fused(m) for m in twin.modules()) and list(twin.state_dict()) == list(model.state_dict())
    loss, gradients = miss.step(model, inputs)
    for name in fp.ops.__all__:
        monkeypatch.setattr(fp.ops, name, None)
    want, wanted = miss.step(twin, inputs)
    assert loss == pytest.approx(want, rel=1e-12)
    miss.assert_same(gradients, wanted)


@pytest.mark.parametrize("name, plan", [*SEEING, ("llama-tiny", "Excitor+AdaptionPrompt")])
def test_plain_language_models_run_nothing_of_ours(name, plan, monkeypatch):
    model = plain.scatter_adapters(plain.without_dropout(fp.adapt(fp.build(name, dtype=torch.float64), plan)))
    case = verifying.case_of(model)
    want, wanted = verifying.run_alone(model, case)
    twin = plain.plain(model)
    for name in fp.ops.__all__:
        monkeypatch.setattr(fp.ops, name, None)
    for module, ours in ((excitor, "merge_keys"), (attention_llama, "attend_prompt"), (attention_llama, "project_together")):
        monkeypatch.setattr(module, ours, None)
    loss, gradients = verifying.run_alone(twin, case)
    assert loss == pytest.approx(want, rel=1e-6) and gradients.keys() == wanted.keys()
    assert not any(is_fused(m) for m in twin.modules()) and list(twin.state_dict()) == list(model.state_dict())


def test_the_papers_equations_read_no_cache():
    twin = plain.plain(fp.adapt(fp.build("llama-tiny"), "Excitor")).eval()
    how = {"max_new_tokens": 3, "pad_token_id": 0, "eos_token_id": None}
    with pytest.raises(ValueError, match="whole sequences: generate with use_cache=False"):
        twin.generate(torch.tensor([[5, 6]]), **how)
    assert twin.generate(torch.tensor([[5, 6]]), use_cache=False, **how).shape == (1, 5)


@pytest.mark.parametrize("plan", ["LoRA/LoRA/LoRA", "T/IA3/LayerNorm", "F/Attention/FFN"])
def test_with_peft_has_the_same_weights(miss, plan):
    pytest.importorskip("peft")
    model, inputs = miss.without_dropout(miss.build(plan)), miss.batch(padded=True)
    twin, names = plain.with_peft(model)
    assert not any(type(m).__module__.startswith("fastpeft.methods") or is_fused(m) for m in twin.modules())
    (loss, gradients), (want, wanted) = miss.step(model, inputs), miss.step(twin, inputs)
    assert loss == pytest.approx(want, rel=1e-12)
    miss.assert_same(gradients, {names[name]: g.view(gradients[names[name]].shape) for name, g in wanted.items()})


def test_what_peft_cannot_express(miss):
    pytest.importorskip("peft")
    with pytest.raises(ValueError, match=r"PEFT does not combine LoRA\+LayerNorm"):
        plain.with_peft(miss.build("LoRA+LayerNorm/F/F"))
    with pytest.raises(ValueError, match=r"PEFT has no MMAdapter"):
        plain.with_peft(fp.adapt(fp.build("lavin-tiny"), "F/T/MMAdapter"))
    with pytest.raises(ValueError, match=r"PEFT runs Excitor through fastpeft itself"):
        plain.with_peft(fp.adapt(fp.build("excitor-tiny"), "F/Excitor"))


def test_without_dropout():
    random = fp.adapt(fp.build("miss-tiny", drop_path_rate=0.5, hidden_dropout_prob=0.5), "LoRA/F/T", lora_dropout=0.5)
    model = plain.without_dropout(random)
    assert model.training and not model.text_encoder.training
    batch = {"input_ids": torch.tensor([[4, 5]]), "labels": torch.tensor([[4, 5, 6]]), "pixel_values": torch.randn(1, 3, 64, 64)}
    with torch.no_grad():
        assert model(**batch).loss == model(**batch).loss


@pytest.fixture
def fastpeft(monkeypatch, capfd):
    """fastpeft("verify", ...) in this process: (exit code, stdout, stderr)."""

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["fastpeft", *arguments])
        capfd.readouterr()
        with pytest.raises(SystemExit) as stop:
            cli.main()
        return stop.value.code, *capfd.readouterr()

    return call


def test_the_command(fastpeft, monkeypatch):
    code, out, err = fastpeft("verify", "--plan", "F/LoRA/IA3", "--rank", "2", "--json")
    told = json.loads(out.splitlines()[-1])
    assert (code, err) == (0, "") and told["ok"] and told["plan"] == "F/LoRA/IA3" and told["dtype"] == "fp32"
    assert {check["check"] for check in told["checks"]} >= {*FORMS, "image features kept"}
    assert "image features kept" in out and "all within tolerance" in out
    monkeypatch.setattr(fp.ops, "add_layer_norm", faulty(fp.ops.add_layer_norm, lambda out: (out[0] * 1.01, *out[1:])))
    code, out, err = fastpeft("verify", "--json")
    assert code == 1 and json.loads(out.splitlines()[-1])["ok"] is False and "DIFFERENT: samples alone" in out
    assert json.loads(out.splitlines()[-1])["plan"] == "LoRA/LoRA/LoRA"


@pytest.mark.parametrize(
    "arguments, said",
    [(("--dtype", "fp8"), "fp64, fp32, bf16"), (("--plan", "LoRA"), "3 parts"), (("--model", "nowhere"), "neither a model name")],
)
def test_bad_input(fastpeft, arguments, said):
    code, out, err = fastpeft("verify", *arguments)
    assert (code, out) == (2, "") and err.startswith("fastpeft: ") and err.count("\n") == 1 and said in err


def test_the_door_to_the_benchmarks(fastpeft, monkeypatch, tmp_path):
    code, out, _ = fastpeft("bench", "steps", "--help")
    assert code == 0 and "--questions-per-image" in out
    monkeypatch.setattr(cli, "__file__", str(tmp_path / "site-packages" / "fastpeft" / "cli.py"))
    code, out, err = fastpeft("bench", "ops")
    assert code == 2 and "run this from a checkout of the repository" in err and err.count("\n") == 1
