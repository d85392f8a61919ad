"""Rounds of the virtual cluster in which nothing is learnt: the published figures, overlap, and longer rounds."""

from __future__ import annotations

import json
import random
from itertools import pairwise
from pathlib import Path

import pytest

from esync import config
from esync.sim.cluster import virtual_cluster
from tests.virtual import Untrained, untrained

CLUSTERS = Path(__file__).parent.parent / "clusters"
GPUS, CPUS = [f"gpu-{i}" for i in range(4)], ["cpu-0", "cpu-1"]


def paper(**run):
    """The published cluster: its summary, and its rounds once everybody is measured."""
    cluster, rounds = untrained(config.read(CLUSTERS / "paper-2019.toml"), **run)
    summary = cluster.run()
    return {row["name"]: row["compute_ratio"] for row in summary["workers"]}, rounds[5:-1], summary


def lengths(rounds):
    return [after.at - before.at for before, after in pairwise(rounds)]


def cluster_of(*workers, network=None, **run):
    return untrained({"workers": list(workers), "network": network or {}}, **run)


def test_esync_as_published_has_the_published_rounds():
    """4.6 s of synchronisation after 3.5 s of training, 42 steps on a GPU, and everybody computes for 37 to 43 %."""
    ratios, rounds, summary = paper(preset="paper", duration_s=1800)
    assert lengths(rounds) == pytest.approx([8.2] * len(lengths(rounds)), abs=0.1)
    for row in rounds:
        assert {row.steps[name] for name in GPUS} == {42}
        assert {row.steps[name] for name in CPUS} == {1}
    assert all(0.37 <= round(ratio, 2) <= 0.43 for ratio in ratios.values())
    assert summary["samples_per_s"] == pytest.approx(1560, rel=0.17)


def test_synchronous_sgd_has_the_published_rounds():
    ratios, rounds, summary = paper(mode="sync", duration_s=600)
    assert lengths(rounds) == pytest.approx([8.2] * len(lengths(rounds)), abs=0.1)
    assert summary["samples_per_s"] == pytest.approx(47, rel=0.05)
    assert [ratios[name] for name in GPUS] == pytest.approx([0.0087] * 4, abs=0.005)
    assert [ratios[name] for name in CPUS] == pytest.approx([0.43] * 2, abs=0.03)


def test_asynchronous_sgd_trains_twice_as_much_as_synchronous_sgd():
    """Not the published 120 samples/s: see docs/virtual-cluster.md."""
    ratios, _, summary = paper(mode="async", duration_s=600)
    assert 75 <= summary["samples_per_s"] <= 125
    assert all(ratios[name] < 0.03 for name in GPUS)
    assert all(0.4 < ratios[name] < 0.65 for name in CPUS)


def test_whoever_overlaps_computes_while_it_synchronises():
    ratios, rounds, _ = paper(overlap=True, duration_s=600)
    assert all(ratio >= 0.95 for ratio in ratios.values())
    waiting, _, _ = paper(duration_s=600)
    assert all(ratio < 0.5 for ratio in waiting.values())
    for row in rounds:
        assert min(row.steps[name] for name in GPUS) >= 42


@pytest.mark.parametrize("overlap", [False, True])
def test_a_round_has_as_many_steps_of_the_slowest_as_were_asked_for(overlap):
    fast, slow = {"name": "fast", "step_time_s": 0.1}, {"name": "slow", "step_time_s": 1.0}
    cluster, rounds = cluster_of(fast, slow, min_steps=5, overlap=overlap, rounds=30)
    cluster.run()
    for row in rounds[10:]:
        assert row.steps["slow"] == 5
        assert 45 <= row.steps["fast"] <= 52
    assert lengths(rounds[10:]) == pytest.approx([5.0] * 19, abs=0.2)


def test_of_equal_workers_nobody_does_more_steps_than_were_asked_for():
    equal = {"name": "w", "count": 3, "step_time_s": 1.0}
    cluster, rounds = cluster_of(equal, min_steps=4, rounds=12)
    cluster.run()
    for row in rounds[5:]:
        assert set(row.steps.values()) == {4}


def test_by_itself_a_round_has_as_many_steps_as_a_synchronisation_takes_time():
    """10 MB up and down over 10 Mbit/s: 8 s each, 16 steps of the slow worker."""
    network = {"up_mbit": 20, "down_mbit": 20, "model_mb": 10}
    fast, slow = {"name": "fast", "step_time_s": 0.1}, {"name": "slow", "step_time_s": 1.0}
    cluster, rounds = cluster_of(fast, slow, network=network, min_steps=0, rounds=30)
    summary = cluster.run()
    assert 14 <= rounds[-1].steps["slow"] <= 18
    slowest = summary["workers"][1]
    assert slowest["compute_ratio"] == pytest.approx(0.5, abs=0.05)
    cluster, rounds = cluster_of(fast, slow, network=network, rounds=30)
    assert cluster.run()["workers"][1]["compute_ratio"] < 0.12


def test_who_waits_for_an_answer_as_published_waits_for_the_latency_twice_a_step():
    """0.1 s there and back after each step; and the next model is 0.2 s away in any case."""
    equal = {"name": "w", "count": 2, "step_time_s": 1.0, "latency_s": 0.1}
    cluster, rounds = cluster_of(equal, preset="paper", rounds=6)
    cluster.run()
    published = lengths(rounds[2:])
    cluster, rounds = cluster_of(equal, rounds=6)
    cluster.run()
    assert published == pytest.approx([1.0 + 0.2 + 0.2] * 3)
    assert lengths(rounds[2:]) == pytest.approx([1.0 + 0.2] * 3)


