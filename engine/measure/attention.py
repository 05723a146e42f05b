"""Attention through the KV cache itself: over prompts, while decoding, and over what lies in a spill file.

Shapes: T tokens of a micro-batch, N heads, H head size.
"""

from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from itertools import cycle
from pathlib import Path

import torch

from engine.devices.base import Device
from engine.devices.open import facts_of
from engine.kvcache.store import KVStore
from engine.measure.effort import SOURCE, Effort, Points, timed
from engine.measure.overheads import Overheads
from engine.measure.products import curve, family_of
from engine.memory.lane import LaneName
from engine.memory.spill import DiskTier
from engine.memory.tier import MemoryTier
from engine.memory.traffic import Moved, Traffic
from engine.model.family import EMBED, HEAD, ModelShape, layer_name
from engine.passes import MicroBatch, Segment
from engine.planner.default import StoredWeights, kv_bytes_per_token, resolve_plan
from engine.planner.hardware import Rate
from engine.planner.plan import PlanOptions, Shares, TierName
from engine.request import SamplingParams
from engine.sequence import Sequence as TokenSequence
from engine.units import GIB
from engine.weights.manifest import PAGE_BYTES

_SPILLED = 4
"""Sequences in a spill file."""


@dataclass(frozen=True, slots=True)
class Attention:
    """Two curves: FLOP/s over the tokens of a prompt (counted over its whole square), bytes/s over those of a sequence
    in one layer."""

    prompt: Rate
    decode: Rate


