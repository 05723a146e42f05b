"""Four bits a value, in groups with a scale and a minimum of their own (Sheng et al. 2023, section 5.1).

A value is ``code * scale + minimum``, with codes from 0 to 15. They are chosen against the scale and the minimum as
these are stored, in float16: a value is off by at most half a stored step, and by what rounding the two costs.

Two codes are in a byte, a row's in *halves*: in the high four bits those of the first half of the padded row, in the
low four those of the second. So a row is unpacked into two ranges, and nothing need be interleaved.

Shapes: R rows, I values of one, P of one padded to whole groups, G groups of g values, C = P / 2 bytes of codes;
``...`` any dimensions in front.
"""

import torch
from torch import Tensor

from engine.formats.int4_sizes import BLOCK_VALUES, Int4

LARGEST_CODE = 15
Parts = tuple[Tensor, Tensor, Tensor]
"""Codes ``uint8 [..., C]``, scales and minima ``float16 [..., G]``."""


def quantised(values_P: Tensor, group: int) -> Parts:
    """Some rows, ``[..., P]``.

    A group of equal values has scale 0. Whether float16 could hold scale and minimum, ``fits`` says.
    """
    return _quantised(values_P, group, fused=values_P.device.type != "cpu")


def _quantised(values_P: Tensor, group: int, *, fused: bool) -> Parts:
    """``fused``: in fewer steps, each of which does more; on a CPU these are slow. The same numbers."""
    values_Gg = values_P.view(*values_P.shape[:-1], -1, group)
    if fused:
        lowest_G, highest_G = (each.float() for each in values_Gg.aminmax(dim=-1))
    else:
        values_Gg = values_Gg.float()
        lowest_G, highest_G = values_Gg.amin(-1), values_Gg.amax(-1)
    scale_G = (highest_G - lowest_G).div_(LARGEST_CODE).half()
    minimum_G = lowest_G.half()
    step_G = scale_G.float().masked_fill_(scale_G == 0, 1)
    # Half a step more, so that cutting off what is behind the point rounds.
    start_G = 0.5 - minimum_G.float() / step_G
    step_G1, start_G1 = step_G[..., None], start_G[..., None]
    steps_Gg = torch.addcdiv(start_G1, values_Gg, step_G1) if fused else values_Gg.div(step_G1).add_(start_G1)
    codes_P = steps_Gg.clamp_(0, LARGEST_CODE).to(torch.uint8).flatten(-2)
    first_C, second_C = codes_P.chunk(2, -1)
    return first_C.bitwise_left_shift(4).bitwise_or_(second_C), scale_G, minimum_G


def fits(scale: Tensor, minimum: Tensor) -> bool:
    """Whether all groups have numbers for a scale and a minimum, and none has a value that float16 cannot hold."""
    largest = scale.float().mul_(LARGEST_CODE).add_(minimum).half()
    return bool(minimum.isfinite().all()) and bool(largest.isfinite().all())


def pack(stored: Int4, values_RI: Tensor) -> Parts:
    """Some rows of a matrix.

    Raises:
        ValueError: a value is not finite, or beyond float16.
    """
    rows, width = values_RI.shape
    padding = stored.unpacked_shape((width,))[0] - width
    # Padding repeats the last value, so that no group's range is wider for it.
    values_RP = torch.cat((values_RI, values_RI[:, -1:].expand(rows, padding)), 1) if padding else values_RI
    codes_RC, scale_RG, minimum_RG = quantised(values_RP, stored.group)
    if not fits(scale_RG, minimum_RG):
        raise ValueError("values that are not finite, or that float16 cannot hold")
    return codes_RC, scale_RG, minimum_RG


def unpack(stored: Int4, raw: Tensor, out: Tensor) -> None:
    """The values of a tensor's bytes into ``out``, contiguous, of the padded shape and the compute dtype."""
    out_RP = out.view(-1, out.shape[-1])
    rows, padded = out_RP.shape
    end = rows * padded // 2
    scale_RG, minimum_RG = raw[end:].view(torch.float16).view(2, rows, -1)
    assert scale_RG.shape[1] * stored.group == padded
    unpack_parts((raw[:end].view(rows, -1), scale_RG, minimum_RG), out_RP)


def unpack_parts(parts: Parts, out_P: Tensor) -> None:
    """The values of some rows, ``[..., P]``.

    Computed in float32, where a code times a scale of float16 is exact: so it makes no difference whether a device
    rounds before it adds the minimum. Then rounded once to the type of ``out``: the same numbers everywhere.
    """
    codes_C, *others = parts
    scale_G, minimum_G = (each.float() for each in others)
    unpack_some = _unpack_in_blocks if out_P.device.type == "cpu" else _unpack_at_once
    unpack_some(codes_C, scale_G, minimum_G, out_P)


def _unpack_at_once(codes_C: Tensor, scale_G: Tensor, minimum_G: Tensor, out_P: Tensor) -> None:
    """On a GPU, which casts as it stores: no bytes in between."""
    first_C, second_C = out_P.chunk(2, -1)
    torch.bitwise_right_shift(codes_C, 4, out=first_C)
    torch.bitwise_and(codes_C, LARGEST_CODE, out=second_C)
    out_Gg = out_P.view(*scale_G.shape, -1)
    torch.addcmul(minimum_G[..., None], out_Gg, scale_G[..., None], out=out_Gg)


def _unpack_in_blocks(codes_C: Tensor, scale_G: Tensor, minimum_G: Tensor, out_P: Tensor) -> None:
    """Some rows at a time: over a whole matrix, each step would go through memory."""
    rows = len(out_P)
    together = min(rows, max(1, BLOCK_VALUES // max(1, out_P[0].numel()))) if rows else 1
    bytes_P = torch.empty(together, *out_P.shape[1:], dtype=torch.uint8)
    first_C, second_C = bytes_P.chunk(2, -1)
    rounds = out_P.dtype != torch.float32
    values_P = torch.empty(bytes_P.shape) if rounds else out_P
    for first in range(0, rows, together):
        block = slice(first, first + together)
        codes_bC, out_bP = codes_C[block], out_P[block]
        count = len(codes_bC)
        torch.bitwise_right_shift(codes_bC, 4, out=first_C[:count])
        torch.bitwise_and(codes_bC, LARGEST_CODE, out=second_C[:count])
        values_bP = values_P[:count] if rounds else out_bP
        values_bP.copy_(bytes_P[:count])
        values_bP.view(*scale_G[block].shape, -1).mul_(scale_G[block][..., None]).add_(minimum_G[block][..., None])
        if rounds:
            out_bP.copy_(values_bP)
