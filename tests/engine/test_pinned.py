"""Memory for a GPU's copies: pinned where the system lets us, ordinary where it does not, and given back."""

import gc
import logging
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from engine.devices.pinned import cpus_near, pinned_empty, populate
from engine.errors import DeviceFailed
from engine.memory.aligned import aligned_empty
from engine.units import MIB


def refusing(error: int) -> Callable[[int, int], int]:
    return lambda address, size: error


def test_pages_are_pinned_for_as_long_as_anybody_has_them() -> None:
    pinned: dict[int, int] = {}

    def register(address: int, size: int) -> int:
        pinned[address] = size
        return 0

    memory = pinned_empty(3 * MIB, "cuda:0", None, register, pinned.pop)
    assert pinned == {memory.data_ptr(): 3 * MIB}
    assert memory.data_ptr() % 4096 == 0
    part = memory[MIB:]
    del memory
    gc.collect()
    part.fill_(7)
    assert len(pinned) == 1
    del part
    gc.collect()
    assert pinned == {}


@pytest.mark.parametrize("error", [2, 304, 801])
def test_memory_that_cannot_be_pinned_is_ordinary_memory(error: int, caplog: pytest.LogCaptureFixture) -> None:
    def never(address: int) -> None:
        raise AssertionError("unpinned")

    with caplog.at_level(logging.WARNING):
        memory = pinned_empty(MIB, "cuda:0", None, refusing(error), never)
    memory.fill_(1)
    assert f"cuda:0: 1.0 MiB of host memory cannot be pinned (CUDA error {error})" in caplog.text
    del memory
    gc.collect()


def test_a_lost_device_is_told_of() -> None:
    with pytest.raises(DeviceFailed, match=r"cuda:0: pinning host memory failed \(CUDA error 719\)"):
        pinned_empty(MIB, "cuda:0", None, refusing(719), refusing(0))  # type: ignore[arg-type]


def test_nothing_is_pinned_for_nothing() -> None:
    assert pinned_empty(0, "cuda:0", None, refusing(719), refusing(0)).numel() == 0  # type: ignore[arg-type]


def resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def test_pages_are_there_before_they_are_touched() -> None:
    memory = aligned_empty(200 * MIB)
    before = resident()
    populate(memory.data_ptr(), memory.numel(), set(os.sched_getaffinity(0)))
    assert resident() - before > 190 * MIB


def test_populating_leaves_the_caller_where_it_may_run() -> None:
    cpus = os.sched_getaffinity(0)
    memory = aligned_empty(MIB)
    populate(memory.data_ptr(), memory.numel(), {min(cpus)})
    assert os.sched_getaffinity(0) == cpus


def test_processors_near_a_gpu(tmp_path: Path) -> None:
    device = tmp_path / "bus/pci/devices/0000:3b:00.0"
    device.mkdir(parents=True)
    node = tmp_path / "devices/system/node/node1"
    node.mkdir(parents=True)
    (node / "cpulist").write_text("0-1,4,900-903\n")
    (device / "numa_node").write_text("1\n")
    assert cpus_near("0000:3B:00.0", tmp_path) == {0, 1, 4} & os.sched_getaffinity(0)
    (device / "numa_node").write_text("-1\n")
    assert cpus_near("0000:3b:00.0", tmp_path) is None
    assert cpus_near("0000:ff:00.0", tmp_path) is None
    assert cpus_near("", tmp_path) is None
