"""Pictures of the web page of a server in use: files of this machine are written to a disk, read and removed."""

import random
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import click
import nbd
from browser import Browser, BrowserError, browse, find_chromium

from zramd.layout import PAGE_SIZE
from zramd.status.client import ask

DISKS = {"zram0": 1 << 30, "zram1": 256 << 20}
CONFIGURATION = """
[server]
unix = ["{directory}/nbd"]
web = "127.0.0.1:{port}"
[zram0]
size = "1G"
compression-algorithm = "lz4 zstd(level=3)"
resident-limit = "512M"
writeback-device = "{directory}/backing"
volatile = true
status = "{directory}/zram0.status"
[zram1]
size = "256M"
compression-algorithm = "zstd"
volatile = true
status = "{directory}/zram1.status"
"""
EXTENT = 1 << 20
"""Bytes of the disk that a file takes a multiple of."""
LATENCY_SECONDS = 20.0
"""The page is open for so long before its picture is taken: latency is that of the time since."""
LOOKS = {
    "desktop": (1440, 900, False, 1.0),
    "dark": (1440, 900, True, 1.0),
    "phone": (360, 780, False, 2.0),
    "phone-dark": (360, 780, True, 2.0),
}
"""Width, height, whether dark, device pixels to a CSS pixel."""


@dataclass
class Load:
    """Writes files to a disk as a file system would, reads some more than others, and removes some."""

    socket: Path
    disk: str
    files: list[Path]
    speed: float
    """MB/s, on average."""
    stopping: threading.Event

    def run(self) -> None:
        """Go on until `stopping` is set."""
        client = nbd.NBD()
        client.connect_uri(f"nbd+unix:///{self.disk}?socket={self.socket}")
        generator = random.Random(self.disk)  # noqa: S311 (the same load each time)
        free = list(range(0, DISKS[self.disk], EXTENT))
        kept: list[list[int]] = []
        started = time.monotonic()
        while not self.stopping.is_set():
            busy = generator.random() < 0.5 + 0.45 * ((time.monotonic() - started) // 11 % 2)
            for _ in range(4 if busy else 1):
                moved = self._once(client, generator, free, kept)
                self.stopping.wait(moved / self.speed / 1e6)
        client.shutdown()

    def _once(self, client: "nbd.NBD", generator: random.Random, free: list[int], kept: list[list[int]]) -> int:
        """Write, read or remove a file. Return the bytes."""
        chance = generator.random()
        if chance < 0.3 and len(free) > len(DISKS) + DISKS[self.disk] // EXTENT // 6:
            data = generator.choice(self.files).read_bytes()[: 24 << 20]
            data += bytes(-len(data) % PAGE_SIZE)
            places = [free.pop(0) for _ in range(0, len(data), EXTENT)]
            for number, place in enumerate(places):
                for start in range(number * EXTENT, min(len(data), (number + 1) * EXTENT), 1 << 16):
                    client.pwrite(data[start : min(start + (1 << 16), (number + 1) * EXTENT)], place + start % EXTENT)
            client.flush()
            kept.append(places)
            return len(data)
        if chance < 0.34 and len(kept) > 30:
            places = kept.pop(int(generator.random() ** 2 * len(kept)))
            for place in places:
                client.trim(EXTENT, place)
            free += places
            return 0
        if not kept:
            return 0
        places = kept[-1 - int(generator.random() ** 8 * len(kept))]
        for _ in range(40):
            length = generator.choice([4096, 4096, 16384, 65536])
            client.pread(length, generator.choice(places) + generator.randrange(EXTENT - length) // 4096 * 4096)
        return 40 * 22000


@contextmanager
def serve(directory: Path) -> Iterator[int]:
    """Start a server, and end it afterwards. Yield the port of its page."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port: int = probe.getsockname()[1]
    (directory / "backing").touch()
    with (directory / "backing").open("r+b") as file:
        file.truncate(512 << 20)
    configuration = directory / "zramd.toml"
    configuration.write_text(CONFIGURATION.format(directory=directory, port=port))
    command = [sys.executable, "-m", "zramd", "serve", "--config", str(configuration)]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert server.stdout is not None  # noqa: S101 (for the type checker)
    if not any(line.startswith("status: ") for line in server.stdout):
        raise click.ClickException("the server did not start")
    try:
        yield port
    finally:
        server.send_signal(signal.SIGTERM)
        server.wait()


@contextmanager
def loaded(directory: Path) -> Iterator[None]:
    """Load the disks of a server."""
    files = [path for path in Path("/usr").rglob("*") if path.is_file() and path.stat().st_size > 100_000]
    files.sort()
    stopping = threading.Event()
    speeds = {"zram0": 25.0, "zram1": 5.0}
    loads = [Load(directory / "nbd", disk, files, speed, stopping) for disk, speed in speeds.items()]
    threads = [threading.Thread(target=load.run) for load in loads]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        stopping.set()
        for thread in threads:
            thread.join()


def age(admin: Path, seconds: float) -> None:
    """Let that much time go by; what is not touched becomes idle, smaller, and is written back."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        time.sleep(min(15, seconds / 4))
        ask(admin, f"idle {int(seconds / 2)}")
        ask(admin, "writeback type=huge_idle", seconds=None)
        ask(admin, "recompress type=idle", seconds=None)
        ask(admin, f"idle {int(seconds / 4)}")


@click.command()
@click.argument("directory", type=click.Path(path_type=Path, file_okay=False))
@click.option("--seconds", default=240.0, help="How long the server is loaded before. Default: 240.")
def main(directory: Path, seconds: float) -> None:
    """Write pictures of the page to DIRECTORY: on a desktop and a phone, light and dark."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    program = find_chromium()
    if program is None:
        raise click.ClickException("there is no Chromium: apt install chromium")
    directory.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="zramd-") as place, serve(Path(place)) as port, loaded(Path(place)):
        age(Path(place) / "zram0.admin", seconds)
        try:
            with browse(program) as browser:
                for name, look in LOOKS.items():
                    (directory / f"{name}.png").write_bytes(take(browser, f"http://127.0.0.1:{port}/", *look))
        except BrowserError as error:
            raise click.ClickException(str(error)) from error


def take(browser: Browser, url: str, width: int, height: int, dark: bool, scale: float) -> bytes:
    """Return a picture of the page after some seconds; tell what it complains of."""
    page = browser.page()
    page.look(width, height, dark=dark, scale=scale)
    page.open(url)
    page.wait_for("document.querySelectorAll('#latency tbody tr').length > 1")
    time.sleep(LATENCY_SECONDS)
    picture = page.picture()
    page.close()
    for complaint in page.complaints:
        click.echo(f"{width} pixels: {complaint}", err=True)
    return picture


if __name__ == "__main__":
    main()
