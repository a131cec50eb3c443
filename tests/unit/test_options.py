import itertools
import socket
import struct
import uuid
from collections.abc import Callable
from dataclasses import replace

import pytest

from tests.nbd_bytes import (
    ABORT,
    ACK,
    ERR_EXT_HEADER_REQD,
    ERR_INVALID,
    ERR_POLICY,
    ERR_SHUTDOWN,
    ERR_TLS_REQD,
    ERR_TOO_BIG,
    ERR_UNKNOWN,
    ERR_UNSUP,
    EXPORT_NAME,
    EXTENDED_HEADERS,
    FIXED_NEWSTYLE,
    GO,
    GREETING,
    INFO,
    INFO_REPLY,
    LIST,
    LIST_META_CONTEXT,
    META_CONTEXT,
    NO_ZEROES,
    PEEK_EXPORT,
    SERVER,
    SET_META_CONTEXT,
    STARTTLS,
    STRUCTURED_REPLY,
    Peer,
    client_flags,
    context_request,
    exchange,
    info_request,
    option,
    option_reply,
    receive,
    receive_rest,
    without_option_texts,
)
from zramd.device.disk import Disk
from zramd.device.opening import OpenDevice
from zramd.nbd.block_status import Context
from zramd.nbd.export import Export, Exports
from zramd.nbd.handshake import Handshake, Session
from zramd.nbd.limits import DEFAULT_LIMITS, Limits
from zramd.nbd.protocol import SessionError
from zramd.nbd.terms import Mode, Terms
from zramd.nbd.tls import TlsMode

SIZE = 64 << 20
WRITABLE, READ_ONLY = 0b1101_0110_1101, 0b0101_0000_1111
DF, BLOCK_STATUS_PAYLOAD = 1 << 7, 1 << 12
NAME, DESCRIPTION, BLOCK_SIZE = 1, 2, 3

ALLOCATION, STATE = (1, b"base:allocation"), (2, b"zramd:state")
GOODBYE = option_reply(ABORT, ACK)
UUID = b"0f3c9a52-6d1b-4f0e-9c55-3a1f6f2f7a10"

Secure = Callable[[socket.socket, float], socket.socket]


@pytest.fixture
def exports(opened: OpenDevice) -> Exports:
    """Return two exports of one device, the second of which is read-only; the first is the default."""
    opened.device.identity = replace(opened.device.identity, uuid=uuid.UUID(UUID.decode()))
    disk = Disk("disk", None)
    disk.opened = opened
    return Exports([Export("disk", "a disk", disk), Export("locked", "", disk, read_only=True)])


def negotiate(
    exports: Exports,
    *pieces: bytes,
    secure: Secure | None = None,
    tls: TlsMode = TlsMode.OFF,
    limits: Limits = DEFAULT_LIMITS,
    stopping: bool = False,
) -> tuple[bytes, object]:
    """Return all that the server sent, and the terms that the handshake ended on, or None, or its error."""

    def connect(export: Export) -> OpenDevice:
        assert export.disk.opened is not None
        return export.disk.opened

    def serve(sock: socket.socket) -> Terms | None:
        session = Handshake(sock, exports, connect, secure, tls, limits, lambda: stopping).run()
        return session.terms if isinstance(session, Session) else None

    with Peer(serve) as peer:
        return exchange(peer.client, *pieces), peer.join()


def replies_to(sent: bytes) -> bytes:
    """Return the option replies in what a server sent, without the texts of errors."""
    assert sent.startswith(GREETING)
    return without_option_texts(sent[len(GREETING) :])


def set_contexts(name: bytes, *queries: bytes) -> bytes:
    return option(SET_META_CONTEXT, context_request(name, *queries))


def list_contexts(name: bytes, *queries: bytes) -> bytes:
    return option(LIST_META_CONTEXT, context_request(name, *queries))


def go(name: bytes = b"disk", *types: int) -> bytes:
    return option(GO, info_request(name, *types))


def selected(*contexts: tuple[int, bytes]) -> bytes:
    replies = (
        option_reply(SET_META_CONTEXT, META_CONTEXT, struct.pack(">I", number) + name) for number, name in contexts
    )
    return b"".join(replies) + option_reply(SET_META_CONTEXT, ACK)


def listed(*names: bytes) -> bytes:
    replies = (option_reply(LIST_META_CONTEXT, META_CONTEXT, bytes(4) + name) for name in names)
    return b"".join(replies) + option_reply(LIST_META_CONTEXT, ACK)


def information(kind: int = GO, flags: int = WRITABLE, payload: int = 64 << 20) -> bytes:
    """Return the replies to an INFO or GO that asks for nothing more."""
    about = option_reply(kind, INFO_REPLY, struct.pack(">HQH", 0, SIZE, flags))
    sizes = option_reply(kind, INFO_REPLY, struct.pack(">HIII", BLOCK_SIZE, 1, 4096, payload))
    return about + sizes + option_reply(kind, ACK)


