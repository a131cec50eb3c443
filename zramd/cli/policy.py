"""`zramd policy`: what the policy of a running server does, and would do."""

from pathlib import Path

import click

from zramd.cli.options import admin_option
from zramd.cli.progress import do_work
from zramd.cli.stat import disk_socket, request
from zramd.paths import ADMIN_SUFFIX


@click.command()
@click.option("--explain", "mode", flag_value="explain", help="Count pages now, and say what it would do, and why.")
@click.option("--on", "mode", flag_value="on", help="Let it act from now on.")
@click.option("--dry-run", "mode", flag_value="dry-run", help="Let it decide and log that from now on, but do nothing.")
@click.option("--off", "mode", flag_value="off", help="Let it rest from now on.")
@admin_option
def policy(mode: str | None, socket: Path | None) -> None:
    """Say what the policy of a disk decided last: whether to recompress or write back pages, or neither, and why.

    Its rules are the table [zram0.policy] of the configuration: how long pages are to be untouched, watermarks on
    memory, a daily budget for writes, and when it is to be quiet.

    \b
    Example:
      zramd policy --explain
      zramd policy --on
    """
    path = disk_socket(socket, ADMIN_SUFFIX)
    if mode == "explain":
        click.echo(do_work(path, "policy explain", "survey"), nl=False)
    else:
        click.echo(request(path, f"policy {mode}" if mode else "policy"), nl=False)
