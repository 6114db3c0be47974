"""Transformer layers on fastpeft's operators, by their code: each residual sum is formed once, inside the norm after it. And LLaMA's and
BLIP's text layers, which know layouts, prefixes and adapters."""

from __future__ import annotations

from torch import Tensor, nn

from fastpeft.fused.layers.norms import add_norm, norm_add
from fastpeft.fused.layout import LabelledQueries, rows_of
from fastpeft.methods.mm_adapter import ATTENTION, FEED_FORWARD, Place, Routing
from fastpeft.ops._recompute import without_recipe
from fastpeft.registry import fuses


@fuses("transformers.models.llama.modeling_llama.LlamaDecoderLayer", layout_aware=True)
class FusedLlamaDecoderLayer:
    """Pre-norm layer; each residual sum is formed once."""

    takes_flat_tokens = True

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values=None,
        use_cache: bool | None = False,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        routing: Routing | None = None,
        labelled: LabelledQueries | None = None,
        **kwargs,
    ) -> Tensor:
        """Arguments as :class:`FusedLlamaAttention`'s, and what routes MM-Adapters; returns the shape of hidden_states."""
        kwargs |= {"position_ids": position_ids, "use_cache": use_cache} | ({} if labelled is None else {"labelled": labelled})
        attended, *_ = self.self_attn(
            hidden_states=self._adapted(ATTENTION, self.input_layernorm, hidden_states, routing),
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            position_embeddings=position_embeddings,
            **kwargs,
        )
        if labelled is not None:
            hidden_states = rows_of(hidden_states, labelled.tokens)
        if getattr(self, FEED_FORWARD, None) is None:
            x, hidden_states = add_norm(attended, hidden_states, self.post_attention_layernorm)
        else:
            hidden_states = hidden_states + attended
            routing = routing if labelled is None or routing is None else routing.at(labelled.tokens)
            x = self._adapted(FEED_FORWARD, self.post_attention_layernorm, hidden_states, routing)
        return hidden_states + self.mlp(x)

    def _adapted(self, before: str, norm: nn.Module, hidden_states: Tensor, routing: Routing | None) -> Tensor:
        """norm(hidden_states), through the adapter ``before`` what reads it, where there is one."""
        if (adapter := getattr(self, before, None)) is None:
            return norm(hidden_states)
        return adapter(hidden_states, norm, routing, Place(self.self_attn.layer_idx, before))

    def adapter_readers(self, before: str) -> tuple[nn.Module, ...]:
        """The projections that read what an adapter ``before`` them puts out."""
        attention, mlp = self.self_attn, self.mlp
        return (attention.q_proj, attention.k_proj, attention.v_proj) if before == ATTENTION else (mlp.gate_proj, mlp.up_proj)

    def give_biases(self, before: str) -> None:
        """Zeros to the linear layers of the attention or of the feed-forward block, and word of them to the configuration: a merged adapter
        has a bias."""
        last = self.self_attn.o_proj if before == ATTENTION else self.mlp.down_proj
        for linear in (*self.adapter_readers(before), last):
            linear.bias = nn.Parameter(linear.weight.new_zeros(len(linear.weight)), requires_grad=False)
        setattr(self.self_attn.config, "attention_bias" if before == ATTENTION else "mlp_bias", True)


@fuses("transformers.models.mistral.modeling_mistral.MistralDecoderLayer", code="dc93916b5118")
class FusedDecoderLayer:
    """Pre-norm decoder layer as LLaMA's, of any model: x + attention(norm(x)), then x + mlp(norm(x))."""

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values=None,
        use_cache: bool | None = False,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        **kwargs,
    ) -> Tensor:
        """[B, M, C]."""
        attended, _ = self.self_attn(
            hidden_states=self.input_layernorm(hidden_states),
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            use_cache=use_cache,
            position_embeddings=position_embeddings,
            **kwargs,
        )
        x, hidden_states = add_norm(attended, hidden_states, self.post_attention_layernorm)
        return hidden_states + self.mlp(x)


@fuses("transformers.models.gemma2.modeling_gemma2.Gemma2DecoderLayer", code="b283ecc24bcf")
class FusedGemma2DecoderLayer:
    """Gemma 2's and 3's layer, with norms before and after: x + norm(attention(norm(x))), then x + norm(mlp(norm(x)))."""

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values=None,
        **kwargs,
    ) -> Tensor:
        """[B, M, C]."""
        attended, _ = self.self_attn(
            hidden_states=self.input_layernorm(hidden_states),
            position_embeddings=position_embeddings,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            **kwargs,
        )
        x, hidden_states = add_norm(self.post_attention_layernorm(attended), hidden_states, self.pre_feedforward_layernorm)
        return hidden_states + self.post_feedforward_layernorm(self.mlp(x))


@fuses("transformers.models.olmo2.modeling_olmo2.Olmo2DecoderLayer", code="5b2ced5fd952")
class FusedOlmo2DecoderLayer:
    """OLMo 2's, OLMo 3's and EXAONE 4's layer, with norms behind alone: x + norm(attention(x)), then x + norm(mlp(x)). Backward forms the
    first of these sums again."""

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values=None,
        use_cache: bool | None = False,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        **kwargs,
    ) -> Tensor:
        """[B, M, C]."""
        attended, _ = self.self_attn(
            hidden_states=hidden_states,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            use_cache=use_cache,
            position_embeddings=position_embeddings,
            **kwargs,
        )
        hidden_states = norm_add(attended, hidden_states, self.post_attention_layernorm)
        return hidden_states + self.post_feedforward_layernorm(self.mlp(hidden_states))


