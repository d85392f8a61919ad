"""What all tests need of their surroundings."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

from tests.processes import Processes

# How long an example takes says how busy the machine is.
settings.register_profile("esync", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("esync")

# A shell that runs the tests in the background has them ignore Ctrl-C, and so would every process that they start.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture
def processes(tmp_path: Path) -> Iterator[Processes]:
    """Starts console commands; whatever still runs at the end of the test is killed."""
    started = Processes(tmp_path)
    yield started
    started.kill_all()
