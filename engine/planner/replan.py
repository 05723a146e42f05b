"""Whether a model that is loaded would be better loaded again, for what is to be computed next. No torch."""

from dataclasses import replace
from math import inf

from engine.errors import HardwareError, PlanDoesNotFit
from engine.memory.lane import LaneName
from engine.planner.hardware import Hardware
from engine.planner.plan import Plan
from engine.planner.plan_input import PlanInput
from engine.planner.predict import predict
from engine.planner.search import search
from engine.planner.workload import Workload

MOVING = 2.0
"""Times the model's size over the disk's speed: what loading takes, checks and fresh memory included."""
LEAST_GAIN = 0.1
"""The share of a workload's time that another plan must save: predictions are off by as much."""


class Replanning:
    """Asks for each new workload, but for those like one that it was asked for: a search takes seconds."""

    def __init__(self, given: PlanInput, plan: Plan, hardware: Hardware) -> None:
        """``plan``: what the model was loaded with, made of ``given``; ``hardware``: the machine's figures."""
        self._given, self._plan, self._hardware = given, plan, hardware
        self._known = [] if given.workload is None else [given.workload]

    def seconds_saved(self, workload: Workload) -> float:
        """Seconds saved by loading the model again with a plan for this workload, what that takes deducted.

        0 or less: it does not pay, or no other plan is found. Infinite: the loaded plan refuses requests for which
        another has room.
        """
        room = self._plan.largest_sequence(self._given.shape)
        if any(workload.is_like(known) and workload.longest <= max(known.longest, room) for known in self._known):
            return 0.0
        saved = self._saved(workload)
        if saved <= 0:
            self._known.append(workload)
        return saved

    def _saved(self, workload: Workload) -> float:
        given, hardware = self._given, self._hardware
        sizes = given.stored.unit_bytes.values()
        moving = MOVING * sum(sizes) / hardware.lanes[LaneName.DISK_READ].at(max(sizes))
        room = self._plan.largest_sequence(given.shape)
        try:
            now = predict(hardware, given.shape, given.stored, self._plan, workload).seconds
            if now * (1 - LEAST_GAIN) <= moving and workload.longest <= room:
                return 0.0  # however fast another plan is
            better = search(replace(given, workload=workload), hardware)
        except (PlanDoesNotFit, HardwareError):
            return 0.0
        if workload.longest > room and better.plan.largest_sequence(given.shape) > room:
            return inf
        if better.plan == self._plan:
            return 0.0
        return now * (1 - LEAST_GAIN) - better.prediction.seconds - moving
