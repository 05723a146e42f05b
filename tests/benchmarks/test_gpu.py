"""`make gpu` on machines without a GPU: what it says there, and how it runs steps and writes its page."""

import datetime
import json
import os
import re
import subprocess
from pathlib import Path

import pytest
import torch

from benchmarks.checkpoints import Checkpoint
from benchmarks.claims.claim import AtLeast, Claim, Machine
from benchmarks.gpu import __main__ as gpu
from benchmarks.gpu import card, page, steps, streamed
from benchmarks.gpu.card import Card
from benchmarks.gpu.steps import STEPS, Ran, Step
from engine.devices import open as opening
from engine.units import GIB

CARD = Card("NVIDIA | L4", "550.54.15", "2.13.0+cu128, CUDA 12.8")


@pytest.fixture
def report(tmp_path: Path) -> Path:
    path = tmp_path / "report.json"
    path.write_text('{"all": "well"}')
    return path


@pytest.fixture
def home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A machine with a card, as far as anybody asks; where its logs go."""
    monkeypatch.setattr(gpu, "why_not", lambda: None)
    monkeypatch.setattr(gpu, "this_card", lambda: CARD)
    monkeypatch.setattr(gpu, "PAGE", tmp_path / "gpu.md")
    monkeypatch.setenv("OVERNIGHT_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


def stub(monkeypatch: pytest.MonkeyPatch, report: Path, *broken: str) -> None:
    """Steps of the same names that print a report, and end well or crash."""
    made = tuple(
        Step(
            each.name, each.sentence, ("tests.benchmarks.crashes" if each.name in broken else "json.tool", str(report))
        )
        for each in STEPS
    )
    monkeypatch.setattr(gpu, "STEPS", made)


# Without a GPU


@pytest.mark.parametrize("has_card", [False, True])
def test_without_a_usable_gpu_one_sentence_says_so_and_nothing_is_run(
    has_card: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    nvidia = tmp_path / "nvidia0"
    if has_card:  # that this PyTorch cannot use
        nvidia.touch()
    monkeypatch.setattr(opening, "_NVIDIA", nvidia)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(gpu, "run_in_turn", None)
    monkeypatch.setattr(gpu, "PAGE", tmp_path / "gpu.md")
    monkeypatch.setenv("OVERNIGHT_HOME", str(tmp_path / "home"))
    assert gpu.main([]) == 3
    said = capsys.readouterr()
    assert said.out == ""
    assert len(said.err.splitlines()) == 1
    assert ("update the driver" if has_card else "please run it where nvidia-smi lists one") in said.err
    assert sorted(tmp_path.iterdir()) == ([nvidia] if has_card else [])


@pytest.mark.parametrize(("given", "passed"), [("STEPS=tests,demo", "--steps=tests,demo"), ("STEPS=", "")])
def test_make_hands_the_steps_on(given: str, passed: str) -> None:
    # Also where this runs within `make test`, which tells a make below it so.
    alone = {name: value for name, value in os.environ.items() if not name.startswith(("MAKE", "MFLAGS"))}
    ran = subprocess.run(["make", "-n", "gpu", given], cwd=steps.ROOT, env=alone, capture_output=True, text=True)
    assert ran.stdout.splitlines()[-1].partition("-m benchmarks.gpu")[2].strip() == passed


# The steps


def test_all_steps_are_run_in_order_and_the_page_says_what_came_of_them(
    home: Path, report: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    stub(monkeypatch, report)
    assert gpu.main(["--steps", ",".join(step.name for step in gpu.STEPS)]) == 0
    said = capsys.readouterr()
    assert re.findall(r"^== (\w+):", said.out, re.MULTILINE) == [step.name for step in STEPS]
    (log,) = home.iterdir()
    assert str(log) in said.out
    assert log.read_text().count('"all": "well"') == len(STEPS)
    text = gpu.PAGE.read_text()
    assert text.count("| passed | } |") == len(STEPS)
    assert "| Card | NVIDIA \\| L4 |" in text
    assert f"| Date | {datetime.datetime.now().year}-" in text
    assert "| PyTorch | 2.13.0+cu128, CUDA 12.8 |" in text
    assert f"| Commit | `{gpu.commit(steps.ROOT)}` |" in text


def test_the_first_step_that_fails_is_the_last_and_the_sentence_says_what_to_send(
    home: Path, report: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    stub(monkeypatch, report, "demo", "streamed")
    assert gpu.main(["--steps", "demo,tests,streamed"]) == 1
    (log,) = home.iterdir()
    said = capsys.readouterr().err
    assert said.startswith("make gpu: the step demo failed; please send us ")
    assert str(log) in said
    assert re.findall(r"^== (\w+):", log.read_text(), re.MULTILINE) == ["tests", "demo"]
    rows = [line for line in gpu.PAGE.read_text().splitlines() if line.startswith("| `")]
    assert [re.findall(r"passed|failed|not run", row)[0] for row in rows] == ["passed", "failed", "not run"]
    assert '{"all": "well"}' in rows[1]


def test_a_step_that_does_not_exist_is_refused(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        gpu.main(["--steps", "tests,everything"])
    assert "'everything' is not a step; they are tests, measure, demo, streamed, claims" in capsys.readouterr().err
    assert not home.exists()


def test_state_goes_where_the_environment_says_else_into_a_folder_that_git_ignores(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("OVERNIGHT_HOME", str(tmp_path))
    assert gpu.home_folder() == tmp_path
    monkeypatch.delenv("OVERNIGHT_HOME")
    assert gpu.home_folder() == steps.ROOT / ".overnight"
    assert "/.overnight/" in (steps.ROOT / ".gitignore").read_text().splitlines()


def test_the_claims_of_a_gpu_are_those_that_compute_on_it() -> None:
    def claim(command: str, line: object) -> Claim:
        return Claim(name="x", sentence="", command=(command,), figure="x", line=line)  # type: ignore[arg-type]

    assert steps.needs_gpu(claim("json.tool", {Machine.CUDA: AtLeast(1)}))
    assert steps.needs_gpu(claim("benchmarks.generate", AtLeast(1)))
    assert not steps.needs_gpu(claim("benchmarks.generate", {Machine.AMX: AtLeast(1)}))
    assert not steps.needs_gpu(claim("json.tool", AtLeast(1)))
    assert len(STEPS[-1].command) > 1, "without a name, all claims would be run"


def test_long_last_words_are_cut() -> None:
    ran = Ran(Step("tests", "all", ("json.tool",)), 12.3, 0, "x" * 1000)
    text = page.text(CARD, datetime.date(2026, 11, 29), "abc1234", [ran.step], [ran])
    assert f"| `tests` | all | 12 | passed | {'x' * 99}… |" in text


def test_a_driver_that_nobody_knows_is_no_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "NVIDIA L4")
    monkeypatch.setattr(card, "_DRIVER", ("a-command-that-is-not-there",))
    assert card.this_card().driver == "unknown"
    monkeypatch.setattr(card, "_DRIVER", ("echo", "550.54.15"))
    assert card.this_card() == Card("NVIDIA L4", "550.54.15", f"{torch.__version__}, CUDA {torch.version.cuda}")


# The model that does not fit


@pytest.mark.parametrize(
    ("card_bytes", "disk_bytes", "made", "shape"),
    [
        (8 * GIB, 1000 * GIB, (), "opt-6.7b"),
        (16 * GIB, 1000 * GIB, (), "opt-13b"),
        (40 * GIB, 1000 * GIB, (), "opt-30b"),
        (40 * GIB, 100 * GIB, (), None),
        (40 * GIB, 100 * GIB, ("opt-30b",), "opt-30b"),
        (80 * GIB, 1000 * GIB, (), None),
        (16 * GIB, 20 * GIB, ("opt-6.7b",), None),
    ],
)
def test_the_smallest_model_is_taken_that_the_card_cannot_hold(
    card_bytes: int, disk_bytes: int, made: tuple[str, ...], shape: str | None
) -> None:
    choice = streamed.choose(card_bytes, disk_bytes, made)
    if shape is not None:
        assert choice == streamed.Choice(shape, None)
        assert streamed.weight_bytes(shape) > card_bytes
    else:
        assert choice.shape == streamed.SMALL
        assert choice.device_memory == streamed.weight_bytes(streamed.SMALL) // 3


@pytest.mark.parametrize("status", ["ok", "error"])
def test_a_streamed_run_is_good_where_every_row_has_an_output(
    status: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: list[list[str]] = []

    def run(command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        asked.append(command)
        rows = [json.loads(line) for line in Path(command[4]).read_text().splitlines()]
        assert all(len(row["prompt"].split()) >= 15 for row in rows)
        last = {"status": status}
        lines = [json.dumps({"status": "ok"})] * (len(rows) - 1) + [json.dumps(last)]
        Path(command[command.index("-o") + 1]).write_text("\n".join(lines))
        return subprocess.CompletedProcess(command, 0)

    class Properties:
        total_memory = 80 * GIB

    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: Properties)
    monkeypatch.setattr(streamed, "make_checkpoint", lambda *_: Checkpoint(tmp_path / "hf", tmp_path / "model"))
    monkeypatch.setattr(subprocess, "run", run)
    assert streamed.main(["--cache-dir", str(tmp_path)]) == (0 if status == "ok" else 1)
    assert f"{streamed.ROWS - (status != 'ok')} of {streamed.ROWS} rows of opt-1.3b" in capsys.readouterr().out
    assert asked[0][5:7] == ["--model", str(tmp_path / "model")]
    assert asked[0][-2:] == ["--device-memory", str(streamed.weight_bytes("opt-1.3b") // 3)]


def test_a_run_that_fails_fails_the_step(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    class Properties:
        total_memory = 8 * GIB

    def fail(command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        assert "--device-memory" not in command
        return subprocess.CompletedProcess(command, 4)

    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: Properties)
    monkeypatch.setattr(streamed, "free_disk_space", lambda _: 1000 * GIB)
    monkeypatch.setattr(streamed, "make_checkpoint", lambda *_: Checkpoint(tmp_path / "hf", tmp_path / "model"))
    monkeypatch.setattr(subprocess, "run", fail)
    assert streamed.main(["--cache-dir", str(tmp_path)]) == 4
