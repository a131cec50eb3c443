"""`zramd status`: the disks that are served, in the table of zramctl, and what the numbers mean."""

import json
import shutil
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click

from zramd.attach.nodes import nodes
from zramd.cli.colour import paint
from zramd.cli.columns import COLUMNS, DEFAULT, Column, Kind, Shown, describe_columns, parse_columns
from zramd.cli.completion import complete_disks, complete_sockets
from zramd.cli.meaning import meaning, swap_lines
from zramd.cli.options import Parsed
from zramd.cli.table import table
from zramd.paths import STATUS_SUFFIX
from zramd.status.client import NoServerError, StatusError, ask, find_disks

NOT_RUNNING = 3
"""The exit status, as that of `systemctl status`."""
INDENT = 3
"""Of JSON, as util-linux has it."""
HELP = f"""\
Show the disks that are served, or those called NAME (zram0, or the block device such as /dev/nbd0).

The table is that of zramctl. Sizes: K, M, G are of 1024. Below it stand where the disks are served, what protects those
that are for swap, and on a terminal what the numbers mean; not so if an option says what to print. The exit status is 3
if no server runs.

The columns, up to MOUNTPOINT those of zramctl:

\b
{describe_columns()}

\b
Example:
  zramd status
  zramd status -o +COMP-RATIO,HUGE-PAGES,P99
  zramd status --json --output-all | jq '.zramdevices[] | .name, .total'
"""


class NotRunningError(click.ClickException):
    """No server runs."""

    exit_code = NOT_RUNNING


@click.command(help=HELP)
@click.argument("names", nargs=-1, metavar="[NAME]...", shell_complete=complete_disks)
@click.option("-b", "--bytes", "exact", is_flag=True, help="Sizes in bytes, and times in nanoseconds.")
@click.option("-n", "--noheadings", is_flag=True, help="No headings.")
@click.option(
    "-o",
    "--output",
    "columns",
    type=Parsed("list", parse_columns),
    metavar="LIST",
    help="Columns, separated by commas; +LIST for those in addition to the usual ones.",
)
@click.option("--output-all", is_flag=True, help="All columns.")
@click.option("--raw", is_flag=True, help="Cells with one blank between them; a blank in a cell is \\x20.")
@click.option("--json", "as_json", is_flag=True, help="The columns as JSON: bytes, nanoseconds, null for nothing.")
@click.option(
    "--status",
    "socket",
    type=click.Path(path_type=Path, readable=False),
    shell_complete=complete_sockets(STATUS_SUFFIX),
    help="Status socket of a disk. Default: those of all disks that are served.",
)
def status(
    names: tuple[str, ...],
    exact: bool,
    noheadings: bool,
    columns: list[Column] | None,
    output_all: bool,
    raw: bool,
    as_json: bool,
    socket: Path | None,
) -> None:
    """Print the table."""
    if output_all and columns:
        raise click.UsageError("--output and --output-all exclude each other")
    if raw and as_json:
        raise click.UsageError("--raw and --json exclude each other")
    disks, errors = _look(socket, names)
    chosen = list(COLUMNS.values()) if output_all else columns or [COLUMNS[name] for name in DEFAULT]
    if as_json:
        rows = [{column.name.lower(): column.value(disk) for column in chosen} for disk in disks]
        click.echo(json.dumps({"zramdevices": rows}, indent=INDENT, ensure_ascii=False))
    elif disks:
        for number, line in enumerate(_lines(disks, chosen, exact=exact, headings=not noheadings, raw=raw)):
            click.echo(paint(line, bold=True) if number == 0 and not (noheadings or raw) else line)
        if not (raw or noheadings or output_all or columns):
            _explain(disks)
    if errors:
        raise click.ClickException("; ".join(errors))


def _look(socket: Path | None, names: tuple[str, ...]) -> tuple[list[Shown], list[str]]:
    """Return the disks that are called so, or all, and what is wrong with others."""
    disks, errors = [], []
    try:
        for path in [socket] if socket else find_disks():
            try:
                facts: dict[str, Any] = json.loads(ask(path, "json"))
                disks.append(Shown(facts, nodes(facts["uuid"], facts["uris"])))
            except NoServerError:
                if socket:
                    raise
                # It has ended since it was found.
            except StatusError as error:
                errors.append(str(error))
    except NoServerError as error:
        raise NotRunningError(str(error)) from error
    except StatusError as error:
        raise click.ClickException(str(error)) from error
    if not names:
        return disks, errors
    called = {id(disk): {disk.facts["name"], *(node.path for node in disk.nodes)} for disk in disks}
    known = set().union(*called.values())
    errors += [
        f"no disk {name!r} is served; there are: {' '.join(sorted(known))}" for name in names if name not in known
    ]
    return [disk for disk in disks if called[id(disk)] & set(names)], errors


def _lines(disks: list[Shown], columns: list[Column], *, exact: bool, headings: bool, raw: bool) -> Iterator[str]:
    rows = [[_printable(column.text(column.value(disk), exact=exact), raw) for column in columns] for disk in disks]
    if headings:
        rows.insert(0, [column.name for column in columns])
    if raw:
        return map(" ".join, rows)
    return table(rows, [number for number, column in enumerate(columns) if column.kind is Kind.TEXT], " ")


def _printable(text: str, raw: bool) -> str:
    """Return a cell that stays one: a directory may have any name."""
    return "".join(
        char
        if char.isprintable() and not (raw and char == " ")
        else "".join(f"\\x{byte:02x}" for byte in char.encode())
        for char in text
    )


def _explain(disks: list[Shown]) -> None:
    if sys.stdout.isatty():
        width = shutil.get_terminal_size().columns
        for disk in disks:
            click.echo()
            for text, warns in meaning(disk):
                for line in textwrap.wrap(_printable(text, False), width, break_on_hyphens=False):
                    click.echo(paint(line, colour="yellow" if warns else None))
        click.echo()
    for disk in disks:
        for uri in disk.facts["uris"]:
            click.echo(f"{disk.facts['name']} is served at {uri}")
        for line, warns in swap_lines(disk.facts):
            click.echo(paint(line, colour="yellow" if warns else None))
