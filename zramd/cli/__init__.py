"""The `zramd` command: one module for each group of verbs."""

import importlib

import click

from zramd import __version__

_VERBS = {
    "serve": "zramd.cli.serve:serve",
    "status": "zramd.cli.stat:status",
    "stat": "zramd.cli.stat:stat",
    "set": "zramd.cli.control:set_attributes",
    "compact": "zramd.cli.control:compact",
    "idle": "zramd.cli.work:idle",
    "recompress": "zramd.cli.work:recompress",
    "writeback": "zramd.cli.work:writeback",
    "policy": "zramd.cli.policy:policy",
    "estimate": "zramd.cli.trials:estimate",
    "train": "zramd.cli.trials:train",
    "block-state": "zramd.cli.stat:block_state",
    "grow": "zramd.cli.control:grow",
    "save": "zramd.cli.image:save",
    "restore": "zramd.cli.image:restore",
    "reset": "zramd.cli.control:reset",
    "stop": "zramd.cli.control:stop",
    "attach": "zramd.cli.attach:attach",
    "detach": "zramd.cli.attach:detach",
    "swapon": "zramd.cli.swap:swapon",
    "swapoff": "zramd.cli.swap:swapoff",
    "doctor": "zramd.cli.doctor:doctor",
    "bench": "zramd.cli.bench:bench",
    "version": "zramd.cli.version:version",
}


class _Verbs(click.Group):
    """Imports a verb when it is used: a client verb starts without the codecs and the server."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(_VERBS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in _VERBS:
            return None
        module, name = _VERBS[cmd_name].split(":")
        command: click.Command = getattr(importlib.import_module(module), name)
        return command


@click.group(cls=_Verbs, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, "-V", "--version", message="zramd %(version)s")
def main() -> None:
    """Serve a compressed block device in memory over NBD: a userspace zram.

    \b
    Start one and look at it:
      zramd serve --size 4G --algorithm zstd
      zramd status
    """
