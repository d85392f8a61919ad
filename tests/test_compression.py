"""How deltas are encoded for the wire, what is lost, and that all who receive it have the same model."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from esync import tensors
from esync.compression import (
    COMPRESSIONS,
    PLAIN,
    BFloat16,
    Compressor,
    Decoder,
    Int8,
    Plain,
    TopK,
)
from esync.config import RunConfig
from esync.errors import ConfigError
from esync.messages import INITIAL, MessageError, Model
from esync.ps.aggregation import Contribution, Mean, Published
from esync.ps.backend import NumpyBackend
from esync.tensors import DELTA, VALUE, Layout, Leaf
from esync.worker.assembly import Assembly
from tests.cluster import Cluster

ENCODINGS = [Plain(), BFloat16(), Int8(), TopK(0.1)]
every_encoding = pytest.mark.parametrize("encoding", ENCODINGS, ids=lambda e: e.name)
LOSSY = ("bf16", "int8", "topk")
every_lossy = pytest.mark.parametrize("compression", LOSSY)
floats = st.floats(-(2.0**127), 2.0**127, width=32, allow_subnormal=False)
vectors = arrays(np.float32, st.integers(1, 200), elements=floats)
property_test = settings(
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)


def round_trip(encoding, x, key=(0,)):
    payload = memoryview(encoding.encode(x, key))
    assert payload.nbytes == encoding.size(x.size)
    return encoding.decode(payload, x.size)


# What is lost


@property_test
@given(vectors)
def test_plain_loses_nothing_and_copies_nothing(x):
    assert np.shares_memory(round_trip(Plain(), x), x)


@property_test
@given(arrays(np.float32, 50, elements=floats))
def test_bf16_is_off_by_at_most_one_part_in_256(x):
    decoded = round_trip(BFloat16(), x).astype(np.float64)
    assert (np.abs(decoded - x) <= np.abs(x.astype(np.float64)) / 256).all()


@property_test
@given(vectors, st.integers(0, 2**32))
def test_int8_is_off_by_at_most_a_level(x, seed):
    level = float(np.abs(x).max()) / 127
    decoded = round_trip(Int8(), x, (seed,)).astype(np.float64)
    assert (np.abs(decoded - x) <= level * (1 + 1e-4) + 127e-37).all()


def test_int8_s_error_is_zero_on_average():
    x = np.linspace(-1, 1, 1001, dtype=np.float32)
    mean = np.mean([round_trip(Int8(), x, (0, i)) for i in range(1000)], axis=0)
    level = 1 / 127
    # Its standard error is at most 0.5 / sqrt(1000) = 0.016 levels, five times that for the worst of 1001 elements.
    assert np.abs(mean - x).max() < 0.09 * level
    assert abs(float((mean - x).mean())) < level / 512


def test_int8_draws_other_bits_for_another_key_and_the_same_for_the_same():
    x = np.random.default_rng(0).normal(size=500).astype(np.float32)
    first, again, other = (round_trip(Int8(), x, key) for key in ((1, 2), (1, 2), (1, 3)))
    np.testing.assert_array_equal(first, again)
    assert (first != other).any()


@property_test
@given(vectors, st.floats(0.001, 1))
def test_topk_keeps_the_largest_exactly_and_no_others(x, share):
    encoding = TopK(share)
    decoded, k = round_trip(encoding, x), encoding.count(x.size)
    kept = np.flatnonzero(decoded)
    np.testing.assert_array_equal(decoded[kept], x[kept])
    assert len(kept) <= k
    expected = np.sort(np.abs(x))[x.size - k :]
    np.testing.assert_array_equal(np.sort(np.abs(decoded))[x.size - k :], expected)


def test_topk_of_a_long_vector_is_exact_whatever_the_sample_suggests():
    random = np.random.default_rng(0)
    cases = [random.normal(size=100_000), np.zeros(100_000), np.ones(100_000)]
    cases.append(np.where(np.arange(100_000) % 37 == 0, 1.0, 100.0))  # the sample sees the small
    for case in cases:
        x = case.astype(np.float32)
        decoded = round_trip(TopK(0.01), x)
        np.testing.assert_array_equal(np.sort(np.abs(decoded))[-1000:], np.sort(np.abs(x))[-1000:])


@pytest.mark.parametrize("share", [0.5, 0.7, 1.0])
def test_topk_of_half_or_more_is_everything_without_indices(share):
    config = RunConfig(compression="topk", topk=share)
    assert config.encoding.name == "f32"
    assert RunConfig(compression="topk", topk=share / 2.1).encoding.name == "topk"


@pytest.mark.parametrize("mib", [1, 2, 64])
@pytest.mark.parametrize("share", [0.01, 0.4999999, 0.5, 1.0])
@pytest.mark.parametrize("name", COMPRESSIONS)
def test_no_whole_chunk_becomes_longer(name, share, mib):
    assert COMPRESSIONS[name](share).size(mib << 18) <= mib << 20


# Senders and receivers


@pytest.fixture
def layout(monkeypatch):
    monkeypatch.setattr(tensors, "CHUNK_ELEMENTS", 40)
    return Layout((Leaf(DELTA, "w", (100,), "float32"), Leaf(VALUE, "s", (50,), "float32")))


def vector(seed, size=150):
    return np.random.default_rng(seed).normal(size=size).astype(np.float32)


def part(layout, flat, chunk):
    return flat[layout.chunks[chunk].start : layout.chunks[chunk].stop]


def test_what_topk_left_out_is_sent_later(layout):
    """Of a vector that is sent again and again, after a while all has arrived: the error does not grow."""
    encoding = TopK(0.1)
    sender, receiver = Compressor(encoding, layout), Decoder(encoding, layout)
    x, total = vector(0, 40), np.zeros(40)
    for round in range(60):
        name, payload = sender.encode(0, x, round)
        total += receiver.decode(name, 0, memoryview(payload))
    assert np.abs(total - 60 * x).max() < 15 * np.abs(x).max()
    without = 60 * np.abs(x - round_trip(encoding, x)).max()
    assert np.abs(total - 60 * x).max() < without


@every_encoding
def test_values_and_the_initial_model_are_not_compressed(layout, encoding):
    sender = Compressor(encoding, layout)
    for chunk, round in ((3, 5), (0, INITIAL)):
        x = part(layout, vector(1), chunk)
        name, payload = sender.encode(chunk, x, round)
        assert name == PLAIN
        assert bytes(payload) == x.tobytes()


@every_encoding
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_vector_that_is_not_finite_arrives_as_it_is_and_spoils_nothing_after_it(
    layout, encoding, bad
):
    sender, receiver = Compressor(encoding, layout), Decoder(encoding, layout)
    x = vector(1, 40)
    spoilt = x.copy()
    spoilt[3] = bad
    name, payload = sender.encode(0, spoilt, 1)
    np.testing.assert_array_equal(receiver.decode(name, 0, memoryview(payload)), spoilt)
    name, payload = sender.encode(0, x, 2)
    assert np.isfinite(receiver.decode(name, 0, memoryview(payload))).all()


@every_encoding
def test_a_payload_of_another_length_is_refused(layout, encoding):
    receiver = Decoder(encoding, layout)
    size = encoding.size(40)
    for length in (0, size - 1, size + 1, 2 * size):
        with pytest.raises(MessageError) as refused:
            receiver.decode(encoding.name, 0, memoryview(bytes(length)))
        assert refused.value.code == "bad-length"


@every_encoding
@property_test
@given(data=st.data())
def test_any_bytes_are_a_vector_or_refused(layout, encoding, data):
    receiver = Decoder(encoding, layout)
    size = encoding.size(40)
    payload = data.draw(st.binary(min_size=size, max_size=size))
    indices = np.frombuffer(payload, np.uint32, encoding.count(40) if encoding.feedback else 0)
    if (indices >= 40).any():
        with pytest.raises(MessageError) as refused:
            receiver.decode(encoding.name, 0, memoryview(payload))
        assert refused.value.code == "bad-index"
    else:
        x = receiver.decode(encoding.name, 0, memoryview(payload))
        assert x.shape == (40,)
        assert x.dtype == np.float32


def test_an_encoding_that_is_not_the_run_s_is_refused(layout):
    receiver = Decoder(Int8(), layout)
    for name, chunk, code in (
        ("bf16", 0, "bad-encoding"),
        ("", 0, "bad-encoding"),
        ("int8", 3, "bad-encoding"),  # values
        ("int8", 99, "bad-chunk"),
        ("f32", -1, "bad-chunk"),
    ):
        with pytest.raises(MessageError) as refused:
            receiver.decode(name, chunk, memoryview(bytes(44)))
        assert refused.value.code == code


# A version is what its receivers decode


class Receiver:
    """A worker's view of what is published."""

    def __init__(self, layout, config):
        self.assembly = Assembly(layout, config.encoding)

    def take(self, events):
        for event in events:
            if isinstance(event, Published):
                self.add(event, event.encoded)

    def add(self, event, encoded):
        header = Model("x", event.version, event.chunk, self.assembly.layout.digest)
        payload = event.data.view(np.uint8)
        if encoded is not None:
            header.encoding, header.base = encoded.encoding, event.version - 1
            payload = encoded.payload
        return self.assembly.add(header, memoryview(payload))


