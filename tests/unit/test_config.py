import grp
import json
import os
import pwd
import re
import uuid
from pathlib import Path

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from zramd.config import ConfigError, find_group, find_user, load, parse_address
from zramd.device.wanted import Wanted
from zramd.nbd.access import Access
from zramd.nbd.limits import Limits
from zramd.nbd.tls import TlsMode, TlsSettings
from zramd.settings import DESCRIPTION, DiskSettings, Settings, UnixAddress

WHOLE = """
[server]
unix = ["/run/a.nbd", "/run/ö b.nbd"]
tcp = ["localhost:10809", "[::1]:10810", ":10811"]
unix-mode = "0660"
unix-owner = "root"
unix-group = 4711
plain-tcp-beyond-loopback = true

[tls]
mode = "require"
certificates = "/etc/zramd/tls"
verify-clients = true

[access]
users = ["root", 1000]
groups = "0"
certificate-names = ["build1.example", "Ann"]

[limits]
handshake-seconds = 3600
option-size = "4K"
options = 4
name-length = 36
payload = 1048576
connections = 65536
handshakes = 1
memory-per-connection = "512K"

[zram7]
size = "1.5G"
compression-algorithm = "zstd(level=9)"
chain-size = 4
resident-limit = "512M"
state = "/var/lib/seven"
description = "sieben"
read-only = true
status = "/run/seven.status"
admin = "/run/seven.change"
status-group = 0

[zram0]
volatile = true
"""


@pytest.fixture(autouse=True)
def _places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("zramd.config.keys.make_runtime_directory", lambda: tmp_path / "run")
    monkeypatch.setattr("zramd.config.keys.state_directory", lambda name: tmp_path / "kept" / name)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "zramd.toml"


def parse(path: Path, text: str) -> Settings:
    path.write_text(text, encoding="utf-8")
    return load(path)


def refuse(path: Path, text: str) -> str:
    """Return the one line with which a configuration is refused, without the name of the file."""
    with pytest.raises(ConfigError) as caught:
        parse(path, text)
    line = str(caught.value)
    assert line.splitlines() == [line]
    assert line.startswith(str(path))
    return line.removeprefix(str(path))


def outcome(path: Path) -> Settings | str:
    """Return what a configuration means, or what is wrong with it."""
    try:
        return load(path)
    except ConfigError as error:
        return str(error)


# What is right


def test_every_key_is_read(path: Path, tmp_path: Path) -> None:
    settings = parse(path, WHOLE)
    chosen = settings.disks[0].wanted.codec
    assert chosen is not None
    assert (chosen.name, chosen.level) == ("zstd", 9)
    assert settings == Settings(
        disks=(
            DiskSettings(
                name="zram7",
                wanted=Wanted(disksize=3 << 29, codec=chosen, chain_size=4),
                mem_limit=512 << 20,
                state=Path("/var/lib/seven"),
                status=Path("/run/seven.status"),
                admin=Path("/run/seven.change"),
                group=0,
                description="sieben",
                read_only=True,
            ),
            DiskSettings(
                name="zram0",
                wanted=Wanted(),
                mem_limit=None,
                state=None,
                status=tmp_path / "run" / "zram0.status",
                admin=tmp_path / "run" / "zram0.admin",
            ),
        ),
        unix=(UnixAddress(Path("/run/a.nbd"), 0o660, 0, 4711), UnixAddress(Path("/run/ö b.nbd"), 0o660, 0, 4711)),
        tcp=(("localhost", 10809), ("::1", 10810), ("", 10811)),
        public=True,
        tls=TlsSettings(TlsMode.REQUIRE, Path("/etc/zramd/tls")),
        access=Access(frozenset([0, 1000]), frozenset([0]), frozenset(["build1.example", "Ann"])),
        limits=Limits(3600, 4096, 4, 36, 1 << 20, 65536, 1, 512 << 10),
    )


def test_only_a_disk_is_needed_and_the_rest_has_defaults(path: Path, tmp_path: Path) -> None:
    settings = parse(path, "[zram3]\n")
    (disk,) = settings.disks
    assert settings == Settings(disks=(disk,))
    assert settings.tls.mode is TlsMode.OFF
    assert not settings.public
    assert disk == DiskSettings(
        name="zram3",
        wanted=Wanted(),
        mem_limit=None,
        state=tmp_path / "kept" / "zram3",
        status=tmp_path / "run" / "zram3.status",
        admin=tmp_path / "run" / "zram3.admin",
        group=None,
        description=DESCRIPTION,
        read_only=False,
    )
    assert parse(path, "[zram3]\n[limits]\n[tls]\n[access]\n[server]\n") == settings


