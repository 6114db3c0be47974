"""BLIP's text attention on fastpeft's operators: self-attention, cross-attention to images and questions."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers.cache_utils import EncoderDecoderCache

from fastpeft import ops
from fastpeft.fused.attention.common import Attends, dense_mask_attention, reads_probabilities
from fastpeft.fused.layers.projections import Recomputes, key_value_rescale, output_factor, project, project_one, project_together, rescaled
from fastpeft.fused.layout import LabelledQueries, Layout, rows_of
from fastpeft.methods.adapted import linear_spec
from fastpeft.ops._quantized_weight import QuantizedWeight
from fastpeft.ops.absorbed_attention import absorbed_attention, absorbed_pays
from fastpeft.registry import fuses
from fastpeft.savings import forced, on


@fuses("transformers.models.blip.modeling_blip_text.BlipTextSelfAttention", layout_aware=True)
class FusedBlipTextSelfAttention(Attends, Recomputes):
    """Self- or cross-attention of one layer. Returns (context, None): probabilities are not formed unless they are asked for."""

    takes_flat_tokens = True

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        encoder_hidden_states: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        past_key_values=None,
        prefix: tuple[Tensor, Tensor] | None = None,
        causal: bool = False,
        layout: Layout | None = None,
        labelled: LabelledQueries | None = None,
        output_attentions: bool | None = None,
        **kwargs,
    ) -> tuple[Tensor, Tensor | None]:
        """hidden_states [B, M, C], or [T, C] with a ``layout``; masks [B, N] bool over keys (True = attend), or transformers' own
        [B, 1, M, N]. Context has the shape of hidden_states, or of its rows in a self-attention's ``labelled``."""
        cross = encoder_hidden_states is not None
        mask = encoder_attention_mask if cross else attention_mask
        # transformers' masks add numbers: a row that is masked as a whole attends to all keys alike, and the gradients that PyTorch's
        # fused attention gives it are those of another row
        additive = mask is not None and mask.is_floating_point()
        if prefix is None and (additive or self.gives_probabilities(output_attentions)):
            return super().forward(hidden_states, attention_mask, encoder_hidden_states, encoder_attention_mask, past_key_values)
        folds = prefix is None and past_key_values is None
        l_k, l_v = self._folded_factors(folds)
        if cross and layout is not None and self._absorbs(encoder_hidden_states, mask, layout):
            context = self._absorbed(project_one(self.query, hidden_states), encoder_hidden_states, layout, l_k)
            return context if l_v is None else ops.rescale(context, l_v), None
        if cross:
            q = project_one(self.query, hidden_states)
            k, v = self._encoder_keys_values(encoder_hidden_states, past_key_values)
            q = self._heads(q if layout is None else layout.pad(q))
        elif labelled is not None:
            layout, mask = labelled.queries, mask if mask is None else mask[:, : labelled.keys.columns]
            (q,) = project_together((self.query,), rows_of(hidden_states, labelled.tokens))
            k, v = project_together((self.key, self.value), rows_of(hidden_states, labelled.seen))
            q, k, v = (self._heads(t) for t in (layout.pad(rescaled(self.query, q)), labelled.keys.pad(k), labelled.keys.pad(v)))
        else:
            linears = (self.query, self.key, self.value)

            def heads_of(x):
                q, k, v = project_together(linears, x)
                q = rescaled(self.query, q)  # l_k and l_v are attention's
                k, v = self._scaled_for_cache(k, v, prefix is None and not folds)
                return tuple(self._heads(t if layout is None else layout.pad(t)) for t in (q, k, v))

            q, k, v = self.projected(heads_of, hidden_states, linears)
            if past_key_values is not None:
                cache = getattr(past_key_values, "self_attention_cache", past_key_values)
                k, v = cache.update(k, v, self.layer_idx)
        rescale = None if prefix is None else key_value_rescale(self.key, self.value, self.num_attention_heads)
        context = self._attend(self._times(q, l_k), k, v, mask, causal, prefix=prefix, rescale=rescale, dropout_p=self._dropout_p)
        return self._output(context, layout, l_v), None

    def _folded_factors(self, folds: bool) -> tuple[Tensor | None, Tensor | None]:
        """IA3's (l_k, l_v), which move to the query and to the output, except over a prefix, which IA3 does not touch, or a cache, which a
        caller may read."""
        return (output_factor(self.key), output_factor(self.value)) if folds else (None, None)

    def _scaled_for_cache(self, k: Tensor, v: Tensor, scaled: bool) -> tuple[Tensor, Tensor]:
        return (rescaled(self.key, k), rescaled(self.value, v)) if scaled else (k, v)

    @staticmethod
    def _attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool, **options) -> Tensor:
        """[B, H, M, d], under a mask [B, N] over keys or transformers' own [B, 1, M, N]."""
        if mask is not None and mask.dim() == 4:
            return dense_mask_attention(q, k, v, mask, **options)
        return ops.attention(q, k, v, causal=causal, key_padding_mask=mask, **options)

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.num_attention_heads, self.attention_head_size)).transpose(1, 2)

    def _times(self, q: Tensor, l_k: Tensor | None) -> Tensor:
        return q if l_k is None else ops.rescale(q, l_k.view(self.num_attention_heads, 1, -1))

    def _output(self, context: Tensor, layout: Layout | None, l_v: Tensor | None) -> Tensor:
        """[B, H, M, d] -> the shape of the hidden states."""
        context = context.transpose(1, 2).flatten(2)
        context = context if layout is None else layout.unpad(context)
        return context if l_v is None else ops.rescale(context, l_v)

    def _encoder_keys_values(self, states: Tensor, cache) -> tuple[Tensor, Tensor]:
        """k, v [B, H, N, d] of an image or a question, before IA3's factors where there is no cache. An EncoderDecoderCache holds them from
        the first token on. A plain cache belongs to self-attention: transformers would append the encoder's keys to it."""
        paired = isinstance(cache, EncoderDecoderCache)
        if paired and cache.is_updated.get(self.layer_idx):
            layer = cache.cross_attention_cache.layers[self.layer_idx]
            return layer.keys, layer.values
        together = project_together if cache is None else project
        k, v = (self._heads(t) for t in together((self.key, self.value), states))
        if paired:
            k, v = cache.cross_attention_cache.update(k, v, self.layer_idx)
            cache.is_updated[self.layer_idx] = True
        return k, v

    def _absorbed(self, q: Tensor, states: Tensor, layout: Layout, l_k: Tensor | None) -> Tensor:
        """Queries [T, C] over states [U, N, C] -> their context [T, C] before IA3's l_v."""
        q = layout.by_row(q).unflatten(-1, (self.num_attention_heads, self.attention_head_size))
        q = q if l_k is None else ops.rescale(q, l_k.view(q.shape[1:]))
        key, value = (linear_spec(linear).projection for linear in (self.key, self.value))
        context = absorbed_attention(q, states, key, value, self.attention_head_size**-0.5, self._dropout_p, layout.counts)
        return layout.from_rows(context.flatten(1))

    def _absorbs(self, states: Tensor, mask: Tensor | None, layout: Layout) -> bool:
        """Whether to attend to the states themselves: only where that is exact and takes fewer FLOPs."""
        specs = [linear_spec(linear) for linear in (self.key, self.value)]
        if not on("absorb") or mask is not None or any(spec is None or spec.dropout_p or spec.input_scale is not None for spec in specs):
            return False
        if any(isinstance(spec.projection.weight, QuantizedWeight) for spec in specs):
            return False
        if (use := forced("absorb")) is not None:
            return use
        shape = (layout.per_row, states.shape[1], states.shape[2], self.num_attention_heads)
        return absorbed_pays(*shape, training=torch.is_grad_enabled(), states_need_grad=states.requires_grad)


MASK_FIX = "cross-attention now honours encoder_attention_mask, which transformers 4.57 to 5.23 loses: padded questions no longer leak"


@fuses("transformers.models.blip.modeling_blip_text.BlipTextAttention", layout_aware=True, note=MASK_FIX)
class FusedBlipTextAttention:
    """Attention with its output projection; passes the encoder's mask on, which transformers loses here."""

    takes_flat_tokens = True

    def forward(self, hidden_states, attention_mask=None, encoder_hidden_states=None, past_key_values=None, **kwargs):
        mask = "attention_mask" if encoder_hidden_states is None else "encoder_attention_mask"
        if reads_probabilities(self):
            kwargs["output_attentions"] = True
        context, probabilities = self.self(
            hidden_states,
            encoder_hidden_states=encoder_hidden_states,
            past_key_values=past_key_values,
            **{mask: attention_mask},
            **kwargs,
        )
        labelled = kwargs.get("labelled")
        return self.output(context, hidden_states if labelled is None else rows_of(hidden_states, labelled.tokens)), probabilities
