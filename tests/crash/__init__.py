"""kill -9 at every moment that can be named, and at others. Steps: steps.py. What must hold: disk.py."""

import pytest

pytest.register_assert_rewrite("tests.crash.client", "tests.crash.disk")
