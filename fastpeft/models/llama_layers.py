"""LLaMA's layers on fastpeft's operators: norms, feed-forward, attention. The stack and its head are llama.py's."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn
from transformers.models.llama import modeling_llama

from fastpeft import ops
from fastpeft.methods.adapted import terms_of
from fastpeft.methods.adaption_prompt import Prompted, attend_prompt
from fastpeft.methods.base import watched
from fastpeft.methods.excitor import Visual
from fastpeft.models.attend import around_wrapper, dense_mask_attention, output_factor, project, project_one, project_together, rescaled
from fastpeft.models.layers import Recomputes
from fastpeft.models.layout import Layout, Tail, rows_of


class RMSNorm(modeling_llama.LlamaRMSNorm):
    """RMSNorm with one rounding, at the end; saves its input and one number a row."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        """[..., C]."""
        return ops.rms_norm(hidden_states, self.weight, self.variance_epsilon)


def add_norm(branch: Tensor, residual: Tensor, norm: nn.Module) -> tuple[Tensor, Tensor]:
    """(norm(branch + residual), branch + residual), the sum formed once, inside the norm."""
    if type(norm) not in (modeling_llama.LlamaRMSNorm, RMSNorm) or watched(norm):  # someone's wrapper, such as PEFT's LN tuning
        total = branch + residual
        return norm(total), total
    return ops.add_rms_norm(branch, residual, norm.weight, norm.variance_epsilon)


class MLP(Recomputes, modeling_llama.LlamaMLP):
    """down(silu(gate(x)) * up(x)), the activation in one pass with IA3's factor on it."""

    def forward(self, x: Tensor) -> Tensor:
        """[..., C]."""
        linears = (self.gate_proj, self.up_proj)
        gate, up = self.projected(partial(project, linears), x, linears)
        if self.config.hidden_act != "silu" or watched(self.act_fn):
            return self.down_proj(self.act_fn(gate) * up)
        down = terms_of(self.down_proj)
        if down is None:
            return self.down_proj(ops.swiglu(gate, up))
        return down._replace(before=None)(ops.swiglu(gate, up, down.before))


class Attention(Recomputes, modeling_llama.LlamaAttention):
    """Causal self-attention with grouped heads. Returns (output, None): probabilities are not formed."""

    visual_dim: int | None = None  # width of the images' features that Excitor sees here
    reads_layout = True

    @property
    def excitor_heads(self) -> int:
        return self.config.num_attention_heads

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        attention_mask: Tensor | None = None,
        past_key_values=None,
        prefix: tuple[Tensor, Tensor] | None = None,
        layout: Layout | None = None,
        visual: Visual | None = None,
        tail: Tail | None = None,
        prompted: Prompted | None = None,
        **kwargs,
    ) -> tuple[Tensor, None]:
        """hidden_states [B, M, C], or [T, C] with a ``layout`` (outputs at a ``tail``'s rows only, where one is given);
        position_embeddings (cos, sin), each [B or 1, M, d] or [T, d]; attention_mask [B, N] bool over keys, or transformers' own
        [B, 1, M, N]; visual: images' features for Excitor; prompted: an adaption prompt, where it is not this module's own."""
        adaption = getattr(self, "adaption", None)
        prompted = prompted if adaption is None else adaption.prompted
        tables = tuple(t.unsqueeze(-2) for t in position_embeddings)
        l_v = output_factor(self.v_proj) if prefix is None else None  # a prefix's values l_v does not touch: it cannot wait for the output
        if tail is None:
            linears = (self.q_proj, self.k_proj, self.v_proj)
            q, k, v = self.projected(partial(self._tables, linears, tables, layout, prefix is None), hidden_states, linears)
            keys = layout
        else:
            layout, keys = tail.queries, tail.keys
            asked, hidden_states = (rows_of(hidden_states, index) for index in (tail.tokens, tail.seen))
            asking, tables = (tuple(t if index is None else t[index] for t in tables) for index in (tail.tokens, tail.seen))
            (q,) = self._tables((self.q_proj,), asking, layout, True, asked)
            k, v = self._tables((self.k_proj, self.v_proj), tables, keys, prefix is None, hidden_states)
        excitor = getattr(self, "excitor", None)
        if excitor is not None and excitor.active:  # its gate is one number per query head: groups no longer share their keys
            if (groups := self.num_key_value_groups) > 1:
                k, v = (t.repeat_interleave(groups, 1) for t in (k, v))
                prefix = prefix and tuple(p.repeat_interleave(groups, 0) for p in prefix)
            k = excitor(k, hidden_states, keys, visual, tables)
        if past_key_values is not None:
            k, v = past_key_values.update(k, v, self.layer_idx)
        options = {"prefix": prefix, "rescale": None, "dropout_p": self.attention_dropout if self.training else 0.0}
        if attention_mask is not None and attention_mask.dim() == 4:
            context = dense_mask_attention(q, k, v, attention_mask, **options)
        else:
            context = ops.attention(q, k, v, causal=True, key_padding_mask=attention_mask, **options)
        if prompted is not None:
            context = attend_prompt(context, q, *self._of_prompt(prompted.prompt, prefix is None, past_key_values), prompted.gate)
        context = context.transpose(1, 2).flatten(2)
        if l_v is not None:
            context = ops.rescale(context, self._per_query_head(l_v))
        output = project_one(self.o_proj, context if layout is None else layout.gather(context))
        if prompted is not None and self.o_proj.bias is not None:
            output = output + self.o_proj.bias  # as PEFT: once for the tokens, once for the prompt
        return output, None

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

    def forward(
        self, hidden_states: Tensor, attention_mask=None, position_embeddings=None, past_key_values=None, routing=None, **kwargs
    ) -> Tensor:
        """Arguments as :class:`Attention`'s, and what routes MM-Adapters; returns the shape of hidden_states."""
        norm, adapter = self.input_layernorm, getattr(self, "mm_adapter", None)
        attention = self.self_attn if hasattr(self.self_attn, "reads_layout") else partial(around_wrapper, self.self_attn)
        attended, _ = attention(
            norm(hidden_states) if adapter is None else adapter(hidden_states, norm, routing, self.self_attn.layer_idx),
            position_embeddings=position_embeddings,
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            **kwargs,
        )
        if (tail := kwargs.get("tail")) is not None:
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
