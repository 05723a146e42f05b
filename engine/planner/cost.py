"""Seconds of a pass and of a workload, lane by lane, from bytes and FLOPs. Pure functions; no torch.

Two schedules. Ours, the mixed pass: weights are brought once, and decode tokens and prompts are computed beside that; a
pass lasts as long as its longest lane plus what cannot overlap. FlexGen's, a block of two phases, to compare with.

Units: bytes, seconds, FLOP, tokens. Memory is not reckoned here: ``engine.planner.default.resolve_plan``, which sizes
what the engine allocates, is asked instead.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

from engine.memory.lane import LaneName
from engine.model.family import HEAD, ModelShape, layer_name
from engine.planner.default import StoredWeights, kv_bytes_per_token
from engine.planner.hardware import LINKS, Hardware
from engine.planner.plan import DTYPE_BYTES, Plan, Shares, TierName
from engine.planner.workload import Lengths, Workload

MIN_BALANCED_PROMPT_TOKENS = 64
"""As ``engine.balance``: a pass carries so many in any case."""
MAX_SIMULATED_PASSES = 2000
"""Beyond these a long workload is taken to go on at its steady rate."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Overlap:
    """What runs beside compute. Whatever does not, compute waits for."""

    kv: bool = True
    """Keys and values that attention needs from another tier are brought ahead of time."""
    activations: bool = True
    """So are hidden states that wait in host memory or on disk."""


OVERLAPPED = Overlap()
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
    moved: float = 0.0
    """KV tokens, whole extents, that decoding would have to bring if none lay where compute can address it."""
    reread: float = 0.0
    """KV tokens that parts of prompts look back at, the prompt having been cut."""
    logits_rows: float = 0.0

    @property
    def tokens(self) -> float:
        """Tokens that go through the layers."""
        return self.prompt_tokens + self.decode_tokens


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
        self._matmul = hardware.matmul_rate(plan.dtype)
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
        kv_transfer = self._kv_transfer_bytes(load)
        batch_bytes = self._hidden_bytes * load.tokens / self._batches(load.tokens)
        waits_s = 0.0
        for lane in LINKS:
            rate = self._hardware.lanes[lane]
            kv_s = rate.seconds(kv[lane], kv_transfer)
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

    def _compute_seconds(self, load: PassLoad) -> tuple[float, float]:
        """Busy seconds of the device and of the host."""
        hardware, layers = self._hardware, self._shape.num_layers
        batches = self._batches(load.tokens)
        compute_s = self._matmul.seconds(sum(self._layer_flops) * load.tokens, load.tokens / batches)
        rows_at_once = min(load.logits_rows, self._plan.logits_rows)
        compute_s += self._matmul.seconds(self._head_flops * load.logits_rows, rows_at_once)
        pair_flops = 4 * self._shape.num_heads * self._shape.head_size * layers
        prompt_length = load.prompt_tokens / load.prompt_segments if load.prompt_segments else 0.0
        compute_s += hardware.prompt_attention.seconds(pair_flops * load.prompt_pairs, prompt_length)
        on_host = self._kv_share[TierName.HOST] + self._kv_share[TierName.DISK] if self._host_attends else 0.0
        read = load.looked_back * self._token_bytes
        size = read / load.decode_tokens / layers if load.decode_tokens else 0.0
        compute_s += hardware.decode_attention.seconds(read * (1 - on_host), size)
        compute_s += hardware.layer_overhead.value * layers * batches
        segments = load.prompt_segments + load.decode_tokens * (1 - on_host)
        compute_s += hardware.segment_overhead.value * layers * segments
        host_s = hardware.host_attention.seconds(read * on_host, size) if hardware.host_attention and on_host else 0.0
        return compute_s, host_s

    def _link_bytes(
        self, load: PassLoad
    ) -> tuple[dict[LaneName, float], dict[LaneName, float], dict[LaneName, float]]:
        """Bytes of weights, of keys and values, and of activations that each lane moves."""
        weights, kv, activations = (dict.fromkeys(LINKS, 0.0) for _ in range(3))
        copies = not self._shares_host
        on_disk, on_host = self._kv_share[TierName.DISK], self._kv_share[TierName.HOST]
        below = on_disk + on_host
        new, moved = load.tokens * self._token_bytes, (load.moved + load.reread) * self._token_bytes
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

    def _kv_transfer_bytes(self, load: PassLoad) -> float:
        """One layer of one extent; for what decoding does not move, of a prompt."""
        segments = load.decode_tokens or load.prompt_segments
        tokens = (load.moved if load.decode_tokens else load.prompt_tokens) / segments if segments else 0.0
        return max(1.0, min(tokens, self._plan.extent_tokens) * self._layer_token_bytes)

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
    """Sequences that run at the same time, once steady."""

    @property
    def bound_by(self) -> LaneName:
        """The lane that decides, once steady."""
        return self.steady_pass.bound_by


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
        moved=lengths.moved(plan.extent_tokens),
        reread=cuts * prompt / 2,
        logits_rows=lengths.generated,
    )


