"""Loading a job: chunk by chunk while it is invisible, so that it appears whole or not at all.

Between two chunks the write lock is free: a worker goes on committing while a large job is loaded.
"""

import itertools
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Connection, Text, bindparam, delete, insert, select, update

from storage.database import Database
from storage.errors import EmptyJob, LoadLost, StorageError
from storage.pace import Pace
from storage.schema import jobs, outputs, requests, to_json
from storage.states import JobState, OutputStatus, RequestState

CHUNK_ROWS = 2000
CHUNK_BYTES = 8 << 20  # of payload text: bounds the memory of an enqueue of very long rows


@dataclass(frozen=True, slots=True)
class NewJob:
    """What is asked for; the rest of a job's row follows from its requests."""

    model: str  # absolute path, or name
    task: str
    params: dict[str, Any]
    seed: int
    priority: int  # higher first
    queue: str
    name: str | None = None  # what its owner calls it
    origin: dict[str, Any] | None = None  # as in `jobs.Job`
    exact: bool = False


@dataclass(frozen=True, slots=True)
class NewRequest:
    """One row. With `error` (code, message) it is refused: it becomes an error output at once and never runs."""

    index: int  # grows from row to row
    row_id: object | None  # the dataset's own name of the row; any JSON value
    payload: Mapping[str, Any] | None  # the rendered work; None only with an error
    error: tuple[str, str] | None = None


@dataclass(slots=True)
class _Chunk:
    requests: list[dict[str, Any]]
    outputs: list[dict[str, Any]]


def create_job(db: Database, new: NewJob, rows: Iterable[NewRequest], *, now: float) -> int:
    """Make a job with its requests, whole or not at all, and return its number.

    Takes the rows as they come, holding one chunk. On any exception, one raised by `rows` included, what was inserted
    is removed again and the exception goes on. A job whose every row is refused is done at once.
    Raises EmptyJob, ValueError for indexes that do not grow, and DatabaseUnreachable.
    """
    started = time.monotonic()
    chunks = _chunks(rows, now)
    first = next(chunks, None)
    if first is None:
        raise EmptyJob("A job needs at least one request.")
    second = next(chunks, None)  # also runs `rows` to its end when all fits into one chunk
    if second is None:
        with db.write() as connection:
            job_id = _insert_job(connection, new, now)
            _insert_chunk(connection, job_id, first)
            _show(connection, job_id, len(first.requests), len(first.outputs), now)
        return job_id
    num_requests = num_failed = 0
    with db.write() as connection:
        job_id = _insert_job(connection, new, now)
    try:
        for chunk in itertools.chain((first, second), chunks):
            with db.write() as connection:
                _still_loading(connection, job_id, now + time.monotonic() - started)
                _insert_chunk(connection, job_id, chunk)
            num_requests += len(chunk.requests)
            num_failed += len(chunk.outputs)
        with db.write() as connection:
            _show(connection, job_id, num_requests, num_failed, now)
    except BaseException:
        with suppress(StorageError):  # the first error is the one to tell; sweep_invisible takes what is left
            remove_rows(db, job_id)
        raise
    return job_id


def sweep_invisible(
    db: Database, *, now: float, older_than_s: float, is_over: Callable[[], bool] = lambda: False
) -> int:
    """Remove what killed enqueues and prunes left: jobs whose last chunk is older than this. Returns how many.

    `is_over`: asked between two chunks, whether to leave the rest to the next one.
    """
    stale = select(jobs.c.id).where(jobs.c.visible.is_(False), jobs.c.loaded_at < now - older_than_s)
    with db.read() as connection:
        found = list(connection.execute(stale).scalars())
    for job_id in found:
        remove_rows(db, job_id, is_over=is_over)
    return len(found)


