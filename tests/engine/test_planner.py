"""Plans: shares as whole layers, spread evenly; within every budget, or a sentence that says what to change."""

import json
from dataclasses import replace
from functools import partial
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from engine.attention.int4_sizes import kv_room
from engine.attention.sizes import decode_workspace_bytes, kv_bytes_per_token
from engine.devices.facts import MachineFacts, free_disk_space, free_host_memory
from engine.dtypes import DType
from engine.errors import PlanDoesNotFit
from engine.formats.sizes import Int4, Plain
from engine.model.family import EMBED, HEAD, layer_name
from engine.planner.known_models import known_model
from engine.planner.placing import interleave, whole_layers
from engine.planner.plan import Plan, PlanOptions
from engine.planner.plan_input import PlanInput
from engine.planner.resolve import resolve_plan
from engine.shape import ModelShape
from engine.tiers import Shares, TierName
from engine.units import GIB, KIB, MIB, align_up
from engine.weights.stored import StoredTensor, StoredWeights


@st.composite
def shares(draw: st.DrawFn) -> Shares:
    device = draw(st.integers(0, 100))
    host = draw(st.integers(0, 100 - device))
    return Shares(device, host, 100 - device - host)


@given(st.integers(1, 200), shares())
def test_shares_become_whole_layers_that_sum_to_all(num_layers: int, wanted: Shares) -> None:
    counts = whole_layers(num_layers, wanted)
    assert sum(counts.values()) == num_layers
    for tier, count in counts.items():
        assert abs(count - wanted.of(tier) * num_layers / 100) < 1
        assert count == 0 or wanted.of(tier) > 0


@given(st.integers(0, 40), st.integers(0, 40), st.integers(0, 40))
def test_tiers_are_spread_evenly_over_depth(device: int, host: int, disk: int) -> None:
    """Up to any depth, every tier has been given its share to within a layer or two: no bursts on any link."""
    counts = {TierName.DEVICE: device, TierName.HOST: host, TierName.DISK: disk}
    homes = interleave(counts)
    num_layers = device + host + disk
    assert {tier: homes.count(tier) for tier in counts} == counts
    for depth in range(1, num_layers + 1):
        for tier, count in counts.items():
            assert abs(homes[:depth].count(tier) - count * depth / num_layers) < 2


@settings(max_examples=200)
@given(
    device=st.integers(100 * MIB, 600 * MIB),
    host=st.integers(0, 300 * MIB),
    dtypes=st.tuples(st.sampled_from(DType), st.none() | st.sampled_from(DType)),
    shares_host=st.booleans(),
)
def test_what_fits_from_disk_fits_by_default(
    device: int, host: int, dtypes: tuple[str, str | None], shares_host: bool
) -> None:
    """Whoever asks for nothing gets a plan wherever there is one."""
    facts = MachineFacts(GIB, GIB, shares_host_memory=shares_host)
    budgets = {"device_memory": device, "host_memory": host, "dtype": dtypes[1]}
    try:
        plan(PlanOptions(weights=Shares(0, 0, 100), **budgets), facts, dtypes[0])  # type: ignore[arg-type]
    except PlanDoesNotFit:
        return
    plan(PlanOptions(**budgets), facts, dtypes[0])  # type: ignore[arg-type]


def test_two_tiers_alternate() -> None:
    homes = interleave({TierName.DEVICE: 5, TierName.HOST: 0, TierName.DISK: 5})
    assert all(a is not b for a, b in pairwise(homes))


SHAPE = ModelShape(
    num_layers=12, hidden_size=768, num_heads=12, num_kv_heads=12, head_size=64, ffn_size=3072, vocab_size=50272,
    max_positions=2048, bos_token_id=2, eos_token_ids=(2,), workspace_values=10 * 768,
)  # fmt: skip
UNIT_BYTES = {EMBED: 80 * MIB, HEAD: 4 * KIB, **{layer_name(i): 14 * MIB for i in range(12)}}


