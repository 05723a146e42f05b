"""Seconds of a pass and of a workload, lane by lane, from bytes and FLOPs. Pure functions; no torch.

Two schedules. Ours, the mixed pass: weights are brought once, and decode tokens and prompts are computed beside that; a
pass lasts as long as its longest lane plus what cannot overlap. FlexGen's, a block of two phases, to compare with.

Units: bytes, seconds, FLOP, tokens. Memory is not reckoned here: ``engine.planner.default.resolve_plan``, which sizes
what the engine allocates, is asked instead.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

from engine.memory.lane import LaneName
from engine.model.family import HEAD, ModelShape, layer_name
from engine.passes import Segment
from engine.planner.default import StoredWeights, kv_bytes_per_token
from engine.planner.hardware import LINKS, Hardware, Rate
from engine.planner.plan import DTYPE_BYTES, Plan, Shares, TierName
from engine.planner.workload import Lengths, Workload

MIN_BALANCED_PROMPT_TOKENS = 64
"""As ``engine.balance``: a pass carries so many in any case."""
MAX_SIMULATED_PASSES = 1000
"""Beyond these a long workload is taken to go on at its steady rate."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Overlap:
    """What runs beside compute. Whatever does not, compute waits for."""

    kv: bool = True
    """Keys and values that attention needs from another tier are brought ahead of time."""
    activations: bool = True
    """So are hidden states that wait in host memory or on disk."""


OVERLAPPED = Overlap()
AS_ENGINE = Overlap(activations=False)
"""What this engine does: weights, keys and values run ahead; activations of other tiers are asked for when needed."""
WAITING = Overlap(kv=False, activations=False)
"""Compute asks for both only when it needs them. Weights run ahead in either case."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PassLoad:
    """What a pass computes, in counts; not whole numbers where it is a mean over passes."""

    prompt_tokens: float = 0.0
    decode_tokens: float = 0.0
    """Sequences that add one token."""
    prompt_segments: float = 0.0
    prompt_pairs: float = 0.0
    """Pairs of a query and a key that prompt attention multiplies."""
    looked_back: float = 0.0
    """KV tokens that decode attention reads."""
    reread: float = 0.0
    """KV tokens that parts of prompts look back at, the prompt having been cut."""
    logits_rows: float = 0.0

    @property
    def tokens(self) -> float:
        """Tokens that go through the layers."""
        return self.prompt_tokens + self.decode_tokens

    def scaled(self, factor: float) -> "PassLoad":
        """So many times as much of everything."""
        return PassLoad(
            prompt_tokens=factor * self.prompt_tokens,
            decode_tokens=factor * self.decode_tokens,
            prompt_segments=factor * self.prompt_segments,
            prompt_pairs=factor * self.prompt_pairs,
            looked_back=factor * self.looked_back,
            reread=factor * self.reread,
            logits_rows=factor * self.logits_rows,
        )

    def __add__(self, other: "PassLoad") -> "PassLoad":
        return PassLoad(
            prompt_tokens=self.prompt_tokens + other.prompt_tokens,
            decode_tokens=self.decode_tokens + other.decode_tokens,
            prompt_segments=self.prompt_segments + other.prompt_segments,
            prompt_pairs=self.prompt_pairs + other.prompt_pairs,
            looked_back=self.looked_back + other.looked_back,
            reread=self.reread + other.reread,
            logits_rows=self.logits_rows + other.logits_rows,
        )

    @property
    def prompts(self) -> "PassLoad":
        """Without the decoding, if it is one request's: the pass that ends a prompt yields the first token."""
        return replace(self, decode_tokens=0.0, looked_back=0.0, logits_rows=min(1.0, self.logits_rows))


@dataclass(frozen=True, slots=True, kw_only=True)
class PassCost:
    """What a pass takes."""

    seconds: float
    lane_seconds: Mapping[LaneName, float]
    """How long each lane is busy if it is alone."""
    lane_bytes: Mapping[LaneName, float]
    exposed_s: float
    """Part of ``seconds`` that is no lane's alone: overheads, waits and contention."""
    bound_by: LaneName
    """The lane that is busy for longest."""