def test_a_slow_device_s_sub_network_of_half_the_width_takes_a_quarter_of_the_time():
    """One step of 4 s in the first round, which measures; then two of 1 s, at width 0.5."""
    fast, slow = (
        {"name": "fast", "count": 2, "step_time_s": 1.0},
        {"name": "slow", "step_time_s": 4.0},
    )
    cluster, rounds = cluster_of(fast, slow, mode="feddrop", local_steps=2, rounds=4)
    cluster.run()
    assert [row.at for row in rounds] == pytest.approx([4.0, 6.0, 8.0, 10.0])


@pytest.mark.parametrize("mode", ["async", "esync"])
def test_after_the_last_round_there_is_no_other_while_the_end_is_on_its_way(mode):
    cluster, _ = cluster_of(
        {"name": "w", "count": 3, "step_time_s": 0.1},
        network={"latency_s": 0.5},
        mode=mode,
        rounds=10,
    )
    assert cluster.run()["rounds"] == cluster.server.version == 10


@pytest.mark.parametrize("options", [{}, {"policy": "paper"}, {"overlap": True}])
def test_a_slower_worker_that_joins_makes_nobody_late(options, tmp_path):
    """Rounds of 1.3 s become rounds of 20 s: the others train on, and arrive with it."""
    file = {
        "run": {"workers": 4, "duration_s": 200, **options},
        "network": {"latency_s": 0.01},
        "workers": [
            *({"name": f"w{s}", "step_time_s": s, "jitter": 0.1} for s in (0.2, 0.5, 1.2, 1.3)),
            {"name": "slow", "step_time_s": 20.0, "jitter": 0.3, "join_s": 40},
        ],
    }
    log = tmp_path / "events.jsonl"
    cluster = virtual_cluster(config.cluster(file, {}), Untrained(), log=log)
    cluster.run()
    rows = [json.loads(line) for line in log.read_text().splitlines()]
    assert not [row for row in rows if row["event"] == "late"]
    members = [set(row["members"]) for row in rows if row.get("members") and row["t"] > 80]
    assert members
    assert all(len(names) == 5 for names in members)


@pytest.mark.parametrize("fast_s", [0.05, 0.1, 0.125, 0.2, 0.25])
def test_steps_that_fit_exactly_fit(fast_s):
    cluster, rounds = cluster_of(
        {"name": "fast", "step_time_s": fast_s}, {"name": "slow", "step_time_s": 1.0}, rounds=30
    )
    cluster.run()
    assert {row.steps["fast"] for row in rounds[3:]} == {round(1.0 / fast_s)}


def test_a_worker_on_a_slow_link_that_joins_makes_nobody_late(tmp_path):
    """It has done its step long before its update is there, and until then the others train on."""
    file = {
        "run": {"workers": 2, "duration_s": 250},
        "network": {"model_mb": 30.0},
        "workers": [
            {"name": "fast", "step_time_s": 0.22, "jitter": 0.2},
            {"name": "slow", "step_time_s": 2.7},
            {"name": "far", "step_time_s": 0.7, "bandwidth_mbit": 20.0, "join_s": 68},
        ],
    }
    log = tmp_path / "events.jsonl"
    virtual_cluster(config.cluster(file, {}), Untrained(), log=log).run()
    rows = [json.loads(line) for line in log.read_text().splitlines()]
    assert not [row for row in rows if row["event"] == "late"]
    assert any(len(row.get("members", ())) == 3 for row in rows)


@pytest.mark.parametrize("staleness", [0, 3])
def test_in_ssp_nobody_is_late_for_a_slow_link(staleness):
    """A model of 50 MB takes 10 s each way; a worker's round is that, and not its step."""
    cluster, _ = cluster_of(
        {"name": "near", "step_time_s": 1.0},
        {"name": "far", "step_time_s": 1.0, "bandwidth_mbit": 40.0},
        network={"model_mb": 50.0},
        mode="ssp",
        max_staleness=staleness,
        duration_s=600,
    )
    steps = {row["name"]: row["steps"] for row in cluster.run()["workers"]}
    assert 20 < steps["far"] <= steps["near"] <= steps["far"] + staleness + 2


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize(
    "options",
    [
        {"mode": "esync"},
        {"mode": "esync", "overlap": True},
        {"preset": "skewed"},
        {"mode": "sync"},
        {"mode": "fedavg", "local_steps": 5, "participation": 0.5},
        {"mode": "ssp", "max_staleness": 0},
    ],
    ids=lambda options: "-".join(str(value) for value in options.values()),
)
def test_no_healthy_worker_is_late_in_clusters_drawn_at_random(options, seed):
    """Unequal steps, links and latencies, and workers that join in the middle."""
    draw = random.Random(seed)
    workers = [
        {
            "name": name,
            "step_time_s": round(10 ** draw.uniform(-1, 0.8), 3),
            "jitter": draw.choice([0, 0.1, 0.2]),
            "bandwidth_mbit": draw.choice([0.0, 0.0, 20.0, 100.0]),
            "join_s": draw.choice([0.0, 0.0, 0.0, 30.0, 100.0]) if name != "a" else 0.0,
        }
        for name in "abcd"
    ]
    network = {"model_mb": draw.choice([0.0, 10.0, 30.0]), "latency_s": draw.choice([0, 0.1])}
    said = []
    cluster, _ = cluster_of(*workers, network=network, duration_s=400, **options)
    cluster.state._say = said.append
    cluster.run()
    assert not [text for text in said if "has not arrived" in text]
