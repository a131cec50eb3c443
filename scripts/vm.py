"""Run zramd in virtual machines with Debian's kernels, which have what the host may not: nbd, and swap of their own."""

import os
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import click
from harness import ERRORS, Interrupt, messages
from vm_image import BUILD, KERNELS
from vm_machine import Guest, Outcome, require_programs, run_guest
from vm_scenarios import SCENARIOS, Expected, Scenario, server_for

LOGS = BUILD / "logs"
FILE = click.Path(exists=True, dir_okay=False, path_type=Path)


def run_scenario(scenario: Scenario, version: str, interrupt: Interrupt, echo: bool) -> Outcome:
    """Run a scenario with a kernel.

    Raises:
        StepError: the machine or the server on the host could not be started.
    """
    with tempfile.TemporaryDirectory(prefix="zramd-vm-") as name:
        directory = Path(name)
        with server_for(scenario) as server:
            port = {"PORT": str(server.port)} if server else {}
            guest = replace(scenario.guest(version, directory / "settings", **port), echo=echo)
            return run_guest(guest, LOGS / f"{guest.name}.log", interrupt, server.hear if server else None)


def is_as_expected(scenario: Scenario, outcome: Outcome) -> bool:
    """Tell whether a scenario showed what it is to show."""
    passed = outcome.verdict == "pass" and not outcome.end
    return scenario.expected is Expected.EITHER or passed == (scenario.expected is Expected.NOTHING_LOST)


def row(scenario: Scenario, version: str, outcome: Outcome) -> str:
    """Return the line of the table for an outcome."""
    if outcome.end:
        verdict, text = ("frozen" if outcome.is_frozen else "ended"), outcome.end
    else:
        verdict, text = outcome.verdict or "none", outcome.text
    if outcome.longest:
        text += f", longest wait {outcome.longest:.1f} s"
    if scenario.expected is Expected.DANGER and is_as_expected(scenario, outcome):
        text += " (shows the danger)"
    mark = " " if is_as_expected(scenario, outcome) else "!"
    return f"{mark} {scenario.name:13} {version:5} {verdict:7} {outcome.seconds:5.0f} s  {text}"


def chosen(names: tuple[str, ...], everything: bool, kernel: str | None) -> Iterator[tuple[Scenario, str]]:
    """Yield the scenarios that are asked for, with their kernels.

    Raises:
        click.UsageError: there is none of that name, or no name.
    """
    known = {scenario.name: scenario for scenario in SCENARIOS}
    if unknown := [name for name in names if name not in known]:
        raise click.UsageError(f"no scenario {', '.join(unknown)}: scripts/vm --list tells those there are")
    if not names and not everything:
        raise click.UsageError("name scenarios, or --all, --list or --script FILE")
    for scenario in SCENARIOS if everything else [known[name] for name in names]:
        for version in [kernel] if kernel else scenario.kernels:
            yield scenario, version


def run_scenarios(wanted: list[tuple[Scenario, str]], interrupt: Interrupt, echo: bool) -> bool:
    """Run scenarios, print a line for each, and tell whether all showed what they are to show."""
    good = True
    for scenario, version in wanted:
        outcome = run_scenario(scenario, version, interrupt, echo)
        click.echo(row(scenario, version, outcome))
        good = good and is_as_expected(scenario, outcome)
    click.echo(f"The consoles are in {LOGS}.")
    return good


def run_script(guest: Guest, interrupt: Interrupt) -> int:
    """Run a script in a guest, and return its status, 1 if it did not end."""
    outcome = run_guest(guest, LOGS / f"{guest.name}.log", interrupt)
    if outcome.end:
        click.echo(f"vm: {outcome.end}; see {outcome.log}", err=True)
    return 1 if outcome.end or outcome.status is None else outcome.status


@click.command()
@click.argument("names", nargs=-1, metavar="[SCENARIO]...")
@click.option("--all", "everything", is_flag=True, help="Run all scenarios.")
@click.option("--list", "listing", is_flag=True, help="List the scenarios.")
@click.option("--script", type=FILE, help="Run this in a guest, by bash, instead.")
@click.option("--file", "files", multiple=True, type=FILE, help="A file that the script finds in /guest.")
@click.option("--kernel", type=click.Choice(list(KERNELS)), help="Default: the scenario's, or 6.1.")
@click.option("--memory", default=512, show_default=True, help="Of a script's guest, in MiB.")
@click.option("--cpus", default=2, show_default=True, help="Of a script's guest.")
@click.option("--append", default="", help="More words for the kernel's command line of a script's guest.")
@click.option("--limit", default=300.0, show_default=True, help="Seconds until a script's guest is ended.")
@click.option("--silence", default=120.0, show_default=True, help="Seconds without a line, until it counts as frozen.")
@click.option("--show", is_flag=True, help="Show the console of each scenario.")
def main(
    names: tuple[str, ...],
    everything: bool,
    listing: bool,
    script: Path | None,
    files: tuple[Path, ...],
    kernel: str | None,
    memory: int,
    cpus: int,
    append: str,
    limit: float,
    silence: float,
    show: bool,
) -> None:
    """Run zramd in virtual machines with Debian's kernels.

    A scenario is marked with ! if it did not show what it is to show, and the status is 1 then.

    \b
    Example:
      scripts/vm d
      scripts/vm --script FILE --kernel 6.12 --memory 420
    """
    if listing:
        for scenario in SCENARIOS:
            click.echo(
                f"{scenario.name:13} {', '.join(scenario.kernels):9} {scenario.about}: {scenario.expected.value}"
            )
        return
    interrupt = Interrupt()
    interrupt.listen()
    os.nice(5)
    try:
        require_programs()
        if script:
            version = kernel or "6.1"
            guest = Guest(f"{script.stem}-{version}", version, memory, script, cpus, echo=True, append=append)
            extra = {path.name: path for path in files}
            sys.exit(run_script(replace(guest, files=extra, limit=limit, silence=silence), interrupt))
        good = run_scenarios(list(chosen(names, everything, kernel)), interrupt, show)
    except ERRORS as error:
        for line in messages(error):
            click.echo(f"vm: {line}", err=True)
        sys.exit(1)
    sys.exit(0 if good else 1)


if __name__ == "__main__":
    main()
