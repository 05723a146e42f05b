"""From what a person fixed to a whole plan that fits: sane defaults until a cost model searches for the best.

One function sizes everything, so that what is promised and what is allocated cannot drift apart.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

from engine.attention.sizes import decode_workspace_bytes, kv_bytes_per_token, kv_layer_bytes
from engine.devices.facts import MachineFacts, free_disk_space
from engine.dtypes import DType
from engine.errors import PlanDoesNotFit
from engine.formats.sizes import Plain
from engine.model.family import EMBED, HEAD, layer_name
from engine.planner.plan import SCHEDULES, Plan, PlanOptions
from engine.shape import ModelShape
from engine.tiers import Shares, TierName
from engine.units import KIB, MIB, align_up, format_bytes
from engine.weights.stored import StoredWeights

MICRO_BATCH_TOKENS = 2048
"""Tokens of a micro-batch. A sequence that is no longer fits whole, so that scoring it needs no KV cache."""
STREAMED_MICRO_BATCHES = 2
EXTENT_TOKENS = 1024
STAGING_SLOTS = 2
"""One layer is computed while the next is brought."""
BOUNCED_SLOTS = 3
"""Where a layer is read to the host first and copied on from there: one is read, one copied, one computed."""
KV_SLOTS = 4
"""One extent's layer is brought while two wait or are looked at and one is taken back."""
ACTIVATION_SLOTS = 3
"""One micro-batch's hidden states are fetched while another's are computed and a third's are written back."""
LOGITS_BYTES = 64 * MIB
DEVICE_SHARE, HOST_SHARE = 0.8, 0.7
"""Of the memory found free, how much a plan takes unasked: the rest is for the page cache and for other people."""
KV_SHARE = 0.25
"""Of the device budget, how much resident weights leave to the KV cache."""
DISK_SHARE = 0.9


def interleave(counts: Mapping[TierName, int]) -> tuple[TierName, ...]:
    """A home for each layer: exact counts, spread evenly over depth.

    Evenly, so that streamed layers alternate with resident ones and the links never see a burst. Each step gives the
    layer to the tier that is furthest behind its share.
    """
    num_layers = sum(counts.values())
    given = dict.fromkeys(TierName, 0)
    homes = []
    for index in range(num_layers):
        behind = {tier: count * (index + 1) / num_layers - given[tier] for tier, count in counts.items()}
        home = max((tier for tier in counts if given[tier] < counts[tier]), key=lambda tier: behind[tier])
        given[home] += 1
        homes.append(home)
    return tuple(homes)


def whole_layers(num_layers: int, shares: Shares) -> dict[TierName, int]:
    """Shares in percent as whole layers that sum to all of them (largest remainders are rounded up)."""
    exact = {tier: shares.of(tier) * num_layers / 100 for tier in TierName}
    counts = {tier: int(value) for tier, value in exact.items()}
    by_remainder = sorted(TierName, key=lambda tier: counts[tier] - exact[tier])
    for tier in by_remainder[: num_layers - sum(counts.values())]:
        counts[tier] += 1
    return counts


def compute_dtype(options: PlanOptions, stored: StoredWeights, facts: MachineFacts) -> DType:
    """As asked, else as the weights are stored; in float16 where the device cannot compute as they are stored."""
    if options.dtype is not None:
        return options.dtype
    return stored.dtype if facts.computes(stored.dtype) else DType.FLOAT16


