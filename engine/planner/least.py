"""Whether any plan fits at all, which costs nothing to know: before a machine is measured, say. Pure; no torch."""

from collections.abc import Iterator
from dataclasses import replace
from itertools import product

from engine.planner.nearest import SMALLEST_MICRO_BATCH
from engine.planner.plan import Plan, PlanOptions
from engine.planner.plan_input import PlanInput
from engine.planner.resolve import fitting_plan
from engine.tiers import Shares

_ALL_IN = (Shares(0, 0, 100), Shares(0, 100, 0), Shares(100, 0, 0))


def least_plan(given: PlanInput, tokens: float) -> Plan | None:
    """A plan that needs little and has room for a sequence of ``tokens``; ``None``: no plan at all fits.

    What the options fix stays as it is.
    """
    for asked in _candidates(given):
        plan = fitting_plan(given.asking(asked))
        if plan is not None and plan.largest_sequence(given.shape) >= tokens:
            return plan
    return None


def _candidates(given: PlanInput) -> Iterator[PlanOptions]:
    """Small batches with layers as the rules place them, then with all layers in one tier.

    A mixture never needs less of any tier than the best of these: staging buffers are as many as the layers that are
    staged, up to a few, and a layer on the device takes at least the place of a buffer.
    """
    options = given.options
    small = replace(
        options, micro_batch=options.micro_batch or SMALLEST_MICRO_BATCH, micro_batches=options.micro_batches or 1
    )
    # Where device and host are one memory, a share of the host's would be the device's once more.
    has_host = not given.facts.shares_host_memory or options.host_memory is not None
    tiers = [None, *(shares for shares in _ALL_IN if has_host or not shares.host)]
    for weights, kv in product(tiers, tiers):
        if (weights is None or options.weights is None) and (kv is None or options.kv is None):
            yield replace(small, weights=weights or options.weights, kv=kv or options.kv)
