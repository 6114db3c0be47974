"""A prefix in rows before the tokens' keys and values, so that one attention of PyTorch's serves both, where that replaces the merge.

    o = softmax(scale q [P_k; k]^T) [P_v; v]        dP = the first n rows of dK and dV, summed over the batch

Causal, n rows of zeros stand before the queries, too: as many queries as keys are PyTorch's own is_causal, and every query sees the
prefix. The first n outputs are nobody's. That form is for cuDNN's kernel, which SDPA takes on sm_90 and which knows no other causality.
Measured on an H200 (torch 2.11), 4 x 2048 tokens, 32 heads of 128, n = 10, causal, bfloat16, ms of a captured graph, forward and backward:
nothing added 1.10, rows 1.33 (by torch.cat 1.82), the merge 2.19; with the rotary embedding that writes them 1.47, 1.32 without a prefix,
2.39 merged. At 2000 tokens, where ten rows more need no tile more, nothing added 1.11, rows 1.26. FlashAttention's causality is aligned at
the last query and the last key (torch.nn.attention.bias.causal_lower_right), and needs no rows of zeros, but its kernel is slower there:
2.26 with rotary.

Not causal, SDPA takes as many queries as there are. Small calls (20 x 35 tokens, 12 heads of 64) took 0.058 merged and 0.057 by torch.cat,
and a third of the host's time; few queries on many keys (cross-attention, a cache) stay with the merge, which copies no keys.

Moved through memory beside one attention's own, in tensors of M H d (q) and of N H_kv d (k): the merge (prefix_attention.py) q 3 forward
and 5 backward; reserved rows k 4 forward (keys and values are copied) and, causal, q 2 in either direction, 2 less for each of queries and
keys that rotary embedding writes there (attention_inputs.py); and n / N of attention itself.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from fastpeft.ops._flash import kernel_of, takes_cudnn
from fastpeft.ops.attention_inputs import behind, one_pass, without_rows


def reserved_pays(q: Tensor, k: Tensor, v: Tensor, causal: bool, padding: Tensor | None) -> bool:
    """Whether a prefix is put before these keys, instead of merged into their attention."""
    (_, H, M, _), (_, H_kv, N, _) = q.shape, k.shape
    if padding is not None or N * H_kv > M * H or not one_pass(k, k) or kernel_of(q, k, v, False, False) != "flash":
        return False
    return M == N and takes_cudnn(q, k, v) if causal and M > 1 else True


def in_reserved_rows(q, k, v, causal: bool, padding: None, scale: float, prefix, dropout_p: float) -> Tensor:
    """Attention behind a prefix, where :func:`reserved_pays`."""
    square = causal and q.shape[2] > 1
    *rows, k, v = behind(q if square else None, k, v, *prefix)
    gqa = {} if q.shape[1] == k.shape[1] else {"enable_gqa": True}
    o = F.scaled_dot_product_attention(*rows, *(() if square else (q,)), k, v, None, dropout_p, square, scale=scale, **gqa)
    return without_rows(o, prefix[0].shape[1]) if square else o
