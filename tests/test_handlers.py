"""The state server's behaviour, without sockets: what it answers to whom, at times that the test chooses."""

from __future__ import annotations

import pytest

from esync import messages
from esync.config import RunConfig
from esync.messages import (
    Error,
    Join,
    Leave,
    Lost,
    Members,
    MessageError,
    Query,
    Report,
    Reset,
    Response,
    Status,
    Welcome,
)
from esync.state.handlers import GOODBYE_S, TICK_S, Handlers, StopRun, Tick
from esync.state.history import TOTALS
from esync.state.policy import FixedSteps
from esync.tensors import DELTA, Layout, Leaf

ENDPOINTS = {"push": "tcp://ps:1", "model": "tcp://ps:2"}
LAYOUT = Layout((Leaf(DELTA, "params/w", (3,), "float32"),))
OTHER = Layout((Leaf(DELTA, "params/w", (4,), "float32"),))


class Server:
    """The handlers, a clock to be set, and everything that was sent."""

    def __init__(self, **config):
        self.now = 100.0
        self.sent = []
        self.said = []
        self.finished = 0
        self.unreachable = set()  # identities whose connection is gone
        self.ps_agrees = True  # the parameter server goes by new members at once
        self.handlers = Handlers(
            RunConfig(**config),
            self._send,
            lambda: self.now,
            say=self.said.append,
            finished=self._finish,
            reaches=lambda peer: peer.decode() not in self.unreachable,
        )

    def _send(self, peer, message):
        assert messages.decode(messages.encode(message)) == message
        self.sent.append((peer.decode(), message))

    def _finish(self):
        self.finished += 1

    def gets(self, message, peer=None):
        """What is sent when `message` arrives."""
        self.sent.clear()
        if peer is None:
            peer = getattr(message, "worker", "")
        handlers = self.handlers.table_of_handlers()
        handlers[type(message)](peer.encode(), message)
        if self.ps_agrees:
            for _, announced in self.sent:  # what is sent on an acknowledgement is looked at, too
                if isinstance(announced, Members):
                    handlers[Members](b"ps", Members(announced.epoch, {}))
        return list(self.sent)

    def agree(self, peer="ps"):
        """What is sent when the parameter server goes by the members that it was told last."""
        return self.gets(Members(self.handlers._epoch, {}), peer=peer)

    def refuses(self, message, peer=None):
        with pytest.raises(MessageError) as caught:
            self.gets(message, peer)
        return caught.value

    def ps(self):
        return self.gets(Join("ps", "ps", host="head", endpoints=dict(ENDPOINTS)))

    def member(self, worker, **options):
        """A worker that joined and asks for its first step."""
        self.gets(Join(worker, "worker", device="cpu", **options))
        self.gets(Join(worker, "worker", layout=LAYOUT.to_wire(), **options))
        return self.gets(Query(worker, self.handlers.history.version, 0))

    def tick(self, seconds=0.0):
        self.now += seconds
        return self.gets(Tick())

    def beat(self, *workers):
        for worker in workers:
            self.gets(Report(worker, 0, 0, "train"))

    @property
    def table(self):
        return self.handlers.table


def running(*workers, **config):
    """A server with a parameter server and these workers, started."""
    server = Server(workers=len(workers), **config)
    server.ps()
    for worker in workers:
        server.member(worker)
    return server


def to(peer, sent):
    return [message for receiver, message in sent if receiver == peer]


# Joining


def test_a_worker_that_is_here_before_the_parameter_server_is_told_what_it_waits_for():
    server = Server()
    assert server.gets(Join("a", "worker")) == [("a", Status(waiting_for="the parameter server"))]
    sent = server.ps()
    (welcome,) = to("a", sent)
    assert isinstance(welcome, Welcome)
    assert welcome.endpoints == [ENDPOINTS]
    assert welcome.rank == 0
    assert isinstance(to("ps", sent)[0], Welcome)


def test_a_worker_that_comes_after_the_parameter_server_is_welcomed_at_once():
    server = Server(workers=3, heartbeat_s=4.0, lr=0.125)
    server.ps()
    ((peer, welcome),) = server.gets(Join("a", "worker"))
    assert peer == "a"
    assert (welcome.rank, welcome.shares, welcome.heartbeat_s) == (0, 3, 4.0)
    assert welcome.config == server.handlers.config.to_wire()
    assert welcome.endpoints == [ENDPOINTS]


def test_workers_that_waited_get_ranks_in_order_of_coming():
    server = Server()
    for worker in ("b", "a", "c"):
        server.gets(Join(worker, "worker"))
    sent = server.ps()
    assert [to(worker, sent)[0].rank for worker in ("b", "a", "c")] == [0, 1, 2]


def test_a_waiting_worker_that_asks_again_gets_one_welcome():
    server = Server()
    server.gets(Join("a", "worker"))
    server.gets(Join("a", "worker"))
    assert len(to("a", server.ps())) == 1


def test_a_rank_that_is_asked_for_is_given_if_it_is_free():
    server = Server(workers=4)
    server.ps()
    ranks = {}
    for worker, rank in (("a", 2), ("b", 2), ("c", None), ("d", -1)):
        ((_, welcome),) = server.gets(Join(worker, "worker", rank=rank))
        ranks[worker] = welcome.rank
    assert ranks == {"a": 2, "b": 0, "c": 1, "d": 3}


def test_a_worker_that_comes_back_gets_its_rank_back_and_others_do_not_wait_for_it():
    server = running("a", "b", "c")
    server.gets(Leave("b"))
    ((_, welcome),) = server.gets(Join("b", "worker"))
    assert welcome.rank == 1


def test_a_free_rank_goes_to_the_next_and_who_comes_back_gets_another():
    server = running("a", "b", "c")
    server.gets(Leave("b"))
    ((_, welcome),) = server.gets(Join("new", "worker"))
    assert welcome.rank == 1
    ((_, welcome),) = server.gets(Join("b", "worker"))
    assert welcome.rank == 3


def test_joining_twice_under_one_id_is_one_worker():
    server = running("a")
    ((_, welcome),) = server.gets(Join("a", "worker"))
    assert welcome.rank == 0
    assert list(server.table.records) == ["a"]


def test_the_first_layout_is_announced_to_the_parameter_server():
    server = Server()
    server.ps()
    server.gets(Join("a", "worker"))
    sent = server.gets(Join("a", "worker", layout=LAYOUT.to_wire()))
    (members,) = to("ps", sent)
    assert members.layout == LAYOUT.to_wire()
    assert members.workers == {}
    assert isinstance(to("a", sent)[0], Welcome)


def test_another_layout_is_refused_and_the_leaf_named():
    server = running("a")
    server.gets(Join("b", "worker"))
    error = server.refuses(Join("b", "worker", layout=OTHER.to_wire()))
    assert error.code == "layout-mismatch"
    assert "the model of b" in error.text
    assert "params/w is float32[4]" in error.text
    assert "float32[3]" in error.text
    assert LAYOUT.digest in error.text
    assert "same model code" in error.text
    assert "b" not in [record.worker for record in server.table.active()]


def test_a_layout_that_is_none_is_refused():
    server = running("a")
    assert server.refuses(Join("b", "worker", layout={"leaves": 5})).code == "bad-layout"


def test_nobody_speaks_for_somebody_else():
    server = running("a", "b")
    for message in (
        Join("a", "worker"),
        Query("a", 0, 0),
        Report("a", 0, 0, "train"),
        Leave("a"),
        Reset("ps", 5, {}),
    ):
        assert server.refuses(message, peer="b").code == "wrong-id"
    assert set(server.table.records) == {"a", "b"}
    assert server.handlers.history.version == 0


