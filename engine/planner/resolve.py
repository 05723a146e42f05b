"""From what a person fixed to a whole plan that fits; whatever is left open follows simple rules. No torch.

One function sizes everything, so that what is promised and what is allocated cannot drift apart.
"""

from collections.abc import Mapping

from engine.attention.groups import least_tokens
from engine.attention.int4_sizes import leaving_bytes, packing_bytes, reading_bytes
from engine.attention.sizes import (
    STORE_BUFFERS,
    decode_workspace_bytes,
    host_attention_bytes,
    host_temporary_bytes,
    kv_bytes_per_token,
    kv_layer_bytes,
)
from engine.attention.table import HEAD_STEP, LARGEST_HEAD, kernel_for, takes_heads
from engine.dtypes import DType
from engine.errors import PlanDoesNotFit
from engine.formats.int4_sizes import Int4
from engine.formats.sizes import Plain, TensorFormat
from engine.kvcache.cache import Layout, layouts, unit_tokens
from engine.model.family import EMBED, HEAD, layer_name
from engine.planner.placing import BOUNCED_SLOTS, STAGING_SLOTS, STREAMED_MICRO_BATCHES, place_layers, unpack_slots
from engine.planner.plan import SCHEDULES, Plan, PlanOptions
from engine.planner.plan_input import PlanInput
from engine.planner.workload import MORE_MAY_COME
from engine.shape import ModelShape
from engine.tiers import TierName
from engine.units import KIB, MIB, align_up, format_bytes

MICRO_BATCH_TOKENS = 2048
"""Tokens of a micro-batch. A sequence that is no longer fits whole, so that scoring it needs no KV cache."""
EXTENT_TOKENS = 1024
KV_SLOTS = 3
"""One group of keys and values is fetched while another is attended to and a third waits."""
GROUP_BYTES, GROUP_BYTES_ON_CPU = 64 * MIB, 16 * MIB
"""The keys and values of such a group in one layer. A GPU attends to a group in one
call, which few sequences would not be worth."""
GROUP_SHARE = 1 / 32
"""A group takes at most this share of the device's budget."""
LOGITS_BYTES, LOGITS_BYTES_ON_CPU = 64 * MIB, 16 * MIB
"""Bytes of the logits that are computed together, in float32. On a CPU they stay in its caches until a token has been
chosen; larger ones, of another size in each pass, would leave the C library's memory in ever more pieces."""
_FEWEST_LOGITS_ROWS = 64
"""Rows of them on a CPU, however large the vocabulary: fewer would take as long, since the same weights are read."""


def resolve_plan(given: PlanInput) -> Plan:
    """Fill in whatever the options leave open.

    Raises:
        PlanDoesNotFit: the sentence says which tier is short, by how much, and what to change; or that the device
            cannot compute in the dtype that was asked for.
    """
    asked = given.options.stay_packed
    if not given.stored.has_packed(given.dtype):
        return _resolved(given, stay_packed=False)
    if asked is not None:
        return _resolved(given, stay_packed=asked)
    try:
        unpacked = _resolved(given, stay_packed=False)
        if unpacked.num_layers_in(TierName.DEVICE) == given.shape.num_layers:
            return unpacked
    except PlanDoesNotFit:
        pass
    return _resolved(given, stay_packed=True)


