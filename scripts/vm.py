"""Run zramd in virtual machines with Debian's kernels, which have what the host may not: nbd, and swap of their own."""

import os
import sys
from pathlib import Path

import click
from harness import ERRORS, Interrupt, messages
from vm_image import BUILD, KERNELS
from vm_machine import Guest, require_programs, run_guest

LOGS = BUILD / "logs"
FILE = click.Path(exists=True, dir_okay=False, path_type=Path)


@click.command()
@click.option("--script", type=FILE, required=True, help="Run this in the guest, by bash, and show the console.")
@click.option("--file", "files", multiple=True, type=FILE, help="A file the script finds in /guest.")
@click.option("--kernel", type=click.Choice(list(KERNELS)), default="6.1", show_default=True)
@click.option("--memory", default=512, show_default=True, help="Of the guest, in MiB.")
@click.option("--cpus", default=2, show_default=True, help="Of the guest.")
@click.option("--append", default="", help="More words for the kernel's command line.")
@click.option("--limit", default=300.0, show_default=True, help="Seconds until the guest is ended.")
@click.option("--silence", default=120.0, show_default=True, help="Seconds without a line, until it counts as frozen.")
@click.option("--systemd", is_flag=True, help="Boot systemd; the script does not run.")
def main(
    script: Path,
    files: tuple[Path, ...],
    kernel: str,
    memory: int,
    cpus: int,
    append: str,
    limit: float,
    silence: float,
    systemd: bool,
) -> None:
    """Run zramd in virtual machines with Debian's kernels."""
    interrupt = Interrupt()
    interrupt.listen()
    os.nice(5)
    guest = Guest(
        script.stem,
        kernel,
        memory,
        script,
        cpus,
        systemd,
        {path.name: path for path in files},
        append,
        limit,
        silence,
        echo=True,
    )
    try:
        require_programs()
        outcome = run_guest(guest, LOGS / f"{guest.name}-{kernel}.log", interrupt)
    except ERRORS as error:
        for line in messages(error):
            click.echo(f"vm: {line}", err=True)
        sys.exit(1)
    if outcome.end:
        click.echo(f"vm: {outcome.end}; see {outcome.log}", err=True)
    sys.exit(1 if outcome.end or outcome.status is None else outcome.status)


if __name__ == "__main__":
    main()
