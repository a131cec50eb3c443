"""A client's stream as a list of frames, and ways to change it that keep most of it understandable."""

import random
import struct
from collections.abc import Callable

from tests.nbd_bytes import (
    BLOCK_STATUS,
    DISC,
    EXPORT_NAME,
    EXTENDED,
    EXTENDED_HEADERS,
    GO,
    INFO,
    LIST_META_CONTEXT,
    PAYLOAD_LEN,
    SET_META_CONTEXT,
    SIMPLE,
    STARTTLS,
    STRUCTURED_REPLY,
    WRITE,
    context_request,
    info_request,
    option,
)

PAGE = 4096
SETUP_BYTES = 4
MAGIC, EXTENDED_MAGIC = b"\x25\x60\x95\x13", b"\x21\xe4\x1c\x71"
NAMES = [b"", b"disk", b"fixed", b"none", b"nothing", b"\xff", b"a\0b"]
QUERIES = [b"base:allocation", b"zramd:state", b"base:", b"zramd:", b":", b"", b"other:thing", b"\xff"]
PLACES = [0, 1, 7, 512, PAGE - 1, PAGE, PAGE + 1, 2 * PAGE, 5 * PAGE + 100, 1 << 15, 1 << 16, 1 << 17, (1 << 18) - PAGE]
PLACES += [(1 << 18) - 1, 1 << 18, (1 << 18) + 1]
LENGTHS = [0, 1, 8, 100, 511, PAGE - 1, PAGE, PAGE + 1, 3 * PAGE, 16300, 16356, 16384, 32768, 40000, 1 << 16, 1 << 17]
LENGTHS += [(1 << 17) + 1, 1 << 18, 1 << 20]
EXTREMES = [1 << 31, (1 << 32) - 1, 1 << 32, 1 << 62, (1 << 63) - 1, 1 << 63, (1 << 64) - 1]


def split(stream: bytes) -> list[bytes]:
    """Take a client's stream apart: its flags, options, requests with their payloads, and what is none of these."""
    frames, position = [stream[:4]], 4
    while position < len(stream):
        length = _frame(stream, position)
        frames.append(stream[position : position + length])
        position += length
    return frames


def _frame(stream: bytes, position: int) -> int:
    """Return the length of the frame that starts here; at least 1."""
    left = len(stream) - position
    if stream.startswith(b"IHAVEOPT", position) and left >= 16:
        return 16 + int.from_bytes(stream[position + 12 : position + 16])
    if stream.startswith(MAGIC, position) and left >= 28:
        command = int.from_bytes(stream[position + 6 : position + 8])
        return 28 + (int.from_bytes(stream[position + 24 : position + 28]) if command == WRITE else 0)
    if stream.startswith(EXTENDED_MAGIC, position) and left >= 32:
        flags = int.from_bytes(stream[position + 4 : position + 6])
        return 32 + (int.from_bytes(stream[position + 24 : position + 32]) if flags & PAYLOAD_LEN else 0)
    found = [stream.find(magic, position + 1) for magic in (b"IHAVEOPT", MAGIC, EXTENDED_MAGIC)]
    return min([place for place in found if place > 0], default=len(stream)) - position


def make_option(generator: random.Random) -> bytes:
    """Return an option, most often a right one."""
    kind = generator.choice([1, 2, 3, 4, 5, 6, 6, 7, 7, 8, 8, 9, 9, 10, 10, 10, 11, 11, 12, 0xFFFFFFFF])
    name = generator.choice(NAMES[:2] * 4 + NAMES)
    data = b""
    if kind in (INFO, GO):
        data = info_request(name, *generator.choices(range(6), k=generator.choice([0, 0, 1, 3])))
    elif kind in (LIST_META_CONTEXT, SET_META_CONTEXT):
        data = context_request(name, *generator.choices(QUERIES[:2] * 3 + QUERIES, k=generator.choice([0, 1, 1, 2, 3])))
    elif kind == EXPORT_NAME:
        data = name
    if generator.random() < 0.05:
        data += generator.randbytes(generator.randrange(5))
    return option(kind, data)


