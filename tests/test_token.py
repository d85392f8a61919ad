"""The token of a parameter server's sockets: who has not been told it gets nothing through, and nothing of it."""

from __future__ import annotations

import contextlib
import threading
from types import SimpleNamespace

import numpy as np
import pytest
import zmq

from esync import handshake, messages, transport
from esync.config import RunConfig
from esync.errors import TransportError
from esync.handshake import Gate, Token
from esync.messages import Fetch, Join
from esync.worker.link import Link
from tests.cluster import Cluster

FRAME = messages.encode(Fetch("w0", -1))


@pytest.fixture
def context():
    context = zmq.Context()
    yield context
    context.term()
    assert not handshake._running, "an authenticator was left running"


@pytest.fixture
def pulls(context):
    """(gate, endpoint, socket) of one that lets in by a token."""
    gate = Gate()
    with transport.pull(context, gate) as socket:
        yield gate, transport.bind(socket, "tcp://127.0.0.1:*"), socket


def refused(context, endpoint, token=""):
    """Send a message to the endpoint; returns once the handshake has failed."""
    with context.socket(zmq.PUSH) as socket:
        socket.linger = 0
        if token:
            socket.setsockopt(zmq.PLAIN_PASSWORD, token.encode())
        events = zmq.EVENT_HANDSHAKE_FAILED_AUTH | zmq.EVENT_DISCONNECTED
        with socket.get_monitor_socket(events) as watch:
            socket.connect(endpoint)
            with contextlib.suppress(zmq.Again):  # it has been refused already
                socket.send(FRAME, zmq.NOBLOCK)
            assert watch.poll(5000), "the handshake goes on"
            socket.disable_monitor()


def test_who_knows_the_token_is_let_in_and_is_nobody_s_user(context, pulls):
    gate, endpoint, socket = pulls
    with transport.push(context, endpoint, Token(gate.token)) as push:
        push.send(FRAME)
        assert socket.poll(5000)
        assert socket.recv() == FRAME
    assert gate.refusals == 0


@pytest.mark.parametrize("token", ["another", "é", "x" * 255])
def test_another_token_is_refused_and_counted(context, pulls, token):
    gate, endpoint, socket = pulls
    refused(context, endpoint, token)
    assert gate.refusals == 1
    assert not socket.poll(0)


def test_without_a_token_nothing_gets_through(context, pulls):
    _, endpoint, socket = pulls
    refused(context, endpoint)
    assert not socket.poll(0)


def test_the_token_of_one_server_is_not_another_s(context, pulls):
    gate, endpoint, _ = pulls
    other = Gate()
    assert other.token != gate.token
    with transport.pull(context, other) as second:
        transport.bind(second, "tcp://127.0.0.1:*")
        refused(context, endpoint, other.token)
    assert (gate.refusals, other.refusals) == (1, 0)


def test_no_more_waits_for_a_gate_than_without_one(context, pulls):
    """A high-water mark counts chunks; what libzmq says of a user would count as one for good."""
    gate, endpoint, socket = pulls
    assert socket.getsockopt(zmq.RCVHWM) == transport.CHUNKS_RECEIVED
    with transport.push(context, endpoint, Token(gate.token)) as push:
        for _ in range(20):
            push.send(FRAME)
        for _ in range(20):
            assert socket.poll(5000)
            socket.recv()


def test_a_token_is_told_to_members_alone(context, tmp_path):
    with Cluster(RunConfig(mode="sync", workers=1, rounds=3), "tcp", tmp_path) as cluster:
        token = cluster.ps.endpoints["token"]
        assert len(token) == 32
        told = []

        def loop(worker):
            params = worker.start({"w": np.zeros(3, np.float32)})
            told.append(worker._link.shared.welcome.endpoints[0]["token"])
            while not worker.stopped:
                params = worker.step(params)

        cluster.train("w0", loop).result()
        cluster.finish()
        assert told == [token]
        for path in (tmp_path / "run").iterdir():
            assert path.is_dir() or token.encode() not in path.read_bytes(), path


def test_strangers_floods_do_not_reach_a_run():
    """Of messages where updates go, of subscriptions and of other frames where models come from."""
    over, sent = threading.Event(), []
    with Cluster(RunConfig(mode="sync", workers=1, rounds=300), "tcp") as cluster:
        endpoints = cluster.ps.endpoints

        def flood():
            sockets = [cluster.context.socket(kind) for kind in (zmq.PUSH, zmq.XSUB, zmq.XSUB)]
            for socket, what in zip(sockets, ("push", "model", "model"), strict=True):
                socket.linger = 0
                socket.sndtimeo = 10
                socket.connect(endpoints[what])
            frames = [FRAME, b"\x02" * 100, b"\x01w/"]
            while not over.is_set():
                for i, socket in enumerate(sockets):
                    try:
                        socket.send(frames[i] + (b"%d/" % len(sent) if i == 2 else b""))
                    except zmq.Again:
                        continue
                    sent.append(i)
            for socket in sockets:
                socket.close()

        def loop(worker):
            params = worker.start({"w": np.zeros(10, np.float32)})
            while not worker.stopped:
                worker.pause(0.003)
                params = worker.step({"w": params["w"] + np.float32(1)})
            return worker.round

        flooder = threading.Thread(target=flood)
        flooder.start()
        try:
            assert cluster.train("w0", loop).result() == 300
        finally:
            over.set()
            flooder.join()
        cluster.finish()
        server = cluster.ps.thread
        assert server is not None
        assert not server.counters
        assert server._subscribers.keys() <= {"w0"}


def test_inside_of_a_process_there_is_no_gate():
    with Cluster(RunConfig(mode="sync", workers=1, rounds=1)) as cluster:
        assert cluster.ps.endpoints["token"] == ""
        cluster.train("w0", lambda worker: worker.start({"w": np.zeros(3, np.float32)})).result()
        cluster.state.stop("seen enough")
        cluster.finish()


def test_a_context_with_an_authenticator_of_its_own_is_said(context):
    from zmq.auth.thread import ThreadAuthenticator

    other = ThreadAuthenticator(context)
    other.start()
    try:
        with pytest.raises(TransportError, match="authenticator"):
            transport.pull(context, Gate())
    finally:
        other.stop()


@pytest.mark.parametrize("blocked", [False, True])
def test_a_worker_that_waits_for_long_asks_where_the_servers_are(context, blocked):
    """A server that was started again has another token, and the word of it may have been lost."""
    with context.socket(zmq.ROUTER) as state:
        state.bind("inproc://state")
        join = Join("w0", "worker", life="1")
        link = Link("inproc://state", join, wait_s=60, context=context, say=lambda text: None)
        try:
            link._answered = link.shared.accepted = True
            link.shared.awaiting = (0,)
            nothing = SimpleNamespace(version=1)
            link._channels = [
                SimpleNamespace(
                    progress_at=0,
                    shard=0,
                    assembly=nothing,
                    blocked=blocked,
                    on_time=lambda now: None,
                )
            ]
            link._on_time(100.0, 0.0)
            assert state.poll(5000)
            assert messages.decode(state.recv_multipart()[-1]) == join
        finally:
            link._control.close(0)
            link.inbox.close()
