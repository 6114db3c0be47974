"""LLaVA's and LLaVA-Med's published layout -> fastpeft's LLaVA-Med: names, the language model's configuration, the connector.

Source: https://github.com/microsoft/LLaVA-Med (model/llava.py and apply_delta.py of its first release; llava_arch.py and llava_mistral.py
of v1.5) and https://github.com/haotian-liu/LLaVA. A folder is a LLaMA's or a Mistral's with more in it: ``model.mm_projector.*`` (a linear
layer's weight and bias; of mlp2x_gelu a Sequential's, numbered 0 and 2), in later releases ``model.vision_tower.vision_tower.*`` (CLIP),
and in config.json the ``mm_*`` fields. What the first release publishes is a delta: LLaMA's weights are added, in the delta's dtype, to the
first rows where the vocabulary has grown.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, MistralConfig, PretrainedConfig

from fastpeft.convert.tensors import listing
from fastpeft.models.llava import NO_TOKEN, connector_layers

TOKENS = ("[PAD]", "<im_patch>", "<im_start>", "<im_end>")  # those of the first release, in their order after LLaMA's
_TEXT = re.compile(r"(?:model\.(?P<inner>(?:embed_tokens|layers|norm)\..*)|(?P<head>lm_head\.weight))")
_PROJECTOR = re.compile(r"(?:.*\.)?mm_projector\.(?P<inner>.*)")
_TOWER = re.compile(r"(?:model\.)?vision_tower\.(?:vision_tower\.)?(?:vision_model\.)?(?P<inner>.*)")
_BUFFERS = ("rotary_emb.inv_freq", "position_ids")
MISTRAL, LLAMA = "llava_mistral", ("llava", "llava_llama")


@dataclass(frozen=True)
class Names:
    """Where a checkpoint's tensors go: by part, the part's own name -> the checkpoint's."""

    text: dict[str, str]
    projector: dict[str, str]
    tower: dict[str, str]


def is_llava_config(values: Any) -> bool:
    """Whether a config.json is one of LLaVA's own, and not transformers'."""
    return isinstance(values, dict) and values.get("model_type") in (*LLAMA, MISTRAL) and "text_config" not in values


def has_projector(names: Collection[str]) -> bool:
    """Whether a file with tensors of these names is a connector alone (mm_projector.bin), with new tokens' embeddings perhaps."""
    found = {bool(_PROJECTOR.fullmatch(str(name))) for name in names if not str(name).endswith("embed_tokens.weight")}
    return found == {True}


def names_of(names: Collection[str]) -> Names:
    """ValueError for tensors that are none of LLaVA's."""
    found, other = Names({}, {}, {}), []
    for name in names:
        if str(name).endswith(_BUFFERS):
            continue
        if match := _TEXT.fullmatch(name):
            found.text[f"model.{match['inner']}" if match["inner"] else name] = name
        elif match := _PROJECTOR.fullmatch(name):
            found.projector[match["inner"]] = name
        elif match := _TOWER.fullmatch(name):
            found.tower[match["inner"]] = name
        else:
            other.append(name)
    if other:
        raise ValueError(f"{len(other)} tensors that are none of LLaVA's: {listing(sorted(other))}")
    return found


def connector_names(kind: str, held: Collection[str]) -> dict[str, str]:
    """Our name of each of a connector's tensors -> LLaVA's (of mm_projector). ``kind``: mm_projector_type. ValueError names what is missing
    or not of that kind."""
    if kind == "linear":
        names = {f"linear.{part}": part for part in ("weight", "bias")}
    else:
        layers = range(connector_layers(kind))
        names = {f"linear_{i + 1}.{part}": f"{2 * i}.{part}" for i in layers for part in ("weight", "bias")}
    if set(held) != set(names.values()):
        raise ValueError(f"mm_projector holds {listing(sorted(held)) or 'nothing'}, and {kind} has {listing(sorted(names.values()))}")
    return names


