"""Operators: one file per op, backends meet here and nowhere else. What `fastpeft.ops` names is the public surface."""

from fastpeft.ops.absorbed_attention import absorbed_attention
from fastpeft.ops.activations import gelu, swiglu
from fastpeft.ops.attention import attention
from fastpeft.ops.dropout import dropout
from fastpeft.ops.excitor_keys import excitor_keys
from fastpeft.ops.layer_norm import add_layer_norm, layer_norm
from fastpeft.ops.linear_cross_entropy import linear_cross_entropy
from fastpeft.ops.lora_linear import Projection, lora_linear, lora_linears
from fastpeft.ops.mm_adapter import mm_adapter
from fastpeft.ops.norm_mm_adapter import norm_mm_adapter
from fastpeft.ops.rescale import rescale
from fastpeft.ops.rms_norm import add_rms_norm, rms_norm
from fastpeft.ops.rotary import rotary

__all__ = [
    "Projection",
    "absorbed_attention",
    "add_layer_norm",
    "add_rms_norm",
    "attention",
    "dropout",
    "excitor_keys",
    "gelu",
    "layer_norm",
    "linear_cross_entropy",
    "lora_linear",
    "lora_linears",
    "mm_adapter",
    "norm_mm_adapter",
    "rescale",
    "rms_norm",
    "rotary",
    "swiglu",
]
