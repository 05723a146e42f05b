"""Four bits a value, in groups with a scale and a minimum of their own (Sheng et al. 2023, section 5.1).

A value is ``code * scale + minimum``, with codes from 0 to 15. They are chosen against the scale and the minimum as
these are stored, in float16: a value is off by at most half a stored step, and by what rounding the two costs.

Two codes are in a byte, a row's in *halves*: in the high four bits those of the first half of the padded row, in the
low four those of the second. So a row is unpacked into two ranges, and nothing need be interleaved.

Shapes: R rows, I values of one, P of one padded to whole groups, G groups of g values, C = P / 2 bytes of codes.
"""

import torch
from torch import Tensor

from engine.formats.sizes import BLOCK_VALUES, Int4

LARGEST_CODE = 15


def quantised(values_RGg: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Codes ``uint8 [R, G, g]``, scales and minima ``float16 [R, G]`` of float32 values.

    A group of equal values has scale 0. One that is not finite, or whose range float16 cannot hold, has a scale or a
    minimum that is not finite, or 15 steps that are beyond float16: see ``fits``.
    """
    lowest_RG, highest_RG = values_RGg.amin(-1), values_RGg.amax(-1)
    scale_RG = (highest_RG - lowest_RG).div_(LARGEST_CODE).half()
    minimum_RG = lowest_RG.half()
    steps_RGg = values_RGg - minimum_RG[..., None].float()
    steps_RGg.div_(scale_RG.float().masked_fill_(scale_RG == 0, 1)[..., None])
    return steps_RGg.round_().clamp_(0, LARGEST_CODE).to(torch.uint8), scale_RG, minimum_RG


def fits(scale: Tensor, minimum: Tensor) -> bool:
    """Whether all groups have numbers for a scale and a minimum, and none has values that float16 cannot hold."""
    largest = scale.float().mul_(LARGEST_CODE).amax()
    return bool(minimum.isfinite().all()) and bool(largest <= torch.finfo(torch.float16).max)


def pack(stored: Int4, values_RI: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The three parts of some rows: codes ``uint8 [R, C]``, scales and minima ``float16 [R, G]``.

    Raises:
        ValueError: a value is not finite, or beyond float16.
    """
    rows, width = values_RI.shape
    padding = stored.unpacked_shape((width,))[0] - width
    # Of the last value, so that no group's range is wider for it.
    values_RP = torch.cat((values_RI, values_RI[:, -1:].expand(rows, padding)), 1) if padding else values_RI
    codes_RGg, scale_RG, minimum_RG = quantised(values_RP.float().view(rows, -1, stored.group))
    if not fits(scale_RG, minimum_RG):
        raise ValueError("values that are not finite, or that float16 cannot hold")
    first_RC, second_RC = codes_RGg.view(rows, -1).chunk(2, 1)
    return first_RC.bitwise_left_shift(4).bitwise_or_(second_RC), scale_RG, minimum_RG


def unpack(stored: Int4, raw: Tensor, out: Tensor) -> None:
    """The values of a tensor's bytes into ``out``, contiguous, of the padded shape and the compute dtype.

    Product and sum are rounded to that type one after the other, and scales and minima before: the same numbers on
    every device.
    """
    out_RP = out.view(-1, out.shape[-1])
    rows, padded = out_RP.shape
    end = rows * padded // 2
    codes_RC = raw[:end].view(rows, -1)
    scale_RG, minimum_RG = raw[end:].view(torch.float16).view(2, rows, -1).to(out.dtype)
    if raw.device.type == "cpu":
        _unpack_in_blocks(codes_RC, scale_RG, minimum_RG, out_RP)
        return
    first_RC, second_RC = out_RP.chunk(2, 1)
    torch.bitwise_right_shift(codes_RC, 4, out=first_RC)  # a GPU casts as it stores: no bytes in between
    torch.bitwise_and(codes_RC, LARGEST_CODE, out=second_RC)
    out_RP.view(rows, -1, stored.group).mul_(scale_RG[..., None]).add_(minimum_RG[..., None])


def _unpack_in_blocks(codes_RC: Tensor, scale_RG: Tensor, minimum_RG: Tensor, out_RP: Tensor) -> None:
    """Some rows at a time: over a whole matrix, each step would go through memory."""
    (rows, groups), padded = scale_RG.shape, out_RP.shape[1]
    together = min(rows, max(1, BLOCK_VALUES // padded))
    bytes_bP = torch.empty(together, padded, dtype=torch.uint8)
    for first in range(0, rows, together):
        block = slice(first, first + together)
        codes_bC, out_bP = codes_RC[block], out_RP[block]
        each_bP = bytes_bP[: len(codes_bC)]
        torch.bitwise_right_shift(codes_bC, 4, out=each_bP[:, : padded // 2])
        torch.bitwise_and(codes_bC, LARGEST_CODE, out=each_bP[:, padded // 2 :])
        out_bP.copy_(each_bP)
        out_bP.view(len(codes_bC), groups, -1).mul_(scale_RG[block, :, None]).add_(minimum_RG[block, :, None])
