"""Attention of one engine: owns keys and values of all tiers, and attends by one call a micro-batch and layer.

Shapes: T tokens of a micro-batch, N query heads, K key/value heads, H head size.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from engine.attention.fetching import Fetching
from engine.attention.kernels import decoder
from engine.attention.pools import KV, FetchedKV, KVPools, MemoryKV
from engine.attention.rows import Part, Rows
from engine.attention.runners import Shares, runner_for
from engine.attention.sizes import kv_layer_bytes
from engine.formats.sizes import Plain
from engine.kvcache.cache import Holding
from engine.kvcache.segments import MicroBatch
from engine.memory.closing import run_all
from engine.memory.memory import Memory
from engine.memory.ring import Ring
from engine.shape import ModelShape
from engine.tiers import TierName


@dataclass(slots=True)
class _Work:
    """What a micro-batch attends to, the same in every layer."""

    num_tokens: int
    here: Shares
    elsewhere: list[Part] = field(default_factory=list)
    decode_rows: int = 0
    """Rows up to the last segment of one token: schedulers put these first."""


class Attention:
    """Keys and values of some layers, and attention over them."""

    def __init__(
        self,
        shape: ModelShape,
        stored: Plain,
        memory: Memory,
        *,
        tokens: Mapping[TierName, int],
        num_slots: int,
        slot_tokens: int,
    ) -> None:
        """Take the memory.

        Args:
            shape: of the layers.
            stored: the format of keys and values.
            memory: where compute is, and the budgets.
            tokens: how many each tier holds.
            num_slots: buffers for what compute cannot address; 0 where there is nothing of the kind.
            slot_tokens: the longest extent.

        Raises:
            TierFull: a budget would be exceeded.
        """
        self.tokens = tokens
        self._num_kv_heads = shape.num_kv_heads
        self._views: WeakKeyDictionary[Holding, MemoryKV | FetchedKV] = WeakKeyDictionary()
        self._work: list[_Work] = []
        self._pools = KVPools(shape, stored, tokens, memory)
        self.claim = self._pools.claim
        try:
            ring = Ring(
                memory,
                what=KV,
                slot_bytes=kv_layer_bytes(shape, stored, slot_tokens),
                num_slots=num_slots,
                from_files=tokens[TierName.DISK] > 0,
            )
        except BaseException:
            self._pools.close()
            raise
        self._fetching = Fetching(shape, stored, ring)
        self._runner = runner_for(memory.device)

    def begin(self, batches: Sequence[MicroBatch]) -> None:
        """A pass over all layers begins, with these micro-batches in each; what lies elsewhere is fetched ahead."""
        self._work = [self._work_of(batch) for batch in batches]
        self._fetching.begin([part for work in self._work for part in work.elsewhere])

    def attend(self, layer: int, index: int, q_TNH: Tensor, k_TKH: Tensor, v_TKH: Tensor) -> Tensor:
        """Store the keys and values of the pass's micro-batch ``index`` and attend: ``[T, N, H]``.

        Rows after the last segment's are padding: zeros come out.
        """
        work = self._work[index]
        out_TNH = torch.empty(q_TNH.shape, dtype=q_TNH.dtype, device=q_TNH.device)
        if work.num_tokens < out_TNH.shape[0]:
            out_TNH[work.num_tokens :] = 0
        decode = decoder(work.decode_rows, q_TNH, k_TKH, v_TKH, out_TNH)
        rows = Rows(layer, q_TNH, k_TKH, v_TKH, out_TNH, decode)
        self._runner.run(rows, work.here)
        for part in work.elsewhere:
            self._fetching.attend(rows, part)
        return out_TNH

    def settle(self) -> None:
        """After a pass: wait until everything that it added is where it is kept."""
        self._fetching.settle()

    def close(self) -> None:
        """Free everything."""
        run_all([self._fetching.close, self._runner.close, self._work.clear, self._views.clear, self._pools.close])

    def _work_of(self, batch: MicroBatch) -> _Work:
        work = _Work(batch.num_tokens, [])
        here: list[Part] = []
        begin = 0
        for segment in batch.segments:
            kv = None if segment.holding is None else self._kv_of(segment.holding)
            part = Part(begin, segment, kv, slice(0, self._num_kv_heads))
            (work.elsewhere if isinstance(kv, FetchedKV) else here).append(part)
            begin += segment.length
            if segment.length == 1:
                work.decode_rows = begin
        work.here = self._runner.share(here)
        return work

    def _kv_of(self, holding: Holding) -> MemoryKV | FetchedKV:
        kv = self._views.get(holding)
        if kv is None:
            kv = self._views[holding] = self._pools.of(holding)
        return kv
