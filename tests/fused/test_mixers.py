"""Stacks whose layers mix tokens in a way of their own: padding is left out around the mixers, and losses and gradients stay."""

from __future__ import annotations

import copy
import threading

import pytest
import torch
import transformers as T
from double import assert_same, step
from tiny_batches import GROUPED, _lively, _rows
from torch import nn

import fastpeft as fp
from fastpeft.fused.stack import any_stack, mixers

pytestmark = pytest.mark.usefixtures("one_thread")
FALCON = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 99}
FALCON |= {"hidden_dropout": 0.0, "attention_dropout": 0.0}
GPTJ = {"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": 99, "n_positions": 64, "rotary_dim": 4}
GPTJ |= {"attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0}
XGLM = {"vocab_size": 99, "d_model": 32, "ffn_dim": 48, "num_layers": 2, "attention_heads": 4, "dropout": 0.0, "attention_dropout": 0.0}
XGLM |= {"activation_dropout": 0.0, "max_position_embeddings": 64, "pad_token_id": 0}
HYBRID = {"layer_types": ["linear_attention", "full_attention"], "head_dim": 8, "linear_num_key_heads": 2, "linear_num_value_heads": 4}
HYBRID = GROUPED | HYBRID | {"linear_key_head_dim": 8, "linear_value_head_dim": 8}
SPARSE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16}
MAMBA = {"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 8, "mamba_n_groups": 1, "mamba_expand": 2}
JAMBA = {"attn_layer_period": 2, "attn_layer_offset": 1, "num_experts": 1, "mamba_d_state": 4, "mamba_dt_rank": 4}

MODELS = {
    "falcon": lambda: T.FalconForCausalLM(T.FalconConfig(**FALCON, alibi=False)),
    "falcon-alibi": lambda: T.FalconForCausalLM(T.FalconConfig(**FALCON, alibi=True, parallel_attn=False)),
    "falcon-new": lambda: T.FalconForCausalLM(T.FalconConfig(**FALCON, num_kv_heads=2, new_decoder_architecture=True)),
    "gptj": lambda: T.GPTJForCausalLM(T.GPTJConfig(**GPTJ)),
    "bloom": lambda: T.BloomForCausalLM(
        T.BloomConfig(hidden_size=32, n_layer=2, n_head=4, vocab_size=99, hidden_dropout=0.0, attention_dropout=0.0)
    ),
    "mpt": lambda: T.MptForCausalLM(T.MptConfig(d_model=32, n_heads=4, n_layers=2, vocab_size=99, max_seq_len=64, expansion_ratio=2)),
    "xglm": lambda: T.XGLMForCausalLM(T.XGLMConfig(**XGLM)),
    "qwen3.5": lambda: T.Qwen3_5ForCausalLM(T.Qwen3_5TextConfig(**HYBRID)),
    "qwen3-next": lambda: T.Qwen3NextForCausalLM(T.Qwen3NextConfig(**HYBRID, **SPARSE)),
    "olmo-hybrid": lambda: T.OlmoHybridForCausalLM(T.OlmoHybridConfig(**HYBRID)),
    "bamba": lambda: T.BambaForCausalLM(T.BambaConfig(**GROUPED, **MAMBA, attn_layer_indices=[1])),
    "jamba": lambda: T.JambaForCausalLM(T.JambaConfig(**GROUPED, **JAMBA, use_mamba_kernels=False)),
}
QUICK = ["falcon-alibi", "gptj", "bloom", "qwen3.5"]
NAMES = [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in MODELS]


def tiny(name: str) -> nn.Module:
    model = MODELS[name]()
    if name == "qwen3-next":  # grouped products take no float64
        model.set_experts_implementation("eager")
    return _lively(model, torch.float32 if name == "xglm" else torch.float64).train()  # XGLM takes float64's least number for a float32


def pair(name: str, change=None) -> tuple[nn.Module, nn.Module]:
    plain = tiny(name)
    if change is not None:
        change(plain)
    fused = copy.deepcopy(plain)
    fp.optimize(fused, lean_logits=True)
    return plain, fused


def batch_of(kind: str, rows: int = 3) -> dict:
    """Prompt, answer and what follows it, unlabelled."""
    ids, mask = _rows("full" if kind == "both" else kind)
    if kind == "both":
        mask[1, :2] = mask[1, 9:] = mask[2, :1] = 0
    labels = ids.masked_fill(mask == 0, -100)
    labels[:, :6] = labels[:, 10:] = -100
    given = {"input_ids": ids, "labels": labels} | ({} if kind == "full" else {"attention_mask": mask})
    return {name: value[-rows:] for name, value in given.items()}


@pytest.fixture
def mixed(monkeypatch):
    """How many real tokens each mixer's layer sees."""
    seen, own = [], mixers.OnPadded

    class Seen(own):
        def __init__(self, mixer, layout, *others):
            seen.append(layout.tokens)
            super().__init__(mixer, layout, *others)

    monkeypatch.setattr(any_stack, "OnPadded", Seen)
    return seen


def same(name: str, fused, plain, given, what="") -> None:
    if name != "xglm":
        return assert_same(step(fused, given), step(plain, given), what)
    for model in (fused, plain):
        model.zero_grad()
    mine, theirs = fused(**given).loss, plain(**given).loss
    torch.testing.assert_close(mine, theirs)
    mine.backward(), theirs.backward()
    for a, b in zip(fused.parameters(), plain.parameters()):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_the_model_as_it_was(name, mixed):
    plain, fused = pair(name)
    for kind in ("full", "padded", "left", "both"):
        given = batch_of(kind)
        mixed.clear()
        same(name, fused, plain, given, f"{name}, {kind}")
        # real tokens up to the last label
        last = given["labels"].ne(-100).long().mul(torch.arange(12)).amax(1)
        real = given.get("attention_mask", torch.ones_like(given["labels"])).bool() & (torch.arange(12) <= last[:, None])
        assert set(mixed) == {int(real.sum())}, kind
    assert fp.restore(fused) == []
    same(name, fused, plain, given)


def _checkpoints(model):
    model.gradient_checkpointing_enable({"use_reentrant": False})


def _hook(model):
    next(m for m in model.modules() if mixers.kind_of(type(m)) is not None).register_forward_hook(lambda module, args, output: None)


def numbers() -> torch.Tensor:
    """Causality as GPT-J adds it to scores."""
    return torch.full((3, 1, 12, 12), torch.finfo(torch.float64).min, dtype=torch.float64).triu(1)


OTHERS = {
    "one sample, padded on the left": ("qwen3.5", {}, lambda: batch_of("left", 1)),
    "packed samples": ("falcon", {}, lambda: batch_of("full") | {"position_ids": torch.arange(12).remainder(5)[None].expand(3, -1)}),
    "a mask of queries": ("gptj", {}, lambda: batch_of("full") | {"attention_mask": numbers()}),
    "a label whose logits padding makes": ("bloom", {}, lambda: batch_of("left") | {"labels": batch_of("left")["input_ids"]}),
    "a hook on a mixer": ("falcon", {"change": _hook}, lambda: batch_of("padded")),
}


@pytest.mark.parametrize("what", OTHERS)
def test_what_keeps_padding(what, mixed):
    name, changes, make = OTHERS[what]
    plain, fused = pair(name, **changes)
    given = make()
    same(name, fused, plain, given)
    assert not mixed


def test_checkpoints_keep_padding(mixed):
    plain, fused = pair("falcon", change=_checkpoints)
    given = batch_of("padded")
    for model in (plain, fused):
        model.zero_grad()
        model(**given).loss.backward()
    for a, b in zip(fused.parameters(), plain.parameters()):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-6)
    assert not mixed


