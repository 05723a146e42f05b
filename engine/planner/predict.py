"""How long a workload takes under a plan: ramp-up, steady state and tail, pass after pass. No torch."""

import math
from dataclasses import dataclass, replace

from engine.attention.sizes import kv_bytes_per_token
from engine.dtypes import DType
from engine.memory.lane import LaneName
from engine.model.family import layer_name
from engine.planner.cost import OVERLAPPED, Overlap, PassCost, PassModel
from engine.planner.hardware import LINKS, Hardware
from engine.planner.load import PassLoad, mean_occupied, mean_request_load, mean_room, residency_passes
from engine.planner.plan import Plan
from engine.planner.simulation import Simulation
from engine.planner.workload import Workload
from engine.schedule.balance import Balance
from engine.shape import ModelShape
from engine.tiers import TierName
from engine.weights.stored import StoredWeights

MAX_SIMULATED_PASSES = 1000
"""For a prediction that people see: in 60 cases it was within 2% of what five times as many gave."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Prediction:
    """What a workload will do under a plan."""

    seconds: float
    """From the first pass to the last output, all weights being where the plan wants them."""
    passes: float
    generated_per_s: float
    total_per_s: float
    """Prompt tokens and generated ones."""
    steady_generated_per_s: float
    """While as many wait as find room: without ramp-up and tail."""
    steady_pass: PassCost
    steady_load: PassLoad
    running: float
    """Sequences that yield a token in a pass, in the mean, once steady."""

    @property
    def bound_by(self) -> LaneName:
        """The lane that decides, once steady."""
        return self.steady_pass.bound_by

    @property
    def lane_ceiling_per_s(self) -> float:
        """Generated tokens per second if that lane never paused: what this plan cannot exceed."""
        return self.steady_generated_per_s * self.steady_pass.seconds / self.steady_pass.lane_seconds[self.bound_by]


def compute_ceiling_per_s(
    hardware: Hardware, shape: ModelShape, stored: StoredWeights, workload: Workload, dtype: DType
) -> float:
    """Generated tokens per second if nothing took time but products with the layers' weights: no plan exceeds it."""
    flops = sum(stored.unit_flops[layer_name(index)] for index in range(shape.num_layers))
    tokens = workload.mean(lambda each: each.reserved)
    fastest = max(rate for _, rate in hardware.matmul_rate(dtype, shape.hidden_size).points)
    generated = workload.generated / workload.requests
    return generated * fastest / (flops * tokens)


def usable_kv_tokens(workload: Workload, plan: Plan, token_bytes: int) -> float:
    """Tokens of KV cache that whole sequences can take: a sequence lives in one tier."""
    room = mean_room(workload, plan)
    return sum(math.floor(pool / token_bytes / room + 1e-9) for pool in plan.kv_bytes.values()) * room


def steady_requests_per_pass(workload: Workload, plan: Plan, token_bytes: int) -> float:
    """New requests a pass once as many end as begin: the least of what memory, slots and tokens allow."""
    residency = workload.mean(lambda each: residency_passes(each, plan))
    return min(
        usable_kv_tokens(workload, plan, token_bytes) / mean_occupied(workload, plan),
        min(workload.requests, plan.tokens_per_pass) / residency,
        plan.tokens_per_pass / workload.mean(lambda each: each.reserved),
    )


def as_filled(workload: Workload, plan: Plan, token_bytes: int) -> Plan:
    """The plan with pools as large as the part of them that a workload fills, once steady: where the device is filled
    first, the other tiers hold what it has no room for."""
    if plan.kv_fills_together:
        return plan
    if plan.schedule == "block":
        tokens = min(float(workload.requests), plan.tokens_per_pass) * mean_room(workload, plan)
    else:
        tokens = steady_requests_per_pass(workload, plan, token_bytes) * mean_occupied(workload, plan)
    left = math.ceil(tokens * token_bytes)
    filled = {}
    for tier in TierName:
        filled[tier] = min(plan.kv_bytes[tier], left)
        left -= filled[tier]
    return replace(plan, kv_bytes=filled) if any(filled.values()) else plan


def predict(
    hardware: Hardware,
    shape: ModelShape,
    stored: StoredWeights,
    plan: Plan,
    workload: Workload,
    overlap: Overlap = OVERLAPPED,
    most_passes: int = MAX_SIMULATED_PASSES,
) -> Prediction:
    """How long a workload takes under a plan, from the first pass to the last output.

    A sequence lives in the tiers in the proportion in which they are filled. Requests that no tier has room for are
    left out, in tokens and in time, since the engine refuses each of them. If these are all, everything is 0 per second
    and takes infinitely long. After ``most_passes`` a long workload is taken to go on at its steady rate.
    """
    workload = workload.of_at_most(plan.largest_sequence(shape)) or workload
    token_bytes = kv_bytes_per_token(shape, plan.kv_format)
    filled = as_filled(workload, plan, token_bytes)
    model = PassModel(hardware, shape, stored, filled, overlap)
    run = _Run(model, plan, workload, token_bytes)
    if plan.schedule == "block":
        return run.by_block()
    return run.mixed(most_passes)


