"""Excitor as a method of PEFT: importing this module registers it.

    import peft, fastpeft.peft
    model = peft.get_peft_model(llama, fastpeft.peft.ExcitorConfig(task_type="CAUSAL_LM"))
    model.save_pretrained(folder)
    model = peft.PeftModel.from_pretrained(llama, folder)

The attached blocks are :mod:`fastpeft.methods.excitor`'s. The base's parameters keep their names: an :class:`ExcitorLayer`
with the blocks of all adapters stands inside each attention (``self_attn.excitor``), and the text model's modules get fastpeft's classes,
as these alone can run with it (``fastpeft.optimize(model)`` exchanges the rest). ``import fastpeft`` has this module follow the import of
peft, before or after it; by itself it loads no peft.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field, fields
from enum import Enum
from typing import Any, ClassVar

from torch import Tensor, nn

from fastpeft.fused.attention.llama import FusedLlamaAttention
from fastpeft.fused.layout_aware import make_room_for_prefix
from fastpeft.fused.stack.llama import FusedLlamaModel
from fastpeft.methods.excitor import Excitor, ExcitorBlock
from fastpeft.registry import has_form, swap_class

INSTALL = "pip install --upgrade 'peft>=0.18'"

try:
    import peft
    from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
    from peft.utils import PeftType, register_peft_method
except ImportError as error:
    raise ImportError(f"fastpeft.peft needs peft 0.18 or newer ({error}): {INSTALL}") from None


def check_version(version: str) -> None:
    """ImportError for a peft that is too old."""
    if tuple(int(n) for n in re.findall(r"\d+", version)[:2]) < (0, 18):
        raise ImportError(f"fastpeft.peft needs peft 0.18 or newer, not {version}: {INSTALL}")


@dataclass
class ExcitorConfig(peft.PeftConfig):
    """Excitor for :func:`peft.get_peft_model`: the options of :class:`fastpeft.Excitor`, and PEFT's own.

    target_modules: attention layers by names, endings or a regular expression, as PEFT has it; None: the topmost ``layers``.
    modules_to_save: further modules to train and save. ValueError for options that :class:`fastpeft.Excitor` refuses.
    """

    target_modules: list[str] | str | None = field(default=None, metadata={"help": "Attention layers; None: the topmost `layers`."})
    exclude_modules: list[str] | str | None = field(default=None, metadata={"help": "Names that target_modules leaves out."})
    modules_to_save: list[str] | None = field(default=None, metadata={"help": "Further modules to train and save."})
    layers: int | list[int] = field(
        default=Excitor.layers, metadata={"help": "The topmost so many, at most all but the lowest two; or a list, from 0 at the bottom."}
    )
    num_prompts: int = field(default=Excitor.num_prompts, metadata={"help": "Learnt prompts of a layer."})
    r: int = field(default=Excitor.r, metadata={"help": "Rank of W_q, and of an image's W_k and W_v."})
    gate: str = field(default=Excitor.gate, metadata={"help": "'head': a gate for each head; 'layer': one for all."})
    gate_std: float = field(default=Excitor.gate_std, metadata={"help": "Standard deviation that gates start with."})
    prompt_std: float = field(default=Excitor.prompt_std, metadata={"help": "Standard deviation that prompts start with."})
    excitor_scale: str = field(default=Excitor.excitor_scale, metadata={"help": "S_excitor over the root of the 'full' width or a 'head'."})
    rotary: bool = field(default=Excitor.rotary, metadata={"help": "Whether the extra key is rotated."})

    def __post_init__(self):
        super().__post_init__()
        self.peft_type = PeftType.EXCITOR
        _ = self.method  # checks the options

    @property
    def method(self) -> Excitor:
        """The same options as fastpeft has them."""
        return Excitor(**{f.name: getattr(self, f.name) for f in fields(Excitor)})


class ExcitorLayer(nn.Module, BaseTunerLayer):
    """The blocks of one attention layer, one an adapter; attention calls it in place of a block. Of several adapters in use, the extra
    keys add up."""

    adapter_layer_names = ("excitor_blocks",)
    takes_flat_tokens = True

    def __init__(self, attention: FusedLlamaAttention):
        super().__init__()
        self.excitor_blocks = nn.ModuleDict()
        self.merged_adapters = []
        self.__dict__["attention"] = attention  # no child: it is the parent

    def add(self, adapter: str, method: Excitor) -> None:
        """A new block, in the base's dtype; PEFT widens it where asked to."""
        attention = self.attention
        block = ExcitorBlock(attention.q_proj, attention.excitor_heads, method, attention.visual_dim)
        weight = attention.q_proj.weight
        self.excitor_blocks[adapter] = block.to(weight.dtype) if weight.is_floating_point() else block

    @property
    def in_use(self) -> list[ExcitorBlock]:
        if self.disable_adapters:
            return []
        return [self.excitor_blocks[name] for name in self.active_adapters if name in self.excitor_blocks]

    @property
    def active(self) -> bool:
        """Whether it changes keys now."""
        return bool(self.in_use)

    def forward(self, k: Tensor, *args: Any) -> Tensor:
        """As :class:`ExcitorBlock`."""
        for block in self.in_use:
            k = block(k, *args)
        return k

    def turns(self, *args: Any) -> bool:
        """As :meth:`ExcitorBlock.turns`: the first one in use turns, others add to what it made."""
        return self.in_use[0].turns(*args)

    def turn(self, q: Tensor, k: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
        """As :meth:`ExcitorBlock.turn`."""
        first, *others = self.in_use
        q, k = first.turn(q, k, *args)
        for block in others:
            k = block(k, *args)
        return q, k

    def get_base_layer(self) -> nn.Module:
        return self.attention

    def _get_base_layer_device_and_dtype(self, base_layer: nn.Module):
        weight = base_layer.q_proj.weight
        return weight.device, weight.dtype

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        raise ValueError(NOT_MERGED)

    def unmerge(self) -> None:
        raise ValueError(NOT_MERGED)


NOT_MERGED = "no weight can take in Excitor, whose extra keys depend on every token; keep the adapter beside the base"


def _attention_names(model: nn.Module, hosts: list[str]) -> list[str]:
    """The attention layers inside the LLaMAs of these names."""
    found = [name for name, module in model.named_modules() if has_form(module, FusedLlamaAttention)]
    return [name for name in found if any(name.startswith(f"{host}." if host else "") for host in hosts)]


def _inside_ours(model: nn.Module, name: str) -> bool:
    """Whether a module belongs to an Excitor that is there already."""
    return any(name.startswith(ours) for ours, module in model.named_modules() if isinstance(module, ExcitorLayer))


class ExcitorModel(BaseTuner):
    """A model whose attention layers have Excitors."""

    prefix = "excitor_"
    tuner_layer_cls = ExcitorLayer
    target_module_mapping: ClassVar[dict] = {}  # unused: targets depend on the model's depth

    def inject_adapter(self, model: nn.Module, *args, state_dict: dict[str, Tensor] | None = None, **kwargs) -> None:
        """As PEFT's. Of a state dict it reads which attention layers have an Excitor."""
        if state_dict is not None:
            state_dict = {name.replace(".excitor.excitor_", ".excitor_"): t for name, t in state_dict.items()}
        super().inject_adapter(model, *args, state_dict=state_dict, **kwargs)

    def _prepare_adapter_config(self, peft_config: ExcitorConfig, model_config: dict) -> ExcitorConfig:
        return peft_config

    def _prepare_model(self, peft_config: ExcitorConfig, model: nn.Module) -> None:
        """Everything is checked, and targets are found, before anything changes."""
        hosts = [(name, module) for name, module in model.named_modules() if has_form(module, FusedLlamaModel)]
        inside = _attention_names(model, [name for name, _ in hosts])
        if not inside:
            raise ValueError(f"Excitor needs a LLaMA (transformers' LlamaModel), and {type(model).__name__} has none; try LoRA")
        if peft_config.target_modules is None:
            peft_config.target_modules = peft_config.method.topmost(inside)
        chosen = [name for name, _ in model.named_modules() if name and self._check_target_module_exists(peft_config, name)]
        if wrong := [name for name in chosen if name not in inside and not _inside_ours(model, name)]:
            raise ValueError(f"Excitor goes into a LLaMA's attention layers, such as {inside[-1]!r}; target_modules names {wrong[0]!r}")
        if not chosen:
            return  # PEFT raises its own error
        theirs = {module: type(module) for _, host in hosts for module in host.modules()}
        for _, host in hosts:
            make_room_for_prefix(host)
        self.__dict__.setdefault("exchanged", {}).update({m: cls for m, cls in theirs.items() if type(m) is not cls})

    def _create_and_replace(self, peft_config, adapter_name, target, target_name, parent, current_key, **kwargs) -> None:
        if getattr(target, "excitor", None) is None:
            target.excitor = ExcitorLayer(target)
        elif not isinstance(target.excitor, ExcitorLayer):
            raise ValueError(f"{current_key} has an Excitor of fastpeft.adapt already: build a new model")
        target.excitor.add(adapter_name, peft_config.method)

    def _check_merge_allowed(self) -> None:
        raise ValueError(NOT_MERGED)

    def _unload_and_optionally_merge(self, merge: bool = True, *args, **kwargs) -> nn.Module:
        if merge:
            self._check_merge_allowed()
        for module in list(self.model.modules()):
            if isinstance(getattr(module, "excitor", None), ExcitorLayer):
                del module.excitor
        for module, theirs in self.exchanged.items():
            swap_class(module, theirs)
        return super()._unload_and_optionally_merge(False, *args, **kwargs)


def extend(kinds: type[Enum], name: str) -> None:
    """Give an enumeration of strings one more member, equal to its name."""
    if name in kinds.__members__:
        return
    member = str.__new__(kinds, name)
    member._name_, member._value_, member._sort_order_ = name, name, len(kinds.__members__)
    setattr(kinds, name, member)  # an attribute first: what is a member already cannot be set
    kinds._member_names_.append(name)
    kinds._member_map_[name] = kinds._value2member_map_[name] = member


def register() -> None:
    """Make Excitor known to PEFT. PEFT's list of methods is closed: it gets a member. ImportError for a PEFT that is too old, or has
    another method of that name."""
    check_version(peft.__version__)
    known = peft.PEFT_TYPE_TO_CONFIG_MAPPING.get("EXCITOR")
    if known is not None and known.__module__ != __name__:
        raise ImportError(f"peft {peft.__version__} has a method called EXCITOR already ({known.__module__}), and fastpeft's is another")
    if known is None:
        extend(PeftType, "EXCITOR")
        register_peft_method(name="excitor", config_cls=ExcitorConfig, model_cls=ExcitorModel)


register()
