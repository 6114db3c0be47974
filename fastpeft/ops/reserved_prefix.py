"""A prefix in rows before the tokens' keys and values, so that one attention of someone else's serves both: when that replaces the merge.

    o = softmax(scale q [P_k; k]^T) [P_v; v]        dP = the first n rows of dK and dV, summed over the batch

| form   | taken for                    | attention                                                                              |
|--------|------------------------------|----------------------------------------------------------------------------------------|
| square | causal, M = N                | n rows of zeros before the queries, too: PyTorch's is_causal, which every kernel takes |
|        |                              | (cuDNN's is the fastest on sm_90); the first n outputs are nobody's                    |
| last   | causal, 1 < M < N            | ATen's flash kernel itself: aligned at the last query and the last key                 |
| full   | not causal, or one query     | SDPA                                                                                   |
| padded | not causal, padding          | SDPA with a mask [B, 1, 1, n + N]                                                      |

FlashAttention's causality over fewer queries than keys is aligned at the last ones from 2.1 on (torch.nn.attention.bias.causal_lower_right
calls it so), which leaves the prefix to every query; PyTorch's own is_causal is aligned at the first ones.

Moved through memory beside one attention's own, in tensors of M H d (q) and of N H_kv d (k): the merge (prefix_attention.py) q 3 forward
and 5 backward; reserved rows k 4 forward (keys and values are copied), q 2 in either direction where they are square, 2 less for each of
queries and keys that rotary embedding writes there (attention_inputs.py); and n / N of attention itself.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fastpeft.ops._flash import kernel_of
from fastpeft.ops.attention_inputs import behind, one_pass, without_rows

# For each form the M H / (N H_kv) from which reserved rows take less time than the merge, by a card; None: none has told yet.
PAYS_FROM: dict[str, float | None] = {"square": None, "last": None, "full": None, "padded": None}
LOWER_RIGHT = False  # whether causality over fewer queries than keys, a cache's, goes to ATen's flash kernel; not yet seen on a card


def form_of(q: Tensor, k: Tensor, causal: bool, padding: Tensor | None) -> str:
    """The row of the table above; "" for none."""
    M, N = q.shape[2], k.shape[2]
    if not causal or M == 1:
        return "full" if padding is None else "padded"
    return "" if padding is not None or M > N else "square" if M == N else "last"


def reserved_pays(q: Tensor, k: Tensor, v: Tensor, causal: bool, padding: Tensor | None) -> bool:
    """Whether a prefix is put before these keys, instead of merged into their attention."""
    pays_from = PAYS_FROM.get(form_of(q, k, causal, padding))
    if pays_from is None or q.shape[2] * q.shape[1] < pays_from * (k.shape[2] * k.shape[1]):
        return False
    return kernel_of(q, k, v, False, False) == "flash"


def takes_lower_right(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Whether :func:`lower_right` serves causal attention to a cache's keys."""
    return LOWER_RIGHT and 1 < q.shape[2] < k.shape[2] and kernel_of(q, k, v, False, False) == "flash"


def lower_right(q: Tensor, k: Tensor, v: Tensor, scale: float, dropout_p: float) -> Tensor:
    """Causal attention aligned at the last query and the last key, on CUDA's flash kernel; M <= N."""
    return torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, dropout_p, True, scale=scale)[0]


def in_reserved_rows(q, k, v, causal: bool, padding: Tensor | None, scale: float, prefix, dropout_p: float) -> Tensor:
    """Attention behind a prefix, in the form that :func:`form_of` says."""
    form, n = form_of(q, k, causal, padding), prefix[0].shape[1]
    rows = q if form == "square" else None
    if one_pass(k, k):
        *before, k, v = behind(rows, k, v, *prefix)
        q = before[0] if before else q
    else:
        k, v = (torch.cat([p.to(t.dtype).expand(t.shape[0], -1, -1, -1), t], 2) for p, t in zip(prefix, (k, v)))
        q = q if rows is None else F.pad(q, (0, 0, n, 0))
    if form == "last":
        return lower_right(q, k, v, scale, dropout_p)
    mask = None if padding is None else F.pad(padding, (n, 0), value=True)[:, None, None]
    gqa = {} if q.shape[1] == k.shape[1] else {"enable_gqa": True}
    o = F.scaled_dot_product_attention(q, k, v, mask, dropout_p, rows is not None, scale=scale, **gqa)
    return o if rows is None else without_rows(o, n)
