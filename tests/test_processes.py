"""Real processes: the console commands, kill -9, Ctrl-C, and the errors that users meet."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from esync import keys
from tests.processes import ENVIRONMENT, QUICK, ROOT, Processes


def command(module: str, *arguments: str, timeout_s: float = 60.0) -> tuple[int, str]:
    """Run a console command to its end; returns its exit status and everything that it printed."""
    done = subprocess.run(
        [sys.executable, "-m", module, *arguments],
        capture_output=True,
        text=True,
        env=ENVIRONMENT,
        cwd=ROOT,
        timeout=timeout_s,
        check=False,
    )
    return done.returncode, done.stdout + done.stderr


def test_killed_workers_are_missed_and_the_run_goes_on_and_takes_new_ones(
    processes: Processes, tmp_path: Path
) -> None:
    """Kill -9 of a fast worker, then of the slowest; the others end the run; a new one takes part."""
    run = tmp_path / "run"
    processes.start(
        "state",
        "esync.state.cli",
        *["--bind", "tcp://127.0.0.1:*", "--workers", "3", "--run-dir", str(run)],
        *["--heartbeat", "2", "--evaluate-every", "0.5", *QUICK],
    )
    endpoint = processes.wait_for("state", r"state server at (tcp://\S+):").group(1)
    join = ["--connect", endpoint, "--run-dir", str(run)]
    processes.start("ps", "esync.ps.cli", *join)
    workers = {
        name: processes.start(
            name, "esync.worker.cli", *join, "--name", name, "--step-time", seconds
        )
        for name, seconds in (("fast-0", "0.02"), ("fast-1", "0.02"), ("slow", "0.4"))
    }
    rounds = run / "state.jsonl"

    def version() -> int:
        lines = [json.loads(line) for line in rounds.read_text().splitlines()]
        return max((line["round"] for line in lines if line["event"] == "round"), default=0)

    def more_rounds(count: int) -> None:
        goal = version() + count
        processes.until(lambda: version() >= goal, f"round {goal}", 30)

    processes.wait_for("state", "the run starts with 3 workers")
    more_rounds(3)
    workers["fast-0"].kill()
    processes.wait_for("state", r"fast-0 left: evicted", 15)
    more_rounds(3)
    workers["slow"].kill()
    processes.wait_for("state", r"slow left: evicted", 15)
    more_rounds(3)
    back = processes.start(
        "back", "esync.worker.cli", *join, "--name", "slow", "--step-time", "0.1"
    )
    processes.until(
        lambda: (run / "slow.jsonl").read_text().count('"event": "round"') > 8,
        "rounds of the worker that came back",
    )
    processes.started[0].send_signal(signal.SIGTERM)
    for process in processes.started:
        process.wait(30)
    assert workers["fast-1"].returncode == back.returncode == 0
    summary = json.loads((run / "summary.json").read_text())
    assert summary["ended"] == "interrupted"
    passages = {(row["name"], row["left_why"][:7]) for row in summary["workers"]}
    assert passages == {
        ("fast-0", "evicted"),
        ("fast-1", "done"),
        ("slow", "evicted"),
        ("slow", "done"),
    }
    ranks = {row["rank"] for row in summary["workers"] if row["name"] == "slow"}
    assert len(ranks) == 1, "a worker that comes back keeps its rank"


def test_esync_run_trains_and_leaves_everything_behind(tmp_path: Path) -> None:
    """Two workers of unequal speed on the handwritten digits, started by one command."""
    status, output = command(
        "esync.run.cli",
        str(_cluster(tmp_path)),
        *["--runs", str(tmp_path / "runs"), "--name", "it", "--rounds", "12"],
        *["--evaluate-every", "0.5"],
        timeout_s=110,
    )
    assert status == 0, output
    assert "final accuracy" in output
    run = tmp_path / "runs" / "it"
    summary = json.loads((run / "summary.json").read_text())
    assert summary["rounds"] == 12
    assert summary["dataset"] == "digits"
    assert len(summary["split_digest"]) == 16
    assert summary["final_accuracy"] > 0.5
    assert summary["bytes_up"] > 0
    assert summary["bytes_down"] > 0
    assert set(summary["time_to"]) == {"0.7", "0.8", "0.85", "0.9"}
    steps = {row["name"]: row["steps"] for row in summary["workers"]}
    assert steps["fast"] > 3 * steps["slow"]
    for name in ("state", "ps", "fast", "slow", "evaluator"):
        lines = (run / f"{name}.jsonl").read_text().splitlines()
        assert all({"t", "role", "event"} <= json.loads(line).keys() for line in lines)
        assert lines, name
    assert (run / "model.safetensors").exists()
    status, output = command("esync.report.cli", str(run), str(run))
    assert status == 0, output
    assert "speed-up" in output


def test_a_dead_role_is_named_with_its_reason_and_ends_the_run(tmp_path: Path) -> None:
    cluster = tmp_path / "cluster.toml"
    cluster.write_text(
        """
