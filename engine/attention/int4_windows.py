"""Keys that positions turn, in four bits: a window of tokens together, each channel with a scale and a minimum.

Token by token they lose far more, since pairs of values swing about means of their own, far from each other's. A query
sees the keys of its own window as they were computed, and those of windows before it as they will be read: so it makes
no difference how a prompt was cut. Until a window is full, its plain keys lie beside the sequence's rows. Values are
packed token by token.

Shapes: T tokens of a micro-batch, N query heads, K key/value heads, Q query heads that share one, t query tokens, s key
tokens, w tokens of a window, n windows, H head size, C = H / 2 bytes of codes.
"""

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from engine.attention.blocks import attend_whole
from engine.attention.extents import NewKV
from engine.attention.int4_decode import weigh_pieces
from engine.attention.int4_products import numbers_of, window_scores
from engine.attention.int4_sizes import WINDOW
from engine.attention.int4_window_extents import WindowedKV, WindowedPiece
from engine.attention.kernels import Decoder, attend, merge
from engine.formats.int4 import Parts, quantised_columns, unpack_columns


def attend_in_extents(
    layer: int,
    start: int,
    heads: slice,
    qkv: tuple[Tensor, Tensor, Tensor],
    kv: WindowedKV | None,
    out_NtH: Tensor,
) -> None:
    """Some heads of a segment, into ``out``, window by window; its keys are packed into ``kv``, if they are kept.

    ``qkv``: queries ``[N, t, H]``, keys and values ``[K, t, H]``, whose values are rounded; keys are, in place.
    """
    q_NtH, k_KsH, v_KsH = qkv
    if start:
        assert kv is not None
        k_KsH, v_KsH = kv.read(layer, start, heads, k_KsH, v_KsH)
    end = start + q_NtH.shape[1]

    attend_window_by_window(q_NtH, k_KsH, v_KsH, out_NtH, keep=None if kv is None else partial(kv.pack, layer, heads))
    opened = end % WINDOW
    if kv is not None and opened:
        begin = max(start, end - opened)
        kv.open(layer)[heads, begin % WINDOW : opened] = k_KsH[:, begin:]


def attend_window_by_window(
    q_NtH: Tensor,
    k_KsH: Tensor,
    v_KsH: Tensor,
    out_NtH: Tensor,
    before: Sequence[tuple[Tensor, Tensor]] = (),
    keep: Callable[[int, Parts], None] | None = None,
) -> None:
    """The last tokens of a sequence, into ``out``: keys of their windows are plain, and full ones are rounded in place
    once their own queries have seen them, and then kept, if there is where.

    ``before``: what attention to earlier keys gave, as from ``attend``; these keys are whole windows.
    """
    end = k_KsH.shape[1]
    start = end - q_NtH.shape[1]
    for first in range(start - start % WINDOW, end, WINDOW):
        begin, seen = max(start, first), min(end, first + WINDOW)
        rows = slice(begin - start, seen - start)
        qkv = q_NtH[:, rows], k_KsH[:, :seen], v_KsH[:, :seen]
        if before:
            its = [(found_NtH[:, rows], lse_Nt[:, rows]) for found_NtH, lse_Nt in before]
            out_NtH[:, rows] = merge([*its, attend(*qkv, causal=True)])[0]
        else:
            attend_whole(*qkv, out_NtH[:, rows])
        if seen == first + WINDOW and (keep is not None or seen < end):
            parts = quantised_columns(k_KsH[:, first:seen])
            if keep is not None:
                keep(first, parts)
            unpack_columns(parts, k_KsH[:, first:seen])


def window_decoder(num_rows: int, q_TNH: Tensor, new: NewKV, out_TNH: Tensor) -> Decoder | None:
    """What stores and attends to one token at one of the first ``num_rows``; see ``kernels.decoder``."""
    assert new.packed is not None
    if not num_rows:
        return None
    num_kv_heads, head_size = new.k_TKH.shape[1:]
    q_TKQH = q_TNH[:num_rows].view(num_rows, num_kv_heads, -1, head_size).float() * head_size**-0.5
    out_TKQH = out_TNH[:num_rows].view(q_TKQH.shape)
    values = new.packed

    def decode(row: int, pieces: Sequence[WindowedPiece], place: int) -> None:
        pieces[-1].add(place, new.k_TKH[row], [part[row, 0] for part in values])
        _attend(q_TKQH[row], pieces, place, out_TKQH[row])
        pieces[-1].close(place)

    return decode


def _attend(q_KQH: Tensor, pieces: Sequence[WindowedPiece], place: int, out_KQH: Tensor) -> None:
    """One softmax over all windows."""
    *before, last = pieces
    found = [_scores(q_KQH, piece, piece.num_windows) for piece in before]
    whole, rest = divmod(place, WINDOW)
    if whole:
        found.append(_scores(q_KQH, last, whole))
    found.append(torch.bmm(q_KQH, last.open_KwH[:, : rest + 1].float().mT))
    weights_KQs = (found[0] if len(found) == 1 else torch.cat(found, -1)).softmax(-1)
    weigh_pieces(weights_KQs, [*(each.packed for each in before), last.packed.up_to(place + 1)], out_KQH)


def _scores(q_KQH: Tensor, piece: WindowedPiece, windows: int) -> Tensor:
    """Queries times the keys of a piece's first windows, ``[K, Q, s]``."""
    num_kv_heads, num_queries, _ = q_KQH.shape
    scale_BH, minimum_BH = (each[:, :windows].flatten(0, 1).float() for each in piece.scales)
    first_BwC, second_BwC = numbers_of(piece.codes_KnwC[:, :windows].flatten(0, 1), torch.float32)
    q_BQH = q_KQH[:, None].expand(-1, windows, -1, -1).flatten(0, 1)
    found_BQw = window_scores(q_BQH, (first_BwC, second_BwC), scale_BH, minimum_BH)
    return found_BQw.view(num_kv_heads, windows, num_queries, WINDOW).transpose(1, 2).flatten(2)
