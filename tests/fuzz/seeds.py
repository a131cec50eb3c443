"""Write the seed corpus: a dialogue for each option, for each command in each framing, and odd orders of both.

Run it from the root of the checkout: python -m tests.fuzz.seeds
"""

import struct
from collections.abc import Iterator
from pathlib import Path

from tests.fuzz.session import Setup
from tests.nbd_bytes import (
    ABORT,
    BLOCK_STATUS,
    CACHE,
    DF,
    DISC,
    EXPORT_NAME,
    EXTENDED,
    EXTENDED_HEADERS,
    FAST_ZERO,
    FIXED_NEWSTYLE,
    FLUSH,
    FUA,
    GO,
    INFO,
    LIST,
    LIST_META_CONTEXT,
    NO_HOLE,
    PAYLOAD_LEN,
    PEEK_EXPORT,
    READ,
    REQ_ONE,
    SET_META_CONTEXT,
    SIMPLE,
    STARTTLS,
    STRUCTURED,
    STRUCTURED_REPLY,
    TRIM,
    WRITE,
    WRITE_ZEROES,
    Dialect,
    client_flags,
    context_request,
    info_request,
    option,
)
from tests.property.test_device import make_data

CORPUS = Path(__file__).parent / "corpus"
PAGE = 4096
BASE, STATE = b"base:allocation", b"zramd:state"
TEXT = bytes(make_data("text", 1, 17 << 10))
RAW = bytes(make_data("random", 1, PAGE))
HEAD = client_flags()
PLAIN_GO = option(GO, info_request(b""))
BYE = option(ABORT)


def handshakes() -> Iterator[tuple[str, bytes]]:
    """Yield names and streams that do not get as far as a transmission, or just so far."""
    structured, extended = option(STRUCTURED_REPLY), option(EXTENDED_HEADERS)
    bodies = {
        "abort": BYE,
        "list": option(LIST) + option(LIST, b"x") + BYE,
        "info": option(INFO, info_request(b"disk", 0, 1, 2, 3)) + option(INFO, info_request(b"fixed")) + BYE,
        "info-bad": option(INFO, info_request(b"none")) + option(INFO, info_request(b"what")) + option(INFO) + BYE,
        "info-text": option(INFO, info_request(b"\xff")) + option(INFO, info_request(b"a\0", 9, 3)) + BYE,
        "info-long": option(INFO, info_request(b"x" * 4097)) + BYE,
        "go-bad": option(GO, info_request(b"none")) + option(GO, info_request(b"disk")[:-1]) + PLAIN_GO,
        "go": option(GO, info_request(b"fixed", 3, 2, 1)),
        "export-name": option(EXPORT_NAME, b"disk"),
        "export-name-bad": option(EXPORT_NAME, b"what"),
        "export-name-none": option(EXPORT_NAME, b"none"),
        "export-name-extended": extended + option(EXPORT_NAME),
        "starttls": option(STARTTLS) + option(STARTTLS, b"x") + option(STARTTLS) + option(LIST) + BYE,
        "starttls-forgets": structured
        + option(SET_META_CONTEXT, context_request(b"", BASE))
        + option(STARTTLS)
        + option(SET_META_CONTEXT, context_request(b"", BASE))
        + PLAIN_GO,
        "modes": structured + structured + extended + extended + structured + option(extended[0], b"x") + BYE,
        "contexts-early": option(LIST_META_CONTEXT, context_request(b"")) + BYE,
        "list-contexts": structured
        + option(LIST_META_CONTEXT, context_request(b""))
        + option(LIST_META_CONTEXT, context_request(b"disk", b"base:", b"base:", b"zramd:state", b"what:"))
        + BYE,
        "set-contexts": structured
        + option(SET_META_CONTEXT, context_request(b"disk", BASE, STATE, BASE, b"x:y"))
        + option(SET_META_CONTEXT, context_request(b"disk", b"\xff"))
        + option(SET_META_CONTEXT, context_request(b"what", BASE))
        + option(SET_META_CONTEXT, context_request(b"fixed", BASE))
        + PLAIN_GO,
        "contexts-broken": structured + option(SET_META_CONTEXT, context_request(b"", BASE)[:-1]) + PLAIN_GO,
        "unknown": option(PEEK_EXPORT) + option(12, b"what") + option(0xFFFFFFFF) + BYE,
        "many": option(LIST) * 65,
        "too-long": option(INFO, bytes(65537))[:100],
        "no-magic": b"IHAVEOPX" + bytes(8),
    }
    for name, body in bodies.items():
        yield name, HEAD + body
    yield "flags-unknown", client_flags(7)
    yield "flags-old", client_flags(0) + option(EXPORT_NAME)
    yield "flags-old-list", client_flags(0) + option(LIST)
    yield "flags-zeroes", client_flags(FIXED_NEWSTYLE) + option(EXPORT_NAME)
    yield "cut", HEAD + option(LIST)[:11]


