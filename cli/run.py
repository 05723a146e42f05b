"""`overnight run`: a dataset in, a file out; nothing else needs to be running."""

import shlex
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from cli.atomic import check_output, open_output
from cli.context import App
from cli.display import format_count, say, warn
from cli.formats import FORMATS, write_rows
from cli.job_options import JobOptions, job_options
from cli.options import Number, placement_options, settings_options
from cli.placement import Placement
from cli.workers import PRIVATE_QUEUE

if TYPE_CHECKING:
    from storage.database import Database
    from storage.jobs import Job


@click.command("run", short_help="Enqueue, work and fetch in one.")
@click.argument("dataset", metavar="DATASET", required=False)
@click.option("-o", "--output", required=True, metavar="FILE|-", help="Where the outputs go; - is stdout.")
@click.option("--format", "file_format", type=click.Choice(FORMATS), default="jsonl", show_default=True)
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
    file_format: str,
    resume: int | None,
    trace: Path | None,
    **values: Any,
) -> None:
    """Run DATASET through a model and write the outputs: enqueue, work and fetch in one.

    It brings a Redis and a worker of its own, which end with it. Interrupted (Ctrl-C), it keeps what is done and says
    how to go on.

    \b
    Example:
      overnight run reviews.jsonl --model reviews --task choose --prompt 'Review: {{ text }}' \\
          --choices positive,negative -o labels.jsonl
    """
    from cli.errors import JobUnfinished
    from cli.reports import outcome_of
    from cli.serving import work_off

    placement = Placement.take(values)
    with _job(app, dataset, output, trace, resume, values) as (database, submitted):
        again = f"overnight run --resume {submitted.id} -o {shlex.quote(output)}"
        job = work_off(database, app.settings, submitted, placement, resume=again, trace=trace)
        if job.state == "done" or job.num_done:
            _write(database, job, output, file_format)
    if trace is not None and trace.exists():
        say(f"trace in {trace}; open it with https://ui.perfetto.dev or chrome://tracing")
    problem = outcome_of(job)
    if problem:
        raise JobUnfinished(problem)


@contextmanager
def _job(
    app: App, dataset: str | None, output: str, trace: Path | None, resume: int | None, values: dict[str, Any]
) -> "Iterator[tuple[Database, Job]]":
    """The database and the job to run: a new one, or the one to go on with."""
    if (dataset is None) == (resume is None):
        raise click.UsageError("name either a DATASET or, to go on with an interrupted run, --resume JOB")
    if resume is not None:
        with app.job_database(resume) as database:
            job = _resumed(database, resume)
            _check_outputs(app, output, trace, job.origin)
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
    submission = prepare(dataset, options, app.settings)
    with app.open_database() as database:
        job_id = submission.store(database, f"{PRIVATE_QUEUE}{uuid.uuid4().hex[:8]}")
        yield database, get_job(database, job_id)


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


def _write(database: "Database", job: "Job", output: str, file_format: str) -> None:
    from storage.results import stream_outputs

    with open_output(output) as stream:
        count = write_rows(stream_outputs(database, job.id), stream, file_format=file_format, task=job.task)
    say(f"{format_count(count)} rows in {'stdout' if output == '-' else output}")
