"""What the console commands share: where results go, and what errors say."""

from __future__ import annotations

import json
import signal
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from esync import cli, config, transport
from esync.config import RunConfig, task
from esync.errors import ConfigError
from esync.keys import cli as keys_cli
from esync.report import cli as report_cli
from esync.run import cli as run_cli
from esync.run import launcher
from esync.run_dir import results_directory
from esync.sim import cli as sim_cli
from esync.status import cli as status_cli
from esync.version import VERSION
from esync.worker import cli as worker_cli


def run(command: Any, *arguments: str, name: str = "python -m esync.some.cli") -> Result:
    return CliRunner().invoke(command, list(arguments), prog_name=name)


def made(runs: Path, name: str | None = "it", force: bool = False) -> Path:
    return results_directory("c.toml", name, str(runs), "sync", force)


def leave(directory: Path, rounds: int | None = None, log: bool = True) -> None:
    """What a run leaves in its directory; `rounds`: its summary says so."""
    (directory / "cluster.toml").write_text("[run]\n")
    if log:
        (directory / "state.jsonl").write_text("")
    if rounds is not None:
        (directory / "summary.json").write_text(json.dumps({"rounds": rounds}))


def test_a_run_that_has_results_is_not_replaced(tmp_path: Path) -> None:
    leave(made(tmp_path), rounds=3)
    with pytest.raises(ConfigError, match="has results already"):
        made(tmp_path)
    assert made(tmp_path, force=True) == tmp_path / "it"
    assert not (tmp_path / "it" / "summary.json").exists()


def test_a_run_that_may_be_going_on_has_results(tmp_path: Path) -> None:
    leave(made(tmp_path))
    with pytest.raises(ConfigError, match="has results already"):
        made(tmp_path)


def test_a_run_of_which_nothing_came_does_not_keep_its_name(tmp_path: Path) -> None:
    for name in ("it", None):
        first = made(tmp_path, name)
        leave(first, rounds=0)
        assert made(tmp_path, name) == first
        assert [path.name for path in first.iterdir()] == ["cluster.toml"]


@pytest.mark.parametrize("force", [False, True])
def test_the_logs_of_a_run_that_did_not_start_are_replaced(force: bool, tmp_path: Path) -> None:
    directory = tmp_path / "it"
    directory.mkdir()
    for name in ("state.log", "lock", "endpoint"):
        (directory / name).write_text("x")
    assert made(tmp_path, force=force) == directory
    assert [path.name for path in directory.iterdir()] == ["cluster.toml"]


def test_a_run_that_begins_has_its_name(tmp_path: Path) -> None:
    """From the first moment on: of two that begin at once each has its own."""
    first = made(tmp_path, None)
    assert made(tmp_path, None) == tmp_path / "c-sync-2"
    with pytest.raises(ConfigError, match="has results already"):
        made(tmp_path, first.name)
    with ThreadPoolExecutor(8) as pool:
        several = list(pool.map(lambda _: made(tmp_path, None), range(8)))
    assert len(set(several)) == 8


def test_what_else_lies_in_a_run_of_which_nothing_came_is_not_touched(tmp_path: Path) -> None:
    directory = made(tmp_path)
    leave(directory, rounds=0)
    (directory / "train.py").write_text("work")
    with pytest.raises(ConfigError, match="has results already"):
        made(tmp_path)
    (directory / "summary.json").unlink()
    with pytest.raises(ConfigError, match="has results already"):
        made(tmp_path)
    assert (directory / "train.py").exists()


def test_a_directory_that_is_no_run_is_not_touched(tmp_path: Path) -> None:
    directory = tmp_path / "it"
    directory.mkdir()
    (directory / "thesis.tex").write_text("years of work")
    with pytest.raises(ConfigError, match="has results already"):
        made(tmp_path)
    with pytest.raises(ConfigError, match="does not look like a run"):
        made(tmp_path, force=True)
    assert (directory / "thesis.tex").exists()


@pytest.mark.parametrize("command", [run_cli, sim_cli, report_cli, status_cli, keys_cli])
def test_every_command_says_its_version(command: Any) -> None:
    assert run(command.main, "--version").output == f"esync, version {VERSION}\n"


