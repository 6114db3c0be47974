"""Papers' equations of the language models' methods, on transformers' own modules: Excitor's two score matrices, LLaMA-Adapter's two
softmaxes, LaVIN's modality token in the text. baseline.py puts them in place; none runs an operator of fastpeft.

Whole sequences only: the one cache that is read is a prefix. What is in float32 under a 16-bit base computes in float32, as in PEFT.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.models.clip.modeling_clip import CLIPEncoderLayer
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaDecoderLayer, apply_rotary_pos_emb, repeat_kv

from fastpeft.methods.mm_adapter import FEED_FORWARD


class PaperAttention(LlamaAttention):
    """A LLaMA's attention with ``excitor`` (Zou et al., 2024, equations 1-9) and/or ``adaption`` (Zhang et al., 2024, section 3.2)."""

    def forward(
        self, hidden_states, position_embeddings, attention_mask=None, past_key_values=None, visual=None, visual_index=None, **kwargs
    ):
        """hidden_states [B, M, C]; attention_mask transformers' own [B, 1, M, N], None: causal. visual [U, V, D] and visual_index [B]: the
        image of each sample, -1 for none."""
        prefix = 0 if past_key_values is None else past_key_values.get_seq_length(self.layer_idx)
        if prefix != getattr(past_key_values, "prefix_tokens", 0):
            raise ValueError("the papers' equations read whole sequences: generate with use_cache=False")
        q, k, v = (self._heads(linear(hidden_states)) for linear in (self.q_proj, self.k_proj, self.v_proj))
        q, k = apply_rotary_pos_emb(q, k, *position_embeddings)
        if past_key_values is not None:
            k, v = past_key_values.update(k, v, self.layer_idx)
        k, v = (repeat_kv(t, self.num_key_value_groups) for t in (k, v))
        scores = q @ k.mT * self.scaling
        if getattr(self, "excitor", None) is not None:
            images = [None] * len(q) if visual is None else [visual[i] if i >= 0 else None for i in visual_index.tolist()]
            extra = F.pad(self._extra_keys(hidden_states, images, position_embeddings).to(q.dtype), (0, 0, prefix, 0))  # none for a prefix
            scores = scores + self.excitor.gate.view(1, -1, 1, 1) * (q @ extra.mT * self.scaling)  # S + g S_extra
        context = (masked(scores, attention_mask).softmax(-1, dtype=_wide(q)).to(v.dtype)) @ v
        output = self.o_proj(context.transpose(1, 2).flatten(2))
        if getattr(self, "adaption", None) is not None:
            output = output + self._of_prompt(q)
        return output, None

    def _heads(self, t: Tensor) -> Tensor:
        return t.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)

    def _extra_keys(self, hidden: Tensor, images: list, tables: tuple[Tensor, Tensor]) -> Tensor:
        """K_x [B, H, M, d]: every token reads the learnt prompts, and its image's tokens."""
        block, found = self.excitor, []
        asked = F.linear(F.linear(hidden.to(block.w_down.dtype), block.w_down), block.w_up)  # [B, M, C]
        for one, image in zip(asked, images):
            keys = values = block.prompt
            if image is not None:
                image = image.to(block.wk_down.dtype)
                keys = torch.cat([keys, F.linear(F.linear(image, block.wk_down), block.wk_up)])
                values = torch.cat([values, F.linear(F.linear(image, block.wv_down), block.wv_up)])
            found.append((one @ keys.T * block.scale).softmax(-1) @ values)
        extra = self._heads(torch.stack(found))
        return apply_rotary_pos_emb(extra, extra, *tables)[0] if block.rotary else extra

    def _of_prompt(self, q: Tensor) -> Tensor:
        """What the adaption prompt adds to the output, [B, M, C]."""
        prompt = self.adaption.prompt.to(q.dtype)[None]
        k, v = (repeat_kv(self._heads(linear(prompt)), self.num_key_value_groups) for linear in (self.k_proj, self.v_proj))
        read = (q @ k.mT * self.scaling).softmax(-1, dtype=_wide(q)).to(v.dtype)
        return self.o_proj((self.adaption.gate.to(v.dtype) * read @ v).transpose(1, 2).flatten(2))


