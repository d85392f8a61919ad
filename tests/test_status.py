"""`esync-status`: what it shows of a run, how it ends, and what it says when it cannot."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zmq
from click.testing import CliRunner, Result

from esync import cli, keys, messages, transport
from esync.config import RunConfig
from esync.messages import Error, Status
from esync.status import cli as status
from esync.worker.client import Worker
from tests.cluster import Cluster


@pytest.fixture(autouse=True)
def surroundings(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither this process's signals nor whatever run it may be in are touched."""
    monkeypatch.setattr(cli, "interrupt_on_sigterm", lambda: None)
    monkeypatch.delenv(transport.STATE, raising=False)
    monkeypatch.delenv(transport.KEYS, raising=False)


def esync_status(*arguments: str | Path) -> Result:
    return CliRunner().invoke(status.main, [str(argument) for argument in arguments])


class Running:
    """A run of one worker, until it is told to end."""

    def __init__(self, directory: Path, **options: Any) -> None:
        config = RunConfig(mode="sync", workers=1, rounds=10**6, model="own")
        self.cluster = Cluster(config, "tcp", directory, **options)
        self.endpoint = self.cluster.endpoint
        self.begun = threading.Event()

    def __enter__(self) -> Running:
        self.cluster.__enter__()

        def loop(worker: Worker) -> None:
            params = worker.start({"w": np.zeros(1000, np.float32)})
            while not worker.stopped:
                params = worker.step({"w": params["w"] + np.float32(1)})
                self.begun.set()

        self.thread = self.cluster.train("w", loop)
        assert self.begun.wait(30), self.thread.error
        # The worker had the first version from the parameter server: the state server may hear of it later.
        deadline = time.monotonic() + 30
        while self.cluster.state.handlers.history.version < 1:
            assert time.monotonic() < deadline, "the state server has not heard of a version"
            time.sleep(0.01)
        return self

    def __exit__(self, *error: Any) -> None:
        self.cluster.state.stop("seen enough")
        if error[0] is None:
            self.thread.result()
            self.cluster.finish()
        self.cluster.__exit__(*error)


def test_the_table_of_a_run_is_shown_once(tmp_path: Path) -> None:
    with Running(tmp_path) as run:
        result = esync_status(run.endpoint)
    assert result.exit_code == 0, result.output
    headline, _progress, header, row = result.output.splitlines()
    assert headline.startswith("sync · own loop  round ")
    assert header.split() == [
        "worker",
        "device",
        "round",
        "steps",
        "now",
        "s/step",
        "computing",
        "loss",
    ]
    assert row.startswith("w ")


def test_programs_get_it_as_json(tmp_path: Path) -> None:
    with Running(tmp_path) as run:
        result = esync_status(run.endpoint, "--json")
    table = json.loads(result.output)
    assert result.exit_code == 0
    assert table["mode"] == "sync"
    assert table["round"] > 0
    assert [row["worker"] for row in table["workers"]] == ["w"]
    assert table["waiting_for"] == ""


def test_where_the_state_server_is_comes_from_the_environment_or_a_runs_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Running(tmp_path) as run:
        assert json.loads(esync_status(tmp_path / "run", "--json").output)["round"] > 0
        monkeypatch.setenv(transport.STATE, run.endpoint)
        assert json.loads(esync_status("--json").output)["round"] > 0


def test_watching_ends_with_the_run(tmp_path: Path) -> None:
    with Running(tmp_path) as run:
        threading.Timer(0.5, run.cluster.state.stop, ["seen enough"]).start()
        result = esync_status(run.endpoint, "--watch")
    assert result.exit_code == 0, result.output
    assert "ending: seen enough" in result.output


def test_watching_for_programs_is_one_object_a_line(tmp_path: Path) -> None:
    with Running(tmp_path) as run:
        threading.Timer(0.5, run.cluster.state.stop, ["seen enough"]).start()
        result = esync_status(run.endpoint, "--watch", "--json")
    tables = [json.loads(line) for line in result.output.splitlines()]
    assert result.exit_code == 0
    assert [tables[0]["stopped"], tables[-1]["stopped"]] == [None, "seen enough"]


def test_when_nobody_answers_that_is_an_error() -> None:
    result = esync_status("tcp://127.0.0.1:9", "--wait", "0.2")
    assert result.exit_code == 1
    assert "no state server answered at tcp://127.0.0.1:9 within 0.2 s" in result.output


