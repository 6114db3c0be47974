"""BLIP's modules on fastpeft's operators: the same parameters under the same names, another ``forward``.

:func:`fastpeft.optimize` gives the transformers modules these classes in place. What differs from transformers' own:

- attention never forms its probabilities (any flash backend serves), takes prefixes, and folds IA3's factors into q and the output;
- masks stay [B, N] booleans, so that no [B, 1, M, N] tensor is built;
- **cross-attention honours ``encoder_attention_mask``.** transformers 4.57 to 5.23 loses it on the way (``BlipTextLayer`` passes it
  as ``attention_mask``, ``BlipTextSelfAttention`` reads ``encoder_attention_mask``): padding of a question leaks into the decoder;
- the language-model loss forms logits at labelled positions only, and no logits are returned from a training step.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.cache_utils import DynamicCache, EncoderDecoderCache
from transformers.modeling_outputs import BaseModelOutputWithPoolingAndCrossAttentions, CausalLMOutputWithCrossAttentions
from transformers.models.blip import modeling_blip, modeling_blip_text
from transformers.utils import can_return_tuple

from fastpeft import ops
from fastpeft.methods.adapted import AdaptedLinear


class TextSelfAttention(modeling_blip_text.BlipTextSelfAttention):
    """Self- or cross-attention of one layer. Returns (context [B, M, C], None): probabilities are not formed."""

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        encoder_hidden_states: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        past_key_values=None,
        prefix: tuple[Tensor, Tensor] | None = None,
        causal: bool = False,
        **kwargs,
    ) -> tuple[Tensor, None]:
        """hidden_states [B, M, C]; masks [B, N] bool over keys (True = attend), or transformers' own [B, 1, M, N]."""
        cross = encoder_hidden_states is not None
        mask = encoder_attention_mask if cross else attention_mask
        q = self._heads(self.query(hidden_states))
        k, v = self._keys_values(encoder_hidden_states if cross else hidden_states, past_key_values, cross)
        options = {"prefix": prefix, "rescale": self._rescale(), "dropout_p": self.dropout.p if self.training else 0.0}
        if mask is not None and mask.dim() == 4:
            context = dense_mask_attention(q, k, v, mask, **options)
        else:
            context = ops.attention(q, k, v, causal=causal, key_padding_mask=mask, **options)
        return context.transpose(1, 2).flatten(2), None

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.num_attention_heads, self.attention_head_size)).transpose(1, 2)

    def _rescale(self) -> tuple[Tensor, Tensor] | None:
        """IA3's (l_k, l_v), each [H, d]."""
        l_k, l_v = (linear.output_rescale if isinstance(linear, AdaptedLinear) else None for linear in (self.key, self.value))
        if l_k is None and l_v is None:
            return None
        l_k, l_v = (torch.ones_like(l_v) if l_k is None else l_k), (torch.ones_like(l_k) if l_v is None else l_v)
        return l_k.view(self.num_attention_heads, -1), l_v.view(self.num_attention_heads, -1)

    def _keys_values(self, states: Tensor, cache, cross: bool) -> tuple[Tensor, Tensor]:
        """k, v [B, H, N, d] before IA3's factors; the cache holds them so, and the image's or question's only once."""
        layer_cache = cache
        if isinstance(cache, EncoderDecoderCache):
            layer_cache = cache.cross_attention_cache if cross else cache.self_attention_cache
            if cross and cache.is_updated.get(self.layer_idx):
                return layer_cache.layers[self.layer_idx].keys, layer_cache.layers[self.layer_idx].values
        k, v = self._heads(before_rescale(self.key, states)), self._heads(before_rescale(self.value, states))
        # a plain cache belongs to self-attention: transformers would append the encoder's keys to it
        if layer_cache is not None and (layer_cache is not cache or not cross):
            k, v = layer_cache.update(k, v, self.layer_idx)
            if cross:
                cache.is_updated[self.layer_idx] = True
        return k, v


def before_rescale(linear: nn.Linear, x: Tensor) -> Tensor:
    """A projection without IA3's factor on its output, which attention folds into q and into its own output."""
    return linear.before_rescale(x) if isinstance(linear, AdaptedLinear) else linear(x)


