"""Nothing that the engine does at the same time touches the same bytes; without any one of its waits, something does.

The waits are found in the source, so that a new one is held to the same.
"""

import ast
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

import engine
from engine import Engine, Generate, PlanOptions, Request, SamplingParams
from engine.attention.table import Kernel, kernel_for
from engine.dtypes import DType
from engine.formats.int4_sizes import Int4
from engine.loading import load_engine
from engine.memory import ring
from engine.memory.lane import REACHED, LaneName, ThreadLane
from engine.units import KIB
from engine.weights.importing import import_checkpoint
from tests.engine import llama_checkpoints
from tests.engine.checkpoints import make_checkpoint
from tests.engine.like_cuda import CARDS, Card
from tests.engine.placements import BESIDE_A_DEVICE, PLACEMENTS, options_of
from tests.engine.planned import WIDE, decide_by_measuring
from tests.engine.races import CheckedDevice, Position, Trace, watch
from tests.engine.test_late import requests

ROOT = Path(engine.__file__).parent
NOT_WAITS_OF_THE_SCHEDULE = (
    "devices", "memory/lane.py", "memory/traffic.py", "attention/workers.py", "memory/closing.py", "measure/",
)  # fmt: skip
"""What implements waiting, what watches it, threads that never outlive one call, and stopwatches."""
NOT_FOR_SAFETY = {
    "stage.py:Stage.settle: self.memory.device.compute_mark().wait()",
    "attention/elsewhere.py:Elsewhere.settle: settle(event)",
    "memory/ring.py:Ring._copy_in: given.popleft().wait()",
}
"""Where memory would be safe without: what a run has moved is counted when it has ended; and large copies are paced."""
PACED_BYTES = 16 * KIB
"""So few that copies of these small models are made in several pieces, as those of large ones are."""
NARROW = "weights cast as they are staged"
PACKED = {f"{name}, in four bits": name for name in ("split", "all-host", "split-and-attended-on-host")}
"""Weights that are unpacked in each pass, those on the device, too."""
PLACED = (*PLACEMENTS, *BESIDE_A_DEVICE, NARROW, *PACKED)


def is_wait(node: ast.Call) -> bool:
    """A call of ``wait``, ``compute_after`` or ``settle``, or a copy, which comes after something."""
    if isinstance(node.func, ast.Name):
        return node.func.id == "settle"
    if not isinstance(node.func, ast.Attribute):
        return False
    waits = node.func.attr == "wait" and not node.args
    copies = node.func.attr == "copy" and len(node.args) == 3 and ast.unparse(node.args[2]) != "REACHED"
    return waits or node.func.attr == "compute_after" or copies


def functions(tree: ast.Module) -> Iterator[tuple[str, ast.FunctionDef]]:
    for outer in tree.body:
        if isinstance(outer, ast.FunctionDef):
            yield outer.name, outer
        elif isinstance(outer, ast.ClassDef):
            yield from (
                (f"{outer.name}.{inner.name}", inner) for inner in outer.body if isinstance(inner, ast.FunctionDef)
            )


def waits() -> dict[str, list[Position]]:
    """Every wait of the engine: where it is, for people and for a trace."""
    found: dict[str, list[Position]] = {}
    for path in sorted(ROOT.rglob("*.py")):
        relative = path.relative_to(ROOT).as_posix()
        if relative.startswith(NOT_WAITS_OF_THE_SCHEDULE):
            continue
        for name, function in functions(ast.parse(path.read_text())):
            for node in ast.walk(function):
                if isinstance(node, ast.Call) and is_wait(node):
                    assert node.end_lineno is not None
                    assert node.end_col_offset is not None
                    same = found.setdefault(f"{relative}:{name}: {ast.unparse(node)}", [])
                    same.append((str(path), node.end_lineno, node.end_col_offset))
    return found


def options(name: str, dtype: DType) -> PlanOptions:
    # More micro-batches than a ring has buffers, so that each buffer is used again within a pass.
    more = {"micro_batch": 24, "micro_batches": 4, "extent_tokens": 16, "dtype": dtype, "stay_packed": True}
    if name == "attended-on-host":
        more["micro_batches"] = 1
    if name in PACKED:
        more["kv_format"] = "int4"
    return options_of("all-device" if name == NARROW else PACKED.get(name, name), **more)


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Hugging Face folder with a model that is larger than what else a plan needs."""
    return make_checkpoint(tmp_path_factory.mktemp("races") / "wide", **WIDE).folder


class Traced(NamedTuple):
    """What was done on a card under each placement, loading and closing included."""

    card: Card
    traces: dict[str, Trace]


@pytest.fixture(scope="module", params=[Card(None, DType.FLOAT32), *CARDS.values()], ids=["no card", *CARDS])
def traced(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Traced:
    card: Card = request.param
    folder = tmp_path_factory.mktemp("races")
    other = DType.FLOAT32 if card.dtype is DType.BFLOAT16 else DType.BFLOAT16
    make_checkpoint(folder / "hf", num_hidden_layers=4)
    for dtype in (card.dtype, other):
        import_checkpoint(folder / "hf", folder / dtype, dtype=dtype)
    import_checkpoint(folder / "hf", folder / "int4", dtype=card.dtype, matrices=Int4(32))
    traces = {}
    for name in PLACED:
        traces[name] = Trace()
        model_dir = folder / ("int4" if name in PACKED else other if name == NARROW else card.dtype)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(ring, "PACED_BYTES", PACED_BYTES)
            device = watch(traces[name], patch, card.capability)
            with load_engine(model_dir, options(name, card.dtype), device=device) as loaded:
                asked = requests()
                if name == "attended-on-host":
                    # So many that some are in one micro-batch: their queries are gathered before they go to the host.
                    asked += [replace(each, key=("again", each.key)) for each in asked]
                assert len(list(loaded.run(asked))) == len(asked)
    return Traced(card, traces)


@pytest.mark.parametrize("name", PLACED)
def test_nothing_races(name: str, traced: Traced) -> None:
    assert [str(race) for race in traced.traces[name].races(most=5)] == []


@pytest.mark.parametrize(
    ("name", "card"),
    [
        ("all-host", Card(None, DType.FLOAT32)),
        ("split", CARDS["7.5 in float16"]),
        ("split-and-attended-on-host", CARDS["8.0 in bfloat16"]),
    ],
)
def test_nothing_races_where_keys_are_packed_by_windows(
    name: str, card: Card, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Which are filled by chunks of prompts, and by generated tokens."""
    llama_checkpoints.make_checkpoint(tmp_path / "hf", "llama, grouped queries")
    import_checkpoint(tmp_path / "hf", tmp_path / "model", dtype=card.dtype)
    sampling = SamplingParams(max_new_tokens=4, ignore_eos=True)
    asked = [Request(length, Generate("x" * length, sampling)) for length in (5, 61, 90, 126)]
    trace = Trace()
    placed = replace(options(name, card.dtype), kv_format="int4", disk_dir=tmp_path)
    with load_engine(tmp_path / "model", placed, device=watch(trace, monkeypatch, card.capability)) as loaded:
        assert len(list(loaded.run(asked))) == len(asked)
    assert [str(race) for race in trace.races(most=5)] == []


