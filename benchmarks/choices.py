"""``python -m benchmarks.choices``: is the plan that the planner chooses the best there is?

Two workloads run on this machine under a grid of plans made by hand, and under the chosen one, in memory that is too
small for the model. Each plan is run once; then the best of the grid and the chosen one again, in turn. What counts is
how fast the chosen one was beside each of these in the same round, in the median, and of these ratios the least: the
best of many single runs would be the luckiest, and a machine that is slower in one minute than in the next would decide
in its place. Between plans that are equally good the least of three ratios is somewhat below 1, by noise alone.
"""

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

from benchmarks.inprocess import generated, measured_here
from benchmarks.turns import positive
from benchmarks.workload import Item, Range
from benchmarks.workload import Workload as Texts
from engine.errors import EngineError
from engine.planner.decide import best_plan
from engine.planner.explain import flags_of
from engine.planner.hardware import Hardware
from engine.planner.plan import PlanOptions
from engine.planner.plan_input import PlanInput
from engine.planner.profiles import load_hardware
from engine.planner.resolve import fitting_plan
from engine.planner.workload import Workload
from engine.process import tune
from engine.tiers import Shares
from engine.units import MIB

LINE = 0.95
SHAPE = "opt-125m"
MEMORY = 512 * MIB
WORKLOADS = {
    "long prompts, short outputs": (48, Range(512, 512), Range(8, 8)),
    "short prompts, long outputs": (96, Range(32, 128), Range(16, 48)),
}
WEIGHTS = ("100/0/0", "75/0/25", "50/0/50", "25/0/75", "0/0/100")
BATCHES = ((256, 2), (512, 1), (512, 4), (1024, 1), (1024, 2), (2048, 1), (2048, 2))
BEST_AGAIN = 3
"""Plans of the grid that run once more."""


@dataclass(frozen=True, slots=True)
class Timed:
    """One plan, and generated tokens per second in one or more runs."""

    options: PlanOptions
    rates: tuple[float, ...] = ()

    @property
    def rate(self) -> float:
        """The median."""
        return median(self.rates)

    def to_json(self) -> dict[str, Any]:
        """For a report."""
        return {"flags": flags_of(self.options), "rate": self.rate, "rates": self.rates}


def main(arguments: list[str] | None = None) -> int:
    """Run, print, and return 0 if the chosen plan is within the line of the best on every workload."""
    tune()
    from benchmarks.checkpoints import default_cache, make_checkpoint  # torch comes after that

    parser = argparse.ArgumentParser(prog="python -m benchmarks.choices", description=__doc__)
    parser.add_argument("--profile", type=Path, metavar="FILE", help="default: the machine is measured now")
    parser.add_argument(
        "--repeat", type=positive, default=5, metavar="N", help="runs of the best and of the chosen plan"
    )
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--cache-dir", type=Path, default=default_cache())
    asked = parser.parse_args(arguments)
    found: dict[str, dict[str, Any]] = {}
    try:
        model_dir = make_checkpoint(SHAPE, "bfloat16", asked.cache_dir, _say).model_dir
        hardware = load_hardware(asked.profile) if asked.profile else measured_here(asked.cache_dir, _say)
        for name, (requests, prompt, out) in WORKLOADS.items():
            _say(name)
            items = Texts(task="generate", prompt=prompt, out=out, vocabulary=50272, seed=1).items(requests)
            found[name] = _compared(model_dir, items, hardware, asked.repeat)
    except (EngineError, OSError) as error:
        print(f"benchmarks: {error}", file=sys.stderr)
        return 1
    if asked.json:
        worst = min(each["ratio"] for each in found.values())
        print(json.dumps({"worst": worst, "workloads": found}, indent=1))
    else:
        for name, each in found.items():
            print(f"{name}: {each['ratio']:.3f} of the best of {each['plans']} plans (line {LINE})")
            print(f"  chosen {each['chosen']['rate']:8.1f} token/s  {each['chosen']['flags']}")
            print(f"  best   {each['best']['rate']:8.1f} token/s  {each['best']['flags']}")
    return 0 if all(each["ratio"] >= LINE for each in found.values()) else 1


def _compared(model_dir: Path, items: Sequence[Item], hardware: Hardware, repeat: int) -> dict[str, Any]:
    given = _plan_input(model_dir, items)
    grid = [_timed(model_dir, options, items) for options in _grid(given)]
    again = [replace(each, rates=()) for each in sorted(grid, key=lambda each: -each.rate)[:BEST_AGAIN]]
    chosen = Timed(best_plan(given, hardware).options)
    runs = [chosen, *again]
    for number in range(repeat):  # each begins a round in its turn
        for index in (*range(number % len(runs), len(runs)), *range(number % len(runs))):
            runs[index] = _timed(model_dir, runs[index].options, items, runs[index].rates)
    chosen, *again = runs
    ratio, best = min(((beside(chosen, each), each) for each in again), key=lambda found: found[0])
    return {
        "plans": len(grid),
        "ratio": ratio,
        "chosen": chosen.to_json(),
        "best": best.to_json(),
        "grid": [each.to_json() for each in grid],
    }


def beside(chosen: Timed, other: Timed) -> float:
    """How fast the chosen plan is in proportion to another, round by round; the median."""
    return median(one / another for one, another in zip(chosen.rates, other.rates, strict=True))


def _plan_input(model_dir: Path, items: Sequence[Item]) -> PlanInput:
    """As of a worker that has nothing but this memory."""
    from engine.devices.host import HostDevice
    from engine.loading import plan_input

    workload = Workload.of((len(item.prompt), len(item.continuation)) for item in items)
    options = PlanOptions(device="cpu", device_memory=MEMORY, disk_dir=model_dir)
    return plan_input(model_dir, options, HostDevice(), workload)


def _grid(given: PlanInput) -> Iterator[PlanOptions]:
    """Plans made by hand, those that fit."""
    for weights, (micro_batch, micro_batches) in product(WEIGHTS, BATCHES):
        options = replace(
            given.options, weights=Shares.parse(weights), micro_batch=micro_batch, micro_batches=micro_batches
        )
        plan = fitting_plan(given.asking(options))
        if plan is not None and plan.largest_sequence(given.shape) >= given.longest:
            yield options


def _timed(model_dir: Path, options: PlanOptions, items: Sequence[Item], before: tuple[float, ...] = ()) -> Timed:
    """One run more. The engine has done part of it before, as a worker's has that goes on to its next job."""

    from engine.loading import load_engine

    with load_engine(model_dir, options) as engine:
        generated(engine, items[: len(items) // 3])
        start = perf_counter()
        tokens = generated(engine, items)
        rate = tokens / (perf_counter() - start)
    _say(f"{rate:8.1f} token/s  {flags_of(options)}")
    return Timed(options, (*before, rate))


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
