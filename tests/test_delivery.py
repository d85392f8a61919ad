"""Who is sent what next: windows, what is lost, what is stuck."""

from __future__ import annotations

import threading
import time
import weakref

import numpy as np
import pytest
import zmq

from esync import messages, tensors, transport
from esync.config import RunConfig
from esync.messages import Have
from esync.ps import delivery
from esync.ps.aggregation import Published
from esync.ps.delivery import LOST_S, STUCK_S, Delivery
from esync.worker import channel
from tests.cluster import Cluster

SIZE = 10


def chunks(version, count=6):
    return [Published(version, i, np.zeros(1, np.float32)) for i in range(count)]


def send(line, worker, now=0.0):
    """Hand over what may go; returns its chunks."""
    sent = []
    for event in line.next(worker):
        line.sent(worker, event, SIZE, now)
        sent.append((event.version, event.chunk))
    return sent


def filled(window, version=1, worker="w", now=0.0):
    line = Delivery(window)
    for event in chunks(version):
        line.put(worker, event, now)
    return line


def test_no_more_than_the_window_is_on_its_way():
    line = filled(3 * SIZE)
    assert send(line, "w") == [(1, 0), (1, 1), (1, 2)]
    assert send(line, "w") == []
    line.have("w", 1, 1, 0.0)  # and so the one before it
    assert send(line, "w") == [(1, 3), (1, 4)]
    line.have("w", 1, 4, 0.0)
    assert send(line, "w") == [(1, 5)]
    assert send(line, "w") == []