def attention(device: Device, dtype: str, overheads: Overheads, folder: Path, effort: Effort) -> Attention:
    """Over keys and values in device memory."""
    prompts: list[tuple[float, float, float]] = []
    decodes: list[tuple[float, float, float]] = []
    with _cache(device, dtype, folder, TierName.DEVICE, effort) as cache:
        for length in effort.lengths:
            number = max(2, min(effort.sequences, effort.cached_tokens // length))
            with cache.sequences(number, length) as sequences:
                batch = [Segment(each, 0, length, keeps_kv=True) for each in sequences]
                # As many prompts as a pass carries; the others, only so that memory is written to that will be read.
                at_once = max(1, min(number, max(effort.lengths) // length))
                cache.fill([batch[first : first + at_once] for first in range(0, number, at_once)])
                flops = 4.0 * cache.shape.num_heads * cache.shape.head_size * length**2
                seconds = cache.seconds(batch[:at_once]) / at_once
                prompts.append((length, flops, max(seconds - overheads.of_segment, 0.1 * seconds)))
                step = [Segment(each, length - 1, 1, keeps_kv=True) for each in sequences]
                seconds = cache.seconds(step) / number
                num_bytes = float(cache.layer_token_bytes * length)
                decodes.append((num_bytes, num_bytes, max(seconds - overheads.of_segment, 0.1 * seconds)))
    return Attention(Rate(curve(prompts, 0.0), SOURCE), Rate(curve(decodes, 0.0), SOURCE))


def spilled(device: Device, dtype: str, folder: Path, effort: Effort) -> dict[LaneName, Rate]:
    """Bytes/s of keys and values to and from a spill file, through the page cache, as long as it has room for them."""
    reads: list[tuple[float, float, float]] = []
    writes: dict[float, float] = {}
    with _cache(device, dtype, folder, TierName.DISK, effort) as cache:
        for length in effort.spilled:
            with cache.sequences(_SPILLED, length + 1) as sequences:
                prompts = [Segment(each, 0, length, keeps_kv=True) for each in sequences]
                steps = [Segment(each, length, 1, keeps_kv=True) for each in sequences]
                cache.moved(prompts)
                moved = cache.moved(prompts)
                writes[float(cache.layer_token_bytes * length)] = _rate(moved, LaneName.DISK_WRITE)
                cache.moved(steps)
                moved = cache.moved(steps)
                writes[float(cache.layer_token_bytes)] = _rate(moved, LaneName.DISK_WRITE)
                size = float(cache.layer_token_bytes * (length + 1))
                reads.append((size, size, size / _rate(moved, LaneName.DISK_READ)))
    return {
        LaneName.DISK_READ: Rate(curve(reads, 0.0), SOURCE),
        LaneName.DISK_WRITE: Rate(tuple(sorted(writes.items())), SOURCE),
    }


def _rate(moved: Moved, lane: LaneName) -> float:
    return moved.num_bytes[lane] / max(moved.seconds[lane], 1e-9)


class _Cache:
    """A KV cache of a few layers, and random queries, keys and values to bring to it."""

    def __init__(self, device: Device, dtype: str, shape: ModelShape, effort: Effort, traffic: Traffic) -> None:
        self.shape = shape
        self.layer_token_bytes = kv_bytes_per_token(shape, dtype) // shape.num_layers
        self.store: KVStore
        self._device = device
        self._effort = effort
        self._traffic = traffic
        tokens = max(*effort.lengths, effort.sequences, _SPILLED * max(effort.spilled))
        self._qkv_T3NH = torch.randn(tokens, 3, shape.num_heads, shape.head_size).to(
            dtype=getattr(torch, dtype), device=device.torch_device
        )
        self._layers = cycle(range(shape.num_layers))

    @contextmanager
    def sequences(self, number: int, length: int) -> Iterator[list[TokenSequence]]:
        """So many sequences with room for so many tokens."""
        found = [TokenSequence([1] * length, length, length + 1, SamplingParams()) for _ in range(number)]
        try:
            for sequence in found:
                if not self.store.admit(sequence):
                    raise AssertionError("the cache was made large enough")
            yield found
        finally:
            for sequence in found:
                self.store.release(sequence)

    def fill(self, batches: Sequence[Sequence[Segment]]) -> None:
        """Attend in every layer."""
        for layer in range(self.shape.num_layers):
            for batch in batches:
                self._attend(layer, batch)

    def seconds(self, batch: Sequence[Segment]) -> float:
        """Of one layer; the next time it is the next one's turn, so that caches cannot help more than in a model."""
        return timed(self._device, lambda: self._attend(next(self._layers), batch), self._effort.figure_s)

    def moved(self, batch: Sequence[Segment]) -> Moved:
        """What the lanes did for all layers."""
        self._device.compute_mark().wait()
        self._traffic.take()
        self.fill([batch])
        self._device.compute_mark().wait()
        return self._traffic.take()

    def _attend(self, layer: int, batch: Sequence[Segment]) -> None:
        micro_batch = MicroBatch(tuple(batch))
        q, k, v = (self._qkv_T3NH[: micro_batch.num_tokens, index] for index in range(3))
        self.store.attend(layer, micro_batch, q, k, v)


@contextmanager
def _cache(device: Device, dtype: str, folder: Path, tier: TierName, effort: Effort) -> Iterator[_Cache]:
    """With room for what is measured, in one tier."""
    shape = replace(family_of(effort.widths[-1][0], effort).shape, num_layers=effort.cached_layers)
    tokens = max(effort.cached_tokens, 2 * max(effort.lengths), _SPILLED * (max(effort.spilled) + 1))
    room = kv_bytes_per_token(shape, dtype) * (tokens + 1) + GIB
    units = dict.fromkeys((EMBED, HEAD, *(layer_name(index) for index in range(shape.num_layers))), PAGE_BYTES)
    shares = Shares(*(100 if each is tier else 0 for each in TierName))
    plan = resolve_plan(
        PlanOptions(
            device=device.name, dtype=dtype, kv=shares, device_memory=room, host_memory=room, disk_space=room,
            weights=Shares(100, 0, 0), micro_batch=max(effort.lengths),
        ),
        shape=shape, stored=StoredWeights(dtype, units), device=device.name, facts=facts_of(device), disk_dir=folder,
    )  # fmt: skip
    tiers = {
        TierName.DEVICE: MemoryTier(TierName.DEVICE, room, device.allocate),
        TierName.HOST: MemoryTier(TierName.HOST, room, device.allocate_host),
    }
    traffic = Traffic(device.compute_mark)
    cache = _Cache(device, dtype, shape, effort, traffic)
    with (
        closing(DiskTier(room, folder)) as disk,
        closing(KVStore(plan, shape, device, tiers, disk, traffic)) as cache.store,
    ):
        yield cache


__all__ = ["Attention", "Points", "attention", "spilled"]