def test_an_unknown_role_is_refused():
    assert Server().refuses(Join("a", "spectator")).code == "bad-role"


def test_a_parameter_server_says_where_it_is():
    for endpoints in (None, {}, {"push": "tcp://ps:1"}, {"push": 1, "model": 2}):
        error = Server().refuses(Join("ps", "ps", endpoints=endpoints))
        assert error.code == "bad-field"


def test_there_is_one_parameter_server_but_it_may_come_back():
    server = running("a")
    error = server.refuses(Join("ps2", "ps", endpoints=dict(ENDPOINTS)))
    assert error.code == "second-ps"
    elsewhere = {"push": "tcp://new:1", "model": "tcp://new:2"}
    sent = server.gets(Join("ps", "ps", endpoints=elsewhere))
    assert to("ps", sent)[-1].workers == {"a": 0}
    ((_, welcome),) = server.gets(Join("b", "worker"))
    assert welcome.endpoints == [elsewhere]


def test_mode_local_takes_one_worker_and_any_evaluator():
    server = Server(mode="local")
    server.ps()
    server.gets(Join("a", "worker"))
    ((peer, error),) = server.gets(Join("b", "worker"))
    assert (peer, error.code) == ("b", "run-full")
    assert "a is it" in error.text
    ((_, welcome),) = server.gets(Join("judge", "evaluator"))
    assert welcome.rank == -1


def test_an_evaluator_has_no_rank_and_is_not_waited_for():
    server = Server()
    server.ps()
    ((_, welcome),) = server.gets(Join("judge", "evaluator", layout=LAYOUT.to_wire()))[-1:]
    assert welcome.rank == -1
    assert server.refuses(Query("judge", 0, 0)).code == "bad-role"
    (response,) = server.member("a")[-1:]
    assert response[1].action == "train"
    assert [record.worker for record in server.table.active()] == ["a"]


# The start


def test_the_run_starts_when_enough_workers_have_the_model():
    server = Server(workers=3)
    server.ps()
    assert server.handlers.waiting_for() == "3 more workers"
    assert to("a", server.member("a")) == [Status(waiting_for="2 more workers")]
    sent = server.member("b")
    assert to("b", sent) == [Status(waiting_for="1 more worker")]
    assert to("a", server.tick()) == [Status(waiting_for="1 more worker")]
    assert not server.handlers.status()["started"]
    server.now += 60.0
    sent = server.member("c")
    for worker in ("a", "b", "c"):
        assert to(worker, sent) == [Response(0, 0, "train", 1)]
    assert to("ps", sent)[-1].workers == {"a": 0, "b": 1, "c": 2}
    assert server.handlers.status()["elapsed_s"] == 0.0
    assert all(record.since == server.now for record in server.table.active())


def test_a_worker_at_the_gate_that_asks_again_is_counted_once():
    server = Server(workers=2)
    server.ps()
    server.member("a")
    assert to("a", server.gets(Query("a", 0, 0))) == [Status(waiting_for="1 more worker")]


def test_a_worker_that_leaves_at_the_gate_is_missed():
    server = Server(workers=2)
    server.ps()
    server.member("a")
    server.gets(Leave("a"))
    sent = server.member("b")
    assert to("b", sent) == [Status(waiting_for="1 more worker")]
    assert to("a", sent) == []
    sent = server.member("c")
    assert to("a", sent) == []
    assert to("b", sent)[0].action == "train"


def test_a_late_joiner_is_answered_at_once_and_announced():
    server = running("a", "b")
    server.gets(Reset("ps", 1, {"a": 0.0, "b": 0.0}))
    sent = server.member("late")
    assert to("late", sent) == [Response(1, 0, "train", 1)]
    (members,) = to("ps", sent)
    assert members.workers == {"a": 0, "b": 1, "late": 2}


def test_each_announcement_has_a_later_epoch():
    server = running("a", "b")
    epochs = []
    for sent in (server.member("c"), server.gets(Leave("a")), server.member("d")):
        epochs += [m.epoch for m in to("ps", sent) if isinstance(m, Members)]
    assert len(epochs) == 3
    assert epochs == sorted(set(epochs))


# Training


def test_in_mode_sync_every_query_is_answered_with_one_step_and_sync():
    server = running("a", "b", mode="sync")
    assert server.gets(Query("a", 0, 0, ahead=1)) == [("a", Response(0, 0, "sync", 1))]


def test_a_report_is_not_answered_and_a_query_is():
    server = running("a", "b")
    assert server.gets(Report("a", 0, 1, "train", 0.5)) == []
    (answer,) = server.gets(Query("a", 0, 1, 0, 0.5, loss=0.75))
    assert answer[0] == "a"
    assert (answer[1].round, answer[1].step) == (0, 1)
    assert server.table.records["a"].loss == 0.75


def test_more_than_one_step_ahead_is_refused():
    assert running("a").refuses(Query("a", 0, 0, ahead=2)).code == "bad-field"


def test_a_worker_that_is_not_known_is_told_to_join():
    server = running("a")
    for message in (Query("x", 0, 0), Report("x", 0, 0, "train"), Reset("x", 1, {})):
        error = server.refuses(message)
        assert error.code == "unknown-worker"
        assert "join first" in error.text


def test_the_slowest_arriving_hurries_the_others():
    server = running("fast", "slow")
    for round in range(3):
        for worker, step_s in (("fast", 0.1), ("slow", 5.0)):
            server.gets(Query(worker, round, 0))
            server.now += step_s
            server.gets(Query(worker, round, 1, 0, step_s))
    (answer,) = to("fast", server.gets(Query("fast", 3, 0, 1)))
    assert answer.action == "train"
    assert answer.lease > 2
    server.gets(Query("slow", 3, 0, 1))
    server.now += 0.5
    sent = server.gets(Report("slow", 3, 1, "sync", 0.5))
    assert sent == [("fast", Response(3, 0, "sync", 0))]
    assert server.gets(Report("slow", 3, 1, "sync")) == []


def test_delivery_is_the_time_from_the_last_step_to_the_update_s_arrival():
    server = running("a", "b")
    server.gets(Report("a", 0, 1, "sync", 1.0))
    server.now += 3.0
    server.gets(Reset("ps", 1, {"a": 0.5, "b": 0.0, "gone": 1.0, "a2": "early"}))
    assert server.table.records["a"].delivery_s.value == pytest.approx(2.5)
    assert server.table.records["b"].delivery_s.value == 0.0


def test_a_heartbeat_while_the_update_travels_does_not_make_its_delivery_shorter():
    server = running("a")
    server.gets(Report("a", 0, 1, "sync", 1.0))
    server.now += 2.0
    server.gets(Report("a", 0, 1, "sync"))
    server.now += 1.0
    server.gets(Reset("ps", 1, {"a": 0.0}))
    assert server.table.records["a"].delivery_s.value == pytest.approx(3.0)


def test_the_published_policy_is_not_told_of_deliveries():
    server = running("a", policy="paper")
    server.gets(Report("a", 0, 1, "sync", 1.0))
    server.now += 3.0
    server.gets(Reset("ps", 1, {"a": 0.0}))
    assert server.table.records["a"].delivery_s.value == 0.0


# Holding back


def done(server, worker, round, steps=1, **facts):
    """What is sent when a worker has finished its round and its update is on the way."""
    return server.gets(Report(worker, round, steps, "sync", 1.0, **facts))


