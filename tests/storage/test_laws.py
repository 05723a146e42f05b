"""Random interleavings of workers, clocks and people, against a model in plain Python and the laws of the tables."""

import tempfile
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, initialize, invariant, rule

from storage.claims import (
    ClaimedRequest,
    claim,
    claim_suspects,
    expire,
    give_back,
    give_back_requests,
    heartbeat,
    stop_worker,
)
from storage.crashes import count_crash, only_suspects
from storage.database import Database
from storage.errors import ClaimLost, InvalidTransition, JobNotFound
from storage.integrity import check_integrity
from storage.jobs import cancel_job, fail_job, get_job, list_jobs, retry_job, runnable_jobs
from storage.prune import look, prune
from storage.results import RequestResult, record, stream_outputs
from tests.storage.factories import make_job, make_worker, result_of

LEASE = 10.0
Key = tuple[int, int]


class Workplace(RuleBasedStateMachine):
    """Jobs of up to five rows, workers that come and go, a clock; results may arrive at any time, or twice."""

    jobs = Bundle("jobs")
    workers = Bundle("workers")
    claims = Bundle("claims")

    @initialize()
    def begin(self) -> None:
        self.folder = tempfile.TemporaryDirectory()
        self.db = Database.open(str(Path(self.folder.name) / "overnight.db"))
        self.now = 0.0
        self.lease: dict[int, float] = {}  # of the workers that nobody ended
        self.holder: dict[Key, tuple[int, int]] = {}  # request -> (worker, attempt) of its living claim
        self.accepted: dict[Key, str] = {}  # request -> text of the output that must be there
        self.pruned: set[int] = set()  # jobs

    def teardown(self) -> None:
        if hasattr(self, "db"):
            self.db.close()
            self.folder.cleanup()

    @rule(target=jobs, number=st.integers(1, 5), refused=st.sets(st.integers(0, 4)))
    def enqueue(self, number: int, refused: set[int]) -> int:
        job_id = make_job(self.db, number, now=self.now, errors=tuple(refused))
        self.accepted |= {(job_id, i): "missing_field" for i in refused if i < number}
        return job_id

    @rule(target=workers)
    def start_worker(self) -> int:
        worker = make_worker(self.db, now=self.now, lease_s=LEASE)
        self.lease[worker] = self.now + LEASE
        return worker

    @rule(target=claims, job=jobs, worker=workers, limit=st.integers(1, 3))
    def claim_some(self, job: int, worker: int, limit: int) -> tuple[int, list[ClaimedRequest]]:
        if worker not in self.lease:
            with pytest.raises(ClaimLost):
                claim(self.db, worker, job, limit, now=self.now)
            return worker, []
        runnable = {j.id for j in runnable_jobs(self.db, "default")}
        apart = only_suspects(self.db, runnable)
        claimed = claim(self.db, worker, job, limit, now=self.now)
        assert bool(claimed) == (job in runnable - apart)
        for one in claimed:
            key = (one.job_id, one.index)
            assert key not in self.holder
            assert key not in self.accepted
            self.holder[key] = (worker, one.attempt)
        return worker, claimed

    @rule(held=claims, fails=st.booleans(), twice=st.booleans())
    def record_some(self, held: tuple[int, list[ClaimedRequest]], fails: bool, twice: bool) -> None:
        worker, claimed = held
        results: list[RequestResult] = []
        for one in claimed:
            text = f"{worker}/{one.attempt}"
            results.append(result_of(one, error=(text, "m") if fails else None, text=text))
        if worker not in self.lease:
            with pytest.raises(ClaimLost):
                record(self.db, worker, results, None, now=self.now)
            return
        mine = [r for r in results if self.holder.get((r.job_id, r.index)) == (worker, r.attempt)]
        assert record(self.db, worker, results * (2 if twice else 1), None, now=self.now) == len(mine)
        for result in mine:
            del self.holder[result.job_id, result.index]
            self.accepted[result.job_id, result.index] = f"{worker}/{result.attempt}"

    @rule(worker=workers)
    def give_all_back(self, worker: int) -> None:
        held = [key for key, (holder, _) in self.holder.items() if holder == worker]
        assert give_back(self.db, worker, now=self.now) == len(held)
        self.holder = {key: claim for key, claim in self.holder.items() if key not in held}

    @rule(worker=workers, other=claims)
    def give_some_back(self, worker: int, other: tuple[int, list[ClaimedRequest]]) -> None:
        held = [(c.job_id, c.index) for c in other[1] if self.holder.get((c.job_id, c.index)) == (worker, c.attempt)]
        assert give_back_requests(self.db, worker, [(c.job_id, c.index, c.attempt) for c in other[1]]) == len(held)
        for key in held:
            del self.holder[key]

    @rule(target=claims, worker=workers)
    def claim_suspects_of_all_jobs(self, worker: int) -> tuple[int, list[ClaimedRequest]]:
        known = [job.id for job in list_jobs(self.db)]
        if worker not in self.lease:
            with pytest.raises(ClaimLost):
                claim_suspects(self.db, worker, known, now=self.now)
            return worker, []
        claimed = claim_suspects(self.db, worker, known, now=self.now)
        assert len({one.crash_group for one in claimed}) <= 1, "one group at a time"
        for one in claimed:
            key = (one.job_id, one.index)
            assert one.crash_group is not None
            assert key not in self.holder
            assert key not in self.accepted
            self.holder[key] = (worker, one.attempt)
        return worker, claimed

    @rule(worker=workers, other=claims)
    def die_in_a_pass(self, worker: int, other: tuple[int, list[ClaimedRequest]]) -> None:
        running = [(c.job_id, c.index, c.attempt) for c in other[1]]
        assert count_crash(self.db, worker, running) in (0, 1)
        assert count_crash(self.db, worker, running) == 0, "a death counts once"
        for job_id, index, attempt in running:
            if self.holder.get((job_id, index)) == (worker, attempt):
                # Still its claim until somebody takes it back, under a new epoch: what it sends late is refused.
                self.holder[job_id, index] = (worker, attempt + 1)

    @rule(seconds=st.floats(0.5, 12.0))
    def time_passes(self, seconds: float) -> None:
        self.now += seconds

    @rule(worker=workers)
    def beat(self, worker: int) -> None:
        if worker in self.lease:
            heartbeat(self.db, worker, now=self.now, lease_s=LEASE)
            self.lease[worker] = self.now + LEASE
        else:
            with pytest.raises(ClaimLost):
                heartbeat(self.db, worker, now=self.now, lease_s=LEASE)

    @rule(proven=st.none() | workers)
    def expire_the_dead(self, proven: int | None) -> None:
        dead = {w for w, until in self.lease.items() if until < self.now or w == proven}
        held = [key for key, (holder, _) in self.holder.items() if holder in dead]
        assert expire(self.db, now=self.now, is_dead=lambda worker: worker.id == proven) == len(held)
        self.lease = {w: until for w, until in self.lease.items() if w not in dead}
        self.holder = {key: claim for key, claim in self.holder.items() if key not in held}

    @rule(worker=workers)
    def stop(self, worker: int) -> None:
        stop_worker(self.db, worker, now=self.now)
        self.lease.pop(worker, None)
        self.holder = {key: claim for key, claim in self.holder.items() if claim[0] != worker}

    @rule(job=jobs, whole=st.booleans())
    def end(self, job: int, whole: bool) -> None:
        if job in self.pruned:
            with pytest.raises(JobNotFound):
                cancel_job(self.db, job, now=self.now)
            return
        finished = get_job(self.db, job).is_finished
        if whole:
            fail_job(self.db, job, "no model", now=self.now)
        elif finished:
            with pytest.raises(InvalidTransition):
                cancel_job(self.db, job, now=self.now)
        else:
            cancel_job(self.db, job, now=self.now)
        if not finished:
            self.holder = {key: claim for key, claim in self.holder.items() if key[0] != job}

    @rule(job=jobs)
    def retry(self, job: int) -> None:
        try:
            retry_job(self.db, job, now=self.now)
        except InvalidTransition:
            return
        except JobNotFound:
            assert job in self.pruned
            return
        errors = {o.index for o in stream_outputs(self.db, job, errors_only=True)}
        ok = {o.index for o in stream_outputs(self.db, job)} - errors
        assert all(self.accepted[job, i] == "missing_field" for i in errors)
        self.accepted = {(j, i): text for (j, i), text in self.accepted.items() if j != job or i in ok | errors}

    @rule(age=st.floats(0.0, 20.0))
    def prune_what_is_older(self, age: float) -> None:
        before = self.now - age
        old = [job.id for job in list_jobs(self.db) if job.finished_at is not None and job.finished_at < before]
        assert list(look(self.db, before=before).jobs) == sorted(old)
        assert list(prune(self.db, before=before).jobs) == sorted(old)
        self.pruned |= set(old)
        self.accepted = {key: text for key, text in self.accepted.items() if key[0] not in self.pruned}

    @invariant()
    def the_outputs_are_the_accepted_ones_and_the_laws_hold(self) -> None:
        if not hasattr(self, "db"):
            return
        check_integrity(self.db)
        found: dict[Key, str] = {}
        for job in {key[0] for key in self.accepted}:
            for row in stream_outputs(self.db, job, page_rows=2):
                assert (job, row.index) not in found
                found[job, row.index] = str(row.output["text"] if row.output else row.error_code)
        assert found == self.accepted


Workplace.TestCase.settings = settings(
    max_examples=15, stateful_step_count=30, deadline=None, suppress_health_check=list(HealthCheck)
)
TestWorkplace = Workplace.TestCase
