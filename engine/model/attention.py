"""One attention primitive, and the exact merge of its results over pieces of one sequence's keys and values.

``attend`` also returns the log-sum-exp of the scores; with it, softmax over the union of several pieces is a weighted
sum of the softmaxes over each (Milakov & Gimelshein 2018, arXiv:1805.02867; Dao 2023, arXiv:2307.08691).

Shapes: N query heads, K key/value heads, t query tokens, s key tokens, H head size.
"""

from collections.abc import Iterator, Sequence
from functools import cache

import torch
from torch import Tensor

from engine.units import align_up

CAUSAL_ROWS = 256
"""Queries of causal attention computed together on the CPU."""
KERNEL_STEP = 64
"""PyTorch compiles a kernel for each number of queries, from so many on, and keys that it meets, and keeps it: 0.4 MB
a prompt of another length. Blocks are cut so that it meets few of them."""
MASK_KEYS = 2048
"""Masks are made for a multiple of so many keys, so that a model needs one or two of them."""


def attend(q_NtH: Tensor, k_KsH: Tensor, v_KsH: Tensor, *, causal: bool) -> tuple[Tensor, Tensor]:
    """Softmax attention of one segment: ``out [N, t, H]`` in the inputs' dtype and ``lse [N, t]`` in float32.

    With ``causal``, the queries are the last t of the s tokens, and each sees the keys up to its own.
    """
    k_KsH, v_KsH = _expand(q_NtH, k_KsH), _expand(q_NtH, v_KsH)
    if q_NtH.shape[1] == 1:
        causal = False  # the last token sees everything
    if q_NtH.device.type == "cpu":
        return _attend_on_cpu(q_NtH, k_KsH, v_KsH, causal=causal)
    past = k_KsH.shape[1] - q_NtH.shape[1]
    if causal and past:
        pieces = [(False, slice(0, past)), (True, slice(past, None))]
        return merge([_attend_on_gpu(q_NtH, k_KsH[:, s], v_KsH[:, s], causal=own) for own, s in pieces])
    return _attend_on_gpu(q_NtH, k_KsH, v_KsH, causal=causal)


def _attend_on_gpu(q_NtH: Tensor, k_NsH: Tensor, v_NsH: Tensor, *, causal: bool) -> tuple[Tensor, Tensor]:
    """With ``causal``, t = s: kernels differ in what they make of anything else."""
    scale = q_NtH.shape[-1] ** -0.5
    if q_NtH.shape[-1] % 8 or q_NtH.shape[-1] > 256:
        return attend_plainly(q_NtH, k_NsH, v_NsH, causal=causal)
    if q_NtH.dtype != torch.float32 and _has_flash(q_NtH.device):
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention(
            q_NtH[None], k_NsH[None], v_NsH[None], 0.0, causal, False, scale=scale
        )[:2]
        return out[0], lse[0]
    out, lse = torch.ops.aten._scaled_dot_product_efficient_attention(
        q_NtH[None], k_NsH[None], v_NsH[None], None, True, 0.0, causal, scale=scale
    )[:2]
    return out[0], lse[0, :, : q_NtH.shape[1]]  # its rows are padded to whole tiles


def _attend_on_cpu(q_NtH: Tensor, k_NsH: Tensor, v_NsH: Tensor, *, causal: bool) -> tuple[Tensor, Tensor]:
    """Causal attention in blocks of queries, each over the keys it sees: the kernel computes what it then masks."""
    num_queries, num_keys = q_NtH.shape[1], k_NsH.shape[1]
    if num_queries == 1 and q_NtH.dtype == torch.bfloat16 and not flash_decodes():
        return _attend_one(q_NtH, k_NsH, v_NsH)
    if not causal:
        whole = num_keys // KERNEL_STEP * KERNEL_STEP
        if num_queries < KERNEL_STEP or whole in (0, num_keys):
            return _flash_on_cpu(q_NtH, k_NsH, v_NsH, None)
        parts = [slice(0, whole), slice(whole, num_keys)]
        return merge([_flash_on_cpu(q_NtH, k_NsH[:, part], v_NsH[:, part], None) for part in parts])
    mask_tS = _mask(q_NtH.dtype, CAUSAL_ROWS, align_up(num_keys, MASK_KEYS))
    blocks = []
    for first, end in _causal_blocks(num_queries, num_keys):
        rows, seen = end - first, num_keys - num_queries + end
        # The mask's last columns are the triangle: from it to the left, all is seen.
        begin = mask_tS.shape[1] - CAUSAL_ROWS + rows - seen
        mask_ts = mask_tS[:rows, begin : begin + seen]
        blocks.append(_flash_on_cpu(q_NtH[:, first:end], k_NsH[:, :seen], v_NsH[:, :seen], mask_ts))
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


def _flash_on_cpu(q_NtH: Tensor, k_NsH: Tensor, v_NsH: Tensor, mask_ts: Tensor | None) -> tuple[Tensor, Tensor]:
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        q_NtH[None], k_NsH[None], v_NsH[None], 0.0, False, attn_mask=mask_ts, scale=q_NtH.shape[-1] ** -0.5
    )
    return out[0], lse[0]