@pytest.mark.parametrize(
    ("where", "said"),
    [
        ("localhost", "'localhost' is not an endpoint"),
        (Path(__file__).parent, "is no run's directory"),
    ],
)
def test_what_is_no_endpoint_is_said_to_be_none(where: str | Path, said: str) -> None:
    result = esync_status(where)
    assert result.exit_code == 1
    assert said in result.output


# Keys


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    keys.make(tmp_path / "keys", ["w", "gpu"])
    return tmp_path / "keys"


def test_whoever_has_a_key_may_look(
    directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Running(tmp_path, keys=directory) as run:
        for own in (directory, directory / "gpu.key"):
            result = esync_status(run.endpoint, "--keys", own)
            assert result.exit_code == 0, result.output
        monkeypatch.setenv(transport.KEYS, str(directory / "gpu.key"))
        assert esync_status(run.endpoint).exit_code == 0


def test_whoever_has_none_or_a_revoked_one_is_told(directory: Path, tmp_path: Path) -> None:
    revoked = tmp_path / "old.key"
    keys.add(directory, "old").rename(revoked)
    keys.revoke(directory, "old")
    with Running(tmp_path, keys=directory) as run:
        for options, why in (
            ((), "the server has keys"),
            (("--keys", revoked), "the server refused the key of 'old'"),
        ):
            result = esync_status(run.endpoint, "--wait", "20", *options)
            assert result.exit_code == 1
            assert f"cannot ask {run.endpoint}: {why}" in result.output


# A state server that goes, or refuses


class Answers:
    """A state server of a few answers, which is gone at the question after them, or at its `end`.

    (It does not close before it has read what was asked: the kernel resets a connection that is closed with something
    unread in it, and ZeroMQ at its other end then loses the answer. Where the machine stands still for a while, a
    question is asked twice.)
    """

    def __init__(self, *answers: messages.Message | bytes) -> None:
        self.context: zmq.Context[Any] = zmq.Context()
        self.socket = transport.router(self.context)
        self.endpoint = transport.bind(self.socket, "tcp://127.0.0.1:*")
        self.ended = threading.Event()
        self.thread = threading.Thread(target=self._answer, args=answers)
        self.thread.start()

    def _answer(self, *answers: messages.Message | bytes) -> None:
        for answer in answers:
            if peer := self._asked():
                frame = answer if isinstance(answer, bytes) else messages.encode(answer)
                self.socket.send_multipart([peer, frame])
        self._asked()
        self.socket.close(1000)

    def _asked(self) -> bytes:
        """Who asked; empty when nobody does any more."""
        while not self.ended.is_set():
            if self.socket.poll(20):
                return bytes(self.socket.recv_multipart()[0])
        return b""

    def end(self) -> None:
        self.ended.set()
        self.thread.join()
        self.context.term()


@pytest.fixture
def table(tmp_path: Path) -> Iterator[dict[str, Any]]:
    with Running(tmp_path) as run:
        yield json.loads(esync_status(run.endpoint, "--json").output)


def test_a_run_that_vanishes_while_it_is_watched_is_an_error(table: dict[str, Any]) -> None:
    server = Answers(*[Status(table=table)] * 2)
    result = esync_status(server.endpoint, "--watch", "--wait", "2")
    server.end()
    assert result.exit_code == 1
    assert f"the state server at {server.endpoint} is gone" in result.output


def test_a_run_that_was_ending_when_it_went_has_ended(table: dict[str, Any]) -> None:
    server = Answers(Status(table=table), Status(table={**table, "stopped": "enough"}))
    result = esync_status(server.endpoint, "--watch", "--wait", "20")
    server.end()
    assert result.exit_code == 0, result.output
    assert "ending: enough" in result.output


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        (Error("unknown-key", "this key is not let in any more"), "not let in any more"),
        (messages.encode(Status()).replace(b"\xa1v\x01", b"\xa1v\x02"), "has v=2"),
    ],
)
def test_a_refusal_is_said_as_it_is(answer: messages.Message | bytes, said: str) -> None:
    server = Answers(answer)
    result = esync_status(server.endpoint)
    server.end()
    assert result.exit_code == 1
    assert said in result.output