def test_stdio_is_told_by_who_loads_it(path: Path) -> None:
    path.write_text("[zram0]\n")
    assert load(path, stdio=True).stdio
    assert not load(path).stdio


def test_disks_keep_the_order_of_the_file(path: Path) -> None:
    names = ["zram10", "zram2", "zram0", "zram1"]
    assert [disk.name for disk in parse(path, "".join(f"[{name}]\n" for name in names)).disks] == names


def test_the_admin_socket_lies_beside_the_status_socket(path: Path) -> None:
    (disk,) = parse(path, '[zram0]\nstatus = "/run/x/y.status"\n').disks
    assert disk.admin == Path("/run/x/y.admin")


@pytest.mark.parametrize(
    ("value", "size"),
    [
        ("0", 0),
        ("4096", 4096),
        ('"4096"', 4096),
        ('"1K"', 1024),
        ('"1.5MiB"', 3 << 19),
        ('"1G"', 1 << 30),
        ("0x1000", 4096),
    ],
)
def test_a_size_is_a_number_or_a_text_with_a_suffix(path: Path, value: str, size: int) -> None:
    (disk,) = parse(path, f"[zram0]\nsize = {value}\nresident-limit = {value}\n").disks
    assert (disk.wanted.disksize, disk.mem_limit) == (size, size)


@pytest.mark.parametrize(("value", "mode"), [('"0600"', 0o600), ('"660"', 0o660), ('"0000"', 0), ('"777"', 0o777)])
def test_a_mode_is_octal(path: Path, value: str, mode: int) -> None:
    settings = parse(path, f'[server]\nunix = "/a"\nunix-mode = {value}\n[zram0]\n')
    assert settings.unix == (UnixAddress(Path("/a"), mode),)


@pytest.mark.parametrize("value", ["0o660", "0o600", "432", "384"])
def test_a_mode_that_is_a_number_means_that_number_or_nothing(path: Path, value: str) -> None:
    path.write_text(f'[server]\nunix = "/a"\nunix-mode = {value}\n[zram0]\n')
    found = outcome(path)
    if isinstance(found, str):
        assert ":3: [server] unix-mode: " in found
    else:
        assert found.unix == (UnixAddress(Path("/a"), int(value, 0)),)


def test_tls_may_be_off_and_its_files_named_all_the_same(path: Path) -> None:
    tls = parse(path, '[tls]\nmode = "off"\ncertificates = "/a"\npsk-file = "/b"\n[zram0]\n').tls
    assert tls == TlsSettings(TlsMode.OFF, Path("/a"), True, Path("/b"))


@pytest.mark.parametrize("mode", ["on", "require"])
def test_tls_takes_certificates_or_keys(path: Path, mode: str) -> None:
    assert parse(path, f'[tls]\nmode = "{mode}"\npsk-file = "/b"\n[zram0]\n').tls.psk_file == Path("/b")
    assert parse(path, f'[tls]\nmode = "{mode}"\ncertificates = "/a"\n[zram0]\n').tls.certificates == Path("/a")


LIMITS = {
    "handshake-seconds": ("handshake_seconds", 1, 3600),
    "option-size": ("option", 4096, 1 << 30),
    "options": ("options", 4, 1 << 20),
    "name-length": ("name", 36, 4096),
    "payload": ("payload", 1 << 20, 1 << 30),
    "connections": ("connections", 1, 65536),
    "handshakes": ("handshakes", 1, 65536),
    "memory-per-connection": ("memory", 512 << 10, 1 << 30),
}


@pytest.mark.parametrize("key", LIMITS)
def test_a_limit_is_taken_up_to_its_bounds_and_not_beyond(path: Path, key: str) -> None:
    name, low, high = LIMITS[key]
    for value in (low, high):
        assert getattr(parse(path, f"[limits]\n{key} = {value}\n[zram0]\n").limits, name) == value
    for value in (low - 1, high + 1, -1, 10**30):
        line = refuse(path, f"[zram0]\n[limits]\n{key} = {value}\n")
        assert line.startswith(f":3: [limits] {key}: ")
    line = refuse(path, f"[zram0]\n[limits]\n{key} = {high + 1}\n")
    assert f"from {low} to {high}" in line


