"""Self-attention of vision encoders (BLIP's ViT, CLIP) on fastpeft's operators."""

from __future__ import annotations

from torch import Tensor, nn

from fastpeft import ops
from fastpeft.fused.attention.common import Attends, dense_mask_attention, forms_probabilities, why_not_fused
from fastpeft.fused.layers.projections import Recomputes, key_value_rescale, project_one, project_together, rescaled
from fastpeft.registry import fuses


@fuses("transformers.models.blip.modeling_blip.BlipAttention")
class FusedBlipAttention(Attends, Recomputes):
    """ViT self-attention from one qkv projection. Returns (output, None): probabilities are not formed unless they are asked for."""

    def forward(self, hidden_states: Tensor, output_attentions: bool | None = None, **kwargs) -> tuple[Tensor, Tensor | None]:
        """hidden_states [B, M, C]."""
        if self.gives_probabilities(output_attentions):
            return super().forward(hidden_states)

        def project(x):
            return project_one(self.qkv, x).unflatten(-1, (3, self.num_heads, self.head_dim)).permute(2, 0, 3, 1, 4).unbind()

        q, k, v = self.projected(project, hidden_states, (self.qkv,))
        context = ops.attention(q, k, v, scale=self.scale, dropout_p=self._dropout_p)
        return project_one(self.projection, context.transpose(1, 2).flatten(2)), None


@fuses("transformers.models.clip.modeling_clip.CLIPAttention")
class FusedCLIPAttention:
    """Self-attention. Returns (output, None): probabilities are not formed unless they are asked for."""

    @staticmethod
    def why_not(module: nn.Module) -> str:
        """'' or why transformers' own attention computes something else than softmax over all keys."""
        return why_not_fused(module) or ("its is_causal was set" if module.is_causal else "")

    def forward(self, hidden_states: Tensor, attention_mask: Tensor | None = None, **kwargs) -> tuple[Tensor, Tensor | None]:
        """hidden_states [B, M, C]; attention_mask and is_causal as transformers gives them to CLIP's text encoder."""
        dense = attention_mask is None or (isinstance(attention_mask, Tensor) and attention_mask.dim() == 4)
        if not dense or self.why_not(self) or forms_probabilities(self, kwargs):
            return super().forward(hidden_states, attention_mask, **kwargs)
        q, k, v = project_together((self.q_proj, self.k_proj, self.v_proj), hidden_states)
        q, k, v = (t.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for t in (rescaled(self.q_proj, q), k, v))
        options = {"prefix": None, "rescale": key_value_rescale(self.k_proj, self.v_proj, self.num_heads)}
        options["dropout_p"] = self.dropout if self.training else 0.0
        if attention_mask is not None:
            context = dense_mask_attention(q, k, v, attention_mask, scale=self.scale, **options)
        else:
            context = ops.attention(q, k, v, causal=bool(kwargs.get("is_causal")), scale=self.scale, **options)
        return project_one(self.out_proj, context.transpose(1, 2).flatten(2)), None
