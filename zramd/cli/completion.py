"""`zramd completion`: what makes a shell complete the command, and what it completes beside options and files."""

import os
from collections.abc import Callable
from pathlib import Path

import click
from click.shell_completion import CompletionItem, get_completion_class

from zramd.paths import ADMIN_SUFFIX, STATUS_SUFFIX, server_sockets
from zramd.status.client import StatusError, ask, find_disk

SHELLS = ("bash", "zsh", "fish")
PROGRAM, VARIABLE = "zramd", "_ZRAMD_COMPLETE"
SECONDS = 1.0
"""What a shell waits for a server."""

Complete = Callable[[click.Context, click.Parameter, str], list[CompletionItem[str]]]


@click.command()
@click.argument("shell", type=click.Choice(SHELLS), required=False, metavar="[SHELL]")
def completion(shell: str | None) -> None:
    """Print what makes SHELL complete this command: verbs, options, sockets, and the attributes of a running server.

    SHELL is bash, zsh or fish. Default: the one in $SHELL.

    \b
    Example:
      zramd completion bash > /etc/bash_completion.d/zramd
      zramd completion zsh > "${fpath[1]}/_zramd"
      zramd completion fish > ~/.config/fish/completions/zramd.fish
    """
    chosen = shell or Path(os.environ.get("SHELL", "")).name
    if chosen not in SHELLS:
        raise click.UsageError(f"say which shell: {', '.join(SHELLS)}")
    click.echo(script(chosen), nl=False)


def script(shell: str) -> str:
    """Return the text of a shell's completion."""
    from zramd.cli import main

    made = get_completion_class(shell)
    assert made is not None  # noqa: S101 (click has all of SHELLS)
    complete = made(main, {}, PROGRAM, VARIABLE)
    text = complete.source_template % complete.source_vars()
    # After NAME= comes a value, and no blank.
    return text.replace("COMPREPLY+=($value)", 'COMPREPLY+=("$value"); [[ $value == *= ]] && compopt -o nospace')


def complete_sockets(suffix: str) -> Complete:
    """Return what completes a socket: those that there are."""

    def complete(_: click.Context, __: click.Parameter, incomplete: str) -> list[CompletionItem[str]]:
        try:
            found = list(map(str, server_sockets(suffix)))
        except OSError:
            found = []
        files = [CompletionItem(incomplete, type="file")]
        return [CompletionItem(path) for path in found if path.startswith(incomplete)] or files

    return complete


def complete_disks(_: click.Context, __: click.Parameter, incomplete: str) -> list[CompletionItem[str]]:
    """Return the names of the disks that have sockets where they are looked for."""
    try:
        names = sorted({path.stem for path in server_sockets(STATUS_SUFFIX)})
    except OSError:
        names = []
    return [CompletionItem(name) for name in names if name.startswith(incomplete)]


def complete_attributes(context: click.Context, _: click.Parameter, incomplete: str) -> list[CompletionItem[str]]:
    """Return the attributes that a running server has."""
    names = _names(context.params.get("socket"), STATUS_SUFFIX)
    return [CompletionItem(name) for name in names if name.startswith(incomplete)]


def complete_words(context: click.Context, _: click.Parameter, incomplete: str) -> list[CompletionItem[str]]:
    """Return what can be changed in a running server, each as NAME=."""
    lines = _names(context.params.get("socket"), ADMIN_SUFFIX)
    words = [line.removesuffix(" VALUE") + "=" for line in lines if line.endswith(" VALUE")]
    return [CompletionItem(word) for word in words if word.startswith(incomplete)]


def _names(socket: Path | None, suffix: str) -> list[str]:
    try:
        return ask(socket or find_disk(suffix), "help", SECONDS).splitlines()
    except StatusError:
        return []  # a shell has no place for errors