class PassModel:
    """The cost of passes under one plan on one machine; what does not depend on the pass is reckoned once."""

    def __init__(
        self,
        hardware: Hardware,
        shape: ModelShape,
        stored: StoredWeights,
        plan: Plan,
        *,
        host_attention: bool = False,
        overlap: Overlap = OVERLAPPED,
    ) -> None:
        self._hardware = hardware
        self._shape = shape
        self._plan = plan
        self._overlap = overlap
        self._item = DTYPE_BYTES[plan.dtype]
        self._matmul = hardware.matmul_rate(plan.dtype, shape.hidden_size)
        self._head = hardware.head_rate(plan.dtype, shape.hidden_size)
        self._prompt_attention = hardware.prompt_rate(shape.hidden_size)
        self._decode_attention = hardware.decode_rate(shape.hidden_size)
        # A weight takes part in one multiplication and one addition a token.
        self._layer_flops = [
            2 * stored.unit_bytes[layer_name(index)] / DTYPE_BYTES[stored.dtype] for index in range(shape.num_layers)
        ]
        self._head_flops = 2 * stored.unit_bytes[HEAD] / DTYPE_BYTES[stored.dtype] + 2 * (
            shape.hidden_size * shape.vocab_size
        )
        self._token_bytes = kv_bytes_per_token(shape, plan.dtype)
        self._layer_token_bytes = self._token_bytes / shape.num_layers
        self._query_bytes = shape.num_layers * shape.num_heads * shape.head_size * self._item
        self._hidden_bytes = shape.hidden_size * self._item
        pool = sum(plan.kv_bytes.values())
        self._kv_share = {tier: plan.kv_bytes[tier] / pool if pool else 0.0 for tier in TierName}
        homes = [(home, stored.unit_bytes[layer_name(index)]) for index, home in enumerate(plan.layers)]
        self._weight_bytes = {tier: sum(size for home, size in homes if home is tier) for tier in TierName}
        self._transfer_bytes = max(size for _, size in homes)
        self._shares_host = hardware.shares_host_memory
        # What compute cannot address where it lies passes through scratch.
        self._brought_share = self._kv_share[TierName.DISK] + (
            0.0 if self._shares_host else self._kv_share[TierName.HOST]
        )
        self._host_attends = host_attention and not self._shares_host and hardware.host_attention is not None

    @property
    def kv_share(self) -> Mapping[TierName, float]:
        """Part of the sequences that lives in each tier."""
        return self._kv_share

    def cost(self, load: PassLoad) -> PassCost:
        """Seconds of one pass, lane by lane."""
        compute_s, host_s = self._compute_seconds(load)
        weights, kv, activations = self._link_bytes(load)
        lane_bytes: dict[LaneName, float] = {}
        lane_seconds: dict[LaneName, float] = {LaneName.DEVICE_COMPUTE: compute_s, LaneName.HOST_COMPUTE: host_s}
        batch_bytes = self._hidden_bytes * load.tokens / self._batches(load.tokens)
        waits_s = 0.0
        for lane in LINKS:
            rate = self._hardware.lanes[lane]
            kv_s = self._kv_seconds(lane, kv[lane], load)
            activations_s = rate.seconds(activations[lane], batch_bytes)
            lane_bytes[lane] = weights[lane] + kv[lane] + activations[lane]
            lane_seconds[lane] = rate.seconds(weights[lane], self._transfer_bytes) + kv_s + activations_s
            waits_s += (0.0 if self._overlap.kv else kv_s) + (0.0 if self._overlap.activations else activations_s)
        if not self._overlap.kv:
            waits_s += host_s
        seconds = self._longest(lane_seconds, compute_s + waits_s)
        if self._host_attends:
            # One micro-batch's host attention runs beside another's products: with one alone, nothing does.
            seconds = max(seconds, (compute_s + host_s) / self._batches(load.tokens))
        seconds += self._hardware.pass_overhead.value
        bound_by = max(lane_seconds, key=lambda lane: lane_seconds[lane])
        return PassCost(
            seconds=seconds,
            lane_seconds=lane_seconds,
            lane_bytes=lane_bytes,
            exposed_s=max(0.0, seconds - lane_seconds[bound_by]),
            bound_by=bound_by,
        )

    def _batches(self, tokens: float) -> int:
        return max(1, math.ceil(tokens / self._plan.micro_batch - 1e-9))

    @staticmethod
    def _in_parts(rate: Rate, flops: float, number: float, most: int) -> float:
        """Seconds of so many tokens or rows of so many FLOP each: as many full parts as there are, and the rest."""
        full, rest = divmod(number, most)
        return rate.seconds(full * most * flops, most) + rate.seconds(rest * flops, rest)

    def _compute_seconds(self, load: PassLoad) -> tuple[float, float]:
        """Busy seconds of the device and of the host."""
        hardware, layers = self._hardware, self._shape.num_layers
        batches = self._batches(load.tokens)
        compute_s = self._in_parts(self._matmul, sum(self._layer_flops), load.tokens, self._plan.micro_batch)
        compute_s += self._in_parts(self._head, self._head_flops, load.logits_rows, self._plan.logits_rows)
        pair_flops = 4 * self._shape.num_heads * self._shape.head_size * layers
        prompt_length = load.prompt_tokens / load.prompt_segments if load.prompt_segments else 0.0
        compute_s += self._prompt_attention.seconds(pair_flops * load.prompt_pairs, prompt_length)
        on_host = self._kv_share[TierName.HOST] + self._kv_share[TierName.DISK] if self._host_attends else 0.0
        read = load.looked_back * self._token_bytes
        size = read / load.decode_tokens / layers if load.decode_tokens else 0.0
        scratch = hardware.scratch_attention
        brought = 0.0 if on_host or scratch is None else self._brought_share
        if scratch is not None:
            compute_s += scratch.seconds(read * brought, size)
        compute_s += self._decode_attention.seconds(read * (1 - on_host - brought), size)
        compute_s += hardware.layer_overhead.value * layers * batches
        segments = load.prompt_segments + load.decode_tokens * (1 - on_host - brought)
        compute_s += hardware.segment_overhead.value * layers * segments
        compute_s += hardware.sequence_overhead.value * (load.prompt_segments + load.decode_tokens)
        host_s = hardware.host_attention.seconds(read * on_host, size) if hardware.host_attention and on_host else 0.0
        return compute_s, host_s

    def _link_bytes(self, load: PassLoad) -> tuple[dict[LaneName, float], dict[LaneName, float], dict[LaneName, float]]:
        """Bytes of weights, of keys and values, and of activations that each lane moves."""
        weights, kv, activations = (dict.fromkeys(LINKS, 0.0) for _ in range(3))
        copies = not self._shares_host
        on_disk, on_host = self._kv_share[TierName.DISK], self._kv_share[TierName.HOST]
        below = on_disk + on_host
        new, moved = load.tokens * self._token_bytes, (load.looked_back + load.reread) * self._token_bytes
        weights[LaneName.DISK_READ] = self._weight_bytes[TierName.DISK]
        kv[LaneName.DISK_READ] = moved * on_disk
        kv[LaneName.DISK_WRITE] = new * on_disk
        if copies:
            weights[LaneName.HOST_TO_DEVICE] = self._weight_bytes[TierName.DISK] + self._weight_bytes[TierName.HOST]
            kv[LaneName.DEVICE_TO_HOST] = new * below
            if self._host_attends:
                # Queries go down, results come up; only parts of prompts bring what they look back at.
                queries = load.decode_tokens * below * self._query_bytes
                kv[LaneName.DEVICE_TO_HOST] += queries
                kv[LaneName.HOST_TO_DEVICE] = load.reread * self._token_bytes * below + queries
            else:
                kv[LaneName.HOST_TO_DEVICE] = moved * below
        if self._plan.activations is not TierName.DEVICE:
            # Stored after the embedding and after each layer, loaded before each layer and before the head.
            num_bytes = load.tokens * self._hidden_bytes * (self._shape.num_layers + 1)
            if copies:
                activations[LaneName.HOST_TO_DEVICE] = activations[LaneName.DEVICE_TO_HOST] = num_bytes
            if self._plan.activations is TierName.DISK:
                activations[LaneName.DISK_READ] = activations[LaneName.DISK_WRITE] = num_bytes
        return weights, kv, activations

    def _kv_seconds(self, lane: LaneName, num_bytes: float, load: PassLoad) -> float:
        """For keys and values on a lane: read extent by extent, written as they are computed, layer by layer."""
        if not num_bytes:
            return 0.0
        rate = self._hardware.kv_rate(lane)
        if lane in (LaneName.DISK_READ, LaneName.HOST_TO_DEVICE):
            segments = load.decode_tokens or load.prompt_segments
            tokens = (load.looked_back if load.decode_tokens else load.prompt_tokens) / segments if segments else 0.0
            return rate.seconds(num_bytes, max(1.0, min(tokens, self._plan.extent_tokens) * self._layer_token_bytes))
        decoded = num_bytes * load.decode_tokens / load.tokens
        prompt = load.prompt_tokens / load.prompt_segments if load.prompt_segments else 1.0
        size = min(max(1.0, prompt), self._plan.extent_tokens) * self._layer_token_bytes
        return rate.seconds(decoded, self._layer_token_bytes) + rate.seconds(num_bytes - decoded, size)

    def _longest(self, lane_seconds: Mapping[LaneName, float], compute_s: float) -> float:
        """Seconds until the last lane ends. While others work, each runs at what contention leaves it of its rate."""
        alone = dict(lane_seconds) | {LaneName.DEVICE_COMPUTE: compute_s}
        share = {lane: self._busy_share(lane) for lane in alone}
        busy = {lane: seconds / share[lane] for lane, seconds in alone.items()}
        longest = 0.0
        for lane, seconds in alone.items():
            others = max((busy[other] for other in busy if other is not lane), default=0.0)
            slowed = min(busy[lane], others)
            longest = max(longest, seconds + slowed * (1 - share[lane]))
        return longest

    def _busy_share(self, lane: LaneName) -> float:
        if lane is LaneName.DEVICE_COMPUTE:
            return self._matmul.busy_share
        if lane is LaneName.HOST_COMPUTE:
            return self._hardware.host_attention.busy_share if self._hardware.host_attention else 1.0
        return self._hardware.lanes[lane].busy_share


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
    hardware: Hardware, shape: ModelShape, stored: StoredWeights, workload: Workload, dtype: str
) -> float:
    """Generated tokens per second if nothing took time but products with the layers' weights: no plan exceeds it."""
    flops = sum(2 * stored.unit_bytes[layer_name(index)] for index in range(shape.num_layers))
    tokens = workload.mean(lambda each: each.reserved)
    fastest = max(rate for _, rate in hardware.matmul_rate(dtype, shape.hidden_size).points)
    generated = workload.generated / workload.requests
    return generated * fastest * DTYPE_BYTES[stored.dtype] / (flops * tokens)