def mean_request_load(workload: Workload, plan: Plan) -> PassLoad:
    """The mean over a workload's requests."""
    loads = [(each.requests / workload.requests, request_load(each, plan)) for each in workload.lengths]
    return _sum(loads)


def residency_passes(lengths: Lengths, plan: Plan) -> float:
    """Passes from admission to the end."""
    return lengths.decode_steps + max(1.0, lengths.prompt / plan.tokens_per_pass)


def usable_kv_tokens(workload: Workload, plan: Plan, token_bytes: int) -> float:
    """Tokens of KV cache that whole sequences can take: a sequence lives in one tier."""
    reserved = workload.mean(lambda each: each.reserved)
    return sum(math.floor(pool / token_bytes / reserved + 1e-9) for pool in plan.kv_bytes.values()) * reserved


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
    """How long a workload takes with mixed passes, from the first pass to the last output.

    A sequence lives in the tiers in the proportion of their pools. If no sequence finds room, everything is 0 per
    second and takes infinitely long.
    """
    model = PassModel(hardware, shape, stored, plan, host_attention=host_attention, overlap=overlap)
    token_bytes = kv_bytes_per_token(shape, plan.dtype)
    rate = steady_requests_per_pass(workload, plan, token_bytes)
    load = _scaled(mean_request_load(workload, plan), rate)
    cost = model.cost(load)
    steady = rate * workload.generated / workload.requests / cost.seconds if rate else 0.0
    passes, seconds = _simulate(model, plan, workload, token_bytes, rate, cost) if rate else (math.inf, math.inf)
    return Prediction(
        seconds=seconds,
        passes=passes,
        generated_per_s=workload.generated / seconds,
        total_per_s=(workload.generated + workload.prompt_tokens) / seconds,
        steady_generated_per_s=steady,
        steady_pass=cost,
        steady_load=load,
        running=rate * workload.mean(lambda each: residency_passes(each, plan)),
    )


