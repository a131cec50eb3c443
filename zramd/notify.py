"""What systemd is told of this process, by sd_notify(3)'s protocol: a datagram of NAME=VALUE lines."""

import os
import socket


def notify(*fields: str) -> bool:
    """Send fields such as READY=1 or STATUS=TEXT, if systemd has said where to; say whether it has got them.

    Never waits, and failing to tell is no reason to fail.
    """
    where = os.environ.get("NOTIFY_SOCKET", "")
    if not where:
        return False
    # A leading @ stands for the NUL of an abstract socket.
    address = "\0" + where[1:] if where.startswith("@") else where
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK) as sock:
            sock.sendto("\n".join(fields).encode(), address)
    except OSError:
        return False
    return True
