"""Throughput against the memory of one tier: the search again and again. Pure; no torch."""

from collections.abc import Iterator
from dataclasses import dataclass, replace

from engine.errors import PlanDoesNotFit
from engine.planner.decide import Question
from engine.planner.search import Found
from engine.tiers import TierName

FACTORS = (0.125, 0.25, 0.375, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0, 4.0)
"""Of the budget that there is."""


@dataclass(frozen=True, slots=True)
class Point:
    """One budget."""

    num_bytes: int
    found: Found | None
    """The best plan of this budget or of a smaller one; ``None``: nothing fits."""


def asked_budgets(question: Question) -> dict[TierName, int]:
    """What a person fixed, else what the machine has."""
    asked = question.options
    fixed = {TierName.DEVICE: asked.device_memory, TierName.HOST: asked.host_memory, TierName.DISK: asked.disk_space}
    return {tier: question.budgets[tier] if given is None else given for tier, given in fixed.items()}


def sweep(question: Question, tier: TierName) -> Iterator[Point]:
    """From little memory to much; what fits into less fits into more, so no point is below the one before it."""
    budgets = asked_budgets(question)
    question = replace(
        question, options=replace(question.options, device_memory=None, host_memory=None, disk_space=None)
    )
    best: Found | None = None
    for factor in FACTORS:
        room = {**budgets, tier: int(budgets[tier] * factor)}
        try:
            found = question.decide(budgets=room)
        except PlanDoesNotFit:
            found = None
        if found is not None and (best is None or found.prediction.seconds < best.prediction.seconds):
            best = found
        yield Point(room[tier], best)