# Options that need others, exclude others, or take no data

STRUCTURED = option(STRUCTURED_REPLY)
EXTENDED = option(EXTENDED_HEADERS)
BOTH = set_contexts(b"disk", b"base:allocation", b"zramd:state")
STRUCTURED_ACK, EXTENDED_ACK = option_reply(STRUCTURED_REPLY, ACK), option_reply(EXTENDED_HEADERS, ACK)
LISTED = (
    option_reply(LIST, SERVER, b"\0\0\0\4disk" + b"a disk, UUID " + UUID)
    + option_reply(LIST, SERVER, b"\0\0\0\6locked" + b"UUID " + UUID)
    + option_reply(LIST, ACK)
)

CONVERSATIONS: dict[str, list[tuple[bytes, bytes]]] = {
    "PEEK_EXPORT is unknown": [(option(PEEK_EXPORT, b"disk"), option_reply(PEEK_EXPORT, ERR_UNSUP))],
    "STARTTLS without TLS, twice": [(option(STARTTLS), option_reply(STARTTLS, ERR_POLICY))] * 2,
    "STARTTLS without TLS forgets nothing": [
        (STRUCTURED, STRUCTURED_ACK),
        (BOTH, selected(ALLOCATION, STATE)),
        (option(STARTTLS), option_reply(STARTTLS, ERR_POLICY)),
        (option(INFO, info_request(b"disk")), information(INFO, WRITABLE | DF)),
    ],
    "STRUCTURED_REPLY with data changes nothing": [
        (option(STRUCTURED_REPLY, b"x"), option_reply(STRUCTURED_REPLY, ERR_INVALID)),
        (BOTH, option_reply(SET_META_CONTEXT, ERR_INVALID)),
        (option(INFO, info_request(b"disk")), information(INFO)),
    ],
    "EXTENDED_HEADERS with data changes nothing": [
        (option(EXTENDED_HEADERS, bytes(4)), option_reply(EXTENDED_HEADERS, ERR_INVALID)),
        (STRUCTURED, STRUCTURED_ACK),
    ],
    "STRUCTURED_REPLY twice": [(STRUCTURED, STRUCTURED_ACK)] * 2,
    "EXTENDED_HEADERS twice": [(EXTENDED, EXTENDED_ACK)] * 2,
    "STRUCTURED_REPLY after EXTENDED_HEADERS": [
        (EXTENDED, EXTENDED_ACK),
        (STRUCTURED, option_reply(STRUCTURED_REPLY, ERR_EXT_HEADER_REQD)),
        (BOTH, selected(ALLOCATION, STATE)),
        (option(INFO, info_request(b"disk")), information(INFO, WRITABLE | DF | BLOCK_STATUS_PAYLOAD)),
    ],
    "EXTENDED_HEADERS after STRUCTURED_REPLY": [
        (STRUCTURED, STRUCTURED_ACK),
        (EXTENDED, EXTENDED_ACK),
        (STRUCTURED, option_reply(STRUCTURED_REPLY, ERR_EXT_HEADER_REQD)),
    ],
    "contexts before structured replies": [
        (list_contexts(b"disk"), option_reply(LIST_META_CONTEXT, ERR_INVALID)),
        (BOTH, option_reply(SET_META_CONTEXT, ERR_INVALID)),
        (STRUCTURED, STRUCTURED_ACK),
        (option(INFO, info_request(b"disk")), information(INFO, WRITABLE | DF)),
        (list_contexts(b"disk"), listed(b"base:allocation", b"zramd:state")),
    ],
    "LIST between the others": [
        (option(LIST), LISTED),
        (EXTENDED, EXTENDED_ACK),
        (option(LIST), LISTED),
        (option(LIST, b"disk"), option_reply(LIST, ERR_INVALID)),
        (option(LIST), LISTED),
    ],
    "INFO and GO of unknown exports, then of known ones": [
        (option(INFO, info_request(b"none")), option_reply(INFO, ERR_UNKNOWN)),
        (go(b"none"), option_reply(GO, ERR_UNKNOWN)),
        (option(INFO, info_request(b"locked")), information(INFO, READ_ONLY)),
        (option(INFO, info_request(b"")), information(INFO, WRITABLE)),
    ],
    "malformed GO between good INFO": [
        (option(INFO, info_request(b"disk")), information(INFO)),
        (option(GO, info_request(b"disk") + b"\0"), option_reply(GO, ERR_INVALID)),
        (option(INFO, info_request(b"disk")), information(INFO)),
    ],
}