[run]
dataset = "digits"
model = "own"
[state]
bind = "tcp://127.0.0.1:*"
[[workers]]
name = "unlucky"
command = "sh -c 'echo the reason; exit 3'"
[[workers]]
name = "patient"
command = "sleep 60"
"""
    )
    began = time.monotonic()
    status, output = command(
        "esync.run.cli", str(cluster), "--runs", str(tmp_path / "runs"), "--name", "it"
    )
    assert status == 1
    assert re.search(r"unlucky died: exit status 3\s+the reason", output)
    assert time.monotonic() - began < 40
    assert not _living(str(tmp_path)), "processes were left behind"


OWN_LOOPS = """
[run]
mode = "sync"
model = "own"
rounds = 1000
[state]
bind = "tcp://127.0.0.1:*"
[[workers]]
name = "first"
command = "{first}"
[[workers]]
name = "second"
command = "{second}"
"""
LOOP = """
import numpy as np
from esync import Worker

with Worker() as worker:
    params = worker.start({"w": np.zeros(5, np.float32)})
    for _ in range(20):
        params = worker.step(params)
"""


def _own_loops(directory: Path, first: str, second: str) -> Path:
    (directory / "loop.py").write_text(LOOP)
    loop = f"{sys.executable} {directory / 'loop.py'}"
    path = directory / "cluster.toml"
    path.write_text(OWN_LOOPS.format(first=first or loop, second=second or loop))
    return path


def test_keep_going_is_for_a_run_that_has_begun(tmp_path: Path) -> None:
    cluster = _own_loops(tmp_path, "sh -c 'sleep 3; exit 3'", "sleep 60")
    options = ["--runs", str(tmp_path / "runs"), "--name", "it", "--keep-going"]
    status, output = command("esync.run.cli", str(cluster), *options)
    assert status == 1
    assert "first died: exit status 3" in output
    assert "the run had not begun, which it does with all of its workers" in output
    assert not _living(str(tmp_path)), "processes were left behind"


def test_a_run_whose_workers_were_sent_into_the_background_goes_on(tmp_path: Path) -> None:
    (tmp_path / "loop.py").write_text(LOOP)
    loop = f"sh -c '{sys.executable} {tmp_path / 'loop.py'} > /dev/null 2>&1 &'"
    cluster = _own_loops(tmp_path, loop, loop)
    options = ["--runs", str(tmp_path / "runs"), "--name", "it"]
    status, output = command("esync.run.cli", str(cluster), *options)
    assert status == 0, output
    summary = json.loads(_text(tmp_path / "runs" / "it" / "summary.json"))
    assert [row["left_why"] for row in summary["workers"]] == ["done", "done"]
    assert summary["rounds"] > 3


LATE = """
with Worker() as worker:
    params = worker.start({"w": np.zeros(5, np.float32)})
    while not worker.stopped:
        params = worker.step(params)
