"""A real run and its virtual twin agree."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

import pytest

from esync import config
from esync.sim.cli import simulate
from tests.test_processes import command

CLUSTER = """
[run]
model = "cnn"
dataset = "digits"
batch_size = 16
lr = 0.1
duration_s = 7
evaluate_every_s = 0
[state]
bind = "tcp://127.0.0.1:*"
[[workers]]
name = "fast"
step_time_s = 0.055
[[workers]]
name = "medium"
step_time_s = 0.4
[[workers]]
name = "slow"
step_time_s = 0.6
"""
SETTLED = 3
"""From this round on everybody has been measured a few times."""
ATTEMPTS = 3


@pytest.mark.processes
@pytest.mark.timeout(180)
def test_a_real_run_and_the_virtual_one_have_the_same_rounds_and_shares_of_computing(
    tmp_path: Path,
) -> None:
    """Rounds a minute, each worker's share of time computing, and the fast worker's steps.

    Step times are emulated by sleeping, so they hold on a busy machine too. What a synchronisation takes on this
    machine is not for the virtual cluster to know: it is measured at the slowest worker, which waits for nobody, and
    half of it becomes the latency of the virtual network. Of the settled rounds the median counts, so that one
    in which the machine had something else to do does not; and if the whole run was disturbed, that is no likeness of
    the virtual one in another run.
    """
    file = tmp_path / "cluster.toml"
    file.write_text(CLUSTER)
    seen = []
    for attempt in range(ATTEMPTS):
        name = f"real-{attempt}"
        arguments = [str(file), "--runs", str(tmp_path), "--name", name]
        status, output = command("esync.run.cli", *arguments, timeout_s=150)
        assert status == 0, output
        real = settled(tmp_path / name)

        tables = config.read(file)
        tables["network"] = {"latency_s": real.synchronisation_s / 2}
        directory = tmp_path / f"virtual-{attempt}"
        directory.mkdir()
        simulate(config.cluster(tables), directory, say=lambda text: None)
        virtual = settled(directory)
        assert virtual.shares["medium"] < 0.8, "it has to wait: that makes the comparison one"
        seen.append(f"{real}\n{virtual}")
        if agree(real, virtual):
            return
    pytest.fail("they do not agree:\n" + "\n".join(seen))


def agree(real: settled, virtual: settled) -> bool:
    return (
        real.synchronisation_s < 0.3
        and virtual.rounds_a_minute == pytest.approx(real.rounds_a_minute, rel=0.05)
        and virtual.shares == pytest.approx(real.shares, rel=0.05)
        and virtual.steps == pytest.approx(real.steps, rel=0.1)
    )


class settled:
    """Medians over the settled rounds of a run's logs."""

    def __init__(self, directory: Path) -> None:
        rows = [
            json.loads(line)
            for path in directory.glob("*.jsonl")
            for line in path.read_text().splitlines()
        ]
        rounds = [r for r in rows if r["event"] == "round" and r["round"] >= SETTLED]
        ends = sorted(row["t"] for row in rounds if row["role"] == "ps")
        self.rounds = len(ends)
        self.rounds_a_minute = 60 / median(b - a for a, b in pairwise(ends))
        self.shares, self.steps = {}, {}
        for name in ("fast", "medium", "slow"):
            own = [row for row in rounds if row["role"] == name]
            self.shares[name] = median(share(row) for row in own)
            self.steps[name] = median(row["steps"] for row in own)
            self.synchronisation_s = median(row["sync_s"] for row in own)

    def __repr__(self) -> str:
        shares = {name: round(x, 3) for name, x in self.shares.items()}
        return (
            f"{self.rounds} rounds, {self.rounds_a_minute:.2f} a minute, steps {self.steps}, "
            f"computing {shares}, synchronisation {self.synchronisation_s * 1000:.1f} ms"
        )


def share(row: dict[str, Any]) -> float:
    return row["compute_s"] / (row["compute_s"] + row["query_s"] + row["sync_s"])