@cache
def _mask(dtype: torch.dtype, rows: int, columns: int) -> Tensor:
    """What a block of queries adds to its scores: 0, and above the diagonal of the last columns minus infinity."""
    mask = torch.zeros(rows, columns + rows, dtype=dtype)
    mask[:, columns:] = torch.full((rows, rows), float("-inf"), dtype=dtype).triu(1)
    return mask


@cache
def flash_decodes() -> bool:
    """Whether the CPU's flash kernel, made for many queries, is as fast for one as memory allows: with AMX it is.

    Without, it takes four times as long in bfloat16 as a batched product.
    """
    return bool(torch.cpu._is_amx_tile_supported())


@cache
def _has_flash(device: torch.device) -> bool:
    """Ampere and later."""
    return torch.cuda.get_device_capability(device) >= (8, 0)


def _attend_one(q_N1H: Tensor, k_NsH: Tensor, v_NsH: Tensor) -> tuple[Tensor, Tensor]:
    """One decode token on the CPU: memory-bound, so each key and value is read once by a batched product.

    Scores are float32, since rounding them would cost more than rounding everything else; the weights are rounded as
    the flash kernel does.
    """
    scores_N1s = torch.bmm(q_N1H.float(), k_NsH.float().transpose(1, 2)).mul_(q_N1H.shape[-1] ** -0.5)
    lse_N1 = scores_N1s.logsumexp(-1)
    weights_N1s = scores_N1s.sub_(lse_N1[..., None]).exp_().to(v_NsH.dtype)
    return torch.bmm(weights_N1s, v_NsH), lse_N1


def attend_decode(
    scaled_NH: Tensor, k_NH: Tensor, v_NH: Tensor, kv_2NcH: Tensor, position: int, out_NH: Tensor
) -> None:
    """Store one decode token's key and value at ``position``, and attend to all up to it: in as few steps as it takes.

    Args:
        scaled_NH: the query in float32, times ``H ** -0.5``.
        k_NH, v_NH: the token's own key and value.
        kv_2NcH: the sequence's keys and values, ``[k|v, N, capacity, H]``; written at ``position``.
        position: the token's place.
        out_NH: receives the result.
    """
    kv_2NcH[0, :, position] = k_NH
    kv_2NcH[1, :, position] = v_NH
    k_NsH, v_NsH = kv_2NcH[:, :, : position + 1]
    weights_N1s = torch.bmm(scaled_NH[:, None], k_NsH.float().mT).softmax(-1)
    torch.bmm(weights_N1s.to(v_NsH.dtype), v_NsH, out=out_NH[:, None])


def attend_decode_by_flash(q_1N1H: Tensor, kv_2NH: Tensor, kv_2NcH: Tensor, position: int, out_1N1H: Tensor) -> None:
    """As ``attend_decode``, by the flash kernel: ``q_1N1H`` is not scaled, ``kv_2NH`` the token's own key and value.

    Nothing here but what must be: for one token, a Python object more or less is a hundredth of the whole.
    """
    kv_2NcH.select(2, position).copy_(kv_2NH)
    k_1NsH, v_1NsH = kv_2NcH.narrow(2, 0, position + 1).chunk(2)
    out, _ = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        q_1N1H, k_1NsH, v_1NsH, 0.0, False, attn_mask=None, scale=q_1N1H.shape[-1] ** -0.5
    )
    out_1N1H.copy_(out)


def _expand(q_NtH: Tensor, x_KsH: Tensor) -> Tensor:
    """Key/value heads repeated for the query heads that share them."""
    repeats = q_NtH.shape[0] // x_KsH.shape[0]
    return x_KsH if repeats == 1 else x_KsH.repeat_interleave(repeats, dim=0)


def attend_plainly(q_NtH: Tensor, k_NsH: Tensor, v_NsH: Tensor, *, causal: bool) -> tuple[Tensor, Tensor]:
    """The definition, in float32: the oracle of the kernels, and the way where no kernel fits."""
    scores_Nts = (q_NtH.float() @ k_NsH.float().transpose(1, 2)) * q_NtH.shape[-1] ** -0.5
    if causal:
        past = k_NsH.shape[1] - q_NtH.shape[1]
        hidden = torch.ones(scores_Nts.shape[1:], dtype=torch.bool, device=scores_Nts.device).triu(past + 1)
        scores_Nts = scores_Nts.masked_fill(hidden, float("-inf"))
    lse_Nt = scores_Nts.logsumexp(-1)
    out_NtH = (scores_Nts - lse_Nt[..., None]).exp() @ v_NsH.float()
    return out_NtH.to(q_NtH.dtype), lse_Nt


def merge(pieces: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Attention over the union of the pieces' keys, from each piece's ``(out [N, t, H], lse [N, t])``: the same two."""
    if len(pieces) == 1:
        return pieces[0]
    lses = torch.stack([lse for _, lse in pieces])
    lse_Nt = lses.logsumexp(0)
    weights = (lses - lse_Nt).exp()[..., None]
    outs = torch.stack([out for out, _ in pieces])
    return (weights * outs.float()).sum(0).to(outs.dtype), lse_Nt
