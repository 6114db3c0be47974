"""Small models for fuzz_dropin.py: any of transformers' classes by its configuration, switches of that configuration drawn."""

from __future__ import annotations

import copy
import random
from typing import Any

import torch
import transformers
from tiny_batches import randomise
from tiny_models import PAD, VISION_LANGUAGE, V, tiny
from torch import nn
from transformers import PretrainedConfig
from transformers.models.auto import modeling_auto

HEADS = {
    "causal": modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    "masked": modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES,
    "sequence": modeling_auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
    "token": modeling_auto.MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES,
    "seq2seq": modeling_auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
    "image": modeling_auto.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES,
}
WEIGHT = {"causal": 10, "masked": 2, "sequence": 2, "token": 2, "seq2seq": 3, "image": 3, "vision-language": 3}
WIDTH = ("hidden_size", "n_embd", "d_model", "embed_dim", "dim")
INNER = ("intermediate_size", "ffn_dim", "d_ff", "encoder_ffn_dim", "decoder_ffn_dim", "n_inner", "hidden_dim", "ffn_hidden_size")
LAYERS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "encoder_layers", "decoder_layers", "num_decoder_layers")
ATTENTION_HEADS = ("num_attention_heads", "n_head", "n_heads", "num_heads", "encoder_attention_heads", "decoder_attention_heads")
POSITIONS = ("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "seq_length", "max_source_positions", "max_target_positions")
EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
FIXED = {
    "vocab_size": V, "pad_token_id": PAD, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 2, "num_experts_per_tok": 2,
    "moe_k": 2, "moe_intermediate_size": 24, "shared_expert_intermediate_size": 20, "moe_shared_expert_intermediate_size": 20, "n_group": 1,
    "topk_group": 1, "first_k_dense_replace": 1, "num_dense_layers": 1, "q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8, "v_head_dim": 8, "d_kv": 8, "word_embed_proj_dim": 32, "state_size": 8, "mamba_d_state": 8, "mamba_n_heads": 4,
    "mamba_d_head": 16, "num_labels": 3, "type_vocab_size": 2, "embedding_size": 32, "image_size": 16, "patch_size": 8,
    "vocab_size_per_layer_input": V, "query_pre_attn_scalar": 8, "linear_num_key_heads": 2, "linear_num_value_heads": 4,
    "linear_key_head_dim": 8, "linear_value_head_dim": 8, "dim_model_base": 16, "max_2d_position_embeddings": 64,
    "use_mamba_kernels": False,
}  # fmt: skip
ACTIVATIONS = ("silu", "gelu", "gelu_new", "gelu_pytorch_tanh", "relu", "relu2", "quick_gelu", "tanh", "mish", "gelu_python", "gelu_fast")
NO_SWITCH = {
    "return_dict", "use_return_dict", "output_hidden_states", "output_attentions", "torchscript", "is_decoder", "is_encoder_decoder",
    "add_cross_attention", "chunk_size_feed_forward", "use_bfloat16", "cross_attention_hidden_size", "use_mamba_kernels",
}  # fmt: skip


def draw_config(cls: type[PretrainedConfig], draw: random.Random, **fixed: Any) -> tuple[PretrainedConfig, dict[str, Any]]:
    """A small configuration, and what was given for it."""
    default = cls()
    known = set(default.to_dict()) | {name for name in cls.attribute_map if hasattr(default, name)}
    heads = draw.choice((2, 4))
    kv_heads = draw.choice([n for n in (1, 2, 4) if heads % n == 0])
    given: dict[str, Any] = {}
    for names, value in (
        (WIDTH, 32), (INNER, 48), (LAYERS, draw.choice((1, 2, 3))), (ATTENTION_HEADS, heads), (POSITIONS, 64), (EXPERTS, 4),
        (("num_key_value_heads", "num_kv_heads", "n_head_kv", "multi_query_group_num"), kv_heads),
        (("head_dim", "attention_head_dim", "kv_channels", "global_head_dim", "swa_head_dim"), draw.choice((8, 16, 32 // heads))),
    ):  # fmt: skip
        given |= {name: value for name in names if name in known}
    given |= {name: value for name, value in FIXED.items() if name in known}
    layers = next((given[name] for name in LAYERS if name in given), 2)
    for name, value in default.to_dict().items():
        switch = _switch(name, value, draw, layers, int(given.get("head_dim", given.get("kv_channels", 32 // heads))))
        if switch is not _KEEP:
            given[name] = switch
    given |= {"num_labels": 3} | fixed
    return cls(**given), given


SLOW = ("NemotronH", "Longformer", "LED", "BigBird")
_KEEP = object()


def _switch(name: str, value: Any, draw: random.Random, layers: int, head: int) -> Any:
    """Another value for a switch, now and then; dropout always off, as two programs draw in another order."""
    rare = draw.random() < 0.2
    if any(word in name for word in ("dropout", "pdrop", "drop_path", "drop_rate", "layerdrop", "jitter", "mask_time_prob")):
        return 0.0 if isinstance(value, float | int) and not isinstance(value, bool) else _KEEP
    if name == "layer_types" and isinstance(value, list):
        kinds = sorted(set(value)) + (
            ["sliding_attention", "full_attention"] if set(value) <= {"sliding_attention", "full_attention"} else []
        )
        return [draw.choice(kinds) for _ in range(layers)]
    if isinstance(value, list) and len(value) > 1 and name.endswith(("layers", "types", "pattern", "list")):
        return [draw.choice(value) for _ in range(layers)]
    if name == "sliding_window":
        return draw.choice((3, 4, 6, 64)) if value is not None or rare else _KEEP
    if name == "rope_parameters" and isinstance(value, dict):
        return _rope(value, draw, head)
    if not rare or name in NO_SWITCH:
        return _KEEP
    if isinstance(value, bool):
        return not value
    if name.endswith(("hidden_act", "hidden_activation", "activation_function", "dense_act_fn")) and isinstance(value, str):
        return draw.choice(ACTIVATIONS)
    if "softcap" in name:
        return draw.choice((None, 2.0, 5.0))
    if name.endswith(("_scale", "multiplier", "scaling", "logit_scale", "factor")) and isinstance(value, float):
        return draw.choice((0.5, 1.0, 1.7))
    if name.endswith(("norm_eps", "norm_epsilon")) and isinstance(value, float):
        return draw.choice((1e-12, 1e-5, 1e-2))
    if name in ("position_embedding_type", "feed_forward_proj", "norm_type", "scoring_func", "topk_method"):
        return draw.choice({"feed_forward_proj": ("gated-gelu", "gated-silu", "relu", "gelu")}.get(name, (value,)))
    return _KEEP


def _rope(value: dict[str, Any], draw: random.Random, head: int) -> Any:
    if any(isinstance(one, dict) for one in value.values()):  # one entry for each type of layer
        return _KEEP
    kept = {name: value[name] for name in ("rope_theta", "partial_rotary_factor", "mrope_section") if name in value}
    kind = draw.choice(("default", "default", "default", "linear", "dynamic", "yarn", "llama3", "longrope"))
    more: dict[str, Any] = {"factor": draw.choice((2.0, 4.0))} if kind != "default" else {}
    if kind in ("yarn", "llama3", "longrope", "dynamic"):
        more["original_max_position_embeddings"] = draw.choice((4, 16, 64))
    if kind == "yarn":
        more |= draw.choice(({}, {"attention_factor": 1.3}, {"mscale": 0.7, "mscale_all_dim": 1.0}))
    if kind == "llama3":
        more |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
    if kind == "longrope":
        half = int(head * kept.get("partial_rotary_factor", 1.0)) // 2
        more |= {"short_factor": [1.0 + n / 10 for n in range(half)], "long_factor": [2.0 + n for n in range(half)]}
    elif draw.random() < (0.3 if "partial_rotary_factor" in value else 0.05):
        kept["partial_rotary_factor"] = 0.5
    return kept | {"rope_type": kind} | more


def draw_model(draw: random.Random, only: str | None = None) -> tuple[str, str, nn.Module, Any]:
    """(kind, what it is, model, batches of tiny_models or None); an exception where transformers makes no model of what was drawn."""
    kind = draw.choices(list(WEIGHT), list(WEIGHT.values()))[0]
    if only in VISION_LANGUAGE or (only is None and kind == "vision-language"):
        name = only or draw.choice(sorted(VISION_LANGUAGE))
        model, batch = tiny(name)
        return "vision-language", name, model, batch
    if only is not None:
        kind = next(k for k, names in HEADS.items() if any(only in ((n,) if isinstance(n, str) else n) for n in names.values()))
    names = sorted({n for entry in HEADS[kind].values() for n in ((entry,) if isinstance(entry, str) else entry)})
    name = only or draw.choice(names)
    cls = getattr(transformers, name)
    config, given = draw_config(cls.config_class, draw)
    config._attn_implementation = draw.choice(("eager", "sdpa"))
    seed = draw.randrange(1000)
    with torch.device("meta"):
        try:
            small = sum(p.numel() for p in cls(copy.deepcopy(config)).parameters()) < 1_000_000
        except ValueError:  # no sdpa
            config._attn_implementation = "eager"
            small = sum(p.numel() for p in cls(copy.deepcopy(config)).parameters()) < 1_000_000
    if not small:
        raise ValueError("not small")
    if name.startswith(SLOW):
        raise ValueError("slow in PyTorch")
    torch.manual_seed(seed)
    model = cls(config)
    if hasattr(model, "set_experts_implementation"):
        model.set_experts_implementation("eager")  # grouped products take no float64
    return kind, f"{name}({', '.join(f'{k}={v!r}' for k, v in given.items())}, attn={config._attn_implementation})", lively(model), None


def lively(model: nn.Module) -> nn.Module:
    """Random weights everywhere, in norms, biases and gates too, in float64."""
    randomise(model)
    for module in model.modules():
        if isinstance(module, nn.Dropout):  # of a configuration that has no name for it
            module.p = 0.0
    return model.double()