def test_an_error_begins_with_the_command_that_a_user_types(tmp_path: Path) -> None:
    missing = run(report_cli.main, str(tmp_path / "no"), name="python -m esync.report.cli")
    assert missing.output.startswith("esync-report: error: ")
    known = ["revoke", "gpu", "--keys", str(tmp_path / "keys")]
    assert run(keys_cli.main, "init", str(tmp_path / "keys")).exit_code == 0
    unknown = run(keys_cli.main, *known, name="esync-keys")
    assert unknown.output.startswith("esync-keys revoke: error: ")
    assert "Known: none." in unknown.output


def test_a_dry_run_refuses_what_the_run_would(tmp_path: Path) -> None:
    file = tmp_path / "c.toml"
    file.write_text('[state]\nbind = "tcp://0.0.0.0:10010"\n[[workers]]\ncount = 2\n')
    found = run(run_cli.main, str(file), "--runs", str(tmp_path / "runs"), "--dry-run")
    assert found.exit_code == 1
    assert "nothing on it is encrypted" in found.output


def test_a_signal_is_heard_again_after_a_second(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also if others came meanwhile, and the first interrupt was caught by somebody."""
    handlers: dict[int, Any] = {}
    monkeypatch.setattr(cli.signal, "signal", lambda number, what: handlers.update({number: what}))
    monkeypatch.setattr(sys, "unraisablehook", sys.unraisablehook)
    now = 100.0
    monkeypatch.setattr(cli.time, "monotonic", lambda: now)
    cli.interrupt_on_sigterm()
    heard = []
    for now in (100.0, 100.1, 100.8, 101.1, 101.2, 102.3):
        try:
            handlers[signal.SIGTERM](signal.SIGTERM, None)
        except KeyboardInterrupt:
            heard.append(now)
    assert heard == [100.0, 101.1, 102.3]


def test_a_run_is_not_gone_on_with_under_another_name(tmp_path: Path) -> None:
    file = tmp_path / "cluster.toml"
    file.write_text("[[workers]]\ncount = 2\n")
    for more in (["--name", "other"], ["--force"]):
        found = run(run_cli.main, str(file), "--resume", *more)
        assert found.exit_code == 1
        assert "leave out --name and --force" in found.output


def test_the_state_of_a_run_that_has_ended_is_that_it_has_ended(tmp_path: Path) -> None:
    (tmp_path / "endpoint").write_text("tcp://127.0.0.1:9\n")
    asked = str(tmp_path), "--wait", "0.1"
    assert "no state server answered" in run(status_cli.main, *asked).output
    summary = {"ended": "30 seconds", "time_to": {}}
    (tmp_path / "summary.json").write_text(json.dumps(summary))
    assert f"the run in {tmp_path} has ended: 30 seconds." in run(status_cli.main, *asked).output


def test_a_name_that_cannot_be_resolved_is_said_to_be_so() -> None:
    there, nowhere = "tcp://localhost:9", "tcp://nosuchhost.invalid:9"
    assert transport.waiting_for_state(there) == f"waiting for the state server at {there}"
    for text in (transport.waiting_for_state(nowhere), transport.no_state_server(nowhere, 1.0)):
        assert "its name cannot be resolved" in text
    assert "its name" not in transport.no_state_server("ipc:///tmp/x", 1.0)


def test_what_is_trained_is_said_in_words() -> None:
    run = RunConfig(model="cnn", dataset="digits")
    assert task(run.model, run.dataset) == "cnn on digits"
    assert task("own", "digits") == "own loop"


@pytest.mark.parametrize(
    ("workers", "device", "variable"),
    [
        ([{}], "cpu", "JAX_PLATFORMS"),
        (
            [{"count": 3}, {"name": "b", "device": "gpu:1"}],
            "gpu:1",
            "XLA_PYTHON_CLIENT_PREALLOCATE",
        ),
        ([{"host": "other", "device": "gpu"}], "cpu", "JAX_PLATFORMS"),
    ],
    ids=str,
)
def test_what_a_gpu_trains_is_evaluated_on_it(tmp_path, workers, device, variable):
    roles = launcher.roles_of(config.cluster({"workers": workers}), tmp_path, "tcp://127.0.0.1:1")
    evaluator = roles[-1]
    assert evaluator.name == "evaluator"
    assert evaluator.command[evaluator.command.index("--device") + 1] == device
    assert variable in evaluator.environment


def test_an_evaluator_is_where_it_is_told_to_be(tmp_path):
    """Or nowhere: it says so before it joins."""
    result = CliRunner().invoke(
        worker_cli.main, ["--connect", "tcp://127.0.0.1:1", "--evaluate", "--device", "gpu:7"]
    )
    assert result.exit_code == 1
    assert "device 'gpu:7': " in result.output
