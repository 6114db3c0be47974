"""A prefix in rows before the tokens' keys and values, so that one flash attention serves both: when that replaces the merge, and on what.

    o = softmax(scale q [P_k; k]^T) [P_v; v], causality aligned at the last query and the last key: key j <= i + n of [P_k; k] for query i

That alignment leaves the prefix to every query, and is what CUDA's flash kernel means by causality where there are fewer queries than keys
(FlashAttention from 2.1 on; torch.nn.attention.bias.causal_lower_right calls it so). PyTorch's own ``is_causal`` is aligned at the first
key, and its mask [M, N] would go to a kernel of half the speed.
dP = sum over the batch of the first n rows of dK and dV; the others are views.

Moved through memory beside one attention's own, in tensors of M H d (q) and of N H_kv d (k): the merge (prefix_attention.py) q 3 forward
and 5 backward; reserved rows k 4 forward (keys and values are copied) and nothing backward, 2 where rotary embedding writes the keys there
(attention_inputs.py); and n / N of attention itself.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastpeft.ops._flash import kernel_of
from fastpeft.ops.attention_inputs import behind, one_pass

# Whether CUDA's flash kernel takes causality over fewer queries than keys here; False until it was seen on a card.
LOWER_RIGHT = False
# M H / (N H_kv) from which reserved rows take less time than the merge, by a card; None until one has told. By bytes alone: 0.5.
QUERIES_PER_KEY: float | None = None


def takes_lower_right(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Whether :func:`lower_right` serves these."""
    return LOWER_RIGHT and 1 < q.shape[2] < k.shape[2] and kernel_of(q, k, v, False, False) == "flash"


def lower_right(q: Tensor, k: Tensor, v: Tensor, scale: float, dropout_p: float) -> Tensor:
    """Causal attention aligned at the last query and the last key, on CUDA's flash kernel; M <= N."""
    return torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, dropout_p, True, scale=scale)[0]


def reserved_pays(q: Tensor, k: Tensor, v: Tensor, causal: bool, padding: Tensor | None) -> bool:
    """Whether a prefix is put before these keys, instead of merged into their attention."""
    (_, H, M, _), (_, H_kv, N, _) = q.shape, k.shape
    if QUERIES_PER_KEY is None or padding is not None or M * H / (N * H_kv) < QUERIES_PER_KEY:
        return False
    aligned = not causal or M == 1 or (LOWER_RIGHT and M <= N)
    return aligned and kernel_of(q, k, v, False, False) == "flash"


def with_prefix(prefix: tuple[Tensor, Tensor], k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """[P_k; k], [P_v; v], each [B, H_kv, n + N, d]."""
    if one_pass(k, k):
        return behind(k, v, *prefix)
    return tuple(torch.cat([p.to(t.dtype).expand(t.shape[0], -1, -1, -1), t], 2) for p, t in zip(prefix, (k, v)))