time.sleep(float(sys.argv[3]))
open(sys.argv[1], "w").write("what the loop saves")
sys.exit(int(sys.argv[2]))
"""
IMPATIENT = """
from esync.run import launcher
launcher.STOP_S = 0.5
from esync.run.cli import main
main()
"""


@pytest.mark.parametrize("code", [0, 3])
def test_loops_of_people_s_own_may_take_their_time_after_the_run(code: int, tmp_path: Path) -> None:
    (tmp_path / "late.py").write_text(
        "import sys, time\nimport numpy as np\nfrom esync import Worker\n" + LATE
    )
    late = f"{sys.executable} {tmp_path / 'late.py'} {tmp_path}"
    cluster = _own_loops(tmp_path, f"{late}/first 0 4", f"{late}/second {code} 2")
    options = ["--runs", str(tmp_path / "runs"), "--name", "it", "--rounds", "20"]
    done = subprocess.run(
        [sys.executable, "-c", IMPATIENT, str(cluster), *options],
        capture_output=True,
        text=True,
        env=ENVIRONMENT,
        cwd=ROOT,
        timeout=60,
        check=False,
    )
    output = done.stdout + done.stderr
    assert "the run is over; waiting for first, second to end" in output
    assert (done.returncode, "second died: exit status 3" in output) == (min(code, 1), code == 3)
    for name in ("first", "second"):
        assert (tmp_path / name).read_text() == "what the loop saves"


def test_a_run_whose_workers_have_all_ended_does_too(tmp_path: Path) -> None:
    cluster = _own_loops(tmp_path, "", "")
    options = ["--runs", str(tmp_path / "runs"), "--name", "it"]
    status, output = command("esync.run.cli", str(cluster), *options)
    assert status == 0, output
    assert "every worker has ended: ending the run" in output
    summary = json.loads(_text(tmp_path / "runs" / "it" / "summary.json"))
    assert [row["left_why"] for row in summary["workers"]] == ["done", "done"]
    assert summary["rounds"] > 3
    assert (tmp_path / "runs" / "it" / "model.safetensors").exists()


def test_ctrl_c_ends_the_run_with_a_summary_and_leaves_no_process(tmp_path: Path) -> None:
    run = tmp_path / "runs" / "it"
    with open(tmp_path / "out", "wb") as out:
        process = subprocess.Popen(
            [
                *[sys.executable, "-m", "esync.run.cli", str(_cluster(tmp_path))],
                *["--runs", str(tmp_path / "runs"), "--name", "it"],
            ],
            stdout=out,
            stderr=subprocess.STDOUT,
            env=ENVIRONMENT,
        )
    try:
        deadline = time.monotonic() + 60
        while '"event": "round"' not in _text(run / "state.jsonl"):
            assert time.monotonic() < deadline, _text(tmp_path / "out")
            time.sleep(0.1)
        process.send_signal(signal.SIGINT)
        assert process.wait(30) == 130, _text(tmp_path / "out")
    finally:
        process.kill()
        process.wait()
    assert json.loads((run / "summary.json").read_text())["ended"] == "interrupted"
    assert (run / "model.safetensors").exists()
    assert not _living(str(tmp_path)), "processes were left behind"


ERRORS = {
    "unknown mode": (
        ["esync.state.cli", "--mode", "esink"],
        r"'esink' is not one of",
    ),
    "unknown model": (
        ["esync.state.cli", "--model", "resnet18"],
        r"unknown model 'resnet18'. Did you mean 'resnet18-v1'\?",
    ),
    "unknown data set": (
        ["esync.state.cli", "--dataset", "fashion"],
        r"unknown data set 'fashion'. Did you mean 'fashion-mnist'\?",
    ),
    "beyond loopback": (
        ["esync.state.cli", "--bind", "tcp://0.0.0.0:*"],
        r"can be reached from other machines.*--insecure",
    ),
    "not an endpoint": (
        ["esync.worker.cli", "--connect", "localhost"],
        r"'localhost' is not an endpoint; expected tcp://HOST:PORT",
    ),
    "no state server": (
        ["esync.worker.cli", "--connect", "tcp://127.0.0.1:9", "--wait", "1"],
        r"no state server answered at tcp://127.0.0.1:9 within 1 s. Is esync-state running there",
    ),
    "no state server for the parameter server": (
        ["esync.ps.cli", "--connect", "tcp://127.0.0.1:9", "--wait", "1"],
        r"no state server answered at tcp://127.0.0.1:9",
    ),
    "no state server to ask": (
        ["esync.status.cli", "tcp://127.0.0.1:9", "--wait", "1"],
        r"no state server answered at tcp://127.0.0.1:9 within 1 s",
    ),
    "metrics at a place that is not ours": (
        [
            *["esync.state.cli", "--bind", "tcp://127.0.0.1:*"],
            *["--metrics-port", "9100", "--metrics-bind", "192.0.2.1"],
        ],
        r"cannot show metrics at 192.0.2.1:9100: .*--metrics-port",
    ),
    "no GPU for a worker": (
        ["esync.worker.cli", "--device", "gpu:99"],
        r"(JAX finds no gpu on this machine.*use --device cpu|this machine has \d+ gpu devices)",
    ),
    "no CUDA for the parameter server": (
        ["esync.ps.cli", "--device", "cuda:99"],
        r"((needs CuPy|no CUDA device: ).*use --device cpu|no CUDA device 99: this machine has)",
    ),
    "no such file": (["esync.run.cli", "nowhere.toml"], r"cannot read nowhere.toml: No such file"),
    "no such run": (["esync.report.cli", "nowhere"], r"cannot read nowhere"),
}


@pytest.mark.parametrize("name", ERRORS)
def test_an_error_is_one_line_that_says_what_to_do(name: str) -> None:
    (module, *arguments), expected = ERRORS[name]
    status, output = command(module, *arguments)
    assert status in (1, 2), output
    assert re.search(expected, output, re.DOTALL), output
    assert "Traceback" not in output


SWALLOWED = """
import gc, os, signal, sys, time
from esync import cli
cli.interrupt_on_sigterm()
class Swallows:
    def __del__(self):  # Python ignores what is raised here
        os.kill(os.getpid(), signal.{signal})
        time.sleep(0.01)
