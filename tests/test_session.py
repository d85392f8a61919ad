"""A worker's side of the pacing protocol."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from esync.messages import Query, Response
from esync.worker.session import Action, Session


def session_in(round=0, *, nonblocking=True, started=True):
    """A session whose `round` has begun; `started` is whether it has begun another before."""
    session = Session("a", nonblocking=nonblocking)
    if started:
        session.begin(round - 1)
    session.begin(round)
    return session


def answered(session, action, lease, width=1.0):
    query = session.query()
    session.on_response(Response(query.round, query.step, action, lease, width))
    return query


def away_in(round, steps=0, *, most=0):
    """A session that has pushed the update of `round` and finished so many steps since."""
    session = Session("a", nonblocking=True, most=most)
    session.begin(round - 1)
    session.begin(round)
    answered(session, "sync", 1)
    session.finished(0.5, 8)
    session.synchronising()
    session.pushed()
    for _ in range(steps):
        session.finished(0.25, 8)
    return session


def test_before_the_first_round_there_is_nothing_to_do_but_ask():
    session = Session("a", nonblocking=True)
    session.begin(0)
    assert session.action() is Action.WAIT
    assert session.wants_query()
    assert session.query() == Query("a", 0, 0, ahead=0)
    assert not session.wants_query()
    assert session.action() is Action.WAIT


def test_the_first_step_of_a_later_round_needs_no_leave():
    session = session_in(5)
    assert session.action() is Action.TRAIN
    assert session.wants_query()
    assert session.query().ahead == 1


def test_asking_and_waiting_as_published_gets_an_answer_before_each_step():
    session = session_in(5, nonblocking=False)
    assert session.action() is Action.WAIT
    assert answered(session, "train", 1).ahead == 0
    assert session.action() is Action.TRAIN
    assert not session.wants_query()
    session.finished(0.5, 64)
    assert session.action() is Action.WAIT
    assert session.wants_query()
    assert answered(session, "sync", 0) == Query("a", 5, 1, 0, 0.5, 64)
    assert session.action() is Action.SYNC


def test_it_asks_again_while_the_last_step_of_a_lease_runs_and_not_before():
    session = session_in(5)
    answered(session, "train", 4)
    asked = []
    for _ in range(4):
        asked.append(session.wants_query())
        session.finished(0.1, 1)
    assert asked == [False, False, False, True]
    assert session.wants_query()
    assert session.action() is Action.WAIT


def test_a_query_that_was_asked_in_time_keeps_the_device_busy():
    session = session_in(5)
    answered(session, "train", 2)
    session.finished(0.1, 1)
    query = session.query()
    assert (query.step, query.ahead) == (1, 1)
    assert session.action() is Action.TRAIN
    session.on_response(Response(5, 1, "train", 3))
    session.finished(0.1, 1)
    assert session.action() is Action.TRAIN


def test_sync_lets_it_finish_the_steps_that_it_was_told():
    session = session_in(5)
    answered(session, "sync", 2)
    assert not session.wants_query()
    assert session.action() is Action.TRAIN
    session.finished(0.1, 1)
    assert session.action() is Action.TRAIN
    session.finished(0.1, 1)
    assert session.action() is Action.SYNC


def test_sync_out_of_turn_ends_a_lease_after_the_running_step():
    session = session_in(5)
    answered(session, "train", 50)
    session.finished(0.1, 1)
    session.finished(0.1, 1)
    session.on_response(Response(5, 0, "sync", 0))
    assert session.action() is Action.SYNC


def test_an_answer_of_another_round_changes_nothing():
    for other in (4, 6):
        session = session_in(5)
        session.query()
        session.on_response(Response(other, 0, "sync", 0))
        session.on_response(Response(other, 0, "train", 9))
        assert not session.wants_query()
        assert session.action() is Action.TRAIN
        session.finished(0.1, 1)
        assert session.action() is Action.WAIT


def test_an_older_answer_never_shortens_a_lease():
    session = session_in(5)
    answered(session, "train", 9)
    session.on_response(Response(5, 0, "train", 2))
    for _ in range(8):
        session.finished(0.1, 1)
        assert session.action() is Action.TRAIN


def test_stop_holds_in_any_round_and_names_the_final_version():
    session = session_in(5)
    session.on_response(Response(9, 0, "stop"))
    assert session.final == 9
    assert session.action() is Action.STOP
    assert not session.wants_query()


def test_a_lost_question_can_be_asked_again():
    session = session_in(5)
    session.query()
    assert not session.wants_query()
    session.ask_again()
    assert session.wants_query()


def test_a_new_round_forgets_the_steps_and_orders_of_the_last():
    session = session_in(5)
    answered(session, "sync", 1)
    session.finished(0.25, 64)
    session.begin(6)
    assert (session.round, session.step, session.samples) == (6, 0, 0)
    assert session.action() is Action.TRAIN
    assert session.wants_query()
    assert session.query() == Query("a", 6, 0, ahead=1)


def test_each_step_s_time_is_reported_once_as_a_mean():
    session = session_in(5)
    for seconds in (1.0, 2.0):
        session.finished(seconds, 10)
    assert session.query(0.5) == Query("a", 5, 2, 0, 1.5, 20, 0.5)
    session.finished(4.0, 10)
    report = session.synchronising(0.25)
    assert (report.round, report.step, report.phase) == (5, 3, "sync")
    assert (report.compute_s, report.samples, report.loss) == (4.0, 30, 0.25)
    assert session.query().compute_s == 0.0


def test_totals_go_on_over_rounds():
    session = session_in(5)
    session.finished(1.0, 10)
    session.begin(6)
    session.finished(2.0, 20)
    report = session.synchronising()
    assert report.totals == session.totals.to_wire()
    assert report.totals["steps"] == 2
    assert report.totals["samples"] == 30
    assert report.totals["compute_s"] == pytest.approx(3.0)
    assert report.totals.keys() >= {"query_s", "sync_s", "eval_s"}


# Asking first


def test_who_asks_first_begins_no_round_without_leave():
    for started in (False, True):
        session = session_in(5, nonblocking=False, started=started)
        assert session.action() is Action.WAIT
        assert session.wants_query()
        assert answered(session, "sync", 3).ahead == 0
        for _ in range(3):
            assert session.action() is Action.TRAIN
            assert not session.wants_query()
            session.finished(0.1, 1)
        assert session.action() is Action.SYNC


def test_who_is_held_waits_and_may_ask_again():
    session = session_in(5, nonblocking=False)
    first = session.query()
    assert session.action() is Action.WAIT
    assert not session.wants_query()
    session.ask_again()
    assert session.wants_query()
    assert session.query() == first
    assert session.action() is Action.WAIT


def test_leave_of_a_round_that_is_over_is_no_leave():
    session = session_in(5, nonblocking=False)
    session.query()
    session.begin(6)
    session.on_response(Response(5, 0, "sync", 3, 0.5))
    assert session.action() is Action.WAIT
    assert session.width == 1.0


def test_the_end_frees_who_is_held():
    session = session_in(5, nonblocking=False)
    session.query()
    session.on_response(Response(5, 0, "stop"))
    assert session.action() is Action.STOP


def test_the_width_is_the_answer_s_and_whole_again_in_the_next_round():
    session = session_in(5, nonblocking=False)
    assert session.width == 1.0
    answered(session, "sync", 3, 0.5)
    assert session.width == 0.5
    session.begin(6)
    assert session.width == 1.0


# Overlapped synchronisation


def test_away_it_trains_on_and_asks_nobody():
    session = away_in(5)
    for _ in range(7):
        assert session.action() is Action.TRAIN
        assert not session.wants_query()
        session.finished(0.25, 8)
    assert session.round == 5


def test_the_steps_since_the_push_are_the_first_ones_of_the_next_round():
    session = away_in(5, steps=3)
    session.begin(6)
    assert (session.round, session.step, session.samples) == (6, 3, 24)
    assert not session.away
    query = session.query(running_s=0.125)
    assert query == Query("a", 6, 3, 1, 0.25, 24, running_s=0.125)
    session.on_response(Response(6, 3, "sync", 2))
    assert session.action() is Action.TRAIN
    session.finished(0.25, 8)
    session.finished(0.25, 8)
    assert session.action() is Action.SYNC
    assert session.synchronising().step == 5


def test_the_step_that_runs_when_a_round_begins_is_finished_and_no_other_begun_without_leave():
    session = away_in(5, steps=2)
    session.begin(6)
    assert session.action() is Action.TRAIN
    session.finished(0.25, 8)
    assert session.action() is Action.WAIT


def test_an_order_of_the_last_round_does_not_end_the_next_one():
    session = away_in(5)
    session.on_response(Response(5, 0, "sync", 0))
    assert session.action() is Action.TRAIN
    session.begin(6)
    assert session.action() is Action.TRAIN
    assert session.wants_query()


def test_each_step_s_time_is_reported_once_across_a_push():
    session = away_in(5, steps=2)
    session.begin(6)
    assert session.query().compute_s == 0.25
    assert session.synchronising().compute_s == 0.0


def test_the_end_comes_in_the_middle_of_an_overlap():
    session = away_in(5, steps=1)
    session.on_response(Response(6, 0, "stop"))
    assert session.action() is Action.STOP
    session.begin(6)
    assert session.action() is Action.STOP
    assert not session.wants_query()


def test_totals_count_the_steps_of_an_overlap_once():
    session = away_in(5, steps=2)
    session.begin(6)
    session.finished(0.25, 8)
    assert (session.totals.steps, session.totals.samples) == (4, 32)
    assert session.totals.compute_s == pytest.approx(1.25)


def test_away_it_trains_for_no_more_steps_than_a_round_may_have():
    session = away_in(5, steps=2, most=3)
    assert session.action() is Action.TRAIN
    session.finished(0.25, 8)
    assert session.action() is Action.WAIT
    assert not session.wants_query()


def test_a_round_that_begins_while_it_waits_has_no_step_running():
    session = away_in(5, steps=3, most=3)
    session.begin(6)
    assert session.query().ahead == 0
    assert session.action() is Action.WAIT
    session.on_response(Response(6, 3, "sync", 0))
    assert session.action() is Action.SYNC


def test_a_round_that_begins_during_the_last_step_allowed_counts_it():
    session = away_in(5, steps=2, most=3)
    session.begin(6)
    assert session.query().ahead == 1
    assert session.action() is Action.TRAIN
    session.finished(0.25, 8)
    session.on_response(Response(6, 2, "sync", 1))
    assert session.action() is Action.SYNC


# Whatever comes


@settings(max_examples=200)
@given(
    st.booleans(),
    st.lists(st.tuples(st.sampled_from(["train", "sync"]), st.integers(0, 5)), min_size=1),
)
def test_it_never_trains_beyond_its_leave_and_never_stops_short_of_it(nonblocking, answers):
    """Answers with any lease, at any query: the steps done are those allowed, and every query moves the leave."""
    session = session_in(5, nonblocking=nonblocking)
    ahead = int(nonblocking)
    allowed, sync_at = ahead, None
    for action, lease in answers:
        while session.action() is Action.TRAIN and not session.wants_query():
            session.finished(0.1, 1)
        if session.action() is Action.SYNC:
            break
        assert session.wants_query()
        query = answered(session, action, lease + 1)
        assert query.ahead == min(ahead, allowed - query.step)
        if action == "sync":
            sync_at = query.step + lease + 1
            while session.action() is Action.TRAIN:
                session.finished(0.1, 1)
            break
        allowed = max(allowed, query.step + lease + 1)
        assert session.step <= allowed
    if sync_at is not None:
        assert session.action() is Action.SYNC
        assert session.step == sync_at
