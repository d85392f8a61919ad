"""Memory that workers and the parameter server of one machine share: mapping it, and what goes through it."""

from __future__ import annotations

import dataclasses
import gc
import mmap
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import zmq

from esync import messages, shared_memory, tensors
from esync.compression import Plain
from esync.config import RunConfig
from esync.errors import EsyncError
from esync.messages import INITIAL, Members, Model, Offer
from esync.ps.aggregation import Contribution, Mean
from esync.ps.backend import NumpyBackend
from esync.ps.server import TensorThread
from esync.shared_memory import MODEL_SLOTS, WRITING, Region, SharedMemoryError
from esync.tensors import DELTA, VALUE, Layout, Leaf
from esync.worker.assembly import Assembly
from esync.worker.channel import Channel, Push
from esync.worker.client import Worker
from tests.cluster import Cluster

pytestmark = pytest.mark.skipif(
    not shared_memory.SUPPORTED,
    reason="this system has no memfd (it takes Linux): sockets carry everything",
)
ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def layout(monkeypatch):
    monkeypatch.setattr(tensors, "CHUNK_ELEMENTS", 40)
    return Layout((Leaf(DELTA, "w", (100,), "float32"), Leaf(VALUE, "s", (50,), "float32")))


def vector(seed):
    return np.random.default_rng(seed).normal(size=150).astype(np.float32)


# Mapping


def test_what_the_owner_writes_is_read_by_who_maps_it_and_by_nobody_written(layout):
    mine = Region.create(layout, 2)
    theirs = Region.open(layout, 2, mine.offer("w", "x"))
    assert (theirs.stamps == WRITING).all()
    for chunk, at in enumerate(layout.chunks):
        mine.begin(1, chunk)[:] = vector(3)[at.start : at.stop]
        mine.finish(1, chunk, 7)
    assert theirs.holds(1, 7)
    assert not theirs.holds(0, 7)
    np.testing.assert_array_equal(theirs.whole(1), vector(3))
    mine.begin(1, 0)
    assert not theirs.holds(1, 7)
    with pytest.raises(ValueError, match="read-only"):
        theirs.whole(1)[0] = 1


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"boot": "another"}, "another machine"),
        ({"boot": ""}, "another machine"),
        ({"pid": 2**30}, "cannot open"),
        ({"fd": 999}, "cannot open"),
        ({"fd": 0}, "no memory of esync"),
        ({"token": "00" * 16}, "another token"),
    ],
)
def test_what_was_not_meant_is_not_mapped(layout, change, why):
    mine = Region.create(layout, 1)
    with pytest.raises(SharedMemoryError, match=why):
        Region.open(layout, 1, dataclasses.replace(mine.offer("w", "x"), **change))


def test_memory_of_another_size_or_that_may_shrink_is_not_mapped(layout):
    mine = Region.create(layout, 1)
    with pytest.raises(SharedMemoryError, match="bytes, not"):
        Region.open(layout, 2, mine.offer("w", "x"))
    size = mmap.PAGESIZE * 16
    fd = os.memfd_create(shared_memory.NAME)
    try:
        os.ftruncate(fd, size)
        offer = Offer("w", shared_memory.boot_id(), os.getpid(), fd, "", "x")
        with pytest.raises(SharedMemoryError, match="may shrink"):
            Region.open(layout, 1, offer)
    finally:
        os.close(fd)


def test_who_has_it_mapped_keeps_it_when_the_owner_is_gone_and_in_the_end_nothing_is_left(layout):
    before = set(os.listdir("/proc/self/fd"))
    mine = Region.create(layout, 1)
    theirs = Region.open(layout, 1, mine.offer("w", "x"))
    mine.begin(0, 0)[:] = 5
    del mine
    gc.collect()
    assert (theirs.chunk(0, 0) == 5).all()
    del theirs
    gc.collect()
    assert set(os.listdir("/proc/self/fd")) <= before


# A model kept in it


def push(server, layout, worker, round, flat):
    return [
        event
        for i, at in enumerate(layout.chunks)
        for event in server.receive(Contribution(worker, round, i, flat[at.start : at.stop]))
    ]