def push(server, layout, worker, round, flat):
    return [
        event
        for i in range(len(layout.chunks))
        for event in server.receive(Contribution(worker, round, i, part(layout, flat, i)))
    ]


@every_lossy
@pytest.mark.parametrize("outer", ["sgd", "nesterov"])
def test_the_server_s_model_is_that_of_its_receivers_to_the_bit(layout, compression, outer):
    config = RunConfig(compression=compression, topk=0.1, outer=outer, outer_momentum=0.8)
    server, worker = Mean(layout, NumpyBackend(), config), Receiver(layout, config)
    worker.take(push(server, layout, "a", INITIAL, vector(0)))
    server.set_members({"a": 0, "b": 1})
    for round in range(10):
        worker.take(push(server, layout, "a", round, vector(2 * round + 1)))
        events = push(server, layout, "b", round, vector(2 * round + 2))
        assert any(event.encoded for event in events if isinstance(event, Published))
        worker.take(events)
        assert worker.assembly.version == server.version == round + 1
        np.testing.assert_array_equal(
            np.concatenate(worker.assembly.newest.parts), np.concatenate(server.chunks)
        )


@every_lossy
def test_what_the_wire_took_from_one_version_stays_bounded(layout, compression):
    """After many rounds the model is near that of a run without compression: no error adds up."""
    models = []
    for name in ("none", compression):
        config = RunConfig(compression=name, topk=0.1)
        server = Mean(layout, NumpyBackend(), config)
        push(server, layout, "a", INITIAL, vector(0))
        server.set_members({"a": 0})
        for round in range(100):
            push(server, layout, "a", round, 0.1 * vector(round))
        models.append(np.concatenate(server.chunks))
    most = {"bf16": 0.02, "int8": 0.1, "topk": 3.0}[compression]
    assert 0 < np.abs(models[1] - models[0]).max() < most


