"""The drain with the real engine on a tiny model, in one thread; only the clock is the test's."""

import contextlib
import logging
import shutil
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from engine import DiskFull, Engine, LaneFailed, PassReport, Request, Shares
from engine.errors import DeviceFailed, TierFull
from storage.claims import claim, expire, list_workers, stop_worker
from storage.database import Database
from storage.errors import ClaimLost, JobNotFound
from storage.faults import list_faults
from storage.jobs import cancel_job, retry_job
from storage.prune import prune
from storage.results import list_passes
from tests.worker.bench import START, Bench, prompts
from worker.aside import DEATHS_SPARED
from worker.bell import Bell
from worker.models import known_models
from worker.residency import Loaded, Residency, Sample, Tell
from worker.settings import Settings


class WrappedEngine:
    """The real engine, whose passes a test may change."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self.drop = engine.drop
        self.close = engine.close
        self.plan = engine.plan


def test_all_jobs_of_a_model_are_drained_in_one_engine_run(bench: Bench, tiny_model: Path) -> None:
    generate = bench.enqueue(tiny_model, prompts(20))
    score = bench.enqueue(tiny_model, [{"context": "ab", "continuation": "cd"}] * 2, task="score")
    choose = bench.enqueue(tiny_model, [{"prompt": "ab", "choices": ["x", "yz"]}], task="choose")

    assert bench.drain.step()

    assert [bench.job(job_id).state for job_id in (generate, score, choose)] == ["done"] * 3
    assert len(bench.loaded) == 1
    assert not bench.drain.step()
    first = bench.outputs(generate)[0]
    assert first.output is not None
    assert set(first.output) == {"text", "finish_reason"}
    assert first.prompt_tokens > 0
    scored = bench.outputs(score)[0].output
    assert scored is not None
    assert set(scored) == {"logprob", "is_greedy", "tokens"}
    assert scored["logprob"] == pytest.approx(sum(token["logprob"] for token in scored["tokens"]))
    chosen = bench.outputs(choose)[0].output
    assert chosen is not None
    assert chosen["label"] == max(chosen["logprobs"], key=chosen["logprobs"].get)
    assert list(chosen["logprobs"]) == ["x", "yz"]


def test_passes_are_recorded_and_a_second_job_reads_no_weights(bench: Bench, tiny_model: Path) -> None:
    first = bench.enqueue(tiny_model, prompts(5))
    bench.drain_all()
    second = bench.enqueue(tiny_model, prompts(5))
    bench.drain_all()

    of_first = [row.totals for row in list_passes(bench.database, job_id=first)]
    of_second = [row.totals for row in list_passes(bench.database, job_id=second)]
    assert len(bench.loaded) == 1
    assert sum(totals.weight_bytes for totals in of_first) > 0
    assert sum(totals.weight_bytes for totals in of_second) == 0
    job = bench.job(second)
    assert sum(totals.prefill_tokens for totals in of_second) == job.prompt_tokens
    # The token that prefill yields needs no decode, and the last one is not fed back.
    assert sum(totals.decode_tokens for totals in of_second) == job.generated_tokens - 5


def test_a_higher_priority_goes_first(bench: Bench, tiny_model: Path) -> None:
    bench.clock.step_s = 1.5  # a commit after each pass
    low = bench.enqueue(tiny_model, prompts(70))
    high = bench.enqueue(tiny_model, prompts(70), priority=5)
    bench.drain_all()

    last_of_high = max(row.finished_at for row in bench.outputs(high))
    assert last_of_high < max(row.finished_at for row in bench.outputs(low))
    assert min(row.finished_at for row in bench.outputs(high)) < min(row.finished_at for row in bench.outputs(low))


def test_a_text_does_not_depend_on_its_neighbours(bench: Bench, tiny_model: Path) -> None:
    alone = bench.enqueue(tiny_model, prompts(1), temperature=1.0)
    bench.drain_all()
    crowd = bench.enqueue(tiny_model, prompts(30), temperature=1.0)
    bench.drain_all()

    assert bench.texts(crowd)[0] == bench.texts(alone)[0]


def test_rows_at_fault_become_error_rows_and_the_job_goes_on(bench: Bench, tiny_model: Path) -> None:
    job_id = bench.enqueue(tiny_model, [{"prompt": "a" * 500}, {"prompt": "fine"}, {"other": "no prompt"}])
    bench.drain_all()

    job, rows = bench.job(job_id), bench.outputs(job_id)
    assert (job.state, job.num_done, job.num_failed) == ("done", 1, 2)
    assert [row.status for row in rows] == ["error", "ok", "error"]
    assert "128" in str(rows[0].error_message)
    assert rows[2].error_code == "invalid_request"


def test_a_job_whose_model_is_damaged_fails_alone_and_can_be_retried(
    bench: Bench, tiny_model: Path, tmp_path: Path
) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(tiny_model, broken)
    victim = max((path for path in broken.iterdir() if path.suffix != ".json"), key=lambda p: p.stat().st_size)
    victim.write_bytes(b"\xff" * victim.stat().st_size)
    bad = bench.enqueue(broken, prompts(3), priority=9)
    good = bench.enqueue(tiny_model, prompts(3))

    bench.drain_all()

    assert bench.job(bad).state == "failed"
    assert str(broken) in str(bench.job(bad).message)
    assert bench.job(good).state == "done"
    shutil.rmtree(broken)
    shutil.copytree(tiny_model, broken)
    retry_job(bench.database, bad, now=bench.clock.now)
    bench.drain_all()
    assert (bench.job(bad).state, bench.job(bad).num_done) == ("done", 3)


@pytest.mark.parametrize("fault", ["absent", "no manifest"])
def test_a_model_that_is_not_here_is_left_to_others_and_tried_again_later(
    bench: Bench, tiny_model: Path, tmp_path: Path, fault: str
) -> None:
    elsewhere = tmp_path / "elsewhere"
    if fault == "no manifest":
        elsewhere.mkdir()
    job_id = bench.enqueue(elsewhere, prompts(3), priority=9)
    good = bench.enqueue(tiny_model, prompts(3))

    bench.drain_all()

    assert bench.job(job_id).state == "queued"
    assert bench.job(good).state == "done"
    bench.bell.ring()  # the wait is over at once
    bench.drain._idle()
    told = bench.told[-1]
    assert (told.state, told.retry_at) == ("waiting", START + 60.0)
    assert str(elsewhere) in str(told.message)

    shutil.rmtree(elsewhere, ignore_errors=True)
    shutil.copytree(tiny_model, elsewhere)
    bench.drain_all()
    assert bench.job(job_id).state == "queued", "it is not time yet"
    bench.clock.now += 61.0
    bench.drain_all()
    assert bench.job(job_id).state == "done"
    assert not bench.aside.is_any


def test_a_plan_that_does_not_fit_leaves_the_job_to_others(bench: Bench, tiny_model: Path) -> None:
    bench.placement = replace(bench.placement, device_memory=1000)
    job_id = bench.enqueue(tiny_model, prompts(2))

    bench.drain_all()

    assert bench.job(job_id).state == "queued"
    assert bench.residency.model_dir is None
    (fault,) = bench.aside.now()
    assert "device" in fault.message


def test_a_worker_that_is_alone_fails_the_job_with_what_to_change(bench: Bench, tiny_model: Path) -> None:
    bench.placement = replace(bench.placement, device_memory=1000)
    bench.is_alone = True
    bench.new_worker()
    job_id = bench.enqueue(tiny_model, prompts(2))
    absent = bench.enqueue("no-such-model", prompts(2))

    bench.drain_all()

    assert bench.job(job_id).state == bench.job(absent).state == "failed"
    assert "device" in str(bench.job(job_id).message)
    assert "no-such-model" in str(bench.job(absent).message)


def test_a_hugging_face_folder_is_imported_on_first_use_and_only_then(bench: Bench, tiny_checkpoint: Path) -> None:
    first = bench.enqueue(tiny_checkpoint, prompts(2))
    bench.drain_all()
    bench.residency.unload()
    (name,) = known_models(bench.settings)
    model_dir = bench.settings.models_dir / name
    manifest = (model_dir / "manifest.json").stat().st_mtime_ns
    second = bench.enqueue(tiny_checkpoint, prompts(2))
    bench.drain_all()

    assert bench.texts(first) == bench.texts(second)
    assert (model_dir / "manifest.json").stat().st_mtime_ns == manifest


def test_stopping_in_the_middle_keeps_what_is_done_and_gives_back_the_rest(bench: Bench, tiny_model: Path) -> None:
    undisturbed = bench.enqueue(tiny_model, prompts(100))
    bench.drain_all()
    job_id = bench.enqueue(tiny_model, prompts(100))
    bench.clock.after(30, bench.bell.stop)

    bench.drain.step()

    job = bench.job(job_id)
    assert 0 < job.num_done < 100
    assert job.state == "running"
    assert bench.count("claimed", job_id) == 0
    assert bench.count("pending", job_id) == 100 - job.num_done
    bench.bell = Bell()
    bench.new_worker()
    bench.drain_all()
    assert bench.texts(job_id) == bench.texts(undisturbed)


def test_a_cancelled_job_leaves_the_engine_and_the_others_go_on(bench: Bench, tiny_model: Path) -> None:
    bench.clock.step_s = 1.5
    unwanted = bench.enqueue(tiny_model, prompts(60), max_new_tokens=30)
    wanted = bench.enqueue(tiny_model, prompts(10))
    bench.clock.after(20, lambda: cancel_job(bench.database, unwanted, now=bench.clock.now))

    bench.drain_all()

    assert bench.job(wanted).state == "done"
    job = bench.job(unwanted)
    assert job.state == "cancelled"
    assert job.num_done == len(bench.outputs(unwanted)) < 60
    passes = [row.totals for row in list_passes(bench.database)]
    assert sum(totals.decode_tokens for totals in passes) < 60 * 29, "it was computed to its end all the same"


def test_a_worker_that_was_taken_for_dead_writes_nothing_and_another_finishes(bench: Bench, tiny_model: Path) -> None:
    bench.clock.step_s = 1.5
    job_id = bench.enqueue(tiny_model, prompts(60))
    bench.clock.after(20, lambda: expire(bench.database, now=bench.clock.now, is_dead=lambda worker: True))

    with pytest.raises(ClaimLost):
        bench.drain_all()
    before = bench.outputs(job_id)
    assert len(before) < 60

    bench.new_worker()
    bench.drain_all()

    assert bench.job(job_id).state == "done"
    assert len(bench.loaded) == 1
    after = {row.index: row for row in bench.outputs(job_id)}
    assert len(after) == 60
    assert [after[row.index] for row in before] == before


def test_a_job_of_another_model_that_waited_too_long_interrupts_the_resident_one(
    bench: Bench, tiny_model: Path, tmp_path: Path
) -> None:
    other_model = tmp_path / "other"
    shutil.copytree(tiny_model, other_model)
    bench.clock.step_s = 0.5
    bench.settings = replace(bench.settings, max_wait_s=10.0)
    bench.new_worker()
    endless = bench.enqueue(tiny_model, prompts(250), priority=9)
    patient = bench.enqueue(other_model, prompts(2))

    bench.drain_all()

    assert bench.job(endless).state == bench.job(patient).state == "done"
    assert bench.loaded[:3] == [tiny_model, other_model, tiny_model]
    finished_at = bench.job(patient).finished_at
    assert finished_at is not None
    assert any(row.finished_at < finished_at for row in bench.outputs(endless))
    assert any(row.finished_at > finished_at for row in bench.outputs(endless))


def test_other_queues_are_left_alone(bench: Bench, tiny_model: Path) -> None:
    elsewhere = bench.enqueue(tiny_model, prompts(1), queue="nightly")

    assert not bench.drain.step()
    assert bench.job(elsewhere).state == "queued"


def test_another_worker_goes_on_where_one_has_stopped(bench: Bench, tiny_model: Path) -> None:
    job_id = bench.enqueue(tiny_model, prompts(200))
    first = bench.drain
    bench.clock.after(25, bench.bell.stop)
    first.step()
    done_by_first = bench.job(job_id).num_done
    stop_worker(bench.database, bench.worker_id, now=bench.clock.now)
    bench.bell = Bell()
    bench.new_worker()
    bench.drain_all()

    assert 0 < done_by_first < 200
    assert [row.index for row in bench.outputs(job_id)] == list(range(200))
    assert [worker.id for worker in list_workers(bench.database)] == [bench.worker_id]


class MeetingEngine(WrappedEngine):
    """The real engine, which after its first pass waits for those that are to be running at the same time."""

    def __init__(self, engine: Engine, meeting: threading.Barrier) -> None:
        super().__init__(engine)
        self._meeting = meeting

    def passes(self, requests: Iterator[Request | None]) -> Iterator[PassReport]:
        for count, report in enumerate(self._engine.passes(requests)):
            if count == 0:
                self._meeting.wait()
            yield report


def test_two_live_drains_share_a_job_and_each_row_is_done_once(
    bench: Bench, settings: Settings, tiny_model: Path
) -> None:
    undisturbed = bench.enqueue(tiny_model, prompts(200))
    bench.drain_all()
    job_id = bench.enqueue(tiny_model, prompts(200))
    meeting = threading.Barrier(2)
    errors: list[BaseException] = []

    def drain(database: Database) -> None:
        torch.set_num_threads(1)
        mine = Bench(database, settings, bench.placement)
        mine.residency = Residency(
            lambda path, sample, tell: Loaded(MeetingEngine(mine.engine_of(path), meeting)), mine.clock
        )
        mine.new_worker()
        try:
            mine.drain_all()
        except BaseException as error:  # noqa: BLE001 (a thread's error is the test's)
            errors.append(error)
            meeting.abort()
        finally:
            mine.residency.unload()

    with Database.open(settings.database_url) as one, Database.open(settings.database_url) as two:
        threads = [threading.Thread(target=drain, args=(database,)) for database in (one, two)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    assert errors == []
    assert bench.job(job_id).state == "done"
    assert [row.index for row in bench.outputs(job_id)] == list(range(200))
    assert bench.texts(job_id) == bench.texts(undisturbed)
    assert len({row.worker_id for row in list_passes(bench.database, job_id=job_id)}) == 2
    with bench.database.read() as connection:
        attempts = connection.exec_driver_sql("SELECT DISTINCT attempt FROM requests WHERE job_id = ?", (job_id,))
        assert [attempt for (attempt,) in attempts] == [1]


def test_a_model_that_is_found_damaged_in_the_middle_fails_its_job_and_the_worker_lives_on(
    bench: Bench, tiny_model: Path, tmp_path: Path
) -> None:
    streamed = tmp_path / "streamed"
    shutil.copytree(tiny_model, streamed)
    bench.placement = replace(bench.placement, weights=Shares(0, 0, 100))
    layer = streamed / "layer.1.bin"
    whole = layer.read_bytes()
    layer.write_bytes(bytes(len(whole)))  # before anything is read ahead: a layer is looked at the first time only
    bench.drain.preload(str(streamed))
    bad = bench.enqueue(streamed, prompts(40), priority=9)
    good = bench.enqueue(tiny_model, prompts(3))

    bench.drain_all()

    assert bench.job(bad).state == "failed"
    assert layer.name in str(bench.job(bad).message)
    assert bench.job(good).state == "done"
    layer.write_bytes(whole)
    retry_job(bench.database, bad, now=bench.clock.now)
    bench.drain_all()
    assert (bench.job(bad).state, bench.job(bad).num_done) == ("done", 40)


class FaultyEngine(WrappedEngine):
    """The real engine, until a fault is injected after some passes."""

    def __init__(self, engine: Engine, num_passes: int, fault: Exception) -> None:
        super().__init__(engine)
        self._num_passes = num_passes
        self._fault = fault

    def passes(self, requests: Iterator[Request | None]) -> Iterator[PassReport]:
        for count, report in enumerate(self._engine.passes(requests)):
            yield report
            if count == self._num_passes:
                raise self._fault


def with_fault(bench: Bench, fault: Exception) -> None:
    def load(model_dir: Path, sample: Sample, tell: Tell) -> Loaded:
        return Loaded(FaultyEngine(bench.engine_of(model_dir), 12, fault))

    bench.residency = Residency(load, bench.clock)
    bench.new_worker()


def mend(bench: Bench) -> None:
    bench.residency = Residency(bench.load, bench.clock)
    bench.new_worker()


@pytest.mark.parametrize(
    "fault", [LaneFailed("reading the disk failed"), DiskFull("no room left for the KV cache in /spill")]
)
def test_a_fault_of_the_machine_gives_the_rows_back_and_waits(bench: Bench, tiny_model: Path, fault: Exception) -> None:
    job_id = bench.enqueue(tiny_model, prompts(100))
    with_fault(bench, fault)

    bench.drain_all()

    job = bench.job(job_id)
    assert job.state == "running"
    assert 0 < job.num_done < 100
    assert bench.count("claimed", job_id) == 0
    assert [each.message for each in bench.aside.now()] == [str(fault)]
    mend(bench)
    bench.clock.now += 61.0
    bench.drain_all()
    assert (bench.job(job_id).state, bench.job(job_id).num_done) == ("done", 100)
    assert bench.crashes(job_id) == set()


def test_a_device_that_is_lost_ends_the_worker_and_loses_nothing(bench: Bench, tiny_model: Path) -> None:
    job_id = bench.enqueue(tiny_model, prompts(100))
    with_fault(bench, DeviceFailed("cuda:0 fell off the bus"))

    with pytest.raises(DeviceFailed):
        bench.drain_all()

    assert bench.job(job_id).state == "running"
    assert 0 < bench.job(job_id).num_done < 100
    assert bench.count("claimed", job_id) == 0
    mend(bench)
    bench.drain_all()
    assert (bench.job(job_id).state, bench.job(job_id).num_done) == ("done", 100)


@pytest.mark.parametrize("fault", [DeviceFailed("an illegal memory access"), TierFull("no room for a pass")])
def test_a_row_that_breaks_the_device_is_found_by_the_processes_that_die_of_it(
    bench: Bench, tiny_model: Path, fault: Exception
) -> None:
    def load(model_dir: Path, sample: Sample, tell: Tell) -> Loaded:
        return Loaded(PoisonedEngine(bench.engine_of(model_dir), {17}, fault))

    job_id = bench.enqueue(tiny_model, prompts(40))
    processes = 0
    while not bench.job(job_id).is_finished:
        processes += 1
        assert processes < 15
        bench.residency = Residency(load, bench.clock)
        bench.new_worker()
        with contextlib.suppress(DeviceFailed):
            bench.drain_all()
        bench.residency.unload()

    assert [(row.index, row.error_code) for row in bench.outputs(job_id) if row.status == "error"] == [(17, "crashed")]
    assert bench.job(job_id).num_done == 39


def test_a_job_that_is_pruned_under_a_worker_ends_nothing(bench: Bench, tiny_model: Path) -> None:
    bench.clock.step_s = 1.5
    doomed = bench.enqueue(tiny_model, prompts(100))
    good = bench.enqueue(tiny_model, prompts(40))

    def prune_it() -> None:
        cancel_job(bench.database, doomed, now=bench.clock.now)
        prune(bench.database, before=bench.clock.now + 1)

    bench.clock.after(10, prune_it)

    bench.drain_all()

    assert bench.clock.actions == []
    assert bench.job(good).num_done == 40
    with pytest.raises(JobNotFound):
        bench.job(doomed)


class PoisonedEngine(FaultyEngine):
    """The real engine, which breaks in any pass that has a certain row in it."""

    def __init__(self, engine: Engine, poison: set[int], fault: Exception | None = None) -> None:
        super().__init__(engine, -1, fault or RuntimeError("a row that nobody foresaw"))
        self._poison = poison

    def passes(self, requests: Iterator[Request | None]) -> Iterator[PassReport]:
        handed: list[int] = []

        def watched() -> Iterator[Request | None]:
            for request in requests:
                if request is not None:
                    handed.append(request.key.index)  # type: ignore[attr-defined]
                yield request

        for report in self._engine.passes(watched()):
            if self._poison & set(handed):
                raise self._fault
            yield report


def test_a_row_that_breaks_the_worker_is_found_and_the_rest_goes_on(bench: Bench, tiny_model: Path) -> None:
    def load(model_dir: Path, sample: Sample, tell: Tell) -> Loaded:
        bench.loaded.append(model_dir)
        return Loaded(PoisonedEngine(bench.engine_of(model_dir), {17, 60}))

    undisturbed = bench.enqueue(tiny_model, prompts(80))
    bench.drain_all()
    bench.loaded.clear()
    bench.residency.unload()
    bench.residency = Residency(load, bench.clock)
    bench.new_worker()
    job_id = bench.enqueue(tiny_model, prompts(80))

    bench.drain_all()

    assert (bench.job(job_id).state, bench.job(job_id).num_failed) == ("done", 2)
    errors = {row.index: row.error_code for row in bench.outputs(job_id) if row.status == "error"}
    assert errors == {17: "crashed", 60: "crashed"}
    wanted = {index: text for index, text in bench.texts(undisturbed).items() if index not in errors}
    assert bench.texts(job_id) == wanted
    assert len(bench.loaded) <= 20, "halves, not one row after another"


def test_an_engine_that_breaks_whatever_it_runs_is_left_alone_after_some_tries(bench: Bench, tiny_model: Path) -> None:
    def load(model_dir: Path, sample: Sample, tell: Tell) -> Loaded:
        bench.loaded.append(model_dir)
        return Loaded(PoisonedEngine(bench.engine_of(model_dir), set(range(1000))))

    bench.residency = Residency(load, bench.clock)
    bench.new_worker()
    job_id = bench.enqueue(tiny_model, prompts(100))

    bench.drain_all()

    assert len(bench.loaded) == 1 + DEATHS_SPARED
    assert bench.job(job_id).num_failed == 0
    (fault,) = bench.aside.now()
    assert "a row that nobody foresaw" in fault.message


def test_cancel_and_retry_between_two_looks_hang_nothing(bench: Bench, tiny_model: Path) -> None:
    """The engine then runs two attempts of the same rows, and both may end within one commit."""
    undisturbed = bench.enqueue(tiny_model, prompts(100))
    bench.drain_all()
    job_id = bench.enqueue(tiny_model, prompts(100))

    def storm() -> None:
        for _ in range(3):
            cancel_job(bench.database, job_id, now=bench.clock.now)
            retry_job(bench.database, job_id, now=bench.clock.now)

    for looks in (20, 25, 30):
        bench.clock.after(looks, storm)

    bench.drain_all()

    assert bench.clock.actions == [], "the storm came too late"
    assert bench.count("claimed", job_id) == 0
    assert bench.job(job_id).state == "done"
    assert bench.texts(job_id) == bench.texts(undisturbed)


def test_claims_that_nobody_runs_are_given_back_by_an_idle_worker(bench: Bench, tiny_model: Path) -> None:
    job_id = bench.enqueue(tiny_model, prompts(5))
    assert len(claim(bench.database, bench.worker_id, job_id, 3, now=bench.clock.now)) == 3
    bench.settings = replace(bench.settings, scan_s=0.01)
    bench.new_worker_of_the_same_number()
    bench.clock.after(200, bench.bell.stop)

    bench.drain.run()

    assert (bench.job(job_id).state, bench.job(job_id).num_done) == ("done", 5)


def test_claims_that_nobody_runs_are_given_back_in_the_middle_of_a_run(bench: Bench, tiny_model: Path) -> None:
    bench.clock.step_s = 1.5
    bench.settings = replace(bench.settings, scan_s=3.0)
    bench.new_worker()
    job_id = bench.enqueue(tiny_model, prompts(300))
    lost: list[int] = []

    def lose_some() -> None:
        lost.extend(row.index for row in claim(bench.database, bench.worker_id, job_id, 20, now=bench.clock.now))

    bench.clock.after(10, lose_some)

    assert bench.drain.step()

    assert len(lost) == 20
    assert (bench.job(job_id).state, bench.job(job_id).num_done) == ("done", 300)


def test_the_log_says_that_jobs_start_and_how_they_end(
    bench: Bench, tiny_model: Path, caplog: pytest.LogCaptureFixture
) -> None:
    job_id = bench.enqueue(tiny_model, [*prompts(4), {"other": "no prompt"}])
    with caplog.at_level(logging.INFO, logger="overnight"):
        bench.drain_all()
    lines = [record.getMessage() for record in caplog.records if getattr(record, "job", None) == job_id]
    assert lines[0] == "job starts: generate, 5 rows"
    assert lines[-1].startswith("job done: 5 of 5 rows, 1 failed, in 0 s: ")
    assert len(lines) == 2


def test_a_model_that_processes_died_of_is_not_preloaded_while_it_is_left_alone(bench: Bench, tiny_model: Path) -> None:
    bench.aside.note_death(str(tiny_model), "the worker died while it loaded the model", "loading")
    bench.drain.preload(str(tiny_model))
    assert bench.loaded == []
    bench.clock.now += 61.0
    bench.drain.preload(str(tiny_model))
    assert bench.loaded == [tiny_model]


def test_a_worker_that_is_alone_leaves_nothing_alone(bench: Bench, tiny_model: Path) -> None:
    """Neither for what others died of, nor so that others would."""
    bench.aside.note_death(str(tiny_model), "the worker died while it loaded the model", "loading")
    bench.is_alone = True
    bench.new_worker()
    job_id = bench.enqueue(tiny_model, prompts(3))
    absent = bench.enqueue("no-such-model", prompts(3))
    bench.drain_all()
    assert bench.job(job_id).state == "done"
    assert bench.job(absent).state == "failed"
    assert list_faults(bench.database) == []


def test_what_a_worker_meets_itself_is_no_reason_for_others_beside_it(bench: Bench, tiny_model: Path) -> None:
    roomy = bench.placement
    bench.placement = replace(roomy, device_memory=1000)
    job_id = bench.enqueue(tiny_model, prompts(3))
    bench.drain_all()
    assert bench.job(job_id).state == "queued"
    bench.placement = roomy
    bench.new_worker()
    bench.drain_all()
    assert bench.job(job_id).state == "done"