try:
    del_me = Swallows()
    del del_me
    time.sleep(20)
    print("slept")
except KeyboardInterrupt:
    print("interrupted")
"""


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT"])
def test_an_interrupt_is_heard_where_python_ignores_exceptions(name: str) -> None:
    code = SWALLOWED.format(signal=name)
    found = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=30, check=False
    )
    assert (found.stdout, found.stderr) == ("interrupted\n", "")


def test_a_run_that_did_not_start_does_not_keep_its_name(
    processes: Processes, tmp_path: Path
) -> None:
    processes.start("state", "esync.state.cli", "--bind", "tcp://127.0.0.1:*")
    taken = processes.wait_for("state", r"state server at (tcp://\S+):").group(1)
    cluster = _cluster(tmp_path)
    good = cluster.read_text()
    cluster.write_text(good.replace("tcp://127.0.0.1:*", taken))
    run = [str(cluster), "--runs", str(tmp_path / "runs"), "--name", "it", "--rounds", "2"]
    status, output = command("esync.run.cli", *run)
    assert status == 1
    assert "already in use" in output
    cluster.write_text(good)
    again = processes.start("again", "esync.run.cli", *run)
    assert again.wait(90) == 0, processes.output("again")


def test_a_port_in_use_is_said_to_be_in_use(processes: Processes) -> None:
    processes.start("state", "esync.state.cli", "--bind", "tcp://127.0.0.1:*")
    endpoint = processes.wait_for("state", r"state server at (tcp://\S+):").group(1)
    status, output = command("esync.state.cli", "--bind", endpoint)
    assert status == 1
    assert "already in use" in output
    assert "Traceback" not in output


def test_missing_data_is_said_by_the_worker_that_misses_it(
    processes: Processes, tmp_path: Path
) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    processes.start(
        "state",
        "esync.state.cli",
        *["--bind", "tcp://127.0.0.1:*", "--data-dir", str(empty)],
    )
    endpoint = processes.wait_for("state", r"state server at (tcp://\S+):").group(1)
    processes.start("ps", "esync.ps.cli", "--connect", endpoint)
    worker = processes.start("worker", "esync.worker.cli", "--connect", endpoint)
    assert worker.wait(60) == 1
    assert re.search(r"error: .*train-images", processes.output("worker"), re.DOTALL)
    assert "Traceback" not in processes.output("worker")


@pytest.mark.parametrize("module", ["state", "ps", "worker", "run", "status", "report"])
def test_help_is_quick_and_complete(module: str) -> None:
    status, output = command(f"esync.{module}.cli", "--help")
    assert status == 0
    assert "Usage:" in output


def _cluster(directory: Path) -> Path:
    path = directory / "cluster.toml"
    path.write_text(
        """
