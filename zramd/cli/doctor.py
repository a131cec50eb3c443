"""`zramd doctor`: what this machine lacks for swapping to a disk."""

import click

from zramd.doctor import Verdict, examine


@click.command()
def doctor() -> None:
    """Tell whether this machine can swap to a disk of zramd, and what would make that safer or faster.

    A line for each thing that was looked at, with what to do about it. The status is 1 if there is a problem; advice is
    none.

    \b
    Example:
      zramd doctor
    """
    try:
        findings = list(examine())
    except OSError as error:
        raise click.ClickException(str(error)) from error
    width = max(len(finding.name) for finding in findings)
    for finding in findings:
        remedy = f": {finding.remedy}" if finding.remedy else ""
        click.echo(f"{finding.verdict.value:8} {finding.name:{width}}  {finding.text}{remedy}")
    if any(finding.verdict is Verdict.PROBLEM for finding in findings):
        raise click.exceptions.Exit(1)
