"""A quantised base against the same model with its weights written out: outputs, losses, and the gradients of what trains on top."""

import copy
import json

import pytest
import torch
from quantized_llama import FORMATS, SHAPE, batch, llama_folder, loaded, logits_of, torchao_or_its_stand_in  # noqa: F401 - fixtures
from torch import nn
from transformers import LlamaForCausalLM

import fastpeft as fp
from fastpeft.cost.profile import measure
from fastpeft.methods.quantized import bytes_held, dequantize, is_held, is_quantized
from fastpeft.models.quantize import quantized_bytes
from fastpeft.verify.baseline import plain, scatter_adapters, without_dropout

PLANS = ("LoRA", "IA3", "PTv2", "Prefix", "LayerNorm", "LoRA+IA3", "Excitor", "Excitor+LoRA")


def gradients(model, inputs):
    model.zero_grad()
    loss = model(**inputs).loss
    loss.backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None} | {"loss": loss.detach()}


def assert_same(got, want, rtol=2e-5, atol=1e-7):
    assert got.keys() == want.keys() and len(got) > 1
    for name, value in want.items():
        scale = value.abs().max().item()
        torch.testing.assert_close(got[name], value, rtol=rtol, atol=atol + rtol * scale, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("how", FORMATS)
@pytest.mark.parametrize("plan", PLANS)
def test_a_model_that_transformers_quantised(folder, how, plan):
    """Drop-in: optimize, adapt, and train as on the weights written out."""
    model = loaded(folder, how)
    held = [name for name, module in model.named_modules() if is_held(module)]
    assert len(held) == 7 * SHAPE["num_hidden_layers"] and "lm_head" not in held
    report = fp.optimize(model)
    assert not report.skipped and any("written out" in note for note in report.notes) == (how == "8bit")
    fp.adapt(model, plan, **({"layers": 1} if "Excitor" in plan else {}))
    scatter_adapters(model)
    twin = dequantize(copy.deepcopy(model))
    assert not any(is_held(module) for module in twin.modules())
    got, want = gradients(model.train(), batch()), gradients(twin.train(), batch())
    assert_same(got, want, rtol=1e-6)  # the same operators on the same numbers
    if plan in ("LoRA", "IA3", "LayerNorm", "LoRA+IA3"):  # transformers' own modules and the papers' formulas
        assert_same(got, gradients(plain(model).train(), batch()))


@pytest.mark.parametrize("how", [how for how in FORMATS if how != "standin"])
def test_peft_on_top(folder, how):
    """PEFT's layers over a quantised base are fused too."""
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=3, target_modules=["q_proj", "v_proj", "down_proj"], init_lora_weights=False)
    torch.manual_seed(3)
    model = peft.get_peft_model(loaded(folder, how), config).train()
    theirs = gradients(model, batch())
    report = fp.optimize(model)
    assert not report.skipped and sum("lora" in name.lower() for _, name in report.swapped) == 6
    with measure(model) as cost:
        ours = gradients(model, batch())
    linears = sum(m.in_features * m.out_features * 4 for m in model.modules() if is_held(m))
    assert cost.saved_bytes < linears
    # bitsandbytes' own 8-bit forward rounds activations too
    assert_same(ours, theirs, **({"rtol": 0.2, "atol": 0.05} if how == "8bit" else {"rtol": 1e-4}))


@pytest.mark.parametrize("how", FORMATS)
def test_restore_gives_the_library_its_layers_back(folder, how):
    model = loaded(folder, how)
    classes = {name: type(module) for name, module in model.named_modules()}
    fp.optimize(model)
    assert fp.restore(model) == []
    assert {name: type(module) for name, module in model.named_modules()} == classes


@pytest.mark.parametrize("how", FORMATS)
def test_nothing_written_out_is_kept(folder, how):
    """What backward keeps is what it keeps on the weights written out."""
    model = fp.adapt(loaded(folder, how), "LoRA")
    fp.optimize(model)
    costs = []
    for one in (model, dequantize(copy.deepcopy(model))):
        with measure(one.train()) as cost:
            one(**batch()).loss.backward()
        costs.append((cost.saved_bytes, cost.flops))
    assert costs[0] == costs[1]


