"""LLaMA's layers on fastpeft's operators: norms, feed-forward, attention. The stack and its head are llama.py's."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn
from transformers.activations import SiLUActivation
from transformers.models.llama import modeling_llama

from fastpeft import ops
from fastpeft.fused.attend import (
    READ_BY_ATTENTION,
    dense_mask_attention,
    forms_probabilities,
    output_factor,
    project,
    project_one,
    project_together,
    rescaled,
    why_not_fused,
)
from fastpeft.fused.layout import Layout, Tail, rows_of
from fastpeft.fused.leaves import Recomputes
from fastpeft.methods.adapted import linear_spec
from fastpeft.methods.adaption_prompt import Prompted, attend_prompt
from fastpeft.methods.base import has_hooks
from fastpeft.methods.excitor import Visual
from fastpeft.methods.mm_adapter import Routing


class RMSNorm(modeling_llama.LlamaRMSNorm):
    """RMSNorm with one rounding, at the end; saves its input and one number a row."""

    layout_aware = True

    def forward(self, hidden_states: Tensor) -> Tensor:
        """[..., C]."""
        return ops.rms_norm(hidden_states, self.weight, self.variance_epsilon)


def add_norm(branch: Tensor, residual: Tensor, norm: nn.Module) -> tuple[Tensor, Tensor]:
    """(norm(branch + residual), branch + residual), the sum formed once, inside the norm."""
    if type(norm) not in (modeling_llama.LlamaRMSNorm, RMSNorm) or has_hooks(norm):  # someone's wrapper, such as PEFT's LN tuning
        total = branch + residual
        return norm(total), total
    return ops.add_rms_norm(branch, residual, norm.weight, norm.variance_epsilon)


SILU = (nn.SiLU, SiLUActivation)


class MLP(Recomputes, modeling_llama.LlamaMLP):
    """down(silu(gate(x)) * up(x)), the activation in one pass with IA3's factor on it."""

    layout_aware = True

    def forward(self, x: Tensor) -> Tensor:
        """[..., C]."""
        if has_hooks(self.act_fn):
            return super().forward(x)
        linears = (self.gate_proj, self.up_proj)
        gate, up = self.projected(partial(project, linears), x, linears)
        if type(self.act_fn) not in SILU:
            return self.down_proj(self.act_fn(gate) * up)
        down = linear_spec(self.down_proj)
        if down is None:
            return self.down_proj(ops.swiglu(gate, up))
        return down._replace(before=None)(ops.swiglu(gate, up, down.before))


