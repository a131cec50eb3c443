"""The table of a pool's size classes, as zsmalloc's debugfs file `classes` shows it."""

from dataclasses import dataclass

from zramd.layout import FULL
from zramd.zsmalloc.pool import ClassState, Pool


@dataclass(frozen=True, slots=True)
class ClassStat:
    """One size class. `groups` counts the zspages of the fullness groups 1 to 11, the last being full."""

    index: int
    size: int
    groups: tuple[int, ...]
    obj_allocated: int
    obj_used: int
    pages_used: int
    pages_per_zspage: int
    freeable: int


def class_stats(pool: Pool) -> list[ClassStat]:
    """Return all classes that are no aliases, smallest first."""
    return [_class_stat(pool.classes[size_class.index]) for size_class in pool.geometry.kept()]


def _class_stat(state: ClassState) -> ClassStat:
    listed = state.counts[1:FULL]
    return ClassStat(
        index=state.size_class.index,
        size=state.size,
        groups=(*listed, state.zspages - sum(listed)),
        obj_allocated=state.zspages * state.objects,
        obj_used=state.live,
        pages_used=state.zspages * state.pages,
        pages_per_zspage=state.pages,
        freeable=state.freeable,
    )


_SHARES = ("10%", "20%", "30%", "40%", "50%", "60%", "70%", "80%", "90%", "99%", "100%")
_COLUMNS = ("obj_allocated", "obj_used", "pages_used", "pages_per_zspage", "freeable")


def format_classes(stats: list[ClassStat]) -> str:
    """Return the file's text to the character (zs_stats_size_show of Linux 6.18)."""
    groups = "{:>9} " * len(_SHARES)
    heading = " {:>5} {:>5}" + " {:>9}" * len(_SHARES) + " {:>13} {:>10} {:>10} {:>16} {:>8}\n"
    row = " {:5d} {:5d} " + groups + "{:13d} {:10d} {:10d} {:16d} {:8d}\n"
    total = " {:>5} {:>5} " + groups + "{:13d} {:10d} {:10d} {:>16} {:8d}\n"
    lines = [heading.format("class", "size", *_SHARES, *_COLUMNS)]
    for stat in stats:
        # Not astuple: it copies in depth, and would take four times as long as the rest.
        counts = (stat.obj_allocated, stat.obj_used, stat.pages_used, stat.pages_per_zspage, stat.freeable)
        lines.append(row.format(stat.index, stat.size, *stat.groups, *counts))
    sums = [sum(column) for column in zip(*(stat.groups for stat in stats), strict=True)]
    lines.append(
        "\n"
        + total.format(
            "Total",
            "",
            *sums,
            sum(stat.obj_allocated for stat in stats),
            sum(stat.obj_used for stat in stats),
            sum(stat.pages_used for stat in stats),
            "",
            sum(stat.freeable for stat in stats),
        )
    )
    return "".join(lines)
