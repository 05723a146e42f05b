"""``python -m benchmarks.soak``: does memory grow with the number of requests? 20,000 short ones through one engine."""

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path

from benchmarks.checkpoints import default_cache, make_checkpoint
from benchmarks.jobs import resident_bytes
from benchmarks.shapes import shape_of
from benchmarks.workload import Range, Workload, as_text
from engine.errors import EngineError
from engine.loading import load_engine
from engine.planner.plan import PlanOptions
from engine.process import tune
from engine.request import Generate, Request, SamplingParams, Score
from engine.tiers import Shares
from engine.units import MIB, format_bytes

LINE = 50 * MIB
_SETTLED = 2000
"""Outputs after which every buffer has had its turn."""
_BUDGET = 512 * MIB
"""So little that all of the KV cache is in use by then: memory that a plan has taken and that a sequence touches for
the first time looks like growth, and is none."""


def main(arguments: list[str] | None = None) -> int:
    """Run, print, and return 0 if resident memory grew by less than the line."""
    tune()
    parser = argparse.ArgumentParser(prog="python -m benchmarks.soak", description=__doc__)
    parser.add_argument("--shape", default="opt-125m", help="weights are on the disk (default: %(default)s)")
    parser.add_argument("--requests", type=int, default=20_000, metavar="N")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--cache-dir", type=Path, default=default_cache())
    asked = parser.parse_args(arguments)
    if asked.requests <= _SETTLED:
        parser.error(f"--requests must be more than {_SETTLED}, after which growth counts")
    try:
        vocabulary = shape_of(asked.shape).vocab_size
    except ValueError as error:
        parser.error(str(error))
    try:
        dtype = "float32" if asked.shape == "tiny" else "bfloat16"
        checkpoint = make_checkpoint(asked.shape, dtype, asked.cache_dir, _say)
        options = PlanOptions(device="cpu", weights=Shares(0, 0, 100), device_memory=_BUDGET)
        sizes: list[int] = []
        with load_engine(checkpoint.model_dir, options) as engine:
            for index, _ in enumerate(engine.run(_requests(asked.requests, vocabulary)), start=1):
                if index % 1000 == 0:
                    sizes.append(resident_bytes())
                    _say(f"{index} outputs, {sizes[-1] / MIB:.1f} MiB resident")
    except (EngineError, OSError) as error:
        print(f"benchmarks: {error}", file=sys.stderr)
        return 1
    settled = sizes[_SETTLED // 1000 - 1]
    growth = max(sizes) - settled
    if asked.json:
        print(json.dumps({"settled_bytes": settled, "most_bytes": max(sizes), "growth_mib": growth / MIB}, indent=1))
        return 0 if growth < LINE else 1
    print(f"resident after {_SETTLED} requests   {format_bytes(settled)}")
    print(f"most after that             {format_bytes(max(sizes))}")
    print(f"growth                      {format_bytes(growth)}, line {format_bytes(LINE)}")
    return 0 if growth < LINE else 1


def _requests(number: int, vocabulary: int) -> Iterator[Request]:
    """Generations and scores of seeded lengths, made as they are asked for."""
    for begin in range(0, number, 1000):
        workload = Workload(task="generate", prompt=Range(4, 24), out=Range(1, 8), vocabulary=vocabulary, seed=begin)
        for index, item in enumerate(workload.items(min(1000, number - begin)), start=begin):
            if index % 4 == 0:
                yield Request(index, Score(item.prompt_text, " " + as_text(item.continuation)))
            else:
                sampling = SamplingParams(max_new_tokens=len(item.continuation), ignore_eos=True)
                yield Request(index, Generate(item.prompt_text, sampling))


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