def make_request(generator: random.Random, *, extended: bool) -> bytes:
    """Return a request, most often a right one."""
    dialect = EXTENDED if extended else SIMPLE
    command = generator.choice([0, 0, 0, 1, 1, 1, 3, 4, 4, 5, 6, 6, 6, 7, 7, 7, 8, 0xFFFF])
    cookie = generator.choice([generator.getrandbits(64), generator.randrange(3)])
    offset, length = generator.choice(PLACES), generator.choice(LENGTHS)
    if generator.random() < 0.7:
        length = min(length, max(0, (1 << 18) - offset))
    if generator.random() < 0.05:
        offset = generator.choice(EXTREMES)
    if generator.random() < 0.05:
        length = generator.choice(EXTREMES)
    flags = generator.choice([0, 0, 0, 0, 1, 2, 4, 8, 16, 32, 3, 9, 0x8000])
    if not extended:
        length &= 0xFFFFFFFF
    if command == WRITE and generator.random() < 0.95:
        payload = make_payload(generator, min(length, generator.choice([100, 9000, 9000, 70000])))
        return dialect.write(cookie, offset, payload, flags & ~PAYLOAD_LEN)
    if command == BLOCK_STATUS and extended and generator.random() < 0.5:
        ids = generator.choices([1, 2, 2, 3], k=generator.choice([0, 1, 1, 2, 3]))
        payload = struct.pack(f">Q{len(ids)}I", length, *ids)
        return dialect.request(command, cookie, offset, len(payload), flags | PAYLOAD_LEN) + payload
    return dialect.request(command, cookie, offset, length, flags)


