"""Sizes as arithmetic on the machine's memory: `min(ram / 2, 4GiB)`, `50%`, `1.5G`.

    sum      = product (("+" | "-") product)*
    product  = operand (("*" | "/") operand)*
    operand  = NUMBER [UNIT] | NUMBER "%" | "ram" | ("min" | "max") "(" sum ("," sum)* ")" | "(" sum ")"

`ram` is the machine's memory (MemTotal of /proc/meminfo), and a percentage is one of that. Units are those of
`sizes.parse_size`. zram-generator's expressions count in megabytes that nobody wrote; here a value is a size or a plain
number, and a plain number where a size belongs is an error, unless it is 0, or all there is: then it is bytes.

Values are exact fractions. A text has at most MAX_LENGTH characters, so numbers of about as many digits at most.
"""

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

from zramd.sizes import MAX_SIZE, unit

MAX_LENGTH = 256
MAX_DEPTH = 16
"""Of parentheses in each other."""

_TOKEN = re.compile(r"\s*(?:(?P<number>[0-9]+(?:\.[0-9]+)?)|(?P<word>[A-Za-z_]\w*)|(?P<sign>[-+*/(),%]))", re.ASCII)


@dataclass(frozen=True, slots=True)
class _Token:
    kind: str
    """number, word, or the sign itself; "end" behind the last."""
    text: str
    start: int
    end: int


@dataclass(frozen=True, slots=True)
class _Value:
    """A size in bytes or a plain number, and where it stands."""

    amount: Fraction
    is_size: bool
    start: int
    end: int


def total_memory(root: Path = Path("/")) -> int:
    """Return MemTotal of /proc/meminfo under `root`, in bytes.

    Raises:
        ValueError: it cannot be read.
    """
    path = root / "proc/meminfo"
    try:
        match = re.search(r"^MemTotal:\s*([0-9]+) kB$", path.read_text(), re.MULTILINE)
    except OSError as error:
        raise ValueError(f"there is no `ram`: {path}: {error.strerror}") from error
    if match is None:
        raise ValueError(f"there is no `ram`: {path} has no MemTotal")
    return int(match[1]) << 10


