"""`esync-sim`: what it refuses, what it leaves behind, and Ctrl-C."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import tomli_w
from click.testing import CliRunner
from safetensors import safe_open

from esync import config
from esync.errors import EsyncError
from esync.sim import cli
from tests.test_processes import ENVIRONMENT, ROOT
from tests.virtual import compiled_once

RUN = {"model": "mlp", "dataset": "digits", "lr": 0.1, "batch_size": 16}
WORKERS = [
    {"name": "fast", "count": 2, "step_time_s": 0.02},
    {"name": "slow", "step_time_s": 0.2},
]


@pytest.fixture(scope="module", autouse=True)
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Any:
    with compiled_once(tmp_path_factory.getbasetemp() / "compiled"):
        yield


ERRORS: dict[str, tuple[dict[str, Any], list[dict[str, Any]], str]] = {
    "no step time": (
        {"rounds": 3},
        [{"name": "a", "step_time_s": 0.1}, {"name": "b"}],
        r"\[\[workers\]\] b: the virtual cluster needs its step_time_s",
    ),
    "no end": (
        {},
        WORKERS,
        r"say when to stop: --rounds, --duration \(virtual seconds\) or --target",
    ),
    "a loop of one's own": (
        {"model": "own", "rounds": 3},
        WORKERS,
        r'not a loop of your own \("own"\)',
    ),
    "leaves before it joins": (
        {"rounds": 3},
        [*WORKERS, {"name": "c", "step_time_s": 0.1, "join_s": 5.0, "leave_s": 4.0}],
        r"c: leave_s \(4\) comes after join_s \(5\)",
    ),
    "more workers than there are": (
        {"rounds": 3, "workers": 4},
        [*WORKERS, {"name": "c", "step_time_s": 0.1, "join_s": 5.0}],
        r"the run starts with 4 workers, but only 3 are there from the beginning",
    ),
    "an unknown model": ({"rounds": 3, "model": "mpl"}, WORKERS, r"Did you mean 'mlp'\?"),
}


@pytest.mark.parametrize("name", ERRORS)
def test_what_cannot_run_is_refused_in_a_line_that_says_why(name: str, tmp_path: Path) -> None:
    run, workers, expected = ERRORS[name]
    file = _file(tmp_path, run={**RUN, **run}, workers=workers)
    result = CliRunner().invoke(cli.main, [str(file), "--runs", str(tmp_path / "runs")])
    assert result.exit_code == 1
    assert re.search(expected, result.output), result.output
    assert not (tmp_path / "runs").exists()


def test_batches_that_no_worker_has_are_refused_before_anything_is_trained(tmp_path: Path) -> None:
    cluster = config.cluster({"run": {**RUN, "rounds": 8, "batch_size": 5000}, "workers": WORKERS})
    with pytest.raises(EsyncError, match=r"a batch has 5000 samples, this worker's share only"):
        cli.simulate(cluster, tmp_path, say=lambda text: None)
    assert not (tmp_path / "summary.json").exists()


def test_a_run_leaves_its_file_its_events_its_summary_and_its_model_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cli, "PROGRESS_S", 0.0)
    said: list[str] = []
    cluster = config.cluster({"run": {**RUN, "rounds": 8}, "workers": WORKERS})
    summary = cli.simulate(cluster, tmp_path, say=said.append)
    assert said[0] == "virtual cluster of 3 workers: esync, mlp"
    assert any(
        re.fullmatch(r"\d+ virtual s in \d+ s: round \d of 8(, accuracy 0\.\d+)?", x) for x in said
    )
    assert re.fullmatch(r"\d+ virtual seconds in \d+ s", said[-1])
    assert json.loads((tmp_path / "summary.json").read_text()) == summary
    assert summary["virtual"] is True
    assert summary["ended"] == "8 rounds"
    assert summary["final_accuracy"] > 0.5
    assert (tmp_path / "model.safetensors").stat().st_size > 4 * 17_000
    assert config.cluster(config.read(tmp_path / "cluster.toml")) == cluster
    events = [json.loads(line) for line in (tmp_path / "events.jsonl").read_text().splitlines()]
    assert {row["role"] for row in events} == {"state", "ps", "fast-0", "fast-1", "slow"}
    rounds = [row for row in events if row["role"] == "slow" and row["event"] == "round"]
    assert {"steps", "samples", "compute_s", "query_s", "sync_s", "loss", "late"} <= set(rounds[0])
    assert [row["round"] for row in rounds] == list(range(len(rounds)))
    assert all(a["t"] <= b["t"] for a, b in pairwise(events))


def test_a_training_that_diverges_ends_with_an_error_and_what_there_was(tmp_path: Path) -> None:
    cluster = config.cluster({"run": {**RUN, "rounds": 50, "lr": 1e5}, "workers": WORKERS})
    with pytest.raises(EsyncError, match="the training diverged"):
        cli.simulate(cluster, tmp_path, say=lambda text: None)
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert "the training diverged" in summary["ended"]
    assert (tmp_path / "model.safetensors").exists()


def test_ctrl_c_ends_with_what_was_learnt_so_far(tmp_path: Path) -> None:
    file = _file(tmp_path, run={**RUN, "duration_s": 1e6}, workers=WORKERS)
    run = tmp_path / "runs" / "it"
    command = [sys.executable, "-m", "esync.sim.cli", str(file)]
    command += ["--runs", str(tmp_path / "runs"), "--name", "it"]
    with open(tmp_path / "out", "wb") as out:
        process = subprocess.Popen(
            command, stdout=out, stderr=subprocess.STDOUT, env=ENVIRONMENT, cwd=ROOT
        )
    try:
        deadline = time.monotonic() + 60
        while _rounds(run / "events.jsonl") < 20:
            assert time.monotonic() < deadline, (tmp_path / "out").read_text()
            assert process.poll() is None, (tmp_path / "out").read_text()
            time.sleep(0.1)
        process.send_signal(signal.SIGINT)
        assert process.wait(30) == 130
    finally:
        process.kill()
        process.wait()
    said = (tmp_path / "out").read_text()
    assert "interrupted: summing up" in said
    assert re.search(r"final accuracy .* 0\.\d+", said)
    assert "Traceback" not in said
    summary = json.loads((run / "summary.json").read_text())
    assert summary["ended"] == "interrupted"
    assert summary["rounds"] >= 20
    with safe_open(run / "model.safetensors", "numpy") as model:
        last = json.loads(model.metadata()["esync"])["version"]
    assert summary["accuracy"][-1]["round"] == last, "what was saved was evaluated"
    assert [row["round"] for row in summary["accuracy"]].count(last) == 1
    assert sum(row["steps"] for row in summary["workers"]) > 60


def _file(directory: Path, **tables: Any) -> Path:
    path = directory / "cluster.toml"
    path.write_text(tomli_w.dumps(tables), encoding="utf-8")
    return path


def _rounds(path: Path) -> int:
    text = path.read_text() if path.exists() else ""
    return text.count('"role": "ps", "event": "round"')