def plan(
    options: PlanOptions,
    facts: MachineFacts | None = None,
    dtype: DType = DType.FLOAT16,
    shape: ModelShape = SHAPE,
    stored: StoredWeights | None = None,
) -> Plan:
    facts = facts or MachineFacts(64 * GIB, 64 * GIB, shares_host_memory=False)
    return resolve_plan(
        PlanInput(
            options=options,
            shape=shape,
            stored=stored or StoredWeights.of_one_tensor(dtype, UNIT_BYTES),
            device="any",
            facts=facts,
            disk_dir=Path("/"),
        )
    )


def held(chosen: Plan, stored_dtype: DType, shares_host_memory: bool) -> dict[TierName, int]:
    """What must lie in each tier by the plan's own words, reckoned anew: weights, cache, activations, workspace."""
    wider = chosen.dtype.num_bytes / stored_dtype.num_bytes
    total = dict(chosen.kv_bytes)
    total[TierName.DEVICE] += chosen.workspace_bytes + int((UNIT_BYTES[EMBED] + UNIT_BYTES[HEAD]) * wider)
    total[TierName.DEVICE] += chosen.staging_slots * 14 * MIB
    # Layers that would not all fit as they are computed with may lie there as they are stored.
    total[TierName.DEVICE] += chosen.num_layers_in(TierName.DEVICE) * int(
        14 * MIB * (1 if chosen.stay_packed else wider)
    )
    total[TierName.HOST] += chosen.num_layers_in(TierName.HOST) * 14 * MIB
    if (chosen.stay_packed or chosen.num_layers_in(TierName.DEVICE) < 12) and chosen.dtype != stored_dtype:
        total[TierName.DEVICE] += int(14 * MIB * wider)
    if not shares_host_memory and chosen.num_layers_in(TierName.DISK):
        total[TierName.HOST] += chosen.staging_slots * 14 * MIB
    slots = chosen.kv_slots * 2 * 768 * chosen.extent_tokens * chosen.dtype.num_bytes
    total[TierName.DEVICE] += slots
    if not shares_host_memory and chosen.kv_bytes[TierName.DISK]:
        total[TierName.HOST] += slots
    batch = chosen.micro_batch * 768 * chosen.dtype.num_bytes
    total[TierName.DEVICE] += chosen.activation_slots * batch
    if not shares_host_memory and chosen.activations is TierName.DISK:
        total[TierName.HOST] += chosen.activation_slots * batch
    total[chosen.activations] += chosen.tokens_per_pass * 768 * chosen.dtype.num_bytes
    return total


@settings(max_examples=300)
@example(
    device=322969600, host=0, disk=0, weights=Shares(4, 1, 95), kv=None, activations=None,
    dtypes=(DType.BFLOAT16, DType.FLOAT32), micro_batch=None, micro_batches=None, extent_tokens=None, shares_host=True,
)  # fmt: skip
@given(
    device=st.integers(0, 2 * GIB),
    host=st.integers(0, 2 * GIB),
    disk=st.integers(0, GIB),
    weights=st.none() | shares(),
    kv=st.none() | shares(),
    activations=st.sampled_from([None, "device", "host", "disk"]),
    dtypes=st.tuples(st.sampled_from(DType), st.none() | st.sampled_from(DType)),
    micro_batch=st.none() | st.integers(1, 4096),
    micro_batches=st.none() | st.integers(1, 64),
    extent_tokens=st.none() | st.integers(1, 4096),
    shares_host=st.booleans(),
)
def test_a_plan_is_within_every_budget_or_was_never_made(
    device: int, host: int, disk: int, weights: Shares | None, kv: Shares | None, activations: str | None,
    dtypes: tuple[str, str | None], micro_batch: int | None, micro_batches: int | None, extent_tokens: int | None,
    shares_host: bool,
) -> None:  # fmt: skip
    stored, dtype = dtypes
    options = PlanOptions(
        dtype=dtype, device_memory=device, host_memory=host, disk_space=disk, weights=weights, kv=kv,
        activations=activations, micro_batch=micro_batch, micro_batches=micro_batches, extent_tokens=extent_tokens,
    )  # fmt: skip
    try:
        chosen = plan(options, MachineFacts(4 * GIB, 4 * GIB, shares_host_memory=shares_host), stored)
    except PlanDoesNotFit as error:
        says = str(error)
        assert "--device-memory" in says or "--host-memory" in says or "--disk-space" in says
        return
    assert chosen.budgets == {TierName.DEVICE: device, TierName.HOST: host, TierName.DISK: disk}
    for tier, num_bytes in held(chosen, stored, shares_host).items():
        assert num_bytes <= chosen.budgets[tier], tier
        assert chosen.kv_bytes[tier] >= 0
    assert len(chosen.layers) == 12
    if weights is not None:
        assert {tier: chosen.num_layers_in(tier) for tier in TierName} == whole_layers(12, weights)
    if kv is not None:
        for tier in TierName:
            assert (chosen.kv_bytes[tier] > 0) == (kv.of(tier) > 0)
    json.dumps(chosen.to_json())


