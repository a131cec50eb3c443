"""`zramd idle`, `recompress` and `writeback`: long work on the pages of a running server."""

import re
from pathlib import Path

import click

from zramd.cli.options import Parsed, admin_option
from zramd.cli.progress import do_work
from zramd.cli.stat import disk_socket
from zramd.layout import PRIORITIES
from zramd.paths import ADMIN_SUFFIX
from zramd.sizes import parse_size

_UNITS = {"": 1, "s": 1, "m": 60, "h": 3600, "d": 86400}


def parse_age(text: str) -> str:
    """Return `all`, or the seconds that `text` means: a number, perhaps with s, m, h or d.

    Raises:
        ValueError: it means neither.
    """
    if text == "all":
        return text
    match = re.fullmatch(r"([0-9]+)([smhd]?)", text, re.ASCII)
    if match is None:
        raise ValueError(f"{text!r} is not an age: write `all`, or a number of seconds, or with m, h or d")
    return str(int(match[1]) * _UNITS[match[2]])


def parse_pages(text: str) -> str:
    """Return the kernel's word for a page, or for pages A-B.

    Raises:
        ValueError: it is neither.
    """
    if re.fullmatch("[0-9]+", text, re.ASCII):
        return f"page_index={text}"
    if re.fullmatch("[0-9]+-[0-9]+", text, re.ASCII):
        return f"page_indexes={text}"
    raise ValueError(f"{text!r} is not a page, or the first and the last of several, as in 0-1023")


@click.command()
@click.argument("age", default="all", type=Parsed("age", parse_age))
@admin_option
def idle(age: str, socket: Path | None) -> None:
    """Mark pages as idle: all of them, or those that were not read or written for AGE, and the others as not.

    AGE is in seconds, or ends in m, h or d. A page is idle until it is used. `recompress` and `writeback` can be told
    to take only such pages.

    \b
    Example:
      zramd idle 10m && zramd recompress --type idle
    """
    click.echo(do_work(disk_socket(socket, ADMIN_SUFFIX), f"idle {age}", "idle"), nl=False)


@click.command()
@click.option(
    "--type", "kind", type=click.Choice(["idle", "huge", "huge_idle"]), help="Only pages that are so, or both."
)
@click.option(
    "--threshold",
    type=Parsed("size", parse_size),
    help="Only pages that take so much or more, and if they take less then.",
)
@click.option("--max-pages", type=click.IntRange(0), help="Most pages to try.")
@click.option("--algorithm", help="The one to use, by name. Default: the next of each page's, until one helps.")
@click.option("--priority", type=click.IntRange(1, PRIORITIES - 1), help="The one to use, by priority.")
@admin_option
def recompress(
    kind: str | None,
    threshold: int | None,
    max_pages: int | None,
    algorithm: str | None,
    priority: int | None,
    socket: Path | None,
) -> None:
    """Compress pages anew, with an algorithm that takes longer and makes them smaller.

    Which: `zramd serve --algorithm 'lz4 zstd(level=9)'`, or `zramd set recomp_algorithm='algo=zstd priority=1'`. It
    runs beside I/O, the largest pages first. Ctrl-C ends it; what was done stays done.

    \b
    Example:
      zramd recompress --type huge
      zramd recompress --threshold 2K --max-pages 100000
    """
    if algorithm is not None and priority is not None:
        raise click.UsageError("--algorithm and --priority exclude each other")
    given = {"type": kind, "threshold": threshold, "max_pages": max_pages, "algo": algorithm, "priority": priority}
    words = " ".join(f"{key}={value}" for key, value in given.items() if value is not None)
    # A word that the kernel takes no notice of, since a request without a value would be for reading.
    request = f"recompress {words or 'all=1'}"
    click.echo(do_work(disk_socket(socket, ADMIN_SUFFIX), request, "recompress"), nl=False)


@click.command()
@click.option(
    "--type",
    "kind",
    type=click.Choice(["idle", "huge", "huge_idle", "incompressible"]),
    help="Pages that are so, or both.",
)
@click.option("--pages", type=Parsed("pages", parse_pages), multiple=True, help="A page, or A-B; may be repeated.")
@admin_option
def writeback(kind: str | None, pages: tuple[str, ...], socket: Path | None) -> None:
    """Write pages to the backing store, and give their memory back. They are read from there from then on.

    \b
    Example:
      zramd idle 1h && zramd writeback --type idle
      zramd writeback --pages 0-1023 --pages 4096
    """
    if not kind and not pages:
        raise click.UsageError("say which pages: --type or --pages")
    words = [*pages, *([f"type={kind}"] if kind else [])]
    request = f"writeback {' '.join(words)}"
    click.echo(do_work(disk_socket(socket, ADMIN_SUFFIX), request, "writeback"), nl=False)
