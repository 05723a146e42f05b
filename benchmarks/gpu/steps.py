"""What ``make gpu`` runs, and how: each step is a command of its own, whose words go to the terminal and to a log."""

import os
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

from benchmarks.claims.claim import Claim, Machine
from benchmarks.claims.listed import CLAIMS

ROOT = Path(__file__).resolve().parents[2]
_ON_THE_DEVICE = "benchmarks.generate"
"""The module that computes on the GPU where there is one, and elsewhere on the CPU."""


@dataclass(frozen=True, slots=True)
class Step:
    """One command."""

    name: str
    sentence: str
    """What it is for."""
    command: tuple[str, ...]
    """A module and its arguments, as after ``python -m``."""


@dataclass(frozen=True, slots=True)
class Ran:
    """A step that was run."""

    step: Step
    seconds: float
    code: int
    """Its exit code."""
    last_words: str
    """The last line that it printed."""


def needs_gpu(claim: Claim) -> bool:
    """Whether a claim says something of a GPU: it has a line of its own for one, or its command computes on it."""
    has_own = isinstance(claim.line, Mapping) and Machine.CUDA in claim.line
    return has_own or (claim.command[0] == _ON_THE_DEVICE and claim.line_for(Machine.CUDA) is not None)


STEPS = (
    Step("tests", "what only a GPU can test", ("pytest", "tests/gpu")),
    Step("measure", "`overnight doctor --measure`", ("cli", "doctor", "--measure")),
    Step("demo", "`overnight demo`", ("cli", "demo")),
    Step("streamed", "`overnight run` of a model that the GPU cannot hold", ("benchmarks.gpu.streamed",)),
    Step(
        "claims",
        "the claims that compute on a GPU, into `benchmarks/RESULTS.md`",
        ("benchmarks.claims", *(claim.name for claim in CLAIMS if needs_gpu(claim))),
    ),
)
"""In the order in which they are run."""


def run_in_turn(steps: Sequence[Step], log: TextIO, home: Path) -> list[Ran]:
    """Run steps up to the first that fails; ``home`` is where all state of theirs goes."""
    ran: list[Ran] = []
    for step in steps:
        ran.append(run(step, log, home))
        if ran[-1].code:
            break
    return ran


def run(step: Step, log: TextIO, home: Path) -> Ran:
    """Run one step to its end."""
    command = [sys.executable, "-m", *step.command]
    environment = {**os.environ, "OVERNIGHT_HOME": str(home), "PYTHONUNBUFFERED": "1"}
    _tell(f"== {step.name}: python -m {' '.join(step.command)}", log)
    begin, last_words = time.monotonic(), ""
    with subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        encoding="utf-8", errors="replace",
    ) as process:  # fmt: skip
        for line in _lines(process):
            _tell(line, log)
            last_words = line.strip() or last_words
    seconds = time.monotonic() - begin
    _tell(f"== {step.name} ended with {process.returncode} after {seconds:.0f} s", log)
    return Ran(step, seconds, process.returncode, last_words)


def _lines(process: "subprocess.Popen[str]") -> Iterator[str]:
    assert process.stdout is not None
    for line in process.stdout:
        yield line.rstrip("\n")


def _tell(line: str, log: TextIO) -> None:
    """At once, to both: whoever looks at the log of a step that hangs shall see where it does."""
    for stream in (sys.stdout, log):
        stream.write(f"{line}\n")
        stream.flush()
