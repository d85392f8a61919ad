"""Workers and a parameter server that hand each other memory of one GPU, on the stand-in for CuPy: with the servers,
sockets and threads of a real run. What JAX and CuPy lend each other is modelled too: JAX is on the CPU here."""

from __future__ import annotations

import dataclasses
import gc
import sys
import threading
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import zmq
from safetensors.numpy import load_file

from esync import device_memory, messages, shared_memory, tensors
from esync.compression import Plain
from esync.config import RunConfig
from esync.device_memory import DeviceMemoryError, on_host
from esync.errors import EsyncError
from esync.messages import Have, Members, Model
from esync.ps.aggregation import MODEL, Mean, Published
from esync.ps.backend import CupyBackend, NumpyBackend, backend_for
from esync.ps.checkpoint import CHECKPOINTS, Checkpoints, model_name
from esync.ps.server import TensorThread
from esync.ps.staging import Staging
from esync.shared_memory import MODEL_SLOTS, WRITING, Region
from esync.tensors import DELTA, VALUE, Layout, Leaf
from esync.worker import channel, pytree
from esync.worker.assembly import Assembly, Newest
from esync.worker.client import Worker
from tests.cluster import Cluster
from tests.cupy_stand_in import READ_ONLY, Gpu, stand_in

pytestmark = pytest.mark.skipif(
    not shared_memory.SUPPORTED,
    reason="this system has no memfd (it takes Linux): sockets carry everything",
)
SIZE = 1000


class Machine:
    """Two processes on one GPU: the parameter servers' threads are one, and the workers' the other.

    Attributes:
        of_servers, of_workers: CuPy, as either has it.
        index: the device on which the workers' JAX has its arrays.
        regions: where memory for sharing was allocated: (CuPy, address)
    """

    def __init__(self, monkeypatch):
        gpu = Gpu()
        self.of_servers, self.of_workers = stand_in(gpu), stand_in(gpu)
        self.index, self.regions, self.offered = 0, [], {}
        self.acting = None  # the process that all threads belong to
        for cupy in (self.of_servers, self.of_workers):
            self.record(cupy)
        monkeypatch.setitem(sys.modules, "cupy", self.of_servers)  # the backend's
        for name in ("_cupy", "unsupported", "from_jax", "lent_to_jax"):
            monkeypatch.setattr(device_memory, name, getattr(self, name.removeprefix("_")))
        monkeypatch.setattr(device_memory, "_offered", self)
        monkeypatch.setattr(pytree, "_InHostMemory", pytree._OnDevice)

    def record(self, cupy):
        runtime, real = cupy.cuda.runtime, cupy.cuda.runtime.malloc

        def malloc(size):
            address = real(size)
            self.regions.append((cupy, address))
            return address

        runtime.malloc = malloc

    @property
    def kept(self):
        """Of the memory for sharing, what is allocated still."""
        return [address for cupy, address in self.regions if address in cupy.memories]

    def cupy(self):
        if self.acting is not None:
            return self.acting
        name = threading.current_thread().name
        return self.of_workers if name.startswith(("w", "esync-link")) else self.of_servers

    def unsupported(self):
        return ""

    def from_jax(self, array):
        cupy = self.cupy()
        with cupy.cuda.Device(self.index):
            x = cupy.empty(array.shape, np.float32)
        x.now()[...] = np.asarray(array)
        return x

    def lent_to_jax(self, x):
        """The same memory, as on a GPU."""
        lent = jax.dlpack.from_dlpack(x.now())
        assert lent.unsafe_buffer_pointer() == x.now().ctypes.data
        return lent

    # Handles that were offered, by process.

    def add(self, handle):
        self.offered[handle] = self.cupy()

    def __contains__(self, handle):
        return self.offered.get(handle) is self.cupy()


@pytest.fixture
def machine(monkeypatch):
    return Machine(monkeypatch)


@pytest.fixture
def chunks(monkeypatch):
    """Several chunks for a small model."""
    monkeypatch.setattr(tensors, "CHUNK_ELEMENTS", 150)  # twice as many in runs of few workers


