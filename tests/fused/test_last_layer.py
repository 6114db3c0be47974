"""The last layer of any stack at labelled positions only: the model's own losses and gradients, and what keeps every token."""

from __future__ import annotations

import copy

import pytest
import torch
import transformers as T
from double import assert_same, step
from tiny_models import tiny
from torch import nn

import fastpeft as fp
from fastpeft.fused.code import state_reads
from fastpeft.fused.layout import LastLayout
from fastpeft.fused.stack import any_stack, last_layer

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def computed(monkeypatch):
    """Of each step whose last layer leaves tokens out, how many it computes behind its attention."""
    seen, of = [], LastLayout.of

    def counted(layout, wanted, device):
        if (made := of(layout, wanted, device)) is not None:
            seen.append(len(made.read))
        return made

    monkeypatch.setattr(LastLayout, "of", counted)
    return seen


def few_labels(batch):
    """The same with labels on the last two tokens of each row that have one, and a mask, as collators give it."""
    labels = batch["labels"].clone()
    for row in labels:
        row[(row != -100).nonzero().squeeze(1)[:-2]] = -100
    mask = batch.get("attention_mask", torch.ones_like(batch["input_ids"]))
    return batch | {"labels": labels, "attention_mask": mask}


# pre-norm; four norms; norms behind; parallel with two norms, with one, with a bias each; GPT-2's and OPT's; a factor on each residual;
# experts; images, with features added behind layers, and seen from both sides
NAMES = ["mistral", "phi3", "gemma3-text", "olmo2", "gpt-neox", "cohere", "phi", "gpt2", "opt", "granite-moe", "qwen3-moe", "gpt-oss"]
NAMES += ["llava-mistral", "qwen2.5-vl", "qwen3-vl", "gemma3", "internvl"]


QUICK = ["mistral", "gemma3-text", "olmo2", "gpt-neox", "gpt2", "opt", "qwen3-moe", "qwen3-vl"]


@pytest.mark.parametrize("name", [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in NAMES])
def test_the_model_as_it_was(name, computed):
    plain, batch = tiny(name)
    model = copy.deepcopy(plain.train())
    fp.optimize(model, lean_logits=True)
    for kind in ("full", "left"):
        given = few_labels(batch(kind))
        assert_same(step(model, given), step(plain, given))
        labelled = given["labels"] != -100
        assert computed == [int((labelled | labelled.roll(-1, 1)).sum())], kind  # those, and the tokens that predict them
        computed.clear()


def test_llama_inside_others(monkeypatch):
    """Its own driver, told by the model around it."""
    from fastpeft.fused.stack import driver as stack

    plain, batch = tiny("llava")
    model, seen, queries_at = copy.deepcopy(plain.train()), [], stack.queries_at
    fp.optimize(model, lean_logits=True)
    monkeypatch.setattr(stack, "queries_at", lambda *args: (seen.append(args[1]), queries_at(*args))[1])
    given = few_labels(batch("padded"))
    assert_same(step(model, given), step(plain, given))
    labelled = given["labels"] != -100
    assert len(seen) == 1 and torch.equal(seen[0], labelled | labelled.roll(-1, 1))


def test_adapters(computed):
    peft = pytest.importorskip("peft")
    plain, batch = tiny("qwen3")
    plain = peft.get_peft_model(plain, peft.LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False)).double().train()
    model = copy.deepcopy(plain)
    fp.optimize(model, lean_logits=True)
    given = few_labels(batch("left"))
    assert_same(step(model, given), step(plain, given))
    assert computed


KEEPS = ["hidden states", "another loss", "a hook", "not lean", "positions and no mask", "evaluation", "wholly labelled"]


@pytest.mark.parametrize("why", KEEPS)
def test_what_keeps_every_token(why, computed):
    plain, batch = tiny("mistral")
    model = copy.deepcopy(plain.train())
    fp.optimize(model, lean_logits=why != "not lean")
    given, heard = few_labels(batch("full")), []
    for each in (plain, model):
        if why == "another loss":
            each.loss_function = T.loss.loss_utils.ForMaskedLMLoss
        if why == "a hook":
            each.model.layers[-1].mlp.register_forward_hook(lambda module, args, output: heard.append(output.shape[:2].numel()))
    given |= {"output_hidden_states": True} if why == "hidden states" else {}
    if why == "positions and no mask":  # they may mark packed samples
        given |= {"attention_mask": None, "position_ids": torch.arange(12).expand(3, -1)}
    if why == "wholly labelled":
        given["labels"] = given["input_ids"]
    if why == "evaluation":
        plain.eval(), model.eval()
    mine, theirs = step(model, given), step(plain, given)
    assert_same(mine, theirs)
    assert not computed and all(n == given["input_ids"].numel() for n in heard)
    if why == "hidden states":
        torch.testing.assert_close(mine[0].hidden_states, theirs[0].hidden_states, rtol=1e-9, atol=1e-11)


def test_gradient_checkpointing_keeps_every_token(computed):
    plain, batch = tiny("mistral", torch.float32)
    model = copy.deepcopy(plain.train())
    fp.optimize(model, lean_logits=True)
    given = few_labels(batch("padded"))
    losses = []
    for each in (plain, model):
        each.gradient_checkpointing_enable({"use_reentrant": False})
        losses.append(each(**given).loss)
        losses[-1].backward()
    assert not computed
    torch.testing.assert_close(losses[1], losses[0])
    torch.testing.assert_close(model.model.layers[0].mlp.up_proj.weight.grad, plain.model.layers[0].mlp.up_proj.weight.grad)


