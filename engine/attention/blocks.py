"""Causal attention of a whole prompt on the CPU: by PyTorch's kernel, or by plain products over blocks of scores.

Without AMX, PyTorch's flash kernel multiplies at a fifth of the speed of a layer's products in bfloat16. Here queries
and keys are multiplied in float32, since rounding scores would cost more than rounding everything else, and weights and
values as they are stored.

Shapes: N query heads, K key/value heads, t query tokens, s key tokens, H head size; G query heads share a key/value
head, and h key/value heads are computed together, r queries at once.
"""

from functools import cache

import torch
from torch import Tensor

from engine.attention.kernels import attend, flash_decodes
from engine.formats.linear import has_products
from engine.units import MIB

BLOCK_QUERIES = 64
"""Queries computed together. All are multiplied with the keys that the last of them sees, so that a larger block
computes more that is masked. Prompts of fewer tokens are left to the kernel."""
BLOCK_BYTES = 2 * MIB
"""Bytes of scores computed together, unless one key/value head has more: what a core's caches hold."""


def attend_whole(q_NtH: Tensor, k_KsH: Tensor, v_KsH: Tensor, out_NtH: Tensor) -> None:
    """Softmax attention into ``out``: the queries are the last t of the s tokens, and each sees the keys up to its own.

    Query heads that share a key/value head are N / K consecutive ones.
    """
    if q_NtH.shape[1] >= BLOCK_QUERIES and blocks_are_faster(q_NtH.dtype):
        attend_in_blocks(q_NtH, k_KsH, v_KsH, out_NtH)
    else:
        out_NtH.copy_(attend(q_NtH, k_KsH, v_KsH, causal=True)[0])


@cache
def blocks_are_faster(dtype: torch.dtype) -> bool:
    """Whether this processor takes less time over blocks than over PyTorch's kernel."""
    return dtype == torch.bfloat16 and has_products(dtype) and not flash_decodes()


def attend_in_blocks(q_NtH: Tensor, k_KsH: Tensor, v_KsH: Tensor, out_NtH: Tensor) -> None:
    """As ``attend_whole``, a block of queries and of heads at a time."""
    (num_kv_heads, num_keys, size), num_queries = k_KsH.shape, q_NtH.shape[1]
    q_KGtH = q_NtH.view(num_kv_heads, -1, num_queries, size)
    out_KGtH = out_NtH.view(q_KGtH.shape)
    group = q_KGtH.shape[1]
    together = max(1, BLOCK_BYTES // (4 * group * BLOCK_QUERIES * num_keys))
    for first in range(0, num_kv_heads, together):
        heads = slice(first, first + together)
        q_hGtH, keys_hHs = q_KGtH[heads].float() * size**-0.5, k_KsH[heads].float().mT
        for begin in range(0, num_queries, BLOCK_QUERIES):
            rows = min(BLOCK_QUERIES, num_queries - begin)
            seen = num_keys - num_queries + begin + rows
            q_hrH = q_hGtH[:, :, begin : begin + rows].flatten(1, 2)
            scores_hGrs = torch.bmm(q_hrH, keys_hHs[..., :seen]).view(-1, group, rows, seen)
            scores_hGrs[..., seen - rows :] += _mask()[:rows, :rows]
            weights_hrs = scores_hGrs.softmax(-1).to(v_KsH.dtype).flatten(1, 2)
            found_hrH = torch.bmm(weights_hrs, v_KsH[heads, :seen])
            out_KGtH[heads, :, begin : begin + rows] = found_hrH.view(-1, group, rows, size)


@cache
def _mask() -> Tensor:
    """What is added to a block's scores of its own tokens: minus infinity above the diagonal."""
    return torch.full((BLOCK_QUERIES, BLOCK_QUERIES), float("-inf")).triu(1)
