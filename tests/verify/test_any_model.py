"""fp.verify(model, batch): any model on a batch of the caller's."""

import pytest
import torch
import transformers as T
from torch import nn

import fastpeft as fp
from fastpeft import ops

pytestmark = pytest.mark.usefixtures("one_thread")
IDS = torch.randint(3, 60, (2, 9), generator=torch.Generator().manual_seed(0))
MASK = torch.ones_like(IDS)
MASK[1, 6:] = 0
TEXT = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "pad_token_id": 0}


def llama(**more):
    torch.manual_seed(0)
    return T.LlamaForCausalLM(T.LlamaConfig(**TEXT, initializer_range=0.2, attention_dropout=0.1, **more))


def bert():
    torch.manual_seed(0)
    return T.BertForSequenceClassification(T.BertConfig(**TEXT, initializer_range=0.2))


def vit():
    torch.manual_seed(0)
    shape = {name: TEXT[name] for name in ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")}
    return T.ViTForImageClassification(T.ViTConfig(**shape, image_size=16, patch_size=8))


BATCHES = {
    llama: {"input_ids": IDS, "attention_mask": MASK, "labels": IDS},
    bert: {"input_ids": IDS, "attention_mask": MASK, "labels": torch.tensor([0, 1])},
    vit: {"pixel_values": torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(1)), "labels": torch.tensor([0, 1])},
}


@pytest.mark.parametrize("make", BATCHES, ids=lambda make: make.__name__)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_equal_models_are_found_equal(make, dtype):
    model = make().to(dtype)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    result = fp.verify(model, BATCHES[make])
    assert result.ok, result.lines()
    assert {check.check for check in result.checks} == {"fused", "fused, lean logits"} and len(result.checks) == 6
    assert all(p.grad is None and torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_a_peft_model_and_one_that_is_fused_already():
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(llama(), peft.LoraConfig(target_modules=["q_proj", "down_proj"], init_lora_weights=False, lora_dropout=0.1))
    assert fp.verify(model, BATCHES[llama]).ok
    fp.optimize(model)
    result = fp.verify(model, BATCHES[llama])
    assert result.ok and all("lora" in check.worst for check in result.checks if check.quantity == "worst gradient")


def test_a_wrong_fused_form_is_found_and_its_gradient_named(monkeypatch):
    real = ops.rms_norm
    monkeypatch.setattr(ops, "rms_norm", lambda x, weight, eps: 1.01 * real(x, weight, eps))
    result = fp.verify(llama(), BATCHES[llama])
    assert not result.ok and "FAILED" in str(result)
    names = {name for name, _ in llama().named_parameters()}
    worst = [check.worst for check in result.checks if check.quantity == "worst gradient"]
    assert names.issuperset(worst) and all(f"FAILED {name}" in str(result) for name in worst)


def test_without_a_batch_it_is_the_families_own(monkeypatch):
    model = fp.adapt(fp.build("llama-tiny"), "LoRA")
    assert fp.verify(model, peft=False).ok


@pytest.mark.parametrize(
    "model, batch, message",
    [
        (llama, {"input_ids": IDS}, "gives no single loss"),
        (llama, [IDS], "the batch is a list"),
        (lambda: llama().requires_grad_(False), BATCHES[llama], "nothing of this model is trained"),
        (lambda: nn.Linear(2, 2), {"input": torch.ones(1, 2)}, "gives no single loss"),
    ],
)
def test_what_cannot_be_compared(model, batch, message):
    with pytest.raises(ValueError, match=message):
        fp.verify(model(), batch)


class Plain(nn.Module):
    """A model of nobody's: what it returns is ``out`` of its loss and outputs."""

    def __init__(self, out, noise=0.0):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.LayerNorm(16), nn.Dropout(0.2), nn.Linear(16, 1))
        self.unused = nn.Linear(2, 2)
        self.out, self.noise = out, noise

    def forward(self, views, scale):
        assert not any(view.requires_grad for view in views["all"])
        y = sum(self.body(view + self.noise * torch.randn_like(view)) for view in views["all"]) * scale["by"]
        return self.out(y.square().mean(), y)


VIEWS = {"views": {"all": [torch.randn(4, 8), torch.randn(4, 8, requires_grad=True)]}, "scale": {"by": torch.tensor(2.0)}}


@pytest.mark.parametrize("out", [lambda loss, y: loss, lambda loss, y: (loss, y), lambda loss, y: {"loss": loss, "y": y}])
def test_losses_and_batches_of_every_shape(out):
    """The loss alone, in a tuple, in a mapping; tensors in lists and mappings, cast with the model, their own gradients untouched."""
    result = fp.verify(Plain(out), VIEWS)
    assert result.ok, "\n".join(result.lines())
    assert VIEWS["views"]["all"][1].grad is None


def test_a_model_whose_truth_needs_another_kernel():
    """transformers' experts multiply in groups, and PyTorch has no such product in float64."""
    size = TEXT | {"num_local_experts": 4, "num_key_value_heads": 2}
    torch.manual_seed(0)
    model = T.MixtralForCausalLM(T.MixtralConfig(**size, initializer_range=0.2))
    result = fp.verify(model, BATCHES[llama])
    assert result.ok, "\n".join(result.lines())


def test_random_numbers_and_models_without_values():
    with pytest.raises(ValueError, match="loss is another at each call"):
        fp.verify(Plain(lambda loss, y: loss, noise=0.1), VIEWS)
    with pytest.raises(ValueError, match="on the meta device"):
        fp.verify(llama().to("meta"), BATCHES[llama])
    with pytest.raises(ValueError, match="gives no single loss"):
        fp.verify(Plain(lambda loss, y: (y, loss)), VIEWS)
