"""The virtual network, against times computed by hand."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from esync.config import NetworkConfig, WorkerConfig
from esync.sim.events import Events
from esync.sim.network import Line, Network, SharedLine
from tests.virtual import untrained

MBIT = 1e6 / 8
"""Bytes a second."""


def arrivals(sent, network=None, mbit=0.0):
    """Seconds at which (when, name or size, way or None) transfers of a second's worth of bytes arrive."""
    events, arrived = Events(), {}
    line = SharedLine(mbit, events)
    net = network(events) if network else None

    def send(number, name, way, size):
        through = lambda: arrived.__setitem__(number, events.now)  # noqa: E731
        net.send(name, way, size, through) if net else line.send(size, through)

    for number, (when, name, way, size) in enumerate(sent):
        events.at(when, lambda n=number, a=(name, way, size): send(n, *a))
    while events.quiet_s == 0.0 and len(arrived) < len(sent):
        events.next()
    return [arrived[number] for number in range(len(sent))]


def on_shared_line(sent, mbit):
    return arrivals([(when, "", "", size) for when, size in sent], mbit=mbit)


def test_six_transfers_at_once_share_a_line_and_all_arrive_after_six_times_the_time_of_one():
    assert on_shared_line([(1.0, 10 * MBIT)] * 6, mbit=10) == pytest.approx([7.0] * 6)


def test_of_transfers_at_once_the_small_ones_are_through_first():
    """1, 2 and 3 s worth: a third each until 3 s, half each until 5 s, then the last one alone."""
    sizes = [(0.0, 3 * MBIT), (0.0, 1 * MBIT), (0.0, 2 * MBIT)]
    assert on_shared_line(sizes, mbit=1) == pytest.approx([6.0, 3.0, 5.0])


def test_whoever_comes_later_shares_from_then_on():
    """4 s worth each, the second 2 s after the first: the first has 2 s left and needs 4 s for it; by then the second
    has had 2 s worth and has the line for itself."""
    assert on_shared_line([(0.0, 4 * MBIT), (2.0, 4 * MBIT)], mbit=1) == pytest.approx([6.0, 8.0])


def test_three_staggered_transfers():
    """a from 0 s, b from 1 s, c from 2 s, 3 s worth each.

    a: 1 + 1/2 by 2 s, the other 1.5 in thirds: 6.5 s. b: 1/2 + 1.5 by then, its last 1 at half speed: 8.5 s.
    c: 1.5 + 1 by then, and the last 0.5 alone: 9 s.
    """
    sent = [(0.0, 3 * MBIT), (1.0, 3 * MBIT), (2.0, 3 * MBIT)]
    assert on_shared_line(sent, mbit=1) == pytest.approx([6.5, 8.5, 9.0])


def fluid(sent):
    """What a line of 1 byte a second does, told from one arrival or departure to the next."""
    left, arrived, now = {}, {}, 0.0
    coming = sorted(range(len(sent)), key=lambda n: sent[n][0])
    while coming or left:
        soonest = min(left, key=left.get, default=None)
        done_at = now + left[soonest] * len(left) if left else float("inf")
        until = min(done_at, sent[coming[0]][0] if coming else float("inf"))
        for number in left:
            left[number] -= (until - now) / len(left)
        now = until
        if now == done_at:
            del left[soonest]
            arrived[soonest] = now
        else:
            left[coming[0]] = sent[coming[0]][1]
            del coming[0]
    return [arrived[number] for number in range(len(sent))]


@given(st.lists(st.tuples(st.floats(0, 20), st.integers(1, 10)), min_size=1, max_size=12))
def test_any_transfers_share_a_line_like_a_fluid(sent):
    assert on_shared_line(sent, mbit=8e-6) == pytest.approx(fluid(sent), abs=0.05)


def test_a_line_that_was_idle_begins_afresh():
    assert on_shared_line([(0.0, MBIT), (10.0, MBIT)], mbit=1) == pytest.approx([1.0, 11.0])


