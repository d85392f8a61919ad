"""CURVE: who gets in, who does not, what each is told, and that nothing is left behind."""

from __future__ import annotations

import multiprocessing
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import zmq
from zmq.auth.thread import ThreadAuthenticator

from esync import handshake, keys, transport
from esync.errors import TransportError

ANY = "tcp://127.0.0.1:*"
PATIENCE_MS = 10_000


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """Keys of the servers and of two workers."""
    keys.make(tmp_path / "keys", ["gpu", "old"])
    return tmp_path / "keys"


@pytest.fixture
def context() -> Iterator[zmq.Context[Any]]:
    """A context whose end fails the test if something in it was left open."""
    made: zmq.Context[Any] = zmq.Context()
    yield made
    term(made)


def term(context: zmq.Context[Any]) -> None:
    thread = threading.Thread(target=context.term, daemon=True)
    thread.start()
    thread.join(10)
    assert not thread.is_alive(), "a socket was left open"
    assert not handshake._running, "an authenticator was left running"


def until(condition: Callable[[], object]) -> None:
    """Look until it is so."""
    deadline = time.monotonic() + PATIENCE_MS / 1000
    while not condition():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.005)


@pytest.mark.parametrize("scheme", ["tcp", "ipc"])
def test_a_listed_key_gets_in_and_its_messages_carry_it(
    scheme: str, context: zmq.Context[Any], directory: Path
) -> None:
    gpu = keys.load_client(directory / "gpu.key")
    with transport.router(context, keys.load_server(directory)) as router:
        bound = transport.bind(router, ANY if scheme == "tcp" else f"ipc://{directory}/socket")
        with transport.dealer(context, "gpu", bound, gpu) as dealer:
            dealer.send(b"hello")
            assert router.poll(PATIENCE_MS)
            peer, frame = router.recv_multipart(copy=False)
            assert (peer.bytes, frame.bytes) == (b"gpu", b"hello")
            assert handshake.user_of(frame) == gpu.public
            router.send_multipart([b"gpu", b"welcome"])
            assert dealer.poll(PATIENCE_MS)
            assert dealer.recv() == b"welcome"
            assert transport.refusal(dealer) == ""


def test_a_revoked_key_is_refused_and_told_so_while_others_get_in(
    context: zmq.Context[Any], directory: Path
) -> None:
    gpu, old = (keys.load_client(directory / f"{name}.key") for name in ("gpu", "old"))
    server = keys.load_server(directory)
    with transport.router(context, server) as router:
        bound = transport.bind(router, ANY)
        keys.revoke(directory, "gpu")
        with transport.dealer(context, "gpu", bound, gpu) as refused:
            refused.send(b"hello")
            until(lambda: transport.refusal(refused))
            assert "refused the key of 'gpu'" in transport.refusal(refused)
            assert server.allowed.refused == {gpu.public: 1}
            with transport.dealer(context, "old", bound, old) as dealer:
                dealer.send(b"hello")
                assert router.poll(PATIENCE_MS)
                assert router.recv_multipart() == [b"old", b"hello"]
                assert not router.poll(0)
            refused.setsockopt(zmq.LINGER, 0)


def test_an_added_key_gets_in_without_a_restart(context: zmq.Context[Any], directory: Path) -> None:
    with transport.router(context, keys.load_server(directory)) as router:
        bound = transport.bind(router, ANY)
        new = keys.load_client(keys.add(directory, "new"))
        with transport.dealer(context, "new", bound, new) as dealer:
            dealer.send(b"hello")
            assert router.poll(PATIENCE_MS)


def test_a_stranger_without_keys_gets_nothing_through(
    context: zmq.Context[Any], directory: Path
) -> None:
    with transport.router(context, keys.load_server(directory)) as router:
        bound = transport.bind(router, ANY)
        plain: zmq.Socket[bytes] = context.socket(zmq.DEALER)
        with plain, plain.get_monitor_socket(zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL) as outcome:
            plain.linger = 0
            plain.connect(bound)
            plain.send(b"hello")
            assert outcome.poll(PATIENCE_MS)
            assert not router.poll(0)