@pytest.mark.parametrize("shares_host", [True, False])
def test_with_plenty_of_memory_all_is_on_the_device(shares_host: bool) -> None:
    chosen = plan(PlanOptions(), MachineFacts(64 * GIB, 64 * GIB, shares_host_memory=shares_host))
    assert set(chosen.layers) == {TierName.DEVICE}
    assert chosen.activations is TierName.DEVICE
    assert (chosen.micro_batches, chosen.staging_slots) == (1, 0)
    assert chosen.kv_bytes[TierName.DEVICE] > 40 * GIB
    assert chosen.kv_bytes[TierName.DISK] == chosen.budgets[TierName.DISK] == 0
    assert chosen.dtype == DType.FLOAT16, "as stored"
    assert (chosen.budgets[TierName.HOST] == 0) == shares_host, "one memory is not given out twice"
    assert chosen.budgets[TierName.DEVICE] < 64 * GIB, "something is left to other people"


def test_with_little_memory_layers_go_to_the_host_and_then_to_disk() -> None:
    known = known_model("facebook/opt-1.3b")
    assert known is not None
    chosen = resolve_plan(
        PlanInput(
            options=PlanOptions(device_memory=2 * GIB, host_memory=GIB),
            shape=known.shape,
            stored=known.stored(DType.FLOAT16),
            device="any",
            facts=MachineFacts(64 * GIB, 64 * GIB, shares_host_memory=False),
            disk_dir=Path("/"),
        )
    )
    counts = [chosen.num_layers_in(tier) for tier in TierName]
    assert all(counts)
    assert chosen.staging_slots == 3
    assert chosen.micro_batches > 1, "streamed weights are worth more tokens a pass"
    assert chosen.kv_bytes[TierName.DEVICE] >= 100 * kv_bytes_per_token(known.shape, Plain(DType.FLOAT16))


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"device_memory": 50 * MIB}, r"device memory and the budget is 50\.0 MiB: .* short; raise --device-memory to"),
        ({"weights": Shares(0, 100, 0), "host_memory": 9 * MIB}, r"host memory and the budget is 9\.0 MiB.*--host-mem"),
        ({"activations": "disk", "disk_space": 9}, r"disk space for spill files and the budget is 9 B.*--disk-space"),
        ({"kv": Shares(90, 0, 10), "disk_space": 5}, r"--kv puts 10% of the KV cache in disk mem.*raise --disk-space"),
    ],
)  # fmt: skip
def test_what_does_not_fit_says_what_to_change(options: dict[str, object], says: str) -> None:
    with pytest.raises(PlanDoesNotFit, match=says):
        plan(PlanOptions(**options))  # type: ignore[arg-type]


def test_no_tier_has_a_share_and_no_room_for_a_sequence() -> None:
    """Where keys are packed by windows, one token takes as much as a window, and the room of its plain keys."""
    rotary = replace(SHAPE, turns_keys=True)
    options = PlanOptions(kv=Shares(90, 0, 10), kv_format="int4")
    # On disk, room comes in pages of 64 tokens.
    tokens = align_up(kv_room(rotary, Int4(), DType.FLOAT16).of(1), 64)
    least = tokens * kv_bytes_per_token(rotary, Int4())
    enough = plan(replace(options, disk_space=least + 9), shape=rotary)
    assert enough.kv_tokens(rotary)[TierName.DISK] == tokens
    with pytest.raises(PlanDoesNotFit, match=r"too little for a sequence of one token \(\d.* or lower its share"):
        plan(replace(options, disk_space=least - 1), shape=rotary)


