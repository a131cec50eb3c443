"""`zramd bench`: what your data would take with each algorithm."""

import json
import os
import shutil
import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import click

from zramd.cli import INTERRUPTED
from zramd.cli.options import Parsed
from zramd.cli.progress import show
from zramd.cli.table import bar, table
from zramd.layout import ACCESSED_BYTES, PAGE_SIZE, WORD
from zramd.sizes import format_size, parse_size

if TYPE_CHECKING:
    from zramd.device.collecting import Collected
    from zramd.device.estimate import Estimated

STDIN = Path("-")
MOST_SAMPLES = 1 << 16
CHAIN_SIZES = (4, 8)
"""Of those that are tried: the kernel's, as most configure it, and the default."""
LEAST_BAR, MOST_BAR = 8, 40
COUNT_EVERY = 1024
"""Pages or files between two lines of progress."""


@click.command()
@click.argument("files", metavar="FILE...", type=click.Path(path_type=Path, allow_dash=True), nargs=-1)
@click.option("--pid", "pids", type=click.IntRange(1), multiple=True, help="Memory of a process; may be repeated.")
@click.option("--algorithm", "algorithms", multiple=True, help="Only this one, as in 'zstd(level=3)'; may be repeated.")
@click.option(
    "--samples", type=click.IntRange(1, MOST_SAMPLES), default=2048, show_default=True, help="Pages to try, at random."
)
@click.option(
    "--memory", type=Parsed("size", parse_size), help="What swap may take, for SWAP. Default: half of this machine's."
)
@click.option("--json", "as_json", is_flag=True, help="Everything as JSON: bytes, and microseconds a page.")
def bench(
    files: tuple[Path, ...],
    pids: tuple[int, ...],
    algorithms: tuple[str, ...],
    samples: int,
    memory: int | None,
    as_json: bool,
) -> None:
    """Tell what your data would take with each algorithm and level: FILES, directories, disks, or (-) standard input.

    A random sample of the pages is tried, and nothing else is read, but for standard input. RATIO is of pages that
    reach an algorithm, to their compressed bytes. COMPR and DECOMPR are microseconds of the processor a page, by the
    engine in use. MEM/4 and MEM/8 are what the pool takes for all the data, by chain size; the bar is MEM/8 as a share
    of the data. SWAP is how much of such data fits into half of this machine's memory (or --memory), with the tables
    of a disk. A star: no other is both faster to compress with and smaller.

    \b
    Example:
      zramd bench /var/lib/dump.img
      zramd bench --pid "$(pgrep -n firefox)" --memory 4G
    """
    from zramd.device.codecs import codec, parse_codec
    from zramd.device.estimate import try_codec
    from zramd.device.trial import LEVELS
    from zramd.memory import NoMemoryError
    from zramd.native import EngineError, describe

    if not files and not pids:
        raise click.UsageError("nothing to try: name files or directories, - for standard input, or --pid")
    if STDIN in files and (len(files) > 1 or pids):
        raise click.UsageError("- stands alone: what it holds is not known before it is read")
    try:
        chosen = [parse_codec(text) for text in algorithms]
    except ValueError as error:
        raise click.BadParameter(str(error), param_hint="--algorithm") from error
    try:
        engine = describe()
        chosen = chosen or [codec(name, level) for name, levels in LEVELS.items() for level in levels]
        collected, skipped = _collect(files, pids, samples)
        pages = bytearray().join(collected.pages)
        collected.pages.clear()
        rows = []
        for number, each in enumerate(chosen, 1):
            _progress(f"bench: {each.name} {each.level} ({number} of {len(chosen)})")
            if (row := try_codec(each, pages, collected.objects)) is not None:
                rows.append(row)
        _progress("")
    except KeyboardInterrupt:
        _progress("")
        raise SystemExit(INTERRUPTED) from None
    except OSError as error:
        _progress("")
        mine = os.geteuid() == 0 or not isinstance(error, PermissionError)
        remedy = "" if mine else ": run this as root, or as its owner"
        raise click.ClickException(f"{error.filename or '-'}: {error.strerror or error}{remedy}") from error
    except (EngineError, NoMemoryError) as error:
        raise click.ClickException(str(error)) from error
    budget = os.sysconf("SC_PHYS_PAGES") * PAGE_SIZE // 2 if memory is None else memory
    tried = len(pages) // PAGE_SIZE
    if as_json:
        click.echo(json.dumps(_facts(collected, tried, rows, budget, skipped, engine), indent=2))
        return
    for line in _chart(rows, collected, budget):
        click.echo(line)
    click.echo(f"{_summary(collected, tried)}; SWAP is what {format_size(budget)} hold; engine: {engine}.")
    if skipped:
        more = f", and {len(skipped) - 1} more" if len(skipped) > 1 else ""
        click.echo(f"Not read: {skipped[0]}{more}.", err=True)


