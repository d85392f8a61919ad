"""Virtual devices: durations of their steps, and how they come and go."""

from __future__ import annotations

from itertools import pairwise
from statistics import fmean, pstdev

import pytest

from esync import config
from esync.config import WorkerConfig
from esync.emulation import StepTimes
from esync.errors import EsyncError
from esync.report.logs import LogReader
from esync.sim.cluster import virtual_cluster
from tests.virtual import Untrained, untrained

FAST, SLOW = {"name": "fast", "step_time_s": 0.1}, {"name": "slow", "step_time_s": 1.0}


def durations(count=20_000, seed=0, rank=0, t=0.0, **device):
    times = StepTimes(WorkerConfig(step_time_s=2.0, **device), seed, rank)
    return [times.next(t) for _ in range(count)]


def cluster_of(*workers, network=None, **run):
    return untrained({"workers": list(workers), "network": network or {}}, **run)


def members(rounds):
    return [set(row.waits) for row in rounds]


# Durations


def test_without_jitter_every_step_takes_the_same_time():
    assert set(durations(100)) == {2.0}


@pytest.mark.parametrize("jitter", [0.1, 0.5, 1.0])
def test_jitter_spreads_the_steps_and_leaves_their_mean(jitter):
    steps = durations(jitter=jitter)
    assert fmean(steps) == pytest.approx(2.0, rel=0.03)
    assert pstdev(steps) == pytest.approx(2.0 * jitter, rel=0.1)
    assert min(steps) > 0


def test_a_stall_comes_once_in_so_many_steps():
    steps = durations(stall_every=50, stall_s=7.0)
    assert set(steps) == {2.0, 9.0}
    assert steps.count(9.0) == pytest.approx(20_000 / 50, rel=0.2)


def test_durations_are_those_of_the_seed_and_the_rank():
    drawn = durations(10, jitter=0.3)
    assert durations(10, jitter=0.3) == drawn
    assert durations(10, jitter=0.3, seed=1) != drawn
    assert durations(10, jitter=0.3, rank=1) != drawn


def test_a_device_that_slows_down_takes_longer_from_that_second_on():
    slows = {"slow_at_s": 10.0, "slow_factor": 3.0}
    assert set(durations(10, t=9.99, **slows)) == {2.0}
    assert set(durations(10, t=10.0, **slows)) == {6.0}


def test_in_a_run_rounds_become_longer_when_the_slowest_device_slows_down():
    """Though the model needs 8 s to be there, second 60 is the run's, not the cluster's."""
    slowing = {**SLOW, "slow_at_s": 60.0, "slow_factor": 3.0}
    network = {"down_mbit": 20, "model_mb": 10}
    cluster, rounds = cluster_of(FAST, slowing, network=network, duration_s=200)
    cluster.run()
    started = cluster.state.started
    assert started == pytest.approx(8.0)
    before = [row.at - started for row in rounds if row.at - started < 60]
    after = [row.at - started for row in rounds if row.at - started > 63]
    assert [b - a for a, b in pairwise(before[1:])] == pytest.approx([9.0] * (len(before) - 2))
    assert [b - a for a, b in pairwise(after)] == pytest.approx([11.0] * (len(after) - 1))


# Coming and going


def test_whoever_joins_late_takes_part_from_then_on_and_the_rounds_go_on():
    cluster, rounds = cluster_of(FAST, SLOW, {**FAST, "name": "late", "join_s": 20.0}, rounds=50)
    summary = cluster.run()
    with_it = [row for row in rounds if "late" in row.waits]
    assert 20 < with_it[0].at < 23
    assert members(with_it) == [{"fast", "slow", "late"}] * len(with_it)
    assert with_it[-1].version == 50
    assert with_it[-1].steps["slow"] == 1
    assert with_it[-1].steps["late"] == with_it[-1].steps["fast"] >= 9
    assert summary["workers"][2]["joined_s"] == pytest.approx(20.0)


@pytest.mark.parametrize("overlap", [False, True])
def test_whoever_joins_while_a_version_comes_out_hangs_nobody(overlap):
    """Its first model, of 100 MB, is on the way to it for a second or two: in some of these cases an old one."""
    network = {"up_mbit": 1000, "down_mbit": 1000, "model_mb": 100}
    for tenth in range(0, 40, 4):
        late = {**FAST, "name": "late", "join_s": 8 + tenth / 10}
        run = {"rounds": 12, "overlap": overlap}
        cluster, rounds = cluster_of({**FAST, "count": 2}, late, network=network, **run)
        cluster.run()
        assert members(rounds[-3:]) == [{"fast-0", "fast-1", "late"}] * 3


