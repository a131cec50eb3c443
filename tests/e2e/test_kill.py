"""`kill -9` at any moment, many times over: no acknowledged write is lost, and no page is anything but old or new."""

import os
import random
import signal
import socket
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import ServerProcess, start_server
from tests.nbd_bytes import REPLY_BYTES, SIMPLE, TRIM, connect, receive
from tests.property.test_device import make_data, read, recount
from zramd.device.opening import OpenDevice, Wanted
from zramd.layout import PAGE_SIZE
from zramd.memory import RegionStore
from zramd.status.client import StatusError

KILLS = 40
PAGES = 2048
SIZE = PAGES * PAGE_SIZE
BATCH = 24
EMPTY = bytes(PAGE_SIZE)
KINDS = ["text", "half", "random", "pattern", "zero"]


class Client:
    """Writes and trims pages, and knows of each what it may hold: what was answered last, or anything sent since."""

    def __init__(self, seed: int) -> None:
        self.generator = random.Random(seed)
        self.possible: list[list[bytes]] = [[EMPTY] for _ in range(PAGES)]
        self.answered = 0

    def run(self, unix: Path) -> None:
        """Send batches until the server is gone."""
        with connect(unix) as sock:
            try:
                while True:
                    self._batch(sock)
            except (ConnectionError, EOFError):
                return

    def _batch(self, sock: socket.socket) -> None:
        sent: list[tuple[int, list[bytes]]] = []
        stream = []
        for cookie in range(BATCH):
            count = self.generator.choice([1, 1, 1, 4])
            page = self.generator.randrange(PAGES - count)
            if self.generator.random() < 0.2:
                contents = [EMPTY] * count
                stream.append(SIMPLE.request(TRIM, cookie, page * PAGE_SIZE, count * PAGE_SIZE))
            else:
                kind, seed = self.generator.choice(KINDS), self.generator.randrange(64)
                contents = [bytes(make_data(kind, seed + number, PAGE_SIZE)) for number in range(count)]
                stream.append(SIMPLE.write(cookie, page * PAGE_SIZE, b"".join(contents)))
            sent.append((page, contents))
            for number, content in enumerate(contents):
                self.possible[page + number].append(content)
        sock.sendall(b"".join(stream))
        for page, contents in sent:
            if len(receive(sock, REPLY_BYTES)) < REPLY_BYTES:
                raise EOFError
            self.answered += 1
            for number, content in enumerate(contents):
                # Requests of one batch that hit a page are carried out in order.
                held = self.possible[page + number]
                del held[: held.index(content)]

    def check(self, found: bytes) -> None:
        """Check what a recovered disk holds, and go on from there."""
        for page, held in enumerate(self.possible):
            content = found[page * PAGE_SIZE : (page + 1) * PAGE_SIZE]
            assert content in held, f"page {page} is none of the {len(held)} that it may be"
            self.possible[page] = [content]


@pytest.fixture
def state() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(dir="/dev/shm") as directory:
        yield Path(directory) / "state"


def compact_until_gone(server: ServerProcess) -> None:
    while True:
        try:
            server.ask("compact 1")
        except (StatusError, OSError):
            return
        time.sleep(0.002)


def test_kills_at_random_moments_lose_nothing_that_was_answered(tmp_path: Path, state: Path) -> None:
    client = Client(1)
    generator = random.Random(2)
    compacted = 0
    for _ in range(KILLS):
        server = start_server(tmp_path, "--state", str(state), "--size", str(SIZE), volatile=False)
        threads = [
            threading.Thread(target=client.run, args=(server.unix,)),
            threading.Thread(target=compact_until_gone, args=(server,)),
        ]
        for thread in threads:
            thread.start()
        time.sleep(generator.uniform(0.01, 0.15))
        os.kill(server.process.pid, signal.SIGKILL)
        server.process.communicate(timeout=30)
        for thread in threads:
            thread.join(30)
        opened = OpenDevice(RegionStore(state), Wanted())
        assert opened.recovered
        client.check(read(opened.device, 0, SIZE))
        stat = opened.device.mm_stat()
        assert stat == recount(opened.device, stat)
        compacted = stat.pages_compacted
        opened.close()
    assert client.answered > KILLS * BATCH
    assert compacted > 0
