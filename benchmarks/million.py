"""A million rows through every command: ``python -m benchmarks.million``.

How long enqueue takes and how much memory, when the first output is there, how quick `status` is meanwhile, and what
cancel and prune cost, themselves and for others. Each figure stands beside its line; exit code 1 when one is missed.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

from benchmarks.chaos import MODEL, ROOT, Round, make_models
from storage.jobs import get_job

LINES = {
    "enqueue_s": 60.0,
    "enqueue_mib": 200.0,
    "first_output_s": 30.0,
    "status_s": 0.6,
    "small_status_s": 0.4,
    "cancel_s": 5.0,
    "prune_s": 60.0,
    "blocked_s": 1.0,
    "file_left": 0.9,
}
"""At most; `file_left` is the share of the database file's size that is left after prune."""


@dataclass(frozen=True, slots=True)
class Ran:
    """One command, as a process."""

    seconds: float
    mib: float
    """The most memory it had."""
    out: str


def command(environ: dict[str, str], *words: str, stdin: Path | None = None) -> Ran:
    """Run `overnight` with these words to its end.

    Raises:
        RuntimeError: it failed; its last words are in the text.
    """
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        source = stdin.open("rb") if stdin is not None else subprocess.DEVNULL
        began = time.monotonic()
        child = subprocess.Popen(
            [sys.executable, "-m", "cli", *words], env=environ, cwd=ROOT, stdin=source, stdout=out, stderr=err
        )
        peak = 0
        while child.poll() is None:
            peak = max(peak, _peak_kib(child.pid))
            time.sleep(0.01)
        seconds = time.monotonic() - began
        out.seek(0)
        err.seek(0)
        if child.returncode != 0:
            raise RuntimeError(f"overnight {' '.join(words)}: {err.read().decode(errors='replace')[-500:]}")
        return Ran(seconds, peak / 1024, out.read().decode())


def _peak_kib(pid: int) -> int:
    """The most memory that a process had so far. (What the kernel tells at its end begins with its parent's.)"""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) for line in lines if line.startswith("VmHWM:")), 0)


@dataclass(slots=True)
class Probe:
    """Times one command again and again beside another."""

    run: Callable[[], Ran]
    seconds: list[float] = field(default_factory=list)

    @contextmanager
    def beside(self) -> Iterator[None]:
        """While the block runs, and once after it."""
        over = threading.Event()

        def again() -> None:
            while True:
                self.seconds.append(self.run().seconds)
                if over.wait(0.2):
                    return

        thread = threading.Thread(target=again)
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join()


def write_rows(path: Path, rows: int) -> None:
    """Short prompts, as JSON lines."""
    with path.open("w") as file:
        for index in range(rows):
            file.write(json.dumps({"id": f"row-{index}", "prompt": f"w{10 + index % 80} w{11 + index % 70}"}) + "\n")


def measure(models: Path, rows: int) -> dict[str, float]:
    """The figures, named as in ``LINES``."""
    figures: dict[str, float] = {}
    with tempfile.TemporaryDirectory(prefix="million-") as folder:
        place = Round(Path(folder), models, Random(0))
        place.begin_empty()
        try:
            place.add_worker("--model", MODEL, micro_batch=512)
            environ = place.helpers[0].environ
            dataset, small = Path(folder) / "rows.jsonl", Path(folder) / "small.jsonl"
            write_rows(dataset, rows)
            write_rows(small, 5)
            asked = ("--model", MODEL, "--task", "generate", "--max-new-tokens", "4")

            def status() -> Ran:
                return command(environ, "status")

            first = int(command(environ, "enqueue", str(small), *asked).out)
            while not get_job(place.database, first).is_finished:
                time.sleep(0.05)
            figures["small_status_s"] = sorted(status().seconds for _ in range(5))[2]
            probe = Probe(status)
            with probe.beside():
                enqueued = command(environ, "enqueue", str(dataset), *asked)
                figures["enqueue_s"], figures["enqueue_mib"] = enqueued.seconds, enqueued.mib
                job_id = int(enqueued.out)
                began = time.monotonic()
                while get_job(place.database, job_id).num_done == 0:
                    time.sleep(0.05)
                figures["first_output_s"] = time.monotonic() - began
                time.sleep(20)
            figures["status_s"] = max(probe.seconds)
            figures["cancel_s"] = command(environ, "cancel", str(job_id)).seconds
            path = Path(str(place.database.path))
            before = path.stat().st_size
            probe = Probe(status)
            quiet = figures["small_status_s"]
            with probe.beside():
                figures["prune_s"] = command(environ, "prune", "--older-than", "0m").seconds
            figures["blocked_s"] = max(probe.seconds) - quiet
            figures["file_left"] = path.stat().st_size / before
        finally:
            place.end()
    return figures


def main() -> int:
    """Prints each figure beside its line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.million", description=__doc__)
    parser.add_argument("--rows", type=int, default=1_000_000)
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="million-models-") as folder:
        models = make_models(Path(folder), lambda text: print(text, file=sys.stderr))
        figures = measure(models, asked.rows)
    report: dict[str, Any] = {
        name: {"measured": round(value, 3), "at_most": LINES[name], "met": value <= LINES[name]}
        for name, value in figures.items()
    }
    print(json.dumps({"rows": asked.rows, **report}, indent=1))
    return 0 if all(each["met"] for each in report.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
