"""Starts servers in milliseconds: a process that has loaded all of zramd, and forks one for each line of its input.

Run as a module, with `steps` to have the named steps, and then perhaps with the file of a compiled engine that has them
too. A line is JSON: {"arguments": [...], "errors": PATH, "step": NAME, "passing": NUMBER} starts a server, and
is answered with its process id; {"wait": PID} is answered with its exit status.
"""

import importlib.util
import json
import os
import sys
import traceback
from importlib.machinery import ExtensionFileLoader
from typing import Any, NoReturn

import zramd.cli
import zramd.cli.serve  # loaded here, so that no server has to
import zramd.native
import zramd.zsmalloc.arena
from tests.crash import injection
from tests.crash.steps import STEPS, Phase, Step
from zramd.device.disk import Disk

SMALL_GROWTH, SMALL_RESERVE = 8, 16
"""Pages of an arena, in place of those of zramd: it then grows and shrinks all the time."""


def main() -> None:
    if sys.argv[1:]:
        if sys.argv[2:]:
            _load_engine(sys.argv[2])
        injection.insert(STEPS)
    zramd.zsmalloc.arena.GROW_PAGES, zramd.zsmalloc.arena.RESERVE_PAGES = SMALL_GROWTH, SMALL_RESERVE
    for line in sys.stdin:
        request = json.loads(line)
        if "wait" in request:
            answer = os.waitstatus_to_exitcode(os.waitpid(request["wait"], 0)[1])
        else:
            answer = os.fork()
            if not answer:
                _serve(request)
        print(answer, flush=True)


def _load_engine(path: str) -> None:
    """Load an extension in place of the compiled engine."""
    name = "zramd.native.engine"
    spec = importlib.util.spec_from_file_location(name, path, loader=ExtensionFileLoader(name, path))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    sys.modules[name] = module


def _serve(request: dict[str, Any]) -> NoReturn:
    for number, path in ((1, os.devnull), (2, request["errors"])):
        fd = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CLOEXEC)
        os.dup2(fd, number)
    status = 1
    try:
        if request["step"]:
            _arm(next(step for step in STEPS if step.name == request["step"]), request["passing"])
        zramd.cli.main(request["arguments"])
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else 1
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def _arm(step: Step, passing: int) -> None:
    """Kill this process at a passing of a step, but not before the phase that the step is of.

    What passes steps before the regions are opened is a trial of the engine.
    """
    begins = {Phase.ENLARGING: "grow", Phase.RESETTING: "reset", Phase.RESTORING: "restore"}.get(step.phase, "open")
    begin = getattr(Disk, begins)

    def armed(*arguments: Any, **named: Any) -> object:
        injection.kill_at(step, passing)
        return begin(*arguments, **named)

    setattr(Disk, begins, armed)


if __name__ == "__main__":
    main()