def load_of(segments: Iterable[Segment]) -> PassLoad:
    """What a pass carries, counted."""
    load = PassLoad()
    for segment in segments:
        end = segment.start + segment.length
        if segment.is_decode:
            load += PassLoad(decode_tokens=1, looked_back=end, logits_rows=1)
            continue
        load += PassLoad(
            prompt_tokens=segment.length,
            prompt_segments=1,
            prompt_pairs=segment.length * end,
            reread=segment.start,
            logits_rows=len(segment.rows),
        )
    return load


def request_load(lengths: Lengths, plan: Plan) -> PassLoad:
    """What one request costs over all its passes. A pass of ``r`` new requests costs ``r`` times that, once steady."""
    prompt = lengths.prompt
    # A prompt is cut at the borders of micro-batches; what is cut off looks back at half of it, in the mean.
    cuts = prompt / plan.micro_batch
    chunk = min(prompt, plan.micro_batch, plan.prefill_chunk)
    return PassLoad(
        prompt_tokens=prompt,
        decode_tokens=lengths.decode_steps,
        prompt_segments=1 + cuts,
        prompt_pairs=prompt * (prompt + chunk) / 2,
        looked_back=lengths.looked_back,
        reread=cuts * prompt / 2,
        logits_rows=lengths.generated,
    )