class _Run:
    """A workload under a plan."""

    def __init__(self, model: PassModel, plan: Plan, workload: Workload, token_bytes: int) -> None:
        self._model, self._plan, self._workload, self._token_bytes = model, plan, workload, token_bytes
        self._request = mean_request_load(workload, plan)
        self._rate = steady_requests_per_pass(workload, plan, token_bytes)

    def mixed(self, most_passes: int) -> Prediction:
        """Decode tokens and prompts in one pass."""
        load = self._request.scaled(self._rate)
        cost = self._model.cost(load)
        if not self._rate:
            return self._prediction(math.inf, math.inf, 0.0, cost, load)
        steady = self._rate * self._workload.generated / self._workload.requests / cost.seconds
        passes, seconds = self._simulate(cost, most_passes)
        return self._prediction(passes, seconds, steady, cost, load)

    def by_block(self) -> Prediction:
        """As many sequences as find room; their prompts; then decoding until the last of them ends; then the next."""
        workload = self._workload
        fitting = usable_kv_tokens(workload, self._plan, self._token_bytes) / mean_room(workload, self._plan)
        in_block = min(float(workload.requests), self._plan.tokens_per_pass, math.floor(fitting + 1e-9))
        if in_block < 1:
            return self._prediction(math.inf, math.inf, 0.0, self._model.cost(PassLoad()), PassLoad())
        prompts = self._request.prompts.scaled(in_block)
        prompt_passes = max(1.0, prompts.prompt_tokens / self._plan.tokens_per_pass)
        costs = [(prompt_passes, self._model.cost(prompts.scaled(1 / prompt_passes)))]
        steps = max(each.decode_steps for each in workload.lengths)
        costs += [(1.0, self._model.cost(self._decoding(in_block, step))) for step in range(steps)]
        passes = sum(times for times, _ in costs)
        seconds = sum(times * cost.seconds for times, cost in costs)
        lane_seconds = {
            lane: sum(times * cost.lane_seconds[lane] for times, cost in costs) / passes for lane in LaneName
        }
        bound_by = max(lane_seconds, key=lane_seconds.__getitem__)
        mean = PassCost(
            seconds=seconds / passes,
            lane_seconds=lane_seconds,
            lane_bytes={lane: sum(times * cost.lane_bytes[lane] for times, cost in costs) / passes for lane in LINKS},
            exposed_s=seconds / passes - lane_seconds[bound_by],
            bound_by=bound_by,
        )
        blocks = self._workload.requests / in_block
        steady = in_block * self._workload.generated / self._workload.requests / seconds
        load = self._request.scaled(in_block / passes)
        return self._prediction(blocks * passes, blocks * seconds, steady, mean, load)

    def _prediction(self, passes: float, seconds: float, steady: float, cost: PassCost, load: PassLoad) -> Prediction:
        workload = self._workload
        return Prediction(
            seconds=seconds,
            passes=passes,
            generated_per_s=workload.generated / seconds,
            total_per_s=(workload.generated + workload.prompt_tokens) / seconds,
            steady_generated_per_s=steady,
            steady_pass=cost,
            steady_load=load,
            running=load.logits_rows,
        )

    def _decoding(self, in_block: float, step: int) -> PassLoad:
        """A decode step of a block, each sequence attending to the mean over its steps."""
        workload = self._workload
        runs = [each for each in workload.lengths if each.decode_steps > step]
        numbers = [in_block * each.requests / workload.requests for each in runs]
        tokens = sum(numbers)
        attended = sum(number * each.attended / each.decode_steps for number, each in zip(numbers, runs, strict=True))
        return PassLoad(decode_tokens=tokens, attended=attended, logits_rows=tokens)

    def _simulate(self, steady: PassCost, most_passes: int) -> tuple[float, float]:
        """Passes and seconds, as the scheduler fills passes and as balance is learned from them."""
        simulation = Simulation(self._workload, self._plan, self._token_bytes)
        balance = Balance()
        last = most_passes + max(each.decode_steps for each in self._workload.lengths)
        passes, seconds = 0.0, 0.0
        while not simulation.is_done:
            if passes == last and simulation.num_waiting > self._rate:
                # Whatever is neither ramp-up nor tail goes on as it does.
                skipped = simulation.num_waiting / self._rate
                seconds += skipped * steady.seconds
                passes += skipped
                simulation.drop_waiting()
            load = simulation.next_pass(balance.prompt_tokens)
            cost = self._model.cost(load)
            passes, seconds = passes + 1, seconds + cost.seconds
            links_s = max(busy for lane, busy in cost.lane_seconds.items() if lane is not LaneName.DEVICE_COMPUTE)
            balance.learn_pass(load.prompt_tokens, cost.lane_seconds[LaneName.DEVICE_COMPUTE], links_s)
        return passes, seconds
