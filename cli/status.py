"""`overnight status`: what is in the queue, how far it is, and who works on it."""

import time
from typing import TYPE_CHECKING

import click

from cli.context import App
from cli.display import emit, emit_json, emit_table, format_count, format_rate, format_seconds, say
from cli.options import Number, json_option, settings_options
from cli.reports import FINISHED, job_document, worker_document

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
        with app.job_database(job_id) as database:
            _show_job(database, job_id, watch=watch, as_json=as_json)
        return
    existing = app.open_existing_database()
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

    return next((job.id for job in list_jobs(database) if job.state not in FINISHED), None)


def _show_job(database: "Database", job_id: int, *, watch: bool, as_json: bool) -> None:
    from cli.workers import missing_worker_hint
    from storage.jobs import get_job

    job = get_job(database, job_id)
    hint = missing_worker_hint(database, job, now=time.time())
    if watch:
        job = _watch(database, job, hint)
    if as_json:
        emit_json(job_document(job, time.time()))
        return
    for name, value in _describe(job, time.time()):
        emit(f"{name + ':':<12}{value}")
    if hint and not watch:
        say(hint)


def _watch(database: "Database", job: "Job", hint: str | None) -> "Job":
    from cli.progress import follow, job_progress

    if hint:
        say(hint)
    with job_progress(f"job {job.id}") as progress:
        for snapshot in follow(database, job.id):
            progress.update(snapshot, time.monotonic())
            job = snapshot
    return job


def _describe(job: "Job", now: float) -> list[tuple[str, str]]:
    document = job_document(job, now)
    counts, speed = document["requests"], document["throughput"]
    lines = [
        ("job", str(job.id)),
        ("state", f"{job.state}" + (f": {job.message}" if job.message else "")),
        ("model", job.model),
        ("task", job.task),
        ("queue", f"{job.queue}, priority {job.priority}"),
        ("requests", f"{counts['done']:,} done, {counts['failed']:,} failed, {counts['total']:,} in all"),
        ("tokens", f"{job.prompt_tokens:,} prompt, {job.generated_tokens:,} generated"),
        ("time", format_seconds(document["seconds"])),
        (
            "throughput",
            f"{format_rate(speed['generated_per_s'])} generated, {format_rate(speed['total_per_s'])} in all",
        ),
    ]
    if document["eta_s"]:
        lines.append(("left", f"about {format_seconds(document['eta_s'])}"))
    return lines


def _show_all(database: "Database", *, as_json: bool) -> None:
    from storage.claims import list_workers
    from storage.jobs import list_jobs

    now = time.time()
    jobs = list_jobs(database, limit=None if as_json else _SHOWN_JOBS + 1)
    workers = list_workers(database, now)
    if as_json:
        emit_json({"jobs": [job_document(job, now) for job in jobs], "workers": [worker_document(w) for w in workers]})
        return
    if jobs:
        emit_table(
            ("JOB", "STATE", "DONE", "FAILED", "TOTAL", "TASK", "MODEL"), [_job_cells(j) for j in jobs[:_SHOWN_JOBS]]
        )
        if len(jobs) > _SHOWN_JOBS:
            say("and older ones: overnight status --json shows all")
    else:
        say("no jobs yet; begin with: overnight demo")
    if workers:
        click.echo()
        rows = [(str(w.id), w.queue, w.device, w.state, w.model or "-", f"{w.hostname}:{w.pid}") for w in workers]
        emit_table(("WORKER", "QUEUE", "DEVICE", "STATE", "MODEL", "HOST:PID"), rows)
    elif any(job.state not in FINISHED for job in jobs):
        say("no worker is running; start one in another terminal: overnight worker")


def _job_cells(job: "Job") -> tuple[str, ...]:
    counts = (format_count(number) for number in (job.num_done, job.num_failed, job.num_requests))
    return (str(job.id), str(job.state), *counts, job.task, job.model)