# What is wrong


@pytest.mark.parametrize(
    ("text", "where", "words"),
    [
        # Names that are not known.
        ("[server]\n[zram0]\nsise = 1\n", ":3: [zram0] sise:", ["did you mean size?"]),
        ("[zram0]\nzram-size = '1G'\n", ":2: [zram0] zram-size:", ["did you mean size?"]),
        ("[zram0]\ncompresion-algorithm = 'lz4'\n", ":2: [zram0] compresion-algorithm:", ["compression-algorithm?"]),
        ("[zram0]\n[server]\n\nunixmode = '0600'\n", ":4: [server] unixmode:", ["unix-mode?"]),
        ("[zram0]\n[server]\nqqq = 1\n", ":3: [server] qqq:", ["unix", "tcp", "plain-tcp-beyond-loopback"]),
        ("[zram0]\n[tls]\ncertificate = '/a'\n", ":3: [tls] certificate:", ["certificates?"]),
        ("[zram0]\n[access]\nuser = 'root'\n", ":3: [access] user:", ["users?"]),
        ("[zram0]\n[limits]\nconections = 5\n", ":3: [limits] conections:", ["connections?"]),
        ("# nothing\n[zram0]\n[sever]\n", ":3: [sever]:", ["server?"]),
        ("[zram0]\n[zram]\n", ":2: [zram]:", ["zram0?"]),
        ("[zram0]\n[zramX]\n", ":2: [zramX]:", ["no such table"]),
        ("[zram0]\n['zram٣']\n", ":2: [zram٣]:", ["no such table"]),
        ("[zram0]\n[xyz]\n", ":2: [xyz]:", ["server", "tls", "access", "limits", "zram0"]),
        ("size = 1\n[zram0]\n", ":1: size:", ["table", "[server]", "[zram0]"]),
        ("\nzram0 = 5\n", ":2: zram0:", ["table"]),
        ("[[zram0]]\n", ":1: zram0:", ["table"]),
        ("[zram0]\n[zram0.size]\n", ":1: [zram0] size:", ["{}"]),
        # Nothing to serve.
        ("", ": there is no disk", ["[zram0]"]),
        ("[server]\nunix = '/a'\n", ": there is no disk", ["[zram0]"]),
        # Values of the wrong type.
        ("[zram0]\nsize = true\n", ":2: [zram0] size:", ["True"]),
        ("[zram0]\nsize = 1.5\n", ":2: [zram0] size:", ["1.5"]),
        ("[zram0]\nsize = ['1G']\n", ":2: [zram0] size:", ["['1G']"]),
        ("[zram0]\nsize = ''\n", ":2: [zram0] size:", ["''"]),
        ("[zram0]\nsize = 2026-01-01\n", ":2: [zram0] size:", ["2026"]),
        ("[zram0]\nchain-size = '8'\n", ":2: [zram0] chain-size:", ["'8' is not a number from 4 to 16"]),
        ("[zram0]\nchain-size = true\n", ":2: [zram0] chain-size:", ["True is not a number"]),
        ("[zram0]\nchain-size = 8.0\n", ":2: [zram0] chain-size:", ["8.0 is not a number"]),
        ("[zram0]\nchain-size = 0\n", ":2: [zram0] chain-size:", ["from 4 to 16"]),
        ("[zram0]\nchain-size = 17\n", ":2: [zram0] chain-size:", ["from 4 to 16"]),
        ("[zram0]\nvolatile = 1\n", ":2: [zram0] volatile:", ["true or false"]),
        ("[zram0]\nvolatile = 'true'\n", ":2: [zram0] volatile:", ["true or false"]),
        ("[zram0]\nread-only = 0\n", ":2: [zram0] read-only:", ["true or false"]),
        ("[zram0]\ndescription = true\n", ":2: [zram0] description:", ["text in quotes"]),
        ("[zram0]\ndescription = ['a']\n", ":2: [zram0] description:", ["text in quotes"]),
        ("[zram0]\n[limits]\nconnections = '5'\n", ":3: [limits] connections:", ["'5' is not a number"]),
        ("[zram0]\n[limits]\nconnections = true\n", ":3: [limits] connections:", ["True is not a number"]),
        ("[zram0]\n[limits]\nhandshake-seconds = 1.5\n", ":3: [limits] handshake-seconds:", ["from 1 to 3600"]),
        ("[zram0]\n[limits]\npayload = true\n", ":3: [limits] payload:", ["True"]),
        ("[zram0]\n[tls]\nverify-clients = 'no'\n", ":3: [tls] verify-clients:", ["true or false"]),
        (
            "[zram0]\n[server]\nplain-tcp-beyond-loopback = 1\n",
            ":3: [server] plain-tcp-beyond-loopback:",
            ["true or false"],
        ),
        # Sizes.
        ("[zram0]\nsize = '1X'\n", ":2: [zram0] size:", ["'1X' is not a size", "GiB"]),
        ("[zram0]\nsize = -1\n", ":2: [zram0] size:", ["-1"]),
        ("[zram0]\nsize = '100000E'\n", ":2: [zram0] size:", ["too large"]),
        ("[zram0]\nresident-limit = 'much'\n", ":2: [zram0] resident-limit:", ["not a size"]),
        ("[zram0]\n[limits]\npayload = '64 MB'\n", ":3: [limits] payload:", ["not a size"]),
        # Algorithms.
        ("[zram0]\ncompression-algorithm = 'gzip'\n", ":2: [zram0] compression-algorithm:", ["gzip"]),
        ("[zram0]\ncompression-algorithm = 'zstd(level=99)'\n", ":2: [zram0] compression-algorithm:", ["99"]),
        ("[zram0]\ncompression-algorithm = 'zstd(dict=/no)'\n", ":2: [zram0] compression-algorithm:", ["/no"]),
        ("[zram0]\ncompression-algorithm = true\n", ":2: [zram0] compression-algorithm:", ["True"]),
        ("[zram0]\ncompression-algorithm = 'lz4 (type=idle)'\n", ":2: [zram0] compression-algorithm:", ["recompress"]),
        ("[zram0]\n[zram0.policy]\nidle-after = 0\n", ":3: [zram0.policy] idle-after:", ["1 to"]),
        ("[zram0]\n\n[zram0.policy]\nidle-afer = 5\n", ":4: [zram0.policy] idle-afer:", ["idle-after?"]),
        ("[zram0]\n[zram0.policy]\nmemory-high = '101%'\n", ":3: [zram0.policy] memory-high:", ["1% to 100%"]),
        (
            "[zram0]\n[zram0.policy]\nmemory-high = '5%'\nmemory-low = '6%'\n",
            ":4: [zram0.policy] memory-low:",
            ["above"],
        ),
        ("[zram0]\npolicy = true\n", ":2: [zram0] policy:", ["[zram0.policy]"]),
        # Addresses and paths.
        ("[zram0]\n[server]\ntcp = 'localhost'\n", ":3: [server] tcp:", ["HOST:PORT", "[::1]:10809"]),
        ("[zram0]\n[server]\ntcp = ['localhost:1', 'localhost:0']\n", ":3: [server] tcp:", ["'localhost:0'"]),
        ("[zram0]\n[server]\ntcp = 'localhost:65536'\n", ":3: [server] tcp:", ["HOST:PORT"]),
        ("[zram0]\n[server]\ntcp = 10809\n", ":3: [server] tcp:", ["HOST:PORT"]),
        ("[zram0]\n[server]\ntcp = true\n", ":3: [server] tcp:", ["True"]),
        ("[zram0]\n[server]\nunix = 'a.nbd'\n", ":3: [server] unix:", ["'a.nbd' is not an absolute path"]),
        ("[zram0]\n[server]\nunix = ['/a', '']\n", ":3: [server] unix:", ["''"]),
        ("[zram0]\nstate = 'kept'\n", ":2: [zram0] state:", ["absolute"]),
        ("[zram0]\nstatus = 'kept'\n", ":2: [zram0] status:", ["absolute"]),
        ("[zram0]\nadmin = 'kept'\n", ":2: [zram0] admin:", ["absolute"]),
        ("[zram0]\n[tls]\ncertificates = 'tls'\n", ":3: [tls] certificates:", ["absolute"]),
        ("[zram0]\n[tls]\npsk-file = ''\n", ":3: [tls] psk-file:", ["''"]),
        # What the server would refuse to listen on.
        ("[zram0]\n[server]\ntcp = ['localhost:1', '0.0.0.0:1']\n", ":3: [server] tcp:", ["require TLS"]),
        ("[zram0]\n[server]\nweb = ':8080'\n", ":3: [server] web:", ["loopback"]),
        ("[zram0]\n[server]\nmetrics = '[2001:db8::1]:9586'\n", ":3: [server] metrics:", ["loopback"]),
        # Modes, users and groups.
        ("[zram0]\n[server]\nunix-mode = '0999'\n", ":3: [server] unix-mode:", ['"0660"']),
        ("[zram0]\n[server]\nunix-mode = '04755'\n", ":3: [server] unix-mode:", ["'04755'"]),
        ("[zram0]\n[server]\nunix-mode = 'rw'\n", ":3: [server] unix-mode:", ["'rw'"]),
        ("[zram0]\n[server]\nunix-mode = true\n", ":3: [server] unix-mode:", ["True"]),
        ("[zram0]\n[server]\nunix-owner = 'no such user'\n", ":3: [server] unix-owner:", ["no user 'no such user'"]),
        ("[zram0]\n[server]\nunix-group = 'no such group'\n", ":3: [server] unix-group:", ["no group 'no such group'"]),
        ("[zram0]\n[server]\nunix-owner = -1\n", ":3: [server] unix-owner:", ["-1"]),
        ("[zram0]\nstatus-group = 'no such group'\n", ":2: [zram0] status-group:", ["no group 'no such group'"]),
        ("[zram0]\n[access]\nusers = ['root', 'nobody at all']\n", ":3: [access] users:", ["no user 'nobody at all'"]),
        ("[zram0]\n[access]\ngroups = ['no such group']\n", ":3: [access] groups:", ["no group"]),
        ("[zram0]\n[access]\nusers = [true]\n", ":3: [access] users:", ["True"]),
        # What does not go together.
        ("[zram0]\nstate = '/a'\nvolatile = true\n", ":3: [zram0] volatile:", ["state", "volatile"]),
        ("[zram0]\n[tls]\nmode = 'maybe'\n", ":3: [tls] mode:", ["off, on, require"]),
        ("[zram0]\n[tls]\nmode = true\n", ":3: [tls] mode:", ["off, on, require"]),
        ("[zram0]\n[tls]\nmode = ['on']\n", ":3: [tls] mode:", ["off, on, require"]),
        ("[zram0]\n[tls]\nmode = 'on'\n", ":3: [tls] mode:", ["certificates", "psk-file"]),
        (
            "[zram0]\n[tls]\nmode = 'require'\ncertificates = '/a'\npsk-file = '/b'\n",
            ":3: [tls] mode:",
            ["either", "certificates", "psk-file"],
        ),
        ("[zram0]\n[access]\ncertificate-names = 'a'\n", ":3: [access] certificate-names:", ["require", "[tls]"]),
        (
            "[zram0]\n[tls]\nmode = 'on'\ncertificates = '/a'\n[access]\ncertificate-names = 'a'\n",
            ":6: [access] certificate-names:",
            ["require", "[tls]"],
        ),
        (
            "[zram0]\n[tls]\nmode = 'on'\npsk-file = '/a'\n[access]\ncertificate-names = 'a'\n",
            ":6: [access] certificate-names:",
            ["certificates of clients"],
        ),
        (
            "[zram0]\n[tls]\nmode = 'on'\ncertificates = '/a'\nverify-clients = false\n"
            "[access]\ncertificate-names = 'a'\n",
            ":7: [access] certificate-names:",
            ["certificates of clients"],
        ),
        # Not TOML.
        ("[zram0\n", ": ", ["line 1"]),
        ("[zram0]\nsize = 1G\n", ": ", ["line 2"]),
        ("[zram0]\nsize = '1G'\nsize = '2G'\n", ": ", ["line 3"]),
        ("[zram0]\n[server]\n[zram0]\n", ": ", ["line 3"]),
    ],
    ids=lambda value: json.dumps(value)[:60] if isinstance(value, str) and "\n" in value else "",
)
def test_an_error_names_the_line_the_key_and_what_to_do(path: Path, text: str, where: str, words: list[str]) -> None:
    line = refuse(path, text)
    assert line.startswith(where)
    for word in words:
        assert word in line.removeprefix(where)


