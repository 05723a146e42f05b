"""One attention primitive on the CPU, and the exact merge of its results over pieces of one sequence's keys and values.

``attend`` also returns the log-sum-exp of the scores; with it, softmax over the union of several pieces is a weighted
sum of the softmaxes over each (Milakov & Gimelshein 2018, arXiv:1805.02867; Dao 2023, arXiv:2307.08691).

Shapes: N query heads, K key/value heads, t query tokens, s key tokens, H head size.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

from engine.formats.linear import has_matrix_units, has_products

CAUSAL_ROWS = 256
"""Queries of causal attention computed together on the CPU."""
KERNEL_STEP = 64
"""PyTorch compiles a kernel for each number of queries, from this many on, and keys that it meets, and keeps it: 0.4 MB
a prompt of another length. Blocks are cut so that it meets few of them."""
FEW_QUERIES = 8
"""Queries of one key/value head, the same decode token's, up to which a batched product is faster than flash."""
MASK_KEYS = 2048
"""Keys that a mask is made for; where a block of queries sees more, those before it are attended to without one."""


def attend(q_NtH: Tensor, k_KsH: Tensor, v_KsH: Tensor, *, causal: bool) -> tuple[Tensor, Tensor]:
    """Softmax attention of one segment: ``out [N, t, H]`` in the inputs' dtype and ``lse [N, t]`` in float32.

    With ``causal``, the queries are the last t of the s tokens, and each sees the keys up to its own. Query heads that
    share a key/value head (grouped queries) are N / K consecutive ones.
    """
    if q_NtH.shape[1] == 1:
        causal = False  # the last token sees everything
    group = q_NtH.shape[0] // k_KsH.shape[0]
    if group > 1:  # nothing is repeated: as more queries of one head, or where positions matter in turn
        q_KGtH = q_NtH.view(-1, group, *q_NtH.shape[1:])
        if not causal:
            out, lse = attend(q_KGtH.flatten(1, 2), k_KsH, v_KsH, causal=False)
            return out.view_as(q_KGtH).flatten(0, 1), lse.view(q_KGtH.shape[:3]).flatten(0, 1)
        outs, lses = zip(*(attend(q_KtH, k_KsH, v_KsH, causal=True) for q_KtH in q_KGtH.unbind(1)), strict=True)
        return torch.stack(outs, 1).flatten(0, 1), torch.stack(lses, 1).flatten(0, 1)
    return _attend(q_NtH, k_KsH, v_KsH, causal=causal)


def _attend(q_NtH: Tensor, k_NsH: Tensor, v_NsH: Tensor, *, causal: bool) -> tuple[Tensor, Tensor]:
    """Causal attention in blocks of queries, each over the keys it sees: the kernel computes what it then masks."""
    num_queries, num_keys = q_NtH.shape[1], k_NsH.shape[1]
    if num_queries <= FEW_QUERIES and not causal and q_NtH.dtype == torch.bfloat16 and not flash_decodes():
        return _attend_few(q_NtH, k_NsH, v_NsH)
    if not causal:
        whole = num_keys // KERNEL_STEP * KERNEL_STEP
        if num_queries < KERNEL_STEP or whole in (0, num_keys):
            return _flash(q_NtH, k_NsH, v_NsH, None)
        parts = [slice(0, whole), slice(whole, num_keys)]
        return merge([_flash(q_NtH, k_NsH[:, part], v_NsH[:, part], None) for part in parts])
    mask_tS = _mask(q_NtH.dtype)
    blocks = []
    for first, end in _causal_blocks(num_queries, num_keys):
        rows, seen = end - first, num_keys - num_queries + end
        # Keys before the mask's need none, since all of the block sees them.
        cut = 0 if seen <= MASK_KEYS else seen - rows
        q_NrH, parts = q_NtH[:, first:end], [slice(0, cut)] if cut else []
        pieces = [_flash(q_NrH, k_NsH[:, part], v_NsH[:, part], None) for part in parts]
        # The mask's last columns are the triangle: from it to the left, all is seen.
        begin = mask_tS.shape[1] - CAUSAL_ROWS + rows - (seen - cut)
        mask_ts = mask_tS[:rows, begin : begin + seen - cut]
        blocks.append(merge([*pieces, _flash(q_NrH, k_NsH[:, cut:seen], v_NsH[:, cut:seen], mask_ts)]))
    if len(blocks) == 1:
        return blocks[0]
    return torch.cat([out for out, _ in blocks], 1), torch.cat([lse for _, lse in blocks], 1)


