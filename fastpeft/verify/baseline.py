"""Baseline without fastpeft's operators: the same model and plan for `fastpeft verify`, `fastpeft estimate --plain` and bench/.

:func:`plain` runs transformers' own modules and every method as its paper writes it, in PyTorch: LoRA and IA3 here, the others in
paper_equations.py. :func:`with_peft` runs transformers' own modules wrapped by PEFT. Both are copies with the same weights,
quantised ones written out. transformers' one error here is put right in both (BLIP's cross-attention loses the mask of its states, 4.57
to 5.23), so that padded batches compare too.
"""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import LlavaForConditionalGeneration, PreTrainedModel
from transformers.cache_utils import DynamicCache, EncoderDecoderCache
from transformers.models.blip.modeling_blip_text import BlipTextAttention, BlipTextPreTrainedModel

from fastpeft.methods import Excitor, Part, is_adapter
from fastpeft.methods.adapted import AdaptedConv2d, AdaptedLinear
from fastpeft.methods.base import ADAPTER_MODULES
from fastpeft.methods.quantized import dequantize
from fastpeft.models import parts_of
from fastpeft.models.lavin import LavinForConditionalGeneration
from fastpeft.models.llava import LlavaMedForConditionalGeneration
from fastpeft.models.miss import DropPath
from fastpeft.optimize import restore
from fastpeft.plan import detach
from fastpeft.registry import swap_class
from fastpeft.verify.paper_equations import PAPER_CLASSES, with_modality_token


class _PlainAdapted:
    """LoRA and IA3 as in their papers. What is in float32 under a half-precision base computes in float32, as in PEFT."""

    def forward(self, x: Tensor) -> Tensor:
        if self.ia3_l is not None and self.ia3_feedforward:
            x = (x * self.ia3_l).to(x.dtype)
        y = self._base(x)
        if self.lora_A is not None:
            y = (y + self.scaling * self._branch(F.dropout(x.to(self.lora_A.dtype), self.active_dropout))).to(y.dtype)
        return y if self.ia3_l is None or self.ia3_feedforward else (y * self.ia3_l).to(y.dtype)


class _PlainLinear(_PlainAdapted, AdaptedLinear):
    def _base(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)

    def _branch(self, x: Tensor) -> Tensor:
        return F.linear(F.linear(x, self.lora_A), self.lora_B)


class _PlainConv2d(_PlainAdapted, AdaptedConv2d):
    def _base(self, x: Tensor) -> Tensor:
        return self._conv_forward(x, self.weight, self.bias)

    def _branch(self, x: Tensor) -> Tensor:
        return F.conv2d(F.conv2d(x, self.lora_A, None, self.stride, self.padding, self.dilation), self.lora_B)


class _PlainLlavaMed(LlavaMedForConditionalGeneration):
    """LLaVA-Med as transformers' LLaVA computes it: logits of every token, then their loss."""

    def forward(
        self, input_ids=None, pixel_values=None, inputs_embeds=None, image_embeds=None, image_index=None, image_mask=None, **kwargs
    ):
        """As :class:`LlavaMedForConditionalGeneration`."""
        if inputs_embeds is None:
            inputs_embeds = self._embedded(input_ids)
            if pixel_values is not None or image_embeds is not None:
                inputs_embeds = self._with_images(input_ids, inputs_embeds, pixel_values, image_embeds, image_index, image_mask)
        return LlavaForConditionalGeneration.forward(self, inputs_embeds=inputs_embeds, **kwargs)


PLAIN_CLASSES = {
    AdaptedLinear: _PlainLinear,
    AdaptedConv2d: _PlainConv2d,
    LlavaMedForConditionalGeneration: _PlainLlavaMed,
}


def plain(model: nn.Module, attention: str | None = None) -> nn.Module:
    """A copy of ``model`` that runs no operator of fastpeft; parameter names stay. On the meta device it costs nothing.

    attention: transformers' implementation ("eager" forms the probabilities); None: the model's own. ValueError where something of
    ours is left.
    """
    twin = dequantize(copy.deepcopy(model))
    if attention is not None:
        for module in twin.modules():
            if isinstance(module, PreTrainedModel):
                module.config._attn_implementation = attention  # and of the configurations inside it
    found = {kind: {n: getattr(m, kind) for n, m in twin.named_modules() if getattr(m, kind, None) is not None} for kind in ADAPTER_MODULES}
    for kind, hosts in found.items():
        for name in hosts:
            delattr(twin.get_submodule(name), kind)  # it would keep the modules above it from their own classes
    if stayed := restore(twin):
        raise ValueError(f"no plain form is known of {stayed[0][0]} ({stayed[0][1]}): this model cannot be compared")
    for kind, hosts in found.items():
        for name, adapter in hosts.items():
            host = twin.get_submodule(name)
            setattr(host, kind, adapter)
            if kind == "prefix_encoder":
                host.register_forward_pre_hook(_prefixed, with_kwargs=True)
            elif type(host) in PAPER_CLASSES:
                swap_class(host, PAPER_CLASSES[type(host)])
    if isinstance(twin, LavinForConditionalGeneration) and twin.config.modality is None:
        twin.llm.register_forward_pre_hook(with_modality_token, with_kwargs=True)
    return mask_cross_attention(_exchange(twin))


def _exchange(twin: nn.Module) -> nn.Module:
    """Gives fastpeft's own modules their plain classes, in place."""
    for module in twin.modules():
        if type(module) in PLAIN_CLASSES:
            swap_class(module, PLAIN_CLASSES[type(module)])
    return twin