def published(server, version, *members):
    return server.gets(Reset("ps", version, dict.fromkeys(members, 0.0)))


def leaves(sent):
    """Who was told to train."""
    return {peer for peer, message in sent if isinstance(message, Response)}


def drawn(server):
    """Who takes part in this round: the members that the parameter server was told of last."""
    return server.handlers._drawn


def drawing(workers, share=0.5, mode="fedavg", **config):
    """A running server of a mode that draws; what was sent last when it began."""
    server = Server(workers=len(workers), mode=mode, participation=share, **config)
    server.ps()
    for worker in workers:
        sent = server.member(worker)
    return server, sent


def test_a_worker_that_is_too_far_ahead_is_answered_when_the_slowest_has_caught_up_and_not_before():
    server = running("fast", "slow", mode="ssp", max_staleness=1)
    for round in (0, 1):
        assert leaves(server.gets(Query("fast", round, 0))) == {"fast"}
        done(server, "fast", round)
        published(server, round + 1, "fast")
    assert server.gets(Query("fast", 2, 0)) == []
    assert server.table.records["fast"].phase == "held"
    assert server.tick(0.2) == []
    assert server.gets(Report("slow", 0, 1, "train", 9.0)) == []
    assert done(server, "slow", 0) == [("fast", Response(2, 0, "sync", 1))]
    assert server.table.records["fast"].phase == "train"


def test_an_arrival_that_helps_nobody_frees_nobody():
    server = running("fast", "middle", "slow", mode="ssp", max_staleness=0)
    done(server, "fast", 0)
    assert server.gets(Query("fast", 1, 0)) == []
    assert done(server, "middle", 0) == []
    assert server.gets(Query("middle", 2, 0)) == []
    assert leaves(done(server, "slow", 0)) == {"fast", "middle"}


@pytest.mark.parametrize("how", ["leaves", "dies"])
def test_the_one_whom_all_are_held_for_goes_and_they_go_on(how):
    server = running("fast", "next", "slow", mode="ssp", max_staleness=0, heartbeat_s=4.0)
    for worker in ("fast", "next"):
        done(server, worker, 0)
        assert server.gets(Query(worker, 1, 0)) == []
    server.ps_agrees = False  # they need not wait for that
    if how == "leaves":
        sent = server.gets(Leave("slow"))
    else:
        server.tick(3.0)
        server.beat("fast", "next")
        sent = server.tick(2.0)
    assert leaves(sent) == {"fast", "next"}


def test_a_held_worker_that_leaves_is_forgotten():
    server = running("fast", "slow", mode="ssp", max_staleness=0)
    done(server, "fast", 0)
    assert server.gets(Query("fast", 1, 0)) == []
    server.gets(Leave("fast"))
    assert done(server, "slow", 0) == []
    assert leaves(server.gets(Query("slow", 1, 0))) == {"slow"}


def test_a_held_worker_that_dies_and_comes_back_is_answered_as_what_it_is_now():
    server = running("fast", "slow", mode="ssp", max_staleness=0, heartbeat_s=4.0)
    done(server, "fast", 0)
    server.gets(Query("fast", 1, 0))
    server.tick(3.0)
    server.beat("slow")
    server.tick(2.0)
    assert "fast" not in server.table.records
    sent = server.member("fast", life="another")
    assert to("fast", sent) == [Response(0, 0, "sync", 1)], "it begins with the slowest"


def test_a_question_that_is_repeated_while_held_is_answered_once():
    server = running("fast", "slow", mode="ssp", max_staleness=0)
    done(server, "fast", 0)
    for _ in range(3):
        assert server.gets(Query("fast", 1, 0)) == []
    assert done(server, "slow", 0) == [("fast", Response(1, 0, "sync", 1))]
    assert leaves(server.gets(Query("fast", 1, 0))) == {"fast"}, "its answer may have been lost"


def test_a_joiner_is_neither_held_nor_lets_the_others_run_away():
    server = running("a", "b", mode="ssp", max_staleness=1)
    for worker in ("a", "b"):
        for round in range(4):
            done(server, worker, round)
    assert leaves(server.member("late")) == {"late"}
    assert server.table.records["late"].clock == 4
    assert leaves(server.gets(Query("a", 9, 0))) == {"a"}
    for round in (9, 10):
        done(server, "a", round)
    assert server.gets(Query("a", 11, 0)) == []
    assert leaves(done(server, "b", 9)) == set(), "the joiner is the slowest now"
    assert leaves(done(server, "late", 0)) == {"a"}


def test_whoever_is_held_is_decided_again_when_a_round_begins():
    """Whatever a policy of one's own holds it for."""

    class Shut(FixedSteps):
        open = False

        def decide(self, table, record, ahead, now):
            return super().decide(table, record, ahead, now) if self.open else None

    server = running("a", "b", mode="fedavg")
    server.handlers.policy = Shut()
    assert server.gets(Query("a", 1, 0)) == []
    assert published(server, 1) == []
    server.handlers.policy.open = True
    assert published(server, 1) == [], "it has begun already"
    assert leaves(published(server, 2)) == {"a"}


def test_a_heartbeat_that_says_sync_is_not_another_round():
    server = running("fast", "slow", mode="ssp", max_staleness=0)
    for _ in range(3):
        done(server, "slow", 0)
    assert server.table.records["slow"].clock == 1


@pytest.mark.parametrize("mode", ["ssp", "fedavg"])
def test_the_end_frees_who_is_held_and_nothing_else_is_said_to_them(mode):
    share = 1.0 if mode == "ssp" else 0.4
    server = running("a", "b", "c", mode=mode, max_staleness=0, participation=share)
    for worker in ("a", "b"):
        done(server, worker, 0)
        server.gets(Query(worker, 1, 0))
    sent = server.gets(StopRun("interrupted"))
    assert stop_of(server, sent) == {"a", "b", "c"}
    later = done(server, "c", 0) + server.agree() + server.gets(Leave("c"))
    assert {m.action for _, m in later if isinstance(m, Response)} <= {"stop"}
    assert server.gets(Query("a", 1, 0)) == [("a", Response(0, 0, "stop"))]


# Drawing


def test_a_round_is_answered_to_the_drawn_alone_and_the_others_hear_nothing():
    server, sent = drawing("abcdef")
    chosen = drawn(server)
    assert len(chosen) == 3
    assert leaves(sent) == chosen
    assert to("ps", sent)[-1].workers.keys() == chosen
    assert {to(worker, sent)[-1].lease for worker in chosen} == {20}
    for worker in set("abcdef") - chosen:
        assert server.gets(Query(worker, 0, 0)) == []
        assert server.table.records[worker].phase == "held"


def test_the_parameter_server_goes_by_the_drawn_before_they_are_answered():
    server = Server(workers=4, mode="fedavg", participation=0.5)
    server.ps()
    for worker in "abc":
        server.member(worker)
    server.ps_agrees = False
    assert leaves(server.member("d")) == set()
    sent = server.agree()
    assert server.handlers.started is not None
    assert leaves(sent) == set(), "it has agreed to wait for all four, not yet to the draw"
    chosen = drawn(server)
    assert to("ps", sent)[-1].workers.keys() == chosen
    assert server.tick(0.2) == []
    assert leaves(server.agree()) == chosen


def test_an_agreement_to_earlier_members_frees_nobody():
    server, _ = drawing("abcd")
    server.ps_agrees = False
    epoch = server.handlers._epoch
    published(server, 1)
    for worker in "abcd":
        assert server.gets(Query(worker, 1, 0)) == []
    assert server.gets(Members(epoch, {}), peer="ps") == []
    assert leaves(server.agree()) == drawn(server)


