"""Measuring keeps to the budgets of the plan it is for, and ends when it is told to."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from engine.devices.facts import MachineFacts
from engine.devices.host import HostDevice
from engine.dtypes import DType
from engine.errors import Interrupted, Unmeasurable
from engine.measure import FULL, QUICK, measure
from engine.measure.room import bytes_needed, within
from engine.planner.plan import PlanOptions
from engine.tiers import TierName
from engine.units import GIB, MIB
from tests.engine.late import tensors_in

SHARED = MachineFacts(16 * GIB, 16 * GIB, shares_host_memory=True, attention_threads=1)
APART = MachineFacts(16 * GIB, 16 * GIB, shares_host_memory=False)
LARGER = replace(
    QUICK,
    widths=((384, 8),),
    head_size=64,
    vocabulary=16384,
    tokens=(1, 256),
    lengths=(16, 256),
    cached_tokens=8192,
    sequences=8,
    streamed_bytes=8 * MIB,
    copies=(MIB, 8 * MIB),
)
"""Enough that what is held exceeds what is always held."""


class Live(TorchDispatchMode):
    """Bytes of all tensors that exist, at their most; temporaries that an operator makes within itself are not seen."""

    def __init__(self) -> None:
        super().__init__()
        self.peak = 0
        self._live: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tensors_in(result):
            self.see(tensor)
        return result

    def see(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        known = self._live.get(storage._cdata)
        if known is not None and not known[0].expired():
            return
        self._live = {key: held for key, held in self._live.items() if not held[0].expired()}
        self._live[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        self.peak = max(self.peak, sum(num_bytes for _, num_bytes in self._live.values()))


class CountedDevice(HostDevice):
    def __init__(self, live: Live) -> None:
        super().__init__()
        self._live = live

    def allocate(self, num_bytes: int) -> Tensor:
        memory = super().allocate(num_bytes)
        self._live.see(memory)
        return memory

    allocate_host = allocate


def test_no_more_memory_is_held_than_the_budget(tmp_path: Path) -> None:
    budget = 60 * MIB
    least = bytes_needed(LARGER, (DType.BFLOAT16, DType.FLOAT32), SHARED, "cpu")[TierName.DEVICE]
    assert least > budget  # so the effort must be made smaller
    live = Live()
    with live:
        measure(CountedDevice(live), tmp_path, effort=LARGER, options=PlanOptions(device_memory=budget))
    assert budget / 2 < live.peak <= budget


@pytest.mark.parametrize("name", ["device_memory", "disk_space"])
def test_a_budget_that_is_too_small_is_said_before_anything_is_done(name: str, tmp_path: Path) -> None:
    class Untouched(HostDevice):
        def allocate(self, num_bytes: int) -> Tensor:
            raise AssertionError("memory was taken")

    options = replace(PlanOptions(device_memory=GIB), **{name: MIB})
    with pytest.raises(Unmeasurable, match=r"needs \S+ MiB of (device|disk), and the budget is 1\.0 MiB"):
        measure(Untouched(), tmp_path / "folder", effort=QUICK, options=options)
    assert not (tmp_path / "folder").exists()


@pytest.mark.parametrize("facts", [SHARED, APART])
def test_the_effort_is_the_most_that_fits(facts: MachineFacts) -> None:
    dtypes = (DType.BFLOAT16, DType.FLOAT32)
    endless = dict.fromkeys(TierName, 1 << 50)
    assert within(FULL, endless, dtypes, facts, "cpu") == FULL
    for size in (1, 2, 3):
        budgets = {TierName.DEVICE: size * GIB, TierName.HOST: size * GIB, TierName.DISK: 4 * GIB}
        found = within(FULL, budgets, dtypes, facts, "cpu")
        needed = bytes_needed(found, dtypes, facts, "cpu")
        assert all(needed[tier] <= budgets[tier] for tier in TierName)
        assert [width for width, _ in found.widths] == [width for width, _ in FULL.widths]
    assert found == FULL


@dataclass
class Stop:
    """Says to stop when asked for the ``at``-th time."""

    at: int
    asked: int = 0

    def __call__(self) -> bool:
        self.asked += 1
        return self.asked == self.at


def test_every_stage_asks_whether_to_go_on(tmp_path: Path) -> None:
    stages: list[str] = []
    asked: dict[str, int] = {}

    def stop() -> bool:
        asked[stages[-1]] = asked.get(stages[-1], 0) + 1
        return False

    measure(HostDevice(), tmp_path, effort=QUICK, stop=stop, say=stages.append)
    assert set(asked) == set(stages)
    # How often a figure is repeated, time decides; seven times at least, in the shortest stage.
    assert min(asked.values()) >= 7, asked


@pytest.mark.parametrize("at", [1, 100, 240])
def test_an_end_leaves_nothing(at: int, tmp_path: Path) -> None:
    stop = Stop(at)
    with pytest.raises(Interrupted):
        measure(HostDevice(), tmp_path, effort=QUICK, stop=stop)
    assert stop.asked == at
    assert list(tmp_path.iterdir()) == []
    assert torch.is_inference_mode_enabled() is False
