"""`zramd estimate` and `zramd train`: what the pages of a running server would be with other algorithms."""

import base64
import json
from pathlib import Path
from typing import Any

import click

from zramd.cli.options import Parsed, admin_option
from zramd.cli.progress import do_work
from zramd.cli.stat import disk_socket
from zramd.cli.table import table
from zramd.layout import PRIORITIES
from zramd.paths import ADMIN_SUFFIX
from zramd.replacement import replaced
from zramd.sizes import format_size, parse_size

MOST_SAMPLES = 8192


@click.command()
@click.option("--samples", type=click.IntRange(1, MOST_SAMPLES), default=1024, show_default=True, help="Pages to try.")
@click.option("--json", "as_json", is_flag=True, help="Everything as JSON: bytes, and microseconds a page.")
@admin_option
def estimate(samples: int, as_json: bool, socket: Path | None) -> None:
    """Tell what the disk would hold with each algorithm and chain size, by a random sample of its pages.

    RATIO is of the sampled pages to their compressed bytes. MEMORY is what the pool would take for all pages, by chain
    size, with full zspages. Times are of the processor, by the engine in use. Nothing changes, and pages count as no
    more used than they were.

    \b
    Example:
      zramd estimate --samples 4096
    """
    facts = _ask(socket, f"estimate samples={samples}", "estimate")
    if as_json:
        click.echo(json.dumps(facts, indent=2))
        return
    chains = list(facts["rows"][0]["memory"])
    heading = ["ALGORITHM", "LEVEL", "RATIO", "COMPRESS", "DECOMPRESS", *(f"MEMORY/{chain}" for chain in chains)]
    for line in table([heading, *(_estimate_row(row) for row in facts["rows"])]):
        click.echo(line)
    click.echo(
        f"By {facts['samples']} of {facts['objects']} pages that have an object in memory. Now they take "
        f"{format_size(facts['used'])}, with chain size {facts['chain_size']}."
    )


def _estimate_row(row: dict[str, Any]) -> list[str]:
    name = f"{row['name']}+dict" if row["dictionary_bytes"] else row["name"]
    costs = [f"{row['ratio']:.2f}", f"{row['compress']:.1f}us", f"{row['decompress']:.1f}us"]
    return [name, str(row["level"]), *costs, *(format_size(size) for size in row["memory"].values())]


@click.command()
@click.option(
    "--priority", type=click.IntRange(1, PRIORITIES - 1), default=1, show_default=True, help="To install it at."
)
@click.option("--level", type=click.IntRange(1, 22), default=9, show_default=True, help="The level to install it with.")
@click.option("--size", type=Parsed("size", parse_size), default="112K", show_default=True, help="Of the dictionary.")
@click.option("--install", is_flag=True, help="Recompress with it from now on, if it is a gain; kept over a restart.")
@click.option("--output", type=click.Path(path_type=Path, dir_okay=False), help="File to write the dictionary to.")
@admin_option
def train(priority: int, level: int, size: int, install: bool, output: Path | None, socket: Path | None) -> None:
    """Train a zstd dictionary on pages of the disk, and tell what it gains on other pages of it.

    MEMORY is what the pool would take for all pages of the disk, by its size classes: a page that becomes a little
    smaller gains nothing unless it becomes of another class. A dictionary holds parts of pages: FILE is readable for
    you only.

    \b
    Example:
      zramd train
      zramd train --install && zramd recompress
    """
    request = f"train size={size} priority={priority} level={level} install={int(install)}"
    facts = _ask(socket, request, "train")
    heading = ["LEVEL", "", "RATIO", "MEMORY", "COMPRESS", "DECOMPRESS"]
    rows = [_train_row(level, level[which], name) for level in facts["levels"] for which, name in _KINDS.items()]
    for line in table([heading, *rows]):
        click.echo(line)
    dictionary = base64.b64decode(facts["dictionary"])
    click.echo(
        f"Trained on {facts['trained_on']} pages and tried on {facts['held_out']} others, of {facts['objects']} that "
        f"have an object in memory; the dictionary has {format_size(len(dictionary))}."
    )
    click.echo(_verdict(facts))
    if output is not None:
        _write_private(output, dictionary)
    if facts["installed"] is not None:
        click.echo(f"Installed as priority {priority}: zramd recompress --priority {priority} uses it.")
    elif install:
        raise click.ClickException(f"not installed: {facts['refusal']}")


_KINDS = {"plain": "", "trained": "trained"}


def _verdict(facts: dict[str, Any]) -> str:
    """Say whether it is worth it: memory for all pages, and for the dictionary."""
    level, gain = facts["level"], facts["gain"]
    (chosen,) = (found for found in facts["levels"] if found["level"] == level)
    plain = chosen["plain"]["memory"]
    if gain > 0:
        share = f"{gain / plain:.1%}"
        return f"At level {level} the disk takes {format_size(gain)} ({share}) less with it, its own memory counted."
    return (
        f"No gain: at level {level} the disk takes {format_size(-gain)} more with it, its own memory counted. These "
        "pages have too little in common."
    )


def _train_row(level: dict[str, Any], tried: dict[str, Any], name: str) -> list[str]:
    costs = [f"{tried['compress']:.1f}us", f"{tried['decompress']:.1f}us"]
    return [str(level["level"]), name, f"{tried['ratio']:.2f}", format_size(tried["memory"]), *costs]


def _ask(socket: Path | None, request: str, kind: str) -> dict[str, Any]:
    answer = do_work(disk_socket(socket, ADMIN_SUFFIX), request, kind)
    if answer.startswith("cancelled"):
        raise click.ClickException(answer.rstrip("\n"))
    facts: dict[str, Any] = json.loads(answer)
    return facts


def _write_private(path: Path, data: bytes) -> None:
    try:
        with replaced(path) as fd, open(fd, "wb", closefd=False) as file:
            file.write(data)
    except OSError as error:
        raise click.ClickException(f"cannot write {path}: {error.strerror}") from error
