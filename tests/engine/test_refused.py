"""What is refused before anything is loaded: more memory than is free, and weights that a number type cannot hold."""

from dataclasses import replace
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from engine.devices.facts import MachineFacts
from engine.devices.simulated import SimulatedDevice
from engine.dtypes import DType
from engine.errors import CheckpointError, PlanDoesNotFit
from engine.loading import load_engine
from engine.planner.plan import PlanOptions
from engine.planner.plan_input import check_asked
from engine.units import GIB, MIB
from engine.weights.importing import import_checkpoint
from tests.engine.checkpoints import make_checkpoint

FACTS = MachineFacts(2 * GIB, 4 * GIB, shares_host_memory=False)


@pytest.mark.parametrize("tier", ["device", "host"])
def test_more_memory_than_is_free_is_refused(tier: str, tmp_path: Path) -> None:
    most = {"device": 2 * GIB, "host": 4 * GIB}[tier]
    field = f"{tier}_memory"
    check_asked(replace(PlanOptions(), **{field: most}), FACTS, tmp_path)
    with pytest.raises(PlanDoesNotFit, match=rf"--{tier}-memory asks for .* of {tier} memory are free here"):
        check_asked(replace(PlanOptions(), **{field: most + 1}), FACTS, tmp_path)


def test_device_and_host_are_not_asked_for_twice_where_they_are_one_memory(tmp_path: Path) -> None:
    one = replace(FACTS, device_free=4 * GIB, shares_host_memory=True)
    check_asked(PlanOptions(device_memory=3 * GIB, host_memory=GIB), one, tmp_path)
    with pytest.raises(PlanDoesNotFit, match=r"together ask for 5\.0 GiB of one memory, and 4\.0 GiB of it are free"):
        check_asked(PlanOptions(device_memory=3 * GIB, host_memory=2 * GIB), one, tmp_path)


def test_more_disk_space_than_is_free_is_refused(tmp_path: Path) -> None:
    check_asked(PlanOptions(disk_space=1), FACTS, tmp_path)
    with pytest.raises(PlanDoesNotFit, match=rf"--disk-space asks for 1024\.0 TiB, and .* are free for {tmp_path};"):
        check_asked(PlanOptions(disk_space=2**50), FACTS, tmp_path)
    with pytest.raises(PlanDoesNotFit, match=rf"free for {tmp_path}/spill;"):
        check_asked(PlanOptions(disk_space=2**50, disk_dir=tmp_path / "spill"), FACTS, tmp_path)


def test_weights_that_float16_cannot_hold_are_refused_by_name(tmp_path: Path) -> None:
    make_checkpoint(tmp_path / "hf", num_hidden_layers=2)
    path = tmp_path / "hf" / "model.safetensors"
    tensors = load_file(path)
    (name,) = (each for each in tensors if each.endswith("layers.1.fc1.weight"))
    tensors[name][3, 5] = -70_000.0
    save_file(tensors, path, metadata={"format": "pt"})
    manifest = import_checkpoint(tmp_path / "hf", tmp_path / "model")
    assert manifest.beyond_float16 == {"layer.1/fc1.weight": 70_000.0}
    options = PlanOptions(dtype=DType.FLOAT16, device_memory=64 * MIB, host_memory=64 * MIB)
    said = r"tensor 'fc1\.weight' of unit 'layer\.1' holds 70000, too large for float16"
    with pytest.raises(CheckpointError, match=said):
        load_engine(tmp_path / "model", options, device=SimulatedDevice())
    load_engine(tmp_path / "model", replace(options, dtype=DType.FLOAT32), device=SimulatedDevice()).close()
