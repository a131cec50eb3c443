"""Sizes as expressions, beside a model that works them out with Python's own syntax tree."""

from fractions import Fraction
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from zramd.expressions import MAX_DEPTH, MAX_LENGTH, evaluate, total_memory
from zramd.sizes import MAX_SIZE, parse_size

RAM = 8 << 30

Part = tuple[str, Fraction]
"""A text, and what it means."""
UNITS = {"": 1, "B": 1, "K": 1 << 10, "KiB": 1 << 10, "m": 1 << 20, "MiB": 1 << 20, "G": 1 << 30, " gib": 1 << 30}
DECIMALS = st.decimals(min_value=0, max_value=9999, places=2).map(str) | st.integers(0, 9999).map(str)
NUMBERS = DECIMALS.map(lambda text: (text, Fraction(text)))
SIZES = (
    st.tuples(DECIMALS, st.sampled_from([unit for unit in UNITS if unit])).map(
        lambda part: (part[0] + part[1], Fraction(part[0]) * UNITS[part[1]])
    )
    | st.just(("ram", Fraction(RAM)))
    | DECIMALS.map(lambda text: (f"{text}%", Fraction(text) * RAM / 100))
)


def combined(sizes: st.SearchStrategy[Part]) -> st.SearchStrategy[Part]:
    """Return sizes made of sizes: in parentheses, so that the model needs no precedence."""

    def joined(parts: tuple[Part, str, Part]) -> Part:
        (left, one), sign, (right, other) = parts
        value = {"+": lambda: one + other, "-": lambda: one - other, "*": lambda: one * other, "/": lambda: one / other}
        return f"({left} {sign}{right})", value[sign]()

    def best(parts: tuple[str, list[Part]]) -> Part:
        name, values = parts
        text = ", ".join(text for text, _ in values)
        return f"{name}({text})", (min if name == "min" else max)(value for _, value in values)

    divisors = NUMBERS.filter(lambda part: part[1] != 0)
    return (
        st.tuples(sizes, st.sampled_from("+-"), sizes).map(joined)
        | st.tuples(sizes, st.just("*"), NUMBERS).map(joined)
        | st.tuples(NUMBERS, st.just("*"), sizes).map(joined)
        | st.tuples(sizes, st.just("/"), divisors).map(joined)
        | st.tuples(st.sampled_from(["min", "max"]), st.lists(sizes, min_size=1, max_size=3)).map(best)
    )


EXPRESSIONS = st.recursive(SIZES, combined, max_leaves=6).filter(lambda part: len(part[0]) <= MAX_LENGTH)


@given(EXPRESSIONS)
def test_an_expression_means_what_arithmetic_says_to_the_byte(part: Part) -> None:
    text, exact = part
    if exact < 0 or 0 < exact < 1 or exact >= MAX_SIZE + 1:
        with pytest.raises(ValueError, match=r"less than|too large"):
            evaluate(text, lambda: RAM)
        return
    assert evaluate(text, lambda: RAM) == int(exact)
    assert evaluate(text, lambda: RAM, up=True) == -int(-exact // 1)


@given(st.text(alphabet="0129. KMGramin%+-*/(),xB\n\0é", max_size=40) | st.text(max_size=300))
def test_whatever_stands_there_is_a_size_or_one_line(text: str) -> None:
    try:
        found: int | str = evaluate(text, lambda: RAM)
    except ValueError as error:
        found = str(error)
    assert found.isprintable() if isinstance(found, str) else 0 <= found <= MAX_SIZE


@pytest.mark.parametrize("text", ["0", "4096", "1.5G", "2 tib", "1KiB", " 7 "])
def test_what_is_a_size_without_arithmetic_is_the_same_one(text: str) -> None:
    assert evaluate(text, lambda: pytest.fail("ram is not needed")) == parse_size(text)


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("min(ram / 2, 4GiB)", 4 << 30),
        ("50%", 4 << 30),
        ("150%", 12 << 30),
        ("min(min(ram, 4G) + max(ram - 4G, 0) / 2, 32 * 1G)", 6 << 30),
        ("1G - 512M / 2 * 2 + 1", None),
        ("1G - 512M / 2 - 256M", 512 << 20),
        ("ram / 1G * 100M", 800 << 20),
        ("2*3*1M", 6 << 20),
    ],
)
def test_signs_bind_as_in_arithmetic(text: str, size: int | None) -> None:
    if size is None:
        with pytest.raises(ValueError, match="column 21: 1 has no unit"):
            evaluate(text, lambda: RAM)
    else:
        assert evaluate(text, lambda: RAM) == size


@pytest.mark.parametrize(
    ("text", "column", "words"),
    [
        ("min(ram / 2, 4096)", 14, "4096 has no unit"),
        ("2 * 3", 1, "2 * 3 has no unit"),
        ("ram * ram", 5, "multiplies a size by a size"),
        ("1 / ram", 3, "divides a number by a size"),
        ("ram / (1 - 1)", 5, "divides by nothing"),
        ("4 GB", 3, "GB is no unit"),
        ("(ram", 5, "a ) is missing"),
        ("ram)", 4, ") is not expected"),
        ("ram +", 6, "a size is missing"),
        ("half(ram)", 1, "half means nothing"),
        ("min ram", 1, "min means nothing"),
        ("-1G", 1, "- is not expected"),
        ("ram ** 2", 6, "* is not expected"),
        ("ram ! 2", 5, "'!' is not expected"),
        ("50%%", 4, "% is not expected"),
        ("(" * (MAX_DEPTH + 1) + "1G", MAX_DEPTH + 1, "too deep"),
    ],
)
def test_an_error_points_at_the_place(text: str, column: int, words: str) -> None:
    with pytest.raises(ValueError, match=f"is not a size: column {column}: ") as caught:
        evaluate(text, lambda: RAM)
    assert words in str(caught.value)


def test_a_text_that_is_too_long_is_not_read() -> None:
    with pytest.raises(ValueError, match=f"at most {MAX_LENGTH} characters, not 1000000"):
        evaluate("1" * 1_000_000, lambda: RAM)


def test_ram_is_the_memory_of_the_machine(tmp_path: Path) -> None:
    (tmp_path / "proc").mkdir()
    with pytest.raises(ValueError, match=r"there is no `ram`: .*: No such file"):
        total_memory(tmp_path)
    (tmp_path / "proc/meminfo").write_text("MemTotal:        2048 kB\nMemFree:  1 kB\n")
    assert total_memory(tmp_path) == 2 << 20
