"""All that depends on a model's width: layers, logits and attention."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from engine.devices.open import facts_of
from engine.dtypes import DType
from engine.formats.int4_sizes import Int4
from engine.formats.sizes import Plain
from engine.measure.attention import (
    Cache,
    OnHost,
    Spilled,
    cache_in,
    decode_points,
    decode_works,
    least_decode_s,
    measured_caches,
    on_host,
    prompt_points,
    prompt_works,
    spilled,
)
from engine.measure.effort import SOURCE, Effort, Points
from engine.measure.overheads import Overheads
from engine.measure.products import Layers, head_points, layer_points, without
from engine.measure.streaming import Streamed, streamed
from engine.measure.timing import curve, in_turns
from engine.memory.device import Device
from engine.planner.hardware import Width
from engine.planner.rates import Rate
from engine.tiers import TierName

FEW_LAYERS = 2
"""With weights of their own, for dtypes other than the machine's best."""
_LEAST_SHARE = 0.9
_LONGEST_PROMPT = 256
"""Tokens of the prompts in a pass whose layers are measured."""


@dataclass(frozen=True, slots=True)
class OfWidth:
    """All that was measured of one width."""

    width: Width
    spilled: Spilled
    streamed: Streamed | None
    """``None``: layers of it were not read from the disk."""
    host: OnHost | None
    """``None``: the host's attention is the device's."""
    packed: Points | None
    """Decode attention over a cache in four bits, where the device is the CPU."""
    packed_host: OnHost | None
    """Where it is the host's."""


def width_of(
    device: Device,
    width: tuple[int, int],
    dtypes: tuple[DType, ...],
    overheads: Overheads,
    share: float,
    folder: Path,
    effort: Effort,
) -> OfWidth:
    """One width, in each dtype; the first dtype in more detail.

    ``share``: what layers that are too wide to be streamed here keep of their speed beside reads.
    """
    hidden_size, number = width
    best = dtypes[0]
    with cache_in(TierName.DEVICE, device, best, hidden_size, folder, effort) as cache:
        layers = Layers(device, hidden_size, number, best, effort)
        works = [partial(_layer_s, layers, cache, tokens) for tokens in effort.tokens]
        prompt_s, decode_s, layer_s = in_turns(effort, prompt_works(cache), decode_works(cache), works)
        prompt = Rate(prompt_points(cache, prompt_s, overheads), SOURCE)
        decode = Rate(decode_points(cache, decode_s, overheads), SOURCE)
        points = _layer_points(layers, cache, layer_s, prompt, overheads)
        from_disk = None
        if hidden_size <= effort.most_streamed_width:
            share, from_disk = _beside_reads(layers, cache, folder, effort)
        matmul = {best: Rate(points, SOURCE, busy_share=share)}
    del layers
    head = {best: Rate(head_points(device, hidden_size, best, effort.rows, effort), SOURCE)}
    for dtype in dtypes[1:]:
        layers = Layers(device, hidden_size, FEW_LAYERS, dtype, effort)
        matmul[dtype] = Rate(layer_points(layers, effort.few_tokens, effort), SOURCE, busy_share=share)
        del layers
        head[dtype] = Rate(head_points(device, hidden_size, dtype, effort.few_rows, effort), SOURCE)
    with cache_in(TierName.DISK, device, best, hidden_size, folder, effort) as cache:
        found = spilled(cache)
    hosts: dict[str, OnHost] = {}
    packed = None
    for tier, name in measured_caches(facts_of(device)):
        if tier is TierName.HOST:
            with cache_in(tier, device, best, hidden_size, folder, effort, name) as cache:
                step = Layers(device, hidden_size, FEW_LAYERS, best, effort).step
                hosts[name] = on_host(cache, step)
        elif tier is TierName.DEVICE and name != Plain.name:
            with cache_in(tier, device, best, hidden_size, folder, effort, name) as cache:
                (seconds,) = in_turns(effort, decode_works(cache))
                packed = decode_points(cache, seconds, overheads)
    one = Width(hidden_size=hidden_size, matmul=matmul, head=head, prompt_attention=prompt, decode_attention=decode)
    return OfWidth(one, found, from_disk, hosts.get(Plain.name), packed, hosts.get(Int4.name))


def least_segment_s(device: Device, dtype: DType, overheads: Overheads, folder: Path, effort: Effort) -> float:
    """Overhead of a segment, which is no more than most of what the shortest sequences take in the narrowest model."""
    with cache_in(TierName.DEVICE, device, dtype, effort.widths[0][0], folder, effort) as cache:
        return min(overheads.of_segment, _LEAST_SHARE * least_decode_s(cache))


def _layer_points(
    layers: Layers, cache: Cache, measured_s: Sequence[float], prompt: Rate, overheads: Overheads
) -> Points:
    """``(tokens, FLOP/s)`` of whole layers with their attention, which is then taken off: products between which other
    things are done are slower than one product after the other."""
    sizes = cache.effort.tokens
    left = []
    for tokens, seconds in zip(sizes, measured_s, strict=True):
        number, length = _prompts(tokens, cache.effort)
        attention_s = number * (prompt.seconds(cache.pair_flops * length**2, length) + overheads.of_segment)
        left.append(without(seconds, attention_s + overheads.of_layer))
    return curve(sizes, [layers.token_flops * tokens for tokens in sizes], left)


def _prompts(tokens: int, effort: Effort) -> tuple[int, int]:
    """How many prompts a layer's tokens are, and of how many tokens each."""
    most = min(tokens, _LONGEST_PROMPT)
    length = max((each for each in effort.lengths if each <= most), default=tokens)
    return max(1, tokens // length), length


def _layer_s(layers: Layers, cache: Cache, tokens: int) -> float:
    """Seconds of a layer for ``tokens`` tokens, attention included, in one turn."""
    with cache.prompts(*_prompts(tokens, cache.effort)) as prompts:
        return layers.seconds(tokens, cache.attend(prompts))


def _beside_reads(layers: Layers, cache: Cache, folder: Path, effort: Effort) -> tuple[float, Streamed]:
    """What is left of a layer's speed while others are read from the disk."""
    tokens = min(_LONGEST_PROMPT, max(effort.tokens))
    ((alone_s,),) = in_turns(effort, [partial(_layer_s, layers, cache, tokens)])
    with cache.prompts(*_prompts(tokens, effort)) as prompts:
        compute = layers.work(tokens, cache.attend(prompts))
        hidden_size = layers.family.shape.hidden_size
        found = streamed(layers.device, layers.dtype, hidden_size, compute, folder, effort)
    return min(1.0, alone_s / found.layer_s), found
