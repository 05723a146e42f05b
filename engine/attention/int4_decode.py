"""A decode token on the CPU over keys and values in four bits, which are never unpacked: see ``int4_products``.

Shapes: T tokens of a micro-batch, K key/value heads, Q query heads that share one, H head size, C = H / 2, s or p key
tokens, c tokens of an extent, G groups of a head.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from engine.attention.extents import NewKV
from engine.attention.int4_extents import PackedPiece
from engine.attention.int4_products import numbers_of, scores, sums_of, weigh
from engine.attention.kernels import Decoder
from engine.formats.linear import has_products


def packed_decoder(num_rows: int, q_TNH: Tensor, new: NewKV, out_TNH: Tensor) -> Decoder | None:
    """What stores and attends to one token at one of the first ``num_rows``; see ``kernels.decoder``.

    Scores are float32, since rounding them would cost more than rounding everything else.
    """
    assert new.packed is not None
    if not num_rows:
        return None
    num_kv_heads, head_size = new.k_TKH.shape[1:]
    q_TKQH = q_TNH[:num_rows].view(num_rows, num_kv_heads, -1, head_size).float() * head_size**-0.5
    sums_TKQG = sums_of(q_TKQH, new.packed[1].shape[-1])
    out_TKQH = out_TNH[:num_rows].view(q_TKQH.shape)
    added = new.packed

    def decode(row: int, pieces: Sequence[PackedPiece], place: int) -> None:
        for lies, part in zip(pieces[-1].parts, added, strict=True):
            lies[:, :, place] = part[row]
        seen = [*pieces[:-1], pieces[-1].up_to(place + 1)]
        _attend(q_TKQH[row], sums_TKQG[row], seen, out_TKQH[row])

    return decode


def _attend(q_KQH: Tensor, sums_KQG: Tensor, pieces: Sequence[PackedPiece], out_KQH: Tensor) -> None:
    """One softmax over all pieces."""
    found = [
        scores(q_KQH, sums_KQG, numbers_of(each.codes_2KcC[0], torch.float32), *_scales(each, 0)) for each in pieces
    ]
    weigh_pieces((found[0] if len(found) == 1 else torch.cat(found, -1)).softmax(-1), pieces, out_KQH)


def weigh_pieces(weights_KQs: Tensor, pieces: Sequence[PackedPiece], out_KQH: Tensor) -> None:
    """Values times weights, into ``out``."""
    # As numbers of the type that is computed with, where products of that are fast: codes lose nothing in any.
    dtype = out_KQH.dtype if has_products(out_KQH.dtype) else torch.float32
    sums = []
    parts = torch.split(weights_KQs, [each.codes_2KcC.shape[2] for each in pieces], -1)
    for weights_KQp, piece in zip(parts, pieces, strict=True):
        sums.append(torch.empty(out_KQH.shape))
        weigh(weights_KQp, numbers_of(piece.codes_2KcC[1], dtype), *_scales(piece, 1), sums[-1])
    out_KQH.copy_(sums[0] if len(sums) == 1 else torch.stack(sums).sum(0))


def _scales(piece: PackedPiece, which: int) -> tuple[Tensor, Tensor]:
    """Scales and minima in float32, ``[K, G, s]``."""
    return piece.scale_2KcG[which].float().mT, piece.minimum_2KcG[which].float().mT
