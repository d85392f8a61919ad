"""The parameter server's thread and its subscribers: who is sent what, and what strangers can do."""

from __future__ import annotations

import threading
import time
from contextlib import suppress

import numpy as np
import pytest
import zmq

from esync import messages, shared_memory
from esync.config import RunConfig
from esync.errors import EsyncError
from esync.messages import INITIAL, Fetch, Have, Members, Model, Update
from esync.ps.backend import NumpyBackend
from esync.ps.server import TensorThread
from esync.shared_memory import UPDATE_SLOTS, Region
from esync.tensors import DELTA, Layout, Leaf
from tests.cluster import Cluster, Thread

LAYOUT = RunConfig().cut(Layout((Leaf(DELTA, "w", (1000,), "float32"),)))


class Xpub:
    """In place of a socket: keeps what is sent."""

    def __init__(self):
        self.sent = []

    def send_multipart(self, frames, **options):
        self.sent.append([bytes(frame) for frame in frames])

    def recv(self, flags):
        raise zmq.Again

    def models(self, topic):
        """(version, first element) of the chunks that were sent on a topic."""
        found = []
        for to, header, *payload in self.sent:
            message = messages.decode(header)
            if to == topic and isinstance(message, Model) and payload:
                found.append((message.version, float(np.frombuffer(payload[0], np.float32)[0])))
        return found


@pytest.fixture
def server():
    """A tensor thread that is not started, with one member, w0."""
    context = zmq.Context()
    sockets = context.socket(zmq.PULL), context.socket(zmq.XPUB)
    thread = TensorThread(
        *sockets, NumpyBackend(), RunConfig(mode="sync", ema=0.9), lambda told: None
    )
    thread._xpub = Xpub()
    thread._set_members(Members(1, {"w0": 0}, LAYOUT.to_wire()))
    thread._subscribers["w0"] += 1
    yield thread
    for socket in sockets:
        socket.close(0)
    thread.inbox.close()
    context.term()


def push(server, round, value):
    header = messages.encode(Update("w0", round, 0, LAYOUT.digest))
    data = np.full(1000, value, np.float32)
    server.handle([memoryview(header), memoryview(data).cast("B")])


@pytest.mark.skipif(not shared_memory.SUPPORTED, reason="this system has no memfd (it takes Linux)")
@pytest.mark.parametrize("first", ["late", "e/ev"])
def test_an_average_of_versions_is_not_sent_for_the_version_nor_the_other_way(server, first):
    """The model lies in shared memory, and is copied to be sent: the version's copy is not the average's."""
    mine = Region.create(LAYOUT, UPDATE_SLOTS)
    offer = mine.offer("w0", server.incarnation)
    server._offer(offer)
    push(server, INITIAL, 0.0)
    for round in range(3):
        push(server, round, 1.0)
    aggregation = server.aggregation
    assert aggregation.version == 3
    average = float(aggregation.averaged()[0][0])
    assert average != 3.0
    server._xpub.sent.clear()
    for worker in (first, "late" if first != "late" else "e/ev"):
        server._subscribers[worker] += 1
        server._send_model(worker)
    assert server._xpub.models(b"w/late/") == [(3, 3.0)]
    assert server._xpub.models(b"e/ev/") == [(3, average)]


def test_an_evaluator_that_is_stuck_gets_the_average_too(server):
    push(server, INITIAL, 0.0)
    for round in range(3):
        push(server, round, 1.0)
    average = server.aggregation.averaged()[0]
    (event,) = server._data_events("e/ev")
    np.testing.assert_array_equal(event.data, average)
    (event,) = server._data_events("late")
    assert event.data[0] == 3.0


def test_the_initial_model_is_asked_for_less_and_less_often(server):
    """What was asked for may be on its way, over a slow link."""
    asked = {}
    for waited in (4, 6, 9, 11, 19, 21, 39, 41, 59, 61, 61):
        server._xpub.sent.clear()
        server._asked_at = time.monotonic() - waited
        server._ask_for_initial_model()
        asked[waited] = [messages.decode(frames[1]).TYPE for frames in server._xpub.sent]
    assert {waited for waited, sent in asked.items() if sent} == {6, 11, 21, 41, 61}
    assert all(sent in ([], ["want"]) for sent in asked.values())


