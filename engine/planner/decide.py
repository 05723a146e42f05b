"""From what is given to the plan that ends the workload soonest, as this engine computes. No torch."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from engine.devices.facts import MachineFacts
from engine.errors import HardwareError, PlanDoesNotFit
from engine.model.family import layer_name
from engine.planner.cost import PassModel
from engine.planner.hardware import Hardware
from engine.planner.least import least_plan
from engine.planner.nearest import nearest_fit
from engine.planner.plan import Plan, PlanOptions
from engine.planner.plan_input import PlanInput
from engine.planner.resolve import resolve_plan
from engine.planner.search import Found, search
from engine.planner.workload import Workload
from engine.shape import ModelShape
from engine.tiers import TierName
from engine.units import GIB, format_bytes
from engine.weights.stored import StoredWeights

WORTH_MEASURING = GIB
"""Bytes of weights streamed in a pass from which measuring the machine pays, which takes a minute or two."""
MACHINE_SHARES = {TierName.DEVICE: 0.92, TierName.HOST: 0.9, TierName.DISK: 0.95}
"""The share of another machine's capacity that a plan takes unasked: the rest is for the runtime and other people."""


@dataclass(frozen=True, slots=True)
class Decision:
    """A plan, and by whose figures it was searched for; ``None``: by the rules of ``resolve_plan`` alone."""

    plan: Plan
    hardware: Hardware | None = None
    expects: PassModel | None = None
    """What predicts its passes, by those figures."""


def decide(
    given: PlanInput,
    hardware: Hardware | None = None,
    measure: Callable[[], Hardware] | None = None,
) -> Decision:
    """The plan to load a model with: searched for where figures of the machine and a workload are known.

    Where the search fails (the profile lacks a figure, say, or the budgets leave too little to measure the machine
    with), the rules decide.

    Args:
        given: what the plan is made from.
        hardware: the machine's figures, if it was measured.
        measure: measures it; called only if some plan fits, and much must be streamed.

    Raises:
        PlanDoesNotFit: nothing fits; the sentence says what is short, and the nearest plan that would fit.
        Interrupted: the machine was being measured, and that was to end.
        EngineError, OSError: the machine had to be measured, and that failed.
    """
    ruled = _by_rules(given)
    if given.workload is None or ruled.largest_sequence(given.shape) < _mean_tokens(given.workload):
        return Decision(ruled)  # where there is no room for a request, it is told so by itself
    try:
        if hardware is None and measure is not None and _streamed_bytes(ruled, given) >= WORTH_MEASURING:
            hardware = measure()
        if hardware is None:
            return Decision(ruled)
        plan = search(given, hardware).plan
        return Decision(plan, hardware, PassModel(hardware, given.shape, given.stored, plan))
    except (PlanDoesNotFit, HardwareError):
        return Decision(ruled)


def best_plan(given: PlanInput, hardware: Hardware) -> Found:
    """What ``decide`` finds by a search, with its prediction.

    Raises:
        PlanDoesNotFit: nothing fits; the sentence says what is short, and the nearest plan that would fit.
        HardwareError: the profile lacks a figure.
    """
    try:
        return search(given, hardware)
    except PlanDoesNotFit as error:
        raise _refused(given, error) from error


def input_for_machine(
    hardware: Hardware, *, shape: ModelShape, stored: StoredWeights, options: PlanOptions, workload: Workload
) -> PlanInput:
    """What a plan is made from on another machine, all of which is there for it.

    Raises:
        PlanDoesNotFit: the model is larger than its disk.
    """
    model, disk = sum(stored.unit_bytes.values()), int(hardware.capacity[TierName.DISK].value)
    if model > disk:
        raise PlanDoesNotFit(
            f"the model has {format_bytes(model)} and the disk of {hardware.name} {format_bytes(disk)}: "
            f"{format_bytes(model - disk)} short; the nearest machine that could hold it has a disk of "
            f"{format_bytes(model)}"
        )
    budgets = {tier: int(hardware.capacity[tier].value * MACHINE_SHARES[tier]) for tier in TierName}
    # The model directory lies on the disk, too.
    budgets[TierName.DISK] = max(0, budgets[TierName.DISK] - model)
    if hardware.shares_host_memory:
        # One memory: a host tier would only be a second name for the same bytes.
        budgets[TierName.HOST] = 0
    asked = {
        TierName.DEVICE: options.device_memory,
        TierName.HOST: options.host_memory,
        TierName.DISK: options.disk_space,
    }
    given = PlanInput(
        shape=shape,
        stored=stored,
        device=hardware.device,
        facts=MachineFacts(0, 0, shares_host_memory=hardware.shares_host_memory),
        options=options,
        disk_dir=Path(),
        workload=workload,
    )
    return given.within(budgets | {tier: num_bytes for tier, num_bytes in asked.items() if num_bytes is not None})


def _by_rules(given: PlanInput) -> Plan:
    """By ``resolve_plan``, or, where that leaves no room for a request, the plan that needs least."""
    refusal: PlanDoesNotFit | None = None
    ruled: Plan | None = None
    try:
        ruled = resolve_plan(given)
    except PlanDoesNotFit as error:
        refusal = error
    if given.workload is not None:
        tokens = _mean_tokens(given.workload)
        if ruled is None or ruled.largest_sequence(given.shape) < tokens:
            ruled = least_plan(given, tokens) or ruled
    if ruled is None:
        assert refusal is not None
        raise _refused(given, refusal) from refusal
    return ruled


def _mean_tokens(workload: Workload) -> float:
    """KV tokens of the mean request, for which the rules must leave room."""
    return workload.mean(lambda each: each.reserved)


def _refused(given: PlanInput, error: PlanDoesNotFit) -> PlanDoesNotFit:
    """The same, and the nearest plan that fits."""
    positions = given.shape.max_positions
    longest = max(given.workload.lengths, key=lambda each: each.prompt + each.generated) if given.workload else None
    if longest is not None and longest.prompt + longest.generated > positions:
        generated = min(longest.generated, positions - 1)
        near: str | None = f"the nearest that fits: --prompt-len {positions - generated} --gen-len {generated}"
    else:
        near = nearest_fit(given)
    return PlanDoesNotFit(f"{error}; {near}" if near else str(error))


def _streamed_bytes(plan: Plan, given: PlanInput) -> int:
    streamed = (index for index, tier in enumerate(plan.layers) if tier is not TierName.DEVICE)
    return sum(given.stored.unit_bytes[layer_name(index)] for index in streamed)