class Attention(Recomputes, modeling_llama.LlamaAttention):
    """Self-attention with grouped heads. Returns (output, None): probabilities are not formed. Where its settings or its caller ask for
    what the fused form has not (see :meth:`why_not_now`), transformers' own forward runs."""

    layout_aware = True
    visual_dim: int | None = None  # width of the images' features that Excitor sees here

    @property
    def excitor_heads(self) -> int:
        return self.config.num_attention_heads

    @staticmethod
    def why_not(module: nn.Module) -> str:
        """'' or why this one stays as it is."""
        return why_not_fused(module) or ("" if isinstance(module.scaling, int | float) else "its scaling is no number")

    def why_not_now(self, attention_mask: Tensor | None, options: dict) -> str:
        """'' or why this call is for transformers' own forward. attention_mask as transformers' model gives it, options: the keywords."""
        if reason := self.why_not(self):
            return reason
        if forms_probabilities(self, options):
            return "someone reads its probabilities, which fused attention does not form"
        if given := [name for name in READ_BY_ATTENTION if options.get(name) is not None]:
            return f"{given[0]} is given, which the fused form does not know"
        name = self.config._attn_implementation or "eager"
        if name not in ("eager", "sdpa") or (attention_mask is not None and attention_mask.dim() != 4):
            return f"{name} makes masks of its own kind"
        return ""

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        attention_mask: Tensor | None = None,
        past_key_values=None,
        causal: bool | None = None,
        prefix: tuple[Tensor, Tensor] | None = None,
        layout: Layout | None = None,
        visual: Visual | None = None,
        tail: Tail | None = None,
        prompted: Prompted | None = None,
        **kwargs,
    ) -> tuple[Tensor, Tensor | None]:
        """hidden_states [B, M, C], or [T, C] with a ``layout`` (outputs at a ``tail``'s rows only, where one is given);
        position_embeddings (cos, sin), each [B or 1, M, d] or [T, d]. ``causal`` None: called as transformers' model calls it, with its
        mask; True or False: by our own stack, attention_mask [B, N] bool over keys. ``layout`` with hidden_states [B, M, C]: samples are
        packed. visual: images' features for Excitor; prompted: an adaption prompt, where it is not this module's own."""
        adaption, excitor = getattr(self, "adaption", None), getattr(self, "excitor", None)
        prompted = prompted if adaption is None else adaption.prompted
        excitor = excitor if excitor is not None and excitor.active else None
        reason = self.why_not_now(attention_mask, kwargs) if causal is None else self.why_not(self)
        if reason:
            if causal is not None or prefix is not None or excitor is not None or prompted is not None:
                raise ValueError(f"attention {self.layer_idx} must run its own forward, as {reason}; what was attached to it cannot")
            return super().forward(
                hidden_states,
                position_embeddings=position_embeddings,
                attention_mask=attention_mask,
                past_key_values=past_key_values,
                **kwargs,
            )
        shape, tables = hidden_states.shape[:-1], tuple(t.unsqueeze(-2) for t in position_embeddings)
        # l_v moves to the output, except over a prefix, whose values it does not touch, or a cache, which a caller may read
        values_raw = prefix is None and past_key_values is None
        l_v = output_factor(self.v_proj) if values_raw else None
        if tail is None:
            linears = (self.q_proj, self.k_proj, self.v_proj)
            q, k, v = self.projected(partial(self._tables, linears, tables, layout, values_raw), hidden_states, linears)
            keys = layout
        else:
            layout, keys = tail.queries, tail.keys
            asked, hidden_states = (rows_of(hidden_states, index) for index in (tail.tokens, tail.seen))
            asking, tables = (tuple(t if index is None else t[index] for t in tables) for index in (tail.tokens, tail.seen))
            (q,) = self._tables((self.q_proj,), asking, layout, True, asked)
            k, v = self._tables((self.k_proj, self.v_proj), tables, keys, values_raw, hidden_states)
            shape = asked.shape[:-1]
        if excitor is not None:  # its gate is one number per query head: groups no longer share their keys
            if (groups := self.num_key_value_groups) > 1:
                k, v = (t.repeat_interleave(groups, 1) for t in (k, v))
                prefix = prefix and tuple(p.repeat_interleave(groups, 0) for p in prefix)
            k = excitor(k, hidden_states, keys, visual, tables)
        if past_key_values is not None:
            k, v = past_key_values.update(k, v, self.layer_idx)
        context = self._attend(q, k, v, attention_mask, causal, prefix, kwargs.get("is_causal"))
        if prompted is not None:
            context = attend_prompt(context, q, *self._of_prompt(prompted.prompt, values_raw, past_key_values), prompted.gate)
        context = context.transpose(1, 2).flatten(2)
        if l_v is not None:
            context = ops.rescale(context, self._per_query_head(l_v))
        output = project_one(self.o_proj, context if layout is None else layout.gather(context).view(*shape, -1))
        if prompted is not None and self.o_proj.bias is not None:
            output = output + self.o_proj.bias  # as PEFT: once for the tokens, once for the prompt
        return output, None

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool | None, prefix, is_causal: bool | None) -> Tensor:
        """[B, H, M, d]. ``causal`` None: ``mask`` and ``is_causal`` mean what they mean to transformers' functions."""
        options = {"prefix": prefix, "rescale": None, "scale": float(self.scaling)}
        options["dropout_p"] = self.attention_dropout if self.training else 0.0
        if causal is not None:
            return ops.attention(q, k, v, causal=causal, key_padding_mask=mask, **options)
        if mask is not None:
            return dense_mask_attention(q, k, v, mask, eager=self.config._attn_implementation == "eager", **options)
        M, causal = q.shape[2], self.is_causal if is_causal is None else is_causal
        if causal and M > 1 and k.shape[2] > M:  # a cache of fixed size, not yet filled: causality is aligned at the first key
            k, v = k[:, :, :M], v[:, :, :M]
        return ops.attention(q, k, v, causal=bool(causal), **options)

    def _of_prompt(self, prompt: Tensor, values_raw: bool, cache) -> tuple[Tensor, Tensor]:
        """Keys, not rotated, and values of an adaption prompt [n, C], each [1, H_kv, n, d]; in generation they stay with the cache."""
        kept = {} if cache is None or torch.is_grad_enabled() else cache.__dict__.setdefault("prompts", {})
        if kept.get(self.layer_idx, (None,))[0] is prompt:
            return kept[self.layer_idx][1:]
        k, v = project_together((self.k_proj, self.v_proj), prompt.to(self.k_proj.weight.dtype).view(1, -1, prompt.shape[-1]))
        k, v = rescaled(self.k_proj, k), v if values_raw else rescaled(self.v_proj, v)
        kept[self.layer_idx] = (prompt, *(t.unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for t in (k, v)))
        return kept[self.layer_idx][1:]

    def _tables(self, linears, rotary, layout: Layout | None, values_raw: bool, x: Tensor) -> tuple[Tensor, ...]:
        """Projections of x as attention reads them, [B, heads, M, d]: rotated (values apart), and with IA3's factors, except that
        ``values_raw`` leaves l_v to the output. l_k multiplies the key before its rotation: q cannot take it."""
        out = []
        for linear, t in zip(linears, project_together(linears, x)):
            value = linear is self.v_proj
            t = t if value and values_raw else rescaled(linear, t)
            t = t if value else ops.rotary(t.unflatten(-1, (-1, self.head_dim)), *rotary).flatten(-2)
            t = t if layout is None else layout.spread(t)
            out.append(t.unflatten(-1, (-1, self.head_dim)).transpose(1, 2))
        return tuple(out)

    def _per_query_head(self, l: Tensor) -> Tensor:
        """[H_kv d] -> [H d]."""
        return l.view(-1, 1, self.head_dim).expand(-1, self.num_key_value_groups, -1).flatten()


