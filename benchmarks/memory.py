"""``python -m benchmarks.memory``: what a process holds whose whole model is on the disk, against what it may hold."""

import argparse
import json
import sys
from pathlib import Path

from benchmarks.checkpoints import default_cache, make_checkpoint
from benchmarks.compare import Runner
from benchmarks.jobs import Job, JobFailed
from benchmarks.shapes import shape_of
from benchmarks.workload import Range, Workload
from engine.errors import EngineError
from engine.units import GIB, MIB, format_bytes
from engine.weights.manifest import read_manifest

_SHARE, _SLACK = 0.35, 3 * GIB // 10
_REQUESTS, _PROMPT, _OUT = 16, Range(128, 128), Range(8, 8)


def allowed_bytes(model_bytes: int) -> int:
    """Resident memory above the idle process that an all-disk placement may take."""
    return int(_SHARE * model_bytes) + _SLACK


def main(arguments: list[str] | None = None) -> int:
    """Run, print, and return 0 if the process stayed within what it may take."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.memory", description=__doc__)
    parser.add_argument("--shape", default="opt-1.3b", help="at least 1 GiB of weights (default: %(default)s)")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--cache-dir", type=Path, default=default_cache())
    asked = parser.parse_args(arguments)
    try:
        vocabulary = shape_of(asked.shape).vocab_size
    except ValueError as error:
        parser.error(str(error))
    try:
        checkpoint = make_checkpoint(asked.shape, "bfloat16", asked.cache_dir, _say)
        model_bytes = sum(unit.num_bytes for unit in read_manifest(checkpoint.model_dir).units)
        allowed = allowed_bytes(model_bytes)
        job = Job(
            role="ours",
            shape=asked.shape,
            dtype="bfloat16",
            device="cpu",
            weights="disk",
            folder=str(checkpoint.folder),
            model_dir=str(checkpoint.model_dir),
            workload=Workload(task="generate", prompt=_PROMPT, out=_OUT, vocabulary=vocabulary),
            num_requests=_REQUESTS,
            # Within 5% and 100 MiB of its budget, the process is within what it may take.
            device_memory=int((allowed - 100 * MIB) / 1.05),
        )
        found = Runner(None, 3600, _say).run(job, f"{asked.shape}, all on the disk: {_REQUESTS} requests")
        peak, idle = int(found.of("peak_bytes")), int(found.of("idle_bytes"))
    except (JobFailed, EngineError, OSError) as error:
        print(f"benchmarks: {error}", file=sys.stderr)
        return 1
    if asked.json:
        found_bytes = {"model_bytes": model_bytes, "idle_bytes": idle, "peak_bytes": peak, "allowed_bytes": allowed}
        print(json.dumps({**found_bytes, "share": peak / allowed}, indent=1))
        return 0 if peak <= allowed else 1
    print(f"model                 {format_bytes(model_bytes)}")
    print(f"idle process          {format_bytes(idle)}")
    print(f"peak above idle       {format_bytes(peak)}, {peak / model_bytes:.0%} of the model")
    print(f"allowed above idle    {format_bytes(allowed)}, 35% of the model and 0.3 GiB")
    return 0 if peak <= allowed else 1


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