@pytest.mark.parametrize("steps", CONVERSATIONS.values(), ids=CONVERSATIONS.keys())
def test_every_option_is_answered_by_what_came_before_it(exports: Exports, steps: list[tuple[bytes, bytes]]) -> None:
    asked = b"".join(question for question, _ in steps)
    sent, outcome = negotiate(exports, client_flags() + asked + option(ABORT))
    assert replies_to(sent) == b"".join(answer for _, answer in steps) + GOODBYE
    assert outcome is None


@pytest.mark.parametrize("name", [b"", b"disk", b"none"])
@pytest.mark.parametrize("before", [EXTENDED, STRUCTURED + EXTENDED, EXTENDED + STRUCTURED], ids=len)
def test_export_name_after_extended_headers_ends_the_session(exports: Exports, before: bytes, name: bytes) -> None:
    whole, _ = negotiate(exports, client_flags() + before)
    sent, outcome = negotiate(exports, client_flags() + before + option(EXPORT_NAME, name))
    assert sent == whole
    assert isinstance(outcome, SessionError)


@pytest.mark.parametrize("flags", [FIXED_NEWSTYLE, FIXED_NEWSTYLE | NO_ZEROES])
@pytest.mark.parametrize(("name", "transmission_flags"), [(b"disk", WRITABLE | DF), (b"locked", READ_ONLY | DF)])
def test_export_name_after_structured_replies_tells_of_df(
    exports: Exports, flags: int, name: bytes, transmission_flags: int
) -> None:
    sent, outcome = negotiate(exports, client_flags(flags) + STRUCTURED + option(EXPORT_NAME, name))
    zeroes = b"" if flags & NO_ZEROES else bytes(124)
    assert sent == GREETING + STRUCTURED_ACK + struct.pack(">QH", SIZE, transmission_flags) + zeroes
    assert isinstance(outcome, Terms)
    assert outcome.mode is Mode.STRUCTURED
    assert outcome.read_only == (name == b"locked")


# What a dialogue leads to

NOTHING: tuple[Context, ...] = ()
SIMPLE_MODE, STRUCTURED_MODE, EXTENDED_MODE = Mode.SIMPLE, Mode.STRUCTURED, Mode.EXTENDED
BOTH_CONTEXTS = (Context.ALLOCATION, Context.STATE)
MALFORMED_SET = option(SET_META_CONTEXT, context_request(b"disk", b"base:allocation") + b"x")

OUTCOMES: dict[str, tuple[bytes, Terms]] = {
    "nothing": (b"", Terms()),
    "structured": (STRUCTURED, Terms(STRUCTURED_MODE)),
    "structured refused": (option(STRUCTURED_REPLY, b"x"), Terms()),
    "extended": (EXTENDED, Terms(EXTENDED_MODE)),
    "extended refused": (option(EXTENDED_HEADERS, b"x"), Terms()),
    "structured, then extended": (STRUCTURED + EXTENDED, Terms(EXTENDED_MODE)),
    "extended, then structured": (EXTENDED + STRUCTURED, Terms(EXTENDED_MODE)),
    "one context": (STRUCTURED + set_contexts(b"disk", b"zramd:state"), Terms(STRUCTURED_MODE, (Context.STATE,))),
    "both contexts": (STRUCTURED + BOTH, Terms(STRUCTURED_MODE, BOTH_CONTEXTS)),
    "both contexts, extended": (EXTENDED + BOTH, Terms(EXTENDED_MODE, BOTH_CONTEXTS)),
    "the default export is the same export": (
        STRUCTURED + set_contexts(b"", b"base:allocation"),
        Terms(STRUCTURED_MODE, (Context.ALLOCATION,)),
    ),
    "contexts of another export": (STRUCTURED + set_contexts(b"locked", b"base:allocation"), Terms(STRUCTURED_MODE)),
    "contexts before structured replies": (BOTH + STRUCTURED, Terms(STRUCTURED_MODE)),
    "the last set counts": (
        EXTENDED + BOTH + set_contexts(b"disk", b"zramd:state"),
        Terms(EXTENDED_MODE, (Context.STATE,)),
    ),
    "a set for another export replaces": (EXTENDED + BOTH + set_contexts(b"locked"), Terms(EXTENDED_MODE)),
    "no queries": (EXTENDED + BOTH + set_contexts(b"disk"), Terms(EXTENDED_MODE)),
    "a namespace selects nothing": (EXTENDED + BOTH + set_contexts(b"disk", b"base:"), Terms(EXTENDED_MODE)),
    "a set that is malformed": (EXTENDED + BOTH + MALFORMED_SET, Terms(EXTENDED_MODE)),
    "a set that is empty": (EXTENDED + BOTH + option(SET_META_CONTEXT), Terms(EXTENDED_MODE)),
    "a set for an unknown export": (EXTENDED + BOTH + set_contexts(b"none", b"zramd:state"), Terms(EXTENDED_MODE)),
    "a list changes nothing": (
        EXTENDED + BOTH + list_contexts(b"disk", b"base:") + list_contexts(b"locked"),
        Terms(EXTENDED_MODE, BOTH_CONTEXTS),
    ),
    "a failed list changes nothing": (
        EXTENDED + BOTH + list_contexts(b"none") + option(LIST_META_CONTEXT),
        Terms(EXTENDED_MODE, BOTH_CONTEXTS),
    ),
    "a failed GO changes nothing": (
        EXTENDED + BOTH + go(b"none") + option(GO),
        Terms(EXTENDED_MODE, BOTH_CONTEXTS),
    ),
    "INFO of another export changes nothing": (
        EXTENDED + BOTH + option(INFO, info_request(b"locked")),
        Terms(EXTENDED_MODE, BOTH_CONTEXTS),
    ),
}


