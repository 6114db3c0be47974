"""LaVIN as its authors compute it, in float64 on the official names: the files that make it up, and the forward pass on one sample.

The adapter's convolutions are written as grouped matrix products; t_m is the first token of the text and no other token sees it.
"""

import argparse
import json
import math

import torch
from official_clip import clip_forward, clip_state
from torch.nn import functional as F

DIM, HEADS, LAYERS, FFN, VOCAB, EPS = 256, 4, 3, 96, 300, 1e-6
WIDTH, DEPTH, MIDDLE, H, GROUPS, SCALE, TEMPERATURE = 128, 9, 24, 8, 2, 0.7, 3.0
SPLIT = {"tok_embeddings": 1, "output": 0, "wq": 0, "wk": 0, "wv": 0, "w1": 0, "w3": 0, "wo": 1, "w2": 1}
BLOCKS = "backbone.visual.transformer.resblocks"


def llama_state(dim=DIM, layers=LAYERS):
    torch.manual_seed(0)
    new = lambda *shape: torch.randn(*shape, dtype=torch.float64) * shape[-1] ** -0.5  # noqa: E731
    state = {"tok_embeddings.weight": new(VOCAB, dim) * 4, "norm.weight": new(dim) + 1, "output.weight": new(VOCAB, dim)}
    for i in range(layers):
        state |= {f"layers.{i}.attention.{name}.weight": new(dim, dim) for name in ("wq", "wk", "wv", "wo")}
        for name, shape in (("w1", (FFN, dim)), ("w2", (dim, FFN)), ("w3", (FFN, dim))):
            state[f"layers.{i}.feed_forward.{name}.weight"] = new(*shape)
        state |= {f"layers.{i}.{name}.weight": new(dim) + 1 for name in ("attention_norm", "ffn_norm")}
    return state


