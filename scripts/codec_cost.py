"""Measure what each codec and level costs a page, and the memory that it saves, so that one can choose."""

import random
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import click
from corpus import collect
from harness import Interrupt, StepError
from measuring import MIB, Machine, Progress, ending_well, output_option, plots_option, spread, this_machine
from report import limits, number, table, write_json

from zramd.device.codecs import Codec, codec
from zramd.device.opening import OpenDevice, Wanted
from zramd.device.trial import run_trial
from zramd.layout import PAGE_SIZE
from zramd.memory import RegionStore
from zramd.native import choose, describe
from zramd.zsmalloc.classes import DEFAULT_CHAIN_SIZE, MAX_CHAIN_SIZE, MIN_CHAIN_SIZE

LEVELS = {"lz4": (1, 2, 4, 8), "lz4hc": (3, 6, 9, 12), "zstd": (-5, -1, 1, 2, 3, 6, 9, 12, 15, 19)}
CORPUS_SIZE = 256 * MIB
MOST_TIMED = 2048
"""Pages: fewer than are stored, for the slowest levels, while the pool needs many to be like one in use."""


@dataclass(frozen=True, slots=True)
class Pages:
    """Pages to measure with.

    Attributes:
        data: all of them.
        different: how many are not one word over and over: only these reach a codec.
        timed: some of those.
    """

    data: bytearray
    different: int
    timed: bytearray

    @property
    def count(self) -> int:
        """How many there are."""
        return len(self.data) // PAGE_SIZE


@dataclass
class Cost:
    """What a codec at a level takes in microseconds a page, and holds.

    Attributes:
        ratio: bytes of data for each compressed byte.
        memory: bytes of the pool (mem_used_total), by chain size.
    """

    name: str
    level: int
    compress: list[float] = field(default_factory=list)
    decompress: list[float] = field(default_factory=list)
    ratio: float = 0
    memory: dict[int, int] = field(default_factory=dict)

    @property
    def codec(self) -> Codec:
        """The codec."""
        return codec(self.name, self.level)


