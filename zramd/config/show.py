"""A configuration as it is in effect, as TOML that loads again, with where each key is from; what is unwise in it."""

import json
from collections.abc import Iterator
from typing import Any

from zramd.config.document import Table, Taken
from zramd.config.keys import Configuration
from zramd.expressions import Size
from zramd.memory import round_up_to_page
from zramd.settings import DiskSettings
from zramd.sizes import format_size


def toml(configuration: Configuration) -> Iterator[str]:
    """Yield the lines of a file that says the same."""
    for path in configuration.sources:
        yield f"# {_printable(str(path))}"
    for table in configuration.tables:
        for part in (table, *table.tables):
            yield ""
            yield f"[{part.name}]"
            yield from _keys(part)


def _keys(table: Table) -> Iterator[str]:
    for taken in table.taken:
        if taken.value is not None:
            yield f"{taken.key} = {_value(taken.value)}  # {_origin(table, taken)}"
    if unset := [taken.key for taken in table.taken if taken.value is None]:
        yield f"# not set: {', '.join(unset)}"


def _origin(table: Table, taken: Taken) -> str:
    if taken.source is None:
        return "default"
    place = _printable(taken.source.place(table.name, taken.key))
    return f"{_bytes(taken)}, {place}" if isinstance(taken.meaning, Size) and taken.meaning.varies else place


def _bytes(taken: Taken) -> int:
    size: int = taken.meaning.bytes
    return round_up_to_page(size) if taken.key == "size" else size


def _value(value: Any) -> str:
    """Return a value as TOML has it, which for these is as JSON has it, but for DEL."""
    return json.dumps(value if isinstance(value, bool | int | list) else str(value), ensure_ascii=False).replace(
        "\x7f", "\\u007f"
    )


def _printable(text: str) -> str:
    return text if text.isprintable() else repr(text)


def unwise(configuration: Configuration, ram: int) -> Iterator[str]:
    """Yield what is valid, and most likely not what was meant, on a machine with that much memory in bytes."""
    settings = configuration.settings
    for disk in settings.disks:
        yield from (f"[{disk.name}] {text}" for text in _unwise(disk, ram, settings.swap))


def _unwise(disk: DiskSettings, ram: int, swap: bool) -> Iterator[str]:
    size, limit = disk.wanted.disksize or 0, disk.mem_limit or 0
    if size > 2 * ram and not limit:
        yield f"size: more than twice the memory of {format_size(ram)}, which it may need: set resident-limit"
    if limit > ram:
        yield f"resident-limit: more than the memory of {format_size(ram)} limits nothing"
    if swap and disk.state is None:
        yield "volatile: what is swapped out is lost when the server dies, and is started anew"
    if disk.policy.writeback_after and disk.wanted.backing is None:
        yield "policy: writeback-after does nothing without writeback-device"
    if (disk.policy.low.percent or disk.policy.high.percent) and not limit:
        yield "policy: memory-low and memory-high in percent are of resident-limit, and there is none"


def summary(configuration: Configuration) -> str:
    """Return one line on the files and on the disks that they have."""
    first, *others = map(str, configuration.sources)
    files = first + (f" and {len(others)} drop-in{'s' * (len(others) > 1)}" if others else "")
    disks = [_describe(disk) for disk in configuration.settings.disks]
    disks += [f"{name} (left out on this machine)" for name in configuration.settings.left_out]
    return f"{files}: {', '.join(disks)}"


def _describe(disk: DiskSettings) -> str:
    size = disk.wanted.disksize
    words = [format_size(size)] if size is not None else []
    words += [str(disk.wanted.codec.name)] if disk.wanted.codec else []
    words += [f"on {disk.use.mount_point}"] if disk.use.mount_point else []
    return f"{disk.name} ({', '.join(words)})" if words else disk.name