def test_a_client_with_keys_does_not_talk_to_a_server_without(
    context: zmq.Context[Any], directory: Path
) -> None:
    with transport.router(context) as router:
        bound = transport.bind(router, ANY)
        with transport.dealer(
            context, "gpu", bound, keys.load_client(directory / "gpu.key")
        ) as dealer:
            dealer.linger = 0
            dealer.send(b"secret")
            until(lambda: transport.refusal(dealer))
            assert "the server uses no keys" in transport.refusal(dealer)
            assert not router.poll(0)


def test_a_client_does_not_talk_to_a_server_with_other_keys(
    context: zmq.Context[Any], directory: Path, tmp_path: Path
) -> None:
    gpu = keys.load_client(directory / "gpu.key")
    keys.make(tmp_path / "impostor", [])
    impostor = keys.load_server(tmp_path / "impostor")
    (tmp_path / "impostor" / "allowed.toml").write_text(f'[allowed]\ngpu = "{gpu.public}"\n')
    impostor.allowed.refresh()
    with transport.router(context, impostor) as router:
        bound = transport.bind(router, ANY)
        with transport.dealer(context, "gpu", bound, gpu) as dealer:
            dealer.linger = 0
            dealer.send(b"secret")
            until(lambda: transport.refusal(dealer))
            assert "its key is not" in transport.refusal(dealer)
            assert not router.poll(0)


def test_without_an_authenticator_nobody_gets_in(
    context: zmq.Context[Any], directory: Path
) -> None:
    with transport.router(context, keys.load_server(directory)) as router:
        bound = transport.bind(router, ANY)
        handshake._running[context.underlying].authenticator.stop()
        gpu = keys.load_client(directory / "gpu.key")
        with transport.dealer(context, "gpu", bound, gpu) as dealer:
            dealer.linger = 0
            dealer.send(b"hello")
            until(lambda: transport.refusal(dealer))
            assert not router.poll(0)


def test_a_client_comes_back_by_itself_when_its_server_does(
    context: zmq.Context[Any], directory: Path
) -> None:
    gpu = keys.load_client(directory / "gpu.key")
    with transport.router(context, keys.load_server(directory)) as router:
        bound = transport.bind(router, ANY)
        dealer = transport.dealer(context, "gpu", bound, gpu)
        dealer.send(b"hello")
        assert router.poll(PATIENCE_MS)
    with dealer, transport.router(context, keys.load_server(directory)) as router:
        # The port stays taken until the I/O thread has closed the listener.
        until(lambda: _binds(router, bound))
        # What leaves by the old connection, before that is known to be gone, is lost.
        until(lambda: dealer.send(b"again") or router.poll(100))
        assert transport.refusal(dealer) == ""


def _binds(socket: zmq.Socket[bytes], endpoint: str) -> bool:
    try:
        transport.bind(socket, endpoint)
    except TransportError:
        return False
    return True


def test_servers_of_one_context_share_an_authenticator_and_keep_their_own_lists(
    context: zmq.Context[Any], tmp_path: Path
) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    keys.make(one, ["gpu"])
    keys.make(two, ["gpu"])
    stranger = keys.load_client(one / "gpu.key")
    first = transport.router(context, keys.load_server(one))
    second = transport.pull(context, keys.load_server(two))
    assert handshake._running[context.underlying].sockets == 2
    first.close()
    bound = transport.bind(second, ANY)
    known_there = keys.ClientKeys(
        "gpu", stranger.public, stranger.secret, keys.load_client(two).server
    )
    with transport.push(context, bound, known_there) as push:
        push.linger = 0
        until(lambda: transport.refusal(push))
    with transport.push(context, bound, keys.load_client(two / "gpu.key")) as push:
        push.send(b"chunk")
        assert second.poll(PATIENCE_MS)
    second.close()
    second.close()  # closing twice is no harm
    assert not handshake._running


