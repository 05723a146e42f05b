"""Makers of what the storage tests need: one line a noun."""

from collections.abc import Iterator
from typing import Any

from storage.claims import ClaimedRequest, register_worker
from storage.database import Database
from storage.jobs import NewJob, NewRequest, create_job
from storage.results import PassTotals, RequestResult


def new_job(**changed: Any) -> NewJob:
    values: dict[str, Any] = {
        "model": "/models/opt",
        "task": "generate",
        "params": {"max_new_tokens": 8},
        "seed": 7,
        "priority": 0,
        "queue": "default",
    }
    return NewJob(**{**values, **changed})


def rows(number: int, errors: tuple[int, ...] = ()) -> Iterator[NewRequest]:
    for index in range(number):
        if index in errors:
            yield NewRequest(index, f"row-{index}", None, ("missing_field", f"row {index} has no text"))
        else:
            yield NewRequest(index, f"row-{index}", {"prompt": f"prompt {index}"})


def make_job(db: Database, number: int = 3, *, now: float = 1.0, errors: tuple[int, ...] = (), **changed: Any) -> int:
    return create_job(db, new_job(**changed), rows(number, errors), now=now)


def make_worker(db: Database, *, now: float = 1.0, lease_s: float = 30.0, pid: int = 1, queue: str = "default") -> int:
    return register_worker(db, hostname="box", pid=pid, queue=queue, device="cpu", now=now, lease_s=lease_s)


def result_of(claimed: ClaimedRequest, *, error: tuple[str, str] | None = None, text: str = "out") -> RequestResult:
    output = None if error else {"text": text, "finish_reason": "stop"}
    return RequestResult(claimed.job_id, claimed.index, claimed.attempt, output, error, 5, 0 if error else 2)


def pass_totals(*job_ids: int) -> PassTotals:
    return PassTotals("/models/opt", job_ids, 1.0, 3, 0.5, 10, 20, 4096, {"disk_read": 4096}, {"disk_read": 0.25})
