"""Any stack of decoder layers without its padding, against the same model as it was; and what keeps the padding."""

import copy
import threading

import pytest
import torch
import transformers as T
from tiny_models import DECODERS, OTHER_DECODERS, VISION_LANGUAGE, V, kinds, tiny
from torch import nn

import fastpeft as fp
from fastpeft.fused.attention.interface import reads_interface
from fastpeft.fused.code.state_reads import reads_labels_alone
from fastpeft.fused.head import any_head
from fastpeft.fused.head.any_head import output_head
from fastpeft.fused.stack import any_stack
from fastpeft.fused.stack.last_layer import at_rows
from fastpeft.fused.stack.layer_arguments import StackCall

UNPADDED = ["mistral", "qwen2", "qwen3", "gemma3-text", "phi3", "smollm3", "olmo2"]
UNPADDED += ["gpt2", "opt", "gpt-neox", "phi", "cohere"]
UNPADDED += ["stablelm", "nemotron", "persimmon", "ministral3", "deepseek-v2", "deepseek-v3", "minicpm3", "bart-decoder"]
UNPADDED += ["ernie-moe", "minimax-m2", "afmoe", "cohere2-moe", "hy-v3"]
UNPADDED += ["blip2", "llava-mistral", "llava-onevision", "paligemma2", "gemma3", "qwen2.5-vl", "qwen3-vl", "internvl"]
QUICK = ["stablelm", "deepseek-v3", "bart-decoder", "mistral", "gemma3-text", "phi3", "gpt2", "opt", "blip2", "paligemma2", "qwen3-vl"]


@pytest.fixture(autouse=True)
def double(monkeypatch):
    """transformers' losses, norms and rotary tables in float64 instead of float32."""
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
    softmax = torch.softmax
    monkeypatch.setattr(torch.nn.functional, "softmax", lambda x, dim, dtype=None: softmax(x, dim))


def stacks_and_attentions(module, name):
    """The head, the stack and attention: leaves stay transformers' own, whose norms are float32."""
    return isinstance(module, T.PreTrainedModel) or reads_interface(type(module))


def both(name="mistral", filter_fn=stacks_and_attentions):
    plain, batch = tiny(name)
    model = copy.deepcopy(plain)
    fp.optimize(model, filter_fn, lean_logits=True)
    return plain.train(), model.train(), batch


def read(given):
    """How many tokens the loss may read: those that are no padding, and padding on which the first of them is predicted."""
    return int(any_head._read_by_loss(given, given.get("attention_mask")).positions().sum())


@pytest.fixture
def tokens_seen(monkeypatch):
    """Tokens that each layer of a stack computed where it stood for real tokens."""
    seen, run = [], any_stack.OnTokens.run

    def watched(self, forward, hidden, *args, **kwargs):
        seen.append(hidden.shape[:2].numel())
        return run(self, forward, hidden, *args, **kwargs)

    monkeypatch.setattr(any_stack.OnTokens, "run", watched)
    return seen


def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def assert_same_step(plain, model, batch):
    want, got = plain(**batch), model(**batch)
    torch.testing.assert_close(got.loss, want.loss, rtol=1e-12, atol=1e-12)
    theirs, ours = gradients(plain, want.loss), gradients(model, got.loss)
    assert theirs.keys() == ours.keys()
    for name, grad in theirs.items():
        torch.testing.assert_close(
            ours[name], grad, rtol=1e-9, atol=1e-9 * (1 + float(grad.abs().max())), msg=lambda m, n=name: f"{n}: {m}"
        )
    return got


