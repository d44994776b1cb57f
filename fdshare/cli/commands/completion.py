"""completion: the script with which a shell completes commands, options and names."""

from __future__ import annotations

import click
from click.shell_completion import get_completion_class

__all__ = ["completion"]


@click.command(
    short_help="Print the completion for a shell.",
    help="""Print the completion for a shell: commands, options, and the names that are registered.

    \b
    Examples:
      fdshare completion bash > ~/.local/share/bash-completion/completions/fdshare
      fdshare completion zsh > "${fpath[1]}/_fdshare"
      fdshare completion fish > ~/.config/fish/completions/fdshare.fish
    """,
)
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
def completion(shell: str) -> None:
    found = get_completion_class(shell)
    assert found is not None
    commands = click.get_current_context().find_root().command
    click.echo(found(commands, {}, "fdshare", "_FDSHARE_COMPLETE").source())
