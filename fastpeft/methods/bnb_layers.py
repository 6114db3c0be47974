"""bitsandbytes' linear layers that write their weight out, with adapters and without. Imported only where bitsandbytes is in use."""

from __future__ import annotations

import bitsandbytes as bnb
from torch import nn

from fastpeft.methods.adapted import AdaptedLinear
from fastpeft.methods.replacement import register
from fastpeft.methods.written import Written


class Linear4bit(Written, bnb.nn.Linear4bit):
    """bitsandbytes' 4-bit layer."""


class Linear8bit(Written, bnb.nn.Linear8bitLt):
    """bitsandbytes' 8-bit layer, whose input stays as it is."""


class AdaptedLinear4bit(AdaptedLinear, Linear4bit):
    """A 4-bit layer with LoRA and IA3."""

    plain_class = AdaptedLinear


class AdaptedLinear8bit(AdaptedLinear, Linear8bit):
    """An 8-bit layer with LoRA and IA3."""

    plain_class = AdaptedLinear


# bitsandbytes' class -> ours; the exact type only
SWAPS: dict[type[nn.Module], type[nn.Module]] = register({bnb.nn.Linear4bit: Linear4bit, bnb.nn.Linear8bitLt: Linear8bit})
NOTES = {Linear8bit: "bitsandbytes' 8-bit layers multiply by their weights written out; their own forward also rounds its input to 8 bit"}
HOSTS = {Linear4bit: AdaptedLinear4bit, Linear8bit: AdaptedLinear8bit}  # the first that leads to a class is what it becomes again
HOSTS |= {theirs: HOSTS[ours] for theirs, ours in SWAPS.items()}