def test_without_a_limit_everything_is_there_at_once():
    assert on_shared_line([(2.0, 1e12), (2.0, 1e12)], mbit=0) == [2.0, 2.0]


def test_on_a_worker_s_own_line_one_transfer_follows_the_other():
    line = Line(1)
    assert line.through(2 * MBIT, 0.0) == 2.0
    assert line.through(1 * MBIT, 1.0) == 3.0
    assert line.through(1 * MBIT, 10.0) == 11.0
    assert Line(0).through(1e12, 5.0) == 5.0


def network(**options):
    workers = {
        "slow": WorkerConfig(bandwidth_mbit=1),
        "far": WorkerConfig(latency_s=0.5),
        "a": WorkerConfig(),
    }
    return lambda events: Network(NetworkConfig(**options), workers, events)


def test_the_slower_of_the_two_lines_decides():
    sent = [(0.0, "slow", "up", 4 * MBIT), (0.0, "a", "up", 4 * MBIT)]
    assert arrivals(sent, network(up_mbit=4)) == pytest.approx([4.0, 2.0])
    assert arrivals(sent, network(up_mbit=0.5)) == pytest.approx([16.0, 16.0])


def test_the_two_directions_do_not_share():
    sent = [(0.0, "a", "up", 4 * MBIT), (0.0, "a", "down", 4 * MBIT)]
    assert arrivals(sent, network(up_mbit=4, down_mbit=2)) == pytest.approx([1.0, 2.0])
    sent = [(0.0, "slow", "up", MBIT), (0.0, "slow", "down", MBIT)]
    assert arrivals(sent, network()) == pytest.approx([1.0, 1.0])


def test_the_latency_of_the_network_and_of_the_worker_come_on_top():
    sent = [(0.0, "far", "up", 4 * MBIT), (0.0, "a", "up", 4 * MBIT), (5.0, "far", "down", 1)]
    assert arrivals(sent, network(up_mbit=4, latency_s=0.25)) == pytest.approx([2.75, 2.25, 5.75])
    made = network(latency_s=0.25)(Events())
    assert made.latency_s("far") == 0.75
    assert made.latency_s("ps") == 0.25


def test_a_pretended_size_takes_the_place_of_the_real_one():
    assert network(model_mb=42.6)(Events()).tensor_bytes == 42_600_000
    assert network()(Events()).tensor_bytes == 0


def test_chunks_of_any_size_take_as_long():
    """An update is one transfer, whatever the chunks in which it is averaged."""
    file = {"workers": [{"step_time_s": 1.0, "bandwidth_mbit": 8.0}], "network": {"model_mb": 1.0}}
    ends = []
    for mib in (1, 2, 64):
        cluster, rounds = untrained(file, mode="sync", rounds=3, chunk_mib=mib)
        cluster.run()
        assert cluster.layout.chunk_mib == mib
        ends.append([row.at for row in rounds])
    assert len(ends[0]) == 3
    assert ends[0] == ends[1] == ends[2]


def test_of_versions_that_come_while_a_model_is_being_sent_the_newest_follows():
    """Rounds take 2 s, and `far` is one of four that are drawn one at a time: a model takes 8 s to it. When it is drawn
    there are the rest of one and the newest one to wait for, and its update: 8 + 8 + 0.5 + 8 s at most."""
    file = {
        "run": {
            "mode": "fedavg",
            "participation": 0.25,
            "local_steps": 5,
            "duration_s": 400,
            "workers": 4,
        },
        "network": {"latency_s": 0.01, "model_mb": 200},
        "workers": [
            {"name": "near", "step_time_s": 0.4, "count": 3},
            {"name": "far", "step_time_s": 0.1, "bandwidth_mbit": 200},
        ],
    }
    cluster, rounds = untrained(file)
    cluster.run()
    far = [
        after.at - before.at
        for before, after in pairwise(rounds)
        if "far" in after.waits and "far" not in before.waits
    ]
    assert len(far) > 5
    assert max(far) < 8 + 8 + 0.5 + 8 + 0.1
    assert max(far) > 8 + 0.5 + 8
