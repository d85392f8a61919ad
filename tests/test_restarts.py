"""Servers that die, by kill -9, and are started again: the run goes on."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import time
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from esync.errors import ConfigError
from esync.messages import Join, Leave, Model, Report, Reset, Welcome, peer_of
from esync.run_dir import is_in_use, results_directory
from esync.state.handlers import StopRun
from esync.tensors import DELTA, Layout, Leaf
from esync.worker.assembly import Shards
from tests.processes import QUICK
from tests.test_handlers import ENDPOINTS, Server, running, to

# The state server's handlers


def back(server, version, name="ps", **changes):
    """The parameter server comes back with a version."""
    sent = server.gets(Join(name, "ps", endpoints={**ENDPOINTS, **changes}))
    return sent + server.gets(Report(name, version, 0, "serving"))


def test_a_parameter_server_that_comes_back_with_an_older_version_is_gone_on_from():
    server = running("a", "b", mode="sync")
    for version in range(1, 8):
        server.gets(Reset("ps", version, {}))
    server.handlers.history.evaluated(2, 0.5, None, 1.0)
    server.handlers.history.evaluated(6, 0.7, None, 2.0)
    sent = back(server, 4)
    assert server.handlers.history.version == 4
    assert [row["round"] for row in server.handlers.history.accuracy] == [2]
    assert set(to("ps", sent)[1].workers) == {"a", "b"}
    assert "ps goes on from version 4: rounds 5 to 7 are done again" in server.said
    server.gets(Reset("ps", 5, {}))
    assert server.handlers.history.version == 5
    assert server.handlers.stopped is None


def test_workers_are_told_where_it_listens_now():
    server = running("a", "b", mode="sync")
    sent = back(server, 0, push="tcp://ps:77")
    for worker in ("a", "b"):
        (welcome,) = [m for m in to(worker, sent) if isinstance(m, Welcome)]
        assert welcome.endpoints[0]["push"] == "tcp://ps:77"
        assert welcome.rank == server.table.records[worker].rank
    assert not to("a", back(server, 0, push="tcp://ps:77")), "that is known by now"


def test_a_run_waits_for_its_parameter_server_and_another_may_take_its_place():
    server = running("a", mode="sync", ps_wait_s=60.0)
    for _ in range(30):
        server.beat("a")
        server.tick(1.0)
    assert server.handlers.stopped is None
    assert any("is silent; the run waits for it" in text for text in server.said)
    assert "which is silent" in server.handlers.waiting_for()
    back(server, 0, name="other")
    assert server.handlers.waiting_for() == ""
    assert set(server.handlers.servers) == {"other"}
    for _ in range(80):
        server.beat("a")
        server.tick(1.0)
    assert server.handlers.stopped == "the parameter server left: it was silent for too long"


def second_ps(server, name, life):
    """What a parameter server of another process is told; it brings no version."""
    peer = peer_of(name, life)
    return to(peer, server.gets(Join(name, "ps", endpoints=dict(ENDPOINTS), life=life), peer))


@pytest.mark.parametrize(("name", "code"), [("ps", "name-taken"), ("other", "second-ps")])
def test_a_second_parameter_server_does_not_take_the_place_of_one_that_lives(name, code):
    server = running("a", mode="sync")
    peer = peer_of(name, "2")
    second = Join(name, "ps", endpoints={**ENDPOINTS, "push": "tcp://ps:77"}, life="2")
    assert server.refuses(second, peer).code == code
    for message in (Reset(name, 7, {}), Report(name, 7, 0, "serving")):
        assert server.refuses(message, peer).code == "unknown-worker"
    server.gets(Leave(name, "bye"), peer)
    assert server.handlers.servers["ps"].endpoints == ENDPOINTS
    assert (server.handlers.history.version, server.handlers.stopped) == (0, None)


@pytest.mark.parametrize("name", ["ps", "other"])
def test_one_that_died_is_replaced_as_soon_as_its_connection_is_gone(name):
    server = running("a", mode="sync")
    server.unreachable = {"ps"}
    assert isinstance(second_ps(server, name, "2")[0], Welcome)
    assert set(server.handlers.servers) == {name}
    assert server.refuses(Report("ps", 1, 0, "serving"), "ps").code == "unknown-worker"
    assert server.refuses(Join("ps", "ps", endpoints=dict(ENDPOINTS)), "ps").code in (
        "name-taken",
        "second-ps",
    )


def test_a_parameter_server_whose_connection_is_gone_is_soon_missed():
    server = running("a", mode="sync")
    server.tick(2.4)
    assert server.handlers.waiting_for() == ""
    server.beat("a")
    server.tick(0.2)
    assert server.handlers.waiting_for() == "", "it has a connection, and may be busy"
    server.unreachable = {"ps"}
    server.tick(0.2)
    assert server.handlers.waiting_for() == "the parameter server ps, which is silent"
    server.unreachable = set()
    server.gets(Report("ps", 0, 0, "serving"))
    assert server.handlers.waiting_for() == ""


def test_one_of_its_name_replaces_one_that_is_silent_though_its_connection_is_there():
    server = running("a", mode="sync")
    server.now += 2.6
    assert isinstance(second_ps(server, "ps", "2")[0], Welcome)


def test_a_state_server_goes_on_where_another_one_was():
    first = running("a", "b", mode="sync")
    first.gets(Reset("ps", 1, {}))
    first.tick(10.0)
    first.handlers.history.evaluated(1, 0.5, 0.1, 3.0)
    saved = json.loads(json.dumps(first.handlers.saved()))
    second = Server(workers=2, mode="sync")
    second.now = 5000.0
    second.handlers.restore(saved)
    assert second.handlers.status()["elapsed_s"] == pytest.approx(10.0)
    assert second.handlers.history.accuracy == first.handlers.history.accuracy
    second.gets(Join("ps", "ps", endpoints=dict(ENDPOINTS)))
    second.gets(Report("ps", 1, 0, "serving"))
    assert second.handlers.history.version == 1
    asked = [m for m in to("b", second.member("b", rank=1)) if hasattr(m, "action")]
    assert not asked, "it waits a while for the other"
    assert second.handlers.waiting_for() == "1 more worker"
    second.tick(1.0)
    for _ in range(8):
        second.beat("b")
        assert not to("b", second.tick(1.0))
    second.beat("b")
    (asked,) = [m for m in to("b", second.tick(1.0)) if hasattr(m, "action")]
    assert asked.action in ("train", "sync"), "who does not come is not waited for"
    assert second.table.records["b"].rank == 1


def test_what_was_moved_is_not_forgotten_when_nothing_more_is():
    first = running("a", "b", mode="sync")
    first.gets(Reset("ps", 1, {}, 700, 900))
    second = gone_on_with(first)
    for _ in range(3):  # it asked before anybody was there
        second.gets(Join("ps", "ps", endpoints=dict(ENDPOINTS)))
    assert [text for text in second.said if "is back" in text] == []
    second.gets(Report("ps", 1, 0, "serving"))
    second.gets(StopRun("interrupted"))
    summary = second.handlers.summary()
    assert (summary["bytes_up"], summary["bytes_down"]) == (700, 900)


def gone_on_with(first):
    """Another state server in its place, an hour later."""
    second = Server(workers=2, mode="sync", duration_s=60.0)
    second.now = 3600.0
    second.handlers.restore(json.loads(json.dumps(first.handlers.saved())))
    return second


def test_the_clock_of_a_run_that_is_gone_on_with_stands_still_until_somebody_trains():
    first = running("a", "b", mode="sync", duration_s=60.0)
    first.gets(Reset("ps", 1, {}))
    first.tick(20.0)
    second = gone_on_with(first)
    second.tick(300.0)
    second.ps()
    second.gets(Join("a", "worker"))
    second.tick(2.0)
    assert second.handlers.stopped is None, "these were not its 60 seconds"
    assert not any("round" in text for text in second.said[1:]), "there is no progress to speak of"
    assert second.handlers.run_s(second.now) == pytest.approx(20.0)
    second.member("a")
    second.tick(3.0)
    assert second.handlers.run_s(second.now) == pytest.approx(20.0)
    second.member("b")
    second.beat("a")
    second.tick(3.0)
    assert second.handlers.run_s(second.now) == pytest.approx(23.0)
    assert gone_on_with(second).handlers.run_s(0.0) == pytest.approx(23.0)
    for _ in range(12):
        second.beat("a")
        second.tick(3.0)
    assert second.handlers.stopped is None
    second.tick(2.0)
    assert second.handlers.stopped == "60 seconds"
    assert second.handlers.summary()["wall_s"] == pytest.approx(61.0)


def totals(server, worker, **counts):
    server.gets(Report(worker, 1, 0, "train", totals=counts))


def test_what_was_trained_before_a_state_server_died_is_in_the_summary_once():
    first = Server(workers=2, mode="sync")
    first.ps()
    for worker in ("a", "b", "short"):
        first.member(worker, life=f"{worker}1")
    totals(first, "short", steps=7, samples=70)
    first.gets(Leave("short", "done"))
    totals(first, "a", steps=10, samples=100)
    totals(first, "b", steps=20, samples=200)
    first.tick(4.0)
    second = gone_on_with(first)
    second.ps()
    second.member("a", life="a1")  # it went on, and has not said yet what it did meanwhile
    second.member("b", life="b2")  # another process
    assert second.handlers.status()["steps"] == 37
    totals(second, "a", steps=15, samples=150)
    totals(second, "b", steps=1, samples=10)
    third = gone_on_with(second)
    summary = third.handlers.summary()
    assert summary["samples"] == 70 + 150 + 200 + 10
    rows = {(row["name"], row["steps"]): row["left_why"] for row in summary["workers"]}
    gone = "the state server was started again"
    assert rows == {("short", 7): "done", ("a", 15): gone, ("b", 20): gone, ("b", 1): gone}
    assert summary["samples_per_s"] == pytest.approx(430 / summary["wall_s"], rel=1e-3)


# Real processes


def test_a_parameter_server_whose_state_server_is_gone_for_good_leaves_its_model(
    processes, tmp_path
):
    run = Run(processes, tmp_path, "--mode", "sync", ps=("--wait", "2"))
    run.rounds(5)
    kill(run.state)
    assert run.ps.wait(30) == 1
    assert "is gone: no connection for 2 s" in processes.output("ps")
    assert load_file(run.directory / "model.safetensors")


def test_a_directory_in_which_a_run_goes_on_is_not_another_run_s(processes, tmp_path):
    run = Run(processes, tmp_path, "--mode", "sync")
    run.rounds(3)
    where = ["--run-dir", str(run.directory)]
    for more in ([], ["--resume"]):
        second = processes.start(
            "second", "esync.state.cli", "--bind", "tcp://127.0.0.1:*", *where, *more
        )
        assert second.wait(30) == 1
    assert (
        processes.output("second").count("is in use: the state server of another run has it") == 2
    )
    (run.directory / "cluster.toml").write_text("[run]\n")
    for force, why in ((True, "is in use"), (False, "has results already")):
        with pytest.raises(ConfigError, match=why):
            results_directory("c", "run", str(tmp_path), "sync", force)
    assert (run.directory / "endpoint").read_text().strip() == run.endpoint
    processes.until(lambda: list((run.directory / "checkpoints").glob("*")), "a checkpoint")
    elsewhere = [*run.join[:2], "--run-dir", str(tmp_path / "elsewhere")]
    for where, why in (
        (
            run.join,
            "has checkpoints: --resume goes on from them, .* only if they are of a run that is over",
        ),
        (elsewhere, "parameter server named 'ps' was heard .* ago"),
    ):
        ps = processes.start("other", "esync.ps.cli", *where, "--name", "ps")
        assert ps.wait(30) == 1
        assert re.search(why, processes.output("other"))
    before = run.version()
    run.rounds(5)
    assert run.end()["rounds"] > before
    assert not is_in_use(run.directory)


class Run:
    """Three workers on digits, and servers that can be killed and started again."""

    def __init__(self, processes, directory, *options, ps=()):
        self.processes, self.directory = processes, directory / "run"
        self.options = options
        self.ps_options = ps
        self.state = self.start_state("tcp://127.0.0.1:*")
        self.endpoint = processes.wait_for("state", r"state server at (tcp://\S+):").group(1)
        self.join = ["--connect", self.endpoint, "--run-dir", str(self.directory)]
        self.ps = self.start_ps()
        self.workers = [
            processes.start(
                f"w{i}", "esync.worker.cli", *self.join, "--name", f"w{i}", "--step-time", "0.02"
            )
            for i in range(3)
        ]
        processes.wait_for("state", "the run starts with 3 workers")

    def start_state(self, bind, *more):
        options = ["--bind", bind, "--workers", "3", "--run-dir", str(self.directory)]
        options += ["--heartbeat", "3", *QUICK, *self.options, *more]
        return self.processes.start("state", "esync.state.cli", *options)

    def start_ps(self, *more):
        options = ["--name", "ps", "--checkpoint", "0.3", *self.ps_options, *more]
        return self.processes.start("ps", "esync.ps.cli", *self.join, *options)

    def lines(self, role, event):
        path = self.directory / f"{role}.jsonl"
        lines = [json.loads(line) for line in path.read_text().splitlines() if line.endswith("}")]
        return [line for line in lines if line["event"] == event]

    def version(self):
        saved = self.directory / "state.json"
        return json.loads(saved.read_text())["history"]["version"] if saved.exists() else 0

    def rounds(self, count):
        """Wait for so many versions more than there are now, in whatever life of the servers."""
        begin = len(self.lines("state", "round"))
        self.processes.until(
            lambda: len(self.lines("state", "round")) >= begin + count, f"{count} rounds", 40
        )

    def end(self):
        self.state.send_signal(signal.SIGTERM)
        for process in (self.state, self.ps, *self.workers):
            assert process.wait(30) == 0
        return json.loads((self.directory / "summary.json").read_text())


def free_port():
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def kill(process):
    process.kill()
    process.wait()


def test_the_parameter_server_is_killed_and_the_run_goes_on_from_its_checkpoint(
    processes,
    tmp_path,
):
    """On the same ports, so that the old connections are tried again, and refused: it has another token. Under its name
    and under another, as one has that is started without."""
    ports = ("--push-port", str(free_port()), "--model-port", str(free_port()))
    run = Run(processes, tmp_path, "--mode", "sync", "--outer", "momentum", ps=ports)
    for name in ("ps", "other"):
        run.rounds(20)
        processes.until(lambda: list((run.directory / "checkpoints").glob("*")), "a checkpoint")
        kill(run.ps)
        run.ps = run.start_ps("--resume", "--name", name)
        run.rounds(20)
    summary = run.end()
    assert "going on from version" in processes.output("ps")
    assert summary["ended"] == "interrupted"
    assert len(summary["workers"]) == 3, "nobody left"
    again = run.lines("state", "rolled_back")
    assert len(again) == 2
    assert all(row["round"] > 0 for row in again)
    assert load_file(run.directory / "model.safetensors")


def test_the_state_server_is_killed_and_the_run_goes_on_where_it_was(
    processes,
    tmp_path,
):
    run = Run(processes, tmp_path, "--mode", "esync")
    run.rounds(20)
    time.sleep(1.2)  # what is saved once a second
    before = run.version()
    assert before > 0
    kill(run.state)
    run.state = run.start_state(run.endpoint, "--resume")
    processes.wait_for("state", "going on with the run at version")
    run.rounds(20)
    processes.until(lambda: run.version() > before, "a later version on disk")
    assert "the state server is back" in processes.output("ps")
    summary = run.end()
    assert len(summary["workers"]) == 3
    ranks: dict[str, set[int]] = {}
    for row in run.lines("state", "join"):
        ranks.setdefault(row["worker"], set()).add(row["rank"])
    assert sorted(len(own) for own in ranks.values()) == [1, 1, 1], "each kept its rank"


def test_both_servers_are_killed_at_once(processes, tmp_path):
    run = Run(processes, tmp_path, "--mode", "sync")
    run.rounds(30)
    processes.until(lambda: list((run.directory / "checkpoints").glob("*")), "a checkpoint")
    for process in (run.state, run.ps):
        kill(process)
    time.sleep(0.5)
    run.ps = run.start_ps("--resume")
    run.state = run.start_state(run.endpoint, "--resume")
    run.rounds(20)
    summary = run.end()
    assert summary["rounds"] > 0
    assert len(summary["workers"]) == 3


def test_checkpoints_of_an_earlier_run_are_not_mixed_with_a_new_one(
    processes,
    tmp_path,
):
    run = Run(processes, tmp_path, "--mode", "sync")
    run.rounds(5)
    run.end()
    assert list((run.directory / "checkpoints").glob("*")), "one at the end"
    ended = (run.directory / "summary.json").read_bytes()
    refused = run.start_state("tcp://127.0.0.1:*")
    assert refused.wait(30) == 1
    said = r"run has a run at version \d+: go on with it \(--resume\), or choose another --run-dir"
    assert re.search(said, processes.output("state"))
    assert (run.directory / "summary.json").read_bytes() == ended
    (run.directory / "state.json").unlink()
    state = run.start_state("tcp://127.0.0.1:*")
    match = processes.until(
        lambda: (
            processes.output("state").count("state server at") == 2
            and processes.output("state").rpartition("state server at ")[2].split(": ")[0]
        ),
        "another state server",
    )
    run.join = ["--connect", match, "--run-dir", str(run.directory)]
    ps = run.start_ps()
    assert ps.wait(30) == 1
    assert "--resume goes on from them, also in the place of" in processes.output("ps")
    kill(state)


def test_a_parameter_server_that_is_started_again_without_resume_does_not_end_the_run(
    processes, tmp_path
):
    run = Run(processes, tmp_path, "--mode", "sync")
    processes.until(lambda: list((run.directory / "checkpoints").glob("*")), "a checkpoint")
    kill(run.ps)
    wrong = run.start_ps()
    assert wrong.wait(30) == 1
    run.ps = run.start_ps("--resume")
    run.rounds(5)
    assert run.end()["ended"] == "interrupted"


@pytest.mark.parametrize("role", ["ps", "state"])
def test_two_signals_at_once_are_one(processes, tmp_path, role):
    """`timeout` sends one to the process and one to its group."""
    run = Run(processes, tmp_path, "--mode", "sync")
    run.rounds(5)
    ended = {"ps": run.ps, "state": run.state}[role]
    for _ in range(2):
        ended.send_signal(signal.SIGTERM)
        time.sleep(0.01)
    for process in (run.ps, run.state, *run.workers):
        status = process.wait(30)
        assert status == 0 or (
            process is ended and status == -signal.SIGTERM
        )  # as Python itself ended
    assert (run.directory / "model.safetensors").exists()
    assert list((run.directory / "checkpoints").glob("*"))
    assert all(row["left_why"] for row in json.loads(_summary(run))["workers"])


def _summary(run):
    return (run.directory / "summary.json").read_text()


def cluster_file(directory):
    path = directory / "c.toml"
    path.write_text(
        '[run]\nmode = "sync"\nmodel = "mlp"\ndataset = "digits"\nrounds = 12\nouter = "momentum"\n'
        'evaluate_every_s = 0.5\n[state]\nbind = "tcp://127.0.0.1:*"\n[ps]\ncheckpoint_s = 0.2\n'
        "[[workers]]\ncount = 2\nstep_time_s = 0.05\n"
    )
    return path


def test_a_run_that_has_ended_is_gone_on_with(processes, tmp_path):
    runs = tmp_path / "runs"
    first = processes.start(
        "first", "esync.run.cli", str(cluster_file(tmp_path)), "--runs", str(runs), "--name", "it"
    )
    assert first.wait(90) == 0, processes.output("first")
    before = json.loads((runs / "it" / "summary.json").read_text())
    nothing = processes.start(
        "nothing", "esync.run.cli", str(runs / "it" / "cluster.toml"), "--resume"
    )
    assert nothing.wait(30) == 1
    assert "has had its 12 rounds (12); to go on, give a larger --rounds" in processes.output(
        "nothing"
    )
    assert json.loads((runs / "it" / "summary.json").read_text()) == before
    began = time.monotonic()
    again = processes.start(
        "again", "esync.run.cli", str(runs / "it" / "cluster.toml"), "--resume", "--rounds", "30"
    )
    assert again.wait(90) == 0, processes.output("again")
    again_s = time.monotonic() - began
    summary = json.loads((runs / "it" / "summary.json").read_text())
    assert summary["rounds"] == 30
    assert summary["accuracy"][-1]["round"] == 30
    assert summary["accuracy"][0] == before["accuracy"][0], "what was there before is remembered"
    assert 0 < summary["wall_s"] - before["wall_s"] < again_s - 1, "not while everybody starts"
    for key in ("samples", "bytes_up", "bytes_down"):  # 12 rounds of 30
        assert summary[key] == pytest.approx(before[key] * 30 / 12, rel=0.2), key
    assert "going on from version 12" in (runs / "it" / "ps.log").read_text()
    other = processes.start(
        "other", "esync.run.cli", str(runs / "it" / "cluster.toml"), "--resume", "--model", "cnn"
    )
    assert other.wait(30) == 1
    assert "has model = mlp, and cannot go on with cnn" in processes.output("other")
    saved = (runs / "it" / "cluster.toml").read_text()
    steps = processes.start(
        "steps", "esync.run.cli", str(runs / "it" / "cluster.toml"), "--resume", "--outer", "adam"
    )
    assert steps.wait(30) == 1
    assert "has outer = momentum, and cannot go on with adam" in processes.output("steps")
    assert (runs / "it" / "cluster.toml").read_text() == saved
    wrong = processes.start("wrong", "esync.run.cli", str(tmp_path / "c.toml"), "--resume")
    assert wrong.wait(30) == 1
    assert "is not an earlier run's" in processes.output("wrong")


def pid_of(module, directory):
    """The process of a role of the run in a directory."""
    for path in Path("/proc").iterdir():
        try:
            command = (path / "cmdline").read_bytes().split(b"\0")
        except OSError:
            continue
        if module.encode() in command and str(directory).encode() in command:
            return int(path.name)
    return None


@pytest.mark.parametrize("role", ["ps", "state"])
def test_esync_run_starts_a_server_again_that_dies(processes, tmp_path, role):
    runs = tmp_path / "runs"
    options = ["--runs", str(runs), "--name", "it", "--keep-going", "--rounds", "80", "--plain"]
    run = processes.start("run", "esync.run.cli", str(cluster_file(tmp_path)), *options)
    processes.until(lambda: list((runs / "it" / "checkpoints").glob("*")), "a checkpoint")
    module = f"esync.{role}.cli"
    pid = processes.until(lambda: pid_of(module, runs / "it"), f"the {role}")
    os.kill(pid, signal.SIGKILL)
    assert run.wait(120) == 0, processes.output("run")
    assert f"{role} died" in processes.output("run")
    assert "it was started again" in processes.output("run")
    summary = json.loads((runs / "it" / "summary.json").read_text())
    assert summary["rounds"] == 80
    assert summary["final_accuracy"] > 0.5


def test_a_parameter_server_that_comes_back_before_the_start_is_known_to_who_waits():
    server = Server(workers=2, mode="sync")
    server.ps()
    server.gets(Join("a", "worker"))
    server.gets(Leave("ps", "stopped"))
    sent = server.gets(Join("ps", "ps", endpoints={**ENDPOINTS, "push": "tcp://ps:77"}))
    (welcome,) = [m for m in to("a", sent) if isinstance(m, Welcome)]
    assert welcome.endpoints[0]["push"] == "tcp://ps:77"


def test_what_is_saved_does_not_grow_with_the_run():
    server = running("a", mode="sync")
    for version in range(1, 3001):
        server.gets(Reset("ps", version, {}))
    saved = server.handlers.saved()
    assert saved["history"]["version"] == 3000
    assert len(saved["history"]["version_s"]) == 1000
    for n in range(1200):
        server.member("guest", life=str(n))
        totals(server, "guest", steps=2)
        server.gets(Leave("guest", "done"))
    saved = server.handlers.saved()
    assert len(saved["history"]["stays"]) == 1001
    second = Server(workers=1, mode="sync")
    second.handlers.restore(json.loads(json.dumps(saved)))
    assert second.handlers.status()["steps"] == 2400
    assert second.handlers.history.gone["worker", "done"] == 200


def test_a_round_that_begins_while_another_life_speaks_is_still_the_old_one_s():
    """The training thread has read a model, and the server comes back before the round begins."""
    layout = Layout((Leaf(DELTA, "w", (3,), "float32"),))
    shards = Shards(layout)

    def arrives(life, version):
        header = Model(life, version, 0, layout.digest)
        shards.assemblies[0].add(header, memoryview(np.zeros(3, np.float32).tobytes()))

    arrives("first", 9)
    read = shards.newest
    shards.assemblies[0].served_by("second")
    shards.begin(read)
    arrives("second", 4)
    assert shards.newer, "an older version, but of the server that there is"
    shards.begin(shards.newest)
    assert not shards.newer
