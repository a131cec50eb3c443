"""Builds the compiled engine, where it can be built; everything else is in pyproject.toml.

Man pages and completions are made of the commands' help, and installed with it.

The engine's constants are those of zramd/layout.py and zramd/nbd/protocol.py: a header is generated from them.

The variable ZRAMD_SANITIZE (address or thread) builds it with sanitizers, for scripts/sanitize.
"""

import os
import re
import runpy
import sys
from enum import IntEnum, IntFlag
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CCompilerError

ROOT = Path(__file__).parent
SOURCES = ROOT / "zramd" / "native"
GENERATED = Path("build") / "native"
SANITIZERS = {
    # Cython's own parsing of arguments adds 0 to a null pointer.
    "address": [
        "-fsanitize=address,undefined",
        "-fno-sanitize=pointer-overflow",
        "-fno-sanitize-recover=undefined",
    ],
    "thread": ["-fsanitize=thread"],
}
NEEDED = "gcc, liblz4-dev, libzstd-dev, libxxhash-dev and the headers of Python"


def constants(module: Path) -> dict[str, int]:
    """Return the integers that a module defines, those of enums as ENUM_MEMBER."""
    found = {}
    for name, value in runpy.run_path(str(module)).items():
        if isinstance(value, int) and name.isupper():
            found[name] = value
        elif isinstance(value, type) and issubclass(value, IntEnum | IntFlag):
            prefix = re.sub(r"(?<=[a-z])(?=[A-Z])", "_", name).upper()
            found |= {f"{prefix}_{member.name}": int(member) for member in value}
    return found


def write_header(path: Path) -> None:
    """Write the constants as macros."""
    lines = []
    for module in ("layout.py", "nbd/protocol.py"):
        lines += [f"#define Z_{name} {value:#x}ULL" for name, value in constants(ROOT / "zramd" / module).items()]
    path.write_text("\n".join(lines) + "\n")


class BuildEngine(build_ext):
    """Builds the engine, or says in one line why not and goes on: zramd runs without it."""

    def run(self) -> None:
        """Generate the C sources and compile them."""
        try:
            from Cython.Build import cythonize

            GENERATED.mkdir(parents=True, exist_ok=True)
            write_header(GENERATED / "layout.h")
            self.extensions = cythonize(self.extensions, build_dir=str(GENERATED), quiet=True)
            for extension in self.extensions:
                extension._needs_stub = False
            super().run()
        except Exception as error:
            if os.environ.get("ZRAMD_ENGINE") == "native":
                raise
            reason = (
                "the compiler failed"
                if isinstance(error, CCompilerError)
                else str(error).partition("\n")[0] or repr(error)
            )
            print(f"zramd: without the compiled engine, which needs {NEEDED}: {reason}", file=sys.stderr)
            self.extensions = []
            for stale in SOURCES.glob("*.so"):
                stale.unlink()  # of another layout, perhaps


def manual() -> list[tuple[str, list[str]]]:
    """Make man pages and completions. Return them by the directory below the prefix that they go to."""
    sys.path.insert(0, str(ROOT))
    try:
        from zramd.cli.manual import write
    except ImportError as error:
        print(f"zramd: without man pages and completions: {error}", file=sys.stderr)
        return []
    return list(write(Path("build") / "manual").items())


sanitize = SANITIZERS.get(os.environ.get("ZRAMD_SANITIZE", ""), [])
engine = Extension(
    "zramd.native.engine",
    [str((SOURCES / "engine.pyx").relative_to(ROOT))],
    depends=[str(path.relative_to(ROOT)) for path in SOURCES.glob("*.pxi")],
    include_dirs=[str(GENERATED)],
    libraries=["lz4", "zstd"],
    extra_compile_args=["-O2", "-g1", *sanitize],
    extra_link_args=sanitize,
)
setup(ext_modules=[engine], data_files=manual(), cmdclass={"build_ext": BuildEngine})
