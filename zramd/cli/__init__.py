"""The `zramd` command: one module for each group of verbs."""

import click

from zramd import __version__
from zramd.cli.serve import serve
from zramd.cli.stat import set_attributes, stat, status


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, "-V", "--version", message="zramd %(version)s")
def main() -> None:
    r"""Serve a compressed block device in memory over NBD: a userspace zram.

    \b
    Start one and look at it:
      zramd serve --size 4G --algorithm zstd
      zramd status
    """


main.add_command(serve)
main.add_command(status)
main.add_command(stat)
main.add_command(set_attributes)