def test_models_and_updates_go_through_keyed_sockets(
    context: zmq.Context[Any], directory: Path
) -> None:
    server, gpu = keys.load_server(directory), keys.load_client(directory / "gpu.key")
    with transport.xpub(context, server) as xpub:
        bound = transport.bind(xpub, ANY)
        with transport.sub(context, bound, b"model", gpu) as sub:
            assert xpub.poll(PATIENCE_MS)
            assert xpub.recv() == b"\x01model"
            xpub.send_multipart([b"model", b"chunk"])
            assert sub.poll(PATIENCE_MS)
            assert sub.recv_multipart() == [b"model", b"chunk"]


def test_inproc_works_with_keys_too(context: zmq.Context[Any], directory: Path) -> None:
    with transport.router(context, keys.load_server(directory)) as router:
        bound = transport.bind(router, "inproc://state")
        gpu = keys.load_client(directory / "gpu.key")
        with transport.dealer(context, "gpu", bound, gpu) as dealer:
            dealer.send(b"hello")
            assert router.poll(PATIENCE_MS)
            assert handshake.user_of(router.recv_multipart(copy=False)[1]) == ""


def test_a_server_with_keys_may_listen_beyond_loopback(
    context: zmq.Context[Any], directory: Path
) -> None:
    with transport.router(context, keys.load_server(directory)) as router:
        assert transport.bind(router, "tcp://0.0.0.0:*").startswith("tcp://0.0.0.0:")
    with transport.dealer(
        context, "gpu", "tcp://127.0.0.1:9", keys.load_client(directory / "gpu.key")
    ) as dealer:
        dealer.linger = 0
        with pytest.raises(TransportError, match="--keys"):  # a client's keys let anybody in
            transport.bind(dealer, "tcp://0.0.0.0:*")


def test_a_context_with_another_authenticator_is_an_error_that_leaves_nothing_open(
    context: zmq.Context[Any], directory: Path
) -> None:
    other = ThreadAuthenticator(context)
    other.start()
    with pytest.raises(TransportError, match="use another context"):
        transport.router(context, keys.load_server(directory))
    other.stop()


def test_a_key_that_zeromq_does_not_take_leaves_nothing_open(
    context: zmq.Context[Any], directory: Path
) -> None:
    allowed = keys.load_server(directory).allowed
    with pytest.raises(zmq.ZMQError):
        transport.router(context, keys.ServerKeys("short", "short", allowed))
    with pytest.raises(zmq.ZMQError):
        transport.push(
            context, "tcp://127.0.0.1:9", keys.ClientKeys("gpu", "short", "short", "short")
        )


def test_an_authenticator_can_follow_another_at_once(
    context: zmq.Context[Any], directory: Path
) -> None:
    server = keys.load_server(directory)
    for _ in range(50):
        transport.router(context, server).close()


def test_closing_in_the_midst_of_handshakes_does_not_hang(directory: Path) -> None:
    context: zmq.Context[Any] = zmq.Context()
    server, gpu = keys.load_server(directory), keys.load_client(directory / "gpu.key")
    router = transport.router(context, server)
    bound = transport.bind(router, ANY)
    dealers = [transport.dealer(context, f"gpu-{i}", bound, gpu) for i in range(20)]
    router.close(0)
    for dealer in dealers:
        dealer.close(0)
    term(context)


def test_destroying_a_context_ends_its_authenticator(directory: Path) -> None:
    context: zmq.Context[Any] = zmq.Context()
    sockets = [transport.router(context, keys.load_server(directory)) for _ in range(3)]
    context.destroy(0)
    assert all(socket.closed for socket in sockets)
    assert not handshake._running


def _forgets(directory: str) -> None:
    server = keys.load_server(directory)
    global forgotten
    forgotten = transport.router(zmq.Context.instance(), server)


def test_a_process_that_forgets_to_close_ends_all_the_same(directory: Path) -> None:
    process = multiprocessing.get_context("spawn").Process(target=_forgets, args=(str(directory),))
    process.start()
    process.join(30)
    alive = process.is_alive()
    process.kill()
    assert not alive
    assert process.exitcode == 0
