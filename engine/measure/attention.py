"""Attention through the KV cache itself: over prompts, while decoding, and over what lies in a spill file.

Shapes: T tokens of a micro-batch, N heads, H head size.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from itertools import cycle
from pathlib import Path
from statistics import median

import torch

from engine.attention.attention import Attention
from engine.attention.sizes import kv_bytes_per_token, kv_layer_bytes
from engine.devices.facts import MachineFacts
from engine.devices.open import facts_of
from engine.dtypes import DType
from engine.formats.int4_sizes import Int4
from engine.formats.sizes import Plain
from engine.kvcache.cache import PAGE_TOKENS, KVCache
from engine.kvcache.segments import MicroBatch, Segment
from engine.measure.effort import Effort, Points
from engine.measure.overheads import Overheads
from engine.measure.products import family_of, without
from engine.measure.timing import Timed, curve, in_turns, one_turn, timed
from engine.memory.device import Device
from engine.memory.lane import LaneName
from engine.memory.memory import Memory
from engine.memory.tensors import torch_dtype
from engine.memory.traffic import Moved, Traffic
from engine.model.family import EMBED, HEAD, Attend, layer_name
from engine.planner.plan import Plan, PlanOptions
from engine.planner.plan_input import PlanInput
from engine.planner.resolve import EXTENT_TOKENS, resolve_plan
from engine.request import SamplingParams
from engine.sequence import Sequence as TokenSequence
from engine.shape import ModelShape
from engine.stage import attention_of
from engine.tiers import Shares, TierName
from engine.units import GIB, align_up
from engine.weights.manifest import PAGE_BYTES
from engine.weights.stored import StoredWeights

_SPILLED = 4
"""Sequences in a spill file."""
_ENDLESS = 1 << 50
_HOST_BUFFERS = GIB
"""Bytes that a cache in host memory may take beside its pool."""


def prompt_works(cache: "Cache") -> list[Timed]:
    """For each length, what measures the seconds of one prompt in one layer, of as many as a pass carries."""
    return [partial(_prompt_s, cache, length) for length in cache.effort.lengths]


def prompt_points(cache: "Cache", seconds: Sequence[float], overheads: Overheads) -> Points:
    """``(tokens of a prompt, FLOP/s)``, counted over the whole square of a prompt."""
    lengths = cache.effort.lengths
    left = [without(each, overheads.of_segment) for each in seconds]
    return curve(lengths, [cache.pair_flops * length**2 for length in lengths], left)


def decode_works(cache: "Cache") -> list[Timed]:
    """For each length, what measures the seconds of one sequence's decode token in one layer.

    Nearly all of the cache is written to before.
    """
    longest = max(cache.effort.lengths)
    with cache.prompts(max(2, cache.effort.cached_tokens // longest), longest) as prompts:
        for prompt in prompts:  # untouched memory would be read faster than any
            cache.effort.pause()
            cache.fill([prompt])
    return [partial(_decode_s, cache, length) for length in cache.effort.lengths]


def decode_points(cache: "Cache", seconds: Sequence[float], overheads: Overheads) -> Points:
    """``(bytes of a sequence's layer, bytes/s)``."""
    sizes = [cache.layer_token_bytes * length for length in cache.effort.lengths]
    return curve(sizes, sizes, [without(each, overheads.of_segment) for each in seconds])


def least_decode_s(cache: "Cache") -> float:
    """Seconds of one sequence's decode token in one layer, however short the sequence is."""
    (seconds,) = in_turns(cache.effort, decode_works(cache)[:3])
    return min(seconds)


def _prompt_s(cache: "Cache", length: int) -> float:
    number = max(2, max(cache.effort.lengths) // length)
    with cache.prompts(number, length) as prompts:
        return cache.seconds(prompts) / number


def _decode_s(cache: "Cache", length: int) -> float:
    number = max(2, min(cache.effort.sequences, cache.effort.cached_tokens // length))
    with cache.prompts(number, length) as prompts:
        return cache.seconds([replace(prompt, start=length - 1, length=1) for prompt in prompts]) / number


@dataclass(frozen=True, slots=True)
class Spilled:
    """``(bytes of a sequence's layer, bytes/s)`` of keys and values in a spill file, through the page cache."""

    reads: Points
    writes: Points
    attention: Points
    """Attention to them, without the lanes' time."""


def spilled(cache: "Cache") -> Spilled:
    """The rates of a cache on disk."""
    reads: dict[float, float] = {}
    writes: dict[float, float] = {}
    attends: dict[float, float] = {}
    token_bytes = float(cache.layer_token_bytes)
    for length in cache.effort.spilled:
        with cache.prompts(_SPILLED, length, more=1) as prompts:
            steps = [replace(prompt, start=length, length=1) for prompt in prompts]
            cache.moved(prompts)  # the first time, the file grows
            writes[token_bytes * length] = _rate(cache.moved(prompts)[1], LaneName.DISK_WRITE)
            cache.moved(steps)
            _, moved = sorted((cache.moved(steps) for _ in range(5)), key=lambda found: found[0])[2]
            read = token_bytes * (length + 1)
            writes[token_bytes] = _rate(moved, LaneName.DISK_WRITE)
            reads[read] = _rate(moved, LaneName.DISK_READ)
            number = len(steps) * cache.shape.num_layers
            attends[read] = read * number / moved.seconds[LaneName.DEVICE_COMPUTE]
    return Spilled(*(tuple(sorted(each.items())) for each in (reads, writes, attends)))


@dataclass(frozen=True, slots=True)
class OnHost:
    """Decode attention on the host, over keys and values that lie there."""

    points: Points
    """``(bytes of a sequence's layer, bytes/s)``."""
    beside_s: float
    """What a micro-batch takes in a layer beside: queries come down, results go up, from thread to thread."""
    busy_share: float
    """What is left of the rate while the device computes layers."""


def on_host(cache: "Cache", computes: Callable[[int], Callable[[], object]]) -> OnHost:
    """The rates of a cache on the host. ``computes(rows)`` gives a function that computes a layer on the device."""
    points, beside, shares = [], [], []
    for length in cache.effort.lengths:
        number = max(1, min(cache.effort.sequences, cache.effort.cached_tokens // (length + PAGE_TOKENS)))
        with cache.prompts(number, length, more=1) as prompts:
            for prompt in prompts:  # untouched memory would be read faster than any
                cache.effort.pause()
                cache.moved([prompt])
            steps = [replace(prompt, start=length, length=1) for prompt in prompts]
            cache.moved(steps)
            found = sorted(
                (moved.seconds[LaneName.HOST_COMPUTE], seconds)
                for seconds, moved in (cache.moved(steps) for _ in range(5))
            )
            busy, seconds = found[2]
            compute = computes(number)
            layer_s = timed(cache.device, compute, cache.effort)
            repeats = max(1, round(busy / cache.shape.num_layers / layer_s))

            def meanwhile(compute: Callable[[], object] = compute, repeats: int = repeats) -> None:
                for _ in range(repeats):
                    compute()

            both = median(cache.moved(steps, meanwhile)[1].seconds[LaneName.HOST_COMPUTE] for _ in range(3))
            shares.append(min(1.0, busy / both))
            num_bytes = cache.layer_token_bytes * (length + 1)
            points.append((float(num_bytes), num_bytes * number * cache.shape.num_layers / busy))
            beside.append(max(0.0, seconds - busy) / cache.shape.num_layers)
    return OnHost(tuple(points), min(beside), median(shares))


def _rate(moved: Moved, lane: LaneName) -> float:
    return moved.num_bytes[lane] / max(moved.seconds[lane], 1e-9)


def measured_caches(facts: MachineFacts) -> tuple[tuple[TierName, str], ...]:
    """Which caches are measured, by tier and format: on the host, if it can attend beside the device; in four bits,
    where the CPU attends to them as they are."""
    plain, packed = Plain.name, Int4.name
    beside = () if facts.shares_host_memory else ((TierName.HOST, plain), (TierName.HOST, packed))
    here = ((TierName.DEVICE, packed),) if facts.shares_host_memory else ()
    return ((TierName.DEVICE, plain), *here, *beside, (TierName.DISK, plain))


def qkv_tokens(effort: Effort) -> int:
    """Tokens that a cache is given at once, at most."""
    return max(2 * max(effort.lengths), effort.sequences, _SPILLED * max(effort.spilled))


def _nothing() -> None:
    """What is done meanwhile, if nothing else is asked for."""


class Cache:
    """A KV cache of a few layers, and random queries, keys and values to give to it."""

    def __init__(self, device: Device, dtype: DType, shape: ModelShape, effort: Effort, traffic: Traffic) -> None:
        self.shape = shape
        self.layer_token_bytes = kv_layer_bytes(shape, Plain(dtype))
        """Also of a packed cache: what it stands for."""
        self.books: KVCache
        self.attention: Attention
        self.device = device
        self.effort = effort
        self._traffic = traffic
        tokens = qkv_tokens(effort)
        heads = shape.num_heads + 2 * shape.num_kv_heads
        self._qkv = torch.randn(tokens, heads, shape.head_size, dtype=torch_dtype(dtype), device=device.torch_device)
        self._layers = cycle(range(shape.num_layers))

    @property
    def pair_flops(self) -> float:
        """Operations of one query with one key in one layer."""
        return 4.0 * self.shape.num_heads * self.shape.head_size

    @contextmanager
    def prompts(self, number: int, length: int, more: int = 0) -> Iterator[list[Segment]]:
        """``number`` prompts of ``length`` tokens each, with room for ``more`` tokens."""
        total = length + more
        found = [TokenSequence([1] * total, length, total + 1, SamplingParams()) for _ in range(number)]
        try:
            for sequence in found:
                if not self.books.admit(sequence):
                    raise AssertionError("the cache was made large enough")
            yield [Segment(each, 0, length, self.books.held[each]) for each in found]
        finally:
            for sequence in found:
                self.books.release(sequence)

    def fill(self, batch: Sequence[Segment], meanwhile: Callable[[], object] = _nothing) -> None:
        """Attend in every layer; ``meanwhile`` is done in each while the host attends."""
        self.attention.begin([MicroBatch(tuple(batch))])
        for layer in range(self.shape.num_layers):
            self._attend(layer, batch, meanwhile)

    def attend(self, batch: Sequence[Segment]) -> Attend:
        """Attention for a layer; each call takes the next layer's keys and values."""
        self.attention.begin([MicroBatch(tuple(batch))])
        return lambda qkv: self.attention.attend(next(self._layers), 0, qkv)

    def seconds(self, batch: Sequence[Segment]) -> float:
        """Seconds of one layer, in one turn; one layer comes after the other, so that the processor's caches help no
        more than in a model."""
        self.attention.begin([MicroBatch(tuple(batch))])
        return one_turn(self.device, lambda: self._attend(next(self._layers), batch), self.effort)

    def moved(self, batch: Sequence[Segment], meanwhile: Callable[[], object] = _nothing) -> tuple[float, Moved]:
        """Seconds of attending in all layers, and what the lanes did; see ``fill``."""
        self.device.compute_mark().wait()
        self._traffic.take()
        start = time.perf_counter()
        self._traffic.computes("attention")
        self.fill(batch, meanwhile)
        self._traffic.computes(None)
        self.device.compute_mark().wait()
        seconds = time.perf_counter() - start
        self.attention.settle()  # what was written counts, but nobody has to wait for it
        return seconds, self._traffic.take()

    def _attend(self, layer: int, batch: Sequence[Segment], meanwhile: Callable[[], object] = _nothing) -> None:
        tokens = sum(segment.length for segment in batch)
        self.attention.start(layer, 0, self._qkv[:tokens])
        meanwhile()
        self.attention.finish()


def cached_shape(hidden_size: int, effort: Effort) -> ModelShape:
    """The layers whose keys and values are kept."""
    return replace(family_of(hidden_size, effort).shape, num_layers=effort.cached_layers)


def cache_plan(
    tier: TierName, kv_format: str, device: str, dtype: DType, shape: ModelShape, facts: MachineFacts, effort: Effort
) -> Plan:
    """A cache in one tier for as many tokens as are ever in it."""
    spilled_tokens = _SPILLED * align_up(max(effort.spilled) + 1, PAGE_TOKENS)
    tokens = max(effort.cached_tokens, 2 * max(effort.lengths), spilled_tokens, *effort.tokens)
    if tier is TierName.DISK:
        tokens = spilled_tokens
    elif tier is TierName.HOST:
        tokens = max(effort.cached_tokens, align_up(max(effort.lengths) + 1, PAGE_TOKENS))
    units = dict.fromkeys((EMBED, HEAD, *(layer_name(index) for index in range(shape.num_layers))), PAGE_BYTES)
    shares = Shares(*(100 if each is tier else 0 for each in TierName))
    # What the host needs to attend with grows with its pool, which fills the memory that there is.
    on_host = (
        _ENDLESS if tier is not TierName.HOST else _HOST_BUFFERS + 4 * tokens * kv_bytes_per_token(shape, Plain(dtype))
    )
    options = PlanOptions(
        device=device, dtype=dtype, kv=shares, device_memory=_ENDLESS, host_memory=on_host, disk_space=_ENDLESS,
        weights=Shares(100, 0, 0), micro_batch=qkv_tokens(effort),
        extent_tokens=min(EXTENT_TOKENS, align_up(max(effort.lengths) + 1, PAGE_TOKENS)),
        host_attention="on" if tier is TierName.HOST else "off", kv_format=kv_format,
    )  # fmt: skip
    plan = resolve_plan(
        PlanInput(
            shape=shape,
            stored=StoredWeights.of_one_tensor(dtype, units),
            device=device,
            facts=facts,
            options=options,
            disk_dir=Path(),
        )
    )
    pools = dict.fromkeys(TierName, 0) | {tier: kv_bytes_per_token(shape, plan.kv_format) * (tokens + 1)}
    return replace(plan, kv_bytes=pools)


@contextmanager
def cache_in(
    tier: TierName,
    device: Device,
    dtype: DType,
    hidden_size: int,
    folder: Path,
    effort: Effort,
    kv_format: str = Plain.name,
) -> Iterator[Cache]:
    """A cache in one tier, with room for what is measured and no more."""
    shape = cached_shape(hidden_size, effort)
    plan = cache_plan(tier, kv_format, device.name, dtype, shape, facts_of(device), effort)
    memory = Memory(device, plan.used_bytes, folder)
    cache = Cache(device, dtype, shape, effort, memory.traffic)
    with closing(memory.disk), closing(attention_of(shape, plan, memory)) as cache.attention:
        cache.books = cache.attention.cache()
        yield cache
