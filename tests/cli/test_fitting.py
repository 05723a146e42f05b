"""What is refused before a job is stored is what the engine would refuse, and nothing else."""

from dataclasses import replace
from pathlib import Path
from typing import NoReturn

import pytest

from cli import fitting
from cli.machine import may_have_gpu
from cli.sizes import Sizes
from engine.devices.host import HostDevice
from engine.engine import Engine
from engine.errors import DeviceUnavailable, HardwareError, PlanDoesNotFit
from engine.loading import plan_input
from engine.model.registry import sizes_for
from engine.planner.decide import decide
from engine.planner.plan import PlanOptions
from engine.planner.workload import Workload
from engine.tiers import Shares
from engine.units import KIB, MIB
from engine.weights.layout import stored_in
from engine.weights.manifest import read_manifest

WORK = Workload.uniform(20, 8, 100)
PLACEMENTS = {
    "rules": PlanOptions(),
    "all resident": PlanOptions(weights=Shares(100, 0, 0)),
    "batch": PlanOptions(micro_batch=64, micro_batches=1),
    "kv on disk": PlanOptions(kv=Shares(0, 0, 100), disk_space=MIB),
    "no room on disk": PlanOptions(activations="disk", disk_space=1),
}
BUDGETS = (KIB, 300 * KIB, 450 * KIB, 600 * KIB, 800 * KIB, MIB, 2 * MIB, 4 * MIB, 8 * MIB, 256 * MIB)


def sizes(model_dir: Path) -> Sizes:
    manifest = read_manifest(model_dir)
    stored = stored_in(manifest)
    return Sizes(sizes_for(manifest.config).shape, stored, model_dir)


def unmeasured() -> NoReturn:
    raise HardwareError("nobody has measured")


@pytest.mark.parametrize("name", PLACEMENTS)
@pytest.mark.parametrize("workload", [WORK, None], ids=["rows", "none"])
def test_both_refuse_the_same(
    name: str, workload: Workload | None, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("engine.planner.decide.WORTH_MEASURING", 1)
    said = {}
    for budget in BUDGETS:
        options = replace(PLACEMENTS[name], device="cpu", device_memory=budget, disk_dir=tmp_path)
        before = during = False
        try:
            fitting.check_fits(sizes(tiny_model), options, tmp_path, lambda: workload)
        except PlanDoesNotFit:
            before = True
        device = HostDevice()
        given = plan_input(tiny_model, options, device, workload)
        try:
            plan = decide(given, measure=unmeasured).plan
            Engine.load(tiny_model, plan, device=device).close()
        except PlanDoesNotFit:
            during = True
        said[budget] = (before, during)
    assert [budget for budget, (before, during) in said.items() if before != during] == []
    assert said[KIB] == (True, True)
    assert said[256 * MIB] == (name == "no room on disk",) * 2


def test_a_device_that_is_not_there_is_refused(tiny_model: Path, tmp_path: Path) -> None:
    with pytest.raises(DeviceUnavailable):
        fitting.check_fits(sizes(tiny_model), PlanOptions(device="cuda:77"), tmp_path, lambda: WORK)


@pytest.mark.parametrize(("name", "found"), [("nvidia0", True), ("dxg", True), ("nvidiactl", False), ("null", False)])
def test_a_gpu_may_be_there_where_its_file_is(tmp_path: Path, name: str, found: bool) -> None:
    (tmp_path / name).touch()
    assert may_have_gpu(tmp_path) is found
