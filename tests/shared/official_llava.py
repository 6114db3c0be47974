"""LLaVA-Med as its authors compute it, in float64 on the official names: the files of its releases, and the forward pass on one prompt.

llava.py of the first release puts the projected patches between <im_start> and <im_end>, in the place of as many <im_patch>; llava_arch.py
of v1.5 joins the embeddings of the text before <image>, the patches, and those of the text after it.
"""

import json
import math

import torch
from official_clip import clip_forward, clip_state
from sentencepiece_model import write_sentencepiece
from torch.nn import functional as F

DIM, HEADS, LAYERS, FFN, EPS = 64, 4, 2, 96, 1e-5
WIDTH, PATCHES = 128, 16
BASE = 3 + 256 + 6 + 6  # pieces of the tokenizer
TOKENS = ["[PAD]", "<im_patch>", "<im_start>", "<im_end>"]


def clip():
    return clip_state(width=WIDTH, layers=3)


def text_state(vocabulary=BASE, groups=HEADS, seed=0, scale=1.0):
    """By transformers' names, as the authors' files have them."""
    generator = torch.Generator().manual_seed(seed)
    new = lambda *shape: torch.randn(*shape, dtype=torch.float64, generator=generator) * shape[-1] ** -0.5 * scale  # noqa: E731
    state = {"model.embed_tokens.weight": new(vocabulary, DIM) * 4, "lm_head.weight": new(vocabulary, DIM) * 2}
    state["model.norm.weight"] = new(DIM) + scale
    kv = DIM * groups // HEADS
    for i in range(LAYERS):
        p = f"model.layers.{i}."
        state |= {f"{p}self_attn.{n}_proj.weight": new(rows, DIM) for n, rows in (("q", DIM), ("k", kv), ("v", kv), ("o", DIM))}
        for name, shape in (("gate", (FFN, DIM)), ("up", (FFN, DIM)), ("down", (DIM, FFN))):
            state[f"{p}mlp.{name}_proj.weight"] = new(*shape) * 2
        state |= {f"{p}{n}.weight": new(DIM) + scale for n in ("input_layernorm", "post_attention_layernorm")}
    return state


def projector_state(depth=1, prefix="model.mm_projector."):
    """A linear layer's, or a Sequential's with GELU between its linear layers."""
    generator = torch.Generator().manual_seed(7)
    new = lambda *shape: torch.randn(*shape, dtype=torch.float64, generator=generator) * shape[-1] ** -0.5  # noqa: E731
    state = {}
    for i in range(depth):
        place = prefix if depth == 1 else f"{prefix}{2 * i}."
        state |= {f"{place}weight": new(DIM, DIM if i else WIDTH) * 3, f"{place}bias": new(DIM)}
    return state