@pytest.mark.parametrize(("before", "terms"), OUTCOMES.values(), ids=OUTCOMES.keys())
def test_go_leads_to_the_terms_that_were_asked_for_and_flags_say_them(
    exports: Exports, before: bytes, terms: Terms
) -> None:
    sent, outcome = negotiate(exports, client_flags() + before + go())
    flags = WRITABLE
    if terms.mode is not Mode.SIMPLE:
        flags |= DF
    if terms.mode is Mode.EXTENDED and terms.contexts:
        flags |= BLOCK_STATUS_PAYLOAD
    assert outcome == terms
    assert replies_to(sent).endswith(information(GO, flags))


def test_contexts_set_for_one_export_are_gone_when_go_names_another(exports: Exports) -> None:
    sent, outcome = negotiate(exports, client_flags() + EXTENDED + BOTH + go(b"locked"))
    assert sent == GREETING + EXTENDED_ACK + selected(ALLOCATION, STATE) + information(GO, READ_ONLY | DF)
    assert outcome == Terms(Mode.EXTENDED, (), read_only=True)


@pytest.mark.parametrize("types", [(), (NAME, DESCRIPTION, BLOCK_SIZE), (0, 99, NAME)], ids=len)
@pytest.mark.parametrize("name", [b"", b"disk", b"locked"])
@pytest.mark.parametrize("before", [b"", STRUCTURED, STRUCTURED + BOTH, EXTENDED, EXTENDED + BOTH], ids=len)
def test_info_and_go_agree(exports: Exports, before: bytes, name: bytes, types: tuple[int, ...]) -> None:
    data = info_request(name, *types)
    start, _ = negotiate(exports, client_flags() + before)
    sent, outcome = negotiate(exports, client_flags() + before + option(INFO, data) + option(GO, data))
    replies = sent[len(start) :]
    half = len(replies) // 2
    assert (
        replies[:half].replace(struct.pack(">QI", 0x3E889045565A9, INFO), struct.pack(">QI", 0x3E889045565A9, GO))
        == (replies[half:])
    )
    assert replies.endswith(option_reply(GO, ACK))
    assert isinstance(outcome, Terms)


@pytest.mark.parametrize("before", [*itertools.permutations([EXTENDED, STRUCTURED, BOTH, option(LIST)])])
def test_options_in_any_order_lead_to_extended_headers_without_what_came_too_early(
    exports: Exports, before: tuple[bytes, ...]
) -> None:
    _, outcome = negotiate(exports, client_flags() + b"".join(before) + go())
    too_early = before.index(BOTH) < min(before.index(EXTENDED), before.index(STRUCTURED))
    assert outcome == Terms(Mode.EXTENDED, () if too_early else BOTH_CONTEXTS)


# Contexts

