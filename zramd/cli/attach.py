"""`zramd attach` and `detach`: an export as a block device, and not any more."""

import json
import os
from pathlib import Path

import click

from zramd.attach.attachment import AttachError, require_root
from zramd.attach.kernel import NbdDevice, attached_nbd_devices
from zramd.attach.loop import LoopDevice, attached_loop_devices
from zramd.attach.module import load_nbd
from zramd.attach.order import DEFAULT_DEAD_SECONDS, DEFAULT_IO_TIMEOUT_MS, MAX_CONNECTIONS, Order
from zramd.attach.process import command
from zramd.attach.sysfs import BlockDevice
from zramd.cli.options import Parsed, status_option
from zramd.cli.stat import disk_socket, request
from zramd.log import start_log
from zramd.nbd.client import Address
from zramd.nbd.uri import UriError, parse_uri
from zramd.paths import STATUS_SUFFIX, make_runtime_directory, runtime_directory

NBD_ONLY = ("device", "connections", "dead_timeout", "io_timeout", "swap", "foreground")
"""What there is to choose when the kernel's NBD client attaches; nbdfuse chooses for itself."""


def device_name(value: str) -> Path:
    """Return the path of a block device.

    Raises:
        ValueError: it is the name of none that zramd attaches.
    """
    path = Path(value)
    kind = path.name.rstrip("0123456789")
    if path.parent != Path("/dev") or kind not in ("nbd", "loop") or kind == path.name:
        raise ValueError(f"{value!r} is not the name of a device such as /dev/nbd0 or /dev/loop0")
    return path


DEVICE = Parsed("device", device_name)


def attached_device() -> Path:
    """Return the one device that is attached."""
    attached = [*attached_nbd_devices(), *attached_loop_devices()]
    if len(attached) != 1:
        there_are = f"there are {' '.join(map(str, attached))}" if attached else "none is attached: zramd attach"
        raise click.ClickException(f"which device? {there_are}")
    return attached[0]


@click.command()
@click.argument("device", type=DEVICE, required=False)
@click.option("--uri", help="NBD URI of the export: nbd+unix:///NAME?socket=PATH or nbd://HOST:PORT/NAME.")
@status_option
@click.option(
    "--connections", type=click.IntRange(1, MAX_CONNECTIONS), default=1, show_default=True, help="To the server."
)
@click.option(
    "--dead-timeout",
    type=click.IntRange(1, 1 << 31),
    default=DEFAULT_DEAD_SECONDS,
    show_default=True,
    help="Seconds that reads and writes wait for a server that has died, before they fail.",
)
@click.option(
    "--io-timeout",
    type=click.IntRange(100, 1 << 31),
    default=DEFAULT_IO_TIMEOUT_MS,
    show_default=True,
    help="Milliseconds until what was in flight is sent again to a server that has come back.",
)
@click.option(
    "--swap/--no-swap",
    default=True,
    help="Protect the keeper against memory pressure, which swap needs, as far as it may. Default: --swap.",
)
@click.option("--foreground", is_flag=True, help="Stay there, for systemd.")
@click.option("--fuse", is_flag=True, help="Use nbdfuse and a loop device instead, which do not survive the server.")
@click.pass_context
def attach(
    context: click.Context,
    device: Path | None,
    uri: str | None,
    socket: Path | None,
    connections: int,
    dead_timeout: int,
    io_timeout: int,
    swap: bool,
    foreground: bool,
    fuse: bool,
) -> None:
    """Make an export a block device: DEVICE, or the first /dev/nbdN that is free. Prints its path.

    By default it is the one disk that is served on this machine. A keeper stays in the background and connects the
    device again when the server has been away; until then, reads and writes wait. A device that is attached already
    and has lost its keeper gets a new one.

    \b
    Example:
      zramd attach
      mkfs.ext4 "$(zramd attach /dev/nbd1 --uri 'nbd+unix:///zram1?socket=/run/zramd/zram0.nbd')"
    """
    start_log()
    if uri is not None and socket is not None:
        raise click.UsageError("--uri and --status exclude each other")
    try:
        require_root()
        if fuse:
            _refuse_nbd_options(context)
            click.echo(LoopDevice.attach(uri or _served(socket)[0], make_runtime_directory()).path)
            return
        if device is not None and not device.name.startswith("nbd"):
            raise click.UsageError(f"{device} is no NBD device; --fuse takes the loop device that is free")
        addresses, name = _find_export(uri, socket, device)
        load_nbd()
        order = Order(
            addresses,
            name,
            device.name if device else "",
            connections=connections,
            dead_seconds=dead_timeout,
            io_timeout=io_timeout,
            swap=swap,
            foreground=foreground,
            runtime=str(make_runtime_directory()),
        )
        if foreground:
            program = command(order)
            os.execv(program[0], program)  # noqa: S606 (a fixed list)
        click.echo(NbdDevice.attach(order).path)
    except (AttachError, UriError) as error:
        raise click.ClickException(str(error)) from error
    except OSError as error:
        raise click.ClickException(str(error)) from error


def _refuse_nbd_options(context: click.Context) -> None:
    for name in NBD_ONLY:
        if context.get_parameter_source(name) is click.core.ParameterSource.COMMANDLINE:
            shown = "DEVICE" if name == "device" else f"--{name.replace('_', '-')}"
            raise click.UsageError(f"{shown} and --fuse exclude each other")


def _find_export(uri: str | None, socket: Path | None, device: Path | None) -> tuple[list[Address], str]:
    """Return the addresses of a server, and the name of its export."""
    if uri is None and device is not None and BlockDevice(device.name).read("backend"):
        # It has lost its keeper; its server may be away too.
        before = Order.load(str(runtime_directory()), device.name)
        if before is not None:
            return before.addresses, before.name
    if uri is not None:
        return parse_uri(uri)
    uri, name = _served(socket)
    # By its own name the default export, too: `swapon` and `mount` look in the configuration for that.
    return parse_uri(uri)[0], name


def _served(socket: Path | None) -> tuple[str, str]:
    """Return where the disk of a status socket is served, or the one disk that there is, and its name."""
    path = disk_socket(socket, STATUS_SUFFIX)
    facts = json.loads(request(path, "json"))
    if not facts["uris"]:
        raise click.ClickException(f"the server at {path} does not tell where it serves: give --uri")
    if not facts["initstate"]:
        raise click.ClickException(
            f"{facts['name']} has no size, and serves nobody: zramd set --admin {facts['admin']} disksize=SIZE"
        )
    return min(facts["uris"], key=lambda uri: not uri.startswith("nbd+unix:")), facts["name"]


@click.command()
@click.argument("device", type=DEVICE)
def detach(device: Path) -> None:
    """Undo an attach. Refused while DEVICE is mounted or swapped to.

    \b
    Example:
      zramd detach /dev/nbd0
    """
    try:
        require_root()
        if not device.exists():
            raise AttachError(f"there is no {device}")
        if device.name.startswith("loop"):
            LoopDevice.of(device).detach()
        else:
            NbdDevice(device).detach()
    except AttachError as error:
        raise click.ClickException(str(error)) from error