def test_without_any_one_wait_something_does(traced: Traced) -> None:
    """On each card by itself, since each attends with a kernel of its own."""
    waited = set().union(*(trace.positions() for trace in traced.traces.values()))
    never = {name for name, positions in waits().items() if not waited.issuperset(positions)}
    assert never == set(), "no placement waits there"
    superfluous = {
        name
        for name, positions in waits().items()
        for position in positions
        if not any(trace.races(without=position) for trace in traced.traces.values())
    }
    assert superfluous == NOT_FOR_SAFETY, "not needed"


@pytest.mark.parametrize("card", CARDS.values(), ids=CARDS)
def test_nothing_races_where_the_machine_is_measured_and_the_plan_searched_for(
    card: Card, wide: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import_checkpoint(wide, tmp_path / "model", dtype=card.dtype)
    trace = Trace()
    device = watch(trace, monkeypatch, card.capability)
    decision = decide_by_measuring(tmp_path / "model", requests(), device, tmp_path)
    with Engine.load(tmp_path / "model", decision.plan, device=device, expects=decision.expects) as loaded:
        assert loaded.plan.dtype == card.dtype
        assert len(list(loaded.run(requests()))) == 3
    assert [str(race) for race in trace.races(most=5)] == []


def test_the_cards_attend_with_either_kernel() -> None:
    assert {kernel_for(card.dtype, card.capability) for card in CARDS.values()} == set(Kernel)


def test_the_waits_are_found() -> None:
    """At least those that every schedule must have."""
    assert {"weights/stream.py", "memory/ring.py"} <= {name.partition(":")[0] for name in waits()}
    assert len(waits()) >= 10


@pytest.mark.parametrize("in_order", [True, False])
def test_two_copies_to_the_same_bytes_need_an_order(in_order: bool) -> None:
    trace = Trace()
    device = CheckedDevice(trace)
    memory, host = device.allocate(64), device.allocate_host(64)
    ready = device.compute_mark()
    up = device.copy(LaneName.HOST_TO_DEVICE, [(memory[:48], host[:48])], ready)
    device.copy(LaneName.DEVICE_TO_HOST, [(host[48:], memory[40:56])], up if in_order else ready)
    assert bool(trace.races()) is not in_order


@pytest.mark.parametrize("one_thread", [True, False])
def test_copies_of_one_lane_are_in_order_if_one_thread_gave_them(
    one_thread: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As with CUDA's streams, which are a thread's own: that they share a link orders nothing."""
    trace = Trace()
    device = watch(trace, monkeypatch)
    memory, host = device.allocate(64), device.allocate_host(64)
    ready = device.compute_mark()

    def copy() -> None:
        device.copy(LaneName.HOST_TO_DEVICE, [(memory, host)], ready)

    copy()
    if one_thread:
        copy()
    else:
        lane = ThreadLane(LaneName.HOST_TO_DEVICE)
        lane.submit(copy)
        lane.close()
    assert bool(trace.races()) is not one_thread


@pytest.mark.parametrize("touches", [True, False])
def test_a_view_touches_nothing_though_it_is_made_in_place(touches: bool) -> None:
    trace = Trace()
    device = CheckedDevice(trace)
    memory, host = device.allocate(64), device.allocate_host(64)
    device.copy(LaneName.DEVICE_TO_HOST, [(host, memory)], device.compute_mark())
    with device.computing():
        memory.add_(1) if touches else memory.unsqueeze_(0)
    assert bool(trace.races()) is touches


@pytest.mark.parametrize("waited", [True, False])
def test_compute_waits_for_a_lane_and_what_it_did(waited: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    trace = Trace()
    device = watch(trace, monkeypatch)
    memory, host = device.allocate(64), device.allocate_host(64)
    events = [device.compute_mark()]
    lane = ThreadLane(LaneName.HOST_TO_DEVICE)
    filled = lane.submit(lambda: events.append(device.copy(LaneName.HOST_TO_DEVICE, [(memory, host)], events[0])))
    if waited:
        filled.wait()
    lane.close()
    device.compute_after(events[1] if waited else REACHED)
    with device.computing():
        memory.add_(1)
    assert bool(trace.races()) is not waited
    assert torch.equal(memory, host + 1)