def requests(dialect: Dialect) -> Iterator[tuple[str, bytes]]:
    """Yield names and streams of requests."""
    ask, put = dialect.request, dialect.write
    some = (
        put(1, 4000, TEXT[:300])
        + put(2, 5 * PAGE, bytes(range(8)) * 512)
        + ask(WRITE_ZEROES, 3, 6 * PAGE, 8000, NO_HOLE)
    )
    bodies = {
        "read": ask(READ, 1, 0, PAGE) + ask(READ, 2, 0, 1 << 18) + ask(READ, 3, 4095, 2) + ask(READ, 4, 9, 0),
        "write": some
        + put(8, 7 * PAGE, RAW, FUA)
        + ask(READ, 4, 0, 9 * PAGE)
        + ask(READ, 5, 101, 4000, DF)
        + ask(READ, 6, 0, 5 * PAGE, DF),
        "write-long": put(1, 4000, TEXT) + ask(READ, 2, 0, 1 << 17) + ask(DISC, 3),
        "write-cut": put(1, 4000, TEXT)[:4500],
        "flush": ask(FLUSH, 1) + ask(FLUSH, 2, 5, 1 << 20, FUA) + ask(FLUSH, 3, 0, 0, DF),
        "trim": some + ask(TRIM, 4, 50, 2 * PAGE) + ask(TRIM, 5, 0, 1 << 18, FUA) + ask(READ, 6, 0, 9 * PAGE),
        "cache": ask(CACHE, 1, 0, 1 << 18) + ask(CACHE, 2, 1, 1 << 18),
        "write-zeroes": some
        + ask(WRITE_ZEROES, 4, 50, 3 * PAGE)
        + ask(WRITE_ZEROES, 5, 6 * PAGE, PAGE, NO_HOLE | FAST_ZERO)
        + ask(WRITE_ZEROES, 6, 5 * PAGE, 10, FAST_ZERO)
        + ask(WRITE_ZEROES, 7, 1, 70000, FUA)
        + ask(READ, 8, 0, 40000),
        "block-status": some
        + ask(BLOCK_STATUS, 4, 0, 1 << 18)
        + ask(BLOCK_STATUS, 5, 4095, 9000, REQ_ONE)
        + ask(BLOCK_STATUS, 6, 0, 0),
        "out-of-bounds": put(1, (1 << 18) - 1, b"xx")
        + ask(READ, 2, 1 << 18, 1)
        + ask(READ, 3, 1 << 63, 1)
        + ask(TRIM, 4, (1 << 64) - 1, 1)
        + ask(WRITE_ZEROES, 5, 0, (1 << 18) + 1)
        + ask(READ, 6, 0, (1 << 17) + 1),
        "flags": b"".join(ask(command, 1 << bit, 0, 0, 1 << bit) for command in (0, 3, 4, 5, 6, 7) for bit in range(5)),
        "unknown": ask(8, 1, 2, 3) + ask(0xFFFF, 2, 0, 1 << 31) + ask(FLUSH, 3),
        "disconnect": ask(READ, 1, 0, 10) + ask(DISC, 2) + ask(READ, 3, 0, 10),
        "goodbye": some + ask(READ, 4, 1 << 18, 1) + put(5, 0, TEXT[:200]) + ask(READ, 6, 0, PAGE, FUA) + ask(DISC, 7),
        "garbage": ask(READ, 1, 0, 10) + bytes(40),
        "one-cookie": put(7, 0, TEXT[:10]) + ask(READ, 7, 0, 20) + ask(FLUSH, 7) + ask(READ, 7, 5, 10),
        "too-much": ask(WRITE, 1, 0, 1 << 30, PAYLOAD_LEN if dialect.extended else 0),
    }
    if dialect.extended:
        ids = struct.pack(">QII", 9 * PAGE, 2, 1)
        bodies["selection"] = (
            some
            + ask(BLOCK_STATUS, 4, 0, 16, PAYLOAD_LEN)
            + ids
            + ask(BLOCK_STATUS, 5, 10, 12, PAYLOAD_LEN | REQ_ONE)
            + ids[:12]
            + ask(BLOCK_STATUS, 6, 0, 8, PAYLOAD_LEN)
            + ids[:8]
            + ask(BLOCK_STATUS, 7, 0, 16, PAYLOAD_LEN)
            + struct.pack(">QII", 5, 1, 1)
        )
        bodies["payloads"] = ask(READ, 1, 0, 4, PAYLOAD_LEN) + b"what" + ask(WRITE, 2, 0, 4) + ask(FLUSH, 3)
        bodies["long-lengths"] = ask(TRIM, 1, 0, 1 << 40) + ask(BLOCK_STATUS, 2, 0, 1 << 63) + ask(READ, 3, 0, 1 << 33)
    yield from bodies.items()


