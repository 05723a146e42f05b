"""The states of jobs and requests, and the one table of the steps between them."""

from enum import StrEnum


class JobState(StrEnum):
    """Where a job stands. The last three are finished states."""

    QUEUED = "queued"
    RUNNING = "running"
    DONE = "done"
    FAILED = "failed"
    CANCELLED = "cancelled"


class RequestState(StrEnum):
    """Where one request stands. `done` and `failed` have an output, the others have none."""

    PENDING = "pending"
    CLAIMED = "claimed"
    DONE = "done"
    FAILED = "failed"
    CANCELLED = "cancelled"


class OutputStatus(StrEnum):
    """What an output holds: a result, or an error code with a message."""

    OK = "ok"
    ERROR = "error"


_J, _R = JobState, RequestState

#: state -> the states that may follow it. Everything else is refused by the statements themselves (`before`).
JOB_STEPS: dict[JobState, frozenset[JobState]] = {
    _J.QUEUED: frozenset({_J.RUNNING, _J.FAILED, _J.CANCELLED}),
    _J.RUNNING: frozenset({_J.DONE, _J.FAILED, _J.CANCELLED}),
    _J.DONE: frozenset({_J.QUEUED}),  # retry
    _J.FAILED: frozenset({_J.QUEUED}),  # retry
    _J.CANCELLED: frozenset({_J.QUEUED}),  # retry
}
REQUEST_STEPS: dict[RequestState, frozenset[RequestState]] = {
    _R.PENDING: frozenset({_R.CLAIMED, _R.CANCELLED}),
    _R.CLAIMED: frozenset({_R.PENDING, _R.DONE, _R.FAILED, _R.CANCELLED}),  # pending: given back, or the lease ended
    _R.DONE: frozenset(),
    _R.FAILED: frozenset({_R.PENDING}),  # retry
    _R.CANCELLED: frozenset({_R.PENDING}),  # retry
}

#: Jobs that still have, or may get, work to do.
OPEN_JOBS = (JobState.QUEUED, JobState.RUNNING)


def jobs_before(state: JobState) -> tuple[JobState, ...]:
    """The job states from which `state` may be reached: the guard of the UPDATE that sets it."""
    return tuple(s for s, following in JOB_STEPS.items() if state in following)


def requests_before(state: RequestState) -> tuple[RequestState, ...]:
    """The request states from which `state` may be reached: the guard of the UPDATE that sets it."""
    return tuple(s for s, following in REQUEST_STEPS.items() if state in following)