class DecoderLayer(modeling_llama.LlamaDecoderLayer):
    """Pre-norm layer; each residual sum is formed once."""

    layout_aware = True

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values=None,
        use_cache: bool | None = False,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        routing: Routing | None = None,
        tail: Tail | None = None,
        **kwargs,
    ) -> Tensor:
        """Arguments as :class:`Attention`'s, and what routes MM-Adapters; returns the shape of hidden_states."""
        kwargs |= {"position_ids": position_ids, "use_cache": use_cache} | ({} if tail is None else {"tail": tail})
        norm, adapter = self.input_layernorm, getattr(self, "mm_adapter", None)
        attended, *_ = self.self_attn(
            hidden_states=norm(hidden_states) if adapter is None else adapter(hidden_states, norm, routing, self.self_attn.layer_idx),
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            position_embeddings=position_embeddings,
            **kwargs,
        )
        if tail is not None:
            hidden_states = rows_of(hidden_states, tail.tokens)
        x, hidden_states = add_norm(attended, hidden_states, self.post_attention_layernorm)
        return hidden_states + self.mlp(x)

    @property
    def adapter_readers(self) -> tuple[nn.Module, ...]:
        """The projections that read what an adapter puts out."""
        return self.self_attn.q_proj, self.self_attn.k_proj, self.self_attn.v_proj

    def give_biases(self) -> None:
        """Zeros to the attention's linear layers, and word of them to the configuration: a merged adapter has a bias."""
        for linear in (*self.adapter_readers, self.self_attn.o_proj):
            linear.bias = nn.Parameter(linear.weight.new_zeros(len(linear.weight)), requires_grad=False)
        self.self_attn.config.attention_bias = True
