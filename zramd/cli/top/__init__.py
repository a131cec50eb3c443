"""`zramd top`: what a disk does, live."""

import importlib
import json
import os
import sys
import time
from dataclasses import asdict
from pathlib import Path
from types import ModuleType

import click

from zramd.cli import INTERRUPTED
from zramd.cli.completion import complete_sockets
from zramd.cli.status import NotRunningError
from zramd.cli.top.tracker import Finder, Tracker, note
from zramd.paths import STATUS_SUFFIX
from zramd.policy.pressure import read_pressure
from zramd.status.client import NoServerError, StatusError

LEAST_SECONDS = 0.1
SVG_LOOKS = 16


@click.command()
@click.option(
    "-d",
    "--delay",
    type=click.FloatRange(LEAST_SECONDS),
    default=1.0,
    show_default=True,
    metavar="SECONDS",
    help="Time between two looks, which rates and latencies are of.",
)
@click.option("--once", is_flag=True, help="Print one such time, and end; needs no terminal.")
@click.option("--json", "as_json", is_flag=True, help="An object a line for each disk and look; bytes, nanoseconds.")
@click.option(
    "--svg",
    type=click.Path(path_type=Path, dir_okay=False),
    help=f"Write a picture of what is seen in {SVG_LOOKS} such times to a file, and end.",
)
@click.option(
    "--status",
    "sockets",
    type=click.Path(path_type=Path, readable=False),
    shell_complete=complete_sockets(STATUS_SUFFIX),
    multiple=True,
    help="Status socket of a disk; can be given several times. Default: those of all disks that are served.",
)
def top(delay: float, once: bool, as_json: bool, svg: Path | None, sockets: tuple[Path, ...]) -> None:
    """Show what the disks do: requests and their latency, memory, the pool by size class, the policy and its work.

    Keys: q ends it, tab and arrows go from disk to disk, p pauses, + and - change how often it looks, s sorts the size
    classes, h helps. A server that ends is waited for.

    \b
    Example:
      zramd top
      zramd top -d 5 --json | jq -c '[.disk, .operations.write.p99]'
    """
    if svg and as_json:
        raise click.UsageError("--svg and --json exclude each other")
    finder = Finder(list(sockets))
    try:
        finder.find()
    except NoServerError as error:
        raise NotRunningError(str(error)) from error
    except StatusError as error:
        raise click.ClickException(str(error)) from error
    answers = finder.ask()
    if all(answer.sample is None for answer in answers):
        raise NotRunningError(answers[0].trouble)
    trackers: list[Tracker] = []
    note(trackers, answers)
    if as_json:
        _print_json(finder, trackers, delay, once=once)
    elif once or svg:
        _print_once(finder, trackers, delay, svg)
    else:
        _draw(finder, delay)


def _print_json(finder: Finder, trackers: list[Tracker], delay: float, *, once: bool) -> None:
    due = time.monotonic()
    try:
        while True:
            due += delay
            time.sleep(max(due - time.monotonic(), 0.0))
            note(trackers, finder.ask())
            pressure = read_pressure()
            machine = {"time": time.time(), "pressure": asdict(pressure) if pressure else None}
            for tracker in trackers:
                sys.stdout.write(json.dumps(machine | tracker.json()) + "\n")
            sys.stdout.flush()
            if once:
                return
    except KeyboardInterrupt:
        raise SystemExit(INTERRUPTED) from None


def _print_once(finder: Finder, trackers: list[Tracker], delay: float, svg: Path | None) -> None:
    screen = _screen()
    for _ in range(SVG_LOOKS if svg else 1):
        time.sleep(delay)
        note(trackers, finder.ask())
    if svg:
        screen.save_svg(trackers, delay, svg)
    else:
        screen.print_once(trackers, delay)


def _draw(finder: Finder, delay: float) -> None:
    screen = _screen()
    if not (sys.stdin.isatty() and sys.stdout.isatty()):
        raise click.ClickException("this is no terminal: use zramd top --once, or --json")
    kind = os.environ.get("TERM") or "dumb"
    if kind in ("dumb", "unknown"):
        raise click.ClickException(f"a terminal of kind {kind} cannot be drawn on: use zramd top --once, or set TERM")
    raise SystemExit(screen.run(finder, delay))


def _screen() -> ModuleType:
    """Return the module that draws: what it draws with is not needed for the rest."""
    try:
        return importlib.import_module("zramd.cli.top.screen")
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != "rich":
            raise
        install = f"{sys.executable} -m pip install rich"
        raise click.ClickException(
            f"zramd top is drawn with rich, which is not installed: {install} (--json works without)"
        ) from error
