"""Do the lanes overlap? A pass over throttled links should take as long as its busiest lane, not as all of them.

``python -m benchmarks.overlap``: the simulated device, with its links and the disk so slow that waiting dominates and
the schedule is measured, not this machine. Decode passes, with weights, keys and values, and hidden states wherever
they can be. Prints the time of the passes over that of their busiest lane, and over the sum of the lanes; exits with 1
where it is more than 1.15 of the busiest lane.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from benchmarks.checkpoints import default_cache, make_checkpoint
from engine import Generate, PassStats, PlanOptions, Request, SamplingParams, Shares
from engine.devices.simulated import SimulatedDevice
from engine.loading import load_engine
from engine.memory import ring
from engine.memory.spill import DiskTier
from engine.units import GIB, KIB
from engine.weights.files import WeightFiles

LINE = 1.15
WARM_PASSES = 2


@dataclass(frozen=True)
class Case:
    """Where weights, keys and values live, and how fast they come."""

    weights: str
    disk_speed: float
    """Bytes a second."""
    link_speed: float
    kv: str = "100/0/0"
    words: int = 2
    """Words of a prompt."""
    activations: str = "device"
    requests: int = 4
    micro_batches: int = 1

    @property
    def micro_batch(self) -> int:
        """Tokens: all prompts at once, or, to have several, as many as make them full of decode tokens."""
        return self.requests * self.words * 2 if self.micro_batches == 1 else self.requests // self.micro_batches


CASES = {
    "weights on host": Case("0/100/0", 1e12, 500e6),
    "weights on disk, which is slower than the link": Case("0/0/100", 400e6, 600e6),
    "weights on disk, which is as fast as the link": Case("0/0/100", 500e6, 500e6),
    "weights on disk, which is faster than the link": Case("0/0/100", 600e6, 400e6),
    "weights in all three tiers": Case("20/40/40", 300e6, 300e6),
    "KV cache on host": Case("100/0/0", 1e12, 300e6, "0/100/0", 500),
    "KV cache on disk, which is slower than the link": Case("100/0/0", 200e6, 300e6, "0/0/100", 500),
    "KV cache on disk, which is as fast as the link": Case("100/0/0", 200e6, 200e6, "0/0/100", 500),
    "weights and KV cache on host": Case("0/100/0", 1e12, 500e6, "0/100/0", 500),
    "weights on disk, KV cache on host": Case("0/0/100", 300e6, 500e6, "0/100/0", 500),
    "weights on host, KV cache on disk": Case("0/100/0", 200e6, 500e6, "0/0/100", 500),
}
_EIGHT: dict[str, Any] = {"weights": "100/0/0", "requests": 64, "micro_batches": 8}
"""The way to the disk and back has five steps with compute, so five micro-batches are on it."""
OF_ACTIVATIONS = {
    "activations on host": Case(disk_speed=1e12, link_speed=1e6, activations="host", **_EIGHT),
    "activations on disk": Case(disk_speed=1e6, link_speed=2e6, activations="disk", **_EIGHT),
    "activations on disk, which is as fast as the link": Case(
        disk_speed=1e6, link_speed=1e6, activations="disk", **_EIGHT
    ),
    "weights and activations on host": Case(
        disk_speed=1e12, link_speed=150e6, activations="host", **{**_EIGHT, "weights": "0/100/0"}
    ),
}
PACED_BYTES = 256 * KIB
"""Bytes of a copy: as small a part of a layer as the engine's 16 MiB are where a layer has a gigabyte."""


@contextmanager
def throttled_disk(bytes_per_second: float) -> Iterator[None]:
    """Reads of weights, and what spill files read and write, take as long as such a disk would."""

    def slow(method: Callable[..., Any]) -> Callable[..., Any]:
        def slowly(*arguments: Any) -> Any:
            start = time.perf_counter()
            result = method(*arguments)
            num_bytes = result or arguments[-1].numel()  # a read of weights says how many it was
            time.sleep(max(0.0, num_bytes / bytes_per_second - (time.perf_counter() - start)))
            return result

        return slowly

    with ExitStack() as stack:
        for owner, name in ((WeightFiles, "read_unit"), (DiskTier, "read"), (DiskTier, "write")):
            method = getattr(owner, name)
            setattr(owner, name, slow(method))
            stack.callback(setattr, owner, name, method)
        yield


def measure(case: Case) -> list[PassStats]:
    """The decode passes of a small job, the first ones left out."""
    checkpoint = make_checkpoint("opt-125m", "bfloat16", default_cache(), _say)
    options = PlanOptions(
        device_memory=GIB, host_memory=GIB, disk_space=GIB, weights=Shares.parse(case.weights),
        kv=Shares.parse(case.kv), micro_batch=case.micro_batch,
        micro_batches=case.micro_batches, device="simulated", activations=case.activations, disk_dir=default_cache(),
    )  # fmt: skip
    # Prompts that begin late must still be there when the last has begun.
    sampling = SamplingParams(max_new_tokens=8 if case.micro_batches == 1 else 24, ignore_eos=True)
    device = SimulatedDevice(bytes_per_second=case.link_speed)
    requests = [Request(index, Generate("w9 " * case.words, sampling)) for index in range(case.requests)]
    with load_engine(checkpoint.model_dir, options, device=device) as engine, throttled_disk(case.disk_speed):
        reports = list(engine.passes(iter(requests)))
    decode = [report.stats for report in reports if report.stats.decode_tokens == case.requests]
    return [stats for stats in decode if not stats.prefill_tokens][WARM_PASSES:-1]


def main() -> int:
    """Measure every case; the exit code."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.overlap", description=__doc__)
    parser.add_argument("--json", action="store_true")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    ring.PACED_BYTES = PACED_BYTES
    ratios: dict[str, float] = {}
    for name, case in {**CASES, **OF_ACTIVATIONS}.items():
        passes = measure(case)
        seconds = sum(stats.seconds for stats in passes)
        lanes: dict[str, float] = {}
        for stats in passes:
            for lane, busy in stats.lane_seconds.items():
                lanes[lane] = lanes.get(lane, 0.0) + busy
        busiest = max(lanes, key=lambda lane: lanes[lane])
        ratio = seconds / lanes[busiest]
        ratios[name] = ratio
        each = ", ".join(f"{lane} {1000 * lanes[lane] / len(passes):.0f}" for lane in sorted(lanes))
        of_sum = f"{seconds / sum(lanes.values()):.2f} of the sum"
        took = f"{1000 * seconds / len(passes):.0f} ms a pass; busy ms: {each}"
        _say(f"{name}: {ratio:.2f} of {busiest}, {of_sum} ({took})")
    worst, of_activations = (max(ratios[name] for name in cases) for cases in (CASES, OF_ACTIVATIONS))
    if asked.json:
        print(json.dumps({"worst": worst, "worst_activations": of_activations, "cases": ratios}, indent=1))
    else:
        print(f"worst {worst:.2f}, with activations elsewhere {of_activations:.2f}, line {LINE}")
    return 0 if max(worst, of_activations) <= LINE else 1


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