def _resolved(given: PlanInput, *, stay_packed: bool) -> Plan:
    options, shape, stored, facts, dtype = given.options, given.shape, given.stored, given.facts, given.dtype
    if facts.capability is not None and kernel_for(dtype, facts.capability) is None:
        raise PlanDoesNotFit(
            f"this GPU has no {dtype} kernels: its compute capability is {facts.capability[0]}.{facts.capability[1]}, "
            f"and they need 8.0; use --dtype float16"
        )
    if not facts.shares_host_memory and not takes_heads(shape.head_size):
        raise PlanDoesNotFit(
            f"attention on a GPU takes heads of up to {LARGEST_HEAD} values, in steps of {HEAD_STEP}, and this model's "
            f"have {shape.head_size}; use --device cpu"
        )
    if options.kv_format == Int4.name and given.why_not_int4 is not None:
        raise PlanDoesNotFit(f"--kv-format int4: {given.why_not_int4}; leave it out")
    budgets = given.budgets
    micro_batch = options.micro_batch or MICRO_BATCH_TOKENS
    activations = TierName(options.activations or TierName.DEVICE)
    extent_tokens = _extent_tokens(given)
    logits_rows = _logits_rows(shape, micro_batch, on_cpu=facts.shares_host_memory)
    workspace = _workspace_bytes(shape, dtype, micro_batch, logits_rows)
    workspace += stored.scratch_bytes(dtype)
    kv_format = given.kv_format
    group_tokens, of_sequence = group_tokens_for(given), given.kv_room
    slot_bytes = kv_layer_bytes(shape, kv_format, group_tokens)
    store_bytes = STORE_BUFFERS * leaving_bytes(shape, kv_format, dtype, micro_batch)
    at_once = extent_tokens
    if options.kv is not None and options.kv.disk and not of_sequence.beside:
        at_once = max(extent_tokens, min(group_tokens, shape.max_positions + 1))
    pool_tokens = (budgets[TierName.DEVICE] + budgets[TierName.HOST]) // kv_bytes_per_token(shape, kv_format)
    workspace += decode_workspace_bytes(shape, kv_format, at_once, facts.attention_threads, pool_tokens)
    if facts.shares_host_memory:
        workspace += reading_bytes(shape, kv_format, dtype, pool_tokens)
    workspace += packing_bytes(shape, kv_format, dtype, micro_batch, on_cpu=facts.shares_host_memory)
    # On the CPU, what is stored waits in the one memory that there is.
    kept_here = store_bytes if facts.shares_host_memory else 0
    batch_bytes = micro_batch * shape.hidden_size * dtype.num_bytes

    activation_slots = _activation_slots(activations, shares_host_memory=facts.shares_host_memory)

    def unpacked_tokens(kv_slots: int) -> int:
        if not isinstance(kv_format, Int4):
            return 0
        # A GPU attends to what is unpacked alone, one sequence at least, unless these come in parts; on the CPU, this
        # is for what is elsewhere.
        longest = 0 if facts.shares_host_memory or of_sequence.beside else shape.max_positions
        return max(longest, group_tokens if kv_slots or not facts.shares_host_memory else 0)

    def buffer_bytes(kv_slots: int) -> int:
        unpacked = unpacked_tokens(kv_slots)
        taken = kv_layer_bytes(shape, Plain(dtype), unpacked)
        if not facts.shares_host_memory:
            # Gathered from the pool, before it is unpacked; of every window, its plain keys, too.
            taken += kv_layer_bytes(shape, kv_format, unpacked + unpacked // of_sequence.window * of_sequence.beside)
            taken += kv_layer_bytes(shape, Plain(dtype), unpacked) // 2 if of_sequence.beside else 0
        return taken + (kv_slots * slot_bytes + kept_here if kv_slots else 0)

    def placed(kv_slots: int) -> tuple[TierName, ...]:
        return place_layers(
            given,
            taken=workspace + buffer_bytes(kv_slots) + activation_slots * batch_bytes,
            batch_bytes=batch_bytes if activations is TierName.DEVICE else 0,
            stay_packed=stay_packed,
        )

    layers = placed(0)
    streamed = any(tier is not TierName.DEVICE for tier in layers)
    spills = _spills_kv(given, budgets, streamed=streamed)
    kv_slots = KV_SLOTS if spills else 0
    if kv_slots:
        layers = placed(kv_slots)
        streamed = any(tier is not TierName.DEVICE for tier in layers)
    micro_batches = options.micro_batches or (STREAMED_MICRO_BATCHES if streamed else 1)
    staged = {TierName.DISK} if facts.shares_host_memory else {TierName.HOST, TierName.DISK}
    bounced = TierName.DISK in layers and not facts.shares_host_memory
    host_attends = _host_attends(given, activations, spills=spills)
    slots = BOUNCED_SLOTS if bounced else STAGING_SLOTS
    # With attention on the host, a layer is begun before the one in front of it is over.
    slots = min(slots + 1 if host_attends else slots, sum(tier in staged for tier in layers))
    largest_layer = max(stored.unit_bytes[layer_name(index)] for index in range(shape.num_layers))

    fixed = dict.fromkeys(TierName, 0)
    fixed[TierName.DEVICE] += workspace + slots * largest_layer + buffer_bytes(kv_slots)
    fixed[TierName.DEVICE] += activation_slots * batch_bytes
    passing = [index for index, tier in enumerate(layers) if stay_packed or tier is not TierName.DEVICE]
    to_unpack = [layer for layer in map(layer_name, passing) if not stored.is_ready(layer, dtype)]
    unpacked = unpack_slots(host_attends=host_attends) if to_unpack else 0
    fixed[TierName.DEVICE] += unpacked * max((stored.computed_bytes(layer, dtype) for layer in to_unpack), default=0)
    activation_bytes = micro_batches * batch_bytes
    # Pieces of a spill file are whole pages.
    fixed[activations] += align_up(activation_bytes, 4 * KIB) if activations is TierName.DISK else activation_bytes
    if not facts.shares_host_memory:
        if kv_slots:
            fixed[TierName.HOST] += store_bytes
        if TierName.DISK in layers:
            fixed[TierName.HOST] += slots * largest_layer
        if options.kv is not None and options.kv.disk:
            fixed[TierName.HOST] += kv_slots * slot_bytes
        if activations is TierName.DISK:
            fixed[TierName.HOST] += activation_slots * batch_bytes
    fixed[TierName.DEVICE] += sum(stored.computed_bytes(unit, dtype) for unit in (EMBED, HEAD))
    for index, tier in enumerate(layers):
        unit = layer_name(index)
        if tier is TierName.DEVICE:
            fixed[tier] += stored.unit_bytes[unit] if stay_packed else stored.computed_bytes(unit, dtype)
        elif tier is TierName.HOST:
            fixed[tier] += stored.unit_bytes[unit]
    for tier in TierName:
        if fixed[tier] > budgets[tier]:
            raise PlanDoesNotFit(_too_small(tier, fixed[tier], budgets[tier]))
    room = {tier: budgets[tier] - fixed[tier] for tier in TierName}
    wanted = _wanted_on_host(given, room[TierName.DEVICE], extent_tokens)
    room[TierName.HOST] = min(room[TierName.HOST], wanted)
    if host_attends:
        fixed[TierName.HOST] += _host_attention_bytes(given, kv_format, micro_batch, room[TierName.HOST], extent_tokens)
        if fixed[TierName.HOST] > budgets[TierName.HOST]:
            raise PlanDoesNotFit(_too_small(TierName.HOST, fixed[TierName.HOST], budgets[TierName.HOST]))
        room[TierName.HOST] = min(wanted, budgets[TierName.HOST] - fixed[TierName.HOST])
    return Plan(
        device=given.device,
        dtype=dtype,
        budgets=budgets,
        disk_dir=options.disk_dir or given.disk_dir,
        layers=layers,
        kv_bytes=_kv_pools(
            options, room, _least_bytes(given, extent_tokens), on_host=spills or facts.shares_host_memory
        ),
        kv_fills_together=options.kv is not None,
        activations=activations,
        micro_batch=micro_batch,
        micro_batches=micro_batches,
        prefill_chunk=options.prefill_chunk or micro_batch * micro_batches,
        extent_tokens=extent_tokens,
        kv_format=kv_format,
        kv_room=of_sequence,
        unpacked_tokens=unpacked_tokens(kv_slots),
        kv_layouts=layouts(shares_host_memory=facts.shares_host_memory),
        group_tokens=group_tokens,
        logits_rows=logits_rows,
        staging_slots=slots,
        kv_slots=kv_slots,
        activation_slots=activation_slots,
        workspace_bytes=workspace,
        schedule=options.schedule or SCHEDULES[0],
        host_attention=host_attends,
        weight_format=stored.weight_format,
        stay_packed=stay_packed,
        unpack_slots=unpacked,
        other_bytes=fixed,
    )


def _activation_slots(tier: TierName, *, shares_host_memory: bool) -> int:
    """Buffers through which hidden states of ``tier`` pass: one for each step of the way there and back, compute among
    them, so that every step has a micro-batch to work on; and one more, since no two steps take equally long."""
    if tier is TierName.DEVICE or (tier is TierName.HOST and shares_host_memory):
        return 0
    links = 1 if tier is TierName.HOST or shares_host_memory else 2
    return 2 * links + 2


def fitting_plan(given: PlanInput) -> Plan | None:
    """What ``resolve_plan`` gives, or ``None`` where it does not fit."""
    try:
        return resolve_plan(given)
    except PlanDoesNotFit:
        return None


def group_tokens_for(given: PlanInput) -> int:
    """Tokens of keys and values that pass through a buffer at once."""
    most_rows = min(given.options.micro_batch or MICRO_BATCH_TOKENS, given.shape.max_positions)
    return max(least_tokens(most_rows, given.kv_room), align_up(_group_tokens(given), given.kv_room.window))


def _group_tokens(given: PlanInput) -> int:
    options, extent_tokens = given.options, _extent_tokens(given)
    if options.group_tokens is not None:
        return options.group_tokens
    if options.extent_tokens is not None:
        return 2 * extent_tokens
    most = GROUP_BYTES_ON_CPU if given.facts.shares_host_memory else GROUP_BYTES
    most = min(most, int(given.budgets[TierName.DEVICE] * GROUP_SHARE))
    token_bytes = kv_layer_bytes(given.shape, Plain(given.dtype))
    return max(unit_tokens(Layout.PAGES, extent_tokens), most // token_bytes)


def _extent_tokens(given: PlanInput) -> int:
    wanted = min(given.options.extent_tokens or EXTENT_TOKENS, given.shape.max_positions + 1)
    return align_up(wanted, given.kv_room.window)


def _spills_kv(given: PlanInput, budgets: Mapping[TierName, int], *, streamed: bool) -> bool:
    """Whether sequences may live where compute cannot address them.

    Unasked only where weights are streamed: then more sequences make more of each pass. A model that is on the device
    whole would only wait for a cache that is not.
    """
    kv, facts = given.options.kv, given.facts
    if kv is None:
        return streamed and not facts.shares_host_memory and budgets[TierName.HOST] > 0
    return bool(kv.disk or (kv.host and not facts.shares_host_memory))


def _host_attends(given: PlanInput, activations: TierName, *, spills: bool) -> bool:
    """Raises ``PlanDoesNotFit`` where it was asked for and cannot be."""
    if given.options.host_attention != "on":
        return False
    kv = given.options.kv
    if given.facts.shares_host_memory or not spills or (kv is not None and not kv.host):
        raise PlanDoesNotFit(
            "--host-attention on: nothing of the KV cache lies in host memory beside a GPU; give --kv a host share, or "
            "leave it out"
        )
    if activations is not TierName.DEVICE:
        raise PlanDoesNotFit("--host-attention on needs --activations device: hidden states must not wait elsewhere")
    return True


def _wanted_on_host(given: PlanInput, on_device: int, extent_tokens: int) -> int:
    """Bytes of keys and values that a workload can need in host memory, which is pinned and then nobody else's: those
    of all its requests and of more that may come, but for what the device has room for."""
    if given.workload is None or given.facts.shares_host_memory:
        return given.budgets[TierName.HOST]
    page_tokens = unit_tokens(Layout.PAGES, extent_tokens)
    tokens = given.workload.reserved_tokens(page_tokens, given.kv_room)
    fixed = given.options.kv
    kept_there = on_device if fixed is None else 0
    return max(page_tokens * given.token_bytes, MORE_MAY_COME * tokens * given.token_bytes - kept_there)


def _host_attention_bytes(
    given: PlanInput, kv_format: TensorFormat, micro_batch: int, room: int, extent_tokens: int
) -> int:
    """For as many pages as the host has room for."""
    page_tokens = unit_tokens(Layout.PAGES, extent_tokens)
    pages = room // (kv_bytes_per_token(given.shape, kv_format) * page_tokens)
    taken = host_attention_bytes(given.shape, kv_format, given.dtype, micro_batch, pages, page_tokens)
    return taken + host_temporary_bytes(given.shape, kv_format, pages, page_tokens)


def _logits_rows(shape: ModelShape, micro_batch: int, *, on_cpu: bool) -> int:
    row_bytes = 4 * shape.vocab_size
    rows = LOGITS_BYTES // row_bytes
    if on_cpu:
        rows = min(rows, max(LOGITS_BYTES_ON_CPU // row_bytes, _FEWEST_LOGITS_ROWS))
    return max(1, min(rows, micro_batch))


def _workspace_bytes(shape: ModelShape, dtype: DType, micro_batch: int, logits_rows: int) -> int:
    item = dtype.num_bytes
    layer = micro_batch * shape.workspace_values * item
    # Logits as computed, as float32, and their log-softmax.
    head = logits_rows * shape.vocab_size * (item + 8) + micro_batch * shape.hidden_size * item
    return max(layer, head) + micro_batch * shape.hidden_size * item


def _least_bytes(given: PlanInput, extent_tokens: int) -> dict[TierName, int]:
    """What the shortest sequence takes of a tier."""
    one, kinds = given.kv_room.of(1), layouts(shares_host_memory=given.facts.shares_host_memory)
    return {tier: align_up(one, unit_tokens(kinds[tier], extent_tokens)) * given.token_bytes for tier in TierName}


def _kv_pools(
    options: PlanOptions, room: Mapping[TierName, int], least: Mapping[TierName, int], *, on_host: bool
) -> dict[TierName, int]:
    if options.kv is None:
        host = room[TierName.HOST] if on_host else 0
        return {TierName.DEVICE: room[TierName.DEVICE], TierName.HOST: host, TierName.DISK: 0}
    shares = {tier: options.kv.of(tier) for tier in TierName}
    totals = {tier: room[tier] * 100 // share for tier, share in shares.items() if share}
    short = min(totals, key=lambda tier: totals[tier])
    pools = {tier: totals[short] * share // 100 for tier, share in shares.items()}
    if any(pools[tier] < least[tier] for tier in totals):
        raise PlanDoesNotFit(
            f"--kv puts {shares[short]}% of the KV cache in {short} memory, where {format_bytes(room[short])} are "
            f"left: too little for a sequence of one token ({format_bytes(least[short])}) in every tier with a share; "
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
