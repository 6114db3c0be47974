"""LaVIN: CLIP's [cls] tokens as six tokens of a LLaMA, adapters in both, routed by the sample's modality.

Source: Luo et al., "Cheap and Quick" (NeurIPS 2023), section 3, and its code: the [cls] tokens after every fourth layer of CLIP-L/14, a
neck 1024 -> 128 -> C with SiLU, two modality tokens (text, image and text), and the input [t_m, bos, "Image: ", six visual tokens, text] or
[t_m, bos, "Image: N/A", text]. No token attends to t_m, and t_m to no other: it serves the adapters' routers alone. So it is not put in
the text here; it runs once per batch and modality, and in generation once per answer. The official generation counts positions without
t_m once it decodes; with rotary embeddings only distances tell, and ours are those of training.
"""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.modeling_outputs import CausalLMOutputWithPast

from fastpeft.fused.attention.prefix_cache import generate_after
from fastpeft.fused.stack.llama import check_takes_prefixes
from fastpeft.methods import Part
from fastpeft.methods.mm_adapter import Place
from fastpeft.models.clip import vision_config, vision_part
from fastpeft.models.family import Family
from fastpeft.models.llama import llama_config, llama_part
from fastpeft.models.vision_language import VisionLanguageConfig, VisionLanguageModel, place_images
from fastpeft.ops._common import to_device_async
from fastpeft.static_shapes import NotStatic, sizes

SIZES = {"lavin-7b": ("L/14", "llama-7b", 128), "lavin-13b": ("L/14", "llama-13b", 128), "lavin-tiny": ("tiny", "llama-tiny", 32)}
MODALITIES = ("text", "image")  # rows of the neck's modality tokens
EVERY = {"lavin-7b": 4, "lavin-13b": 4, "lavin-tiny": 1}  # layers of CLIP between two [cls] tokens
PARTS = (vision_part(), Part("neck", "neck", lora=("down", "up")), llama_part("llm", "llm"))


class LavinConfig(VisionLanguageConfig):
    """cls_every: a [cls] token is taken after every so many layers of the image encoder. neck_dim: width of the neck's middle. modality:
    of the samples for which adapters were merged into the weights, "text" or "image"; None: of all."""

    model_type = "fastpeft-lavin"
    cls_every: int = 4
    neck_dim: int = 128
    modality: str | None = None

    @property
    def visual_tokens(self) -> int:
        return self.vision_config.num_hidden_layers // self.cls_every


def lavin_config(name: str, **overrides) -> LavinConfig:
    """``overrides``: ``vision_config`` and ``text_config``, mappings of what differs, ``cls_every``, ``neck_dim``."""
    vision, text, neck = SIZES[name]
    given = {"cls_every": EVERY[name], "neck_dim": neck} | overrides
    seen, read = vision_config(vision, **given.pop("vision_config", {})), llama_config(text, **given.pop("text_config", {}))
    if unknown := sorted(set(given) - {"cls_every", "neck_dim"}):
        raise ValueError(f"a {name} has no {', '.join(unknown)}; overrides are vision_config, text_config, cls_every and neck_dim")
    return LavinConfig(vision_config=seen, text_config=read, architectures=["LavinForConditionalGeneration"], **given)


class Neck(nn.Module):
    """[cls] tokens [U, N, C_vision] -> [U, N, C], and the modalities' tokens [2, C]: text, image and text."""

    def __init__(self, config: LavinConfig):
        super().__init__()
        width = config.text_config.hidden_size
        self.down = nn.Linear(config.vision_config.hidden_size, config.neck_dim)
        self.up = nn.Linear(config.neck_dim, width)
        self.modality = nn.Embedding(2, width)
        for linear in (self.down, self.up):
            nn.init.xavier_uniform_(linear.weight)
            nn.init.zeros_(linear.bias)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.up(F.silu(self.down(tokens)))


