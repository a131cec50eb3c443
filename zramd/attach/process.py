"""The keeper's process: how it is started, its signals, and its place in the background.

    SIGTERM, SIGINT   disconnect the device and end; refused while somebody uses it
    SIGHUP            upgrade: become the program that is installed now, which takes the device over

It runs without site-packages, of which it needs nothing: to look for them would take a quarter of its memory.
"""

import os
import select
import signal
import sys
from collections.abc import Callable
from contextlib import suppress

from zramd.attach.keeper import Keeper, KeeperError, prepare
from zramd.attach.netlink import NbdFamily, NetlinkError
from zramd.attach.order import Order
from zramd.notify import notify

MAX_LOG = 256 << 10
"""Bytes. In the background the log lies in memory: it starts anew when it has so many."""

_STOP = (signal.SIGTERM, signal.SIGINT)
_SIGNALS = (*_STOP, signal.SIGHUP, signal.SIGCHLD)


def command(order: Order) -> list[str]:
    """Return the command that runs a keeper. It prints the device's path once it is attached."""
    return [*_python("from zramd.attach.process import main; main()"), *order.words()]


def _python(code: str) -> list[str]:
    packages = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
    return [sys.executable, "-I", "-S", "-c", f"import sys; sys.path.append({packages!r}); {code}"]


def main() -> None:
    """Attach a device and keep it; the arguments are the words of an order."""
    process = _Process(Order.parse(sys.argv[1:]))
    try:
        status = process.run()
    except KeeperError as error:
        process.write(f"Error: {error}")
        status = 1
    except OSError as error:
        process.write(f"Error: {error.strerror or error}")
        status = 1
    sys.exit(status)


def _open_family() -> NbdFamily:
    try:
        return NbdFamily.open()
    except NetlinkError as error:
        raise KeeperError(f"the kernel has no NBD client ({error.strerror}): modprobe nbd") from error


class _Process:
    """A keeper, and what goes on around it."""

    def __init__(self, order: Order) -> None:
        self._order = order
        self._child = 0
        self._when_done: Callable[[int], None] = self._announce
        self._is_upgrading = False
        self._log = -1
        self._wakeups, wake = os.pipe()
        for end in self._wakeups, wake:
            os.set_blocking(end, False)
        for number in _SIGNALS:
            signal.signal(number, lambda *_: None)
        signal.set_wakeup_fd(wake, warn_on_full_buffer=False)
        with open("/proc/self/comm", "w") as comm:
            comm.write("zramd-keeper")
        # Whoever it was before an exec has blocked them.
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)

    def run(self) -> int:
        """Attach, and keep until it is over. Return the exit status.

        Raises:
            KeeperError, OSError: it cannot be attached.
        """
        order = self._order
        keeper = Keeper.attach(_open_family(), order, self.say)
        pid_file = keeper.take_pid_file(order.runtime)
        order.device = keeper.device.name
        order.save()
        if keeper.payload:
            self._start(lambda: prepare(keeper.device, order.io_timeout, keeper.payload, self.say), self._announce)
        else:
            self._announce(0)
        if order.swap:
            self._protect()
        try:
            return keeper.keep(self._wakeups, lambda: self._woken(keeper))
        finally:
            if not keeper.is_attached():
                order.forget()
            pid_file.remove()

    def say(self, text: str) -> None:
        """Write a line to the log, and tell systemd, if it has started this."""
        self.write(f"zramd: {text}")
        notify(f"STATUS={text}")

    def write(self, line: str) -> None:
        """Write a line to standard error, unless that would have to wait for whoever reads it."""
        log = select.poll()
        log.register(2, select.POLLOUT)
        # Where it fails, there is nowhere left to say it.
        with suppress(OSError):
            if self._log >= 0 and os.fstat(self._log).st_size > MAX_LOG:
                os.ftruncate(self._log, 0)
            if log.poll(0):
                os.write(2, f"{line}\n".encode())

    def _protect(self) -> None:
        """Keep memory reclaim, which may wait for this process, from being what it waits for."""
        # Where nobody swaps, it is not even to be loaded.
        from zramd.reclaim import protect

        missing = [f"{measure.name} ({measure.missing})" for measure in protect(0) if not measure.in_force]
        if missing and self._order.foreground:
            self.say(f"not protected against memory pressure: {', '.join(missing)}")

    def _woken(self, keeper: Keeper) -> int | None:
        """Do what signals ask for; return a status to end."""
        for number in self._signals():
            if number == signal.SIGHUP:
                self._is_upgrading = True
            elif number in _STOP and keeper.leave():
                return 0
        if self._child:
            done, status = os.waitpid(self._child, os.WNOHANG)
            if done:
                self._child = 0
                self._when_done(os.waitstatus_to_exitcode(status))
        elif self._is_upgrading and keeper.is_whole():
            # A program that does not come up would leave the device without a keeper.
            check = _python("import zramd.attach.process")
            self._start(lambda: os.execv(check[0], check), self._upgrade)  # noqa: S606 (a fixed list)
        return None

    def _signals(self) -> bytes:
        try:
            return os.read(self._wakeups, 64)
        except BlockingIOError:
            return b""

    def _start(self, work: Callable[[], None], when_done: Callable[[int], None]) -> None:
        """Work in another process: what waits for the device must not wait in this one."""
        self._when_done = when_done
        self._child = os.fork()
        if self._child:
            return
        status = 1
        try:
            signal.set_wakeup_fd(-1)
            work()
            status = 0
        except OSError as error:
            self.say(f"/dev/{self._order.device}: {error.strerror}")
        finally:
            os._exit(status)

    def _announce(self, _: int) -> None:
        """Tell that the device is there, and go into the background unless that is not wanted."""
        order = self._order
        # Whoever waited for it may have ended, which is no reason to let the device down.
        with suppress(BrokenPipeError):
            os.write(1, f"/dev/{order.device}\n".encode())
        notify("READY=1", f"STATUS=keeping /dev/{order.device} attached")
        if order.foreground:
            return
        os.chdir("/")
        nothing = os.open(os.devnull, os.O_RDWR)
        os.dup2(nothing, 0)
        os.dup2(nothing, 1)
        self._log = os.open(os.path.join(order.runtime, f"{order.device}.log"), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(self._log, 2)

    def _upgrade(self, status: int) -> None:
        self._is_upgrading = False
        if status:
            self.say("no upgrade: the program that is installed now does not start")
            return
        signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
        program = command(self._order)
        os.execv(program[0], program)  # noqa: S606 (a fixed list)
