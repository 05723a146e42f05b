"""Pages of keys and values in four bits, as ``engine.attention.pages`` reads them: see ``int4_products``.

Shapes: b pages of a block, p tokens of one, N query heads, K key/value heads, H head size, G groups of one, C = H / 2,
B bytes of a row.
"""

from torch import Tensor

from engine.attention.int4_products import Halves, scores, sums_of, weigh, window_scores
from engine.attention.int4_rows import PackedRows
from engine.attention.int4_window_rows import WindowRows
from engine.formats.int4 import LARGEST_CODE


class PackedPages:
    """A block of them."""

    def __init__(self, stored: PackedRows) -> None:
        self._stored = stored

    def stage(self, rows_bpB: Tensor, work: Tensor, opened: tuple[Tensor, Tensor] | None = None) -> None:
        """These are next; ``work``: float32 values; ``opened``: see ``pages.Block``."""
        del opened
        parts = (each.view(*rows_bpB.shape[:2], *each.shape[1:]) for each in self._stored.parts(rows_bpB.flatten(0, 1)))
        # Codes [k|v, b, K, p, C], scales and minima [k|v, b, K, p, G].
        self._parts = [each.permute(2, 0, 3, 1, 4) for each in parts]
        _, number, num_kv_heads, page_tokens, size = self._parts[0].shape
        self._shape = number * num_kv_heads, page_tokens, 2 * size
        values = number * num_kv_heads * page_tokens * size
        self._halves = tuple(work[first : first + values].view(self._parts[0].shape[1:]) for first in (0, values))

    def scores(self, q_bNH: Tensor) -> Tensor:
        """Queries times keys, ``[b, N, p]``."""
        batches, page_tokens, head_size = self._shape
        q = q_bNH.view(batches, -1, head_size)
        keys, scale, minimum = self._read(0)
        return scores(q, sums_of(q, scale.shape[1]), keys, scale, minimum).view(len(q_bNH), -1, page_tokens)

    def weigh(self, weights_bNp: Tensor, out_bNH: Tensor) -> None:
        """Values times weights, into ``out``."""
        batches, page_tokens, head_size = self._shape
        out = out_bNH.view(batches, -1, head_size)
        weigh(weights_bNp.view(batches, -1, page_tokens), *self._read(1), out)

    def _read(self, which: int) -> tuple[Halves, Tensor, Tensor]:
        """Codes as numbers, scales and minima of keys (0) or values (1)."""
        _, scale, minimum = (each[which] for each in self._parts)
        return self._numbers(which), scale.float().flatten(0, 1).mT, minimum.float().flatten(0, 1).mT

    def _numbers(self, which: int) -> Halves:
        codes = self._parts[0][which]
        first, second = self._halves
        first.copy_(codes.bitwise_right_shift(4))
        second.copy_(codes.bitwise_and(LARGEST_CODE))
        return first.flatten(0, 1), second.flatten(0, 1)


class WindowedPages(PackedPages):
    """The same where a page is a window, whose keys are packed together: see ``int4_windows``."""

    def __init__(self, stored: WindowRows, pool_SB: Tensor) -> None:
        super().__init__(stored)
        self._window_rows, self._pool = stored, pool_SB

    def stage(self, rows_bpB: Tensor, work: Tensor, opened: tuple[Tensor, Tensor] | None = None) -> None:
        """These are next."""
        super().stage(rows_bpB, work)
        self._opened = opened

    def scores(self, q_bNH: Tensor) -> Tensor:
        """Queries times keys, ``[b, N, p]``; in windows that are not full, plain ones."""
        batches, page_tokens, head_size = self._shape
        q_BQH = q_bNH.view(batches, -1, head_size)
        scale_BH, minimum_BH = (each[0].flatten(2)[..., :head_size].flatten(0, 1).float() for each in self._parts[1:])
        products = window_scores(q_BQH, self._numbers(0), scale_BH, minimum_BH).view(len(q_bNH), -1, page_tokens)
        if self._opened is not None:
            which, rows = self._opened
            keys_mpKH = self._window_rows.opened(self._pool, rows).float()
            q_mKQH = q_bNH[which].view(len(which), keys_mpKH.shape[2], -1, head_size)
            plain_mKQp = q_mKQH @ keys_mpKH.permute(0, 2, 3, 1)
            products[which] = plain_mKQp.flatten(1, 2)
        return products
