"""How much disk space the benchmark of predictions expects a run to take."""

from pathlib import Path

from benchmarks.predictions import bytes_taken
from engine.attention.sizes import kv_bytes_per_token
from engine.devices.facts import MachineFacts
from engine.planner.known_models import known_model
from engine.planner.plan import PlanOptions
from engine.planner.plan_input import PlanInput
from engine.planner.resolve import resolve_plan
from engine.planner.workload import Workload
from engine.tiers import Shares, TierName
from engine.units import GIB


def test_keys_on_disk_are_taken_by_whole_pages() -> None:
    model = known_model("facebook/opt-125m")
    assert model is not None
    plan = resolve_plan(
        PlanInput(
            options=PlanOptions(device_memory=2 * GIB, disk_space=8 * GIB, kv=Shares(0, 0, 100)),
            shape=model.shape,
            stored=model.stored(),
            device="cpu",
            facts=MachineFacts(64 * GIB, 64 * GIB, shares_host_memory=True),
            disk_dir=Path("/"),
        )
    )
    taken = bytes_taken(plan, model.shape, Workload.uniform(256, 8, 32))  # 263 tokens: five pages of 64
    assert taken[TierName.DISK] == 32 * 320 * kv_bytes_per_token(model.shape, plan.kv_format)
