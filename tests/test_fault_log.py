"""Faults that come again and again: what is in the log of them."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any

import pytest
import zmq

from esync import messages
from esync.config import RunConfig
from esync.fault_log import AGAIN, OTHERS, REMEMBERED, FaultLog, name_of
from esync.messages import Join, MessageError, Report
from esync.messaging import LOCAL, MessageServer
from esync.ps.aggregation import NOT_FINITE, Refused
from esync.ps.backend import NumpyBackend
from esync.ps.server import TensorThread
from esync.worker.link import Link

log = logging.getLogger("esync.test")


@pytest.fixture
def faults() -> FaultLog:
    return FaultLog(log)


def said(caplog: pytest.LogCaptureFixture) -> list[str]:
    """What has been logged since this was last asked."""
    lines = [record.getMessage() for record in caplog.records]
    caplog.clear()
    return lines


def test_a_fault_is_said_once_and_then_whenever_its_number_has_doubled(
    faults: FaultLog, caplog: pytest.LogCaptureFixture
) -> None:
    for number in range(100):
        faults.say("old", "late", f"update {number} is late")
    assert said(caplog) == [
        "old: update 0 is late",
        f"old: update 9 is late ({AGAIN} times so far)",
        "old: update 19 is late (20 times so far)",
        "old: update 39 is late (40 times so far)",
        "old: update 79 is late (80 times so far)",
    ]
    faults.close()
    assert said(caplog) == ["old: update 99 is late (100 times so far)"]


def test_faults_of_others_and_for_other_reasons_are_said_too(
    faults: FaultLog, caplog: pytest.LogCaptureFixture
) -> None:
    for _ in range(3):
        faults.say("old", "late", "is late")
        faults.say(b"gpu", "late", "is late")
        faults.say("old", "torn", "is torn")
    assert said(caplog) == ["old: is late", "gpu: is late", "old: is torn"]
    faults.close()
    assert len(said(caplog)) == 3


def test_what_was_said_already_is_not_said_again_at_the_end(
    faults: FaultLog, caplog: pytest.LogCaptureFixture
) -> None:
    faults.say("old", "late", "is late")
    said(caplog)
    faults.close()
    assert said(caplog) == []


def test_a_fault_that_was_over_is_a_new_one_when_it_comes_again(
    faults: FaultLog, caplog: pytest.LogCaptureFixture
) -> None:
    for _ in range(4):
        faults.say("old", "silent", "is silent")
        faults.say("old", "late", "is late")
    said(caplog)
    faults.over("old", "silent")
    assert said(caplog) == ["old: is silent (4 times so far)"]
    faults.over("old", "silent")
    faults.over("gpu", "silent")
    assert said(caplog) == []
    faults.say("old", "silent", "is silent")
    faults.say("old", "late", "is late")
    assert said(caplog) == ["old: is silent"]


def test_who_makes_up_ids_does_not_fill_the_log_or_the_memory(
    faults: FaultLog, caplog: pytest.LogCaptureFixture
) -> None:
    for number in range(10 * REMEMBERED):
        faults.say(f"stranger-{number}", "unknown", "is unknown")
    lines = said(caplog)
    assert len(lines) < REMEMBERED + 20
    assert lines[REMEMBERED] == f"{OTHERS}: is unknown"
    assert len(faults._faults) == REMEMBERED + 1


def test_a_level_is_that_of_the_fault(faults: FaultLog, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, log.name):
        faults.say("old", "far", "is far", level=logging.INFO)
        faults.say("old", "bad", "is bad", level=logging.ERROR)
    assert [record.levelno for record in caplog.records] == [logging.INFO, logging.ERROR]


@pytest.mark.parametrize(
    ("peer", "name"),
    [
        ("old", "old"),
        (b"gpu-1", "gpu-1"),
        (b"", "b''"),
        (b"\x00k\x8b", r"b'\x00k\x8b'"),
        (b"old\n2026 ERROR forged", r"b'old\n2026 ERROR forged'"),
        ("x" * 500, "x" * 80),
    ],
)
def test_a_name_fits_on_a_line_whatever_a_peer_calls_itself(peer: str | bytes, name: str) -> None:
    assert name_of(peer) == name


def test_a_text_from_the_network_makes_no_line_of_its_own(
    faults: FaultLog, caplog: pytest.LogCaptureFixture
) -> None:
    faults.say("old", "error", "reports\n2026 ERROR forged")
    (line,) = said(caplog)
    assert "\n" not in line


@pytest.fixture
def context() -> Iterator[zmq.Context[Any]]:
    made: zmq.Context[Any] = zmq.Context()
    yield made
    made.term()


@pytest.fixture
def server(context: zmq.Context[Any]) -> Iterator[MessageServer]:
    with context.socket(zmq.ROUTER) as socket:
        yield MessageServer(socket)


def test_a_message_server_says_a_refusal_once_and_counts_each(
    server: MessageServer, caplog: pytest.LogCaptureFixture
) -> None:
    for peer in (b"old", b"gpu"):
        for number in range(AGAIN - 1):
            server.refuse(peer, MessageError("bad-field", f"the field is {number}"))
    assert said(caplog) == [
        "old: refused: bad-field: the field is 0",
        "gpu: refused: bad-field: the field is 0",
    ]
    assert server.counters == {"bad-field": 2 * (AGAIN - 1)}


def test_a_handlers_defect_is_an_error_with_its_place_once(
    server: MessageServer, caplog: pytest.LogCaptureFixture
) -> None:
    def fails(peer: bytes, message: object) -> None:
        raise ZeroDivisionError

    server.on(messages.Status, fails)
    server.on(str, fails)
    frame = messages.encode(messages.Status())
    for _ in range(3):
        server._handle(b"old", frame, "")
        server._handle(LOCAL, "tick", "")
    assert [record.levelno for record in caplog.records] == [logging.ERROR] * 2
    assert all(record.exc_info for record in caplog.records)
    first, second = said(caplog)
    assert first.startswith("old: handling b'")
    assert second == "this process: handling 'tick' failed"
    assert server.counters == {"internal": 3}


def test_a_parameter_server_names_once_whose_updates_hold_nan(
    context: zmq.Context[Any], caplog: pytest.LogCaptureFixture
) -> None:
    sockets = context.socket(zmq.PULL), context.socket(zmq.XPUB)
    thread = TensorThread(*sockets, NumpyBackend(), RunConfig(), lambda event: None)
    for _ in range(5):
        thread._emit([Refused(NOT_FINITE, "old")])
        thread.handle([memoryview(b"\xc1")])
    for socket in sockets:
        socket.close(0)
    thread.inbox.close()
    first, second = said(caplog)
    assert first.startswith("old: not counted: the update holds NaN")
    assert second.startswith("somebody: refused: not-msgpack")
    assert thread.counters == {NOT_FINITE: 5, "not-msgpack": 5}


class Full:
    """A control socket that takes nothing, for a while."""

    full = True

    def send(self, frame: bytes, flags: int) -> None:
        if self.full:
            raise zmq.Again


def test_a_worker_says_once_that_the_state_server_takes_nothing_and_again_the_next_time(
    context: zmq.Context[Any], caplog: pytest.LogCaptureFixture
) -> None:
    link = Link("inproc://x", Join("old", "worker"), wait_s=1, context=context, say=print)
    link._control.close(0)
    socket: Any = Full()
    link._control = socket
    text = "old: the state server takes no messages: a report was dropped"

    def send() -> list[str]:
        for _ in range(5):
            link._send(Report("old", 1, 1, "train"))
        return said(caplog)

    assert send() == [text]
    socket.full = False
    assert send() == [f"{text} (5 times so far)"]
    socket.full = True
    assert send() == [text]
    link.inbox.close()
