"""What the configuration says that a disk's block device is for: options that say which disk, and the search for it."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import click

from zramd.attach.attachment import AttachError
from zramd.attach.order import Order
from zramd.cli.options import describe
from zramd.paths import runtime_directory
from zramd.use import DEFAULT_USE, Use

Command = TypeVar("Command", bound=Callable[..., Any])


@dataclass(frozen=True, slots=True)
class Found:
    """What a disk is for, and for errors, where that is written; `name` is "" where no file tells."""

    use: Use = DEFAULT_USE
    name: str = ""
    path: Path | None = None

    @property
    def where(self) -> str:
        """The table and the file."""
        return f"[{self.name}] of {self.path}"


def use_options(command: Command) -> Command:
    """Add --disk and --config to a verb that makes something of a block device."""
    disk = click.option("--disk", help="Name of the disk in the configuration. Default: as DEVICE was attached.")
    config = click.option(
        "--config",
        type=click.Path(path_type=Path),
        help="Default: what a server of this disk reads: /etc/zramd/NAME.toml, or /etc/zramd/zramd.toml.",
    )
    return disk(config(command))


def find_use(device: Path, disk: str | None, config: Path | None) -> Found:
    """Return what a device is for by the configuration, or the defaults if that does not tell.

    Raises:
        AttachError: the configuration cannot be used, or does not say which disk it is.
    """
    from zramd.config import ConfigError, find, load  # most of the server

    name = disk or _export(device)
    try:
        path = config or (find(f"{name}.toml") if name else None) or find()
        if path is None:
            return Found()
        disks = {each.name: each for each in load(path).disks}
    except ConfigError as error:
        raise AttachError(str(error)) from error
    except OSError as error:
        raise AttachError(describe(error)) from error
    if not name and len(disks) > 1:
        raise AttachError(f"which disk of {path} is {device}? Say --disk, one of {', '.join(disks)}")
    name = name or next(iter(disks), "")
    if name not in disks:
        if disk or config:
            raise AttachError(f"{path} has no disk {name} for this machine: add a table [{name}]")
        return Found()
    return Found(disks[name].use, name, path)


def _export(device: Path) -> str:
    """Return the name of the export that a device was made of, "" if that is the default one, or is not known."""
    try:
        order = Order.load(str(runtime_directory()), device.name)
    except OSError:
        return ""
    return order.name if order else ""
