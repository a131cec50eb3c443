"""The compiled hot path: transmission loop, codecs, malloc and free, page table, on the same memory as the Python one.

`engine` is one extension; setup.py builds it where there are a compiler, liblz4 and libzstd. What is rare (handshake,
requests out of the ordinary, growing, compaction, recovery, statistics) is Python with either engine.
"""

import importlib
import os
from enum import Enum
from types import ModuleType

VARIABLE = "ZRAMD_ENGINE"


class Engine(Enum):
    """What runs the hot path."""

    PYTHON = "python"
    NATIVE = "native"


class EngineError(Exception):
    """The engine that was asked for cannot be had."""


def choose() -> Engine:
    """Return the engine that ZRAMD_ENGINE names, or else the compiled one if it was built.

    Raises:
        EngineError: the variable names none, or one that was not built.
    """
    wanted = os.environ.get(VARIABLE, "")
    if wanted not in ("", *(engine.value for engine in Engine)):
        raise EngineError(f"{VARIABLE}={wanted} is not an engine: choose python or native")
    if wanted == Engine.PYTHON.value:
        return Engine.PYTHON
    try:
        _load()
    except ImportError as error:
        if wanted:
            raise EngineError(
                f"{VARIABLE}=native, but the compiled engine cannot be loaded ({error}): install gcc, liblz4-dev, "
                "libzstd-dev and the headers of Python, then install zramd again"
            ) from error
        return Engine.PYTHON
    return Engine.NATIVE


def _load() -> ModuleType:
    return importlib.import_module("zramd.native.engine")


def library_versions() -> tuple[str, str]:
    """Return the versions of liblz4 and libzstd that the compiled engine uses."""
    engine = _load()
    return engine.lz4_version(), engine.zstd_version()


def describe() -> str:
    """Return a line on the engine in use, and why it is that one. Raises EngineError as `choose`."""
    if choose() is Engine.NATIVE:
        return "native"
    try:
        _load()
    except ImportError as error:
        return f"python, since the compiled one cannot be loaded: {error}"
    return f"python, since {VARIABLE} says so"
