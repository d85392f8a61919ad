"""The timeline: who did what from when to when, and what a figure shows of it."""

from __future__ import annotations

import itertools
import random

import pytest

from esync.errors import ConfigError
from esync.report.runs import load
from esync.report.timeline import (
    COMPUTING,
    EVALUATING,
    QUERYING,
    SYNCHRONISING,
    WAITING,
    chosen_window,
    intervals,
    slowness,
    timeline,
    window,
)
from tests.test_report_logs import rows_of_a_run, write_rows, write_run


def run_of(directory, rows, **fields):
    write_run(directory, **fields)
    for path in directory.glob("*.jsonl"):
        path.unlink()
    write_rows(directory / "all.jsonl", rows)
    return load(directory)


def spans(run, worker, round=None):
    """(kind, begin, end) of a worker, to the millisecond."""
    return [
        (item.kind, round_ms(item.begin_s), round_ms(item.end_s))
        for item in intervals(run, [worker])
        if round is None or item.round == round
    ]


def round_ms(seconds):
    return round(seconds, 3)


def a_round(t, worker="a", round=0, compute_s=1.0, query_s=0.0, sync_s=0.0, late=False):
    parts = {"compute_s": compute_s, "query_s": query_s, "sync_s": sync_s}
    fields = {"round": round, "steps": 1, "samples": 1, "loss": None, "late": late}
    return {"t": t, "role": worker, "event": "round", **parts, **fields}


def start(t=0.0):
    return {"t": t, "role": "state", "event": "start", "workers": []}


def published(t, version, **early_s):
    return {"t": t, "role": "ps", "event": "round", "round": version, "early_s": early_s}


def test_a_round_is_computing_asking_sending_waiting_and_receiving(tmp_path):
    run = load(write_run(tmp_path))
    assert spans(run, "fast", round=1) == [
        (COMPUTING, 1.5, 2.25),
        (QUERYING, 2.25, 2.3),
        (SYNCHRONISING, 2.3, 2.4),
        (WAITING, 2.4, 2.75),
        (SYNCHRONISING, 2.75, 3.0),
    ]
    assert spans(run, "slow", round=1) == [
        (COMPUTING, 1.5, 2.5),
        (SYNCHRONISING, 2.5, 2.7),
        (WAITING, 2.7, 2.75),
        (SYNCHRONISING, 2.75, 3.0),
    ]
    assert spans(run, "judge") == [
        (EVALUATING, 1.35, 1.75),
        (EVALUATING, 2.85, 3.25),
        (EVALUATING, 4.35, 4.75),
    ]
    assert {i.steps for i in intervals(run, ["fast"]) if i.kind == COMPUTING} == {3}
    assert {i.steps for i in intervals(run, ["fast"]) if i.kind != COMPUTING} == {0}


def test_a_window_selects_whole_intervals_of_the_rounds_that_reach_into_it(tmp_path):
    run = load(write_run(tmp_path))
    found = intervals(run, begin_s=1.6, end_s=2.9)
    assert {(item.worker, item.round) for item in found} == {
        ("fast", 1),
        ("slow", 1),
        ("judge", 1),
        ("judge", 2),
    }


def test_nothing_overlaps_and_the_parts_add_up_to_the_rounds(tmp_path):
    dice = random.Random(1)
    rows, at = [start()], {name: 0.0 for name in "abc"}
    for version in range(30):
        out = 0.0
        made = []
        for name in at:
            parts = [dice.choice([0.0, dice.random()]) for _ in range(3)]
            at[name] += dice.random() * 0.1 + sum(parts)
            out = max(out, at[name] - dice.random())
            made.append(a_round(at[name], name, version, *parts, late=dice.random() < 0.1))
        early_s = {name: 2 * dice.random() for name in at}
        rows += [published(out, version + 1, **early_s), *made]
    run = run_of(tmp_path, rows)
    for name in at:
        found = intervals(run, [name])
        assert all(item.end_s > item.begin_s for item in found)
        assert all(a.end_s <= b.begin_s for a, b in itertools.pairwise(found))
        for row in run.log.rounds[name]:
            lasted = {kind: 0.0 for kind in (COMPUTING, QUERYING, SYNCHRONISING, WAITING)}
            for item in found:
                if item.round == row.round:
                    lasted[item.kind] += item.end_s - item.begin_s
            assert lasted[COMPUTING] == pytest.approx(row.compute_s, abs=1e-6)
            assert lasted[QUERYING] == pytest.approx(row.query_s, abs=1e-6)
            together = lasted[SYNCHRONISING] + lasted[WAITING]
            assert together == pytest.approx(row.sync_s, abs=1e-6)


def test_a_clock_that_was_set_back_makes_no_overlap(tmp_path):
    rows = [start(), a_round(2.0, round=0, compute_s=2.0), a_round(2.5, round=1, compute_s=1.0)]
    run = run_of(tmp_path, rows)
    assert spans(run, "a") == [(COMPUTING, 0.0, 2.0), (COMPUTING, 2.0, 2.5)]