@pytest.mark.parametrize("name", [pytest.param(n, marks=() if n in QUICK else pytest.mark.slow) for n in UNPADDED])
def test_the_model_as_it_was(name, tokens_seen):
    plain, model, batch = both(name)
    for kind in kinds(name):
        given = batch(kind)
        assert_same_step(plain, model, given)
        padded = kind in ("padded", "left")
        decoder = any_head._decoder_of(model)
        cut = at_rows(type(any_stack.layers_of(decoder)[1][-1])) is not None
        at_labels = kind != "packed" and cut and reads_labels_alone(model, output_head(model), decoder)
        assert tokens_seen == ([read(given)] * 2 if padded or at_labels else []), kind
        tokens_seen.clear()
    assert not any({"layers", "h"} & module.__dict__.keys() for module in model.modules())


@pytest.mark.parametrize("name", ["llava", "idefics3"])
def test_llamas_own_driver_inside_others(name, monkeypatch):
    """A model with images, around LLaMA: its stack runs without padding too."""
    from fastpeft.fused.stack import llama as stack_llama

    plain, model, batch = both(name, lambda module, where: True)
    plans, run = [], stack_llama.run_layers
    monkeypatch.setattr(
        stack_llama, "run_layers", lambda layers, hidden, plan, **rest: (plans.append(plan), run(layers, hidden, plan, **rest))[1]
    )
    given = batch("padded")
    torch.testing.assert_close(model(**given).loss, plain(**given).loss, rtol=1e-6, atol=0)  # norms in float32 there, in float64 here
    assert [plan.tokens.tokens for plan in plans] == [read(given)]


@pytest.mark.parametrize("checkpointing", [{"use_reentrant": False}, {"use_reentrant": True}], ids=str)
def test_gradient_checkpointing(checkpointing, tokens_seen):
    plain, model, batch = both()
    for each in (plain, model):
        each.gradient_checkpointing_enable(checkpointing)
        each.enable_input_require_grads()
    given = batch("left")
    assert_same_step(plain, model, given)
    assert tokens_seen == [read(given)] * 2


def test_layers_that_run_again_by_their_own_forward_hand_nothing_on(tokens_seen):
    """StableLM's hand their attention no other arguments: under gradient checkpointing they get every token."""
    plain, model, batch = both("stablelm")
    for each in (plain, model):
        each.gradient_checkpointing_enable({"use_reentrant": False})
    assert_same_step(plain, model, batch("padded"))
    assert tokens_seen == []
    model.eval()  # nothing runs again; and nothing is left out
    assert_same_step(plain.eval(), model, batch("padded"))


def test_adapters_in_the_layers(tokens_seen):
    peft = pytest.importorskip("peft")
    base, batch = tiny("qwen3")
    plain = peft.get_peft_model(base, peft.LoraConfig(r=2, target_modules="all-linear")).double().train()
    for name, p in plain.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(p)
    model = copy.deepcopy(plain)
    fp.optimize(model, lambda module, name: stacks_and_attentions(module, name) or hasattr(module, "lora_A"), lean_logits=True)
    given = batch("padded")
    assert_same_step(plain, model, given)
    assert tokens_seen == [read(given)] * 2


