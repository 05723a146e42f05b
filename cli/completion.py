"""`overnight completion`: a script with which a shell completes commands and options."""

import click
from click.shell_completion import get_completion_class


@click.command("completion", short_help="Print a completion script for the shell.")
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
@click.pass_context
def command(ctx: click.Context, shell: str) -> None:
    """Print a script that completes commands and options.

    \b
    bash: add to ~/.bashrc                    eval "$(overnight completion bash)"
    zsh:  add to ~/.zshrc                     eval "$(overnight completion zsh)"
    fish: in ~/.config/fish/config.fish       overnight completion fish | source
    """
    kind = get_completion_class(shell)
    assert kind is not None
    group = ctx.find_root().command
    completion = kind(group, {}, "overnight", "_OVERNIGHT_COMPLETE")
    click.echo(completion.source_template % completion.source_vars())