def test_lines_of_workers_that_are_gone_are_forgotten(server):
    push(server, INITIAL, 0.0)
    server._delivery._window = 0  # everything waits
    for i in range(5):
        server._subscribers[f"d{i}"] += 1
    server._set_members(Members(2, {f"d{i}": i for i in range(5)}))
    for i in range(5):
        server._send_model(f"d{i}")
    assert len(server._delivery._lines) >= 5
    for i in range(5):  # first its connection goes, then it is evicted
        server._unsubscribed(f"d{i}")
    server._set_members(Members(3, {"w0": 0}))
    assert not [worker for worker in server._delivery._lines if worker.startswith("d")]


def test_a_chunk_that_is_missed_many_times_is_sent_once(server):
    push(server, INITIAL, 7.0)
    server._xpub.sent.clear()
    server._delivery.forget("w0")
    missing = [0] * 1000 + [-1, 5, 10**6, "0"]
    server._fetch(Fetch("w0", -1, version=0, missing=missing))
    assert server._xpub.models(b"w/w0/") == [(0, 7.0)]


def steady(worker):
    params = worker.start({"w": np.zeros(10, np.float32)})
    while not worker.stopped:
        worker.pause(0.005)
        params = worker.step({"w": params["w"] + np.float32(1)})
    return worker.round


@pytest.mark.parametrize("topic", [b"e/w0/", b"w/ev/"])
def test_a_stranger_s_subscription_under_another_s_name_starves_nobody(topic):
    config = RunConfig(mode="sync", workers=2, rounds=400, evaluate_every_s=0.05)
    with Cluster(config, "tcp") as cluster:
        seen = []

        def watch():
            with cluster.worker("ev", role="evaluator") as worker:
                for version, _, _ in worker.watch({"w": np.zeros(10, np.float32)}):
                    seen.append(version)
                    worker.report_accuracy(version, 0.5, 1.0, 0.0)

        evaluator = Thread(watch, "ev")
        cluster.workers.append(evaluator)
        evaluator.start()
        threads = [cluster.train(f"w{i}", steady, rank=i) for i in range(2)]
        deadline = time.monotonic() + 30
        while not seen or seen[-1] < 20:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        stranger = cluster.intruder(zmq.XSUB, "model")
        stranger.send(b"\x01" + topic)
        assert [thread.result(30) for thread in threads] == [400, 400]
        evaluator.result(30)
        assert seen[-1] == 400
        stranger.close(0)
        cluster.finish()


def test_a_flood_of_small_messages_does_not_stop_the_rounds():
    """Sent for as long as the run takes."""
    with Cluster(RunConfig(mode="sync", workers=1, rounds=100), "tcp") as cluster:
        over, sent = threading.Event(), []

        def flood():
            stranger = cluster.intruder(zmq.PUSH, "push", SNDTIMEO=100)
            frame = messages.encode(Have("nobody", 1, 1))
            while not over.is_set():
                with suppress(zmq.Again):  # the server takes no more than it looks at
                    stranger.send(frame)
                    sent.append(1)
            stranger.close()

        flooder = Thread(flood, "flood")
        flooder.start()
        try:
            assert cluster.train("w0", steady).result(50) == 100
        finally:
            over.set()
            flooder.join(10)
        assert len(sent) > 1000
        cluster.finish()


def test_without_a_barrier_a_run_of_two_servers_ends_though_workers_died_between_them():
    """The first server has their updates, and so all that it takes, before the second one has."""
    config = RunConfig(
        mode="async", workers=3, ps=2, rounds=20, heartbeat_s=1.0, shared_memory=False
    )
    with Cluster(config, "tcp") as cluster:
        dead = []

        def dies(worker):
            params = worker.start({"w": np.zeros(1000, np.float32)})
            worker._link._channels[1].push_chunk = lambda *args, **options: None
            worker._link._beat = lambda: None
            dead.append(worker.name)
            try:
                worker.step({"w": params["w"] + np.float32(1)})
            except EsyncError:
                pass

        def lives(worker):
            params = worker.start({"w": np.zeros(1000, np.float32)})
            while len(dead) < 2 or cluster.servers[0].thread.version < 2:
                worker.pause(0.01)
            while not worker.stopped:
                params = worker.step({"w": params["w"] + np.float32(1)})

        thread = cluster.train("lives", lives, rank=0)
        for i in range(2):
            cluster.train(f"d{i}", dies, rank=i + 1)
        thread.result(40)
        for worker in cluster.workers:
            worker.join(20)
        assert cluster.finish()["ended"] == "20 rounds"
