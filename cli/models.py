"""`overnight models`: what is in the model folder."""

from pathlib import Path
from typing import Any

import click

from cli.context import App
from cli.display import emit_json, emit_table, say, warn
from cli.options import json_option, settings_options


@click.command("models", short_help="List the models in the model folder.")
@json_option
@settings_options
@click.pass_obj
def command(app: App, as_json: bool) -> None:
    """List the models that --model knows by name."""
    from engine.units import format_bytes

    folder = app.settings.models_dir
    models, faults = scan(folder)
    for fault in faults:
        warn(fault)
    if as_json:
        emit_json({"models": models})
        return
    if not models:
        say(f"no models in {folder} yet; begin with: overnight demo, or: overnight import FOLDER")
        return
    cells = [
        (m["name"], m["family"], m["weight_format"], m["dtype"], format_bytes(m["bytes"]), m["path"]) for m in models
    ]
    emit_table(("NAME", "FAMILY", "WEIGHTS", "DTYPE", "SIZE", "PATH"), cells)


def scan(folder: Path) -> tuple[list[dict[str, Any]], list[str]]:
    """The models in a folder by name, and a sentence for each one that cannot be used."""
    from engine.errors import CheckpointError
    from engine.weights.checks import check_units
    from engine.weights.manifest import is_model_dir, read_manifest

    models: list[dict[str, Any]] = []
    faults: list[str] = []
    for path in sorted(folder.iterdir()) if folder.is_dir() else []:
        if not is_model_dir(path):
            continue
        try:
            manifest = read_manifest(path)
            check_units(manifest, path)
        except CheckpointError as error:
            faults.append(str(error))
            continue
        models.append(
            {
                "name": path.name,
                "family": manifest.model_type,
                "weight_format": manifest.weight_format,
                "dtype": manifest.dtype,
                "bytes": manifest.num_bytes,
                "path": str(path),
            }
        )
    return models, faults
