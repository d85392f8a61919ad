"""What becomes of updates: averages against independent NumPy, deaths in mid-update, and what is refused."""

from __future__ import annotations

import dataclasses
import weakref
from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from esync import tensors
from esync.config import RunConfig
from esync.errors import ModelError
from esync.messages import INITIAL
from esync.ps.aggregation import (
    NOT_FINITE,
    Completed,
    Contribution,
    Doubted,
    FedAsync,
    Immediate,
    Mean,
    Published,
    Refused,
)
from esync.ps.backend import NumpyBackend
from esync.ps.outer import OUTER
from esync.tensors import DELTA, VALUE, Layout, Leaf

DELTAS, VALUES = 7, 4
SIZE = DELTAS + VALUES
CHUNKS = 5  # deltas 3 + 3 + 1, values 3 + 1
STATES = {"sgd": [], "momentum": ["m"], "nesterov": ["m"], "adam": ["m", "v"]}
without_a_barrier = pytest.mark.parametrize("kind", [Immediate, FedAsync])
every_kind = pytest.mark.parametrize("kind", [Mean, Immediate, FedAsync])
every_outer = pytest.mark.parametrize("outer", list(OUTER))
property_test = settings(
    max_examples=50, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@pytest.fixture(autouse=True)
def _several_chunks(monkeypatch):
    monkeypatch.setattr(tensors, "CHUNK_ELEMENTS", 3)


def layout():
    made = Layout((Leaf(DELTA, "w", (DELTAS,), "float32"), Leaf(VALUE, "s", (VALUES,), "float32")))
    assert len(made.chunks) == CHUNKS
    return made


def vector(seed):
    return np.random.default_rng(seed).normal(size=SIZE).astype(np.float32)


@dataclass
class Server:
    """An aggregation with its model, taking whole updates or single chunks."""

    aggregation: Mean | Immediate | FedAsync

    @classmethod
    def of(cls, kind, members=(), initial=None, ordered=None, **config):
        options = {} if ordered is None else {"ordered": ordered}
        server = cls(kind(layout(), NumpyBackend(), RunConfig(**config), **options))
        if initial is not None:
            server.push("w0", INITIAL, initial)
        server.members(*members)
        return server

    def members(self, *workers):
        return self.aggregation.set_members({w: rank for rank, w in enumerate(workers)})

    def chunk(self, worker, round, vector, chunk, samples=1, steps=1):
        at = self.aggregation.layout.chunks[chunk]
        data = vector[at.start : at.stop].copy()
        data.flags.writeable = False
        update = Contribution(worker, round, chunk, data, steps, samples)
        return self.aggregation.receive(update)

    def push(self, worker, round, vector, samples=1, chunks=range(CHUNKS), steps=1):
        return [e for i in chunks for e in self.chunk(worker, round, vector, i, samples, steps)]

    @property
    def model(self):
        return np.concatenate(self.aggregation.chunks)

    @property
    def version(self):
        return self.aggregation.version


def averaged(model, updates, weights, global_lr=1.0):
    """One round, written down independently: float64, deltas and values apart."""
    mean = np.average(np.array(updates, np.float64), axis=0, weights=weights)
    return np.concatenate([model[:DELTAS] + global_lr * mean[:DELTAS], mean[DELTAS:]])


def normalised(model, updates, steps):
    """One round of FedNova, written down independently."""
    rate = np.mean([update[:DELTAS] / n for update, n in zip(updates, steps, strict=True)], axis=0)
    values = np.mean([update[DELTAS:] for update in updates], axis=0)
    return np.concatenate([model[:DELTAS] + np.mean(steps) * rate, values])


def completed(events):
    return [event for event in events if isinstance(event, Completed)]


def published(events):
    return [event for event in events if isinstance(event, Published)]


def doubted(events):
    return [event for event in events if isinstance(event, Doubted)]


def refused(events):
    return [event.reason for event in events if isinstance(event, Refused)]


# The initial model


@every_kind
def test_the_first_model_is_the_first_that_one_worker_delivered_whole(kind):
    server = Server.of(kind)
    assert server.version == -1
    assert server.aggregation.missing("w0", INITIAL) == list(range(CHUNKS))
    assert server.aggregation.missing("w0", 0) == []
    assert server.push("w0", INITIAL, vector(0), chunks=range(4)) == []
    assert server.aggregation.missing("w0", INITIAL) == [4]
    assert server.aggregation.missing("w1", INITIAL) == list(range(CHUNKS))
    assert refused(server.chunk("w0", INITIAL, vector(1), 2)) == ["double"]
    events = server.push("w1", INITIAL, vector(1))
    assert [(event.version, event.chunk, event.worker) for event in published(events)] == [
        (0, i, None) for i in range(CHUNKS)
    ]
    assert completed(events) == [Completed(0, frozenset())]
    np.testing.assert_array_equal(server.model, vector(1))
    assert refused(server.chunk("w0", INITIAL, vector(0), 4)) == ["late"]
    np.testing.assert_array_equal(server.model, vector(1))


@every_kind
def test_finite_updates_whose_result_is_infinite_change_nothing(kind):
    server = Server.of(kind)
    server.push("w0", INITIAL, vector(0))
    server.aggregation.set_members({"w0": 0, "w1": 1})
    largest = np.full_like(vector(0), 3e38)
    for worker in ("w0", "w1", "w0"):  # the sum is not finite: once more
        server.push(worker, 0, largest)
        server.push(worker, 0, largest)
    assert server.version >= 1
    assert np.isfinite(server.model).all()


@every_kind
def test_before_there_is_a_model_an_update_is_early(kind):
    server = Server.of(kind)
    assert refused(server.push("w0", 0, vector(0))) == ["early"] * CHUNKS
    assert server.version == -1


@every_kind
def test_a_second_initial_model_changes_nothing(kind):
    server = Server.of(kind, ["w0"], vector(0))
    assert refused(server.push("w1", INITIAL, vector(1))) == ["late"] * CHUNKS
    np.testing.assert_array_equal(server.model, vector(0))
    assert server.version == 0


# The mean


@property_test
@given(st.integers(1, 4), st.integers(0, 2**32), st.sampled_from([1.0, 0.5, 2.0]), st.booleans())
def test_rounds_of_the_mean_follow_the_recurrence(workers, seed, global_lr, ordered):
    names = [f"w{i}" for i in range(workers)]
    server = Server.of(Mean, names, vector(seed), ordered, global_lr=global_lr)
    expected = vector(seed).astype(np.float64)
    for round in range(4):
        updates = [vector([seed, round, i]) for i in range(workers)]
        expected = averaged(expected, updates, np.ones(workers), global_lr)
        for name, update in zip(names, updates, strict=True):
            events = server.push(name, round, update)
        assert completed(events) == [Completed(round + 1, frozenset(names))]
        np.testing.assert_allclose(server.model, expected, rtol=1e-4, atol=1e-5)


@property_test
@given(st.lists(st.integers(1, 1000), min_size=1, max_size=4), st.booleans())
def test_weights_may_be_samples(samples, ordered):
    names = [f"w{i}" for i in range(len(samples))]
    server = Server.of(Mean, names, vector(9), ordered, weights="samples")
    updates = [vector(i) for i in range(len(samples))]
    for name, update, n in zip(names, updates, samples, strict=True):
        server.push(name, 0, update, n)
    expected = averaged(vector(9), updates, samples)
    np.testing.assert_allclose(server.model, expected, rtol=1e-4, atol=1e-5)


def test_equal_weights_do_not_look_at_samples():
    server = Server.of(Mean, ["w0", "w1"], vector(9))
    server.push("w0", 0, vector(0), samples=1)
    server.push("w1", 0, vector(1), samples=1000)
    expected = averaged(vector(9), [vector(0), vector(1)], [1, 1])
    np.testing.assert_allclose(server.model, expected, rtol=1e-5, atol=1e-6)


def test_the_global_learning_rate_scales_deltas_and_not_values():
    server = Server.of(Mean, ["w0"], vector(9), global_lr=0.0)
    server.push("w0", 0, vector(0))
    np.testing.assert_array_equal(server.model[:DELTAS], vector(9)[:DELTAS])
    np.testing.assert_array_equal(server.model[DELTAS:], vector(0)[DELTAS:])


def test_a_chunk_is_published_the_moment_its_last_contribution_is_in():
    server = Server.of(Mean, ["w0", "w1"], vector(9))
    assert server.push("w0", 0, vector(0)) == []
    events = server.chunk("w1", 0, vector(1), 3)
    assert [(e.version, e.chunk, e.worker) for e in published(events)] == [(1, 3, None)]
    assert server.version == 0
    [begun], [first] = server.aggregation.in_progress(), published(events)
    assert (begun.version, begun.chunk) == (first.version, first.chunk)
    np.testing.assert_array_equal(begun.data, first.data)
    np.testing.assert_array_equal(server.model, vector(9))
    events = server.push("w1", 0, vector(1), chunks=[0, 1, 2, 4])
    assert len(published(events)) == 4
    assert server.version == 1
    assert server.aggregation.in_progress() == []


@property_test
@given(st.permutations([(w, c) for w in range(3) for c in range(CHUNKS)]), st.booleans())
def test_chunks_may_arrive_in_any_order_and_mixed(arrivals, ordered):
    server = Server.of(Mean, ["w0", "w1", "w2"], vector(9), ordered)
    events = [e for w, c in arrivals for e in server.chunk(f"w{w}", 0, vector(w), c)]
    assert sorted(e.chunk for e in published(events)) == list(range(CHUNKS))
    assert completed(events) == [Completed(1, frozenset(["w0", "w1", "w2"]))]
    expected = averaged(vector(9), [vector(w) for w in range(3)], [1, 1, 1])
    np.testing.assert_allclose(server.model, expected, rtol=1e-4, atol=1e-5)


@property_test
@given(st.permutations([(w, c) for w in range(4) for c in range(CHUNKS)]))
def test_in_order_of_ranks_the_result_is_the_same_bit_for_bit_for_any_arrival(arrivals):
    def model_after(order):
        server = Server.of(Mean, ["w3", "w1", "w0", "w2"], vector(9), True, weights="samples")
        for w, c in order:
            server.chunk(f"w{w}", 0, vector(w), c, samples=3 * w + 1)
        assert server.version == 1
        return server.model.tobytes()

    assert model_after(arrivals) == model_after(sorted(arrivals))


def test_a_worker_that_dies_in_mid_update_takes_part_in_the_chunks_that_it_delivered():
    for ordered in (False, True):
        server = Server.of(Mean, ["w0", "w1", "w2"], vector(9), ordered, weights="samples")
        server.push("w0", 0, vector(0), samples=1)
        server.push("w1", 0, vector(1), samples=2, chunks=[0, 4])
        server.push("w2", 0, vector(2), samples=3)
        events = server.members("w0", "w2")
        assert completed(events) == [Completed(1, frozenset(["w0", "w1", "w2"]))]
        updates = [vector(i) for i in range(3)]
        everybody = averaged(vector(9), updates, [1, 2, 3])
        survivors = averaged(vector(9), updates, [1, 0, 3])
        expected = survivors.copy()
        expected[:3], expected[10:] = everybody[:3], everybody[10:]
        np.testing.assert_allclose(server.model, expected, rtol=1e-4, atol=1e-5)
        assert not np.allclose(everybody, survivors)


@property_test
@given(st.lists(st.sets(st.integers(0, CHUNKS - 1)), min_size=1, max_size=3), st.booleans())
def test_each_chunk_is_the_mean_over_exactly_those_that_arrived(delivered, ordered):
    """The worker w0 delivers everything; the others die after the drawn chunks."""
    dying = [f"w{i + 1}" for i in range(len(delivered))]
    server = Server.of(Mean, ["w0", *dying], vector(9), ordered)
    for i, chunks in enumerate(delivered):
        server.push(f"w{i + 1}", 0, vector(i + 1), chunks=sorted(chunks))
    server.push("w0", 0, vector(0))
    server.members("w0")
    assert server.version == 1
    for c, chunk in enumerate(server.aggregation.layout.chunks):
        there = [vector(0)] + [vector(i + 1) for i, d in enumerate(delivered) if c in d]
        expected = averaged(vector(9), there, np.ones(len(there)))
        np.testing.assert_allclose(
            server.aggregation.chunks[c], expected[chunk.start : chunk.stop], rtol=1e-4, atol=1e-5
        )


@pytest.mark.parametrize("ordered", [False, True])
def test_what_is_late_double_or_early_is_refused_and_changes_nothing(ordered):
    server = Server.of(Mean, ["w0", "w1"], vector(9), ordered)
    server.push("w0", 0, vector(0))
    assert refused(server.push("w0", 0, vector(5))) == ["double"] * CHUNKS
    assert refused(server.push("w0", 1, vector(5))) == ["early"] * CHUNKS
    server.chunk("w1", 0, vector(1), 2)
    assert refused(server.chunk("w1", 0, vector(5), 2)) == ["late"]
    server.push("w1", 0, vector(1), chunks=[0, 1, 3, 4])
    assert refused(server.push("w1", 0, vector(5))) == ["late"] * CHUNKS
    assert server.version == 1
    expected = averaged(vector(9), [vector(0), vector(1)], [1, 1])
    np.testing.assert_allclose(server.model, expected, rtol=1e-4, atol=1e-5)


def test_a_worker_that_is_not_yet_expected_is_included_if_it_comes_in_time():
    server = Server.of(Mean, ["w0", "w1"], vector(9))
    server.push("w0", 0, vector(0))
    assert server.push("new", 0, vector(2)) == []
    events = server.push("w1", 0, vector(1))
    assert completed(events) == [Completed(1, frozenset(["w0", "w1", "new"]))]
    expected = averaged(vector(9), [vector(0), vector(1), vector(2)], [1, 1, 1])
    np.testing.assert_allclose(server.model, expected, rtol=1e-4, atol=1e-5)


def test_a_new_member_is_waited_for_from_then_on():
    server = Server.of(Mean, ["w0"], vector(9))
    server.members("w0", "w1")
    assert completed(server.push("w0", 0, vector(0))) == []
    assert completed(server.push("w1", 0, vector(1))) == [Completed(1, frozenset(["w0", "w1"]))]


def test_members_that_leave_complete_a_round_only_if_somebody_s_update_is_there():
    server = Server.of(Mean, ["w0", "w1"], vector(9))
    assert server.members() == []
    server.members("w0", "w1")
    server.push("w1", 0, vector(1), chunks=[0])
    events = server.members()
    assert [event.chunk for event in published(events)] == [0]
    assert server.version == 0
    server.members("w2")
    events = server.push("w2", 0, vector(2))
    assert refused(events) == ["late"]
    assert completed(events) == [Completed(1, frozenset(["w1", "w2"]))]


def test_missing_names_the_chunks_that_are_still_wanted():
    server = Server.of(Mean, ["w0", "w1"], vector(9))
    missing = server.aggregation.missing
    assert missing("w0", 0) == list(range(CHUNKS))
    server.push("w0", 0, vector(0), chunks=[0, 3])
    assert missing("w0", 0) == [1, 2, 4]
    assert missing("w0", 1) == missing("w0", INITIAL) == []
    server.push("w1", 0, vector(1))
    assert missing("w1", 0) == []
    assert missing("new", 0) == [1, 2, 4]
    server.push("w0", 0, vector(0), chunks=[1, 2, 4])
    assert missing("w0", 0) == []
    assert missing("w0", 1) == list(range(CHUNKS))


# FedNova's weights


@pytest.mark.parametrize("ordered", [False, True])
def test_fednova_counts_a_delta_per_step_and_does_not_look_at_samples(ordered):
    server = Server.of(Mean, ["w0", "w1"], vector(9), ordered, weights="fednova")
    server.push("w0", 0, vector(0), steps=1, samples=1000)
    server.push("w1", 0, vector(1), steps=7)
    expected = normalised(vector(9), [vector(0), vector(1)], [1, 7])
    np.testing.assert_allclose(server.model, expected, rtol=1e-5, atol=1e-6)


def test_fednova_with_equal_steps_is_the_mean():
    server = Server.of(Mean, ["w0", "w1"], vector(9), weights="fednova")
    for i in range(2):
        server.push(f"w{i}", 0, vector(i), steps=5)
    expected = averaged(vector(9), [vector(0), vector(1)], [1, 1])
    np.testing.assert_allclose(server.model, expected, rtol=1e-5, atol=1e-6)


def test_fednova_takes_an_update_of_no_step_for_one_of_one_step():
    server = Server.of(Mean, ["w0", "w1"], vector(9), weights="fednova")
    server.push("w0", 0, vector(0), steps=0)
    server.push("w1", 0, vector(1), steps=3)
    expected = normalised(vector(9), [vector(0), vector(1)], [1, 3])
    np.testing.assert_allclose(server.model, expected, rtol=1e-5, atol=1e-6)


def test_fednova_normalises_each_chunk_by_those_that_arrived():
    server = Server.of(Mean, ["w0", "w1", "w2"], vector(9), weights="fednova")
    server.push("w0", 0, vector(0), steps=1)
    server.push("w1", 0, vector(1), steps=50, chunks=[0, 4])
    server.push("w2", 0, vector(2), steps=4)
    server.members("w0", "w2")
    assert server.version == 1
    everybody = normalised(vector(9), [vector(i) for i in range(3)], [1, 50, 4])
    expected = normalised(vector(9), [vector(0), vector(2)], [1, 4])
    expected[:3], expected[10:] = everybody[:3], everybody[10:]
    np.testing.assert_allclose(server.model, expected, rtol=1e-5, atol=1e-5)


# Outer optimisers


@every_outer
def test_a_fresh_outer_optimiser_has_no_state_and_a_round_gives_every_delta_chunk_one(outer):
    server = Server.of(Mean, ["w0"], vector(9), outer=outer)
    assert server.aggregation.outer.state() == {name: [None] * CHUNKS for name in STATES[outer]}
    server.push("w0", 0, vector(0))
    state = server.aggregation.outer.state()
    assert list(state) == STATES[outer]
    for chunks in state.values():
        assert [None if x is None else x.size for x in chunks] == [3, 3, 1, None, None]
        assert all(x.dtype == np.float32 for x in chunks[:3])


@every_outer
def test_an_outer_optimiser_steps_on_the_mean_of_deltas_and_leaves_values_alone(outer):
    server = Server.of(Mean, ["w0", "w1"], vector(9), outer=outer, global_lr=0.5)
    alone = Server.of(Mean, ["w0"], vector(9), outer=outer, global_lr=0.5)
    for round in range(3):
        updates = [vector([round, i]) for i in range(2)]
        for i, update in enumerate(updates):
            server.push(f"w{i}", round, update)
        alone.push("w0", round, np.mean(updates, axis=0))
        np.testing.assert_allclose(server.model, alone.model, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(
            server.model[DELTAS:], np.mean(updates, axis=0)[DELTAS:], rtol=1e-5, atol=1e-6
        )


@every_outer
def test_a_run_goes_on_from_a_saved_outer_state_bit_for_bit(outer):
    def rounds(server, first, last):
        for round in range(first, last):
            server.push("w0", round - first, vector([5, round]))

    whole, before = (Server.of(Mean, ["w0"], vector(9), outer=outer) for _ in range(2))
    rounds(whole, 0, 6)
    rounds(before, 0, 3)
    state = before.aggregation.outer.state()
    after = Server.of(Mean, ["w0"], before.model, outer=outer)
    after.aggregation.outer.load(state)
    kept = {name: [None if x is None else x.copy() for x in xs] for name, xs in state.items()}
    rounds(after, 3, 6)
    assert after.model.tobytes() == whole.model.tobytes()
    for name, chunks in state.items():  # what was saved is not written to
        for x, copy in zip(chunks, kept[name], strict=True):
            np.testing.assert_array_equal(x, copy)


def test_the_state_of_another_outer_optimiser_or_model_is_refused():
    outer = Server.of(Mean, ["w0"], vector(9), outer="adam").aggregation.outer
    before = outer.state()
    for state in ({"m": [None] * CHUNKS}, {"m": [None], "v": [None]}):
        with pytest.raises(ModelError, match=r"outer optimiser adam has the chunks.*'v': 5"):
            outer.load(state)
    assert outer.state() == before


@every_outer
def test_a_chunk_that_overflows_keeps_its_value_and_its_outer_state(outer):
    server = Server.of(Mean, ["w0", "w1"], vector(9), outer=outer)
    for worker in ("w0", "w1"):
        server.push(worker, 0, vector(0))
    model, state = server.model, server.aggregation.outer.state()
    too_much = vector(1)
    too_much[4] = 3e38  # in the second chunk; twice it is infinite
    events = server.push("w0", 1, too_much) + server.push("w1", 1, too_much)
    assert doubted(events) == [Doubted(1, 1, frozenset(["w0", "w1"]))]
    assert server.version == 1
    events = server.chunk("w0", 1, too_much, 1) + server.chunk("w1", 1, too_much, 1)
    assert refused(events) == ["overflow"]
    assert server.version == 2
    np.testing.assert_array_equal(server.model[3:6], model[3:6])
    assert not np.any(server.model[:3] == model[:3])
    after = server.aggregation.outer.state()
    for name in state:
        assert after[name][1] is state[name][1]
        assert after[name][0] is not state[name][0]
    for worker in ("w0", "w1"):
        assert refused(server.push(worker, 2, vector(2))) == []
    assert np.isfinite(server.model).all()
    assert not np.any(server.model[3:6] == model[3:6])


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("ordered", [False, True])
@pytest.mark.parametrize("weights", ["equal", "fednova"])
def test_who_sends_nan_is_found_and_the_others_mean_is_the_one_without_him(bad, ordered, weights):
    server, without = (
        Server.of(Mean, ["w0", "w1", "w2"], vector(9), ordered, weights=weights) for _ in range(2)
    )
    spoilt = vector(1)
    spoilt[4] = bad
    updates = {"w0": vector(0), "w1": spoilt, "w2": vector(2)}
    events = [e for worker, update in updates.items() for e in server.push(worker, 0, update)]
    assert doubted(events) == [Doubted(0, 1, frozenset(updates))]
    assert server.aggregation.missing("w0", 0) == [1]
    again = [server.chunk(worker, 0, update, 1) for worker, update in updates.items()]
    assert again == [[], [Refused(NOT_FINITE, "w1")], []]
    assert server.version == 0
    assert [event.chunk for event in published(server.members("w0", "w2"))] == [1]
    for worker, update in updates.items():
        without.push(worker, 0, update, chunks=[0, 2, 3, 4] if worker == "w1" else range(CHUNKS))
    without.members("w0", "w2")
    assert server.version == without.version == 1
    np.testing.assert_array_equal(server.model, without.model)
    assert server.push("w0", 1, vector(5)) == []  # the next round trusts again


@without_a_barrier
def test_without_a_barrier_nan_is_refused_at_once(kind):
    server = Server.of(kind, ["w0"], vector(9))
    spoilt = vector(1)
    spoilt[4] = np.nan
    assert server.chunk("w0", 0, spoilt, 1) == [Refused(NOT_FINITE, "w0")]
    np.testing.assert_array_equal(server.model, vector(9))


def test_an_initial_model_with_nan_is_refused():
    server = Server.of(Mean, ["w0"])
    spoilt = vector(1)
    spoilt[4] = np.nan
    assert server.push("w0", INITIAL, spoilt) == [Refused(NOT_FINITE, "w0")]
    assert server.version == -1


def test_outer_adam_s_state_stays_finite_where_a_square_overflows():
    server = Server.of(Mean, ["w0"], vector(9), outer="adam")
    too_much = vector(1)
    too_much[4] = 1e30  # m / sqrt(v) would be 0, and for ever
    assert doubted(server.push("w0", 0, too_much)) == [Doubted(0, 1, frozenset(["w0"]))]
    assert refused(server.chunk("w0", 0, too_much, 1)) == ["overflow"]
    assert server.aggregation.outer.state()["v"][1] is None
    server.push("w0", 1, vector(2))
    assert not np.any(server.model[3:6] == vector(9)[3:6])


def test_outer_adam_without_epsilon_leaves_alone_what_no_delta_moves():
    server = Server.of(Mean, ["w0"], vector(9), outer="adam", outer_epsilon=0.0, global_lr=1.0)
    update = vector(1)
    update[1] = 0.0
    for round in range(3):
        assert refused(server.push("w0", round, update)) == []
    assert server.model[1] == vector(9)[1]
    assert np.isfinite(server.model).all()
    assert np.all(np.abs(server.model - vector(9))[[0, 2, 3, 4, 5, 6]] > 0.1)


def test_outer_momentum_of_a_dead_worker_s_chunks_is_that_of_those_that_arrived():
    server = Server.of(Mean, ["w0", "w1"], vector(9), outer="momentum")
    server.push("w0", 0, vector(0))
    server.push("w1", 0, vector(1), chunks=[0])
    server.members("w0")
    assert server.version == 1
    m = server.aggregation.outer.state()["m"]
    np.testing.assert_allclose(m[0], (vector(0) + vector(1))[:3] / 2, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(m[1], vector(0)[3:6], rtol=1e-6)


# Without a barrier


@property_test
@given(st.lists(st.integers(0, 2), min_size=1, max_size=12), st.sampled_from([1.0, 0.5]))
def test_asgd_applies_each_update_as_it_arrives(pushers, global_lr):
    server = Server.of(Immediate, ["w0", "w1", "w2"], vector(9), mode="async", global_lr=global_lr)
    model = vector(9).astype(np.float64)
    has = dict.fromkeys(["w0", "w1", "w2"], 0)
    for n, number in enumerate(pushers):
        worker, update = f"w{number}", vector(100 + n)
        model[:DELTAS] += global_lr * update[:DELTAS]
        model[DELTAS:] += (update[DELTAS:] - model[DELTAS:]) / 3
        events = server.push(worker, has[worker], update)
        assert completed(events) == [Completed(n + 1, frozenset([worker]))]
        assert {event.worker for event in published(events)} == {worker}
        assert [event.chunk for event in published(events)] == list(range(CHUNKS))
        has[worker] = server.version
        np.testing.assert_allclose(server.model, model, rtol=1e-4, atol=1e-5)


@property_test
@given(st.lists(st.integers(0, 2), min_size=1, max_size=12), st.sampled_from([0.04, 2.0]))
def test_dc_asgd_compensates_the_delay_as_published(pushers, dc_lambda):
    """Zheng et al. 2017, equation 10: `w <- w - lr * (g + lambda * g * g * (w - w_bak))`."""
    lr = 0.1
    workers = ["w0", "w1", "w2"]
    server = Server.of(
        Immediate, workers, vector(9), mode="async", dcasgd=True, lr=lr, dc_lambda=dc_lambda
    )
    w = vector(9)[:DELTAS].astype(np.float64)
    backup = {worker: w.copy() for worker in workers}
    has = dict.fromkeys(workers, 0)
    for worker in workers:
        server.aggregation.sent_to(worker)
    for n, number in enumerate(pushers):
        worker, gradient = f"w{number}", vector(100 + n).astype(np.float64)[:DELTAS]
        w = w - lr * (gradient + dc_lambda * gradient * gradient * (w - backup[worker]))
        backup[worker] = w.copy()
        update = np.concatenate([-lr * gradient, np.zeros(VALUES)]).astype(np.float32)
        server.push(worker, has[worker], update)
        has[worker] = server.version
        np.testing.assert_allclose(server.model[:DELTAS], w, rtol=1e-4, atol=1e-5)


def test_dc_asgd_without_a_known_backup_is_asgd():
    server = Server.of(Immediate, ["w0"], vector(9), mode="async", dcasgd=True)
    server.push("w0", 0, vector(0))
    server.members("w0", "late")
    before = server.model
    server.push("late", 0, vector(1))
    expected = before[:DELTAS] + vector(1)[:DELTAS]
    np.testing.assert_allclose(server.model[:DELTAS], expected, rtol=1e-5, atol=1e-6)


def test_dc_asgd_with_a_backup_of_another_version_is_asgd():
    server = Server.of(Immediate, ["w0", "w1"], vector(9), mode="async", dcasgd=True)
    server.push("w0", 0, vector(0))
    server.aggregation.sent_to("w1")
    server.push("w0", 1, vector(1))
    before = server.model
    server.push("w1", 0, vector(2))
    expected = before[:DELTAS] + vector(2)[:DELTAS]
    np.testing.assert_allclose(server.model[:DELTAS], expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("when", ["before", "after"])
def test_the_initial_model_counts_as_sent_to_everybody(when):
    server = Server.of(Immediate, mode="async", dcasgd=True, lr=1.0, dc_lambda=0.5)
    if when == "before":
        server.members("w0", "w1")
    server.push("w0", INITIAL, vector(9))
    if when == "after":
        server.members("w0", "w1")
    w = vector(9) + vector(0)
    server.push("w0", 0, vector(0))
    w = w + vector(1) - 0.5 * vector(1) ** 2 * (w - vector(9))
    server.push("w1", 0, vector(1))
    np.testing.assert_allclose(server.model[:DELTAS], w[:DELTAS], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("function", ["constant", "hinge", "polynomial"])
def test_fedasync_mixes_a_fresh_model_in_with_the_whole_weight(function):
    server = Server.of(FedAsync, ["w0"], vector(9), mixing=0.25, staleness_weight=function)
    server.push("w0", 0, vector(0))
    expected = vector(9) + 0.25 * vector(0)
    expected[DELTAS:] = 0.75 * vector(9)[DELTAS:] + 0.25 * vector(0)[DELTAS:]
    np.testing.assert_allclose(server.model, expected, rtol=1e-5, atol=1e-6)


def test_one_staleness_and_one_model_hold_for_all_chunks_of_an_update():
    """The same update, at once and with another's in the middle of it, gets the same weight and the same w_i."""
    weight = 0.6 / np.sqrt(2)
    server = Server.of(FedAsync, ["w0", "w1", "w2"], vector(9), mixing=0.6)
    server.push("w0", 0, vector(0))
    server.push("w1", 0, vector(1), chunks=[0])  # one version stale
    server.push("w0", 1, vector(2))
    server.push("w2", 0, vector(3))
    server.aggregation.sent_to("w1")  # its connection dropped and came back
    before = server.model.astype(np.float64)
    events = server.push("w1", 0, vector(1), chunks=[1, 2, 3, 4])
    assert completed(events) == [Completed(4, frozenset(["w1"]))]
    expected = (1 - weight) * before + weight * (vector(9) + vector(1))
    expected[DELTAS:] = (1 - weight) * before[DELTAS:] + weight * vector(1)[DELTAS:]
    np.testing.assert_allclose(server.model[3:], expected[3:], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("why", ["joined later", "left", "was sent another version"])
def test_fedasync_mixes_in_the_delta_alone_if_it_does_not_know_the_model_behind_it(why):
    members = ["w0"] if why == "joined later" else ["w0", "w1"]
    server = Server.of(FedAsync, members, vector(9), mixing=0.5, staleness_weight="constant")
    server.push("w0", 0, vector(0))
    if why == "joined later":
        server.members("w0", "w1")
    elif why == "left":
        server.members("w0")
    else:
        server.aggregation.sent_to("w1")
    before = server.model
    server.push("w1", 0, vector(1))
    expected = before + 0.5 * vector(1)
    np.testing.assert_allclose(server.model[:DELTAS], expected[:DELTAS], rtol=1e-5, atol=1e-6)


def test_fedasync_knows_the_model_of_a_worker_that_joined_later_from_its_second_update_on():
    server = Server.of(FedAsync, ["w0"], vector(9), mixing=0.5, staleness_weight="constant")
    server.push("w0", 0, vector(0))
    server.members("w0", "w1")
    server.push("w1", 0, vector(1))
    sent = server.model
    server.push("w0", 1, vector(2))
    before = server.model
    server.push("w1", 2, vector(3))
    expected = 0.5 * before + 0.5 * (sent + vector(3))
    np.testing.assert_allclose(server.model[:DELTAS], expected[:DELTAS], rtol=1e-5, atol=1e-6)


@without_a_barrier
def test_only_the_sender_gets_the_new_model_and_only_when_its_update_is_whole(kind):
    server = Server.of(kind, ["w0", "w1"], vector(9))
    assert server.push("w0", 0, vector(0), chunks=range(4)) == []
    assert server.version == 0
    events = server.push("w0", 0, vector(0), chunks=[4])
    assert [(e.version, e.chunk, e.worker) for e in published(events)] == [
        (1, i, "w0") for i in range(CHUNKS)
    ]
    assert completed(events) == [Completed(1, frozenset(["w0"]))]


@without_a_barrier
def test_without_a_barrier_what_is_late_double_or_early_is_refused_and_changes_nothing(kind):
    server = Server.of(kind, ["w0", "w1"], vector(9), mode="async")
    assert refused(server.push("w0", 1, vector(5))) == ["early"] * CHUNKS
    server.push("w0", 0, vector(0))
    server.push("w0", 1, vector(1))
    server.chunk("w1", 0, vector(2), 3)
    before = server.model.copy()
    assert refused(server.push("w0", 1, vector(5))) == ["double"] * CHUNKS
    assert refused(server.push("w0", 0, vector(5))) == ["late"] * CHUNKS
    assert refused(server.chunk("w1", 0, vector(5), 3)) == ["double"]
    np.testing.assert_array_equal(server.model, before)
    assert server.version == 2


@without_a_barrier
def test_without_a_barrier_an_update_counts_once_even_if_its_worker_was_away_in_between(kind):
    server = Server.of(kind, ["w0", "w1"], vector(9), mode="async")
    server.push("w0", 0, vector(0))
    before = server.model.copy()
    server.members("w1")
    server.members("w0", "w1")
    assert server.aggregation.missing("w0", 0) == []
    assert refused(server.push("w0", 0, vector(0))) == ["double"] * CHUNKS
    np.testing.assert_array_equal(server.model, before)


def test_a_departed_worker_s_backup_is_not_kept():
    server = Server.of(Immediate, ["w0", "w1"], vector(9), mode="async", dcasgd=True)
    for worker in ("w0", "w1"):
        server.aggregation.sent_to(worker)
    server.push("w1", 0, vector(1))
    server.members("w1")
    before = server.model
    server.push("w0", 0, vector(0))
    expected = before[:DELTAS] + vector(0)[:DELTAS]
    np.testing.assert_allclose(server.model[:DELTAS], expected, rtol=1e-5, atol=1e-6)


@without_a_barrier
def test_a_model_is_kept_only_until_nobody_works_from_it_any_more(kind):
    dcasgd = {"mode": "async", "dcasgd": True} if kind is Immediate else {}
    server = Server.of(kind, ["w0", "w1"], vector(9), **dcasgd)
    initial = weakref.ref(server.aggregation.chunks[0])
    server.push("w0", 0, vector(0))
    assert initial() is not None
    server.push("w1", 0, vector(1))
    assert initial() is None


@without_a_barrier
def test_without_a_barrier_missing_names_the_rest_of_an_update(kind):
    server = Server.of(kind, ["w0"], vector(9), mode="async")
    missing = server.aggregation.missing
    assert missing("w0", 0) == list(range(CHUNKS))
    server.push("w0", 0, vector(0), chunks=[1, 2])
    assert missing("w0", 0) == [0, 3, 4]
    server.push("w0", 0, vector(0), chunks=[0, 3, 4])
    assert missing("w0", 0) == []
    assert missing("w0", 1) == list(range(CHUNKS))
    server.chunk("w0", 1, vector(1), 0)
    assert missing("w0", 0) == []
    assert server.aggregation.in_progress() == []


# What was published stays as it was


@property_test
@given(
    st.sampled_from(["mean", "ordered", *OUTER, "asgd", "dcasgd", "fedasync"]), st.integers(0, 1000)
)
def test_published_arrays_are_never_written_to_again(kind, seed):
    workers = ["w0", "w1"]
    barrier = kind in ("mean", "ordered", *OUTER)
    if barrier:
        outer = kind if kind in OUTER else "sgd"
        server = Server.of(Mean, [], None, kind == "ordered", weights="samples", outer=outer)
    elif kind == "fedasync":
        server = Server.of(FedAsync)
    else:
        server = Server.of(Immediate, [], None, mode="async", dcasgd=kind == "dcasgd")
    events = server.push("w0", INITIAL, vector(seed))
    server.members(*workers)
    for worker in workers:
        server.aggregation.sent_to(worker)
    has = dict.fromkeys(workers, 0)
    kept = [(event.data, event.data.copy()) for event in published(events)]
    for round in range(4):
        for worker in workers:
            events = server.push(worker, has[worker], vector([seed, round]), samples=2)
            kept += [(event.data, event.data.copy()) for event in published(events)]
            for event in completed(events):
                for member in event.members:
                    has[member] = event.version
        if barrier:
            has = dict.fromkeys(workers, server.version)
    assert len(kept) >= 5 * CHUNKS
    for array, copy in kept:
        np.testing.assert_array_equal(array, copy)


@every_kind
def test_updates_are_never_written_to(kind):
    server = Server.of(kind, ["w0"], vector(9), mode="async")
    update = vector(0)
    at = server.aggregation.layout.chunks
    for i, chunk in enumerate(at):
        data = update[chunk.start : chunk.stop]  # the memory itself, as from a socket
        server.aggregation.receive(Contribution("w0", 0, i, data))
    assert server.version == 1
    np.testing.assert_array_equal(update, vector(0))


class Device(NumpyBackend):
    """Says that it is a GPU, and writes down what it was asked to add up."""

    cuda = 0

    def __init__(self):
        self.sums = []

    def weighted_sum(self, xs, weights, out=None):
        self.sums.append(len(xs))
        return NumpyBackend().weighted_sum(xs, weights, out)

    def add_scaled(self, total, x, weight):
        self.sums.append(-1)
        super().add_scaled(total, x, weight)


@pytest.mark.parametrize("ordered", [False, True])
@pytest.mark.parametrize(
    ("lasting", "sums"), [("abcd", [4]), ("bcd", [4]), ("", [2, -1, -1]), ("ac", [2, 3])]
)
def test_what_lies_in_its_senders_memory_is_added_up_by_a_device_in_one_pass(
    lasting, sums, ordered
):
    backend = Device()
    mean = Mean(layout(), backend, RunConfig(weights="samples"), ordered=ordered)
    whole = vector(0)
    for i, at in enumerate(mean.layout.chunks):
        mean.receive(Contribution("a", INITIAL, i, whole[at.start : at.stop]))
    mean.set_members({w: rank for rank, w in enumerate("abcd")})
    backend.sums.clear()
    updates = {worker: vector(1 + rank) for rank, worker in enumerate("abcd")}
    at = mean.layout.chunks[0]
    for rank, (worker, update) in enumerate(updates.items()):
        part = update[at.start : at.stop]
        events = mean.receive(
            Contribution(worker, 0, 0, part, samples=1 + rank, lasts=worker in lasting)
        )
    (event,) = published(events)
    assert backend.sums == sums
    expected = averaged(whole, list(updates.values()), [1, 2, 3, 4])[at.start : at.stop]
    np.testing.assert_allclose(event.data, expected, rtol=1e-5, atol=1e-6)


class Several(NumpyBackend):
    """Looks at three chunks at a time, and writes down of how many vectors."""

    at_once = 3 * 3 * 4

    def __init__(self):
        self.looks = []

    def are_finite(self, xs):
        self.looks.append(len(xs))
        return super().are_finite(xs)


@property_test
@given(
    seed=st.integers(0, 10_000),
    outer=st.sampled_from(list(OUTER)),
    weights=st.sampled_from(["equal", "samples", "fednova"]),
    ordered=st.booleans(),
    clip=st.booleans(),
    compression=st.sampled_from(["none", "int8"]),
)
def test_what_comes_together_counts_as_if_it_came_one_after_the_other(
    seed, outer, weights, ordered, clip, compression
):
    clip = 4.0 if clip and weights != "fednova" else 0.0
    config = RunConfig(outer=outer, weights=weights, clip_update=clip, compression=compression)
    random = np.random.default_rng(seed)
    one, all_at_once = (
        Mean(layout(), backend, config, ordered=ordered) for backend in (NumpyBackend(), Several())
    )
    ranks = {w: rank for rank, w in enumerate("abc")}
    at = one.layout.chunks

    def chunk(worker, round, i, whole):
        data = whole[at[i].start : at[i].stop].copy()
        return Contribution(worker, round, i, data, 1 + i, 1 + i)

    whole = vector(seed)
    for mean in (one, all_at_once):
        together(mean, [chunk("a", INITIAL, i, whole) for i in range(CHUNKS)])
        mean.set_members(ranks)
    for _ in range(3):
        round, updates = one.version, []
        for worker in "abc":
            whole = vector([seed, round, ranks[worker]])
            whole[random.integers(SIZE)] = random.choice([1.0, 1.0, np.nan, 3e38])
            updates += [chunk(worker, round, i, whole) for i in range(CHUNKS)]
        updates = [updates[i] for i in random.permutation(len(updates))]
        # Then all of it once more, sound: what was doubted is counted, and the rest came twice.
        again = [
            chunk(w, round, i, vector(rank)) for w, rank in ranks.items() for i in range(CHUNKS)
        ]
        for left in (updates, again):
            while left:
                some = left[: random.integers(1, 12)]
                del left[: len(some)]
                apart = [event for update in some for event in one.receive(update)]
                at_once = together(all_at_once, some)
                assert one.version == all_at_once.version
                assert described(apart, clip) == described(at_once, clip)
        if one.version == round:
            assert clip, "with it, nobody's may be left"
            break
        np.testing.assert_array_equal(
            np.concatenate(one.chunks), np.concatenate(all_at_once.chunks)
        )


def together(mean, updates):
    return [event for update in updates for event in mean.take(update)] + mean.settle()


def described(events, clip):
    """What happened, in any order. Why a chunk is refused of which there was no need any more depends on when that is
    found: it came twice or late, or also is too long."""
    rows = []
    for each in events:
        if isinstance(each, Published):
            rows.append(f"published {each.version} {each.chunk} {each.data.tobytes().hex()}")
        elif not isinstance(each, Refused):
            rows.append(repr(dataclasses.astuple(each)[:2]))
        elif not clip:
            rows.append(each.reason.replace("double", "late"))
    return sorted(rows)


def test_what_comes_together_is_looked_at_together():
    backend = Several()
    mean = Mean(layout(), backend, RunConfig(outer="momentum"))
    together(mean, [Contribution("a", INITIAL, i, x) for i, x in enumerate(cut(vector(0)))])
    mean.set_members({"a": 0, "b": 1})
    backend.looks.clear()
    updates = [
        Contribution(worker, 0, i, x)
        for worker in "ab"
        for i, x in enumerate(cut(vector(ord(worker))))
    ]
    events = together(mean, updates)
    assert len(completed(events)) == 1
    # Chunks of deltas, three in number, come with a momentum each.
    assert backend.looks == [6, 2]


def cut(whole):
    return [whole[at.start : at.stop] for at in layout().chunks]
