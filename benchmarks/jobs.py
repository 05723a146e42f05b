"""One measurement in a process of its own: what it is asked (``Job``), and how it is started and heard."""

import json
import os
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

from benchmarks import caps
from benchmarks.workload import Item, Range, Workload
from engine.units import KIB

_ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """What a measuring process needs to know."""

    role: str
    """``ours``, ``limits`` or the name of a peer."""
    shape: str
    dtype: str
    device: str
    weights: str
    """``device``, ``host`` or ``disk``."""
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
        asked, answer = Path(scratch) / "job.json", Path(scratch) / "result.json"
        asked.write_text(job.to_json())
        command = [sys.executable, "-m", "benchmarks.child", str(asked), str(answer)]
        log = Path(scratch) / "log"
        ended = caps.run(command, cap, cwd=_ROOT, log=log, timeout_s=timeout_s)
        error = caps.explain(ended, job.memory_cap)
        if error is not None:
            reason = answer.with_suffix(".error")
            if reason.exists() and not ended.over_cap:
                error = reason.read_text()
            elif ended.code > 0:
                error += ": " + " ".join(log.read_text(errors="replace").split("\n")[-3:])
            return Finished(None, error)
        return Finished(json.loads(answer.read_text()), None)


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
