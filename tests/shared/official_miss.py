"""MISS_VQA's official names and shapes, and a forward pass on them, written out independently of fastpeft."""

import functools

import torch
from safetensors.torch import load_file
from torch.nn import functional as F
from transformers import BlipConfig, BlipForQuestionAnswering

from fastpeft.convert.formats import transformers_to_blip

WIDTH, HEADS, DEPTH, LAYERS, VOCAB, PATCH, GRID, POSITIONS = 128, 2, 3, 2, 97, 8, 4, 24
SIZE = PATCH * GRID


def official_state(width=WIDTH, dtype=torch.float32, seed=0):
    return dict(_official_state(width, dtype, seed))


@functools.cache
def _official_state(width, dtype, seed):
    """What the official MISS_VQA's state_dict() holds: every name and shape, random values."""
    generator = torch.Generator().manual_seed(seed)
    state = {}

    def add(name, *shape):
        value = torch.randn(shape, generator=generator) * 0.1
        state[name] = (value + 1 if "norm" in name.lower() and name.endswith("weight") else value).to(dtype)

    def linear(name, n_out, n_in):
        add(f"{name}.weight", n_out, n_in)
        add(f"{name}.bias", n_out)

    def norm(name):
        add(f"{name}.weight", width)
        add(f"{name}.bias", width)

    add("visual_encoder.cls_token", 1, 1, width)
    add("visual_encoder.pos_embed", 1, GRID * GRID + 1, width)
    add("visual_encoder.patch_embed.proj.weight", width, 3, PATCH, PATCH)
    add("visual_encoder.patch_embed.proj.bias", width)
    for i in range(DEPTH):
        block = f"visual_encoder.blocks.{i}"
        norm(f"{block}.norm1")
        linear(f"{block}.attn.qkv", 3 * width, width)
        linear(f"{block}.attn.proj", width, width)
        norm(f"{block}.norm2")
        linear(f"{block}.mlp.fc1", 3 * width, width)
        linear(f"{block}.mlp.fc2", width, 3 * width)
    norm("visual_encoder.norm")
    for bert in ("text_encoder", "text_decoder.bert"):
        state[f"{bert}.embeddings.position_ids"] = torch.arange(POSITIONS).expand(1, -1)
        add(f"{bert}.embeddings.word_embeddings.weight", VOCAB, width)
        add(f"{bert}.embeddings.position_embeddings.weight", POSITIONS, width)
        norm(f"{bert}.embeddings.LayerNorm")
        for i in range(LAYERS):
            layer = f"{bert}.encoder.layer.{i}"
            for attention in ("attention", "crossattention"):
                for role in ("query", "key", "value"):
                    linear(f"{layer}.{attention}.self.{role}", width, width)
                linear(f"{layer}.{attention}.output.dense", width, width)
                norm(f"{layer}.{attention}.output.LayerNorm")
            linear(f"{layer}.intermediate.dense", 2 * width, width)
            linear(f"{layer}.output.dense", width, 2 * width)
            norm(f"{layer}.output.LayerNorm")
    head = "text_decoder.cls.predictions"
    add(f"{head}.bias", VOCAB)
    linear(f"{head}.transform.dense", width, width)
    norm(f"{head}.transform.LayerNorm")
    state[f"{head}.decoder.weight"] = state["text_decoder.bert.embeddings.word_embeddings.weight"]
    state[f"{head}.decoder.bias"] = state[f"{head}.bias"]
    return state


def attend(q, k, v, heads, causal=False):
    q, k, v = (t.unflatten(-1, (heads, -1)).transpose(1, 2) for t in (q, k, v))
    scores = q @ k.mT / q.shape[-1] ** 0.5
    if causal:
        scores = scores.masked_fill(torch.ones(scores.shape[-2:]).triu(1).bool(), -torch.inf)
    return (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)


def forward(state, image, question, answer, heads=HEADS):
    """The official computation on official names: image features, question states, answer logits."""

    def linear(name, x):
        return F.linear(x, state[f"{name}.weight"], state[f"{name}.bias"])

    def norm(name, x, eps):
        return F.layer_norm(x, x.shape[-1:], state[f"{name}.weight"], state[f"{name}.bias"], eps)

    def bert(name, ids, memory, causal):
        words, positions = (state[f"{name}.embeddings.{kind}_embeddings.weight"] for kind in ("word", "position"))
        x = norm(f"{name}.embeddings.LayerNorm", words[ids] + positions[: ids.shape[1]], 1e-12)
        for i in range(LAYERS):
            layer = f"{name}.encoder.layer.{i}"
            for kind, keys in (("attention", None), ("crossattention", memory)):
                sub, y = f"{layer}.{kind}", x if keys is None else keys
                mixed = attend(
                    linear(f"{sub}.self.query", x), linear(f"{sub}.self.key", y), linear(f"{sub}.self.value", y), heads,
                    causal and keys is None,
                )  # fmt: skip
                x = norm(f"{sub}.output.LayerNorm", linear(f"{sub}.output.dense", mixed) + x, 1e-12)
            inner = F.gelu(linear(f"{layer}.intermediate.dense", x))
            x = norm(f"{layer}.output.LayerNorm", linear(f"{layer}.output.dense", inner) + x, 1e-12)
        return x

    proj = "visual_encoder.patch_embed.proj"
    x = F.conv2d(image, state[f"{proj}.weight"], state[f"{proj}.bias"], stride=PATCH).flatten(2).mT
    x = torch.cat([state["visual_encoder.cls_token"].expand(len(x), -1, -1), x], 1) + state["visual_encoder.pos_embed"]
    for i in range(DEPTH):
        block = f"visual_encoder.blocks.{i}"
        qkv = linear(f"{block}.attn.qkv", norm(f"{block}.norm1", x, 1e-6)).chunk(3, -1)
        x = x + linear(f"{block}.attn.proj", attend(*qkv, heads))
        x = x + linear(f"{block}.mlp.fc2", F.gelu(linear(f"{block}.mlp.fc1", norm(f"{block}.norm2", x, 1e-6))))
    features = norm("visual_encoder.norm", x, 1e-6)
    states = bert("text_encoder", question, features, causal=False)
    head = "text_decoder.cls.predictions"
    y = F.gelu(linear(f"{head}.transform.dense", bert("text_decoder.bert", answer, states, causal=True)))
    return features, states, linear(f"{head}.decoder", norm(f"{head}.transform.LayerNorm", y, 1e-12))


def write(path, content):
    torch.save(content, path)
    return path


def load(folder):
    model, info = BlipForQuestionAnswering.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values()), info
    return model.eval()


def official_again(folder):
    return transformers_to_blip(load_file(folder / "model.safetensors"), BlipConfig.from_pretrained(folder))


def same(a, b):
    assert set(a) == set(b)
    for name in a:
        assert a[name].dtype == b[name].dtype and torch.equal(a[name], b[name]), name


def facts(config):
    """All fields, but for what saving adds."""
    parts = {"": config, "text": config.text_config, "vision": config.vision_config}
    left_out = ("_name_or_path", "architectures", "dtype", "transformers_version", "text_config", "vision_config")
    return {(part, k): v for part, c in parts.items() for k, v in c.to_dict().items() if k not in left_out}