def _simulate(
    model: PassModel, plan: Plan, workload: Workload, token_bytes: int, rate: float, steady: PassCost
) -> tuple[float, float]:
    """Passes and seconds of the whole workload, pass after pass, with so many requests of each length as a fluid.

    As the scheduler does it: decode tokens first, then as many prompts as find room and tokens; while more wait than
    find room, no more prompt tokens than make compute as long as the links.
    """
    kinds = [(each.requests / workload.requests, each, request_load(each, plan)) for each in workload.lengths]
    room = usable_kv_tokens(workload, plan, token_bytes)
    prompt_mean = workload.mean(lambda each: each.prompt)
    reserved_mean = workload.mean(lambda each: each.reserved)
    begun = [0.0]  # requests admitted up to and including each pass
    total, seconds, tail = float(workload.requests), 0.0, max(each.generated for each in workload.lengths)
    balance: float | None = None
    prompt_s: float | None = None
    number = 0
    while begun[-1] < total - 1e-6 or number < len(begun) - 1:
        if len(begun) > MAX_SIMULATED_PASSES + tail and begun[-1] < total - rate:
            # Whatever is neither ramp-up nor tail goes on as it does.
            skipped = (total - begun[-1]) / rate
            seconds += skipped * steady.seconds
            number += int(skipped)
            total = begun[-1]
        decoding = PassLoad()
        used = 0.0
        for weight, each, whole in kinds:
            alive = begun[-1] - _at(begun, len(begun) - 1 - each.decode_steps)
            used += weight * alive * each.reserved
            if each.decode_steps:
                decoding = _sum([(1.0, decoding), (weight * alive / each.decode_steps, _decode_only(whole))])
        waiting = total - begun[-1]
        admitted = min(waiting, max(0.0, room - used) / reserved_mean)
        admitted = min(admitted, max(0.0, plan.tokens_per_pass - decoding.tokens) / prompt_mean)
        if balance is not None and waiting * reserved_mean > max(0.0, room - used):
            admitted = min(admitted, max(MIN_BALANCED_PROMPT_TOKENS, balance) / prompt_mean)
        if admitted <= 0 and decoding.tokens < 1e-9:
            break
        starting = _sum([(weight * admitted, _prompt_only(whole)) for weight, _, whole in kinds])
        cost = model.cost(_sum([(1.0, decoding), (1.0, starting)]))
        seconds += cost.seconds
        links = max(busy for lane, busy in cost.lane_seconds.items() if lane is not LaneName.DEVICE_COMPUTE)
        compute_s = cost.lane_seconds[LaneName.DEVICE_COMPUTE]
        if starting.prompt_tokens >= MIN_BALANCED_PROMPT_TOKENS:
            prompt_s = min(compute_s / starting.prompt_tokens, prompt_s or math.inf)
        if links and prompt_s:
            balance = (links - max(0.0, compute_s - starting.prompt_tokens * prompt_s)) / prompt_s
        begun.append(begun[-1] + admitted)
        number += 1
        if total - begun[-1] < 1e-6:
            # The tail: nothing begins any more, and passes end with the longest request that still runs.
            last = _tail_seconds(model, kinds, begun)
            return number + last[0], seconds + last[1]
    return number, seconds


def _tail_seconds(
    model: PassModel, kinds: list[tuple[float, Lengths, PassLoad]], begun: list[float]
) -> tuple[int, float]:
    """Passes and seconds after the one that admitted the last request."""
    seconds, passes = 0.0, 0
    history = list(begun)
    while True:
        decoding = PassLoad()
        for weight, each, whole in kinds:
            alive = history[-1] - _at(history, len(history) - 1 - each.decode_steps)
            if each.decode_steps:
                decoding = _sum([(1.0, decoding), (weight * alive / each.decode_steps, _decode_only(whole))])
        if decoding.tokens < 1e-9:
            return passes, seconds
        seconds += model.cost(decoding).seconds
        passes += 1
        history.append(history[-1])


def _at(begun: list[float], index: int) -> float:
    return begun[index] if index > 0 else 0.0


def _decode_only(load: PassLoad) -> PassLoad:
    return PassLoad(
        decode_tokens=load.decode_tokens,
        looked_back=load.looked_back,
        moved=load.moved,
        logits_rows=load.logits_rows - 1,
    )


def _prompt_only(load: PassLoad) -> PassLoad:
    return PassLoad(
        prompt_tokens=load.prompt_tokens,
        prompt_segments=load.prompt_segments,
        prompt_pairs=load.prompt_pairs,
        reread=load.reread,
        logits_rows=1,
    )


def _scaled(load: PassLoad, factor: float) -> PassLoad:
    return _sum([(factor, load)])


def _sum(loads: list[tuple[float, PassLoad]]) -> PassLoad:
    return PassLoad(
        prompt_tokens=sum(weight * load.prompt_tokens for weight, load in loads),
        decode_tokens=sum(weight * load.decode_tokens for weight, load in loads),
        prompt_segments=sum(weight * load.prompt_segments for weight, load in loads),
        prompt_pairs=sum(weight * load.prompt_pairs for weight, load in loads),
        looked_back=sum(weight * load.looked_back for weight, load in loads),
        moved=sum(weight * load.moved for weight, load in loads),
        reread=sum(weight * load.reread for weight, load in loads),
        logits_rows=sum(weight * load.logits_rows for weight, load in loads),
    )


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
