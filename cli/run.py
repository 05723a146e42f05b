"""`overnight run`: a dataset in, a file out; nothing else needs to be running."""

import shlex
import time
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from cli.atomic import check_output, open_output
from cli.context import App
from cli.describing import throughput_of
from cli.display import counted, say, warn
from cli.fitting import check_fits
from cli.formats import FORMATS, format_of, write_rows
from cli.job_options import JobOptions, job_options
from cli.options import Number, PathName, settings_options
from cli.placement import placement_options, take_placement
from cli.sizes import sizes_of
from cli.workers import PRIVATE_QUEUE
from engine.planner.plan import flag_name
from worker.spill import make_spill_folder, spill_folder

if TYPE_CHECKING:
    from engine.planner.plan import PlanOptions
    from engine.planner.workload import Workload
    from storage.database import Database
    from storage.jobs import Job


@click.command("run", short_help="Enqueue, work and fetch in one.")
@click.argument("dataset", metavar="DATASET", required=False, type=PathName())
@click.option(
    "-o", "--output", required=True, type=PathName(), metavar="FILE|-", help="Where the outputs go; - is stdout."
)
@click.option(
    "--format", "file_format", type=click.Choice(FORMATS), help="Default: by the end of FILE's name, else jsonl."
)
@click.option(
    "--resume",
    type=Number(minimum=1, maximum=2**63 - 1, whole=True),
    metavar="JOB",
    help="Go on with a run that was interrupted, instead of a DATASET.",
)
@click.option(
    "--trace",
    type=click.Path(dir_okay=False, path_type=Path),
    metavar="FILE",
    help="Write what each lane and pass did, for ui.perfetto.dev.",
)
@job_options(required=False)
@placement_options
@settings_options
@click.pass_obj
def command(
    app: App,
    /,
    dataset: str | None,
    output: str,
    file_format: str | None,
    resume: int | None,
    trace: Path | None,
    **values: Any,
) -> None:
    """Run DATASET through a model and write the outputs: enqueue, work and fetch in one.

    It starts a Redis and a worker of its own, which end with it. Interrupted (Ctrl-C), it keeps what is done and says
    how to go on.

    \b
    Example:
      overnight run reviews.jsonl --model reviews --task choose --prompt 'Review: {{ text }}' \\
          --choices positive,negative -o labels.jsonl
    """
    from cli.errors import JobUnfinished
    from cli.reports import outcome_of
    from cli.serving import work_off

    file_format = format_of(output, file_format)
    placement = take_placement(values)
    with _job(app, dataset, output, trace, resume, placement, values) as (database, submitted):
        again = f"overnight run --resume {submitted.id} -o {shlex.quote(output)}"
        job = work_off(database, app.settings, submitted, placement, resume=again, trace=trace)
        if job.num_done or job.num_failed:
            say(_how_fast(database, job))
        if job.state == "done" or job.num_done:
            _write(database, job, output, file_format)
    if trace is not None and trace.exists():
        say(f"trace in {trace}; open it with https://ui.perfetto.dev or chrome://tracing")
    problem = outcome_of(job)
    if problem:
        raise JobUnfinished(problem)


@contextmanager
def _job(
    app: App,
    dataset: str | None,
    output: str,
    trace: Path | None,
    resume: int | None,
    placement: "PlanOptions",
    values: dict[str, Any],
) -> "Iterator[tuple[Database, Job]]":
    """The database and the job to run: a new one, or the one to go on with."""
    if (dataset is None) == (resume is None):
        raise click.UsageError("name either a DATASET or, to go on with an interrupted run, --resume JOB")
    if resume is not None:
        _refuse_what_a_job_keeps(click.get_current_context())
        with app.job_database(resume) as database:
            job = _resumed(database, resume)
            _check_outputs(app, output, trace, job.origin)
            _check_resumed(app, database, job, placement)
            yield database, job
        return
    from cli.submission import prepare
    from storage.jobs import get_job

    for name in ("model", "task"):
        if values[name] is None:
            raise click.UsageError(f"missing option '--{name}'")
    options = JobOptions.take(values)
    for sentence in options.warnings():
        warn(sentence)
    assert dataset is not None
    _check_outputs(app, output, trace, {"dataset": dataset})
    _check_exact(placement, exact=options.exact)
    submission = prepare(dataset, options, app.settings)
    for sentence in submission.warnings():
        warn(sentence)
    sizes = sizes_of(submission.model, app.settings)
    check_fits(sizes, _plan_options(app, placement), app.settings.spill_dir, lambda: submission.workload(sizes))
    app.make_home()
    make_spill_folder(spill_folder(app.settings, placement))
    with app.open_database() as database:
        job_id = submission.store(database, f"{PRIVATE_QUEUE}{uuid.uuid4().hex[:8]}")
        yield database, get_job(database, job_id)


