"""The best placement for given batches, as a linear program: a bound, and where to look for plans. No torch.

The linear relaxation of FlexGen's search (Sheng et al. 2023, section 4.3), for mixed passes: parts of layers are
allowed. It is linear because steady throughput is a ratio. With ``R`` requests finished per second, ``T`` seconds a
pass and ``x`` layers in a tier, everything that a pass does is linear in (x, R·T); divided by T it is linear in (x/T,
R, 1/T), and R is what is maximised.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from enum import Enum

from engine.memory.lane import LaneName
from engine.model.family import layer_name
from engine.planner.cost import Overlap, PassModel
from engine.planner.hardware import LINKS, Hardware
from engine.planner.load import PassLoad, mean_occupied, mean_request_load, residency_passes
from engine.planner.lp import LinearProgram
from engine.planner.placing import whole_layers
from engine.planner.plan import Plan
from engine.planner.plan_input import PlanInput
from engine.planner.resolve import fitting_plan, group_tokens_for, resolve_plan
from engine.planner.workload import Workload
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
    stay_packed: bool | None = None
    """Whether layers lie on the device as they are stored; ``None``: there is no difference."""


@dataclass(frozen=True, slots=True)
class Optimum:
    """The solution of one linear program: no plan yet, since layers come whole."""

    choice: Choice
    bound: float
    """Requests per second that no plan of this choice exceeds."""
    layers: Mapping[TierName, float]
    kv: Mapping[TierName, float]
    """Share of the sequences."""


class _Quantity(Enum):
    LAYERS = "layers in a tier, over T"
    REQUESTS = "requests per unit of time whose KV cache lies in a tier"
    PASSES = "1/T: passes per unit of time"


_Variable = tuple[_Quantity, TierName | None]
_Program = LinearProgram[_Variable]
_PASSES: _Variable = (_Quantity.PASSES, None)
_LAYERS: tuple[_Variable, ...] = tuple((_Quantity.LAYERS, tier) for tier in _TIERS)
_REQUESTS: tuple[_Variable, ...] = tuple((_Quantity.REQUESTS, tier) for tier in _TIERS)


@dataclass(frozen=True, slots=True)
class _Seconds:
    """What one layer's weights and one request cost, by tier in the order of ``_TIERS``."""

    layer: Mapping[LaneName, Sequence[float]]
    request: Mapping[LaneName, Sequence[float]]
    waits: Sequence[float]
    """How long compute waits for a request's cache."""


