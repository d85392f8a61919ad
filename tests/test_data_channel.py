"""A parameter server's and a worker's ends of the data channel, with nothing between them that keeps time."""

from __future__ import annotations

import os

import numpy as np
import pytest
import zmq

from esync import messages, tensors, transport
from esync.compression import Compressor, Plain
from esync.config import RunConfig
from esync.messages import INITIAL, Fetch, Have, Members, Model, Offer, Update, Want
from esync.ps.backend import NumpyBackend
from esync.ps.server import TensorThread, Welcomed
from esync.seal import TO_SERVER, TO_WORKERS, Envelope
from esync.shared_memory import UPDATE_SLOTS, Region
from esync.tensors import DELTA, Layout, Leaf
from esync.worker.assembly import Shards
from esync.worker.channel import Address, Channel, Push
from tests.fuzz.fakes import Socket, connected

SIZE = 4


@pytest.fixture
def layout(monkeypatch):
    monkeypatch.setattr(tensors, "CHUNK_ELEMENTS", 2)
    return Layout((Leaf(DELTA, "w", (SIZE,), "float32"),)).cut(1, 2)


class Server:
    """A tensor thread that is not started, and what its subscribers have of its models."""

    def __init__(self, layout, workers=("a", "b"), key=b"", **run):
        self.layout, self.key = layout, key
        self.xpub = Socket(zmq.XPUB)
        config = RunConfig(chunk_mib=2, **run)
        self.thread = TensorThread(
            Socket(zmq.PULL),
            self.xpub,
            NumpyBackend(),
            config,
            lambda event: None,
            envelope=Envelope(key, "ps"),
        )
        self.thread._set_members(Members(1, dict.fromkeys(workers, 0), layout.to_wire()))
        self.models = {worker: {} for worker in workers}
        for worker in workers:
            self.thread._subscribers[worker] += 1
        for chunk in range(len(layout.chunks)):
            self.push(workers[0], INITIAL, chunk, 0.0)

    def gets(self, message, payload=None):
        envelope = Envelope(self.key, message.worker)
        frames = envelope.pack(messages.encode(message), payload, TO_SERVER)
        self.thread.handle([memoryview(frame).cast("B") for frame in frames])

    def push(self, worker, round, chunk, value):
        size = self.layout.chunks[chunk].size
        self.gets(
            Update(worker, round, chunk, self.layout.digest),
            np.full(size, value, np.float32).view(np.uint8),
        )

    def sent(self):
        """(worker, message, payload) of what was sent since this was last asked."""
        found = []
        for topic, *frames in self.xpub.sent:
            about = () if messages.decode(bytes(frames[0])).TYPE == "model" else (topic,)
            head, payload, _ = Envelope(self.key, "x").unpack(
                [memoryview(f) for f in frames], TO_WORKERS, *about
            )
            found.append((topic.decode()[2:-1], messages.decode(head), payload))
        self.xpub.sent.clear()
        return found

    def deliver(self, lost=()):
        for worker, message, payload in self.sent():
            if isinstance(message, Model) and (worker, message.chunk) not in lost:
                data = np.frombuffer(payload[0], np.float32).tolist()
                self.models[worker][message.chunk] = (message.version, data)
                self.gets(Have(worker, message.version, message.chunk))


@pytest.fixture
def serve():
    made = []

    def start(*arguments, **run):
        made.append(Server(*arguments, **run))
        return made[-1]

    yield start
    for server in made:
        server.thread.inbox.close()


def test_a_model_is_sealed_anew_when_the_state_server_came_back_with_another_key(serve):
    layout = Layout((Leaf(DELTA, "w", (SIZE,), "float32"),)).cut(1, 2)
    server = serve(layout, ("a",), os.urandom(32), mode="sync")
    server.deliver()
    server.key = os.urandom(32)
    server.thread._welcomed(Welcomed(Envelope(server.key, "ps")))
    server.gets(Fetch("a", -1))
    server.deliver()  # which it opens
    assert server.models["a"][0] == (0, [0.0] * SIZE)


