"""Sizes as people write them, as the kernel reads them, and as zramctl prints them."""

import errno
import re
from decimal import Decimal

_HUMAN = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([KMGTPE]?)(iB|B)?\s*", re.ASCII | re.IGNORECASE)
_C_NUMBER = "0[xX][0-9a-fA-F]+|0[0-7]*|[1-9][0-9]*"
_KERNEL = re.compile(rf"\s*({_C_NUMBER})([KMGTPEkmgtpe]?)")
_UNSIGNED = {base: re.compile(rf"\+?({digits})\n?", re.ASCII) for base, digits in ((10, "[0-9]+"), (0, _C_NUMBER))}
MAX_SIZE = (1 << 63) - 1
"""Of anything: what the protocol and the kernel can count in signed 64 bits."""
_EXPONENTS = {"": 0, "K": 10, "M": 20, "G": 30, "T": 40, "P": 50, "E": 60}


def unit(name: str) -> int | None:
    """Return the bytes in a unit: B, K or KiB (1024), M or MiB and so on, in any case. None: there is no such unit."""
    if name.upper() == "B":
        return 1
    exponent = _EXPONENTS.get(name.upper().removesuffix("IB"))
    return 1 << exponent if exponent else None


def parse_size(text: str) -> int:
    """Return the bytes that `text` means: a number with an optional suffix K, M, G, T (of 1024), KiB, MiB and so on.

    Raises:
        ValueError: it is not a size, or too large.
    """
    match = _HUMAN.fullmatch(text)
    if match is None or (match[3] and match[3].upper() == "B" and match[2]):
        raise ValueError(f"{text!r} is not a size: write bytes, or a number with K, M, G, T, KiB, MiB, GiB or TiB")
    exact = Decimal(match[1]) * (1 << _EXPONENTS[match[2].upper()])
    size = int(exact)
    if exact and not size:
        raise ValueError(f"{text!r} is less than a byte")
    return _check_range(size, text)


def memparse(text: str) -> int:
    """Return the bytes that `text` means to the kernel's memparse: hex and octal by C prefix, the rest is ignored.

    Raises:
        ValueError: it does not start with a number, or that is too large.
    """
    match = _KERNEL.match(text)
    if match is None:
        raise ValueError(f"{text!r} does not start with a number")
    return _check_range(_c_number(match[1]) << _EXPONENTS[match[2].upper()], text)


def _c_number(digits: str) -> int:
    return int(digits, 16 if digits[:2] in ("0x", "0X") else 8 if digits.startswith("0") else 10)


def parse_unsigned(text: str, what: str, most: int = (1 << 64) - 1, base: int = 10) -> int:
    """Return the number that `text` is to the kernel's kstrtoull: decimal; with base 0, hex and octal by C prefix too.

    Raises:
        ValueError: it is none; the text says of `what`.
        OSError: ERANGE, it is more than `most`.
    """
    match = _UNSIGNED[base].fullmatch(text)
    if match is None:
        raise ValueError(f"{what} takes a {'number' if base == 0 else 'decimal number'}, not {text!r}")
    number = int(match[1]) if base else _c_number(match[1])
    if number > most:
        raise OSError(errno.ERANGE, f"{what} takes at most {most}, not {number}")
    return number


def _check_range(size: int, text: str) -> int:
    if size > MAX_SIZE:
        raise ValueError(f"{text!r} is too large: at most {MAX_SIZE} bytes")
    return size


def format_size(size: int) -> str:
    """Format bytes as util-linux does: one letter, at most one decimal, `0B 904M 2.3G`."""
    exponent, suffix = 0, "B"
    for letter, shift in _EXPONENTS.items():
        if letter and size >= 1 << shift:
            exponent, suffix = shift, letter
    tenths = (size * 10 + (1 << exponent >> 1)) >> exponent
    if tenths >= 10240 and suffix != "E":
        return format_size(1 << (exponent + 10))
    return f"{tenths // 10}{suffix}" if tenths % 10 == 0 else f"{tenths // 10}.{tenths % 10}{suffix}"