def mean_request_load(workload: Workload, plan: Plan) -> PassLoad:
    """The mean over a workload's requests."""
    total = PassLoad()
    for each in workload.lengths:
        total += request_load(each, plan).scaled(each.requests / workload.requests)
    return total


def residency_passes(lengths: Lengths, plan: Plan) -> float:
    """Passes from admission to the end."""
    return lengths.decode_steps + max(1.0, lengths.prompt / plan.tokens_per_pass)


def usable_kv_tokens(workload: Workload, plan: Plan, token_bytes: int) -> float:
    """Tokens of KV cache that whole sequences can take: a sequence lives in one tier."""
    reserved = workload.mean(lambda each: each.reserved)
    return sum(math.floor(pool / token_bytes / reserved + 1e-9) for pool in plan.kv_bytes.values()) * reserved


def bytes_taken(plan: Plan, shape: ModelShape, workload: Workload) -> dict[TierName, int]:
    """Bytes of each tier that a run will hold at its peak: the cache's share of memory is taken at once, that of the
    disk as sequences come."""
    taken = plan.used_bytes
    needed = (
        workload.requests * math.ceil(workload.mean(lambda each: each.reserved)) * kv_bytes_per_token(shape, plan.dtype)
    )
    taken[TierName.DISK] -= max(0, plan.kv_bytes[TierName.DISK] - needed)
    return taken


