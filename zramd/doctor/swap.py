"""The machine's swap areas: which of them are used before ours, and which are compressed memory too."""

import re

from zramd.attach.swaps import Swap, read_swaps
from zramd.doctor.finding import Finding, advice, ok
from zramd.doctor.machine import Machine


def examine(machine: Machine) -> Finding:
    """Return what is found. Swap on an NBD device is taken to be ours; if it is not, what is said holds for it too."""
    try:
        swaps = read_swaps(str(machine.root))
    except OSError:
        return ok("swap", "the kernel has none")
    ours = [swap for swap in swaps if re.fullmatch(r"/dev/nbd\d+", swap.path)]
    kernel = [swap for swap in swaps if re.fullmatch(r"/dev/zram\d+", swap.path)]
    others = [swap for swap in swaps if swap not in ours and swap not in kernel]
    if kernel:
        text = f"the kernel's zram is swapped to ({_list(kernel)}): two pools would share the memory"
        return advice("swap", text, f"use one of them: swapoff {kernel[0].path}")
    if not ours:
        return ok("swap", f"not on zramd; there is {_list(swaps)}" if swaps else "none yet")
    first = max((swap.priority for swap in others), default=-1)
    for swap in ours:
        if swap.priority <= first:
            text = f"{_list(others)} is used before {_list([swap])}, or in turns with it"
            remedy = f"zramd swapoff {swap.path} && zramd swapon --priority {max(first, 0) + 1} {swap.path}"
            return advice("swap", text, remedy)
    return ok("swap", f"{_list(ours)} is used first")


def _list(swaps: list[Swap]) -> str:
    return ", ".join(f"{swap.path} (priority {swap.priority})" for swap in swaps)
