"""FlexGen's policies and its schedule of two phases, to compare with (Sheng et al. 2023, section 4)."""

from collections.abc import Mapping
from dataclasses import dataclass

from engine.attention.sizes import kv_bytes_per_token
from engine.dtypes import DType
from engine.formats.sizes import Plain
from engine.memory.lane import LaneName
from engine.model.family import HEAD, layer_name
from engine.planner.hardware import Hardware
from engine.planner.workload import Lengths
from engine.shape import ModelShape
from engine.tiers import Shares, TierName
from engine.weights.stored import StoredWeights


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
    dtype: DType = DType.FLOAT16,
) -> BlockCost:
    """FlexGen's schedule: all prompts of a block, then all its decode steps; no page cache.

    How its lanes add up is as in the fit that FlexGen released (experimental/cost_model.py): a prefill takes the
    longest of the way up (host to device plus disk reads), the way down (device to host plus disk writes) and compute;
    a decode step takes its host-to-device copies *plus* the longest of the rest, in which compute is the device's and
    the host's together, since its one thread waits for both. The pure maximum of its paper is commented out there.

    ``lengths.requests`` is not looked at: the block is as large as the policy says. Nor are the machine's overheads,
    which are this engine's: FlexGen's are contained in the throughputs that its authors fitted.
    """
    size = policy.batch * policy.num_batches
    prefill = _block_lanes(
        hardware, shape, stored, policy, dtype,
        tokens=size * lengths.prompt, rows=size * lengths.prompt, batch_tokens=policy.batch * lengths.prompt,
        pairs=size * lengths.prompt**2, attended=0.0, prompt=lengths.prompt,
    )  # fmt: skip
    up = prefill[LaneName.HOST_TO_DEVICE] + prefill[LaneName.DISK_READ]
    down = prefill[LaneName.DEVICE_TO_HOST] + prefill[LaneName.DISK_WRITE]
    prefill_s = max(up, down, prefill[LaneName.DEVICE_COMPUTE])
    steps = lengths.decode_steps
    attended = size * lengths.attended / steps if steps else 0.0
    decode = _block_lanes(
        hardware, shape, stored, policy, dtype,
        tokens=size, rows=size, batch_tokens=policy.batch, pairs=0.0, attended=attended, prompt=lengths.prompt,
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
    dtype: DType,
    *,
    tokens: float,
    rows: float,
    batch_tokens: float,
    pairs: float,
    attended: float,
    prompt: int,
) -> dict[LaneName, float]:
    """Busy seconds of each lane for one trip of a block through all layers."""
    item, layers = dtype.num_bytes, shape.num_layers
    layer_bytes = [stored.unit_bytes[layer_name(index)] for index in range(layers)]
    weight_bytes = sum(layer_bytes)
    w, kv, h = (
        {tier: share.of(tier) / 100 for tier in TierName} for share in (policy.weights, policy.kv, policy.activations)
    )
    token_bytes = kv_bytes_per_token(shape, Plain(dtype))
    hidden = tokens * shape.hidden_size * item * layers
    read, new = attended * token_bytes, tokens * token_bytes
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
    flops = sum(stored.unit_flops[layer_name(index)] for index in range(layers)) * tokens
    flops += stored.unit_flops[HEAD] * rows
    compute_s = matmul.seconds(flops, batch_tokens)
    pair_flops = 4 * shape.num_heads * shape.head_size * layers
    compute_s += hardware.prompt_attention.seconds(pair_flops * pairs, prompt)
    per_sequence = max(1.0, read / tokens / layers)
    compute_s += hardware.decode_attention.seconds(read * (1 - below if attends else 1.0), per_sequence)
    lanes[LaneName.DEVICE_COMPUTE] = compute_s
    lanes[LaneName.HOST_COMPUTE] = 0.0
    if attends and hardware.host_attention is not None:
        lanes[LaneName.HOST_COMPUTE] = hardware.host_attention.seconds(read * below, per_sequence)
    return lanes
