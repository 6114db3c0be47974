"""PEFT's layers on our operators: the same numbers, and PEFT's own way wherever PEFT does more."""

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import fastpeft as fp
from fastpeft.cost.profile import measure

peft = pytest.importorskip("peft")
SHAPE = {"hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 50}


class Two(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(12, 20), nn.Linear(20, 8, bias=False)

    def forward(self, x):
        return self.b(self.a(x).tanh())


def wrapped(config, cls=Two, **more):
    torch.manual_seed(0)
    model = peft.get_peft_model(cls(**more), config).double()
    for p in model.parameters():
        if p.requires_grad:
            p.data += 0.3 * torch.randn_like(p)
    return model


def step(model, x):
    model.zero_grad()
    y = model(x)
    y.square().sum().backward()
    return y.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same(mine, theirs):
    torch.testing.assert_close(mine[0], theirs[0], rtol=1e-12, atol=1e-12)
    assert mine[1].keys() == theirs[1].keys()
    for name in mine[1]:
        torch.testing.assert_close(mine[1][name], theirs[1][name], rtol=1e-10, atol=1e-12, msg=lambda m, name=name: f"{name}: {m}")


CONFIGS = {
    "LoRA": lambda: peft.LoraConfig(r=3, lora_alpha=5, target_modules=["a", "b"]),
    "rsLoRA": lambda: peft.LoraConfig(r=3, use_rslora=True, target_modules=["a"]),
    "DoRA": lambda: peft.LoraConfig(r=3, use_dora=True, target_modules=["a", "b"]),
    "LoRA with a bias": lambda: peft.LoraConfig(r=3, lora_bias=True, target_modules=["a"]),
    "IA3": lambda: peft.IA3Config(target_modules=["a", "b"], feedforward_modules=["b"]),
}


@pytest.mark.parametrize("kind", CONFIGS)
def test_values_and_gradients(kind):
    model, x = wrapped(CONFIGS[kind]()), torch.randn(5, 12, dtype=torch.float64)
    want, report = step(model, x), None
    report = fp.optimize(model)
    layer, theirs = model.base_model.model.a, {"IA3": peft.tuners.ia3.Linear}.get(kind, peft.tuners.lora.Linear)
    assert ("base_model.model.a" in dict(report.swapped)) == (type(layer) is not theirs) == (kind not in ("DoRA", "LoRA with a bias"))
    assert_same(step(model, x), want)
    fp.restore(model)
    assert type(layer) is theirs


@pytest.mark.parametrize("kind", ["LoRA", "IA3"])
def test_what_peft_can_switch_stays_switchable(kind, tmp_path):
    model, x = wrapped(CONFIGS[kind]()), torch.randn(5, 12, dtype=torch.float64)
    plain, adapted = Two().double(), model(x)
    plain.load_state_dict(
        {n.replace("base_model.model.", "").replace("base_layer.", ""): p for n, p in model.state_dict().items()}, strict=False
    )
    fp.optimize(model)
    with model.disable_adapter():
        torch.testing.assert_close(model(x), plain(x))
    model.merge_adapter()
    torch.testing.assert_close(model(x), adapted)
    model.unmerge_adapter()
    torch.testing.assert_close(model(x), adapted)
    model.add_adapter("other", CONFIGS[kind]())
    model.set_adapter("other")
    want = model(x)
    fp.restore(model)
    torch.testing.assert_close(want, model(x))
    fp.optimize(model)
    model.set_adapter("default")
    model.save_pretrained(tmp_path)
    torch.manual_seed(0)
    again = peft.PeftModel.from_pretrained(Two().double(), tmp_path)
    fp.optimize(again)
    torch.testing.assert_close(again(x), adapted)
    torch.testing.assert_close(model.merge_and_unload()(x), adapted)


def test_dropout_falls_in_training_only():
    model, x = wrapped(peft.LoraConfig(r=3, lora_dropout=0.5, target_modules=["a"])), torch.randn(5, 12, dtype=torch.float64)
    want = model.eval()(x)
    fp.optimize(model)
    assert torch.equal(model(x), model(x))
    torch.testing.assert_close(model(x), want)
    torch.manual_seed(1)
    mean = torch.stack([model.train().base_model.model.a(x) for _ in range(4000)]).mean(0)
    torch.testing.assert_close(mean, model.eval().base_model.model.a(x), rtol=0, atol=0.2)
    assert not torch.equal(model.train()(x), model(x))


def llama(method):
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SHAPE, initializer_range=0.2)).double()
    config = {
        "LoRA": lambda: peft.LoraConfig(task_type="CAUSAL_LM", r=3, target_modules=["q_proj", "v_proj", "down_proj"]),
        "IA3": lambda: peft.IA3Config(
            task_type="CAUSAL_LM", target_modules=["k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"]
        ),
        "PTv2": lambda: peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4),
        "adaption prompt": lambda: peft.AdaptionPromptConfig(task_type="CAUSAL_LM", adapter_len=4, adapter_layers=1),
    }[method]()
    model = peft.get_peft_model(model, config).double()
    for p in model.parameters():
        if p.requires_grad:
            p.data += 0.1 * torch.randn_like(p)
    return model


