"""`overnight fetch`: the outputs of a job, in the order of its rows."""

from pathlib import Path

import click

from cli.atomic import check_output, open_output
from cli.context import App
from cli.display import counted, format_count, say
from cli.formats import FORMATS, format_of, write_rows
from cli.options import PathName, job_argument, settings_options


@click.command("fetch", short_help="Write the outputs of a job.")
@job_argument
@click.option(
    "-o", "--output", default="-", type=PathName(), metavar="FILE|-", help="Where to; - is stdout.  [default: -]"
)
@click.option(
    "--format", "file_format", type=click.Choice(FORMATS), help="Default: by the end of FILE's name, else jsonl."
)
@click.option("--errors", is_flag=True, help="Only the rows that failed.")
@settings_options
@click.pass_obj
def command(app: App, job_id: int, output: str, file_format: str | None, errors: bool) -> None:
    """Write the outputs of JOB, one row each, in the order of the dataset.

    A file is replaced whole, when all rows are there; the dataset itself is never replaced. Of an unfinished job, the
    outputs that are there are written. Exit code 0 says that they were written, also when some of them are error rows.
    """
    from storage.jobs import get_job
    from storage.results import stream_outputs

    file_format = format_of(output, file_format)
    with app.job_database(job_id, only_look=True) as database:
        job = get_job(database, job_id)
        check_output(output, keep=app.files_to_keep(job.origin))
        with open_output(output) as stream:
            rows = stream_outputs(database, job_id, errors_only=errors)
            count = write_rows(
                rows,
                stream,
                file_format=file_format,
                task=job.task,
                choices=(job.origin or {}).get("choices"),
            )
    if not job.is_finished and (errors or count < job.num_requests):
        say(
            f"job {job.id} is still {job.state}: these are {format_count(count)} of {format_count(job.num_requests)} "
            f"rows; for all of them: overnight wait {job.id}, then fetch again"
        )
    elif not count:
        nothing = "of its rows failed" if errors else "of its rows has an output"
        say(f"job {job.id} is {job.state}: none {nothing}")
    elif output != "-":
        say(f"{counted(count, 'row')} in {Path(output)}")
