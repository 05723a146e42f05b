"""Do the lanes overlap? A pass over throttled links should take as long as its busiest lane, not as all of them.

``python -m benchmarks.overlap``: the simulated device, with its links and the disk so slow that waiting dominates and
the schedule is measured, not this machine. Prints the time of the passes over that of their busiest lane, and over the
sum of the lanes; exits with 1 where it is more than 1.15 of the busiest lane.
"""

import sys
import time
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.checkpoints import default_cache, make_checkpoint
from engine import Engine, Generate, PassStats, PlanOptions, Request, SamplingParams, Shares
from engine.devices.simulated import SimulatedDevice
from engine.units import GIB
from engine.weights.files import WeightFiles

LINE = 1.15
WARM_PASSES = 2


@dataclass(frozen=True)
class Case:
    """Where weights live, and how fast they come."""

    weights: str
    disk_speed: float
    """Bytes a second."""
    link_speed: float


CASES = {
    "weights on host": Case("0/100/0", 1e12, 500e6),
    "weights on disk, which is slower than the link": Case("0/0/100", 400e6, 600e6),
    "weights on disk, which is as fast as the link": Case("0/0/100", 500e6, 500e6),
    "weights on disk, which is faster than the link": Case("0/0/100", 600e6, 400e6),
    "weights in all three tiers": Case("20/40/40", 300e6, 300e6),
}


def throttle_disk(bytes_per_second: float) -> None:
    """Reads of weights take as long as such a disk would."""
    read_unit = WeightFiles.read_unit

    def read_slowly(self: WeightFiles, name: str, out: Tensor) -> int:
        start = time.perf_counter()
        num_bytes = read_unit(self, name, out)
        time.sleep(max(0.0, num_bytes / bytes_per_second - (time.perf_counter() - start)))
        return num_bytes

    WeightFiles.read_unit = read_slowly  # type: ignore[method-assign]


def measure(case: Case) -> list[PassStats]:
    """The passes of a small job, first and last ones left out."""
    checkpoint = make_checkpoint("opt-125m", "bfloat16", default_cache(), print)
    options = PlanOptions(
        device_memory=GIB, host_memory=GIB, weights=Shares.parse(case.weights), kv=Shares(100, 0, 0),
        micro_batch=16, micro_batches=1, device="simulated",
    )  # fmt: skip
    sampling = SamplingParams(max_new_tokens=8, ignore_eos=True)
    device = SimulatedDevice(bytes_per_second=case.link_speed)
    with Engine.load(checkpoint.model_dir, options, device=device) as engine:
        read_unit = WeightFiles.read_unit
        throttle_disk(case.disk_speed)
        try:
            reports = list(engine.passes(iter([Request(index, Generate("w9 w8", sampling)) for index in range(4)])))
        finally:
            WeightFiles.read_unit = read_unit  # type: ignore[method-assign]
    return [report.stats for report in reports[WARM_PASSES:-1]]


def main() -> int:
    """Measure every case; the exit code."""
    torch.set_num_threads(1)
    worst = 0.0
    for name, case in CASES.items():
        passes = measure(case)
        seconds = sum(stats.seconds for stats in passes)
        lanes: dict[str, float] = {}
        for stats in passes:
            for lane, busy in stats.lane_seconds.items():
                lanes[lane] = lanes.get(lane, 0.0) + busy
        busiest = max(lanes, key=lambda lane: lanes[lane])
        ratio = seconds / lanes[busiest]
        worst = max(worst, ratio)
        each = ", ".join(f"{lane} {1000 * lanes[lane] / len(passes):.0f}" for lane in sorted(lanes))
        print(f"{name}: {ratio:.2f} of {busiest}, {seconds / sum(lanes.values()):.2f} of the sum", end=" ")
        print(f"({1000 * seconds / len(passes):.0f} ms a pass; busy ms: {each})")
    print(f"worst {worst:.2f}, line {LINE}")
    return 0 if worst <= LINE else 1


if __name__ == "__main__":
    sys.exit(main())