class Doubled(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return self.inner(x) + x.mean(1, keepdim=True)


KEEPS = [
    "hook", "hidden states", "cache", "labels on padding", "4-D mask", "module of one's own", "not lean", "evaluation",
    "attention of one's own",
    "hardly any padding", "eager, and read on padding",
]  # fmt: skip


@pytest.mark.parametrize("why", KEEPS)
def test_what_keeps_the_padding(why, tokens_seen):
    plain, model, batch = both()
    given, shapes = batch("padded"), []
    if why == "hook":
        for each in (plain, model):
            each.model.layers[1].mlp.register_forward_hook(lambda module, args, output: shapes.append(tuple(output.shape)))
    elif why == "hidden states":
        given["output_hidden_states"] = True
    elif why == "cache":
        given["use_cache"] = True
    elif why == "labels on padding":
        given["labels"] = given["input_ids"].clone()
    elif why == "4-D mask":
        keys = given["attention_mask"][:, None, None].bool()
        given["attention_mask"] = keys & torch.ones(12, 12, dtype=torch.bool).tril()
    elif why == "module of one's own":
        for each in (plain, model):
            each.model.layers[0].mlp = Doubled(each.model.layers[0].mlp)
    elif why == "not lean":
        fp.optimize(model, stacks_and_attentions, lean_logits=False)
    elif why == "evaluation":
        model.eval()
    elif why == "attention of one's own":
        fp.restore(model.model.layers[1].self_attn)
    elif why == "eager, and read on padding":
        given = batch("left")
        for each in (plain, model):
            each.set_attn_implementation("eager")
    else:
        given["attention_mask"] = torch.ones_like(given["attention_mask"])
        given["attention_mask"][2, -1] = 0
        given["labels"] = given["input_ids"].clone()
        given["labels"][2, -1] = -100
    got = assert_same_step(plain, model, given)
    assert not tokens_seen and all(shape == (3, 12, 32) for shape in shapes)
    if why == "cache":
        assert got.past_key_values.get_seq_length() == 12
    if why == "hidden states":
        torch.testing.assert_close(got.hidden_states, plain(**given).hidden_states, rtol=1e-12, atol=1e-12)


def test_holes_and_positions(tokens_seen):
    """A mask with holes, and positions of one's own, with gaps: which tokens see which, and where they stand, is as it was."""
    plain, model, batch = both()
    given = batch("padded")
    given["attention_mask"][0, 3] = given["attention_mask"][1, 5:7] = 0
    given["labels"] = given["labels"].masked_fill(given["attention_mask"] == 0, -100)
    given["labels"][:, 1:] = given["labels"][:, 1:].masked_fill(given["attention_mask"][:, :-1] == 0, -100)
    given["position_ids"] = torch.arange(12)[None] * 3 + torch.tensor([[0], [5], [9]])
    assert_same_step(plain, model, given)
    assert tokens_seen == [read(given)] * 2


@pytest.mark.parametrize("kind", ["full", "padded", "left"])
@pytest.mark.parametrize("name", ["mistral", "gemma3-text", "gpt2", "opt", "paligemma2"])
def test_tokens_behind_the_last_label(name, kind, tokens_seen):
    """No token attends to a later one: what is behind the last label is computed for nobody, with a mask or without."""
    plain, model, batch = both(name)
    given = batch(kind)
    last = given["labels"].shape[1] - torch.tensor([[0], [3], [6]])
    given["labels"][torch.arange(given["labels"].shape[1]) >= last] = -100
    if kind == "full":
        given.pop("attention_mask", None)
    assert_same_step(plain, model, given)
    cut = any_head._read_by_loss(given, given.get("attention_mask"))._replace(alone=True).positions(causal=True)
    assert tokens_seen == [int(cut.sum())] * 2 and tokens_seen[0] < read(given)


def test_labels_of_one_sample_alone(tokens_seen):
    plain, model, batch = both()
    given = batch("full")
    given["labels"][1:] = -100
    assert_same_step(plain, model, given)
    assert tokens_seen == [12] * 2


def test_a_sample_without_tokens(tokens_seen):
    plain, model, batch = both()
    given = batch("left")
    given["attention_mask"][1] = 0
    given["labels"][1] = -100
    assert_same_step(plain, model, given)
    assert tokens_seen == [read(given)] * 2


def test_other_threads_get_layers():
    """A thread that evaluates the same model while this one trains."""
    _, model, batch = both()
    given, results = batch("padded"), {}
    stack = model.model
    want = stack(given["input_ids"], attention_mask=given["attention_mask"]).last_hidden_state
    layout = any_stack.self_layout((3, 12), given["attention_mask"].bool(), torch.device("cpu"))

    def evaluate():
        results["other"] = stack(given["input_ids"], attention_mask=given["attention_mask"]).last_hidden_state

    with any_stack._on_tokens(stack, layout, any_stack.Read(given["attention_mask"], given["labels"] != -100)):
        thread = threading.Thread(target=evaluate)
        thread.start()
        thread.join()
    torch.testing.assert_close(results["other"], want, rtol=0, atol=0)


def test_what_a_layer_may_be_told():
    """An argument of no known kind: the layers see the padded batch."""
    given = tiny("mistral")[1]("padded")
    layout = any_stack.self_layout((3, 12), given["attention_mask"].bool(), torch.device("cpu"))
    call = StackCall(layout)
    table, ids = torch.randn(1, 12, 8), torch.arange(36).view(3, 12)
    args, named = call.arguments(
        ["past_key_values"], (None,), {"position_embeddings": (table, table), "position_ids": ids, "use_cache": False}
    )
    assert args == (None,) and named["position_embeddings"][0] is named["position_embeddings"][1] and not named["use_cache"]
    assert named["position_ids"][0].tolist() == ids[given["attention_mask"].bool()].tolist()
    torch.testing.assert_close(named["position_embeddings"][0][0], table.expand(3, -1, -1)[given["attention_mask"].bool()])
    for bad in ({"per_layer_input": torch.zeros(3, 12, 4)}, {"position_ids": torch.zeros(3, 3, 12)}, {"position_embeddings": table[0]}):
        assert call.arguments([], (), bad) is None


def test_differentiated_behind_pytorchs_functions():
    """An autograd Function gets unpadded states as if they were padded."""

    class Square(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x)
            return x * x

        @staticmethod
        def backward(ctx, grad):
            return 2 * grad * ctx.saved_tensors[0]

    mask = torch.tensor([[1, 1, 0], [1, 0, 0]]).bool()
    layout = any_stack.self_layout((2, 3), mask, torch.device("cpu"))
    tokens = torch.randn(1, 3, 4, dtype=torch.float64, requires_grad=True)
    outputs = [Square.apply(x).sum(-1).square().sum() for x in (any_stack._Flat.of(tokens, layout), layout.pad(tokens))]
    torch.testing.assert_close(*outputs)
    torch.testing.assert_close(*(torch.autograd.grad(x, tokens)[0] for x in outputs), rtol=1e-12, atol=0)


@pytest.mark.parametrize("pack", [lambda tensor: tensor, torch.clone], ids=["kept as it is", "copied"])
@pytest.mark.parametrize("name", QUICK)
def test_hooks_on_saved_tensors(name, pack, tokens_seen):
    """Hooks may count what backward keeps, or move it away: the same gradients."""
    model, batch = tiny(name)
    fp.optimize(model.train(), lean_logits=True)
    given = batch("padded")
    wanted = gradients(model, model(**given).loss)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda kept: kept):
        got = gradients(model, model(**given).loss)
    assert tokens_seen and got.keys() == wanted.keys()
    for name, grad in got.items():
        torch.testing.assert_close(grad, wanted[name], rtol=0, atol=0)


def test_an_encoders_mask_is_not_the_decoders(tokens_seen):
    """BART, whose texts and answers are of one length: each stack has a mask of its own."""
    sizes = {"encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 4, "decoder_attention_heads": 4, "vocab_size": V}
    config = T.BartConfig(
        **sizes, d_model=32, encoder_ffn_dim=48, decoder_ffn_dim=48, dropout=0.0, pad_token_id=0, decoder_start_token_id=2
    )
    torch.manual_seed(0)
    plain = T.BartForConditionalGeneration(config).double().train()
    model = copy.deepcopy(plain)
    fp.optimize(model, stacks_and_attentions, lean_logits=True)
    _, batch = tiny("mistral")
    given = batch("padded")
    mask = torch.ones_like(given["attention_mask"])
    given["labels"][:, 10:] = -100
    for decoder_mask in (None, mask, given["attention_mask"].flip(0)):
        assert_same_step(plain, model, given | {"decoder_attention_mask": decoder_mask})
    assert tokens_seen == [28, 10 + 9 + 7] * 3


def test_every_name_is_a_model():
    assert set(UNPADDED) <= {*DECODERS, *OTHER_DECODERS, *VISION_LANGUAGE} and V == 99
