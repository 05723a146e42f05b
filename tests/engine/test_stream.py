"""Weights over the tiers: every pass sees what was stored, and whoever forgets to wait is found out."""

import os
import threading
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from engine.devices.host import HostDevice
from engine.devices.open import facts_of
from engine.devices.simulated import SimulatedDevice
from engine.errors import CheckpointError, EngineError, LaneFailed, TierFull
from engine.memory.aligned import aligned_empty
from engine.memory.device import Device, Event, Pieces
from engine.memory.lane import LaneName
from engine.memory.memory import Memory
from engine.model.family import EMBED, HEAD, NamedWeights, layer_name
from engine.model.registry import family_for
from engine.planner.plan import Plan, PlanOptions
from engine.planner.plan_input import PlanInput
from engine.planner.resolve import resolve_plan
from engine.tiers import Shares, TierName
from engine.units import MIB
from engine.weights.files import WeightFiles
from engine.weights.importing import import_checkpoint
from engine.weights.layout import stored_in
from engine.weights.manifest import read_manifest
from engine.weights.stream import WeightStream
from tests.engine.checkpoints import make_checkpoint, unit_of

NUM_LAYERS = 7
PASSES = 3


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("stream")
    make_checkpoint(folder / "hf", num_hidden_layers=NUM_LAYERS, hidden_size=32, word_embed_proj_dim=32, ffn_dim=64)
    import_checkpoint(folder / "hf", folder / "model")
    return folder / "model"


@dataclass
class Opened:
    files: WeightFiles
    stream: WeightStream
    memory: Memory


Open = Callable[..., Opened]


def stream_of(files: WeightFiles, memory: Memory, plan: Plan) -> WeightStream:
    """As a stage of all layers opens it."""
    layers = {layer_name(index): tier for index, tier in enumerate(plan.layers)}
    units = {EMBED: TierName.DEVICE, **layers, HEAD: TierName.DEVICE}
    return WeightStream(files, memory, units=units, dtype=plan.dtype, num_slots=plan.staging_slots)


@pytest.fixture
def open_stream() -> Iterator[Open]:
    """Opens streams as the engine does, and closes them."""
    opened: list[Opened] = []

    def open_one(model_dir: Path, device: Device, weights: str, dtype: str | None = None) -> Opened:
        manifest = read_manifest(model_dir)
        shares = Shares.parse(weights)
        plan = resolve_plan(
            PlanInput(
                options=PlanOptions(
                    device_memory=32 * MIB, host_memory=32 * MIB, weights=shares, dtype=dtype, micro_batch=16
                ),
                shape=family_for(manifest.config).shape,
                stored=stored_in(manifest),
                device=device.name,
                facts=facts_of(device),
                disk_dir=model_dir,
            )
        )
        memory = Memory(device, plan.budgets, model_dir)
        files = WeightFiles(model_dir, manifest)
        opened.append(Opened(files, stream_of(files, memory, plan), memory))
        return opened[-1]

    yield open_one
    for each in opened:
        each.stream.close()
        each.files.close()
        each.memory.close()
        for tier in each.memory.tiers.values():
            assert tier.used == 0
            tier.check_integrity()


