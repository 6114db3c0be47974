"""LLaVA-Med: transformers' LlavaForConditionalGeneration with LLaVA's own connectors.

Source: Li et al., "LLaVA-Med" (2023), and https://github.com/microsoft/LLaVA-Med, on LLaVA (Liu et al., 2023). The patches of the last
layer but one of CLIP, a connector, a language model:

- the first release: CLIP ViT-L/14 at 224 px, Linear 1024 -> 4096, LLaMA-7B with four added tokens (padding, image patch, image start and
  end: a vocabulary of 32,004);
- v1.5: CLIP ViT-L/14 at 336 px, Linear, GELU, Linear (mlp2x_gelu), Mistral-7B-Instruct-v0.2. A Mistral without a sliding window computes
  what a LLaMA computes (grouped heads, another base of the rotary embedding), and is built as one: every method and saving serves it.
  With a window it stays transformers' MistralModel.
"""

from __future__ import annotations

import re
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlavaConfig, LlavaForConditionalGeneration, PretrainedConfig
from transformers.loss.loss_utils import ForCausalLMLoss
from transformers.models.llava.modeling_llava import LlavaCausalLMOutputWithPast
from transformers.utils import can_return_tuple

from fastpeft.fused.attention.prefix_cache import generate_after
from fastpeft.fused.head.loss import OF_THE_LOSS, Labelled, causal_loss
from fastpeft.fused.head.outputs import with_deferred_logits
from fastpeft.fused.stack.flatten import why_not_flat
from fastpeft.fused.stack.llama import FusedLlamaModel, check_takes_prefixes
from fastpeft.methods import Part
from fastpeft.methods.base import has_hooks
from fastpeft.models.clip import vision_config, vision_part
from fastpeft.models.family import Family
from fastpeft.models.llama import llama_config, llama_part
from fastpeft.models.parts import FrozenEvaluates
from fastpeft.models.vision_language import VisionLanguageModel, place_images
from fastpeft.ops._common import to_device_async
from fastpeft.static_shapes import sizes

MISTRAL_7B = {"intermediate_size": 14_336, "num_key_value_heads": 8, "max_position_embeddings": 32_768, "rms_norm_eps": 1e-5} | {
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e6}
}
NO_TOKEN = -200  # LLaVA's IMAGE_TOKEN_INDEX: the image has places, and the vocabulary no token for them
OF_V1_5 = {"mm_projector_type": "mlp2x_gelu", "image_aspect_ratio": "pad", "prompt_template": "mistral_instruct"} | {
    "image_token_index": NO_TOKEN
}
SIZES: dict[str, tuple[str, str, dict[str, Any], dict[str, Any]]] = {  # CLIP, LLaMA, what differs in it, and in LlavaConfig
    "llava-med": ("L/14", "llama-7b", {"vocab_size": 32_004}, {}),
    "llava-med-v1.5": ("L/14@336", "llama-7b", MISTRAL_7B, OF_V1_5),
    "llava-med-tiny": ("tiny", "llama-tiny", {}, {}),
    "llava-med-v1.5-tiny": ("tiny", "llama-tiny", {"num_key_value_heads": 2}, OF_V1_5),
}
CONNECTORS = "linear, or mlp2x_gelu and its like (mlpNx_gelu)"
ALL_LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")

PARTS = (
    vision_part("vision", "model.vision_tower"),
    Part("connector", "model.multi_modal_projector", lora=r"linear(_\d+)?"),
    llama_part(
        "llm",
        "model.language_model",
        lora=ALL_LINEARS,
        prefix_host="",
        prefix_tokens=5,
        norms_left_out=("norm",),
        excludes=("embed_tokens",),
        peft_task="FEATURE_EXTRACTION",
    ),
    Part("head", "", only=("lm_head", "model.language_model.embed_tokens"), lora=("lm_head",)),
)


