"""The fuzzer's checks without the fuzzer: its seeds, sessions that hypothesis makes, and that the oracle is awake."""

import random
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.fuzz import frames
from tests.fuzz.seeds import CORPUS, write_corpus
from tests.fuzz.session import LIMITS, SIZE, STEPS, TLS, Setup, World
from tests.nbd_bytes import (
    BLOCK_STATUS,
    EXPORT_NAME,
    EXTENDED,
    EXTENDED_HEADERS,
    GO,
    INFO,
    LIST_META_CONTEXT,
    PAYLOAD_LEN,
    SET_META_CONTEXT,
    SIMPLE,
    STRUCTURED,
    STRUCTURED_REPLY,
    WRITE,
    Dialect,
    client_flags,
    context_request,
    info_request,
    option,
)
from tests.property.test_device import contents, make_data

OPENINGS = {SIMPLE: b"", STRUCTURED: option(STRUCTURED_REPLY), EXTENDED: option(EXTENDED_HEADERS)}


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    made = World()
    yield made
    made.check_devices()
    made.close()


@pytest.mark.parametrize("path", sorted(CORPUS.iterdir()), ids=lambda path: path.name)
def test_a_seed_is_answered_as_the_protocol_asks(world: World, path: Path) -> None:
    world.run(path.read_bytes())


def test_the_seeds_are_those_that_their_script_writes(tmp_path: Path) -> None:
    write_corpus(tmp_path)
    written, kept = ({path.name: path.read_bytes() for path in where.iterdir()} for where in (tmp_path, CORPUS))
    assert written == kept


def test_a_stream_is_the_frames_that_it_is_split_into() -> None:
    for path in CORPUS.iterdir():
        stream = path.read_bytes()
        assert b"".join(frames.split(stream)) == stream


# Sessions that hypothesis makes

names = st.sampled_from(frames.NAMES) | st.binary(max_size=5)
queries = st.lists(st.sampled_from(frames.QUERIES) | st.binary(max_size=20), max_size=4).map(tuple)
cookies = st.integers(0, 2) | st.integers(0, 2**64 - 1)
offsets = st.sampled_from(frames.PLACES) | st.integers(0, SIZE + 1) | st.sampled_from(frames.EXTREMES)
lengths = st.sampled_from(frames.LENGTHS) | st.integers(0, 20000)
flags = st.sampled_from([0, 0, 0, 1, 2, 4, 8, 16, 32, 0x8000]) | st.integers(0, 63)


@st.composite
def options(draw: st.DrawFn) -> bytes:
    kind = draw(st.integers(0, 12))
    if kind in (INFO, GO):
        data = info_request(draw(names), *draw(st.lists(st.integers(0, 4), max_size=4)))
    elif kind in (LIST_META_CONTEXT, SET_META_CONTEXT):
        data = context_request(draw(names), *draw(queries))
    else:
        data = draw(names) if kind == EXPORT_NAME else draw(st.just(b"") | st.binary(max_size=3))
    return option(kind, data)


@st.composite
def requests(draw: st.DrawFn, dialect: Dialect) -> bytes:
    command, cookie, offset, length = draw(st.integers(0, 8)), draw(cookies), draw(offsets), draw(lengths)
    if offset < SIZE and draw(st.booleans()):
        length = min(length, SIZE - offset)
    if command == WRITE:
        payload = bytes(make_data(draw(contents), 1, min(length, 40000)))
        return dialect.write(cookie, offset, payload, draw(flags))
    if command == BLOCK_STATUS and dialect.extended and draw(st.booleans()):
        ids = draw(st.lists(st.integers(0, 3), max_size=3))
        payload = length.to_bytes(8) + b"".join(number.to_bytes(4) for number in ids)
        return dialect.request(command, cookie, offset, len(payload), draw(flags) | PAYLOAD_LEN) + payload
    return dialect.request(command, cookie, offset, length, draw(flags))


@st.composite
def setups(draw: st.DrawFn, length: int) -> Setup:
    leave = draw(st.none() | st.integers(0, length))
    return Setup(
        step=draw(st.integers(0, len(STEPS) - 1)),
        small=draw(st.booleans()),
        limits=draw(st.integers(0, len(LIMITS) - 1)),
        tls=draw(st.integers(0, len(TLS) - 1)),
        answered=draw(st.none() | st.integers(0, 7)) if leave is None else None,
        leave=leave,
    )


@st.composite
def broken(draw: st.DrawFn, parts: list[bytes]) -> bytes:
    """Return a stream, in most cases just as it is."""
    stream = b"".join(parts)
    match draw(st.integers(0, 9)):
        case 0:
            place = draw(st.integers(0, len(stream) - 1))
            stream = stream[:place] + draw(st.binary(min_size=1, max_size=4)) + stream[place + 1 :]
        case 1:
            stream = stream[: draw(st.integers(0, len(stream)))]
        case 2:
            place = draw(st.integers(0, len(parts) - 1))
            stream = b"".join([*parts[:place], *parts[place + 1 :]])
    return stream


@st.composite
def inputs(draw: st.DrawFn, *, transmission: bool) -> bytes:
    parts = [client_flags(draw(st.sampled_from([3, 3, 3, 2, 1, 0, 4])) if not transmission else 3)]
    if transmission:
        dialect = draw(st.sampled_from([SIMPLE, STRUCTURED, EXTENDED]))
        name = draw(st.sampled_from([b"", b"", b"disk", b"fixed"]))
        parts += [OPENINGS[dialect], option(SET_META_CONTEXT, context_request(name, *draw(queries)))]
        parts += [option(GO, info_request(name)), *draw(st.lists(requests(dialect), max_size=12))]
    else:
        parts += draw(st.lists(options(), max_size=8))
    stream = draw(broken(parts))
    return draw(setups(min(len(stream), 65535))).pack() + stream


@settings(max_examples=200)
@given(data=inputs(transmission=False))
def test_any_handshake_goes_as_the_protocol_asks(world: World, data: bytes) -> None:
    world.run(data)


@settings(max_examples=300)
@given(data=inputs(transmission=True))
def test_any_transmission_goes_as_the_protocol_asks(world: World, data: bytes) -> None:
    world.run(data)


@settings(max_examples=150)
@given(seed=st.randoms(use_true_random=False), path=st.sampled_from(sorted(CORPUS.iterdir())))
def test_what_the_fuzzer_makes_of_a_seed_goes_as_the_protocol_asks(world: World, seed: object, path: Path) -> None:
    assert isinstance(seed, random.Random)
    world.run(frames.mutate(path.read_bytes(), 65536, seed))