def test_the_advice_helps() -> None:
    """Doing what the sentence says, as often as it says it, ends in a plan."""
    device, advice = 1 * MIB, ""
    for _ in range(3):
        try:
            chosen = plan(PlanOptions(device_memory=device, weights=Shares(100, 0, 0)))
            break
        except PlanDoesNotFit as error:
            advice = str(error).partition("to at least ")[2].split(",")[0]
            device = int(float(advice.split()[0]) * MIB) + MIB
    else:
        raise AssertionError(advice)
    assert chosen.num_layers_in(TierName.DEVICE) == 12


@pytest.mark.parametrize(
    ("text", "parsed"), [("20/80/0", (20, 80, 0)), ("100/0/0", (100, 0, 0)), (" 1 / 2 / 97 ", (1, 2, 97))]
)
def test_shares_are_read(text: str, parsed: tuple[int, int, int]) -> None:
    found = Shares.parse(text)
    assert (found.device, found.host, found.disk) == parsed
    assert Shares.parse(str(found)) == found


@pytest.mark.parametrize("text", ["", "20/80", "20/80/0/0", "a/b/c", "-20/120/0", "20.5/79.5/0", "20,80,0", "//"])
def test_what_is_no_shares_is_named(text: str) -> None:
    with pytest.raises(ValueError, match="is not three percentages; write device/host/disk, for example 20/80/0"):
        Shares.parse(text)