@every_lossy
def test_whoever_lacks_the_version_before_asks_for_the_whole_one(layout, compression):
    config = RunConfig(compression=compression)
    server, worker = Mean(layout, NumpyBackend(), config), Receiver(layout, config)
    worker.take(push(server, layout, "a", INITIAL, vector(0)))
    server.set_members({"a": 0})
    lost = push(server, layout, "a", 0, vector(1))
    worker.take(push(server, layout, "a", 1, vector(2)))
    assert worker.assembly.version == 0
    assert lost
    for i, data in enumerate(server.chunks):
        worker.add(Published(2, i, data), None)
    assert worker.assembly.version == 2
    np.testing.assert_array_equal(
        np.concatenate(worker.assembly.newest.parts), np.concatenate(server.chunks)
    )
    worker.take(push(server, layout, "a", 2, vector(3)))
    assert worker.assembly.version == 3


def test_an_unknown_compression_is_refused_with_the_closest_name():
    with pytest.raises(ConfigError, match="Did you mean 'int8'"):
        RunConfig(compression="int9")


# Real sockets


@pytest.mark.parametrize("mode", ["sync", "async"])
@every_lossy
def test_a_real_run_learns_with_it_and_ends_with_one_model(mode, compression):
    target = np.linspace(-1, 1, 1000, dtype=np.float32)

    def train(worker):
        params = worker.start({"w": np.zeros(1000, np.float32)})
        while not worker.stopped:
            params = worker.step({"w": params["w"] - 0.2 * (params["w"] - target)})
        return params["w"]

    config = RunConfig(
        mode=mode,
        workers=2,
        rounds=400,
        compression=compression,
        topk=0.2,
        global_lr=0.9,
        shared_memory=False,
    )
    with Cluster(config) as cluster:
        threads = [cluster.train(f"w{i}", train) for i in range(2)]
        finals = [thread.result() for thread in threads]
        summary = cluster.finish()
        assert cluster.ps.thread is not None
        assert cluster.refused() == {}
    assert np.abs(finals[0] - target).max() < 0.02
    if mode == "sync":
        np.testing.assert_array_equal(finals[0], finals[1])
        whole = 4 * 1000 * 2 * summary["rounds"]
        assert summary["bytes_up"] < 0.55 * whole
        assert summary["bytes_down"] < 0.6 * whole


def test_what_topk_left_over_is_given_up_by_a_run_without_feedback(layout):
    before = Mean(layout, NumpyBackend(), RunConfig(compression="topk", topk=0.1))
    push(before, layout, "a", INITIAL, vector(0))
    before.set_members({"a": 0})
    push(before, layout, "a", 0, vector(1))
    version, saved = before.version, before.snapshot()
    assert "lost" in saved
    for topk, kept in ((0.2, True), (0.6, False)):
        after = Mean(layout, NumpyBackend(), RunConfig(compression="topk", topk=topk))
        after.restore(version, saved)
        assert ("lost" in after.snapshot()) == kept


@every_lossy
def test_numbers_near_the_largest_float_do_not_become_infinite_by_it(layout, compression):
    config = RunConfig(compression=compression, topk=0.4)
    server, worker = Mean(layout, NumpyBackend(), config), Receiver(layout, config)
    worker.take(push(server, layout, "a", INITIAL, np.zeros(150, np.float32)))
    server.set_members({"a": 0})
    for round, value in enumerate((np.finfo(np.float32).max, -1e38, 0.01, 0.01)):
        worker.take(push(server, layout, "a", round, np.full(150, value, np.float32)))
        assert server.version == round + 1
        assert np.isfinite(np.concatenate(server.chunks)).all()
        np.testing.assert_array_equal(
            np.concatenate(worker.assembly.newest.parts), np.concatenate(server.chunks)
        )
