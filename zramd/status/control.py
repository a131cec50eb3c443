"""The words that change a disk, as `NAME VALUE`, by the rules of the kernel's files of the same names.

What each takes and refuses, and in which order: drivers/block/zram/zram_drv.c of Linux 6.18. But algorithms and their
parameters may be changed at any time, since a page keeps what it was compressed with.
"""

import errno
from collections.abc import Callable
from datetime import datetime

from zramd.device.codecs import parse_parameters, split_words
from zramd.device.disk import Disk
from zramd.device.fetching import PageError
from zramd.device.life import BusyError, UnderWayError, UninitialisedError
from zramd.device.recompression import PAGE_TYPES, Recompression
from zramd.device.superblock import StateError
from zramd.device.work import WorkKind
from zramd.layout import PAGE_SIZE, PRIORITIES
from zramd.memory import NoMemoryError, RegionError
from zramd.sizes import format_size, memparse, parse_unsigned
from zramd.status import trials, writeback
from zramd.status.attributes import NAMES, AttributeRefusedError, Served
from zramd.status.caller import Caller

FORCE = "force"
"""The value of `reset` and `stop` that takes no notice of clients; the kernel has nothing like it."""
MAX_ALGORITHM = 128
"""Characters in comp_algorithm (CRYPTO_MAX_ALG_NAME)."""
POLICY = ("explain", "on", "dry-run", "off")
MAX_RESET = (1 << 16) - 1


def _set_mem_used_max(disk: Disk, value: str) -> None:
    if parse_unsigned(value, "mem_used_max") != 0:
        raise ValueError("mem_used_max takes only 0, which resets it to the current use")
    disk.reset_mem_used_max()


def _set_algorithm(disk: Disk, value: str) -> None:
    if len(value) >= MAX_ALGORITHM:
        raise OSError(errno.E2BIG, "no algorithm has so long a name")
    disk.set_algorithm(value)


def _set_parameters(disk: Disk, value: str) -> None:
    words = split_words(value)
    priority = _priority(words, 0, 0)
    if "algo" in words:
        named = [number for number in range(PRIORITIES) if disk.algorithm(number) == words["algo"]]
        if not named or ("priority" in words and priority not in named):
            raise ValueError(f"{words['algo']} is not chosen: set comp_algorithm or recomp_algorithm first")
        priority = priority if "priority" in words else named[0]
    try:
        parameters = parse_parameters(words)
    except OSError as error:
        # The kernel gives no other reason.
        raise ValueError(f"cannot read the dictionary {words['dict']}: {error.strerror}") from error
    disk.set_parameters(parameters, priority)


def _set_secondary(disk: Disk, value: str) -> None:
    words = split_words(value)
    priority = _priority(words, 1, 1)
    if "algo" not in words:
        raise ValueError("recomp_algorithm takes algo=NAME, and perhaps priority=1, 2 or 3")
    disk.set_algorithm(words["algo"], priority)


def _priority(words: dict[str, str], lowest: int, default: int) -> int:
    priority = _number(words, "priority")
    if priority is None:
        return default
    if not lowest <= priority < PRIORITIES:
        raise ValueError(f"priority={priority} is not one of {lowest} to {PRIORITIES - 1}")
    return priority


def _number(words: dict[str, str], key: str) -> int | None:
    """Return the value of a key, or None if it is not there."""
    return parse_unsigned(words[key], key) if key in words else None


def _mark_idle(disk: Disk, value: str) -> str:
    text = value.strip()
    pages = disk.mark_idle(None if text == "all" else parse_unsigned(text, "idle, unless it is `all`,", base=0))
    return f"{pages} pages are idle\n"


def parse_recompression(disk: Disk, value: str) -> Recompression:
    """Read what `recompress` takes: type, threshold, max_pages, algo, priority.

    Raises:
        ValueError: it is none of that, or no such algorithm is chosen.
    """
    words = split_words(value)
    kind = words.get("type")
    if kind is not None and kind not in PAGE_TYPES:
        raise ValueError(f"type={kind} is not idle, huge or huge_idle")
    idle, huge = PAGE_TYPES[kind] if kind else (False, False)
    priority = _number(words, "priority")
    if priority == 0:
        priority = 1  # as the kernel corrects it
    if "algo" in words:
        named = [number for number in range(priority or 1, PRIORITIES) if disk.algorithm(number) == words["algo"]]
        if not named:
            raise ValueError(f"{words['algo']} is no algorithm to recompress with: set recomp_algorithm")
        priority = named[0]
    return Recompression(idle, huge, _number(words, "threshold") or 0, _number(words, "max_pages"), priority)


def _recompress(disk: Disk, value: str) -> str:
    outcome = disk.recompress(parse_recompression(disk, value))
    return (
        f"{'cancelled: ' * outcome.cancelled}{outcome.recompressed} of {outcome.tried} pages recompressed, "
        f"{outcome.saved} bytes saved\n"
    )


