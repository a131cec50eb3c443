"""Play the same random histories on a kernel zram device and on zramd, and compare all of mm_stat as they go.

Two kinds of history. In `exact` the pages are ones that both compress to the same size, and no column may ever differ.
In `files` they are any pages of this machine's files: the kernel's lz4 and liblz4 differ by a few bytes on 3% of them.
"""

import argparse
import fcntl
import mmap
import os
import random
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, fields
from pathlib import Path

import nbd

from zramd.device.counters import MmStat
from zramd.layout import PAGE_SIZE
from zramd.status.client import StatusError, ask

CONTROL = Path("/sys/class/zram-control")
BLKDISCARD = 0x1277
MOST_PAGES = 16  # in a write: the kernel splits one of more than 124 KiB, and then counts two failures
COMPARE_EVERY = 7
COLUMNS = [column.name for column in fields(MmStat)]
MOST_DIFFERENCE = {"compr_data_size": 0.0005, "mem_used_total": 0.05, "mem_used_max": 0.05, "pages_compacted": 0.1}
"""Relative, of histories of any files. A page next to the boundary of a class may fall on the other side of it."""


class DifferenceError(Exception):
    """The two sides differ."""


class KernelZram:
    """A kernel zram device of our own."""

    def __init__(self, disksize: int) -> None:
        self._number = (CONTROL / "hot_add").read_text().strip()
        self._sysfs = Path(f"/sys/block/zram{self._number}")
        self._fd = -1
        try:
            self.set("comp_algorithm", "lz4")
            self.set("disksize", str(disksize))
            self._fd = os.open(f"/dev/zram{self._number}", os.O_RDWR | os.O_DIRECT)
        except OSError:
            self.close()
            raise
        self._buffer = mmap.mmap(-1, MOST_PAGES * PAGE_SIZE)

    def set(self, name: str, value: str) -> None:
        """Store to an attribute."""
        (self._sysfs / name).write_text(value)

    def read_stat(self, name: str) -> list[int]:
        """Return the columns of a statistics file."""
        return [int(column) for column in (self._sysfs / name).read_text().split()]

    def write(self, page: int, data: bytes) -> bool:
        """Write pages; say whether that succeeded."""
        self._buffer[: len(data)] = data
        with memoryview(self._buffer)[: len(data)] as view:
            try:
                return os.pwrite(self._fd, view, page * PAGE_SIZE) == len(data)
            except OSError:
                return False

    def discard(self, page: int, count: int) -> None:
        """Discard pages."""
        fcntl.ioctl(self._fd, BLKDISCARD, struct.pack("=QQ", page * PAGE_SIZE, count * PAGE_SIZE))

    def read(self, page: int) -> bytes:
        """Return a page."""
        with memoryview(self._buffer)[:PAGE_SIZE] as view:
            os.preadv(self._fd, [view], page * PAGE_SIZE)
            return view.tobytes()

    def close(self) -> None:
        """Take the device away."""
        if self._fd >= 0:
            os.close(self._fd)
        (CONTROL / "hot_remove").write_text(self._number)


class Zramd:
    """A zramd server of our own, and a client."""

    def __init__(self, directory: Path, disksize: int) -> None:
        unix, self._admin = directory / "nbd", directory / "zram.admin"
        options: list[str | Path] = ["--unix", unix, "--status", directory / "zram.status", "--admin", self._admin]
        self._process = subprocess.Popen(
            [
                sys.executable,
                "-m",
                "zramd",
                "serve",
                "--volatile",
                "--size",
                str(disksize),
                "--algorithm",
                "lz4",
                *options,
            ],
            stdout=subprocess.DEVNULL,
            start_new_session=True,
        )
        try:
            self._wait()
            self._client = nbd.NBD()
            self._client.connect_unix(str(unix))
        except BaseException:
            self._process.kill()
            self._process.wait()
            raise

    def _wait(self) -> None:
        deadline = time.monotonic() + 20
        while self._process.poll() is None and time.monotonic() < deadline:
            with suppress(StatusError):
                ask(self._admin, "initstate")
                return
            time.sleep(0.05)
        raise StatusError("zramd did not start")

    def set(self, name: str, value: str) -> None:
        """Store to an attribute."""
        ask(self._admin, f"{name} {value}", None)

    def read_stat(self, name: str) -> list[int]:
        """Return the columns of a statistics file."""
        return [int(column) for column in ask(self._admin, name).split()]

    def write(self, page: int, data: bytes) -> bool:
        """Write pages; say whether that succeeded."""
        try:
            self._client.pwrite(data, page * PAGE_SIZE)
        except nbd.Error:
            return False
        return True

    def discard(self, page: int, count: int) -> None:
        """Discard pages."""
        self._client.trim(count * PAGE_SIZE, page * PAGE_SIZE)

    def read(self, page: int) -> bytes:
        """Return a page."""
        return bytes(self._client.pread(PAGE_SIZE, page * PAGE_SIZE))

    def close(self) -> None:
        """Take the device away."""
        self._client.shutdown()
        self._process.terminate()
        self._process.wait()


