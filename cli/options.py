"""Option types and decorators that several commands share. Every refusal is a sentence naming the option."""

import math
import re
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

import click

from cli.context import App

if TYPE_CHECKING:
    from engine.tiers import Shares

    ParamType = click.ParamType[Any]
else:  # click 8.1 has no type argument
    ParamType = click.ParamType

Command = TypeVar("Command", bound=Callable[..., Any])


class Number(ParamType):
    """A finite number within bounds; click's own ranges let NaN through."""

    def __init__(self, *, minimum: float, maximum: float = math.inf, above: bool = False, whole: bool = False) -> None:
        self.minimum = minimum
        self.maximum = maximum
        self.above = above
        """The minimum itself is not allowed."""
        self.whole = whole
        self.name = "integer" if whole else "number"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float | int:
        try:
            number: float | int = int(value) if self.whole else float(value)
        except ValueError:
            self.fail(f"{value!r} is not {self._wanted()}", param, ctx)
        too_small = number <= self.minimum if self.above else number < self.minimum
        # A whole number is never compared as a float: one of 400 digits has none.
        if (isinstance(number, float) and not math.isfinite(number)) or too_small or number > self.maximum:
            self.fail(f"{value} is not {self._wanted()}", param, ctx)
        return number

    def _wanted(self) -> str:
        kind = "a whole number" if self.whole else "a number"
        low = f"above {self.minimum}" if self.above else f"of at least {self.minimum}"
        return f"{kind} {low}" + (f" and at most {self.maximum}" if self.maximum != math.inf else "")


_LARGEST = 2**60
"""Bytes of a size: figures are computed in floating point, which has fewer digits than a person can type."""


class Size(ParamType):
    """``4GiB``, ``500MB`` or plain bytes, as bytes."""

    name = "size"

    def __init__(self, *, minimum: int = 0, too_small: str = "is no room at all") -> None:
        self.minimum = minimum
        self.too_small = too_small

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        if isinstance(value, int):
            return value
        from engine.units import parse_bytes

        try:
            num_bytes = parse_bytes(value)
        except ValueError as error:
            self.fail(str(error), param, ctx)
        if num_bytes < self.minimum:
            self.fail(f"{value!r} {self.too_small}; leave the option out for the default", param, ctx)
        if num_bytes > _LARGEST:
            self.fail(f"{value!r} is more than any machine has; write for example 4GiB", param, ctx)
        return num_bytes


class SharesType(ParamType):
    """``20/80/0``: percent on device, host and disk."""

    name = "device/host/disk"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> "Shares":
        from engine.tiers import Shares

        try:
            return Shares.parse(value)
        except ValueError as error:
            self.fail(str(error), param, ctx)


class DeviceName(ParamType):
    """``cpu``, ``cuda``, ``cuda:N`` or ``simulated``; whether it exists is known only to the worker."""

    name = "device"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        if not re.fullmatch(r"cpu|cuda(:\d+)?|simulated", value):
            self.fail(f"{value!r} is no device; write cpu or, for a GPU, cuda:0", param, ctx)
        return str(value)


class Text(ParamType):
    """Text that can be written as UTF-8; a shell may pass bytes that are not UTF-8."""

    name = "text"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        try:
            str(value).encode()
        except UnicodeEncodeError:
            self.fail("the text is not valid UTF-8", param, ctx)
        return str(value)


class PathName(Text):
    """The name of a file or folder: never empty, which would mean the folder that one is in."""

    name = "path"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        if not value:
            self.fail("'' names nothing; give the path of a file or folder", param, ctx)
        return super().convert(value, param, ctx)


def _remember(ctx: click.Context, param: click.Parameter, value: object) -> None:
    """Keeps a settings flag for `App.settings`; the one nearest to the command's end wins."""
    if value is not None and param.name is not None:
        ctx.ensure_object(App).flags[param.name] = value


def settings_options(command: Command) -> Command:
    """``--database`` and ``--redis``, accepted before and after the command's name."""
    redis = click.option(
        "--redis",
        metavar="URL",
        type=Text(),
        expose_value=False,
        callback=_remember,
        help="URL of the Redis that wakes workers: redis://… or unix://… (OVERNIGHT_REDIS).",
    )
    database = click.option(
        "--database",
        metavar="URL|FILE",
        type=Text(),
        expose_value=False,
        callback=_remember,
        help="The database: an SQLAlchemy URL or a file (OVERNIGHT_DATABASE).",
    )
    return database(redis(command))


def queue_option(help_text: str) -> Callable[[Command], Command]:
    """``--queue``, a setting like the others."""
    return click.option(
        "--queue",
        metavar="NAME",
        type=Text(),
        expose_value=False,
        callback=_remember,
        help=f"{help_text} (OVERNIGHT_QUEUE). [default: default]",
    )


def json_option(command: Command) -> Command:
    """``--json``: one document on stdout for machines."""
    return click.option("--json", "as_json", is_flag=True, help="One JSON document on stdout, for machines.")(command)


def job_argument(command: Command) -> Command:
    """JOB: the id that `overnight enqueue` printed."""
    return click.argument("job_id", metavar="JOB", type=Number(minimum=1, maximum=2**63 - 1, whole=True))(command)