def resolve_plan(
    options: PlanOptions,
    *,
    shape: ModelShape,
    stored: StoredWeights,
    device: str,
    facts: MachineFacts,
    disk_dir: Path,
) -> Plan:
    """Fill in whatever ``options`` leaves open.

    Raises:
        PlanDoesNotFit: the sentence says which tier is short, by how much, and what to change; or that the device
            cannot compute in the dtype that was asked for.
    """
    dtype = compute_dtype(options, stored, facts)
    if not facts.computes(dtype):
        assert facts.capability is not None
        raise PlanDoesNotFit(
            f"this GPU has no {dtype} kernels: its compute capability is {facts.capability[0]}.{facts.capability[1]}, "
            f"and they need 8.0; use --dtype float16"
        )
    disk_dir = options.disk_dir or disk_dir
    budgets = budgets_of(options, facts, disk_dir)
    micro_batch = options.micro_batch or MICRO_BATCH_TOKENS
    activations = TierName(options.activations or TierName.DEVICE)
    extent_tokens = min(options.extent_tokens or EXTENT_TOKENS, shape.max_positions + 1)
    logits_rows = _logits_rows(shape, micro_batch)
    workspace = _workspace_bytes(shape, dtype, micro_batch, logits_rows)
    workspace += decode_workspace_bytes(shape, extent_tokens, facts.attention_threads)
    kv_format = Plain(dtype)
    token_bytes = kv_bytes_per_token(shape, kv_format)
    slot_bytes = kv_layer_bytes(shape, kv_format, extent_tokens)
    batch_bytes = micro_batch * shape.hidden_size * dtype.num_bytes

    is_addressable = activations is TierName.DEVICE or (activations is TierName.HOST and facts.shares_host_memory)
    activation_slots = 0 if is_addressable else ACTIVATION_SLOTS

    def placed(kv_slots: int) -> tuple[TierName, ...]:
        return _place_layers(
            options,
            shape,
            stored,
            dtype,
            budgets,
            workspace=workspace + kv_slots * slot_bytes + activation_slots * batch_bytes,
            batch_bytes=batch_bytes if activations is TierName.DEVICE else 0,
            bounces=not facts.shares_host_memory,
        )

    layers = placed(0)
    streamed = any(home is not TierName.DEVICE for home in layers)
    spills = _spills_kv(options, budgets, facts, streamed=streamed)
    kv_slots = KV_SLOTS if spills else 0
    if kv_slots:
        layers = placed(kv_slots)
        streamed = any(home is not TierName.DEVICE for home in layers)
    micro_batches = options.micro_batches or (STREAMED_MICRO_BATCHES if streamed else 1)
    staged = {TierName.DISK} if facts.shares_host_memory else {TierName.HOST, TierName.DISK}
    bounced = TierName.DISK in layers and not facts.shares_host_memory
    slots = min(BOUNCED_SLOTS if bounced else STAGING_SLOTS, sum(home in staged for home in layers))
    largest_layer = max(stored.unit_bytes[layer_name(index)] for index in range(shape.num_layers))

    fixed = dict.fromkeys(TierName, 0)
    fixed[TierName.DEVICE] += workspace + slots * largest_layer + kv_slots * slot_bytes
    fixed[TierName.DEVICE] += activation_slots * batch_bytes
    away = [layer_name(index) for index, home in enumerate(layers) if home is not TierName.DEVICE]
    to_unpack = [layer for layer in away if not stored.is_ready(layer, dtype)]
    fixed[TierName.DEVICE] += max((stored.computed_bytes(layer, dtype) for layer in to_unpack), default=0)
    activation_bytes = micro_batches * batch_bytes
    # Pieces of a spill file are whole pages.
    fixed[activations] += align_up(activation_bytes, 4 * KIB) if activations is TierName.DISK else activation_bytes
    if not facts.shares_host_memory:
        if TierName.DISK in layers:
            fixed[TierName.HOST] += slots * largest_layer
        if options.kv is not None and options.kv.disk:
            fixed[TierName.HOST] += kv_slots * slot_bytes
        if activations is TierName.DISK:
            fixed[TierName.HOST] += activation_slots * batch_bytes
    fixed[TierName.DEVICE] += sum(stored.computed_bytes(unit, dtype) for unit in (EMBED, HEAD))
    for index, home in enumerate(layers):
        unit = layer_name(index)
        if home is TierName.DEVICE:
            fixed[home] += stored.computed_bytes(unit, dtype)
        elif home is TierName.HOST:
            fixed[home] += stored.unit_bytes[unit]
    for tier in TierName:
        if fixed[tier] > budgets[tier]:
            raise PlanDoesNotFit(_too_small(tier, fixed[tier], budgets[tier]))
    room = {tier: budgets[tier] - fixed[tier] for tier in TierName}
    return Plan(
        device=device,
        dtype=dtype,
        budgets=budgets,
        disk_dir=disk_dir,
        layers=layers,
        kv_bytes=_kv_pools(options, room, token_bytes, on_host=spills or facts.shares_host_memory),
        kv_fills_together=options.kv is not None,
        activations=activations,
        micro_batch=micro_batch,
        micro_batches=micro_batches,
        prefill_chunk=options.prefill_chunk or micro_batch * micro_batches,
        extent_tokens=extent_tokens,
        logits_rows=logits_rows,
        staging_slots=slots,
        kv_slots=kv_slots,
        activation_slots=activation_slots,
        workspace_bytes=workspace,
        schedule=options.schedule or SCHEDULES[0],
        other_bytes=fixed,
    )


def budgets_of(options: PlanOptions, facts: MachineFacts, disk_dir: Path) -> dict[TierName, int]:
    """Bytes that each tier may hold: as asked, else a share of what is free."""
    device = options.device_memory if options.device_memory is not None else int(facts.device_free * DEVICE_SHARE)
    # Where device and host are one memory, a host tier would only be a second name for the same bytes.
    unasked_host = 0 if facts.shares_host_memory else int(facts.host_free * HOST_SHARE)
    wants_host = options.activations == "host" or any(s is not None and s.host for s in (options.weights, options.kv))
    if facts.shares_host_memory and wants_host:
        unasked_host = device
    host = options.host_memory if options.host_memory is not None else unasked_host
    wants_disk = bool(options.kv and options.kv.disk) or options.activations == "disk"
    unasked_disk = int(free_disk_space(disk_dir) * DISK_SHARE) if wants_disk else 0
    disk = options.disk_space if options.disk_space is not None else unasked_disk
    return {TierName.DEVICE: device, TierName.HOST: host, TierName.DISK: disk}


