"""OpenAI's CLIP: its image encoder's names and shapes, and the forward pass on them, written out independently of fastpeft."""

import torch
from torch.nn import functional as F


def clip_state(width=128, layers=4, patch=8, grid=4, out=40, dtype=torch.float64, text=True, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def new(*shape, by=None):
        return (torch.randn(shape, generator=generator, dtype=torch.float64) * (by or shape[-1]) ** -0.5).to(dtype)

    def norm(name):
        return {f"{name}.weight": new(width) + 1, f"{name}.bias": new(width)}

    state = {
        "visual.class_embedding": new(width, by=4),
        "visual.positional_embedding": new(grid * grid + 1, width, by=4),
        "visual.proj": new(width, out, by=width),
        "visual.conv1.weight": new(width, 3, patch, patch, by=3 * patch * patch),
        **norm("visual.ln_pre"),
        **norm("visual.ln_post"),
    }
    for i in range(layers):
        block = f"visual.transformer.resblocks.{i}"
        state |= norm(f"{block}.ln_1") | norm(f"{block}.ln_2")
        state |= {f"{block}.attn.in_proj_weight": new(3 * width, width), f"{block}.attn.in_proj_bias": new(3 * width)}
        for name, rows, columns in (("attn.out_proj", width, width), ("mlp.c_fc", 4 * width, width), ("mlp.c_proj", width, 4 * width)):
            state |= {f"{block}.{name}.weight": new(rows, columns), f"{block}.{name}.bias": new(rows)}
    if text:
        state |= {"positional_embedding": new(7, 64), "text_projection": new(64, out), "logit_scale": new(1)[0]}
        state |= {"token_embedding.weight": new(11, 64), "ln_final.weight": new(64), "transformer.resblocks.0.ln_1.bias": new(64)}
        state |= {"input_resolution": torch.tensor(grid * patch), "context_length": torch.tensor(7), "vocab_size": torch.tensor(11)}
    return state


def clip_forward(state, image, adapter=None, every=4, states=None):
    """(projected class token [1, D], class tokens after every fourth layer [1, N, C]) of one image [1, 3, S, S]; ``adapter``: what is
    between a layer's norm and its attention, given its number and tokens [L, C]. ``states``: a list that gets the tokens before the first
    layer and after each."""

    def norm(name, x):
        return F.layer_norm(x, x.shape[-1:], state[f"{name}.weight"], state[f"{name}.bias"])

    def linear(name, x):
        return x @ state[f"{name}.weight"].T + state[f"{name}.bias"]

    kernel = state["visual.conv1.weight"]
    x = F.conv2d(image, kernel, stride=kernel.shape[-1]).flatten(2)[0].T
    x = torch.cat([state["visual.class_embedding"][None], x]) + state["visual.positional_embedding"]
    x, seen, i = norm("visual.ln_pre", x), [], 0
    states = [] if states is None else states
    states.append(x)
    while f"visual.transformer.resblocks.{i}.ln_1.weight" in state:
        block = f"visual.transformer.resblocks.{i}"
        y = norm(f"{block}.ln_1", x)
        y = y if adapter is None else adapter(i, y)
        qkv = y @ state[f"{block}.attn.in_proj_weight"].T + state[f"{block}.attn.in_proj_bias"]
        q, k, v = (t.unflatten(-1, (-1, 64)).transpose(0, 1) for t in qkv.chunk(3, -1))  # heads of 64
        x = x + linear(f"{block}.attn.out_proj", ((q @ k.mT / 8).softmax(-1) @ v).transpose(0, 1).flatten(1))
        y = linear(f"{block}.mlp.c_fc", norm(f"{block}.ln_2", x))
        x = x + linear(f"{block}.mlp.c_proj", y * torch.sigmoid(1.702 * y))
        states.append(x)
        i += 1
        if i % every == 0:
            seen.append(x[0])
    return norm("visual.ln_post", x[:1]) @ state["visual.proj"], torch.stack(seen)[None] if seen else None
