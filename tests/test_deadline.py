"""How long a barrier waits for a worker that is connected and does not arrive, and runs with too few workers."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from esync.messages import Join, Lost, Members, Query, Report, Reset, Response
from esync.state.deadline import deadline_s
from esync.state.handlers import Tick
from tests.test_handlers import ENDPOINTS, running, to

seconds = st.floats(0, 1e4)


def test_the_deadline_is_learned_from_the_arrivals():
    steady = [4.0, 4.1, 3.9, 4.0, 4.05]
    assert deadline_s(steady, 1, 300) == pytest.approx(8.0, rel=0.05)
    spread = [4.0, 9.0, 2.0, 5.0, 7.0]
    assert deadline_s(spread, 1, 300) > 15
    assert deadline_s([0.01] * 9, 5, 300) == 5
    assert deadline_s([200.0] * 9, 5, 300) == 300
    assert deadline_s([4.0, 4.0], 5, 300) == 300, "two arrivals are no habit"
    one_stall = [4.0] * 8 + [100.0]
    assert deadline_s(one_stall, 1, 300) == pytest.approx(8.0)


@given(st.lists(seconds, max_size=20), seconds, seconds)
def test_the_deadline_is_between_floor_and_ceiling_and_beyond_the_habit(arrivals, low, high):
    floor, ceiling = min(low, high), max(low, high)
    limit = deadline_s(arrivals, floor, ceiling)
    assert floor <= limit <= ceiling
    if len(arrivals) >= 3 and limit < ceiling:
        assert limit >= sorted(arrivals)[len(arrivals) // 2 - 1]


def arrives(server, worker, step=3):
    version = server.handlers.history.version
    server.gets(Query(worker, version, step, compute_s=1.0))
    return server.gets(Report(worker, version, step, "sync"))


def published(server, version):
    return server.gets(Reset("ps", version, {}))


def habitual(rounds=5, **config):
    """A run of three in which each round took four seconds."""
    server = running("a", "b", "c", **{"mode": "sync", **config})
    for version in range(1, rounds + 1):
        server.tick(4.0)
        server.gets(Report("ps", version - 1, 0, "serving"))
        for worker in ("a", "b", "c"):
            arrives(server, worker)
        published(server, version)
    return server


def members_of(sent):
    return [set(m.workers) for m in to("ps", sent) if isinstance(m, Members)]


def wait(server, seconds, *beating):
    """Time passes, in which only these are heard of."""
    sent = []
    for _ in range(int(seconds * 2)):
        version = server.handlers.history.version
        for worker in beating:
            server.gets(Report(worker, version, 0, "train"))
        server.gets(Report("ps", version, 0, "serving"))
        sent += server.tick(0.5)
    return sent


def test_a_connected_worker_that_does_not_arrive_is_not_waited_for_and_may_come_back():
    server = habitual()
    server.tick(4.0)
    arrives(server, "a")
    arrives(server, "b")
    assert not members_of(wait(server, 3.0, "a", "b", "c")), "it may still come"
    sent = wait(server, 3.0, "a", "b", "c")
    assert members_of(sent) == [{"a", "b"}]
    assert any("c has not arrived after" in text and "usually" in text for text in server.said)
    published(server, 6)
    assert server.table.records["c"].phase == "train", "it is still here"
    back = server.gets(Query("c", 6, 0))
    assert members_of(back) == [{"a", "b", "c"}]
    assert [m.action for m in to("c", back) if isinstance(m, Response)]


def test_nobody_is_late_while_nobody_waits():
    server = habitual()
    server.tick(4.0)
    assert not members_of(wait(server, 30.0, "a", "b", "c"))


def test_without_a_habit_the_ceiling_counts_and_zero_is_none():
    for ceiling, expected in ((20.0, [{"a", "b"}]), (0.0, [])):
        server = running("a", "b", "c", mode="sync", deadline_s=ceiling)
        arrives(server, "a")
        assert not members_of(wait(server, 19.0, "a", "b", "c"))
        arrives(server, "b")
        assert members_of(wait(server, 15.0, "a", "b", "c")) == expected


def test_a_worker_that_has_become_slow_for_good_is_waited_for_again():
    server = habitual()
    for version in range(6, 30):
        server.tick(4.0)
        for worker in ("a", "b"):
            if server.table.records[worker].active:
                arrives(server, worker)
        sent = wait(server, 16.0, "a", "b", "c")
        if not members_of(sent):
            break
        published(server, version)
        server.gets(Query("c", version, 0))
    else:
        pytest.fail("it is late in every round")
    assert version < 25


def test_where_nobody_waits_for_others_there_is_no_deadline():
    server = running("a", "b", mode="async", deadline_s=10.0)
    arrives(server, "a")
    assert not members_of(wait(server, 30.0, "a", "b"))


def test_with_too_few_workers_the_run_pauses_says_so_and_goes_on():
    server = running("a", "b", "c", mode="esync", min_workers=2)
    server.gets(Query("a", 0, 1, compute_s=1.0))
    for worker in ("b", "c"):
        server.handlers._remove(worker, "gone")
    asked = server.gets(Query("a", 0, 2, compute_s=1.0))
    assert not to("a", asked), "nobody goes on alone"
    server.tick(0.5)
    assert "waiting for 1 more worker: too few are left" in server.said
    back = server.member("d")
    assert [m for m in to("a", back) if isinstance(m, Response)], "and now it does"
    assert [m for m in to("d", back) if isinstance(m, Response)]
    server.tick(0.5)
    assert server.handlers.waiting_for() == ""


def test_a_worker_whose_connection_is_gone_and_who_is_silent_is_soon_evicted():
    server = running("a", "b", "c", mode="sync")
    for peer in ("b", "c", "nobody"):
        server.gets(Lost("ps", peer))
    server.tick(0.5)
    server.beat("c")
    sent = wait(server, 1.5, "a", "c")
    assert members_of(sent) == [{"a", "c"}], "c is heard of: it is alive"
    assert "worker b left: evicted: its connection is gone" in server.said
    assert not members_of(wait(server, 5.0, "a", "c"))
    error = server.refuses(Lost("ps", "a"), peer="a")
    assert error.code == "wrong-id"
    server.gets(Lost("a", "c"))  # a worker may not say it
    assert members_of(wait(server, 3.0, "a")) == []


def test_a_worker_that_comes_in_the_middle_of_a_round_has_its_own_time():
    server = habitual(deadline_s=20.0)
    server.tick(4.0)
    arrives(server, "a")
    arrives(server, "b")
    wait(server, 12.0, "a", "b", "c")  # the others have gone on without c by now
    assert not server.table.records["c"].active
    for _ in range(8):  # and nothing is published: they wait for another
        server.gets(Report("ps", 5, 0, "serving"))
        server.tick(0.5)
    server.gets(Query("c", 5, 0))
    assert server.table.records["c"].active
    assert not members_of(wait(server, 3.0, "a", "b", "c")), "it has only begun"


def test_nobody_is_late_for_rounds_that_another_has_made_longer():
    """`c` is the slowest by now: who arrived after 4 seconds before does so when it does."""
    server = habitual(mode="esync")
    wait(server, 20.0, "a", "b", "c")
    arrives(server, "a")
    assert not members_of(wait(server, 4.5, "a", "b", "c")), (
        "a and b stop when no step fits any more"
    )
    arrives(server, "b")
    assert members_of(wait(server, 1.0, "a", "b", "c")) == [{"a", "b"}], (
        "the others have waited 5 s"
    )


def test_others_wait_as_long_as_a_step_of_those_who_have_arrived():
    server = habitual()
    wait(server, 12.0, "a", "b", "c")
    version = server.handlers.history.version
    for _ in range(3):
        server.gets(Query("a", version, 3, compute_s=9.0))
    server.gets(Report("a", version, 3, "sync"))
    assert not members_of(wait(server, 8.5, "a", "b", "c")), "no other step of 9 s fitted"
    assert members_of(wait(server, 1.0, "a", "b", "c"))


def test_a_pause_is_no_time_that_somebody_was_waited_for():
    server = habitual(min_workers=3)
    server.tick(1.0)
    server.handlers._remove("b", "gone")
    arrives(server, "a")
    assert not members_of(wait(server, 60.0, "a", "c"))
    server.member("d")
    arrives(server, "d")
    assert not members_of(wait(server, 7.0, "a", "c", "d"))
    assert members_of(wait(server, 2.0, "a", "c", "d")) == [{"a", "d"}]


def test_nobody_is_late_for_an_outage_of_the_parameter_server():
    """Its first word, when it is back, may be of the next version already, or of an older one."""
    for version in (4, 5, 6):
        server = habitual(heartbeat_s=100.0)
        for _ in range(60):
            server.beat("a", "b", "c")
            server.tick(0.5)
        server.unreachable.add("ps")
        server.gets(
            Join("ps", "ps", host="head", endpoints=dict(ENDPOINTS), life="2"), peer="ps\x002"
        )
        server.agree("ps\x002")
        if version == 6:
            server.gets(Reset("ps", 6, {}), peer="ps\x002")
        else:
            server.gets(Report("ps", version, 0, "serving"), peer="ps\x002")
        assert server.handlers.history.version == version
        for worker in ("a", "b", "c"):
            server.gets(Query(worker, version, 0))
        arrives(server, "a")
        for _ in range(14):
            server.beat("a", "b", "c")
            server.gets(Report("ps", version, 0, "serving"), peer="ps\x002")
            server.tick(0.5)
        assert [r.worker for r in server.table.active()] == ["a", "b", "c"], version


def clocked(**config):
    """A run in mode ssp in which each worker has finished four rounds, of two seconds each."""
    server = running("a", "b", "c", mode="ssp", max_staleness=1, **config)
    for round in range(4):
        server.tick(2.0)
        server.gets(Report("ps", server.handlers.history.version, 0, "serving"))
        for worker in ("a", "b", "c"):
            server.gets(Report(worker, 3 * round, 1, "sync", compute_s=2.0))
            server.gets(Query(worker, 3 * round + 3, 0))
    return server


def alone(server, worker, round):
    """It finishes a round while the others are still in theirs, and asks for the next."""
    server.gets(Report(worker, round, 1, "sync", compute_s=2.0))
    return [m for m in to(worker, server.gets(Query(worker, round + 1, 0)))]


def test_whoever_is_held_for_a_stuck_worker_goes_on_without_it():
    server = clocked()
    assert alone(server, "a", 12), "one round ahead"
    assert alone(server, "b", 13)
    assert not alone(server, "a", 15), "two rounds ahead of c"
    waited = wait(server, 4.5, "a", "b", "c")
    assert not to("a", waited)
    assert server.table.records["c"].active
    sent = wait(server, 2.0, "a", "b", "c")
    assert [m.action for m in to("a", sent) if isinstance(m, Response)] == ["sync"], "it may go on"
    assert any("c has not arrived after" in text for text in server.said)
    server.gets(Report("c", 12, 1, "sync", compute_s=9.0))
    server.gets(Query("c", 16, 0))
    assert server.table.records["c"].active, "it is back"


def test_nobody_is_late_in_ssp_while_nobody_is_held():
    server = clocked()
    assert alone(server, "a", 12)
    wait(server, 60.0, "a", "b", "c")
    assert len(server.table.active()) == 3


def test_who_was_held_has_its_own_time():
    server = clocked(deadline_s=20.0)
    assert alone(server, "a", 12)
    assert not alone(server, "a", 15)
    wait(server, 4.0, "a", "b", "c")
    for worker, round in (("b", 12), ("c", 13)):
        assert alone(server, worker, round)
    assert server.table.records["a"].since == server.now, "its step begins when it is let go on"


def test_everybody_who_was_drawn_may_be_stuck():
    server = running("a", "b", mode="fedavg", participation=0.5, deadline_s=20.0)
    [drawn] = server.handlers._drawn
    [other] = {"a", "b"} - {drawn}
    assert not members_of(wait(server, 19.0, "a", "b"))
    wait(server, 3.0, "a", "b")
    assert [r.worker for r in server.table.active()] == [other], "it waited, held"
    assert server.handlers._drawn == {other}


def test_who_is_drawn_in_the_middle_of_a_round_begins_then():
    server = habitual(mode="fedavg", local_steps=3, deadline_s=20.0)
    handlers = server.handlers
    handlers._drawn = {"a"}
    wait(server, 18.0, "a", "b", "c")
    handlers._drawn = {"b", "c"}
    server.table.remove("a")
    handlers._drawn = {"a"}
    handlers.policy.participants = lambda table, round: table.active()
    handlers._members_changed()
    assert handlers._drawn == {"b", "c"}
    arrives(server, "b")
    assert not members_of(wait(server, 7.0, "b", "c")), (
        "it usually takes 4 s, and has begun 7 s ago"
    )
    assert members_of(wait(server, 2.0, "b", "c"))


def test_a_state_server_that_stood_still_blames_nobody_in_ssp_either():
    server = clocked()
    assert alone(server, "a", 12)
    assert alone(server, "b", 13)
    assert not alone(server, "a", 15)
    server.now += 60.0
    server.gets(Tick(60.0))
    assert server.table.records["c"].active


@pytest.mark.parametrize("mode", ["sync", "ssp"])
def test_nobody_is_late_while_the_parameter_server_is_gone(mode):
    """Who has not got the model from it can do nothing."""
    server = (habitual if mode == "sync" else clocked)(heartbeat_s=100.0)
    if mode == "sync":
        arrives(server, "a")
    else:
        assert alone(server, "a", 12)
        assert not alone(server, "a", 15)
    server.unreachable.add("ps")
    for _ in range(60):
        server.beat("a", "b", "c")
        server.tick(0.5)
    assert len(server.table.active()) == 3


def test_rounds_in_which_something_stood_still_teach_no_habit():
    server = running("a", "b", "c", mode="sync", min_workers=3)
    server.handlers._remove("b", "gone")
    arrives(server, "a")
    assert not server.table.records["a"].arrivals
    server.gets(Report("ps", 0, 0, "serving"))
    server.tick(0.5)
    server.member("d")
    server.tick(1.0)
    arrives(server, "c")
    assert not server.table.records["c"].arrivals