def adapter_state(h=H, groups=GROUPS):
    torch.manual_seed(1)
    new = lambda *shape: torch.randn(*shape, dtype=torch.float64) / 3  # noqa: E731
    state = {}
    for blocks, count, width in (("layers", LAYERS, DIM), (BLOCKS, DEPTH, WIDTH)):
        for i in range(count):
            p = f"{blocks}.{i}.adapter_attn."
            state |= {f"{p}conv_A.weight": new(h, width, 1), f"{p}conv_A.bias": new(h)}
            for name in ("conv_B", "conv_D"):
                state |= {f"{p}{name}.weight": new(width, h // groups, 1), f"{p}{name}.bias": new(width)}
            state |= {f"{p}expert_weights.weight": new(2, width), f"{p}expert_weights.bias": new(2)}
    state |= {"adapter_proj.conv_A.weight": new(MIDDLE, WIDTH), "adapter_proj.conv_A.bias": new(MIDDLE)}
    state |= {"adapter_proj.conv_B.weight": new(DIM, MIDDLE), "adapter_proj.conv_B.bias": new(DIM)}
    return state | {"adapter_modality_embedding.weight": new(2, DIM)}


def arguments(**changes):
    """Some of what train.py is given."""
    given = {"adapter_type": "attn", "visual_adapter_type": "router", "adapter_dim": H, "adapter_scale": SCALE, "max_seq_len": 512}
    given |= {"temperature": TEMPERATURE, "prompt_format": "QCM-LA", "options": ["A", "B"], "use_vicuna": False, "lr": None}
    return argparse.Namespace(**given | changes)


def write_llama_folder(folder, state, shards=1, **changes):
    folder.mkdir(parents=True)
    params = {"dim": DIM, "multiple_of": 32, "n_heads": HEADS, "n_layers": LAYERS, "norm_eps": EPS, "vocab_size": -1} | changes
    (folder / "params.json").write_text(json.dumps(params))
    for i in range(shards):
        part = {n: t.chunk(shards, SPLIT[n.split(".")[-2]])[i].clone() if n.split(".")[-2] in SPLIT else t for n, t in state.items()}
        torch.save(part, folder / f"consolidated.{i:02d}.pth")
    return folder


def write_adapter(path, state, args=None, prefix="module."):
    """As save_model of misc.py, from a distributed run."""
    content = {"model": {prefix + n: t for n, t in state.items()}, "optimizer": {"state": {}, "param_groups": [{"betas": (0.9, 0.95)}]}}
    torch.save(content | {"epoch": 19, "scaler": {"scale": 65536.0}, "args": args or arguments()}, path)
    return path


def mixture(adapters, place, x):
    """What the router of the adapter at ``place`` makes of x [..., C]: [..., 2]."""
    scores = x @ adapters[f"{place}.expert_weights.weight"].T + adapters[f"{place}.expert_weights.bias"]
    return (scores / TEMPERATURE).softmax(-1)


def adapted(adapters, place, x, weights):
    """x [L, C] -> [L, C]."""
    a = x @ adapters[f"{place}.conv_A.weight"][:, :, 0].T + adapters[f"{place}.conv_A.bias"]
    for expert, name in enumerate(("conv_B", "conv_D")):
        kernel, bias = adapters[f"{place}.{name}.weight"][:, :, 0], adapters[f"{place}.{name}.bias"]
        n, (rows, inner) = len(kernel) // (a.shape[-1] // kernel.shape[1]), kernel.shape
        grouped = [a[:, g * inner : (g + 1) * inner] @ kernel[g * n : (g + 1) * n].T for g in range(rows // n)]
        x = x + SCALE * weights[..., expert : expert + 1] * (torch.cat(grouped, -1) + bias)
    return x


def image_tokens(clip, adapters, image):
    """[1, N, C]: class tokens after every fourth layer of CLIP, each of whose tokens is routed by itself."""

    def adapter(i, x):
        place = f"{BLOCKS}.{i}.adapter_attn"
        return adapted(adapters, place, x, mixture(adapters, place, x))

    return clip_forward(clip, image, adapter)[1]


def turned(x):
    """[L, H, d]: each pair (2i, 2i + 1) turned by position * 10000^(-2i / d)."""
    d = x.shape[-1]
    angle = torch.arange(len(x), dtype=torch.float64)[:, None, None] * 10_000.0 ** (-torch.arange(0, d, 2, dtype=torch.float64) / d)
    a, b = x[..., ::2], x[..., 1::2]
    return torch.stack([a * angle.cos() - b * angle.sin(), a * angle.sin() + b * angle.cos()], -1).flatten(-2)


def forward(llama, adapters, text, modality):
    """Logits [1 + L, vocabulary] of [t_m, text], text [L, C]; modality: 0 text, 1 image."""
    norm = lambda x, name: x * torch.rsqrt(x.square().mean(-1, keepdim=True) + EPS) * llama[f"{name}.weight"]  # noqa: E731
    h = torch.cat([adapters["adapter_modality_embedding.weight"][modality][None], text])
    hidden = torch.ones(len(h), len(h), dtype=torch.bool).triu(1)
    hidden[1:, 0] = True
    for i in range(LAYERS):
        p, place, x = f"layers.{i}.", f"layers.{i}.adapter_attn", norm(h, f"layers.{i}.attention_norm")
        x = adapted(adapters, place, x, mixture(adapters, place, x[:1]))
        q, k, v = ((x @ llama[f"{p}attention.{n}.weight"].T).unflatten(-1, (HEADS, -1)) for n in ("wq", "wk", "wv"))
        scores = torch.einsum("ihd,jhd->hij", turned(q), turned(k)) / math.sqrt(DIM // HEADS)
        context = torch.einsum("hij,jhd->ihd", scores.masked_fill(hidden, -torch.inf).softmax(-1), v)
        h = h + context.flatten(1) @ llama[f"{p}attention.wo.weight"].T
        y = norm(h, f"{p}ffn_norm")
        w1, w2, w3 = (llama[f"{p}feed_forward.{n}.weight"] for n in ("w1", "w2", "w3"))
        h = h + (F.silu(y @ w1.T) * (y @ w3.T)) @ w2.T
    return norm(h, "norm") @ llama["output.weight"].T


def embedded(llama, clip, adapters, before, after, image):
    """Embeddings of [``before``, the image's tokens if there is one, ``after``]."""
    words = llama["tok_embeddings.weight"]
    if image is None:
        return torch.cat([words[before], words[after]])
    linear = lambda name, x: x @ adapters[f"adapter_proj.{name}.weight"].T + adapters[f"adapter_proj.{name}.bias"]  # noqa: E731
    seen = linear("conv_B", F.silu(linear("conv_A", image_tokens(clip, adapters, image)[0])))
    return torch.cat([words[before], seen, words[after]])


def clip():
    return clip_state(width=WIDTH, layers=DEPTH)


def write_all(folder):
    """7B/ (one shard), 13B/ (two, the same weights), ViT.pt and lavin.pth."""
    write_llama_folder(folder / "7B", llama_state())
    write_llama_folder(folder / "13B", llama_state(), shards=2)
    torch.save(clip(), folder / "ViT.pt")
    write_adapter(folder / "lavin.pth", adapter_state())
    return folder
