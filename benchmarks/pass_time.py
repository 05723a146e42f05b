"""How long Python takes over a pass on a device like CUDA, whatever is computed: what a GPU would wait for.

``python -m benchmarks.pass_time [--before COMMIT] [--json]``. Decode passes of 144 sequences in two micro-batches
through 48 layers of hidden size 64, on the tests' device that copies as CUDA does: almost nothing is computed. Time in
which some thread is in an operator, as PyTorch's profiler tells it, is taken off; the shortest of 20 passes counts.
``--before`` runs the engine of another commit in the same call.
"""

import argparse
import json
import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch._C._profiler import _ExperimentalConfig
from torch.profiler import ProfilerActivity, profile, record_function

from benchmarks.turns import RunFailed, run_module
from engine import Generate, PlanOptions, Request, SamplingParams, Shares
from engine.loading import load_engine
from engine.units import MIB
from engine.weights.importing import import_checkpoint
from tests.engine.checkpoints import make_checkpoint
from tests.engine.like_cuda import LikeCuda

LAYERS, SEQUENCES, PASSES = 48, 144, 20
_WARM = 3
_CALL = "a pass"
CASES: dict[str, dict[str, Any]] = {
    "KV cache on the device": {"kv": Shares(100, 0, 0)},
    "KV cache on the host": {"kv": Shares(0, 100, 0)},
    "KV cache on the host, which attends": {"kv": Shares(0, 100, 0), "host_attention": "on"},
}
LINES = {
    "KV cache on the device": 0.030,
    "KV cache on the host": 0.008 * LAYERS,
    "KV cache on the host, which attends": 0.060,
}
"""Seconds of a pass, at most."""


def python_seconds(model_dir: Path, options: PlanOptions) -> float:
    """The shortest pass, without its operators."""
    sampling = SamplingParams(max_new_tokens=_WARM + 2 * PASSES + SEQUENCES, ignore_eos=True)
    requests = [Request(index, Generate("a b c d e", sampling)) for index in range(SEQUENCES)]
    with load_engine(model_dir, options, device=LikeCuda()) as engine:
        passes = engine.passes(iter(requests))

        def decode() -> None:
            while next(passes).stats.decode_tokens < SEQUENCES:
                pass

        for _ in range(_WARM):
            decode()
        shortest = min(_python_s(decode) for _ in range(PASSES))
        passes.close()
    return shortest


def _python_s(work: Callable[[], None]) -> float:
    """Seconds of a call in which no thread is in an operator: these would be the GPU's work, or a lane's."""
    every_thread = _ExperimentalConfig(profile_all_threads=True)
    recorded = profile(activities=[ProfilerActivity.CPU], experimental_config=every_thread)
    with recorded as traced, record_function(_CALL):
        work()
    # As recorded: to make a tree of a hundred thousand operators takes PyTorch half a minute.
    events = traced.profiler.kineto_results.events()
    ((begin, end),) = ((each.start_ns(), each.end_ns()) for each in events if each.name() == _CALL)
    operators = sorted((each.start_ns(), each.end_ns()) for each in events if each.name() != _CALL)
    beside, reached = 0, begin
    for first, last in operators:
        beside += max(0, min(first, end) - reached)
        reached = max(reached, min(last, end))
    return float(beside + end - reached) / 1e9


def measured() -> dict[str, float]:
    """Every case that this engine knows."""
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder)
        make_checkpoint(path / "hf", num_hidden_layers=LAYERS)
        import_checkpoint(path / "hf", path / "model")
        for name, case in CASES.items():
            try:
                options = PlanOptions(
                    weights=Shares(100, 0, 0), micro_batch=SEQUENCES // 2, micro_batches=2, device_memory=2048 * MIB,
                    host_memory=2048 * MIB, **case,
                )  # fmt: skip
            except TypeError:
                continue  # an engine without it
            found[name] = python_seconds(path / "model", options)
    return found


def _before(commit: str) -> dict[str, float]:
    """The same of another commit, by this script."""
    from benchmarks.before_after import tree_of

    with tree_of(commit) as tree:
        shutil.copy(__file__, tree / "benchmarks" / "pass_time.py")
        found: dict[str, float] = json.loads(run_module(tree, "benchmarks.pass_time", "--json", "--unjudged"))[
            "seconds"
        ]
        return found


def main(arguments: list[str] | None = None) -> int:
    """0 if no case takes longer than its line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.pass_time", description=__doc__)
    parser.add_argument("--before", metavar="COMMIT", help="another engine, for comparison")
    parser.add_argument("--json", action="store_true", help="one document on standard output")
    parser.add_argument("--unjudged", action="store_true", help="end with 0 whatever is found")
    chosen = parser.parse_args(arguments)
    torch.set_num_threads(1)  # so that operators are on the thread that is profiled
    try:
        before = _before(chosen.before) if chosen.before else {}
    except RunFailed as error:
        print(f"benchmarks: {error}", file=sys.stderr)
        return 2
    found = measured()
    if chosen.json:
        print(json.dumps({"seconds": found, "before": before, "lines": LINES}))
    else:
        for name, seconds in found.items():
            was = f", {1000 * before[name]:.1f} ms before" if name in before else ""
            print(f"{name}: {1000 * seconds:.1f} ms a pass (line {1000 * LINES[name]:.0f}){was}")
    return 0 if chosen.unjudged or all(seconds <= LINES[name] for name, seconds in found.items()) else 1


if __name__ == "__main__":
    sys.exit(main())
