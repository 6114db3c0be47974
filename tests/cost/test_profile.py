"""FLOPs and saved bytes against formulas worked out by hand, by part."""

import subprocess
import sys

import pytest
import torch
from tiny_models import tiny
from torch import nn

import fastpeft as fp
from fastpeft.cost.profile import measure, memory_bytes, peak_memory_bytes
from fastpeft.device import to_device
from fastpeft.evaluate.answers import MODEL_INPUTS

pytestmark = pytest.mark.usefixtures("one_thread")

B, M, L, C, P, LAYERS = 3, 7, 5, 32, 16, 2  # questions, their tokens, answers' tokens, width, patches, layers of each stack
S, PIXELS, VOCABULARY = P + 1, 3 * 8 * 8, 64


def linear(rows: int, into: int, out: int) -> int:
    return 2 * rows * into * out


def attention(queries: int, keys: int) -> int:
    return 4 * queries * keys * C


def vision_layer() -> int:
    return linear(S, C, 3 * C) + attention(S, S) + linear(S, C, C) + 2 * linear(S, C, 4 * C)


def text_layer(tokens: int, context: int) -> int:
    own = 4 * linear(tokens, C, C) + attention(tokens, tokens)
    cross = 2 * linear(tokens, C, C) + 2 * linear(context, C, C) + attention(tokens, context)
    return own + cross + 2 * linear(tokens, C, 4 * C)


def batch(miss):
    return miss.batch(B, dtype=torch.float32)


def run(model, inputs):
    with measure(model) as cost:
        model(**inputs).loss.backward()
    return cost


def test_a_multilayer_perceptron():
    """Saved: both linears' inputs, and what GELU takes; the loss of a sum keeps nothing. The first input needs no gradient."""
    model = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 4))
    with measure(model) as cost:
        model(torch.randn(10, 8)).sum().backward()
    forward = linear(10, 8, 16) + linear(10, 16, 4)
    assert cost.flops == forward + linear(10, 8, 16) + 2 * linear(10, 16, 4)
    assert cost.saved_bytes == 4 * 10 * (8 + 16 + 16)
    assert cost.flops_by_part == {"backward": cost.flops} and cost.saved_by_part == {"other": cost.saved_bytes}


def test_one_storage_counts_once_and_parameters_never():
    weight = nn.Parameter(torch.randn(6, 6))
    x = torch.randn(4, 6, requires_grad=True)
    model = nn.Module()
    model.weight = weight
    with measure(model) as cost:
        y = x @ weight  # keeps x; the weight is held anyway
        (y * y + y.view(24).view(4, 6) * x).sum().backward()  # keeps y, as two views and one factor, and x again
    assert cost.saved_bytes == 4 * (x.numel() + y.numel())


def test_attention_counts_on_this_device():
    """PyTorch's counter leaves out attention on CPU; five products backward, the scores' once more among them."""
    q, k, v = (torch.randn(2, 4, n, 8, requires_grad=True) for n in (6, 10, 10))
    with measure(nn.Module()) as cost:
        fp.ops.attention(q, k, v).sum().backward()
    assert cost.flops == (2 + 5) * 2 * (2 * 4 * 6 * 10 * 8)


def test_full_training_by_hand(miss):
    """transformers' own modules, every layer's products written out; twice the forward's backward, but where no gradient is due."""
    model = miss.plain(miss.without_dropout(miss.build("T/T/T", dtype=torch.float32)))
    cost = run(model, batch(miss))
    patches = linear(P, PIXELS, C)
    parts = {
        "vit": B * (patches + LAYERS * vision_layer()),
        "jtm": B * LAYERS * text_layer(M, S),
        "dec": B * (LAYERS * text_layer(L, M) + linear(L, C, C) + linear(L, C, VOCABULARY)),
    }
    assert {name: cost.flops_by_part[name] for name in parts} == parts
    assert cost.flops_by_part["backward"] == 2 * sum(parts.values()) - B * patches  # pixels get no gradient


def test_a_frozen_image_encoder_by_hand(miss):
    """F/LoRA/LoRA: the image encoder's forward is all it costs, nothing in it is kept, and nothing goes back through it."""
    inputs = batch(miss)
    costs = {plan: run(miss.without_dropout(miss.build(plan, dtype=torch.float32)), inputs) for plan in ("F/LoRA/LoRA", "T/T/T")}
    lean, full = costs["F/LoRA/LoRA"], costs["T/T/T"]
    assert lean.flops_by_part["vit"] == B * (linear(P, PIXELS, C) + LAYERS * vision_layer())
    assert "vit" not in lean.saved_by_part and full.saved_by_part["vit"] > 0
    assert lean.flops_by_part["backward"] < full.flops_by_part["backward"] - 2 * B * LAYERS * vision_layer()
    assert lean.saved_bytes < 0.6 * full.saved_bytes
    for cost in costs.values():
        assert sum(cost.flops_by_part.values()) == cost.flops
        assert sum(cost.saved_by_part.values()) == cost.saved_bytes