def test_an_announcement_of_the_drawn_that_was_lost_is_made_again():
    server, _ = drawing("abcd")
    server.ps_agrees = False
    published(server, 1)
    for worker in "abcd":
        server.gets(Query(worker, 1, 0))
    (again,) = to("ps", server.gets(Report("ps", 1, 0, "serving")))
    assert again.workers.keys() == drawn(server)
    assert leaves(server.gets(Members(again.epoch, {}), peer="ps")) == drawn(server)


def test_each_version_draws_anew_and_frees_those_who_have_asked_already():
    server, _ = drawing("abcdef", share=0.3, seed=1)
    seen = [drawn(server)]
    for version in range(1, 12):
        for worker in "abcdef":
            assert server.gets(Query(worker, version, 0)) == [], "its version is not known here yet"
        sent = published(server, version, *seen[-1])
        seen.append(drawn(server))
        assert leaves(sent) == seen[-1]
        assert len(seen[-1]) == 2
    assert set().union(*seen) == set("abcdef")
    assert len({frozenset(row) for row in seen}) > 4


def test_a_drawn_worker_that_still_asks_for_the_last_round_is_answered_when_it_asks_for_this_one():
    server, _ = drawing("ab", share=0.001)
    (one,) = drawn(server)
    (other,) = set("ab") - {one}
    version = 0
    while drawn(server) != {other}:
        version += 1
        assert other not in leaves(published(server, version)), "it has asked for version 0 alone"
    assert leaves(server.gets(Query(other, version, 0))) == {other}


def test_when_one_of_the_drawn_dies_the_parameter_server_is_told_and_the_round_goes_on():
    server, _ = drawing("abcdef")
    chosen = sorted(drawn(server))
    sent = server.gets(Leave(chosen[0]))
    assert to("ps", sent)[-1].workers.keys() == set(chosen[1:])
    assert leaves(sent) == set()
    assert drawn(server) == set(chosen)


def test_when_all_of_the_drawn_die_others_are_drawn_for_the_same_round():
    server, _ = drawing("abcdef", share=0.3, heartbeat_s=4.0)
    dead = drawn(server)
    server.tick(3.0)
    server.beat(*(set("abcdef") - dead))
    sent = server.tick(2.0)
    assert len(drawn(server)) == 2
    assert not drawn(server) & dead
    assert leaves(sent) == drawn(server)
    assert to("ps", sent)[-1].workers.keys() == drawn(server)
    assert all(message.round == 0 for _, message in sent if isinstance(message, Response))


def test_a_drawn_worker_that_comes_back_in_its_round_takes_part_again():
    server, _ = drawing("abcd", heartbeat_s=4.0)
    back, stays = sorted(drawn(server))
    server.gets(Leave(back))
    sent = server.member(back)
    assert leaves(sent) == {back}
    assert to("ps", sent)[-1].workers.keys() == {back, stays}


def test_a_late_joiner_waits_for_the_next_draw_and_can_be_drawn():
    server, _ = drawing("ab", seed=3)
    sent = server.member("late")
    assert leaves(sent) == set()
    assert to("ps", sent)[-1].workers.keys() == drawn(server)
    version = 0
    while "late" not in drawn(server):
        version += 1
        server.gets(Query("late", version, 0))
        sent = published(server, version)
    assert "late" in leaves(sent)


@pytest.mark.parametrize("mode", ["fedavg", "tifl"])
def test_a_run_whose_last_worker_has_left_draws_the_next_one_that_comes(mode):
    server, _ = drawing("ab", mode=mode)
    for worker in "ab":
        done(server, worker, 0, 20)
    published(server, 1, *"ab")
    for worker in "ab":
        server.gets(Leave(worker))
    assert drawn(server) == set()
    sent = server.member("c")
    assert leaves(sent) == {"c"}
    assert to("ps", sent)[-1].workers.keys() == {"c"}


def test_with_a_share_of_one_everybody_takes_part_who_joins_too():
    server, sent = drawing("ab", share=1.0)
    assert leaves(sent) == {"a", "b"}
    assert leaves(server.member("late")) == {"late"}
    assert to("ps", server.sent)[-1].workers.keys() == {"a", "b", "late"}


def test_where_a_policy_draws_some_and_then_everybody_the_parameter_server_is_told():
    server, _ = drawing("abc", share=0.3)
    server.handlers.policy.share = 1.0
    sent = published(server, 1)
    assert to("ps", sent)[-1].workers.keys() == {"a", "b", "c"}
    assert leaves(server.gets(Query("a", 1, 0))) == {"a"}


def test_a_first_round_of_tiers_measures_everybody_and_the_next_is_one_tier_s():
    server, sent = drawing("abcd", share=1.0, mode="tifl", tiers=2)
    assert leaves(sent) == set("abcd")
    assert {to(worker, sent)[-1].lease for worker in "abcd"} == {1}
    for worker, seconds in zip("abcd", (0.1, 5.0, 0.1, 5.0), strict=True):
        server.gets(Report(worker, 0, 1, "sync", seconds, loss=1.0))
    assert leaves(server.member("late")) == set(), "this round is measured without it"
    published(server, 1, *"abcd")
    assert drawn(server) in ({"a", "c", "late"}, {"b", "d", "late"})
    ((_, answer),) = server.gets(Query("late", 1, 0))
    assert answer == Response(1, 0, "sync", 1), "and the next one measures it"
    server.gets(Report("late", 1, 1, "sync", 0.2))
    published(server, 2, *drawn(server))
    assert drawn(server) in ({"a", "c"}, {"b", "d", "late"})
    one = min(drawn(server))
    ((_, answer),) = server.gets(Query(one, 2, 0))
    assert answer == Response(2, 0, "sync", 20)


def test_in_mode_feddrop_a_slow_worker_is_told_its_width_and_asking_again_changes_nothing():
    server = running("a", "b", "slow", mode="feddrop")
    for worker, seconds in (("a", 1.0), ("b", 1.0), ("slow", 4.0)):
        server.gets(Report(worker, 0, 20, "sync", seconds))
    published(server, 1, "a", "b", "slow")
    for worker, width in (("slow", 0.5), ("slow", 0.5), ("a", 1.0), ("b", 1.0)):
        ((_, answer),) = server.gets(Query(worker, 1, 0))
        assert answer == Response(1, 0, "sync", 20, width)


# Overlapped synchronisation


def test_a_round_that_began_while_a_step_was_running_is_counted_from_that_step_s_beginning():
    server = running("a", "b", overlap=True)
    server.gets(Query("a", 0, 1, 0, 1.0))
    server.gets(Report("a", 0, 2, "sync", 1.0))
    server.now += 3.0
    server.gets(Query("a", 1, 2, 1, 1.0, running_s=0.75))
    record = server.table.records["a"]
    assert (record.round, record.step, record.since) == (1, 2, server.now - 0.75)
    assert not record.arrived


def test_an_arrival_that_is_told_after_the_next_round_has_begun_takes_nothing_back():
    """The thread that receives the model asks at once; the report of the push may still be in its queue."""
    server = running("a", "b", overlap=True)
    server.gets(Query("a", 1, 2, 1, 1.0, running_s=0.5))
    server.gets(Report("a", 0, 3, "sync", 1.0))
    record = server.table.records["a"]
    assert (record.round, record.step, record.arrived) == (1, 2, False)


