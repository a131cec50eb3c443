"""The words `train` and `estimate`, which the kernel does not have: they answer with a line of JSON."""

import base64
import json
from dataclasses import asdict

from zramd.device.codecs import codec, split_words
from zramd.device.disk import Disk
from zramd.device.estimate import estimate
from zramd.device.life import BusyError
from zramd.device.sampling import MOST_PAGES
from zramd.device.training import DEFAULT_DICTIONARY, LEVELS, train
from zramd.device.work import WorkKind
from zramd.layout import PRIORITIES

DEFAULT_SAMPLES = 1024
DEFAULT_LEVEL = 9
CANCELLED = "cancelled: nothing has changed\n"
"""The answer to what was cancelled."""


def run_estimate(disk: Disk, value: str) -> str:
    """Estimate by `samples=N` pages."""
    samples = _number(split_words(value), "samples", DEFAULT_SAMPLES, 1, MOST_PAGES)
    with disk.work(WorkKind.ESTIMATE) as work:
        found = estimate(disk.require_opened().device, samples, work)
    return CANCELLED if found is None else json.dumps(asdict(found)) + "\n"


def run_training(disk: Disk, value: str) -> str:
    """Train a dictionary of `size=BYTES`; with `install=1`, let `priority=P` have it at `level=L`, if it is a gain."""
    words = split_words(value)
    size = _number(words, "size", DEFAULT_DICTIONARY, 0, 1 << 32)
    priority = _number(words, "priority", 1, 1, PRIORITIES - 1)
    level = _number(words, "level", DEFAULT_LEVEL, 1, 22)
    install = bool(_number(words, "install", 0, 0, 1))
    with disk.work(WorkKind.TRAIN) as work:
        found = train(disk.require_opened().device, size, tuple(sorted({*LEVELS, level})), work)
        if found is None:
            return CANCELLED
        refusal = None if found.gain(level) > 0 else "the dictionary is no gain"
        if install and not refusal:
            try:
                disk.use_codec(codec("zstd", level, found.dictionary), priority)
            except BusyError as error:
                # What was found out took long, and is of use without.
                refusal = str(error)
    facts = asdict(found) | {
        "dictionary": base64.b64encode(found.dictionary).decode(),
        "level": level,
        "gain": found.gain(level),
        "installed": priority if install and not refusal else None,
        "refusal": refusal,
    }
    return json.dumps(facts) + "\n"


def _number(words: dict[str, str], key: str, default: int, least: int, most: int) -> int:
    text = words.get(key, str(default))
    if not text.isascii() or not text.isdecimal() or not least <= int(text) <= most:
        raise ValueError(f"{key}={text} is not a number from {least} to {most}")
    return int(text)