class LavinForConditionalGeneration(VisionLanguageModel):
    """``vision``, ``neck``, ``llm``. ``image_mask`` [B, L] marks the places of an image's tokens in the text."""

    config_class = LavinConfig

    def __init__(self, config: LavinConfig):
        super().__init__(config)
        self.neck = Neck(config)
        self.post_init()

    def encode_images(self, pixel_values: Tensor) -> Tensor:
        """[U, 3, S, S] -> [cls] tokens [U, N, C_vision], one after every ``cls_every`` layers."""
        hidden, seen = self.vision.pre_layrnorm(self.vision.embeddings(pixel_values)), []
        layers = self.vision.encoder.layers[: self.config.cls_every * self.config.visual_tokens]
        for number, layer in enumerate(layers, 1):
            hidden = layer(hidden, None)
            if number % self.config.cls_every == 0:
                seen.append(hidden[:, 0])
        return torch.stack(seen, 1)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        labels: Tensor | None = None,
        pixel_values: Tensor | None = None,
        image_embeds: Tensor | None = None,
        image_index: Tensor | None = None,
        image_mask: Tensor | None = None,
        prefix_lengths: Tensor | None = None,
        **kwargs,
    ) -> CausalLMOutputWithPast:
        """Text as LlamaForCausalLM takes it, padded or packed, without the modality token; images as :class:`VisionLanguageModel` says.
        Samples without an image are of the modality "text"."""
        check_takes_prefixes(self.llm.model, prefix_lengths)
        places = (position_ids, attention_mask, prefix_lengths)
        given = self._prepared(input_ids, pixel_values, image_embeds, image_index, image_mask, *places)
        kwargs |= {} if prefix_lengths is None else {"prefix_lengths": prefix_lengths}
        return self.llm(attention_mask=attention_mask, position_ids=position_ids, labels=labels, **given, **kwargs)

    @torch.no_grad()
    def generate(
        self, input_ids: Tensor, pixel_values=None, image_embeds=None, image_index=None, image_mask=None, prefix_length: int = 0, **options
    ):
        """transformers' own; the ids of prompt and response. ``prefix_length``: tokens that all prompts begin with, computed once."""
        given = self._prepared(input_ids, pixel_values, image_embeds, image_index, image_mask)
        # as transformers does with embeddings, without the prompt
        if prefix_length:
            check_takes_prefixes(self.llm.model, prefix_length)
            embeds, mask = given.pop("inputs_embeds"), options.pop("attention_mask", None)
            answer = generate_after(self.llm, prefix_length, embeds, mask, given, **options)
        else:
            answer = self.llm.generate(**given, **options)
        return torch.cat([input_ids.repeat_interleave(len(answer) // len(input_ids), 0), answer], 1)

    @torch.no_grad()
    def mixtures(self) -> dict[str, dict[Place, Tensor]]:
        """By modality and place in the LLaMA: the mixture [2] of a routed adapter (figure 4), as in evaluation; {} where the LLaMA runs as
        transformers' own, which has no such pass."""
        if not hasattr(self.llm.model, "routes"):
            return {}
        was = self.training
        weights = self.eval().llm.model.routes(self.neck.modality.weight.to(self.llm.dtype))
        self.train(was)
        return {name: {place: w[row] for place, w in weights.items()} for row, name in enumerate(MODALITIES)}

    def specialise(self, modality: str | None) -> dict[nn.Module, Tensor]:
        """Be a model of samples of one modality; returns the mixture [2] of each adapter that the modality's token routes."""
        if modality not in MODALITIES:
            raise ValueError(f"MMAdapter has a mixture for each modality: say which, modality='text' or 'image', not {modality!r}")
        layers = self.llm.model.layers
        found = {getattr(layers[place.layer], place.before): weights for place, weights in self.mixtures()[modality].items()}
        self.config.modality = modality
        return found

    def _prepared(
        self, input_ids, pixel_values, image_embeds, image_index, image_mask, position_ids=None, attention_mask=None, prefix_lengths=None
    ) -> dict:
        images = self.images_of(pixel_values, image_embeds)
        if sizes() is not None:
            return self._prepared_static(input_ids, images, image_index, image_mask)
        index = self.index_of(images, image_index, self.samples_in(input_ids, position_ids, attention_mask))
        if (kept := self.config.modality) is not None and bool(((index >= 0) != (kept == "image")).any()):
            raise ValueError(f"this model's adapters were merged for samples {'with' if kept == 'image' else 'without'} an image alone")
        text = self.get_input_embeddings()(input_ids)
        if images is not None and bool((index >= 0).any()):
            seen, places = (
                self.neck(images)[to_device_async(self.placed_images(index, image_mask, position_ids, prefix_lengths), images.device)],
                input_ids.new_zeros(()) if image_mask is None else image_mask,
            )
            if int(places.sum()) != seen.shape[0] * seen.shape[1]:
                raise ValueError(f"image_mask has {int(places.sum())} places for {seen.shape[0]} images of {seen.shape[1]} tokens each")
            text = text.masked_scatter(to_device_async(places[..., None].bool(), text.device), seen.to(text.dtype))
        if kept is not None:  # nothing is left to route
            return {"inputs_embeds": text}
        return {"inputs_embeds": text, "modality": (index >= 0).long(), "modality_embeds": tuple(self.neck.modality.weight)}

    def _prepared_static(self, input_ids: Tensor, images: Tensor | None, index: Tensor | None, image_mask: Tensor | None) -> dict:
        if self.config.modality is not None:
            raise NotStatic("its adapters were merged")
        text = self.get_input_embeddings()(input_ids)
        if images is None:
            modality = input_ids.new_zeros(len(input_ids))
        else:
            text, modality = place_images(text, self.neck(images), index, image_mask), (index >= 0).long()
        return {"inputs_embeds": text, "modality": modality, "modality_embeds": tuple(self.neck.modality.weight)}


FAMILY = Family(
    kind="causal",
    known=LavinForConditionalGeneration,
    model=LavinForConditionalGeneration,
    config=LavinConfig,
    parts=PARTS,
    plan="MMAdapter/T/MMAdapter",
    configs={name: partial(lavin_config, name) for name in SIZES},
    template="lavin",
    image_tokens=lambda config: config.visual_tokens,
    # six [cls] tokens of L/14, and of B/16
    image_encoder=lambda fields: {"vision_config": fields, "cls_every": max(1, fields["num_hidden_layers"] // 6)},
)
