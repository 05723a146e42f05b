"""When nothing fits: the nearest plan that would, as the flags that give it. Pure; no torch.

Nearest means, in this order: the same memory with one flag changed; the same memory with every placement flag free; the
least memory, with weights on the disk and small batches. Each was sized by ``resolve_plan`` before it is named.
"""

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

from engine.devices.facts import MachineFacts
from engine.planner.plan import FLAGS, PlanOptions, flag_name
from engine.planner.plan_input import PlanInput
from engine.planner.resolve import fitting_plan
from engine.tiers import Shares
from engine.units import GIB, MIB, div_ceil

SMALLEST_MICRO_BATCH = 256
_MOST = 1 << 50
_FLAGS = [name for name, flag in FLAGS.items() if flag.by_hand and name != "schedule"]
"""What may be changed to make a plan fit; a schedule that was asked for stays."""
_BUDGETS = [name for name, flag in FLAGS.items() if flag.kind == "size"]


def nearest_fit(given: PlanInput) -> str | None:
    """Flags of a near plan that fits, with room for the longest sequence; ``None``: there is none."""
    options, facts = given.options, given.facts

    def fits(asked: PlanOptions) -> bool:
        plan = fitting_plan(given.asking(asked))
        return plan is not None and plan.largest_sequence(given.shape) >= given.longest

    for changed in _one_change(options, facts):
        if changed != options and fits(changed):
            return f"the nearest that fits: {_difference(options, changed)}"
    least = replace(
        options,
        weights=Shares(0, 0, 100),
        kv=None,
        activations=None,
        micro_batch=SMALLEST_MICRO_BATCH,
        micro_batches=1,
    )
    if fits(least):
        return f"the nearest that fits: {_difference(options, least)}"
    # Where device and host are one memory, more of the host's would be the device's under another name.
    names = [name for name in _BUDGETS if name != "host_memory" or not facts.shares_host_memory]
    bounded = _with(least, **dict.fromkeys(names, _MOST))
    if not fits(bounded):
        return None
    # Each budget in turn is lowered to what it must be while those after it are endless.
    raised = {}
    for name in names:
        asked = _with(bounded, **{name: getattr(options, name)})
        if not fits(asked):
            raised[name] = _least(bounded, name, fits)
            asked = _with(bounded, **{name: raised[name]})
        bounded = asked
    memory = " ".join(f"{flag_name(name)} {format_flag(num_bytes)}" for name, num_bytes in raised.items())
    with_flags = _difference(options, _with(bounded, **{name: getattr(options, name) for name in _BUDGETS}))
    return f"the smallest that fits: {memory} with {with_flags}" if with_flags else f"the smallest that fits: {memory}"


def format_flag(num_bytes: int) -> str:
    """Bytes as a flag takes them, rounded up to what a person would type."""
    if num_bytes < GIB:
        return f"{div_ceil(num_bytes, MIB)}MiB"
    tenths = div_ceil(10 * num_bytes, GIB)
    return f"{tenths // 10}.{tenths % 10}GiB" if tenths % 10 else f"{tenths // 10}GiB"


def _one_change(options: PlanOptions, facts: MachineFacts) -> Iterator[PlanOptions]:
    """The same with one flag changed, the smallest change first; then with the placement left to the engine."""
    if options.weights is not None:
        asked = options.weights
        for device in range(asked.device - 1, -1, -1):
            moved = asked.device - device
            # Where device and host are one memory, moving between them frees none.
            if facts.shares_host_memory:
                yield replace(options, weights=Shares(device, asked.host, asked.disk + moved))
            else:
                yield replace(options, weights=Shares(device, asked.host + moved, asked.disk))
        below = asked.host + (0 if facts.shares_host_memory else asked.device)
        for host in range(below - 1, -1, -1):
            yield replace(options, weights=Shares(0, host, 100 - host))
    batch = options.micro_batch or 2 * SMALLEST_MICRO_BATCH
    while batch > SMALLEST_MICRO_BATCH:
        batch //= 2
        yield replace(options, micro_batch=batch)
    for name in _FLAGS:
        if getattr(options, name) is not None:
            yield _with(options, **{name: None})
    yield _with(options, **dict.fromkeys(_FLAGS))


def _with(options: PlanOptions, **changes: Any) -> PlanOptions:
    """``replace`` by names that are not known before the program runs."""
    return replace(options, **changes)


def _difference(asked: PlanOptions, changed: PlanOptions) -> str:
    """What to write instead: the flags of ``changed`` that ``asked`` has not, and those to leave out."""
    words, without = [], []
    for name in _FLAGS:
        value = getattr(changed, name)
        if value == getattr(asked, name):
            continue
        flag = flag_name(name)
        if value is None:
            without.append(flag)
        else:
            words.append(f"{flag} {value}")
    return " ".join(words) + (" " * bool(words) + "without " + ", ".join(without) if without else "")


def _least(options: PlanOptions, name: str, fits: Callable[[PlanOptions], bool]) -> int:
    """The least of one budget that fits, to a MiB, by bisection: a budget that is larger never fits less."""
    low, high = 0, _MOST // MIB
    while low < high:
        middle = (low + high) // 2
        if fits(_with(options, **{name: middle * MIB})):
            high = middle
        else:
            low = middle + 1
    return high * MIB