def make_payload(generator: random.Random, length: int) -> bytes:
    """Return so many bytes that are zeros, repeat, or can or cannot be compressed."""
    kind = generator.randrange(5)
    if kind == 0:
        return bytes(length)
    unit = generator.randbytes([1, 8, 300, length][kind - 1] or 1)
    return (unit * (length // len(unit) + 1))[:length]


def make_frame(generator: random.Random, frames: list[bytes]) -> bytes:
    """Return a new frame of the kind that the others are."""
    extended = any(frame.startswith(EXTENDED_MAGIC) for frame in frames)
    if extended or any(frame.startswith(MAGIC) for frame in frames):
        return make_request(generator, extended=extended != (generator.random() < 0.02))
    return make_option(generator)


def repack(frame: bytes) -> bytes:
    """Return a frame with the length that its payload has; what is no frame is as it was."""
    if frame.startswith(b"IHAVEOPT") and len(frame) >= 16:
        return frame[:12] + struct.pack(">I", len(frame) - 16) + frame[16:]
    if frame.startswith(MAGIC) and len(frame) > 28:
        return frame[:24] + struct.pack(">I", len(frame) - 28) + frame[28:]
    if frame.startswith(EXTENDED_MAGIC) and len(frame) > 32:
        return frame[:24] + struct.pack(">Q", len(frame) - 32) + frame[32:]
    return frame


def change_field(frame: bytes, generator: random.Random) -> bytes:
    """Return a frame with one of its fields set to something else."""
    if frame.startswith(b"IHAVEOPT") and len(frame) >= 16:
        if generator.random() < 0.3:
            kind = struct.pack(">I", generator.randrange(13))
            return frame[:8] + kind + frame[12:]
        if generator.random() < 0.2:
            return frame[:12] + struct.pack(">I", generator.choice([0, 1, 65536, 65537, (1 << 32) - 1])) + frame[16:]
        return make_option(generator)
    extended = frame.startswith(EXTENDED_MAGIC)
    size = 32 if extended else 28
    if not (extended or frame.startswith(MAGIC)) or len(frame) < size:
        return frame + generator.randbytes(1)
    layout = ">4sHHQQQ" if extended else ">4sHHQQI"
    magic, flags, command, cookie, offset, length = struct.unpack(layout, frame[:size])
    match generator.randrange(6):
        case 0:
            flags ^= 1 << generator.choice([0, 1, 2, 3, 4, 5, 15])
        case 1:
            command = generator.choice([0, 1, 3, 4, 5, 6, 7, DISC, 8])
        case 2:
            offset = generator.choice([*PLACES, *EXTREMES])
        case 3:
            length = generator.choice([*LENGTHS, *LENGTHS, *EXTREMES]) & (
                0xFFFFFFFFFFFFFFFF if extended else 0xFFFFFFFF
            )
        case 4:
            cookie = generator.getrandbits(64)
        case _:
            length = max(0, min(length, EXTREMES[1]) + generator.choice([-1, 1, -PAGE, PAGE]))
    if not extended:
        length &= 0xFFFFFFFF
    changed = struct.pack(layout, magic, flags, command, cookie, offset, length) + frame[size:]
    if command == WRITE and len(frame) == size:
        changed += make_payload(generator, min(length, 20000))
    return repack(changed) if generator.random() < 0.8 else changed


def set_up_transmission(generator: random.Random) -> list[bytes]:
    """Return the flags and options that lead to a transmission."""
    frames = [struct.pack(">I", 3)]
    kind = generator.choice([0, STRUCTURED_REPLY, EXTENDED_HEADERS])
    if generator.random() < 0.1:
        frames.append(option(STARTTLS))
    name = generator.choice([b"", b"", b"disk", b"fixed"])
    if kind:
        frames.append(option(kind))
        if generator.random() < 0.8:
            queries = generator.choice([QUERIES[:1], QUERIES[1:2], QUERIES[:2]])
            frames.append(option(SET_META_CONTEXT, context_request(name, *queries)))
    frames.append(option(GO, info_request(name)))
    count = generator.choice([1, 3, 10])
    return frames + [make_request(generator, extended=kind == EXTENDED_HEADERS) for _ in range(count)]


def mutate(
    data: bytes, max_size: int, generator: random.Random, mutate_bytes: Callable[[bytes, int], bytes] | None = None
) -> bytes:
    """Return an input that differs from `data` by a frame or a few, and is at most `max_size` bytes long."""
    setup, frames = bytearray(data[:SETUP_BYTES].ljust(SETUP_BYTES, b"\0")), split(data[SETUP_BYTES:])
    for _ in range(generator.choice([1, 1, 1, 2, 4])):
        frames = _mutate_once(setup, frames, generator, mutate_bytes)
    return (bytes(setup) + b"".join(frames))[:max_size]


def _mutate_once(
    setup: bytearray,
    frames: list[bytes],
    generator: random.Random,
    mutate_bytes: Callable[[bytes, int], bytes] | None,
) -> list[bytes]:
    place = generator.randrange(len(frames))
    match generator.randrange(11):
        case 0:
            setup[0], setup[1] = generator.randrange(8), generator.choice([0, 1, 2, 4, 8, 16, 32, 33, 34, 40])
            if setup[1] & 32:
                setup[2:4] = generator.randrange(min(65536, 1 + sum(map(len, frames)))).to_bytes(2)
            else:
                setup[2:4] = generator.randrange(8).to_bytes(2)
        case 1:
            return frames[:place] + frames[place + 1 :] or frames
        case 2:
            frames.insert(generator.randint(1, len(frames)), frames[place])
        case 3 | 4:
            frames.insert(generator.randint(1, len(frames)), make_frame(generator, frames))
        case 5:
            frames.insert(place, make_option(generator))
        case 6:
            other = generator.randrange(len(frames))
            frames[place], frames[other] = frames[other], frames[place]
        case 7 | 8:
            frames[place] = change_field(frames[place], generator)
        case 9 if mutate_bytes and len(frames[place]) > 1:
            changed = mutate_bytes(frames[place], len(frames[place]) + 64)
            frames[place] = repack(changed) if generator.random() < 0.8 else changed
        case _:
            if generator.random() < 0.3:
                return set_up_transmission(generator)
            frames.append(make_frame(generator, frames))
    return frames


def cross_over(first: bytes, second: bytes, max_size: int, generator: random.Random) -> bytes:
    """Return the beginning of one input with the end of another."""
    ours, theirs = split(first[SETUP_BYTES:]), split(second[SETUP_BYTES:])
    frames = ours[: generator.randint(1, len(ours))] + theirs[generator.randrange(len(theirs)) :]
    return (first[:SETUP_BYTES].ljust(SETUP_BYTES, b"\0") + b"".join(frames))[:max_size]
