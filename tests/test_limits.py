"""What one peer may send to a message server, and that a flood from one costs no other its answers."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import zmq
from hypothesis import given
from hypothesis import strategies as st

from esync import messages, transport
from esync.config import RunConfig, StateConfig, check_room
from esync.errors import ConfigError
from esync.fault_log import OTHERS, REMEMBERED, FaultLog
from esync.limits import LARGEST_BYTES, SWEEP_AT, SWEEP_S, Limits, Queue, Standing, Verdict
from esync.messages import Error, Join, Leave, Query, Report, Response, Status
from esync.messaging import MessageServer
from esync.state import handlers as state
from esync.state import history
from esync.tensors import MAX_AXES, MAX_LEAVES
from tests.test_handlers import ENDPOINTS, LAYOUT, Server, running, to

TAKEN, DROPPED, TELL = Verdict.TAKEN, Verdict.DROPPED, Verdict.TELL
KNOWN = {b"a": Standing.MEMBER, b"b": Standing.MEMBER, b"ps": Standing.SERVER}


def queue(**limits: Any) -> Queue[Any]:
    return Queue(Limits(**limits), lambda peer: KNOWN.get(peer, Standing.STRANGER))


def put(
    made: Queue[Any], peer: bytes, times: int, now: float = 0.0, size: int = 0
) -> list[Verdict]:
    return [made.put(peer, size, (peer, n), now) for n in range(times)]


def drained(made: Queue[Any]) -> list[Any]:
    return [made.take() for _ in range(len(made))]


# The decision


def test_a_peer_may_send_a_burst_and_then_its_rate_and_is_told_once():
    made = queue(rate=2.0, burst=4.0)
    assert put(made, b"a", 7) == [TAKEN] * 4 + [TELL, DROPPED, DROPPED]
    assert put(made, b"a", 3, now=1.0) == [TAKEN, TAKEN, DROPPED]
    assert put(made, b"b", 1, now=1.0) == [TAKEN], "another peer's bucket is its own"


def test_who_was_told_and_kept_within_the_limits_since_is_told_again():
    made = queue(rate=2.0, burst=4.0)
    assert put(made, b"a", 5)[-1] is TELL
    drained(made)
    assert put(made, b"a", 6, now=3.0) == [TAKEN] * 4 + [TELL, DROPPED]


def test_a_long_message_counts_as_many():
    made = queue(rate=1.0, burst=10.0)
    assert put(made, b"a", 3, size=4096) == [TAKEN, TAKEN, TELL]


@given(st.floats(0.001, 1e6))
def test_a_full_bucket_has_enough_for_the_largest_message(rate: float):
    assert LARGEST_BYTES == transport.MAX_CONTROL_BYTES
    assert Queue(Limits(rate)).put(b"x", LARGEST_BYTES, None, 0.0) is TAKEN


def test_no_rate_is_no_limit_to_it():
    made = queue(rate=0.0, waiting=10_000)
    assert set(put(made, b"a", 10_000)) == {TAKEN}


def test_so_many_messages_of_one_peer_wait_and_so_many_bytes():
    made = queue(waiting=3)
    assert put(made, b"a", 5) == [TAKEN] * 3 + [TELL, DROPPED]
    made.take()
    assert put(made, b"a", 2) == [TAKEN, DROPPED]
    made = queue(waiting_bytes=5000)
    assert put(made, b"a", 3, size=2000) == [TAKEN, TAKEN, TELL]
    assert queue(waiting_bytes=5000).put(b"a", 6000, None, 0.0) is TAKEN, "one always may"


def test_members_take_turns_however_many_messages_each_has_sent():
    made = queue()
    put(made, b"a", 3)
    put(made, b"b", 1)
    assert drained(made) == [(b"a", 0), (b"b", 0), (b"a", 1), (b"a", 2)]


def test_strangers_have_one_place_between_them():
    made = queue()
    for n in range(5):
        put(made, b"stranger %d" % n, 1)
    put(made, b"a", 2)
    assert [peer for peer, _ in drained(made)][:4] == [b"stranger 0", b"a", b"stranger 1", b"a"]


def test_a_server_of_the_run_and_what_is_posted_wait_for_no_turn():
    made = queue(rate=1.0, burst=1.0, waiting=1)
    put(made, b"a", 1)
    assert set(put(made, b"ps", 3)) == {TAKEN}
    made.post("tick")
    assert drained(made) == [(b"a", 0), (b"ps", 0), (b"ps", 1), (b"ps", 2), "tick"]
    made = queue(queued=3)
    assert put(made, b"ps", 5) == [TAKEN] * 3 + [TELL, DROPPED]


def test_a_full_queue_shuts_out_strangers_and_lets_a_member_in():
    made = queue(queued=10)
    for n in range(20):
        put(made, b"stranger %d" % n, 1)
    assert len(made) == 10
    assert put(made, b"new", 1) == [DROPPED], "it is not this one's fault, so it is not told"
    assert put(made, b"a", 2) == [TAKEN, DROPPED]


def test_ids_that_are_made_up_are_forgotten():
    made = queue(rate=1000.0)
    for n in range(20 * SWEEP_AT):
        put(made, b"id %d" % n, 1, now=n * 0.01)
        made.take()
    assert made.remembered <= SWEEP_AT


def test_ids_that_are_made_up_faster_than_they_are_forgotten_share_a_bucket_and_no_member_does():
    made = queue(rate=1.0, burst=2.0, remembered=300)
    verdicts = [made.put(b"id %d" % n, 0, None, 0.0) for n in range(1000)]
    assert verdicts.count(TAKEN) <= 302
    assert made.remembered == 300
    assert put(made, b"a", 2) == [TAKEN, TAKEN]
    drained(made)
    put(made, b"late", 1, now=SWEEP_S + 5.0)
    assert made.remembered == 1


names = st.sampled_from([b"a", b"b", b"ps", b"x", b"y", b"z"])


@given(
    st.lists(st.tuples(names | st.none(), st.integers(0, 5000), st.floats(0, 0.5)), max_size=200)
)
def test_each_peers_messages_stay_in_order_and_nobodys_bound_is_passed(events: Any):
    made: Queue[Any] = queue(rate=10.0, burst=20.0, waiting=5, waiting_bytes=8000)
    now, sent, got, waits = 0.0, {}, {}, {}
    for number, (peer, size, after) in enumerate(events):
        now += after
        if peer is None:
            if len(made):
                name, taken, _ = made.take()
                got.setdefault(name, []).append(taken)
                waits[name] = waits[name][1:]
            continue
        if made.put(peer, size, (peer, number, size), now) is TAKEN:
            sent.setdefault(peer, []).append(number)
            waits.setdefault(peer, []).append(size)
        if peer != b"ps":
            assert len(waits.get(peer, [])) <= 5
            assert sum(waits.get(peer, [])) <= 8000
    for name, taken, _ in drained(made):
        got.setdefault(name, []).append(taken)
    assert got == sent


# Over sockets


class Served:
    """A message server on a thread that answers each query; its members are the ids that begin with `member`."""

    def __init__(self, endpoint: str, limits: Limits | None) -> None:
        self.context: zmq.Context[Any] = zmq.Context()
        self._socket = transport.router(self.context)
        self.endpoint = transport.bind(self._socket, endpoint)
        self.server = MessageServer(self._socket, limits=limits, standing=self._standing)
        self.server.on(Query, self._answer)
        self.server.on(str, lambda peer, event: self.server.stop())
        self._dealers: list[zmq.Socket[bytes]] = []
        self._thread = threading.Thread(target=lambda: asyncio.run(self.server.run()), daemon=True)

    def start(self) -> None:
        self._thread.start()

    def _standing(self, peer: bytes) -> Standing:
        return Standing.MEMBER if peer.startswith(b"member") else Standing.STRANGER

    def _answer(self, peer: bytes, query: Query) -> None:
        self.server.send(peer, Response(query.round, query.step, "train", 1))

    def dealer(self, name: str) -> zmq.Socket[bytes]:
        socket = transport.dealer(self.context, name, self.endpoint)
        socket.linger = 0
        self._dealers.append(socket)
        return socket

    def end(self) -> None:
        if self._thread.ident is not None:
            self.server.post_threadsafe("end")
            self._thread.join(30)
            assert not self._thread.is_alive()
        for socket in self._dealers:
            socket.close(0)
        self._socket.close(0)
        self.context.term()


@contextmanager
def served(endpoint: str, limits: Limits | None) -> Iterator[Served]:
    made = Served(endpoint, limits)
    try:
        yield made
    finally:
        made.end()


def answers(socket: zmq.Socket[bytes], count: int) -> list[messages.Message]:
    found = []
    for _ in range(count):
        assert socket.poll(30_000), f"only {len(found)} answers"
        found.append(messages.decode(socket.recv()))
    return found


@pytest.mark.parametrize("endpoint", ["tcp://127.0.0.1:*", "inproc://limits"])
def test_an_honest_peers_queries_are_all_answered_while_another_floods(endpoint: str):
    frame = messages.encode(Query("member-b", 0, 0))
    sent, ended = [0], threading.Event()
    with served(endpoint, Limits(rate=100.0, burst=100.0)) as made:
        made.start()

        def flood() -> None:
            socket = made.dealer("member-b")
            while not ended.is_set():
                if socket.poll(100, zmq.POLLOUT):
                    socket.send(frame)
                    sent[0] += 1

        flooder = threading.Thread(target=flood)
        flooder.start()
        try:
            honest = made.dealer("member-a")
            for step in range(50):
                honest.send(messages.encode(Query("member-a", 0, step)))
                assert answers(honest, 1) == [Response(0, step, "train", 1)]
            while made.server.counters["too-many"] < 1000:
                assert sent[0] < 1_000_000, "nothing of a flood is dropped"
        finally:
            ended.set()
            flooder.join(30)


def test_one_that_filled_the_queue_before_delays_another_by_a_message():
    """Both have sent before the server looks: in order of arrival the second one would be the last."""
    with served("inproc://limits", Limits()) as made:
        order: list[bytes] = []
        made.server.on(Query, lambda peer, query: order.append(peer))
        flooder, honest = made.dealer("member-b"), made.dealer("member-a")
        for step in range(200):
            flooder.send(messages.encode(Query("member-b", 0, step)))
        honest.send(messages.encode(Query("member-a", 0, 0)))
        made.server._receive()
        assert made.server.queued > 100
        while made.server.queued:
            made.server._handle(*made.server._queue.take())
        assert order.index(b"member-a") <= 2


def test_a_flood_is_dropped_undecoded_counted_and_said_once_and_told_once(
    caplog: pytest.LogCaptureFixture,
):
    with served("inproc://limits", Limits(rate=1e-9, burst=11.0)) as made:
        flooder = made.dealer("stranger")
        for _ in range(10):
            flooder.send(messages.encode(Query("stranger", 0, 0)))
        for _ in range(200):
            flooder.send(b"\xc1")  # not msgpack
        made.start()
        other = made.dealer("member")
        other.send(messages.encode(Query("member", 0, 0)))
        answers(other, 1)
        found = answers(flooder, 11)
        for _ in range(30_000):
            if made.server.counters["too-many"] == 200:
                break
            other.poll(1)
        assert [type(x) for x in found].count(Response) == 10
        (error,) = [x for x in found if isinstance(x, Error)]
        assert error.code == "too-many"
        assert "max_rate" in error.text
        assert made.server.counters == {"too-many": 200}, "nothing was decoded"
        assert not flooder.poll(0)
    assert [r.levelno for r in caplog.records] == [logging.WARNING]
    assert caplog.records[0].getMessage().startswith("stranger: refused: too-many")


def test_a_message_of_many_frames_is_refused_and_not_kept():
    with served("inproc://limits", Limits()) as made:
        peer = made.dealer("member")
        peer.send_multipart([b"x"] * 100)
        made.start()
        (error,) = answers(peer, 1)
    assert error == Error("bad-frames", "expected one frame, got 100")


# What handlers keep


def test_a_run_takes_so_many_members_and_says_that_it_is_full():
    server = Server(workers=2)
    server.handlers._max_peers = 3
    server.ps()
    server.member("a")
    server.member("b")
    error = server.refuses(Join("c", "worker"))
    assert error.code == "full"
    assert "max_peers" in error.text
    assert server.refuses(Join("judge", "evaluator", layout=LAYOUT.to_wire())).code == "full"
    server.member("b")  # who is in it may come back
    server.gets(Leave("a", "done"))
    server.member("c")


def test_who_waits_for_the_parameter_server_counts_and_that_is_let_in_after_them():
    server = Server(workers=2)
    server.handlers._max_peers = 3
    for worker in ("a", "b"):
        server.gets(Join(worker, "worker"))
    assert server.refuses(Join("c", "worker")).code == "full"
    assert len(to("a", server.ps())) == 1


def test_a_run_that_waits_for_more_than_it_takes_is_refused_at_once():
    check_room(RunConfig(workers=9999), StateConfig())
    with pytest.raises(ConfigError, match="max_peers = 10000 lets in fewer"):
        check_room(RunConfig(workers=10_000), StateConfig())


def test_the_layouts_of_those_that_wait_are_kept_once():
    server = Server(workers=8)
    for n in range(8):
        server.gets(Join(f"w{n}", "worker", layout={**LAYOUT.to_wire(), "more": ["x"] * n}))
    kept = [one.join.layout for one in server.handlers._waiting.values()]
    assert all(layout is kept[0] for layout in kept)
    for n in range(state.LAYOUTS - 1):
        other = {"leaves": [["delta", f"w{n}", [1], "float32"]]}
        server.gets(Join(f"x{n}", "worker", layout=other))
    error = server.refuses(Join("y", "worker", layout={"leaves": [["delta", "y", [1], "float32"]]}))
    assert error.code == "layout-mismatch"
    sent = server.ps()
    assert all(type(to(f"w{n}", sent)[-1]) is messages.Welcome for n in range(8))


def test_the_layouts_of_those_that_have_gone_are_not_kept():
    server = Server(workers=1)
    for n in range(2 * state.LAYOUTS):
        layout = {"leaves": [["delta", "w", [1 + n], "float32"]]}
        server.gets(Join("a", "worker", layout=layout, life=str(n)))
        if n % 2:
            server.gets(Leave("a", "another model"))
        server.now += 3.0  # or it is not heard of any more
    assert len(server.handlers._waiting_layouts) <= state.LAYOUTS


@pytest.mark.parametrize(
    "leaves",
    [
        [["delta", "w", [1], "float32"]] * (MAX_LEAVES + 1),
        [["delta", "w", [1 << 39] * (MAX_AXES + 1), "float32"]],
        [["delta", "w" * 2000, [1], "float32"]],
        [["delta", "w", [1], "f" * 50]],
    ],
)
def test_a_layout_that_is_too_long_is_refused(leaves: Any):
    server = running("a")
    assert server.refuses(Join("b", "worker", layout={"leaves": leaves})).code == "bad-layout"


def test_texts_are_cut_to_a_length():
    server = Server(workers=1)
    server.ps()
    server.gets(Join("a", "worker", host="h" * 4096, device="d" * 4096))
    record = server.table.records["a"]
    assert (len(record.host), len(record.device)) == (state.MAX_NAME, state.MAX_NAME)
    server.gets(Report("a", 0, 0, "p" * 4096))
    assert len(record.phase) == state.MAX_WORD
    server.gets(Leave("a", "r" * 4096))
    assert len(server.handlers.history.passages[0].reason) == state.MAX_NAME
    assert server.refuses(Join("b", "worker", life="l" * 100)).code == "bad-field"


def test_a_parameter_servers_endpoints_are_few_and_plain():
    for more in ({str(n): n for n in range(20)}, {"device": ["x"]}):
        error = Server().refuses(Join("ps", "ps", endpoints={**ENDPOINTS, **more}))
        assert error.code == "bad-field"


def test_who_asks_for_the_table_all_the_time_is_answered_now_and_then():
    server = running("a")
    assert len(server.gets(Status(), peer="eager")) == 1
    for _ in range(5):
        assert server.gets(Status(), peer="eager") == []
    assert [peer for peer, _ in server.tick(0.01)] == ["eager"]
    assert server.tick(0.01) == []


def test_so_many_watch_the_table_and_no_more():
    server = running("a")
    for n in range(state.WATCHERS):
        server.gets(Status(), peer=f"p{n}")
    assert server.refuses(Status(), peer="one more").code == "too-many"
    server.now += 2 * state.WATCHING_S
    assert len(server.gets(Status(), peer="one more")) == 1


def test_stays_that_ended_long_ago_are_summed_up(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(history, "STAYS", 8)
    server = running("a")
    for n in range(30):
        server.member(f"w{n}")
        server.gets(Report(f"w{n}", 0, 1, "train", totals={"steps": 2}))
        server.gets(Leave(f"w{n}", "done"))
    kept = server.handlers.history
    assert len(kept.passages) <= 11
    assert kept.passages[0].record.worker == "a", "who is here is kept"
    assert kept.total("steps") == 60
    assert sum(kept.gone.values()) + len(kept.passages) == 31


def test_evaluations_are_thinned_out(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(history, "EVALUATIONS", 10)
    made = history.History()
    for version in range(100):
        made.evaluated(version, 0.5, None, float(version))
    rounds = [row["round"] for row in made.accuracy]
    assert len(rounds) <= 10
    assert rounds == sorted(rounds)
    assert rounds[-1] == 99


def test_ranks_of_the_latest_are_kept(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(state, "RANKS", 5)
    server = running("a")
    for n in range(10):
        server.member(f"w{n}")
        server.gets(Leave(f"w{n}", "done"))
    assert len(server.handlers._ranks) == 5


def test_a_fault_log_does_not_grow_with_reasons_that_are_made_up():
    made = FaultLog(logging.getLogger("test"))
    for n in range(3 * REMEMBERED):
        made.say(f"p{n}", f"reason {n}", "text")
    assert len(made._faults) <= 2 * REMEMBERED + 1
    assert (OTHERS, OTHERS) in made._faults