def test_steps_taken_while_away_count_for_the_least_number_of_steps():
    server = running("a", "slow", overlap=True, min_steps=5)
    for worker in ("a", "slow"):
        server.gets(Query(worker, 0, 1, 0, 1.0 if worker == "slow" else 0.1))
        server.gets(Report(worker, 0, 5, "sync"))
    ((_, answer),) = server.gets(Query("slow", 1, 2, 1, 1.0, running_s=0.5))
    assert answer == Response(1, 2, "sync", 3)
    ((_, answer),) = server.gets(Query("slow", 2, 9, 1, 1.0, running_s=0.5))
    assert answer == Response(2, 9, "sync", 1), "the step that is running is finished"


def test_how_long_a_synchronisation_takes_is_measured_from_the_last_step_to_the_next_round():
    server = running("a")
    server.gets(Report("a", 0, 1, "sync", 1.0))
    server.now += 2.0
    server.gets(Report("a", 0, 1, "sync"))
    server.now += 1.5
    server.gets(Query("a", 1, 0, 1))
    assert server.table.records["a"].sync_s.value == pytest.approx(3.5)
    server.now += 9.0
    server.gets(Query("a", 2, 0, 1))  # the round ended without it
    assert server.table.records["a"].sync_s.value == pytest.approx(3.5)


# Silence


def test_a_silent_worker_is_evicted_announced_and_no_longer_waited_for():
    server = running("a", "b", heartbeat_s=4.0)
    server.tick(3.0)
    server.beat("a")
    assert server.tick(1.0 - TICK_S) == []
    sent = server.tick(0.9 * TICK_S)
    assert server.now - 100.0 < 4.0, "within the heartbeat time, not at the first look after it"
    (members,) = to("ps", sent)
    assert members.workers == {"a": 0}
    assert "b" not in server.table.records
    assert any("b left: evicted: silent for 4 s" in line for line in server.said)
    assert server.refuses(Report("b", 0, 0, "train")).code == "unknown-worker"


def test_after_the_slowest_was_evicted_the_others_still_get_decisions():
    for policy in ("adaptive", "paper"):
        server = running("a", "b", "slow", heartbeat_s=4.0, policy=policy)
        for worker in ("a", "b"):
            server.gets(Query(worker, 0, 1, 0, 0.5))
        server.gets(Query("slow", 0, 1, 0, 30.0))
        server.gets(Query("slow", 1, 0))
        for worker in ("a", "b"):
            server.gets(Query(worker, 1, 0))
            ((_, answer),) = server.gets(Query(worker, 1, 1, 0, 0.5))
            assert answer.action == "train"
        server.tick(3.0)
        server.beat("a", "b")
        server.tick(2.0)
        ((_, answer),) = server.gets(Query("a", 1, 5, 0, 0.5))
        assert answer.action == "sync"
        server.gets(Query("b", 1, 5, 0, 0.5))
        sent = server.gets(Report("a", 1, 5, "sync")) + server.gets(Query("b", 1, 6, 0, 0.5))
        assert to("b", sent)[-1].action == "sync"


@pytest.mark.parametrize(
    "message",
    [
        Query("a", 0, 1),
        Report("a", 0, 1, "train"),
        Report("a", 0, 1, "sync"),
        Join("a", "worker"),
    ],
    ids=lambda message: message.TYPE,
)
def test_any_message_is_a_sign_of_life(message):
    server = running("a", heartbeat_s=4.0)
    server.now += 3.0
    server.gets(message)
    server.tick(3.0)
    assert "a" in server.table.records
    server.tick(3.0)
    assert "a" not in server.table.records


def test_an_evicted_worker_that_was_only_slow_is_a_member_again_after_joining():
    server = running("a", "b", heartbeat_s=4.0)
    server.tick(3.0)
    server.beat("a")
    server.tick(2.0)
    sent = server.member("b")
    assert to("b", sent)[0].action == "train"
    assert to("ps", sent)[-1].workers == {"a": 0, "b": 1}


def test_a_run_without_workers_waits_for_one():
    server = running("a", heartbeat_s=4.0)
    server.tick(5.0)
    assert server.handlers.waiting_for() == "a worker: none is left"
    assert server.said[-1] == "waiting for a worker: none is left"
    assert to("b", server.member("b"))[0].action == "train"
    assert server.handlers.waiting_for() == ""


def test_a_worker_that_leaves_is_announced_but_one_that_never_trained_is_not():
    server = running("a", "b")
    server.gets(Join("c", "worker"))
    assert to("ps", server.gets(Leave("c"))) == []
    (members,) = to("ps", server.gets(Leave("b", "done")))
    assert members.workers == {"a": 0}
    server.gets(Leave("never seen"))
    assert set(server.table.records) == {"a"}


# The end


def stop_of(server, sent):
    assert server.handlers.stopped
    return {peer for peer, message in sent if getattr(message, "action", "") == "stop"}


def test_a_run_ends_after_its_rounds():
    server = running("a", "b", rounds=2)
    assert server.gets(Reset("ps", 1, {})) == []
    sent = server.gets(Reset("ps", 2, {}))
    assert stop_of(server, sent) == {"a", "b"}
    assert {message.round for _, message in sent if isinstance(message, Response)} == {2}
    assert server.handlers.stopped == "2 rounds"


def test_a_run_ends_after_its_duration_which_begins_with_the_start():
    server = Server(workers=1, duration_s=5.0)
    server.ps()
    server.tick(4.0)
    server.member("a")
    assert server.tick(4.9) == []
    assert stop_of(server, server.tick(0.1)) == {"a"}
    assert server.handlers.stopped == "5 seconds"


def test_a_run_ends_at_its_target_accuracy():
    server = running("a", target_accuracy=0.8)
    server.gets(Join("judge", "evaluator"))
    server.gets(Report("judge", 1, 0, "eval", accuracy=0.79))
    assert server.handlers.stopped is None
    sent = server.gets(Report("judge", 2, 0, "eval", accuracy=0.8))
    assert stop_of(server, sent) == {"a", "judge"}
    assert "0.8000" in server.handlers.stopped


def test_without_a_target_no_accuracy_ends_a_run():
    server = running("a")
    server.gets(Join("judge", "evaluator"))
    server.gets(Report("judge", 1, 0, "eval", accuracy=1.0))
    assert server.handlers.stopped is None


def test_after_the_end_everything_is_answered_with_stop_and_nobody_may_join():
    server = running("a", rounds=1)
    server.gets(Reset("ps", 1, {}))
    assert server.gets(Query("a", 1, 0)) == [("a", Response(1, 0, "stop"))]
    assert server.gets(Report("a", 1, 0, "train")) == [("a", Response(1, 0, "stop"))]
    error = server.refuses(Join("b", "worker"))
    assert error.code == "run-over"
    assert "1 rounds" in error.text


def test_workers_that_wait_for_a_parameter_server_are_told_of_the_end():
    server = Server()
    server.gets(Join("a", "worker"))
    ((peer, error),) = server.gets(StopRun("interrupted"))
    assert (peer, error.code) == ("a", "run-over")


def test_everybody_leaves_then_the_parameter_server_then_the_run_is_finished_once():
    server = running("a", "b")
    server.gets(Join("judge", "evaluator"))
    assert stop_of(server, server.gets(StopRun("interrupted"))) == {"a", "b", "judge"}
    for worker in ("a", "judge"):
        assert to("ps", server.gets(Leave(worker)))[1:] == []
        assert server.handlers.servers
    sent = server.gets(Leave("b"))
    assert to("ps", sent)[-1] == Leave("ps", "interrupted")
    assert server.finished == 0
    server.gets(Leave("ps", "done"))
    assert server.finished == 1
    server.tick(1.0)
    server.gets(StopRun("again"))
    assert server.finished == 1
    assert server.handlers.stopped == "interrupted"


