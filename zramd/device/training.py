"""A zstd dictionary for the pages that a device has: trained on some of them, and tried on others."""

from dataclasses import dataclass

import zstandard

from zramd.device.codecs import MAX_DICTIONARY, codec
from zramd.device.sampling import sample_pages
from zramd.device.trial import Trial, pool_memory, run_trial
from zramd.device.work import Work
from zramd.device.zram import Device

LEVELS = (1, 3, 9, 19)
SAMPLES = 5120
"""Pages: 16 MiB to train on, and 4 MiB to try on."""
HELD_OUT = 5
"""One page in so many is not trained on."""
MIN_SAMPLES = 100
MIN_DICTIONARY = 1024
DEFAULT_DICTIONARY = 112 << 10
_SEGMENT, _DMER = 1024, 8
"""Parameters of the trainer (k and d): without them it would look for the best ones, for minutes."""


@dataclass(frozen=True, slots=True)
class Tried:
    """Held-out pages: data for each byte, bytes of the pool for all pages of the device, microseconds a page."""

    ratio: float
    memory: int
    compress: float
    decompress: float


@dataclass(frozen=True, slots=True)
class Level:
    """A level, without and with the dictionary."""

    level: int
    plain: Tried
    trained: Tried


@dataclass(frozen=True, slots=True)
class Training:
    """A dictionary, how many pages it was trained and tried on, of how many, and what came of it."""

    dictionary: bytes
    trained_on: int
    held_out: int
    objects: int
    levels: list[Level]

    def gain(self, level: int) -> int:
        """Return the bytes of memory that a level takes less with the dictionary, which takes some itself."""
        (found,) = (tried for tried in self.levels if tried.level == level)
        return found.plain.memory - found.trained.memory - len(self.dictionary)


def train(device: Device, size: int, levels: tuple[int, ...], work: Work) -> Training | None:
    """Train a dictionary of at most `size` bytes; None if that was cancelled.

    Raises:
        ValueError: there are too few pages, or they are unfit; or no dictionary has this size.
        PageError: a page is damaged.
        NoMemoryError: there is no room to try it.
    """
    if not MIN_DICTIONARY <= size <= MAX_DICTIONARY:
        raise ValueError(f"a dictionary has {MIN_DICTIONARY} to {MAX_DICTIONARY} bytes, not {size}")
    sample = sample_pages(device, SAMPLES, work)
    if work.cancelled:
        return None
    if len(sample.pages) < MIN_SAMPLES:
        raise ValueError(f"{len(sample.pages)} pages have an object in memory: training takes {MIN_SAMPLES}")
    held_out = len(sample.pages) // HELD_OUT
    work.total = len(sample.pages) - held_out + 2 * len(levels) * held_out
    try:
        made = zstandard.train_dictionary(size, [*sample.pages[held_out:]], k=_SEGMENT, d=_DMER).as_bytes()
    except zstandard.ZstdError as error:
        raise ValueError(f"these pages make no dictionary of {size} bytes: {error}") from error
    trained_on = len(sample.pages) - held_out
    work.done = trained_on
    pages = bytearray().join(sample.pages[:held_out])
    sample.pages.clear()
    chain_size, rows = device.identity.chain_size, []
    for level in levels:
        plain = run_trial(codec("zstd", level), pages, work)
        trained = run_trial(codec("zstd", level, made), pages, work)
        if plain is None or trained is None:
            return None
        rows.append(Level(level, *(_tried(trial, chain_size, sample.objects) for trial in (plain, trained))))
    return Training(made, trained_on, held_out, sample.objects, rows)


def _tried(trial: Trial, chain_size: int, objects: int) -> Tried:
    return Tried(trial.ratio, pool_memory(trial.lengths, chain_size, objects), trial.compress, trial.decompress)
