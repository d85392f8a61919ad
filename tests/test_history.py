"""What a summary is made of."""

from __future__ import annotations

import json

import pytest

from esync.config import RunConfig
from esync.state import history
from esync.state.database import Table
from esync.state.history import THRESHOLDS, TOTALS, History, compute_ratio


def record(worker="a", rank=0, role="worker", **totals):
    made = Table().add(worker, rank, 0.0, role=role, device="cpu", host="old")
    made.totals = totals
    return made


def test_an_accuracy_counts_at_the_time_at_which_its_version_was_published():
    history = History()
    history.published(1, 2.0, 0, 0)
    history.published(2, 4.0, 0, 0)
    history.evaluated(2, 0.9, 0.3, t=9.0)
    history.evaluated(1, 0.7, None, t=8.0)
    history.evaluated(0, 0.1, 2.3, t=8.5)
    assert history.accuracy == [
        {"t": 0.0, "round": 0, "accuracy": 0.1, "loss": 2.3},
        {"t": 2.0, "round": 1, "accuracy": 0.7, "loss": None},
        {"t": 4.0, "round": 2, "accuracy": 0.9, "loss": 0.3},
    ]


def test_a_version_that_is_evaluated_again_is_there_once():
    history = History()
    for version in (1, 2, 3):
        history.evaluated(version, 0.1 * version, None, float(version))
    history.evaluated(2, 0.25, 0.7, 9.0)
    assert [(row["round"], row["accuracy"]) for row in history.accuracy] == [
        (1, 0.1),
        (2, 0.25),
        (3, pytest.approx(0.3)),
    ]


def test_a_version_that_nobody_announced_counts_when_it_was_evaluated():
    history = History()
    history.evaluated(7, 0.5, None, t=3.25)
    assert history.accuracy[0]["t"] == 3.25


def test_a_version_keeps_its_first_time_and_the_newest_is_never_taken_back():
    history = History()
    history.published(3, 1.0, 10, 20)
    history.published(3, 5.0, 11, 21)
    history.published(2, 6.0, 12, 22)
    assert history.version == 3
    assert history.version_s[3] == 1.0
    assert (history.bytes_up, history.bytes_down) == (12, 22)


def test_times_of_versions_do_not_grow_with_the_run(monkeypatch):
    monkeypatch.setattr(history, "VERSIONS", 10)
    seen = History()
    for version in range(1, 1000):
        seen.published(version, 2.0 * version, 0, 0)
        assert len(seen.version_s) <= 20
        assert {v: 2.0 * v for v in range(max(0, version - 9), version + 1)}.items() <= (
            seen.version_s.items()
        )


def test_the_time_to_an_accuracy_is_that_of_the_first_version_that_had_it():
    history = History()
    for version, accuracy in enumerate([0.1, 0.71, 0.69, 0.8, 0.9]):
        history.published(version, float(version), 0, 0)
        history.evaluated(version, accuracy, None, t=99.0)
    assert [history.time_to(x) for x in (0.05, 0.7, 0.8, 0.85, 0.95)] == [0.0, 1.0, 3.0, 4.0, None]


def test_a_worker_that_was_taken_for_gone_and_goes_on_counting_is_counted_once():
    history = History()
    for life, totals in (
        ("x", {"steps": 100}),
        ("x", {}),  # it went again before it had reported anything
        ("x", {"steps": 130}),
        ("y", {"steps": 5}),
        ("", {"steps": 3}),
        ("", {"steps": 2}),
    ):
        stay = record(**totals)
        stay.life = life
        history.joined(stay, 0.0)
    assert history.total("steps") == 130 + 5 + 3 + 2
    rows = history.summary(RunConfig(), 1.0, "")["workers"]
    assert [row["steps"] for row in rows] == [100, 0, 30, 5, 3, 2]


def test_the_computing_time_ratio_is_computing_by_computing_asking_and_synchronising():
    totals = {"compute_s": 3.0, "query_s": 1.0, "sync_s": 2.0, "eval_s": 100.0}
    assert compute_ratio(totals) == pytest.approx(0.5)
    assert compute_ratio({}) == 0.0


def test_a_summary_has_every_field_and_is_plain_json():
    history = History(split_digest="abc")
    history.joined(record("b", 1, samples=30, steps=3, compute_s=1.0, sync_s=1.0), 0.5)
    history.joined(record("a", 0, samples=70, steps=7, compute_s=2.0), 0.0)
    history.joined(record("judge", -1, role="evaluator", samples=5), 0.0)
    history.published(1, 2.0, 100, 200)
    history.evaluated(1, 0.82, 0.4, t=3.0)
    summary = history.summary(RunConfig(mode="sync", seed=5), 10.0, "1 rounds")
    assert json.loads(json.dumps(summary)) == summary
    assert summary["mode"] == "sync"
    assert summary["policy"] is None
    assert summary["model"] == "cnn"
    assert summary["dataset"] == "fashion-mnist"
    assert summary["split"] == "iid"
    assert summary["split_digest"] == "abc"
    assert summary["seed"] == 5
    assert summary["ended"] == "1 rounds"
    assert summary["rounds"] == 1
    assert summary["wall_s"] == 10.0
    assert summary["samples"] == 100
    assert summary["samples_per_s"] == pytest.approx(10.0)
    assert (summary["bytes_up"], summary["bytes_down"]) == (100, 200)
    assert summary["final_accuracy"] == 0.82
    assert summary["time_to"] == {"0.7": 2.0, "0.8": 2.0, "0.85": None, "0.9": None}
    assert [row["name"] for row in summary["workers"]] == ["a", "b"]
    row = summary["workers"][1]
    assert row.keys() >= {"rank", "device", "host", "compute_ratio", *TOTALS}
    assert (row["rank"], row["device"], row["steps"], row["samples"]) == (1, "cpu", 3, 30)
    assert row["compute_ratio"] == pytest.approx(0.5)
    assert (row["joined_s"], row["left_s"], row["left_why"]) == (0.5, None, "")


def test_a_summary_of_a_run_that_never_started_is_all_zero():
    summary = History().summary(RunConfig(), 0.0, "interrupted")
    assert summary["samples_per_s"] == 0.0
    assert summary["rounds"] == 0
    assert summary["workers"] == []
    assert summary["final_accuracy"] is None
    assert list(summary["time_to"]) == [f"{x:g}" for x in THRESHOLDS]


def test_a_worker_that_left_and_came_back_has_a_row_for_each_passage():
    history = History()
    first, second = record(steps=1, samples=8), record(steps=4, samples=32)
    history.joined(first, 0.0)
    history.left(first, 3.0, "evicted")
    history.joined(second, 5.0)
    summary = history.summary(RunConfig(), 10.0, "")
    assert [(x["steps"], x["left_s"], x["left_why"]) for x in summary["workers"]] == [
        (1, 3.0, "evicted"),
        (4, None, ""),
    ]
    assert summary["samples"] == 40
