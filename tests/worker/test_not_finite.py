"""Models that give no finite numbers: a job that gets nothing else fails early, whoever computed its first rows."""

import logging
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from engine import Engine
from engine.dtypes import DType
from engine.weights.importing import import_checkpoint
from storage.claims import stop_worker
from storage.jobs import retry_job
from tests.engine.checkpoints import make_overflowing, make_poisoned
from tests.worker.bench import Bench, prompts
from worker.bell import Bell
from worker.fault_policy import FIRST_ROWS

TINY = {
    "hidden_size": 32,
    "word_embed_proj_dim": 32,
    "ffn_dim": 64,
    "num_hidden_layers": 2,
    "max_position_embeddings": 128,
}


def imported(folder: Path, make: Callable[[Path], None]) -> Path:
    make(folder / "checkpoint")
    import_checkpoint(folder / "checkpoint", folder / "model")
    return folder / "model"


@pytest.fixture(scope="module")
def poisoned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Gives finite numbers for rows without a z."""
    return imported(tmp_path_factory.mktemp("poisoned"), lambda folder: make_poisoned(folder, "z", **TINY))


@pytest.fixture(scope="module")
def overflowing(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Gives finite numbers, but for in float16."""
    return imported(tmp_path_factory.mktemp("overflowing"), lambda folder: make_overflowing(folder, **TINY))


@pytest.fixture
def bench(bench: Bench) -> Bench:
    """Which commits after each pass."""
    bench.clock.step_s = 1.5
    return bench


def bad_rows(count: int) -> list[dict[str, Any] | None]:
    return [{"prompt": f"z{index}"} for index in range(count)]


def test_a_job_without_finite_numbers_fails_and_one_beside_it_goes_on(
    bench: Bench, poisoned: Path, caplog: pytest.LogCaptureFixture
) -> None:
    undisturbed = bench.enqueue(poisoned, prompts(25))
    bench.drain_all()
    # So long that two passes share a prompt: one is half computed when the job fails.
    bad = bench.enqueue(poisoned, [{"prompt": f"z{index}" + "a" * 90} for index in range(300)])
    good = bench.enqueue(poisoned, prompts(25))

    with caplog.at_level(logging.INFO, logger="overnight"):
        bench.drain_all()

    job = bench.job(bad)
    assert (job.state, job.num_done) == ("failed", 0)
    assert FIRST_ROWS <= job.num_failed < 300, "it was computed to its end all the same"
    assert {row.error_code for row in bench.outputs(bad)} == {"not_finite"}
    assert bench.count("claimed", bad) == 0
    (dropped,) = [each.getMessage() for each in caplog.records if getattr(each, "action", None) == "cancel"]
    assert re.fullmatch(r"dropped [1-9]\d* rows: their job has ended", dropped)
    assert bench.job(good).state == "done"
    assert bench.texts(good) == bench.texts(undisturbed)
    engine = bench.residency.ensure(poisoned)
    assert isinstance(engine, Engine)
    assert engine._kv.held_tokens == 0
    engine.check_integrity()


def test_another_number_type_mends_the_job(bench: Bench, overflowing: Path) -> None:
    bench.placement = replace(bench.placement, dtype=DType.FLOAT16)
    job_id = bench.enqueue(overflowing, prompts(100))

    bench.drain_all()

    job = bench.job(job_id)
    assert job.state == "failed"
    assert job.message is not None
    assert job.message.startswith(f"its first {FIRST_ROWS} rows all are errors: the model's logits are not finite")
    assert "in float16; give the worker --dtype bfloat16 or float32" in job.message
    bench.residency.unload()
    bench.placement = replace(bench.placement, dtype=DType.FLOAT32)
    retry_job(bench.database, job_id, now=bench.clock.now)
    bench.drain_all()
    assert (bench.job(job_id).state, bench.job(job_id).num_done) == ("done", 100)


@pytest.mark.parametrize("fine", [0, FIRST_ROWS - 1])
def test_one_row_with_finite_numbers_among_the_first_lets_the_job_go_on(
    bench: Bench, poisoned: Path, fine: int
) -> None:
    """Also while it is at work for longer than the others: all of them have ended before it."""
    rows = bad_rows(60)
    rows[fine] = {"prompt": "ab"}
    job_id = bench.enqueue(poisoned, rows, max_new_tokens=100)

    bench.drain_all()

    job = bench.job(job_id)
    assert (job.state, job.num_done, job.num_failed) == ("done", 1, 59)


def test_a_short_job_ends_with_its_error_rows(bench: Bench, poisoned: Path) -> None:
    job_id = bench.enqueue(poisoned, bad_rows(FIRST_ROWS - 1))

    bench.drain_all()

    job = bench.job(job_id)
    assert (job.state, job.num_failed) == ("done", FIRST_ROWS - 1)


def test_rows_with_another_fault_neither_save_the_job_nor_give_the_reason(bench: Bench, poisoned: Path) -> None:
    too_long: dict[str, Any] = {"prompt": "a" * 500}
    job_id = bench.enqueue(poisoned, [row for bad in bad_rows(60) for row in (too_long, bad, too_long)])

    bench.drain_all()

    job = bench.job(job_id)
    assert (job.state, "not finite" in str(job.message)) == ("failed", True)
    assert job.num_failed < job.num_requests


def test_rows_that_another_worker_computed_count(bench: Bench, poisoned: Path) -> None:
    bench.placement = replace(bench.placement, micro_batch=4)  # a row a pass
    job_id = bench.enqueue(poisoned, bad_rows(60))
    bench.clock.after(40, bench.bell.stop)
    bench.drain.step()
    by_first = bench.job(job_id).num_failed
    assert 0 < by_first < FIRST_ROWS
    stop_worker(bench.database, bench.worker_id, now=bench.clock.now)
    bench.bell = Bell()
    bench.new_worker()

    bench.drain_all()

    job = bench.job(job_id)
    assert (job.state, job.num_failed) == ("failed", FIRST_ROWS)