@contextmanager
def both(disksize: int) -> Iterator[tuple[KernelZram, Zramd]]:
    """Make a device on either side, and take both away."""
    with tempfile.TemporaryDirectory(prefix="zramd-compare-") as directory:
        zramd = Zramd(Path(directory), disksize)
        try:
            kernel = KernelZram(disksize)
            try:
                yield kernel, zramd
            finally:
                kernel.close()
        finally:
            zramd.close()


def file_pages(generator: random.Random, count: int) -> list[bytes]:
    """Return pages from programs, libraries and text of this machine."""
    paths = [
        path
        for directory in ("/usr/bin", "/usr/lib/python3", "/usr/lib/x86_64-linux-gnu", "/usr/share")
        for path in sorted(Path(directory).glob("**/*"))[:4000]
    ]
    generator.shuffle(paths)
    pages: list[bytes] = []
    for path in paths:
        with suppress(OSError):
            if path.is_file() and not path.is_symlink():
                data = path.read_bytes()[: 64 * PAGE_SIZE]
                pages += [
                    data[start : start + PAGE_SIZE].ljust(PAGE_SIZE, b"\0") for start in range(0, len(data), PAGE_SIZE)
                ]
        if len(pages) >= count:
            break
    return pages[:count]


def synthetic_pages(generator: random.Random) -> list[bytes]:
    """Return pages of every size class, raw ones and same-filled ones."""
    prefixes = [generator.randbytes(length) for length in range(8, PAGE_SIZE, 31)]
    pages = [prefix.ljust(PAGE_SIZE, b"\0") for prefix in prefixes]
    pages += [generator.randbytes(PAGE_SIZE) for _ in range(4)]
    pages += [generator.randbytes(8) * (PAGE_SIZE // 8) for _ in range(4)]
    return [*pages, bytes(PAGE_SIZE)]


def equally_compressed(pages: list[bytes]) -> list[bytes]:
    """Return the pages that both sides compress to the same size."""
    with both(PAGE_SIZE) as (kernel, zramd):

        def size(side: KernelZram | Zramd, page: bytes) -> int:
            side.write(0, page)
            return side.read_stat("mm_stat")[1]

        return [page for page in pages if size(kernel, page) == size(zramd, page)]


@dataclass
class History:
    """One random history, played on both sides step by step."""

    kernel: KernelZram
    zramd: Zramd
    pages: list[bytes]
    disk_pages: int
    generator: random.Random
    exact: bool
    comparisons: int = 0
    failures: int = 0
    largest: dict[str, float] = field(default_factory=lambda: dict.fromkeys(COLUMNS, 0.0))

    def play(self, steps: int) -> None:
        """Play, and compare after every few steps and at the end.

        Raises:
            DifferenceError: the sides differ.
        """
        for step in range(steps):
            done = self._step(step, steps)
            if step % COMPARE_EVERY == 0 or step == steps - 1:
                self._compare(f"step {step}, after {done}")
        for page in range(self.disk_pages):
            if self.kernel.read(page) != self.zramd.read(page):
                raise DifferenceError(f"page {page} reads differently at the end")

    def _step(self, step: int, steps: int) -> str:
        generator = self.generator
        choice = generator.random()
        # Mostly filling, then mostly emptying, over and over.
        filling = step * 8 // steps % 2 == 0
        page = generator.randrange(self.disk_pages)
        if choice < 0.004:
            self._set("compact", "1")
            return "compact"
        if choice < 0.006:
            self._set("mem_used_max", "0")
            return "mem_used_max 0"
        if self.exact and choice < 0.009:
            used = self.kernel.read_stat("mm_stat")[2]
            limit = generator.choice([0, 0, used, used + 64 * PAGE_SIZE, used // 2])
            self._set("mem_limit", str(limit))
            return f"mem_limit {limit}"
        if choice < (0.2 if filling else 0.6):
            count = min(generator.choice([1, 1, 2, 5, 64]), self.disk_pages - page)
            self.kernel.discard(page, count)
            self.zramd.discard(page, count)
            return f"discard of {count} pages from {page}"
        count = min(generator.choice([1] * 8 + [3, MOST_PAGES]), self.disk_pages - page)
        data = b"".join(generator.choices(self.pages, k=count))
        succeeded = self.kernel.write(page, data), self.zramd.write(page, data)
        if succeeded[0] != succeeded[1]:
            raise DifferenceError(
                f"step {step}, write of {count} pages to {page}: kernel, zramd succeeded: {succeeded}"
            )
        self.failures += not succeeded[0]
        return f"write of {count} pages to {page}"

    def _set(self, name: str, value: str) -> None:
        self.kernel.set(name, value)
        self.zramd.set(name, value)

    def _compare(self, when: str) -> None:
        self.comparisons += 1
        theirs, ours = self.kernel.read_stat("mm_stat"), self.zramd.read_stat("mm_stat")
        # Failed writes and discarded pages. The kernel also counts what it reads ahead, so reads are left out.
        io = [side.read_stat("io_stat") for side in (self.kernel, self.zramd)]
        if io[0][1:] != io[1][1:]:
            raise DifferenceError(f"{when}: io_stat of the kernel {io[0]}, of zramd {io[1]}")
        for name, their, our in zip(COLUMNS, theirs, ours, strict=True):
            # What a compaction frees is a part of what the pool used, and the differences of all of them add up.
            base = max(1, their, theirs[4] // PAGE_SIZE if name == "pages_compacted" else 0)
            difference = abs(our - their) / base
            self.largest[name] = max(self.largest[name], difference)
            if difference > (0 if self.exact else MOST_DIFFERENCE.get(name, 0)):
                raise DifferenceError(f"{when}: {name} differs\n  kernel {theirs}\n  zramd  {ours}")


def run(kind: str, seed: int, steps: int, disk_pages: int) -> None:
    """Play one history and report."""
    generator = random.Random(seed)  # noqa: S311 (a history to be played again)
    pages = file_pages(generator, 3000)
    if kind == "exact":
        pages = equally_compressed(synthetic_pages(generator) + pages[:300])
    started = time.monotonic()
    with both(disk_pages * PAGE_SIZE) as (kernel, zramd):
        history = History(kernel, zramd, pages, disk_pages, generator, kind == "exact")
        try:
            history.play(steps)
        except DifferenceError as error:
            raise DifferenceError(f"{kind}, seed {seed}: {error}") from error
        print(
            f"{kind}, seed {seed}: {steps} steps with {len(pages)} pages, {history.failures} writes failed on both, "
            f"{history.comparisons} comparisons, {time.monotonic() - started:.0f} s"
        )
        differing = {name: f"{100 * share:.4f} %" for name, share in history.largest.items() if share}
        print(f"  largest differences: {differing or 'none'}")
        print(f"  kernel {' '.join(map(str, kernel.read_stat('mm_stat')))}")
        print(f"  zramd  {' '.join(map(str, zramd.read_stat('mm_stat')))}", flush=True)


def main() -> int:
    """Run the comparison; return its exit status."""
    parser = argparse.ArgumentParser(prog="compare-kernel", description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--steps", type=int, default=40_000, help="of each history (default: %(default)s)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3], help="a history of each kind for each")
    parser.add_argument("--kinds", nargs="+", choices=["exact", "files"], default=["exact", "files"])
    parser.add_argument("--disk-pages", type=int, default=12_000, help="size of the disk (default: %(default)s)")
    options = parser.parse_args()
    if os.geteuid() != 0 or not CONTROL.exists():
        print("compare-kernel: needs root and kernel zram (modprobe zram)", file=sys.stderr)
        return 1
    try:
        for kind in options.kinds:
            for seed in options.seeds:
                run(kind, seed, options.steps, options.disk_pages)
    except (DifferenceError, StatusError, OSError, nbd.Error) as error:
        print(f"compare-kernel: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
