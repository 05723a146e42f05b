"""The best plan within the budgets: discrete choices enumerated, placements by a linear program for each.

Optima are rounded to plans that could be written with flags, and each of these is sized by ``resolve_plan``, which also
sizes what the engine allocates: no second formula for memory.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import product
from math import ceil

from engine.errors import PlanDoesNotFit
from engine.formats.sizes import TENSOR_FORMATS
from engine.planner.cost import OVERLAPPED, Overlap, PassModel
from engine.planner.hardware import Hardware
from engine.planner.load import mean_request_load, mean_room, residency_passes
from engine.planner.plan import AUTO, Plan, PlanOptions
from engine.planner.plan_input import PlanInput
from engine.planner.predict import (
    MAX_SIMULATED_PASSES,
    Prediction,
    as_filled,
    predict,
    steady_requests_per_pass,
    usable_kv_tokens,
)
from engine.planner.relaxation import TIE, Choice, Optimum, Relaxation
from engine.planner.resolve import fitting_plan, resolve_plan
from engine.planner.rounding import moves, roundings
from engine.planner.workload import Workload
from engine.shape import ModelShape
from engine.tiers import Shares, TierName
from engine.units import format_bytes

MICRO_BATCHES_TOKENS = (256, 512, 1024, 2048, 4096, 8192)
MICRO_BATCHES = (1, 2, 4, 8)
RESIDENT = (1.0, 0.5, 0.0)
"""Shares of the layers that may stay on the device. The program takes products to be as fast for few tokens as for
many, so it likes a device full of weights with room for two sequences too well; it is also asked without."""
ROUNDED = 72
"""Optima that are rounded, of each such share, the best first."""
SLOWER = 0.8
"""Optima of this share of a known plan's rate are rounded, too: they may need less time to fill and to drain."""
MOST_SIMULATED, LEAST_SIMULATED = 120, 32
"""How many plans are simulated from the first pass to the last, the best estimate first; all, for blocks."""
SCREENED_PASSES, SCREENED_LIVES, FINALISTS = 200, 4, 8
"""Passes, and lives of the longest request, that are simulated to find the best plans by; and how many of these are
then predicted as carefully as can be. The steady rate, by which a short simulation goes on, is too good for plans whose
passes come in waves."""
PASSES_A_SECOND = 200
"""Passes that are simulated for each second that the workload will take: which takes about a fiftieth of that time."""
STEPS = (16, 4, 1)
"""Percents by which the best roundings are moved from tier to tier while that helps."""
AHEAD = 1.02
"""A workload is never faster than its steady state by more than this, so that slower steady states need no look."""
_TIERS = tuple(TierName)


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """The best plan that the search knows."""

    options: PlanOptions
    """As a person would write it with flags; ``resolve_plan`` makes ``plan`` of it."""
    plan: Plan
    prediction: Prediction


@dataclass(frozen=True, slots=True)
class _Rounding:
    """A plan that fits."""

    rate: float
    """Requests per second once steady."""
    seconds: float
    """An estimate for the workload, near enough to compare by."""
    room: int
    """KV tokens of the longest sequence that it holds."""
    options: PlanOptions
    plan: Plan

    @property
    def key(self) -> object:
        """Equal for plans that are one."""
        plan = self.plan
        shape = plan.micro_batch, plan.micro_batches, plan.host_attention, plan.stay_packed
        return (plan.layers, *plan.kv_bytes.values(), *shape)

    @property
    def on_disk(self) -> bool:
        """Whether it needs the disk."""
        return bool(self.plan.kv_bytes[TierName.DISK] or self.plan.num_layers_in(TierName.DISK))


def search(
    given: PlanInput, hardware: Hardware, overlap: Overlap = OVERLAPPED, most_simulated: int = MOST_SIMULATED
) -> Found:
    """The plan under which the workload ends soonest.

    Whatever a person fixed stays. No more than ``most_simulated`` plans are simulated: an answer from fewer comes
    sooner, and may be a few percent slower.

    Raises:
        PlanDoesNotFit: nothing fits; the sentence says what is short.
        HardwareError: the profile lacks a figure for the dtype.
        ValueError: nobody said what the workload is.
    """
    if given.workload is None:
        raise ValueError("a plan is searched for a workload, and none is given")
    if given.options.kv_format == AUTO:
        return _either_format(given, hardware, overlap, most_simulated)
    _check_lengths(given.shape, given.workload)
    fixed = replace(given.options, dtype=given.dtype, disk_dir=given.options.disk_dir or given.disk_dir)
    return _Search(given.asking(fixed).within(given.budgets), hardware, given.workload, overlap).best(most_simulated)


def _either_format(given: PlanInput, hardware: Hardware, overlap: Overlap, most_simulated: int) -> Found:
    """The better of what is found for each format of the KV cache; plain where there is no difference."""
    formats = TENSOR_FORMATS if given.why_not_int4 is None else TENSOR_FORMATS[:1]
    found: list[Found] = []
    refused: list[PlanDoesNotFit] = []
    for name in formats:
        try:
            asked = given.asking(replace(given.options, kv_format=name))
            found.append(search(asked, hardware, overlap, most_simulated))
        except PlanDoesNotFit as error:
            refused.append(error)
    if not found:
        raise refused[0]
    best = found[0]
    for other in found[1:]:
        if other.prediction.seconds < best.prediction.seconds * (1 - TIE):
            best = other
    return best


