"""`zramd status` and `stat`: what a running server says of itself."""

import json
import sys
from pathlib import Path
from typing import Any

import click

from zramd.cli.completion import complete_attributes
from zramd.cli.options import admin_option, status_option
from zramd.layout import PAGE_SIZE
from zramd.paths import ADMIN_SUFFIX, STATUS_SUFFIX
from zramd.sizes import format_size
from zramd.status.client import SECONDS, StatusError, ask, find_disk, find_disks, stream


def request(socket: Path, line: str, seconds: float | None = SECONDS) -> str:
    """Ask a server, and end the command with one line if it refuses."""
    try:
        return ask(socket, line, seconds)
    except StatusError as error:
        raise click.ClickException(str(error)) from error


def disk_socket(given: Path | None, suffix: str) -> Path:
    """Return the socket that was named, or that of the one disk that is served."""
    try:
        return given or find_disk(suffix)
    except StatusError as error:
        raise click.ClickException(str(error)) from error


@click.command()
@click.argument("name", shell_complete=complete_attributes)
@click.option("--human", is_flag=True, help="For `classes`: only what is in use, with bars for occupancy.")
@status_option
def stat(name: str, human: bool, socket: Path | None) -> None:
    """Print the attribute NAME of a running server, as the kernel prints it for zram.

    Sizes are in bytes. Names: mm_stat io_stat debug_stat stat disksize comp_algorithm mem_limit mem_used_max initstate,
    classes for the pool's size classes (zsmalloc's file in debugfs), codecs for the libraries in use, and json for
    everything at once.

    \b
    Example:
      zramd stat mm_stat
      zramd stat classes --human
    """
    if name.split() != [name]:
        raise click.UsageError(f"{name!r} is not the name of an attribute; to change one: zramd set NAME=VALUE")
    if human and name != "classes":
        raise click.UsageError("--human is for `classes`; for a table of the rest: zramd status")
    text = request(disk_socket(socket, STATUS_SUFFIX), name)
    click.echo(_show_classes(text) if human else text, nl=False)


BAR = 30
"""Characters of a bar."""


def _show_classes(text: str) -> str:
    """Return the classes that are in use, from the text of zsmalloc's file: 18 columns."""
    lines = [f"{'SIZE':>5} {'CHAIN':>5} {'OBJECTS':>9} {'USED':>9} {'MEMORY':>8} {'FREEABLE':>8}  OCCUPANCY\n"]
    for line in text.splitlines()[1:]:
        fields = line.split()
        if len(fields) == 18 and fields[15] != "0":
            allocated, used, pages, chain, freeable = map(int, fields[13:])
            lines.append(_class_line(fields[1], str(chain), allocated, used, pages, freeable))
        elif fields[:1] == ["Total"]:
            allocated, used, pages, freeable = map(int, fields[12:])
            lines.append(_class_line("total", "", allocated, used, pages, freeable))
    return "".join(lines)


def _class_line(size: str, chain: str, allocated: int, used: int, pages: int, freeable: int) -> str:
    share = used / allocated if allocated else 1
    bar = ("#" * round(share * BAR)).ljust(BAR, ".")
    memory, spare = format_size(pages * PAGE_SIZE), format_size(freeable * PAGE_SIZE) if freeable else "-"
    return f"{size:>5} {chain:>5} {allocated:9} {used:9} {memory:>8} {spare:>8}  {bar} {share:4.0%}\n"


@click.command()
@status_option
def status(socket: Path | None) -> None:
    """Show the disks that are served in a table for people.

    DATA is what was written and not discarded, COMPR what it is compressed to, TOTAL the memory that takes, and RATIO
    is DATA / TOTAL. Sizes: K, M, G are of 1024. Of a disk that is served with --swap it tells what of that is in force,
    and what is missing and why.

    \b
    Example:
      zramd status
    """
    try:
        sockets = [socket] if socket else find_disks()
    except StatusError as error:
        raise click.ClickException(str(error)) from error
    disks = [json.loads(request(path, "json")) for path in sockets]
    rows = [_status_row(facts) for facts in disks]
    widths = {name: max(len(name), *(len(row[name]) for row in rows)) for name in rows[0]}
    left = {"NAME", "ALGORITHM"}
    for cells in ({name: name for name in rows[0]}, *rows):
        line = " ".join(
            text.ljust(widths[name]) if name in left else text.rjust(widths[name]) for name, text in cells.items()
        )
        click.echo(line.rstrip())
    for facts in disks:
        for uri in facts["uris"]:
            click.echo(f"{facts['name']} is served at {uri}")
        for line in _swap_lines(facts):
            click.echo(line)


def _swap_lines(facts: dict[str, Any]) -> list[str]:
    """Return what there is to say of a disk that is swapped to, or is to be."""
    name, measures = facts["name"], facts["measures"]
    lines = [f"{name} is swapped to: {' '.join(facts['swaps'])}"] if facts["swaps"] else []
    if measures is not None:
        lines.append(f"{name} for swap, in force: {', '.join(key for key, missing in measures.items() if not missing)}")
        lines += [f"{name} for swap, missing: {key} ({missing})" for key, missing in measures.items() if missing]
    elif facts["swaps"]:
        lines.append(f"{name} is not safe to swap to: serve it with --swap")
    return lines


def _status_row(facts: dict[str, Any]) -> dict[str, str]:
    memory = facts["mm_stat"]
    stored, total, limit = memory["orig_data_size"], memory["mem_used_total"], memory["mem_limit"]
    return {
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


@click.command("block-state")
@admin_option
def block_state(socket: Path | None) -> None:
    """Print what each page of the disk is, as the kernel's file block_state does.

    A line is the number of a page that is in use, when it was last read or written (in seconds since the machine
    started), and letters: s same-filled, w written back, h huge, i idle, r recompressed, n incompressible. It is for
    the owner of the server and root. The server goes on meanwhile: pages may change before their line is there.

    \b
    Example:
      zramd block-state | grep -c h
    """
    out = sys.stdout.buffer
    try:
        for line in stream(disk_socket(socket, ADMIN_SUFFIX), "block_state"):
            out.write(line)
        out.flush()
    except StatusError as error:
        raise click.ClickException(str(error)) from error
