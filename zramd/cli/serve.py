"""`zramd serve`: the daemon, in the foreground."""

import logging
import sys
from pathlib import Path

import click

from zramd.cli.options import Parsed, parse_address, parse_group
from zramd.daemon import DaemonError, Settings, run
from zramd.device.codecs import Codec, parse_codec
from zramd.device.opening import Wanted
from zramd.paths import ADMIN_SUFFIX, DEVICE_NAME, STATUS_SUFFIX, make_runtime_directory, state_directory
from zramd.sizes import parse_size
from zramd.zsmalloc.classes import DEFAULT_CHAIN_SIZE, MAX_CHAIN_SIZE, MIN_CHAIN_SIZE

SIZE = Parsed("size", parse_size)


@click.command()
@click.option(
    "--size", type=SIZE, help="Size of the disk: bytes, or with K, M, G, T. 0: set later as disksize. Default: 1G."
)
@click.option(
    "--algorithm",
    type=Parsed("algorithm", parse_codec),
    help="lz4, lz4hc or zstd; with parameters: 'zstd(level=9,dict=/PATH)'. Default: lz4.",
)
@click.option("--unix", type=click.Path(path_type=Path), help="NBD socket to listen on.")
@click.option(
    "--tcp",
    type=Parsed("host:port", parse_address),
    help="TCP address to listen on instead of a Unix socket, or beside it.",
)
@click.option("--status", type=click.Path(path_type=Path), help="Socket to listen on for those who read attributes.")
@click.option("--status-group", type=Parsed("group", parse_group), help="Group that may read. Default: only you.")
@click.option(
    "--admin", type=click.Path(path_type=Path), help="Socket for changes. Default: as --status, but ending in .admin."
)
@click.option("--state", type=click.Path(path_type=Path), help="Directory that keeps the contents over a restart.")
@click.option("--volatile", is_flag=True, help="Keep nothing: the contents go when the server ends.")
@click.option("--mem-limit", type=SIZE, help="Most memory for compressed data; 0 for no limit. Default: 0.")
@click.option(
    "--chain-size",
    type=click.IntRange(MIN_CHAIN_SIZE, MAX_CHAIN_SIZE),
    help=f"Most pages in a zspage. Default: {DEFAULT_CHAIN_SIZE}.",
)
def serve(
    size: int | None,
    algorithm: Codec | None,
    unix: Path | None,
    tcp: tuple[str, int] | None,
    status: Path | None,
    status_group: int | None,
    admin: Path | None,
    state: Path | None,
    volatile: bool,
    mem_limit: int | None,
    chain_size: int | None,
) -> None:
    """Serve a compressed disk over NBD until SIGINT or SIGTERM.

    Without options: 1 GiB, lz4, with its sockets and its memory in your runtime directory (/run/zramd for root,
    $XDG_RUNTIME_DIR/zramd for others; the memory goes to /dev/shm where that is not a tmpfs). What was written is
    there again when the server is started anew, until the machine restarts; --volatile keeps nothing.

    \b
    Example:
      zramd serve --size 4G --algorithm 'zstd(level=3)' --mem-limit 1G
    """
    if state is not None and volatile:
        raise click.UsageError("--state and --volatile exclude each other")
    logging.basicConfig(level=logging.WARNING, format="zramd: %(message)s", stream=sys.stderr)
    try:
        if unix is None and tcp is None:
            unix = make_runtime_directory() / f"{DEVICE_NAME}.nbd"
        if status is None:
            status = make_runtime_directory() / f"{DEVICE_NAME}{STATUS_SUFFIX}"
        if state is None and not volatile:
            state = state_directory()
        run(
            Settings(
                wanted=Wanted(size, algorithm, chain_size),
                mem_limit=mem_limit,
                state=state,
                unix=unix,
                tcp=tcp,
                status=status,
                admin=admin or status.with_suffix(ADMIN_SUFFIX),
                group=status_group,
            ),
            click.echo,
        )
    except DaemonError as error:
        raise click.ClickException(str(error)) from error
    except OSError as error:
        raise click.ClickException(str(error) if error.filename else error.strerror or str(error)) from error
