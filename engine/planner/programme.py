"""The best placement for given batches, as a linear programme: a bound, and where to look for plans. No torch.

The programme is linear because steady throughput is a ratio. With ``R`` requests finished per second, ``T`` seconds a
pass and ``x`` layers in a tier, everything a pass does is linear in (x, R·T); divided by T it is linear in (x/T, R,
1/T), and R is what is maximised.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from engine.memory.lane import LaneName
from engine.model.family import layer_name
from engine.planner.cost import PassModel
from engine.planner.default import whole_layers
from engine.planner.hardware import LINKS
from engine.planner.load import PassLoad, mean_request_load, residency_passes
from engine.planner.plan import Plan, PlanOptions
from engine.planner.problem import Problem
from engine.tiers import Shares, TierName
from engine.units import GIB

TIE = 0.01
"""Throughput that is not worth putting KV cache on disk for: of plans as good as each other, the plainer one."""
_ENDLESS = 1 << 60
_TIERS = tuple(TierName)


@dataclass(frozen=True, slots=True)
class Choice:
    """One set of discrete decisions."""

    micro_batch: int
    micro_batches: int
    host_attention: bool
    streams: frozenset[TierName]
    """Below the device, the tiers that may hold weights."""


@dataclass(frozen=True, slots=True)
class Optimum:
    """What a programme found: no plan yet, since layers come whole."""

    choice: Choice
    bound: float
    """Requests per second that no plan of this choice exceeds."""
    layers: Mapping[TierName, float]
    kv: Mapping[TierName, float]
    """Share of the sequences."""


class Programme:
    """Solves for one choice after another."""

    def __init__(self, problem: Problem) -> None:
        self._problem = problem
        assert problem.fixed.dtype is not None
        layers = [layer_name(index) for index in range(problem.shape.num_layers)]
        self._layer_bytes = {
            TierName.DEVICE: max(problem.stored.computed_bytes(layer, problem.fixed.dtype) for layer in layers),
            TierName.HOST: max(problem.stored.unit_bytes[layer] for layer in layers),
            TierName.DISK: 0,
        }

    def solve(self, choice: Choice, shares: Sequence[float]) -> dict[float, Optimum]:
        """Requests per second at best, layers and share of sequences by tier, for each share of the layers that may
        stay on the device; nothing where nothing fits."""
        import numpy as np  # heavy, and only planning needs them
        from scipy.optimize import linprog

        room = self._room(choice)
        if room is None:
            return {}
        workload = self._problem.workload
        sample, per_request = self._sample(choice)
        occupied = workload.mean(lambda each: each.reserved * residency_passes(each, sample))
        occupied *= self._problem.token_bytes
        residency = workload.mean(lambda each: residency_passes(each, sample))
        layer_s, request_s, wait_s = self._lane_seconds(choice, sample, per_request)
        layers = self._problem.shape.num_layers
        # In this unit of time 1/T is near 1, so that the solver's tolerances mean something.
        unit = max(1e-9, sum(request_s[LaneName.DEVICE_COMPUTE]) / 3 * sample.tokens_per_pass / per_request.tokens)
        unit += max(max(layer_s[lane]) for lane in layer_s) * layers
        gib = float(GIB)
        # Variables: layers by tier over T, requests per unit of time by tier of their cache, 1/T.
        rows: list[list[float]] = []
        limits: list[float] = []
        for index, tier in enumerate(_TIERS):
            row = [0.0] * 7
            row[index] = self._layer_bytes[tier] / gib
            row[3 + index] = occupied / gib
            row[6] = -room[tier] / gib
            rows.append(row)
            limits.append(0.0)
        overhead = self._problem.hardware.pass_overhead.value / unit
        for lane in layer_s:
            rows.append([s / unit for s in (*layer_s[lane], *request_s[lane])] + [overhead])
            limits.append(1.0)
        if choice.host_attention:
            both = [request_s[LaneName.DEVICE_COMPUTE][i] + request_s[LaneName.HOST_COMPUTE][i] for i in range(3)]
            rows.append([0.0] * 3 + [s / unit / choice.micro_batches for s in both] + [overhead])
            limits.append(1.0)
        waits = [request_s[LaneName.DEVICE_COMPUTE][i] + wait_s[i] for i in range(3)]
        rows.append([0.0] * 3 + [s / unit for s in waits] + [overhead])
        limits.append(1.0)
        rows.append([0.0] * 3 + [per_request.tokens] * 3 + [-float(sample.tokens_per_pass)])
        limits.append(0.0)
        rows.append([0.0] * 3 + [residency] * 3 + [-float(min(workload.requests, sample.tokens_per_pass))])
        limits.append(0.0)
        upper: list[tuple[float, float | None]] = [(0.0, None)] * 7
        for index, tier in enumerate(_TIERS):
            if tier is not TierName.DEVICE and tier not in choice.streams:
                upper[index] = (0.0, 0.0)
        equal = [[1.0, 1.0, 1.0, 0.0, 0.0, 0.0, -float(layers)]]
        right = [0.0]
        self._fix_shares(equal, right)
        found = {}
        for share in shares:
            if share < 1 and not choice.streams:
                continue
            solved = linprog(
                c=[0.0] * 3 + [-1.0, -1.0 + TIE / 4, -1.0 + TIE, 0.0],
                A_ub=np.array([*rows, [1.0] + [0.0] * 5 + [-share * layers]]),
                b_ub=np.array([*limits, 0.0]),
                A_eq=np.array(equal),
                b_eq=np.array(right),
                bounds=upper,
                method="highs",
            )
            if solved.status != 0 or solved.x[6] <= 0:
                continue
            # The solver's tolerances let variables be a little below 0.
            per_unit = [max(0.0, float(value)) for value in solved.x]
            served = sum(per_unit[3:6])
            if served > 0:
                found[share] = Optimum(
                    choice,
                    served / unit,
                    {tier: min(layers, per_unit[index] / per_unit[6]) for index, tier in enumerate(_TIERS)},
                    {tier: per_unit[3 + index] / served for index, tier in enumerate(_TIERS)},
                )
        return found

    def _fix_shares(self, equal: list[list[float]], right: list[float]) -> None:
        """What a person fixed of weights and cache."""
        if self._problem.fixed.weights is not None:
            counts = whole_layers(self._problem.shape.num_layers, self._problem.fixed.weights)
            for index, tier in enumerate(_TIERS[:2]):
                equal.append([float(i == index) for i in range(6)] + [-float(counts[tier])])
                right.append(0.0)
        if self._problem.fixed.kv is not None:
            for index, tier in enumerate(_TIERS[:2]):
                share = self._problem.fixed.kv.of(tier) / 100
                equal.append([0.0] * 3 + [float(i == index) - share for i in range(3)] + [0.0])
                right.append(0.0)

    def _room(self, choice: Choice) -> dict[TierName, float] | None:
        """Bytes left for layers and cache: the budgets less what ``resolve_plan`` takes for everything else."""
        layers = self._problem.shape.num_layers
        lowest = next(tier for tier in reversed(_TIERS) if tier is TierName.DEVICE or tier in choice.streams)
        probe = replace(
            self._problem.fixed,
            micro_batch=choice.micro_batch,
            micro_batches=choice.micro_batches,
            weights=Shares(*(100 if tier is lowest else 0 for tier in _TIERS)),
            kv=None,
            device_memory=_ENDLESS,
            host_memory=_ENDLESS,
            disk_space=_ENDLESS,
        )
        plan = self._problem.resolved(probe)
        if plan is None:
            return None
        budgets = self._problem.budgets
        taken = {tier: _ENDLESS - left for tier, left in self._cache_room(probe).items()}
        taken[lowest] -= self._layer_bytes[lowest] * layers
        room = {tier: float(budgets[tier] - taken[tier]) for tier in _TIERS}
        if self._problem.hardware.shares_host_memory and not budgets[TierName.HOST]:
            room[TierName.HOST] = 0.0
        return room if min(room.values()) >= 0 else None

    def _cache_room(self, options: PlanOptions) -> dict[TierName, int]:
        """Bytes of each tier that the KV cache could take if it had all that nothing else needs."""
        room = dict(self._problem.resolve(replace(options, kv=None)).kv_bytes)
        # A plan gives neither disk to the cache nor, where all weights are on the device, host unless it is asked to.
        for tier in (TierName.HOST, TierName.DISK):
            asked = Shares(*(100 if each is tier else 0 for each in _TIERS))
            room[tier] = self._problem.resolve(replace(options, kv=asked)).kv_bytes[tier]
        return room

    def _sample(self, choice: Choice) -> tuple[Plan, PassLoad]:
        """A plan of this batch shape, whatever its placement, and the load of one request under it."""
        plan = self._problem.resolved(
            replace(
                self._problem.fixed,
                micro_batch=choice.micro_batch,
                micro_batches=choice.micro_batches,
                weights=Shares(0, 0, 100),
                kv=None,
                device_memory=_ENDLESS,
                host_memory=_ENDLESS,
                disk_space=_ENDLESS,
            )
        )
        assert plan is not None
        return plan, mean_request_load(self._problem.workload, plan)

    def _lane_seconds(
        self, choice: Choice, sample: Plan, per_request: PassLoad
    ) -> tuple[dict[LaneName, list[float]], dict[LaneName, list[float]], list[float]]:
        """Seconds of each lane per layer and per request, by tier, and how long compute waits for a request's cache.

        Read off the very cost model that predicts: of passes full of such requests, all in one tier, without weights
        to bring; and of an empty pass over layers of one tier.
        """
        full = max(1.0, sample.tokens_per_pass / per_request.tokens)
        packed = per_request.scaled(full)
        count = self._problem.shape.num_layers
        layer_s: dict[LaneName, list[float]] = {lane: [] for lane in LaneName}
        request_s: dict[LaneName, list[float]] = {lane: [] for lane in LaneName}
        wait_s = []
        for tier in _TIERS:
            weights = self._model(replace(sample, layers=(tier,) * count), choice).cost(PassLoad())
            pools = {each: int(each is tier) for each in _TIERS}
            cache = self._model(replace(sample, layers=(TierName.DEVICE,) * count, kv_bytes=pools), choice).cost(packed)
            for lane in LaneName:
                share = self._contended(lane)
                layer_s[lane].append(weights.lane_seconds[lane] / count / share if lane in LINKS else 0.0)
                request_s[lane].append(cache.lane_seconds[lane] / full / share)
            links = sum(cache.lane_seconds[lane] for lane in LINKS) + cache.lane_seconds[LaneName.HOST_COMPUTE]
            wait_s.append(0.0 if self._problem.overlap.kv else links / full)
        return layer_s, request_s, wait_s

    def _contended(self, lane: LaneName) -> float:
        if lane is LaneName.HOST_COMPUTE and self._problem.hardware.host_attention is not None:
            return self._problem.hardware.host_attention.busy_share
        return self._problem.hardware.lanes[lane].busy_share if lane in LINKS else 1.0

    def _model(self, plan: Plan, choice: Choice) -> PassModel:
        return self._problem.model(plan, choice.host_attention)