def test_a_version_that_comes_out_while_the_parameter_server_leaves_is_no_error_of_its():
    server = running("a")
    server.gets(StopRun("interrupted"))
    server.gets(Leave("a"))
    server.gets(Leave("ps", "done"))
    assert server.gets(Reset("ps", 1, {"a": 0.0})) == []
    assert server.finished == 1


def test_the_end_with_nobody_here_is_the_end():
    server = Server()
    server.gets(StopRun("interrupted"))
    assert server.finished == 1


def test_a_parameter_server_that_missed_its_dismissal_is_told_again():
    server = running("a")
    server.gets(StopRun("interrupted"))
    server.gets(Leave("a"))
    assert server.tick(0.2) == [("ps", Leave("ps", "interrupted"))]


def test_members_that_never_say_goodbye_are_waited_for_no_longer_than_that():
    server = running("a", heartbeat_s=3600.0)
    server.gets(StopRun("interrupted"))
    server.tick(GOODBYE_S)
    assert server.finished == 0
    assert to("ps", server.tick(1.0)) == [Leave("ps", "interrupted")]
    server.gets(Leave("ps", "done"))
    assert server.finished == 1


def test_an_evaluator_that_is_heard_may_take_longer_over_the_final_model():
    server = running("a", heartbeat_s=3600.0)
    server.gets(Join("judge", "evaluator"))
    server.gets(StopRun("interrupted"))
    server.gets(Leave("a"))
    server.said.clear()
    for _ in range(3):
        server.tick(3.0)
    waits = (
        "waiting for judge to evaluate the last version, at most 10 minutes; Ctrl-C does without"
    )
    assert server.said == [waits]
    assert to("ps", server.tick(10 * GOODBYE_S)) == []
    server.gets(Report("judge", 0, 0, "eval", accuracy=0.5))
    assert to("ps", server.gets(Leave("judge"))) == [Leave("ps", "interrupted")]


def test_who_interrupts_a_run_that_has_ended_does_without_the_last_evaluation():
    server = running("a", heartbeat_s=3600.0, rounds=1)
    server.gets(Join("judge", "evaluator"))
    server.gets(Reset("ps", 1, {}))
    assert server.handlers.stopped == "1 rounds"
    server.gets(Leave("a"))
    assert to("ps", server.gets(StopRun("interrupted"))) == [Leave("ps", "1 rounds")]
    server.gets(Leave("ps", "done"))
    assert server.finished == 1
    (judge,) = [p for p in server.handlers.history.passages if p.record.worker == "judge"]
    assert judge.reason == "interrupted"


def test_a_parameter_server_that_goes_after_the_end_does_not_cost_the_last_evaluation():
    server = running("a", heartbeat_s=3600.0, rounds=1)
    server.gets(Join("judge", "evaluator"))
    server.gets(Reset("ps", 1, {}))
    server.gets(Leave("a"))
    server.gets(Leave("ps", "it was killed"))
    server.gets(Report("judge", 1, 0, "eval", accuracy=0.9))
    assert server.handlers.history.accuracy[-1]["accuracy"] == 0.9
    server.gets(Leave("judge"))
    assert server.finished == 1


def test_who_interrupts_a_run_twice_has_its_workers_leave_in_order():
    server = running("a", heartbeat_s=3600.0)
    server.gets(Join("judge", "evaluator"))
    server.ps_agrees = False
    server.gets(StopRun("interrupted"))
    server.gets(StopRun("interrupted"))
    assert server.table.records.keys() == {"a", "judge"}, "they have not been told yet"
    server.agree()
    server.gets(StopRun("interrupted"))
    assert server.table.records.keys() == {"a"}
    assert to("ps", server.gets(Leave("a"))) == [Leave("ps", "interrupted")]


def test_a_parameter_server_that_falls_silent_ends_the_run_that_it_served():
    server = running("a", heartbeat_s=10.0, ps_wait_s=0.0)
    server.now += 8.0
    server.beat("a")
    assert server.tick(1.0) == []
    assert stop_of(server, server.tick(1.5)) == {"a"}
    assert "parameter server" in server.handlers.stopped


def test_after_this_process_was_held_up_nobody_is_taken_for_silent():
    server = running("a", "b")
    server.now += 60.0
    server.gets(Tick(late_s=59.0))
    assert set(server.table.records) == {"a", "b"}
    assert server.handlers.stopped is None


def test_members_and_versions_that_were_lost_on_the_way_are_made_up_for():
    server = running("a", rounds=5)
    server.handlers.servers["ps"].epoch -= 1
    sent = server.gets(Report("ps", 0, 0, "serving"))
    assert to("ps", sent)[0].workers == {"a": 0}
    assert to("ps", server.gets(Report("ps", 0, 0, "serving"))) == []
    server.gets(Report("ps", 5, 0, "serving"))
    assert server.handlers.stopped == "5 rounds"


def test_two_living_workers_cannot_have_one_name_but_a_killed_one_may_come_back():
    server = running("a", "b", heartbeat_s=10.0)
    (refusal,) = to("a", server.gets(Join("a", "worker", life="another")))
    assert refusal.code == "name-taken"
    assert "choose another --name" in refusal.text
    server.now += 6.0
    server.gets(Join("a", "worker", life="another"))
    assert not server.table.records["a"].active, "nobody waits for it while it loads"
    assert server.table.records["a"].rank == 0


def test_of_two_processes_with_one_name_each_is_answered_itself_and_one_is_the_worker():
    server = Server(workers=1, heartbeat_s=10.0)
    old, new = (messages.peer_of("a", life) for life in ("old", "new"))
    server.gets(Join("a", "worker", life="old"), old)
    assert server.sent[0][0] == old, "waiting"
    assert server.refuses(Join("a", "worker", life="new"), new).code == "name-taken"
    server.gets(Leave("a"), new)
    assert isinstance(to(old, server.ps())[0], Welcome)
    server.gets(Leave("a"), old)
    for layout in (None, LAYOUT.to_wire()):
        server.gets(Join("a", "worker", life="old", layout=layout), old)
    assert to(old, server.gets(Query("a", 0, 0), old)), "the run starts"
    assert to(new, server.gets(Join("a", "worker", life="new"), new))[0].code == "name-taken"
    server.now += 6.0
    for layout in (None, LAYOUT.to_wire()):
        assert to(new, server.gets(Join("a", "worker", life="new", layout=layout), new))
    assert to(new, server.gets(Query("a", 0, 0), new))
    for message in (Query("a", 0, 1), Report("a", 0, 1, "train")):
        assert server.refuses(message, old).code == "unknown-worker"
    server.gets(Leave("a", "done"), old)
    assert server.table.records["a"].life == "new", "only one's own life ends"
    assert to(new, server.gets(StopRun("enough")))
    server.gets(Leave("a", "died"), "a")
    assert "a" not in server.table.records, "who has started it says so in its name"


def test_a_worker_whose_connection_is_gone_has_its_place_taken_at_once():
    server = Server(workers=1, heartbeat_s=10.0)
    server.ps()
    old, new = (messages.peer_of("a", life) for life in ("old", "new"))
    server.gets(Join("a", "worker", life="old"), old)
    server.unreachable = {old}
    (welcome,) = to(new, server.gets(Join("a", "worker", life="new"), new))
    assert isinstance(welcome, Welcome)
    assert server.table.records["a"].life == "new"


