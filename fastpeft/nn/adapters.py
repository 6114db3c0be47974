"""LaVIN's mixture of adapters, and LLaMA-Excitor's attention."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fastpeft import methods, ops
from fastpeft.methods.excitor import ExcitorBlock
from fastpeft.methods.mm_adapter import AdapterParameters
from fastpeft.ops.excitor_turn import excitor_turn, turns


class MMAdapter(AdapterParameters):
    """``x + scale (w_0 B_0 + w_1 B_1)(A x + a)``: two adapters that share their projection down, mixed by a router (LaVIN, equations 2-4).

    x [B, M, embed_dim] or [M, embed_dim], after a norm -> the same shape. h: width of the bottleneck; groups: of the projections up, must
    divide h and embed_dim; dropout: on the bottleneck, in training; temperature: of the router's softmax. State: ``w_down`` [h, C],
    ``b_down`` [h], ``w_up`` [2, C, h / groups], ``b_up`` [2, C], ``router_weight`` [2, C], ``router_bias`` [2]. A new adapter changes
    nothing. ValueError or TypeError for options, shapes and dtypes that do not fit.

    >>> adapter = MMAdapter(16)
    >>> x = torch.ones(2, 3, 16)
    >>> adapter(x, routing=adapter.route(x[:, 0])).shape
    torch.Size([2, 3, 16])
    """

    def __init__(
        self,
        embed_dim: int,
        h: int = 8,
        groups: int = 2,
        scale: float = 1.0,
        dropout: float = 0.1,
        temperature: float = 10.0,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        method = methods.MMAdapter(h, groups, scale, dropout, temperature)  # checks them
        super().__init__(embed_dim, method, lambda *shape: nn.Parameter(torch.empty(shape, device=device, dtype=dtype)))

    def route(self, tokens: Tensor) -> Tensor:
        """The mixture [..., 2] that the router gives to ``tokens`` [..., embed_dim]; float32, or float64 for float64."""
        return self.weights_of(tokens)

    def forward(self, x: Tensor, routing: Tensor | None = None) -> Tensor:
        """x [B, M, C]; routing [B, 2] for samples or [B, M, 2] for tokens, or None: every token routes itself -> [B, M, C]."""
        if x.dim() == 2:
            return self.forward(x[None], None if routing is None else routing.reshape(1, *routing.shape))[0]
        routing = self.weights_of(x) if routing is None else routing
        return ops.mm_adapter(x, self.w_down, self.b_down, self.w_up, self.b_up, routing, *self._options())

    def extra_repr(self) -> str:
        h, C = self.w_down.shape
        return f"{C}, h={h}, groups={self.groups}, scale={self.scale}, dropout={self.dropout}, temperature={self.temperature}"


class ExcitorAttention(nn.Module):
    """Self-attention whose keys are ``k + gate K_x``: every token reconstructs an extra key from learnt prompts, and from an image
    (LLaMA-Excitor, equations 1-9).

    x [B, M, embed_dim] -> [B, M, embed_dim]. ``q_proj``, ``k_proj``, ``v_proj``, ``o_proj`` are frozen linear layers (exchange them as you
    like, :class:`fastpeft.nn.LoRALinear` included). Trained is ``excitor``: ``w_down`` [r, C], ``w_up`` [C, r], ``prompt`` [num_prompts,
    C], ``gate`` [num_heads]; and, with image tokens of width ``visual_dim`` D, ``wk_down``, ``wv_down`` [r, D], ``wk_up``, ``wv_up``
    [C, r]. num_key_value_heads: of grouped heads. gate_std 0 makes a new layer equal plain attention. ValueError for sizes that do not
    fit.

    >>> attention = ExcitorAttention(32, 4, num_prompts=5, r=4, visual_dim=6)
    >>> attention(torch.zeros(2, 7, 32), visual=torch.zeros(2, 3, 6)).shape
    torch.Size([2, 7, 32])
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        *,
        num_key_value_heads: int | None = None,
        bias: bool = False,
        num_prompts: int = 30,
        r: int = 16,
        gate_std: float = 0.01,
        prompt_std: float = 1.0,
        visual_dim: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        kv_heads = num_heads if num_key_value_heads is None else num_key_value_heads
        if min(num_heads, kv_heads) < 1 or embed_dim % num_heads or num_heads % kv_heads:
            raise ValueError(
                f"ExcitorAttention: {num_heads} heads must divide embed_dim = {embed_dim}, and {kv_heads} heads of keys the others"
            )
        method = methods.Excitor(num_prompts=num_prompts, r=r, gate_std=gate_std, prompt_std=prompt_std)  # checks them
        self.embed_dim, self.num_heads, self.num_key_value_heads, self.visual_dim = embed_dim, num_heads, kv_heads, visual_dim
        narrow, make = embed_dim // num_heads * kv_heads, {"bias": bias, "device": device, "dtype": dtype}
        self.q_proj, self.o_proj = nn.Linear(embed_dim, embed_dim, **make), nn.Linear(embed_dim, embed_dim, **make)
        self.k_proj, self.v_proj = nn.Linear(embed_dim, narrow, **make), nn.Linear(embed_dim, narrow, **make)
        self.requires_grad_(False)
        self.excitor = ExcitorBlock(self.q_proj, num_heads, method, visual_dim)

    def reset_parameters(self) -> None:
        """Draw all parameters anew."""
        for module in self.children():
            module.reset_parameters()

    def forward(
        self,
        x: Tensor,
        attention_mask: Tensor | None = None,
        *,
        is_causal: bool = True,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        visual: Tensor | None = None,
    ) -> Tensor:
        """x [B, M, C] -> [B, M, C]. attention_mask [B, M]: 1 or True where a token is attended to, as transformers has it.
        position_embeddings: (cos, sin) [B or 1, M, d] for rotary queries and keys, the extra keys not rotated. visual [B, V, visual_dim]:
        image tokens, for a layer that was made with ``visual_dim``."""
        if x.dim() != 3 or x.shape[-1] != self.embed_dim:
            raise ValueError(f"ExcitorAttention: x has shape {tuple(x.shape)}; pass [B, M, {self.embed_dim}]")
        if visual is not None and self.visual_dim is None:
            raise ValueError("ExcitorAttention: visual= needs a layer that was made with visual_dim=")
        heads = (self.num_heads, self.num_key_value_heads, self.num_key_value_heads)
        projections = zip((self.q_proj, self.k_proj, self.v_proj), heads)
        q, k, v = (proj(x).unflatten(-1, (n, -1)).transpose(1, 2) for proj, n in projections)  # [B, heads, M, d]
        own = self.excitor
        image = None if visual is None else (visual, own.wk_down, own.wk_up, own.wv_down, own.wv_up)
        excitor = (x, own.w_down, own.w_up, own.prompt, own.gate, image)
        v = v.repeat_interleave(self.num_heads // self.num_key_value_heads, 1)  # each query head has its own keys
        if position_embeddings is not None and turns(q, q.shape[-1], position_embeddings[0]):
            q, k = excitor_turn(q, k, position_embeddings, *excitor)
        else:
            if position_embeddings is not None:
                cos, sin = (t.unsqueeze(1) for t in position_embeddings)
                q, k = ops.rotary(q, cos, sin), ops.rotary(k, cos, sin)
            k = ops.excitor_keys(k, *excitor)
        mask = None if attention_mask is None else attention_mask.bool()
        y = ops.attention(q, k, v, causal=is_causal, key_padding_mask=mask)
        return self.o_proj(y.transpose(1, 2).flatten(2))

    def extra_repr(self) -> str:
        return f"{self.embed_dim}, num_heads={self.num_heads}, num_key_value_heads={self.num_key_value_heads}, visual_dim={self.visual_dim}"