@pytest.mark.parametrize("how", FORMATS)
@pytest.mark.parametrize("plan", ["T", "Attention", "FFN"])
def test_quantised_weights_cannot_be_trained(folder, how, plan):
    model = loaded(folder, how)
    with pytest.raises(ValueError, match=f"{plan} of part 'llm' would train .* quantised weights"):
        fp.adapt(model, plan)
    assert getattr(model, "fastpeft_plan", None) is None
    fp.adapt(model, "LoRA")


def test_a_layer_that_is_not_quantised_yet_says_so(folder):
    bnb = pytest.importorskip("bitsandbytes")
    model = LlamaForCausalLM.from_pretrained(folder)
    model.model.layers[0].mlp.up_proj = bnb.nn.Linear4bit(64, 128, bias=False)
    report = fp.optimize(model)
    assert dict(report.skipped)["model.layers.0.mlp.up_proj"].startswith("its weight is not quantised yet")
    with pytest.raises(TypeError, match="not quantised: move the model to its device"):
        fp.adapt(model, "LoRA", target_modules=["up_proj"])


@pytest.mark.parametrize("how", ["4bit", "8bit"])
@pytest.mark.parametrize(
    "name, plan",
    [
        ("llama-tiny", "LoRA"),
        ("llava-med-tiny", "LoRA/T/LoRA/F"),
        ("excitor-tiny", "F/Excitor"),
        ("lavin-tiny", "MMAdapter/T/MMAdapter"),
        ("lavin-tiny", "LoRA/T/RepAdapter+LoRA"),
    ],
)
def test_build(name, plan, how):
    """Our own door: attention and feed-forward layers are quantised, nothing else; the step is that of the weights written out."""
    pytest.importorskip("bitsandbytes")
    from fastpeft.cost.batches import AskedStep, inputs_for

    model = fp.adapt(fp.build(name, quantize=how), plan)
    without_dropout(scatter_adapters(model))
    held = {n for n, m in model.named_modules() if is_held(m)}
    assert held and all(any(block in n for block in ("self_attn", "mlp")) for n in held)
    linears = {n for n, m in model.named_modules() if isinstance(m, nn.Linear) and any(b in n for b in ("self_attn", "mlp"))}
    assert held == linears
    told = fp.count(fp.adapt(fp.build(name, device="meta"), plan))
    assert fp.count(model) == told  # parameters are counted, not codes
    told = {"batch_size": 3, "seq_len": 24, "answer_len": 6, "questions_per_image": 1, "feature_cache": False, "cache_layers": False}
    inputs = inputs_for(model, AskedStep(dtype="fp32", gradient_accumulation=1, optimized=True, quantize=None, **told), torch.float32)
    inputs = {key: torch.randn_like(t) if t.is_floating_point() else t for key, t in inputs.items()}
    inputs["input_ids"] = torch.randint(3, 400, inputs["input_ids"].shape)
    if name.startswith("lavin"):
        inputs["image_index"][1], inputs["image_mask"][1] = -1, False
    twin = dequantize(copy.deepcopy(model))
    assert_same(gradients(model, inputs), gradients(twin, inputs), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("how, dtype", [("4bit", torch.float32), ("8bit", torch.bfloat16)])
def test_bytes_of_the_formats(how, dtype):
    pytest.importorskip("bitsandbytes")
    model = fp.build("lavin-tiny", quantize=how, dtype=dtype, text_config={"hidden_size": 144, "num_attention_heads": 4})
    sizes = []
    for module in filter(is_held, model.modules()):
        sizes.append(bytes_held(module))
        assert sizes[-1] == quantized_bytes((module.out_features, module.in_features), how)
    rest = sum(t.nbytes for t in (*model.parameters(), *model.buffers()) if not is_quantized(t))
    kind = {torch.float32: "fp32", torch.bfloat16: "bf16"}[dtype]
    told = fp.estimate(model, "F/T/MMAdapter", batch_size=2, seq_len=24, dtype=kind)
    adapters = sum(p.nbytes for n, p in fp.adapt(model, "F/T/MMAdapter").named_parameters() if "mm_adapter" in n)
    assert told.weight_bytes == rest + sum(sizes) + adapters
    dense = fp.estimate("lavin-tiny", "F/T/MMAdapter", batch_size=2, seq_len=24, dtype=kind)
    assert fp.estimate("lavin-tiny", "F/T/MMAdapter", batch_size=2, seq_len=24, dtype=kind, quantize=how).weight_bytes < dense.weight_bytes


def test_estimate_of_what_cannot_be():
    with pytest.raises(ValueError, match=r"weight is to be trained, and a quantised base"):
        fp.estimate("llama-tiny", "T", batch_size=1, seq_len=8, quantize="4bit")


def test_refusals(monkeypatch):
    with pytest.raises(ValueError, match=r"must be one of 4bit, 8bit, not '2bit'"):
        fp.build("llama-tiny", quantize="2bit")
    with pytest.raises(ValueError, match=r"float32, bfloat16 or float16, not torch\.float64"):
        fp.build("llama-tiny", quantize="4bit", dtype=torch.float64)
    monkeypatch.setattr("fastpeft.models.quantize.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"needs bitsandbytes: pip install 'fastpeft\[bitsandbytes\]'"):
        fp.build("llama-tiny", quantize="4bit")
    monkeypatch.setattr("fastpeft.models.quantize.find_spec", lambda name: True)
    with pytest.raises(ValueError, match="miss-tiny is none"):
        fp.build("miss-tiny", quantize="8bit")
    assert fp.count(fp.build("llama-7b", device="meta", quantize="4bit"))["base"] == 6_738_415_616


@pytest.mark.parametrize("how", ["4bit", "8bit"])
def test_files(how, tmp_path):
    """An adapter holds nothing of the quantised base; loaded over the same base it gives the same; merging writes the base out."""
    pytest.importorskip("bitsandbytes")
    model = scatter_adapters(fp.adapt(fp.build("llama-tiny", quantize=how), "LoRA+IA3"))
    logits = logits_of(model)
    fp.save_adapter(model, tmp_path / "adapter")
    assert json.loads((tmp_path / "adapter" / "fastpeft.json").read_text())["base"]["quantize"] == how
    assert sum(f.stat().st_size for f in (tmp_path / "adapter").rglob("*.safetensors")) < 60_000
    again = fp.load_adapter(fp.build("llama-tiny", quantize=how), tmp_path / "adapter")
    assert torch.equal(logits_of(again), logits)
    with pytest.warns(UserWarning, match="trained on other base weights"):
        fp.load_adapter(fp.build("llama-tiny"), tmp_path / "adapter")
    fp.merge(again)
    assert not any(is_held(m) for m in again.modules()) and not any("lora" in n or "ia3" in n for n, _ in again.named_parameters())
    assert all(type(m) is nn.Linear for n, m in again.named_modules() if n.endswith("_proj"))
    torch.testing.assert_close(logits_of(again), logits, rtol=1e-4, atol=1e-4)
    again.save_pretrained(tmp_path / "merged")
    torch.testing.assert_close(logits_of(fp.build(tmp_path / "merged")), logits_of(again))


@pytest.mark.parametrize("how", ["4bit", "8bit"])
def test_a_folder_that_is_quantised_already(folder, how, tmp_path):
    loaded(folder, how).save_pretrained(tmp_path / "small")
    model = fp.build(tmp_path / "small")
    assert any(map(is_held, model.modules()))
    torch.testing.assert_close(logits_of(model), logits_of(dequantize(loaded(folder, how))), rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="quantised already"):
        fp.build(tmp_path / "small", quantize="4bit")


@pytest.mark.parametrize("how", FORMATS)
def test_memory_budget_and_autocast(folder, how):
    model = scatter_adapters(fp.adapt(loaded(folder, how), "LoRA")).train()
    fp.optimize(model)
    plain_step = gradients(model, batch())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert_same(gradients(model, batch()), plain_step, rtol=0.1, atol=1e-2)
    from fastpeft.cost.memory_budget import fixed_bytes

    adapters = sum(p.nbytes for p in model.parameters() if p.requires_grad)
    rest = sum(t.nbytes for t in (*model.parameters(), *model.buffers()) if not is_quantized(t))
    assert fixed_bytes(model) == rest + sum(map(bytes_held, filter(is_held, model.modules()))) + 3 * adapters
    for module in model.modules():
        if hasattr(module, "recompute"):
            module.recompute = True
    assert_same(gradients(model, batch()), plain_step, rtol=1e-6)
