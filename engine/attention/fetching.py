"""Attention over keys and values that compute cannot address: they come through a ring, an extent of a layer a time."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from engine.attention.kernels import attend
from engine.attention.pools import KV, FetchedKV
from engine.attention.rows import Part, Rows
from engine.attention.sizes import kv_layer_bytes
from engine.attention.workers import one_core
from engine.formats.sizes import Plain
from engine.memory.ring import Item, Place, Ring
from engine.memory.tensors import torch_dtype
from engine.shape import ModelShape


class Fetching:
    """Enters extent after extent of a ring, which it owns."""

    def __init__(self, shape: ModelShape, stored: Plain, ring: Ring) -> None:
        self._shape = shape
        self._dtype = torch_dtype(stored.dtype)
        self._token_bytes = kv_layer_bytes(shape, stored)
        self._ring = ring

    def begin(self, parts: Sequence[Part]) -> None:
        """A pass begins, in each of whose layers these will be attended to, in this order."""
        self._ring.begin(self._items(parts))

    def attend(self, rows: Rows, part: Part) -> None:
        """Store a segment's keys and values, and attend to its sequence's, extent by extent as they come."""
        assert isinstance(part.kv, FetchedKV)
        start, end = part.segment.start, part.segment.start + part.segment.length
        extents = zip(part.kv.extents, part.kv.places, strict=True)
        if rows.decode is not None and end == start + 1 and start < part.kv.extents[0].capacity:
            # On one core: others read what comes next meanwhile.
            with one_core(), self._fetched(part.kv.places[0][rows.layer]) as (past, kv_c2KH):
                rows.decode(part.begin, kv_c2KH.permute(1, 2, 0, 3), past)
            return
        q_NtH, k_KtH, v_KtH = rows.of(part)
        kv_t2KH = torch.stack((k_KtH.transpose(0, 1), v_KtH.transpose(0, 1)), dim=1)
        pieces = []
        done, whole = 0, False
        for extent, places in extents:
            if extent.start >= end:
                break
            with self._fetched(places[rows.layer]) as (past, kv_c2KH):
                added = kv_c2KH.shape[0] - past
                kv_c2KH[past:] = kv_t2KH[done : done + added]
                done += added
                # Its own tokens, if all are here, are read with the rest: one piece less to merge.
                whole = added == part.segment.length
                k_KsH, v_KsH = kv_c2KH[: None if whole else past].permute(1, 2, 0, 3)
                if k_KsH.shape[1]:
                    pieces.append(attend(q_NtH, k_KsH, v_KsH, causal=whole))
        if not whole:
            pieces.append(attend(q_NtH, k_KtH, v_KtH, causal=True))
        rows.finish(part, pieces)

    def settle(self) -> None:
        """After a pass: wait until everything that it added is where it is kept."""
        self._ring.settle()

    def close(self) -> None:
        """Free the buffers."""
        self._ring.close()

    @contextmanager
    def _fetched(self, place: Place) -> Iterator[tuple[int, Tensor]]:
        """How many tokens of an extent there are, and they and those that follow them: ``[token, k|v, head, dim]``.

        Those that follow are for the caller to fill in; they are kept when the context ends.
        """
        with self._ring.enter(place) as (item, raw):
            end = item.fetched if item.changed is None else item.changed.stop
            sizes = (end // self._token_bytes, 2, self._shape.num_kv_heads, self._shape.head_size)
            yield item.fetched // self._token_bytes, raw[:end].view(self._dtype).view(sizes)

    def _items(self, parts: Sequence[Part]) -> Iterator[Item]:
        for layer in range(self._shape.num_layers if parts else 0):
            for part in parts:
                assert isinstance(part.kv, FetchedKV)
                start, end = part.segment.start, part.segment.start + part.segment.length
                for extent, places in zip(part.kv.extents, part.kv.places, strict=True):
                    past, there = (
                        min(max(0, position - extent.start), extent.capacity) * self._token_bytes
                        for position in (start, end)
                    )
                    if there:
                        yield Item(KV, places[layer], past, slice(past, there) if past < there else None)
