"""What benchmarks of the planner share: this machine's profile, and a workload run by an engine in this process."""

import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.jobs import Job
from benchmarks.workload import Item
from engine.planner.hardware import Hardware
from engine.planner.profiles import profile_json

if TYPE_CHECKING:  # torch comes after ``engine.process.tune``
    from engine.engine import Engine
    from engine.memory.device import Device
    from engine.request import Request


def measured_here(folder: Path, say: Callable[[str], None], device: "Device | None" = None) -> Hardware:
    """The machine's profile with a device, which is closed then, measured now; scratch files lie in ``folder``."""
    from engine.devices.open import open_device
    from engine.measure import measure

    device = device or open_device(None)
    try:
        return measure(device, folder, say=lambda what: say(f"measuring {what}"))
    finally:
        device.close()


def profile(job: Job) -> dict[str, object]:
    """The machine's profile as JSON, with the device of a job; what is measured is said on standard error."""
    from engine.devices.open import open_device

    def say(what: str) -> None:
        print(what, file=sys.stderr, flush=True)

    return profile_json(measured_here(Path(job.folder), say, open_device(job.device)))


def generated(engine: "Engine", items: Iterable[Item]) -> int:
    """Run every item to its end; tokens generated."""
    return sum(output.completion_tokens for output in engine.run(_requests(items)))


def _requests(items: Iterable[Item]) -> "Iterator[Request]":
    from engine.request import Generate, Request, SamplingParams

    for index, item in enumerate(items):
        sampling = SamplingParams(max_new_tokens=len(item.continuation), ignore_eos=True)
        yield Request(index, Generate(item.prompt_text, sampling))
