"""``python -m benchmarks.unpacking [--json]``: weights a second that the engine unpacks from four bits, from its trace.

opt-1.3b, its layers in four bits on the disk, in bfloat16; beside it the rate at which the same memory is copied, and
how many fewer bytes a pass reads than of plain layers.
"""

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import TYPE_CHECKING

from engine.dtypes import DType
from engine.process import tune
from engine.units import GIB, MIB

if TYPE_CHECKING:  # torch comes after ``tune``
    from engine.memory.traffic import Span
    from engine.schedule.passes import PassStats

SHAPE = "opt-1.3b"
REQUESTS, WORDS, STEPS = 8, 31, 8
_COPIED = 64 * MIB
_COPIES = 20


class _Recorder:
    """Seconds of each layer that is unpacked, and what passes read. Implements ``engine.trace.Recorder``."""

    def __init__(self) -> None:
        self.unpacking: list[float] = []
        self.read: list[int] = []

    def moved(self, lane: str, what: str, span: "Span", num_bytes: int) -> None:
        del lane, num_bytes
        if what.startswith("unpack "):
            self.unpacking.append(span[1] - span[0])

    def loaded(self, span: "Span") -> None:
        del span
        self.unpacking.clear()

    def passed(self, span: "Span", stats: "PassStats") -> None:
        del span
        self.read.append(stats.lane_bytes.get("disk_read", 0))


def measure(cache: Path, say: Callable[[str], None]) -> dict[str, float]:
    """Weights/s in the median over layers; in bytes, over bytes/s of a copy; plain bytes of a pass over those read."""
    from benchmarks.checkpoints import make_checkpoint
    from engine import Generate, PlanOptions, Request, SamplingParams, Shares
    from engine.loading import load_engine
    from engine.weights.layout import stored_in
    from engine.weights.manifest import read_manifest

    dirs = [make_checkpoint(SHAPE, DType.BFLOAT16, cache, say, form).model_dir for form in ("int4", "plain")]
    recorder = _Recorder()
    options = PlanOptions(device_memory=3 * GIB, weights=Shares(0, 0, 100))
    sampling = SamplingParams(max_new_tokens=STEPS, ignore_eos=True)
    requests = [Request(index, Generate("w9 " * WORDS, sampling)) for index in range(REQUESTS)]
    with load_engine(dirs[0], options, recorder=recorder) as engine:
        if sum(1 for _ in engine.run(requests)) != REQUESTS:
            raise RuntimeError("a request was lost")
        dtype = engine.plan.dtype
    stored, plain = (stored_in(read_manifest(each)) for each in dirs)
    layers = [unit for unit in stored.unit_bytes if unit.startswith("layer.")]
    values = stored.computed_bytes(layers[0], dtype) / dtype.num_bytes
    rate = values / median(recorder.unpacking[len(layers) :])  # the first pass meets fresh memory
    plain_bytes = sum(plain.unit_bytes[layer] for layer in layers)
    return {
        "weights_per_s": rate,
        "of_copying": rate * dtype.num_bytes / _copy_rate(),
        "fewer_bytes": plain_bytes / median(recorder.read[1:-1]),
    }


def _copy_rate() -> float:
    """Bytes/s that are copied from one place in memory to another, by all cores."""
    import torch

    source, target = (torch.ones(_COPIED // 2, dtype=torch.bfloat16) for _ in range(2))
    found = []
    for _ in range(_COPIES):
        begin = perf_counter()
        target.copy_(source)
        found.append(perf_counter() - begin)
    return _COPIED / median(found[1:])


def main(arguments: list[str] | None = None) -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.unpacking", description=__doc__)
    parser.add_argument("--json", action="store_true", help="one document on standard output")
    parser.add_argument("--cache-dir", type=Path, help="where checkpoints are kept")
    asked = parser.parse_args(arguments)
    tune()
    from benchmarks.checkpoints import default_cache

    found = measure(asked.cache_dir or default_cache(), lambda text: print(text, file=sys.stderr, flush=True))
    if asked.json:
        print(json.dumps(found))
    else:
        print(f"{found['weights_per_s'] / 1e9:.2f} G weights/s, {found['of_copying']:.2f} of the rate of a copy")
        print(f"a pass reads {found['fewer_bytes']:.2f} times fewer bytes than of plain layers")
    return 0


if __name__ == "__main__":
    sys.exit(main())