def test_nobody_waits_longer_than_the_synchronisation_took(tmp_path):
    rows = [start(), published(1.4, 1, a=3.0), a_round(1.5, sync_s=0.5)]
    assert spans(run_of(tmp_path, rows), "a") == [(COMPUTING, 0.0, 1.0), (WAITING, 1.0, 1.5)]


def test_a_parameter_server_whose_clock_differs_moves_the_wait_no_further_than_it_can_be(tmp_path):
    for number, (clock, expected) in enumerate({90.0: (1.2, 1.5), -90.0: (1.0, 1.3)}.items()):
        rows = [start(), published(1.4 + clock, 1, a=0.3), a_round(1.5, sync_s=0.5)]
        run = run_of(tmp_path / str(number), rows)
        assert (WAITING, *expected) in spans(run, "a")


def test_a_late_worker_a_worker_alone_and_one_that_overlaps_do_not_wait(tmp_path):
    pushed = a_round(1.5, sync_s=0.5)
    cases = {
        "late": run_of(
            tmp_path / "late", [start(), published(1.4, 1, a=0.3), {**pushed, "late": True}]
        ),
        "no publication": run_of(tmp_path / "none", [start(), pushed]),
        "not in it": run_of(tmp_path / "not", [start(), published(1.4, 1, b=0.3), pushed]),
        "overlap": run_of(
            tmp_path / "overlap",
            [start(), published(1.4, 1, a=0.3), pushed],
            run={"overlap": True},
        ),
    }
    for name, run in cases.items():
        expected = [(COMPUTING, 0.0, 1.0), (SYNCHRONISING, 1.0, 1.5)]
        assert spans(run, "a") == expected, name


def life(t, *totals, worker="a"):
    """When a process began, or ended with these totals."""
    if not totals:
        return {"t": t, "role": worker, "event": "start", "rank": 0, "device": "cpu"}
    keys = ("steps", "samples", "compute_s", "query_s", "sync_s", "eval_s")
    fields = dict(zip(keys, totals, strict=True))
    return {"t": t, "role": worker, "event": "end", "totals": fields}


def test_a_round_that_the_end_of_the_run_cut_off_was_waited_in(tmp_path):
    rows = [start(), published(1.4, 1, a=0.3), a_round(1.5, sync_s=0.5)]
    rows += [a_round(4.0, round=1, sync_s=1.5)]
    assert spans(run_of(tmp_path, rows), "a", 1) == [(COMPUTING, 1.5, 2.5), (WAITING, 2.5, 4.0)]


def test_what_came_after_the_last_round_is_known_from_the_totals_at_the_end(tmp_path):
    before = [life(-9.0), a_round(-5.0), life(-4.0, 1, 1, 1.0, 0.0, 0.0, 0.0)]
    first = [life(-1.0), start(), published(1.4, 1, a=0.3), a_round(1.5, sync_s=0.5)]
    second = [published(2.9, 2, a=0.3), a_round(3.0, round=1, sync_s=0.5)]
    second += [published(7.0, 3, b=0.3)]  # without it
    third = [life(9.0, 5, 5, 3.2, 0.1, 5.0, 0.0)]  # two more steps, and 4 s of waiting to be drawn
    run = run_of(tmp_path, [*before, *first, *second, *third])
    expected = [(COMPUTING, 3.0, 4.2), (QUERYING, 4.2, 4.3), (WAITING, 4.3, 8.3)]
    assert spans(run, "a", 2) == expected
    drawn = run_of(tmp_path / "drawn", [*first, *second, *third], run={"mode": "tifl"})
    assert [kind for kind, *_ in spans(drawn, "a", 2)] == [WAITING, COMPUTING, QUERYING]
    assert slowness(run) == {"a": 1.0}, "of rounds that ended"
    shown = timeline(run, "it", 0.0, 10.0)
    assert shown.rows[0].share == pytest.approx(3.2 / 8.3)


def test_a_process_without_a_round_or_with_nothing_after_its_last_one_adds_none(tmp_path):
    idle = run_of(tmp_path / "idle", [life(-1.0), start(), life(9.0, 1, 1, 1.0, 0.0, 0.0, 0.0)])
    assert spans(idle, "a") == []
    rows = [life(-1.0), start(), a_round(1.0), life(9.0, 1, 1, 1.0004, 0.0, 0.0, 0.0)]
    assert spans(run_of(tmp_path / "all", rows), "a") == [(COMPUTING, 0.0, 1.0)]


def test_where_workers_wait_for_their_turn_that_wait_is_before_the_round(tmp_path):
    # The turn comes at 3.0; 1 s of computing, 0.1 s of sending, 0.3 s for the others, 0.1 s of receiving.
    rows = [start(), published(4.4, 8, a=0.3), a_round(4.5, round=7, sync_s=3.5)]
    run = run_of(tmp_path, rows, run={"mode": "fedavg"})
    assert spans(run, "a") == [
        (WAITING, 0.0, 3.0),
        (COMPUTING, 3.0, 4.0),
        (SYNCHRONISING, 4.0, 4.1),
        (WAITING, 4.1, 4.4),
        (SYNCHRONISING, 4.4, 4.5),
    ]


