"""Operators: one file per op, backends meet here and nowhere else. What `fastpeft.ops` names is the public surface.

Every operator has a composite form, on ATen. An operator has at most one other form, so that nothing is written twice:

| operators                                                             | form beside ATen's | why                                     |
|-----------------------------------------------------------------------|--------------------|-----------------------------------------|
| layer_norm_fwd, layer_norm_bwd, rms_norm_fwd, rms_norm_bwd            | native             | row-wise: memory decides, one pass      |
|                                                                       |                    | serves, on CPU and CUDA alike           |
| gelu_fwd, gelu_bwd, swiglu_fwd, swiglu_bwd, geglu_fwd, geglu_bwd      | native             | likewise                                |
| rescale_fwd, rescale_bwd, rotary                                      | native             | likewise                                |
| clamped_swiglu_fwd, clamped_swiglu_bwd                                | native             | likewise; on the CPU alone              |
| attention_inputs_fwd, attention_inputs_bwd                            | native             | several of these in one pass, on CUDA   |
|                                                                       |                    | alone                                   |
| low_rank_grads                                                        | native             | two skinny products of one matrix, read |
|                                                                       |                    | once; on the CPU alone                  |
| relu_fwd, relu_pack, relu_again, relu_bwd                             | native             | values above zero and a bit each, in    |
|                                                                       |                    | place of y; on the CPU alone            |
| lora_linears_fwd, lora_linears_bwd                                    | triton             | skinny products of what a wide one      |
|                                                                       |                    | reads; on a CPU ATen's GEMMs serve      |
| mm_adapter_fwd, mm_adapter_bwd, norm_mm_adapter_fwd,                  | triton             | likewise                                |
| norm_mm_adapter_bwd, excitor_merge_fwd, excitor_merge_bwd             | triton             | likewise                                |
| excitor_text_bwd                                                      | triton             | likewise                                |
| prefix_attention_fwd, prefix_attention_bwd, linear_cross_entropy      | triton             | likewise                                |
| dropout                                                               | native             | one pass, on CUDA alone; on a CPU       |
|                                                                       |                    | PyTorch's own generator                 |
| attention_dq                                                          | none               | three of ATen's products, by blocks     |
| expert_linear_fwd, expert_linear_bwd                                  | none               | ATen's products, an expert's rows each  |
"""

from fastpeft.ops.absorbed_attention import absorbed_attention
from fastpeft.ops.activations import geglu, gelu, swiglu
from fastpeft.ops.attention import attention
from fastpeft.ops.attention_inputs import attention_inputs
from fastpeft.ops.clamped_swiglu import clamped_swiglu
from fastpeft.ops.dropout import dropout
from fastpeft.ops.excitor_keys import excitor_keys
from fastpeft.ops.layer_norm import add_layer_norm, layer_norm
from fastpeft.ops.linear_cross_entropy import linear_cross_entropy
from fastpeft.ops.lora_attention import lora_attention
from fastpeft.ops.lora_linear import Projection, lora_linear, lora_linears
from fastpeft.ops.mm_adapter import mm_adapter
from fastpeft.ops.norm_mm_adapter import norm_mm_adapter
from fastpeft.ops.relu import relu
from fastpeft.ops.rescale import rescale
from fastpeft.ops.rms_norm import add_rms_norm, rms_norm
from fastpeft.ops.rotary import rotary
from fastpeft.ops.tree_attention import PrefixTree, tree_attention

__all__ = [
    "PrefixTree",
    "Projection",
    "absorbed_attention",
    "add_layer_norm",
    "add_rms_norm",
    "attention",
    "attention_inputs",
    "clamped_swiglu",
    "dropout",
    "excitor_keys",
    "geglu",
    "gelu",
    "layer_norm",
    "linear_cross_entropy",
    "lora_attention",
    "lora_linear",
    "lora_linears",
    "mm_adapter",
    "norm_mm_adapter",
    "relu",
    "rescale",
    "rms_norm",
    "rotary",
    "swiglu",
    "tree_attention",
]
