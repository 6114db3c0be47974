"""What an attention layer keeps for backward lies in memory once: its output, which the output projection reads too, and its queries before
or after a norm."""

from __future__ import annotations

import copy
from contextlib import nullcontext

import pytest
import torch
import transformers as T
from tiny_models import tiny
from torch import nn
from torch.autograd.graph import saved_tensors_hooks

import fastpeft as fp
from fastpeft.methods.base import sees_no_values

pytestmark = pytest.mark.usefixtures("one_thread")
peft = pytest.importorskip("peft")


def adapted(model):
    model = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False)).train()
    fp.optimize(model)
    return model


def storage(t):
    return t.untyped_storage().data_ptr()


def kept_by(model, batch):
    """What autograd keeps of a step, alive."""
    kept = []
    with saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        model(**batch)
    return kept


def phi():
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 60}
    ids = torch.arange(3, 33).view(3, 10)
    return T.PhiForCausalLM(T.PhiConfig(**sizes)), {"input_ids": ids, "labels": ids}


def of(name):
    if name == "phi":
        return phi()
    model, batch = tiny(name)
    return model, batch("full")


# queries that a model lays one head after the other (.contiguous(), torch.cat of rotated and other channels), and as projections leave them
@pytest.mark.parametrize("name", ["whisper", "phi", "qwen3", "blip2"])
def test_an_output_is_kept_once(name):
    model, batch = of(name)
    model, read = adapted(model), []
    last = ("out_proj", "o_proj", "dense", "projection")
    for name, module in model.named_modules():
        if name.rpartition(".")[2] in last and "attn" in name and isinstance(module, nn.Module):
            module.register_forward_pre_hook(sees_no_values(lambda m, args: read.append(args[0])))
    kept = {storage(t) for t in kept_by(model, batch) if t.dim() == 4}
    assert read and all(storage(x) in kept for x in read)


def test_queries_before_a_norm_are_kept_alone():
    """OLMo 2 takes norms of all heads together, before it moves them: backward computes queries and keys of what the norms keep."""
    model, batch = of("olmo2")
    kept = kept_by(adapted(model.float()), batch)  # rotary tables are float32
    B, L = batch["input_ids"].shape
    wide = {storage(t) for t in kept if t.dim() == 4 and t.shape == (B, 4, L, 8)}
    assert len(wide) == 2  # the outputs of two layers


def test_a_sum_of_what_is_kept_is_formed_again():
    """OLMo 2 adds a norm's output to what the attention read: the norm keeps its input, the attention its own, the feed-forward block
    nothing."""
    model, batch = of("olmo2")
    model = adapted(model.float())
    B, L = batch["input_ids"].shape

    def wide():
        return len({storage(t) for t in kept_by(model, batch) if t.shape == (B, L, 32)})

    # of each layer: what its attention reads, queries before their norm, the output, what the two norms read; and what the last one reads
    assert wide() == 2 * 5 + 1
    wanted, got = {}, {}
    for grads, context in ((got, nullcontext()), (wanted, fp.without("remake"))):
        model.zero_grad()
        with context:
            model(**batch).loss.backward()
        grads |= {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert got.keys() == wanted.keys() and all(torch.equal(got[name], grad) for name, grad in wanted.items())


@pytest.mark.parametrize("name", ["t5", "qwen3", "whisper"])
def test_an_output_of_real_tokens_is_formed_of_the_padded_one(name):
    """Where padding was left out, attention keeps its padded output: its real tokens, which the output projection reads, are in it."""
    model, batch = tiny(name)
    batch = batch("padded")
    model, read = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False)).train(), []
    fp.optimize(model, lean_logits=True)
    stack = model.get_base_model().get_decoder()
    for name, module in stack.named_modules():
        if name.rpartition(".")[2] in ("out_proj", "o_proj", "o") and isinstance(module, nn.Module):
            module.register_forward_pre_hook(sees_no_values(lambda m, args: read.append(args[0])))
    kept = {storage(t) for t in kept_by(model, batch)}
    assert read and all(x.shape[0] == 1 for x in read) and not any(storage(x) in kept for x in read)


def test_queries_that_are_turned_alone_are_kept_before_their_norm():
    """Gemma 4 turns queries and keys one at a time, before it moves their heads."""
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 60, "head_dim": 8}
    sizes |= {"num_key_value_heads": 1, "layer_types": ["sliding_attention", "full_attention"], "hidden_size_per_layer_input": 8}
    sizes |= {"vocab_size_per_layer_input": 60, "num_kv_shared_layers": 0}
    torch.manual_seed(0)
    plain = T.Gemma4ForCausalLM(T.Gemma4TextConfig(**sizes)).float()
    plain = peft.get_peft_model(plain, peft.LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False)).train()
    ids = torch.arange(3, 33).view(3, 10)
    batch, model = {"input_ids": ids, "labels": ids}, copy.deepcopy(plain)
    fp.optimize(model)
    heads = {(4, q.out_features // 4) for name, q in model.named_modules() if name.endswith("q_proj.base_layer")}
    kept = [t for t in kept_by(model, batch) if t.dim() == 4 and (t.shape[1], t.shape[3]) in heads and t.shape[2] == 10]
    assert len({storage(t) for t in kept}) == 2  # the outputs of two layers
    losses = []
    for each in (model, plain):
        losses.append(each(**batch).loss)
        losses[-1].backward()
    torch.testing.assert_close(*losses)
    for (name, p), q in zip(model.named_parameters(), plain.parameters()):
        if q.grad is not None:
            torch.testing.assert_close(p.grad, q.grad, rtol=0, atol=1e-4 * float(q.grad.abs().max()), msg=name)
