"""One measurement in a process of its own: what it is asked (``Job``), and how it is started and heard."""

import json
import os
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Self

from benchmarks import caps
from benchmarks.bound import COMPUTE
from benchmarks.slices import Slices, take_turns
from benchmarks.workload import Item, Range, Workload
from engine.units import KIB

_ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """What a measuring process needs to know."""

    role: str
    """``ours``, ``profile`` (measure the machine for the planner), ``limits`` or the name of a peer."""
    shape: str
    dtype: str
    device: str
    weights: str
    """``device``, ``host`` or ``disk``; ``planned``: where the planner finds best."""
    folder: str
    model_dir: str
    workload: Workload
    num_requests: int
    batch: int = 1
    """Requests that a peer computes together."""
    schedule: str | None = None
    device_memory: int | None = None
    memory_cap: int | None = None
    micro_batch: int | None = None
    micro_batches: int | None = None
    plain_dir: str | None = None
    """The model with plain weights, where ``model_dir`` has others, or the cache is packed: what ``plain`` runs."""
    kv_format: str | None = None
    disk_rate: int | None = None
    """Bytes/s that the disk may be read at; ``None``: as fast as it is."""
    profile: dict[str, object] | None = None
    """This machine's, from which to plan."""
    until: str | None = None
    """Limits: measure products over and over until there is a file of this name."""
    keep_tokens: bool = False
    """Give the generated tokens back, to compare them."""

    def items(self) -> list[Item]:
        """The requests to run."""
        return self.workload.items(self.num_requests)

    def to_json(self) -> str:
        """For ``from_json``."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Self:
        """A job from another process."""
        values = json.loads(text)
        workload = values.pop("workload")
        prompt, out = (Range(**workload.pop(name)) for name in ("prompt", "out"))
        return cls(workload=Workload(prompt=prompt, out=out, **workload), **values)


@dataclass(frozen=True, slots=True)
class Finished:
    """What a measuring process found, or why it found nothing."""

    result: dict[str, Any] | None
    error: str | None

    def of(self, key: str) -> Any:
        """One finding.

        Raises:
            JobFailed: there are none.
        """
        if self.result is None:
            raise JobFailed(self.error or "no result")
        return self.result[key]


class JobFailed(Exception):
    """A measuring process that had to succeed did not; the message says why, for people."""


def measure(job: Job, cap: caps.Cap | None, *, timeout_s: float) -> Finished:
    """Run ``job`` in a new process, in the memory group ``cap`` if there is one, with nothing of its files cached."""
    caps.forget_cached([Path(job.folder), Path(job.model_dir)])
    with tempfile.TemporaryDirectory(prefix="overnight-benchmark-") as scratch:
        files = _Files(Path(scratch))
        ended = caps.run(files.command(job), cap, cwd=_ROOT, log=files.log, timeout_s=timeout_s)
        return files.finished(ended, job.memory_cap)


def measure_in_slices(jobs: Sequence[Job], limits: Job | None, *, timeout_s: float) -> tuple[list[Finished], Finished]:
    """Run all ``jobs`` at the same time, in slices: see ``benchmarks.slices``. ``seconds`` are those of its slices.

    Beside them ``limits`` multiplies matrices over and over, if it is given, as fast as this machine does at the time:
    the second result has its rate while the first job was timed.
    """
    with tempfile.TemporaryDirectory(prefix="overnight-benchmark-") as scratch, ExitStack() as stack:
        done = Path(scratch) / "done"
        asked = [*jobs, *([replace(limits, until=str(done))] if limits else [])]
        files = [_Files(Path(scratch) / str(number)) for number in range(len(asked))]
        processes = []
        for job, each in zip(asked, files, strict=True):
            log = stack.enter_context(each.log.open("wb"))
            command = each.command(job)
            processes.append(subprocess.Popen(command, cwd=_ROOT, stdout=log, stderr=log, start_new_session=True))
        found: dict[int, Finished] = {}
        slices: dict[int, Slices] = {}
        for number, slices[number] in take_turns(processes, timeout_s=timeout_s * len(asked)):
            found[number] = files[number].finished(caps.Ended(processes[number].returncode, False, False), None)
            if all(each in found for each in range(len(jobs))):
                done.touch()
        timed = [found[number] for number in range(len(jobs))]
        rate = Finished(None, "no limits were measured")
        if limits is not None:
            rate = _rate_beside(found[len(jobs)], slices[len(jobs)], timed[0])
        return [_in_slices(each, slices[number]) for number, each in enumerate(timed)], rate


def _in_slices(finished: Finished, slices: Slices) -> Finished:
    if finished.result is None:
        return finished
    began = finished.of("began")
    return Finished({**finished.result, "seconds": slices.seconds(began, began + finished.of("seconds"))}, None)


def _rate_beside(limits: Finished, slices: Slices, timed: Finished) -> Finished:
    """Operations a second of the number of tokens that is best, from what was begun and ended in one slice each."""
    if limits.result is None or timed.result is None:
        return Finished(None, limits.error or timed.error)
    began, ended = timed.of("began"), timed.of("began") + timed.of("seconds")
    whole = [sample for sample in limits.of("samples") if slices.hold(sample[1], sample[2])]
    # A run of less than a slice has nothing beside it.
    beside = [sample for sample in whole if began <= sample[1] and sample[2] <= ended] or whole
    done: defaultdict[int, list[tuple[float, float]]] = defaultdict(list)
    for tokens, begin, end, flops in beside:
        done[tokens].append((flops, end - begin))
    if not done:
        return Finished(None, "no product was multiplied within a slice")
    rates = {tokens: sum(flops for flops, _ in each) / sum(taken for _, taken in each) for tokens, each in done.items()}
    rate = {COMPUTE: max(rates.values())}
    return Finished({"alone": rate, "busy": rate}, None)


class _Files:
    """What a measuring process reads and writes, in a folder of its own."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(exist_ok=True)
        self._asked, self._answer, self.log = folder / "job.json", folder / "result.json", folder / "log"

    def command(self, job: Job) -> list[str]:
        """The command line of the process that does ``job``."""
        self._asked.write_text(job.to_json())
        return [sys.executable, "-m", "benchmarks.child", str(self._asked), str(self._answer)]

    def finished(self, ended: caps.Ended, memory_cap: int | None) -> Finished:
        """What it found."""
        error = caps.explain(ended, memory_cap)
        if error is None:
            return Finished(json.loads(self._answer.read_text()), None)
        reason = self._answer.with_suffix(".error")
        if reason.exists() and not ended.over_cap:
            error = reason.read_text()
        elif ended.code > 0:
            error += ": " + " ".join(self.log.read_text(errors="replace").split("\n")[-3:])
        return Finished(None, error)


class PeakMemory:
    """Main memory of this process above what it had when this was made: the idle process."""

    def __init__(self) -> None:
        self.idle_bytes = resident_bytes()
        # Until now loading was counted too: the kernel's high-water mark begins anew.
        Path("/proc/self/clear_refs").write_text("5")

    def bytes(self) -> int:
        """The peak so far."""
        return max(0, _status("VmHWM") - self.idle_bytes)


def resident_bytes() -> int:
    """Main memory that this process holds now."""
    return _status("VmRSS")


def _status(key: str) -> int:
    for line in Path(f"/proc/{os.getpid()}/status").read_text().splitlines():
        if line.startswith(f"{key}:"):
            return int(line.split()[1]) * KIB
    raise RuntimeError(f"the kernel does not tell {key}")
