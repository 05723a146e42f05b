"""How work is timed: in turns with other work, so that a moment in which the machine is slow touches all alike."""

import time
from collections.abc import Callable, Sequence
from itertools import islice
from statistics import median

from engine.measure.effort import Effort, Points
from engine.memory.device import Device

Timed = Callable[[], float]
"""Does some work, and returns the seconds of a part of it: a layer's, or a sequence's."""

_TURNS = 5
_MOST = 40
"""Samples in one turn."""
_SHORTEST_S = 0.002
"""Seconds of a sample, at least: in less, waiting for the device to be done would be most of it."""
_SLOW = 4
"""Times ``figure_s`` that a work may take, in the mean: where all together have taken more, no other round begins."""


def in_turns(effort: Effort, *curves: Sequence[Timed]) -> list[list[float]]:
    """For each curve, the seconds of each work: the median over its turns, of which all works have equally many.

    Measured one after the other, the points of a curve would be of moments in which the machine is not equally fast,
    and much of its slope would be that. The first round is thrown away: works allocate and compile in it.

    Raises:
        Interrupted: somebody wants an end of it.
    """
    works = [work for each in curves for work in each]
    found: list[list[float]] = [[] for _ in works]
    for work in works:
        work()
    begin = time.perf_counter()
    for _ in range(_TURNS):
        for work, seconds in zip(works, found, strict=True):
            seconds.append(work())
        if time.perf_counter() - begin > _SLOW * effort.figure_s * len(works):
            break
    medians = iter([median(seconds) for seconds in found])
    return [list(islice(medians, len(each))) for each in curves]


def one_turn(device: Device, call: Callable[[], object], effort: Effort) -> float:
    """Seconds of one call, the median over as many as a turn has time for.

    Other work had its turn before, so that the first call, which finds none of its own in caches, is thrown away;
    unless it takes a whole turn, of which that is a small part.

    Raises:
        Interrupted: somebody wants an end of it.
    """
    budget_s = effort.figure_s / _TURNS
    effort.pause()
    first_s = _sample(device, call, 1)
    if first_s > budget_s:
        return first_s
    repeats = max(1, round(_SHORTEST_S / max(first_s, 1e-7)))
    found: list[float] = []
    while not found or (sum(found) < budget_s and len(found) < _MOST):
        effort.pause()
        found.append(_sample(device, call, repeats))
    return median(found) / repeats


def curve(sizes: Sequence[float], amounts: Sequence[float], seconds: Sequence[float]) -> Points:
    """Points of a rate, ``(size, amount per second)``."""
    return tuple((float(size), amount / each) for size, amount, each in zip(sizes, amounts, seconds, strict=True))


def timed(device: Device, call: Callable[[], object], effort: Effort) -> float:
    """Seconds of one call, in turns of its own."""
    ((seconds,),) = in_turns(effort, [lambda: one_turn(device, call, effort)])
    return seconds


def _sample(device: Device, call: Callable[[], object], repeats: int) -> float:
    device.compute_mark().wait()
    start = time.perf_counter()
    for _ in range(repeats):
        call()
    device.compute_mark().wait()
    return time.perf_counter() - start
