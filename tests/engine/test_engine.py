"""The engine from outside: what is refused, what is dropped, what a failure leaves, and that nothing is kept."""

import itertools
import random
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest

from engine import (
    CheckpointError,
    Choice,
    Choose,
    Engine,
    EngineError,
    Generate,
    Generation,
    Output,
    PlanDoesNotFit,
    PlanOptions,
    Rejection,
    Request,
    SamplingParams,
    Score,
    Scoring,
    Shares,
)
from engine.attention.sizes import kv_bytes_per_token
from engine.devices.host import HostDevice
from engine.devices.simulated import SimulatedDevice
from engine.engine import REJECTIONS_A_PASS
from engine.loading import load_engine
from engine.schedule.balance import MIN_PROMPT_TOKENS, PROMPTS
from engine.schedule.scheduler import LOOK_AHEAD
from engine.tiers import TierName
from engine.units import KIB, MIB
from engine.weights.manifest import read_manifest
from tests.engine.checkpoints import unit_of

BUDGETS = {"device": "cpu", "device_memory": 64 * MIB}


def options(**more: object) -> PlanOptions:
    return PlanOptions(**{**BUDGETS, **more})  # type: ignore[arg-type]


def generate(key: object, prompt: str = "abc", count: int = 4, **sampling: object) -> Request:
    params = SamplingParams(max_new_tokens=count, ignore_eos=True, **sampling)  # type: ignore[arg-type]
    return Request(key, Generate(prompt, params))  # type: ignore[arg-type]


def by_key(outputs: Iterable[Output]) -> dict[object, object]:
    return {output.key: output.result for output in outputs}


@pytest.fixture
def engine(tiny_model: Path) -> Iterator[Engine]:
    with load_engine(tiny_model, options()) as loaded:
        yield loaded
        assert loaded._kv.held_tokens == 0, "every sequence's KV cache is free again"
        loaded.check_integrity()


def with_kv_room(model_dir: Path, num_tokens: int, **more: object) -> Engine:
    """An engine whose KV cache holds so many tokens, all on the device."""
    more = {"weights": Shares(100, 0, 0), **more}
    with load_engine(model_dir, options(**more)) as roomy:
        token_bytes = kv_bytes_per_token(roomy._stage.family.shape, roomy.plan.kv_format)
        fixed = roomy.plan.budgets[TierName.DEVICE] - roomy.plan.kv_bytes[TierName.DEVICE]
    return load_engine(model_dir, options(**more, device_memory=fixed + num_tokens * token_bytes))


# Rows that are refused


def test_rows_that_cannot_be_run_are_rejected_among_those_that_can(engine: Engine) -> None:
    requests = [
        generate("good"),
        generate("long", "a" * 200),
        Request("no-choices", Choose("a", ())),
        Request("twice", Choose("a", ("x", "x"))),
        Request("surrogate", Score("a", "\ud800")),
        Request("empty", Score("a", "")),
        Request("score", Score("a", "b")),
        Request("choose", Choose("a", ("x", "y"))),
    ]
    found = by_key(engine.run(requests))
    assert len(found) == len(requests)
    codes = {key: result.code for key, result in found.items() if isinstance(result, Rejection)}
    assert codes == {
        "long": "too_long", "no-choices": "no_choices", "twice": "duplicate_choices", "surrogate": "invalid_text",
        "empty": "empty_continuation",
    }  # fmt: skip
    long = found["long"]
    assert isinstance(long, Rejection)
    assert "201 tokens" in long.message
    assert "at most 128" in long.message
    assert isinstance(found["good"], Generation)
    assert isinstance(found["score"], Scoring)
    assert isinstance(found["choose"], Choice)


def test_only_rejections_and_nothing_at_all(engine: Engine) -> None:
    assert list(engine.run([])) == []
    assert [output.key for output in engine.run(Request(key, Choose("a", ())) for key in range(3))] == [0, 1, 2]


def test_endless_rejections_come_in_bounded_reports(engine: Engine) -> None:
    pulled = 0

    def source() -> Iterator[Request]:
        nonlocal pulled
        while True:
            pulled += 1
            yield Request(pulled, Choose("a", ()))

    for count, report in enumerate(engine.passes(source()), 1):
        assert 0 < len(report.outputs) <= REJECTIONS_A_PASS
        assert pulled <= count * REJECTIONS_A_PASS
        if count == 4:
            break