def test_questions_that_waited_for_a_connection_are_answered_once(serve, layout):
    server = serve(layout, mode="sync")
    server.deliver()
    server.push("a", 0, 0, 1.0)
    server.thread._arrival["a"] -= 60
    for _ in range(20):
        server.gets(Fetch("a", 0, 0))
    assert [m.chunks for _, m, _ in server.sent() if isinstance(m, Want)] == [[1]]


@pytest.mark.parametrize("run", [{"mode": "fedasync"}, {"mode": "async", "dcasgd": True}])
def test_what_a_worker_was_sent_is_known_also_where_a_chunk_of_it_was_lost(serve, layout, run):
    server = serve(layout, lr=1.0, **run)
    server.deliver()
    for chunk in (0, 1):
        server.push("b", 0, chunk, 8.0)
    server.deliver()
    for chunk in (0, 1):
        server.push("a", 0, chunk, 0.0)
    server.deliver(lost={("a", 1)})
    server.push("b", 1, 0, 100.0)  # a part of the next update: the version stays
    server.thread._delivery.forget("a")
    server.gets(Fetch("a", 0, 0, 2, [1]))
    server.deliver()
    progress = server.thread.aggregation._progress["a"]
    had = server.models["a"]
    assert [(progress.sent_version, x.tolist()) for x in progress.sent] == [had[0], had[1]]


# A worker's end


@pytest.fixture
def channel(layout, monkeypatch):
    monkeypatch.setattr(transport, "push", connected)
    monkeypatch.setattr(transport, "sub", connected)
    memory = Region.create(layout, UPDATE_SLOTS)
    made = Channel(
        0,
        Address("tcp://127.0.0.1:1", "tcp://127.0.0.1:2", None),
        Shards(layout).assemblies[0],
        Compressor(Plain(), layout),
        layout.of_shard(0),
        worker="a",
        role="worker",
        memories=lambda: [memory],
        cuda=lambda: None,
        on_complete=lambda: None,
        on_error=pytest.fail,
        on_want=lambda *arguments: None,
        envelope=Envelope(b"", "a"),
        context=None,
        poller=_Poller(),
    )
    yield made
    made.close()


class _Poller:
    def register(self, *arguments):
        pass

    unregister = register


def test_an_update_in_shared_memory_is_not_taken_for_one_of_an_earlier_life(layout, channel):
    for life, value in (("first", 1.0), ("second", 2.0)):
        channel._meet(life)
        channel._on_offer(Offer("a", "", 0, -1, "", life))
        assert channel.puts
        flat = np.full(SIZE, value, np.float32)
        channel.push_chunk(Push(flat, (3,), (life,), 1, 1), 0, flat[:2], in_place=False)
        memory = channel._memory
        assert memory.chunk(0, 0).tolist() == [value, value]
        assert memory.stamps[0, 0] == 3


def test_what_came_after_the_end_is_asked_for_when_another_server_has_made_one_version_more(
    serve, layout
):
    """It learned a moment later that the run was over, and the workers send nothing again by themselves."""
    server = serve(layout)
    members = {"a": 0, "b": 1}
    server.thread._set_members(Members(2, members, last=0))
    for chunk in range(2):
        server.push("a", 0, chunk, 1.0)
    assert server.thread.counters["after-the-end"] == 2
    server.sent()
    server.thread._set_members(Members(3, members, last=1))
    wants = [(worker, m.round, m.chunks) for worker, m, _ in server.sent() if isinstance(m, Want)]
    assert wants == [("a", 0, [0, 1]), ("b", 0, [0, 1])]
    for worker in members:
        for chunk in range(2):
            server.push(worker, 0, chunk, 1.0)
    assert server.thread.version == 1
    server.sent()
    server.thread._set_members(Members(4, members, last=1))
    assert not [m for _, m, _ in server.sent() if isinstance(m, Want)]
