"""`zramd mount` and `umount`: a file system on an attached device, as the configuration says, and not any more."""

from pathlib import Path

import click

from zramd.attach import filesystem
from zramd.attach.attachment import AttachError, require_root
from zramd.cli.attach import DEVICE, attached_device
from zramd.cli.use import find_use, use_options


@click.command()
@click.argument("device", type=DEVICE, required=False)
@use_options
def mount(device: Path | None, disk: str | None, config: Path | None) -> None:
    """Mount DEVICE, by default the one that is attached, at the mount-point that the configuration has for the disk.

    Where there is nothing on it, a file system is made first (fs-type). What is there stays: another file system, swap
    or a partition table is an error. The directory is made if need be.

    \b
    Example:
      zramd mount
    """
    try:
        require_root()
        chosen = device or attached_device()
        found = find_use(chosen, disk, config)
        if not found.name:
            raise AttachError(
                "no configuration says where: write mount-point = ... into [zram0] of /etc/zramd/zramd.toml"
            )
        if found.use.mount_point is None:
            raise AttachError(f"{found.where} has no mount-point: write one, or swap to it (zramd swapon)")
        filesystem.mount(chosen, found.use.mount_point, found.use.fs_type, found.use.options)
        click.echo(found.use.mount_point)
    except AttachError as error:
        raise click.ClickException(str(error)) from error


@click.command()
@click.argument("device", type=DEVICE, required=False)
def umount(device: Path | None) -> None:
    """Unmount DEVICE, by default the one that is attached, wherever it is mounted. Refused while files are in use.

    \b
    Example:
      zramd umount && zramd detach /dev/nbd0
    """
    try:
        require_root()
        filesystem.unmount(device or attached_device())
    except AttachError as error:
        raise click.ClickException(str(error)) from error
