"""Whether a plan fits, asked before a job is stored: by the function that its worker will plan with."""

from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from cli.machine import cautious_cpu_facts, exact_facts, may_have_gpu
from cli.sizes import Sizes

if TYPE_CHECKING:
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
    from engine.planner.decide import decide
    from engine.planner.plan_input import check_asked

    if options.device == "cpu" or (options.device is None and not may_have_gpu()):
        facts = cautious_cpu_facts()
        check_asked(options, facts, disk_dir)
        with suppress(PlanDoesNotFit):
            decide(sizes.plan_input(options, "cpu", facts, disk_dir))
            return
    device, facts = exact_facts(options.device)
    check_asked(options, facts, disk_dir)
    try:
        decide(sizes.plan_input(options, device, facts, disk_dir))
    except PlanDoesNotFit as error:
        refusal = error
    else:
        return
    try:
        lengths = workload()
        if lengths is None:
            raise refusal
        decide(sizes.plan_input(options, device, facts, disk_dir, lengths), measure=_not_yet)
    except _MeasuredFirst:
        pass
    except PlanDoesNotFit as error:
        text = str(error).replace("device memory", "memory") if device == "cpu" else str(error)
        what = f"it {text.removeprefix('the plan ')}" if text.startswith("the plan ") else text
        raise PlanDoesNotFit(f"the plan does not fit: {what}") from error


def _not_yet() -> NoReturn:
    raise _MeasuredFirst
