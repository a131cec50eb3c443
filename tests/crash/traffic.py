"""What goes on while a server lives: its clients, and long work of all kinds."""

import os
import random
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path

from tests.crash.client import PAUSE_SECONDS, Client
from tests.crash.servers import SECONDS, Server
from zramd.status.client import StatusError, ask

WORDS = (
    "comp_algorithm lz4",
    "comp_algorithm lz4hc",
    "recomp_algorithm algo=zstd priority=1",
    "recomp_algorithm algo=lz4hc priority=2",
    "algorithm_params priority=1 level=1",
    "algorithm_params priority=1 level=3",
    "train size=1024 level=1 priority=3 install=1",
    "estimate samples=10",
    "idle all",
    "idle 1",
    "writeback_limit 100",
    "writeback_limit_enable 1",
    "writeback_limit_enable 0",
    "policy on",
    "policy off",
    "compact 1",
    "cancel all",
)
"""That anybody may say at any time; many are refused."""


class Traffic:
    """Clients of a disk of `pages` pages, and work; if it is `busy`, all kinds of work. It ends with the server.

    `image` is the last one that was saved whole, empty if none was.
    """

    def __init__(self, clients: list[Client], server: Server, medium: Path, pages: int, *, busy: bool) -> None:
        self.image = b""
        self._failures: list[BaseException] = []
        actions = [partial(client.run, server.unix, server.has_died) for client in clients]
        actions += [
            partial(_compact_and_recompress, server),
            partial(_write_back, server, medium, pages),
        ]
        if busy:
            actions += [partial(_say_words, server), partial(self._save, server)]
        self._threads = [threading.Thread(target=self._run, args=(action,)) for action in actions]

    def _run(self, action: Callable[[], None]) -> None:
        try:
            action()
        except BaseException as error:
            self._failures.append(error)

    def __enter__(self) -> "Traffic":
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        for thread in self._threads:
            thread.join()
        if self._failures:
            raise self._failures[0]

    def _save(self, server: Server) -> None:
        while not server.has_died(20 * PAUSE_SECONDS):
            # After a reset there is nothing to save.
            with suppress(StatusError, OSError):
                self.image = save(server)


def _compact_and_recompress(server: Server) -> None:
    say(server, "recomp_algorithm algo=zstd priority=1")
    while not server.has_died():
        for request in ("compact 1", "recompress max_pages=20"):
            say(server, request)
            time.sleep(PAUSE_SECONDS)


def _write_back(server: Server, medium: Path, pages: int) -> None:
    generator = random.Random(server.pid)
    while not server.has_died(PAUSE_SECONDS):
        first = generator.randrange(pages)
        request = f"writeback page_indexes={first}-{min(pages, first + generator.randrange(1, 300)) - 1}"
        # It may be full, or be busy with something else; after a reset there is none.
        with suppress(StatusError, OSError):
            if ask(server.admin, "backing_dev") == "none\n":
                ask(server.admin, f"backing_dev {medium}")
            ask(server.admin, request)


def _say_words(server: Server) -> None:
    generator = random.Random(server.pid)
    while not server.has_died(5 * PAUSE_SECONDS):
        with suppress(StatusError, OSError):
            ask(server.admin, generator.choice(WORDS))


def say(server: Server, request: str, descriptor: int | None = None) -> None:
    """Ask for a change, once the server can be asked; it may die of that, or before."""
    deadline = time.monotonic() + SECONDS
    while not server.has_died() and time.monotonic() < deadline:
        with suppress(StatusError, OSError):
            ask(server.admin, request, None, descriptor)
            return
        time.sleep(PAUSE_SECONDS)


def save(server: Server) -> bytes:
    """Return an image of the disk.

    Raises:
        StatusError: it cannot be saved.
    """
    with in_memory() as fd:
        ask(server.admin, "save fd", None, fd)
        return os.pread(fd, os.fstat(fd).st_size, 0)


@contextmanager
def in_memory(data: bytes = b"") -> Iterator[int]:
    """Return the descriptor of a file with these data, at its start."""
    fd = os.memfd_create("image")
    try:
        os.write(fd, data)
        os.lseek(fd, 0, os.SEEK_SET)
        yield fd
    finally:
        os.close(fd)