QUERIES: dict[str, tuple[list[bytes], list[bytes], list[tuple[int, bytes]]]] = {
    "none": ([], [b"base:allocation", b"zramd:state"], []),
    "one": ([b"base:allocation"], [b"base:allocation"], [ALLOCATION]),
    "the other": ([b"zramd:state"], [b"zramd:state"], [STATE]),
    "both": ([b"base:allocation", b"zramd:state"], [b"base:allocation", b"zramd:state"], [ALLOCATION, STATE]),
    "twice": ([b"zramd:state"] * 3, [b"zramd:state"], [STATE]),
    "a namespace": ([b"base:"], [b"base:allocation"], []),
    "namespaces": ([b"zramd:", b"base:"], [b"base:allocation", b"zramd:state"], []),
    "a namespace and one in it": ([b"base:", b"base:allocation"], [b"base:allocation"], [ALLOCATION]),
    "an unknown one": ([b"base:nothing"], [], []),
    "an unknown namespace": ([b"qemu:dirty-bitmap:x", b"qemu:", b"x-:"], [], []),
    "unknown ones among known ones": (
        [b"qemu:", b"zramd:state", b"base:nothing", b"base:allocation\xc3\xa9"],
        [b"zramd:state"],
        [STATE],
    ),
    "no colon": ([b"base", b"", b"allocation"], [], []),
    "only a colon": ([b":"], [], []),
    "a beginning, an end, another case, spaces": (
        [b"base:alloc", b"base:allocation:", b"BASE:ALLOCATION", b" base:allocation", b"base:allocation "],
        [],
        [],
    ),
    "the longest": ([b"base:" + b"x" * 4091], [], []),
    "many": ([*([b"qemu:dirty-bitmap:name"] * 1023), b"zramd:state"], [b"zramd:state"], [STATE]),
    "many empty ones": ([b""] * 1024, [], []),
    "both 512 times": (
        [b"zramd:state", b"base:allocation"] * 512,
        [b"base:allocation", b"zramd:state"],
        [ALLOCATION, STATE],
    ),
}


@pytest.mark.parametrize(("queries", "found", "chosen"), QUERIES.values(), ids=QUERIES.keys())
@pytest.mark.parametrize("mode", [STRUCTURED, EXTENDED], ids=["structured", "extended"])
def test_queries_list_names_and_namespaces_and_select_only_names(
    exports: Exports, mode: bytes, queries: list[bytes], found: list[bytes], chosen: list[tuple[int, bytes]]
) -> None:
    asked = list_contexts(b"disk", *queries) + set_contexts(b"disk", *queries)
    sent, outcome = negotiate(exports, client_flags() + mode + asked + go())
    flags = WRITABLE | DF | (BLOCK_STATUS_PAYLOAD if mode == EXTENDED and chosen else 0)
    answer = STRUCTURED_ACK if mode == STRUCTURED else EXTENDED_ACK
    assert sent == GREETING + answer + listed(*found) + selected(*chosen) + information(GO, flags)
    assert isinstance(outcome, Terms)
    assert [int(context) for context in outcome.contexts] == [number for number, _ in chosen]


QUERY = b"base:allocation"
NUMBERED = struct.pack(">I", len(QUERY)) + QUERY
MALFORMED = {
    "empty": b"",
    "half a length": b"\0\0\0",
    "no number of queries": b"\0\0\0\4disk",
    "half a number of queries": b"\0\0\0\4disk\0\0",
    "name length 0xffffffff": b"\xff\xff\xff\xffdisk\0\0\0\1" + NUMBERED,
    "name length 0xfffffffc": b"\xff\xff\xff\xfcdisk\0\0\0\1" + NUMBERED,
    "name length one too long": b"\0\0\0\5disk\0\0\0\1" + NUMBERED,
    "name length one too short": b"\0\0\0\3disk\0\0\0\1" + NUMBERED,
    "name eats all": b"\0\0\0\x1bdisk\0\0\0\1" + NUMBERED,
    "more queries than there are": b"\0\0\0\4disk\0\0\0\2" + NUMBERED,
    "0xffffffff queries": b"\0\0\0\4disk\xff\xff\xff\xff" + NUMBERED,
    "fewer queries than there are": b"\0\0\0\4disk\0\0\0\0" + NUMBERED,
    "a byte behind": context_request(b"disk", QUERY) + b"\0",
    "a query one too long": b"\0\0\0\4disk\0\0\0\1\0\0\0\x10" + QUERY,
    "a query of 0xffffffff": b"\0\0\0\4disk\0\0\0\1\xff\xff\xff\xff" + QUERY,
    "a query of 0xfffffff0": b"\0\0\0\4disk\0\0\0\1\xff\xff\xff\xf0" + QUERY,
    "half a query length": b"\0\0\0\4disk\0\0\0\1\0\0",
    "a query of 4097 bytes": context_request(b"disk", b"x" * 4097),
    "a query that is not UTF-8": context_request(b"disk", b"base:\xff"),
    "a query with a NUL": context_request(b"disk", b"base:allocation\0"),
    "a name of 4097 bytes": context_request(b"x" * 4097, QUERY),
    "a name that is not UTF-8": context_request(b"\xff\xfe", QUERY),
    "a name with a NUL": context_request(b"disk\0", QUERY),
    "the last of many is bad": context_request(b"disk", *[QUERY] * 1000, b"\xff"),
}


