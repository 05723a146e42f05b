"""Products with keys and values in four bits, scales and minima kept out of them.

A key of one group is ``scale * n + minimum``, so its score is ``scale * (q · n) + minimum * Σ q``; values add up to
``Σ (w * scale) · n + Σ w * minimum``. So nothing of the size of keys and values is written but their codes.

Shapes: B batches (a head of a sequence, or of a page), Q queries of one, s tokens, H head size, C = H / 2, G groups of
a head. Codes come in the two halves of a head, see ``engine.formats.int4``.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from engine.formats.int4 import LARGEST_CODE

Halves = tuple[Tensor, Tensor]
"""Codes as numbers of any floating type, ``[B, s, C]`` each."""


def numbers_of(codes_sC: Tensor, dtype: torch.dtype) -> Halves:
    """Two codes a byte as numbers, ``[..., s, C]`` each."""
    return codes_sC.bitwise_right_shift(4).to(dtype), codes_sC.bitwise_and(LARGEST_CODE).to(dtype)


def sums_of(q_BQH: Tensor, groups: int) -> Tensor:
    """Σ q of each group, ``[..., Q, G]``."""
    return q_BQH.view(*q_BQH.shape[:-1], groups, -1).sum(-1)


def scores(q_BQH: Tensor, sums_BQG: Tensor, keys: Halves, scale_BGs: Tensor, minimum_BGs: Tensor) -> Tensor:
    """Queries times keys, ``[B, Q, s]``; all in float32."""
    groups = scale_BGs.shape[1]
    found_BQs = torch.bmm(sums_BQG, minimum_BGs)
    if groups == 1:
        first_BQC, second_BQC = q_BQH.chunk(2, -1)
        products_BQs = torch.bmm(first_BQC, keys[0].mT).baddbmm_(second_BQC, keys[1].mT)
        return found_BQs.addcmul_(products_BQs, scale_BGs)
    for group, (q_BQg, keys_Bsg) in enumerate(zip(q_BQH.chunk(groups, -1), _by_group(keys, groups), strict=True)):
        found_BQs.addcmul_(torch.bmm(q_BQg, keys_Bsg.mT), scale_BGs[:, group, None])
    return found_BQs


def window_scores(q_BQH: Tensor, keys: Halves, scale_BH: Tensor, minimum_BH: Tensor) -> Tensor:
    """Queries times the keys of a window, ``[B, Q, s]``, whose channels have a scale and a minimum each: that is put
    into the queries."""
    first_BQC, second_BQC = (q_BQH * scale_BH[:, None]).chunk(2, -1)
    products_BQs = torch.bmm(first_BQC, keys[0].mT).baddbmm_(second_BQC, keys[1].mT)
    return products_BQs.add_(torch.bmm(q_BQH, minimum_BH[..., None]))


def weigh(weights_BQs: Tensor, values: Halves, scale_BGs: Tensor, minimum_BGs: Tensor, out_BQH: Tensor) -> None:
    """Values times weights, into ``out``; all in float32, but for products with codes, which have the type of these."""
    groups = scale_BGs.shape[1]
    added_BQG = torch.bmm(weights_BQs, minimum_BGs.mT)
    parts = values if groups == 1 else tuple(_by_group(values, groups))
    for place, (values_Bsg, out_BQg) in enumerate(zip(parts, out_BQH.chunk(len(parts), -1), strict=True)):
        group = 0 if groups == 1 else place
        weights = (weights_BQs * scale_BGs[:, group, None]).to(values_Bsg.dtype)
        torch.add(torch.bmm(weights, values_Bsg), added_BQG[..., group, None], out=out_BQg)


def _by_group(halves: Halves, groups: int) -> Iterator[Tensor]:
    for half in halves:
        yield from half.chunk(groups // 2, -1)
