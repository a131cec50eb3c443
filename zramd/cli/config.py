"""`zramd config`: whether a configuration is right, and what is in effect."""

from pathlib import Path

import click

from zramd.cli.options import describe


@click.command()
@click.argument("action", type=click.Choice(["check", "show"]))
@click.argument("file", type=click.Path(path_type=Path), required=False)
@click.option(
    "--root",
    type=click.Path(path_type=Path, file_okay=False, exists=True),
    default=Path("/"),
    help="Directory in which etc/, run/, usr/ and proc/meminfo of the machine are.",
)
def config(action: str, file: Path | None, root: Path) -> None:
    """Check a configuration, or show what is in effect. FILE is by default /etc/zramd/zramd.toml.

    check tells the disks and what is unwise, or what is wrong with the exit status 1. show prints a file that says the
    same with every key, and after each what an expression comes to in bytes, and where it is from. Drop-ins
    (FILE.d/*.toml) are merged in both.

    \b
    Example:
      zramd config check
      zramd config show /etc/zramd/zram0.toml
    """
    from zramd.config import ConfigError, Configuration, find
    from zramd.config.show import summary, toml, unwise
    from zramd.expressions import total_memory

    path = file or find(root=root)
    if path is None:
        where = root / "etc/zramd/zramd.toml"
        raise click.ClickException(f"there is no {where}: name a FILE, or write it (configs/ has examples)")
    try:
        found = Configuration.read(path, root=root)
        said = "\n".join(toml(found)) if action == "show" else summary(found)
        warnings = [] if action == "show" else list(unwise(found, total_memory(root)))
    except (ConfigError, ValueError) as error:
        raise click.ClickException(str(error)) from error
    except OSError as error:
        raise click.ClickException(describe(error)) from error
    for line in warnings:
        click.echo(f"Warning: {path}: {line}", err=True)
    click.echo(said)
