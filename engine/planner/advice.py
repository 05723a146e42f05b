"""What would help most: the search once more, on a machine that has more of one thing. Pure; no torch."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple

from engine.errors import PlanDoesNotFit
from engine.formats.int4_sizes import Int4
from engine.formats.sizes import Plain
from engine.memory.lane import LaneName
from engine.planner.hardware import Hardware
from engine.planner.plan_input import PlanInput
from engine.planner.rates import Rate
from engine.planner.search import LEAST_SIMULATED, Found, search
from engine.tiers import TierName
from engine.units import format_bytes
from engine.weights.layout import in_format

LEAST_GAIN = 0.01
MOST_ADVICE = 5
FACTOR = 2
WEIGHTS, KV = "weights", "kv"
_DISK = (LaneName.DISK_READ, LaneName.DISK_WRITE)
_LINK = (LaneName.HOST_TO_DEVICE, LaneName.DEVICE_TO_HOST)


@dataclass(frozen=True, slots=True)
class Advice:
    """One change, and what the planner predicts of it."""

    change: str
    generated_per_s: float
    gain: float
    """0.5: half as much again."""


@dataclass(frozen=True, slots=True)
class Advised:
    """What was tried."""

    changes: tuple[Advice, ...] = ()
    """Those that would help most, the best first; those that gain less than a hundredth are left out."""
    in_vain: tuple[str, ...] = ()
    """What was tried in four bits, ``WEIGHTS`` or ``KV``, and gains less than that."""


class _Change(NamedTuple):
    text: str
    given: PlanInput
    hardware: Hardware
    four_bits: str | None = None
    """What it stores in four bits, if that is what it does."""


def advise(given: PlanInput, hardware: Hardware, found: Found) -> Advised:
    """The changes that would help most.

    ``found``: what the search gives without them.
    """
    advice: list[Advice] = []
    in_vain: list[str] = []
    changes = list(_changes(given, hardware))
    if found.prediction.bound_by is not LaneName.DEVICE_COMPUTE:
        # Else it costs compute, and all that it gains is room.
        changes += _with_packed_cache(given, hardware)
    for change in changes:
        try:
            # A fraction of the gain matters less than an answer in seconds.
            changed = search(change.given, change.hardware, most_simulated=LEAST_SIMULATED).prediction.generated_per_s
        except PlanDoesNotFit:
            continue
        gain = changed / found.prediction.generated_per_s - 1
        if gain >= LEAST_GAIN:
            advice.append(Advice(change.text, changed, gain))
        elif change.four_bits is not None:
            in_vain.append(change.four_bits)
    return Advised(tuple(sorted(advice, key=lambda each: -each.gain)[:MOST_ADVICE]), tuple(in_vain))


def _changes(given: PlanInput, hardware: Hardware) -> Iterator[_Change]:
    budgets = given.budgets
    given = given.within(budgets)
    for tier in (TierName.DEVICE, TierName.HOST):
        if budgets[tier]:
            name = "memory" if hardware.shares_host_memory else f"{tier} memory"
            text = f"twice the {name}: {format_bytes(FACTOR * budgets[tier])}"
            yield _Change(text, given.within(budgets | {tier: FACTOR * budgets[tier]}), hardware)
    yield _Change("a disk twice as fast", given, _with_lanes(hardware, _DISK))
    if not hardware.shares_host_memory:
        yield _Change("a link to the device twice as fast", given, _with_lanes(hardware, _LINK))
    if given.stored.weight_format == Plain.name:
        text = (
            "the layers' weights in four bits (overnight import --weight-format int4), which changes answers a little"
        )
        yield _Change(text, replace(given, stored=in_format(given.stored, Int4())), hardware, WEIGHTS)
    products = {dtype: _faster(rate) for dtype, rate in hardware.matmul.items()}
    yield _Change("products twice as fast", given, replace(hardware, matmul=products))


def _with_packed_cache(given: PlanInput, hardware: Hardware) -> Iterator[_Change]:
    if not given.options.may_round and given.why_not_int4 is None:
        text = f"a KV cache in four bits (--kv-format {Int4.name}), which changes answers a little"
        yield _Change(text, given.asking(replace(given.options, kv_format=Int4.name)), hardware, KV)


def _with_lanes(hardware: Hardware, lanes: tuple[LaneName, ...]) -> Hardware:
    return replace(
        hardware,
        lanes={lane: _faster(rate) if lane in lanes else rate for lane, rate in hardware.lanes.items()},
    )


def _faster(rate: Rate) -> Rate:
    return replace(rate, points=tuple((size, FACTOR * value) for size, value in rate.points))
