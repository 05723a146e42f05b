"""Which layer lives in which tier: shares as whole layers, spread over depth. No torch."""

from collections.abc import Mapping, Sequence
from functools import lru_cache

from engine.model.family import EMBED, HEAD, layer_name
from engine.planner.plan_input import PlanInput
from engine.tiers import Shares, TierName

STREAMED_MICRO_BATCHES = 2
STAGING_SLOTS = 2
"""One layer is computed while the next is fetched."""
BOUNCED_SLOTS = 3
"""Where a layer is read to the host first and copied on from there: one is read, one copied, one computed."""
KV_SHARE = 0.25
"""The share of the device budget that resident weights leave to the KV cache."""
WHOLE_KV_SHARE = 0.1
"""The same, where a GPU then holds all of them: no layer has to be streamed, and no KV cache pinned beside it."""


def interleave(counts: Mapping[TierName, int]) -> tuple[TierName, ...]:
    """A tier for each layer: exact counts, spread evenly over depth.

    Evenly, so that streamed layers alternate with resident ones and the links never see a burst. Each step gives the
    layer to the tier that is furthest behind its share.
    """
    return _interleaved(tuple(counts.items()))


@lru_cache(maxsize=1024)  # a search asks for the same few counts again and again
def _interleaved(per_tier: tuple[tuple[TierName, int], ...]) -> tuple[TierName, ...]:
    counts = dict(per_tier)
    num_layers = sum(counts.values())
    given = dict.fromkeys(TierName, 0)
    tiers = []
    for index in range(num_layers):
        behind = {tier: count * (index + 1) / num_layers - given[tier] for tier, count in counts.items()}
        next_tier = max((tier for tier in counts if given[tier] < counts[tier]), key=lambda tier: behind[tier])
        given[next_tier] += 1
        tiers.append(next_tier)
    return tuple(tiers)


def whole_layers(num_layers: int, shares: Shares) -> dict[TierName, int]:
    """Shares in percent as whole layers that sum to all of them (largest remainders are rounded up)."""
    exact = {tier: shares.of(tier) * num_layers / 100 for tier in TierName}
    counts = {tier: int(value) for tier, value in exact.items()}
    by_remainder = sorted(TierName, key=lambda tier: counts[tier] - exact[tier])
    for tier in by_remainder[: num_layers - sum(counts.values())]:
        counts[tier] += 1
    return counts


def place_layers(given: PlanInput, *, taken: int, batch_bytes: int, stay_packed: bool) -> tuple[TierName, ...]:
    """As asked; else as many layers as fit on the device, then on the host; the others stay on the disk.

    Args:
        given: what a plan is made from.
        taken: device bytes that workspace and buffers will have.
        batch_bytes: device bytes of each micro-batch's hidden states.
        stay_packed: layers lie on the device as they are stored.
    """
    options, stored, num_layers = given.options, given.stored, given.shape.num_layers
    if options.weights is not None:
        return interleave(whole_layers(num_layers, options.weights))
    bounces, budgets = not given.facts.shares_host_memory, given.budgets
    computed = [stored.computed_bytes(layer_name(index), given.dtype) for index in range(num_layers)]
    kept = [stored.unit_bytes[layer_name(index)] for index in range(num_layers)]
    sizes = kept if stay_packed else computed
    ready = all(stored.is_ready(layer_name(index), given.dtype) for index in range(num_layers))
    unpacked = 0 if ready else unpack_slots(host_attends=options.host_attention == "on") * max(computed)
    taken += sum(stored.computed_bytes(unit, given.dtype) for unit in (EMBED, HEAD))
    whole_share = WHOLE_KV_SHARE if bounces else KV_SHARE
    whole_room = int(budgets[TierName.DEVICE] * (1 - whole_share)) - taken
    whole_room -= batch_bytes * (options.micro_batches or 1) + (unpacked if stay_packed else 0)
    on_device = _how_many(sizes, whole_room)
    if on_device < num_layers:
        room = int(budgets[TierName.DEVICE] * (1 - KV_SHARE)) - taken
        # As stored, and where it is unpacked, as computed: never less than what the ring will take.
        room -= (BOUNCED_SLOTS if bounces else STAGING_SLOTS) * max(kept) + max(unpacked, *kept)
        room -= batch_bytes * (options.micro_batches or STREAMED_MICRO_BATCHES)
        on_device = _how_many(sizes, room)
    host_room = int(budgets[TierName.HOST] * (1 - KV_SHARE))
    on_host = _how_many(kept[on_device:], host_room)
    if bounces and on_device + on_host < num_layers:
        on_host = _how_many(kept[on_device:], host_room - BOUNCED_SLOTS * max(kept))
    on_disk = num_layers - on_device - on_host
    return interleave({TierName.DEVICE: on_device, TierName.HOST: on_host, TierName.DISK: on_disk})


def unpack_slots(*, host_attends: bool) -> int:
    """Device buffers that layers are unpacked into: with attention on the host, a layer is begun before the one in
    front of it is over."""
    return 2 if host_attends else 1


def _how_many(sizes: Sequence[int], room: int) -> int:
    taken = 0
    for count, size in enumerate(sizes):
        taken += size
        if taken > room:
            return count
    return len(sizes)