def test_one_that_waits_and_asks_no_more_keeps_no_name():
    server = Server(workers=1)
    old, new = (messages.peer_of("a", life) for life in ("old", "new"))
    server.gets(Join("a", "worker", life="old"), old)
    server.now += 2.6
    server.gets(Join("a", "worker", life="new"), new)
    assert isinstance(to(new, server.ps())[0], Welcome)


def test_an_identity_s_life_is_the_one_that_joins():
    server = Server(workers=1)
    wrong = server.refuses(Join("a", "worker", life="x"), messages.peer_of("a", "y"))
    assert wrong.code == "wrong-id"


def test_a_version_that_was_on_its_way_when_the_run_was_stopped_is_the_last():
    server = running("a", "b", mode="sync")
    server.ps_agrees = False
    server.gets(Reset("ps", 1, {}))
    (members,) = to("ps", server.gets(StopRun("enough")))
    assert members.last == 1, "none after this one is made, unless it was already"
    assert stop_of(server, server.sent) == set(), "it is not known which is the last"
    assert server.gets(Query("a", 1, 1)) == []
    server.gets(Reset("ps", 2, {}))
    sent = server.agree()
    assert stop_of(server, sent) == {"a", "b"}
    assert {message.round for _, message in sent} == {2}
    assert server.gets(Query("a", 1, 1)) == [("a", Response(2, 1, "stop"))]
    assert server.agree() == []


def test_a_parameter_server_that_does_not_say_its_last_version_is_not_waited_for_long():
    server = running("a", mode="sync")
    server.ps_agrees = False
    server.gets(StopRun("enough"))
    assert stop_of(server, server.tick(2.9)) == set()
    assert stop_of(server, server.tick(0.2)) == {"a"}


@pytest.mark.parametrize("how", ["leaves", "dies"])
def test_a_parameter_server_that_goes_at_the_end_is_not_waited_for(how):
    server = running("a", mode="sync")
    server.ps_agrees = False
    server.gets(StopRun("enough"))
    server.unreachable = {"ps"}
    sent = server.gets(Leave("ps", "interrupted")) if how == "leaves" else server.tick(0.2)
    assert stop_of(server, sent) == {"a"}


def test_of_several_parameter_servers_the_others_come_to_the_version_that_one_had_made():
    server = Server(workers=1, ps=2)
    for name in ("ps", "ps1"):
        server.gets(Join(name, "ps", endpoints=dict(ENDPOINTS)))
    server.member("a")
    for name in ("ps", "ps1"):
        server.gets(Members(server.handlers._epoch, {}), name)
    server.ps_agrees = False
    server.gets(StopRun("enough"))
    (members,) = to("ps1", server.gets(Reset("ps", 1, {})))  # it was on its way
    assert members.last == 1
    for name in ("ps", "ps1"):
        assert stop_of(server, server.gets(Members(members.epoch, {}), name)) == set()
    sent = server.gets(Reset("ps1", 1, {}))
    assert stop_of(server, sent) == {"a"}
    assert {message.round for _, message in sent} == {1}


@pytest.mark.parametrize("why", ["the run ends", "a server is interrupted"])
def test_the_last_versions_of_several_parameter_servers_count_though_one_has_left(why):
    server = Server(workers=1, ps=2)
    for name in ("ps", "ps1"):
        server.gets(Join(name, "ps", endpoints=dict(ENDPOINTS)))
    server.member("a")
    server.gets(Members(server.handlers._epoch, {}), "ps1")
    assert server.handlers.started is not None
    for name in ("ps", "ps1"):
        server.gets(Reset(name, 1, {}, 10, 20))
    if why == "the run ends":
        server.gets(StopRun("enough"))
        server.gets(Leave("a", "done"))
    server.gets(Reset("ps", 2, {}, 30, 40))
    server.gets(Leave("ps", "interrupted"))
    server.gets(Leave("a", "done"))
    server.gets(Reset("ps1", 2, {}, 50, 60))
    server.gets(Leave("ps1", "done"))
    summary = server.handlers.summary()
    assert (summary["rounds"], summary["bytes_up"], summary["bytes_down"]) == (2, 80, 100)
    assert server.finished == 1


def test_a_worker_named_like_the_parameter_server_is_not_taken_for_it():
    server = running("a")
    peer = messages.peer_of("ps", "1")
    assert server.refuses(Reset("ps", 1, {}), peer).code == "unknown-worker"
    assert server.refuses(Report("ps", 1, 0, "serving"), peer).code == "unknown-worker"
    server.gets(Lost("ps", "a"), peer)
    assert server.table.records["a"].suspected is None
    server.gets(Leave("ps", "bye"), peer)
    assert "ps" in server.handlers.servers


def test_a_layout_that_nobody_trained_with_is_forgotten_with_its_last_worker():
    server = Server(workers=2)
    server.ps()
    server.member("wrong")
    server.gets(Leave("wrong"))
    server.gets(Join("right", "worker"))
    assert server.gets(Join("right", "worker", layout=OTHER.to_wire()))
    assert server.handlers.layout == server.handlers.config.cut(OTHER)


def test_a_run_that_has_stopped_publishes_no_version_of_those_who_leave_last():
    server = running("a", "b")
    server.gets(StopRun("interrupted"))
    assert not any(isinstance(m, Members) for _, m in server.gets(Leave("a")))


def test_a_dead_worker_does_not_hold_up_the_end_longer_than_its_heartbeat():
    server = running("a", "b", heartbeat_s=4.0)
    server.gets(StopRun("interrupted"))
    server.gets(Leave("a"))
    sent = server.tick(4.5)
    assert to("ps", sent)[-1] == Leave("ps", "interrupted")


# Looking


def test_the_status_is_the_live_table():
    server = running("b", "a", rounds=9)
    totals = {"steps": 3, "samples": 192, "compute_s": 3.0, "query_s": 1.0, "sync_s": 0.0}
    server.now += 2.5
    server.gets(Report("b", 0, 3, "train", 1.0, 192, loss=0.5, totals=totals))
    server.gets(Query("b", 0, 3, 0, 1.0))
    server.gets(Join("judge", "evaluator"))
    server.gets(Reset("ps", 1, {}))
    server.gets(Report("judge", 1, 0, "eval", loss=0.25, accuracy=0.75))
    ((peer, answer),) = server.gets(Status(), peer="anybody")
    assert peer == "anybody"
    assert answer.waiting_for == ""
    table = answer.table
    assert (table["mode"], table["round"], table["rounds"]) == ("esync", 1, 9)
    assert table["elapsed_s"] == pytest.approx(2.5)
    assert table["started"]
    assert table["stopped"] is None
    assert (table["accuracy"], table["accuracy_round"], table["loss"]) == (0.75, 1, 0.25)
    assert [row["worker"] for row in table["workers"]] == ["b", "a", "judge"]
    row = table["workers"][0]
    assert (row["rank"], row["device"], row["step"]) == (0, "cpu", 3)
    assert (row["phase"], row["step_s"], row["loss"]) == ("train", 1.0, 0.5)
    assert (row["steps"], row["samples"], row["compute_ratio"]) == (3, 192, 0.75)


def test_the_status_before_anything_happened_says_what_is_missing():
    ((_, answer),) = Server().gets(Status(), peer="anybody")
    assert answer.waiting_for == "the parameter server"
    assert answer.table["workers"] == []
    assert answer.table["accuracy"] is None


