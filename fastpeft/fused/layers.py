"""Transformer layers on fastpeft's operators: LLaMA's decoder layer, CLIP's encoder layer, BLIP's text layer."""

from __future__ import annotations

from torch import Tensor, nn

from fastpeft.fused.layout import LabelledQueries, rows_of
from fastpeft.fused.norms import add_norm
from fastpeft.methods.mm_adapter import Routing
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
        norm, adapter = self.input_layernorm, getattr(self, "mm_adapter", None)
        attended, *_ = self.self_attn(
            hidden_states=norm(hidden_states) if adapter is None else adapter(hidden_states, norm, routing, self.self_attn.layer_idx),
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            position_embeddings=position_embeddings,
            **kwargs,
        )
        if labelled is not None:
            hidden_states = rows_of(hidden_states, labelled.tokens)
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


@fuses("transformers.models.clip.modeling_clip.CLIPEncoderLayer")
class FusedCLIPEncoderLayer:
    """Pre-norm layer; each residual sum is formed once."""

    def forward(self, hidden_states: Tensor, attention_mask: Tensor | None = None, **kwargs) -> Tensor:
        """[B, M, C]."""
        attended, _ = self.self_attn(self.before_attention(hidden_states), attention_mask=attention_mask, **kwargs)
        x, hidden_states = add_norm(attended, hidden_states, self.layer_norm2)
        return hidden_states + self.mlp(x)

    def before_attention(self, hidden_states: Tensor) -> Tensor:
        """What attention sees."""
        x, adapter = self.layer_norm1(hidden_states), getattr(self, "mm_adapter", None)
        return x if adapter is None else adapter.by_token(x)

    @property
    def adapter_readers(self) -> tuple[nn.Module, ...]:
        """The projections that read what an adapter puts out."""
        return self.self_attn.q_proj, self.self_attn.k_proj, self.self_attn.v_proj


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
