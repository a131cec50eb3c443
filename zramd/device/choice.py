"""The algorithms of a disk as one text, in zram-generator's syntax.

    lz4 zstd(level=9) zstd(level=19,dict=/etc/zramd/dictionary) (type=idle)

The first is the primary one, the others are those to recompress with, of priorities 1 to 3. Parentheses of their own
say which pages the policy recompresses, in the kernel's words: type, threshold.
"""

import re
from dataclasses import dataclass, field

from zramd.device.codecs import Codec, parse_codec, split_words
from zramd.device.recompression import PAGE_TYPES, Recompression
from zramd.layout import PRIORITIES

_PART = re.compile(r'\s*((\w+)?(\((?:[^()"]|"[^"]*")*\))?)(?=\s|$)')


@dataclass(frozen=True, slots=True)
class Choice:
    """The codecs of a disk, `secondary` by priority, and which pages the policy is to recompress."""

    primary: Codec
    secondary: dict[int, Codec] = field(default_factory=dict)
    recompression: Recompression | None = None


def parse_choice(text: str) -> Choice:
    """Return what a text in the syntax above means.

    Raises:
        ValueError: it means nothing, or a dictionary cannot be used.
    """
    codecs: list[Codec] = []
    recompression = None
    position = 0
    while text[position:].strip():
        match = _PART.match(text, position)
        if match is None or not match[1]:
            raise ValueError(f"{text!r} is not a list of algorithms: write names, as in 'lz4 zstd(level=9)'")
        position = match.end()
        if match[2]:
            codecs.append(parse_codec(match[1]))
        elif recompression is not None:
            raise ValueError(f"{text!r} says twice which pages to recompress: {match[3]}")
        else:
            recompression = _parse_recompression(match[3])
    if not codecs:
        raise ValueError(f"{text!r} is not an algorithm: write a name, or a name and a level as in 'zstd(level=9)'")
    if len(codecs) > PRIORITIES:
        raise ValueError(f"{text!r} has {len(codecs)} algorithms: there may be {PRIORITIES}, the first being primary")
    if recompression is not None and len(codecs) == 1:
        raise ValueError(f"{text!r} has no algorithm to recompress with: parameters follow a name without a blank")
    return Choice(codecs[0], dict(enumerate(codecs[1:], 1)), recompression)


def _parse_recompression(text: str) -> Recompression:
    words = split_words(re.sub(r"\s*=\s*", "=", text.strip("()").replace(",", " ")))
    if unknown := words.keys() - {"type", "threshold"}:
        raise ValueError(f"{text} can have type= and threshold=, not {', '.join(unknown)}")
    if words.get("type", "idle") not in PAGE_TYPES:
        raise ValueError(f"{text}: a type is one of {', '.join(PAGE_TYPES)}")
    if not re.fullmatch("[0-9]+", words.get("threshold", "0"), re.ASCII):
        raise ValueError(f"{text}: a threshold is a number of bytes")
    idle, huge = PAGE_TYPES[words["type"]] if "type" in words else (False, False)
    return Recompression(idle, huge, int(words.get("threshold", "0")))
