"""The measuring process: ``python -m benchmarks.child JOB.json RESULT.json``; started by ``jobs.measure``."""

import ctypes
import json
import signal
import sys
from pathlib import Path

from benchmarks.jobs import Job
from engine.errors import EngineError
from engine.process import tune

_PR_SET_PDEATHSIG = 1


def main(asked: Path, answer: Path) -> int:
    """Do the job; a result file, or one with the reason why not."""
    _end_with_parent()
    job = Job.from_json(asked.read_text())
    try:
        if job.role == "ours":
            tune()  # as the worker does
            from benchmarks.ours import run
        elif job.role == "profile":
            tune()
            from benchmarks.inprocess import profile as run
        elif job.role == "limits":
            from benchmarks.limits import run
        else:
            from benchmarks.peers import run
        answer.write_text(json.dumps(run(job)))
    except (EngineError, MemoryError) as error:
        answer.with_suffix(".error").write_text(str(error) or type(error).__name__)
        return 1
    except Exception as error:
        answer.with_suffix(".error").write_text(f"{type(error).__name__}: {error}"[:500])
        raise
    return 0


def _end_with_parent() -> None:
    """However the parent ends: a measurement that nobody waits for would only spoil the next."""
    libc = ctypes.CDLL(None, use_errno=True)
    if hasattr(libc, "prctl"):
        libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), Path(sys.argv[2])))