def dense_mask_attention(q, k, v, mask, *, prefix, rescale, dropout_p) -> Tensor:
    """Attention under transformers' own [B, 1, M, N] mask, for text models whose outer modules were left as they are."""
    if rescale is not None:
        k, v = k * rescale[0][:, None].to(k.dtype), v * rescale[1][:, None].to(v.dtype)
    if prefix is not None:
        k, v = (torch.cat([p.to(t.dtype).expand(t.shape[0], -1, -1, -1), t], dim=2) for p, t in zip(prefix, (k, v)))
        mask = F.pad(mask, (prefix[0].shape[1], 0), value=True if mask.dtype == torch.bool else 0.0)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout_p)


class TextAttention(modeling_blip_text.BlipTextAttention):
    """Attention with its output projection; passes the encoder's mask on, which transformers loses here."""

    def forward(
        self,
        hidden_states,
        attention_mask=None,
        encoder_hidden_states=None,
        past_key_values=None,
        prefix=None,
        causal=False,
        **kwargs,
    ):
        mask = "attention_mask" if encoder_hidden_states is None else "encoder_attention_mask"
        context, _ = self.self(
            hidden_states,
            encoder_hidden_states=encoder_hidden_states,
            past_key_values=past_key_values,
            prefix=prefix,
            causal=causal,
            **{mask: attention_mask},
        )
        return self.output(context, hidden_states), None


class TextLayer(modeling_blip_text.BlipTextLayer):
    """Post-norm layer: self-attention (with prefix), cross-attention where there is something to attend to, feed-forward."""

    def forward(
        self,
        hidden_states,
        encoder_hidden_states=None,
        attention_mask=None,
        encoder_attention_mask=None,
        past_key_values=None,
        prefix=None,
        causal=False,
        **kwargs,
    ) -> Tensor:
        hidden_states, _ = self.attention(
            hidden_states, attention_mask=attention_mask, past_key_values=past_key_values, prefix=prefix, causal=causal
        )
        if encoder_hidden_states is not None:
            hidden_states, _ = self.crossattention(
                hidden_states,
                attention_mask=encoder_attention_mask,
                encoder_hidden_states=encoder_hidden_states,
                past_key_values=past_key_values,
            )
        return self.feed_forward_chunk(hidden_states)


class TextModel(modeling_blip_text.BlipTextModel):
    """The stack of text layers: hands each its prefix, keeps masks [B, N], counts positions from the end of the prefix."""

    @property
    def prefix_shape(self) -> tuple[int, int, int]:
        first = self.encoder.layer[0].attention.self
        return len(self.encoder.layer), first.num_attention_heads, first.attention_head_size

    @can_return_tuple
    def forward(
        self,
        input_ids=None,
        attention_mask=None,
        position_ids=None,
        inputs_embeds=None,
        encoder_embeds=None,
        encoder_hidden_states=None,
        encoder_attention_mask=None,
        past_key_values=None,
        use_cache=None,
        is_decoder=False,
        output_attentions=None,
        output_hidden_states=None,
        **kwargs,
    ) -> BaseModelOutputWithPoolingAndCrossAttentions:
        """Arguments as BlipTextModel's; ``is_decoder`` makes self-attention causal. Masks [B, N]: nonzero = attend."""
        if output_attentions:
            raise ValueError("fused attention forms no probabilities to return; call fastpeft.restore(model) first")
        if (input_ids is None) == (inputs_embeds is None) and encoder_embeds is None:
            raise ValueError("give exactly one of input_ids and inputs_embeds")
        encoder = getattr(self, "prefix_encoder", None)
        prefixes = [None] * len(self.encoder.layer) if encoder is None else encoder()
        if use_cache is None:
            use_cache = self.config.use_cache
        if is_decoder and use_cache:
            past_key_values = self._cache(past_key_values)
        past = past_key_values.get_seq_length() if past_key_values is not None else 0
        hidden = encoder_embeds
        if hidden is None:
            hidden = self.embeddings(
                input_ids=input_ids,
                position_ids=position_ids,
                inputs_embeds=inputs_embeds,
                past_key_values_length=past + (encoder.tokens if encoder is not None else 0),
            )
        states = (hidden,)
        for layer, prefix in zip(self.encoder.layer, prefixes):
            hidden = layer(
                hidden,
                encoder_hidden_states,
                attention_mask=as_key_mask(attention_mask),
                encoder_attention_mask=as_key_mask(encoder_attention_mask),
                past_key_values=past_key_values,
                prefix=prefix,
                causal=bool(is_decoder),
            )
            states += (hidden,) if output_hidden_states else ()
        return BaseModelOutputWithPoolingAndCrossAttentions(
            last_hidden_state=hidden,
            pooler_output=self.pooler(hidden) if self.pooler is not None else None,
            past_key_values=past_key_values,
            hidden_states=states if output_hidden_states else None,
        )

    def _cache(self, cache):
        if cache is None:
            return EncoderDecoderCache(DynamicCache(config=self.config), DynamicCache(config=self.config))
        return EncoderDecoderCache(cache, DynamicCache(config=self.config)) if isinstance(cache, DynamicCache) else cache