@pytest.mark.parametrize("value", [-1, 1e15, float("nan"), "many", None, [1]])
def test_totals_that_cannot_be_are_passed_over(value):
    server = running("a")
    server.gets(Report("a", 0, 1, "train", totals={"steps": 5}))
    server.gets(Report("a", 0, 1, "train", totals={"steps": 7, "unknown": 3, "samples": 9}))
    server.handlers.table_of_handlers()[Report](
        b"a", Report("a", 0, 1, "train", totals={"steps": value})
    )
    assert server.table.records["a"].totals == {"steps": 7, "samples": 9}


def test_an_error_from_a_peer_is_logged_and_not_answered():
    assert running("a").gets(Error("odd", "something"), peer="a") == []


def test_the_summary_has_every_field():
    server = running("b", "a", mode="sync", rounds=2, seed=7)
    server.gets(Join("judge", "evaluator"))
    totals = {
        "steps": 2,
        "samples": 100,
        "compute_s": 3.0,
        "query_s": 0.5,
        "sync_s": 0.5,
        "eval_s": 0.0,
        "split_digest": "beef",
    }
    server.now += 4.0
    server.gets(Reset("ps", 1, {"a": 0.0, "b": 0.0}, 1000, 2000))
    server.gets(Report("a", 1, 1, "train", totals=totals))
    server.gets(Report("b", 1, 1, "train", totals=totals))
    server.now += 1.0
    server.gets(Report("judge", 1, 0, "eval", loss=0.5, accuracy=0.81))
    server.now += 3.0
    server.gets(Reset("ps", 2, {"a": 0.0, "b": 0.0}, 2000, 4000))
    server.now += 1.0
    server.gets(Report("judge", 2, 0, "eval", accuracy=0.86))
    for peer in ("a", "b", "judge", "ps"):
        server.gets(Leave(peer, "done"))
    summary = server.handlers.summary()
    assert summary["mode"] == "sync"
    assert summary["model"] == "cnn"
    assert summary["dataset"] == "fashion-mnist"
    assert summary["split_digest"] == "beef"
    assert summary["seed"] == 7
    assert summary["ended"] == "2 rounds"
    assert summary["rounds"] == 2
    assert summary["wall_s"] == pytest.approx(8.0)
    assert summary["samples_per_s"] == pytest.approx(200 / 8.0)
    assert (summary["bytes_up"], summary["bytes_down"]) == (2000, 4000)
    assert summary["accuracy"] == [
        {"t": 4.0, "round": 1, "accuracy": 0.81, "loss": 0.5},
        {"t": 8.0, "round": 2, "accuracy": 0.86, "loss": None},
    ]
    assert summary["final_accuracy"] == 0.86
    assert summary["time_to"] == {"0.7": 4.0, "0.8": 4.0, "0.85": 8.0, "0.9": None}
    assert [(row["rank"], row["name"]) for row in summary["workers"]] == [(0, "b"), (1, "a")]
    for row in summary["workers"]:
        assert {key: row[key] for key in TOTALS} == {key: totals[key] for key in TOTALS}
        assert row["device"] == "cpu"
        assert row["compute_ratio"] == pytest.approx(0.75)
        assert row["joined_s"] == 0.0
        assert row["left_s"] == pytest.approx(9.0)
        assert row["left_why"] == "done"


def test_the_time_before_the_start_does_not_count():
    server = Server(workers=2)
    server.ps()
    server.member("a")
    server.now += 500.0
    server.member("b")
    server.now += 2.0
    server.member("late")
    summary = server.handlers.summary()
    assert summary["wall_s"] == pytest.approx(2.0)
    assert [row["joined_s"] for row in summary["workers"]] == [0.0, 0.0, 2.0]
    assert Server().handlers.summary()["wall_s"] == 0.0


def test_an_evaluator_that_was_still_loading_when_the_run_ended_may_evaluate_the_final_model():
    server = running("a", rounds=1)
    server.gets(Join("eval", "evaluator"))
    server.gets(Reset("ps", 1, {"a": 0.0}))
    server.gets(Leave("a", "done"))
    welcome = server.gets(Join("eval", "evaluator", layout=LAYOUT.to_wire()))
    assert isinstance(to("eval", welcome)[0], Welcome)
    assert to("eval", server.gets(Report("eval", -1, 0, "loading")))[0].action == "stop"
    server.gets(Report("eval", 1, 0, "eval", accuracy=0.9))
    server.gets(Leave("eval", "done"))
    server.gets(Leave("ps", "done"))
    assert server.finished == 1
    assert server.handlers.summary()["final_accuracy"] == 0.9


def test_who_watches_is_told_that_the_run_ends():
    server = Server(workers=1)
    server.ps()
    server.member("a")
    for peer in ("gone", "there"):
        assert [to for to, _ in server.gets(Status(), peer=peer)] == [peer]
        server.now += 2.5
    told = {to: m.table["stopped"] for to, m in server.gets(StopRun("enough")) if type(m) is Status}
    assert told == {"there": "enough"}


# Gone on with


def restored(**config):
    """A state server that goes on with a run of two workers after 5 seconds of it."""
    before = running("a", "b", **config)
    before.tick(5.0)
    after = Server(workers=2, **config)
    after.handlers.restore(before.handlers.saved())
    return after


def test_a_run_that_is_gone_on_with_waits_for_its_parameter_server_and_not_for_ever():
    server = restored(ps_wait_s=60.0, duration_s=26.0)
    join = Join("a", "worker", layout=LAYOUT.to_wire())
    assert to("a", server.gets(join)) == [Status(waiting_for="the parameter server")]
    for _ in range(118):
        assert not server.gets(Report("a", 0, 0, "train")), "it waits, as it was told"
        assert not server.gets(Query("a", 0, 3))
        server.tick(0.5)
    assert server.handlers.stopped is None
    assert "a" in server.handlers._waiting, "it is heard of"
    for _ in range(4):
        sent = server.tick(0.5)
        if server.handlers.stopped:
            break
    assert server.handlers.stopped == "the parameter server did not come back: waited 60 s"
    assert [m.code for m in to("a", sent)] == ["run-over"]
    assert server.finished == 1


def test_a_parameter_server_that_comes_back_in_time_is_no_reason_to_end_a_run():
    server = restored(ps_wait_s=60.0)
    server.tick(30.0)
    server.ps()
    for _ in range(200):
        server.gets(Report("ps", 0, 0, "serving"))
        server.tick(0.5)
    assert server.handlers.stopped is None


def test_what_others_say_is_one_line_that_does_nothing_to_a_terminal():
    server = Server(workers=1)
    server.ps()
    server.gets(Join("a", "worker", device="gpu\x1b[2J\n0", host="h\tx"))
    assert server.said[-1] == "worker a joined (gpu [2J 0)"
    assert server.table.records["a"].host == "h x"
    server.gets(Report("a", -1, 0, "load\ring"))
    assert server.table.records["a"].phase == "load ing"
    server.gets(Leave("a", "ValueError: my own bug\nline two\n"))
    assert server.said[-1] == "worker a left: ValueError: my own bug line two"


def test_a_member_that_asks_where_the_servers_are_is_still_heard():
    server = Server(workers=2)
    server.ps()
    server.member("a")
    server.gets(Leave("ps", "gone"))
    server.gets(Join("a", "worker", layout=LAYOUT.to_wire()))
    for _ in range(60):
        server.gets(Report("a", -1, 0, "waiting"))
        server.tick(0.5)
    assert "a" in server.table.records
