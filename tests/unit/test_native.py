"""Which engine runs the hot path."""

import pytest

from zramd import native
from zramd.native import Engine, EngineError, choose, describe


@pytest.fixture
def not_built(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> None:
        raise ImportError("No module named 'zramd.native.engine'")

    monkeypatch.setattr(native, "_load", fail)


@pytest.mark.usefixtures("not_built")
def test_without_the_compiled_engine_the_python_one_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(native.VARIABLE, raising=False)
    assert choose() is Engine.PYTHON
    assert describe() == "python, since the compiled one cannot be loaded: No module named 'zramd.native.engine'"


@pytest.mark.usefixtures("not_built")
def test_asking_for_what_was_not_built_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(native.VARIABLE, "native")
    with pytest.raises(EngineError, match="install gcc, liblz4-dev, libzstd-dev"):
        choose()


def test_the_variable_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(native.VARIABLE, "python")
    assert choose() is Engine.PYTHON
    monkeypatch.setenv(native.VARIABLE, "turbo")
    with pytest.raises(EngineError, match="ZRAMD_ENGINE=turbo is not an engine: choose python or native"):
        choose()
