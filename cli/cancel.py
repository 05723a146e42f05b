"""`overnight cancel`: drop what a job has not done yet."""

import time

import click

from cli.context import App
from cli.display import format_count, say
from cli.options import job_argument, settings_options


@click.command("cancel", short_help="Cancel a job; its outputs stay.")
@job_argument
@settings_options
@click.pass_obj
def command(app: App, job_id: int) -> None:
    """Cancel JOB: requests without an output are dropped, outputs stay and can be fetched."""
    from storage.jobs import cancel_job

    with app.job_database(job_id) as database:
        job = cancel_job(database, job_id, now=time.time())
    say(
        f"job {job.id} is cancelled; {format_count(job.num_done)} of {format_count(job.num_requests)} requests have "
        f"outputs (overnight fetch {job.id}); to take it up again: overnight retry {job.id}"
    )