def test_every_position_can_be_used(engine: Engine) -> None:
    outputs = {o.key: o for o in engine.run([generate("last", "a" * 127, 10), generate("two", "a" * 126, 10)])}
    for key, count in (("last", 1), ("two", 2)):
        result = outputs[key].result
        assert isinstance(result, Generation)
        assert (len(result.token_ids), str(result.finish_reason)) == (count, "length")


def test_what_never_fits_is_rejected_while_others_run(tiny_model: Path) -> None:
    with with_kv_room(tiny_model, 40) as engine:
        order = [
            output.key
            for output in engine.run([generate("a", count=30), generate("large", count=60), generate("b", count=30)])
            if not (output.key == "large" and not isinstance(output.result, Rejection))
        ]
        assert order == ["large", "a", "b"], "at once: it does not hold up those behind it"
        (output,) = engine.run([generate("large", count=60)])
        assert isinstance(output.result, Rejection)
        assert output.result.code == "no_room"
        assert "up to 64 tokens" in output.result.message
        assert "which holds 40 (" in output.result.message
        assert "--device-memory" in output.result.message
        (output,) = engine.run(
            [generate("just", "a" * 10, count=30)]
        )  # with BOS 41 tokens, the last of which needs none
        assert isinstance(output.result, Generation)


def test_scores_need_no_kv_room(tiny_model: Path) -> None:
    with with_kv_room(tiny_model, 1) as engine:
        (output,) = engine.run([Request("row", Score("a" * 60, "b" * 60))])
        assert isinstance(output.result, Scoring)
    with with_kv_room(tiny_model, 1, prefill_chunk=50) as engine:
        (output,) = engine.run([Request("row", Score("a" * 60, "b" * 60))])
        assert isinstance(output.result, Rejection), "in pieces, they do"


# Pulling


