"""`zramd set`, `compact`, `grow`, `reset` and `stop`: what can be changed in a running server."""

from pathlib import Path

import click

from zramd.cli.completion import complete_words
from zramd.cli.options import Parsed, admin_option
from zramd.cli.stat import disk_socket, request
from zramd.layout import PAGE_SIZE
from zramd.paths import ADMIN_SUFFIX
from zramd.sizes import format_size, parse_size
from zramd.status.client import SECONDS

QUICK = ("mem_limit", "mem_used_max", "comp_algorithm", "algorithm_params", "recomp_algorithm", "writeback_limit")
"""Others may take as long as there is to do, or wait for who does it."""


@click.command("set")
@click.argument("assignments", metavar="NAME=VALUE...", nargs=-1, required=True, shell_complete=complete_words)
@admin_option
def set_attributes(assignments: tuple[str, ...], socket: Path | None) -> None:
    """Change attributes of a running server, one after the other.

    Each is what the kernel's file of that name takes for zram; numbers may end in K, M, G, T (of 1024).

    \b
      mem_limit         most memory for compressed data; 0 for none
      mem_used_max      0: the peak starts from the current use
      compact           anything: compact the pool
      reset             1: throw the contents and all settings away; `force` disconnects clients
      comp_algorithm    lz4, lz4hc or zstd
      algorithm_params  'level=N dict=/PATH priority=P'
      recomp_algorithm  'algo=NAME priority=P', P being 1 to 3: what to recompress with
      backing_dev       file or block device to write pages back to; what is on it is overwritten
      writeback_limit   pages that may be written back, with writeback_limit_enable=1
      cancel            work that is under way: recompress, writeback ..., or all
      disksize          makes the disk; after a reset, or after `zramd serve --size 0`
      grow              makes it larger, while it is used
      stop              1: end the server; `force`, even while the machine swaps to it

    \b
    Example:
      zramd set mem_limit=512M mem_used_max=0
      zramd set reset=1 comp_algorithm=zstd algorithm_params='level=9' disksize=4G
    """
    pairs = [_parse(assignment) for assignment in assignments]
    path = disk_socket(socket, ADMIN_SUFFIX)
    for name, value in pairs:
        request(path, f"{name} {value}", SECONDS if name in QUICK else None)


def _parse(assignment: str) -> tuple[str, str]:
    name, equals, value = assignment.partition("=")
    if not equals or name.split() != [name] or not value.strip() or "\n" in value:
        raise click.UsageError(f"{assignment!r} is not NAME=VALUE")
    return name, value


@click.command()
@admin_option
def compact(socket: Path | None) -> None:
    """Move compressed pages together, and give the memory between them back.

    It runs beside I/O, in slices of a millisecond. `zramd stat classes --human` shows what it could free.

    \b
    Example:
      zramd compact
    """
    path = disk_socket(socket, ADMIN_SUFFIX)
    before = _pages_compacted(path)
    request(path, "compact 1", None)
    freed = _pages_compacted(path) - before
    click.echo(f"{freed} pages freed ({format_size(freed * PAGE_SIZE)})")


def _pages_compacted(path: Path) -> int:
    return int(request(path, "mm_stat").split()[6])


@click.command()
@click.argument("size", type=Parsed("size", parse_size))
@admin_option
def grow(size: int, socket: Path | None) -> None:
    """Make the disk larger, to SIZE, while it is used.

    Clients are disconnected and connect again; a device of `zramd attach` has the new size a moment later. What is on
    it has to be told: resize2fs for ext4; a swap area keeps its size until mkswap. A device of `zramd attach --fuse` is
    lost: unmount and detach it before.

    \b
    Example:
      zramd grow 8G
    """
    request(disk_socket(socket, ADMIN_SUFFIX), f"grow {size}", None)


@click.command()
@click.option("--force", is_flag=True, help="Even while the machine swaps to a disk. What is swapped out is lost.")
@admin_option
def stop(force: bool, socket: Path | None) -> None:
    """End the server. What its disks hold is kept, if it is kept at all: see `zramd serve --help`.

    Refused while the machine swaps to the disk; SIGTERM is carried out once it does not any more.

    \b
    Example:
      zramd swapoff && zramd stop
    """
    request(disk_socket(socket, ADMIN_SUFFIX), "stop force" if force else "stop 1", None)


@click.command()
@click.option("--force", is_flag=True, help="Disconnect the clients first. What they have mounted or swapped is lost.")
@admin_option
def reset(force: bool, socket: Path | None) -> None:
    """Throw the contents away, with size, limit, algorithm and counters. The server goes on.

    Refused while a client is connected.

    \b
    Example:
      zramd reset && zramd set disksize=2G
    """
    request(disk_socket(socket, ADMIN_SUFFIX), "reset force" if force else "reset 1", None)
