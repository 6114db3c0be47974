"""BLIP's layers on fastpeft's operators: attention, feed-forward, ViT blocks. The text stack and its head are blip.py's."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers.cache_utils import EncoderDecoderCache
from transformers.models.blip import modeling_blip, modeling_blip_text

from fastpeft import ops
from fastpeft.fused.attend import dense_mask_attention, key_value_rescale, output_factor, project, project_one, project_together, rescaled
from fastpeft.fused.layout import Layout, Tail, rows_of
from fastpeft.fused.leaves import Dropout, Recomputes, is_layer_norm
from fastpeft.methods.adapted import linear_spec
from fastpeft.methods.base import has_hooks
from fastpeft.ops._quantized_weight import QuantizedWeight
from fastpeft.ops._recompute import without_recipe
from fastpeft.ops.absorbed_attention import absorbed_attention, absorbed_pays
from fastpeft.savings import forced, on


def reads_probabilities(module: nn.Module) -> bool:
    """Whether a hook on ``module`` (or a forward of its own) sees the probabilities that transformers' attentions return."""
    if not has_hooks(module):
        return False
    return "forward" in module.__dict__ or not all(getattr(hook, "passes_rest_on", False) for hook in module._forward_hooks.values())


class _Attends:
    """What the fused attentions assume of a module, and when transformers' own runs instead."""

    @staticmethod
    def why_not(module: nn.Module) -> str:
        """'' or why fused attention, which takes of ``module.dropout`` its probability alone, computes something else than ``module``."""
        dropout = module.dropout
        if type(dropout) not in (nn.Dropout, Dropout):
            return f"its dropout is a {type(dropout).__name__}"
        return "its dropout has hooks, which read attention probabilities" if has_hooks(dropout) else ""

    def gives_probabilities(self, output_attentions: bool | None) -> bool:
        """Whether transformers' own attention runs: probabilities are asked for, by argument or configuration, or somebody reads them."""
        if output_attentions is None:
            output_attentions = self.config.output_attentions
        return bool(output_attentions) or bool(self.why_not(self)) or reads_probabilities(self)

    @property
    def _dropout_p(self) -> float:
        return self.dropout.p if self.dropout.training else 0.0


class TextSelfAttention(_Attends, Recomputes, modeling_blip_text.BlipTextSelfAttention):
    """Self- or cross-attention of one layer. Returns (context, None): probabilities are not formed unless they are asked for."""

    layout_aware = True

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
        tail: Tail | None = None,
        output_attentions: bool | None = None,
        **kwargs,
    ) -> tuple[Tensor, Tensor | None]:
        """hidden_states [B, M, C], or [T, C] with a ``layout``; masks [B, N] bool over keys (True = attend), or transformers' own
        [B, 1, M, N]. Context has the shape of hidden_states, or of its rows in a self-attention's ``tail``."""
        cross = encoder_hidden_states is not None
        mask = encoder_attention_mask if cross else attention_mask
        # transformers' masks add numbers: a row that is masked as a whole attends to all keys alike, and the gradients that PyTorch's
        # fused attention gives it are those of another row
        additive = mask is not None and mask.is_floating_point()
        if prefix is None and (additive or self.gives_probabilities(output_attentions)):
            return super().forward(hidden_states, attention_mask, encoder_hidden_states, encoder_attention_mask, past_key_values)
        # l_k moves to the query and l_v to the output, except over a prefix, which IA3 does not touch, or a cache, which a caller may read
        folds = prefix is None and past_key_values is None
        l_k, l_v = (output_factor(linear) if folds else None for linear in (self.key, self.value))
        if cross and layout is not None and self._absorbs(encoder_hidden_states, mask, layout):
            context = self._absorbed(project_one(self.query, hidden_states), encoder_hidden_states, layout, l_k)
            return context if l_v is None else ops.rescale(context, l_v), None
        if cross:
            q = project_one(self.query, hidden_states)
            k, v = self._encoder_keys_values(encoder_hidden_states, past_key_values)
            q = self._heads(q if layout is None else layout.spread(q))
        elif tail is not None:
            layout, mask = tail.queries, mask if mask is None else mask[:, : tail.keys.columns]
            (q,) = project_together((self.query,), rows_of(hidden_states, tail.tokens))
            k, v = project_together((self.key, self.value), rows_of(hidden_states, tail.seen))
            q, k, v = (self._heads(t) for t in (layout.spread(rescaled(self.query, q)), tail.keys.spread(k), tail.keys.spread(v)))
        else:
            linears = (self.query, self.key, self.value)

            def heads_of(x):
                q, k, v = project_together(linears, x)
                q = rescaled(self.query, q)  # l_k and l_v are attention's
                if prefix is None and not folds:
                    k, v = rescaled(self.key, k), rescaled(self.value, v)
                return tuple(self._heads(t if layout is None else layout.spread(t)) for t in (q, k, v))

            q, k, v = self.projected(heads_of, hidden_states, linears)
            if past_key_values is not None:
                cache = getattr(past_key_values, "self_attention_cache", past_key_values)
                k, v = cache.update(k, v, self.layer_idx)
        rescale = None if prefix is None else key_value_rescale(self.key, self.value, self.num_attention_heads)
        q, options = self._times(q, l_k), {"prefix": prefix, "rescale": rescale, "dropout_p": self._dropout_p}
        if mask is not None and mask.dim() == 4:
            context = dense_mask_attention(q, k, v, mask, **options)
        else:
            context = ops.attention(q, k, v, causal=causal, key_padding_mask=mask, **options)
        return self._output(context, layout, l_v), None

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.num_attention_heads, self.attention_head_size)).transpose(1, 2)

    def _times(self, q: Tensor, l_k: Tensor | None) -> Tensor:
        return q if l_k is None else ops.rescale(q, l_k.view(self.num_attention_heads, 1, -1))

    def _output(self, context: Tensor, layout: Layout | None, l_v: Tensor | None) -> Tensor:
        """[B, H, M, d] -> the shape of the hidden states."""
        context = context.transpose(1, 2).flatten(2)
        context = context if layout is None else layout.gather(context)
        return context if l_v is None else ops.rescale(context, l_v)

    def _encoder_keys_values(self, states: Tensor, cache) -> tuple[Tensor, Tensor]:
        """k, v [B, H, N, d] of an image or a question, before IA3's factors where there is no cache. An EncoderDecoderCache holds them from
        the first token on.
        A plain cache belongs to self-attention: transformers would append the encoder's keys to it."""
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
        if not on("absorb") or mask is not None or any(spec is None or spec.dropout_p or spec.before is not None for spec in specs):
            return False
        if any(isinstance(spec.projection.weight, QuantizedWeight) for spec in specs):
            return False
        if (use := forced("absorb")) is not None:
            return use
        shape = (layout.tokens / max(1, layout.rows), states.shape[1], states.shape[2], self.num_attention_heads)
        return absorbed_pays(*shape, training=torch.is_grad_enabled(), states_need_grad=states.requires_grad)


