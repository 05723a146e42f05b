"""The command group: subcommands are imported when they are named, and every error leaves through one door.

`overnight status` must answer at once, so nothing here imports more than click.
"""

import errno
import importlib
import os
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

import click

from cli import __version__, exit_codes
from cli.context import App
from cli.display import say
from cli.garbage import collect_seldom
from cli.options import settings_options

COMMANDS = {
    "import": "cli.import_",
    "models": "cli.models",
    "plan": "cli.plan",
    "worker": "cli.worker",
    "enqueue": "cli.enqueue",
    "status": "cli.status",
    "wait": "cli.wait",
    "fetch": "cli.fetch",
    "cancel": "cli.cancel",
    "retry": "cli.retry",
    "prune": "cli.prune",
    "run": "cli.run",
    "demo": "cli.demo",
    "doctor": "cli.doctor",
    "completion": "cli.completion",
}
"""Each command's module; its click command is the module's `command`. In the order of `--help`."""


class CommandGroup(click.Group):
    """Loads a command's module when it is asked for; turns errors into one sentence and an exit code."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        module = COMMANDS.get(cmd_name)
        if module is None:
            return None
        command = importlib.import_module(module).command
        assert isinstance(command, click.Command)
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        name = args[0]
        if name not in COMMANDS and not name.startswith("-") and not ctx.resilient_parsing:
            import difflib

            near = difflib.get_close_matches(name, COMMANDS, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"the commands are {', '.join(COMMANDS)}"
            raise click.UsageError(f"there is no command {name!r}; {hint}", ctx=ctx)
        return super().resolve_command(ctx, args)

    def invoke(self, ctx: click.Context) -> Any:
        try:
            result = super().invoke(ctx)
            sys.stdout.flush()
        except BrokenPipeError:
            _close_stdout_quietly()
            raise click.exceptions.Exit(exit_codes.OK) from None
        return result

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """How a process begins; within one, as in tests, `main` is called."""
        collect_seldom()
        return super().__call__(*args, **kwargs)

    def main(
        self,
        args: Sequence[str] | None = None,
        prog_name: str | None = None,
        complete_var: str | None = None,
        standalone_mode: bool = True,
        windows_expand_args: bool = True,
        **extra: Any,
    ) -> NoReturn:
        """Runs the command line and exits; a fault of ours leaves as its traceback."""
        if sys.stdout is None:  # closed by the shell (`>&-`): nobody wants to read it
            _close_stdout_quietly()
        try:
            code = super().main(args, prog_name or "overnight", complete_var, standalone_mode=False, **extra)
        except (click.exceptions.Abort, KeyboardInterrupt):
            _print_error("interrupted")
            sys.exit(exit_codes.INTERRUPTED)
        except click.UsageError as error:
            hint = f"; see: {error.ctx.command_path} --help" if error.ctx else ""
            _print_error(f"{_sentence(error)}{hint}")
            sys.exit(exit_codes.USAGE)
        except click.ClickException as error:
            _print_error(_sentence(error))
            sys.exit(exit_codes.USAGE)
        except Exception as error:
            known = exit_codes.exit_code_of(error)
            if known is None and (refusal := _refusal(error)):
                _print_error(refusal)
                is_misnamed = getattr(error, "errno", None) in (errno.ENAMETOOLONG, errno.ENOTDIR)
                sys.exit(exit_codes.USAGE if is_misnamed else exit_codes.FAILED)
            if known is None:
                raise
            _print_error(str(error))
            sys.exit(known)
        sys.exit(code if isinstance(code, int) else exit_codes.OK)


def _refusal(error: Exception) -> str | None:
    """A sentence where the file system refused a path or has no room: nothing that a traceback would explain."""
    refusals = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT, errno.ENOTDIR, errno.ENAMETOOLONG)
    if not isinstance(error, OSError) or error.errno not in refusals:
        return None
    # Only what is written to a stream that was open already has no name: of ours, that is stdout.
    return f"{error.filename or 'stdout'} cannot be used: {error.strerror}; mend that, or choose another place"


def _sentence(error: click.ClickException) -> str:
    """click's message, in the form of ours: no capital, no full stop."""
    text = " ".join(error.format_message().split()).removesuffix(".")
    first = text.partition(" ")[0]
    # A capital of click's own sentences: a file may be called README.md.
    return text[:1].lower() + text[1:] if first.istitle() and first.isalpha() else text


def _print_error(text: str) -> None:
    say(f"error: {text}")


def _close_stdout_quietly() -> None:
    """Nobody reads our output (``| head`` has left); without this, Python complains once more at its end."""
    sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: PTH123, SIM115


@click.group(
    cls=CommandGroup,
    invoke_without_command=True,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
    epilog="First time here? Type: overnight demo",
)
@click.version_option(__version__, "-V", "--version", prog_name="overnight", message="%(prog)s %(version)s")
@settings_options
@click.pass_context
def main(ctx: click.Context) -> None:
    """Offline LLM batch inference for one GPU machine.

    Put a dataset in the queue, let a worker run it through a language model over GPU, CPU and disk memory, and fetch
    the outputs in the morning.
    """
    ctx.ensure_object(App)
    if ctx.invoked_subcommand is None:
        click.echo(ctx.get_help())