def test_a_chunk_larger_than_the_window_goes_alone():
    line = filled(SIZE // 2)
    assert send(line, "w") == [(1, 0)]
    line.have("w", 1, 0, 0.0)
    assert send(line, "w") == [(1, 1)]


def test_subscribers_do_not_wait_for_each_other():
    line = filled(SIZE)
    assert send(line, "w") == [(1, 0)]
    for event in chunks(1):
        line.put("v", event, 0.0)
    assert send(line, "v") == [(1, 0)]
    line.have("v", 1, 0, 0.0)
    assert send(line, "w") == []
    assert send(line, "v") == [(1, 1)]


@pytest.mark.parametrize("said", [(1, 5), (0, 0), (2, 1)])
def test_what_was_not_sent_is_not_believed(said):
    line = filled(2 * SIZE)
    send(line, "w")
    line.have("w", *said, 0.0)
    line.have("nobody", 1, 0, 0.0)
    assert send(line, "w") == []


def test_a_new_connection_begins_anew():
    line = filled(2 * SIZE)
    send(line, "w")
    line.forget("w")
    assert send(line, "w") == []
    line.put("w", chunks(1)[0], 0.0)
    assert send(line, "w") == [(1, 0)]


def test_what_is_on_its_way_is_lost_after_a_while_and_on_a_slow_link_after_a_longer_one():
    line = filled(SIZE)
    send(line, "w")
    assert line.is_busy("w", LOST_S)
    assert not line.is_busy("w", LOST_S + 0.1)
    for event in chunks(1):
        line.put("w", event, 3.0)
    send(line, "w", 3.0)
    assert line.is_busy("w", 3.0 + 2 * LOST_S)
    line.have("w", 1, 0, 6.0)
    assert send(line, "w", 6.0) == [(1, 1)]
    assert line.is_busy("w", 6.0 + 2 * LOST_S)
    assert not line.is_busy("w", 6.1 + 2 * LOST_S)


def test_who_misses_something_and_has_nothing_on_its_way_is_not_busy():
    line = Delivery()
    assert not line.is_busy("w", 0.0)
    line.put("w", chunks(1)[0], 0.0)
    assert not line.is_busy("w", 0.0)


def test_who_is_stuck_gets_the_newest_version_and_who_is_slow_gets_its_own():
    line = filled(2 * SIZE, worker="slow")
    for event in chunks(1):
        line.put("stuck", event, 0.0)
    for worker in ("slow", "stuck"):
        assert send(line, worker) == [(1, 0), (1, 1)]
    line.have("slow", 1, 0, STUCK_S - 1)
    assert send(line, "slow", STUCK_S - 1) == [(1, 2)]
    line.completed(2, lambda worker: chunks(2), STUCK_S + 0.1)
    for worker in ("slow", "stuck"):
        line.have(worker, 1, 1, STUCK_S + 1)
    assert send(line, "stuck", STUCK_S + 1) == [(2, 0), (2, 1)]
    assert send(line, "slow", STUCK_S + 1) == [(1, 3)]


def test_a_version_that_begins_to_be_sent_is_not_older_than_itself():
    line = filled(2 * SIZE, version=2)
    line.completed(2, lambda worker: pytest.fail("not an older one"), STUCK_S * 10)
    assert send(line, "w") == [(2, 0), (2, 1)]


def versions_waiting(line, worker):
    return sorted({event.version for event in line._lines[worker].waiting})


def publish(line, version, now, *workers):
    for worker in workers:
        for event in chunks(version):
            line.put(worker, event, now)
    line.completed(version, lambda worker: chunks(version), now)


def test_a_slow_subscriber_gets_the_version_that_it_has_begun_and_then_the_newest():
    """It takes 20 seconds for a version, and there is one a second."""
    line, got, now = Delivery(SIZE), [], 0.0
    for version in range(200):
        publish(line, version, now, "slow")
        assert len(versions_waiting(line, "slow")) <= 2
        if now % 4 == 0:
            for sent, chunk in send(line, "slow", now):
                line.have("slow", sent, chunk, now)
                got.append((sent, chunk))
                break
        now += 1.0
    whole = [got[i][0] for i in range(5, len(got), 6)]
    assert [chunk for _, chunk in got] == [i % 6 for i in range(len(got))], "version by version"
    assert all(len({v for v, _ in got[i : i + 6]}) == 1 for i in range(0, len(got) - 5, 6))
    assert whole[-1] > 150, "it is never far behind"


def test_a_stopped_subscriber_keeps_no_more_however_long_it_stays():
    line = Delivery(2 * SIZE)
    for version in range(1000):
        publish(line, version, float(version), "stopped")
        send(line, "stopped", float(version))
        assert len(versions_waiting(line, "stopped")) <= 2
    assert line._lines["stopped"].bytes == 2 * SIZE


def test_without_a_barrier_a_worker_gets_the_version_that_is_its_own():
    line = Delivery(SIZE)
    for event in chunks(1):
        line.put("own", event, 0.0)
    assert send(line, "own") == [(1, 0)]
    for version in range(2, 30):
        line.completed(version, lambda worker: pytest.fail("not its version"), 0.0, {"other"})
    assert versions_waiting(line, "own") == [1]
    for version in (30, 40, 50):  # it is sent more than it takes
        for event in chunks(version):
            line.put("own", event, 0.0)
        line.completed(version, lambda worker: chunks(version), 0.0, {"own"})  # noqa: B023
        assert versions_waiting(line, "own") == [1, version]
    line.completed(60, lambda worker: chunks(60), STUCK_S + 1, {"other"})
    assert versions_waiting(line, "own") == [60], "it is stuck"


# The real server


@pytest.mark.parametrize("mode", ["async", "fedasync"])
def test_without_a_barrier_a_slow_link_costs_no_worker_its_work(monkeypatch, mode):
    """The others' versions were sent after its own, and came in the middle of its next round, which was given up."""
    monkeypatch.setattr(tensors, "CHUNK_ELEMENTS", 100)
    monkeypatch.setattr(channel, "HAVE_S", 0.0)
    take = channel.Channel._on_model

    def slowly(self, header, payload):
        if self._worker == "slow":
            time.sleep(0.01)
        take(self, header, payload)

    monkeypatch.setattr(channel.Channel, "_on_model", slowly)
    rows = {"slow": [], "fast": []}
    config = RunConfig(mode=mode, workers=2, shared_memory=False, local_steps=1, chunk_mib=2)
    with Cluster(config, "tcp") as cluster:

        def loop(worker):
            worker.on_round(rows[worker.name].append)
            while cluster.ps.thread is None:
                time.sleep(0.01)
            cluster.ps.thread._delivery._window = 800  # two of twenty chunks
            params = worker.start({"w": np.zeros(2000, np.float32)})
            while not worker.stopped:
                time.sleep(0.15 if worker.name == "slow" else 0.01)
                params = worker.step({"w": params["w"] + np.float32(1)})
                if len(rows["slow"]) == 6:
                    cluster.state.stop("seen enough")

        for thread in [cluster.train(name, loop) for name in rows]:
            thread.result()
        cluster.finish()
    assert [row["late"] for row in rows["slow"][:6]] == [False] * 6


@pytest.mark.parametrize("shared", [False, True])
def test_stuck_subscribers_keep_a_window_s_worth_of_old_chunks_alive(monkeypatch, shared):
    """Six subscribers take nothing any more, one after the other, while 60 versions go by."""
    chunk, count, stuck = 1 << 16, 10, 6
    monkeypatch.setattr(tensors, "CHUNK_ELEMENTS", chunk)
    monkeypatch.setattr(delivery, "STUCK_S", 0.0)
    monkeypatch.setattr(transport, "HAVE_BYTES", 4 * chunk)
    alive: weakref.WeakValueDictionary[int, np.ndarray] = weakref.WeakValueDictionary()
    config = RunConfig(mode="sync", workers=2, rounds=70, shared_memory=shared, chunk_mib=2)
    with Cluster(config, "tcp") as cluster:
        most, strangers, ready = [], [], threading.Event()

        def loop(worker):
            params = worker.start({"w": np.zeros(chunk * count, np.float32)})
            ready.wait(20)
            while not worker.stopped:
                params = worker.step({"w": params["w"] + np.float32(1)})
                if worker.rank == 0 and worker.round % 8 == 0 and len(strangers) < stuck:
                    stranger = cluster.intruder(zmq.XSUB, "model", RCVHWM=1)
                    stranger.send(b"\x01" + f"w/stuck{len(strangers)}/".encode())
                    strangers.append(stranger)
                if worker.round > 60:
                    most.append(len(alive))

        threads = [cluster.train(f"w{i}", loop, rank=i) for i in range(2)]
        while cluster.ps.thread is None:
            time.sleep(0.01)
        lines = cluster.ps.thread._delivery
        lines._window, put = 3 * 4 * chunk, lines.put

        def watched(worker, event, now):
            alive[id(event.data)] = event.data
            put(worker, event, now)

        lines.put = watched
        ready.set()
        for thread in threads:
            thread.result()
        for stranger in strangers:
            stranger.close(0)
        cluster.finish()
    assert len(strangers) == stuck
    allowed = 2 * count + stuck * (3 + 1) + count
    assert max(most) <= allowed, "two models, the windows, one more model on its way"


def test_a_subscriber_that_takes_one_chunk_after_the_other_is_sent_all_of_them(monkeypatch):
    monkeypatch.setattr(tensors, "CHUNK_ELEMENTS", 1000)
    config = RunConfig(mode="sync", workers=1, rounds=3, chunk_mib=2)
    with Cluster(config, "tcp") as cluster:
        done = threading.Event()

        def loop(worker):
            params = worker.start({"w": np.zeros(9500, np.float32)})
            server = cluster.ps.thread
            server._delivery._window = 4000
            slow = cluster.intruder(zmq.SUB, "model", SUBSCRIBE=b"w/slow/")
            word = cluster.intruder(zmq.PUSH, "push")
            got = []
            while len(got) < 10:
                assert slow.poll(5000), f"only {got}"
                while slow.poll(100):
                    model = messages.decode(slow.recv_multipart()[1])
                    got.append(model.chunk)
                assert len(got) <= 10
                word.send(messages.encode(Have("slow", model.version, model.chunk)))
            assert got == list(range(10))
            slow.close()
            word.close()
            done.set()
            while not worker.stopped:
                params = worker.step(params)

        cluster.train("w0", loop).result()
        cluster.finish()
    assert done.is_set()


def test_what_is_no_message_coming_upstream_is_counted_and_nothing_else(monkeypatch):
    with Cluster(RunConfig(mode="sync", workers=1, rounds=200), "tcp") as cluster:

        def loop(worker):
            params = worker.start({"w": np.zeros(10, np.float32)})
            stranger = cluster.intruder(zmq.XSUB, "model")
            for frame in (b"\x02", b"\xff" * 100, messages.encode(Have("w0", 7, 7, True))):
                stranger.send(frame)
            server = cluster.ps.thread
            deadline = time.monotonic() + 10
            while server.counters["unexpected-type"] < 3:
                assert time.monotonic() < deadline, server.counters
                time.sleep(0.01)
            stranger.close(0)
            while not worker.stopped:
                params = worker.step(params)
            return worker.round

        assert cluster.train("w0", loop).result() == 200
        cluster.finish()