def _refuse_what_a_job_keeps(ctx: click.Context) -> None:
    """A job that goes on keeps its options: one that is given again is refused, rather than ignored."""
    given = [
        flag_name(field.name)
        for field in fields(JobOptions)
        if ctx.get_parameter_source(field.name) is ParameterSource.COMMANDLINE
    ]
    if given:
        raise click.UsageError(
            f"{', '.join(given)} cannot be changed with --resume: the job goes on as it was made; leave "
            f"{'it' if len(given) == 1 else 'them'} out, or run the DATASET anew"
        )


def _check_outputs(app: App, output: str, trace: Path | None, origin: Mapping[str, object] | None) -> None:
    keep = app.files_to_keep(origin)
    check_output(output, keep=keep)
    if trace is not None:
        check_output(str(trace.absolute()), keep=[*keep, Path(output)], option="--trace")


def _resumed(database: "Database", job_id: int) -> "Job":
    from storage.jobs import get_job

    job = get_job(database, job_id)
    if not job.queue.startswith(PRIVATE_QUEUE):
        raise click.UsageError(
            f"job {job_id} waits in the queue {job.queue!r}, not for `overnight run`; start: overnight worker --queue "
            f"{job.queue}"
        )
    return job


def _plan_options(app: App, placement: "PlanOptions") -> "PlanOptions":
    """The options as the worker will have them."""
    return replace(placement, disk_dir=spill_folder(app.settings, placement))


def _check_resumed(app: App, database: "Database", job: "Job", placement: "PlanOptions") -> None:
    """What does not fit is refused now: the worker would end the job with it."""
    from engine.lengths import workload_for
    from storage.jobs import peek_requests
    from worker.models import resolve_model
    from worker.sample import ROWS, requests_of

    if job.is_finished:
        return
    _check_exact(placement, exact=job.exact)
    ref = resolve_model(job.model, app.settings)
    sizes = sizes_of(ref, app.settings)

    def workload() -> "Workload | None":
        rows = peek_requests(database, job.id, ROWS)
        requests = requests_of(job.id, job.task, job.params, job.seed, rows)
        return workload_for(sizes.shape, sizes.folder or ref.path, requests)

    check_fits(sizes, _plan_options(app, placement), app.settings.spill_dir, workload)


def _check_exact(placement: "PlanOptions", *, exact: bool) -> None:
    """The only worker there is would leave the job alone."""
    if exact and placement.may_round:
        raise click.UsageError(
            f"--exact and --kv-format {placement.kv_format}: a cache in four bits is not exact; leave one of them out"
        )


def _how_fast(database: "Database", job: "Job") -> str:
    from storage.lanes import lane_seconds

    busy = lane_seconds(database, job.id, since=job.created_at)
    bound = f", bound by {max(busy, key=lambda lane: busy[lane])}" if any(busy.values()) else ""
    return f"job {job.id}: {throughput_of(job, time.time())}{bound}"


def _write(database: "Database", job: "Job", output: str, file_format: str) -> None:
    from storage.results import stream_outputs

    with open_output(output) as stream:
        count = write_rows(
            stream_outputs(database, job.id),
            stream,
            file_format=file_format,
            task=job.task,
            choices=(job.origin or {}).get("choices"),
        )
    say(f"{counted(count, 'row')} in {'stdout' if output == '-' else output}")