def steady_requests_per_pass(workload: Workload, plan: Plan, token_bytes: int) -> float:
    """New requests a pass once as many end as begin: the least of what memory, slots and tokens allow."""
    residency = workload.mean(lambda each: residency_passes(each, plan))
    occupied = workload.mean(lambda each: each.reserved * residency_passes(each, plan))
    return min(
        usable_kv_tokens(workload, plan, token_bytes) / occupied,
        min(workload.requests, plan.tokens_per_pass) / residency,
        plan.tokens_per_pass / workload.mean(lambda each: each.reserved),
    )


def predict(
    hardware: Hardware,
    shape: ModelShape,
    stored: StoredWeights,
    plan: Plan,
    workload: Workload,
    *,
    host_attention: bool = False,
    overlap: Overlap = OVERLAPPED,
) -> Prediction:
    """How long a workload takes under a plan, from the first pass to the last output.

    A sequence lives in the tiers in the proportion of their pools. If no sequence finds room, everything is 0 per
    second and takes infinitely long.
    """
    model = PassModel(hardware, shape, stored, plan, host_attention=host_attention, overlap=overlap)
    run = _Run(model, plan, workload, kv_bytes_per_token(shape, plan.dtype))
    if plan.schedule == "block":
        return run.by_block()
    return run.mixed()


@dataclass(frozen=True, slots=True)
class _Kind:
    """Requests of one length: what one of them adds to a pass in which it decodes, in the mean over its steps."""

    share: float
    """Of all requests."""
    steps: int
    reserved: int
    looked_back: float