def test_whoever_leaves_is_not_waited_for():
    cluster, rounds = cluster_of(FAST, {**SLOW, "leave_s": 30.5}, rounds=400)
    summary = cluster.run()
    assert [row.at for row in rounds if "slow" in row.waits][-1] <= 30.5
    lengths = [b.at - a.at for a, b in pairwise(rounds)]
    assert max(lengths) <= 1.01
    assert lengths[-1] == pytest.approx(0.1)
    assert summary["workers"][1]["left_why"] == "left"
    assert summary["workers"][1]["left_s"] == pytest.approx(30.5)


def test_joining_and_leaving_are_told_in_seconds_of_the_run():
    """It starts 8 s after the workers have joined: so long does the model need."""
    guest = {**FAST, "name": "guest", "join_s": 20.0, "leave_s": 60.0}
    network = {"down_mbit": 20, "model_mb": 10}
    cluster, _ = cluster_of(FAST, SLOW, guest, network=network, duration_s=100)
    row = cluster.run()["workers"][2]
    assert cluster.state.started == pytest.approx(8.0)
    assert row["joined_s"] == pytest.approx(20.0)
    assert row["left_s"] == pytest.approx(60.0)


def test_whoever_falls_silent_is_evicted_after_the_heartbeat_time():
    cluster, rounds = cluster_of(FAST, SLOW, rounds=100, heartbeat_s=4.0)
    cluster.after_start(20.5, lambda: cluster.kill("slow"))
    summary = cluster.run()
    assert summary["workers"][1]["left_why"] == "evicted: silent for 4 s"
    assert 22.5 < summary["workers"][1]["left_s"] < 24.6
    assert "slow" not in rounds[-1].waits
    lengths = [b.at - a.at for a, b in pairwise(rounds)]
    assert sum(length > 1.01 for length in lengths) == 1, "one round waits for it"
    assert lengths[-1] == pytest.approx(0.1)


def test_a_model_that_is_on_the_way_for_longer_than_the_heartbeat_time_evicts_nobody():
    """Two times 100 MB over 100 Mbit/s: 16 s."""
    network = {"down_mbit": 100, "model_mb": 100}
    cluster, _ = cluster_of({**FAST, "count": 2}, network=network, rounds=3, heartbeat_s=5.0)
    summary = cluster.run()
    assert [row["left_why"] for row in summary["workers"]] == ["done", "done"]


def test_a_run_that_nobody_is_left_to_end_says_so():
    cluster, _ = cluster_of({**FAST, "leave_s": 5.0}, rounds=100)
    with pytest.raises(EsyncError, match=r"nothing happens any more .* waiting for a worker: none"):
        cluster.run()


def test_a_run_that_lacks_workers_says_so():
    cluster, _ = cluster_of(FAST, workers=2, duration_s=10.0)
    with pytest.raises(EsyncError, match="waiting for 1 more worker"):
        cluster.run()


def test_a_run_of_some_duration_ends_even_if_everybody_has_left():
    cluster, _ = cluster_of({**FAST, "leave_s": 5.0}, duration_s=200)
    assert cluster.run()["wall_s"] == pytest.approx(200, abs=0.3)


# The end


@pytest.mark.parametrize("latency_s", [0.0005, 0.001, 0.0011, 0.0013, 0.0017])
def test_a_duration_is_kept_to_the_point(latency_s):
    """Sums of a start and a duration are rounded, and a look at the clock comes each 0.2 s only."""
    network = {"latency_s": latency_s}
    cluster, _ = cluster_of({"name": "w", "step_time_s": 0.05}, network=network, duration_s=1.0)
    assert cluster.run()["wall_s"] == 1.0


def test_the_log_knows_what_the_end_of_a_run_cut_off(tmp_path):
    """As a real one: `esync-report`'s timelines reach to the end."""
    file = {
        "run": {"mode": "fedavg", "local_steps": 5, "duration_s": 8.0},
        "workers": [{**FAST, "count": 2}, SLOW],
    }
    virtual_cluster(config.cluster(file), Untrained(), log=tmp_path / "events.jsonl").run()
    log = LogReader(tmp_path).read()
    rests = {name: rest for name, [rest] in log.unfinished.items()}
    assert rests.keys() == {"fast-0", "fast-1", "slow"}
    assert all(rest.t == pytest.approx(8.0, abs=0.01) for rest in rests.values())
    assert rests["slow"].compute_s == pytest.approx(3.0, abs=0.01)
    assert rests["fast-0"].sync_s == pytest.approx(2.5, abs=0.01)