def as_key_mask(mask: Tensor | None) -> Tensor | None:
    """[B, N] of any dtype -> bool; transformers' 4-D masks pass as they are."""
    return mask if mask is None or mask.dim() == 4 else mask.bool()


class TextLMHeadModel(modeling_blip_text.BlipTextLMHeadModel):
    """Decoder with its head. In training, with labels, logits exist for labelled positions only and are not returned."""

    @can_return_tuple
    def forward(
        self,
        input_ids=None,
        attention_mask=None,
        position_ids=None,
        inputs_embeds=None,
        encoder_hidden_states=None,
        encoder_attention_mask=None,
        labels=None,
        past_key_values=None,
        use_cache=None,
        return_logits=False,
        is_decoder=True,
        reduction="mean",
        logits_to_keep=0,
        **kwargs,
    ) -> CausalLMOutputWithCrossAttentions:
        """As BlipTextLMHeadModel's; reduction "none" sums over each sample's tokens, like transformers."""
        lean = labels is not None and self.training and not return_logits
        outputs = self.bert(
            input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            encoder_hidden_states=encoder_hidden_states,
            encoder_attention_mask=encoder_attention_mask,
            past_key_values=past_key_values,
            is_decoder=is_decoder,
            use_cache=False if labels is not None else use_cache,
            **kwargs,
        )
        hidden, logits, loss = outputs.last_hidden_state, None, None
        if not lean:
            keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) and logits_to_keep else slice(None)
            logits = self.cls(hidden[:, keep if isinstance(logits_to_keep, int) else logits_to_keep])
        if return_logits:
            return logits[:, :-1].contiguous()
        if labels is not None:
            loss = self._loss(hidden[:, :-1], labels[:, 1:], reduction)
        return CausalLMOutputWithCrossAttentions(
            loss=loss, logits=logits, past_key_values=outputs.past_key_values, hidden_states=outputs.hidden_states
        )

    def _loss(self, hidden: Tensor, labels: Tensor, reduction: str) -> Tensor:
        head = self.cls.predictions
        loss = ops.linear_cross_entropy(
            head.transform(hidden),
            head.decoder.weight,
            head.decoder.bias,
            labels.to(hidden.device),
            label_smoothing=self.label_smoothing,
            reduction=reduction,
        )
        return loss.view(labels.shape).sum(1) if reduction == "none" else loss


class VisionAttention(modeling_blip.BlipAttention):
    """ViT self-attention from one qkv projection."""

    def forward(self, hidden_states: Tensor, **kwargs) -> tuple[Tensor, None]:
        """hidden_states [B, M, C]."""
        q, k, v = self.qkv(hidden_states).unflatten(-1, (3, self.num_heads, self.head_dim)).permute(2, 0, 3, 1, 4)
        dropout_p = self.dropout.p if self.training else 0.0
        context = ops.attention(q, k, v, scale=self.scale, dropout_p=dropout_p)
        return self.projection(context.transpose(1, 2).flatten(2)), None


# transformers' class -> ours; the exact type only, as a subclass may mean something else
SWAPS: dict[type[nn.Module], type[nn.Module]] = {
    modeling_blip_text.BlipTextSelfAttention: TextSelfAttention,
    modeling_blip_text.BlipTextAttention: TextAttention,
    modeling_blip_text.BlipTextLayer: TextLayer,
    modeling_blip_text.BlipTextModel: TextModel,
    modeling_blip_text.BlipTextLMHeadModel: TextLMHeadModel,
    modeling_blip.BlipAttention: VisionAttention,
}
# what Prefix needs below its host, whatever optimize() leaves alone
PREFIX_SWAPS = {
    theirs: ours for theirs, ours in SWAPS.items() if theirs.__name__.startswith("BlipText") and "LMHead" not in theirs.__name__
}
MASK_FIX = "cross-attention now honours encoder_attention_mask, which transformers 4.57 to 5.23 loses: padded questions no longer leak"