def _causal_blocks(num_queries: int, num_keys: int) -> Iterator[tuple[int, int]]:
    """First query and end of each block: a multiple of ``KERNEL_STEP`` that sees a multiple of keys; or fewer."""
    first = min(num_queries, (num_queries - num_keys) % KERNEL_STEP)
    if first:
        yield 0, first
    while first < num_queries:
        rows = min(CAUSAL_ROWS, num_queries - first)
        if rows > KERNEL_STEP:
            rows -= rows % KERNEL_STEP
        yield first, first + rows
        first += rows


def _flash(q_NtH: Tensor, k_NsH: Tensor, v_NsH: Tensor, mask_ts: Tensor | None) -> tuple[Tensor, Tensor]:
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        q_NtH[None], k_NsH[None], v_NsH[None], 0.0, False, attn_mask=mask_ts, scale=q_NtH.shape[-1] ** -0.5
    )
    return out[0], lse[0]


@cache
def _mask(dtype: torch.dtype) -> Tensor:
    """What a block of queries adds to its scores: 0, and above the diagonal of the last columns minus infinity."""
    mask = torch.zeros(CAUSAL_ROWS, MASK_KEYS + CAUSAL_ROWS, dtype=dtype)
    mask[:, MASK_KEYS:] = torch.full((CAUSAL_ROWS, CAUSAL_ROWS), float("-inf"), dtype=dtype).triu(1)
    return mask


def flash_decodes() -> bool:
    """Whether the CPU's flash kernel, made for many queries, is as fast for one as memory allows: with AMX it is.

    Without, it takes four times as long in bfloat16 as a batched product.
    """
    return has_matrix_units()


def _attend_few(q_NtH: Tensor, k_NsH: Tensor, v_NsH: Tensor) -> tuple[Tensor, Tensor]:
    """A decode token on the CPU: memory-bound, so each key and value is read once by a batched product.

    Scores are float32, since rounding them would cost more than rounding everything else.
    """
    scores_Nts = torch.bmm(q_NtH.float(), k_NsH.float().mT).mul_(q_NtH.shape[-1] ** -0.5)
    lse_Nt = scores_Nts.logsumexp(-1)
    out_NtH = q_NtH.new_empty(q_NtH.shape)
    _weigh(scores_Nts.sub_(lse_Nt[..., None]).exp_(), v_NsH, out_NtH)
    return out_NtH, lse_Nt


def _weigh(weights_Nts: Tensor, v_NsH: Tensor, out_NtH: Tensor) -> None:
    """Values times weights, which are float32, into ``out``. Weights are rounded as values are where that is faster."""
    if has_products(v_NsH.dtype):
        torch.bmm(weights_Nts.to(v_NsH.dtype), v_NsH, out=out_NtH)
    else:
        out_NtH.copy_(torch.bmm(weights_Nts, v_NsH.float()))


Decoder = Callable[[int, Sequence[Any], int], None]
"""Attends to one token: given its row, its sequence's keys and values in pieces, ``[k|v, K, c, H]`` unless they are
packed, up to the one that the token is in, and its place in that."""


def decoder(num_rows: int, q_TNH: Tensor, k_TKH: Tensor, v_TKH: Tensor, out_TNH: Tensor) -> Decoder | None:
    """On the CPU, what stores and attends to one token at one of the first ``num_rows``: see ``attend_decode``.

    What can be done for all rows together is done here.
    """
    if not num_rows:
        return None
    grouped = (num_rows, k_TKH.shape[1], -1, q_TNH.shape[2])
    q_TKGH, out_TKGH = q_TNH[:num_rows].view(grouped), out_TNH[:num_rows].view(grouped)
    if not flash_decodes():
        scaled_TKGH = q_TKGH.float() * q_TNH.shape[-1] ** -0.5
        return lambda row, pieces, place: attend_decode(
            scaled_TKGH[row], k_TKH[row], v_TKH[row], pieces, place, out_TKGH[row]
        )
    kv_T2KH = torch.stack((k_TKH[:num_rows], v_TKH[:num_rows]), 1)
    q_T1KGH, out_T1KGH = q_TKGH[:, None], out_TKGH[:, None]
    return lambda row, pieces, place: attend_decode_by_flash(q_T1KGH[row], kv_T2KH[row], pieces, place, out_T1KGH[row])