@pytest.mark.parametrize(
    "text",
    [
        '[zram0]\n"a\\nb" = 1\n',
        '[zram0]\n["a\\nb"]\n',
        '"a\\nb" = 1\n[zram0]\n',
        '[zram0]\n"" = 1\n',
        '[zram0]\n[""]\n',
        '[zram0]\n"\\u001b[31m" = 1\n',
    ],
)
def test_an_odd_name_makes_no_odd_line(path: Path, text: str) -> None:
    assert refuse(path, text).isprintable()


@pytest.mark.parametrize(
    "text",
    [
        "[zram0]\nsize = " + "9" * 5000,
        "[zram0]\nsize = 0x" + "f" * 5000,
        "[zram0]\nchain-size = 0x" + "f" * 5000,
        "[zram0]\nsize = " + "[" * 2000 + "]" * 2000,
        "[zram0]\nx = " + "{a = " * 2000 + "1" + "}" * 2000,
        "[zram0" + ".a" * 5000 + "]\n",
        "[zram0]\nsize = 9999-99-99\n",
        "[zram0]\nsize = nan\n",
        "[zram0]\nsize = 1e999\n",
        "[zram0]\n[server]\nunix-owner = '" + "9" * 5000 + "'\n",
    ],
    ids=lambda text: text[:20],
)
def test_what_is_much_too_large_is_refused_in_one_line(path: Path, text: str) -> None:
    assert len(refuse(path, text)) < 30_000


