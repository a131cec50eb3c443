"""Puts the named steps into the modules of zramd that this process has loaded; their source has no trace of them."""

import ast
import importlib
import inspect
import os
import signal
from collections.abc import Iterable, Iterator
from types import CodeType, FunctionType, ModuleType

from tests.crash.steps import Step

VARIABLE = "ZRAMD_STEP"
"""NAME:NUMBER, at which passing of which step the process is to be killed."""
_HOOK = "_zramd_step"
_passed = 0


def kill_at(step: Step, passing: int) -> None:
    """Kill this process at a passing of a step, counted from now on; in the compiled engine too."""
    os.environ[VARIABLE] = f"{step.name}:{passing}"


def _pass(name: str) -> None:
    global _passed
    wanted, _, number = os.environ.get(VARIABLE, "").partition(":")
    if wanted == name:
        _passed += 1
        if _passed == int(number):
            os.write(2, f"killed at {name}\n".encode())
            os.kill(os.getpid(), signal.SIGKILL)


def insert(steps: Iterable[Step]) -> None:
    """Insert all of them.

    Raises:
        LookupError: there is no such statement, or there are several.
    """
    functions: dict[str, list[Step]] = {}
    for step in steps:
        functions.setdefault(step.function, []).append(step)
    for where, inside in functions.items():
        module_name, _, name = where.partition(":")
        module = importlib.import_module(module_name)
        _insert_into(module, name, inside)


def _insert_into(module: ModuleType, name: str, steps: list[Step]) -> None:
    tree = ast.parse(inspect.getsource(module))
    body = _function(tree, name).body
    for step in steps:
        places = [
            (block, number)
            for block, number in _statements(body)
            if ast.unparse(block[number]).startswith(step.statement)
        ]
        if len(places) != 1:
            raise LookupError(f"{step.name}: {len(places)} statements of {step.function} begin with {step.statement!r}")
        ((block, number),) = places
        call = ast.Expr(ast.Call(ast.Name(_HOOK, ast.Load()), [ast.Constant(step.name)], []))
        block.insert(number + 1, ast.copy_location(call, block[number]))
    setattr(module, _HOOK, _pass)
    code = compile(ast.fix_missing_locations(tree), str(module.__file__), "exec")
    function: object = module
    for part in name.split("."):
        function = getattr(function, part)
    assert isinstance(function, FunctionType)
    function.__code__ = next(found for found in _codes(code) if found.co_qualname == name)


def _function(tree: ast.Module, name: str) -> ast.FunctionDef:
    scope: list[ast.stmt] = tree.body
    for part in name.split("."):
        (found,) = (node for node in scope if isinstance(node, ast.ClassDef | ast.FunctionDef) and node.name == part)
        scope = found.body
    assert isinstance(found, ast.FunctionDef)
    return found


def _statements(body: list[ast.stmt]) -> Iterator[tuple[list[ast.stmt], int]]:
    """Yield the list and the index of each statement, and of those inside it."""
    for number, statement in enumerate(body):
        yield body, number
        for field in ("body", "orelse", "finalbody"):
            yield from _statements(getattr(statement, field, []))
        for handler in getattr(statement, "handlers", []):
            yield from _statements(handler.body)


def _codes(code: CodeType) -> Iterator[CodeType]:
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield constant
            yield from _codes(constant)
