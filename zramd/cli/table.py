"""Tables and bars of text."""

from collections.abc import Collection, Iterable, Iterator

FIRST = (0,)


def table(rows: Iterable[list[str]], left: Collection[int] = FIRST, gap: str = "  ") -> Iterator[str]:
    """Yield lines; the columns with these numbers are to the left, the others to the right."""
    rows = list(rows)
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        cells = (
            cell.ljust(width) if number in left else cell.rjust(width)
            for number, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        yield gap.join(cells).rstrip()


def bar(share: float, width: int) -> str:
    """Return a bar of so many characters, a share of which is full."""
    return ("#" * round(min(share, 1) * width)).ljust(width, ".")