[run]
dataset = "digits"
batch_size = 16
lr = 0.1
[state]
bind = "tcp://127.0.0.1:*"
[[workers]]
name = "fast"
step_time_s = 0.02
[[workers]]
name = "slow"
step_time_s = 0.3
"""
    )
    return path


def _text(path: Path) -> str:
    return path.read_text(errors="replace") if path.exists() else ""


def _living(mark: str) -> list[str]:
    """Command lines of the processes that mention `mark`."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and int(entry.name) != os.getpid():
            try:
                line = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode()
            except OSError:
                continue
            if mark in line:
                found.append(line)
    return found


def test_ctrl_c_at_esync_run_makes_one_model_of_two_servers_parts(
    processes: Processes, tmp_path: Path
) -> None:
    options = ["--runs", str(tmp_path / "runs"), "--name", "it", "--ps", "2", "--rounds", "0"]
    run = processes.start("run", "esync.run.cli", str(_cluster(tmp_path)), *options, "--plain")
    journal = tmp_path / "runs" / "it" / "state.jsonl"
    processes.until(lambda: journal.exists() and '"round": 3' in journal.read_text(), "rounds")
    run.send_signal(signal.SIGINT)
    assert run.wait(60) == 130, processes.output("run")
    found = {path.name for path in (tmp_path / "runs" / "it").glob("*.safetensors")}
    assert found == {"model.safetensors"}


def test_servers_read_the_keys_of_the_cluster_file_and_an_evaluator_has_a_worker_s_id(
    processes: Processes, tmp_path: Path
) -> None:
    """The parameter server's table has an empty one, as esync-run writes it."""
    keys.make(tmp_path / "keys", ["gpu"])
    path = tmp_path / "c.toml"
    path.write_text(
        f'[run]\nmode = "sync"\nmodel = "mlp"\ndataset = "digits"\nrounds = 3\n[state]\n'
        f'bind = "tcp://127.0.0.1:*"\nkeys = "{tmp_path / "keys"}"\n[ps]\nkeys = ""\n[[workers]]\n'
    )
    processes.start("state", "esync.state.cli", "--config", str(path))
    endpoint = processes.wait_for("state", r"state server at (tcp://\S+):").group(1)
    processes.start("ps", "esync.ps.cli", "--config", str(path), "--connect", endpoint)
    joins = ["--connect", endpoint, "--keys", str(tmp_path / "keys" / "gpu.key")]
    processes.start("evaluator", "esync.worker.cli", "--evaluate", *joins)
    processes.start("worker", "esync.worker.cli", *joins)
    for process in processes.started:
        assert process.wait(60) == 0, [processes.output(n) for n in ("ps", "evaluator", "worker")]
    assert "gpu-evaluator joined" in processes.output("evaluator")
