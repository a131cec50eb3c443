"""Tables and bars of text."""

from collections.abc import Iterable, Iterator


def table(rows: Iterable[list[str]]) -> Iterator[str]:
    """Yield lines; the first column is to the left, the others to the right."""
    rows = list(rows)
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        first, *rest = (
            cell.rjust(width) if number else cell.ljust(width)
            for number, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        yield "  ".join([first, *rest]).rstrip()


def bar(share: float, width: int) -> str:
    """Return a bar of so many characters, a share of which is full."""
    return ("#" * round(min(share, 1) * width)).ljust(width, ".")