@pytest.mark.parametrize("text", ["20/80/1", "0/0/0", "50/0/0", "101/0/0"])
def test_shares_sum_to_100(text: str) -> None:
    with pytest.raises(ValueError, match=f"sum to 100, not {text}"):
        Shares.parse(text)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"dtype": "int8"}, "dtype must be one of bfloat16, float16, float32, not 'int8'"),
        ({"activations": "gpu"}, "activations must be device, host or disk, not 'gpu'"),
        ({"micro_batch": 0}, "micro_batch must be at least 1, not 0"),
        ({"micro_batches": -1}, "micro_batches must be at least 1, not -1"),
        ({"prefill_chunk": 0}, "prefill_chunk must be at least 1"),
        ({"extent_tokens": 0}, "extent_tokens must be at least 1"),
        ({"device_memory": -1}, "device_memory must not be negative, not -1"),
        ({"host_memory": -1}, "host_memory must not be negative"),
        ({"disk_space": -1}, "disk_space must not be negative"),
    ],
)
def test_options_that_mean_nothing_are_refused(options: dict[str, object], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        PlanOptions(**options)  # type: ignore[arg-type]


def test_this_machines_free_memory_is_plausible(tmp_path: Path) -> None:
    assert 16 * MIB < free_host_memory() < 1 << 50
    # Others write to the disk, too; one of these times nobody does in between.
    while free_disk_space(tmp_path) != free_disk_space(tmp_path / "not" / "yet" / "there"):
        pass


def test_each_attention_thread_has_its_keys_and_scores_in_the_workspace() -> None:
    few, many = (
        plan(PlanOptions(), MachineFacts(64 * GIB, 64 * GIB, shares_host_memory=True, attention_threads=threads))
        for threads in (1, 5)
    )
    keys = SHAPE.num_kv_heads * few.extent_tokens * SHAPE.head_size * 4
    scores = 2 * 4 * SHAPE.num_heads * (SHAPE.max_positions + 1)
    assert many.workspace_bytes - few.workspace_bytes == 4 * (keys + scores)


@pytest.mark.parametrize("shares_host", [True, False])
def test_keys_and_values_in_four_bits_have_room_to_be_packed_and_unpacked(shares_host: bool) -> None:
    facts = MachineFacts(64 * GIB, 64 * GIB, shares_host_memory=shares_host, attention_threads=3 if shares_host else 0)
    plain, four = (plan(PlanOptions(kv_format=name, micro_batch=4096), facts) for name in ("plain", "int4"))
    values = 2 * SHAPE.num_kv_heads * SHAPE.head_size
    as_stored = values // 2 + 4 * values // 64
    # Rows, and beside them 12 bytes a value while it is packed, on the CPU a million values at a time.
    at_once = (1 << 20) // values * values if shares_host else 4096 * values
    more = 4096 * as_stored + 12 * at_once
    if shares_host:  # each thread reads codes of keys and values as bytes
        more += 3 * 2 * four.extent_tokens * as_stored
        # A prompt unpacks earlier parts of itself.
        more += SHAPE.max_positions * values * four.dtype.num_bytes
    assert four.workspace_bytes - plain.workspace_bytes == more
    # A GPU gathers rows of its pool, and unpacks them: the longest sequence, if need be.
    assert four.unpacked_tokens == (0 if shares_host else max(four.group_tokens, SHAPE.max_positions))
    more += four.unpacked_tokens * (as_stored + values * four.dtype.num_bytes)
    assert four.other_bytes[TierName.DEVICE] - plain.other_bytes[TierName.DEVICE] == more


def test_layers_in_four_bits_have_room_to_be_unpacked() -> None:
    """A buffer for what they are unpacked to, if that is done in each pass, and what it takes meanwhile."""
    shape, stored = (768, 4 * 768), Int4()
    layers = {layer_name(index): stored.num_bytes(shape) for index in range(SHAPE.num_layers)}
    plain = StoredWeights.of_one_tensor(DType.FLOAT16, {EMBED: 80 * MIB, HEAD: 4 * KIB, **layers})
    tensors = plain.unit_tensors | {layer: (StoredTensor(stored, shape),) for layer in layers}
    four = replace(plain, unit_tensors=tensors)
    facts = MachineFacts(64 * GIB, 64 * GIB, shares_host_memory=False)
    made = [
        plan(PlanOptions(stay_packed=stay_packed), facts, stored=each)
        for each, stay_packed in ((plain, None), (four, True))
    ]
    # Scales and minima in float32, and on the CPU half a million codes, a byte each and in float32.
    scratch = 2 * 4 * 768 * 4 * 768 // 64 + (1 + 4) * (1 << 19)
    assert made[1].workspace_bytes - made[0].workspace_bytes == scratch
    more = made[1].other_bytes[TierName.DEVICE] - made[0].other_bytes[TierName.DEVICE]
    assert more == scratch + 768 * 4 * 768 * 2


def test_no_more_scores_are_counted_than_keys_find_room() -> None:
    """Long contexts that many threads could have, and no memory could."""
    taken = partial(decode_workspace_bytes, SHAPE, Plain(DType.BFLOAT16), 64, 1)
    one = taken(pool_tokens=1000)
    assert taken(pool_tokens=2000) - one == 2 * 4 * SHAPE.num_heads * 1000
    endless = taken(pool_tokens=1 << 40)
    assert endless - one == 2 * 4 * SHAPE.num_heads * (SHAPE.max_positions + 1 - 1000)


@pytest.mark.parametrize(
    ("vocab_size", "shares_host", "micro_batch", "rows"),
    [
        (50272, False, 2048, 333),
        (50272, True, 2048, 83),  # 16 MiB in float32: a CPU's caches hold them
        (50272, True, 16, 16),
        (151_936, False, 2048, 110),
        (151_936, True, 2048, 64),  # for fewer, the head's weights would be read too often
        (1_000_000, True, 2048, 16),  # never more than a GPU computes together
    ],
)
def test_logits_of_as_many_rows_are_computed_together(
    vocab_size: int, shares_host: bool, micro_batch: int, rows: int
) -> None:
    facts = MachineFacts(64 * GIB, 64 * GIB, shares_host_memory=shares_host)
    chosen = plan(PlanOptions(micro_batch=micro_batch), facts, shape=replace(SHAPE, vocab_size=vocab_size))
    assert chosen.logits_rows == rows
    assert chosen.workspace_bytes >= rows * vocab_size * (2 + 4 + 4)
