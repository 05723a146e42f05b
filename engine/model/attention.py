"""One attention primitive, and the exact merge of its results over pieces of one sequence's keys and values.

``attend`` also returns the log-sum-exp of the scores; with it, softmax over the union of several pieces is a weighted
sum of the softmaxes over each (Milakov & Gimelshein 2018, arXiv:1805.02867; Dao 2023, arXiv:2307.08691).

Shapes: N query heads, K key/value heads, t query tokens, s key tokens, H head size.
"""

from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor


def attend(q_NtH: Tensor, k_KsH: Tensor, v_KsH: Tensor, *, causal: bool) -> tuple[Tensor, Tensor]:
    """Softmax attention of one segment: ``out [N, t, H]`` in the inputs' dtype and ``lse [N, t]`` in float32.

    With ``causal``, the keys are the segment's own (t = s) and token i sees tokens 0..i.
    """
    k_KsH, v_KsH = _expand(q_NtH, k_KsH), _expand(q_NtH, v_KsH)
    scale = q_NtH.shape[-1] ** -0.5
    if q_NtH.device.type == "cpu":
        if q_NtH.shape[1] == 1 and q_NtH.dtype == torch.bfloat16:
            return _attend_one(q_NtH, k_KsH, v_KsH)
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            q_NtH[None], k_KsH[None], v_KsH[None], 0.0, causal, scale=scale
        )
        return out[0], lse[0]
    if q_NtH.shape[-1] % 8 or q_NtH.shape[-1] > 256:
        return attend_plainly(q_NtH, k_KsH, v_KsH, causal=causal)
    if q_NtH.dtype != torch.float32 and _has_flash(q_NtH.device):
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention(
            q_NtH[None], k_KsH[None], v_KsH[None], 0.0, causal, False, scale=scale
        )[:2]
        return out[0], lse[0]
    out, lse = torch.ops.aten._scaled_dot_product_efficient_attention(
        q_NtH[None], k_KsH[None], v_KsH[None], None, True, 0.0, causal, scale=scale
    )[:2]
    return out[0], lse[0, :, : q_NtH.shape[1]]  # its rows are padded to whole tiles


@cache
def _has_flash(device: torch.device) -> bool:
    """Ampere and later."""
    return torch.cuda.get_device_capability(device) >= (8, 0)


def _attend_one(q_N1H: Tensor, k_NsH: Tensor, v_NsH: Tensor) -> tuple[Tensor, Tensor]:
    """One decode token on the CPU: memory-bound, so each key and value is read once by a batched product.

    The flash kernel, made for many queries, takes four times as long for one in bfloat16. Scores are float32, since
    rounding them would cost more than rounding everything else; the weights are rounded as the flash kernel does.
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


def _expand(q_NtH: Tensor, x_KsH: Tensor) -> Tensor:
    """Key/value heads repeated for the query heads that share them."""
    repeats = q_NtH.shape[0] // x_KsH.shape[0]
    return x_KsH if repeats == 1 else x_KsH.repeat_interleave(repeats, dim=0)


def attend_plainly(q_NtH: Tensor, k_NsH: Tensor, v_NsH: Tensor, *, causal: bool) -> tuple[Tensor, Tensor]:
    """The definition, in float32: the oracle of the kernels, and the way where no kernel fits."""
    scores_Nts = (q_NtH.float() @ k_NsH.float().transpose(1, 2)) * q_NtH.shape[-1] ** -0.5
    if causal:
        hidden = torch.ones(scores_Nts.shape[1:], dtype=torch.bool, device=scores_Nts.device).triu(1)
        scores_Nts = scores_Nts.masked_fill(hidden, float("-inf"))
    lse_Nt = scores_Nts.logsumexp(-1)
    out_NtH = (scores_Nts - lse_Nt[..., None]).exp() @ v_NsH.float()
    return out_NtH.to(q_NtH.dtype), lse_Nt


def merge(pieces: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
    """The attention over the union of the pieces' keys, from each piece's ``(out [N, t, H], lse [N, t])``."""
    if len(pieces) == 1:
        return pieces[0][0]
    lses = torch.stack([lse for _, lse in pieces])
    weights = (lses - lses.logsumexp(0)).exp()[..., None]
    outs = torch.stack([out for out, _ in pieces])
    return (weights * outs.float()).sum(0).to(outs.dtype)
