"""NBD URIs, as far as the kernel's NBD client can go where they lead.

nbd+unix:///NAME?socket=PATH      nbd://HOST[:PORT][/NAME]
"""

import os
import socket
from urllib.parse import parse_qs, unquote, urlsplit

from zramd.nbd.client import Address

DEFAULT_PORT = 10809


class UriError(ValueError):
    """A URI does not lead to an export that can be attached; the text says why, and what would."""


def parse_uri(uri: str) -> tuple[list[Address], str]:
    """Return the addresses of a server, best first, and the name of the export.

    Host names are looked up, once and for all: whoever reconnects later must not depend on that.

    Raises:
        UriError: it is no such URI, or its host cannot be found.
    """
    try:
        parts = urlsplit(uri)
        host, port = parts.hostname, parts.port
        query = parse_qs(parts.query, keep_blank_values=True, strict_parsing=bool(parts.query))
    except ValueError as error:
        raise UriError(f"{uri}: {error}") from error
    name = unquote(parts.path.removeprefix("/"))
    if parts.scheme in ("nbds", "nbds+unix"):
        raise UriError(f"{uri}: the kernel's NBD client cannot do TLS; use a Unix socket, or a tunnel to one")
    if parts.scheme == "nbd+unix":
        paths = query.pop("socket", [])
        if query or len(paths) != 1 or not paths[0] or parts.netloc:
            raise UriError(f"{uri} does not name one socket: nbd+unix:///NAME?socket=PATH")
        return [os.path.abspath(paths[0])], name
    if parts.scheme == "nbd":
        if query or not host or parts.username is not None:
            raise UriError(f"{uri} does not name a host: nbd://HOST:PORT/NAME")
        return _look_up(uri, host, DEFAULT_PORT if port is None else port), name
    raise UriError(f"{uri} is no NBD URI that can be attached: nbd+unix:///NAME?socket=PATH, or nbd://HOST:PORT/NAME")


def _look_up(uri: str, host: str, port: int) -> list[Address]:
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:
        raise UriError(f"{uri}: {host} is not the address of a host") from error
    return [(str(address[0]), port) for _, _, _, _, address in found]