@pytest.mark.parametrize("method", ["LoRA", "IA3", "PTv2", "adaption prompt"])
def test_a_peft_llama_trains_the_same_and_keeps_less(method):
    """transformers' norms and loss are in float32: no more than that can be asked for. It already runs on SDPA here."""
    model, ids = llama(method).train(), torch.randint(3, 50, (3, 9))
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": torch.where(torch.arange(9) > 4, ids, -100)}
    results = []
    for fused in (False, True):
        if fused:
            report = fp.optimize(model)
            assert dict(report.swapped)["base_model" if method == "PTv2" else "base_model.model"] == "LlamaForCausalLM"
        model.zero_grad()
        with measure(model) as cost:
            loss = model(**batch).loss
            loss.backward()
        results.append((loss.detach().double(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}, cost))
    (want, wanted, before), (loss, gradients, after) = results
    torch.testing.assert_close(loss, want, rtol=1e-5, atol=0)
    assert gradients.keys() == wanted.keys() and gradients
    for name in wanted:
        torch.testing.assert_close(gradients[name], wanted[name], rtol=1e-4, atol=1e-5, msg=lambda m, name=name: f"{name}: {m}")
    assert after.saved_bytes < 0.95 * before.saved_bytes and after.flops < before.flops
    prompt = {"input_ids": ids[:, :4], "attention_mask": torch.ones_like(ids[:, :4]), "max_new_tokens": 5, "pad_token_id": 0}
    mine = model.eval().generate(**prompt, eos_token_id=None)
    fp.restore(model)
    assert torch.equal(mine, model.generate(**prompt, eos_token_id=None))


@pytest.mark.parametrize("padded", [False, True])
def test_an_adapter_for_each_sample(padded):
    """PEFT hands ``adapter_names`` to its layers by hooks: attention and feed-forward must call them then."""
    config = {"r": 3, "target_modules": ["q_proj", "v_proj", "down_proj"], "init_lora_weights": False}
    model = wrapped(peft.LoraConfig(**config), lambda: LlamaForCausalLM(LlamaConfig(**SHAPE)))
    model.add_adapter("other", peft.LoraConfig(**config))
    model.double().eval()
    ids, names = torch.randint(3, 50, (3, 7)), ["default", "other", "__base__"]
    mask = torch.ones_like(ids)
    mask[1, 5:] = 1 - padded
    want = model(input_ids=ids, attention_mask=mask, adapter_names=names).logits
    fp.optimize(model)
    got = model(input_ids=ids, attention_mask=mask, adapter_names=names).logits
    torch.testing.assert_close(got[mask.bool()], want[mask.bool()], rtol=1e-6, atol=1e-6)  # LlamaRMSNorm's own statistics are float32
