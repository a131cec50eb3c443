"""Colour, for terminals that have it and people who want it."""

import os
import sys

import click


def is_coloured() -> bool:
    """Say whether what goes to standard output may be coloured (NO_COLOR: no-color.org)."""
    return sys.stdout.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM", "dumb") != "dumb"


def paint(text: str, *, colour: str | None = None, bold: bool | None = None) -> str:
    """Return text in a colour, or as it is where there is none."""
    return click.style(text, fg=colour, bold=bold) if (colour or bold) and is_coloured() else text