def llava_med_config(name: str, **overrides) -> LlavaConfig:
    """``overrides``: ``vision_config`` and ``text_config`` (mappings of what differs), or fields of LlavaConfig; of these LLaVA's own are
    ``mm_projector_type`` (linear, mlp2x_gelu, ...), ``image_aspect_ratio`` ("pad": images are padded to squares, not cropped),
    ``mm_use_im_start_end`` (a token before and after an image's) and our ``prompt_template``."""
    vision, text, of_text, own = SIZES[name]
    seen = vision_config(vision, **overrides.pop("vision_config", {}))
    read = llama_config(text, **of_text | overrides.pop("text_config", {}))
    if unknown := sorted(set(overrides) - LlavaConfig().to_dict().keys() - set(OF_LLAVA)):
        raise ValueError(f"a LLaVA-Med has no {', '.join(unknown)}; overrides are vision_config, text_config and fields of LlavaConfig")
    defaults = {
        "image_token_index": read.vocab_size - 3,  # after the padding token: <im_patch>
        "image_seq_length": (seen.image_size // seen.patch_size) ** 2,
        "vision_feature_layer": -2,
        "vision_feature_select_strategy": "default",
        "architectures": ["LlavaMedForConditionalGeneration"],
    }
    return LlavaConfig(vision_config=seen, text_config=read, **defaults | own | overrides)


OF_LLAVA = ("mm_projector_type", "image_aspect_ratio", "mm_use_im_start_end", "prompt_template")  # fields that LlavaConfig keeps for us


# names in files of transformers' own class, as it has written them until now and writes them still -> names of its modules
RENAMED = {r"^language_model\.lm_head": "lm_head", r"^language_model\.model": "model.language_model"} | {
    f"^{name}": f"model.{name}" for name in ("vision_tower", "multi_modal_projector")
}


def complete(config: LlavaConfig) -> None:
    """Set what a configuration of transformers' own class leaves open, in place: its connector, two linear layers around GELU, and the
    places of an image, which are its patches. ValueError for another image encoder than CLIP, several of its layers, and for another
    connector than LLaVA's."""
    config.text_config = as_llama(config.text_config)
    if config.vision_config.model_type != "clip_vision_model" or not isinstance(config.vision_feature_layer, int):
        tower, layer = config.vision_config.model_type, config.vision_feature_layer
        raise ValueError(f"an image encoder {tower!r}, vision_feature_layer {layer!r}: LLaVA here reads one layer of a 'clip_vision_model'")
    if getattr(config, "mm_projector_type", None) is not None:
        return
    config.mm_projector_type = "linear"
    if "LlavaForConditionalGeneration" in (config.architectures or ()):
        if config.projector_hidden_act != "gelu" or not config.multimodal_projector_bias:
            act, bias = config.projector_hidden_act, config.multimodal_projector_bias
            raise ValueError(
                f"projector_hidden_act {act!r} and multimodal_projector_bias {bias!r}: the connectors known here have 'gelu' and True"
            )
        seen = config.vision_config
        config.mm_projector_type = "mlp2x_gelu"
        config.image_seq_length = (seen.image_size // seen.patch_size) ** 2 + (config.vision_feature_select_strategy == "full")


def connector_layers(kind: str) -> int:
    """Linear layers of a connector, GELU between them: mm_projector_type of LLaVA's configurations. ValueError for an unknown one."""
    found = re.fullmatch(r"linear|mlp([1-9]\d?)x_gelu", kind)
    if found is None:
        raise ValueError(f"mm_projector_type {kind!r} is no connector known here: {CONNECTORS}")
    return int(found[1] or 1)


def as_llama(config: PretrainedConfig) -> PretrainedConfig:
    """A Mistral's configuration as that of the LLaMA that computes the same, where it has no sliding window; any other as it is."""
    if config.model_type != "mistral" or config.sliding_window is not None:
        return config
    known = LlamaConfig().to_dict().keys() - {"model_type", "architectures", "transformers_version"}
    llama = LlamaConfig(**{name: value for name, value in config.to_dict().items() if name in known})
    llama._attn_implementation = config._attn_implementation
    return llama


class Connector(nn.Module):
    """Patches [U, N, C_vision] -> the language model's width: ``linear``, or ``linear_1``, ``linear_2``, ... with GELU between them."""

    def __init__(self, config: LlavaConfig):
        super().__init__()
        kind, width = config.mm_projector_type, config.text_config.hidden_size
        for number in range(1, connector_layers(kind) + 1):
            name = "linear" if kind == "linear" else f"linear_{number}"
            self.add_module(name, nn.Linear(config.vision_config.hidden_size if number == 1 else width, width))

    def forward(self, image_features: Tensor) -> Tensor:
        first, *others = self.children()
        hidden = first(image_features)
        for linear in others:
            hidden = linear(nn.functional.gelu(hidden))
        return hidden


class LlavaMedForConditionalGeneration(FrozenEvaluates, LlavaForConditionalGeneration):
    """Beyond transformers' arguments, ``forward`` takes ``image_embeds`` [U, N, C_vision], patches that :meth:`encode_images` made, and
    ``image_index`` [B]: the image of each sample, -1 for a sample without one. Patches take the places of ``image_mask`` [B, L], or of
    the image token's id."""

    lean_logits = False

    def __init__(self, config: LlavaConfig):
        complete(config)
        super().__init__(config)
        self.model.multi_modal_projector = Connector(config)
        self.post_init()

    @property
    def host_inputs(self) -> tuple[str, ...]:
        """Of forward's tensors, those that are best left on the host: nobody then waits for the device."""
        fused = isinstance(self.model.language_model, FusedLlamaModel)
        return ("attention_mask", "position_ids", "labels", "prefix_lengths", "image_index", "image_mask") if fused else ()

    def encode_images(self, pixel_values: Tensor) -> Tensor:
        """[U, 3, S, S] -> patches [U, N, C_vision] of the layer that the configuration names, the last but one; those after it are not run.
        With vision_feature_select_strategy "full" the class token comes first."""
        tower, layer = self.model.vision_tower, self.config.vision_feature_layer
        hidden = tower.pre_layrnorm(tower.embeddings(pixel_values))
        for block in tower.encoder.layers[: layer if layer >= 0 else len(tower.encoder.layers) + 1 + layer]:
            hidden = block(hidden, None)
        return hidden if self.config.vision_feature_select_strategy == "full" else hidden[:, 1:]

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values=None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        image_embeds: Tensor | None = None,
        image_index: Tensor | None = None,
        image_mask: Tensor | None = None,
        prefix_lengths: Tensor | None = None,
        **kwargs,
    ) -> LlavaCausalLMOutputWithPast:
        """labels [B, L] with -100 where there is none, shifted here; ``loss`` is the mean over labelled tokens, or their sum over
        ``num_items_in_batch``. Logits as :class:`fastpeft.fused.head.models.FusedLlamaForCausalLM` returns them."""
        if inputs_embeds is None:
            inputs_embeds = self._embedded(input_ids)
            if pixel_values is not None or image_embeds is not None:
                holes = input_ids == self.config.image_token_index if image_mask is None else image_mask
                if image_index is not None and sizes() is None:
                    image_index = VisionLanguageModel.placed_images(image_index, holes, position_ids, prefix_lengths)
                inputs_embeds = self._with_images(input_ids, inputs_embeds, pixel_values, image_embeds, image_index, holes)
        decoder, to_model = self.model.language_model, {} if prefix_lengths is None else {"prefix_lengths": prefix_lengths}
        check_takes_prefixes(decoder, prefix_lengths)
        asked = None
        if self.training and self.loss_function is ForCausalLMLoss:
            asked = Labelled.of(labels, inputs_embeds.shape[:2], logits_to_keep, kwargs)
        lean = asked is not None and self.lean_logits and not torch.compiler.is_compiling() and not why_not_flat(self, self.lm_head)
        if lean and isinstance(decoder, FusedLlamaModel) and not has_hooks(decoder):
            to_model["output_mask"] = asked.targets != asked.ignore_index
        outputs = decoder(
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=False if labels is not None and use_cache is None else use_cache,
            **{name: value for name, value in kwargs.items() if name not in OF_THE_LOSS},
            **to_model,
        )
        loss, logits, read_later = causal_loss(self, outputs.last_hidden_state, labels, asked, lean, logits_to_keep, kwargs)
        output = LlavaCausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )
        return output if read_later is None else with_deferred_logits(output, read_later, self.lm_head)

    @torch.no_grad()
    def generate(
        self, input_ids: Tensor | None = None, image_index=None, image_mask=None, image_embeds=None, prefix_length: int = 0, **options
    ):
        """transformers' own, for batches of distinct images too: ids of prompt and answer. ``prefix_length``: tokens that all prompts begin
        with, computed once."""
        if image_index is None and image_mask is None and image_embeds is None and not prefix_length:
            return super().generate(input_ids, **options)
        embeds, pixels = self._embedded(input_ids), options.pop("pixel_values", None)
        if pixels is not None or image_embeds is not None:
            embeds = self._with_images(input_ids, embeds, pixels, image_embeds, image_index, image_mask)
        # as transformers does with embeddings, without the prompt
        if prefix_length:
            check_takes_prefixes(self.model.language_model, prefix_length)
            answer = generate_after(self, prefix_length, embeds, options.pop("attention_mask", None), {}, **options)
        else:
            answer = super().generate(inputs_embeds=embeds, **options)
        repeats = len(answer) // len(input_ids)  # num_return_sequences
        return torch.cat([input_ids.repeat_interleave(repeats, 0), answer], 1)

    def _embedded(self, input_ids: Tensor) -> Tensor:
        """Of an image token that the vocabulary has not, anything: the image takes its place."""
        token = self.config.image_token_index
        return self.get_input_embeddings()(input_ids.masked_fill(input_ids == token, 0) if token < 0 else input_ids)

    def _with_images(self, input_ids, inputs_embeds, pixel_values, image_embeds, image_index, image_mask) -> Tensor:
        if (pixel_values is None) == (image_embeds is None):
            raise ValueError("give pixel_values, or image_embeds that encode_images() made of them")
        images = self.encode_images(pixel_values) if image_embeds is None else image_embeds
        seen = self.model.multi_modal_projector(images)
        if sizes() is not None:
            return place_images(inputs_embeds, seen, image_index, image_mask)
        if image_index is not None:
            seen = seen[to_device_async(image_index[image_index >= 0], seen.device)]
        holes = input_ids == self.config.image_token_index if image_mask is None else image_mask
        images, patches, found = *seen.shape[:2], int(holes.sum())
        if found != images * patches:
            raise ValueError(f"{found} image tokens for {images} images of {patches} patches each")
        return inputs_embeds.masked_scatter(to_device_async(holes[..., None], seen.device), seen.to(inputs_embeds.dtype))


FAMILY = Family(
    kind="causal",
    known=LlavaMedForConditionalGeneration,
    model=LlavaMedForConditionalGeneration,
    config=LlavaConfig,
    parts=PARTS,
    plan="F/F/LayerNorm/F",
    configs={name: partial(llava_med_config, name) for name in SIZES},
    template="llava",
    image_tokens=lambda config: config.image_seq_length,
    image_encoder=lambda fields: {"vision_config": fields},
    renamed=RENAMED,
)
