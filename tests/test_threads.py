"""How many threads a worker computes with: those that XLA has made, by their names."""

from __future__ import annotations

import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from esync import config
from esync.run import launcher
from tests.processes import QUICK

TASKS = Path("/proc/self/task")
pytestmark = pytest.mark.skipif(not TASKS.is_dir(), reason="needs Linux: threads are read in /proc")
CORES = len(os.sched_getaffinity(0)) if TASKS.is_dir() else 0  # only Linux tells
COUNT = """
import jax.numpy as jnp
from collections import Counter
from pathlib import Path
x = jnp.ones((200, 200))
(x @ x).block_until_ready()
names = Counter((task / "comm").read_text().strip() for task in Path("/proc/self/task").iterdir())
print(names["tf_XLAEigen"])
"""


@pytest.mark.parametrize(
    ("worker", "threads"),
    [({}, 1), ({"threads": 3}, 3), ({"command": "own"}, 1), ({"host": "other"}, CORES)],
    ids=str,
)
def test_workers_that_share_a_machine_compute_with_as_many_threads_as_they_were_given(
    tmp_path, worker, threads
):
    cluster = config.cluster({"workers": [{"name": "w", **worker}]})
    roles = launcher.roles_of(cluster, tmp_path, "tcp://127.0.0.1:1")
    (role,) = (role for role in roles if role.name == "w")
    assert "NPROC" not in roles[-1].environment, "the evaluator takes what is left"
    environment = {k: v for k, v in os.environ.items() if k not in ("NPROC", "OMP_NUM_THREADS")}
    counted = subprocess.run(
        [sys.executable, "-c", COUNT],
        env={**environment, **role.environment},
        capture_output=True,
        check=True,
        timeout=60,
    )
    assert int(counted.stdout) == threads


def test_a_worker_by_hand_computes_with_as_many_threads_as_it_is_told(processes, tmp_path):
    state = ["--bind", "tcp://127.0.0.1:*", "--workers", "1", "--rounds", "1000", *QUICK]
    processes.start("state", "esync.state.cli", *state, "--run-dir", str(tmp_path))
    endpoint = processes.wait_for("state", r"tcp://127\.0\.0\.1:\d+").group()
    joins = ["--connect", endpoint]
    processes.start("ps", "esync.ps.cli", *joins)
    worker = processes.start("w", "esync.worker.cli", *joins, "--threads", "3")
    processes.wait_for("w", "training from version")
    tasks = Path(f"/proc/{worker.pid}/task").iterdir()
    names = Counter((task / "comm").read_text().strip() for task in tasks)
    assert names["tf_XLAEigen"] == 3
