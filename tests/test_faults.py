"""Short versions of what `benchmarks/faults.py` does to a run of real processes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.append(str(Path(__file__).parent.parent / "benchmarks"))

import faults


def without_namespaces() -> str:
    """What is missing to make network namespaces; empty if nothing is."""
    try:
        faults.Network().close()
    except FileNotFoundError:
        return "there is no `ip`: apt-get install iproute2"
    except subprocess.CalledProcessError as error:
        return f"this process may not: run it as root ({error.stderr.decode().strip()})"
    return ""


def hurt(name: str, workers: int, times: int, seconds: float) -> dict[str, Any]:
    """What came of a run with a fault; the model has to be what the logs say is in it."""
    rate, counts = faults.run_with(name, workers, times, seconds, 1)
    assert abs(counts["missing"]) < 1e-3 * counts["rounds"], "no update was lost or counted twice"
    assert rate > 0
    assert counts["recover_s"]
    return counts


def test_workers_that_are_killed_are_soon_not_waited_for() -> None:
    assert max(hurt("worker", 3, 1, 5.0)["recover_s"]) < 8.0, "before a heartbeat has been missing"


@pytest.mark.parametrize("role", ["ps", "state"])
def test_servers_that_are_killed_are_gone_on_from(role: str) -> None:
    counts = hurt(role, 3, 1, 6.0)
    assert role == "ps" or counts["redone"] == 0


def test_a_worker_that_is_stopped_holds_nobody_up_for_long_and_comes_back() -> None:
    hurt("stop", 3, 1, 14.0)


def test_garbage_changes_nothing() -> None:
    hurt("garbage", 3, 1, 3.0)


@pytest.mark.parametrize(("name", "seconds"), [("cut", 18.0), ("way", 10.0)])
def test_workers_whose_network_is_gone_for_a_while_or_bad_stay_in(
    name: str, seconds: float
) -> None:
    if why := without_namespaces():
        pytest.skip(f"no network namespaces: {why}")
    hurt(name, 3, 1, seconds)