def learner(target):
    def train(worker):
        params = worker.start({"w": jnp.zeros(SIZE)})
        while not worker.stopped:
            params = worker.step({"w": params["w"] - 0.2 * (params["w"] - target)})
        return np.array(params["w"])

    return train


def lanes(cluster):
    """Worker -> how its updates come, at the run's end: device, host or sockets; and that of all servers."""
    found = []
    for server in cluster.servers:
        assert server.thread is not None
        memories = server.thread._memories
        found.append(
            {
                thread.name: "sockets"
                if thread.name not in memories
                else "host"
                if memories[thread.name].device is None
                else "device"
                for thread in cluster.workers
            }
        )
    assert all(each == found[0] for each in found)
    return found[0]


def run_of(workers=2, rounds=60, kind="inproc", device="cuda", **options):
    """(final models, lanes, the first server's thread) of a run."""
    config = RunConfig(workers=workers, rounds=rounds, **options)
    with Cluster(config, kind, device=device) as cluster:
        threads = [cluster.train(f"w{i}", learner(float(i)), rank=i) for i in range(workers)]
        finals = [thread.result() for thread in threads]
        cluster.finish()
        thread = cluster.ps.thread
        assert thread is not None
        assert thread.counters.keys() <= {"after-the-end", "late", "early", "no-shared-memory"}
        return finals, lanes(cluster), thread


def chunks_brought_back(cupy):
    return sum(cupy.schedule.brought_back)


DEVICE = {"w0": "device", "w1": "device"}


# A run


@pytest.mark.parametrize("kind", ["inproc", "tcp"])
@pytest.mark.parametrize("outer", ["sgd", "momentum", "adam"])
def test_a_run_through_device_memory_makes_the_model_that_one_over_sockets_does(
    machine, chunks, kind, outer
):
    through, used, thread = run_of(mode="sync", outer=outer, kind=kind)
    assert used == DEVICE
    moved = thread.bytes_up + thread.bytes_down
    assert thread.bytes_shared > 0.8 * moved, "all but what was sent before it was opened"
    assert chunks_brought_back(machine.of_servers) < 0.2 * moved, "models do not touch the host"
    assert chunks_brought_back(machine.of_workers) < 0.1 * moved
    assert machine.of_servers.schedule.pageable == 0
    over, used, _ = run_of(mode="sync", outer=outer, kind=kind, shared_memory=False)
    assert used == {"w0": "sockets", "w1": "sockets"}
    for a, b in zip(through, over, strict=True):
        np.testing.assert_array_equal(a, b)