class Head(nn.Module):
    """One that does nothing else with a last hidden state."""

    def forward(self, input_ids, labels=None, logits_to_keep=0, **kwargs):
        outputs = self.model(input_ids, **kwargs)
        hidden_states = outputs.last_hidden_state
        logits = self.lm_head(hidden_states[:, -logits_to_keep:, :])
        return self.loss_function(logits, labels), logits, outputs.hidden_states


class ReadsItTwice(Head):
    def forward(self, input_ids, labels=None, **kwargs):
        outputs = self.model(input_ids, **kwargs)
        hidden_states = outputs.last_hidden_state
        return self.lm_head(hidden_states), hidden_states.mean()


class TwoHeads(Head):
    def forward(self, input_ids, labels=None, **kwargs):
        outputs = self.model(input_ids, **kwargs)
        return self.lm_head(outputs[0]), self.value_head(outputs[0])


class HandsAllOn(Head):
    def forward(self, input_ids, labels=None, **kwargs):
        outputs = self.model(input_ids, **kwargs)
        return self.lm_head(outputs[0]), outputs


Output = T.modeling_outputs.BaseModelOutput


class Between(nn.Module):
    def forward(self, input_ids, **kwargs):
        outputs = self.language_model(input_ids, **kwargs)
        return Output(last_hidden_state=outputs.last_hidden_state, hidden_states=outputs.hidden_states)


class BetweenThatReads(nn.Module):
    def forward(self, input_ids, **kwargs):
        outputs = self.language_model(input_ids, **kwargs)
        return Output(last_hidden_state=outputs.last_hidden_state, pooled=outputs.last_hidden_state.mean(1))


class Stack(nn.Module):
    def forward(self, hidden, **kwargs):
        for layer in self.layers:
            hidden = layer(hidden, **kwargs)
        hidden = self.norm(hidden)
        return hidden


class StackThatMixes(Stack):
    def forward(self, hidden, **kwargs):
        for layer in self.layers:
            hidden = layer(hidden, **kwargs)
        hidden = hidden - hidden.mean(1, keepdim=True)
        return self.norm(hidden)


class StackThatMixesBehindItsNorm(Stack):
    def forward(self, hidden, **kwargs):
        for layer in self.layers:
            hidden = layer(hidden, **kwargs)
        normed = self.norm(hidden)
        return normed - normed.mean(1, keepdim=True)


class Layer(nn.Module):
    def forward(self, hidden, attention_mask=None, **kwargs):
        attended, _ = self.attention(self.norm(hidden), attention_mask=attention_mask, **kwargs)
        hidden = hidden + attended
        return hidden + self.mlp(hidden)


class LayerWithAShape(Layer):
    def forward(self, hidden, attention_mask=None, **kwargs):
        shape = hidden.shape
        attended, _ = self.attention(self.norm(hidden), attention_mask=attention_mask, **kwargs)
        return (hidden + attended).view(shape)


class LayerOfTwoAttentions(Layer):
    def forward(self, hidden, attention_mask=None, **kwargs):
        attended, _ = self.attention(self.norm(hidden), attention_mask=attention_mask, **kwargs)
        more, _ = self.attention(attended, attention_mask=attention_mask, **kwargs)
        return hidden + more


def test_what_is_found_in_code():
    assert state_reads.read_by_head(Head) == ("model", "lm_head")
    assert [state_reads.read_by_head(cls) for cls in (ReadsItTwice, TwoHeads, HandsAllOn)] == [None] * 3
    assert [state_reads.handed_on(cls) for cls in (Between, BetweenThatReads)] == ["language_model", None]
    assert state_reads.ends_row_by_row(Stack)
    assert not any(map(state_reads.ends_row_by_row, (StackThatMixes, StackThatMixesBehindItsNorm)))
    assert last_layer.at_rows(Layer) and not any(map(last_layer.at_rows, (LayerWithAShape, LayerOfTwoAttentions)))
    assert not state_reads.ends_row_by_row(T.Gemma3nTextModel), "which puts several streams together behind its layers"


def test_a_forward_at_rows():
    """A layer's code, gone on with behind its attention for some tokens."""
    layer = Layer()
    layer.norm, layer.mlp = nn.LayerNorm(4), nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.Linear(8, 4))
    layer.attention = lambda x, attention_mask, **kwargs: (x.cumsum(1), None)
    x = torch.randn(1, 6, 4)
    layout = any_stack.self_layout((2, 3), None, x.device)
    wanted = torch.tensor([[False, True, False], [True, False, True]])
    last = LastLayout.of(layout, wanted, x.device)
    some = last_layer.at_rows(Layer)(layer, x, **{any_stack.LAYOUT: last})
    torch.testing.assert_close(some, layer(x)[:, wanted.flatten()])
    torch.testing.assert_close(last_layer.at_rows(Layer)(layer, x), layer(x))
    assert LastLayout.of(layout, torch.ones(2, 3, dtype=torch.bool), x.device) is None
    assert torch.equal(last.outputs.pad(some)[wanted], some[0]) and not last.outputs.pad(some)[~wanted].any()
