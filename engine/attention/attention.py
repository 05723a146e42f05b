"""Attention over keys and values that it owns, in all tiers: one call a micro-batch and layer, whatever the device."""

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from torch import Tensor

from engine.attention.device_runner import DeviceRunner, OnDevice
from engine.attention.elsewhere import Elsewhere
from engine.attention.host_attention import HostAttention
from engine.attention.host_runner import HostRunner
from engine.attention.int4_sizes import has_windows
from engine.attention.int4_window_attention import WindowAttention
from engine.attention.pool_attention import PoolAttention
from engine.attention.pools import KVPools
from engine.attention.table import kernel_for
from engine.dtypes import DType
from engine.errors import DeviceUnavailable
from engine.formats.sizes import TensorFormat
from engine.kvcache.cache import KVCache, Layout, Move, SequenceRoom, unit_tokens
from engine.kvcache.segments import MicroBatch
from engine.memory.closing import run_all
from engine.memory.memory import Memory
from engine.memory.tensors import torch_dtype
from engine.shape import ModelShape
from engine.tiers import TierName


class Runner(Protocol):
    """A kind of device's way to attend."""

    def begin(self, batches: Sequence[MicroBatch], moves: Sequence[Move]) -> None:
        """A pass over all layers begins, with these micro-batches in each; what lies elsewhere is fetched ahead.

        Before, keys and values are moved, in this order.
        """

    def start(self, layer: int, index: int, qkv: Tensor) -> None:
        """Store the keys and values of the pass's micro-batch ``index``, and begin to attend.

        ``qkv``, ``[T, N + 2 K, H]``: queries, keys and values.
        """

    def finish(self) -> Tensor:
        """What came of that which was started first, ``[T, N, H]``; of rows of padding, anything."""

    def settle(self) -> None:
        """After a pass: wait until everything that it added is where it is kept."""

    def close(self) -> None:
        """Free everything."""


class Attention:
    """Keys and values of some layers, and attention over them."""

    def __init__(
        self,
        shape: ModelShape,
        stored: TensorFormat,
        dtype: DType,
        memory: Memory,
        *,
        tokens: Mapping[TierName, int],
        layouts: Mapping[TierName, Layout],
        room: SequenceRoom,
        extent_tokens: int,
        num_slots: int,
        group_tokens: int,
        unpacked_tokens: int,
        kept_rows: int,
        host_attends: bool = False,
    ) -> None:
        """Take the memory.

        Args:
            shape: of the layers.
            stored: the format of keys and values, of a head's vector.
            dtype: what is computed with.
            memory: where compute is, and the budgets.
            tokens: how many each tier holds.
            layouts: how a sequence lies in each.
            room: what a sequence takes.
            extent_tokens: the longest extent, and no page is longer.
            num_slots: buffers for what compute cannot address; 0 where there is nothing of the kind.
            group_tokens: of one of these.
            unpacked_tokens: whose keys and values are unpacked at a time; 0: they are never packed.
            kept_rows: rows of a micro-batch, at most.
            host_attends: decode tokens are attended to where host memory has their keys, beside the device.

        Raises:
            TierFull: a budget would be exceeded.
            DeviceUnavailable: the device has no kernel for this number type.
        """
        device = memory.device
        kernel = None if device.shares_host_memory else kernel_for(dtype, device.capability)
        if kernel is None and not device.shares_host_memory:
            raise DeviceUnavailable(f"{device.name} has no attention in {dtype}")
        self.tokens, self.layouts, self._room = tokens, layouts, room
        self._extent_tokens = extent_tokens
        page_tokens = unit_tokens(Layout.PAGES, extent_tokens)
        computed = torch_dtype(dtype)
        pools = KVPools(shape, stored, computed, tokens, page_tokens, memory)
        self.claim = pools.claim
        try:
            elsewhere = Elsewhere(
                shape,
                stored,
                computed,
                memory,
                pools,
                room=room,
                group_tokens=group_tokens,
                unpacked_tokens=unpacked_tokens,
                num_slots=num_slots,
                kept_rows=kept_rows,
                host_attends=host_attends,
            )
        except BaseException:
            pools.close()
            raise
        self._runner: Runner
        if kernel is None:
            self._runner = HostRunner(shape.num_kv_heads, pools, elsewhere)
        else:
            try:
                on_host = (
                    HostAttention(
                        shape, stored, dtype, memory, pools, page_tokens=page_tokens, most_rows=kept_rows, room=room
                    )
                    if host_attends
                    else None
                )
            except BaseException:
                run_all([elsewhere.close, pools.close])
                raise
            parts = (shape, kernel, pools, elsewhere)
            on_device: OnDevice[Any]
            if has_windows(shape, stored):
                on_device = WindowAttention(*parts, room=room, unpacked_tokens=unpacked_tokens)
            else:
                on_device = PoolAttention(*parts, unpacked_tokens=unpacked_tokens)
            self._runner = DeviceRunner[Any](shape.num_heads, device, pools, elsewhere, on_device, on_host)
        self.ahead = 1 if host_attends else 0
        """How many micro-batches should be started before one is finished: what is computed meanwhile."""

    def begin(self, batches: Sequence[MicroBatch], moves: Sequence[Move] = ()) -> None:
        """A pass over all layers begins: see ``Runner``."""
        self._runner.begin(batches, moves)

    def start(self, layer: int, index: int, qkv: Tensor) -> None:
        """Store a micro-batch's keys and values, and begin to attend: see ``Runner``."""
        self._runner.start(layer, index, qkv)

    def finish(self) -> Tensor:
        """What came of that which was started first: see ``Runner``."""
        return self._runner.finish()

    def attend(self, layer: int, index: int, qkv: Tensor) -> Tensor:
        """Both, one after the other."""
        self.start(layer, index, qkv)
        return self.finish()

    def settle(self) -> None:
        """After a pass: wait until everything that it added is where it is kept."""
        self._runner.settle()

    def close(self) -> None:
        """Free everything."""
        self._runner.close()

    def cache(self, *, fills_together: bool = False) -> KVCache:
        """The books of an empty cache; see ``KVCache`` for ``fills_together``."""
        return KVCache(
            self.tokens,
            extent_tokens=self._extent_tokens,
            layouts=self.layouts,
            room=self._room,
            fills_together=fills_together,
            claim=self.claim,
        )
