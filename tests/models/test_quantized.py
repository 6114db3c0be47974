"""A quantised base against the same model with its weights written out: outputs, losses, and the gradients of what trains on top."""

import copy
import json
import sys
import types

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import fastpeft as fp
from fastpeft.methods.quantized import bytes_held, dequantize, is_held, is_quantized, weight_of
from fastpeft.models.quantize import quantized_bytes
from fastpeft.ops._held import Held
from fastpeft.ops.lora_linear import Projection, lora_linears
from fastpeft.plain import plain, scatter_adapters, without_dropout
from fastpeft.train.profile import measure

SHAPE = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 90}
PLANS = ("LoRA", "IA3", "PTv2", "Prefix", "LayerNorm", "LoRA+IA3", "Excitor", "Excitor+LoRA")


class Stored(Held):
    """A weight kept as it is, told how often it was formed."""

    def __init__(self, weight):
        self.weight, self.shape, self.formed = weight, weight.shape, 0

    def dense(self, dtype):
        self.formed += 1
        return self.weight.to(dtype, copy=True)


@pytest.mark.parametrize("wanted", ["x", "A", "B", "xAB", "bias"])
@pytest.mark.parametrize("p", [0.0, 0.5])
def test_an_op_forms_a_held_weight_twice_and_keeps_it_never(wanted, p):
    x, b = torch.randn(2, 5, 6, dtype=torch.float64), torch.randn(8, dtype=torch.float64)
    W, A, B = (torch.randn(shape, dtype=torch.float64) for shape in ((8, 6), (3, 6), (8, 3)))
    leaves = {"x": x, "A": A, "B": B, "b": b}
    for name in "xAB" if wanted == "xAB" else wanted[0]:
        leaves[name].requires_grad_()
    results, held = [], [Stored(W), Stored(W)]
    for first, second in ((W, W), held):
        torch.manual_seed(1)
        saved = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.shape) or t, lambda t: t):  # noqa: B023
            ys = lora_linears(x, [Projection(first, b, A, B, 0.7), Projection(second)], p)
            loss = sum(y.square().sum() for y in ys)
        results.append((loss.detach(), *torch.autograd.grad(loss, [t for t in leaves.values() if t.requires_grad])))
    assert (8, 6) not in saved
    for mine, theirs in zip(*results):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=0)
    assert [h.formed for h in held] == ([2, 2] if "x" in wanted else [1, 1])  # only dx is a product with the weight


def test_a_held_weight_must_fit():
    with pytest.raises(ValueError, match=r"do not fit; pass x \[..., in\]"):
        lora_linears(torch.ones(2, 5), [Projection(Stored(torch.ones(3, 4)))])
    with pytest.raises(TypeError, match=r"weight is torch\.float64"):
        lora_linears(torch.ones(2, 4), [Projection(torch.ones(3, 4, dtype=torch.float64))])


class StandIn(torch.Tensor):
    """A weight of int8 codes and a scale an output that says itself what it is in full, as torchao's are: for where torchao is not."""

    @staticmethod
    def __new__(cls, codes, scale, dtype):
        return torch.Tensor._make_wrapper_subclass(cls, codes.shape, dtype=dtype, device=codes.device)

    def __init__(self, codes, scale, dtype):
        self.codes, self.scale = codes, scale

    def __tensor_flatten__(self):
        return ["codes", "scale"], self.dtype

    def dequantize(self):
        return (self.codes * self.scale).to(self.dtype)

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        assert func.overloadpacket in (torch.ops.aten.detach, torch.ops.aten.clone), func  # ops may only take it written out
        mine = args[0]
        return cls(func(mine.codes), func(mine.scale), mine.dtype)


@pytest.fixture(autouse=True)
def torchao_or_its_stand_in(request, monkeypatch):
    if "standin" in request.node.name:
        monkeypatch.setitem(sys.modules, "torchao.utils", types.SimpleNamespace(TorchAOBaseTensor=StandIn))


def bnb_config(bits, **more):
    from transformers import BitsAndBytesConfig

    pytest.importorskip("bitsandbytes")
    four = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
    return BitsAndBytesConfig(load_in_4bit=True, **four | more) if bits == "4bit" else BitsAndBytesConfig(load_in_8bit=True)


def ao_config():
    quantization = pytest.importorskip("torchao.quantization")
    from transformers import TorchAoConfig

    return TorchAoConfig(quantization.Int8WeightOnlyConfig())


