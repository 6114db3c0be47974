"""Modules for people's own models: what ``fastpeft.ops`` computes, with parameters, as ``torch.nn`` and PEFT name them.

Each is a thin layer over an operator. dtype and device are keywords as in PyTorch; adapters on a base in bfloat16 or float16 are float32.
Forward-mode and second derivatives are refused with an error.
"""

from fastpeft.nn.adapters import ExcitorAttention, MMAdapter
from fastpeft.nn.hub import kernel_mapping
from fastpeft.nn.linear import LoRALinear
from fastpeft.nn.loss import LinearCrossEntropy
from fastpeft.nn.norms import LayerNorm, RMSNorm

__all__ = ["ExcitorAttention", "LayerNorm", "LinearCrossEntropy", "LoRALinear", "MMAdapter", "RMSNorm", "kernel_mapping"]
