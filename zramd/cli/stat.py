"""`zramd status`, `stat` and `set`: what a running server says of itself, and what can be changed in it."""

import json
from pathlib import Path

import click

from zramd.cli.options import status_option
from zramd.sizes import format_size
from zramd.status.client import StatusError, ask, find_server


def _ask(socket: Path | None, request: str) -> str:
    try:
        return ask(socket or find_server(), request)
    except StatusError as error:
        raise click.ClickException(str(error)) from error


@click.command()
@click.argument("name")
@status_option
def stat(name: str, socket: Path | None) -> None:
    """Print the attribute NAME of a running server, as the kernel prints it for zram.

    Sizes are in bytes. Names: mm_stat io_stat stat disksize comp_algorithm mem_limit mem_used_max initstate, and json
    for everything at once.

    \b
    Example:
      zramd stat mm_stat
    """
    if name.split() != [name]:
        raise click.UsageError(f"{name!r} is not the name of an attribute; to change one: zramd set NAME=VALUE")
    click.echo(_ask(socket, name), nl=False)


@click.command("set")
@click.argument("assignments", metavar="NAME=VALUE...", nargs=-1, required=True)
@status_option
def set_attributes(assignments: tuple[str, ...], socket: Path | None) -> None:
    """Change attributes of a running server.

    mem_limit takes a size (K, M, G of 1024), 0 for none. mem_used_max takes 0: the peak starts from the current use.

    \b
    Example:
      zramd set mem_limit=512M mem_used_max=0
    """
    for assignment in assignments:
        name, equals, value = assignment.partition("=")
        if not equals or name.split() != [name] or not value.strip() or "\n" in value:
            raise click.UsageError(f"{assignment!r} is not NAME=VALUE")
        _ask(socket, f"{name} {value}")


@click.command()
@status_option
def status(socket: Path | None) -> None:
    """Show a running server in a table for people.

    DATA is what was written and not discarded, COMPR what it is compressed to, TOTAL the memory that takes, and RATIO
    is DATA / TOTAL. Sizes: K, M, G are of 1024.

    \b
    Example:
      zramd status
    """
    facts = json.loads(_ask(socket, "json"))
    memory = facts["mm_stat"]
    stored, total = memory["orig_data_size"], memory["mem_used_total"]
    limit = memory["mem_limit"]
    row = {
        "NAME": facts["name"],
        "ALGORITHM": facts["comp_algorithm"],
        "DISKSIZE": format_size(facts["disksize"]),
        "DATA": format_size(stored),
        "COMPR": format_size(memory["compr_data_size"]),
        "TOTAL": format_size(total),
        "RATIO": f"{stored / total:.2f}" if total else "-",
        "MEM-LIMIT": format_size(limit) if limit else "-",
        "MEM-PEAK": format_size(memory["mem_used_max"]),
        "CLIENTS": str(facts["connections"]),
    }
    widths = {name: max(len(name), len(value)) for name, value in row.items()}
    left = {"NAME", "ALGORITHM"}
    for cells in ({name: name for name in row}, row):
        line = " ".join(
            text.ljust(widths[name]) if name in left else text.rjust(widths[name]) for name, text in cells.items()
        )
        click.echo(line.rstrip())
    for uri in facts["uris"]:
        click.echo(f"{facts['name']} is served at {uri}")
