"""What a device would hold with other codecs, levels and chain sizes, by a sample of its pages."""

from dataclasses import dataclass

from zramd.device.codecs import Codec, codec
from zramd.device.sampling import sample_pages
from zramd.device.trial import pool_memory, run_trial
from zramd.device.work import Work
from zramd.device.zram import Device
from zramd.layout import PAGE_SIZE

LEVELS = {"lz4": (1, 4), "lz4hc": (3, 9, 12), "zstd": (-5, 1, 3, 9, 15, 19)}
CHAIN_SIZES = (4, 8, 16)
MANY = 1 << 24
"""Objects."""


@dataclass(frozen=True, slots=True)
class Estimated:
    """A codec at a level: data for each byte, microseconds a page, and bytes of the pool by chain size.

    `per_object` are bytes of the pool for each object, where there are so many that no class has too few.
    """

    name: str
    level: int
    dictionary_bytes: int
    ratio: float
    compress: float
    decompress: float
    memory: dict[int, int]
    per_object: dict[int, float]


@dataclass(frozen=True, slots=True)
class Estimate:
    """How many pages were tried, of how many that have an object in memory, and what came of it.

    `used` are the bytes of the pool as it is, of chain size `chain_size`.
    """

    samples: int
    objects: int
    used: int
    chain_size: int
    rows: list[Estimated]


def estimate(device: Device, samples: int, work: Work) -> Estimate | None:
    """Try codecs on pages of a device; None if that was cancelled.

    Raises:
        ValueError: it has no pages.
        PageError: one of them is damaged.
        NoMemoryError: there is no room to try.
    """
    sample = sample_pages(device, samples, work)
    if work.cancelled:
        return None
    if not sample.pages:
        raise ValueError("no page has an object in memory: there is nothing to estimate by")
    pages, codecs = bytearray().join(sample.pages), _codecs(device)
    sample.pages.clear()
    count = len(pages) // PAGE_SIZE
    work.total = count * len(codecs)
    rows = []
    for chosen in codecs:
        row = try_codec(chosen, pages, sample.objects, work)
        if row is None:
            return None
        rows.append(row)
    used = device.mm_stat().mem_used_total
    return Estimate(count, sample.objects, used, device.identity.chain_size, rows)


def try_codec(chosen: Codec, pages: bytearray, objects: int, work: Work | None = None) -> Estimated | None:
    """Try a codec on pages that are a sample of so many objects; None if that was cancelled.

    Raises:
        NoMemoryError: there is no room to try.
    """
    trial = run_trial(chosen, pages, work)
    if trial is None:
        return None
    memory = {size: pool_memory(trial.lengths, size, objects) for size in CHAIN_SIZES}
    per_object = {size: pool_memory(trial.lengths, size, MANY) / MANY for size in CHAIN_SIZES}
    costs = trial.ratio, trial.compress, trial.decompress
    return Estimated(chosen.name, chosen.level, len(chosen.dictionary), *costs, memory, per_object)


def _codecs(device: Device) -> list[Codec]:
    """Return what to try: each codec at some levels, and those with dictionaries that the device has."""
    found = [codec(name, level) for name, levels in LEVELS.items() for level in levels]
    algorithms = device.identity.algorithms
    return found + [made for made in (algorithms.primary, *algorithms.secondary.values()) if made.dictionary]
