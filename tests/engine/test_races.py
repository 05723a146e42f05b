"""Nothing that the engine does at the same time touches the same bytes; without any one of its waits, something does.

The waits are found in the source, so that a new one is held to the same.
"""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import engine
from engine import PlanOptions
from engine.loading import load_engine
from engine.memory.lane import REACHED, LaneName, ThreadLane
from tests.engine.placements import BESIDE_A_DEVICE, PLACEMENTS, options_of
from tests.engine.races import CheckedDevice, Position, Trace, watch
from tests.engine.test_late import make_models, requests

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
NARROW = "weights cast as they are staged"


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


def options(name: str) -> PlanOptions:
    # More micro-batches than a ring has buffers, so that each buffer is used again within a pass.
    more = {"micro_batch": 24, "micro_batches": 4, "extent_tokens": 16}
    return options_of("all-device", dtype="float32", **more) if name == NARROW else options_of(name, **more)


@pytest.fixture(scope="module")
def traces(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Trace]:
    """What is done under each placement, loading and closing included."""
    models = make_models(tmp_path_factory.mktemp("races"))
    found = {}
    for name in (*PLACEMENTS, *BESIDE_A_DEVICE, NARROW):
        found[name] = Trace()
        with (
            pytest.MonkeyPatch.context() as patch,
            load_engine(
                models["narrow" if name == NARROW else "model"], options(name), device=watch(found[name], patch)
            ) as loaded,
        ):
            assert len(list(loaded.run(requests()))) == 3
    return found


@pytest.mark.parametrize("name", [*PLACEMENTS, *BESIDE_A_DEVICE, NARROW])
def test_nothing_races(name: str, traces: dict[str, Trace]) -> None:
    assert [str(race) for race in traces[name].races(most=5)] == []


def test_without_any_one_wait_something_does(traces: dict[str, Trace]) -> None:
    superfluous = {
        name
        for name, positions in waits().items()
        for position in positions
        if not any(trace.races(without=position) for trace in traces.values())
    }
    assert superfluous == NOT_FOR_SAFETY, "not needed, or not seen under any placement"


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