@pytest.mark.parametrize("data", MALFORMED.values(), ids=MALFORMED.keys())
def test_malformed_queries_are_invalid_and_the_handshake_goes_on_without_contexts(
    exports: Exports, data: bytes
) -> None:
    asked = STRUCTURED + BOTH + option(LIST_META_CONTEXT, data) + option(SET_META_CONTEXT, data) + go()
    sent, outcome = negotiate(exports, client_flags() + asked)
    assert replies_to(sent) == (
        STRUCTURED_ACK
        + selected(ALLOCATION, STATE)
        + option_reply(LIST_META_CONTEXT, ERR_INVALID)
        + option_reply(SET_META_CONTEXT, ERR_INVALID)
        + information(GO, WRITABLE | DF)
    )
    assert outcome == Terms(Mode.STRUCTURED)


@pytest.mark.parametrize("queries", [[QUERY] * 1025, [b""] * 262_000], ids=len)
def test_too_many_queries_are_too_big_and_the_handshake_goes_on_without_contexts(
    exports: Exports, queries: list[bytes]
) -> None:
    asked = STRUCTURED + BOTH + list_contexts(b"disk", *queries) + set_contexts(b"disk", *queries) + go()
    sent, outcome = negotiate(exports, client_flags() + asked)
    refused = option_reply(LIST_META_CONTEXT, ERR_TOO_BIG) + option_reply(SET_META_CONTEXT, ERR_TOO_BIG)
    assert replies_to(sent) == (STRUCTURED_ACK + selected(ALLOCATION, STATE) + refused + information(GO, WRITABLE | DF))
    assert outcome == Terms(Mode.STRUCTURED)


@pytest.mark.parametrize("name", [b"none", b"x" * 4096, b"DISK"], ids=len)
def test_contexts_of_an_unknown_export_are_unknown(exports: Exports, name: bytes) -> None:
    asked = STRUCTURED + list_contexts(name) + set_contexts(name, QUERY) + option(ABORT)
    sent, _ = negotiate(exports, client_flags() + asked)
    refused = option_reply(LIST_META_CONTEXT, ERR_UNKNOWN) + option_reply(SET_META_CONTEXT, ERR_UNKNOWN)
    assert replies_to(sent) == STRUCTURED_ACK + refused + GOODBYE


# TLS

KINDS = [LIST, PEEK_EXPORT, INFO, GO, STRUCTURED_REPLY, LIST_META_CONTEXT, SET_META_CONTEXT, EXTENDED_HEADERS, 0, 4711]
DATA_OF = {
    INFO: info_request(b"disk"),
    GO: info_request(b"disk"),
    LIST_META_CONTEXT: context_request(b"disk"),
    SET_META_CONTEXT: context_request(b"disk"),
}


def as_it_is(sock: socket.socket, seconds: float) -> socket.socket:
    """Stand in for TLS: the bytes after it are the same as before it."""
    assert 0 < seconds <= DEFAULT_LIMITS.handshake_seconds
    return sock


@pytest.mark.parametrize("data", [None, b"", b"rubbish"])
@pytest.mark.parametrize("kind", KINDS)
def test_where_tls_is_required_nothing_is_told_without_it(exports: Exports, kind: int, data: bytes | None) -> None:
    asked = option(kind, DATA_OF.get(kind, b"") if data is None else data) * 2
    sent, outcome = negotiate(exports, client_flags() + asked + option(ABORT), secure=as_it_is, tls=TlsMode.REQUIRE)
    assert replies_to(sent) == option_reply(kind, ERR_TLS_REQD) * 2 + GOODBYE
    assert outcome is None


@pytest.mark.parametrize("name", [b"", b"disk", b"none"])
def test_where_tls_is_required_export_name_without_it_ends_the_session(exports: Exports, name: bytes) -> None:
    sent, outcome = negotiate(exports, client_flags() + option(EXPORT_NAME, name), secure=as_it_is, tls=TlsMode.REQUIRE)
    assert sent == GREETING
    assert isinstance(outcome, SessionError)


STARTED = option_reply(STARTTLS, ACK)


@pytest.mark.parametrize("tls", [TlsMode.ON, TlsMode.REQUIRE])
def test_after_starttls_everything_is_answered(exports: Exports, tls: TlsMode) -> None:
    asked = option(STARTTLS) + option(LIST) + EXTENDED + BOTH + option(4711) + go()
    sent, outcome = negotiate(exports, client_flags() + asked, secure=as_it_is, tls=tls)
    assert replies_to(sent) == (
        STARTED
        + LISTED
        + EXTENDED_ACK
        + selected(ALLOCATION, STATE)
        + option_reply(4711, ERR_UNSUP)
        + information(GO, WRITABLE | DF | BLOCK_STATUS_PAYLOAD)
    )
    assert outcome == Terms(Mode.EXTENDED, BOTH_CONTEXTS)


