"""However late copies, compute or disk are, the answers are right. ``test_races`` holds that every wait is needed."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from engine import Generate, Generation, PlanOptions, Request, SamplingParams, Score
from engine.devices.host import HostDevice
from engine.dtypes import DType
from engine.loading import load_engine
from engine.memory.device import Device
from engine.memory.spill import DiskTier
from engine.tiers import Shares
from engine.units import MIB
from engine.weights.files import WeightFiles
from engine.weights.importing import import_checkpoint
from tests.engine.checkpoints import make_checkpoint
from tests.engine.late import LateDevice

BUDGETS = {"device_memory": 32 * MIB, "host_memory": 32 * MIB, "disk_space": 32 * MIB}
LATE_S = 0.004


@dataclass(frozen=True)
class Case:
    """A placement, and what is late."""

    options: PlanOptions
    model: str = "model"
    link_s: float = 0.0
    compute_s: float = 0.0
    disk_s: float = 0.0
    spill_s: float = 0.0
    """What is written to the spill file arrives so much later."""


def placed(weights: str, kv: str, activations: str, **more: Any) -> PlanOptions:
    chosen: dict[str, Any] = {
        **BUDGETS, "activations": activations, "micro_batch": 24, "micro_batches": 2, "extent_tokens": 16, **more
    }  # fmt: skip
    return PlanOptions(weights=Shares.parse(weights), kv=Shares.parse(kv), **chosen)


CASES = {
    "weights on disk, late links": Case(placed("0/0/100", "100/0/0", "device"), link_s=4 * LATE_S),
    "weights on disk, late compute": Case(placed("0/0/100", "100/0/0", "device"), compute_s=4 * LATE_S),
    "weights on disk, late disk": Case(placed("0/0/100", "100/0/0", "device"), disk_s=4 * LATE_S),
    "weights on host, late compute": Case(placed("0/100/0", "100/0/0", "device"), compute_s=4 * LATE_S),
    "weights resident and cast, late links": Case(
        placed("100/0/0", "100/0/0", "device", dtype="float32"), model="narrow", link_s=LATE_S
    ),
    # So late that the KV cache is made in the meantime.
    "weights resident, very late links": Case(placed("100/0/0", "100/0/0", "device"), link_s=0.1),
    "all on host, late compute": Case(placed("0/100/0", "0/100/0", "host"), compute_s=LATE_S),
    "all on disk, late compute": Case(placed("0/0/100", "0/0/100", "disk"), compute_s=LATE_S),
    "all on host, late links": Case(placed("0/100/0", "0/100/0", "host"), link_s=LATE_S),
    "all on disk, late links": Case(placed("0/0/100", "0/0/100", "disk"), link_s=LATE_S),
    "KV cache on host, late compute": Case(placed("100/0/0", "0/100/0", "device"), compute_s=4 * LATE_S),
    "KV cache attended to on the host, late compute": Case(
        placed("0/100/0", "0/100/0", "device", host_attention="on"), compute_s=LATE_S
    ),
    "KV cache attended to on the host, late links": Case(
        placed("100/0/0", "0/100/0", "device", host_attention="on"), link_s=LATE_S
    ),
    "KV cache on disk, late writes": Case(placed("100/0/0", "0/0/100", "device"), spill_s=2 * LATE_S),
    "KV cache on disk, late links": Case(placed("100/0/0", "0/0/100", "device"), link_s=4 * LATE_S),
}


def requests() -> list[Request]:
    sampling = SamplingParams(max_new_tokens=3, ignore_eos=True)
    texts = ["a quick brown fox", "jumps over the lazy dog, and is gone"]
    return [Request(text, Generate(text, sampling)) for text in texts] + [Request("score", Score("so long", " then"))]


def outputs(model_dir: Path, options: PlanOptions, device: Device) -> dict[object, object]:
    with load_engine(model_dir, options, device=device) as loaded:
        return {
            output.key: output.result.token_ids if isinstance(output.result, Generation) else output.result.logprob
            for output in loaded.run(requests())
        }


def make_models(folder: Path) -> dict[str, Path]:
    """One model in float32, and with the same weights in bfloat16."""
    make_checkpoint(folder / "hf", num_hidden_layers=4)
    import_checkpoint(folder / "hf", folder / "model")
    import_checkpoint(folder / "hf", folder / "narrow", dtype=DType.BFLOAT16)
    return {name: folder / name for name in ("model", "narrow")}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return make_models(tmp_path_factory.mktemp("late"))


@pytest.fixture(scope="module")
def expected(models: dict[str, Path]) -> dict[str, dict[object, object]]:
    found = {}
    for name, folder in models.items():
        on_host = outputs(folder, PlanOptions(**BUDGETS, dtype="float32", kv=Shares(100, 0, 0)), HostDevice())
        found[name] = {
            key: pytest.approx(value, abs=1e-4) if isinstance(value, float) else value for key, value in on_host.items()
        }
    return found


@pytest.fixture
def late_disk(monkeypatch: pytest.MonkeyPatch) -> Callable[[float, float], None]:
    """Makes reads of weights, and writes to spill files, late from now on."""
    read_unit, write = WeightFiles.read_unit, DiskTier.write

    def set_late(read_s: float, write_s: float) -> None:
        def read_late(self: WeightFiles, name: str, out: torch.Tensor) -> int:
            time.sleep(read_s)
            return read_unit(self, name, out)

        def write_late(self: DiskTier, offset: int, data: torch.Tensor) -> None:
            time.sleep(write_s)
            write(self, offset, data)

        monkeypatch.setattr(WeightFiles, "read_unit", read_late)
        monkeypatch.setattr(DiskTier, "write", write_late)

    return set_late


def run_case(case: Case, models: dict[str, Path], late_disk: Callable[[float, float], None]) -> dict[object, object]:
    late_disk(case.disk_s, case.spill_s)
    device = LateDevice(delay_s=case.link_s, compute_delay_s=case.compute_s)
    return outputs(models[case.model], case.options, device)


@pytest.mark.parametrize("name", CASES)
def test_the_answers_are_right(
    name: str,
    models: dict[str, Path],
    expected: dict[str, dict[object, object]],
    late_disk: Callable[[float, float], None],
) -> None:
    assert run_case(CASES[name], models, late_disk) == expected[CASES[name].model]
