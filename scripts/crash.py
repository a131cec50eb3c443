"""Kill servers, at named steps and at random moments, and verify what each leaves: tests/crash at length."""

import logging
import random
import shutil
import tempfile
import time
import traceback
from collections import Counter
from contextlib import ExitStack
from pathlib import Path

import click

from tests.crash.disk import KilledDisk
from tests.crash.servers import ForkedServers, Starter, build_engine
from tests.crash.steps import STEPS, Phase
from zramd.device.superblock import StateError
from zramd.native import Engine, EngineError, choose

KILLS_OF_A_DISK = 25
ALGORITHMS = ("lz4", "lz4hc", "zstd(level=-50)")
"""Each leaves something for recompression to do."""
LONGEST_LIFE = 0.25
"""Seconds, of a server that is killed at a random moment."""
SAVERS = 6
"""Commands that save a disk, of which each is killed, for each disk."""
LONGEST_SAVE = 0.6
"""Seconds, of a command that is killed at a random moment; to start takes a third of it."""
EARLY = (Phase.MAKING, Phase.GROWING)
"""Phases that only a new disk goes through."""


class Kills:
    """Kills with one engine: `plain` is as it is installed, `stepped` has the named steps."""

    def __init__(self, plain: Starter, stepped: Starter, seed: int) -> None:
        self._plain = plain
        self._stepped = stepped
        self._generator = random.Random(seed)  # noqa: S311
        self.by_kind: Counter[str] = Counter()
        self.answered = self.compacted = self.written_back = self.saved = self.savers = 0

    def kill(self, directory: Path, most: int) -> None:
        """Kill the servers of a new disk, and verify it after each kill."""
        generator = self._generator
        seed, algorithm, chain_size = (
            generator.randrange(1 << 32),
            generator.choice(ALGORITHMS),
            generator.randrange(4, 17),
        )
        disk = KilledDisk(directory, seed, algorithm, chain_size, integrity=generator.random() < 0.5, busy=True)
        for number in range(min(most, KILLS_OF_A_DISK)):
            steps = [step for step in STEPS if (step.phase in EARLY) != bool(number)]
            step = generator.choice([None, generator.choice(steps)])
            if step is not None and step.phase in (Phase.OPENING, Phase.RESTORING):
                self._kill_at_random(disk, requests=200)
            if step is None:
                self._kill_at_random(disk)
            else:
                disk.live_to(self._stepped, step, generator.randint(1, step.most))
                self.by_kind[step.phase.value] += 1
            disk.verify()
        disk.live_while_savers_are_killed(
            self._plain, [generator.uniform(LONGEST_SAVE / 3, LONGEST_SAVE) for _ in range(SAVERS)]
        )
        self.savers += SAVERS
        self.by_kind["while it saves to a file"] += 1
        disk.verify()
        disk.verify_that_nothing_leaks()
        self.answered += disk.answered
        self.compacted += disk.compacted
        self.written_back += disk.written_back
        self.saved += disk.saved

    def _kill_at_random(self, disk: KilledDisk, requests: int = 0) -> None:
        disk.live_until(self._plain, self._generator.uniform(0, LONGEST_LIFE), requests)
        self.by_kind["at a random moment"] += 1


def report(kills: Kills, seconds: float) -> str:
    """Return the lines about what was done."""
    total = kills.by_kind.total()
    lines = [f"{total} kills in {seconds:.0f} s: every acknowledged write was there, and nothing leaked"]
    lines += [f"  {count:5} {kind}" for kind, count in kills.by_kind.most_common()]
    lines.append(
        f"  {kills.answered:,} requests were answered, compaction freed {kills.compacted:,} pages, and "
        f"{kills.written_back:,} blocks were written back"
    )
    lines.append(
        f"  {kills.savers:,} commands that saved were killed too; {kills.saved:,} images were restored, all whole"
    )
    return "\n".join(lines)


@click.command()
@click.option("--kills", "wanted", type=click.IntRange(1), default=1000, show_default=True, help="How many.")
@click.option("--seed", type=int, default=1, show_default=True, help="Of what is sent and of where to kill.")
def main(wanted: int, seed: int) -> None:
    """Kill servers again and again. ZRAMD_ENGINE chooses the engine."""
    try:
        engine = choose()
    except EngineError as error:
        raise click.ClickException(str(error)) from error
    # Algorithms are changed all the time, and each start says which are no longer those that were asked for.
    logging.getLogger("zramd").setLevel(logging.ERROR)
    began = time.monotonic()
    with ExitStack() as undo:
        files = []
        if engine is Engine.NATIVE:
            files.append(str(build_engine(Path(undo.enter_context(tempfile.TemporaryDirectory())))))
        starters = ForkedServers(engine), ForkedServers(engine, "steps", *files)
        kills = Kills(*starters, seed)
        while (done := kills.by_kind.total()) < wanted:
            click.echo(f"crash: {engine.value} engine, {done} of {wanted} kills", err=True)
            directory = Path(tempfile.mkdtemp(prefix="zramd-crash-", dir="/dev/shm"))
            try:
                kills.kill(directory, wanted - done)
            except (AssertionError, StateError) as error:
                place = traceback.extract_tb(error.__traceback__)[-1]
                raise click.ClickException(
                    f"after {kills.by_kind.total()} kills with seed {seed}, {place.filename}:{place.lineno} does not "
                    f"hold: {place.line} {error}; the regions are in {directory}"
                ) from error
            shutil.rmtree(directory)
        for starter in starters:
            starter.close()
    click.echo(report(kills, time.monotonic() - began))


if __name__ == "__main__":
    main()
