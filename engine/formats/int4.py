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

from engine.formats.sizes import BLOCK_VALUES, Int4

LARGEST_CODE = 15
_BITS_OF_1024 = 0x6400
"""Of float16, in which numbers from there on are a whole one apart."""
Parts = tuple[Tensor, Tensor, Tensor]
"""Codes ``uint8 [..., C]``, scales and minima ``float16 [..., G]``."""


def quantised(values_P: Tensor, group: int) -> Parts:
    """Some rows of float32 values, ``[..., P]``.

    A group of equal values has scale 0. Whether float16 could hold scale and minimum, ``fits`` says.
    """
    values_Gg = values_P.view(*values_P.shape[:-1], -1, group)
    lowest_G, highest_G = values_Gg.amin(-1), values_Gg.amax(-1)
    scale_G = (highest_G - lowest_G).div_(LARGEST_CODE).half()
    minimum_G = lowest_G.half()
    steps_Gg = values_Gg - minimum_G[..., None].float()
    steps_Gg.div_(scale_G.float().masked_fill_(scale_G == 0, 1)[..., None])
    codes_P = steps_Gg.round_().clamp_(0, LARGEST_CODE).to(torch.uint8).flatten(-2)
    first_C, second_C = codes_P.chunk(2, -1)
    return first_C.bitwise_left_shift(4).bitwise_or_(second_C), scale_G, minimum_G


def fits(scale: Tensor, minimum: Tensor) -> bool:
    """Whether all groups have numbers for a scale and a minimum, and none has values that float16 cannot hold."""
    largest = scale.float().mul_(LARGEST_CODE).amax()
    return bool(minimum.isfinite().all()) and bool(largest <= torch.finfo(torch.float16).max)


def pack(stored: Int4, values_RI: Tensor) -> Parts:
    """Some rows of a matrix.

    Raises:
        ValueError: a value is not finite, or beyond float16.
    """
    rows, width = values_RI.shape
    padding = stored.unpacked_shape((width,))[0] - width
    # Of the last value, so that no group's range is wider for it.
    values_RP = torch.cat((values_RI, values_RI[:, -1:].expand(rows, padding)), 1) if padding else values_RI
    codes_RC, scale_RG, minimum_RG = quantised(values_RP.float(), stored.group)
    if not fits(scale_RG, minimum_RG):
        raise ValueError("values that are not finite, or that float16 cannot hold")
    return codes_RC, scale_RG, minimum_RG


def unpack(stored: Int4, raw: Tensor, out: Tensor) -> None:
    """The values of a tensor's bytes into ``out``, contiguous, of the padded shape and the compute dtype."""
    out_RP = out.view(-1, out.shape[-1])
    rows, padded = out_RP.shape
    end = rows * padded // 2
    scale_RG, minimum_RG = raw[end:].view(torch.float16).view(2, rows, -1).to(out.dtype)
    assert scale_RG.shape[1] * stored.group == padded
    unpack_parts((raw[:end].view(rows, -1), scale_RG, minimum_RG), out_RP)


def unpack_parts(parts: Parts, out_P: Tensor) -> None:
    """The values of some rows, ``[..., P]``.

    Product and sum are rounded to the type of ``out`` one after the other, and scales and minima before: the same
    numbers on every device.
    """
    codes_C, *others = parts
    scale_G, minimum_G = (each.to(out_P.dtype) for each in others)
    if out_P.device.type == "cpu":
        _unpack_in_blocks(codes_C, scale_G, minimum_G, out_P)
        return
    first_C, second_C = out_P.chunk(2, -1)
    torch.bitwise_right_shift(codes_C, 4, out=first_C)  # a GPU casts as it stores: no bytes in between
    torch.bitwise_and(codes_C, LARGEST_CODE, out=second_C)
    _scale(scale_G, minimum_G, out_P)


def _unpack_in_blocks(codes_C: Tensor, scale_G: Tensor, minimum_G: Tensor, out_P: Tensor) -> None:
    """Some rows at a time: over a whole matrix, each step would go through memory."""
    rows = len(out_P)
    together = min(rows, max(1, BLOCK_VALUES // max(1, out_P[0].numel()))) if rows else 1
    bytes_P = torch.empty(together, *out_P.shape[1:], dtype=torch.uint8)
    first_C, second_C = bytes_P.chunk(2, -1)
    for first in range(0, rows, together):
        block = slice(first, first + together)
        codes_bC, out_bP = codes_C[block], out_P[block]
        count = len(codes_bC)
        torch.bitwise_right_shift(codes_bC, 4, out=first_C[:count])
        torch.bitwise_and(codes_bC, LARGEST_CODE, out=second_C[:count])
        _as_numbers(bytes_P[:count], out_bP)
        _scale(scale_G[block], minimum_G[block], out_bP)


def _as_numbers(bytes_P: Tensor, out_P: Tensor) -> None:
    """Small whole numbers, a byte each, into ``out``."""
    if out_P.dtype != torch.float16:
        out_P.copy_(bytes_P)
        return
    # PyTorch casts to float16 one by one; this takes a fourth of the time: 1024 + n has the bits of both.
    out_P.view(torch.int16).copy_(bytes_P).bitwise_or_(_BITS_OF_1024)
    out_P.sub_(1024)


def _scale(scale_G: Tensor, minimum_G: Tensor, out_P: Tensor) -> None:
    out_Gg = out_P.view(*scale_G.shape, -1)
    out_Gg.mul_(scale_G[..., None]).add_(minimum_G[..., None])