@fuses("transformers.models.qwen2_5_vl.modeling_qwen2_5_vl.Qwen2_5_VLVisionBlock", code="72c197f9afd8")
class FusedQwenVisionBlock:
    """Qwen-VL's vision layer: x + attention(norm(x)), then x + mlp(norm(x)); images one after the other, [T, C]."""

    def forward(self, hidden_states: Tensor, cu_seqlens: Tensor, position_embeddings=None, **kwargs) -> Tensor:
        """[T, C]."""
        attended = self.attn(self.norm1(hidden_states), cu_seqlens=cu_seqlens, position_embeddings=position_embeddings, **kwargs)
        x, hidden_states = add_norm(attended, hidden_states, self.norm2)
        return hidden_states + self.mlp(x)


@fuses("transformers.models.vit.modeling_vit.ViTLayer", code="c5053b059886")
class FusedViTLayer:
    """ViT's layer: x + dropout(attention(norm(x))), then x + dropout(mlp(norm(x)))."""

    def forward(self, hidden_states: Tensor, attention_mask: Tensor | None = None, **kwargs) -> Tensor:
        """[B, M, C]."""
        attended, _ = self.attention(self.layernorm_before(hidden_states), attention_mask, **kwargs)
        x, hidden_states = add_norm(self.dropout(attended), hidden_states, self.layernorm_after)
        return self.dropout(self.mlp(x)) + hidden_states


@fuses("transformers.models.dinov2.modeling_dinov2.Dinov2Layer", code="aafbf596bf98")
class FusedDinov2Layer:
    """DINOv2's layer: x + drop_path(scale(attention(norm(x)))), then the same of its feed-forward."""

    def forward(self, hidden_states: Tensor, attention_mask: Tensor | None = None, **kwargs) -> Tensor:
        """[B, M, C]."""
        attended, _ = self.attention(self.norm1(hidden_states), attention_mask=attention_mask, **kwargs)
        x, hidden_states = add_norm(self.drop_path(self.layer_scale1(attended)), hidden_states, self.norm2)
        return self.drop_path(self.layer_scale2(self.mlp(x))) + hidden_states


@fuses("transformers.models.clip.modeling_clip.CLIPEncoderLayer", code="7a7153ac7ed5")
class FusedCLIPEncoderLayer:
    """Pre-norm layer; each residual sum is formed once."""

    def forward(self, hidden_states: Tensor, attention_mask: Tensor | None = None, **kwargs) -> Tensor:
        """[B, M, C]."""
        seen = self._adapted(ATTENTION, self.layer_norm1(hidden_states))
        attended, _ = self.self_attn(hidden_states=seen, attention_mask=attention_mask, **kwargs)
        x, hidden_states = add_norm(attended, hidden_states, self.layer_norm2)
        return hidden_states + self.mlp(self._adapted(FEED_FORWARD, x))

    def _adapted(self, before: str, x: Tensor) -> Tensor:
        """x, after a norm, through the adapter ``before`` what reads it, where there is one."""
        adapter = getattr(self, before, None)
        return x if adapter is None else adapter.by_token(x)

    def adapter_readers(self, before: str) -> tuple[nn.Module, ...]:
        """The projections that read what an adapter ``before`` them puts out."""
        attention = self.self_attn
        return (attention.q_proj, attention.k_proj, attention.v_proj) if before == ATTENTION else (self.mlp.fc1,)


@fuses("transformers.models.blip.modeling_blip_text.BlipTextLayer", layout_aware=True)
class FusedBlipTextLayer:
    """Post-norm layer: self-attention (with prefix), cross-attention where there is something to attend to, feed-forward."""

    takes_flat_tokens = True

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
        labelled=None,
        output_attentions=None,
        **kwargs,
    ) -> Tensor:
        if self.gradient_checkpointing and self.training:  # run again in backward, it gets its inputs without the recipes they may have now
            hidden_states, encoder_hidden_states = without_recipe(hidden_states), without_recipe(encoder_hidden_states)
        options = {"prefix": prefix, "causal": causal, "layout": layout, "labelled": labelled}
        # what is at its default is not said: a module left as transformers wrote it takes no more than its own arguments
        options = {name: value for name, value in options.items() if value is not None and value is not False}
        asked = {} if output_attentions is None else {"output_attentions": output_attentions}
        hidden_states, _ = self.attention(hidden_states, attention_mask=attention_mask, past_key_values=past_key_values, **options | asked)
        if encoder_hidden_states is not None:
            hidden_states, _ = self.crossattention(
                hidden_states,
                attention_mask=encoder_attention_mask,
                encoder_hidden_states=encoder_hidden_states,
                past_key_values=past_key_values,
                **asked if encoder_layout is None else {"layout": encoder_layout},
            )
        return self.feed_forward_chunk(hidden_states)  # chunks would save no memory: nothing in it is kept that is larger than its parts