@pytest.mark.parametrize("key", ["unix-owner", "unix-group"])
@pytest.mark.parametrize("number", [2**32 - 1, 2**32, 2**64, 10**30])
def test_a_number_that_is_no_user_or_group_is_refused(path: Path, key: str, number: int) -> None:
    text = f"[server]\nunix = '/a'\n{key} = '{number}'\n[zram0]\n"
    assert refuse(path, text).startswith(f":3: [server] {key}: ")


@pytest.mark.parametrize(
    "line",
    [
        'unix = "/a\\u0000b"',
        'unix = "/"',
        'unix-owner = "a\\u0000b"',
        'unix-group = "a\\u0000b"',
    ],
)
def test_what_the_system_cannot_name_is_refused_in_the_server(path: Path, line: str) -> None:
    assert refuse(path, f"[zram0]\n[server]\n{line}\n").startswith(":3: [server] unix")


@pytest.mark.parametrize("line", ['status = "/"', 'admin = "/"', 'state = "/a\\u0000b"', 'status = "/a\\u0000b"'])
def test_what_the_system_cannot_name_is_refused_in_a_disk(path: Path, line: str) -> None:
    assert refuse(path, f"[zram0]\n{line}\n").startswith(":2: [zram0] ")


@pytest.mark.parametrize("text", ['"a\\u0000b"', '"' + "ü" * 2027 + '"'])
def test_a_description_that_the_protocol_cannot_carry_is_refused(path: Path, text: str) -> None:
    assert refuse(path, f"[zram0]\ndescription = {text}\n").startswith(":2: [zram0] description: ")