class _Run:
    """A workload pass after pass, with so many requests of each length as a fluid."""

    def __init__(self, model: PassModel, plan: Plan, workload: Workload, token_bytes: int) -> None:
        self._model = model
        self._plan = plan
        self._workload = workload
        self._kinds = [
            _Kind(
                each.requests / workload.requests,
                each.decode_steps,
                each.reserved,
                each.looked_back / max(1, each.decode_steps),
            )
            for each in workload.lengths
        ]
        self._request = mean_request_load(workload, plan)
        self._starting = self._request.prompts
        self._room = usable_kv_tokens(workload, plan, token_bytes)
        self._reserved = workload.mean(lambda each: each.reserved)
        self._rate = steady_requests_per_pass(workload, plan, token_bytes)
        self._longest = max(kind.steps for kind in self._kinds)

    def mixed(self) -> Prediction:
        """Decode tokens and prompts in one pass."""
        load = self._request.scaled(self._rate)
        cost = self._model.cost(load)
        if not self._rate:
            return self._prediction(math.inf, math.inf, 0.0, cost, load)
        steady = self._rate * self._workload.generated / self._workload.requests / cost.seconds
        passes, seconds = self._simulate(cost)
        return self._prediction(passes, seconds, steady, cost, load)

    def by_block(self) -> Prediction:
        """As many sequences as find room; their prompts; then decoding until the last of them ends; then the next."""
        in_block = min(
            float(self._workload.requests), self._plan.tokens_per_pass, math.floor(self._room / self._reserved + 1e-9)
        )
        if in_block < 1:
            return self._prediction(math.inf, math.inf, 0.0, self._model.cost(PassLoad()), PassLoad())
        prompts = self._starting.scaled(in_block)
        prompt_passes = max(1.0, prompts.prompt_tokens / self._plan.tokens_per_pass)
        costs = [(prompt_passes, self._model.cost(prompts.scaled(1 / prompt_passes)))]
        for step in range(self._longest):
            running = (((in_block * kind.share) if kind.steps > step else 0.0) for kind in self._kinds)
            costs.append((1.0, self._model.cost(self._decoding(list(running)))))
        passes = sum(times for times, _ in costs)
        seconds = sum(times * cost.seconds for times, cost in costs)
        lane_seconds = {
            lane: sum(times * cost.lane_seconds[lane] for times, cost in costs) / passes for lane in LaneName
        }
        bound_by = max(lane_seconds, key=lambda lane: lane_seconds[lane])
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

    def _decoding(self, running: list[float]) -> PassLoad:
        """The load of so many sequences of each kind that decode."""
        pairs = list(zip(running, self._kinds, strict=True))
        tokens = sum(running)
        return PassLoad(
            decode_tokens=tokens,
            looked_back=sum(number * kind.looked_back for number, kind in pairs),
            logits_rows=tokens,
        )

    def _balanced(self) -> tuple[float, float]:
        """Compute seconds of a prompt token where a pass carries as many as it can, and how many the links hide then.

        A pass that carries few takes longer for each; what an engine has seen of the former, it goes by.
        """
        requests = min(
            self._plan.tokens_per_pass / self._starting.prompt_tokens,
            self._room / self._reserved,
            float(self._workload.requests),
        )
        cost = self._model.cost(self._starting.scaled(requests))
        prompt_s = cost.lane_seconds[LaneName.DEVICE_COMPUTE] / (requests * self._starting.prompt_tokens)
        links_s = max(cost.lane_seconds[lane] for lane in LINKS)
        return prompt_s, links_s / prompt_s if links_s else math.inf

    def _simulate(self, steady: PassCost) -> tuple[float, float]:
        """Passes and seconds, as the scheduler fills passes: decode tokens first, then prompts that find room.

        While more wait than find room, no more prompt tokens than make compute as long as the links.
        """
        total, seconds, skipped = float(self._workload.requests), 0.0, 0.0
        begun = [0.0]  # requests admitted up to and including each pass, from pass 1
        prompt_s, balance = self._balanced()
        while True:
            now = len(begun) - 1
            running = [
                kind.share * (begun[now] - (begun[now - kind.steps] if now > kind.steps else 0.0))
                for kind in self._kinds
            ]
            decoding = self._decoding(running)
            waiting = total - begun[now]
            if waiting < 1e-6 and decoding.tokens < 1e-6:
                return now + skipped, seconds
            if now == MAX_SIMULATED_PASSES + self._longest and waiting > self._rate:
                # Whatever is neither ramp-up nor tail goes on as it does.
                skipped = waiting / self._rate
                seconds += skipped * steady.seconds
                total, waiting = begun[now], 0.0
            room = self._room - sum(number * kind.reserved for number, kind in zip(running, self._kinds, strict=True))
            admitted = min(
                waiting,
                max(0.0, room) / self._reserved,
                max(0.0, self._plan.tokens_per_pass - decoding.tokens) / self._starting.prompt_tokens,
            )
            if waiting * self._reserved > room:
                # Where nobody decodes, nobody is kept waiting: a whole prompt begins.
                least = MIN_BALANCED_PROMPT_TOKENS if decoding.tokens else self._starting.prompt_tokens
                admitted = min(admitted, max(least, balance) / self._starting.prompt_tokens)
            cost = self._model.cost(decoding + self._starting.scaled(admitted))
            seconds += cost.seconds
            begun.append(begun[now] + admitted)
            prompt_tokens = admitted * self._starting.prompt_tokens
            compute_s = cost.lane_seconds[LaneName.DEVICE_COMPUTE]
            links_s = max(busy for lane, busy in cost.lane_seconds.items() if lane is not LaneName.DEVICE_COMPUTE)
            if prompt_tokens >= MIN_BALANCED_PROMPT_TOKENS:
                prompt_s = min(prompt_s, compute_s / prompt_tokens)
            if links_s > 0 and prompt_s < math.inf:
                balance = (links_s - (compute_s - prompt_tokens * prompt_s)) / prompt_s


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockPolicy:
    """What FlexGen calls a policy: a block of ``batch`` × ``num_batches`` sequences, and where its tensors live."""

    batch: int
    num_batches: int
    weights: Shares
    kv: Shares
    activations: Shares
    host_attention: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockCost:
    """What a block of two phases takes."""

    seconds: float
    prefill_s: float
    decode_s: float
    generated_per_s: float
    decode_per_s: float
    """Tokens of decode steps over their time alone."""
    prefill_lanes: Mapping[LaneName, float]
    """Busy seconds of each lane over the whole prefill."""
    decode_lanes: Mapping[LaneName, float]
    """The same over a decode step, in the mean."""
    bound_by: LaneName
    """The lane that is busiest over the whole block."""


