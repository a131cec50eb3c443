"""`zramd version`: which zramd this is, and what it is made up of."""

import platform

import click

from zramd import __version__


@click.command()
@click.option("-v", "--verbose", is_flag=True, help="Also the engine that runs the hot path, and the libraries.")
def version(verbose: bool) -> None:
    """Print the version.

    ZRAMD_ENGINE=python or native chooses the engine; without it, the compiled one runs if it was built.

    \b
    Example:
      zramd version -v
    """
    text = f"zramd {__version__}"
    if verbose:
        from zramd.device.codecs import describe
        from zramd.device.wanted import DEFAULT_ALGORITHM
        from zramd.native import EngineError
        from zramd.native import describe as describe_engine

        try:
            text += f"\nengine  {describe_engine()}\npython  {platform.python_version()}\n"
            text += describe(DEFAULT_ALGORITHM).rstrip()
        except EngineError as error:
            raise click.ClickException(str(error)) from error
    click.echo(text)