def test_a_description_leaves_room_for_a_uuid(path: Path) -> None:
    (disk,) = parse(path, f"[zram0]\ndescription = '{'ü' * 2026}'\n").disks
    assert len(f"{disk.description}, UUID {uuid.uuid4()}".encode()) <= 4096


def test_a_file_that_is_missing_is_named(path: Path) -> None:
    with pytest.raises(ConfigError, match=f"^cannot read {re.escape(str(path))}: No such file"):
        load(path)


def test_a_directory_is_no_configuration(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=f"^cannot read {re.escape(str(tmp_path))}: Is a directory"):
        load(tmp_path)


@pytest.mark.parametrize("data", [b"\xff\xfe[zram0]", b"[zram0]\ndescription = '\xe4'\n"])
def test_a_file_that_is_not_utf_8_is_refused(path: Path, data: bytes) -> None:
    path.write_bytes(data)
    with pytest.raises(ConfigError, match=f"^{re.escape(str(path))} is not UTF-8 text$"):
        load(path)


def test_a_file_without_an_end_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"^/dev/zero has more than 1048576 characters"):
        load(Path("/dev/zero"))


def test_a_file_that_may_not_be_read_is_named(path: Path) -> None:
    if os.geteuid() == 0:
        pytest.skip("root may read everything: run the tests as another user")
    path.write_text("[zram0]\n")
    path.chmod(0)
    with pytest.raises(ConfigError, match=f"^cannot read {re.escape(str(path))}: Permission denied"):
        load(path)