def masked(scores: Tensor, mask: Tensor | None) -> Tensor:
    """scores [B, H, M, N] under transformers' mask, bool or added; None: causal, aligned at the last key."""
    if mask is None:
        M, N = scores.shape[-2:]
        mask = torch.ones(M, N, dtype=torch.bool, device=scores.device).tril(N - M)
    return scores.masked_fill(~mask, -math.inf) if mask.dtype == torch.bool else scores + mask


def _wide(t: Tensor) -> torch.dtype:
    return torch.promote_types(t.dtype, torch.float32)


def adapted_by(block: nn.Module, x: Tensor, routed_by: Tensor) -> Tensor:
    """LaVIN's equations: x + s (w0 B(A x) + w1 D(A x)), w = softmax(router(routed_by) / t); one expert needs no router."""
    dtype, x, routed_by = x.dtype, x.to(block.w_down.dtype), routed_by.to(block.w_down.dtype)
    low = F.dropout(F.linear(x, block.w_down, block.b_down), block.dropout, block.training)
    up = []
    for weight, bias in zip(block.w_up, block.b_up):  # each expands the bottleneck by groups: a grouped 1 x 1 convolution
        pieces = zip(low.chunk(block.groups, -1), weight.chunk(block.groups))
        up.append(torch.cat([F.linear(piece, rows) for piece, rows in pieces], -1) + bias)
    if len(up) == 1:
        return (x + block.scale * up[0]).to(dtype)
    weights = (F.linear(routed_by, block.router_weight, block.router_bias) / block.temperature).softmax(-1)
    return (x + block.scale * (weights[..., :1] * up[0] + weights[..., 1:] * up[1])).to(dtype)


class PaperDecoderLayer(LlamaDecoderLayer):
    """A LLaMA's layer with adapters before its attention and before its feed-forward block, routed by the token at position 0."""

    def forward(self, hidden_states: Tensor, **kwargs) -> Tensor:
        """hidden_states [B, 1 + L, C]."""
        x = self.input_layernorm(hidden_states)
        attended, _ = self.self_attn(hidden_states=adapted_by(self.mm_adapter, x, x[:, :1]), **kwargs)
        hidden_states = hidden_states + attended
        x = self.post_attention_layernorm(hidden_states)
        return hidden_states + self.mlp(x if (block := getattr(self, FEED_FORWARD, None)) is None else adapted_by(block, x, x[:, :1]))


class PaperEncoderLayer(CLIPEncoderLayer):
    """CLIP's layer with adapters before its attention and before its feed-forward block: every token is routed by itself."""

    def forward(self, hidden_states: Tensor, attention_mask: Tensor | None = None, **kwargs) -> Tensor:
        """hidden_states [B, M, C]."""
        x = self.layer_norm1(hidden_states)
        attended, _ = self.self_attn(hidden_states=adapted_by(self.mm_adapter, x, x), attention_mask=attention_mask, **kwargs)
        hidden_states = hidden_states + attended
        x = self.layer_norm2(hidden_states)
        return hidden_states + self.mlp(x if (block := getattr(self, FEED_FORWARD, None)) is None else adapted_by(block, x, x))


PAPER_CLASSES = {LlamaAttention: PaperAttention, LlamaDecoderLayer: PaperDecoderLayer, CLIPEncoderLayer: PaperEncoderLayer}


def with_modality_token(llm: nn.Module, args: tuple, kwargs: dict):
    """A hook before a LlamaForCausalLM: each text starts with its modality's token, which no later token attends to."""
    modality, tokens = kwargs.pop("modality"), torch.stack(kwargs.pop("modality_embeds"))
    text, mask, labels = kwargs["inputs_embeds"], kwargs.get("attention_mask"), kwargs.get("labels")
    kwargs["inputs_embeds"] = torch.cat([tokens[modality.to(tokens.device)][:, None].to(text.dtype), text], 1)
    B, L = kwargs["inputs_embeds"].shape[:2]
    allowed = torch.ones(L, L, dtype=torch.bool, device=text.device).tril()
    allowed[1:, 0] = False
    allowed = allowed.expand(B, 1, L, L)
    if mask is not None:
        allowed = allowed & F.pad(mask.bool(), (1, 0), value=True)[:, None, None]
    kwargs["attention_mask"] = allowed
    if labels is not None:
        kwargs["labels"] = F.pad(labels, (1, 0), value=-100)
    return args, kwargs
