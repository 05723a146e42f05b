"""Closing: the device is waited for first, every part is closed whatever the others do, the first error is told."""

import gc
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from engine.activations import Activations
from engine.attention.attention import Attention
from engine.devices.host import HostDevice
from engine.devices.simulated import SimulatedDevice
from engine.engine import Engine
from engine.errors import DeviceFailed, EngineError
from engine.executor import Executor
from engine.loading import load_engine
from engine.memory.closing import run_all
from engine.memory.device import Device
from engine.memory.ring import Ring
from engine.memory.spill import DiskTier
from engine.memory.tier import Block
from engine.planner.plan import PlanOptions
from engine.request import Generate, Request, SamplingParams
from engine.tiers import Shares, TierName
from engine.units import MIB
from engine.weights.stream import WeightStream

SPREAD = PlanOptions(
    weights=Shares(0, 0, 100), kv=Shares(0, 50, 50), activations="disk", micro_batch=64, device_memory=32 * MIB,
    host_memory=32 * MIB, disk_space=32 * MIB,
)  # fmt: skip
PARTS = [Attention, Activations, WeightStream, DiskTier, SimulatedDevice]
"""In the order in which they are closed."""
IN_ORDER = ["SimulatedDevice.synchronize", *(f"{part.__name__}.close" for part in PARTS)]


@pytest.fixture
def closed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What was ended, in order."""
    order: list[str] = []
    for kind, name in [(SimulatedDevice, "synchronize"), *((part, "close") for part in PARTS)]:
        monkeypatch.setattr(kind, name, noted(f"{kind.__name__}.{name}", getattr(kind, name), order))
    return order


def noted(what: str, original: Callable[[object], None], order: list[str]) -> Callable[[object], None]:
    def call(self: object) -> None:
        order.append(what)
        original(self)

    return call


def fail(monkeypatch: pytest.MonkeyPatch, kind: type, name: str, error: BaseException) -> None:
    """After its work, so that nothing is left running."""
    original = getattr(kind, name)

    def failing(self: object) -> None:
        original(self)
        raise error

    monkeypatch.setattr(kind, name, failing)


def used(model: Path, device: Device) -> Engine:
    """An engine that has run, with a ring that reads ahead."""
    engine = load_engine(model, SPREAD, device=device)
    list(engine.run([Request(0, Generate("a b", SamplingParams(max_new_tokens=3)))]))
    return engine


def test_the_device_is_waited_for_before_anything_is_freed(tiny_model: Path, closed: list[str]) -> None:
    engine = used(tiny_model, SimulatedDevice())
    engine.close()
    assert closed == IN_ORDER
    engine.close()
    assert closed == IN_ORDER


@pytest.mark.parametrize("failing", [(SimulatedDevice, "synchronize"), *((part, "close") for part in PARTS[:-1])])
def test_one_part_that_fails_leaves_no_other_open(
    failing: tuple[type, str], tiny_model: Path, closed: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    first = DeviceFailed("first")
    fail(monkeypatch, *failing, first)
    fail(monkeypatch, SimulatedDevice, "close", RuntimeError("second"))
    engine = used(tiny_model, SimulatedDevice())
    with pytest.raises(DeviceFailed) as told:
        engine.close()
    assert told.value is first
    assert closed == IN_ORDER
    assert all(tier.used == 0 for tier in engine.tiers.values())


def test_what_went_wrong_while_loading_is_told_and_not_what_followed(
    tiny_model: Path, closed: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(self: object, *_: object) -> None:
        raise EngineError("the reason")

    monkeypatch.setattr(Executor, "__init__", refuse)
    for part in (SimulatedDevice, Attention, DiskTier):
        fail(monkeypatch, part, "close", RuntimeError("a consequence"))
    with pytest.raises(EngineError, match="the reason"):
        load_engine(tiny_model, SPREAD, device=SimulatedDevice())
    assert closed == IN_ORDER


def test_a_ring_that_fails_leaves_no_memory_of_the_cache(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As an event does on a GPU whose context is lost: with no error of the engine's own."""
    engine = used(tiny_model, SimulatedDevice())
    fail(monkeypatch, Ring, "close", RuntimeError("CUDA error"))
    with pytest.raises(RuntimeError, match="CUDA error"):
        engine.close()
    assert all(tier.used == 0 for tier in engine.tiers.values())


def test_every_step_is_taken_and_the_first_error_raised() -> None:
    taken: list[int] = []

    def step(number: int, error: BaseException | None) -> Callable[[], None]:
        def take() -> None:
            taken.append(number)
            if error is not None:
                raise error

        return take

    errors = [None, KeyboardInterrupt(), ValueError(), None]
    with pytest.raises(KeyboardInterrupt):
        run_all(step(number, error) for number, error in enumerate(errors))
    assert taken == [0, 1, 2, 3]
    run_all([])


@pytest.mark.parametrize("device", [SimulatedDevice, HostDevice])
def test_an_engine_that_was_closed_keeps_no_memory(tiny_model: Path, device: Callable[[], Device]) -> None:
    """Whoever still has it, as an error's traceback may, does not keep its blocks alive: a GPU's would not be free."""
    engine = used(tiny_model, device())
    starts = {block.data.untyped_storage().data_ptr() for block in held_blocks()}
    assert starts
    engine.close()
    gc.collect()
    kept = [each for each in gc.get_objects() if type(each) is torch.Tensor]
    assert not [each for each in kept if each.untyped_storage().data_ptr() in starts]
    assert not engine.tiers[TierName.DEVICE].used


def held_blocks() -> list[Block]:
    return [each for each in gc.get_objects() if type(each) is Block and each._data is not None]
