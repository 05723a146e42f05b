"""Results: recorded once per request together with the passes that made them; streamed out page by page."""

import json
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from sqlalchemy import Connection, Text, insert, select, type_coerce, update

from storage.claims import hold_worker
from storage.database import Database
from storage.dialects import insert_once
from storage.jobs import get_job
from storage.schema import jobs, outputs, passes, requests, value_of
from storage.states import JobState, OutputStatus, RequestState, jobs_before

_IN_LIST = 500  # SQLite's oldest limit of parameters is 999
_PASSES_PAGE = 1000
_Claim = tuple[int, int]
"""Index and attempt."""


@dataclass(frozen=True, slots=True)
class RequestResult:
    """What became of one claimed request: an output, or an error (code, message). Tokens are counts."""

    job_id: int
    index: int
    attempt: int  # of the claim
    output: Mapping[str, Any] | None
    error: tuple[str, str] | None
    prompt_tokens: int
    completion_tokens: int


@dataclass(frozen=True, slots=True)
class PassTotals:
    """Sums over the engine's passes since the last commit. Lanes by name; bytes and seconds."""

    model: str
    job_ids: tuple[int, ...]
    started_at: float  # unix seconds
    num_passes: int
    seconds: float
    prefill_tokens: int
    decode_tokens: int
    weight_bytes: int
    lane_bytes: dict[str, int]
    lane_seconds: dict[str, float]


@dataclass(frozen=True, slots=True)
class PassRow:
    """One recorded row of passes."""

    id: int
    worker_id: int
    totals: PassTotals


@dataclass(frozen=True, slots=True)
class OutputRow:
    """One output as `fetch` shows it."""

    index: int
    row_id: Any
    status: OutputStatus
    output: dict[str, Any] | None
    error_code: str | None
    error_message: str | None
    prompt_tokens: int
    completion_tokens: int
    finished_at: float


def record(
    db: Database, worker_id: int, results: Sequence[RequestResult], passes: PassTotals | None, *, now: float
) -> int:
    """Commit results and passes in one transaction; returns how many of the results were new.

    A result counts only while its worker holds its claim (worker and attempt): what was cancelled, expired or recorded
    before is discarded quietly. A job whose last request this was is done.
    Raises ClaimLost, and writes nothing, when the worker itself was expired or stopped.
    """
    with db.write() as connection:
        hold_worker(connection, worker_id)
        by_job: dict[int, dict[_Claim, RequestResult]] = defaultdict(dict)
        for result in results:
            # By attempt, too: a job that was cancelled and queued again within one commit has results of both.
            by_job[result.job_id].setdefault((result.index, result.attempt), result)
        new = sum(_record_job(connection, worker_id, job_id, by_job[job_id], now) for job_id in sorted(by_job))
        if passes is not None:
            _insert_passes(connection, worker_id, passes)
    return new


def _record_job(
    connection: Connection, worker_id: int, job_id: int, results: dict[_Claim, RequestResult], now: float
) -> int:
    connection.execute(select(jobs.c.id).where(jobs.c.id == job_id).with_for_update())
    held = _held(connection, worker_id, job_id, sorted({index for index, _ in results}))
    mine = [results[claim] for claim in held if claim in results]
    if not mine:
        return 0
    for state, some in (
        (RequestState.DONE, [r.index for r in mine if r.error is None]),
        (RequestState.FAILED, [r.index for r in mine if r.error is not None]),
    ):
        for start in range(0, len(some), _IN_LIST):
            these = requests.c.index.in_(some[start : start + _IN_LIST])
            statement = update(requests).where(requests.c.job_id == job_id, these)
            connection.execute(statement.values(state=state, worker_id=None))
    connection.execute(insert_once(connection, outputs), [_output_values(result, now) for result in mine])
    num_failed = sum(result.error is not None for result in mine)
    connection.execute(
        update(jobs)
        .where(jobs.c.id == job_id)
        .values(
            num_done=jobs.c.num_done + len(mine) - num_failed,
            num_failed=jobs.c.num_failed + num_failed,
            prompt_tokens=jobs.c.prompt_tokens + sum(r.prompt_tokens for r in mine),
            generated_tokens=jobs.c.generated_tokens + sum(r.completion_tokens for r in mine),
        )
    )
    connection.execute(
        update(jobs)
        .where(
            jobs.c.id == job_id,
            jobs.c.state.in_(jobs_before(JobState.DONE)),
            jobs.c.num_done + jobs.c.num_failed == jobs.c.num_requests,
        )
        .values(state=JobState.DONE, finished_at=now)
    )
    return len(mine)


