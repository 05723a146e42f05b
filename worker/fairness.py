"""Which model is next: by priority, then age; but loading takes long, so the resident model stays while it may.

Pure: jobs and times in, a model out.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Waiting:
    """A job with pending requests, as far as choosing a model is concerned."""

    job_id: int
    model: str
    priority: int
    """Higher first."""
    created_at: float
    is_served: bool
    """Some other worker holds requests of it."""

    @property
    def turn(self) -> tuple[int, float, int]:
        """Sorts jobs into the order in which they are served."""
        return (-self.priority, self.created_at, self.job_id)


def choose_model(
    jobs: Iterable[Waiting], *, resident: str | None, left_at: Mapping[str, float], now: float, max_wait_s: float
) -> str | None:
    """The model to work with now; None when no job waits.

    The resident model is kept while a job needs it, unless a job of another model has waited for more than
    ``max_wait_s`` seconds. ``left_at`` says when this worker last unloaded a model: its jobs wait only since then, so
    two models with endless work take turns of ``max_wait_s`` instead of throwing each other out. A job that another
    worker is at does not count as waiting.
    """
    in_turn = sorted(jobs, key=lambda job: job.turn)
    if not in_turn:
        return None
    if any(job.model == resident for job in in_turn):
        for job in in_turn:
            if job.model != resident and _waited_s(job, left_at, now) > max_wait_s:
                return job.model
        return resident
    return in_turn[0].model


def _waited_s(job: Waiting, left_at: Mapping[str, float], now: float) -> float:
    return 0.0 if job.is_served else now - max(job.created_at, left_at.get(job.model, job.created_at))
