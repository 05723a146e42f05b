"""What would help most: the search once more, on a machine that has more of one thing. Pure; no torch."""

from collections.abc import Iterator
from dataclasses import dataclass, replace

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
_DISK = (LaneName.DISK_READ, LaneName.DISK_WRITE)
_LINK = (LaneName.HOST_TO_DEVICE, LaneName.DEVICE_TO_HOST)


@dataclass(frozen=True, slots=True)
class Advice:
    """One change, and what the planner predicts of it."""

    change: str
    generated_per_s: float
    gain: float
    """0.5: half as much again."""


def advise(given: PlanInput, hardware: Hardware, found: Found) -> list[Advice]:
    """The changes that would help most, the best first; those that gain less than a hundredth are left out.

    ``found``: what the search gives without them.
    """
    advice = []
    changes = list(_changes(given, hardware))
    if found.prediction.bound_by is not LaneName.DEVICE_COMPUTE:
        # Else it costs compute, and all that it gains is room.
        changes += _with_packed_cache(given, hardware)
    for change, changed_input, machine in changes:
        try:
            # A fraction of the gain matters less than an answer in seconds.
            changed = search(changed_input, machine, most_simulated=LEAST_SIMULATED).prediction.generated_per_s
        except PlanDoesNotFit:
            continue
        gain = changed / found.prediction.generated_per_s - 1
        if gain >= LEAST_GAIN:
            advice.append(Advice(change, changed, gain))
    return sorted(advice, key=lambda each: -each.gain)[:MOST_ADVICE]


def _changes(given: PlanInput, hardware: Hardware) -> Iterator[tuple[str, PlanInput, Hardware]]:
    budgets = given.budgets
    given = given.within(budgets)
    for tier in (TierName.DEVICE, TierName.HOST):
        if budgets[tier]:
            name = "memory" if hardware.shares_host_memory else f"{tier} memory"
            change = f"twice the {name}: {format_bytes(FACTOR * budgets[tier])}"
            yield change, given.within(budgets | {tier: FACTOR * budgets[tier]}), hardware
    yield "a disk twice as fast", given, _with_lanes(hardware, _DISK)
    if not hardware.shares_host_memory:
        yield "a link to the device twice as fast", given, _with_lanes(hardware, _LINK)
    if given.stored.weight_format == Plain.name:
        change = (
            "the layers' weights in four bits (overnight import --weight-format int4), which changes answers a little"
        )
        yield change, replace(given, stored=in_format(given.stored, Int4())), hardware
    products = {dtype: _faster(rate) for dtype, rate in hardware.matmul.items()}
    yield "products twice as fast", given, replace(hardware, matmul=products)


def _with_packed_cache(given: PlanInput, hardware: Hardware) -> Iterator[tuple[str, PlanInput, Hardware]]:
    if not given.options.may_round and given.why_not_int4 is None:
        change = f"a KV cache in four bits (--kv-format {Int4.name}), which changes answers a little"
        yield change, given.asking(replace(given.options, kv_format=Int4.name)), hardware


def _with_lanes(hardware: Hardware, lanes: tuple[LaneName, ...]) -> Hardware:
    return replace(
        hardware,
        lanes={lane: _faster(rate) if lane in lanes else rate for lane, rate in hardware.lanes.items()},
    )


def _faster(rate: Rate) -> Rate:
    return replace(rate, points=tuple((size, FACTOR * value) for size, value in rate.points))
