"""Seconds of a pass, lane by lane, from bytes and FLOPs. Pure functions; no torch.

Weights are fetched once, and decode tokens and prompts are computed beside that; a pass lasts as long as its longest
lane plus what cannot overlap.

Units: bytes, seconds, FLOP, tokens. Memory is no matter here: ``engine.planner.resolve`` sizes what the engine
allocates.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

from engine.attention.int4_sizes import leaving_bytes
from engine.attention.sizes import kv_bytes_per_token
from engine.formats.sizes import Plain
from engine.memory.lane import LaneName
from engine.model.family import HEAD, layer_name
from engine.planner.hardware import LINKS, Hardware
from engine.planner.load import PassLoad
from engine.planner.plan import Plan
from engine.planner.rates import Rate
from engine.shape import ModelShape
from engine.tiers import TierName
from engine.weights.stored import StoredWeights


@dataclass(frozen=True, slots=True, kw_only=True)
class Overlap:
    """What runs beside compute. Whatever does not, compute waits for."""

    kv: bool = True
    """Keys and values that attention needs from another tier are fetched ahead of time."""
    activations: bool = True
    """So are the hidden states of other micro-batches that wait in host memory or on disk."""


OVERLAPPED = Overlap()
"""What this engine does."""


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
    """The cost of passes under one plan on one machine; what does not depend on the pass is computed once."""

    def __init__(
        self,
        hardware: Hardware,
        shape: ModelShape,
        stored: StoredWeights,
        plan: Plan,
        overlap: Overlap = OVERLAPPED,
    ) -> None:
        self._hardware = hardware
        self._shape = shape
        self._plan = plan
        self._overlap = overlap
        self._item = plan.dtype.num_bytes
        self._matmul = hardware.matmul_rate(plan.dtype, shape.hidden_size)
        self._busy_shares = _busy_shares(hardware, self._matmul)
        self._contends = min(self._busy_shares.values()) < 1
        self._head = hardware.head_rate(plan.dtype, shape.hidden_size)
        self._prompt_attention = hardware.prompt_rate(shape.hidden_size)
        self._decode_attention = hardware.decode_rate(shape.hidden_size)
        self._host_attention = hardware.host_attention
        self._shares_host = hardware.shares_host_memory
        self._unpack_token_s = self._pack_token_s = self._pack_below_s = 0.0
        self._layer_flops = sum(stored.unit_flops[layer_name(index)] for index in range(shape.num_layers))
        self._head_flops = stored.unit_flops[HEAD]
        self._token_bytes = kv_bytes_per_token(shape, plan.kv_format)
        self._layer_token_bytes = self._token_bytes / shape.num_layers
        self._leaving_bytes = shape.num_layers * leaving_bytes(shape, plan.kv_format, plan.dtype, 1)
        self._open_bytes = plan.kv_room.beside / 2 * self._token_bytes
        """What the plain keys of a window that is not full take, in the mean, over all layers."""
        self._again_bytes = self._token_bytes * (plan.kv_room.beside / plan.kv_room.window + bool(plan.kv_room.beside))
        """What keeping a decode token's plain key changes in the spill file, beside its row: with 114 rows for 64 plain
        keys, 1.8 rows, and one that it shares with the key before it. These are read before they are written."""
        self._attended_bytes = kv_bytes_per_token(shape, Plain(plan.dtype))
        """The keys and values of a token in all layers, as they are computed with."""
        if plan.kv_format.name != Plain.name:
            self._host_attention = hardware.packed_host_attention or self._host_attention
            if self._shares_host:  # where compute addresses them on the CPU, they are multiplied as they are
                self._decode_attention = hardware.packed_decode or self._decode_attention
            rates = hardware.unpack_rate(plan.dtype), hardware.pack_rate(plan.dtype)
            values = self._attended_bytes / self._item
            self._unpack_token_s, self._pack_token_s = (values / rate for rate in rates)
            if plan.kv_room.beside:  # keys are packed by windows, below the device by the lane that keeps them
                self._pack_below_s = values / 2 / hardware.host_pack_rate(plan.dtype)
        self._query_bytes = shape.num_layers * shape.num_heads * shape.head_size * self._item
        self._hidden_bytes = shape.hidden_size * self._item
        pool = sum(plan.kv_bytes.values())
        self._kv_share = {tier: plan.kv_bytes[tier] / pool if pool else 0.0 for tier in TierName}
        layers = [(tier, stored.unit_bytes[layer_name(index)]) for index, tier in enumerate(plan.layers)]
        weight_bytes = {tier: sum(size for place, size in layers if place is tier) for tier in TierName}
        transfer_bytes = max(size for _, size in layers)
        self._weight_bytes = dict.fromkeys(LINKS, 0) | {LaneName.DISK_READ: weight_bytes[TierName.DISK]}
        if not self._shares_host:
            self._weight_bytes[LaneName.HOST_TO_DEVICE] = weight_bytes[TierName.DISK] + weight_bytes[TierName.HOST]
        self._weight_seconds = {
            lane: hardware.lanes[lane].seconds(num_bytes, transfer_bytes)
            for lane, num_bytes in self._weight_bytes.items()
        }
        # What compute cannot address where it lies passes through scratch.
        self._fetched_share = self._kv_share[TierName.DISK] + (
            0.0 if self._shares_host else self._kv_share[TierName.HOST]
        )
        in_each_pass = [
            layer_name(index)
            for index, tier in enumerate(plan.layers if stored.has_packed(plan.dtype) else ())
            if (plan.stay_packed or tier is not TierName.DEVICE) and stored.is_packed(layer_name(index), plan.dtype)
        ]
        unpacked = sum(stored.computed_bytes(layer, plan.dtype) for layer in in_each_pass) / self._item
        self.unpack_s = unpacked / hardware.unpack_rate(plan.dtype) if unpacked else 0.0
        """Seconds of a pass, whatever it carries, in which layers are unpacked from four bits."""
        can_attend = not self._shares_host and hardware.host_attention is not None
        self._host_attends = plan.host_attention and can_attend
        """Decode tokens whose keys and values lie in host memory are attended to there."""

    def cost(self, load: PassLoad) -> PassCost:
        """Seconds of one pass, lane by lane."""
        tokens = load.tokens
        batches = max(1, math.ceil(tokens / self._plan.micro_batch - 1e-9))
        batch_tokens, batch_rows = float(self._plan.micro_batch), float(self._plan.logits_rows)
        if self._host_attends and self._plan.micro_batches > 1 and load.decode_tokens > 1:
            # Dealt out evenly, so that one's attention goes on beside another's products.
            batches = max(2, batches)
            batch_tokens = tokens / batches
            batch_rows = min(batch_rows, max(1.0, load.logits_rows / batches))
        head_s = self._in_parts(self._head, self._head_flops, load.logits_rows, batch_rows)
        layers_s, host_s = self._layer_seconds(load, batches, batch_tokens)
        compute_s = layers_s + head_s + self.unpack_s
        kv, activations = self._link_bytes(load, tokens)
        lane_bytes: dict[LaneName, float] = {}
        lane_seconds: dict[LaneName, float] = {LaneName.DEVICE_COMPUTE: compute_s, LaneName.HOST_COMPUTE: host_s}
        batch_bytes = self._hidden_bytes * tokens / batches
        waits_s, asked_s = 0.0, self._host_beside(host_s, layers_s)
        overlaps, round_trips_s = self._overlap.activations, layers_s
        for lane in LINKS:
            rate = self._hardware.lanes[lane]
            kv_s = self._kv_seconds(lane, kv[lane], load, tokens)
            if lane is LaneName.DISK_WRITE:
                # The thread of that lane packs windows, also those that stay in host memory.
                kv_s += self._again_seconds(load) + tokens * self._pack_below_s * self._fetched_share
            activations_s = rate.seconds(activations[lane], batch_bytes)
            lane_bytes[lane] = self._weight_bytes[lane] + kv[lane] + activations[lane]
            lane_seconds[lane] = self._weight_seconds[lane] + kv_s + activations_s
            round_trips_s += activations_s
            waits_s += (0.0 if self._overlap.kv else kv_s) + (0.0 if overlaps else activations_s)
            if lane in (LaneName.DISK_READ, LaneName.HOST_TO_DEVICE):
                asked_s = max(asked_s, kv_s)
        if not self._overlap.kv:
            waits_s += host_s
        seconds = self._longest(lane_seconds, compute_s + waits_s)
        if self._plan.activation_slots:
            # A micro-batch is written back before it can be fetched again, and has a buffer until then.
            round_trips_s /= min(batches, self._plan.activation_slots)
            seconds = max(seconds, round_trips_s + head_s + self.unpack_s)
        if self._host_attends:
            # One micro-batch's host attention runs beside another's products: with one alone, nothing does.
            asked_s = max(asked_s, (layers_s + host_s) / batches + self.unpack_s)
        # Which keys a pass needs is known when it begins, and that is when the tokens of the one before are chosen.
        seconds = max(seconds, asked_s + head_s if asked_s else 0.0)
        seconds += self._hardware.pass_overhead.value
        bound_by = max(lane_seconds, key=lane_seconds.__getitem__)
        return PassCost(
            seconds=seconds,
            lane_seconds=lane_seconds,
            lane_bytes=lane_bytes,
            exposed_s=max(0.0, seconds - lane_seconds[bound_by]),
            bound_by=bound_by,
        )

    def _host_beside(self, host_s: float, layers_s: float) -> float:
        """Seconds of attention on the host while the device computes layers, too."""
        share = self._busy_shares[LaneName.HOST_COMPUTE]
        return host_s + min(host_s / share, layers_s) * (1 - share)

    @staticmethod
    def _in_parts(rate: Rate, flops: float, number: float, most: float) -> float:
        """Seconds of ``number`` tokens or rows of ``flops`` each, in parts of at most ``most`` and a last one."""
        full, rest = divmod(number, most)
        return rate.seconds(full * most * flops, most) + rate.seconds(rest * flops, rest)

    def _layer_seconds(self, load: PassLoad, batches: int, batch_tokens: float) -> tuple[float, float]:
        """Busy seconds of the device and of the host, between the first layer and the last.

        ``batch_tokens``: of every micro-batch but a smaller one at the end.
        """
        hardware, layers = self._hardware, self._shape.num_layers
        compute_s = self._in_parts(self._matmul, self._layer_flops, load.tokens, batch_tokens)
        compute_s += load.tokens * self._pack_token_s + (load.tokens + load.reattended) * self._unpack_token_s
        pair_flops = 4 * self._shape.num_heads * self._shape.head_size * layers
        prompt_length = load.prompt_tokens / load.prompt_segments if load.prompt_segments else 0.0
        compute_s += self._prompt_attention.seconds(pair_flops * load.prompt_pairs, prompt_length)
        on_host = self._kv_share[TierName.HOST] if self._host_attends else 0.0
        read = load.attended * self._attended_bytes
        size = read / load.decode_tokens / layers if load.decode_tokens else 0.0
        scratch = hardware.scratch_attention
        fetched = 0.0 if scratch is None else self._fetched_share - on_host
        if scratch is not None:
            compute_s += scratch.seconds(read * fetched, size)
        here = 1 - on_host - fetched
        compute_s += self._decode_attention.seconds(read * here, size)
        compute_s += load.attended * (fetched if self._shares_host else 1 - on_host) * self._unpack_token_s
        compute_s += hardware.layer_overhead.value * layers * batches
        segments = load.prompt_segments + load.decode_tokens * here
        compute_s += hardware.segment_overhead.value * layers * segments
        compute_s += hardware.sequence_overhead.value * (load.prompt_segments + load.decode_tokens)
        host_s = 0.0
        if self._host_attention is not None and on_host and load.decode_tokens:
            host_s = self._host_attention.seconds(read * on_host, size)
            host_s += hardware.host_overhead.value * layers * batches
        return compute_s, host_s

    def _link_bytes(self, load: PassLoad, tokens: float) -> tuple[dict[LaneName, float], dict[LaneName, float]]:
        """Bytes of keys and values, and of activations that each lane moves."""
        kv, activations = dict.fromkeys(LINKS, 0.0), dict.fromkeys(LINKS, 0.0)
        copies = not self._shares_host
        on_disk, on_host = self._kv_share[TierName.DISK], self._kv_share[TierName.HOST]
        below = on_disk + on_host
        new = tokens * self._token_bytes
        attended = load.attended * self._token_bytes + load.decode_tokens * self._open_bytes
        moved = attended + load.reattended * self._token_bytes
        again = load.decode_tokens * self._again_bytes
        kv[LaneName.DISK_READ] = moved * on_disk
        kv[LaneName.DISK_WRITE] = (new + again) * on_disk
        if copies:
            kv[LaneName.DEVICE_TO_HOST] = tokens * self._leaving_bytes * below
            kv[LaneName.HOST_TO_DEVICE] = moved * below
            if self._host_attends:
                # Queries go down, results come up; only prompt chunks fetch what they attend to.
                queries = load.decode_tokens * on_host * self._query_bytes
                kv[LaneName.DEVICE_TO_HOST] += queries
                kv[LaneName.HOST_TO_DEVICE] += queries - attended * on_host
        if self._plan.activations is not TierName.DEVICE:
            # Stored after the embedding and after each layer, loaded before each layer and before the head.
            num_bytes = tokens * self._hidden_bytes * (self._shape.num_layers + 1)
            if copies:
                activations[LaneName.HOST_TO_DEVICE] = activations[LaneName.DEVICE_TO_HOST] = num_bytes
            if self._plan.activations is TierName.DISK:
                activations[LaneName.DISK_READ] = activations[LaneName.DISK_WRITE] = num_bytes
        return kv, activations

    def _kv_seconds(self, lane: LaneName, num_bytes: float, load: PassLoad, tokens: float) -> float:
        """For keys and values on a lane: sequence by sequence, layer by layer; what a micro-batch adds comes in one
        copy from a device with memory of its own."""
        if not num_bytes:
            return 0.0
        rate = self._hardware.kv_rate(lane)
        # Measured by what a sequence has in a layer, however many pages that is; else each piece is a page.
        is_measured = lane in self._hardware.kv_lanes
        most = math.inf if is_measured or lane is LaneName.HOST_TO_DEVICE else self._plan.kv_unit(TierName.DISK)
        if lane in (LaneName.DISK_READ, LaneName.HOST_TO_DEVICE):
            segments = load.decode_tokens or load.prompt_segments
            each = (load.attended if load.decode_tokens else load.prompt_tokens) / segments if segments else 0.0
            return rate.seconds(num_bytes, max(1.0, min(each, most) * self._layer_token_bytes))
        if lane is LaneName.DEVICE_TO_HOST:
            return rate.seconds(num_bytes, min(tokens, self._plan.micro_batch) * self._layer_token_bytes)
        again = load.decode_tokens * self._again_bytes * self._kv_share[TierName.DISK]
        decoded = again + (num_bytes - again) * load.decode_tokens / tokens
        prompt = load.prompt_tokens / load.prompt_segments if load.prompt_segments else 1.0
        size = min(max(1.0, prompt), most) * self._layer_token_bytes
        return rate.seconds(decoded, self._layer_token_bytes) + rate.seconds(num_bytes - decoded, size)

    def _again_seconds(self, load: PassLoad) -> float:
        """To read what is written again: by the lane that writes it, row by row. When a window is full, all of it is
        read, and all of its plain keys: once more as much."""
        rate, on_disk = self._hardware.kv_rate(LaneName.DISK_READ), self._kv_share[TierName.DISK]
        return rate.seconds(2 * load.decode_tokens * self._again_bytes * on_disk, self._layer_token_bytes)

    def _longest(self, lane_seconds: Mapping[LaneName, float], compute_s: float) -> float:
        """Seconds until the last lane ends. While others work, each runs at what contention leaves it of its rate."""
        alone = {**lane_seconds, LaneName.DEVICE_COMPUTE: compute_s}
        if not self._contends:
            return max(alone.values())
        busy = {lane: seconds / self._busy_shares[lane] for lane, seconds in alone.items()}
        second, first = sorted(busy.values())[-2:]
        longest = 0.0
        for lane, seconds in alone.items():
            others = second if busy[lane] == first else first
            longest = max(longest, seconds + min(busy[lane], others) * (1 - self._busy_shares[lane]))
        return longest


def _busy_shares(hardware: Hardware, matmul: Rate) -> dict[LaneName, float]:
    """What is left of each lane's rate while all others work, too."""
    host = hardware.host_attention
    return {
        **{lane: rate.busy_share for lane, rate in hardware.lanes.items()},
        LaneName.DEVICE_COMPUTE: matmul.busy_share,
        LaneName.HOST_COMPUTE: host.busy_share if host is not None else 1.0,
    }
