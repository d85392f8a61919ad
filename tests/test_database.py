"""The state table: records, progress, and who is the slowest."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from esync.state.database import Latest, MedianOfThree, Table

INFINITE = float("inf")


def table_with(*workers, **options):
    table = Table(**options)
    for rank, worker in enumerate(workers):
        table.activate(table.add(worker, rank, 0.0))
    return table


def test_a_new_record_is_known_but_not_expected_at_the_barrier():
    table = Table()
    record = table.add("a", 4, 2.5, role="worker", host="old", device="cpu")
    assert table.records == {"a": record}
    assert (record.rank, record.heard, record.since, record.host) == (4, 2.5, 2.5, "old")
    assert table.active() == []
    assert table.slowest() is None
    table.activate(record)
    assert table.active() == [record]
    assert table.slowest() is record


def test_a_removed_worker_is_forgotten_and_no_longer_the_slowest():
    table = table_with("a", "b")
    table.progress(table.records["a"], 0, 1, 1.0, 1.0)
    table.progress(table.records["b"], 0, 1, 9.0, 9.0)
    assert table.slowest().worker == "b"
    assert table.remove("b").worker == "b"
    assert table.slowest().worker == "a"
    assert table.remove("b") is None
    assert table.remove("a").worker == "a"
    assert table.slowest() is None


def test_progress_in_a_round_moves_the_last_step_s_time_only_when_a_step_was_finished():
    table = table_with("a")
    record = table.records["a"]
    table.progress(record, 0, 0, 0.0, 1.0)
    assert (record.round, record.step, record.since, record.heard) == (0, 0, 1.0, 1.0)
    table.progress(record, 0, 2, 0.5, 2.0)
    assert (record.step, record.since) == (2, 2.0)
    table.progress(record, 0, 2, 0.0, 3.0)
    assert (record.step, record.since, record.heard) == (2, 2.0, 3.0)
    table.progress(record, 0, 1, 0.0, 4.0)
    assert (record.step, record.since) == (2, 2.0)


def test_a_new_round_takes_back_what_was_said_of_the_last():
    table = table_with("a")
    record = table.records["a"]
    table.progress(record, 0, 3, 0.5, 1.0)
    record.ready = record.arrived = True
    table.progress(record, 1, 0, 0.0, 2.0)
    assert (record.round, record.step, record.since) == (1, 0, 2.0)
    assert not record.ready
    assert not record.arrived
    assert record.step_s.value == 0.5


def test_a_report_without_a_finished_step_measures_nothing():
    table = table_with("a")
    record = table.records["a"]
    table.progress(record, 0, 0, 0.0, 1.0)
    assert record.step_s.value == 0.0
    table.progress(record, 0, 1, 0.25, 1.0)
    table.progress(record, 0, 1, 0.0, 1.0)
    assert record.step_s.value == 0.25


def test_an_unmeasured_worker_costs_what_the_table_was_told():
    assert table_with("a", "b", unmeasured_s=INFINITE).slowest().worker == "a"
    for unmeasured_s, slowest in ((INFINITE, "b"), (0.0, "a")):
        table = table_with("a", "b", unmeasured_s=unmeasured_s)
        table.progress(table.records["a"], 0, 1, 5.0, 5.0)
        assert table.slowest().worker == slowest


def test_delivery_counts_but_not_before_a_step_was_measured():
    table = table_with("a", "b")
    for worker in ("a", "b"):
        table.progress(table.records[worker], 0, 1, 1.0, 1.0)
    table.delivered(table.records["b"], 0.5)
    assert table.slowest().worker == "b"
    table.delivered(table.records["a"], -3.0)
    assert table.records["a"].delivery_s.value == 0.0
    table = table_with("a", "b", unmeasured_s=0.0)
    table.progress(table.records["a"], 0, 1, 1.0, 1.0)
    table.delivered(table.records["b"], 99.0)
    assert table.slowest().worker == "a"


def test_a_round_that_began_a_while_ago_counts_from_then():
    table = table_with("a")
    record = table.records["a"]
    table.progress(record, 0, 1, 1.0, 5.0)
    table.progress(record, 1, 3, 1.0, 9.0, running_s=0.75)
    assert (record.round, record.step, record.since, record.heard) == (1, 3, 8.25, 9.0)
    table.progress(record, 2, 0, 0.0, 9.0, running_s=-4.0)
    assert record.since == 9.0, "no step begins in the future"
    table.progress(record, 2, 1, 0.0, 10.0, running_s=0.5)
    assert record.since == 10.0, "only a new round began before it was told"


def test_a_synchronisation_lasts_from_the_last_step_to_the_next_round():
    table = table_with("a")
    record = table.records["a"]
    table.progress(record, 0, 1, 1.0, 5.0)
    record.arrived, record.finished = True, (0, 5.0)
    table.progress(record, 0, 1, 0.0, 6.0)
    assert record.sync_s.value == 0.0, "the round still goes on"
    table.progress(record, 1, 0, 0.0, 7.5)
    assert record.sync_s.value == 2.5
    assert table.slowest() is record


def test_a_round_that_ended_without_a_worker_is_no_synchronisation_of_its():
    table = table_with("a")
    record = table.records["a"]
    table.progress(record, 0, 1, 1.0, 5.0)
    table.progress(record, 1, 0, 0.0, 7.5)
    assert record.sync_s.value == 0.0
    record.arrived, record.finished = True, (0, 8.0)  # of an earlier round
    table.progress(record, 2, 0, 0.0, 9.0)
    assert record.sync_s.value == 0.0


def test_a_worker_that_becomes_active_has_the_clock_of_the_slowest():
    table = table_with("a", "b")
    table.records["a"].clock, table.records["b"].clock = 9, 7
    late = table.add("late", 2, 0.0)
    assert late.clock == 0
    table.activate(late)
    assert late.clock == 7
    assert (table.records["a"].clock, table.records["b"].clock) == (9, 7)
    first = Table().add("first", 0, 0.0)
    Table().activate(first)
    assert first.clock == 0


@settings(max_examples=200)
@given(
    st.lists(
        st.tuples(
            st.sampled_from(["step", "step", "step", "deliver", "activate", "leave"]),
            st.integers(0, 2),
            st.floats(0.01, 10.0),
        ),
        min_size=5,
        max_size=40,
    ),
    st.sampled_from([Latest, MedianOfThree]),
    st.sampled_from([0.0, INFINITE]),
)
def test_the_slowest_that_is_kept_is_the_slowest_that_a_search_finds(events, estimate, unmeasured):
    def cost(record):
        if not record.step_s.value:
            return unmeasured
        return record.step_s.value + record.delivery_s.value

    table = table_with("w0", "w1", estimate=estimate, unmeasured_s=unmeasured)
    for event, number, seconds in events:
        worker = f"w{number}"
        record = table.records.get(worker)
        if record is None:
            record = table.add(worker, number, 0.0)
        if event == "leave":
            table.remove(worker)
        elif event == "activate":
            table.activate(record)
        elif event == "step":
            table.progress(record, 0, record.step + 1, seconds, 0.0)
        elif event == "deliver":
            table.delivered(record, seconds)
        active = [record for record in table.records.values() if record.active]
        slowest = table.slowest()
        assert (slowest is None) == (not active)
        if slowest is not None:
            assert slowest in active
            assert cost(slowest) == max(cost(record) for record in active)


def test_the_median_of_three_passes_over_one_stall_and_follows_a_change():
    estimate = MedianOfThree()
    values = []
    for seconds in (1.0, 1.0, 50.0, 1.0, 4.0, 4.0, 0.5, 0.5):
        estimate.observe(seconds)
        values.append(estimate.value)
    assert values == [1.0, 1.0, 1.0, 1.0, 4.0, 4.0, 4.0, 0.5]


def test_the_latest_is_the_last_measurement_and_has_no_jitter():
    estimate = Latest()
    for seconds in (1.0, 50.0):
        estimate.observe(seconds)
        assert estimate.value == seconds
        assert estimate.jitter == 0.0


def test_jitter_is_the_smoothed_deviation():
    estimate = MedianOfThree()
    estimate.observe(1.0)
    assert estimate.jitter == 0.0
    estimate.observe(1.25)
    assert estimate.jitter == pytest.approx(0.25 / 4)
    estimate.observe(1.0)
    assert estimate.jitter == pytest.approx(0.25 / 4 * 3 / 4)