def attend_decode(
    scaled_KGH: Tensor, k_KH: Tensor, v_KH: Tensor, pieces: Sequence[Tensor], place: int, out_KGH: Tensor
) -> None:
    """Store one decode token's key and value at its place, and attend to all up to it: in as few steps as it takes.

    Args:
        scaled_KGH: the query in float32, times ``H ** -0.5``; G query heads share a key/value head.
        k_KH, v_KH: the token's own key and value.
        pieces: the sequence's keys and values, ``[k|v, K, capacity, H]`` each; the last is written at ``place``.
        place: that of the token in the last piece.
        out_KGH: receives the result.
    """
    kv_2KcH = pieces[-1]
    kv_2KcH[0, :, place] = k_KH
    kv_2KcH[1, :, place] = v_KH
    k_KsH, v_KsH = kv_2KcH[:, :, : place + 1]
    if len(pieces) == 1:
        _weigh(torch.bmm(scaled_KGH, k_KsH.float().mT).softmax(-1), v_KsH, out_KGH)
        return
    # One softmax over all: nothing but sums of values is left to merge.
    seen = [*pieces[:-1], kv_2KcH[:, :, : place + 1]]
    weights_KGs = torch.cat([torch.bmm(scaled_KGH, k_KpH.float().mT) for k_KpH, _ in seen], -1).softmax(-1)
    found = []
    for weights_KGp, (_, v_KpH) in zip(torch.split(weights_KGs, [kv.shape[2] for kv in seen], -1), seen, strict=True):
        found.append(torch.empty_like(out_KGH))
        _weigh(weights_KGp, v_KpH, found[-1])
    out_KGH.copy_(torch.stack(found).sum(0, dtype=torch.float32))


def attend_decode_by_flash(
    q_1KGH: Tensor, kv_2KH: Tensor, pieces: Sequence[Tensor], place: int, out_1KGH: Tensor
) -> None:
    """As ``attend_decode``, by the flash kernel: ``q_1KGH`` is not scaled, ``kv_2KH`` the token's own key and value.

    Nothing here but what must be: for one token, a Python object more or less is a hundredth of the whole.
    """
    kv_2KcH = pieces[-1]
    kv_2KcH.select(2, place).copy_(kv_2KH)
    kv_2KsH = kv_2KcH.narrow(2, 0, place + 1)
    if len(pieces) > 1:
        seen = (*pieces[:-1], kv_2KsH)
        out_1KGH[0] = merge([_flash(q_1KGH[0], k_KpH, v_KpH, None) for k_KpH, v_KpH in seen])[0]
        return
    k_1KsH, v_1KsH = kv_2KsH.chunk(2)
    out, _ = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        q_1KGH, k_1KsH, v_1KsH, 0.0, False, attn_mask=None, scale=q_1KGH.shape[-1] ** -0.5
    )
    out_1KGH.copy_(out)


def merge(pieces: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Attention over the union of the pieces' keys, from each piece's ``(out [N, t, H], lse [N, t])``: the same two."""
    if len(pieces) == 1:
        return pieces[0]
    lses = torch.stack([lse for _, lse in pieces])
    lse_Nt = lses.logsumexp(0)
    outs, weights = [out for out, _ in pieces], (lses - lse_Nt).exp_()[..., None].unbind()
    # Weights are float32, and so is the sum; no piece is copied to be.
    total_NtH = outs[0] * weights[0]
    for out, weight in zip(outs[1:], weights[1:], strict=True):
        total_NtH.addcmul_(out, weight)
    return total_NtH.to(outs[0].dtype), lse_Nt
