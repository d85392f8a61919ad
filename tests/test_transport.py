"""Endpoints: which are accepted, who can reach them, and what others are told."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import zmq

from esync import messages, transport
from esync.errors import TransportError
from esync.messaging import DRAIN, MessageServer


@pytest.fixture
def router() -> Iterator[Callable[[], zmq.Socket[bytes]]]:
    """Makes sockets, and closes them after the test."""
    context: zmq.Context[Any] = zmq.Context()
    made: list[zmq.Socket[bytes]] = []

    def make() -> zmq.Socket[bytes]:
        made.append(transport.router(context))
        return made[-1]

    yield make
    for socket in made:
        socket.close(0)
    context.term()


@pytest.mark.parametrize(
    "endpoint",
    [
        "tcp://127.0.0.1:10010",
        "tcp://head:1",
        "tcp://[::1]:5",
        "tcp://*:*",
        "ipc:///x",
        "inproc://x",
    ],
)
def test_endpoints_of_the_three_transports_are_accepted(endpoint: str) -> None:
    assert transport.check_endpoint(endpoint) == endpoint


@pytest.mark.parametrize(
    "endpoint", ["", "head:1", "tcp://head", "tcp://:5", "udp://head:5", "ipc://", "tcp://a:b"]
)
def test_other_endpoints_are_refused_with_an_example(endpoint: str) -> None:
    with pytest.raises(TransportError, match="expected tcp://HOST:PORT"):
        transport.check_endpoint(endpoint)


@pytest.mark.parametrize("endpoint", ["tcp://0.0.0.0:*", "tcp://*:*", "tcp://192.0.2.1:5"])
def test_nothing_listens_beyond_loopback_unless_told_to(
    endpoint: str, router: Callable[[], zmq.Socket[bytes]]
) -> None:
    assert not transport.is_local(endpoint)
    with pytest.raises(TransportError, match="--insecure"):
        transport.bind(router(), endpoint)


def test_a_router_reaches_whose_connection_is_there(
    router: Callable[[], zmq.Socket[bytes]],
) -> None:
    socket = router()
    bound = transport.bind(socket, "tcp://127.0.0.1:*")
    server = MessageServer(socket)
    assert not server.reaches(b"w\0x")
    with transport.dealer(socket.context, "w\0x", bound) as dealer:
        dealer.send(b"hello")
        assert socket.poll(5000)
        assert server.reaches(b"w\0x")
        assert not server.reaches(b"w\0y")
        assert messages.decode(dealer.recv()) == messages.Status(), "which says nothing"
    deadline = time.monotonic() + 5
    while server.reaches(b"w\0x"):
        assert time.monotonic() < deadline
        if socket.poll(1):
            socket.recv_multipart()


def test_what_is_sent_before_there_is_a_connection_arrives_though_the_socket_is_closed(
    router: Callable[[], zmq.Socket[bytes]],
) -> None:
    socket = router()
    bound = transport.bind(socket, "tcp://127.0.0.1:*")
    for number in range(5):
        with transport.dealer(socket.context, "w", bound) as dealer:
            dealer.send(b"%d" % number)
        assert socket.poll(5000)
        assert socket.recv_multipart() == [b"w", b"%d" % number]


def test_a_socket_can_be_closed_while_its_context_is_terminated() -> None:
    context = zmq.Context[Any]()
    dealer = transport.dealer(context, "w", "tcp://127.0.0.1:9")
    term = threading.Thread(target=context.term, daemon=True)
    term.start()
    with pytest.raises(zmq.ContextTerminated):
        dealer.recv()
    dealer.close(0)
    term.join(10)
    assert not term.is_alive()


def test_a_server_that_is_stopped_takes_nothing_more_off_its_socket(
    router: Callable[[], zmq.Socket[bytes]],
) -> None:
    """Or one that is flooded would never end."""
    socket, handled = router(), []
    bound = transport.bind(socket, "inproc://flooded")
    server = MessageServer(socket)

    def stop(peer: bytes, message: messages.Status) -> None:
        handled.append(peer)
        server.stop()

    server.on(messages.Status, stop)
    with socket.context.socket(zmq.DEALER) as flood:
        flood.linger = 0
        flood.connect(bound)
        for _ in range(3 * DRAIN):
            flood.send(messages.encode(messages.Status()), zmq.NOBLOCK)
        transport.run(server.run())
    assert 0 < len(handled) <= 2 * DRAIN


def test_a_wildcard_port_becomes_a_real_one(
    router: Callable[[], zmq.Socket[bytes]],
) -> None:
    bound = transport.bind(router(), "tcp://127.0.0.1:*")
    assert int(bound.rpartition(":")[2]) > 0
    with pytest.raises(TransportError, match="already in use"):
        transport.bind(router(), bound)


def test_an_address_of_another_machine_cannot_be_bound(
    router: Callable[[], zmq.Socket[bytes]],
) -> None:
    with pytest.raises(TransportError, match="cannot bind"):
        transport.bind(router(), "tcp://192.0.2.1:5", insecure=True)


@pytest.mark.parametrize(
    ("bound", "state", "told", "joined_by", "connects_to"),
    [
        (
            "tcp://127.0.0.1:7",
            "tcp://127.0.0.1:1",
            "tcp://127.0.0.1:7",
            "tcp://h:1",
            "tcp://127.0.0.1:7",
        ),
        ("tcp://0.0.0.0:7", "tcp://127.0.0.1:1", "tcp://*:7", "tcp://head:1", "tcp://head:7"),
        ("tcp://0.0.0.0:7", "tcp://127.0.0.1:1", "tcp://*:7", "tcp://[::1]:1", "tcp://[::1]:7"),
        ("inproc://x", "inproc://state", "inproc://x", "inproc://state", "inproc://x"),
        ("tcp://0.0.0.0:7", "ipc:///state", "tcp://*:7", "ipc:///state", "tcp://127.0.0.1:7"),
    ],
)
def test_workers_find_a_parameter_server_that_listens_everywhere(
    bound: str, state: str, told: str, joined_by: str, connects_to: str
) -> None:
    assert transport.advertised(bound, state) == told
    assert transport.resolved(told, joined_by) == connects_to


def test_servers_may_have_as_many_connections_as_the_system_allows() -> None:
    resource = pytest.importorskip("resource")
    before, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    few = min(before, most, 1000) - 1
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (few, most))
        transport.allow_many_connections()
        assert resource.getrlimit(resource.RLIMIT_NOFILE) == (most, most)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (before, most))
