"""`zramd save` and `restore`: what a disk holds, to a file and back."""

import os
import stat
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import click

from zramd.cli.options import Parsed, admin_option
from zramd.cli.progress import do_work
from zramd.cli.stat import disk_socket, request
from zramd.paths import ADMIN_SUFFIX
from zramd.replacement import replaced
from zramd.sizes import parse_size

PIPE = Path("-")


@click.command()
@click.argument("file", type=click.Path(path_type=Path))
@admin_option
def save(file: Path, socket: Path | None) -> None:
    """Save what the disk holds to FILE, or (-) to standard output; `zramd restore` brings it back.

    The pages are written as they are stored, compressed, with checksums: all of them as they are at one moment, though
    the disk may be used meanwhile. Have a file system write what it holds back before: sync, or better fsfreeze.
    FILE is replaced once the new one is complete and on its medium; only its owner can read it. Interrupted, the
    command leaves FILE as it was.

    \b
    Example:
      fsfreeze -f /srv/build; zramd save /var/lib/zramd/zram0.img & sleep 0.1; fsfreeze -u /srv/build; wait
      zramd save - | ssh elsewhere 'zramd restore -'
    """
    path = disk_socket(socket, ADMIN_SUFFIX)
    with _opened_to_write(file) as fd:
        done = _transfer(path, "save fd", fd, f"{file} is not saved")
    click.echo(done, nl=False, err=True)


@click.command()
@click.argument("file", type=click.Path(path_type=Path))
@click.option(
    "--size", type=Parsed("size", parse_size), help="Size of the disk, if it is to be larger than the saved one."
)
@click.option("--if-empty", is_flag=True, help="Do nothing if the disk holds data, as one that was kept does.")
@admin_option
def restore(file: Path, size: int | None, if_empty: bool, socket: Path | None) -> None:
    """Make the disk what was saved in FILE, or (-) comes from standard input.

    The disk must be empty, or have no size yet, and no client may be connected. Algorithms, dictionaries and chain size
    are those of the saved disk; its size too, unless the disk has a larger one. A file that is damaged is refused, and
    leaves a disk without a size.

    \b
    Example:
      zramd reset && zramd restore /var/lib/zramd/zram0.img
    """
    path = disk_socket(socket, ADMIN_SUFFIX)
    if if_empty and int(request(path, "mm_stat").split()[0]):
        click.echo("the disk holds data: nothing is restored", err=True)
        return
    with _opened_to_read(file) as fd:
        done = _transfer(path, f"restore fd disksize={size or 0}", fd, f"{file} is not restored")
    click.echo(done, nl=False, err=True)


@contextmanager
def _opened_to_write(file: Path) -> Iterator[int]:
    try:
        if file == PIPE:
            if sys.stdout.isatty():
                raise click.UsageError("a saved disk is nothing for a terminal: name a file, or a pipe")
            yield sys.stdout.fileno()
        elif _is_pipe(file):
            fd = os.open(file, os.O_WRONLY | os.O_CLOEXEC)
            with open(fd, "wb"):
                yield fd
        else:
            with replaced(file) as fd:
                yield fd
    except OSError as error:
        raise click.ClickException(f"{file} is not saved: {error.strerror or error}") from error


def _is_pipe(file: Path) -> bool:
    with suppress(FileNotFoundError):
        return stat.S_ISFIFO(file.lstat().st_mode)
    return False


@contextmanager
def _opened_to_read(file: Path) -> Iterator[int]:
    try:
        if file == PIPE:
            yield sys.stdin.fileno()
        else:
            with file.open("rb", buffering=0) as opened:
                yield opened.fileno()
    except OSError as error:
        raise click.ClickException(f"{file} is not restored: {error.strerror or error}") from error


def _transfer(path: Path, request: str, fd: int, otherwise: str) -> str:
    try:
        return do_work(path, request, request.partition(" ")[0], fd)
    except click.ClickException as error:
        raise click.ClickException(f"{otherwise}: {error.message}") from error
