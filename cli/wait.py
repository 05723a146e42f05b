"""`overnight wait`: returns when the job has ended; the exit code is its outcome."""

import click

from cli.context import App
from cli.display import say
from cli.options import job_argument, settings_options


@click.command("wait", short_help="Wait for a job; the exit code is its outcome.")
@job_argument
@settings_options
@click.pass_obj
def command(app: App, job_id: int) -> None:
    """Wait until JOB has ended. Exit code 0: every request has its output; 1: the job failed, was cancelled or has
    failed requests.

    \b
    Example: overnight wait 7 && overnight fetch 7 -o out.jsonl
    """
    from cli.errors import JobUnfinished
    from cli.progress import follow
    from cli.reports import outcome_of

    with app.job_database(job_id, only_look=True) as database:
        hint: str | None = None
        for snapshot in follow(database, job_id):
            if snapshot.attendance.hint not in (None, hint):
                say(snapshot.attendance.hint)
            hint = snapshot.attendance.hint
    job = snapshot.job
    problem = outcome_of(job)
    if problem:
        raise JobUnfinished(problem)
    say(f"job {job.id} is done; its outputs: overnight fetch {job.id}")
