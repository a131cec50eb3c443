"""A virtual machine that runs one script: QEMU without hardware virtualisation, its console read line by line."""

import contextlib
import json
import os
import re
import select
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self

from harness import Interrupt, StepError
from vm_image import debian_disk, initramfs, kernel, make_payload

PANIC = re.compile(rb"Kernel panic - not syncing: (.*)")
EXIT = re.compile(rb"^EXIT (\d+)$")
HOG = re.compile(rb"^hog: .* longest wait ([\d.]+) s$")
VERDICT = re.compile(rb"^VERDICT (pass|fail) (.*)$")
WATCH = b"watch: "
"""Lines that begin so say how the machine is, not that anything got done."""
LOOK_SECONDS = 0.2
DUMP_QUIET_SECONDS, DUMP_SECONDS = 4.0, 90.0
END_SECONDS = 20.0


@dataclass(frozen=True, slots=True)
class Guest:
    """What a machine is like, and what it does.

    Attributes:
        version: of the kernel, one of vm_image.KERNELS.
        memory: in MiB.
        script: run by bash as root, with /guest in PATH.
        systemd: whether systemd is the first process; something that it starts has to run the script.
        files: more files for /guest, by their names there.
        append: more words for the kernel's command line.
        limit: seconds until it is ended.
        silence: seconds without a line on the console after which it counts as frozen.
        echo: whether its console is shown.
    """

    name: str
    version: str
    memory: int
    script: Path
    cpus: int = 2
    systemd: bool = False
    files: dict[str, Path] = field(default_factory=dict)
    append: str = ""
    limit: float = 300
    silence: float = 300
    echo: bool = False


@dataclass(slots=True)
class Outcome:
    """How a run ended.

    Attributes:
        verdict: what the guest said, "pass" or "fail"; "" if it said nothing.
        end: why it ended, "" if it switched itself off.
        is_frozen: whether that was because nothing happened any more.
        status: of the script, None if it did not end.
        longest: seconds that hog waited for a page.
    """

    verdict: str = ""
    text: str = ""
    end: str = ""
    is_frozen: bool = False
    status: int | None = None
    longest: float = 0
    seconds: float = 0
    log: Path = Path()


