"""Metrics as text, for node_exporter's textfile collector."""

import json
import os
from pathlib import Path

from zramd.status.client import ask, find_disks
from zramd.status.metrics import Format, render


def write_metrics(socket: Path | None, output: Path | None) -> str:
    """Return the metrics of all disks that are served, or of one; with `output`, replace that file by them instead.

    If they cannot be had the file is removed: numbers of a server that is gone must not look like those of now.

    Raises:
        StatusError: no server answers.
        OSError: the file cannot be written.
    """
    try:
        disks = [json.loads(ask(path, "json")) for path in ([socket] if socket else find_disks())]
    except Exception:
        if output is not None:
            output.unlink(missing_ok=True)
        raise
    text = render(disks, Format.TEXT)
    if output is None:
        return text
    # In the same directory; the collector reads what ends in .prom.
    unfinished = output.with_name(f".{output.name}.{os.getpid()}")
    try:
        unfinished.write_text(text)
        unfinished.chmod(0o644)
        unfinished.replace(output)
    except OSError:
        unfinished.unlink(missing_ok=True)
        raise
    return ""