def test_requests_are_pulled_as_room_appears(tiny_model: Path) -> None:
    """An endless dataset: memory does not grow with it."""
    pulled = 0

    def source() -> Iterator[Request]:
        nonlocal pulled
        for pulled in itertools.count(1):
            yield generate(pulled, count=3)

    with with_kv_room(tiny_model, 100) as engine:
        outputs = engine.run(source())
        for count, _ in enumerate(itertools.islice(outputs, 300), 1):
            # 100 tokens of room, 6 a sequence, and a few that wait; a pass ends at most all of them at once.
            assert pulled - count <= 2 * (100 // 6) + LOOK_AHEAD
            assert len(engine._running) <= 100 // 6 + LOOK_AHEAD
        outputs.close()
        assert engine._running == {}


def test_none_means_nothing_at_the_moment(engine: Engine) -> None:
    asked: list[str] = []

    def source() -> Iterator[Request | None]:
        for name in ("a", "", "", "b", "", "", "", "", "", "never"):
            asked.append(name)
            yield generate(name, count=4) if name else None

    reports = list(engine.passes(source()))
    assert [output.key for report in reports for output in report.outputs] == ["a", "b"]
    # a's four passes ask for: a and nothing, nothing, b and nothing, nothing; b's last two passes, and the end.
    assert asked == ["a", "", "", "b", "", "", "", "", ""][: len(asked)]
    assert "never" not in asked
    assert len(reports) == 6


def test_a_source_that_fails_fails_the_run_and_not_the_engine(engine: Engine) -> None:
    def source() -> Iterator[Request]:
        yield generate("a")
        raise OSError("the dataset is gone")

    with pytest.raises(OSError, match="the dataset is gone"):
        list(engine.run(source()))
    assert len(list(engine.run([generate("b")]))) == 1


def test_two_requests_may_have_one_key(engine: Engine) -> None:
    outputs = list(engine.run([generate("same"), generate("same", "xyz"), generate("same")]))
    assert [output.key for output in outputs] == ["same"] * 3
    reports = engine.passes(iter([generate("same"), generate("same"), generate("other")]))
    next(reports)
    assert engine.drop({"same"}) == 2
    assert [output.key for report in reports for output in report.outputs] == ["other"]


# Dropping and closing


def test_what_is_dropped_never_comes_out(engine: Engine) -> None:
    reports = engine.passes(iter([generate(index, count=20) for index in range(6)]))
    next(reports)
    assert engine.drop({1, 4, "unknown"}) == 2
    assert engine.drop({1}) == 0
    assert sorted(output.key for report in reports for output in report.outputs) == [0, 2, 3, 5]  # type: ignore[type-var]
    assert engine.drop({0}) == 0


def test_dropping_everything_ends_the_run(engine: Engine) -> None:
    reports = engine.passes(iter([generate(index, count=20) for index in range(3)]))
    next(reports)
    assert engine.drop(range(3)) == 3
    assert list(reports) == []


@pytest.mark.parametrize("chunk", [None, 3])
def test_a_choice_is_dropped_with_some_of_its_sequences_done_and_some_waiting(
    chunk: int | None, tiny_model: Path
) -> None:
    """One sequence of 8 tokens a pass: after two passes, two are done and the others wait."""
    choices = Request("choose", Choose("abcde", ("xx", "yy", "zz", "ww")))
    with load_engine(tiny_model, options(micro_batch=8, micro_batches=1, prefill_chunk=chunk)) as engine:
        assert engine._kv.held_tokens == 0
        expected = by_key(engine.run([choices, generate("after")]))
        reports = engine.passes(iter([choices, generate("after")]))
        assert [next(reports).outputs for _ in range(2)] == [(), ()]
        assert engine.drop({"choose"}) == 1
        assert {output.key: output.result for report in reports for output in report.outputs} == {
            "after": expected["after"]
        }
        assert engine._kv.held_tokens == 0
        engine.check_integrity()


def test_a_run_left_midway_leaves_the_engine_usable(engine: Engine) -> None:
    requests = [generate(index, "abc" * index, count=12) for index in range(8)]
    expected = by_key(engine.run(requests))
    for passes in (1, 3, 7):
        reports = engine.passes(iter(requests))
        for _ in range(passes):
            next(reports)
        with pytest.raises(EngineError, match="already running"):
            next(engine.passes(iter(requests)))
        reports.close()
        assert by_key(engine.run(requests)) == expected


@pytest.mark.parametrize("count", [3, 30])
def test_a_second_job_gets_its_first_token_with_its_first_pass(count: int, tiny_model: Path) -> None:
    """Also where the first job taught the engine to take prompts in small amounts, and more wait than fit."""
    with with_kv_room(tiny_model, 100, weights=Shares(0, 0, 100)) as engine:
        first = [generate(index, "ab" * 20, count=8) for index in range(12)]
        assert len(by_key(engine.run(first))) == 12
        for _ in range(PROMPTS):
            engine._balance.learn_pass(100, 5.0, 1.0)
        assert engine._balance.prompt_tokens == MIN_PROMPT_TOKENS
        second = [generate(index, "ba" * 20, count=1) for index in range(count)]
        reports = list(engine.passes(iter(second)))
    assert reports[0].outputs
    assert sum(len(report.outputs) for report in reports) == count


PLACEMENTS = {
    "device": {"weights": Shares(100, 0, 0), "kv": Shares(100, 0, 0)},
    "host": {"weights": Shares(0, 100, 0), "kv": Shares(0, 100, 0), "activations": "host"},
    "disk": {"weights": Shares(0, 0, 100), "kv": Shares(0, 0, 100), "activations": "disk"},
    "split": {"weights": Shares(50, 0, 50), "kv": Shares(30, 30, 40)},
}


@pytest.mark.parametrize("kind", ["cpu", "simulated"])
@pytest.mark.parametrize("placement", PLACEMENTS)
def test_closing_frees_every_byte(placement: str, kind: str, tiny_model: Path, tmp_path: Path) -> None:
    chosen = options(**PLACEMENTS[placement], host_memory=32 * MIB, disk_space=4 * MIB, disk_dir=tmp_path)
    engine = load_engine(tiny_model, chosen, device=HostDevice() if kind == "cpu" else SimulatedDevice())
    assert engine.tiers[TierName.DEVICE].used > 0
    reports = engine.passes(iter([generate(index, count=9) for index in range(5)]))
    next(reports)
    engine.close()  # in the middle of a run
    engine.close()
    assert {name: tier.used for name, tier in engine.tiers.items()} == dict.fromkeys(TierName, 0)
    engine.check_integrity()
    reports.close()
    assert {name: tier.used for name, tier in engine.tiers.items()} == dict.fromkeys(TierName, 0)
    with pytest.raises(EngineError, match="closed"):
        list(engine.run([generate("late")]))


@pytest.mark.parametrize("kind", ["cpu", "simulated"])
def test_whatever_the_budget_a_plan_fits_or_is_refused(kind: str, tiny_model: Path, tmp_path: Path) -> None:
    """The plan's arithmetic and what is really allocated are the same: no tier is ever found full."""
    rng = random.Random(1)
    loaded = 0
    for _ in range(40):
        splits = [Shares(a, b, 100 - a - b) for a, b in ((rng.randrange(0, 60, 20), rng.randrange(0, 41, 20)),) * 2]
        chosen = PlanOptions(
            dtype=rng.choice([None, "bfloat16"]),
            device_memory=rng.randrange(150 * KIB, 1200 * KIB),
            host_memory=rng.randrange(0, 400 * KIB),
            disk_space=rng.randrange(0, 600 * KIB),
            disk_dir=tmp_path,
            weights=rng.choice([None, splits[0]]),
            kv=rng.choice([None, splits[1]]),
            activations=rng.choice(["device", "host", "disk"]),
            micro_batch=rng.randrange(1, 64),
            extent_tokens=rng.randrange(1, 200),
        )
        try:
            engine = load_engine(tiny_model, chosen, device=HostDevice() if kind == "cpu" else SimulatedDevice())
        except PlanDoesNotFit:
            continue
        loaded += 1
        with engine:
            outputs = list(engine.run([generate(0), generate(1, "a" * 100, 9), Request(2, Choose("a", ("b", "c")))]))
            assert len(outputs) == 3
            engine.check_integrity()
    assert 5 < loaded < 40, "some of both, or this shows nothing"


# Failures


def damage(folder: Path, unit: str) -> None:
    path = folder / unit_of(read_manifest(folder), unit).file
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


@pytest.fixture
def own_copy(tiny_model: Path, tmp_path: Path) -> Path:
    """A model directory that a test may damage."""
    folder = tmp_path / "model"
    folder.mkdir()
    for path in tiny_model.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    return folder


@pytest.mark.parametrize("unit", ["embed", "layer.1", "head"])
def test_a_damaged_model_is_found_when_it_is_loaded(unit: str, own_copy: Path) -> None:
    damage(own_copy, unit)
    with pytest.raises(CheckpointError, match=rf"{unit}\S* is damaged: its checksum is wrong; import the model again"):
        load_engine(own_copy, options())


@pytest.mark.parametrize("kind", ["cpu", "simulated"])
def test_a_damaged_model_on_disk_is_found_when_it_is_read(kind: str, own_copy: Path) -> None:
    """And the failure neither hangs nor keeps anything; the engine says that it is of no more use."""
    damage(own_copy, "layer.1")
    chosen = options(weights=Shares(0, 0, 100), host_memory=32 * MIB)
    engine = load_engine(own_copy, chosen, device=HostDevice() if kind == "cpu" else SimulatedDevice())
    with pytest.raises(CheckpointError, match="checksum is wrong"):
        list(engine.run([generate("a"), generate("b")]))
    with pytest.raises(EngineError, match="close it and load it again"):
        list(engine.run([generate("c")]))
    assert engine.drop({"a"}) == 0
    engine.check_integrity()
    engine.close()
    assert {name: tier.used for name, tier in engine.tiers.items()} == dict.fromkeys(TierName, 0)


def test_a_folder_that_is_no_model(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=str(tmp_path)):
        load_engine(tmp_path, options())


# Figures


@pytest.mark.parametrize("chunk", [None, 1, 5])
def test_the_figures_of_the_passes_add_up(chunk: int | None, tiny_model: Path) -> None:
    requests = [generate(0, "a" * 9, 5), generate(1, "", 1), Request(2, Score("abcd", "efg"))]
    with load_engine(tiny_model, options(prefill_chunk=chunk)) as engine:
        reports = list(engine.passes(iter(requests)))
    assert sum(report.stats.prefill_tokens for report in reports) == 10 + 1 + 7
    assert sum(report.stats.decode_tokens for report in reports) == 4
    assert reports[0].stats.num_sequences == 3
    assert all(report.stats.seconds > 0 for report in reports)
    usage = {o.key: (o.prompt_tokens, o.completion_tokens) for report in reports for o in report.outputs}
    assert usage == {0: (10, 5), 1: (1, 1), 2: (5, 3)}