@pytest.mark.parametrize("moved_after", [0, 1, 2])
@pytest.mark.parametrize("outer", ["sgd", "nesterov", "adam"])
def test_a_model_in_shared_memory_is_the_one_that_it_would_be_elsewhere(layout, outer, moved_after):
    """Moved there before the first version, between two rounds, or in the middle of one."""
    servers = [Mean(layout, NumpyBackend(), RunConfig(outer=outer)) for _ in range(2)]
    region = Region.create(layout, MODEL_SLOTS)

    def move():
        assert servers[1].move_to(lambda version, chunk: region.begin(version % 2, chunk))

    if moved_after == 0:
        move()
    for server in servers:
        push(server, layout, "a", INITIAL, vector(0))
        server.set_members({"a": 0, "b": 1, "c": 2})
    if moved_after == 1:
        move()
    for round in range(4):
        for i, worker in enumerate("abc"):
            for server in servers:
                push(server, layout, worker, round, vector(3 * round + i + 1))
            if moved_after == 2 and round == i == 0:
                move()
        for chunk, (a, b) in enumerate(zip(servers[0].chunks, servers[1].chunks, strict=True)):
            np.testing.assert_array_equal(a, b)
            assert np.shares_memory(b, region.chunk((round + 1) % 2, chunk))


def test_a_sum_that_overflows_in_shared_memory_leaves_the_chunk_as_it_was(layout):
    server, region = Mean(layout, NumpyBackend(), RunConfig()), Region.create(layout, MODEL_SLOTS)
    server.move_to(lambda version, chunk: region.begin(version % 2, chunk))
    push(server, layout, "a", INITIAL, vector(0))
    server.set_members({"a": 0, "b": 1})
    huge = np.full(150, 3e38, np.float32)
    push(server, layout, "a", 0, huge)
    push(server, layout, "b", 0, huge)
    push(server, layout, "a", 0, huge)
    push(server, layout, "b", 0, huge)
    assert server.version == 1
    np.testing.assert_array_equal(np.concatenate(server.chunks), vector(0))


class Receiver:
    """A worker's view of a parameter server's memory."""

    def __init__(self, layout):
        self.mine = Region.create(layout, MODEL_SLOTS)
        self.layout, self.assembly = layout, Assembly(layout, Plain())
        self.assembly.served_by("x")
        self.assembly.share(Region.open(layout, MODEL_SLOTS, self.mine.offer("w", "x")))

    def write(self, version, chunks=None):
        for i in range(len(self.layout.chunks)) if chunks is None else chunks:
            at = self.layout.chunks[i]
            self.mine.begin(version % 2, i)[:] = vector(version)[at.start : at.stop]
            self.mine.finish(version % 2, i, version)

    def add(self, version, chunk, wire=False):
        at = self.layout.chunks[chunk]
        payload = memoryview(vector(version)[at.start : at.stop].tobytes()) if wire else None
        slot = -1 if wire else version % 2
        header = Model("x", version, chunk, self.layout.digest, slot=slot)
        return self.assembly.add(header, payload)


def test_a_version_in_shared_memory_is_read_where_it_lies(layout):
    it = Receiver(layout)
    it.write(4)
    results = [it.add(4, i) for i in range(len(layout.chunks))]
    assert results == [False] * (len(results) - 1) + [True]
    newest = it.assembly.newest
    assert newest.region is not None
    assert newest.intact()
    np.testing.assert_array_equal(np.concatenate(newest.parts), vector(4))
    it.write(6, [2])
    assert not newest.intact()


@pytest.mark.parametrize("first", ["wire", "shared"])
def test_a_version_that_comes_both_ways_is_put_together(layout, first):
    it = Receiver(layout)
    it.write(4)
    for i in range(len(layout.chunks)):
        it.add(4, i, wire=(i % 2 == 0) == (first == "wire"))
    assert it.assembly.version == 4
    np.testing.assert_array_equal(np.concatenate(it.assembly.newest.parts), vector(4))
    shared = [i for i in range(len(layout.chunks)) if (i % 2 == 0) != (first == "wire")]
    it.write(6, [i for i in range(len(layout.chunks)) if i not in shared])
    assert it.assembly.newest.intact()
    it.write(6, shared[:1])
    assert not it.assembly.newest.intact()


def test_chunks_of_a_memory_that_is_not_used_any_more_are_missing(layout):
    it = Receiver(layout)
    it.write(4)
    it.add(4, 0)
    it.add(4, 1, wire=True)
    it.assembly.share(None)
    assert it.assembly.missing() == (4, [i for i in range(len(layout.chunks)) if i != 1])
    assert not it.add(4, 0), "word of memory that is not known"
    for i in range(len(layout.chunks)):
        it.add(4, i, wire=True)
    assert it.assembly.newest.region is None
    np.testing.assert_array_equal(np.concatenate(it.assembly.newest.parts), vector(4))


