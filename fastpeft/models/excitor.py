"""LLaMA-Excitor's multimodal model: LLaMA whose Excitors see CLIP's tokens of an image; none of them enters the text.

Source: Zou et al. (CVPR 2024), section 3.3: the global and the patch tokens of CLIP's last layer, as CLIP projects them (D = 768 for L/14),
frozen, the same for every layer.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.models.clip.modeling_clip import CLIPVisionModelWithProjection

from fastpeft.fused.attention.prefix_cache import generate_after
from fastpeft.fused.stack.llama import check_takes_prefixes
from fastpeft.models.clip import vision_config, vision_part
from fastpeft.models.family import Family
from fastpeft.models.llama import llama_config, llama_part
from fastpeft.models.vision_language import VisionLanguageConfig, VisionLanguageModel

SIZES = {"excitor-7b": ("L/14", "llama-7b"), "excitor-13b": ("L/14", "llama-13b"), "excitor-tiny": ("tiny", "llama-tiny")}
PARTS = (vision_part(), llama_part("llm", "llm"))


class ExcitorModelConfig(VisionLanguageConfig):
    """``vision_config.projection_dim`` is the width of what Excitor sees of an image."""

    model_type = "fastpeft-excitor"


def excitor_config(name: str, **overrides) -> ExcitorModelConfig:
    """``overrides``: ``vision_config`` and ``text_config``, mappings of what differs."""
    vision, text = SIZES[name]
    seen, read = vision_config(vision, **overrides.pop("vision_config", {})), llama_config(text, **overrides.pop("text_config", {}))
    if overrides:
        raise ValueError(f"an {name} has no {', '.join(overrides)}; overrides are vision_config and text_config")
    return ExcitorModelConfig(vision_config=seen, text_config=read, architectures=["ExcitorForConditionalGeneration"])


class ExcitorForConditionalGeneration(VisionLanguageModel):
    """``vision``: CLIP's image encoder with its projection; ``llm``: LlamaForCausalLM, with or without Excitors (plans over vision/llm)."""

    config_class = ExcitorModelConfig

    def __init__(self, config: ExcitorModelConfig):
        super().__init__(config)
        self.vision = CLIPVisionModelWithProjection(config.vision_config)
        for layer in self.llm.model.layers:
            layer.self_attn.visual_dim = config.vision_config.projection_dim
        self.post_init()

    def encode_images(self, pixel_values: Tensor) -> Tensor:
        """[U, 3, S, S] -> the global and the patch tokens as CLIP projects them, [U, 1 + patches, D]."""
        tower = self.vision.vision_model
        return self.vision.visual_projection(tower.post_layernorm(tower(pixel_values).last_hidden_state))

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        labels: Tensor | None = None,
        pixel_values: Tensor | None = None,
        image_embeds: Tensor | None = None,
        image_index: Tensor | None = None,
        prefix_lengths: Tensor | None = None,
        **kwargs,
    ) -> CausalLMOutputWithPast:
        """Text as LlamaForCausalLM takes it, padded or packed; images as :class:`VisionLanguageModel` says."""
        images = self.images_of(pixel_values, image_embeds)
        if images is not None:
            index = self.index_of(images, image_index, self.samples_in(input_ids, position_ids, attention_mask))
            kwargs |= {"visual": images, "visual_index": index}
        check_takes_prefixes(self.llm.model, prefix_lengths)
        kwargs |= {} if prefix_lengths is None else {"prefix_lengths": prefix_lengths}
        return self.llm(input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids, labels=labels, **kwargs)

    @torch.no_grad()
    def generate(self, input_ids: Tensor, pixel_values=None, image_embeds=None, image_index=None, prefix_length: int = 0, **options):
        """transformers' own; the ids of prompt and response. ``prefix_length``: tokens that all prompts begin with, on one image, computed
        once."""
        images, seen = self.images_of(pixel_values, image_embeds), {}
        if images is not None:
            index = self.index_of(images, image_index, len(input_ids)).to(images.device)
            seen = {"visual": images[index.clamp(min=0)], "visual_seen": index >= 0}
        if not prefix_length:
            return self.llm.generate(input_ids, **seen, **options)
        check_takes_prefixes(self.llm.model, prefix_length)
        embeds, mask = self.get_input_embeddings()(input_ids), options.pop("attention_mask", None)
        answer = generate_after(self.llm, prefix_length, embeds, mask, seen, **options)
        return torch.cat([input_ids.repeat_interleave(len(answer) // len(input_ids), 0), answer], 1)


FAMILY = Family(
    kind="causal",
    known=ExcitorForConditionalGeneration,
    model=ExcitorForConditionalGeneration,
    config=ExcitorModelConfig,
    parts=PARTS,
    plan="F/Excitor",
    configs={name: partial(excitor_config, name) for name in SIZES},
    template="alpaca",
    image_encoder=lambda fields: {"vision_config": fields},
)
