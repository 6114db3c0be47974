"""LLaMA: its configurations by name, and where methods attach in it."""

from __future__ import annotations

from functools import partial

from transformers import LlamaConfig, LlamaForCausalLM

from fastpeft.methods import Part
from fastpeft.models.family import Family

SIZES = {
    "llama-7b": {"hidden_size": 4096, "intermediate_size": 11_008, "num_hidden_layers": 32, "num_attention_heads": 32},
    "llama-13b": {"hidden_size": 5120, "intermediate_size": 13_824, "num_hidden_layers": 40, "num_attention_heads": 40},
    "llama-tiny": {"hidden_size": 128, "intermediate_size": 344, "num_hidden_layers": 4, "num_attention_heads": 4, "vocab_size": 512}
    | {"max_position_embeddings": 1024, "initializer_range": 0.08},
}


def llama_config(name: str, **overrides) -> LlamaConfig:
    """The first LLaMA's numbers (vocabulary 32,000, eps 1e-6) at a size of SIZES. ``overrides``: fields of LlamaConfig."""
    if unknown := sorted(set(overrides) - LlamaConfig().to_dict().keys()):
        raise ValueError(f"a LLaMA has no {', '.join(unknown)}; overrides are fields of transformers' LlamaConfig")
    defaults = {"vocab_size": 32_000, "rms_norm_eps": 1e-6, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    return LlamaConfig(**defaults | {"max_position_embeddings": 2048} | SIZES[name] | overrides)


def llama_part(name: str = "llm", path: str = "", **more) -> Part:
    """A LLaMA as a part of a backbone; ``path`` is where its LlamaForCausalLM stands."""
    defaults = {
        "lora": ("q_proj", "v_proj"),
        "ia3": ("k_proj", "v_proj", "down_proj"),
        "ia3_feedforward": ("down_proj",),
        "attention": ("self_attn",),
        "ffn": ("mlp",),
        "prefix_host": "model",
        "peft_task": "CAUSAL_LM",
    }
    return Part(name, path, **defaults | more)


PARTS = (llama_part(),)


FAMILY = Family(
    kind="causal",
    known=LlamaForCausalLM,
    model=LlamaForCausalLM,
    config=LlamaConfig,
    parts=PARTS,
    plan="LoRA",
    configs={name: partial(llama_config, name) for name in SIZES},
    template="alpaca",
)