# Real runs


def learner(target):
    def train(worker):
        params = worker.start({"w": np.zeros(1000, np.float32)})
        while not worker.stopped:
            params = worker.step({"w": params["w"] - np.float32(0.2) * (params["w"] - target)})
        return params["w"]

    return train


@pytest.mark.parametrize("mode", ["sync", "esync", "async", "fedasync", "fedavg"])
@pytest.mark.parametrize("kind", ["inproc", "tcp"])
def test_a_run_through_shared_memory_learns_what_one_over_sockets_does(mode, kind):
    finals = {}
    for shared in (True, False):
        config = RunConfig(mode=mode, workers=2, rounds=60, shared_memory=shared)
        with Cluster(config, kind) as cluster:
            threads = [cluster.train(f"w{i}", learner(np.float32(i)), rank=i) for i in range(2)]
            finals[shared] = [thread.result() for thread in threads]
            summary = cluster.finish()
            server = cluster.ps.thread
            assert server is not None
            assert server.counters.keys() <= {"after-the-end", "late", "early"}
            assert (server.bytes_shared > 0) == shared
            if shared and mode == "sync":  # all but what was sent before it was mapped
                assert server.bytes_shared > 0.8 * (server.bytes_up + server.bytes_down)
        assert summary["rounds"] >= 60
    if mode == "sync":
        for a, b in zip(finals[True], finals[False], strict=True):
            np.testing.assert_array_equal(a, b)


def test_workers_here_and_elsewhere_have_the_same_model(monkeypatch):
    """Of three workers one cannot be mapped: it uses the sockets, and all end with one model."""
    offer = Region.offer

    def elsewhere(self, worker, incarnation):
        made = offer(self, worker, incarnation)
        return dataclasses.replace(made, boot="another machine") if worker == "w1" else made

    monkeypatch.setattr(Region, "offer", elsewhere)
    with Cluster(RunConfig(mode="sync", workers=3, rounds=40)) as cluster:
        threads = [cluster.train(f"w{i}", learner(np.float32(i)), rank=i) for i in range(3)]
        finals = [thread.result() for thread in threads]
        cluster.finish()
    for final in finals:
        np.testing.assert_array_equal(final, finals[0])
    assert np.abs(finals[0] - 1.0).max() < 0.01


def test_a_worker_that_cannot_map_the_model_takes_its_offer_back(monkeypatch):
    real = Region.open.__func__

    def refuse(cls, layout, slots, offer):
        if slots == MODEL_SLOTS:
            raise SharedMemoryError("not here")
        return real(cls, layout, slots, offer)

    monkeypatch.setattr(Region, "open", classmethod(refuse))
    with Cluster(RunConfig(mode="sync", workers=2, rounds=40)) as cluster:
        threads = [cluster.train(f"w{i}", learner(np.float32(i)), rank=i) for i in range(2)]
        finals = [thread.result() for thread in threads]
        cluster.finish()
    np.testing.assert_array_equal(finals[0], finals[1])


def test_an_update_with_nan_is_refused_through_shared_memory_too():
    def diverge(worker):
        params = worker.start({"w": np.zeros(1000, np.float32)})
        while not worker.stopped:
            spoilt = params["w"].copy()
            spoilt[7] = np.nan
            params = worker.step({"w": spoilt})

    with Cluster(RunConfig(mode="sync", workers=2, rounds=20)) as cluster:
        good = cluster.train("w0", learner(np.float32(1)), rank=0)
        bad = cluster.train("w1", diverge, rank=1)
        with pytest.raises(EsyncError, match="NaN or infinity"):
            bad.result()
        assert np.isfinite(good.result()).all()
        cluster.finish()


