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


def quantised_columns(values_sH: Tensor) -> Parts:
    """The same of ``[..., s, H]`` where the values of a column are a group: scales and minima ``[..., H]``."""
    codes_sH, scale_1H, minimum_1H = _coded(values_sH, -2, fused=values_sH.device.type != "cpu")
    return _in_halves(codes_sH), scale_1H.squeeze(-2), minimum_1H.squeeze(-2)


def _quantised(values_P: Tensor, group: int, *, fused: bool) -> Parts:
    codes_Gg, scale_G1, minimum_G1 = _coded(values_P.view(*values_P.shape[:-1], -1, group), -1, fused=fused)
    return _in_halves(codes_Gg.flatten(-2)), scale_G1.squeeze(-1), minimum_G1.squeeze(-1)


def _coded(values: Tensor, dim: int, *, fused: bool) -> Parts:
    """Codes, a byte each, of groups along a dimension, which scales and minima have, too.

    ``fused``: in fewer steps, each of which does more; on a CPU these are slow. The same numbers.
    """
    if fused:
        lowest, highest = (each.float() for each in values.aminmax(dim=dim, keepdim=True))
    else:
        values = values.float()
        lowest, highest = values.amin(dim, keepdim=True), values.amax(dim, keepdim=True)
    # Multiplied: a GPU does that, too, where it is told to divide by a number, and would round otherwise than a CPU.
    scale = (highest - lowest).mul_(1 / LARGEST_CODE).half()
    minimum = lowest.half()
    step = scale.float().masked_fill_(scale == 0, 1)
    # Half a step more, so that cutting off what is behind the point rounds.
    start = 0.5 - minimum.float() / step
    steps = torch.addcdiv(start, values, step) if fused else values.div(step).add_(start)
    return steps.clamp_(0, LARGEST_CODE).to(torch.uint8), scale, minimum


def _in_halves(codes_P: Tensor) -> Tensor:
    first_C, second_C = codes_P.chunk(2, -1)
    return first_C.bitwise_left_shift(4).bitwise_or_(second_C)


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
    codes_C, scale_G, minimum_G = parts
    _unpack(codes_C, scale_G[..., None], minimum_G[..., None], out_P, out_P.view(*scale_G.shape, -1))


def unpack_columns(parts: Parts, out_sH: Tensor) -> None:
    """The same of what ``quantised_columns`` gave."""
    codes_sC, scale_H, minimum_H = parts
    _unpack(codes_sC, scale_H[..., None, :], minimum_H[..., None, :], out_sH, out_sH)


def _unpack(codes_C: Tensor, scale: Tensor, minimum: Tensor, out_P: Tensor, grouped: Tensor) -> None:
    """``grouped``: a view of ``out``, as scales and minima can be multiplied with."""
    unpack_some = _unpack_in_blocks if out_P.device.type == "cpu" else _unpack_at_once
    unpack_some(codes_C, scale.float(), minimum.float(), out_P, grouped)


def _unpack_at_once(codes_C: Tensor, scale: Tensor, minimum: Tensor, out_P: Tensor, grouped: Tensor) -> None:
    """On a GPU, which casts as it stores: no bytes in between."""
    first_C, second_C = out_P.chunk(2, -1)
    torch.bitwise_right_shift(codes_C, 4, out=first_C)
    torch.bitwise_and(codes_C, LARGEST_CODE, out=second_C)
    torch.addcmul(minimum, grouped, scale, out=grouped)


def _unpack_in_blocks(codes_C: Tensor, scale: Tensor, minimum: Tensor, out_P: Tensor, grouped: Tensor) -> None:
    """Some rows at a time: over a whole matrix, each step would go through memory."""
    rows = len(out_P)
    together = min(rows, max(1, BLOCK_VALUES // max(1, out_P[0].numel()))) if rows else 1
    bytes_P = torch.empty(together, *out_P.shape[1:], dtype=torch.uint8)
    first_C, second_C = bytes_P.chunk(2, -1)
    rounds = out_P.dtype != torch.float32
    scratch = torch.empty(together, *grouped.shape[1:]) if rounds else grouped
    for first in range(0, rows, together):
        block = slice(first, first + together)
        codes_bC, place = codes_C[block], grouped[block]
        count = len(codes_bC)
        torch.bitwise_right_shift(codes_bC, 4, out=first_C[:count])
        torch.bitwise_and(codes_bC, LARGEST_CODE, out=second_C[:count])
        values = scratch[:count] if rounds else place
        values.copy_(bytes_P[:count].view(place.shape)).mul_(scale[block]).add_(minimum[block])
        if rounds:
            place.copy_(values)