@pytest.mark.parametrize("name", ["falcon", pytest.param("bamba", marks=pytest.mark.slow)])
def test_adapters_evaluation_and_generation(name, mixed):
    peft = pytest.importorskip("peft")
    targets = ["query_key_value", "dense"] if name == "falcon" else ["in_proj", "q_proj", "down_proj"]
    plain = peft.get_peft_model(tiny(name), peft.LoraConfig(r=2, target_modules=targets, init_lora_weights=False)).double().train()
    fused = copy.deepcopy(plain)
    fp.optimize(fused, lean_logits=True)
    given = batch_of("padded")
    assert_same(step(fused, given), step(plain, given))
    assert mixed
    mixed.clear()
    plain.eval(), fused.eval()
    asked = {name: value for name, value in batch_of("left").items() if name != "labels"}
    with torch.no_grad():
        torch.testing.assert_close(fused(**given).logits, plain(**given).logits, rtol=1e-4, atol=1e-5)
        made = [model.generate(**asked, max_new_tokens=3, do_sample=False, pad_token_id=0) for model in (fused, plain)]
    assert torch.equal(*made) and not mixed


def test_a_mixer_gets_what_its_layer_hands_it():
    """And not what a forward made of the layer's own hands on besides."""
    plain, fused = pair("jamba")
    given, heard = batch_of("padded") | {"other": torch.ones(1)}, []
    cls = type(plain.model.layers[0].mamba)
    own = cls.forward
    cls.forward = lambda self, *args, **kwargs: (heard.append(set(kwargs)), own(self, *args, **kwargs))[1]
    try:
        plain(**given), fused(**given)
    finally:
        cls.forward = own
    assert heard[0] == heard[1] and "other" not in heard[0]


def test_another_thread_gets_the_mixer():
    layer, layout = nn.Linear(4, 4), any_stack.Layout(1, 3, None)
    stands, x, found = mixers.OnPadded(layer, layout, []), torch.randn(2, 5, 4), []
    thread = threading.Thread(target=lambda: found.append(stands(x)))
    thread.start()
    thread.join()
    assert torch.equal(found[0], layer(x)) and stands.weight is layer.weight
