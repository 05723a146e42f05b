"""`overnight enqueue`: a dataset becomes a job."""

import time
from typing import Any

import click

from cli.context import App
from cli.display import counted, emit_json, say, warn
from cli.job_options import JobOptions, job_options
from cli.options import PathName, json_option, queue_option, settings_options

_PING_AGAIN_S = 5.0
"""A load that took longer asks Redis once more before it commits."""


@click.command("enqueue", short_help="Put a dataset in the queue as one job.")
@click.argument("dataset", metavar="DATASET", type=PathName())
@job_options()
@queue_option("Which workers take the job")
@json_option
@settings_options
@click.pass_obj
def command(app: App, /, dataset: str, as_json: bool, **values: Any) -> None:
    """Put DATASET (JSON lines, CSV by its suffix, or - for stdin) in the queue as one job; print the job's id.

    \b
    Examples:
      overnight enqueue reviews.jsonl --model reviews --task choose \\
          --prompt 'Review: {{ text }}' --choices positive,negative
      overnight enqueue prompts.jsonl --model opt-1.3b --task generate --max-new-tokens 100
    """
    from cli.submission import prepare
    from storage.jobs import get_job
    from worker.doorbell import ring
    from worker.errors import RedisUnreachable

    options = JobOptions.take(values)
    for sentence in options.warnings():
        warn(sentence)
    settings = app.settings
    submission = prepare(dataset, options, settings)
    for sentence in submission.warnings():
        warn(sentence)
    _ping(settings.redis_url)
    pinged = time.monotonic()

    def still_there() -> None:
        if time.monotonic() - pinged > _PING_AGAIN_S:
            _ping(settings.redis_url)

    with app.open_database() as database:
        job_id = submission.store(database, settings.queue, before_commit=still_there)
        job = get_job(database, job_id)
    try:
        ring(settings, job_id)
    except RedisUnreachable as error:
        warn(f"job {job_id} is stored, but its worker could not be told and will find it by itself ({error})")
    if as_json:
        emit_json({"id": job.id, "requests": job.num_requests})
        return
    click.echo(job.id)
    say(f"{counted(job.num_requests, 'request')} in job {job.id}; watch it: overnight status {job.id} --watch")
    if job.num_failed:
        say(f"faulty already: {counted(job.num_failed, 'row')}; see overnight fetch {job.id} --errors")


def _ping(redis_url: str) -> None:
    """Ask Redis for a sign of life.

    Raises:
        RedisUnreachable: no answer; the sentence ends with the command that starts one, if that is so easy.
    """
    from worker.doorbell import ping
    from worker.errors import RedisRefused, RedisUnreachable
    from worker.redis_hint import start_command

    try:
        ping(redis_url)
    except RedisRefused:
        raise
    except RedisUnreachable as error:
        command = start_command(redis_url)
        raise (RedisUnreachable(f"{error}; to start one here: {command}") if command else error) from error