def config_of(groups=HEADS, theta=1e4, **more):
    fields = {"hidden_size": DIM, "intermediate_size": FFN, "num_attention_heads": HEADS, "num_key_value_heads": groups}
    fields |= {"num_hidden_layers": LAYERS, "rms_norm_eps": EPS, "vocab_size": BASE, "rope_theta": theta, "hidden_act": "silu"}
    return fields | {"max_position_embeddings": 1024, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": -1} | more


MED = {"model_type": "llava", "architectures": ["LlavaLlamaForCausalLM"], "mm_vision_tower": "openai/clip-vit-large-patch14"}
MED |= {"mm_hidden_size": WIDTH, "mm_vision_select_layer": -2, "mm_use_im_start_end": True, "use_mm_proj": True}
V1_5 = {"model_type": "llava_mistral", "architectures": ["LlavaMistralForCausalLM"], "mm_vision_tower": "openai/clip-vit-large-patch14-336"}
V1_5 |= {"mm_hidden_size": WIDTH, "mm_vision_select_layer": -2, "mm_vision_select_feature": "patch", "mm_projector_type": "mlp2x_gelu"}
V1_5 |= {"mm_use_im_start_end": False, "mm_use_im_patch_token": False, "image_aspect_ratio": "pad", "sliding_window": None}


def write_folder(folder, config, state, shards=2, tokens=()):
    """config.json, pytorch_model-*.bin with their index, tokenizer.model, and added_tokens.json."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    names, where = list(state), {}
    for i in range(shards):
        file = f"pytorch_model-{i + 1:05d}-of-{shards:05d}.bin"
        torch.save({n: state[n].clone() for n in names[i::shards]}, folder / file)
        where |= dict.fromkeys(names[i::shards], file)
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))
    write_sentencepiece(folder / "tokenizer.model")
    if tokens:
        (folder / "added_tokens.json").write_text(json.dumps({token: BASE + i for i, token in enumerate(tokens)}))
    return folder


def patches_of(image, layer=-2):
    states = []
    clip_forward(clip(), image, states=states)
    return states[layer][1:]


def projected(state, patches, prefix="model.mm_projector."):
    if f"{prefix}weight" in state:
        return patches @ state[f"{prefix}weight"].T + state[f"{prefix}bias"]
    i = 0
    while f"{prefix}{i}.weight" in state:
        patches = F.gelu(patches) if i else patches
        patches = patches @ state[f"{prefix}{i}.weight"].T + state[f"{prefix}{i}.bias"]
        i += 2
    return patches


def rotated(x, theta):
    """[L, H, d]: channels (i, i + d/2) turned by position * theta^(-2i / d)."""
    d = x.shape[-1]
    angle = torch.arange(len(x), dtype=torch.float64)[:, None, None] * theta ** (-torch.arange(0, d, 2, dtype=torch.float64) / d)
    a, b = x[..., : d // 2], x[..., d // 2 :]
    return torch.cat([a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()], -1)


def forward(w, embeds, theta=1e4):
    """Logits [L, vocabulary] of embeddings [L, C]."""
    norm = lambda x, name: x * torch.rsqrt(x.square().mean(-1, keepdim=True) + EPS) * w[f"{name}.weight"]  # noqa: E731
    h, hidden = embeds, torch.ones(len(embeds), len(embeds), dtype=torch.bool).triu(1)
    for i in range(LAYERS):
        p = f"model.layers.{i}."
        x = norm(h, f"{p}input_layernorm")
        q, k, v = ((x @ w[f"{p}self_attn.{n}_proj.weight"].T).unflatten(-1, (-1, DIM // HEADS)) for n in "qkv")
        shared = HEADS // k.shape[1]
        q, k, v = rotated(q, theta), rotated(k, theta).repeat_interleave(shared, 1), v.repeat_interleave(shared, 1)
        scores = torch.einsum("ihd,jhd->hij", q, k) / math.sqrt(DIM // HEADS)
        context = torch.einsum("hij,jhd->ihd", scores.masked_fill(hidden, -torch.inf).softmax(-1), v)
        h = h + context.flatten(1) @ w[f"{p}self_attn.o_proj.weight"].T
        x = norm(h, f"{p}post_attention_layernorm")
        gate, up, down = (w[f"{p}mlp.{n}_proj.weight"] for n in ("gate", "up", "down"))
        h = h + (F.silu(x @ gate.T) * (x @ up.T)) @ down.T
    return norm(h, "model.norm") @ w["lm_head.weight"].T


def first_release(w, ids, image, start, end):
    """Embeddings of ids with <im_start>, <im_patch> x N, <im_end> in them: llava.py's loop over start tokens."""
    words = w["model.embed_tokens.weight"][ids]
    if image is None:
        return words
    seen = projected(w, patches_of(image))
    (at,) = torch.where(ids == start)[0].tolist()
    assert ids[at + len(seen) + 1] == end
    return torch.cat([words[: at + 1], seen, words[at + len(seen) + 1 :]])


def release_1_5(w, chunks, image):
    """Embeddings of the ids before and after <image>: llava_arch.py joins them with the patches between."""
    words = [w["model.embed_tokens.weight"][ids] for ids in chunks]
    return words[0] if image is None else torch.cat([words[0], projected(w, patches_of(image)), words[1]])