def evaluate(text: str, ram: Callable[[], int] = total_memory, *, up: bool = False) -> int:
    """Return the bytes that `text` means; a part of a byte is dropped, or with `up` made a whole one.

    Raises:
        ValueError: it is no size; the message tells the column.
    """
    if len(text) > MAX_LENGTH:
        raise ValueError(f"a size has at most {MAX_LENGTH} characters, not {len(text)}")
    exact = _Parser(text, ram).result()
    if exact < 0:
        raise ValueError(f"{text!r} is less than nothing: max(0, ...) does away with that")
    size = -(-exact // 1) if up else exact // 1
    if 0 < exact < 1:
        raise ValueError(f"{text!r} is less than a byte")
    if size > MAX_SIZE:
        raise ValueError(f"{text!r} is too large: at most {MAX_SIZE} bytes")
    return size


@dataclass(frozen=True, slots=True)
class Size:
    """What an expression comes to in bytes, and whether that is more on a machine with more memory."""

    bytes: int
    varies: bool = False


def parse(text: str, ram: Callable[[], int] = total_memory, *, up: bool = False) -> Size:
    """Return what `text` comes to; the rest is as in `evaluate`."""
    return Size(evaluate(text, ram, up=up), "ram" in text or "%" in text)


def parse_disksize(text: str) -> Size:
    """Return the disksize that `text` means on this machine, before the device rounds it up to pages."""
    return parse(text, up=True)


class _Parser:
    """Reads a text from left to right, and has its value at the end."""

    def __init__(self, text: str, ram: Callable[[], int]) -> None:
        self._text = text
        self._ram = ram
        self._tokens = list(self._split())
        self._next = 0
        self._depth = 0

    def result(self) -> Fraction:
        value = self._sum()
        if self._token.kind != "end":
            raise self._wrong(self._token, "is not expected here")
        if len(self._tokens) > 2:  # more than a number and the end
            self._require_size(value)
        return value.amount

    def _split(self) -> Iterator[_Token]:
        position, end = 0, len(self._text.rstrip())
        while position < end:
            match = _TOKEN.match(self._text, position)
            if match is None:
                start = position + len(self._text[position:]) - len(self._text[position:].lstrip())
                raise self._wrong_at(start, f"{self._text[start]!r} is not expected here")
            kind, text, position = match.lastgroup or "", match[0].lstrip(), match.end()
            yield _Token(text if kind == "sign" else kind, text, position - len(text), position)
        yield _Token("end", "", end, end)

    @property
    def _token(self) -> _Token:
        return self._tokens[self._next]

    def _take(self, *kinds: str) -> _Token | None:
        """Go past the next token if it is of one of the kinds, and return it."""
        token = self._token
        if token.kind not in kinds:
            return None
        self._next += 1
        return token

    def _sum(self) -> _Value:
        value = self._product()
        while sign := self._take("+", "-"):
            right = self._product()
            value, right = self._alike([value, right])
            amount = value.amount + right.amount if sign.kind == "+" else value.amount - right.amount
            value = _Value(amount, value.is_size, value.start, right.end)
        return value

    def _product(self) -> _Value:
        value = self._operand()
        while sign := self._take("*", "/"):
            right = self._operand()
            if sign.kind == "*":
                if value.is_size and right.is_size:
                    raise self._wrong(sign, "multiplies a size by a size")
                amount, is_size = value.amount * right.amount, value.is_size or right.is_size
            else:
                if not right.amount:
                    raise self._wrong(sign, "divides by nothing")
                if right.is_size and not value.is_size:
                    raise self._wrong(sign, "divides a number by a size")
                amount, is_size = value.amount / right.amount, value.is_size != right.is_size
            value = _Value(amount, is_size, value.start, right.end)
        return value

    def _operand(self) -> _Value:
        token = self._token
        if self._take("number"):
            return self._number(token)
        if self._take("("):
            return self._list(token, 1)[0]
        if self._take("word"):
            if token.text == "ram":
                return _Value(Fraction(self._ram()), True, token.start, token.end)
            if token.text in ("min", "max") and (bracket := self._take("(")):
                values = self._alike(self._list(bracket, None))
                best = (min if token.text == "min" else max)(values, key=lambda value: value.amount)
                return _Value(best.amount, best.is_size, token.start, self._tokens[self._next - 1].end)
            raise self._wrong(token, "means nothing: there are `ram`, min(...) and max(...)")
        raise self._wrong(token, "is not expected here" if token.text else "a size is missing")

    def _number(self, token: _Token) -> _Value:
        amount = Fraction(token.text)
        if percent := self._take("%"):
            return _Value(amount * self._ram() / 100, True, token.start, percent.end)
        if name := self._take("word"):
            factor = unit(name.text)
            if factor is None:
                raise self._wrong(name, "is no unit: write K, M, G, T, KiB, MiB, GiB or TiB")
            return _Value(amount * factor, True, token.start, name.end)
        return _Value(amount, False, token.start, token.end)

    def _list(self, bracket: _Token, most: int | None) -> list[_Value]:
        """Return what stands in parentheses, after the first of which this is called."""
        self._depth += 1
        if self._depth > MAX_DEPTH:
            raise self._wrong(bracket, f"is too deep: at most {MAX_DEPTH} parentheses in each other")
        values = [self._sum()]
        while len(values) != most and self._take(","):
            values.append(self._sum())
        if not self._take(")"):
            raise self._wrong(self._token, "is not expected here" if self._token.text else "a ) is missing")
        self._depth -= 1
        return values

    def _alike(self, values: list[_Value]) -> list[_Value]:
        """Return the values, of which either all or none are to be sizes; 0 is what the others are."""
        if not any(value.is_size for value in values):
            return values
        for value in values:
            self._require_size(value)
        return [_Value(value.amount, True, value.start, value.end) for value in values]

    def _require_size(self, value: _Value) -> None:
        if not value.is_size and value.amount:
            raise self._wrong_at(value.start, f"{self._text[value.start : value.end]} has no unit, such as M or GiB")

    def _wrong(self, token: _Token, reason: str) -> ValueError:
        return self._wrong_at(token.start, f"{token.text} {reason}".lstrip())

    def _wrong_at(self, position: int, reason: str) -> ValueError:
        return ValueError(f"{self._text!r} is not a size: column {position + 1}: {reason}")
