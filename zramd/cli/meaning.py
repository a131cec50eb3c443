"""What the numbers of `zramd status` mean, in sentences."""

from collections.abc import Iterator
from typing import Any

from zramd.cli.columns import Shown
from zramd.layout import PAGE_SIZE
from zramd.sizes import format_size

NEAR = 0.9
"""Share of the limit from which on it is worth a warning."""


def meaning(shown: Shown) -> Iterator[tuple[str, bool]]:
    """Yield a sentence or two a line, and whether it is a warning."""
    facts, memory = shown.facts, shown.facts["mm_stat"]
    name = facts["name"]
    if not facts["initstate"]:
        yield f"{name} has no size, and serves nobody: zramd set disksize=SIZE.", False
        return
    stored, used = memory["orig_data_size"], memory["mem_used_total"]
    size = facts["disksize"]
    attached = f", attached as {shown.node}" if shown.node else ""
    place = f", {'swapped to' if shown.place == '[SWAP]' else f'mounted on {shown.place}'}" if shown.place else ""
    yield f"{name} is a device of {format_size(size)}{attached}{place}.", False
    if stored:
        away = facts["bd_stat"]["pages"] * PAGE_SIZE
        yield _stored(stored, away, used, size, memory["compr_data_size"]), False
    else:
        yield "Nothing is stored; it takes memory only for what is.", False
    yield _limit(used, memory["mem_limit"], size)
    if pages := list(_pages(facts)):
        yield f"{'; '.join(pages)}.", False


def _stored(stored: int, away: int, used: int, size: int, compressed: int) -> str:
    """Say what the stored data take; `away` of them are written back, and take no memory."""
    here = stored - away
    gain = here - used
    effect = f"{format_size(gain)} less" if gain >= 0 else f"{format_size(-gain)} more"
    ratio = f", a ratio of {here / used:.2f}" if used else ""
    part = f"{format_size(away)} of that written back; the rest is " if away else ""
    return (
        f"{format_size(stored)} of it ({_percent(stored / size)}) is stored, {part}compressed to "
        f"{format_size(compressed)}. That takes {format_size(used)} of memory: {effect} than uncompressed{ratio}."
    )


def _limit(used: int, limit: int, size: int) -> tuple[str, bool]:
    if not limit:
        return f"No mem_limit is set: data that do not compress may take up to {format_size(size)} of memory.", False
    share = used / limit
    return (
        f"It may take {format_size(limit)} of memory (mem_limit), and takes {_percent(share)} of that; "
        "a write that finds no more fails (ENOSPC).",
        share >= NEAR,
    )


def _percent(share: float) -> str:
    return f"{share:.0%}" if share >= 0.01 or not share else "less than 1%"


def _pages(facts: dict[str, Any]) -> Iterator[str]:
    memory = facts["mm_stat"]
    if huge := memory["huge_pages"]:
        yield f"{_count(huge)} did not compress and {'is' if huge == 1 else 'are'} stored as they are (huge)"
    if same := memory["same_pages"]:
        yield f"{_count(same)} {'is' if same == 1 else 'are'} one word repeated and take no memory (same-filled)"
    if written := facts["bd_stat"]["pages"]:
        yield f"{_count(written)} {'is' if written == 1 else 'are'} written back to {facts['backing_dev']}"


def _count(pages: int) -> str:
    return f"{format_size(pages * PAGE_SIZE)} in {pages:,} page{'s' * (pages != 1)}"


def swap_lines(facts: dict[str, Any]) -> Iterator[tuple[str, bool]]:
    """Yield what there is to say of a disk that is swapped to, or is to be, and whether that is a warning."""
    name, measures = facts["name"], facts["measures"]
    if facts["swaps"]:
        yield f"{name} is swapped to: {' '.join(facts['swaps'])}", False
    if measures is not None:
        in_force = ", ".join(key for key, missing in measures.items() if not missing)
        yield f"{name} for swap, in force: {in_force}", False
        for key, missing in measures.items():
            if missing:
                yield f"{name} for swap, missing: {key} ({missing})", True
    elif facts["swaps"]:
        yield f"{name} is not safe to swap to: serve it with --swap", True
