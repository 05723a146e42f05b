"""Every wait in the engine is needed: without any one of them, some run gives a wrong result.

The waits are found in the source, so that a new one is held to the same. Each in turn is cut out of the function that
makes it, and runs on a device whose copies, compute or disk are late must then fail or answer wrongly. With all waits
in place, the same runs answer rightly.
"""

import ast
import copy
import importlib
import inspect
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from types import CodeType, FunctionType
from typing import Any

import pytest
import torch

import engine
from engine import EngineError, Generate, Generation, PlanOptions, Request, SamplingParams, Score
from engine.devices.host import HostDevice
from engine.dtypes import DType
from engine.loading import load_engine
from engine.memory.device import Device
from engine.memory.spill import DiskTier
from engine.tiers import Shares
from engine.units import MIB
from engine.weights.files import WeightFiles
from engine.weights.importers.huggingface import import_checkpoint
from tests.engine.checkpoints import make_checkpoint
from tests.engine.late import LateDevice

ROOT = Path(engine.__file__).parent
NOT_WAITS_OF_THE_SCHEDULE = (
    "devices",
    "memory/lane.py",
    "memory/traffic.py",
    "attention/workers.py",
    "memory/closing.py",
    "measure/",
)
"""What implements waiting, what watches it, threads that never outlive one call, and stopwatches."""
BUDGETS = {"device_memory": 32 * MIB, "host_memory": 32 * MIB, "disk_space": 32 * MIB}
LATE_S = 0.004


@dataclass(frozen=True)
class Site:
    """One wait: a call of ``wait`` or ``compute_after``, or what a copy comes after."""

    path: Path
    function: str
    line: int
    column: int
    text: str

    def __str__(self) -> str:
        return f"{self.path.relative_to(ROOT).as_posix()}:{self.line}:{self.function}: {self.text}"


def waited(node: ast.AST) -> ast.expr | None:
    """The expression that a wait is for, where ``node`` is one."""
    if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
        return None
    if node.func.attr == "wait" and not node.args:
        return node.func.value
    if node.func.attr == "compute_after":
        return node.args[0]
    if node.func.attr != "copy" or len(node.args) != 4 or ast.unparse(node.args[3]) == "REACHED":
        return None
    return node.args[3]


def functions(tree: ast.Module) -> Iterator[tuple[str, ast.FunctionDef]]:
    for outer in tree.body:
        if isinstance(outer, ast.FunctionDef):
            yield outer.name, outer
        elif isinstance(outer, ast.ClassDef):
            for inner in outer.body:
                if isinstance(inner, ast.FunctionDef):
                    yield f"{outer.name}.{inner.name}", inner


def sites() -> list[Site]:
    found = []
    for path in sorted(ROOT.rglob("*.py")):
        if not path.relative_to(ROOT).as_posix().startswith(NOT_WAITS_OF_THE_SCHEDULE):
            for name, function in functions(ast.parse(path.read_text())):
                for node in ast.walk(function):
                    if name.endswith((".close", "settle")):
                        continue  # what is waited for there keeps memory safe and figures whole, not answers right
                    if (event := waited(node)) is not None and isinstance(node, ast.Call):
                        text = ast.unparse(event if len(node.args) == 4 else node)
                        found.append(Site(path, name, event.lineno, event.col_offset, text))
    return found


class Cut(ast.NodeTransformer):
    """Takes one wait out."""

    def __init__(self, site: Site) -> None:
        self.at = (site.line, site.column)
        self.done = False

    def visit_Call(self, node: ast.Call) -> ast.expr:
        event = waited(node)
        if event is not None and not self.done and (event.lineno, event.col_offset) == self.at:
            self.done = True
            if len(node.args) != 4:
                return event
            now = ast.parse("__import__('engine.memory.lane', fromlist=['Reached']).Reached()", mode="eval").body
            node.args[3] = ast.copy_location(now, event)
            return ast.fix_missing_locations(node)
        self.generic_visit(node)
        return node


def without(site: Site) -> tuple[FunctionType, CodeType]:
    """The function that waits, and its code without that wait."""
    tree = ast.parse(site.path.read_text())
    cut = Cut(site)
    code = compile(cut.visit(copy.deepcopy(tree)), str(site.path), "exec")
    assert cut.done
    relative = site.path.relative_to(ROOT.parent).with_suffix("")
    target: Any = importlib.import_module(".".join(relative.parts))
    for part in site.function.split("."):
        target = getattr(target, part)
        code = next(c for c in code.co_consts if isinstance(c, CodeType) and c.co_name == part)
    return inspect.unwrap(target), code


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

    def later(self, times: int) -> "Case":
        return replace(
            self,
            link_s=times * self.link_s,
            compute_s=times * self.compute_s,
            disk_s=times * self.disk_s,
            spill_s=times * self.spill_s,
        )


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


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("waits")
    make_checkpoint(folder / "hf", num_hidden_layers=4)
    import_checkpoint(folder / "hf", folder / "model")
    import_checkpoint(folder / "hf", folder / "narrow", dtype=DType.BFLOAT16)
    return {name: folder / name for name in ("model", "narrow")}


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
def test_with_every_wait_the_answers_are_right(
    name: str,
    models: dict[str, Path],
    expected: dict[str, dict[object, object]],
    late_disk: Callable[[float, float], None],
) -> None:
    assert run_case(CASES[name], models, late_disk) == expected[CASES[name].model]


@pytest.mark.parametrize("site", sites(), ids=str)
def test_without_a_wait_they_are_not(
    site: Site,
    models: dict[str, Path],
    expected: dict[str, dict[object, object]],
    late_disk: Callable[[float, float], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    function, code = without(site)
    monkeypatch.setattr(function, "__code__", code)
    # The placements that move most of what this wait is about come first.
    of_weights = site.path.parent.name == "weights"
    cases = sorted(CASES.values(), key=lambda case: of_weights != (case.options.kv == Shares(100, 0, 0)))
    # Lateness is relative: where the machine itself holds the run up, what is late must be later still to be seen.
    for case in [case.later(times) for times in (1, 1, 4, 16, 64) for case in cases]:
        try:
            found = run_case(case, models, late_disk)
        except (EngineError, RuntimeError, IndexError):
            return
        if found != expected[case.model]:
            return
    pytest.fail(f"nothing fails without {site}: it is not needed, or a late device must be made later")


def test_the_waits_are_found() -> None:
    """Of those that a schedule of any kind must have."""
    files = {site.path.relative_to(ROOT).as_posix() for site in sites()}
    assert {"weights/stream.py", "memory/ring.py"} <= files
    assert len(sites()) >= 8
