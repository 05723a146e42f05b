"""PLACEMENT on the command line: an option for each flag of ``PlanOptions``, and the way back to such words."""

from pathlib import Path
from typing import Any

import click

from cli.options import Command, DeviceName, Number, ParamType, SharesType, Size
from engine.planner.plan import FLAGS, Flag, PlanOptions, flag_name


def placement_options(command: Command, *, least_device_memory: int = 1) -> Command:
    """PLACEMENT: where weights, KV cache and activations live; ``take_placement`` takes the values."""
    for name, flag in reversed(FLAGS.items()):
        kind = Size(minimum=least_device_memory) if name == "device_memory" else _type_of(flag)
        metavar = "FOLDER" if flag.kind == "folder" else None
        command = click.option(flag_name(name), type=kind, metavar=metavar, help=flag.help)(command)
    return command


def take_placement(options: dict[str, Any]) -> PlanOptions:
    """Moves the placement's values out of a command's keyword arguments."""
    return PlanOptions(**{name: options.pop(name) for name in FLAGS})


def placement_arguments(placement: PlanOptions) -> list[str]:
    """What was asked for, as words for another command line; the folder absolute."""
    words: list[str] = []
    for name in FLAGS:
        value = getattr(placement, name)
        if value is not None:
            words += [flag_name(name), str(value.absolute() if isinstance(value, Path) else value)]
    return words


def _type_of(flag: Flag) -> ParamType:
    match flag.kind:
        case "device":
            return DeviceName()
        case "choice":
            return click.Choice([str(choice) for choice in flag.choices])
        case "size":
            return Size()
        case "folder":
            return click.Path(file_okay=False, path_type=Path)
        case "shares":
            return SharesType()
        case "count":
            return Number(minimum=1, maximum=2**31 - 1, whole=True)
