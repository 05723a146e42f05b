"""From a machine, a model and its workload to the plan that ends it soonest, as this engine computes. No torch."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from engine.errors import HardwareError, PlanDoesNotFit
from engine.model.family import ModelShape, layer_name
from engine.planner.cost import AS_ENGINE
from engine.planner.default import StoredWeights, budgets_of, resolve_plan
from engine.planner.hardware import Hardware
from engine.planner.machine import MachineFacts
from engine.planner.nearest import nearest_fit
from engine.planner.plan import Plan, PlanOptions, TierName
from engine.planner.search import Found, default_budgets, search
from engine.planner.workload import Workload
from engine.units import GIB, format_bytes

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
                overlap=AS_ENGINE,
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
        options = replace(
            asked,
            dtype=asked.dtype or self.stored.dtype,
            device_memory=budgets[TierName.DEVICE] if asked.device_memory is None else asked.device_memory,
            host_memory=budgets[TierName.HOST] if asked.host_memory is None else asked.host_memory,
            disk_space=budgets[TierName.DISK] if asked.disk_space is None else asked.disk_space,
        )
        facts = self.facts or MachineFacts(0, 0, shares_host_memory=self.hardware.shares_host_memory)
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

    Raises:
        PlanDoesNotFit: nothing fits; the sentence says what is short, and the nearest plan that would fit.
        EngineError, OSError: the machine had to be measured, and that failed.
    """
    ruled: Plan | None = None
    refusal: PlanDoesNotFit | None = None
    try:
        ruled = resolve_plan(options, shape=shape, stored=stored, device=device, facts=facts, disk_dir=disk_dir)
    except PlanDoesNotFit as error:
        refusal = error
    if refusal is not None and outlook is None:
        # Nobody knows what comes, so there shall be room for the longest that may.
        asked = replace(options, disk_dir=options.disk_dir or disk_dir)
        near = nearest_fit(asked, shape=shape, stored=stored, facts=facts, tokens=shape.max_positions, device=device)
        raise PlanDoesNotFit(f"{refusal}; {near}" if near else str(refusal)) from refusal
    if outlook is None or (ruled is not None and _streamed_bytes(ruled, stored) < max(1, outlook.worth_bytes)):
        assert ruled is not None
        return Decision(ruled, None)
    hardware = outlook.hardware()
    options = replace(options, disk_dir=options.disk_dir or disk_dir, device=device)
    question = Question(
        hardware=hardware,
        shape=shape,
        stored=stored,
        workload=outlook.workload,
        options=options,
        budgets=budgets_of(options, facts, options.disk_dir or disk_dir),
        facts=facts,
    )
    try:
        return Decision(question.decide().plan, hardware)
    except (PlanDoesNotFit, HardwareError):
        if ruled is None:
            raise
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