def stored(model_dir: Path, name: str, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    """A unit's tensors as the files have them."""
    with WeightFiles.open(model_dir) as files:
        raw = aligned_empty(files.num_bytes(name))
        files.read_unit(name, raw)
        return {key: tensor.to(dtype) for key, tensor in files.tensors(name, raw).items()}


def assert_same(found: NamedWeights, expected: NamedWeights) -> None:
    assert list(found) == list(expected)
    for key, tensor in expected.items():
        assert found[key].dtype == tensor.dtype
        assert torch.equal(found[key], tensor), key


def make_device(kind: str) -> Device:
    return HostDevice() if kind == "cpu" else SimulatedDevice(delay_s=0.001)


def fetch_all(opened: Opened) -> None:
    """Wait until whatever is fetched ahead is on its way, and out of its file."""
    if (ring := opened.stream._ring) is not None:
        for lane in (ring._reading, ring._copying):
            lane.submit(lambda: None).wait()


@pytest.mark.parametrize("dtype", [None, "bfloat16"])
@pytest.mark.parametrize("kind", ["cpu", "simulated"])
@pytest.mark.parametrize(
    "weights", ["100/0/0", "0/100/0", "0/0/100", "30/40/30", "85/0/15", "85/15/0", "70/15/15", "60/0/40"]
)  # fmt: skip
def test_every_pass_sees_what_is_stored(
    weights: str, kind: str, dtype: str | None, model_dir: Path, open_stream: Open
) -> None:
    """Among the splits: one streamed layer (less than the ring), two (all of it), three."""
    opened = open_stream(model_dir, make_device(kind), weights, dtype)
    wanted = getattr(torch, dtype or "float32")
    expected = {name: stored(model_dir, name, wanted) for name in (EMBED, HEAD, *map(layer_name, range(NUM_LAYERS)))}
    for _ in range(PASSES):
        for index in range(NUM_LAYERS):
            with opened.stream.layer(index) as found:
                fetch_all(opened)
                assert_same(found, expected[layer_name(index)])
        assert_same(opened.stream.embedding(), expected[EMBED])
        assert_same(opened.stream.head(), expected[HEAD])
    layer_bytes = sum(tensor.nbytes for tensor in expected[layer_name(0)].values())
    assert opened.memory.tiers[TierName.DEVICE].used >= layer_bytes * (Shares.parse(weights).device * NUM_LAYERS // 100)


def test_layers_that_fit_into_the_ring_are_read_once(model_dir: Path, open_stream: Open) -> None:
    opened = open_stream(model_dir, HostDevice(), "70/0/30")  # two of seven
    for index in range(NUM_LAYERS):
        with opened.stream.layer(index):
            pass
    opened.memory.traffic.take()
    for index in range(NUM_LAYERS):
        with opened.stream.layer(index):
            pass
    assert opened.memory.traffic.take().weight_bytes == 0


class Impatient(SimulatedDevice):
    """Forgets to wait for copies."""

    def compute_after(self, event: Event) -> None:
        pass


class Hasty(SimulatedDevice):
    """Says that copies are done as soon as they are begun, to the host too."""

    def copy(self, lane: LaneName, pieces: Pieces, after: Event) -> Event:
        super().copy(lane, pieces, after)
        return self.compute_mark()


@pytest.mark.parametrize("weights", ["0/100/0", "0/0/100"])
@pytest.mark.parametrize("faulty", [Impatient, Hasty])
def test_whoever_does_not_wait_for_a_copy_is_found_out(
    faulty: type[SimulatedDevice], weights: str, model_dir: Path, open_stream: Open
) -> None:
    """The link is stopped: whoever looks before it goes on sees NaN, never the right weights by luck."""
    device = faulty()
    opened = open_stream(model_dir, device, weights)
    fetch_all(opened)
    link = device._lanes[LaneName.HOST_TO_DEVICE]
    link.submit(lambda: None).wait()  # the first layers are in the ring
    gate = threading.Event()
    stopped = link.submit(lambda: gate.wait() and None)
    num_slots = len(opened.stream._ring._slots)
    try:
        for index in range(2 * num_slots):
            with opened.stream.layer(index) as found:
                poisoned = [bool(tensor.isnan().all()) for tensor in found.values()]
            assert index < num_slots or all(poisoned)
    finally:
        gate.set()
    stopped.wait()


@pytest.fixture
def own_copy(model_dir: Path, tmp_path: Path) -> Path:
    """A model directory that a test may damage."""
    folder = tmp_path / "model"
    folder.mkdir()
    for path in model_dir.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    return folder


def unit_path(folder: Path, name: str) -> Path:
    return folder / unit_of(read_manifest(folder), name).file


def truncate(path: Path) -> None:
    os.truncate(path, 4096)


def make_unreadable(path: Path) -> None:
    path.unlink()
    path.mkdir()


@pytest.mark.parametrize("kind", ["cpu", "simulated"])
@pytest.mark.parametrize(
    ("damage", "error", "says"),
    [
        (truncate, CheckpointError, "ends after 4096 bytes"),
        (Path.unlink, CheckpointError, "cannot be opened"),
        (make_unreadable, LaneFailed, "Is a directory"),
    ],
)
def test_a_failed_read_surfaces_where_the_layer_is_wanted(
    damage: Callable[[Path], None], error: type[EngineError], says: str, kind: str, own_copy: Path, open_stream: Open
) -> None:
    opened = open_stream(own_copy, make_device(kind), "0/0/100")
    damage(unit_path(own_copy, layer_name(3)))
    for index in range(3):
        with opened.stream.layer(index):
            pass
    for _ in range(2):  # and again: whoever tries once more is told, not kept waiting
        with pytest.raises(error, match=says), opened.stream.layer(3):
            pass


@pytest.mark.parametrize("weights", ["100/0/0", "0/100/0"])
def test_a_failed_read_of_a_resident_layer_leaves_nothing_held(weights: str, own_copy: Path, open_stream: Open) -> None:
    path = unit_path(own_copy, layer_name(5))
    content = bytearray(path.read_bytes())
    content[100] ^= 1
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"layer\.5\S* is damaged: its checksum is wrong; import the model again"):
        open_stream(own_copy, HostDevice(), weights)


def test_layers_are_entered_in_turn(model_dir: Path, open_stream: Open) -> None:
    opened = open_stream(model_dir, HostDevice(), "0/0/100")
    with pytest.raises(EngineError, match=r"layer\.0 is next, and something else is entered"), opened.stream.layer(1):
        pass


def test_a_tier_without_room_is_an_error_and_frees_what_was_taken(model_dir: Path) -> None:
    device = SimulatedDevice()
    manifest = read_manifest(model_dir)
    plan = resolve_plan(
        PlanInput(
            options=PlanOptions(device_memory=32 * MIB, host_memory=32 * MIB, weights=Shares(50, 50, 0)),
            shape=family_for(manifest.config).shape,
            stored=stored_in(manifest),
            device="simulated",
            facts=facts_of(device),
            disk_dir=model_dir,
        )
    )
    memory = Memory(device, {**plan.budgets, TierName.HOST: 50_000}, model_dir)
    files = WeightFiles(model_dir, manifest)
    with closing(files), pytest.raises(TierFull, match="host memory is full: weights needs"):
        stream_of(files, memory, plan)
    assert [tier.used for tier in memory.tiers.values()] == [0, 0, 0]
    memory.close()