def _held(connection: Connection, worker_id: int, job_id: int, indexes: list[int]) -> list[_Claim]:
    """Which of the indexes the worker holds, and by which claims. The write lock keeps that true until the commit."""
    held: list[_Claim] = []
    for start in range(0, len(indexes), _IN_LIST):
        rows = connection.execute(
            select(requests.c.index, requests.c.attempt)
            .where(
                requests.c.job_id == job_id,
                requests.c.index.in_(indexes[start : start + _IN_LIST]),
                requests.c.worker_id == worker_id,
                requests.c.state == RequestState.CLAIMED,
            )
            .with_for_update()
        )
        held += [(index, attempt) for index, attempt in rows]
    return held


def _output_values(result: RequestResult, now: float) -> dict[str, Any]:
    code, message = result.error or (None, None)
    return {
        "job_id": result.job_id,
        "index": result.index,
        "status": OutputStatus.OK if result.error is None else OutputStatus.ERROR,
        "output": result.output if result.error is None else None,
        "error_code": code,
        "error_message": message,
        "prompt_tokens": result.prompt_tokens,
        "completion_tokens": result.completion_tokens,
        "finished_at": now,
    }


def stream_outputs(
    db: Database, job_id: int, *, errors_only: bool = False, page_rows: int = 1000
) -> Iterator[OutputRow]:
    """The outputs of a job by index, a page at a time; `errors_only`: those that are errors.

    No transaction is open while a row is out: a slow reader never keeps a writer waiting. Rows that are written behind
    the reader's position meanwhile are not seen. Raises JobNotFound at once, before the first row;
    or at the end, if the job was pruned meanwhile.
    """
    get_job(db, job_id)
    return _stream(db, job_id, errors_only, page_rows)


def _stream(db: Database, job_id: int, errors_only: bool, page_rows: int) -> Iterator[OutputRow]:
    query = (
        select(
            outputs.c.index,
            type_coerce(requests.c.row_id, Text),
            outputs.c.status,
            type_coerce(outputs.c.output, Text),  # parsed one row at a time, below
            outputs.c.error_code,
            outputs.c.error_message,
            outputs.c.prompt_tokens,
            outputs.c.completion_tokens,
            outputs.c.finished_at,
        )
        .join_from(outputs, requests, (requests.c.job_id == outputs.c.job_id) & (requests.c.index == outputs.c.index))
        .where(outputs.c.job_id == job_id)
        .order_by(outputs.c.index)
        .limit(page_rows)
    )
    if errors_only:
        query = query.where(outputs.c.status == OutputStatus.ERROR)
    last = -1
    while True:
        with db.read() as connection:
            page = connection.execute(query.where(outputs.c.index > last)).all()
        for index, row_id, status, output, code, message, prompt, completion, finished_at in page:
            made = None if output is None else json.loads(output)
            yield OutputRow(index, value_of(row_id), status, made, code, message, prompt, completion, finished_at)
        if len(page) < page_rows:
            get_job(db, job_id)  # pruned meanwhile? An end that comes too early must not look like the end.
            return
        last = page[-1][0]


def _insert_passes(connection: Connection, worker_id: int, totals: PassTotals) -> None:
    values = {**asdict(totals), "job_ids": list(totals.job_ids)}
    connection.execute(insert(passes).values(worker_id=worker_id, **values))


def list_passes(db: Database, *, job_id: int | None = None, after_id: int = 0, limit: int = 1000) -> list[PassRow]:
    """Recorded passes, oldest first, at most `limit` of those after `after_id`; `job_id`: those that worked for it."""
    found: list[PassRow] = []
    while True:
        query = select(passes).where(passes.c.id > after_id).order_by(passes.c.id).limit(_PASSES_PAGE)
        with db.read() as connection:
            page = connection.execute(query).all()
        for pass_id, worker_id, model, job_ids, *rest in page:
            after_id = pass_id
            if job_id is None or job_id in job_ids:
                found.append(PassRow(pass_id, worker_id, PassTotals(model, tuple(job_ids), *rest)))
                if len(found) == limit:
                    return found
        if len(page) < _PASSES_PAGE:
            return found
