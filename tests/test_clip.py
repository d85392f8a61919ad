"""Updates are scaled down to `clip_update` by workers, and what is longer all the same is refused by the server."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from esync import config, tensors
from esync.compression import COMPRESSIONS, Compressor, Decoder, squared_norm
from esync.config import RunConfig
from esync.errors import ConfigError, EsyncError, ProtocolError
from esync.ps.aggregation import (
    NOT_FINITE,
    ROUNDING,
    TOO_LONG,
    Completed,
    Doubted,
    FedAsync,
    Immediate,
    Mean,
    Refused,
)
from esync.ps.backend import NumpyBackend
from esync.sim.cluster import virtual_cluster
from esync.sim.learner import Learner
from esync.tensors import DELTA, VALUE, Layout, Leaf
from esync.worker import pytree
from esync.worker.client import Worker
from esync.worker.pytree import clip
from tests.cluster import Cluster
from tests.test_aggregation import CHUNKS, DELTAS, Server, completed, refused, vector
from tests.virtual import Untrained

START = np.zeros(6, np.float32)
every_kind = pytest.mark.parametrize("kind", [Mean, Immediate, FedAsync])
ZERO = np.zeros(DELTAS + 4, np.float32)


def short_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tensors, "CHUNK_ELEMENTS", 3)


@pytest.fixture
def chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    short_chunks(monkeypatch)


# The worker


@given(st.integers(1, 70_000), st.integers(0, 9), st.floats(1e-3, 1e3), st.integers(0, 2**32))
def test_deltas_are_scaled_down_to_the_norm_and_values_are_not(
    deltas: int, values: int, most: float, seed: int
):
    update = np.random.default_rng(seed).normal(size=deltas + values).astype(np.float32)
    before = update.copy()
    clip(update, deltas, most)
    norm = float(np.linalg.norm(before[:deltas].astype(np.float64)))
    scale = np.float32(min(1.0, most / norm))
    np.testing.assert_allclose(update[:deltas], before[:deltas] * scale, rtol=2e-7)
    np.testing.assert_array_equal(update[deltas:], before[deltas:])
    assert np.linalg.norm(update[:deltas].astype(np.float64)) <= max(most, 0.0) * ROUNDING


def test_what_is_short_enough_stays_the_same_to_the_bit():
    update = vector(1)
    before = update.copy()
    clip(update, DELTAS, 1e6)
    np.testing.assert_array_equal(update, before)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_what_is_not_finite_is_left_to_be_refused(bad: float):
    update = vector(1)
    update[2] = bad
    before = update.copy()
    clip(update, DELTAS, 1.0)
    np.testing.assert_array_equal(update, before)


def test_a_norm_is_summed_without_overflow():
    assert squared_norm(np.full(100_000, 1e30, np.float32)) == pytest.approx(1e65)


# What compression may add


@pytest.mark.parametrize("name", COMPRESSIONS)
@given(data=st.data())
def test_compression_adds_no_more_than_its_growth(name: str, data: st.DataObject):
    share = data.draw(st.sampled_from([0.01, 0.1, 0.5, 1.0]))
    size = data.draw(st.sampled_from([1, 2, 7, 100, 5000]))
    encoding = COMPRESSIONS[name](share)
    made = Layout((Leaf(DELTA, "w", (size,), "float32"),))
    compressor, decoder = Compressor(encoding, made), Decoder(encoding, made)
    random = np.random.default_rng(data.draw(st.integers(0, 2**32)))
    tail = data.draw(st.sampled_from([0.0, 1.0, 10.0, 100.0, 1e4]))
    direction = random.normal(size=size)
    for round in range(5):  # what one lost is added to the next
        x = direction + random.normal(size=size)
        x[random.integers(size)] *= 1 + tail
        x = x.astype(np.float32)
        clip(x, size, 1.0)
        kind, payload = compressor.encode(0, x, round)
        decoded = decoder.decode(kind, 0, memoryview(payload))
        assert math.sqrt(squared_norm(decoded)) <= encoding.growth(size) * ROUNDING


def test_the_worst_vector_for_levels_is_within_their_growth():
    """One large element makes the levels far apart for many small ones."""
    size = 1 << 19
    encoding = COMPRESSIONS["int8"](0.0)
    x = np.full(size, 1 / math.sqrt(2 * size), np.float32)
    x[0] = 1 / math.sqrt(2)
    decoded = encoding.decode(memoryview(encoding.encode(x, (1,))), size)
    assert math.sqrt(squared_norm(decoded)) / math.sqrt(squared_norm(x)) > 1.5
    assert math.sqrt(squared_norm(decoded)) <= encoding.growth(size)


# The decision


@every_kind
@pytest.mark.usefixtures("chunks")
def test_what_of_an_absurd_update_gets_in_is_no_longer_than_the_limit(kind: Any):
    made = Server.of(kind, ["bad", "good"], ZERO, clip_update=1.0)
    absurd = np.full(ZERO.size, 0.5, np.float32)  # its first chunk is short enough
    absurd[3:] = 1e6
    events = made.push("bad", 0, absurd)
    assert refused(events) == [TOO_LONG] * (CHUNKS - 1)
    assert [e.worker for e in events if isinstance(e, Refused)] == ["bad"] + [""] * (CHUNKS - 2)
    version = made.version
    made.push("good", 0, ZERO)
    assert made.version == version + 1, "the others' round goes on"
    assert np.linalg.norm(made.model[:DELTAS]) <= 1.0
    np.testing.assert_array_equal(made.model[3:], 0.0)


@pytest.mark.parametrize("ordered", [False, True])
@pytest.mark.usefixtures("chunks")
def test_a_barrier_does_not_wait_for_the_rest_of_a_refused_update(ordered: bool):
    made = Server.of(Mean, ["bad", "a", "b"], ZERO, ordered=ordered, clip_update=10.0)
    update = {"a": vector(1), "b": vector(2)}
    made.push("a", 0, update["a"])
    made.push("b", 0, update["b"])
    assert made.version == 0
    events = made.chunk("bad", 0, np.full(ZERO.size, 1e20, np.float32), 1)
    assert [e for e in events if isinstance(e, Completed)] == [Completed(1, frozenset("ab"))]
    mean = (update["a"].astype(np.float64) + update["b"]) / 2
    np.testing.assert_allclose(made.model, mean, rtol=1e-6, atol=1e-7)
    assert refused(made.push("bad", 1, ZERO)) == [], "its next one is looked at anew"


@every_kind
@pytest.mark.usefixtures("chunks")
def test_a_refused_update_is_not_asked_for_again(kind: Any):
    made = Server.of(kind, ["bad", "good"], ZERO, clip_update=1.0)
    made.chunk("bad", 0, np.full(ZERO.size, 9.0, np.float32), 0)
    assert made.aggregation.missing("bad", 0) == []
    assert made.aggregation.missing("good", 0) == list(range(CHUNKS))


@every_kind
@pytest.mark.usefixtures("chunks")
def test_who_comes_back_in_the_round_in_which_it_was_refused_is_looked_at_anew(kind: Any):
    made = Server.of(kind, ["alone"], ZERO, clip_update=1.0)
    round = made.version
    made.chunk("alone", round, np.full(ZERO.size, 9.0, np.float32), 0)
    assert made.aggregation.beyond("alone", round) == TOO_LONG
    made.aggregation.set_members({})
    made.aggregation.set_members({"alone": 0})
    assert made.aggregation.missing("alone", round) == list(range(CHUNKS))
    assert refused(made.push("alone", round, ZERO)) == []
    assert made.version == round + 1


@every_kind
@pytest.mark.usefixtures("chunks")
def test_nan_is_told_apart(kind: Any):
    made = Server.of(kind, ["bad", "good"], ZERO, clip_update=1.0)
    update = np.full(ZERO.size, np.nan, np.float32)
    assert refused(made.chunk("bad", 0, update, 0)) == [NOT_FINITE]


@every_kind
@pytest.mark.usefixtures("chunks")
def test_values_are_no_part_of_it(kind: Any):
    made = Server.of(kind, ["a"], ZERO, clip_update=1.0)
    update = np.full(ZERO.size, 1e6, np.float32)
    update[:DELTAS] = 0.1
    assert completed(made.push("a", 0, update))


@pytest.mark.usefixtures("chunks")
def test_a_chunk_that_is_asked_for_again_counts_once():
    """The sum of two finite chunks is infinite, so both come again."""
    most = 3e38
    made = Server.of(Mean, ["a", "b"], ZERO, clip_update=most)
    update = np.zeros(ZERO.size, np.float32)
    update[0] = most
    made.chunk("a", 0, update, 0)
    (doubted,) = made.chunk("b", 0, update, 0)
    assert isinstance(doubted, Doubted)
    assert refused(made.chunk("a", 0, update, 0)) == []
    assert refused(made.chunk("b", 0, update, 0)) == ["overflow"]


@pytest.mark.parametrize("kind", [Mean, Immediate, FedAsync])
@given(
    sent=st.lists(
        st.tuples(
            st.sampled_from("abc"),
            st.integers(0, 1),
            st.integers(0, CHUNKS - 1),
            st.floats(0, 2) | st.sampled_from([1e10, 3e38]),
        ),
        max_size=60,
    ),
    compression=st.sampled_from(["none", "bf16", "int8"]),
)
def test_what_is_taken_of_each_update_is_no_longer_than_the_limit(
    kind: Any, sent: Any, compression: str
):
    with pytest.MonkeyPatch.context() as patch:
        short_chunks(patch)
        made = Server.of(kind, "abc", ZERO, clip_update=2.0, compression=compression)
        growth = COMPRESSIONS[compression](0.0).growth(3)
        taken: dict[tuple[str, int], float] = {}
        for worker, round, chunk, size in sent:
            update = np.full(ZERO.size, size, np.float32)
            events = made.chunk(worker, round, update, chunk)
            at = made.aggregation.layout.chunks[chunk]
            if (
                not {"late", "early", "double", TOO_LONG} & set(refused(events))
                and at.kind == DELTA
            ):
                square = squared_norm(update[at.start : at.stop])
                taken[worker, round] = taken.get((worker, round), 0.0) + square
        assert all(math.sqrt(x) <= 2.0 * growth * ROUNDING for x in taken.values())
        assert np.isfinite(made.model).all()


def test_a_shard_without_deltas_has_nothing_to_measure():
    made = Layout((Leaf(VALUE, "s", (4,), "float32"),))
    assert Mean(made, NumpyBackend(), RunConfig(clip_update=1.0)).version == -1


# Whole runs


def leap(worker: Worker) -> Any:
    """Each local step goes far into the same direction."""
    params = worker.start({"w": START})
    while not worker.stopped:
        params = worker.step({"w": params["w"] + np.float32(100)})
    return params["w"]


def unclipped(worker: Worker) -> Any:
    worker._clip = lambda update: None  # type: ignore[method-assign]
    return leap(worker)


def steady(worker: Worker) -> Any:
    params = worker.start({"w": START})
    while not worker.stopped:
        worker.pause(0.01)
        params = worker.step({"w": params["w"]})
    return params["w"]


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("inproc", {"mode": "sync"}),
        ("tcp", {"mode": "sync", "shared_memory": False}),
        ("inproc", {"mode": "esync", "overlap": True}),
        ("inproc", {"mode": "async"}),
        ("inproc", {"mode": "fedasync", "mixing": 1.0}),
        ("inproc", {"mode": "sync", "ps": 2}),
        ("tcp", {"mode": "sync", "compression": "bf16", "shared_memory": False}),
        ("tcp", {"mode": "sync", "compression": "int8", "shared_memory": False}),
        ("tcp", {"mode": "sync", "compression": "topk", "topk": 0.5, "shared_memory": False}),
    ],
    ids=lambda x: x if isinstance(x, str) else "-".join(str(v) for v in x.values()),
)
def test_a_worker_moves_the_model_by_no_more_than_the_limit(kind: str, options: Any):
    run = RunConfig(workers=1, rounds=5, clip_update=1.0, **options)
    with Cluster(run, kind) as cluster:
        final = cluster.train("w0", leap).result()
        cluster.finish()
        assert TOO_LONG not in cluster.refused()
    assert 1.0 < np.linalg.norm(final) <= 5 * run.encoding.growth(6) * ROUNDING
    if run.compression == "none":
        np.testing.assert_allclose(final, 5 / math.sqrt(6), rtol=1e-5)


@pytest.mark.parametrize("mode", ["sync", "async"])
@pytest.mark.parametrize("shared", [False, True])
def test_a_worker_that_does_not_scale_is_told_and_the_others_go_on(mode: str, shared: bool):
    run = RunConfig(mode=mode, workers=2, rounds=8, clip_update=1.0, shared_memory=shared)
    with Cluster(run, "tcp") as cluster:
        good = cluster.train("good", steady)
        bad = cluster.train("bad", unclipped)
        with pytest.raises(ProtocolError, match="longer than clip_update") as caught:
            bad.result()
        final = good.result()
        cluster.finish()
        assert cluster.refused()[TOO_LONG] == 1
    assert caught.value.code == TOO_LONG
    np.testing.assert_array_equal(final, START)


def test_exchange_scales_too_and_leaves_the_callers_vector_alone():
    def loop(worker: Worker) -> Any:
        worker.start({"w": START})
        mine = np.full(6, 100, np.float32)
        parts = worker.exchange(mine)
        np.testing.assert_array_equal(mine, 100)
        return np.concatenate([np.array(part) for part in parts])

    with Cluster(RunConfig(mode="sync", workers=1, rounds=1, clip_update=1.0)) as cluster:
        final = cluster.train("w0", loop).result()
        cluster.finish()
    np.testing.assert_allclose(np.linalg.norm(final), 1.0, rtol=1e-6)


# The virtual cluster

FILE = {"workers": [{"count": 2, "step_time_s": 0.1}]}


@pytest.mark.parametrize("packing", [pytree._InHostMemory, pytree._OnDevice])
def test_a_virtual_worker_moves_the_model_by_no_more_than_the_limit(
    packing: Any, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(pytree, "_InHostMemory", packing)
    run = {"mode": "sync", "model": "mlp", "dataset": "digits", "rounds": 3, "clip_update": 0.01}
    learner = Learner(RunConfig(workers=2, **run), say=lambda text: None)
    try:
        cluster = virtual_cluster(config.cluster(FILE, run), learner)
        versions = [np.concatenate(cluster.server.chunks)]
        while cluster.state.stopped is None:
            cluster.step()
            if cluster.server.version == len(versions):
                versions.append(np.concatenate(cluster.server.chunks))
    finally:
        learner.close()
    moved = [float(np.linalg.norm(b - a)) for a, b in itertools.pairwise(versions)]
    assert len(moved) == 3
    assert all(0.001 < x <= 0.01 * ROUNDING for x in moved)


def test_a_virtual_trainee_that_does_not_scale_is_an_error():
    run = {"mode": "sync", "rounds": 3, "clip_update": 0.5}
    cluster = virtual_cluster(config.cluster(FILE, run), Untrained())
    with pytest.raises(EsyncError, match="longer than clip_update"):
        cluster.run()


@pytest.mark.parametrize("option", [{"weights": "fednova"}, {"mode": "async", "dcasgd": True}])
def test_what_makes_more_of_an_update_than_it_is_long_is_refused(option):
    RunConfig(**option)
    with pytest.raises(ConfigError, match="more of it than it is long"):
        RunConfig(clip_update=1.0, **option)
