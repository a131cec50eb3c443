"""kill -9 at every named step and at random moments, many times: no acknowledged write is lost, and nothing leaks."""

import random
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.crash.disk import KilledDisk
from tests.crash.servers import ExecutedServers, ForkedServers, Starter, build_engine
from tests.crash.steps import STEPS, Phase, Step
from zramd import native
from zramd.native import Engine, choose

RANDOM_KILLS = 45
KILLS_AS_BY_A_USER = 10
KILLS_AT_A_STEP = 3
NATIVE = Path(native.__file__).parent


@pytest.fixture(scope="session")
def with_steps(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Starter]:
    """Return what starts servers that have the named steps."""
    engine = choose()
    files = [str(build_engine(tmp_path_factory.mktemp("engine")))] if engine is Engine.NATIVE else []
    starter = ForkedServers(engine, "steps", *files)
    yield starter
    starter.close()


@pytest.fixture
def directory() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(dir="/dev/shm") as name:
        yield Path(name)


@pytest.mark.parametrize("step", STEPS, ids=lambda step: step.name)
def test_a_kill_at_a_step_loses_nothing(step: Step, directory: Path, with_steps: Starter) -> None:
    generator = random.Random(step.name)
    if step.phase in (Phase.MAKING, Phase.GROWING):
        for number in range(KILLS_AT_A_STEP):
            (directory / str(number)).mkdir()
            disk = KilledDisk(directory / str(number), number)
            disk.live_to(with_steps, step, generator.randint(1, step.most))
            assert disk.verify() is (step.phase is Phase.GROWING)
    else:
        disk = KilledDisk(directory, 0)
        for _ in range(1 if step.phase is Phase.RESTORING else KILLS_AT_A_STEP):
            if step.phase in (Phase.OPENING, Phase.RESTORING):
                disk.live_until(with_steps, generator.uniform(0, 0.05), requests=200)
            disk.live_to(with_steps, step, generator.randint(1, step.most))
            assert disk.verify() or step.phase in (Phase.RESETTING, Phase.RESTORING)
    disk.verify_that_nothing_leaks()


@pytest.mark.parametrize("kills", [RANDOM_KILLS, KILLS_AS_BY_A_USER], ids=["forked", "executed"])
def test_kills_at_random_moments_lose_nothing(kills: int, directory: Path) -> None:
    starter = ForkedServers(choose()) if kills == RANDOM_KILLS else ExecutedServers()
    generator = random.Random(kills)
    disk = KilledDisk(directory, kills, busy=kills == RANDOM_KILLS)
    for number in range(kills):
        # Every third answers requests first, however slow the machine is.
        requests = 300 * (number % 3 == 0)
        disk.live_until(starter, generator.uniform(0, 0.15 if kills == RANDOM_KILLS else 1), requests)
        disk.verify()
    disk.verify_that_nothing_leaks()
    starter.close()
    assert disk.answered >= 100 * kills
    assert disk.compacted > 0


def test_the_compiled_engine_has_the_steps_that_it_is_said_to_have() -> None:
    found = [name for path in NATIVE.glob("*.pxi") for name in re.findall(r'\bstep\("(.+)"\)', path.read_text())]
    assert sorted(found) == sorted(step.name for step in STEPS if step.compiled)


def test_what_is_installed_has_no_trace_of_the_steps() -> None:
    engine = pytest.importorskip(
        "zramd.native.engine", reason="no compiled engine: install gcc, liblz4-dev, libzstd-dev, and zramd again"
    )
    code = Path(engine.__file__).read_bytes()
    traces = [b"ZRAMD_STEP", b"zramd_step", b"killed at", *(step.name.encode() for step in STEPS if step.compiled)]
    assert [trace for trace in traces if trace in code] == []