class _Search:
    def __init__(self, given: PlanInput, hardware: Hardware, workload: Workload, overlap: Overlap) -> None:
        self._given, self._hardware, self._workload, self._overlap = given, hardware, workload, overlap
        self._relaxation = Relaxation(given, hardware, workload, overlap)
        self._fixed = given.options
        self._num_layers = given.shape.num_layers
        lives = SCREENED_LIVES * max(each.decode_steps for each in workload.lengths)
        self._screened_passes = min(max(SCREENED_PASSES, lives), MAX_SIMULATED_PASSES)
        self._needed = 0
        """KV tokens that some tier must have room for."""
        self._sized: dict[PlanOptions, _Rounding | None] = {}
        """What was tried: optima of different shares, and moves from different starts, lead to the same plans."""

    def best(self, most_simulated: int) -> Found:
        """Bound, round, predict."""
        steady = self._rounded()
        if not steady:
            raise self._nothing_fits()
        # A request that some plan has room for shall not be refused for a few tokens per second.
        most = max(each.room for each in steady)
        self._needed = max(each.reserved for each in self._workload.lengths if each.reserved <= most)
        steady = [each for each in steady if each.room >= self._needed]
        steady += [self._climbed(start) for start in self._starts(steady)]
        steady.sort(key=lambda each: each.seconds)
        by_block = self._fixed.schedule == "block"
        per_request = self._workload.generated / self._workload.requests
        best: Prediction | None = None
        simulated: list[tuple[_Rounding, Prediction]] = []
        passes = 0.0
        for number, each in enumerate(steady if by_block else steady[:most_simulated]):
            if best is not None and not by_block:
                if number >= LEAST_SIMULATED and passes > PASSES_A_SECOND * best.seconds:
                    break
                if each.rate * per_request * AHEAD < best.generated_per_s:
                    continue
            prediction = self._predicted(each, self._screened_passes)
            simulated.append((each, prediction))
            passes += min(prediction.passes, self._screened_passes)
            if best is None or prediction.seconds < best.seconds:
                best = prediction
        simulated.sort(key=lambda pair: pair[1].seconds)
        finalists = [(each, self._predicted(each, MAX_SIMULATED_PASSES)) for each, _ in simulated[:FINALISTS]]
        soonest = min(prediction.seconds for _, prediction in finalists)
        ties = [pair for pair in finalists if pair[1].seconds <= soonest * (1 + TIE / 4)]
        chosen, prediction = min(ties, key=lambda pair: (pair[0].on_disk, pair[1].seconds))
        return Found(options=chosen.options, plan=chosen.plan, prediction=prediction)

    def _predicted(self, each: "_Rounding", most_passes: int) -> Prediction:
        given = self._given
        return predict(self._hardware, given.shape, given.stored, each.plan, self._workload, self._overlap, most_passes)

    def _rounded(self) -> "list[_Rounding]":
        """Plans near the optima of the linear programs, each once, with their steady rates."""
        found: dict[object, _Rounding] = {}
        shares = RESIDENT if self._fixed.weights is None else RESIDENT[:1]
        optima: dict[float, list[Optimum]] = {share: [] for share in shares}
        for choice in self._choices():
            for share, optimum in self._relaxation.solve(choice, shares).items():
                optima[share].append(optimum)
        for group in optima.values():
            best = 0.0
            for optimum in sorted(group, key=lambda each: -each.bound)[:ROUNDED]:
                if optimum.bound < best * SLOWER:
                    break
                for options in roundings(optimum, self._fixed, self._num_layers):
                    rounding = self._rounding(options)
                    if rounding is not None:
                        best = max(best, rounding.rate)
                        found.setdefault(rounding.key, rounding)
        return list(found.values())

    def _rounding(self, options: PlanOptions) -> "_Rounding | None":
        """The plan and its steady rate; ``None`` if it does not fit or no sequence finds room."""
        if options not in self._sized:
            self._sized[options] = self._size(options)
        rounding = self._sized[options]
        return rounding if rounding is not None and rounding.room >= self._needed else None

    def _size(self, options: PlanOptions) -> "_Rounding | None":
        plan = fitting_plan(self._given.asking(options))
        if plan is None:
            return None
        room = plan.largest_sequence(self._given.shape)
        if room < min(each.reserved for each in self._workload.lengths):
            return None
        rate, seconds = self._estimate(plan)
        return _Rounding(rate, seconds, room, options, plan) if rate > 0 else None

    def _starts(self, steady: "Iterable[_Rounding]") -> "list[_Rounding]":
        """The best of each kind: attending here or there, with most layers on the device, some or none, packed or
        not."""
        kinds: dict[object, _Rounding] = {}
        for each in sorted(steady, key=lambda each: each.seconds):
            plan = each.plan
            on_device = ceil(2 * plan.num_layers_in(TierName.DEVICE) / self._num_layers)
            kinds.setdefault((plan.host_attention, plan.stay_packed, on_device), each)
        return list(kinds.values())

    def _climbed(self, best: "_Rounding") -> "_Rounding":
        """A plan from which no small move is better: the program is linear, the machine is not quite."""
        for step in STEPS:
            better = True
            while better:
                better = False
                for options in moves(best.options, best.plan, self._fixed, step):
                    moved = self._rounding(options)
                    if moved is not None and moved.seconds < best.seconds * (1 - TIE / 10):
                        best, better = moved, True
                        break
        return best

    def _choices(self) -> Iterator[Choice]:
        # Room for more tokens than there are would be taken from the KV cache, and do nothing.
        tokens = self._workload.prompt_tokens + self._workload.requests
        enough = next((size for size in MICRO_BATCHES_TOKENS if size >= tokens), MICRO_BATCHES_TOKENS[-1])
        useful = [size for size in MICRO_BATCHES_TOKENS if size <= enough]
        batches = [self._fixed.micro_batch] if self._fixed.micro_batch else useful
        counts = (self._fixed.micro_batches,) if self._fixed.micro_batches else MICRO_BATCHES
        attends = [False, True] if self._can_attend_on_host() else [False]
        if self._fixed.host_attention == "on":
            attends = [True]
        streams = [frozenset[TierName](), frozenset({TierName.HOST}), frozenset({TierName.HOST, TierName.DISK})]
        packed: tuple[bool | None, ...] = (self._fixed.stay_packed,)
        if self._fixed.stay_packed is None and self._given.stored.has_packed(self._given.dtype):
            packed = (False, True)
        for micro_batch, count, attend, below, stay in product(batches, counts, attends, streams, packed):
            yield Choice(micro_batch, count, attend, below, stay)

    def _can_attend_on_host(self) -> bool:
        fixed, hardware = self._fixed, self._hardware
        can = not hardware.shares_host_memory and hardware.host_attention is not None
        return can and fixed.host_attention != "off" and fixed.activations in (None, TierName.DEVICE)

    def _estimate(self, plan: Plan) -> tuple[float, float]:
        """Requests per second once steady, and seconds for the workload; zeros if none finds room."""
        workload = self._workload
        rate = steady_requests_per_pass(workload, plan, self._given.token_bytes)
        if not rate:
            return 0.0, 0.0
        load = mean_request_load(workload, plan)
        filled = as_filled(workload, plan, self._given.token_bytes)
        model = PassModel(self._hardware, self._given.shape, self._given.stored, filled, self._overlap)
        pass_s = model.cost(load.scaled(rate)).seconds
        residency = workload.mean(lambda each: residency_passes(each, plan))
        at_once = usable_kv_tokens(workload, plan, self._given.token_bytes) / mean_room(workload, plan)
        steadily_s = (workload.requests / rate + residency) * pass_s
        if workload.requests > min(at_once, plan.tokens_per_pass):
            return rate / pass_s, steadily_s
        # All of them begin at once: if their prompts take few passes, nothing is ever steady.
        prompts = load.prompts.scaled(workload.requests)
        passes = max(1.0, prompts.prompt_tokens / plan.tokens_per_pass)
        steps = max(each.decode_steps for each in workload.lengths)
        seconds = passes * model.cost(prompts.scaled(1 / passes)).seconds
        if steps:
            seconds += steps * model.cost(load.decodes.scaled(workload.requests / steps)).seconds
        return rate / pass_s, min(steadily_s, seconds)

    def _nothing_fits(self) -> PlanDoesNotFit:
        """What is short even of the plan that needs least."""
        least = replace(
            self._fixed,
            micro_batch=self._fixed.micro_batch or min(MICRO_BATCHES_TOKENS),
            micro_batches=self._fixed.micro_batches or 1,
            weights=self._fixed.weights or Shares(0, 0, 100),
        )
        try:
            plan = resolve_plan(self._given.asking(least))
        except PlanDoesNotFit as error:
            return error
        needed = self._given.longest * self._given.token_bytes
        most = max(plan.kv_bytes.values())
        return PlanDoesNotFit(
            f"no tier has room for the KV cache of one sequence of this workload ({format_bytes(needed)}): the most "
            f"that is left in one is {format_bytes(most)}, {format_bytes(max(0, needed - most))} short; raise "
            "--host-memory or --disk-space to at least that much more, or shorten prompts and outputs"
        )


def _check_lengths(shape: ModelShape, workload: Workload) -> None:
    longest = max(workload.lengths, key=lambda each: each.prompt + each.generated)
    if longest.prompt + longest.generated > shape.max_positions:
        raise PlanDoesNotFit(
            f"a prompt of {longest.prompt} tokens with {longest.generated} generated is longer than the model's "
            f"{shape.max_positions} positions by {longest.prompt + longest.generated - shape.max_positions}; shorten "
            "the prompts or generate fewer tokens"
        )