class TextAttention(modeling_blip_text.BlipTextAttention):
    """Attention with its output projection; passes the encoder's mask on, which transformers loses here."""

    layout_aware = True

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
        tail = kwargs.get("tail")
        return self.output(context, hidden_states if tail is None else rows_of(hidden_states, tail.tokens)), probabilities


class _AddNorm:
    """norm(dropout(dense(x)) + residual), the sum formed once, inside the norm."""

    layout_aware = True

    def forward(self, hidden_states: Tensor, input_tensor: Tensor) -> Tensor:
        branch, norm = self.dropout(project_one(self.dense, hidden_states)), self.LayerNorm
        if not is_layer_norm(norm):  # someone's wrapper, such as PEFT's LN tuning
            return norm(branch + input_tensor)
        return ops.add_layer_norm(branch, input_tensor, norm.weight, norm.bias, norm.eps)[0]


class TextSelfOutput(_AddNorm, modeling_blip_text.BlipTextSelfOutput):
    pass


class TextOutput(_AddNorm, modeling_blip_text.BlipTextOutput):
    pass


class TextIntermediate(Recomputes, modeling_blip_text.BlipTextIntermediate):
    """The feed-forward's first half; keeps its linear layer's output and neither input nor activation."""

    layout_aware = True

    def forward(self, hidden_states: Tensor) -> Tensor:
        """[..., C] -> [..., 4 C]."""
        (hidden,) = self.projected(lambda x: (project_one(self.dense, x),), hidden_states, (self.dense,))
        return self.intermediate_act_fn(hidden)


class TextLayer(modeling_blip_text.BlipTextLayer):
    """Post-norm layer: self-attention (with prefix), cross-attention where there is something to attend to, feed-forward."""

    layout_aware = True

    def forward(
        self,
        hidden_states,
        encoder_hidden_states=None,
        attention_mask=None,
        encoder_attention_mask=None,
        past_key_values=None,
        prefix=None,
        causal=False,
        layout=None,
        encoder_layout=None,
        tail=None,
        output_attentions=None,
        **kwargs,
    ) -> Tensor:
        if self.gradient_checkpointing and self.training:  # run again in backward, it gets its inputs without the recipes they may have now
            hidden_states, encoder_hidden_states = without_recipe(hidden_states), without_recipe(encoder_hidden_states)
        how = {"prefix": prefix, "causal": causal, "layout": layout, "tail": tail}
        # what is at its default is not said: a module left as transformers wrote it takes no more than its own arguments
        how = {name: value for name, value in how.items() if value is not None and value is not False}
        asked = {} if output_attentions is None else {"output_attentions": output_attentions}
        hidden_states, _ = self.attention(hidden_states, attention_mask=attention_mask, past_key_values=past_key_values, **how | asked)
        if encoder_hidden_states is not None:
            hidden_states, _ = self.crossattention(
                hidden_states,
                attention_mask=encoder_attention_mask,
                encoder_hidden_states=encoder_hidden_states,
                past_key_values=past_key_values,
                **asked if encoder_layout is None else {"layout": encoder_layout},
            )
        return self.feed_forward_chunk(hidden_states)  # chunks would save no memory: nothing in it is kept that is larger than its parts


class VisionAttention(_Attends, Recomputes, modeling_blip.BlipAttention):
    """ViT self-attention from one qkv projection. Returns (output, None): probabilities are not formed unless they are asked for."""

    def forward(self, hidden_states: Tensor, output_attentions: bool | None = None, **kwargs) -> tuple[Tensor, Tensor | None]:
        """hidden_states [B, M, C]."""
        if self.gives_probabilities(output_attentions):
            return super().forward(hidden_states)

        def heads_of(x):
            return project_one(self.qkv, x).unflatten(-1, (3, self.num_heads, self.head_dim)).permute(2, 0, 3, 1, 4).unbind()

        q, k, v = self.projected(heads_of, hidden_states, (self.qkv,))
        context = ops.attention(q, k, v, scale=self.scale, dropout_p=self._dropout_p)
        return project_one(self.projection, context.transpose(1, 2).flatten(2)), None


class VisionMLP(Recomputes, modeling_blip.BlipMLP):
    """fc2(gelu(fc1(x))); keeps fc1's output and neither x nor the activation."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        """[..., C]."""
        (hidden,) = self.projected(lambda x: (project_one(self.fc1, x),), hidden_states, (self.fc1,))
        return project_one(self.fc2, self.activation_fn(hidden))
