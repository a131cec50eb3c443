"""`zramd serve`: the daemon, in the foreground."""

import logging
import os
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import click

from zramd.cli import forget_output
from zramd.cli.options import Parsed, describe, later
from zramd.paths import ADMIN_SUFFIX, DEVICE_NAME, STATUS_SUFFIX, make_runtime_directory, state_directory
from zramd.zsmalloc.classes import DEFAULT_CHAIN_SIZE, MAX_CHAIN_SIZE, MIN_CHAIN_SIZE

if TYPE_CHECKING:
    from zramd.device.choice import Choice
    from zramd.expressions import Size

GROUP = Parsed("group", later("zramd.config", "find_group"))
SOCKET = click.Path(path_type=Path, dir_okay=False)


@click.command()
@click.option(
    "--config",
    type=click.Path(path_type=Path),
    help="File with all of this, and more: several disks, access, limits. Excludes the other options but --stdio.",
)
@click.option(
    "--disk",
    help="Name of a disk: serve what /etc/zramd/NAME.toml says, or the table [NAME] of /etc/zramd/zramd.toml.",
)
@click.option(
    "--size",
    type=Parsed("size", later("zramd.expressions", "parse_disksize")),
    help="Size of the disk: bytes, or with K, M, G, T; or of the machine's memory, as in 50% or 'min(ram / 2, 4G)'. "
    "0: that of what is kept, or set later as disksize. Default: 1G.",
)
@click.option(
    "--algorithm",
    type=Parsed("algorithm", later("zramd.device.choice", "parse_choice")),
    help="lz4, lz4hc or zstd; with parameters: 'zstd(level=9,dict=/PATH)'. After blanks more, to recompress with. "
    "Default: lz4.",
)
@click.option("--unix", type=SOCKET, help="NBD socket to listen on.")
@click.option(
    "--tcp",
    type=Parsed("host:port", later("zramd.config", "parse_address")),
    help="TCP address to listen on instead of a Unix socket, or beside it. Not beyond loopback without TLS.",
)
@click.option(
    "--web",
    type=Parsed("host:port", later("zramd.config", "parse_address")),
    help="Loopback address for browsers: a page on what the disk holds and does, for every user of this machine.",
)
@click.option(
    "--metrics",
    type=Parsed("host:port", later("zramd.config", "parse_address")),
    help="Loopback address for Prometheus: metrics of all disks, at /metrics, for every user of this machine.",
)
@click.option("--stdio", is_flag=True, help="Serve the one client on standard input, keep nothing, and end with it.")
@click.option("--tls", type=click.Path(path_type=Path), help="Require TLS, with the certificates in this directory.")
@click.option("--read-only", is_flag=True, help="Let clients change nothing.")
@click.option("--status", type=SOCKET, help="Socket to listen on for those who read attributes.")
@click.option(
    "--status-group",
    type=Parsed("group", later("zramd.config", "find_group")),
    help="Group that may read. Default: only you.",
)
@click.option("--admin", type=SOCKET, help="Socket for changes. Default: as --status, but ending in .admin.")
@click.option("--state", type=click.Path(path_type=Path), help="Directory that keeps the contents over a restart.")
@click.option("--volatile", is_flag=True, help="Keep nothing: the contents go when the server ends.")
@click.option(
    "--mem-limit",
    type=Parsed("size", later("zramd.expressions", "evaluate")),
    help="Most memory for compressed data, as --size is written; 0 for no limit. Default: 0.",
)
@click.option(
    "--chain-size",
    type=click.IntRange(MIN_CHAIN_SIZE, MAX_CHAIN_SIZE),
    help=f"Most pages in a zspage. Default: {DEFAULT_CHAIN_SIZE}.",
)
@click.option(
    "--integrity", is_flag=True, help="Give each stored page a checksum; a page that was damaged in memory is an error."
)
@click.option(
    "--swap",
    is_flag=True,
    help="For swapping to: locks and populates memory ahead, runs in real time, and a supervisor restarts the server.",
)
@click.option(
    "--check", is_flag=True, help="Only find out whether this would serve: configuration, what is kept, engine."
)
@click.pass_context
def serve(
    context: click.Context,
    config: Path | None,
    disk: str | None,
    size: "Size | None",
    algorithm: "Choice | None",
    unix: Path | None,
    tcp: tuple[str, int] | None,
    web: tuple[str, int] | None,
    metrics: tuple[str, int] | None,
    stdio: bool,
    tls: Path | None,
    read_only: bool,
    status: Path | None,
    status_group: int | None,
    admin: Path | None,
    state: Path | None,
    volatile: bool,
    mem_limit: int | None,
    chain_size: int | None,
    integrity: bool,
    swap: bool,
    check: bool,
) -> None:
    """Serve a compressed disk over NBD until SIGINT or SIGTERM.

    Without options, root serves what /etc/zramd/zramd.toml says, if it is there (or in /run/zramd,
    /usr/local/lib/zramd, /usr/lib/zramd). With any option but --check, a file is read only for --config or --disk.

    Without a file: 1 GiB, lz4, with its sockets and its memory in your runtime directory (/run/zramd for root,
    $XDG_RUNTIME_DIR/zramd for others; the memory goes to /dev/shm where that is not a tmpfs). What was written is
    there again when the server is started anew, until the machine restarts; --volatile keeps nothing. Sockets that
    systemd has opened (LISTEN_FDS) are served too, and then no other by default.

    \b
    Example:
      zramd serve --size 4G --algorithm 'zstd(level=3)' --mem-limit 1G
      zramd serve --config /etc/zramd/zramd.toml
    """
    from zramd.config import ConfigError, find, load, load_disk
    from zramd.daemon import DaemonError, run
    from zramd.device.wanted import Wanted
    from zramd.disks import UnfitError
    from zramd.disks import check as check_disks
    from zramd.log import start_log
    from zramd.native import EngineError, choose
    from zramd.nbd.tls import TlsMode, TlsSettings
    from zramd.notify import notify
    from zramd.policy.rules import Rules
    from zramd.settings import DiskSettings, Settings, UnixAddress

    if state is not None and volatile:
        raise click.UsageError("--state and --volatile exclude each other")
    if stdio and web is not None:
        raise click.UsageError("--stdio and --web exclude each other")
    if stdio and metrics is not None:
        raise click.UsageError("--stdio and --metrics exclude each other")
    start_log()
    try:
        choose()
        given = _given(context)
        if config is None and not given - {"check"} and os.geteuid() == 0:
            config = find()
            if config is not None:
                _announce(f"config:  {config}", err=False)
        if disk is not None:
            _require_alone(given, "disk")
            settings = load_disk(disk)
        elif config is not None:
            _require_alone(given, "config")
            settings = load(config, stdio=stdio)
        else:
            if state is None and not volatile and not stdio:
                state = state_directory(DEVICE_NAME)
            if status is None and not stdio:
                status = make_runtime_directory() / f"{DEVICE_NAME}{STATUS_SUFFIX}"
            settings = Settings(
                disks=(
                    DiskSettings(
                        name=DEVICE_NAME,
                        wanted=Wanted(
                            size.bytes if size else None,
                            algorithm.primary if algorithm else None,
                            chain_size,
                            secondary=algorithm.secondary if algorithm else {},
                            integrity=integrity,
                            keep_size=size is not None and size.varies,
                        ),
                        mem_limit=mem_limit,
                        state=state,
                        status=status,
                        admin=admin or (status.with_suffix(ADMIN_SUFFIX) if status else None),
                        group=status_group,
                        read_only=read_only,
                        policy=Rules(recompression=algorithm.recompression if algorithm else None),
                    ),
                ),
                unix=(UnixAddress(unix),) if unix else (),
                tcp=(tcp,) if tcp else (),
                web=web,
                metrics=metrics,
                swap=swap,
                stdio=stdio,
                tls=TlsSettings(TlsMode.REQUIRE, tls) if tls else TlsSettings(),
            )
        if not settings.disks:
            nothing = (
                f"nothing to serve: this machine has more than the host-memory-limit of {', '.join(settings.left_out)}"
            )
            if check:
                # A server that has a disk is not to be replaced by one that has none.
                raise click.ClickException(nothing)
            # Not a failure, or systemd would start it again and again.
            notify("READY=1")
            click.echo(nothing, err=stdio)
            return
        if check:
            check_disks(settings)
            return
        run(settings, partial(_announce, err=stdio))
    except (ConfigError, DaemonError, EngineError, UnfitError) as error:
        raise click.ClickException(str(error)) from error
    except OSError as error:
        raise click.ClickException(describe(error)) from error


def _announce(line: str, *, err: bool) -> None:
    """Print a line for whoever has started the server, who may have left."""
    try:
        click.echo(line, err=err)
    except OSError as error:
        logging.getLogger(__name__).warning("cannot print where the disks are served: %s", error.strerror)
        if not err:
            forget_output()


def _given(context: click.Context) -> set[str]:
    """Return the names of the options that stand on the command line."""
    command_line = click.core.ParameterSource.COMMANDLINE
    return {name for name in context.params if context.get_parameter_source(name) is command_line}


def _require_alone(given: set[str], by: str) -> None:
    for name in sorted(given - {by, "check", *(["stdio"] if by == "config" else [])}):
        raise click.UsageError(f"--{name.replace('_', '-')} and --{by} exclude each other: write it into the file")