@pytest.mark.parametrize("logged", [3.4, 3.501])
def test_without_a_barrier_the_turn_is_waited_for_but_nobody_at_the_end(tmp_path, logged):
    rows = [start(), published(0.2, 3, a=0.1), published(logged, 9, a=0.1), published(5.0, 12, a=0)]
    rows.append(a_round(3.5, round=4, sync_s=2.5))
    run = run_of(tmp_path, rows, run={"mode": "ssp"})
    receiving = max(0.0, 3.5 - logged)
    turn = 2.5 - 2 * receiving
    expected = [(WAITING, 0.0, round_ms(turn)), (COMPUTING, round_ms(turn), round_ms(turn + 1.0))]
    if receiving:
        expected.append((SYNCHRONISING, round_ms(turn + 1.0), 3.5))
    assert spans(run, "a") == expected


def test_the_window_is_six_rounds_in_the_middle_of_the_run(tmp_path):
    run = load(write_run(tmp_path, rounds=21))
    begin_s, end_s = window(run)
    assert begin_s == pytest.approx(1.25 + 7 * 1.5 - 0.18)
    assert end_s == pytest.approx(1.25 + 13 * 1.5 + 0.18)
    shown = timeline(run, "a run")
    assert [version for _, version in shown.boundaries] == list(range(8, 15))


def test_a_short_run_is_shown_whole(tmp_path):
    begin_s, end_s = window(load(write_run(tmp_path, rounds=4)))
    assert begin_s < 1.25
    assert end_s > 1.25 + 3 * 1.5


def test_without_a_barrier_the_window_is_three_rounds_of_the_slowest_and_has_no_boundaries(
    tmp_path,
):
    rows = [start()]
    rows += [a_round(0.1 * n, "fast", n, compute_s=0.1) for n in range(1, 101)]
    rows += [a_round(1.0 * n, "slow", n, compute_s=1.0) for n in range(1, 11)]
    rows += [published(0.1 * n, n, fast=0.0) for n in range(1, 101)]
    run = run_of(tmp_path, rows, run={"mode": "async"})
    begin_s, end_s = window(run)
    assert (begin_s, end_s) == (pytest.approx(3 - 0.06), pytest.approx(6 + 0.06))
    assert timeline(run, "a run").boundaries == []


def test_a_part_of_a_window_may_be_given(tmp_path):
    run = load(write_run(tmp_path, rounds=21))
    length = window(run)[1] - window(run)[0]
    assert chosen_window(run, 3.0, 4.0) == (3.0, 4.0)
    assert chosen_window(run, 3.0, None) == (3.0, pytest.approx(3.0 + length))
    assert chosen_window(run, None, 20.0) == (pytest.approx(20.0 - length), 20.0)
    with pytest.raises(ConfigError, match=r"--from 4 --to 3: a window ends after it begins"):
        chosen_window(run, 4.0, 3.0)


def test_a_row_tells_the_share_of_the_window_that_was_spent_computing(tmp_path):
    run = load(write_run(tmp_path))
    shown = timeline(run, "a run", begin_s=0.5, end_s=1.5)
    rows = {row.worker: row for row in shown.rows}
    assert list(rows) == ["fast", "slow", "judge"]
    assert rows["fast"].share == pytest.approx(0.25)
    assert rows["slow"].share == pytest.approx(0.5)
    assert rows["judge"].share is None
    assert rows["fast"].device == "cpu 250 ms"
    assert (shown.gap, shown.note) == (None, "")


def test_of_many_workers_the_fastest_and_the_slowest_are_shown(tmp_path):
    names = [f"w{n}" for n in range(30)]
    steps = {name: 0.1 * (30 - n) for n, name in enumerate(names)}
    rows = [start()]
    rows += [a_round(s, name, compute_s=s) for name, s in steps.items()]
    run = run_of(tmp_path, rows)
    assert list(slowness(run)) == names[::-1]
    shown = timeline(run, "a run", 0.0, 9.0)
    assert [row.worker for row in shown.rows] == names[:21:-1] + names[7::-1]
    assert shown.gap == 8
    assert shown.note == "the 8 fastest and the 8 slowest of 30 workers"


def test_there_is_no_timeline_where_there_is_nothing_to_show(tmp_path):
    rows = [row for row in rows_of_a_run() if row["role"] in ("state", "server")]
    assert timeline(run_of(tmp_path / "own", rows), "own loops") is None
    run = load(write_run(tmp_path / "over"))
    assert timeline(run, "long over", begin_s=1000.0) is None


def test_virtual_time_is_called_so_on_the_axis(tmp_path):
    assert timeline(load(write_run(tmp_path / "a")), "a").xlabel == "time (s)"
    assert timeline(load(write_run(tmp_path / "b", virtual=True)), "b").xlabel == "virtual time (s)"