def _spills_kv(options: PlanOptions, budgets: Mapping[TierName, int], facts: MachineFacts, *, streamed: bool) -> bool:
    """Whether sequences may live where compute cannot address them.

    Unasked only where weights are streamed: then more sequences make more of each pass. A model that is on the device
    whole would only wait for a cache that is not.
    """
    if options.kv is None:
        return streamed and not facts.shares_host_memory and budgets[TierName.HOST] > 0
    return bool(options.kv.disk or (options.kv.host and not facts.shares_host_memory))


def _logits_rows(shape: ModelShape, micro_batch: int) -> int:
    return max(1, min(LOGITS_BYTES // (4 * shape.vocab_size), micro_batch))


def _workspace_bytes(shape: ModelShape, dtype: DType, micro_batch: int, logits_rows: int) -> int:
    item = dtype.num_bytes
    layer = micro_batch * shape.workspace_values * item
    # Logits as computed, as float32, and their log-softmax.
    head = logits_rows * shape.vocab_size * (item + 8) + micro_batch * shape.hidden_size * item
    return max(layer, head) + micro_batch * shape.hidden_size * item


def _place_layers(
    options: PlanOptions,
    shape: ModelShape,
    stored: StoredWeights,
    dtype: DType,
    budgets: Mapping[TierName, int],
    *,
    workspace: int,
    batch_bytes: int,
    bounces: bool,
) -> tuple[TierName, ...]:
    """As asked; else as many layers as fit on the device, then on the host, whatever else must lie there left aside."""
    if options.weights is not None:
        return interleave(whole_layers(shape.num_layers, options.weights))
    sizes = [stored.computed_bytes(layer_name(index), dtype) for index in range(shape.num_layers)]
    kept = [stored.unit_bytes[layer_name(index)] for index in range(shape.num_layers)]
    room = int(budgets[TierName.DEVICE] * (1 - KV_SHARE)) - workspace
    room -= sum(stored.computed_bytes(unit, dtype) for unit in (EMBED, HEAD))
    on_device = _how_many(sizes, room - batch_bytes * (options.micro_batches or 1))
    if on_device < shape.num_layers:
        # Stored and, where it is cast on the way, as computed: never less than what the ring will take.
        room -= ((BOUNCED_SLOTS if bounces else STAGING_SLOTS) + 1) * max(*sizes, *kept)
        room -= batch_bytes * (options.micro_batches or STREAMED_MICRO_BATCHES)
        on_device = _how_many(sizes, room)
    host_room = int(budgets[TierName.HOST] * (1 - KV_SHARE))
    on_host = _how_many(kept[on_device:], host_room)
    if bounces and on_device + on_host < shape.num_layers:
        on_host = _how_many(kept[on_device:], host_room - BOUNCED_SLOTS * max(kept))
    on_disk = shape.num_layers - on_device - on_host
    return interleave({TierName.DEVICE: on_device, TierName.HOST: on_host, TierName.DISK: on_disk})


def _how_many(sizes: Sequence[int], room: int) -> int:
    taken = 0
    for count, size in enumerate(sizes):
        taken += size
        if taken > room:
            return count
    return len(sizes)


def _kv_pools(
    options: PlanOptions, room: Mapping[TierName, int], bytes_per_token: int, *, on_host: bool
) -> dict[TierName, int]:
    if options.kv is None:
        host = room[TierName.HOST] if on_host else 0
        return {TierName.DEVICE: room[TierName.DEVICE], TierName.HOST: host, TierName.DISK: 0}
    shares = {tier: options.kv.of(tier) for tier in TierName}
    totals = {tier: room[tier] * 100 // share for tier, share in shares.items() if share}
    short = min(totals, key=lambda tier: totals[tier])
    pools = {tier: totals[short] * share // 100 for tier, share in shares.items()}
    if any(pools[tier] < bytes_per_token for tier in totals):
        raise PlanDoesNotFit(
            f"--kv puts {shares[short]}% of the KV cache in {short} memory, where {format_bytes(room[short])} are "
            f"left: too little for one token ({format_bytes(bytes_per_token)}) in every tier with a share; "
            f"{_raise_hint(short)} or lower its share"
        )
    return pools


def _raise_hint(tier: TierName) -> str:
    flag = "--disk-space" if tier is TierName.DISK else f"--{tier}-memory"
    return f"raise {flag}"


def _too_small(tier: TierName, needed: int, budget: int) -> str:
    where = "disk space for spill files" if tier is TierName.DISK else f"{tier} memory"
    hint = f"{_raise_hint(tier)} to at least {format_bytes(needed)}"
    if tier is TierName.DEVICE:
        hint += ", give weights a larger host or disk share (--weights), or take a smaller --micro-batch"
    return (
        f"the plan needs {format_bytes(needed)} of {where} and the budget is {format_bytes(budget)}: "
        f"{format_bytes(needed - budget)} short; {hint}"
    )
