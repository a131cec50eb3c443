"""The algorithms of a disk in zram-generator's syntax."""

import pytest

from zramd.device.choice import parse_choice
from zramd.device.recompression import Recompression


def names(text: str) -> list[tuple[int, str, int]]:
    choice = parse_choice(text)
    return [(priority, made.name, made.level) for priority, made in ({0: choice.primary} | choice.secondary).items()]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("lz4", [(0, "lz4", 1)]),
        ("zstd(level=9)", [(0, "zstd", 9)]),
        ("  zstd( level = -3 )  ", [(0, "zstd", -3)]),
        ("lz4 zstd", [(0, "lz4", 1), (1, "zstd", 3)]),
        (
            "lz4(level=4)\tlz4hc  zstd(level=9) zstd(level=19)",
            [(0, "lz4", 4), (1, "lz4hc", 9), (2, "zstd", 9), (3, "zstd", 19)],
        ),
        ("lz4 zstd (type=idle)", [(0, "lz4", 1), (1, "zstd", 3)]),
    ],
)
def test_the_first_is_primary_and_the_others_are_to_recompress_with(
    text: str, expected: list[tuple[int, str, int]]
) -> None:
    assert names(text) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("lz4 zstd", None),
        ("lz4 zstd (type=idle)", Recompression(idle=True)),
        ("lz4 (type=huge) zstd", Recompression(huge=True)),
        ("lz4 zstd (type=huge_idle, threshold = 3000)", Recompression(idle=True, huge=True, threshold=3000)),
        ("lz4 zstd (threshold=100)", Recompression(threshold=100)),
    ],
)
def test_parentheses_of_their_own_say_what_the_policy_recompresses(text: str, expected: Recompression | None) -> None:
    assert parse_choice(text).recompression == expected


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "is not an algorithm"),
        ("  ", "is not an algorithm"),
        ("gzip", "unknown algorithm"),
        ("lz4 gzip", "unknown algorithm 'gzip'"),
        ("lz4,zstd", "not a list"),
        ("lz4 zstd(level=9", "not a list"),
        ("lz4 zstd(level=99)", "levels"),
        ("lz4 zstd(type=idle)", "type"),
        ("lz4 zstd zstd zstd zstd", "5 algorithms"),
        ("(type=idle)", "is not an algorithm"),
        ("lz4 (type=idle)", "without a blank"),
        ("lz4 zstd (type=cold)", "a type is one of idle, huge, huge_idle"),
        ("lz4 zstd (level=9)", "level"),
        ("lz4 zstd (threshold=-1)", "bytes"),
        ("lz4 zstd (type)", "no value"),
        ("lz4 zstd (type=idle) (type=huge)", "twice"),
    ],
)
def test_what_is_no_list_of_algorithms_is_refused(text: str, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        parse_choice(text)
