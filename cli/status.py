"""`overnight status`: what is in the queue, how far it is, and who works on it."""

import time
from collections import Counter
from typing import TYPE_CHECKING

import click

from cli import exit_codes
from cli.context import App
from cli.describing import describe, jobs_table
from cli.display import emit, emit_json, emit_table, format_seconds, say
from cli.options import Number, json_option, settings_options
from cli.reports import job_document, worker_document

if TYPE_CHECKING:
    from storage.database import Database
    from storage.jobs import Job

_SHOWN_JOBS = 20


@click.command("status", short_help="Show jobs and workers; --watch follows.")
@click.argument("job_id", metavar="[JOB]", required=False, type=Number(minimum=1, maximum=2**63 - 1, whole=True))
@click.option("--watch", is_flag=True, help="Follow the job until it ends.")
@json_option
@settings_options
@click.pass_obj
def command(app: App, job_id: int | None, watch: bool, as_json: bool) -> None:
    """Show JOB, or all jobs and the workers that are alive. Needs no Redis.

    --watch follows JOB, or without one the newest unfinished job, until it ends.
    """
    if job_id is not None:
        with app.job_database(job_id, only_look=True) as database:
            _show_job(database, job_id, watch=watch, as_json=as_json)
        return
    existing = app.open_for_reading()
    if existing is None:
        if as_json:
            emit_json({"jobs": [], "workers": []})
        else:
            say(f"no jobs yet ({app.database_name} does not exist); begin with: overnight demo")
        return
    with existing as database:
        newest = _newest_unfinished(database) if watch else None
        if newest is not None:
            _show_job(database, newest, watch=True, as_json=as_json)
        else:
            _show_all(database, as_json=as_json)


def _newest_unfinished(database: "Database") -> int | None:
    from storage.jobs import list_jobs

    return next((job.id for job in list_jobs(database) if not job.is_finished), None)


def _show_job(database: "Database", job_id: int, *, watch: bool, as_json: bool) -> None:
    from cli.workers import missing_worker_hint
    from storage.clock import time_of
    from storage.jobs import get_job

    job = get_job(database, job_id)
    if watch:
        try:
            job = _watch(database, job)
        except KeyboardInterrupt:  # looking ends, and nothing else does
            raise click.exceptions.Exit(exit_codes.INTERRUPTED) from None
    now = time_of(database)
    hint = missing_worker_hint(database, job, now=now)
    if as_json:
        emit_json(job_document(job, now, is_attended=hint is None))
        return
    for name, value in describe(job, now, is_attended=hint is None):
        emit(f"{name + ':':<12}{value}")
    if hint and not watch:
        say(hint)


def _watch(database: "Database", job: "Job") -> "Job":
    from cli.progress import follow, job_progress

    hint: str | None = None
    with job_progress(f"job {job.id}") as progress:
        for snapshot in follow(database, job.id):
            if snapshot.attendance.hint not in (None, hint):
                progress.note(snapshot.attendance.hint)
            hint = snapshot.attendance.hint
            progress.update(snapshot, time.monotonic())
            job = snapshot.job
    return job


def _show_all(database: "Database", *, as_json: bool) -> None:
    from cli.workers import living_workers, missing_worker_hint
    from storage.claims import list_workers
    from storage.clock import time_of
    from storage.faults import list_faults
    from storage.jobs import list_jobs

    now = time_of(database)
    jobs = list_jobs(database, limit=None if as_json else _SHOWN_JOBS + 1)
    workers = list_workers(database, now)
    if as_json:
        served = {worker.queue for worker in living_workers(database, now)}
        documents = [job_document(job, now, is_attended=job.queue in served) for job in jobs]
        faults = Counter[str]()
        for fault in list_faults(database):
            faults[fault.machine] += fault.count
        emit_json({"jobs": documents, "workers": [worker_document(w, crashes=faults[w.hostname]) for w in workers]})
        return
    if jobs:
        emit_table(*jobs_table(jobs[:_SHOWN_JOBS], now))
        if len(jobs) > _SHOWN_JOBS:
            say("and older ones: overnight status --json shows all")
    else:
        say("no jobs yet; begin with: overnight demo")
    if workers:
        click.echo()
        rows = [(str(w.id), w.queue, w.device, w.state, w.model or "-", f"{w.hostname}:{w.pid}") for w in workers]
        emit_table(("WORKER", "QUEUE", "DEVICE", "STATE", "MODEL", "HOST:PID"), rows)
        for worker in workers:
            if worker.message:
                emit(f"worker {worker.id}: {worker.message}{_again(worker.retry_at, now)}")
    else:
        for job in jobs:
            if hint := missing_worker_hint(database, job, now=now):
                say(hint)  # of the newest that waits; the others may well wait for the same
                break


def _again(retry_at: float | None, now: float) -> str:
    return "" if retry_at is None else f" (tries again in {format_seconds(max(0.0, retry_at - now))})"