def transmissions() -> Iterator[tuple[str, bytes]]:
    """Yield names and streams of whole sessions."""
    openings = {SIMPLE: b"", STRUCTURED: option(STRUCTURED_REPLY), EXTENDED: option(EXTENDED_HEADERS)}
    for dialect, opening in openings.items():
        for name, body in requests(dialect):
            export = b"fixed" if name in ("read", "cache") and dialect is not SIMPLE else b""
            if name.startswith("write-") and len(body) > 4 * PAGE and dialect is STRUCTURED:
                continue
            contexts = option(SET_META_CONTEXT, context_request(export, BASE, STATE)) if opening else b""
            yield f"{dialect}-{name}", HEAD + opening + contexts + option(GO, info_request(export)) + body
    yield (
        "read-only",
        HEAD + option(EXPORT_NAME, b"fixed") + SIMPLE.write(1, 0, b"x") + SIMPLE.request(TRIM, 2, 0, PAGE),
    )
    yield "wrong-framing", HEAD + openings[EXTENDED] + PLAIN_GO + SIMPLE.request(READ, 1, 0, 10)
    yield "option-late", HEAD + PLAIN_GO + SIMPLE.request(READ, 1, 0, 10) + BYE


SETUPS = {
    "starttls": [Setup(tls=1), Setup(tls=2), Setup()],
    "starttls-forgets": [Setup(tls=1)],
    "go": [Setup(tls=2), Setup(answered=0), Setup(step=1)],
    "export-name": [Setup(tls=2), Setup(answered=0), Setup()],
    "simple-write-long": [Setup(leave=9000)],
    "extended-write": [Setup(step=5, small=True)],
    "extended-block-status": [Setup(leave=6000)],
    "structured-disconnect": [Setup(leave=100), Setup(leave=300)],
    "simple-goodbye": [Setup(leave=0), Setup(leave=4700, step=6)],
    "structured-goodbye": [Setup(leave=0), Setup(leave=4900, step=5)],
    "extended-goodbye": [Setup(leave=0, limits=1), Setup(leave=5000, step=5)],
}
"""How a stream is played, where it is not with the default."""


def write_corpus(directory: Path) -> None:
    """Write the seeds."""
    for name, stream in (*handshakes(), *transmissions()):
        for number, setup in enumerate(SETUPS.get(name, [Setup()])):
            (directory / (f"{name}-{number}" if number else name)).write_bytes(setup.pack() + stream)


def main() -> None:
    """Write the corpus anew."""
    CORPUS.mkdir(exist_ok=True)
    for old in CORPUS.iterdir():
        old.unlink()
    write_corpus(CORPUS)


if __name__ == "__main__":
    main()
