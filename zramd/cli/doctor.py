"""`zramd doctor`: what this machine lacks for a disk, and for swapping to it."""

import json

import click


@click.command()
@click.option("--json", "as_json", is_flag=True, help="A list of objects: name, verdict, text, remedy.")
def doctor(as_json: bool) -> None:
    """Tell whether this machine can swap to a disk of zramd, and what would make that safer or faster.

    It looks at the kernel, at what you may do (run it as whoever runs the server), at the machine's swap, at the
    configuration in /etc/zramd, and at memory beside the disks that are configured or served.
    Each finding has a line, and where there is something to do, one that says what. The status is 1 if there is a
    problem; advice is none.

    \b
    Example:
      zramd doctor
      zramd doctor --json | jq -r '.[] | select(.verdict == "problem") | .remedy'
    """
    from zramd.doctor import Machine, Verdict, examine

    findings = list(examine(Machine()))
    if as_json:
        facts = [
            {"name": found.name, "verdict": found.verdict.value, "text": found.text, "remedy": found.remedy}
            for found in findings
        ]
        click.echo(json.dumps(facts, indent=2))
    else:
        width = max(len(finding.name) for finding in findings)
        for finding in findings:
            click.echo(f"{finding.verdict.value:7}  {finding.name:{width}}  {finding.text}")
            if finding.remedy:
                click.echo(f"{'':{width + 11}}-> {finding.remedy}")
    if any(finding.verdict is Verdict.PROBLEM for finding in findings):
        raise click.exceptions.Exit(1)
