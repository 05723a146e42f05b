"""`overnight prune`: delete old jobs, and give back the disk space that they took."""

import re
import time
from typing import TYPE_CHECKING, Any

import click

from cli.context import App
from cli.display import emit_json, format_count, say
from cli.options import ParamType, json_option, settings_options

if TYPE_CHECKING:
    from storage.database import Database
    from storage.prune import Pruned
    from storage.space import Space

_UNITS = {"m": 60.0, "h": 3600.0, "d": 86400.0, "w": 7 * 86400.0}
_SHOWN_JOBS = 20


class Age(ParamType):
    """``30m``, ``12h``, ``7d`` or ``2w``, as seconds."""

    name = "age"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        if isinstance(value, float):
            return value
        match = re.fullmatch(r"(\d{1,6})([mhdw])", str(value).strip())
        if match is None:
            self.fail(f"{value!r} is no age; write for example 30m, 12h, 7d or 2w", param, ctx)
        return int(match[1]) * _UNITS[match[2]]


@click.command("prune", short_help="Drop finished jobs, give the space back.")
@click.option(
    "--older-than",
    type=Age(),
    metavar="AGE",
    default="7d",
    show_default=True,
    help="How long ago a job must have ended: 30m, 12h, 7d or 2w.",
)
@click.option("--dry-run", is_flag=True, help="Say what would go, and change nothing.")
@click.option("--compact", is_flag=True, help="Write the SQLite file anew as a whole; others wait meanwhile.")
@json_option
@settings_options
@click.pass_obj
def command(app: App, older_than: float, dry_run: bool, compact: bool, as_json: bool) -> None:
    """Drop the jobs that are done, failed or cancelled for longer than AGE, with their outputs, passes and workers.

    Workers and other commands go on meanwhile. The room comes back at once, unless an older overnight made the
    database: such a file is written anew where it is small and no worker is alive, or with --compact.
    """
    before = time.time() - older_than
    existing = app.open_for_reading() if dry_run else app.open_existing_database()
    if existing is None:
        if as_json:
            emit_json(_document(None, None, None, before, dry_run))
        else:
            say(f"nothing to prune: {app.database_name} does not exist")
        return
    from storage.prune import look, prune
    from storage.space import space_of

    with existing as database:
        was = space_of(database)
        if dry_run:
            pruned = look(database, before=before)
        else:
            pruned = prune(database, before=before)
            _give_back(database, compact)
        now = space_of(database)
    if as_json:
        emit_json(_document(pruned, was, now, before, dry_run))
        return
    say(("would prune " if dry_run else "pruned ") + _in_words(pruned))
    if was and now and not dry_run:
        say(_about_space(was, now))


def _give_back(database: "Database", compact: bool) -> None:
    from storage.claims import list_workers
    from storage.clock import time_of
    from storage.space import give_back, rewrite, space_of

    space = space_of(database)
    if space is None:
        return
    is_quiet = not list_workers(database, time_of(database))
    if compact or (not space.is_incremental and space.free and space.is_little and is_quiet):
        rewrite(database)
    else:
        give_back(database)


def _in_words(pruned: "Pruned") -> str:
    if not pruned.jobs:
        what = "no jobs"
    else:
        numbers = ", ".join(map(str, pruned.jobs[:_SHOWN_JOBS])) + (", …" if len(pruned.jobs) > _SHOWN_JOBS else "")
        kind = "job" if len(pruned.jobs) == 1 else "jobs"
        what = f"{format_count(len(pruned.jobs))} {kind} ({numbers}) with {format_count(pruned.requests)} requests"
    return f"{what}; {format_count(pruned.passes)} records of passes, {format_count(pruned.workers)} of workers"


def _about_space(was: "Space", now: "Space") -> str:
    from engine.units import format_bytes

    text = f"the database has {format_bytes(now.size)}"
    if now.size < was.size:
        text += f", {format_bytes(was.size - now.size)} less than before"
    if now.free and not now.is_incremental:
        text += (
            f"; {format_bytes(now.free)} in it are free for new jobs; to give them back while nothing else needs the "
            "database: overnight prune --compact"
        )
    return text


def _document(
    pruned: "Pruned | None", was: "Space | None", now: "Space | None", before: float, dry_run: bool
) -> dict[str, Any]:
    space = was and now and {"before": was.size, "after": now.size, "free": now.free}
    return {
        "dry_run": dry_run,
        "before": before,
        "jobs": list(pruned.jobs) if pruned else [],
        "requests": pruned.requests if pruned else 0,
        "passes": pruned.passes if pruned else 0,
        "workers": pruned.workers if pruned else 0,
        "faults": pruned.faults if pruned else 0,
        "bytes": space,
    }
