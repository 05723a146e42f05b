"""What a plan is searched for: machine, model, workload, and whatever a person fixed. Pure; no torch."""

from dataclasses import dataclass
from pathlib import Path

from engine.attention.sizes import kv_bytes_per_token
from engine.devices.facts import MachineFacts
from engine.errors import PlanDoesNotFit
from engine.formats.sizes import Plain
from engine.planner.cost import Overlap, PassModel
from engine.planner.default import resolve_plan
from engine.planner.hardware import Hardware
from engine.planner.plan import Plan, PlanOptions
from engine.planner.workload import Workload
from engine.shape import ModelShape
from engine.tiers import TierName
from engine.weights.stored import StoredWeights


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """All that is given."""

    hardware: Hardware
    shape: ModelShape
    stored: StoredWeights
    workload: Workload
    fixed: PlanOptions
    """With its dtype and every budget."""
    overlap: Overlap
    facts: MachineFacts

    @property
    def token_bytes(self) -> int:
        """Of keys and values, over all layers."""
        assert self.fixed.dtype is not None
        return kv_bytes_per_token(self.shape, Plain(self.fixed.dtype))

    @property
    def budgets(self) -> dict[TierName, int]:
        """Bytes of each tier."""
        fixed = self.fixed
        assert fixed.device_memory is not None
        assert fixed.host_memory is not None
        assert fixed.disk_space is not None
        return {TierName.DEVICE: fixed.device_memory, TierName.HOST: fixed.host_memory, TierName.DISK: fixed.disk_space}

    def model(self, plan: Plan, host_attention: bool) -> PassModel:
        """What passes cost under a plan."""
        return PassModel(
            self.hardware, self.shape, self.stored, plan, host_attention=host_attention, overlap=self.overlap
        )

    def resolved(self, options: PlanOptions) -> Plan | None:
        """The plan, or ``None`` if it does not fit."""
        try:
            return self.resolve(options)
        except PlanDoesNotFit:
            return None

    def resolve(self, options: PlanOptions) -> Plan:
        """The plan.

        Raises:
            PlanDoesNotFit: it needs more of a tier than there is.
        """
        return resolve_plan(
            options,
            shape=self.shape,
            stored=self.stored,
            device=self.hardware.device,
            facts=self.facts,
            disk_dir=Path(),
        )
