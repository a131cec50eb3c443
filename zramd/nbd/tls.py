"""TLS: certificates or pre-shared keys, and a socket that does what the transmission asks of one."""

import errno
import secrets
import socket
import ssl
from contextlib import suppress
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any, cast

from zramd.nbd.access import Access
from zramd.nbd.protocol import SessionError

CA_CERTIFICATE, CA_REVOKED = "ca-cert.pem", "ca-crl.pem"
SERVER_CERTIFICATE, SERVER_KEY = "server-cert.pem", "server-key.pem"
"""Names of files in a directory of certificates; nbdkit, libnbd and QEMU have the same."""


class TlsError(Exception):
    """TLS cannot be set up; the text says why."""


class TlsMode(Enum):
    """Whether clients can use TLS, and whether they have to."""

    OFF = "off"
    ON = "on"
    REQUIRE = "require"


@dataclass(frozen=True, slots=True)
class TlsSettings:
    """How to use TLS.

    Attributes:
        certificates: directory with the server's certificate and key, and those of the authority it trusts.
        verify_clients: whether a client must show a certificate of that authority.
        psk_file: instead of certificates, a file with a line `user:key in hexadecimal` for each client.
    """

    mode: TlsMode = TlsMode.OFF
    certificates: Path | None = None
    verify_clients: bool = True
    psk_file: Path | None = None


def make_context(settings: TlsSettings) -> ssl.SSLContext:
    """Load what the settings name. Less than TLS 1.2 is refused.

    Raises:
        TlsError: a file is missing or not what it should be, or this Python cannot do what is asked for.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.options |= ssl.OP_NO_RENEGOTIATION
    context.num_tickets = 0  # nobody resumes a session
    context.sslsocket_class = TlsSocket
    if settings.psk_file is not None:
        _load_keys(context, settings.psk_file)
    elif settings.certificates is not None:
        _load_certificates(context, settings.certificates, settings.verify_clients)
    else:
        raise TlsError("TLS needs a directory of certificates, or a file of pre-shared keys")
    return context


def _load_certificates(context: ssl.SSLContext, directory: Path, verify_clients: bool) -> None:
    needed = [SERVER_CERTIFICATE, SERVER_KEY] + [CA_CERTIFICATE] * verify_clients
    try:
        for name in needed:
            (directory / name).open("rb").close()
        context.load_cert_chain(directory / SERVER_CERTIFICATE, directory / SERVER_KEY, password=_no_password)
        if verify_clients:
            context.load_verify_locations(directory / CA_CERTIFICATE)
            context.verify_mode = ssl.CERT_REQUIRED
            if (directory / CA_REVOKED).exists():
                context.load_verify_locations(directory / CA_REVOKED)
                context.verify_flags |= ssl.VerifyFlags.VERIFY_CRL_CHECK_LEAF
    except (ssl.SSLError, ValueError) as error:
        raise TlsError(f"the certificates in {directory} cannot be used: {_reason(error)}") from error
    except OSError as error:
        raise TlsError(f"cannot read {error.filename}: {error.strerror}") from error


def _no_password() -> str:
    """Keep OpenSSL from asking on the terminal."""
    raise ValueError(f"{SERVER_KEY} is encrypted")


def _load_keys(context: ssl.SSLContext, path: Path) -> None:
    if not hasattr(context, "set_psk_server_callback"):
        raise TlsError("pre-shared keys need Python 3.13 or newer: use certificates")
    keys: dict[str, bytes] = {}
    try:
        for number, line in enumerate(path.read_text().splitlines(), 1):
            if line.strip() and not line.startswith("#"):
                user, _, key = line.strip().partition(":")
                try:
                    keys[user] = bytes.fromhex(key)
                except ValueError:
                    keys[user] = b""
                if not user or not keys[user]:
                    raise TlsError(f"{path}:{number}: not `user:key in hexadecimal`")
    except UnicodeDecodeError as error:
        raise TlsError(f"{path} is not text") from error
    except OSError as error:
        raise TlsError(f"cannot read {path}: {error.strerror}") from error
    # A key that nobody has, for an unknown user: with none, the alert would tell which users there are.
    nobody = secrets.token_bytes(32)
    context.set_psk_server_callback(lambda identity: keys.get(identity or "", nobody))
    context.set_ciphers("PSK")
    context.verify_mode = ssl.CERT_NONE


class TlsSocket(ssl.SSLSocket):
    """A TLS socket that receives and sends as the transmission does."""

    def recv_into(self, buffer: Any, nbytes: int | None = None, flags: int = 0) -> int:
        """Receive; with MSG_DONTWAIT, only what is there."""
        if flags != socket.MSG_DONTWAIT:
            return self._read_into(buffer)
        seconds = self.gettimeout()
        self.setblocking(False)
        try:
            return self._read_into(buffer)
        except ssl.SSLWantReadError as error:
            raise BlockingIOError(error.errno, "nothing is there") from error
        finally:
            self.settimeout(seconds)

    def _read_into(self, buffer: Any) -> int:
        # A Unix peer that left replies unread resets the connection, once; what it had sent can still be received.
        # Python takes that for the end. After a real end, the second call returns 0 too.
        return super().recv_into(buffer) or super().recv_into(buffer)

    def sendmsg(self, buffers: list[bytes | memoryview]) -> int:  # type: ignore[override]  # SSLSocket has none
        """Send all of a list of buffers."""
        data = b"".join(buffers)
        try:
            self.sendall(data)
        except ssl.SSLError as error:
            # Python says "EOF in violation of protocol" for a peer that is gone; a second attempt fails otherwise.
            raise BrokenPipeError(errno.EPIPE, "the client is gone") from error
        return len(data)

    def close(self) -> None:
        """Say that nothing more comes (close_notify), without waiting for the peer to agree, and close."""
        with suppress(OSError, ValueError):
            self.setblocking(False)
            self.unwrap()
        super().close()


def start_tls(sock: socket.socket, context: ssl.SSLContext, access: Access, seconds: float) -> TlsSocket:
    """Return a TLS socket on the same connection, for a peer that is let in; `sock` stays open beside it.

    Raises:
        SessionError: the handshake failed, or the peer is not let in.
        OSError: the connection failed, or it took too long.
    """
    plain = sock.dup()
    try:
        plain.settimeout(seconds)
        secure = cast(TlsSocket, context.wrap_socket(plain, server_side=True, suppress_ragged_eofs=True))
    except ssl.SSLError as error:
        plain.close()
        raise SessionError(f"TLS failed: {_reason(error)}") from error
    except OSError:
        plain.close()
        raise
    if not access.admits_certificate(secure.getpeercert()):
        secure.close()
        raise SessionError("the name in the client's certificate is not let in")
    return secure


def _reason(error: Exception) -> str:
    """Return what OpenSSL says is wrong, without its source line."""
    if isinstance(error, ssl.SSLCertVerificationError):
        return str(error.verify_message)
    reason = getattr(error, "reason", None)
    return str(reason).lower().replace("_", " ") if reason else str(error)
