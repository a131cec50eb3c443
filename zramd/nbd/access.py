"""Who may use a server: users and groups on a Unix socket, names in certificates with TLS."""

import socket
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from zramd.listeners import peer_ids

_GID = struct.Struct("I")
_SO_PEERGROUPS = 59
_MAX_GROUPS = 255
"""Of a peer; all that Python's getsockopt can return. The kernel refuses to tell of more."""


@dataclass(frozen=True, slots=True)
class Access:
    """Who may use a server; where no one is named, everyone may whom the socket's mode or the TLS settings let in.

    Attributes:
        users, groups: of the peers of Unix sockets, by uid and gid. One of the two has to fit.
        names: of the TLS peers' certificates: a DNS name, address, e-mail or URI among the alternative names, or the
            common name, as a whole and in the same case.
    """

    users: frozenset[int] = frozenset()
    groups: frozenset[int] = frozenset()
    names: frozenset[str] = frozenset()

    def admits_peer(self, sock: socket.socket) -> bool:
        """Say whether the peer of a Unix socket may use the server, by the credentials it connected with."""
        if not self.users and not self.groups:
            return True
        uid, gid = peer_ids(sock)
        return uid in self.users or gid in self.groups or not self.groups.isdisjoint(_peer_groups(sock))

    def admits_certificate(self, certificate: dict[str, Any] | None) -> bool:
        """Say whether the holder of a certificate, as ssl's getpeercert returns it, may use the server."""
        return not self.names or not self.names.isdisjoint(_names(certificate or {}))


DEFAULT_ACCESS = Access()


def _peer_groups(sock: socket.socket) -> Iterator[int]:
    """Yield the peer's supplementary groups; none if it has more than can be told."""
    try:
        groups = sock.getsockopt(socket.SOL_SOCKET, _SO_PEERGROUPS, _MAX_GROUPS * _GID.size)
    except OSError:
        return
    for (gid,) in _GID.iter_unpack(groups):
        yield gid


def _names(certificate: dict[str, Any]) -> Iterator[str]:
    for _, value in certificate.get("subjectAltName", ()):
        yield value
    for part in certificate.get("subject", ()):
        for field, value in part:
            if field == "commonName":
                yield value
