"""Attention on a device with memory of its own, over keys that are packed by windows: in the calls of
``int4_window_calls``.

Shapes: T tokens of a micro-batch, S tokens of a buffer or rows of a pool, n windows, w tokens of one, N query heads, K
key/value heads, H head size, B bytes of a row.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from engine.attention.elsewhere import Elsewhere
from engine.attention.groups import Group
from engine.attention.int4_sizes import packed_windows
from engine.attention.int4_window_calls import Before, Call, Chunk, WindowCalls, Work
from engine.attention.int4_window_rows import WindowRows, windows_of
from engine.attention.int4_window_store import store
from engine.attention.kernels import merge
from engine.attention.packed import attend_packed, attend_part, foldings_of
from engine.attention.pools import KVPools
from engine.attention.table import Kernel
from engine.attention.upload import Upload
from engine.kvcache.cache import SequenceRoom
from engine.kvcache.segments import MicroBatch
from engine.shape import ModelShape
from engine.tiers import TierName


class WindowAttention:
    """Implements ``engine.attention.device_runner.OnDevice``."""

    def __init__(
        self,
        shape: ModelShape,
        kernel: Kernel,
        pools: KVPools,
        elsewhere: Elsewhere,
        *,
        room: SequenceRoom,
        unpacked_tokens: int,
    ) -> None:
        """As in ``Attention``."""
        assert isinstance(pools.rows, WindowRows)
        self._rows, self._kernel, self._elsewhere = pools.rows, kernel, elsewhere
        self._layers = pools.layers(TierName.DEVICE)
        self._most_windows = packed_windows(shape, on_cpu=False)
        foldings = foldings_of(kernel, shape.num_heads, shape.num_kv_heads)
        self._calls = WindowCalls(
            foldings, pools.rows, room, buffer_tokens=unpacked_tokens, most_windows=self._most_windows
        )

    def work_of(self, batch: MicroBatch, groups: Sequence[Group], upload: Upload) -> Callable[[], Work]:
        """See ``OnDevice``."""
        return self._calls.of(batch, groups, upload)

    def stores_first(self, groups: Sequence[Group]) -> bool:
        """Not where keys are fetched: a new window's plain ones go where those of the one before are read from."""
        return not groups

    def attend(self, layer: int, work: Work, q_TNH: Tensor, kv_T2KH: Tensor, stored: Tensor, out_TNH: Tensor) -> None:
        """Some sequences at a time."""
        parts: list[tuple[Tensor, Tensor]] = []
        for chunk in work.chunks:
            with self._filled(layer, chunk) as kv_S2KH:
                if not chunk.is_part:
                    kv_S2KH.index_copy_(0, chunk.at, kv_T2KH[chunk.rows])
                for call in chunk.calls:
                    q, out = q_TNH[call.rows], out_TNH[call.rows]
                    if not (chunk.is_part or chunk.follows_parts or call.before):
                        attend_packed(self._kernel, q, kv_S2KH, call.own, out)
                        continue
                    parts[:] = [merge([*parts, self._part(call, q, kv_S2KH, causal=not chunk.is_part)])]
                    if not chunk.is_part:
                        out.copy_(parts.pop()[0].transpose(0, 1))
        # Behind attention: windows that become full are read plain until then.
        for each in work.stores:
            store(self._rows, self._layers[layer], each, kv_T2KH[:, 0], stored)

    def _part(self, call: Call, q_TNH: Tensor, kv_S2KH: Tensor, *, causal: bool) -> tuple[Tensor, Tensor]:
        """What queries find in the buffer: ``out [N, T, H]``, ``lse [N, T]``."""
        found = attend_part(self._kernel, q_TNH, kv_S2KH, call.own, causal=causal)
        if call.before is not None:
            self._add_before(call.before, q_TNH, kv_S2KH, found)
        return found

    def _add_before(self, before: Before, q_TNH: Tensor, kv_S2KH: Tensor, found: tuple[Tensor, Tensor]) -> None:
        """Merge what windows find before themselves into what they found in themselves."""
        for some in torch.split(before.full, self._most_windows):
            windows_nwKH = windows_of(kv_S2KH).index_select(0, some)
            self._rows.round_windows(windows_nwKH)
            windows_of(kv_S2KH).index_copy_(0, some, windows_nwKH)
        out_NTH, lse_NT = found
        queries = q_TNH.index_select(0, before.rows)
        more = attend_part(self._kernel, queries, kv_S2KH, before.ragged, causal=False)
        both = merge([(out_NTH.index_select(1, before.rows), lse_NT.index_select(1, before.rows)), more])
        for place, merged in zip(found, both, strict=True):
            place.index_copy_(1, before.rows, merged)

    @contextmanager
    def _filled(self, layer: int, chunk: Chunk) -> Iterator[Tensor]:
        """A buffer with the keys and values of earlier tokens, ``[S, k|v, K, H]``."""
        if chunk.group is not None:
            with self._elsewhere.fetched_rows(chunk.group) as rows_SB:
                yield self._with_opened(self._elsewhere.unpacked(rows_SB), rows_SB, chunk)
        elif chunk.tokens is not None:
            pool_SB = self._layers[layer]
            buffer = self._elsewhere.unpacked(pool_SB.index_select(0, chunk.tokens))
            yield self._with_opened(buffer, pool_SB, chunk)
        else:
            yield self._elsewhere.buffer(chunk.num_tokens)

    def _with_opened(self, kv_S2KH: Tensor, rows_SB: Tensor, chunk: Chunk) -> Tensor:
        if len(chunk.opened_at):
            windows = self._rows.opened(rows_SB, chunk.opened.view(len(chunk.opened_at), -1))
            windows_of(kv_S2KH).index_copy_(0, chunk.opened_at, windows)
        return kv_S2KH