def remove_rows(
    db: Database, job_id: int, pace: Pace | None = None, *, is_over: Callable[[], bool] = lambda: False
) -> None:
    """Delete an invisible job, its row last, a chunk a transaction. A visible one is left alone."""
    pace = pace or Pace(1000)
    with db.write() as connection:
        # Should its loader be alive after all, its next chunk fails (_still_loading) instead of filling up again.
        condemned = update(jobs).where(jobs.c.id == job_id, jobs.c.visible.is_(False)).values(state=JobState.CANCELLED)
        if connection.execute(condemned).rowcount != 1:
            return
    of_job = select(requests.c.index).where(requests.c.job_id == job_id).order_by(requests.c.index)
    while not is_over():
        with pace.step() as rows, db.write() as connection:
            page = connection.execute(of_job.limit(rows)).scalars().all()
            if not page:
                connection.execute(delete(jobs).where(jobs.c.id == job_id))
                return
            for table in (outputs, requests):
                connection.execute(
                    delete(table).where(table.c.job_id == job_id, table.c.index.between(page[0], page[-1]))
                )


def _insert_job(connection: Connection, new: NewJob, now: float) -> int:
    inserted = connection.execute(
        insert(jobs).values(
            created_at=now,
            loaded_at=now,
            state=JobState.QUEUED,
            visible=False,
            model=new.model,
            task=new.task,
            params=new.params,
            seed=new.seed,
            priority=new.priority,
            queue=new.queue,
            name=new.name,
            origin=new.origin,
            exact=new.exact,
            num_requests=0,
            num_done=0,
            num_failed=0,
            prompt_tokens=0,
            generated_tokens=0,
        )
    )
    key = inserted.inserted_primary_key
    assert key is not None
    return int(key[0])


def _still_loading(connection: Connection, job_id: int, now: float) -> None:
    mine = (jobs.c.id == job_id, jobs.c.visible.is_(False), jobs.c.state == JobState.QUEUED)
    if connection.execute(update(jobs).where(*mine).values(loaded_at=now)).rowcount != 1:
        raise LoadLost(f"Job {job_id} was removed while it was being loaded. Enqueue the dataset again.")


def _show(connection: Connection, job_id: int, num_requests: int, num_failed: int, now: float) -> None:
    _still_loading(connection, job_id, now)
    values: dict[str, Any] = {"visible": True, "num_requests": num_requests, "num_failed": num_failed}
    if num_failed == num_requests:
        values |= {"state": JobState.DONE, "finished_at": now}
    connection.execute(update(jobs).where(jobs.c.id == job_id).values(values))


_INSERT_REQUESTS = insert(requests).values(
    # Serialised already, to know the size of a chunk: bound as text.
    row_id=bindparam("row_id", type_=Text),
    payload=bindparam("payload", type_=Text),
)


def _insert_chunk(connection: Connection, job_id: int, chunk: _Chunk) -> None:
    connection.execute(_INSERT_REQUESTS, [{"job_id": job_id, **row} for row in chunk.requests])
    if chunk.outputs:
        connection.execute(insert(outputs), [{"job_id": job_id, **row} for row in chunk.outputs])


def _chunks(rows: Iterable[NewRequest], now: float) -> Iterator[_Chunk]:
    chunk, size, last = _Chunk([], []), 0, -1
    for row in rows:
        if row.index <= last:
            raise ValueError(f"Request indexes must grow from 0: {row.index} came after {last}.")
        last = row.index
        payload = None if row.payload is None else to_json(row.payload)
        row_id = None if row.row_id is None else to_json(row.row_id)
        if row.error is None:
            if payload is None:
                raise ValueError(f"Request {row.index} has neither a payload nor an error.")
            state = RequestState.PENDING
        else:
            state, payload = RequestState.FAILED, None
            chunk.outputs.append(_error_output(row.index, row.error, now))
        chunk.requests.append({"index": row.index, "row_id": row_id, "payload": payload, "state": state, "attempt": 0})
        size += len(payload or "") + len(row_id or "")
        if len(chunk.requests) >= CHUNK_ROWS or size >= CHUNK_BYTES:
            yield chunk
            chunk, size = _Chunk([], []), 0
    if chunk.requests:
        yield chunk


def _error_output(index: int, error: tuple[str, str], now: float) -> dict[str, Any]:
    code, message = error
    return {
        "index": index,
        "status": OutputStatus.ERROR,
        "output": None,
        "error_code": code,
        "error_message": message,
        "prompt_tokens": 0,
        "completion_tokens": 0,
        "finished_at": now,
    }