def test_larger_chunks_make_the_same_model(machine, chunks):
    usual, used, thread = run_of(mode="sync")
    larger, used_too, one = run_of(mode="sync", chunk_mib=8)
    assert used == used_too == DEVICE
    assert len(one.layout.chunks) < len(thread.layout.chunks)
    for a, b in zip(usual, larger, strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("options", [{"mode": "esync"}, {"mode": "async"}, {"mode": "fedasync"}])
def test_other_modes_learn_through_it_too(machine, chunks, options):
    finals, used, thread = run_of(**options)
    assert used == DEVICE
    assert thread.bytes_shared > 0.3 * thread.bytes_up
    for final in finals:
        assert np.isfinite(final).all()
        assert 0.0 < final.mean() < 1.0


def test_compression_is_for_sockets_only(machine, chunks):
    finals, used, _ = run_of(mode="sync", compression="int8")
    assert used == DEVICE
    np.testing.assert_array_equal(finals[0], finals[1])
    assert np.abs(finals[0] - 0.5).max() < 0.05


def test_a_worker_that_overlaps_merges_on_the_device(machine, chunks):
    finals, used, thread = run_of(mode="esync", overlap=True, rounds=80)
    assert used == DEVICE
    assert chunks_brought_back(machine.of_workers) < 0.1 * (thread.bytes_up + thread.bytes_down)
    for final in finals:
        assert np.abs(final - 0.5).max() < 0.3


@pytest.mark.parametrize("ps", [2, 3])
def test_several_servers_read_their_parts_of_one_memory(machine, chunks, ps):
    through, used, _ = run_of(mode="sync", ps=ps)
    assert used == DEVICE
    over, _, _ = run_of(mode="sync", ps=ps, shared_memory=False)
    for a, b in zip(through, over, strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("devices", [("cuda", "cpu"), ("cuda:1", "cuda")])
def test_servers_on_different_devices_have_one_worker(machine, chunks, monkeypatch, devices):
    """The worker shares device memory with the one that is on its device; its updates are on the host for both."""
    left = [backend_for(device) for device in devices] * 2
    monkeypatch.setattr("esync.ps.server.backend_for", lambda device: left.pop(0))
    finals = {}
    for shared in (True, False):
        with Cluster(
            RunConfig(mode="sync", workers=2, rounds=60, ps=2, shared_memory=shared)
        ) as it:
            threads = [it.train(f"w{i}", learner(float(i)), rank=i) for i in range(2)]
            finals[shared] = [thread.result() for thread in threads]
            it.finish()
        brought = machine.of_workers.schedule.brought_back
        assert sum(brought) <= sum(each.thread.bytes_up for each in it.servers), "updates, once"
        brought.clear()
        for device, each in zip(devices, it.servers, strict=True):
            there = {w: m.device is not None for w, m in each.thread._memories.items()}
            assert there == dict.fromkeys(("w0", "w1") if shared else (), device == "cuda")
    for a, b in zip(finals[True], finals[False], strict=True):
        np.testing.assert_array_equal(a, b)


def test_what_a_worker_has_of_a_model_is_its_own(machine, chunks):
    """It keeps every model that it was given; none changes when the server goes on."""

    def hoard(worker):
        params, given = worker.start({"w": jnp.zeros(SIZE)}), []
        while not worker.stopped:
            given.append((params["w"], np.array(params["w"])))
            params = worker.step({"w": params["w"] + 1.0})
        return given

    with Cluster(RunConfig(mode="sync", workers=1, rounds=40), device="cuda") as cluster:
        given = cluster.train("w0", hoard, rank=0).result()
        cluster.finish()
        assert lanes(cluster) == {"w0": "device"}
    assert len(given) >= 40
    for array, then in given:
        np.testing.assert_array_equal(array, then)


def test_a_vector_on_the_device_is_exchanged_there_by_one_copy(machine, chunks, monkeypatch):
    copies, real = [], channel.put
    monkeypatch.setattr(channel, "put", lambda x, to: (copies.append(to), real(x, to)))

    def exchange(worker):
        worker.start({"w": jnp.zeros(SIZE)})
        update, sums, kinds = machine.from_jax(jnp.ones(SIZE)), [], set()
        while not worker.stopped:
            parts = worker.exchange(update)
            kinds.add(type(parts[0]))
            sums.append(np.concatenate([on_host(part) for part in parts]))
        return sums, kinds

    with Cluster(RunConfig(mode="sync", workers=1, rounds=30), device="cuda") as cluster:
        sums, kinds = cluster.train("w0", exchange, rank=0).result()
        cluster.finish()
    assert kinds >= {machine.of_workers.ndarray}
    assert len(copies) < 20, "chunk by chunk only until the server has opened the memory"
    for i, model in enumerate(sums[:30]):
        np.testing.assert_array_equal(model, np.full(SIZE, i + 1.0, np.float32))


def test_what_is_saved_is_the_model_on_the_device(machine, chunks, tmp_path):
    config = RunConfig(mode="sync", workers=2, rounds=40)
    with Cluster(config, "tcp", tmp_path, device="cuda") as cluster:
        threads = [cluster.train(f"w{i}", learner(float(i)), rank=i) for i in range(2)]
        finals = [thread.result() for thread in threads]
        cluster.finish()
        assert lanes(cluster) == DEVICE
    (saved,) = load_file(tmp_path / "run" / model_name(0, 1)).values()
    np.testing.assert_array_equal(saved, finals[0])
    kept = Checkpoints(tmp_path / "run" / CHECKPOINTS, 3).latest(print)
    assert kept.version == 40
    np.testing.assert_array_equal(np.concatenate(kept.arrays[MODEL]), finals[0])


def test_an_update_with_nan_is_refused_through_device_memory_too(machine, chunks):
    def diverge(worker):
        params = worker.start({"w": jnp.zeros(SIZE)})
        while not worker.stopped:
            spoilt = params["w"].at[7].set(jnp.nan) if worker.round > 10 else params["w"]
            params = worker.step({"w": spoilt})

    with Cluster(RunConfig(mode="sync", workers=2, rounds=30), device="cuda") as cluster:
        good = cluster.train("w0", learner(1.0), rank=0)
        bad = cluster.train("w1", diverge, rank=1)
        with pytest.raises(EsyncError, match="NaN or infinity"):
            bad.result()
        assert np.isfinite(good.result()).all()
        cluster.finish()
        assert lanes(cluster)["w0"] == "device"


# Where it cannot be used


@pytest.mark.parametrize("side", ["of_servers", "of_workers"])
@pytest.mark.parametrize("call", ["ipcOpenMemHandle", "ipcGetMemHandle", "malloc"])
def test_memory_of_the_host_is_next_best(machine, chunks, side, call):
    """A handle that cannot be opened, or made, and a device that is full."""
    cupy = getattr(machine, side)
    setattr(cupy.cuda.runtime, call, lambda *args: _raise(cupy))
    finals, used, thread = run_of(mode="sync")
    assert used == {"w0": "host", "w1": "host"}
    assert thread.bytes_shared > 0.5 * (thread.bytes_up + thread.bytes_down)
    np.testing.assert_array_equal(finals[0], finals[1])
    assert not machine.of_servers.opened
    assert not machine.of_workers.opened


def _raise(cupy):
    raise cupy.cuda.runtime.CUDARuntimeError("cudaErrorUnknown")


def test_workers_on_another_device_than_the_server_s_use_memory_of_the_host(machine, chunks):
    machine.index = 1
    _, used, _ = run_of(mode="sync")
    assert used == {"w0": "host", "w1": "host"}
    assert not machine.regions, "nothing is allocated for nobody"


def test_what_was_brought_to_the_device_is_not_kept_for_the_round(machine, chunks, monkeypatch):
    """It is not in its sender's memory, but in the server's: as much as a model for each worker."""
    machine.index, lasting, real = 1, [], Mean.take

    def take(self, update):
        lasting.append(update.lasts)
        return real(self, update)

    monkeypatch.setattr(Mean, "take", take)
    _, used, thread = run_of(mode="sync", rounds=20)
    assert used == {"w0": "host", "w1": "host"}
    assert thread.bytes_shared > 0
    assert lasting
    assert not any(lasting)


@pytest.mark.parametrize("mode", ["sync", "async"])
@pytest.mark.parametrize("pins", [True, False])
def test_a_device_itself_moves_what_is_in_shared_memory(machine, chunks, monkeypatch, pins, mode):
    machine.index = 1
    if not pins:
        runtime = machine.of_servers.cuda.runtime
        monkeypatch.setattr(runtime, "hostRegister", lambda *args: _raise(machine.of_servers))
    loaded, brought = [], []
    copied, host = Staging._copied, Staging.host

    def count_loaded(self, x, event):
        loaded.append(machine.of_servers.registered.keys() and event is self._moved)
        return copied(self, x, event)

    def count_brought(self, x):
        brought.append(x.size)
        return host(self, x)

    monkeypatch.setattr(Staging, "_copied", count_loaded)
    monkeypatch.setattr(Staging, "host", count_brought)
    finals, used, thread = run_of(mode=mode, rounds=60)
    assert used == {"w0": "host", "w1": "host"}
    if not pins:
        assert not any(loaded)
    elif mode == "sync":
        assert sum(map(bool, loaded)) > 0.5 * len(loaded)
        assert sum(brought) < 0.5 * 60 * SIZE
    else:
        assert any(loaded)
    if mode == "sync":
        over, _, _ = run_of(mode=mode, rounds=60, shared_memory=False)
        for a, b in zip(finals, over, strict=True):
            np.testing.assert_array_equal(a, b)
    del thread
    gc.collect()
    assert not machine.of_servers.registered


def test_workers_without_cupy_use_memory_of_the_host(machine, chunks, monkeypatch):
    def unsupported():
        return "CuPy is not installed" if machine.cupy() is machine.of_workers else ""

    monkeypatch.setattr(device_memory, "unsupported", unsupported)
    _, used, _ = run_of(mode="sync")
    assert used == {"w0": "host", "w1": "host"}
    assert not machine.regions


def test_a_server_on_the_cpu_does_not_know_of_devices(machine, chunks, monkeypatch):
    runtime, pinned = machine.of_workers.cuda.runtime, []
    real = runtime.hostRegister

    def register(address, size, flags):
        pinned.append(flags)
        real(address, size, flags)

    monkeypatch.setattr(runtime, "hostRegister", register)
    _, used, thread = run_of(mode="sync", device="cpu")
    assert used == {"w0": "host", "w1": "host"}
    assert not machine.regions
    assert not machine.of_servers.registered
    brought = sum(machine.of_workers.schedule.brought_back)
    assert brought > 0.9 * thread.bytes_up, "an update leaves the device by one copy"
    # Each worker pins its own memory, and both slots of the server's, for its device.
    assert sorted(pinned) == [0, 0, *[READ_ONLY] * 4]
    gc.collect()
    assert not machine.of_workers.registered
    assert thread.bytes_shared > 0.5 * (thread.bytes_up + thread.bytes_down)


def test_workers_of_all_kinds_have_one_model(machine, chunks, monkeypatch):
    """The server cannot open w1's handle, and cannot map w2's memory at all."""
    real = Region.offer

    def offer(self, worker, incarnation):
        made = real(self, worker, incarnation)
        if threading.current_thread().name != "esync-link":
            return made
        if worker == "w1" and made.handle:
            made.handle = bytes(64)
        return dataclasses.replace(made, boot="another") if worker == "w2" else made

    monkeypatch.setattr(Region, "offer", offer)
    finals, used, _ = run_of(mode="sync", workers=3)
    assert used == {"w0": "device", "w1": "host", "w2": "sockets"}
    over, _, _ = run_of(mode="sync", workers=3, shared_memory=False)
    for final in (*finals, *over):
        np.testing.assert_array_equal(final, finals[0])


def test_an_update_on_the_device_goes_over_sockets_if_the_server_forgot_the_memory(machine, chunks):
    forgot, again = threading.Event(), threading.Event()
    with Cluster(RunConfig(mode="sync", workers=2, rounds=10**6), device="cuda") as cluster:

        def loop(worker):
            params = worker.start({"w": jnp.zeros(SIZE)})
            while not worker.stopped:
                params = worker.step({"w": params["w"] + 1.0})
                if not worker.stopped:
                    np.testing.assert_array_equal(params["w"], float(worker.round))
                server = cluster.ps.thread
                assert server is not None
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
        assert lanes(cluster)["w1"] == "device"


# What is overwritten


def test_a_chunk_that_is_being_added_up_is_stamped_so_before(machine, chunks, monkeypatch):
    real, seen = CupyBackend.stepped, []

    def stepped(self, base, scale, xs, weights, out=None):
        region = cluster.ps.thread._in_place
        for slot, chunk in np.ndindex(*region.stamps.shape) if region and out is not None else ():
            if region.chunk(slot, chunk).data.ptr == out.data.ptr:
                seen.append(region.stamps[slot, chunk])
        return real(self, base, scale, xs, weights, out)

    monkeypatch.setattr(CupyBackend, "stepped", stepped)
    with Cluster(RunConfig(mode="sync", workers=2, rounds=30), device="cuda") as cluster:
        threads = [cluster.train(f"w{i}", learner(float(i)), rank=i) for i in range(2)]
        for thread in threads:
            thread.result()
        cluster.finish()
    assert len(seen) > 30
    assert set(seen) == {WRITING}


@pytest.mark.parametrize("options", [{}, {"outer": "adam"}, {"weights": "samples"}])
def test_chunks_that_come_together_are_looked_at_together(machine, chunks, monkeypatch, options):
    updates, take, settle, seen = TensorThread._updates, Mean.take, Mean.settle, []

    def late(thread):
        time.sleep(0.01)  # so that several words are there
        updates(thread)

    def counted(call):
        def called(mean, *update):
            waits = machine.of_servers.schedule.waits
            events = call(mean, *update)
            final = sum(isinstance(event, Published) for event in events)
            waits = machine.of_servers.schedule.waits - waits
            seen.append((call, mean.version, final, waits))
            return events

        return called

    monkeypatch.setattr(TensorThread, "_updates", late)
    monkeypatch.setattr(Mean, "take", counted(take))
    monkeypatch.setattr(Mean, "settle", counted(settle))
    through, used, _ = run_of(mode="sync", rounds=20, **options)
    assert used == DEVICE
    assert max(final for call, _, final, _ in seen if call is settle) > 1
    for call, version, final, waits in seen:
        if (
            version > 0 or call is settle
        ):  # else it is the initial model, each of whose chunks is looked at
            assert waits == (final > 0)
    over, _, _ = run_of(mode="sync", rounds=20, shared_memory=False, **options)
    for a, b in zip(through, over, strict=True):
        np.testing.assert_array_equal(a, b)


def test_what_waits_for_a_slow_subscriber_stays_what_it_is(machine, chunks):
    """Its model comes over a socket, a chunk at a time, while the server goes on in the memory where it was."""
    got = []

    def loop(worker):
        def train():
            return worker.step({"w": params["w"] + 1.0})

        params = worker.start({"w": jnp.zeros(SIZE)})
        while not worker._link._channels[0].puts:
            params = train()
        cluster.ps.thread._delivery._window = 1200
        slow = cluster.intruder(zmq.SUB, "model", SUBSCRIBE=b"w/slow/")
        word = cluster.intruder(zmq.PUSH, "push")
        while len(got) < 8:
            for _ in range(5):
                params = train()
            if slow.poll(50):
                _, header, data = slow.recv_multipart()
                model = messages.decode(header)
                got.append((model.version, np.frombuffer(data, np.float32)))
                word.send(messages.encode(Have("slow", model.version, model.chunk)))
        slow.close()
        word.close()

    with Cluster(RunConfig(mode="sync", workers=1, rounds=10**6), "tcp", device="cuda") as cluster:
        cluster.train("w0", loop, rank=0).result()
        assert cluster.ps.thread._in_place is not None
    for version, data in got:
        np.testing.assert_array_equal(data, np.float32(version))


@pytest.fixture
def layout(monkeypatch):
    monkeypatch.setattr(tensors, "CHUNK_ELEMENTS", 40)
    return Layout((Leaf(DELTA, "w", (100,), "float32"), Leaf(VALUE, "s", (50,), "float32")))


def vector(seed):
    return np.random.default_rng(seed).normal(size=150).astype(np.float32)


class Receiver:
    """A worker's view of a parameter server's memory of a device."""

    def __init__(self, machine, layout):
        self.mine = device_memory.shared(layout, MODEL_SLOTS, 0)
        offer = self.mine.offer("w", "x")
        machine.acting = machine.of_workers
        self.layout, self.assembly = layout, Assembly(layout, Plain())
        self.assembly.served_by("x")
        self.assembly.share(device_memory.opened(layout, MODEL_SLOTS, offer, 0))
        machine.acting = None

    def write(self, version, chunks=None):
        for i in range(len(self.layout.chunks)) if chunks is None else chunks:
            at = self.layout.chunks[i]
            device_memory.put(vector(version)[at.start : at.stop], self.mine.begin(version % 2, i))
            self.mine.finish(version % 2, i, version)

    def add(self, version, chunk, wire=False):
        at = self.layout.chunks[chunk]
        payload = memoryview(vector(version)[at.start : at.stop].tobytes()) if wire else None
        slot = -1 if wire else version % 2
        return self.assembly.add(Model("x", version, chunk, self.layout.digest, slot=slot), payload)


def test_a_version_in_device_memory_is_one_array_until_it_is_overwritten(machine, layout):
    it = Receiver(machine, layout)
    it.write(4)
    results = [it.add(4, i) for i in range(len(layout.chunks))]
    assert results == [False] * (len(results) - 1) + [True]
    newest = it.assembly.newest
    (part,) = newest.parts
    np.testing.assert_array_equal(part.now(), vector(4))
    assert newest.intact()
    it.write(6, [2])
    assert not newest.intact()


def test_a_version_that_comes_both_ways_is_brought_to_the_host(machine, layout):
    it = Receiver(machine, layout)
    it.write(4)
    for i in range(len(layout.chunks)):
        it.add(4, i, wire=i % 2 == 0)
    newest = it.assembly.newest
    assert all(isinstance(part, np.ndarray) for part in newest.parts)
    np.testing.assert_array_equal(np.concatenate(newest.parts), vector(4))
    it.write(6, [0])
    assert newest.intact(), "that chunk came over the socket"
    it.write(6, [1])
    assert not newest.intact()


@pytest.mark.parametrize("readable", [True, False])
def test_of_a_server_that_is_gone_the_model_is_kept_if_it_can_be_read(machine, layout, readable):
    it = Receiver(machine, layout)
    it.write(4)
    for i in range(len(layout.chunks)):
        it.add(4, i)
    if not readable:
        it.assembly.newest.parts[0].get = lambda **how: _raise(machine.of_servers)
    it.assembly.served_by("y")
    assert it.assembly.version == -1
    if readable:
        np.testing.assert_array_equal(np.concatenate(it.assembly.newest.parts), vector(4))
    else:
        assert it.assembly.newest is None


def test_a_worker_nobody_waits_for_sees_that_its_model_was_overwritten(
    machine, chunks, monkeypatch
):
    """w1 is evicted while it reads a model, comes back when that is overwritten, and ends with the model of w0."""
    real_read, real_intact, done, torn = Worker._read, Newest.intact, threading.Event(), []

    def read(self, make):
        def slowly(parts):
            made = make(parts)
            newest = self._shared.model.newest
            if self.name == "w1" and newest.version >= 10 and not done.is_set():
                assert newest.is_shared
                done.set()
                server = cluster.ps.thread
                server.inbox.put(Members(server._epoch, {"w0": 0}))
                while server.aggregation.version < newest.version + 10:
                    time.sleep(0.001)
                server.inbox.put(Members(server._epoch, {"w0": 0, "w1": 1}))
            return made

        return real_read(self, slowly)

    def intact(self):
        whole = real_intact(self)
        if not whole:
            torn.append(self.version)
        return whole

    monkeypatch.setattr(Worker, "_read", read)
    monkeypatch.setattr(Newest, "intact", intact)
    with Cluster(RunConfig(mode="sync", workers=2, rounds=100), device="cuda") as cluster:
        threads = [cluster.train(f"w{i}", learner(float(i)), rank=i) for i in range(2)]
        finals = [thread.result() for thread in threads]
        cluster.finish()
    assert done.is_set()
    assert torn
    np.testing.assert_array_equal(finals[0], finals[1])


# What is left


def test_workers_that_come_and_go_leave_nothing_open(machine, chunks):
    with Cluster(RunConfig(mode="sync", workers=1, rounds=10**6), device="cuda") as cluster:
        cluster.train("w-stays", learner(1.0))

        def visit(worker):
            params = worker.start({"w": jnp.zeros(SIZE)})
            while not worker._link._channels[0].puts:
                params = worker.step(params)

        for i in range(5):
            cluster.train(f"w-visitor{i}", visit).result()
        server = cluster.ps.thread
        assert server is not None
        deadline = time.monotonic() + 20
        there = machine.of_servers.opened, machine.of_servers.registered
        while set(server._memories) != {"w-stays"} or len(there[0]) > 1 or there[1]:
            assert time.monotonic() < deadline, (server._memories, there)
            time.sleep(0.01)
        cluster.state.stop("seen enough")
        cluster.finish()
        assert server._memories["w-stays"].device is not None


def test_memory_of_the_host_is_pinned_as_long_as_a_worker_is_there(machine, chunks):
    machine.index = 1
    with Cluster(RunConfig(mode="sync", workers=1, rounds=10**6), device="cuda") as cluster:
        cluster.train("w-stays", learner(1.0))
        pinned, ours = machine.of_servers.registered, MODEL_SLOTS + 1

        def visit(worker):
            params = worker.start({"w": jnp.zeros(SIZE)})
            while len(pinned) < ours + 1:
                params = worker.step(params)

        deadline = time.monotonic() + 20
        for i in range(5):
            cluster.train(f"w-visitor{i}", visit).result()
            while len(pinned) > ours:
                assert time.monotonic() < deadline, pinned
                time.sleep(0.01)
        assert len(pinned) == ours
        cluster.state.stop("seen enough")
        cluster.finish()


def test_after_a_run_nothing_is_allocated_or_open(machine, chunks):
    _, used, thread = run_of(mode="sync", rounds=30)
    assert used == DEVICE
    assert len(machine.kept) >= 1
    del thread
    gc.collect()
    assert not machine.kept
    assert not machine.of_servers.opened
    assert not machine.of_workers.opened


# The pieces


def test_memory_of_a_device_is_offered_with_its_stamps(machine, layout):
    mine = device_memory.shared(layout, 2, 1)
    offer = mine.offer("w", "x")
    assert offer.device == device_memory.uuid_of(1)
    machine.acting = machine.of_workers
    for index, here in ((0, device_memory.uuid_of(0)), (None, "none")):
        with pytest.raises(DeviceMemoryError, match=f"on the CUDA device .*, not on {here}"):
            device_memory.opened(layout, 2, offer, index)
    theirs = device_memory.opened(layout, 2, offer, 1)
    part = theirs.part(range(1, 3))
    device_memory.put(vector(1), theirs.whole(1))
    mine.finish(1, 2, 7)
    assert part.stamps[1, 1] == 7
    at = layout.chunks[2]
    np.testing.assert_array_equal(part.chunk(1, 1).now(), vector(1)[at.start : at.stop])
    assert theirs.offer("w", "x").handle == b"", "only its owner can offer it"


@pytest.mark.parametrize("on_device", [True, False])
def test_a_chunk_is_told_from_its_copy(machine, layout, on_device):
    mine = device_memory.shared(layout, 2, 0) if on_device else Region.create(layout, 2)
    backend = CupyBackend() if on_device else NumpyBackend()
    assert mine.lends(1, 2, mine.chunk(1, 2))
    assert not mine.lends(0, 2, mine.chunk(1, 2))
    assert not mine.lends(1, 2, backend.copied(mine.chunk(1, 2)))


def test_memory_is_unpinned_when_what_is_copied_from_it_has_been(machine, layout):
    region, backend = Region.create(layout, 2), backend_for("cuda:1")
    region.whole(1)[:] = vector(3)
    device_memory.pinned(region, 1, waits=False)
    assert len(machine.of_servers.registered) == 2
    there = [backend.load(region.chunk(1, i), pinned=True) for i in range(len(layout.chunks))]
    assert np.isnan(there[0].now()).all(), "the stand-in has not copied yet"
    region.pin = None
    assert not machine.of_servers.registered
    np.testing.assert_array_equal(np.concatenate([x.now() for x in there]), vector(3))


def test_where_one_slot_cannot_be_pinned_none_is(machine, layout, monkeypatch):
    runtime, calls = machine.of_servers.cuda.runtime, []
    real = runtime.hostRegister

    def register(*arguments):
        calls.append(arguments)
        _raise(machine.of_servers) if len(calls) == 2 else real(*arguments)

    monkeypatch.setattr(runtime, "hostRegister", register)
    region = device_memory.pinned(Region.create(layout, 2), 0)
    assert len(calls) == 2
    assert region.pin is None
    assert not machine.of_servers.registered


def test_a_vector_is_put_from_and_to_any_memory(machine):
    cupy = machine.of_servers
    source = vector(1)
    here, there, other = (
        np.empty(150, np.float32),
        cupy.empty(150, np.float32),
        cupy.empty(150, np.float32),
    )
    device_memory.put(source, there)
    np.testing.assert_array_equal(there.now(), source)
    device_memory.put(there, other)
    np.testing.assert_array_equal(other.now(), source)
    device_memory.put(other, here)
    np.testing.assert_array_equal(here, source)
    assert on_host(here) is here
    with pytest.raises(DeviceMemoryError, match="expected float32 without gaps"):
        device_memory.put(source.astype(np.float64), there)


def test_device_memory_that_cannot_be_read_is_said_to_be_so(machine):
    x = machine.of_servers.empty(3, np.float32)
    x.get = lambda **how: _raise(machine.of_servers)
    with pytest.raises(DeviceMemoryError, match="cannot be read"):
        on_host(x)
