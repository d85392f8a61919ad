"""A queue that wakes a thread in a poller."""

from __future__ import annotations

import os
import select
import threading

import pytest

from esync.mailbox import Mailbox


@pytest.fixture
def mailbox():
    box = Mailbox()
    yield box
    box.close()


def readable(box):
    return bool(select.select([box.fileno()], [], [], 0)[0])


def test_a_mailbox_that_is_closed_meanwhile_does_not_write_to_what_has_its_descriptor_then(
    mailbox, monkeypatch
):
    write, closing = os.write, threading.Thread(target=mailbox.close)

    def late(descriptor, data):
        closing.start()
        closing.join(0.3)
        assert closing.is_alive(), "the descriptor may be another file's"
        return write(descriptor, data)

    monkeypatch.setattr("esync.mailbox.os.write", late)
    mailbox.put("a")
    closing.join(10)
    mailbox.put("b")
    assert not closing.is_alive()


def test_what_is_put_in_is_taken_out_once_and_in_order(mailbox):
    for item in ("a", "b", "c"):
        mailbox.put(item)
    assert mailbox.take() == ["a", "b", "c"]
    assert mailbox.take() == []


def test_its_descriptor_is_readable_exactly_while_something_is_in_it(mailbox):
    assert not readable(mailbox)
    mailbox.put(1)
    mailbox.put(2)
    assert readable(mailbox)
    mailbox.take()
    assert not readable(mailbox)


def test_taking_from_an_empty_mailbox_does_not_block(mailbox):
    assert mailbox.take() == []


def test_more_items_than_its_pipe_holds_are_all_taken_and_wake_the_receiver(mailbox):
    count = 200_000
    for item in range(count):
        mailbox.put(item)
    taken = []
    while readable(mailbox):
        taken += mailbox.take()
    assert taken == list(range(count))


def test_a_waiting_receiver_gets_everything_from_many_senders(mailbox):
    def send(sender):
        for number in range(200):
            mailbox.put((sender, number))

    senders = [threading.Thread(target=send, args=(i,)) for i in range(4)]
    for sender in senders:
        sender.start()
    taken = []
    while len(taken) < 800:
        assert select.select([mailbox.fileno()], [], [], 30)[0]
        taken += mailbox.take()
    for sender in senders:
        sender.join()
    for i in range(4):
        assert [number for sender, number in taken if sender == i] == list(range(200))


def test_after_closing_a_mailbox_senders_are_not_troubled():
    box = Mailbox()
    box.put("before")
    box.close()
    box.put("after")
    box.close()