@pytest.mark.parametrize("tls", [TlsMode.ON, TlsMode.REQUIRE])
@pytest.mark.parametrize("flags", [FIXED_NEWSTYLE, FIXED_NEWSTYLE | NO_ZEROES])
def test_after_starttls_export_name_works(exports: Exports, tls: TlsMode, flags: int) -> None:
    asked = option(STARTTLS) + option(EXPORT_NAME, b"disk")
    sent, outcome = negotiate(exports, client_flags(flags) + asked, secure=as_it_is, tls=tls)
    assert sent == GREETING + STARTED + struct.pack(">QH", SIZE, WRITABLE) + (b"" if flags & NO_ZEROES else bytes(124))
    assert outcome == Terms()


@pytest.mark.parametrize("before", [STRUCTURED, EXTENDED, STRUCTURED + EXTENDED], ids=len)
def test_starttls_forgets_what_was_said_in_clear(exports: Exports, before: bytes) -> None:
    spoken = client_flags() + before + BOTH + option(STARTTLS)
    start, _ = negotiate(exports, spoken, secure=as_it_is, tls=TlsMode.ON)
    sent, outcome = negotiate(exports, spoken + BOTH + go(), secure=as_it_is, tls=TlsMode.ON)
    assert start.endswith(STARTED)
    forgotten = option_reply(SET_META_CONTEXT, ERR_INVALID) + information(GO, WRITABLE)
    assert without_option_texts(sent[len(start) :]) == forgotten
    assert outcome == Terms()
    _, outcome = negotiate(exports, spoken + before + go(), secure=as_it_is, tls=TlsMode.ON)
    assert outcome == Terms(Mode.STRUCTURED if before == STRUCTURED else Mode.EXTENDED)
    # Extended headers would make this end the session.
    _, outcome = negotiate(exports, spoken + option(EXPORT_NAME), secure=as_it_is, tls=TlsMode.ON)
    assert outcome == Terms()


@pytest.mark.parametrize("tls", [TlsMode.ON, TlsMode.REQUIRE])
def test_a_second_starttls_is_invalid_and_forgets_nothing(exports: Exports, tls: TlsMode) -> None:
    calls: list[float] = []

    def secure(sock: socket.socket, seconds: float) -> socket.socket:
        calls.append(seconds)
        return sock

    asked = option(STARTTLS) + EXTENDED + BOTH + option(STARTTLS) + go()
    sent, outcome = negotiate(exports, client_flags() + asked, secure=secure, tls=tls)
    assert option_reply(STARTTLS, ERR_INVALID) in replies_to(sent)
    assert outcome == Terms(Mode.EXTENDED, BOTH_CONTEXTS)
    assert len(calls) == 1


@pytest.mark.parametrize("data", [b"x", bytes(4096)], ids=len)
def test_starttls_with_data_is_invalid_and_starts_nothing(exports: Exports, data: bytes) -> None:
    started: list[float] = []

    def secure(sock: socket.socket, seconds: float) -> socket.socket:
        started.append(seconds)
        return sock

    asked = option(STARTTLS, data) + option(LIST) + option(ABORT)
    sent, outcome = negotiate(exports, client_flags() + asked, secure=secure, tls=TlsMode.REQUIRE)
    assert replies_to(sent) == option_reply(STARTTLS, ERR_INVALID) + option_reply(LIST, ERR_TLS_REQD) + GOODBYE
    assert outcome is None
    assert started == []


def test_what_comes_right_behind_starttls_is_left_to_tls(exports: Exports) -> None:
    behind = b"\x16\x03\x01" + option(LIST)
    seen: list[bytes] = []

    def secure(sock: socket.socket, _: float) -> socket.socket:
        seen.append(receive(sock, len(behind)))
        return sock

    asked = client_flags() + option(STARTTLS) + behind + option(ABORT)
    sent, _ = negotiate(exports, asked, secure=secure, tls=TlsMode.REQUIRE)
    assert seen == [behind]
    assert sent == GREETING + STARTED + GOODBYE


def test_after_starttls_nothing_goes_over_the_plain_socket(exports: Exports) -> None:
    inside, outside = socket.socketpair()

    def secure(_: socket.socket, __: float) -> socket.socket:
        return inside

    with inside, outside:
        outside.settimeout(60)
        outside.sendall(option(LIST) + option(ABORT))
        sent, outcome = negotiate(
            exports, client_flags() + option(STARTTLS) + option(LIST), secure=secure, tls=TlsMode.ON
        )
        inside.close()
        assert sent == GREETING + STARTED
        assert receive_rest(outside) == LISTED + GOODBYE
    assert outcome is None


