"""Attention where the device has memory of its own: what it stores when, and what the host does beside it.

Shapes: T tokens of a micro-batch, N query heads, K key/value heads, H head size.
"""

from collections import deque
from collections.abc import Callable, Sequence
from typing import Generic, Protocol, TypeVar

import torch
from torch import Tensor

from engine.attention.elsewhere import Elsewhere
from engine.attention.groups import Group
from engine.attention.host_attention import Attended, HostAttention
from engine.attention.pools import KVPools
from engine.attention.upload import Upload
from engine.kvcache.cache import Move
from engine.kvcache.segments import MicroBatch
from engine.memory.closing import run_all
from engine.memory.device import Device

Work = TypeVar("Work")
"""What a micro-batch needs on the device, in every layer alike."""


class OnDevice(Protocol[Work]):
    """Attention over keys and values as they are stored."""

    def work_of(self, batch: MicroBatch, groups: Sequence[Group], upload: Upload) -> Callable[[], Work]:
        """That of a micro-batch, once the upload is sent; ``groups``: what it fetches."""

    def stores_first(self, groups: Sequence[Group]) -> bool:
        """Whether what a micro-batch adds elsewhere is stored before the device attends, so that the host can begin."""

    def attend(self, layer: int, work: Work, q_TNH: Tensor, kv_T2KH: Tensor, stored: Tensor, out_TNH: Tensor) -> None:
        """Store what is kept on the device, and attend, into ``out``; ``stored``: see ``StoredRows.rounded``."""


class DeviceRunner(Generic[Work]):
    """Implements ``engine.attention.attention.Runner``."""

    def __init__(
        self,
        num_heads: int,
        device: Device,
        pools: KVPools,
        elsewhere: Elsewhere,
        on_device: OnDevice[Work],
        on_host: HostAttention | None = None,
    ) -> None:
        """``pools``, ``elsewhere`` and ``on_host`` are the runner's to close."""
        self._num_heads, self._device, self._rows = num_heads, device, pools.rows
        self._pools, self._elsewhere = pools, elsewhere
        self._on_device, self._on_host = on_device, on_host
        self._work: list[Work] = []
        self._attended: list[Attended | None] = []
        """What of each micro-batch the host attends to."""
        self._started: deque[tuple[Tensor, bool]] = deque()
        """Outputs, and whether the host has a part in them."""

    def begin(self, batches: Sequence[MicroBatch], moves: Sequence[Move]) -> None:
        """All numbers of a pass go to the device in two copies."""
        for move in moves:
            self._pools.move(move)
        self._elsewhere.begin(batches)
        self._started.clear()
        on_host = self._on_host
        self._attended = [on_host.attended(batch) if on_host is not None else None for batch in batches]
        upload, groups = Upload(), self._elsewhere.groups
        coming = [self._on_device.work_of(batch, groups(index), upload) for index, batch in enumerate(batches)]
        upload.send(self._device)
        self._work = [each() for each in coming]

    def start(self, layer: int, index: int, qkv: Tensor) -> None:
        """Store a micro-batch's keys and values, and attend, but for what the host is left to do."""
        q_TNH, kv_T2KH = qkv[:, : self._num_heads], qkv[:, self._num_heads :].view(len(qkv), 2, -1, qkv.shape[2])
        stored = self._rows.rounded(kv_T2KH)
        left = self._elsewhere.leaving(index, stored, kv_T2KH)
        # Rows of padding stay as they are: no other row ever depends on them.
        out_TNH = torch.empty(q_TNH.shape, dtype=qkv.dtype, device=qkv.device)
        stores_first = self._on_device.stores_first(self._elsewhere.groups(index))
        if stores_first:
            self._store(layer, index, left, q_TNH, out_TNH)
        self._on_device.attend(layer, self._work[index], q_TNH, kv_T2KH, stored, out_TNH)
        if not stores_first:
            self._store(layer, index, left, q_TNH, out_TNH)
        self._started.append((out_TNH, self._attended[index] is not None))

    def finish(self) -> Tensor:
        """What came of what was started first, the host's part included."""
        out_TNH, waits = self._started.popleft()
        if waits:
            assert self._on_host is not None
            self._on_host.finish()
        return out_TNH

    def settle(self) -> None:
        """Wait for what is stored elsewhere."""
        self._elsewhere.settle()

    def close(self) -> None:
        """Free everything."""
        on_host = [self._on_host.close] if self._on_host is not None else []
        run_all([*on_host, self._elsewhere.close, self._work.clear, self._started.clear, self._pools.close])

    def _store(self, layer: int, index: int, left: Tensor | None, q_TNH: Tensor, out_TNH: Tensor) -> None:
        """What is kept elsewhere; and have the host attend to its part, once that is in its pages."""
        self._elsewhere.store(layer, index, left)
        attended = self._attended[index]
        if self._on_host is not None and attended is not None:
            rows = attended.rows
            self._on_host.start(layer, attended, q_TNH[rows], out_TNH[rows], self._elsewhere.stored(layer))