def _collect(files: tuple[Path, ...], pids: tuple[int, ...], samples: int) -> "tuple[Collected, list[str]]":
    """Return pages, and the files that could not be read.

    Raises:
        OSError: something that was named cannot be read.
        click.ClickException: there are no pages to try.
    """
    from zramd.device.collecting import Found, collect, collect_stream, find

    done = 0

    def check() -> None:
        nonlocal done
        done += 1
        if done % COUNT_EVERY == 0:
            _progress(f"bench: {what} {done}")

    what = "reading page"
    if files == (STDIN,):
        found = Found()
        collected = collect_stream(sys.stdin.buffer, samples, check)
    else:
        what = "looking at file"
        found = find(files, pids, check)
        what, done = "reading page", 0
        collected = collect(found, samples, check)
    if not collected.total:
        raise click.ClickException("there is no data: name other files")
    if not collected.pages:
        raise click.ClickException(f"{_summary(collected, 0)}: no algorithm sees such pages; name other files")
    return collected, found.skipped


def _progress(line: str) -> None:
    if sys.stderr.isatty():
        show(line)


def _capacity(row: "Estimated", collected: "Collected", budget: int) -> int:
    """Return the bytes of such data that fit into so much memory, with a disk's tables."""
    each = row.per_object[CHAIN_SIZES[-1]] * collected.objects / collected.total + WORD + ACCESSED_BYTES
    return int(budget / each) * PAGE_SIZE


def _chart(rows: "list[Estimated]", collected: "Collected", budget: int) -> Iterator[str]:
    heading = ["ALGORITHM", "RATIO", "COMPR", "DECOMPR", *(f"MEM/{size}" for size in CHAIN_SIZES), "SWAP"]
    lines = list(table([heading, *(_row(row, _capacity(row, collected, budget)) for row in rows)]))
    width = max(map(len, lines))
    length = min(max(shutil.get_terminal_size().columns - width - 4, LEAST_BAR), MOST_BAR)
    yield lines[0]
    for line, row in zip(lines[1:], rows, strict=True):
        share = row.memory[CHAIN_SIZES[-1]] / (collected.total * PAGE_SIZE)
        star = " *" if not any(_is_better(other, row) for other in rows) else ""
        yield f"{line:{width}}  {bar(share, length)}{star}"


def _is_better(other: "Estimated", row: "Estimated") -> bool:
    chain_size = CHAIN_SIZES[-1]
    return other.compress < row.compress and other.memory[chain_size] < row.memory[chain_size]


def _row(row: "Estimated", capacity: int) -> list[str]:
    name = f"{row.name}{'+dict' if row.dictionary_bytes else ''} {row.level}"
    memory = [format_size(row.memory[size]) for size in CHAIN_SIZES]
    return [
        name,
        f"{row.ratio:.2f}",
        f"{row.compress:.1f}us",
        f"{row.decompress:.1f}us",
        *memory,
        format_size(capacity),
    ]


def _summary(collected: "Collected", tried: int) -> str:
    """Say what the data are."""
    total = collected.total
    same = total - collected.zeros - collected.objects
    size, pages = format_size(total * PAGE_SIZE), "1 page" if tried == 1 else f"{tried} pages"
    return f"{size} of data: {collected.zeros / total:.1%} zeros, {same / total:.1%} same-filled; {pages} tried"


def _facts(
    collected: "Collected", tried: int, rows: "list[Estimated]", budget: int, skipped: list[str], engine: str
) -> dict[str, object]:
    """Return all of it, ready for JSON."""
    counts = {name: getattr(collected, name) for name in ("total", "holes", "read", "zero", "same", "objects")}
    found = [asdict(row) | {"swap": _capacity(row, collected, budget)} for row in rows]
    return {"engine": engine, "pages": counts, "tried": tried, "budget": budget, "rows": found, "skipped": skipped}
