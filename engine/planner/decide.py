"""From a machine, a model and its workload to the plan that ends it soonest, as this engine computes. No torch."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from engine.devices.facts import MachineFacts
from engine.errors import HardwareError, PlanDoesNotFit
from engine.model.family import layer_name
from engine.planner.cost import OVERLAPPED
from engine.planner.default import budgets_of, compute_dtype, resolve_plan
from engine.planner.hardware import Hardware
from engine.planner.least import has_room, least_plan
from engine.planner.nearest import nearest_fit
from engine.planner.plan import Plan, PlanOptions
from engine.planner.search import Found, default_budgets, search
from engine.planner.workload import Workload
from engine.shape import ModelShape
from engine.tiers import TierName
from engine.units import GIB, format_bytes
from engine.weights.stored import StoredWeights

ENGINE_ATTENDS_ON_HOST = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """Everything a plan is made for."""

    hardware: Hardware
    shape: ModelShape
    stored: StoredWeights
    workload: Workload
    options: PlanOptions
    """What a person fixed."""
    budgets: Mapping[TierName, int]
    """Bytes that each tier may hold, where ``options`` does not say."""
    facts: MachineFacts | None = None
    """The machine as it is now; ``None``: some other machine."""

    def decide(self, hardware: Hardware | None = None, budgets: Mapping[TierName, int] | None = None) -> Found:
        """The best plan, on another machine or with other budgets if given.

        Raises:
            PlanDoesNotFit: nothing fits; the sentence says what is short, and the nearest plan that would fit.
        """
        budgets = budgets or self.budgets
        fixed = self.options
        if budgets is not self.budgets:
            fixed = replace(fixed, device_memory=None, host_memory=None, disk_space=None)
        try:
            return search(
                hardware or self.hardware,
                self.shape,
                self.stored,
                self.workload,
                budgets=budgets,
                fixed=fixed,
                host_attention=ENGINE_ATTENDS_ON_HOST,
                overlap=OVERLAPPED,
                disk_dir=fixed.disk_dir or Path(),
                facts=self.facts,
            )
        except PlanDoesNotFit as error:
            near = self._nearest(budgets)
            raise PlanDoesNotFit(f"{error}; {near}" if near else str(error)) from error

    def _nearest(self, budgets: Mapping[TierName, int]) -> str | None:
        longest = max(self.workload.lengths, key=lambda each: each.prompt + each.generated)
        positions = self.shape.max_positions
        if longest.prompt + longest.generated > positions:
            generated = min(longest.generated, positions - 1)
            return f"the nearest that fits: --prompt-len {positions - generated} --gen-len {generated}"
        asked = self.options
        facts = self.facts or MachineFacts(0, 0, shares_host_memory=self.hardware.shares_host_memory)
        options = replace(
            asked,
            dtype=compute_dtype(asked, self.stored, facts),
            device_memory=budgets[TierName.DEVICE] if asked.device_memory is None else asked.device_memory,
            host_memory=budgets[TierName.HOST] if asked.host_memory is None else asked.host_memory,
            disk_space=budgets[TierName.DISK] if asked.disk_space is None else asked.disk_space,
        )
        return nearest_fit(
            options,
            shape=self.shape,
            stored=self.stored,
            facts=facts,
            tokens=max(each.reserved for each in self.workload.lengths),
            device=self.hardware.device,
        )


@dataclass(frozen=True, slots=True)
class Outlook:
    """What an engine is loaded for, so that it can plan by itself."""

    workload: Workload
    hardware: Callable[[], Hardware]
    """Asked only where there is something to decide: measuring takes most of a minute."""
    worth_bytes: int = GIB
    """Weights streamed in a pass from which a search pays; below, rules will do."""


@dataclass(frozen=True, slots=True)
class Decision:
    """A plan, and by what it was found; ``None``: by the rules of ``resolve_plan`` alone."""

    plan: Plan
    hardware: Hardware | None


def decide_plan(
    options: PlanOptions,
    outlook: Outlook | None,
    *,
    shape: ModelShape,
    stored: StoredWeights,
    device: str,
    facts: MachineFacts,
    disk_dir: Path,
) -> Decision:
    """The plan to load a model with: searched for if weights must be streamed and ``outlook`` says what comes.

    The machine is measured only if some plan fits. Where the budgets leave too little to measure it with, or its
    profile lacks a figure, the rules decide.

    Raises:
        PlanDoesNotFit: nothing fits; the sentence says what is short, and the nearest plan that would fit.
        Interrupted: the machine was being measured, and that was to end.
        EngineError, OSError: the machine had to be measured, and that failed.
    """
    here = options.disk_dir or disk_dir
    ruled: Plan | None = None
    refusal: PlanDoesNotFit | None = None
    try:
        ruled = resolve_plan(options, shape=shape, stored=stored, device=device, facts=facts, disk_dir=here)
    except PlanDoesNotFit as error:
        refusal = error
    if outlook is not None:
        # A search goes by the mean request.
        tokens = outlook.workload.mean(lambda each: each.reserved)
        if ruled is None or not has_room(ruled, shape, tokens):
            least = least_plan(
                options, shape=shape, stored=stored, facts=facts, tokens=tokens, device=device, disk_dir=here
            )
            if least is None and ruled is not None:
                return Decision(ruled, None)  # each request is told by itself that there is no room for it
            ruled = least
    if ruled is None:
        # Where nobody knows what comes, there shall be room for the longest that may.
        lengths = outlook.workload.lengths if outlook is not None else ()
        longest = max((each.reserved for each in lengths), default=shape.max_positions)
        asked = replace(options, disk_dir=here)
        near = nearest_fit(asked, shape=shape, stored=stored, facts=facts, tokens=longest, device=device)
        raise PlanDoesNotFit(f"{refusal}; {near}" if near else str(refusal)) from refusal
    if outlook is None or _streamed_bytes(ruled, stored) < max(1, outlook.worth_bytes):
        return Decision(ruled, None)
    options = replace(options, disk_dir=here, device=device)
    try:
        hardware = outlook.hardware()
        question = Question(
            hardware=hardware,
            shape=shape,
            stored=stored,
            workload=outlook.workload,
            options=options,
            budgets=budgets_of(options, facts, here),
            facts=facts,
        )
        return Decision(question.decide().plan, hardware)
    except (PlanDoesNotFit, HardwareError):
        return Decision(ruled, None)


def _streamed_bytes(plan: Plan, stored: StoredWeights) -> int:
    away = (index for index, home in enumerate(plan.layers) if home is not TierName.DEVICE)
    return sum(stored.unit_bytes[layer_name(index)] for index in away)


def budgets_of_machine(hardware: Hardware, stored: StoredWeights) -> dict[TierName, int]:
    """What a plan may take of a machine that is this one's alone.

    Raises:
        PlanDoesNotFit: the model is larger than its disk.
    """
    needed, room = sum(stored.unit_bytes.values()), int(hardware.capacity[TierName.DISK].value)
    if needed > room:
        raise PlanDoesNotFit(
            f"the model has {format_bytes(needed)} and the disk of {hardware.name} {format_bytes(room)}: "
            f"{format_bytes(needed - room)} short; the nearest machine that could hold it has a disk of "
            f"{format_bytes(needed)}"
        )
    return default_budgets(hardware, stored)
