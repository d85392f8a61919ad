"""The state server with keys: who may say what, decided alone and over real connections."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import zmq
from click.testing import CliRunner

from esync import keys, messages, transport
from esync.config import RunConfig
from esync.keys import AllowList, ClientKeys
from esync.messages import (
    Error,
    Join,
    Leave,
    Members,
    Message,
    MessageError,
    Query,
    Report,
    Reset,
    Status,
    Welcome,
)
from esync.state import cli as state_cli
from esync.state.admission import check_key
from esync.state.server import StateServer

PATIENCE_MS = 10_000
ENDPOINTS = {"push": "tcp://127.0.0.1:1", "model": "tcp://127.0.0.1:2"}


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """Keys of the servers and of two workers."""
    keys.make(tmp_path / "keys", ["gpu", "old"])
    return tmp_path / "keys"


# The decision


def refused(allowed: AllowList, who: ClientKeys, message: Message, peer: str) -> str:
    """The code of the refusal; empty if the message may be sent. A parameter server named `gpu-ps` has joined."""
    try:
        check_key(allowed, {"gpu-ps"}, peer.encode(), message, who.public)
    except MessageError as error:
        return error.code
    return ""


def test_a_workers_key_speaks_for_its_own_ids_alone(directory: Path) -> None:
    allowed, gpu = keys.load_server(directory).allowed, keys.load_client(directory / "gpu.key")
    for peer, code in (
        ("gpu", ""),
        ("gpu-0", ""),
        ("gpu-host-17", ""),
        ("old", "wrong-key"),
        ("old-0", "wrong-key"),
        ("gpus", "wrong-key"),
        ("new", "wrong-key"),
        ("gpu-ps", "wrong-key"),  # the parameter server's, whatever its name
    ):
        for message in (Query(peer, 0, 0), Join(peer, "worker"), Report(peer, 0, 0, "train")):
            assert refused(allowed, gpu, message, peer) == code, (peer, message)
        assert refused(allowed, gpu, Status(), peer) == code
        assert refused(allowed, gpu, Leave(peer), peer) == code


def test_the_servers_key_alone_makes_a_parameter_server(directory: Path) -> None:
    allowed, gpu = keys.load_server(directory).allowed, keys.load_client(directory / "gpu.key")
    own = keys.load_client(directory)
    for message in (Join("gpu", "ps"), Reset("gpu", 1, {}), Members(1, {})):
        assert refused(allowed, gpu, message, "gpu") == "wrong-key"
        assert refused(allowed, own, message, "gpu") == ""
        assert refused(allowed, own, message, "ps") == ""


def test_a_key_that_is_revoked_or_absent_says_nothing(directory: Path) -> None:
    allowed, gpu = keys.load_server(directory).allowed, keys.load_client(directory / "gpu.key")
    keys.revoke(directory, "gpu")
    allowed.refresh()
    assert refused(allowed, gpu, Status(), "gpu") == "unknown-key"
    with pytest.raises(MessageError, match="revoked"):
        check_key(allowed, (), b"gpu", Status(), "")


# Over connections


class Served:
    """A state server on a thread, and dealers to it."""

    def __init__(self, directory: Path) -> None:
        self.context: zmq.Context[Any] = zmq.Context()
        self.keys = keys.load_server(directory)
        self.server = StateServer(
            RunConfig(), "tcp://127.0.0.1:*", context=self.context, keys=self.keys
        )
        self.summary: dict[str, Any] = {}
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()
        self._dealers: list[zmq.Socket[bytes]] = []

    def _run(self) -> None:
        self.summary = asyncio.run(self.server.run())

    def dealer(self, name: str, who: ClientKeys) -> zmq.Socket[bytes]:
        socket = transport.dealer(self.context, name, self.server.endpoint, who)
        socket.linger = 0
        self._dealers.append(socket)
        return socket

    def end(self) -> dict[str, Any]:
        self.server.stop("the test is over")
        self._thread.join(30)
        assert not self._thread.is_alive()
        for socket in self._dealers:
            socket.close()
        self.context.term()
        return self.summary


@pytest.fixture
def served(directory: Path) -> Iterator[Served]:
    made = Served(directory)
    yield made
    if not made.context.closed:
        made.end()


def ask(dealer: zmq.Socket[bytes], message: Message) -> Message:
    dealer.send(messages.encode(message))
    assert dealer.poll(PATIENCE_MS), transport.refusal(dealer) or "no answer"
    return messages.decode(dealer.recv())


def test_roles_join_with_their_keys(served: Served, directory: Path) -> None:
    ps = served.dealer("ps", keys.load_client(directory))
    assert isinstance(ask(ps, Join("ps", "ps", endpoints=ENDPOINTS)), Welcome)
    gpu = served.dealer("gpu-1", keys.load_client(directory / "gpu.key"))
    assert isinstance(ask(gpu, Join("gpu-1", "worker")), Welcome)
    gpu.send(messages.encode(Leave("gpu-1")))
    ps.send(messages.encode(Leave("ps")))


def test_another_keys_id_is_refused_and_its_owner_can_still_join(
    served: Served, directory: Path
) -> None:
    old = served.dealer("gpu", keys.load_client(directory / "old.key"))
    answer = ask(old, Join("gpu", "worker"))
    assert isinstance(answer, Error)
    assert answer.code == "wrong-key"
    assert "'old'" in answer.text
    gpu = served.dealer("gpu", keys.load_client(directory / "gpu.key"))
    answer = ask(gpu, Join("gpu", "worker"))
    assert isinstance(answer, Status)
    assert answer.waiting_for == "the parameter server"
    assert served.end()["refused"] == {"wrong-key": 1}


def test_a_key_revoked_in_mid_run_is_not_heard_any_more(served: Served, directory: Path) -> None:
    gpu = served.dealer("gpu", keys.load_client(directory / "gpu.key"))
    assert isinstance(ask(gpu, Status()), Status)
    keys.revoke(directory, "gpu")
    while isinstance(answer := ask(gpu, Status()), Status):  # until the server looks at its list
        pass
    assert isinstance(answer, Error)
    assert answer.code == "unknown-key"


def test_refused_connections_are_in_the_summary(served: Served, directory: Path) -> None:
    gpu = keys.load_client(directory / "gpu.key")
    keys.revoke(directory, "gpu")
    dealer = served.dealer("gpu", gpu)
    old = served.dealer("old", keys.load_client(directory / "old.key"))
    while not transport.refusal(dealer):
        assert isinstance(ask(old, Status()), Status)
    assert served.end()["refused"] == {"connection": 1}


def test_within_the_process_keys_change_nothing(directory: Path) -> None:
    context: zmq.Context[Any] = zmq.Context()
    server = StateServer(
        RunConfig(), "inproc://state", context=context, keys=keys.load_server(directory)
    )
    thread = threading.Thread(target=lambda: asyncio.run(server.run()), daemon=True)
    thread.start()
    with transport.dealer(context, "any", "inproc://state") as dealer:
        assert isinstance(ask(dealer, Join("any", "worker")), Status)
    server.stop("the test is over")
    thread.join(30)
    assert not thread.is_alive()
    context.term()


# The command


def started_with(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> dict[str, Any]:
    """What `esync-state` makes its server of."""
    seen: dict[str, Any] = {}

    class Seen(Exception):
        pass

    def server(run: RunConfig, bind: str, **options: Any) -> None:
        seen.update(options, bind=bind)
        raise Seen

    monkeypatch.setattr(state_cli, "StateServer", server)
    result = CliRunner().invoke(state_cli.main, list(arguments))
    assert isinstance(result.exception, Seen), result.output
    return seen


def test_keys_come_by_option_or_by_file(
    monkeypatch: pytest.MonkeyPatch, directory: Path, tmp_path: Path
) -> None:
    own = keys.load_server(directory)
    assert started_with(monkeypatch)["keys"] is None
    assert started_with(monkeypatch, "--keys", str(directory))["keys"].public == own.public
    file = tmp_path / "cluster.toml"
    file.write_text(f'[state]\nkeys = "{directory}"\n')
    assert started_with(monkeypatch, "--config", str(file))["keys"].public == own.public


def test_missing_keys_end_the_command_with_one_line(tmp_path: Path) -> None:
    result = CliRunner().invoke(state_cli.main, ["--keys", str(tmp_path / "none")])
    assert result.exit_code == 1
    assert "esync-keys init" in result.output
    assert "Traceback" not in result.output


def test_beyond_loopback_a_state_server_needs_keys_or_insecure(directory: Path) -> None:
    context: zmq.Context[Any] = zmq.Context()
    with pytest.raises(transport.TransportError, match="--insecure"):
        StateServer(RunConfig(), "tcp://0.0.0.0:*", context=context)
    server = StateServer(
        RunConfig(), "tcp://0.0.0.0:*", context=context, keys=keys.load_server(directory)
    )
    assert server.endpoint.startswith("tcp://0.0.0.0:")
    asyncio.run(_stopped(server))
    context.term()


async def _stopped(server: StateServer) -> None:
    running = asyncio.create_task(server.run())
    await asyncio.sleep(0)  # it takes the loop
    server.stop("the test is over")
    await running