# The parts


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("localhost:1", ("localhost", 1)),
        ("[::1]:65535", ("::1", 65535)),
        (":10809", ("", 10809)),
        ("192.0.2.1:80", ("192.0.2.1", 80)),
    ],
)
def test_an_address_is_a_host_and_a_port(text: str, address: tuple[str, int]) -> None:
    assert parse_address(text) == address


@pytest.mark.parametrize("text", ["", ":", "a", "a:", "a:-1", "a:0", "a:65536", "a:http", "a: 1", "a:1 ", "a:0x1"])
def test_what_is_no_address_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="is not HOST:PORT"):
        parse_address(text)


def test_users_and_groups_have_names_and_numbers() -> None:
    user, group = pwd.getpwuid(os.getuid()), grp.getgrgid(os.getgid())
    assert find_user(user.pw_name) == find_user(str(user.pw_uid)) == find_user(user.pw_uid) == user.pw_uid
    assert find_group(group.gr_name) == find_group(str(group.gr_gid)) == find_group(group.gr_gid) == group.gr_gid
    with pytest.raises(ValueError, match="there is no user"):
        find_user("no such user")
    with pytest.raises(ValueError, match="there is no group"):
        find_group("no such group")


# Whatever stands in the file

TABLES = ["server", "tls", "access", "limits", "zram0", "zram1", "sever"]
KEYS = [*re.findall(r"(?m)^([a-z-]+) = ", WHOLE), "psk-file", "nothing"]
SCALARS = st.one_of(
    st.sampled_from(
        ['"1G"', '"0660"', '"/a"', '"root"', '"on"', '"off"', '"require"', '"zstd(level=3)"', '"a:1"', "8"]
    ),
    st.booleans().map(lambda value: str(value).lower()),
    st.integers(-(2**70), 2**70).map(str),
    st.floats().map(str),
    st.text().map(json.dumps),
    st.sampled_from(["1979-05-27T07:32:00Z", "1979-05-27", "07:32:00", "0o777", "0b1", "0xFF", "'''a\nb'''", "inf"]),
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: (
        st.lists(inner, max_size=3).map(lambda parts: f"[{', '.join(parts)}]")
        | st.dictionaries(st.sampled_from(KEYS), inner, max_size=2).map(
            lambda parts: "{" + ", ".join(f"{key} = {value}" for key, value in parts.items()) + "}"
        )
    ),
    max_leaves=4,
)
LINES = st.tuples(st.sampled_from(KEYS) | st.text(max_size=5).map(json.dumps), VALUES).map(" = ".join)
HEADERS = st.sampled_from(TABLES).map("[{}]".format) | st.text(max_size=5).map(lambda text: f"[{json.dumps(text)}]")
DOCUMENTS = st.lists(
    st.tuples(HEADERS, st.lists(LINES, max_size=3)).map(lambda part: "\n".join((part[0], *part[1]))), max_size=5
).map("\n".join)


@settings(max_examples=400, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=DOCUMENTS | st.text(alphabet=st.characters(codec="utf-8")))
@example(text="[zram0]\nstatus = '/'\n")
def test_any_document_gives_settings_or_one_line(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8", errors="replace", newline="")
    found = outcome(path)
    assert found.isprintable() if isinstance(found, str) else found.disks


@settings(max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(key=st.sampled_from(KEYS), value=VALUES)
def test_any_value_in_a_whole_document_gives_settings_or_names_its_key_and_line(
    path: Path, key: str, value: str
) -> None:
    table = next(
        (name for name, body in re.findall(r"(?ms)^\[(\w+)\]$(.*?)(?=^\[|\Z)", WHOLE) if f"\n{key} = " in body), "zram0"
    )
    text = re.sub(rf"(?m)^{key} = .*\n", "", WHOLE)
    text = text.replace(f"[{table}]\n", f"[{table}]\n{key} = {value}\n")
    number = text[: text.index(f"\n{key} = ")].count("\n") + 2
    path.write_text(text, encoding="utf-8", errors="replace")
    found = outcome(path)
    if isinstance(found, str):
        assert found.isprintable()
        # Or it goes badly with a key that was there, or is no TOML.
        assert any(part in found for part in (f":{number}: [{table}] {key}: ", "needs", "exclude", "(at line "))