class Relaxation:
    """Solves for one choice after another."""

    def __init__(self, given: PlanInput, hardware: Hardware, workload: Workload, overlap: Overlap) -> None:
        self._given, self._hardware, self._workload, self._overlap = given, hardware, workload, overlap
        self._num_layers = given.shape.num_layers
        layers = [layer_name(index) for index in range(self._num_layers)]
        self._computed_bytes = max(given.stored.computed_bytes(layer, given.dtype) for layer in layers)
        self._stored_bytes = max(given.stored.unit_bytes[layer] for layer in layers)
        self._rooms: dict[Choice, Mapping[TierName, float] | None] = {}

    def solve(self, choice: Choice, shares: Sequence[float]) -> dict[float, Optimum]:
        """The optimum for each share of the layers that may stay on the device; none where nothing fits.

        ``shares``: the largest first.
        """
        room = self._room(choice)
        if room is None:
            return {}
        sample = self._sample(choice)
        per_request = mean_request_load(self._workload, sample)
        seconds = self._seconds(choice, sample, per_request)
        # In this unit of time 1/T is near 1, so that the solver's tolerances mean something.
        unit = max(
            1e-9, sum(seconds.request[LaneName.DEVICE_COMPUTE]) / 3 * sample.tokens_per_pass / per_request.tokens
        )
        unit += max(max(seconds.layer[lane]) for lane in seconds.layer) * self._num_layers
        program = LinearProgram((*_LAYERS, *_REQUESTS, _PASSES))
        self._limit_memory(program, room, sample, choice)
        self._limit_lanes(program, choice, seconds, unit)
        self._limit_batches(program, sample, per_request)
        self._place_layers(program, choice)
        self._fix_shares(program)
        found: dict[float, Optimum] = {}
        optimum: Optimum | None = None
        for share in shares:
            if share < 1 and not choice.streams:
                continue
            if optimum is not None and optimum.layers[TierName.DEVICE] <= share * self._num_layers:
                found[share] = optimum  # a limit that it keeps anyway changes nothing
                continue
            limited = program.copy()
            limited.at_most({_LAYERS[0]: 1.0, _PASSES: -share * self._num_layers})
            values = limited.maximise(dict(zip(_REQUESTS, (1.0, 1.0 - TIE / 4, 1.0 - TIE), strict=True)))
            if values is None or values[_PASSES] <= 0:
                continue
            served = sum(values[name] for name in _REQUESTS)
            if served > 0:
                layers = (min(self._num_layers, values[name] / values[_PASSES]) for name in _LAYERS)
                found[share] = optimum = Optimum(
                    choice,
                    served / unit,
                    dict(zip(_TIERS, layers, strict=True)),
                    dict(zip(_TIERS, (values[name] / served for name in _REQUESTS), strict=True)),
                )
        return found

    def _limit_memory(self, program: _Program, room: Mapping[TierName, float], sample: Plan, choice: Choice) -> None:
        """Layers and KV cache of a tier fit into what is left of it; in GiB."""
        occupied = mean_occupied(self._workload, sample) * self._given.token_bytes
        gib = float(GIB)
        layer_bytes = self._layer_bytes(choice)
        for index, tier in enumerate(_TIERS):
            program.at_most(
                {
                    _LAYERS[index]: layer_bytes[tier] / gib,
                    _REQUESTS[index]: occupied / gib,
                    _PASSES: -room[tier] / gib,
                }
            )

    def _limit_lanes(self, program: _Program, choice: Choice, seconds: _Seconds, unit: float) -> None:
        """No lane is busy for longer than a pass, nor what cannot overlap."""
        overhead = {_PASSES: self._hardware.pass_overhead.value / unit}

        def limit(requests: Sequence[float], layers: Sequence[float] = (0.0, 0.0, 0.0)) -> None:
            weights = [each / unit for each in (*layers, *requests)]
            program.at_most(dict(zip((*_LAYERS, *_REQUESTS), weights, strict=True)) | overhead, 1.0)

        for lane in seconds.layer:
            limit(seconds.request[lane], seconds.layer[lane])
        computes, unpacking = seconds.request[LaneName.DEVICE_COMPUTE], seconds.layer[LaneName.DEVICE_COMPUTE]
        if choice.host_attention:
            host = seconds.request[LaneName.HOST_COMPUTE]
            limit([(computes[i] + host[i]) / choice.micro_batches for i in range(3)], unpacking)
        limit([computes[i] + seconds.waits[i] for i in range(3)], unpacking)

    def _limit_batches(self, program: _Program, sample: Plan, per_request: PassLoad) -> None:
        """No more tokens in a pass than it carries, and no more sequences at once than there are, or tokens."""
        residency = self._workload.mean(lambda each: residency_passes(each, sample))
        most = min(self._workload.requests, sample.tokens_per_pass)
        program.at_most(dict.fromkeys(_REQUESTS, per_request.tokens) | {_PASSES: -float(sample.tokens_per_pass)})
        program.at_most(dict.fromkeys(_REQUESTS, residency) | {_PASSES: -float(most)})

    def _place_layers(self, program: _Program, choice: Choice) -> None:
        """Every layer is somewhere, and in no tier that this choice excludes."""
        for index, tier in enumerate(_TIERS):
            if tier is not TierName.DEVICE and tier not in choice.streams:
                program.without(_LAYERS[index])
        program.equal(dict.fromkeys(_LAYERS, 1.0) | {_PASSES: -float(self._num_layers)})

    def _fix_shares(self, program: _Program) -> None:
        """What a person fixed of weights and cache."""
        options = self._given.options
        if options.weights is not None:
            counts = whole_layers(self._num_layers, options.weights)
            for index, tier in enumerate(_TIERS[:2]):
                program.equal({_LAYERS[index]: 1.0, _PASSES: -float(counts[tier])})
        if options.kv is not None:
            for index, tier in enumerate(_TIERS[:2]):
                share = options.kv.of(tier) / 100
                program.equal({name: float(i == index) - share for i, name in enumerate(_REQUESTS)})

    def _layer_bytes(self, choice: Choice) -> dict[TierName, int]:
        """Bytes of a layer by the tier that it lies in."""
        on_device = self._stored_bytes if choice.stay_packed else self._computed_bytes
        return {TierName.DEVICE: on_device, TierName.HOST: self._stored_bytes, TierName.DISK: 0}

    def _room(self, choice: Choice) -> Mapping[TierName, float] | None:
        """Bytes left for layers and cache: the budgets less what ``resolve_plan`` takes for everything else."""
        # Where decode tokens are attended to takes next to no memory.
        sizes = replace(choice, host_attention=False)
        if sizes not in self._rooms:
            self._rooms[sizes] = self._sized_room(sizes)
        return self._rooms[sizes]

    def _sized_room(self, choice: Choice) -> dict[TierName, float] | None:
        lowest = next(tier for tier in reversed(_TIERS) if tier is TierName.DEVICE or tier in choice.streams)
        probe = self._endless(choice, Shares(*(100 if tier is lowest else 0 for tier in _TIERS)))
        if fitting_plan(probe) is None:
            return None
        budgets = self._given.budgets
        taken = {tier: _ENDLESS - left for tier, left in self._cache_room(probe).items()}
        taken[lowest] -= self._layer_bytes(choice)[lowest] * self._num_layers
        room = {tier: float(budgets[tier] - taken[tier]) for tier in _TIERS}
        if self._hardware.shares_host_memory and not budgets[TierName.HOST]:
            room[TierName.HOST] = 0.0
        return room if min(room.values()) >= 0 else None

    def _cache_room(self, probe: PlanInput) -> dict[TierName, int]:
        """Bytes of each tier that the KV cache could take if it had all that nothing else needs."""
        room = dict(resolve_plan(probe).kv_bytes)
        # A plan gives neither disk to the cache nor, where all weights are on the device, host unless it is asked to.
        for tier in (TierName.HOST, TierName.DISK):
            kv = Shares(*(100 if each is tier else 0 for each in _TIERS))
            room[tier] = resolve_plan(probe.asking(replace(probe.options, kv=kv))).kv_bytes[tier]
        return room

    def _sample(self, choice: Choice) -> Plan:
        """A plan of this batch shape, whatever its placement."""
        plan = fitting_plan(self._endless(choice, Shares(0, 0, 100)))
        assert plan is not None
        return plan

    def _endless(self, choice: Choice, weights: Shares) -> PlanInput:
        """This batch shape and placement of weights, where memory is no matter."""
        in_memory = self._given.asking(replace(self._given.options, micro_batch=choice.micro_batch))
        options = replace(
            in_memory.options,
            micro_batches=choice.micro_batches,
            weights=weights,
            kv=None,
            host_attention=None,  # what it takes of the host is sized with the plan
            stay_packed=choice.stay_packed,
            group_tokens=group_tokens_for(in_memory),  # by the budgets that there are
        )
        endless = self._given.asking(options).within(dict.fromkeys(TierName, _ENDLESS))
        return replace(endless, workload=None)  # which would limit the cache

    def _seconds(self, choice: Choice, sample: Plan, per_request: PassLoad) -> _Seconds:
        """Read off the very cost model that predicts: of passes full of such requests, all in one tier, without weights
        to stream or to unpack; and of an empty pass over layers of one tier.
        """
        full = max(1.0, sample.tokens_per_pass / per_request.tokens)
        packed = per_request.scaled(full)
        count = self._num_layers
        layer_s: dict[LaneName, list[float]] = {lane: [] for lane in LaneName}
        request_s: dict[LaneName, list[float]] = {lane: [] for lane in LaneName}
        waits = []
        for tier in _TIERS:
            streaming = self._model(replace(sample, layers=(tier,) * count), choice)
            weights = streaming.cost(PassLoad())
            pools = {each: int(each is tier) for each in _TIERS}
            resident = replace(sample, layers=(TierName.DEVICE,) * count, stay_packed=False, kv_bytes=pools)
            cache = self._model(resident, choice).cost(packed)
            for lane in LaneName:
                share = self._contended(lane)
                layer_s[lane].append(weights.lane_seconds[lane] / count / share if lane in LINKS else 0.0)
                request_s[lane].append(cache.lane_seconds[lane] / full / share)
            layer_s[LaneName.DEVICE_COMPUTE][-1] = streaming.unpack_s / count
            links = sum(cache.lane_seconds[lane] for lane in LINKS) + cache.lane_seconds[LaneName.HOST_COMPUTE]
            waits.append(0.0 if self._overlap.kv else links / full)
        return _Seconds(layer_s, request_s, waits)

    def _contended(self, lane: LaneName) -> float:
        if lane is LaneName.HOST_COMPUTE and self._hardware.host_attention is not None:
            return self._hardware.host_attention.busy_share
        return self._hardware.lanes[lane].busy_share if lane in LINKS else 1.0

    def _model(self, plan: Plan, choice: Choice) -> PassModel:
        plan = replace(plan, host_attention=choice.host_attention)
        return PassModel(self._hardware, self._given.shape, self._given.stored, plan, self._overlap)