def kind_of_connector(held: Collection[str]) -> str:
    """mm_projector_type by the tensors' names, for a file that comes without a configuration."""
    if not any("." in name for name in held):
        return "linear"
    return f"mlp{len({name.partition('.')[0] for name in held})}x_gelu"


def text_config(values: dict[str, Any]) -> PretrainedConfig:
    """The language model's own fields of a LLaVA's config.json. ValueError where they are none."""
    kind = MistralConfig if values["model_type"] == MISTRAL else LlamaConfig
    known = (kind().to_dict().keys() | {"rope_theta", "rope_scaling"}) - {"model_type", "architectures", "transformers_version"}
    fields = {name: value for name, value in values.items() if name in known}
    if (fields.get("pad_token_id") or 0) < 0:  # what LLaMA's first configurations have for none
        fields["pad_token_id"] = None
    try:
        return kind.from_dict(fields)
    except Exception as error:  # of huggingface_hub's strict dataclasses, and of rope's validation
        raise ValueError(f"config.json: {' '.join(str(error).split())}") from None


def llava_config(values: dict[str, Any], text: PretrainedConfig, vision: CLIPVisionConfig, image_token: int | None) -> LlavaConfig:
    """The configuration of fastpeft's LLaVA-Med. ``image_token``: <im_patch>'s id, None where the vocabulary has none."""
    chosen = values.get("mm_vision_select_feature", "patch")
    if chosen not in ("patch", "cls_patch"):
        raise ValueError(f"config.json: mm_vision_select_feature {chosen!r} is neither patch nor cls_patch")
    layer, patches = values.get("mm_vision_select_layer", -1), (vision.image_size // vision.patch_size) ** 2
    if not isinstance(layer, int) or not -vision.num_hidden_layers - 1 <= layer <= vision.num_hidden_layers:
        raise ValueError(f"config.json: mm_vision_select_layer {layer!r} is no layer of a CLIP of {vision.num_hidden_layers}")
    kind = values.get("mm_projector_type", "linear")
    connector_layers(kind)
    ours = {"mm_projector_type": kind, "prompt_template": values.get("prompt_template") or _template(values)}
    if values.get("mm_use_im_start_end"):
        ours["mm_use_im_start_end"] = True
    if values.get("image_aspect_ratio") in ("pad", "anyres"):
        if values["image_aspect_ratio"] == "anyres":
            raise ValueError("config.json: image_aspect_ratio anyres cuts images into tiles (LLaVA-NeXT), which is not converted")
        ours["image_aspect_ratio"] = "pad"
    return LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=NO_TOKEN if image_token is None else image_token,
        image_seq_length=patches + (chosen == "cls_patch"),
        vision_feature_layer=layer,
        vision_feature_select_strategy="full" if chosen == "cls_patch" else "default",
        tie_word_embeddings=text.tie_word_embeddings,
        architectures=["LlavaMedForConditionalGeneration"],
        dtype=text.dtype,
        **ours,
    )


def _template(values: dict[str, Any]) -> str:
    """What a release asks with: LLaVA-Med v1.5 mistral_instruct, its first release simple (model_vqa_med.py), LLaVA 1.5 v1."""
    if values.get("model_type") == MISTRAL:
        return "mistral_instruct"
    return "simple" if values.get("mm_use_im_start_end") else "v1"


def undelta(delta: Tensor, base: Tensor | None) -> Tensor:
    """``delta`` with ``base`` added to its first rows, as apply_delta.py does. ValueError where the base is larger."""
    if base is None:
        return delta
    if base.shape[1:] != delta.shape[1:] or len(base) > len(delta):
        raise ValueError(f"a delta {tuple(delta.shape)} for weights {tuple(base.shape)}: made for another LLaMA")
    base = base.to(delta.dtype)
    if len(base) == len(delta):
        return delta + base
    whole = delta.clone()
    whole[: len(base)] += base
    return whole