def block_cost(
    hardware: Hardware,
    shape: ModelShape,
    stored: StoredWeights,
    policy: BlockPolicy,
    lengths: Lengths,
    dtype: str = "float16",
) -> BlockCost:
    """FlexGen's schedule: all prompts of a block, then all its decode steps; no page cache.

    How its lanes add up is as in the fit that FlexGen released (experimental/cost_model.py): a prefill takes the
    longest of the way up (host to device plus disk reads), the way down (device to host plus disk writes) and compute;
    a decode step takes its host-to-device copies *plus* the longest of the rest, in which compute is the device's and
    the host's together, since its one thread waits for both. The pure maximum of its paper is commented out there.

    ``lengths.requests`` is not looked at: the block is as large as the policy says.
    """
    size = policy.batch * policy.num_batches
    prefill = _block_lanes(
        hardware, shape, stored, policy, dtype,
        tokens=size * lengths.prompt, rows=size * lengths.prompt, batch_tokens=policy.batch * lengths.prompt,
        pairs=size * lengths.prompt**2, looked_back=0.0, prompt=lengths.prompt,
    )  # fmt: skip
    up = prefill[LaneName.HOST_TO_DEVICE] + prefill[LaneName.DISK_READ]
    down = prefill[LaneName.DEVICE_TO_HOST] + prefill[LaneName.DISK_WRITE]
    prefill_s = max(up, down, prefill[LaneName.DEVICE_COMPUTE])
    steps = lengths.decode_steps
    looked_back = size * lengths.looked_back / steps if steps else 0.0
    decode = _block_lanes(
        hardware, shape, stored, policy, dtype,
        tokens=size, rows=size, batch_tokens=policy.batch, pairs=0.0, looked_back=looked_back, prompt=lengths.prompt,
    )  # fmt: skip
    step_s = decode[LaneName.HOST_TO_DEVICE] + max(
        decode[LaneName.DEVICE_COMPUTE] + decode[LaneName.HOST_COMPUTE],
        decode[LaneName.DEVICE_TO_HOST],
        decode[LaneName.DISK_READ],
        decode[LaneName.DISK_WRITE],
    )
    seconds = prefill_s + steps * step_s
    return BlockCost(
        seconds=seconds,
        prefill_s=prefill_s,
        decode_s=steps * step_s,
        generated_per_s=size * lengths.generated / seconds,
        decode_per_s=size / step_s,
        prefill_lanes=prefill,
        decode_lanes=decode,
        bound_by=max(LaneName, key=lambda lane: prefill[lane] + steps * decode[lane]),
    )


