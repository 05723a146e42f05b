"""Whether a plan fits, asked before a job is stored: by the function that its worker will plan with."""

import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from cli.sizes import Sizes

if TYPE_CHECKING:
    from engine.devices.facts import MachineFacts
    from engine.planner.plan import PlanOptions
    from engine.planner.workload import Workload


class _MeasuredFirst(Exception):
    """Some plan fits; which is the best depends on figures of this machine."""


def check_fits(sizes: Sizes, options: "PlanOptions", disk_dir: Path, workload: "Callable[[], Workload | None]") -> None:
    """Return if a worker with these options could load the model now.

    ``workload``: what it would be loaded for, asked only where the rules alone find no plan. Torch is imported only
    where a GPU may be there, or where it is close: importing it takes longer than all the rest of a command.

    Raises:
        PlanDoesNotFit: it could not; the sentence says what is short, and the nearest plan that would fit.
        DeviceUnavailable: there is no such device.
    """
    from engine.errors import PlanDoesNotFit
    from engine.planner.decide import Outlook, decide_plan

    def decide(outlook: Outlook | None, device: str, facts: "MachineFacts") -> None:
        decide_plan(
            options, outlook, shape=sizes.shape, stored=sizes.stored, device=device, facts=facts, disk_dir=disk_dir
        )

    if options.device == "cpu" or (options.device is None and not _may_have_gpu()):
        with suppress(PlanDoesNotFit):
            decide(None, "cpu", _cautious_cpu_facts())
            return
    device, facts = _exact_facts(options.device)
    try:
        decide(None, device, facts)
    except PlanDoesNotFit as error:
        refusal = error
    else:
        return
    try:
        lengths = workload()
        if lengths is None:
            raise refusal
        decide(Outlook(lengths, _not_yet), device, facts)
    except _MeasuredFirst:
        pass
    except PlanDoesNotFit as error:
        text = str(error).replace("device memory", "memory") if device == "cpu" else str(error)
        what = f"it {text.removeprefix('the plan ')}" if text.startswith("the plan ") else text
        raise PlanDoesNotFit(f"the plan does not fit: {what}") from error


def _not_yet() -> NoReturn:
    raise _MeasuredFirst


def _may_have_gpu(devices: Path = Path("/dev")) -> bool:
    """Whether torch may find a GPU: one of NVIDIA's, or Windows' behind Linux."""
    return any(devices.glob("nvidia[0-9]*")) or (devices / "dxg").exists()


def _cautious_cpu_facts() -> "MachineFacts":
    """What a CPU worker will find, with at least as many threads as torch will start: each takes workspace."""
    from engine.devices.facts import MachineFacts, free_host_memory

    free = free_host_memory()
    asked = os.environ.get("OMP_NUM_THREADS", "")
    threads = max(os.cpu_count() or 1, int(asked) if asked.isdecimal() else 1)
    return MachineFacts(free, free, shares_host_memory=True, attention_threads=threads)


def _exact_facts(name: str | None) -> "tuple[str, MachineFacts]":
    """The device's full name and what its worker will find.

    Raises:
        DeviceUnavailable: there is no such device.
    """
    from engine.devices.open import facts_of, open_device

    device = open_device(name)
    try:
        return device.name, facts_of(device)
    finally:
        device.close()