def test_measuring_changes_nothing(miss):
    model, inputs = miss.without_dropout(miss.build("LoRA/LoRA/LoRA", dtype=torch.float32)), batch(miss)
    want = miss.step(model, inputs)
    with measure(model):
        got = miss.step(model, inputs)
    assert got[0] == want[0] and all(torch.equal(got[1][name], grad) for name, grad in want[1].items())
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_measuring_frees_what_autograd_frees():
    """A chain of layers keeps its activations; halfway through backward half of them are gone, measured or not."""
    alive = []

    class Probe(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            y = x.clone()
            ctx.save_for_backward(y)
            alive.append(torch.multiprocessing.reductions.StorageWeakRef(y.untyped_storage()))
            return y

        @staticmethod
        def backward(ctx, grad):
            left.append(sum(not ref.expired() for ref in alive))
            return grad

    left = []
    with measure(nn.Module()) as cost:
        x = torch.randn(100, requires_grad=True)
        y = x
        for _ in range(6):
            y = Probe.apply(y)
        loss = y.sum()
        del y
        loss.backward()
    assert cost.saved_bytes == 6 * 400 and left[-1] <= 2


@pytest.mark.parametrize("name", ["mistral", "gemma3-text"])
def test_what_is_computed_when_read_is_not_read(name):
    """A profile asks nothing of logits and padding that the step leaves out: labels that are left out take their products along."""
    model, batch = tiny(name)
    model = model.float().train().requires_grad_(False)
    model.model.layers[0].self_attn.q_proj.weight.requires_grad_(True)
    fp.optimize(model, lean_logits=True)
    given = batch("padded")
    labels = given["labels"].masked_fill(given["attention_mask"] == 0, -100)
    fewer = labels.clone()
    row, column = (labels != -100).nonzero()[0]  # behind a sample's last one nothing is computed
    fewer[row, column] = -100
    more, less = (run(model, given | {"labels": labels}) for labels in (labels, fewer))
    into, out = model.config.hidden_size, model.config.vocab_size
    inner = model.config.intermediate_size
    last = 2 * (2 * linear(1, into, inner) + linear(1, inner, into))  # the feed-forward layer behind the last attention, and its dx
    assert more.flops - less.flops == 2 * linear(1, into, out) + last  # its logits, and what they hand back
    real = int(given["attention_mask"].sum())
    assert real < given["attention_mask"].numel()
    full = run(model, {"input_ids": given["input_ids"], "labels": given["input_ids"]})
    left_out = given["attention_mask"].numel() - real
    layer = sum(p.numel() for layer in model.model.layers for p in layer.parameters() if p.dim() == 2)
    assert full.flops - more.flops >= 2 * left_out * layer


@pytest.mark.slow
def test_peak_is_of_this_process_alone():
    """A small process started by a large one: its peak is its own, though the kernel's ru_maxrss would say otherwise."""
    big = torch.ones(100_000_000)
    device = torch.device("cpu")
    assert peak_memory_bytes(device) >= memory_bytes(device) > big.nbytes
    code = "import torch; from fastpeft.cost import profile; print(profile.peak_memory_bytes(torch.device('cpu')))"
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(said.stdout) < 0.9 * memory_bytes(device)


@pytest.mark.gpu
def test_flops_are_the_same_on_cuda(miss):
    def total(device):
        model = miss.without_dropout(miss.build("F/LoRA/LoRA", dtype=torch.float32)).to(device)
        return run(model, to_device(batch(miss), (*MODEL_INPUTS, "labels"), torch.device(device), torch.float32, model)).flops

    assert total("cuda") == total("cpu")


def test_products_of_experts_are_counted():
    """Forward, and backward for the input and for the weights of the experts."""
    x, weight = torch.randn(12, 16, requires_grad=True), torch.randn(3, 16, 32, requires_grad=True)
    with measure(nn.Linear(1, 1)) as cost:
        y = torch.nn.functional.grouped_mm(x, weight, offs=torch.tensor([4, 4, 12], dtype=torch.int32))
        y.backward(torch.randn_like(y))
    assert cost.flops == 3 * 2 * 12 * 16 * 32
