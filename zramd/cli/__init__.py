"""The `zramd` command: one module for each group of verbs."""

import importlib
import os
import signal
import sys
from typing import Any

import click

INTERRUPTED = 130
"""The exit status of what Ctrl-C has ended, as shells have it."""

_VERBS = {
    "serve": ("zramd.cli.serve:serve", "Serve disks over NBD until SIGINT or SIGTERM."),
    "status": ("zramd.cli.status:status", "Show the disks that are served in a table."),
    "top": ("zramd.cli.top:top", "Show what the disks do, live."),
    "stat": ("zramd.cli.stat:stat", "Print an attribute of a disk as the kernel does."),
    "set": ("zramd.cli.control:set_attributes", "Change attributes of a disk."),
    "compact": ("zramd.cli.control:compact", "Give the memory between compressed pages back."),
    "idle": ("zramd.cli.work:idle", "Mark pages as idle that were not used for a while."),
    "recompress": ("zramd.cli.work:recompress", "Compress pages anew, to smaller ones."),
    "writeback": ("zramd.cli.work:writeback", "Write pages to the backing store."),
    "policy": ("zramd.cli.policy:policy", "Say what the policy did, or would do, and why."),
    "estimate": ("zramd.cli.trials:estimate", "Tell what a disk would take with each algorithm."),
    "train": ("zramd.cli.trials:train", "Train a dictionary on the pages of a disk."),
    "bench": ("zramd.cli.bench:bench", "Tell what your data would take with each algorithm."),
    "block-state": ("zramd.cli.stat:block_state", "Print what each page of a disk is."),
    "grow": ("zramd.cli.control:grow", "Make a disk larger while it is used."),
    "save": ("zramd.cli.image:save", "Save what a disk holds to a file or a pipe."),
    "restore": ("zramd.cli.image:restore", "Make a disk what was saved."),
    "reset": ("zramd.cli.control:reset", "Throw the contents of a disk away."),
    "stop": ("zramd.cli.control:stop", "End the server."),
    "attach": ("zramd.cli.attach:attach", "Make a disk a block device."),
    "detach": ("zramd.cli.attach:detach", "Undo an attach."),
    "swapon": ("zramd.cli.swap:swapon", "Swap to a block device that was attached."),
    "swapoff": ("zramd.cli.swap:swapoff", "Stop swapping to it."),
    "mount": ("zramd.cli.mount:mount", "Mount a block device that was attached."),
    "umount": ("zramd.cli.mount:umount", "Unmount it."),
    "config": ("zramd.cli.config:config", "Check a configuration, or show what is in effect."),
    "doctor": ("zramd.cli.doctor:doctor", "Tell what this machine lacks for it all."),
    "completion": ("zramd.cli.completion:completion", "Print what makes a shell complete this command."),
    "version": ("zramd.cli.version:version", "Print the version."),
}
"""Where each verb is defined, and what the list of all says of it."""
_ALIASES = {"list": "status"}


class _Verb(click.Command):
    """A verb that is imported when it is used: a client verb starts without the codecs and the server."""

    def __init__(self, name: str, path: str, short_help: str) -> None:
        super().__init__(name, help=short_help)
        self._path = path

    def load(self) -> click.Command:
        """Return the verb itself."""
        module, name = self._path.split(":")
        command: click.Command = getattr(importlib.import_module(module), name)
        return command

    def make_context(
        self, info_name: str | None, args: list[str], parent: click.Context | None = None, **extra: object
    ) -> click.Context:
        """Parse the verb's arguments; the context is of the verb itself, which then runs."""
        return self.load().make_context(info_name, args, parent, **extra)


class _Verbs(click.Group):
    def main(self, *args: Any, **extra: Any) -> Any:
        """Run, and end with one line where something could not be read or written that no verb knows to name."""
        _open_standard_files()
        try:
            return super().main(*args, **extra)
        except OSError as error:
            where = os.fsdecode(error.filename) if isinstance(error.filename, str | bytes) else "standard output"
            click.echo(f"Error: {where}: {error.strerror or error}", err=True)
            forget_output()
            sys.exit(1)

    def invoke(self, ctx: click.Context) -> Any:
        """Run the verb; Ctrl-C ends it with the status that shells have for that."""
        ends_at_once = signal.getsignal(signal.SIGINT) is signal.SIG_DFL  # see zramd.__main__
        if ends_at_once:
            signal.signal(signal.SIGINT, signal.default_int_handler)
        try:
            return super().invoke(ctx)
        except (KeyboardInterrupt, click.Abort):
            click.echo(err=True)
            ctx.exit(INTERRUPTED)
        finally:
            if ends_at_once:
                signal.signal(signal.SIGINT, signal.SIG_DFL)

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(_VERBS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        verb = _ALIASES.get(cmd_name, cmd_name)
        return _Verb(verb, *_VERBS[verb]) if verb in _VERBS else None


def _open_standard_files() -> None:
    """Give those of the three standard files that are closed to something: another file would take their place.

    Standard input and output then fail, and what is said on standard error is lost, as was asked for.
    """
    for number, flags in enumerate((os.O_WRONLY, os.O_RDONLY, os.O_WRONLY)):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, flags)  # takes the least number that is free
    sys.stdin = sys.stdin or open(0, closefd=False)  # noqa: SIM115 (as long as the process)
    sys.stdout = sys.stdout or open(1, "w", closefd=False)  # noqa: SIM115
    sys.stderr = sys.stderr or open(2, "w", closefd=False)  # noqa: SIM115


def forget_output() -> None:
    """Throw away what could not be written, which would be tried again at the end."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)


def load_verbs() -> dict[str, click.Command]:
    """Import all verbs, and return them by name."""
    return {name: _Verb(name, *verb).load() for name, verb in _VERBS.items()}


def _print_version(context: click.Context, _: click.Parameter, wanted: bool) -> None:
    if wanted:
        from zramd.cli.version import version

        context.invoke(version, verbose=context.meta.get("verbose", False))
        context.exit()


def _note_verbose(context: click.Context, _: click.Parameter, wanted: bool) -> None:
    context.meta["verbose"] = wanted


@click.group(cls=_Verbs, context_settings={"help_option_names": ["-h", "--help"]})
@click.option(
    "-V", "--version", is_flag=True, expose_value=False, callback=_print_version, help="Print the version and exit."
)
@click.option(
    "-v",
    "--verbose",
    is_flag=True,
    is_eager=True,
    expose_value=False,
    callback=_note_verbose,
    help="With --version: also the engine and the libraries.",
)
@click.pass_context
def main(context: click.Context) -> None:
    """Serve a compressed block device in memory over NBD: a userspace zram.

    \b
    Start one and look at it:
      zramd serve --size 4G --algorithm zstd
      zramd status
    """
    if context.meta["verbose"]:
        raise click.UsageError("-v goes with --version")
