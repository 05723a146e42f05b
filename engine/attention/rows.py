"""What attention works on: a micro-batch's rows in one layer, cut into parts that can be computed side by side.

Shapes: T tokens of a micro-batch, t of one segment, N query heads, K key/value heads, H head size.
"""

from dataclasses import dataclass

from torch import Tensor

from engine.attention.kernels import Decoder, attend, merge
from engine.attention.pools import MemoryKV
from engine.kvcache.segments import Segment


@dataclass(frozen=True, slots=True)
class Part:
    """A segment, or some of its heads."""

    begin: int
    """The segment's first row."""
    segment: Segment
    kv: MemoryKV | None
    """Where its keys and values are kept, if compute can address that."""
    kv_heads: slice
    """The key/value heads, and with them the query heads that share them."""

    @property
    def cost(self) -> int:
        """In proportion to the time it takes: reading the keys costs as much as computing with a few dozen queries."""
        queries = self.segment.length + 32
        num_heads: int = self.kv_heads.stop - self.kv_heads.start
        return queries * (self.segment.start + self.segment.length) * num_heads


@dataclass(frozen=True, slots=True)
class Rows:
    """Queries, keys and values of a micro-batch in one layer, and room for its output."""

    layer: int
    q_TNH: Tensor
    k_TKH: Tensor
    v_TKH: Tensor
    out_TNH: Tensor
    decode: Decoder | None
    """Where one token's attention has a faster way."""

    def at(self, row: int, length: int) -> tuple[Tensor, Tensor, Tensor]:
        """All heads of some rows: queries ``[N, t, H]``, keys and values ``[K, t, H]``."""
        rows = slice(row, row + length)
        return self.q_TNH[rows].transpose(0, 1), self.k_TKH[rows].transpose(0, 1), self.v_TKH[rows].transpose(0, 1)

    def put(self, row: int, pieces: list[tuple[Tensor, Tensor]]) -> None:
        """Set the output of rows, from the attention over pieces of their keys."""
        out_NtH = merge(pieces)[0]
        self.out_TNH[row : row + out_NtH.shape[1]] = out_NtH.transpose(0, 1)

    def of(self, part: Part) -> tuple[Tensor, Tensor, Tensor]:
        """Queries ``[N, t, H]``, keys and values ``[K, t, H]``."""
        rows = slice(part.begin, part.begin + part.segment.length)
        q_TNH, heads = self.q_TNH[rows, self._heads(part)], part.kv_heads
        return q_TNH.transpose(0, 1), self.k_TKH[rows, heads].transpose(0, 1), self.v_TKH[rows, heads].transpose(0, 1)

    def finish(self, part: Part, pieces: list[tuple[Tensor, Tensor]]) -> None:
        """Set a part's output, from the attention over pieces of its keys."""
        rows = slice(part.begin, part.begin + part.segment.length)
        self.out_TNH[rows, self._heads(part)] = merge(pieces)[0].transpose(0, 1)

    def attend(self, part: Part) -> None:
        """Store a part's keys and values where compute can address them, if they are kept, and attend."""
        kv, start, length = part.kv, part.segment.start, part.segment.length
        if kv is not None and length == 1 and self.decode is not None and (layers := kv.only_extent(start)) is not None:
            self.decode(part.begin, layers[self.layer], start)
            return
        q_NtH, k_KtH, v_KtH = self.of(part)
        pieces, whole = [], False
        if kv is not None:
            kv.append(self.layer, start, part.kv_heads, k_KtH, v_KtH)
            # Its own tokens, if they are read with the rest, are one piece less to merge.
            whole = length == 1 or kv.only_extent(start + length - 1) is not None
            stored = kv.read(self.layer, start + length if whole else start, part.kv_heads)
            pieces = [attend(q_NtH, k_KsH, v_KsH, causal=whole) for k_KsH, v_KsH in stored]
        if not whole:
            pieces.append(attend(q_NtH, k_KtH, v_KtH, causal=True))
        self.finish(part, pieces)

    def _heads(self, part: Part) -> slice:
        group = self.q_TNH.shape[1] // self.k_TKH.shape[1]
        return slice(part.kv_heads.start * group, part.kv_heads.stop * group)
