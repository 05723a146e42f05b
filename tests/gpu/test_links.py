"""The links of a GPU: memory that is pinned at once, and small copies that do not wait behind large ones.

These two compare seconds with a line, which tests otherwise do not: decision 9 rests on them.
"""

from contextlib import closing
from pathlib import Path
from statistics import median
from time import perf_counter, sleep

import pytest

from engine.devices.cuda import CudaDevice
from engine.devices.facts import free_host_memory
from engine.memory.lane import LaneName
from engine.memory.memory import Memory
from engine.memory.ring import PACED_BYTES, HostPlace, Item, Ring
from engine.tiers import TierName
from engine.units import GIB, MIB, format_bytes
from tests.gpu.on_gpu import ON_A_GPU, tell

pytestmark = ON_A_GPU

LAYER, GROUP = 512 * MIB, MIB
"""Bytes of a large model's layer, and of some keys and values."""
MOST_BEHIND_S = 0.005
REPEATS = 9
PIECES, PAUSE_S = 4, 0.0002
"""Pieces of the weights that have come when keys are asked for, and how often that is looked at."""
ARENA, ARENA_S, ENOUGH_HOST = 8 * GIB, 2.0, 32 * GIB


def test_keys_and_values_behind_a_layers_weights_are_there_within_five_milliseconds(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    room = 2 * (LAYER + GROUP)
    with closing(CudaDevice(0)) as device:
        memory = Memory(device, {TierName.DEVICE: room, TierName.HOST: room, TierName.DISK: 0}, tmp_path)
        weights, keys = (HostPlace(memory.allocate(TierName.HOST, size, "test").data) for size in (LAYER, GROUP))
        with (
            closing(Ring(memory, what="weights", slot_bytes=LAYER, num_slots=1, from_files=False)) as of_weights,
            closing(Ring(memory, what="KV cache", slot_bytes=GROUP, num_slots=1, from_files=False)) as of_keys,
            device.computing(),
        ):
            found = [seconds_behind(memory, of_weights, of_keys, weights, keys) for _ in range(REPEATS)]
    behind, whole = median(pair[0] for pair in found), median(pair[1] for pair in found)
    worst = max(pair[0] for pair in found)
    tell(
        capsys,
        f"keys behind weights: {1000 * behind:.2f} ms in the median, {1000 * worst:.2f} ms at most; the "
        f"{format_bytes(LAYER)} of weights took {1000 * whole:.1f} ms",
    )
    assert behind < whole
    assert behind <= MOST_BEHIND_S


def seconds_behind(
    memory: Memory, of_weights: Ring, of_keys: Ring, weights: HostPlace, keys: HostPlace
) -> tuple[float, float]:
    """From when keys are asked for in the middle of a layer's weights until they are there; and of the weights."""
    device = memory.device
    memory.traffic.take()
    begin = perf_counter()
    of_weights.begin([Item("weights", weights, LAYER)])
    there = 0
    while there < PIECES * PACED_BYTES:  # from then on the link is busy with one piece, and another waits
        sleep(PAUSE_S)
        there += memory.traffic.take().num_bytes.get(LaneName.HOST_TO_DEVICE, 0)
    asked = perf_counter()
    of_keys.begin([Item("KV cache", keys, GROUP)])
    with of_keys.enter(keys):
        device.compute_mark().wait()
    behind = perf_counter() - asked
    with of_weights.enter(weights):
        device.compute_mark().wait()
    return behind, perf_counter() - begin


def test_a_large_arena_is_pinned_in_two_seconds(capsys: pytest.CaptureFixture[str]) -> None:
    free = free_host_memory()
    if free < ENOUGH_HOST:
        pytest.skip(f"{format_bytes(free)} of host memory are free, and this wants {format_bytes(ENOUGH_HOST)}")
    with closing(CudaDevice(0)) as device:
        begin = perf_counter()
        memory = device.allocate_host(ARENA)
        seconds = perf_counter() - begin
        assert memory.is_pinned()
        del memory
    tell(capsys, f"pinning {format_bytes(ARENA)} took {seconds:.2f} s")
    assert seconds <= ARENA_S