@pytest.mark.processes
def test_nothing_is_left_behind_by_roles_that_are_killed(tmp_path):
    before = set(os.listdir("/dev/shm"))
    file = tmp_path / "c.toml"
    file.write_text(
        '[run]\nmodel = "mlp"\ndataset = "digits"\nduration_s = 600\n'
        '[state]\nbind = "tcp://127.0.0.1:*"\n'
        "[[workers]]\ncount = 2\nstep_time_s = 0.05\n"
    )
    command = [sys.executable, "-m", "esync.run.cli", str(file), "--runs", str(tmp_path / "runs")]
    process = subprocess.Popen(
        [*command, "--name", "it"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        cwd=ROOT,
    )
    pids: list[int] = []
    try:
        deadline = time.monotonic() + 90
        log = tmp_path / "runs" / "it" / "ps.jsonl"
        while not log.exists() or log.read_text().count('"round"') < 5:
            assert time.monotonic() < deadline, "no rounds"
            assert process.poll() is None
            time.sleep(0.1)
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text()
        pids = [int(pid) for pid in children.split()]
        assert len(pids) >= 4
        maps = Path(f"/proc/{pids[1]}/maps").read_text()
        assert f"/memfd:{shared_memory.NAME}" in maps
    finally:
        for pid in pids:
            os.kill(pid, signal.SIGKILL)
        process.send_signal(signal.SIGINT)
        process.wait(30)
    assert set(os.listdir("/dev/shm")) <= before


# What a review found


def steady(worker):
    params = worker.start({"w": np.zeros(1000, np.float32)})
    while not worker.stopped:
        params = worker.step({"w": params["w"] + np.float32(0.1)})
    return worker.round


def test_word_of_an_update_that_comes_too_late_is_passed_over(monkeypatch):
    """The barrier does not wait for w1, so its updates are often still on their way when it makes the next."""
    real = Mean.set_members

    def without_w1(self, ranks):
        return real(self, {w: r for w, r in ranks.items() if w != "w1"} or ranks)

    monkeypatch.setattr(Mean, "set_members", without_w1)
    monkeypatch.setattr(tensors, "CHUNK_ELEMENTS", 10)
    with Cluster(RunConfig(mode="sync", workers=2, rounds=300, chunk_mib=2)) as cluster:
        threads = [cluster.train(f"w{i}", steady, rank=i) for i in range(2)]
        for thread in threads:
            assert thread.result() > 200  # and no error
        cluster.finish()


def test_what_is_lost_while_a_worker_finds_its_model_overwritten_is_asked_for(monkeypatch):
    """w1 is evicted and comes back while it reads a model; what is sent to it meanwhile is lost."""
    lost, real_data, real_read = threading.Event(), Channel._on_data, Worker._read
    done = threading.Event()

    def lossy(self, frames):
        drop = lost.is_set() and self._worker == "w1"
        if not (drop and isinstance(messages.decode(frames[1].buffer), Model)):
            real_data(self, frames)

    def read(self, make):
        newest = self._shared.model.newest
        if self.name == "w1" and newest.version >= 10 and not done.is_set():
            done.set()
            lost.set()
            server = cluster.ps.thread
            server.inbox.put(Members(server._epoch, {"w0": 0}))
            while server.aggregation.version < newest.version + 10:
                assert not server.aggregation.missing("w0", -5)
            server.inbox.put(Members(server._epoch, {"w0": 0, "w1": 1}))
            while not server._members >= {"w1"}:
                pass
            lost.clear()
        return real_read(self, make)

    monkeypatch.setattr(Channel, "_on_data", lossy)
    monkeypatch.setattr(Worker, "_read", read)
    with Cluster(RunConfig(mode="sync", workers=2, rounds=200)) as cluster:
        threads = [cluster.train(f"w{i}", steady, rank=i) for i in range(2)]
        assert [thread.result() for thread in threads] == [200, 200]
        cluster.finish()
    assert done.is_set()


@pytest.mark.parametrize("shared", [True, False])
def test_a_stranger_that_unsubscribes_others_changes_nothing(shared):
    config = RunConfig(mode="sync", workers=2, rounds=2000, shared_memory=shared)
    with Cluster(config, "tcp") as cluster:
        began = threading.Event()

        def loop(worker):
            params = worker.start({"w": np.zeros(1000, np.float32)})
            while not worker.stopped:
                params = worker.step(params)
                if worker.round == 100:
                    began.set()
            return worker.round

        threads = [cluster.train(f"w{i}", loop, rank=i) for i in range(2)]
        assert began.wait(30)
        stranger = cluster.intruder(zmq.XSUB, "model")
        for topic in (b"w/w0/", b"w/w1/"):
            stranger.send(b"\x01" + topic)
            for first in (b"\x02", b"\x00", b"\x00", b"\x00", b"\x02"):
                stranger.send(first + topic)
        assert [thread.result() for thread in threads] == [
            2000,
            2000,
        ]  # at a second a round: not in time
        stranger.close(0)
        cluster.finish()


def test_memory_that_is_not_mapped_any_more_is_offered_again():
    with Cluster(RunConfig(mode="sync", workers=2, rounds=10**6)) as cluster:
        forgot, again = threading.Event(), threading.Event()

        def loop(worker):
            params = worker.start({"w": np.zeros(1000, np.float32)})
            while not worker.stopped:
                params = worker.step({"w": params["w"] + np.float32(0.1)})
                server = cluster.ps.thread
                if worker.rank == 1 and worker.round > 20 and not forgot.is_set():
                    del server._memories["w1"]
                    forgot.set()
                if forgot.is_set() and "w1" in server._memories and worker._link._channels[0].puts:
                    again.set()

        threads = [cluster.train(f"w{i}", loop, rank=i) for i in range(2)]
        assert again.wait(30)
        cluster.state.stop("seen enough")
        for thread in threads:
            thread.result()
        cluster.finish()


@pytest.mark.parametrize("ps", [1, 2])
def test_an_update_that_a_server_may_still_read_is_not_written_over(ps):
    """Of two servers one can have a worker's update for its round already when the worker begins that round."""
    with Cluster(RunConfig(mode="sync", workers=2, rounds=10**6, ps=ps)) as cluster:
        done = threading.Event()

        def again(worker):
            link, model = worker._link, worker._shared.model
            memory = link.buffer()
            assert memory is link._channels[0].whole.whole(0)
            stamps = link._channels[0].whole.stamps
            memory[:] = 1.0
            worker._push(Push(memory, model.begun, model.lives, 1, 64))
            while not (stamps == worker.round).all():
                time.sleep(0.001)
            other = link.buffer()
            assert not np.shares_memory(other, memory)
            other[:] = 2.0
            worker._push(Push(other, model.begun, model.lives, 1, 64))
            counters = [server.thread.counters for server in cluster.servers]
            while not all(c["double"] + c["late"] for c in counters):
                time.sleep(0.001)
            assert (memory == 1.0).all()
            assert (stamps == worker.round).all()

        def loop(worker):
            params = worker.start({"w": np.zeros(1000, np.float32)})
            while not worker.stopped:
                params = worker.step({"w": params["w"] + np.float32(0.1)})
                ready = worker.round > 20 and all(c.puts for c in worker._link._channels)
                if worker.rank == 1 and ready and not done.is_set():
                    again(worker)
                    done.set()

        threads = [cluster.train(f"w{i}", loop, rank=i) for i in range(2)]
        assert done.wait(30)
        cluster.state.stop("seen enough")
        for thread in threads:
            thread.result()
        cluster.finish()


def test_workers_that_come_and_go_leave_no_mapping_behind():
    with Cluster(RunConfig(mode="sync", workers=1, rounds=10**6)) as cluster:
        cluster.train("stays", steady)

        def visit(worker):
            params = worker.start({"w": np.zeros(1000, np.float32)})
            for _ in range(3):
                params = worker.step(params)

        for i in range(8):
            cluster.train(f"visitor{i}", visit).result()
        server = cluster.ps.thread
        deadline = time.monotonic() + 20
        while set(server._memories) != {"stays"}:
            assert time.monotonic() < deadline, server._memories.keys()
            time.sleep(0.01)
        cluster.state.stop("seen enough")
        cluster.finish()


def test_memory_that_the_system_does_not_give_leaves_no_descriptor(layout, monkeypatch):
    def refuse(*args, **kwargs):
        raise OSError(12, "Cannot allocate memory")

    monkeypatch.setattr(shared_memory.mmap, "mmap", refuse)
    before = os.listdir("/proc/self/fd")
    for _ in range(3):
        with pytest.raises(SharedMemoryError, match="Cannot allocate"):
            Region.create(layout, 1)
    assert os.listdir("/proc/self/fd") == before


def test_an_offer_that_is_lost_is_made_again(monkeypatch):
    """The server misses every worker's first offer."""
    real, missed = TensorThread._offer, set()

    def deaf(self, message):
        if message.worker in missed:
            real(self, message)
        missed.add(message.worker)

    monkeypatch.setattr(TensorThread, "_offer", deaf)
    with Cluster(RunConfig(mode="sync", workers=2, rounds=10**6)) as cluster:
        mapped = threading.Event()

        def loop(worker):
            params = worker.start({"w": np.zeros(1000, np.float32)})
            while not worker.stopped:
                params = worker.step({"w": params["w"] + np.float32(0.1)})
                if len(cluster.ps.thread._memories) == 2:
                    mapped.set()

        threads = [cluster.train(f"w{i}", loop, rank=i) for i in range(2)]
        assert mapped.wait(30)
        cluster.state.stop("seen enough")
        for thread in threads:
            thread.result()
        cluster.finish()