def read_pages(files: Iterable[Path], count: int) -> Pages:
    """Return so many pages of files, or all if there are fewer, chosen at random but the same each time.

    Raises:
        StepError: there are none.
    """
    data = bytearray()
    for path in files:
        data += path.read_bytes()
        data += bytes(-len(data) % PAGE_SIZE)
    if not data:
        raise StepError("these files are empty: name others")
    offsets = range(0, len(data), PAGE_SIZE)
    generator = random.Random(1)  # noqa: S311 (the same each time)
    chosen = sorted(generator.sample(offsets, min(count, len(offsets))))
    pages = [bytes(data[offset : offset + PAGE_SIZE]) for offset in chosen]
    different = [page for page in pages if page != page[:8] * (PAGE_SIZE // 8)]
    if not different:
        raise StepError("every page of these files is one word over and over, which no codec sees: name others")
    timed = generator.sample(different, min(MOST_TIMED, len(different)))
    return Pages(bytearray().join(pages), len(different), bytearray().join(timed))


def measure(cost: Cost, pages: Pages) -> None:
    """Compress and decompress the timed pages, as a device of the engine in use does."""
    trial = run_trial(cost.codec, pages.timed)
    if trial:
        cost.compress.append(trial.compress)
        cost.decompress.append(trial.decompress)


def store(cost: Cost, pages: Pages, chain_sizes: Iterable[int]) -> None:
    """Write all pages to a device of each chain size, and note what it holds."""
    for chain_size in chain_sizes:
        opened = OpenDevice(RegionStore(None), Wanted(len(pages.data), cost.codec, chain_size))
        try:
            stream = opened.device.stream(pages.data)
            for offset in range(0, len(pages.data), MIB):
                length = min(MIB, len(pages.data) - offset)
                prepared = stream.prepare(offset, length, offset)
                with opened.device:
                    opened.device.write(stream, offset, length, offset, prepared)
            stat = opened.device.mm_stat()
        finally:
            opened.close()
        cost.ratio = stat.orig_data_size / max(stat.compr_data_size, 1)
        cost.memory[chain_size] = stat.mem_used_total


def report(costs: list[Cost], pages: Pages, machine: Machine) -> Iterator[str]:
    """Yield the lines of a report."""
    yield f"{machine}; {pages.count:,} pages, of which {pages.different:,} are not same-filled,"
    yield f"and {len(pages.timed) // PAGE_SIZE:,} of these are timed; engine: {describe()}"
    yield ""
    headings = ["codec", "level", "compress us/page", "min..max", "decompress", "min..max", "data/compressed"]
    for chain_size in costs[0].memory:
        headings += [f"MiB, chain {chain_size}", "data/memory"]
    yield from table(headings, (_row(cost, pages) for cost in costs))
    yield ""
    yield "Ratios and memory are of all pages, same-filled ones too, as a device holds them."


def _row(cost: Cost, pages: Pages) -> list[str]:
    compress, decompress = spread(cost.compress), spread(cost.decompress)
    row = [cost.name, str(cost.level), number(compress, 2), limits(compress, 2)]
    row += [number(decompress, 2), limits(decompress, 2), f"{cost.ratio:.3f}"]
    for used in cost.memory.values():
        row += [f"{used / MIB:,.1f}", f"{len(pages.data) / max(used, 1):.3f}"]
    return row


def as_json(costs: list[Cost], pages: Pages, machine: Machine) -> dict[str, object]:
    """Return all of it, ready for JSON."""
    medians = [
        {
            "name": cost.name,
            "level": cost.level,
            "compress": spread(cost.compress),
            "decompress": spread(cost.decompress),
        }
        for cost in costs
    ]
    return {
        "machine": machine,
        "engine": choose().value,
        "pages": pages.count,
        "medians_us": medians,
        "samples": costs,
    }


@click.command()
@click.argument("files", type=click.Path(exists=True, dir_okay=False, path_type=Path), nargs=-1)
@click.option("--pages", "count", type=click.IntRange(1), default=16384, show_default=True, help="How many, at random.")
@click.option("--repeat", type=click.IntRange(1), default=5, show_default=True, help="Repetitions: medians are shown.")
@click.option(
    "--chain-size",
    "chain_sizes",
    type=click.IntRange(MIN_CHAIN_SIZE, MAX_CHAIN_SIZE),
    multiple=True,
    default=[DEFAULT_CHAIN_SIZE],
    show_default=True,
    help="Of the pool, for the column of memory; may be repeated.",
)
@output_option
@plots_option
def main(
    files: tuple[Path, ...],
    count: int,
    repeat: int,
    chain_sizes: tuple[int, ...],
    output: Path | None,
    plots: Path | None,
) -> None:
    """Measure what each codec and level costs and saves on pages of FILES, or of a corpus of this machine.

    \b
    Example:
      scripts/codec-cost --chain-size 4 --chain-size 8 swapped-out.img
    """
    machine, progress = this_machine(), Progress()
    with ending_well() as interrupt:
        try:
            costs, pages = run(files, count, repeat, chain_sizes, progress, interrupt)
        finally:
            progress.close()
        for line in report(costs, pages, machine):
            click.echo(line)
        if output is not None:
            write_json(output, as_json(costs, pages, machine))
        if plots is not None:
            from plots import codec_plot

            points = [(cost.name, cost.level, spread(cost.compress), cost.ratio) for cost in costs]
            codec_plot(plots / "codecs", f"{pages.count:,} pages on {machine.cpu}", points)


def run(
    files: tuple[Path, ...],
    count: int,
    repeat: int,
    chain_sizes: tuple[int, ...],
    progress: Progress,
    interrupt: Interrupt,
) -> tuple[list[Cost], Pages]:
    """Measure all codecs, which take turns, and return what they cost on which pages."""
    progress.note("collecting pages")
    pages = read_pages(files or [collect(CORPUS_SIZE, interrupt).path], count)
    costs = [Cost(name, level) for name, levels in LEVELS.items() for level in levels]
    progress.begin(len(costs) * (repeat + 1))
    for turn in range(repeat + 1):
        for cost in costs:
            interrupt.check()
            progress.step(f"{cost.name} {cost.level}")
            if turn:
                measure(cost, pages)
            else:
                store(cost, pages, chain_sizes)
    return costs, pages


if __name__ == "__main__":
    main()
