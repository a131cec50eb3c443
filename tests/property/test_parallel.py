"""Several connections at once, beside compaction and statistics: nobody's pages become another's."""

import random
import threading

import pytest

from tests.nbd_bytes import READ, REPLY_BYTES, SIMPLE, TRIM, WRITE, Peer, receive
from tests.property.test_device import make_data, recount
from zramd.device.opening import OpenDevice
from zramd.layout import PAGE_SIZE
from zramd.nbd.transmission import Transmission

CONNECTIONS = 4
PAGES = 600
"""Of each connection, on which it is alone; and of a part that all of them write to."""
BATCHES = 60
KINDS = ["text", "half", "random", "zero", "pattern"]


class Client:
    """Writes, trims and reads its own pages in batches, and checks what it reads; writes to what all share."""

    def __init__(self, number: int) -> None:
        self.generator = random.Random(number)
        self.first = (number + 1) * PAGES
        self.pages = [bytes(PAGE_SIZE)] * PAGES

    def talk(self, peer: Peer) -> None:
        for _ in range(BATCHES):
            reads, stream = self._batch()
            sender = threading.Thread(target=peer.client.sendall, args=(stream,))
            sender.start()
            for cookie, wanted in reads:
                assert receive(peer.client, REPLY_BYTES) == SIMPLE.done(cookie)
                if wanted is not None:
                    assert receive(peer.client, PAGE_SIZE) == wanted or wanted == b""
            sender.join()

    def _batch(self) -> tuple[list[tuple[int, bytes | None]], bytes]:
        """Return a stream of requests, and for each its cookie and what it reads: None nothing, b"" anything."""
        generator, replies, stream = self.generator, [], []
        for cookie in range(40):
            page = generator.randrange(PAGES)
            command = generator.choices([WRITE, READ, TRIM], [6, 4, 1])[0]
            shared = generator.random() < 0.2
            offset = (page if shared else self.first + page) * PAGE_SIZE
            wanted: bytes | None = None
            if command == WRITE:
                data = bytes(make_data(generator.choice(KINDS), generator.randrange(500), PAGE_SIZE))
                stream.append(SIMPLE.write(cookie, offset, data))
            else:
                data = bytes(PAGE_SIZE)
                stream.append(SIMPLE.request(command, cookie, offset, PAGE_SIZE))
            if command == READ:
                wanted = b"" if shared else self.pages[page]
            elif not shared:
                self.pages[page] = data
            replies.append((cookie, wanted))
        return replies, b"".join(stream)


def test_connections_do_not_disturb_each_other(opened: OpenDevice) -> None:
    clients = [Client(number) for number in range(CONNECTIONS)]
    failures: list[BaseException] = []
    done = threading.Event()

    def run(client: Client) -> None:
        try:
            with Peer(lambda sock: Transmission(sock, opened.device, opened.flush).run()) as peer:
                client.talk(peer)
        except BaseException as error:
            failures.append(error)

    def maintain() -> None:
        while not done.wait(0.002):
            opened.device.compact()
            opened.device.mm_stat()
            opened.device.class_stats()

    threads = [threading.Thread(target=run, args=(client,)) for client in clients]
    maintenance = threading.Thread(target=maintain)
    for thread in (maintenance, *threads):
        thread.start()
    for thread in threads:
        thread.join(120)
    done.set()
    maintenance.join(60)
    if failures:
        pytest.fail(repr(failures[0]))
    stat = opened.device.mm_stat()
    assert stat == recount(opened.device, stat)
    assert stat.pages_compacted > 0
