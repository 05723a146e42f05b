"""What attention works on: a micro-batch's rows in one layer, cut into parts that can be computed side by side.

Shapes: T tokens of a micro-batch, t of one segment, N query heads, K key/value heads, H head size.
"""

from dataclasses import dataclass

from torch import Tensor

from engine.attention.blocks import attend_whole
from engine.attention.extents import NewKV, SequenceKV
from engine.attention.int4_window_extents import WindowedKV
from engine.attention.int4_windows import attend_in_extents
from engine.attention.kernels import Decoder, attend, merge
from engine.kvcache.segments import Segment


@dataclass(frozen=True, slots=True)
class Part:
    """A segment, or some of its heads."""

    begin: int
    """The segment's first row."""
    segment: Segment
    kv: SequenceKV | WindowedKV | None
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
    new: NewKV
    out_TNH: Tensor
    decode: Decoder | None
    """Where one token's attention has a faster way."""
    has_windows: bool = False
    """Keys are packed by windows."""

    def at(self, row: int, length: int) -> tuple[Tensor, Tensor, Tensor]:
        """All heads of some rows: queries ``[N, t, H]``, keys and values ``[K, t, H]``."""
        rows = slice(row, row + length)
        new = self.new
        return self.q_TNH[rows].transpose(0, 1), new.k_TKH[rows].transpose(0, 1), new.v_TKH[rows].transpose(0, 1)

    def out(self, row: int, length: int) -> Tensor:
        """Where the output of some rows goes, ``[N, t, H]``."""
        return self.out_TNH[row : row + length].transpose(0, 1)

    def attend(self, part: Part) -> None:
        """Store a part's keys and values where compute can address them, if they are kept, and attend."""
        kv, start, length = part.kv, part.segment.start, part.segment.length
        if kv is not None and length == 1 and self.decode is not None:
            self.decode(part.begin, *kv.up_to(self.layer, start))
            return
        q_NtH, k_KtH, v_KtH = self.at(part.begin, length)
        k_KtH, v_KtH = k_KtH[part.kv_heads], v_KtH[part.kv_heads]
        heads = self._heads(part)
        q_NtH, out_NtH = q_NtH[heads], self.out(part.begin, length)[heads]
        if kv is not None:
            kv.append(self.layer, start, part.kv_heads, slice(part.begin, part.begin + length), self.new)
        if self.has_windows:
            assert kv is None or isinstance(kv, WindowedKV)
            attend_in_extents(self.layer, start, part.kv_heads, (q_NtH, k_KtH, v_KtH), kv, out_NtH)
            return
        if kv is None:
            attend_whole(q_NtH, k_KtH, v_KtH, out_NtH)
            return
        assert not isinstance(kv, WindowedKV)
        if not start and self.new.packed is not None:
            attend_whole(q_NtH, k_KtH, v_KtH, out_NtH)  # what would be unpacked is at hand
            return
        extents, _ = kv.up_to(self.layer, start + length - 1)
        if len(extents) == 1:
            (seen,) = kv.read(self.layer, start + length, part.kv_heads)
            attend_whole(q_NtH, *seen, out_NtH)
            return
        # One by one: reading packed ones unpacks them.
        stored = kv.read(self.layer, start, part.kv_heads)
        pieces = [attend(q_NtH, k_KsH, v_KsH, causal=False) for k_KsH, v_KsH in stored]
        pieces.append(attend(q_NtH, k_KtH, v_KtH, causal=True))
        out_NtH.copy_(merge(pieces)[0])

    def _heads(self, part: Part) -> slice:
        """The query heads that share a part's key/value heads."""
        group = self.q_TNH.shape[1] // self.new.k_TKH.shape[1]
        return slice(part.kv_heads.start * group, part.kv_heads.stop * group)