FORMATS = {
    "standin": lambda: None,
    "4bit": lambda: bnb_config("4bit"),
    "fp4": lambda: bnb_config("4bit", bnb_4bit_quant_type="fp4", bnb_4bit_use_double_quant=False),
    "8bit": lambda: bnb_config("8bit"),
    "torchao": ao_config,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A small LLaMA as transformers saves it."""
    torch.manual_seed(0)
    model, where = LlamaForCausalLM(LlamaConfig(**SHAPE, initializer_range=0.2)), tmp_path_factory.mktemp("llama")
    model.save_pretrained(where)
    return where


def loaded(folder, how, dtype=torch.float32):
    """As a user loads it."""
    if how == "standin":
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
        for layer in (m for n, m in model.named_modules() if isinstance(m, nn.Linear) and n != "lm_head"):
            scale = layer.weight.detach().float().abs().amax(1, keepdim=True) / 127
            codes = (layer.weight.detach() / scale).round().to(torch.int8)
            layer.weight = nn.Parameter(StandIn(codes, scale, dtype), requires_grad=False)
        return model
    return AutoModelForCausalLM.from_pretrained(folder, quantization_config=FORMATS[how](), dtype=dtype)


def batch():
    ids = torch.randint(0, SHAPE["vocab_size"], (3, 12), generator=torch.Generator().manual_seed(4))
    mask = torch.ones_like(ids)
    mask[1, 8:] = 0
    return {"input_ids": ids, "attention_mask": mask, "labels": torch.where((torch.arange(12) > 5) & mask.bool(), ids, -100)}


def logits_of(model):
    """At real tokens."""
    inputs = batch()
    with torch.no_grad():
        return model.eval()(**inputs).logits[inputs["attention_mask"].bool()]


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


@pytest.mark.parametrize("how", FORMATS)
def test_dequantised_weights_are_the_librarys(folder, how):
    model = loaded(folder, how)
    wanted = copy.deepcopy(model)
    if how in ("torchao", "standin"):
        wanted = {name: m.weight.dequantize() for name, m in wanted.named_modules() if is_held(m)}
    else:
        wanted = {name: m.weight for name, m in wanted.dequantize().named_modules() if type(m) is nn.Linear and name != "lm_head"}
    got = {name: weight_of(m).dense(torch.float32) for name, m in model.named_modules() if is_held(m)}
    assert got.keys() == wanted.keys()
    for name, weight in wanted.items():
        torch.testing.assert_close(got[name], weight.detach(), rtol=0, atol=0)
    dense = LlamaForCausalLM.from_pretrained(folder).model.layers[0].mlp.up_proj.weight
    error = (got["model.layers.0.mlp.up_proj"] - dense).abs().max() / dense.abs().max()
    assert 0 < error < (0.25 if how in ("4bit", "fp4") else 0.01)


@pytest.mark.parametrize("how", ["4bit", "8bit"])
def test_after_bitsandbytes_own_forward(folder, how):
    """Its first forward moves the scales of 8 bits, and on some CPUs lays 4 bits out anew, their maxima rounded to bfloat16."""
    model = loaded(folder, how).eval()
    before = dequantize(copy.deepcopy(model))
    logits_of(model)
    twin = dequantize(copy.deepcopy(model))
    torch.testing.assert_close(logits_of(twin), logits_of(before), rtol=0.2, atol=0.2)
    fp.optimize(model)
    torch.testing.assert_close(logits_of(model), logits_of(twin), rtol=1e-4, atol=1e-4)


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
    from fastpeft.train.estimate import _inputs

    model = fp.adapt(fp.build(name, quantize=how), plan)
    without_dropout(scatter_adapters(model))
    held = {n for n, m in model.named_modules() if is_held(m)}
    assert held and all(any(block in n for block in ("self_attn", "mlp")) for n in held)
    linears = {n for n, m in model.named_modules() if isinstance(m, nn.Linear) and any(b in n for b in ("self_attn", "mlp"))}
    assert held == linears
    told = fp.count(fp.adapt(fp.build(name, device="meta"), plan))
    assert fp.count(model) == told  # parameters are counted, not codes
    inputs = _inputs(model, 3, 24, 6, 1, False, torch.float32)
    inputs = {key: torch.randn_like(t) if t.is_floating_point() else t for key, t in inputs.items()}
    inputs["input_ids"] = torch.randint(3, 400, inputs["input_ids"].shape)
    if name.startswith("lavin"):
        inputs["image_index"][1], inputs["image_mask"][1] = -1, False
    twin = dequantize(copy.deepcopy(model))
    assert_same(gradients(model, inputs), gradients(twin, inputs), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("how", ["4bit", "8bit"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
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
    from fastpeft.train.recompute import fixed_bytes

    adapters = sum(p.nbytes for p in model.parameters() if p.requires_grad)
    rest = sum(t.nbytes for t in (*model.parameters(), *model.buffers()) if not is_quantized(t))
    assert fixed_bytes(model) == rest + sum(map(bytes_held, filter(is_held, model.modules()))) + 3 * adapters
    for module in model.modules():
        if hasattr(module, "recompute"):
            module.recompute = True
    assert_same(gradients(model, batch()), plain_step, rtol=1e-6)


def test_without_the_libraries_nothing_is_imported():
    assert "bitsandbytes" not in sys.modules or "bitsandbytes.nn" in sys.modules
    assert not is_quantized(torch.ones(2)) and not is_held(nn.Linear(2, 2))


def test_a_format_that_cannot_be_written_out_says_so(folder):
    utils = pytest.importorskip("torchao.utils")

    class Opaque(utils.TorchAOBaseTensor):
        """As torchao's CPU layout of int4."""

        tensor_data_names, tensor_attribute_names = ("codes",), ()

        def __new__(cls, codes):
            return torch.Tensor._make_wrapper_subclass(cls, codes.shape, dtype=torch.float32)

        def __init__(self, codes):
            self.codes = codes

    model = LlamaForCausalLM.from_pretrained(folder)
    model.model.layers[0].mlp.up_proj.weight = nn.Parameter(Opaque(torch.ones(128, 64, dtype=torch.int8)), requires_grad=False)
    report = fp.optimize(model)
    assert dict(report.skipped)["model.layers.0.mlp.up_proj"].startswith("torchao's Opaque cannot be written out")
    with pytest.raises(TypeError, match="Opaque cannot be written out"):
        weight_of(model.model.layers[0].mlp.up_proj)