class Machine:
    """QEMU, its console and its monitor."""

    def __init__(self, guest: Guest, directory: Path, log: Path) -> None:
        chosen = kernel(guest.version)
        payload = make_payload(directory, chosen, {"script": guest.script, **guest.files})
        self._monitor = directory / "monitor"
        self._log = log.open("wb")
        self._echo = guest.echo
        self._started = time.monotonic()
        self._pending = b""
        init = "/sbin/init" if guest.systemd else "/guest/init"
        words = (
            "console=ttyS0 loglevel=6 panic=-1 mitigations=off sysrq_always_enabled log_buf_len=4M rootfstype=ramfs "
            f"net.ifnames=0 random.trust_cpu=1 guest.init={init} {guest.append}"
        )
        command = ["qemu-system-x86_64", "-accel", "tcg,thread=multi", "-nodefaults", "-display", "none", "-no-reboot"]
        command += ["-m", str(guest.memory), "-smp", str(guest.cpus)]
        command += ["-kernel", str(chosen.image), "-initrd", str(initramfs(chosen)), "-append", words]
        command += ["-chardev", "stdio,id=console,signal=off", "-serial", "chardev:console"]
        command += ["-qmp", f"unix:{self._monitor},server=on,wait=off"]
        for disk in (debian_disk(), payload):
            command += ["-drive", f"file={disk},format=raw,if=virtio,snapshot=on"]
        command += ["-nic", "user,model=virtio-net-pci", "-device", "virtio-rng-pci"]
        guest_in, self._console_in = os.pipe()
        self._console_out, guest_out = os.pipe()
        # A session of its own: Ctrl-C is for us to hear, and to end it in order.
        self._process = subprocess.Popen(
            command, stdin=guest_in, stdout=guest_out, stderr=guest_out, start_new_session=True
        )
        os.close(guest_in)
        os.close(guest_out)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._process.poll() is None:
            self._process.kill()
        self._process.wait()
        os.close(self._console_in)
        os.close(self._console_out)
        self._log.close()

    @property
    def seconds(self) -> float:
        """Seconds since the start."""
        return time.monotonic() - self._started

    def lines(self, seconds: float) -> list[bytes] | None:
        """Return the lines that came, waiting at most so long for the first; None once the machine is off."""
        if not select.select([self._console_out], [], [], seconds)[0]:
            return []
        read = os.read(self._console_out, 1 << 16)
        if not read:
            return None
        *lines, self._pending = (self._pending + read).replace(b"\r", b"").split(b"\n")
        for line in lines:
            entry = f"{self.seconds:7.1f} ".encode() + line + b"\n"
            self._log.write(entry)
            if self._echo:
                os.write(1, entry)
        self._log.flush()
        return lines

    def note(self, text: str) -> None:
        """Write a line of our own into the log."""
        self._log.write(f"{self.seconds:7.1f} HOST {text}\n".encode())
        self._log.flush()

    def monitor(self, line: str) -> None:
        """Give a command to QEMU's monitor.

        Raises:
            OSError: QEMU has ended.
        """
        with socket.socket(socket.AF_UNIX) as connection:
            connection.settimeout(END_SECONDS)
            connection.connect(str(self._monitor))
            with connection.makefile("rwb", buffering=0) as stream:
                stream.readline()
                for request in (
                    {"execute": "qmp_capabilities"},
                    {"execute": "human-monitor-command", "arguments": {"command-line": line}},
                ):
                    stream.write(json.dumps(request).encode() + b"\n")
                    while b'"return"' not in (answer := stream.readline()):
                        if b'"error"' in answer or not answer:
                            raise OSError(f"QEMU's monitor refused {line}: {answer.decode()}")

    def dump(self) -> None:
        """Let the kernel print its tasks and its memory on the console, which works when no process gets to run."""
        for key in b"8wmlt":
            self.note(f"sysrq {chr(key)}")
            self.monitor("chardev-send-break console")
            os.write(self._console_in, bytes([key]))
            last = began = time.monotonic()
            while time.monotonic() - last < DUMP_QUIET_SECONDS and time.monotonic() - began < DUMP_SECONDS:
                lines = self.lines(LOOK_SECONDS)
                if lines is None:
                    return
                if lines:
                    last = time.monotonic()


def run_guest(guest: Guest, log: Path, interrupt: Interrupt, on_line: Callable[[str], None] | None = None) -> Outcome:
    """Boot a machine, hand each line of its console on, and return how it ended.

    Raises:
        InterruptError: a signal came; the machine is off.
        StepError: there is no machine to boot.
    """
    outcome = Outcome(log=log)
    log.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="zramd-vm-") as name, Machine(guest, Path(name), log) as machine:
        heard = 0.0
        while True:
            interrupt.check()
            lines = machine.lines(LOOK_SECONDS)
            if lines is None:
                break
            for line in lines:
                if not line.startswith(WATCH):
                    heard = machine.seconds
                if found := VERDICT.match(line):
                    outcome.verdict, outcome.text = (part.decode(errors="replace") for part in found.groups())
                elif found := HOG.match(line):
                    outcome.longest = float(found[1])
                elif found := EXIT.match(line):
                    outcome.status = int(found[1])
                elif found := PANIC.search(line):
                    outcome.end = f"panic: {found[1].decode(errors='replace')}"
                if on_line:
                    on_line(line.decode(errors="replace"))
            if machine.seconds > guest.limit:
                outcome.end = f"not done after {guest.limit:.0f} s"
            elif machine.seconds - heard > guest.silence:
                outcome.end = f"nothing got done for {guest.silence:.0f} s"
                outcome.is_frozen = True
            else:
                continue
            if outcome.status is None:
                with contextlib.suppress(OSError):
                    machine.dump()
            break
        outcome.seconds = machine.seconds
    return outcome


def require_programs() -> None:
    """Check that what makes and boots a machine is there.

    Raises:
        StepError: it is not; the message says how to get it.
    """
    if os.geteuid():
        raise StepError("root is needed to make the guest's disk: sudo scripts/vm")
    missing = [
        name for name in ("qemu-system-x86_64", "debootstrap", "busybox", "cpio", "depmod") if not shutil.which(name)
    ]
    if missing:
        raise StepError(f"there is no {', '.join(missing)}: scripts/vm installs it")