def _prefixed(host: nn.Module, args: tuple, kwargs: dict):
    """Forward pre-hook: hands a text model its prefix as keys and values of earlier tokens: positions then start after it."""
    given = [t for t in (*args[:1], kwargs.get("input_ids"), kwargs.get("inputs_embeds")) if t is not None]
    pairs = [tuple(t.to(host.dtype).expand(len(given[0]), -1, -1, -1) for t in pair) for pair in host.prefix_encoder()]
    prefix, mask = DynamicCache(pairs), kwargs.get("attention_mask")
    prefix.prefix_tokens = pairs[0][0].shape[2]
    crosses = isinstance(host, BlipTextPreTrainedModel)
    kwargs["past_key_values"] = EncoderDecoderCache(prefix, DynamicCache()) if crosses else prefix
    if mask is not None:
        kwargs["attention_mask"] = F.pad(mask, (pairs[0][0].shape[2], 0), value=1)
    return args, kwargs


def mask_cross_attention(model: nn.Module) -> nn.Module:
    """Hand transformers' BLIP cross-attention the mask that it drops on the way; in place."""

    def pass_on(module, args, kwargs):
        if kwargs.get("encoder_hidden_states") is not None:
            kwargs["encoder_attention_mask"] = kwargs.pop("attention_mask", None)
        return args, kwargs

    for module in model.modules():
        if type(module) is BlipTextAttention:
            module.self.register_forward_pre_hook(pass_on, with_kwargs=True)
    return model


def with_peft(model: nn.Module) -> tuple[nn.Module, dict[str, str]]:
    """An adapted model as transformers' own modules with each part wrapped by PEFT; T, F and the like by ``requires_grad``.

    Returns (copy, {its trainable parameter: ours}). ValueError where PEFT cannot express the plan, ImportError without PEFT.
    """
    twin, names = dequantize(copy.deepcopy(model)), {}
    detach(twin)
    restore(twin)
    _exchange(twin)
    inside = ""  # where the model lies once PEFT is around all of it
    planned = zip(parts_of(model), model.fastpeft_plan.treatments.values())
    for part, methods in sorted(planned, key=lambda one: bool(one[0].path)):  # what is around all comes first
        kinds = [m for m in methods if m.peft_type is not None]
        if len(kinds) > 1 or (kinds and len(methods) > 1):
            raise ValueError(f"PEFT does not combine {'+'.join(map(str, methods))} on one module")
        if unknown := [m for m in methods if m.needs_fused_attention and m.peft_type is None]:
            raise ValueError(f"PEFT has no {unknown[0]}")
        if any(isinstance(m, Excitor) for m in methods):
            raise ValueError("PEFT runs Excitor through fastpeft itself: see fastpeft.peft")
        if any(hasattr(m, "num_virtual_tokens") for m in methods):
            raise ValueError(f"PEFT's prefix in {part.name!r} lies in the cache that transformers' cross-attention writes to as well")
        if kinds:
            twin, wrapped = _wrap(twin, model, part, kinds[0], inside)
            names |= wrapped
            inside = inside if part.path else "base_model.model."
            continue
        within = f"{part.path}." if part.path else ""
        for method in methods:
            for name, parameter in method.trains(twin.get_submodule(f"{inside}{within}".rstrip(".")), part).items():
                parameter.requires_grad_(True)
                names[f"{inside}{within}{name}"] = f"{within}{name}"
    return mask_cross_attention(twin.train(model.training)), names


def _wrap(twin: nn.Module, model: nn.Module, part: Part, method, inside: str = "") -> tuple[nn.Module, dict[str, str]]:
    """Replace one part of ``twin``, or all of it, by a PEFT model with the weights of ``model``'s; returns what :func:`with_peft` does.
    ``inside``: where the model lies in ``twin``."""
    import peft

    place, ours = f"{inside}{part.path}" if part.path else "", part.of(model)
    root = twin.get_submodule(place)
    config = peft.PeftConfig.from_peft_type(**method.peft_config(ours, part) | {"task_type": None})
    wrapped = peft.get_peft_model(root, config)
    if place:
        twin.get_submodule(place.rpartition(".")[0]).__setattr__(place.rpartition(".")[2], wrapped)
    wrapped.to(next(ours.parameters()).device)
    kept = method.tensors(ours, part)
    by_address = {p.data_ptr(): name for name, p in model.named_parameters()}
    names = {}
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if parameter.requires_grad:
                key = name.replace(".default", "")
                parameter.data = kept[key].clone().view(parameter.shape)
                names[f"{place}.{name}" if place else name] = by_address[kept[key].data_ptr()]
    if missing := len(kept) - len(names):
        raise ValueError(f"PEFT attaches {missing} tensors fewer than fastpeft in {part.name!r}")
    return twin if part.path else wrapped, names


def without_dropout(model: nn.Module) -> nn.Module:
    """The model in training mode, with nothing random left in it; in place. Parts marked F stay as in evaluation."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name in ("lora_dropout", "attention_dropout", "dropout"):
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)
        for hook in module._forward_hooks.values():
            if isinstance(hook, DropPath):
                hook.rate = 0.0
    return model.train()


@torch.no_grad()
def scatter_adapters(model: nn.Module, scale: float = 0.05, seed: int = 0) -> nn.Module:
    """Move adapters from where they start, which is where they change nothing; in place."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and is_adapter(name):
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.add_(noise.to(parameter.device, parameter.dtype), alpha=scale)
    return model