def _cancel(disk: Disk, value: str) -> None:
    """Let long work stop: that of a kind, or all. The kernel has nothing like it."""
    text = value.strip()
    kinds = [kind.value for kind in WorkKind]
    if text != "all" and text not in kinds:
        raise ValueError(f"cancel takes `all`, or a kind of work: {', '.join(kinds)}")
    disk.works.cancel(None if text == "all" else WorkKind(text))


def _reset(disk: Disk, value: str) -> None:
    force = value == FORCE
    if not force and not parse_unsigned(value, "reset", MAX_RESET):
        raise ValueError("reset takes a number that is not 0, or `force` to disconnect the clients first")
    disk.reset(force=force)


def _set_policy(served: Served, value: str) -> str:
    """Switch the policy, or let it explain itself. The kernel has nothing like it."""
    text = value.strip()
    if text not in POLICY:
        raise ValueError(f"policy takes {', '.join(POLICY)}")
    return served.policy(text)


def _stop(served: Served, value: str) -> None:
    """End the server. The kernel has nothing like it."""
    swaps = served.swaps()
    if swaps and value != FORCE:
        raise BusyError(f"{' '.join(swaps)} is swapped to: swapoff first, or force it and lose what is swapped out")
    served.stop()


_WORDS: dict[str, Callable[[Disk, str], str | None]] = {
    "disksize": lambda disk, value: disk.initialise(memparse(value)),
    "comp_algorithm": _set_algorithm,
    "algorithm_params": _set_parameters,
    "mem_limit": lambda disk, value: disk.set_mem_limit(memparse(value)),
    "mem_used_max": _set_mem_used_max,
    "compact": lambda disk, _: disk.compact(),
    "recomp_algorithm": _set_secondary,
    "idle": _mark_idle,
    "recompress": _recompress,
    "backing_dev": writeback.set_backing_dev,
    "writeback": writeback.write_back,
    "writeback_limit": writeback.set_limit,
    "writeback_limit_enable": writeback.set_limit_enable,
    "writeback_batch_size": writeback.set_batch_size,
    "compressed_writeback": writeback.set_compressed,
    "grow": lambda disk, value: disk.grow(memparse(value)),
    "estimate": trials.run_estimate,
    "train": trials.run_training,
    "cancel": _cancel,
    "reset": _reset,
}


def _save(disk: Disk, value: str, caller: Caller) -> str:
    if value.strip() != "fd":
        raise ValueError("save takes `fd`, and a descriptor to write to")
    saved = disk.save(caller.descriptor(), caller.is_gone)
    return f"{format_size(saved.pages * PAGE_SIZE)} of data saved, {format_size(saved.bytes)} compressed\n"


def _restore(disk: Disk, value: str, caller: Caller) -> str:
    kind, _, rest = value.strip().partition(" ")
    words = split_words(rest)
    if kind != "fd" or words.keys() - {"disksize"}:
        raise ValueError("restore takes `fd`, a descriptor to read from, and perhaps disksize=SIZE")
    restored = disk.restore(caller.descriptor(), memparse(words.get("disksize", "0")), caller.is_gone)
    when = datetime.fromtimestamp(restored.seconds).astimezone()
    return f"{format_size(restored.pages * PAGE_SIZE)} of data restored, saved on {when:%Y-%m-%d at %H:%M:%S %z}\n"


_TRANSFERS = {"save": _save, "restore": _restore}
"""Words that work on a descriptor of the client's. The kernel has nothing like them."""

WORDS = (*_WORDS, *_TRANSFERS, "policy", "stop")


def write(served: Served, name: str, value: str, caller: Caller | None = None) -> str:
    """Carry out a control word. Return what there is to say of it: nothing, or a line on what long work has done.

    Raises:
        AttributeRefusedError: there is no such word, or not with this value or in this state.
    """
    if name not in WORDS:
        if name in NAMES:
            raise AttributeRefusedError(f"EACCES {name} cannot be written")
        raise AttributeRefusedError(f"EINVAL no attribute {name!r} can be written; there are: {' '.join(WORDS)}")
    try:
        if name == "stop":
            _stop(served, value)
        elif name == "policy":
            return _set_policy(served, value)
        elif name in _TRANSFERS:
            if caller is None:
                raise ValueError(f"{name} needs a client that has a descriptor")
            return _TRANSFERS[name](served.disk, value, caller)
        else:
            return _WORDS[name](served.disk, value) or ""
    except BusyError as error:
        # As in the kernel for recompress and writeback.
        name = "EAGAIN" if isinstance(error, UnderWayError) else "EBUSY"
        raise AttributeRefusedError(f"{name} {error}") from error
    except (ValueError, UninitialisedError, StateError) as error:
        raise AttributeRefusedError(f"EINVAL {error}") from error
    except NoMemoryError as error:
        raise AttributeRefusedError(f"ENOMEM {error}") from error
    except (RegionError, PageError) as error:
        raise AttributeRefusedError(f"EIO {error}") from error
    except OSError as error:
        name = errno.errorcode.get(error.errno or 0, "EIO")
        where = f"{error.filename}: " if error.filename else ""
        raise AttributeRefusedError(f"{name} {where}{error.strerror or error}") from error
    return ""
