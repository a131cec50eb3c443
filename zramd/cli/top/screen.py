"""The terminal of `zramd top`: what is drawn on it, the keys, and that it is left as it was found."""

import io
import os
import re
import select
import signal
import sys
import termios
import tty
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import Self

from rich.console import Console, Group
from rich.live import Live
from rich.text import Text

from zramd.cli import INTERRUPTED
from zramd.cli.top.tracker import Asking, Finder, Tracker, note
from zramd.cli.top.view import View

INTERVALS = (0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0, 60.0)
"""Seconds, that + and - choose from."""
SUSPEND = "\x1a"
NEXT, PREVIOUS = ("\t", "\x1b[C", "\x1b[B", "\x1bOC", "\x1bOB"), ("\x1b[Z", "\x1b[D", "\x1b[A", "\x1bOD", "\x1bOA")
_KEY = re.compile(r"\x1b[\[O][0-9;]*[A-Za-z~]|.", re.DOTALL)
_FONT = re.compile(r"@font-face \{.*?\}", re.DOTALL)
"""Fonts that the SVG would fetch from elsewhere."""


class _EndedError(Exception):
    """The user, or a signal, has ended it."""

    def __init__(self, status: int) -> None:
        self.status = status


def plain_console() -> Console:
    """Return a console for what is printed once, as wide as the terminal, or 80."""
    return Console(highlight=False, soft_wrap=True)


def print_once(trackers: list[Tracker], interval: float) -> None:
    """Print each disk once."""
    console = plain_console()
    for number in range(len(trackers)):
        view = _view(console, interval)
        for line in view.draw(trackers, number):
            console.print(line)


def save_svg(trackers: list[Tracker], interval: float, path: Path) -> None:
    """Write a picture of the first disk.

    Raises:
        OSError: it cannot be written.
    """
    console = Console(
        record=True, width=80, height=24, file=io.StringIO(), force_terminal=True, color_system="truecolor"
    )
    for line in View(interval=interval).draw(trackers, 0):
        console.print(line, highlight=False)
    path.write_text(_FONT.sub("", console.export_svg(title="zramd top")))


def run(finder: Finder, interval: float) -> int:
    """Draw until the user, or a signal, ends it. Return the exit status."""
    console = Console(highlight=False)
    woken, wake = os.pipe()
    os.set_blocking(wake, False)
    asking = Asking(finder, interval, wake)
    asking.start()
    live = Live(console=console, screen=True, auto_refresh=False)
    try:
        with _signals(wake), _Terminal(live) as terminal:
            _Screen(console, terminal, asking, interval).run(woken)
    except _EndedError as ended:
        return ended.status
    except KeyboardInterrupt:
        return INTERRUPTED
    return 0


class _Terminal:
    """The terminal as a screen of its own, which has keys as they are typed; as it was found after that."""

    def __init__(self, live: Live) -> None:
        self._live = live
        self._found = termios.tcgetattr(sys.stdin)

    def __enter__(self) -> Self:
        tty.setcbreak(sys.stdin)
        changed = termios.tcgetattr(sys.stdin)
        changed[6][termios.VSUSP] = b"\0"
        termios.tcsetattr(sys.stdin, termios.TCSADRAIN, changed)
        self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        # A terminal that is gone (SIGHUP) has nothing to be restored.
        with suppress(termios.error, OSError):
            self._live.stop()
        with suppress(termios.error, OSError):
            termios.tcsetattr(sys.stdin, termios.TCSADRAIN, self._found)

    def draw(self, lines: list[Text]) -> None:
        """Draw lines."""
        self._live.update(Group(*lines), refresh=True)

    def suspend(self) -> None:
        """Stop, as Ctrl-Z would without a screen, until the shell lets this go on."""
        self.__exit__()
        os.kill(os.getpid(), signal.SIGSTOP)
        self.__enter__()


class _Screen:
    """What is shown, and what keys do to it."""

    def __init__(self, console: Console, terminal: _Terminal, asking: Asking, interval: float) -> None:
        self._console = console
        self._terminal = terminal
        self._asking = asking
        self._view = _view(console, interval)
        self._trackers: list[Tracker] = []
        self._selected = 0

    def run(self, woken: int) -> None:
        """Draw whenever there is something new, and answer keys."""
        while True:
            ready, _, _ = select.select([sys.stdin, woken], [], [])
            if woken in ready:
                os.read(woken, 4096)
                while not self._asking.answers.empty():
                    note(self._trackers, self._asking.answers.get())
            if sys.stdin in ready:
                typed = os.read(sys.stdin.fileno(), 4096)
                if not typed:
                    return
                for key in _KEY.findall(typed.decode(errors="replace")):
                    if key == "q":
                        return
                    self._press(key)
            self._draw()

    def _draw(self) -> None:
        if self._trackers:
            self._view.width, self._view.height = self._console.size
            self._terminal.draw(self._view.draw(self._trackers, self._selected))

    def _press(self, key: str) -> None:
        view = self._view
        if key in NEXT or key in PREVIOUS:
            step = 1 if key in NEXT else -1
            self._selected = (self._selected + step) % max(len(self._trackers), 1)
        elif key in ("p", " "):
            view.paused = not view.paused
            self._asking.change(view.interval, paused=view.paused)
        elif key in ("+", "="):
            self._change(max((each for each in INTERVALS if each < view.interval), default=view.interval))
        elif key == "-":
            self._change(min((each for each in INTERVALS if each > view.interval), default=view.interval))
        elif key in ("h", "?"):
            view.help = not view.help
        elif key == "s":
            view.sort = view.sort.next
        elif key == SUSPEND:
            self._terminal.suspend()

    def _change(self, interval: float) -> None:
        self._view.interval = interval
        self._asking.change(interval, paused=self._view.paused)


def _view(console: Console, interval: float) -> View:
    width, height = console.size
    return View(width, height, unicode=console.encoding.lower().startswith("utf"), interval=interval)


@contextmanager
def _signals(wake: int) -> Iterator[None]:
    """Let SIGTERM and SIGHUP end it as a key would, and SIGWINCH wake it."""

    def end(number: int, _: FrameType | None) -> None:
        raise _EndedError(128 + number)

    handlers = {signal.SIGTERM: end, signal.SIGHUP: end, signal.SIGWINCH: lambda *_: None}
    before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    signal.set_wakeup_fd(wake, warn_on_full_buffer=False)
    try:
        yield
    finally:
        signal.set_wakeup_fd(-1)
        for number, handler in before.items():
            signal.signal(number, handler)
