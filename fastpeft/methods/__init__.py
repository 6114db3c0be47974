"""Methods: what can be done to a part. Names as in the papers: F, T, LoRA, IA3, Prefix, PTv2, LayerNorm, Attention, FFN, Excitor,
MMAdapter, RepAdapter; AdaptionPrompt, LLaMA-Adapter under PEFT's name."""

from fastpeft.methods.adaption_prompt import AdaptionPrompt
from fastpeft.methods.base import Method, Part, is_adapter
from fastpeft.methods.excitor import Excitor
from fastpeft.methods.ia3 import IA3
from fastpeft.methods.intrinsic import FFN, Attention, Frozen, Full, LayerNorm
from fastpeft.methods.lora import LoRA
from fastpeft.methods.mm_adapter import MMAdapter, RepAdapter
from fastpeft.methods.prefix import Prefix, PTv2

METHODS: dict[str, type[Method]] = {
    m.name: m for m in (Frozen, Full, LoRA, IA3, Prefix, PTv2, LayerNorm, Attention, FFN, Excitor, AdaptionPrompt, MMAdapter, RepAdapter)
}


def from_peft(config: dict) -> Method:
    """The method that a PEFT ``adapter_config.json`` describes; ValueError for one that fastpeft does not have."""
    kinds = {m.peft_type: m for m in (LoRA, IA3, PTv2, LayerNorm, Excitor, AdaptionPrompt)}
    if config.get("peft_type") not in kinds:
        raise ValueError(f"PEFT method {config.get('peft_type')!r} is not supported; supported: {', '.join(kinds)}")
    return kinds[config["peft_type"]].from_peft(config)


__all__ = [
    "FFN", "IA3", "METHODS", "AdaptionPrompt", "Attention", "Excitor", "Frozen", "Full", "LayerNorm", "LoRA", "MMAdapter", "Method",
    "PTv2", "Part", "Prefix", "RepAdapter",
    "from_peft", "is_adapter",
]  # fmt: skip
