"""Certificates for TLS, made by the `openssl` command, in directories as nbdkit, libnbd and QEMU read them."""

import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

CONFIG = """
[req]
distinguished_name = nothing
prompt = no
[nothing]
[authority]
basicConstraints = critical, CA:true
keyUsage = critical, keyCertSign, cRLSign
subjectKeyIdentifier = hash
[ca]
default_ca = files
[files]
database = index.txt
rand_serial = yes
new_certs_dir = .
certificate = ca-cert.pem
private_key = ca-key.pem
default_md = sha256
default_days = 30
default_crl_days = 30
policy = any
unique_subject = no
[any]
commonName = supplied
"""
NEW_KEY = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes"]


def openssl(directory: Path, *arguments: str) -> None:
    if shutil.which("openssl") is None:
        pytest.skip("openssl is missing: apt install openssl")
    done = subprocess.run(["openssl", *arguments], cwd=directory, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


class Authority:
    """A certificate authority with its files in a directory of its own."""

    def __init__(self, directory: Path, name: str) -> None:
        self.directory = directory
        directory.mkdir(parents=True)
        (directory / "config").write_text(CONFIG)
        (directory / "index.txt").touch()
        subject = ["-subj", f"/CN={name}", "-days", "30", "-config", "config", "-extensions", "authority"]
        openssl(directory, "req", "-x509", *NEW_KEY, "-keyout", "ca-key.pem", "-out", "ca-cert.pem", *subject)

    @property
    def certificate(self) -> Path:
        return self.directory / "ca-cert.pem"

    def issue(
        self, directory: Path, kind: str, name: str, alternatives: Sequence[str] = (), *, expired: bool = False
    ) -> Path:
        """Make KIND-cert.pem and KIND-key.pem, `kind` being server or client, and copy the authority's certificate.

        `name` is the common name; `alternatives` are as openssl writes them: DNS:name, IP:address.
        """
        directory.mkdir(parents=True, exist_ok=True)
        shutil.copy(self.certificate, directory)
        key, certificate, request = directory / f"{kind}-key.pem", directory / f"{kind}-cert.pem", directory / "request"
        extensions = directory / "extensions"
        extensions.write_text(
            f"keyUsage = critical, digitalSignature\nextendedKeyUsage = {kind}Auth\nauthorityKeyIdentifier = keyid\n"
            + (f"subjectAltName = {', '.join(alternatives)}\n" if alternatives else "")
        )
        subject = ["-subj", f"/CN={name}", "-config", "config"]
        openssl(self.directory, "req", *NEW_KEY, "-keyout", str(key), "-out", str(request), *subject)
        times = ["-startdate", "20200101000000Z", "-enddate", "20200102000000Z"] if expired else []
        files = ["-in", str(request), "-out", str(certificate), "-extfile", str(extensions)]
        openssl(self.directory, "ca", "-batch", "-notext", "-config", "config", *files, *times)
        request.unlink()
        extensions.unlink()
        return directory

    def revoke(self, directory: Path) -> None:
        """Revoke the client's certificate in a directory."""
        openssl(self.directory, "ca", "-config", "config", "-revoke", str(directory / "client-cert.pem"))

    def list_revoked(self, path: Path) -> None:
        """Write the list of what was revoked so far."""
        openssl(self.directory, "ca", "-config", "config", "-gencrl", "-out", str(path))


@dataclass(frozen=True)
class Certificates:
    """Directories with certificates.

    Attributes:
        server: of the server, for localhost, 127.0.0.1 and ::1.
        strict: the same, with a list of revoked certificates.
        clients: holds a directory for each client, which trusts the server in all of them.
    """

    server: Path
    strict: Path
    clients: Path

    def client(self, name: str) -> Path:
        return self.clients / name


def make_certificates(directory: Path) -> Certificates:
    """Make an authority, a server and its clients.

    Clients: alice and bob, each with two alternative names; `without` any certificate; `foreign`, of another authority
    of the same name; `expired`; `revoked`.
    """
    made = Certificates(directory / "server", directory / "strict", directory / "clients")
    authority = Authority(directory / "authority", "zramd tests")
    foreign = Authority(directory / "foreign", "zramd tests")
    authority.issue(made.server, "server", "localhost", ["DNS:localhost", "IP:127.0.0.1", "IP:::1"])
    for name in ("alice", "bob"):
        authority.issue(made.client(name), "client", name, [f"DNS:{name}.example", f"DNS:{name}.other.example"])
    authority.issue(made.client("expired"), "client", "alice", expired=True)
    authority.issue(made.client("revoked"), "client", "alice")
    foreign.issue(made.client("foreign"), "client", "alice", ["DNS:alice.example"])
    shutil.copy(authority.certificate, made.client("foreign"))
    made.client("without").mkdir()
    shutil.copy(authority.certificate, made.client("without"))
    shutil.copytree(made.server, made.strict)
    authority.revoke(made.client("revoked"))
    authority.list_revoked(made.strict / "ca-crl.pem")
    return made
