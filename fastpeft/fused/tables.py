"""Tables of fused classes: transformers' class -> ours, and which classes take layouts."""

from __future__ import annotations

from torch import nn
from transformers.activations import GELUActivation
from transformers.models.blip import modeling_blip, modeling_blip_text
from transformers.models.clip import modeling_clip
from transformers.models.llama import modeling_llama

from fastpeft.fused.attention_llama import FusedLlamaAttention
from fastpeft.fused.attention_text import FusedBlipTextAttention, FusedBlipTextSelfAttention
from fastpeft.fused.attention_vision import FusedBlipAttention, FusedCLIPAttention
from fastpeft.fused.head import (
    FusedBlipForConditionalGeneration,
    FusedBlipForQuestionAnswering,
    FusedBlipTextLMHeadModel,
    FusedLlamaForCausalLM,
)
from fastpeft.fused.layers import FusedBlipTextLayer, FusedCLIPEncoderLayer, FusedLlamaDecoderLayer
from fastpeft.fused.leaves import FusedDropout, FusedGELU
from fastpeft.fused.mlp import (
    FusedBlipMLP,
    FusedBlipTextIntermediate,
    FusedBlipTextOutput,
    FusedBlipTextSelfOutput,
    FusedCLIPMLP,
    FusedLlamaMLP,
)
from fastpeft.fused.norms import FusedLayerNorm, FusedLlamaRMSNorm
from fastpeft.fused.stack_blip import FusedBlipTextModel
from fastpeft.fused.stack_llama import FusedLlamaModel

# transformers' class -> ours; the exact type only, as a subclass may mean something else
BLIP_SWAPS: dict[type[nn.Module], type[nn.Module]] = {
    modeling_blip_text.BlipTextSelfAttention: FusedBlipTextSelfAttention,
    modeling_blip_text.BlipTextAttention: FusedBlipTextAttention,
    modeling_blip_text.BlipTextSelfOutput: FusedBlipTextSelfOutput,
    modeling_blip_text.BlipTextOutput: FusedBlipTextOutput,
    modeling_blip_text.BlipTextIntermediate: FusedBlipTextIntermediate,
    modeling_blip_text.BlipTextLayer: FusedBlipTextLayer,
    modeling_blip_text.BlipTextModel: FusedBlipTextModel,
    modeling_blip_text.BlipTextLMHeadModel: FusedBlipTextLMHeadModel,
    modeling_blip.BlipAttention: FusedBlipAttention,
    modeling_blip.BlipMLP: FusedBlipMLP,
}
BLIP_MODELS: dict[type[nn.Module], type[nn.Module]] = {
    modeling_blip.BlipForQuestionAnswering: FusedBlipForQuestionAnswering,
    modeling_blip.BlipForConditionalGeneration: FusedBlipForConditionalGeneration,
}
# these hand masks, layouts and prefixes down in a form that only they read
BLIP_LAYOUT_AWARE = (FusedBlipTextModel, FusedBlipTextLayer, FusedBlipTextAttention, FusedBlipTextSelfAttention)
MASK_FIX = "cross-attention now honours encoder_attention_mask, which transformers 4.57 to 5.23 loses: padded questions no longer leak"
# transformers' class -> ours; the exact type only, as a subclass may mean something else
CLIP_SWAPS: dict[type[nn.Module], type[nn.Module]] = {
    modeling_clip.CLIPAttention: FusedCLIPAttention,
    modeling_clip.CLIPMLP: FusedCLIPMLP,
    modeling_clip.CLIPEncoderLayer: FusedCLIPEncoderLayer,
}
# transformers' class -> ours; the exact type only, as a subclass may mean something else
LLAMA_SWAPS: dict[type[nn.Module], type[nn.Module]] = {
    modeling_llama.LlamaRMSNorm: FusedLlamaRMSNorm,
    modeling_llama.LlamaMLP: FusedLlamaMLP,
    modeling_llama.LlamaAttention: FusedLlamaAttention,
    modeling_llama.LlamaDecoderLayer: FusedLlamaDecoderLayer,
    modeling_llama.LlamaModel: FusedLlamaModel,
    modeling_llama.LlamaForCausalLM: FusedLlamaForCausalLM,
}
# these hand masks, layouts and prefixes down in a form that only they read
LLAMA_LAYOUT_AWARE = (FusedLlamaModel, FusedLlamaDecoderLayer, FusedLlamaAttention)
# PyTorch's or transformers' class -> ours
LEAF_SWAPS: dict[type[nn.Module], type[nn.Module]] = {nn.LayerNorm: FusedLayerNorm, nn.Dropout: FusedDropout, GELUActivation: FusedGELU}
