"""`overnight doctor`: looks at everything a night's work needs, and says how to mend what is not there."""

from dataclasses import asdict

import click

from cli import exit_codes
from cli.context import App
from cli.display import colour_wanted, emit_json
from cli.options import json_option, settings_options

_COLOURS = {"ok": "green", "warn": "yellow", "fail": "red"}


@click.command("doctor", short_help="Check the installation; say how to mend it.")
@json_option
@settings_options
@click.pass_obj
def command(app: App, as_json: bool) -> None:
    """Check Python, settings, database, Redis, device, memory, disk and models.

    Exit code 0: nothing is broken (warnings may be there); 4: the database cannot be used; 1: something else is broken.
    """
    from cli.checks import run_checks

    checks = run_checks(app)
    if as_json:
        emit_json({"checks": [asdict(check) for check in checks]})
    else:
        for check in checks:
            mark = (
                click.style(f"{check.status:<4}", fg=_COLOURS[check.status])
                if colour_wanted()
                else f"{check.status:<4}"
            )
            click.echo(f"{mark}  {check.name:<9} {check.detail}")
            if check.remedy:
                click.echo(f"      {'':<9} → {check.remedy}")
    failed = {check.name for check in checks if check.status == "fail"}
    if "database" in failed:
        raise click.exceptions.Exit(exit_codes.UNREACHABLE)
    if failed:
        raise click.exceptions.Exit(exit_codes.FAILED)
