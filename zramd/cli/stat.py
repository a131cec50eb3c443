"""`zramd stat` and `block-state`: what a running server says of itself."""

import sys
from pathlib import Path

import click

from zramd.cli.completion import complete_attributes
from zramd.cli.options import admin_option, status_option
from zramd.cli.table import bar
from zramd.paths import ADMIN_SUFFIX, STATUS_SUFFIX
from zramd.sizes import format_size
from zramd.status.classes import ClassUse, parse_classes
from zramd.status.client import SECONDS, StatusError, ask, find_disk, stream


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
@click.argument("name", required=False, shell_complete=complete_attributes)
@click.option("--human", is_flag=True, help="For `classes`: only what is in use, with bars for occupancy.")
@click.option("--prometheus", is_flag=True, help="Instead of an attribute: metrics of all disks, for Prometheus.")
@click.option(
    "--output",
    type=click.Path(path_type=Path, dir_okay=False),
    help="With --prometheus: a file to be replaced at once by the metrics, or removed if no server answers.",
)
@status_option
def stat(name: str | None, human: bool, prometheus: bool, output: Path | None, socket: Path | None) -> None:
    """Print the attribute NAME of a running server, as the kernel prints it for zram.

    Sizes are in bytes. Names: mm_stat io_stat bd_stat debug_stat stat disksize comp_algorithm recomp_algorithm
    mem_limit mem_used_max backing_dev writeback_limit initstate; classes for the pool's size classes (zsmalloc's file
    in debugfs), codecs for the libraries in use, work for what is under way, and json for everything at once.

    \b
    Example:
      zramd stat mm_stat
      zramd stat classes --human
      zramd stat --prometheus --output /var/lib/prometheus/node-exporter/zramd.prom
    """
    if prometheus:
        if name is not None or human:
            raise click.UsageError("--prometheus goes with no attribute: its metrics have all of them")
        _print_metrics(socket, output)
        return
    if output is not None:
        raise click.UsageError("--output goes with --prometheus")
    if name is None:
        raise click.UsageError("Missing argument 'NAME'.")
    if name.split() != [name]:
        raise click.UsageError(f"{name!r} is not the name of an attribute; to change one: zramd set NAME=VALUE")
    if human and name != "classes":
        raise click.UsageError("--human is for `classes`; for a table of the rest: zramd status")
    text = request(disk_socket(socket, STATUS_SUFFIX), name)
    click.echo(_show_classes(text) if human else text, nl=False)


def _print_metrics(socket: Path | None, output: Path | None) -> None:
    from zramd.cli.prometheus import write_metrics

    try:
        text = write_metrics(socket, output)
    except StatusError as error:
        raise click.ClickException(str(error)) from error
    except OSError as error:
        raise click.ClickException(f"cannot write {output}: {error.strerror}") from error
    click.echo(text, nl=False)


BAR = 30
"""Characters of a bar."""


def _show_classes(text: str) -> str:
    """Return the classes that are in use, from the text of zsmalloc's file: 18 columns."""
    classes, total = parse_classes(text)
    lines = [f"{'SIZE':>5} {'CHAIN':>5} {'OBJECTS':>9} {'USED':>9} {'MEMORY':>8} {'FREEABLE':>8}  OCCUPANCY\n"]
    lines += [_class_line(str(each.size), str(each.chain), each) for each in classes]
    return "".join((*lines, _class_line("total", "", total)))


def _class_line(size: str, chain: str, use: ClassUse) -> str:
    memory, spare = format_size(use.memory), format_size(use.compactable) if use.freeable else "-"
    shown = f"{bar(use.occupancy, BAR)} {use.occupancy:4.0%}"
    return f"{size:>5} {chain:>5} {use.allocated:9} {use.used:9} {memory:>8} {spare:>8}  {shown}\n"


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
