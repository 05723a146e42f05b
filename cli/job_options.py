"""What a person asks of a job: the options that `enqueue` and `run` share, checked before anything is read."""

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any, Self

import click

from cli import templates
from cli.options import Command, Number, ParamType, Text
from cli.tasks import split_choices
from worker.payloads import TASKS

GENERATION_DEFAULTS: dict[str, Any] = {
    "max_new_tokens": 64,
    "temperature": 0.0,
    "top_p": 1.0,
    "top_k": 0,
    "stop": (),
}
"""Options that only `generate` heeds, with their defaults. A test compares them with the engine's own."""


class Choices(ParamType):
    """``positive,negative`` as a tuple."""

    name = "a,b,…"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[str, ...]:
        if isinstance(value, tuple):
            return value
        try:
            return split_choices(Text().convert(value, param, ctx))
        except ValueError as error:
            self.fail(str(error), param, ctx)


def _no_empty_stop(ctx: click.Context, param: click.Parameter, value: tuple[str, ...]) -> tuple[str, ...]:
    if not all(value):
        raise click.BadParameter("a stop string must not be empty", ctx, param)
    return value


_LONGEST_NAME = 80
"""Characters: `status` shows names in a table, whose cells it never shortens."""


def _no_blank_name(ctx: click.Context, param: click.Parameter, value: str | None) -> str | None:
    if value is not None and (not value.strip() or not value.isprintable() or len(value) > _LONGEST_NAME):
        raise click.BadParameter(f"a name is one line of at most {_LONGEST_NAME} characters", ctx, param)
    return value


_OPTIONS: tuple[Callable[[Command], Command], ...] = (
    click.option("--model", required=True, type=Text(), help="A name from `overnight models`, or a folder."),
    click.option("--task", required=True, type=click.Choice(TASKS), help="What to do with each row."),
    click.option(
        "--prompt",
        default=templates.DEFAULT,
        show_default=True,
        type=Text(),
        metavar="TEMPLATE|@FILE",
        help="Jinja2 template over a row's fields.",
    ),
    click.option("--choices", type=Choices(), help="The labels of `choose`, split at commas. Default: each row's own."),
    click.option(
        "--max-new-tokens",
        type=Number(minimum=1, maximum=2**31 - 1, whole=True),
        help="Tokens to generate, at most. [default: 64]",
    ),
    click.option("--temperature", type=Number(minimum=0), help="0 takes the likeliest token. [default: 0]"),
    click.option(
        "--top-p",
        type=Number(minimum=0, above=True, maximum=1),
        help="Sample among the likeliest tokens whose probabilities add up to this. [default: 1]",
    ),
    click.option(
        "--top-k",
        type=Number(minimum=0, maximum=2**31 - 1, whole=True),
        help="Sample among this many of the likeliest tokens; 0: all. [default: 0]",
    ),
    click.option(
        "--seed",
        type=Number(minimum=0, maximum=2**63 - 1, whole=True),
        help="The same seed gives the same text. [default: 0]",
    ),
    click.option(
        "--stop",
        type=Text(),
        multiple=True,
        callback=_no_empty_stop,
        help="Text that ends an output; may be given several times.",
    ),
    click.option(
        "--name", type=Text(), callback=_no_blank_name, help="A name of your own for the job; `status` shows it."
    ),
    click.option(
        "--priority",
        default=0,
        show_default=True,
        type=Number(minimum=-(2**31), maximum=2**31 - 1, whole=True),
        help="Jobs with a higher one go first.",
    ),
    click.option(
        "--exact",
        is_flag=True,
        help="Only for workers that round nothing: neither weights nor KV cache in four bits.",
    ),
    click.option(
        "--keep-going",
        is_flag=True,
        help="Store lines that cannot be read as error rows, instead of refusing the dataset.",
    ),
)


def job_options(*, required: bool = True) -> Callable[[Command], Command]:
    """The options of a job. ``required=False``: without --model and --task too, for `run --resume`."""

    def decorate(command: Command) -> Command:
        for option in reversed(_OPTIONS):
            command = option(command)
        if not required:
            for parameter in getattr(command, "__click_params__", []):
                parameter.required = False
        return command

    return decorate


@dataclass(frozen=True, slots=True, kw_only=True)
class JobOptions:
    """The values of these options; None: not given."""

    model: str
    task: str
    prompt: str = templates.DEFAULT
    choices: tuple[str, ...] | None = None
    max_new_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    seed: int | None = None
    stop: tuple[str, ...] = ()
    name: str | None = None
    priority: int = 0
    keep_going: bool = False
    exact: bool = False

    @classmethod
    def take(cls, options: dict[str, Any]) -> Self:
        """Moves the job's values out of a command's keyword arguments."""
        return cls(**{field.name: options.pop(field.name) for field in fields(cls)})

    def params(self) -> dict[str, Any]:
        """What the worker needs to make requests; the names are those of the engine's sampling parameters."""
        if self.task != "generate":
            return {}
        given = {name: getattr(self, name) for name in GENERATION_DEFAULTS}
        values = {name: GENERATION_DEFAULTS[name] if value is None else value for name, value in given.items()}
        return {**values, "stop": list(values["stop"]), "ignore_eos": False}

    def warnings(self) -> list[str]:
        """A sentence for each option that was given but has no effect."""
        unheard: list[tuple[str, str]] = []
        if self.task != "generate":
            names = [name for name in (*GENERATION_DEFAULTS, "seed") if getattr(self, name) not in (None, ())]
            unheard += [(name, f"with --task {self.task}") for name in names]
        elif not self.temperature:
            names = [name for name in ("top_p", "top_k", "seed") if getattr(self, name) is not None]
            unheard += [(name, "while --temperature is 0: the likeliest token is taken") for name in names]
        if self.task != "choose" and self.choices:
            unheard.append(("choices", f"with --task {self.task}"))
        return [f"--{name.replace('_', '-')} has no effect {why}" for name, why in unheard]
