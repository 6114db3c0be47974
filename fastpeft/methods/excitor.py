"""LLaMA-Excitor: learnt prompts, read by every token, add to the keys of a layer's attention.

Source: Zou et al., "LLaMA-Excitor: General Instruction Tuning via Indirect Feature Interaction" (CVPR 2024), equations 1-9; the algebra
that needs no second score matrix is in :mod:`fastpeft.ops.excitor_keys`.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from fastpeft import ops
from fastpeft.methods.adapted import new_parameter
from fastpeft.methods.base import Method, Part, shorten
from fastpeft.methods.peft_config import COMMON, MODULES_TO_SAVE, NEUTRAL, READ, Refused, check_fields
from fastpeft.ops._common import to_device_async
from fastpeft.ops.excitor_keys import merge_keys
from fastpeft.ops.excitor_turn import turn_and_merge, turns
from fastpeft.ops.lora_linear import linear
from fastpeft.static_shapes import sizes

PEFT_FIELDS = {
    **COMMON,
    **dict.fromkeys(("layers", "num_prompts", "r", "gate", "gate_std", "prompt_std", "excitor_scale", "rotary"), READ),
    **dict.fromkeys(("target_modules", "exclude_modules"), NEUTRAL),  # the tensors' names say which layers have one: the topmost ``layers``
    "modules_to_save": MODULES_TO_SAVE,
}


class Visual(NamedTuple):
    """Images that Excitor sees: ``features`` [U, V, D] of distinct images, ``index`` [B] int64 on the CPU (on the device in a step of
    static shapes): the image of each sample, -1 for none."""

    features: Tensor
    index: Tensor


class ExcitorBlock(nn.Module):
    """The parameters of one layer: w_down [r, C], w_up [C, r], prompt [K, C], gate [H] or [1]; with images of width D also
    wk_down, wv_down [r, D] and wk_up, wv_up [C, r]."""

    takes_flat_tokens = True
    active = True  # attention then gives every query head keys of its own: PEFT's layers are not, while switched off

    def __init__(self, like: nn.Linear, heads: int, method: Excitor, visual_dim: int | None):
        super().__init__()
        C, r = like.in_features, method.r
        shapes = {"w_down": (r, C), "w_up": (C, r), "prompt": (method.num_prompts, C), "gate": (heads if method.gate == "head" else 1,)}
        if visual_dim is not None:
            shapes |= {"wk_down": (r, visual_dim), "wk_up": (C, r), "wv_down": (r, visual_dim), "wv_up": (C, r)}
        for name, shape in shapes.items():
            self.register_parameter(name, new_parameter(like, *shape))
        self.heads, self.rotary = heads, method.rotary
        self.scale = (C if method.excitor_scale == "full" else C // heads) ** -0.5
        self.prompt_std, self.gate_std = method.prompt_std, method.gate_std
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw all parameters anew."""
        for name, parameter in self.named_parameters():
            if name.endswith("_down"):
                nn.init.kaiming_uniform_(parameter, a=math.sqrt(5))
            elif name.endswith("_up"):
                nn.init.normal_(parameter, std=0.02)
        nn.init.normal_(self.prompt, std=self.prompt_std)
        nn.init.normal_(self.gate, std=self.gate_std)

    def forward(self, k: Tensor, hidden: Tensor, layout=None, visual: Visual | None = None, tables: tuple[Tensor, Tensor] | None = None):
        """K' [B, H, M, d] from k, rotated, of H heads or of a divisor of it, and hidden [B, M, C], the attention's input, or [T, C] where
        ``layout`` says how tokens lie in the table of k. tables: (cos, sin) of the tokens, as :func:`fastpeft.ops.rotary` takes them."""
        u = linear(hidden, self.w_down.to(hidden.dtype))
        u = u if layout is None else layout.pad(u)
        gate = self.gate.expand(self.heads)
        merged = self._merged(torch.zeros_like(k) if self.rotary else k, u, gate, visual)
        if not self.rotary:
            return merged
        k = k.repeat_interleave(self.heads // k.shape[1], 1)
        cos, sin = (t.squeeze(-2) for t in tables)
        cos, sin = ((t if layout is None else layout.pad(t)).unsqueeze(1) for t in (cos, sin))
        return k + ops.rotary(merged, cos, sin)

    def turns(self, x: Tensor, d: int, visual: Visual | None, cos: Tensor) -> bool:
        """Whether :meth:`turn` takes queries and keys of d channels, in x's dtype and on its device: the extra key is not turned, and all
        samples see an image or none does."""
        return not self.rotary and turns(x, d, cos) and self._seen_by(visual) != "some"

    def turn(
        self, q: Tensor, k: Tensor, hidden: Tensor, layout, visual: Visual | None, tables: tuple[Tensor, Tensor]
    ) -> tuple[Tensor, Tensor]:
        """(Q', K') of q and k, both before their rotation; the rest as :meth:`forward` takes it."""
        u, *tables = (linear(hidden, self.w_down.to(hidden.dtype)), *(t.squeeze(-2).expand(*hidden.shape[:-1], -1) for t in tables))
        if layout is not None:
            u, *tables = (layout.pad(t) for t in (u, *tables))
        pair = None
        if self._seen_by(visual) == "every":
            zk, zv = (linear(visual.features.to(w.dtype), w) for w in (self.wk_down, self.wv_down))
            images = to_device_async(visual.index, k.device)
            pair = (zk[images], self.wk_up, zv[images], self.wv_up)
        return turn_and_merge(q, k, tuple(tables), u, self.w_up, self.prompt, self.gate.expand(self.heads), pair, self.scale)

    def _seen_by(self, visual: Visual | None) -> str:
        """Which samples see an image: "none", "some" or "every" one."""
        if visual is None or not hasattr(self, "wk_up"):
            return "none"
        if (static := sizes()) is not None:
            return static.images
        sees = visual.index >= 0
        return "every" if bool(sees.all()) else "some" if bool(sees.any()) else "none"

    def _merged(self, k: Tensor, u: Tensor, gate: Tensor, visual: Visual | None) -> Tensor:
        static = sizes()
        if self._seen_by(visual) == "none":
            return merge_keys(k, u, self.w_up, self.prompt, gate, scale=self.scale)
        zk, zv = (linear(visual.features.to(w.dtype), w) for w in (self.wk_down, self.wv_down))  # once per distinct image
        if static is not None:
            images = visual.index.clamp(min=0)
            pair = (zk[images], self.wk_up, zv[images], self.wv_up)  # its gradient adds up in a fixed order on CUDA
            seen = merge_keys(k, u, self.w_up, self.prompt, gate, pair, self.scale)
            if static.images == "every":
                return seen
            alone = merge_keys(k, u, self.w_up, self.prompt, gate, scale=self.scale)
            return torch.where((visual.index >= 0)[:, None, None, None], seen, alone)
        seeing = (visual.index >= 0).nonzero().squeeze(1)
        images = to_device_async(visual.index[seeing], k.device)
        seen = (zk.index_select(0, images), self.wk_up, zv.index_select(0, images), self.wv_up)
        if len(seeing) == len(k):
            return merge_keys(k, u, self.w_up, self.prompt, gate, seen, self.scale)
        rest = to_device_async((visual.index < 0).nonzero().squeeze(1), k.device)
        seeing = to_device_async(seeing, k.device)
        merged = [
            merge_keys(k.index_select(0, rows), u.index_select(0, rows), self.w_up, self.prompt, gate, pair, self.scale)
            for rows, pair in ((seeing, seen), (rest, None))
        ]
        return torch.cat(merged).index_select(0, torch.cat([seeing, rest]).argsort())


@dataclass(frozen=True)
class Excitor(Method):
    """Extra attention keys, reconstructed for every token from learnt prompts (and an image).

    layers: the topmost so many (at most all but the lowest two, as the paper leaves them), or a list of layers, counted from 0 at the
    bottom. num_prompts: K. r: rank of W_q, W_k, W_v.
    Where the paper is silent: gate: "head", a number for each head, or "layer", one for all (equation 3 has g_l); gate_std: of its
    N(0, 1e-2), read as a standard deviation of 0.01; excitor_scale: S_excitor is divided by the root of the "full" width or of a "head"'s
    (equation 6 has C); rotary: whether the extra key is rotated like the key it is added to; prompt_std: LLaMA-Adapter's 1.
    """

    name: ClassVar[str] = "Excitor"
    peft_type: ClassVar[str] = "EXCITOR"  # PEFT has it once fastpeft.peft is imported
    peft_fields: ClassVar[dict[str, str | Refused]] = PEFT_FIELDS
    old_file: ClassVar[str] = "model.safetensors"
    mergeable: ClassVar[bool] = False
    needs_fused_attention: ClassVar[bool] = True
    layers: int | tuple[int, ...] = 30
    num_prompts: int = 30
    r: int = 16
    gate: str = "head"
    gate_std: float = 0.01
    prompt_std: float = 1.0
    excitor_scale: str = "full"
    rotary: bool = False

    def __post_init__(self):
        if isinstance(self.layers, list | tuple):
            object.__setattr__(self, "layers", _checked_layers(self.layers))
        for name in ("num_prompts", "r", *(() if isinstance(self.layers, tuple) else ("layers",))):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"Excitor: {name} must be a positive integer, not {value!r}")
        for name, known in (("gate", ("head", "layer")), ("excitor_scale", ("full", "head"))):
            if getattr(self, name) not in known:
                raise ValueError(f"Excitor: {name} must be one of {', '.join(known)}, not {getattr(self, name)!r}")
        if not isinstance(self.rotary, bool):
            raise ValueError(f"Excitor: rotary must be true or false, not {self.rotary!r}")
        for name in ("gate_std", "prompt_std"):
            value = getattr(self, name)
            if not isinstance(value, int | float) or isinstance(value, bool) or not 0 <= value < math.inf:
                raise ValueError(f"Excitor: {name} must be a number of 0 or more, not {value!r}")

    def attach(self, root: nn.Module, part: Part) -> None:
        found = self.attentions(root, part)
        if not found:
            raise ValueError(f"Excitor is not defined for part {part.name!r}: it needs the attention of a LLaMA")
        for _, attention in found:
            attention.excitor = ExcitorBlock(attention.q_proj, attention.excitor_heads, self, attention.visual_dim)

    def attentions(self, root: nn.Module, part: Part) -> list[tuple[str, nn.Module]]:
        """The attention layers that it excites, by their names in ``root``."""
        return self.topmost([(n, m) for n, m in root.named_modules() if part.holds(n) and hasattr(m, "excitor_heads")])

    def topmost(self, found: list) -> list:
        """Of all layers, bottom to top, those with an Excitor. ValueError for one that is not there."""
        if isinstance(self.layers, tuple):
            if found and self.layers[-1] >= len(found):
                raise ValueError(f"Excitor: there is no layer {self.layers[-1]}: this model has layers 0 to {len(found) - 1}")
            return [found[layer] for layer in self.layers] if found else []
        return found[-min(self.layers, max(1, len(found) - 2)) :]

    def tensors(self, root: nn.Module, part: Part) -> dict[str, Tensor]:
        """``base_model.model.<attention>.excitor.excitor_blocks.w_down``: the keys of :mod:`fastpeft.peft`."""
        return {peft_key(name): p.detach() for name, p in root.named_parameters() if "excitor" in name.split(".")}

    def check(self, root: nn.Module, part: Part, tensors: dict[str, Tensor], where: str) -> None:
        super().check(root, part, _as_peft(tensors), where)

    def load(self, root: nn.Module, part: Part, tensors: dict[str, Tensor]) -> None:
        super().load(root, part, _as_peft(tensors))

    def equivalent(self, other: Method, part: Part) -> bool:
        """How gate and prompts were drawn does not matter to what is loaded over them."""
        drawn = {"gate_std": 0.0, "prompt_std": 0.0}
        return type(self) is type(other) and dataclasses.replace(self, **drawn) == dataclasses.replace(other, **drawn)

    def peft_config(self, root: nn.Module, part: Part) -> dict[str, Any]:
        targets = [name for name, _ in self.attentions(root, part)]
        return {"peft_type": self.peft_type, "task_type": part.peft_task, "target_modules": targets} | self.options()

    @classmethod
    def from_peft(cls, config: dict[str, Any]) -> Excitor:
        """The method that an ``adapter_config.json`` of :mod:`fastpeft.peft` describes. Its ``target_modules`` are known again by the
        keys beside it, which must be those of ``layers``."""
        check_fields(cls.name, cls.peft_fields, config)
        return cls(**{f.name: config[f.name] for f in dataclasses.fields(cls) if f.name in config})


def _checked_layers(layers) -> tuple[int, ...]:
    """A list of layers, sorted. ValueError for anything but different whole numbers of 0 or more."""
    numbers = [layer for layer in layers if isinstance(layer, int) and not isinstance(layer, bool) and layer >= 0]
    if not layers or len(set(numbers)) < len(layers):
        raise ValueError(f"Excitor: a list of layers holds different whole numbers of 0 or more, not {list(layers)!r}")
    return tuple(sorted(numbers))


def peft_key(name: str) -> str:
    """A parameter's name -> PEFT's key, in which the adapter's name comes after ``excitor_blocks``."""
    return "base_model.model." + name.replace("excitor.", "excitor.excitor_blocks.")


def _as_peft(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Tensors under PEFT's keys; fastpeft saved them under the parameters' names before. ValueError for a tensor under both."""
    named = {name: name if name.startswith("base_model.") else peft_key(name) for name in tensors}
    if twice := sorted(name for name, key in named.items() if name != key and key in tensors):
        raise ValueError(f"Excitor adapter: {len(twice)} tensors are there twice, under the old name and PEFT's: {shorten(twice)}")
    return {named[name]: t for name, t in tensors.items()}
