"""Fuzz handshake and transmission with atheris; the oracle in tests/fuzz knows what the server must answer.

Inputs that reach new code are kept in build/fuzz-corpus. One that shows a defect is written to build/, with the
command that replays it.
"""

import os
import random
import re
import shlex
import subprocess
import sys
import time
from pathlib import Path

import atheris
import click

ROOT = Path(__file__).resolve().parents[1]
SEEDS = ROOT / "tests" / "fuzz" / "corpus"
BUILD = ROOT / "build"
FOUND = BUILD / "fuzz-corpus"
MOST_BYTES = 64 << 10
"""In an input: more than the buffer of the server under test."""
INPUT_SECONDS = 30
MEMORY_MIB = 2048

sys.path.insert(0, str(ROOT))
with atheris.instrument_imports(include=["zramd.nbd"]):
    from tests.fuzz import frames, session


def fuzz(arguments: list[str]) -> None:
    """Run libFuzzer in this process; it ends the process."""

    def mutate(data: bytes, most: int, seed: int) -> bytes:
        generator = random.Random(seed)  # noqa: S311
        if generator.random() < 0.5:
            return bytes(atheris.Mutate(data, most))
        return frames.mutate(data, most, generator, lambda frame, size: bytes(atheris.Mutate(frame, size)))

    def cross_over(first: bytes, second: bytes, most: int, seed: int) -> bytes:
        return frames.cross_over(first, second, most, random.Random(seed))  # noqa: S311

    atheris.Setup([sys.argv[0], *arguments], session.run, custom_mutator=mutate, custom_crossover=cross_over)
    atheris.Fuzz()


def supervise(seconds: int) -> int:
    """Fuzz in a process of its own, pass its lines on, and sum up. Return the exit status."""
    FOUND.mkdir(parents=True, exist_ok=True)
    arguments = [
        f"-max_total_time={seconds}",
        f"-max_len={MOST_BYTES}",
        f"-timeout={INPUT_SECONDS}",
        f"-rss_limit_mb={MEMORY_MIB}",
        "-len_control=0",
        f"-artifact_prefix={BUILD}/",
        "-print_final_stats=1",
        str(FOUND),
        str(SEEDS),
    ]
    began = time.monotonic()
    executions = coverage = features = 0
    artifact = None
    command = [sys.executable, __file__, "--child", *arguments]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as child:
        assert child.stdout is not None  # noqa: S101
        try:
            for line in child.stdout:
                print(line, end="", flush=True)
                if progress := re.match(r"#(\d+)\s.*\bcov: (\d+) ft: (\d+)", line):
                    executions, coverage, features = (int(number) for number in progress.groups())
                elif written := re.search(r"Test unit written to (\S+)", line):
                    artifact = written[1]
                elif total := re.match(r"stat::number_of_executed_units:\s*(\d+)", line):
                    executions = int(total[1])
        except KeyboardInterrupt:
            child.terminate()
    took = time.monotonic() - began
    print(f"fuzz: {executions} executions in {took:.0f} s, {executions / took:.0f} a second")
    print(f"fuzz: coverage {coverage} edges, {features} features; {len(os.listdir(FOUND))} inputs in {FOUND}")
    if artifact:
        print(f"fuzz: a defect; to see it again: scripts/fuzz {shlex.quote(artifact)}")
    return child.returncode


@click.command()
@click.option("--seconds", default=3600, show_default=True, help="How long to fuzz.")
@click.argument("inputs", nargs=-1, type=click.Path(exists=True, dir_okay=False, path_type=Path))
def main(seconds: int, inputs: tuple[Path, ...]) -> None:
    """Fuzz the NBD server; or play INPUTS, files that fuzzing has found, each once."""
    if not inputs:
        sys.exit(supervise(seconds))
    for path in inputs:
        session.run(path.read_bytes())
        print(f"fuzz: nothing wrong with {path}")
    session.world().check_devices()


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        fuzz(sys.argv[2:])
    else:
        main()
