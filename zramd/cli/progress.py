"""Long work in a server as its client sees it: progress on a terminal, and Ctrl-C cancels it there."""

import json
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click

from zramd.cli import INTERRUPTED
from zramd.sizes import format_size
from zramd.status.client import StatusError, ask

LOOK_SECONDS = 0.2
"""Between two looks at how far the work is."""


class _Asking(threading.Thread):
    """Asks for work, and waits for as long as it takes; `ended` is then set."""

    def __init__(self, path: Path, request: str, descriptor: int | None) -> None:
        super().__init__(name="asking", daemon=True)
        self._descriptor = descriptor
        self._path = path
        self._request = request
        self.ended = threading.Event()
        self.answer = ""
        self.error: StatusError | None = None

    def run(self) -> None:
        """Ask."""
        try:
            self.answer = ask(self._path, self._request, None, self._descriptor)
        except StatusError as error:
            self.error = error
        finally:
            self.ended.set()


def do_work(path: Path, request: str, kind: str, descriptor: int | None = None) -> str:
    """Let a server do work of a kind. Return what it says of it; after Ctrl-C, end the command with that.

    It gets the `descriptor` that the work is on.

    Raises:
        click.ClickException: it refuses.
    """
    asking = _Asking(path, request, descriptor)
    shown = sys.stderr.isatty()
    cancelled = False
    with noted_interrupts() as interrupts:
        asking.start()
        while not asking.ended.wait(LOOK_SECONDS):
            if len(interrupts) > 1:
                raise click.Abort
            if interrupts and not cancelled:
                cancelled = True
                _cancel(path, kind)
            if shown:
                show(_line(path, kind, cancelled=cancelled))
    if shown:
        show("")
    if asking.error:
        raise click.ClickException(str(asking.error)) from asking.error
    if interrupts:
        click.echo(asking.answer, nl=False)
        raise SystemExit(INTERRUPTED)
    return asking.answer


@contextmanager
def noted_interrupts() -> Iterator[list[int]]:
    """Yield a list that gets longer with each Ctrl-C. An exception could come where nobody is ready for it."""
    noted: list[int] = []
    before = signal.signal(signal.SIGINT, lambda number, _: noted.append(number))
    try:
        yield noted
    finally:
        signal.signal(signal.SIGINT, before)


def _cancel(path: Path, kind: str) -> None:
    try:
        ask(path, f"cancel {kind}")
    except StatusError as error:
        raise click.ClickException(str(error)) from error


def show(line: str) -> None:
    """Write over the line that progress is in."""
    click.echo(f"\r\x1b[K{line}", nl=False, err=True)


def _line(path: Path, kind: str, *, cancelled: bool) -> str:
    try:
        works: list[dict[str, Any]] = json.loads(ask(path, "json"))["work"]
    except StatusError:
        return ""  # who waits for the answer will tell
    for work in works:
        if work["kind"] == kind:
            return describe(work, cancelled=cancelled)
    return ""


def describe(work: dict[str, Any], *, cancelled: bool) -> str:
    """Return a line on how far work is: pages done and in all, pages a second, bytes saved."""
    done, total, seconds, saved = work["done"], work["total"], work["seconds"], work["saved"]
    share = f" of {total} ({done * 100 // total}%)" if total else ""
    rate = f", {done / seconds:,.0f}/s" if seconds else ""
    memory = f", {format_size(saved)} saved" if saved else ""
    return f"{work['kind']}: {done}{share}{rate}{memory}{', cancelling' * cancelled}"
