"""Servers that are started with a configuration file."""

import json
import subprocess
import sys
from pathlib import Path

from tests.conftest import ServerProcess, wait_until_served

MODULE = [sys.executable, "-m", "zramd"]


def quoted(value: str | Path | list[str]) -> str:
    """Return a text or a list of texts as TOML has it, which for these is as JSON has it."""
    return json.dumps(value if isinstance(value, list) else str(value), ensure_ascii=False)


def disk_table(directory: Path, name: str = "zram0", *lines: str) -> str:
    """Return the table of a volatile disk of 64 MiB with its status socket in `directory`, unless `lines` say more."""
    kept = any(line.startswith("state") for line in lines)
    size = any(line.startswith("size") for line in lines)
    table = [f"[{name}]", f"status = {quoted(directory / f'{name}.status')}", *lines]
    return "\n".join(table + ["volatile = true"] * (not kept) + ['size = "64M"'] * (not size)) + "\n"


def write_config(directory: Path, text: str) -> Path:
    path = directory / "zramd.toml"
    path.write_text(text, encoding="utf-8")
    return path


def start_configured(directory: Path, text: str, *options: str) -> ServerProcess:
    """Start a server with this configuration, and wait until it serves. Its first disk has to be zram0.

    `directory` is where its socket zram0.nbd should be, and the status socket is.
    """
    command = [*MODULE, "serve", "--config", str(write_config(directory, text)), *options]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    wait_until_served(process)
    return ServerProcess(process, *(directory / f"zram0.{socket}" for socket in ("nbd", "status", "admin")))
