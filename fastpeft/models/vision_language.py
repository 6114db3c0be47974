"""What backbones of a CLIP image encoder and a LLaMA have in common: their configuration, their batches, generation."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers import CLIPVisionConfig, LlamaConfig, LlamaForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.models.clip.modeling_clip import CLIPVisionModel

from fastpeft.models.parts import FrozenEvaluates
from fastpeft.ops.tree_attention import tree_of
from fastpeft.static_shapes import sizes as static_sizes


class VisionLanguageConfig(PretrainedConfig):
    """``vision_config`` (CLIPVisionConfig) and ``text_config`` (LlamaConfig), and what a subclass adds."""

    sub_configs: ClassVar = {"vision_config": CLIPVisionConfig, "text_config": LlamaConfig}

    vision_config: Any = None
    text_config: Any = None

    def __post_init__(self, **kwargs):
        for name, cls in self.sub_configs.items():
            given = getattr(self, name)
            setattr(self, name, given if isinstance(given, cls) else cls(**given or {}))
        self.tie_word_embeddings = self.text_config.tie_word_embeddings
        super().__post_init__(**kwargs)


class VisionLanguageModel(FrozenEvaluates, PreTrainedModel):
    """``vision``: CLIP's image encoder; ``llm``: LlamaForCausalLM. A subclass says how images enter the text.

    A batch holds distinct images (``pixel_values`` [U, 3, S, S], or ``image_embeds`` that :meth:`encode_images` made of them) and
    ``image_index`` [B]: sample b sees image ``image_index[b]``, or none where that is -1.
    """

    config_class = VisionLanguageConfig
    base_model_prefix = "llm"
    supports_gradient_checkpointing = True
    lean_logits = False  # whether nobody reads the logits of a training step

    def __init__(self, config: VisionLanguageConfig):
        super().__init__(config)
        self.vision = CLIPVisionModel(config.vision_config)
        self.llm = LlamaForCausalLM(config.text_config)

    @property
    def host_inputs(self) -> tuple[str, ...]:
        """Of forward's tensors, those that are best left on the host: nobody then waits for the device."""
        inputs = getattr(self.llm, "host_inputs", ())  # of a fused LLaMA
        return (*inputs, "image_index", "image_mask") if inputs else ()

    def get_input_embeddings(self):
        return self.llm.get_input_embeddings()

    def get_output_embeddings(self):
        return self.llm.get_output_embeddings()

    def _init_weights(self, module):
        """Both halves have initialised themselves."""

    def encode_images(self, pixel_values: Tensor) -> Tensor:
        """[U, 3, S, S] -> what of an image does not depend on the text: a constant where ``vision`` is frozen."""
        raise TypeError(f"{type(self).__name__} does not say what it takes of an image")

    def images_of(self, pixel_values: Tensor | None, image_embeds: Tensor | None) -> Tensor | None:
        """The distinct images' features, given as pixels or as features; None where a batch has none."""
        if pixel_values is not None and image_embeds is not None:
            raise ValueError("give pixel_values, or image_embeds that encode_images() made of them, not both")
        return self.encode_images(pixel_values) if pixel_values is not None else image_embeds

    @staticmethod
    def placed_images(index: Tensor, places: Tensor | None, position_ids: Tensor | None, prefix_lengths: Tensor | None) -> Tensor:
        """The images whose tokens lie in the row, in its order: of ``index`` [B], -1 for none. Where samples share prefixes
        (``prefix_lengths`` [B]), those with ``places`` [1, T] among a sample's own tokens."""
        if prefix_lengths is None or places is None:
            return index[index >= 0]
        own = tree_of(position_ids[0], prefix_lengths, torch.device("cpu")).sample
        placed = torch.zeros(len(index), dtype=torch.bool).index_fill(0, own[places[0].cpu().bool()].unique(), True)
        return index[(index >= 0) & placed.to(index.device)]

    @staticmethod
    def samples_in(input_ids: Tensor, position_ids: Tensor | None, attention_mask: Tensor | None) -> int:
        """Samples of a batch: its rows, or where they are packed into one, the places where positions start again."""
        if attention_mask is not None or position_ids is None or len(input_ids) > 1:
            return len(input_ids)
        return int((position_ids[0, 1:] != position_ids[0, :-1] + 1).sum()) + 1

    @staticmethod
    def index_of(images: Tensor | None, image_index: Tensor | None, samples: int) -> Tensor:
        """[samples] int64: each sample's image, -1 for none; without ``image_index`` sample b sees image b."""
        if static_sizes() is not None and image_index is not None:  # checked where the batch was made
            return image_index
        count = 0 if images is None else len(images)
        if image_index is None:
            if count not in (0, samples):
                raise ValueError(f"{count} images for {samples} samples: give image_index [{samples}], -1 for a sample without an image")
            image_index = torch.arange(samples) if count else torch.full((samples,), -1)
        if image_index.shape != (samples,) or int(image_index.max()) >= count or int(image_index.min()) < -1:
            raise ValueError(f"image_index {image_index.tolist()} must give each of {samples} samples one of {count} images, or -1")
        return image_index


def place_images(text: Tensor, seen: Tensor, index: Tensor, places: Tensor) -> Tensor:
    """text [B, L, C] with, at ``places`` [B, L] bool of sample b, the rows of ``seen[index[b]]`` in their order; seen [U, N, C], index [B].
    All on the device, whose values nobody reads."""
    row = (places.cumsum(1) - 1).clamp(0, seen.shape[1] - 1) + index.clamp(min=0)[:, None] * seen.shape[1]
    rows = torch.nn.functional.embedding(row, seen.to(text.dtype).flatten(0, 1))  # its gradient adds up in a fixed order on CUDA
    return torch.where(places[..., None].bool(), rows, text)
