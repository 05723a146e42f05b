"""`overnight worker`: takes jobs from a queue until it is told to stop."""

import os
from pathlib import Path
from typing import Any

import click

from cli.context import App
from cli.garbage import collect_as_usual
from cli.options import Text, queue_option, settings_options
from cli.placement import placement_options, take_placement
from cli.workers import ALONE_VARIABLE, TRACE_VARIABLE


@click.command("worker", short_help="Work on the jobs of a queue.")
@click.option("--model", type=Text(), help="Load this model at the start. Default: the one that the queue needs first.")
@queue_option("Which jobs to take")
@placement_options
@settings_options
@click.pass_obj
def command(app: App, /, model: str | None, **values: Any) -> None:
    """Work on the jobs of a queue until Ctrl-C; then finish the pass, and give back what is not done.

    \b
    Examples:
      overnight worker
      overnight worker --model opt-30b --device-memory 14GiB --host-memory 60GiB --disk-space 200GiB
    """
    from worker.daemon import WorkerOptions, run_worker
    from worker.scratch import sweep

    sweep()
    trace = os.environ.get(TRACE_VARIABLE)
    options = WorkerOptions(
        model=model,
        placement=take_placement(values),
        trace=Path(trace) if trace else None,
        is_alone=bool(os.environ.get(ALONE_VARIABLE)),
    )
    collect_as_usual()
    code = run_worker(app.settings, options)
    raise click.exceptions.Exit(code)
