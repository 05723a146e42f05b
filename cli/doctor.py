"""`overnight doctor`: looks at everything a night's work needs, and says how to mend what is not there."""

from dataclasses import asdict

import click

from cli import exit_codes
from cli.context import App
from cli.display import colour_wanted, emit_json, printable, say
from cli.options import DeviceName, json_option, settings_options

_COLOURS = {"ok": "green", "warn": "yellow", "fail": "red"}


@click.command("doctor", short_help="Check the installation, or measure the machine.")
@click.option("--measure", "measures", is_flag=True, help="Measure the machine for the planner; takes a minute or two.")
@click.option("--device", type=DeviceName(), help="With --measure: cpu or cuda:0. Default: the first GPU, else cpu.")
@json_option
@settings_options
@click.pass_obj
def command(app: App, measures: bool, device: str | None, as_json: bool) -> None:
    """Check Python, settings, database, Redis, device, memory, disk and models.

    With --measure, time products, attention, disk and links first, and keep the figures for `overnight plan` and the
    worker.

    Exit code 0: nothing is broken (warnings may be there); 4: the database cannot be used; 1: something else is broken.
    """
    from cli.checks import run_checks

    if measures:
        _measure(app, device)
    elif device is not None:
        raise click.UsageError("--device is for --measure")
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
            click.echo(f"{mark}  {check.name:<9} {printable(check.detail)}")
            if check.remedy:
                click.echo(f"      {'':<9} → {printable(check.remedy)}")
    failed = {check.name for check in checks if check.status == "fail"}
    if "database" in failed:
        raise click.exceptions.Exit(exit_codes.UNREACHABLE)
    if failed:
        raise click.exceptions.Exit(exit_codes.FAILED)


def _measure(app: App, device_name: str | None) -> None:
    from cli.errors import OutputNotWritten
    from engine.process import tune

    tune()
    from engine.devices.open import open_device
    from engine.measure import measure
    from engine.profile import store_profile

    device = open_device(device_name)
    try:
        hardware = measure(device, app.settings.spill_dir, say=lambda what: say(f"measuring {what} …"))
        path = store_profile(app.settings.home, hardware)
    except OSError as error:
        where = error.filename or app.settings.home
        raise OutputNotWritten(f"nothing can be written to {where}: {error.strerror or error}") from error
    finally:
        device.close()
    say(f"measured; the profile is in {path}")
