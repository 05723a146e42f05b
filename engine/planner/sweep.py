"""Throughput against the memory of one tier: the search again and again. Pure; no torch."""

from collections.abc import Iterator
from dataclasses import dataclass

from engine.errors import PlanDoesNotFit
from engine.planner.hardware import Hardware
from engine.planner.plan_input import PlanInput
from engine.planner.search import LEAST_SIMULATED, Found, search
from engine.tiers import TierName

FACTORS = (0.125, 0.25, 0.375, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0, 4.0)
"""Multiples of the budget that are tried."""


@dataclass(frozen=True, slots=True)
class Point:
    """One budget."""

    num_bytes: int
    found: Found | None
    """The best plan of this budget or of a smaller one; ``None``: nothing fits."""


def sweep(given: PlanInput, hardware: Hardware, tier: TierName) -> Iterator[Point]:
    """From little memory to much; what fits into less fits into more, so no point is below the one before it."""
    budgets = given.budgets
    best: Found | None = None
    for factor in FACTORS:
        room = {**budgets, tier: int(budgets[tier] * factor)}
        try:
            found = search(given.within(room), hardware, most_simulated=LEAST_SIMULATED)
        except PlanDoesNotFit:
            found = None
        if found is not None and (best is None or found.prediction.seconds < best.prediction.seconds):
            best = found
        yield Point(room[tier], best)