@pytest.mark.parametrize("error", [SessionError("not let in"), ConnectionResetError(), TimeoutError()], ids=repr)
def test_tls_that_fails_ends_the_session(exports: Exports, error: Exception) -> None:
    def secure(_: socket.socket, __: float) -> socket.socket:
        raise error

    sent, outcome = negotiate(exports, client_flags() + option(STARTTLS) + option(LIST), secure=secure, tls=TlsMode.ON)
    assert sent == GREETING + STARTED
    assert type(outcome) is type(error)


@pytest.mark.parametrize("tls", [TlsMode.ON, TlsMode.REQUIRE])
def test_a_client_without_fixed_newstyle_is_not_offered_tls(exports: Exports, tls: TlsMode) -> None:
    sent, outcome = negotiate(exports, client_flags(0) + option(STARTTLS), secure=as_it_is, tls=tls)
    assert sent == GREETING
    assert isinstance(outcome, SessionError)


# A server that is shutting down


@pytest.mark.parametrize("kind", [*KINDS, STARTTLS])
def test_a_server_that_shuts_down_says_so_to_every_option_but_abort(exports: Exports, kind: int) -> None:
    asked = option(kind, DATA_OF.get(kind, b"")) + option(kind, b"rubbish")
    sent, outcome = negotiate(exports, client_flags() + asked + option(ABORT), secure=as_it_is, stopping=True)
    assert replies_to(sent) == option_reply(kind, ERR_SHUTDOWN) * 2 + GOODBYE
    assert outcome is None


def test_a_server_that_shuts_down_answers_export_name_by_closing(exports: Exports) -> None:
    sent, outcome = negotiate(exports, client_flags() + option(EXPORT_NAME, b"disk"), stopping=True)
    assert sent == GREETING
    assert isinstance(outcome, SessionError)


# Limits


@pytest.mark.parametrize("kind", [LIST, INFO, SET_META_CONTEXT, 4711, ABORT])
def test_the_longest_option_is_a_matter_of_the_limits(exports: Exports, kind: int) -> None:
    limits = Limits(option=100)
    sent, outcome = negotiate(exports, client_flags() + option(kind, bytes(100)) + option(ABORT), limits=limits)
    assert sent.endswith(GOODBYE)
    assert outcome is None
    sent, outcome = negotiate(exports, client_flags() + option(kind, bytes(101)) + option(ABORT), limits=limits)
    assert sent == GREETING
    assert isinstance(outcome, SessionError)


def test_the_number_of_options_is_a_matter_of_the_limits(exports: Exports) -> None:
    limits = Limits(options=3)
    sent, outcome = negotiate(exports, client_flags() + STRUCTURED * 2 + go(), limits=limits)
    assert sent == GREETING + STRUCTURED_ACK * 2 + information(GO, WRITABLE | DF)
    assert outcome == Terms(Mode.STRUCTURED)
    sent, outcome = negotiate(exports, client_flags() + STRUCTURED * 3 + go(), limits=limits)
    assert sent == GREETING + STRUCTURED_ACK * 3
    assert isinstance(outcome, SessionError)


@pytest.mark.parametrize(
    ("kind", "request_of"),
    [
        (INFO, info_request),
        (GO, info_request),
        (LIST_META_CONTEXT, context_request),
        (SET_META_CONTEXT, context_request),
    ],
)
def test_the_longest_name_is_a_matter_of_the_limits(
    exports: Exports, kind: int, request_of: Callable[[bytes], bytes]
) -> None:
    asked = option(kind, request_of(b"x" * 20)) + option(kind, request_of(b"x" * 21))
    sent, _ = negotiate(exports, client_flags() + STRUCTURED + asked + option(ABORT), limits=Limits(name=20))
    refused = option_reply(kind, ERR_UNKNOWN) + option_reply(kind, ERR_INVALID)
    assert replies_to(sent) == STRUCTURED_ACK + refused + GOODBYE


def test_the_limit_of_names_is_none_of_queries(exports: Exports) -> None:
    asked = STRUCTURED + BOTH + option(EXPORT_NAME, b"disk")
    _, outcome = negotiate(exports, client_flags() + asked, limits=Limits(name=4))
    assert outcome == Terms(Mode.STRUCTURED, BOTH_CONTEXTS)
    _, outcome = negotiate(exports, client_flags() + option(EXPORT_NAME, b"disk"), limits=Limits(name=3))
    assert isinstance(outcome, SessionError)


@pytest.mark.parametrize("payload", [1 << 20, 32 << 20, 1 << 30])
@pytest.mark.parametrize("kind", [INFO, GO])
def test_the_largest_payload_of_the_limits_is_advertised(exports: Exports, kind: int, payload: int) -> None:
    sent, _ = negotiate(exports, client_flags() + option(kind, info_request(b"disk")), limits=Limits(payload=payload))
    assert sent == GREETING + information(kind, payload=payload)
