"""LLaMA's original layout (params.json, consolidated.NN.pth) -> transformers' LlamaForCausalLM: names, shapes, rotary order, config.

Source: model.py of https://github.com/meta-llama/llama. Its shards split the vocabulary's embedding by channel, q, k, v, w1, w3 and the
output by rows, wo and w2 by columns; norms are in every shard. Its rotary embedding turns neighbouring channels (2i, 2i + 1),
transformers' turns (i, i + d/2): rows of q and k change places within each head.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from fastpeft.models.untrusted import MOST

_LAYER = {  # Meta's name: (transformers' name, dimension along which shards split it)
    "attention.wq": ("self_attn.q_proj", 0),
    "attention.wk": ("self_attn.k_proj", 0),
    "attention.wv": ("self_attn.v_proj", 0),
    "attention.wo": ("self_attn.o_proj", 1),
    "feed_forward.w1": ("mlp.gate_proj", 0),
    "feed_forward.w2": ("mlp.down_proj", 1),
    "feed_forward.w3": ("mlp.up_proj", 0),
    "attention_norm": ("input_layernorm", None),
    "ffn_norm": ("post_attention_layernorm", None),
}
_OUTSIDE = {"tok_embeddings": ("model.embed_tokens", 1), "norm": ("model.norm", None), "output": ("lm_head", 0)}


def llama_to_transformers(
    shards: list[dict[str, Tensor]], params: dict, delta: Mapping[str, Tensor] | None = None
) -> tuple[LlamaConfig, Iterator[tuple[str, Tensor]]]:
    """The state dicts of all shards, in order, and params.json -> LlamaForCausalLM's config and state, each tensor joined when its turn
    comes: a model of 26 GB need not be in memory.

    delta: by transformers' names, what LaVIN's code adds to these weights for Vicuna: to q and k in the original order of their rows,
    though the delta has transformers' (apply_delta.py); its adapters were trained on the sum.
    Feed-forward width and vocabulary come from the weights. ValueError names missing, unexpected and misshapen tensors.
    """
    dim, layers, heads = (_positive(params, name) for name in ("dim", "n_layers", "n_heads"))
    groups = heads if params.get("n_kv_heads") is None else _positive(params, "n_kv_heads")
    if params.get("use_scaled_rope"):
        raise ValueError("params.json asks for Llama 3.1's scaled rotary embedding, which is not converted: use transformers' own files")
    if dim % (2 * heads) or heads % groups:
        raise ValueError(f"params.json: n_heads = {heads} must divide dim = {dim} evenly, n_kv_heads = {groups} n_heads")
    if layers > len(shards[0]):
        raise ValueError(f"params.json: n_layers = {layers}, and the first shard holds {len(shards[0])} tensors")
    if dim > MOST:
        raise ValueError(f"params.json: dim = {dim} is beyond any model")
    names = _names(layers)
    _check_names(shards, set(names))
    shapes = {new: _joined_shape(name, [s[name] for s in shards], split) for name, (new, split) in names.items()}
    config = LlamaConfig(
        hidden_size=dim,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=groups,
        intermediate_size=shapes["model.layers.0.mlp.gate_proj.weight"][0],
        vocab_size=shapes["model.embed_tokens.weight"][0],
        rms_norm_eps=_number(params, "norm_eps", 1e-5),
        rope_parameters={"rope_type": "default", "rope_theta": _number(params, "rope_theta", 10_000.0)},
        bos_token_id=1,
        eos_token_id=2,
        tie_word_embeddings=False,
        architectures=["LlamaForCausalLM"],
        dtype=shards[0]["output.weight"].dtype,
    )
    _check_shapes(config, shapes, len(shards), delta or {})

    def tensors() -> Iterator[tuple[str, Tensor]]:
        for name, (new, split) in names.items():
            parts = [shard[name] for shard in shards]
            tensor = parts[0] if split is None or len(parts) == 1 else torch.cat(parts, split)
            if delta and new in delta:
                tensor = tensor + delta[new].to(tensor.dtype)
            if new.endswith(("q_proj.weight", "k_proj.weight")):
                tensor = _halves(tensor, heads if "q_proj" in new else groups)
            yield new, tensor

    return config, tensors()


def _names(layers: int) -> dict[str, tuple[str, int | None]]:
    """Meta's name: (transformers' name, dimension along which shards split it)."""
    names = {f"{name}.weight": (f"{new}.weight", split) for name, (new, split) in _OUTSIDE.items()}
    for i in range(layers):
        names |= {f"layers.{i}.{n}.weight": (f"model.layers.{i}.{new}.weight", split) for n, (new, split) in _LAYER.items()}
    return names


def _check_names(shards: list[dict[str, Tensor]], names: set[str]) -> None:
    """ValueError where a shard lacks a tensor or has another."""
    for number, shard in enumerate(shards):
        got = {name for name in shard if not name.endswith("rope.freqs")}
        for what, some in (("missing", names - got), ("unexpected", got - names)):
            if some:
                raise ValueError(f"shard {number}: {what} {', '.join(sorted(some)[:5])}{' ...' if len(some) > 5 else ''}")


def _check_shapes(config: LlamaConfig, shapes: dict[str, tuple[int, ...]], shards: int, delta: Mapping[str, Tensor]) -> None:
    """ValueError where the joined tensors' shapes, or the delta's, are not those of transformers' model."""
    with torch.device("meta"):
        wanted = {name: tuple(t.shape) for name, t in LlamaForCausalLM(config).state_dict().items()}
    original = {new: name for name, (new, _) in _names(config.num_hidden_layers).items()}
    if wrong := [f"{original[new]} {shape}, not {wanted[new]}" for new, shape in shapes.items() if shape != wanted[new]]:
        raise ValueError(f"misshapen over {shards} shard(s) (is one missing?): {'; '.join(wrong[:5])}")
    if unlike := [name for name, shape in wanted.items() if name in delta and tuple(delta[name].shape) != shape]:
        raise ValueError(f"the delta's {unlike[0]} is {tuple(delta[unlike[0]].shape)}, not {wanted[unlike[0]]}: made for another LLaMA")


def _number(params: dict, name: str, default: float) -> float:
    if not isinstance(value := params.get(name, default), int | float) or isinstance(value, bool) or not 0 < value < math.inf:
        raise ValueError(f"params.json: {name} must be a number above 0, not {value!r}")
    return float(value)


def _positive(params: dict, name: str) -> int:
    if not isinstance(value := params.get(name), int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"params.json: {name} must be a positive integer, not {value!r}")
    return value


def _joined_shape(name: str, tensors: list[Tensor], split: int | None) -> tuple[int, ...]:
    shapes = [tuple(t.shape) for t in tensors]
    if any(len(shape) != (1 if split is None else 2) for shape in shapes):
        raise ValueError(f"{name}: shapes {shapes} cannot be joined")
    if split is None or len(tensors) == 1:
        return shapes[0]
    if len({shape[1 - split] for shape in shapes}) > 1:
        raise ValueError(f"{name}: shards do not join: {shapes} differ along another dimension than {split}")
    whole = list(shapes[0])
    whole[split] = sum(shape[split] for shape in shapes)
    return tuple(whole)


def _halves(weight: Tensor, heads: int) -> Tensor:
    """[H d, C], pairs (2i, 2i + 1) -> pairs (i, i + d/2)."""
    return weight.view(heads, -1, 2, weight.shape[1]).transpose(1, 2).reshape(weight.shape)
