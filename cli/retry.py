"""`overnight retry`: run failed and cancelled requests once more."""

import time

import click

from cli.context import App
from cli.display import counted, say, warn
from cli.options import job_argument, settings_options


@click.command("retry", short_help="Queue failed and cancelled requests again.")
@job_argument
@settings_options
@click.pass_obj
def command(app: App, job_id: int) -> None:
    """Queue the failed and cancelled requests of JOB again; good outputs stay as they are."""
    from cli.workers import missing_worker_hint
    from storage.clock import time_of
    from storage.jobs import retry_job
    from worker.doorbell import ring
    from worker.errors import RedisUnreachable

    with app.job_database(job_id) as database:
        job = retry_job(database, job_id, now=time.time())
        hint = missing_worker_hint(database, job, now=time_of(database))
    remaining = job.num_requests - job.num_done - job.num_failed
    say(f"job {job.id} is {job.state} again with {counted(remaining, 'request')} to do")
    if hint:
        say(hint)
        return
    try:
        ring(app.settings, job.id, queue=job.queue)
    except RedisUnreachable as error:
        warn(f"the worker could not be told and will find the job by itself ({error})")
