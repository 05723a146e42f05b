"""What the log says of jobs: that they started, how far they are once a minute, and how they ended."""

from collections.abc import Callable, Iterable

from storage.jobs import Job
from worker.logs import BoundLogger

_EVERY_S = 60.0


class JobLog:
    """Lines about the jobs that one worker works on. ``read`` gives those of some jobs that are still there."""

    def __init__(
        self, log: BoundLogger, read: Callable[[Iterable[int]], list[Job]], clock: Callable[[], float]
    ) -> None:
        self._log = log
        self._read = read
        self._clock = clock
        self._said_at: dict[int, float] = {}

    def claims(self, job: Job) -> None:
        """Rows of the job were claimed."""
        if job.id in self._said_at:
            return
        self._said_at[job.id] = self._clock()
        sentence = "job starts: %s, %d rows" if job.started_at is None else "job goes on: %s, %d rows left"
        self._log.info(sentence, job.task, job.num_left, extra={"action": "job", "job": job.id, "model": job.model})

    def committed(self, still_claimed: Iterable[int]) -> None:
        """Results were recorded; ``still_claimed``: the jobs of which this worker holds rows."""
        now, held = self._clock(), set(still_claimed)
        for job_id, said_at in list(self._said_at.items()):
            if job_id in held and now - said_at < _EVERY_S:
                continue
            found = self._read([job_id])
            if not found:
                del self._said_at[job_id]
                continue
            (job,) = found
            if job.is_finished or now - said_at >= _EVERY_S:
                self._log.info("%s", sentence_of(job, now), extra={"action": "job", "job": job_id})
                self._said_at[job_id] = now
            if job.is_finished:
                del self._said_at[job_id]


def sentence_of(job: Job, now: float) -> str:
    """``job done: 1,000 of 1,000 rows, 3 failed, in 61 s: 16.4 rows/s, 540 tokens/s``."""
    ended = job.num_done + job.num_failed
    seconds = max((job.finished_at or now) - (job.started_at or now), 1e-3)
    failed = f", {job.num_failed:,} failed" if job.num_failed else ""
    rates = f"{ended / seconds:,.3g} rows/s, {(job.prompt_tokens + job.generated_tokens) / seconds:,.0f} tokens/s"
    return f"job {job.state}: {ended:,} of {job.num_requests:,} rows{failed}, in {seconds:,.0f} s: {rates}"