def _block_lanes(
    hardware: Hardware,
    shape: ModelShape,
    stored: StoredWeights,
    policy: BlockPolicy,
    dtype: str,
    *,
    tokens: float,
    rows: float,
    batch_tokens: float,
    pairs: float,
    looked_back: float,
    prompt: int,
) -> dict[LaneName, float]:
    """Busy seconds of each lane for one trip of a block through all layers."""
    item, layers = DTYPE_BYTES[dtype], shape.num_layers
    layer_bytes = [stored.unit_bytes[layer_name(index)] for index in range(layers)]
    weight_bytes = sum(layer_bytes)
    w, kv, h = (
        {tier: share.of(tier) / 100 for tier in TierName} for share in (policy.weights, policy.kv, policy.activations)
    )
    token_bytes = kv_bytes_per_token(shape, dtype)
    hidden = tokens * shape.hidden_size * item * layers
    read, new = looked_back * token_bytes, tokens * token_bytes
    below = kv[TierName.HOST] + kv[TierName.DISK]
    h_below = h[TierName.HOST] + h[TierName.DISK]
    attends = policy.host_attention and hardware.host_attention is not None
    num_bytes = {
        LaneName.HOST_TO_DEVICE: (1 - w[TierName.DEVICE]) * weight_bytes
        + h_below * hidden
        + (0.0 if attends else below * read),
        LaneName.DEVICE_TO_HOST: below * new + h_below * hidden,
        LaneName.DISK_READ: w[TierName.DISK] * weight_bytes + kv[TierName.DISK] * read + h[TierName.DISK] * hidden,
        LaneName.DISK_WRITE: kv[TierName.DISK] * new + h[TierName.DISK] * hidden,
    }
    lanes = {lane: hardware.lanes[lane].seconds(amount, max(layer_bytes)) for lane, amount in num_bytes.items()}
    matmul = hardware.matmul_rate(dtype)
    flops = 2 * weight_bytes / DTYPE_BYTES[stored.dtype] * tokens + 2 * shape.hidden_size * shape.vocab_size * rows
    compute_s = matmul.seconds(flops, batch_tokens)
    pair_flops = 4 * shape.num_heads * shape.head_size * layers
    compute_s += hardware.prompt_attention.seconds(pair_flops * pairs, prompt)
    per_sequence = max(1.0, read / tokens / layers)
    compute_s += hardware.decode_attention.seconds(read * (1 - below if attends else 1.0), per_sequence)
    compute_s += hardware.layer_overhead.value * layers * tokens / batch_tokens
    lanes[LaneName.DEVICE_COMPUTE] = compute_s
    lanes[LaneName.HOST_COMPUTE] = 0.0
    if attends and hardware.host_attention is not None:
        lanes[LaneName.HOST_COMPUTE] = hardware.host_attention.seconds(read * below, per_sequence)
    return lanes
