"""Pacing: the published decision, its improvements, and whole rounds of both in virtual time."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from esync.config import RunConfig
from esync.state.database import Latest, MedianOfThree
from esync.state.policy import (
    FEW_STEPS,
    PAPER_EPSILON_S,
    SYNC,
    TRAIN,
    AdaptiveEsync,
    Decision,
    FixedSteps,
    PaperEsync,
    policy_for,
)
from tests.virtual import Cluster

CLOSE = 1e-6
seconds = st.floats(0.01, 5.0)
policies = st.sampled_from(["adaptive", "paper"])


def table_of(policy, rows, round=3, now=0.0):
    """A policy's table with active workers from (seconds a step, finished steps) rows, all in one round."""
    table = policy.table()
    for rank, (step_s, step) in enumerate(rows):
        record = table.add(f"w{rank}", rank, now)
        table.activate(record)
        table.progress(record, round, step, step_s, now)
    return table


# The published algorithm


def published(rank, c, k, te, ready, round, now, epsilon=0.5):
    """The state server's answer to device `rank` as PAPER puts it: lists indexed by device; True is synchronise."""
    s = max(range(len(c)), key=lambda i: c[i])
    if k[rank] == 0 or round[s] < round[rank]:
        return False
    rest = c[s] - (now - te[s])
    synchronise = rank == s or ready[s] or c[rank] + epsilon > rest
    ready[rank] |= synchronise
    return synchronise


@settings(max_examples=200)
@given(st.data())
def test_paper_esync_decides_as_published(data):
    p = data.draw(st.integers(1, 5))
    epsilon = data.draw(st.sampled_from([0.0, 0.5, 1.0]))
    policy = PaperEsync(epsilon)
    table = policy.table()
    records = [table.add(f"w{i}", i, 0.0) for i in range(p)]
    for record in records:
        table.activate(record)
    c, k, te, ready, round = [0.0] * p, [0] * p, [0.0] * p, [False] * p, [-1] * p
    now = 0.0
    for query in range(data.draw(st.integers(1, 25))):
        now += data.draw(st.floats(0.0, 2.0))
        i = data.draw(st.integers(0, p - 1))
        if round[i] < 0 or data.draw(st.booleans()):
            round[i], k[i], te[i], ready[i] = round[i] + 1, 0, now, False
            compute_s = 0.0
        else:
            compute_s = data.draw(seconds) + 1e-7 * query  # argmax of equals is anybody's choice
            c[i], k[i], te[i] = compute_s, k[i] + 1, now
        table.progress(records[i], round[i], k[i], compute_s, now)
        expected = published(i, c, k, te, ready, round, now, epsilon)
        decision = policy.decide(table, records[i], 0, now)
        assert decision == (Decision(SYNC, 0) if expected else Decision(TRAIN, 1))
        assert [record.ready for record in records] == ready


def test_the_paper_s_margin_is_half_a_second_unless_the_run_says_otherwise():
    assert policy_for(RunConfig(policy="paper")).epsilon_s == PAPER_EPSILON_S == 0.5
    assert policy_for(RunConfig(policy="paper", epsilon_s=0.0)).epsilon_s == 0.0
    assert policy_for(RunConfig(policy="adaptive", epsilon_s=0.25)).epsilon_s == 0.25
    assert policy_for(RunConfig(policy="adaptive")).epsilon_s is None


# Fixed steps


@given(st.integers(1, 60), st.integers(0, 60), st.integers(0, 1))
def test_fixed_steps_syncs_after_exactly_that_many_but_finishes_a_running_step(steps, done, ahead):
    policy = policy_for(RunConfig(mode="local", local_steps=steps))
    table = table_of(policy, [(1.0, done), (9.0, 0)])
    decision = policy.decide(table, table.records["w0"], ahead, 0.0)
    assert decision == Decision(SYNC, max(ahead, steps - done))
    assert policy.hurry(table, table.records["w1"], 0.0) == []


# The adaptive decision


@given(
    st.floats(0.01, 1.0),
    st.floats(1.0, 20.0),
    st.floats(0.0, 1.0),
    st.integers(0, 1),
    st.integers(1, 50),
    st.floats(0.0, 0.5),
)
def test_a_lease_is_at_most_half_of_what_fits(step_s, slowest_s, begun, ahead, step, epsilon):
    policy = AdaptiveEsync(epsilon)
    table = table_of(policy, [(step_s, step), (slowest_s, 0)])
    now = begun * slowest_s
    decision = policy.decide(table, table.records["w0"], ahead, now)
    left_s = slowest_s - now - epsilon
    if decision.action == TRAIN:
        assert decision.lease * step_s <= left_s / 2 + CLOSE
        assert decision.lease > max(ahead, 1)
    elif decision.lease > ahead:
        assert decision.lease <= FEW_STEPS
        assert decision.lease * step_s <= left_s + CLOSE
        assert (decision.lease + 1) * step_s > left_s - CLOSE
    else:
        assert (ahead + 1) * step_s > left_s - CLOSE


@given(st.floats(0.1, 1.0), st.integers(0, 1))
def test_the_slowest_worker_does_one_step_a_round(step_s, ahead):
    policy = AdaptiveEsync()
    table = table_of(policy, [(step_s, 0), (2.0, 0)])
    assert policy.decide(table, table.records["w1"], ahead, 0.1) == Decision(SYNC, 1)
    table.progress(table.records["w1"], 3, 1, 2.0, 2.0)
    assert policy.decide(table, table.records["w1"], ahead, 2.0) == Decision(SYNC, ahead)


def test_once_the_slowest_has_arrived_the_others_finish_only_their_running_step():
    policy = AdaptiveEsync()
    table = table_of(policy, [(0.01, 5), (2.0, 1)])
    table.records["w1"].arrived = True
    assert policy.decide(table, table.records["w0"], 1, 0.0) == Decision(SYNC, 1)
    assert policy.decide(table, table.records["w0"], 0, 0.0) == Decision(SYNC, 0)


def test_a_slowest_worker_that_has_not_pulled_yet_is_expected_a_whole_step_from_now():
    policy = AdaptiveEsync(0.0)
    table = table_of(policy, [(0.125, 1), (1.0, 1)])
    table.progress(table.records["w0"], 4, 1, 0.125, 50.0)
    assert policy.decide(table, table.records["w0"], 0, 50.0) == Decision(TRAIN, 4)


def test_while_anybody_is_unmeasured_the_others_train_on_step_by_step():
    policy = AdaptiveEsync()
    table = table_of(policy, [(0.01, 7), (0.0, 0)])
    for ahead in (0, 1):
        decision = policy.decide(table, table.records["w0"], ahead, 1000.0)
        assert decision == Decision(TRAIN, ahead + 1)
    assert not table.records["w0"].ready


def test_an_unmeasured_worker_trains_until_it_has_been_measured():
    policy = AdaptiveEsync()
    table = table_of(policy, [(1.0, 0), (0.0, 0)])
    assert policy.decide(table, table.records["w1"], 0, 0.0) == Decision(TRAIN, 1)
    table.progress(table.records["w1"], 3, 1, 5.0, 5.0)
    assert policy.decide(table, table.records["w1"], 0, 5.0) == Decision(SYNC, 0)


def test_a_slowest_worker_that_died_before_its_first_report_holds_up_nobody_once_it_is_removed():
    policy = AdaptiveEsync(0.0)
    table = table_of(policy, [(0.1, 5), (1.0, 0), (0.0, 0)], now=10.0)
    assert policy.decide(table, table.records["w0"], 0, 10.0) == Decision(TRAIN, 1)
    table.remove("w2")
    assert policy.decide(table, table.records["w1"], 1, 10.0) == Decision(SYNC, 1)
    assert policy.decide(table, table.records["w0"], 0, 10.95) == Decision(SYNC, 0)


def test_with_nobody_at_the_barrier_a_worker_trains_on():
    for policy in (AdaptiveEsync(), PaperEsync()):
        table = policy.table()
        record = table.add("early", 0, 0.0)
        assert policy.decide(table, record, 0, 0.0) == Decision(TRAIN, 1)


def test_a_slowest_worker_that_has_no_step_left_to_do_is_not_taken_to_begin_another():
    """Two equally slow workers in their first round: when one is measured and done, the other stops too."""
    policy = AdaptiveEsync(0.0)
    table = table_of(policy, [(1.0, 1), (1.001, 1)])
    other, slowest = table.records.values()
    assert policy.decide(table, slowest, 0, 1.0) == Decision(SYNC, 0)
    assert policy.decide(table, other, 1, 1.0) == Decision(SYNC, 1)


def test_the_slowest_arriving_early_hurries_those_who_were_not_told_to_sync_yet():
    policy = AdaptiveEsync()
    table = table_of(policy, [(0.01, 5), (0.02, 3), (2.0, 1), (0.03, 1)])
    told, hurried, slowest, elsewhere = table.records.values()
    told.ready = slowest.ready = slowest.arrived = True
    slowest.finished = (slowest.round, 1.0)
    table.progress(elsewhere, 2, 1, 0.03, 1.0)
    assert policy.hurry(table, slowest, 1.0) == [hurried]
    assert hurried.ready
    assert policy.hurry(table, slowest, 1.0) == []


def test_while_the_slowest_s_update_is_on_its_way_there_may_be_time_for_more_steps():
    policy = AdaptiveEsync(0.0)
    table = table_of(policy, [(0.01, 5), (2.0, 1)])
    fast, slowest = table.records.values()
    table.delivered(slowest, 0.5)
    slowest.ready = slowest.arrived = True
    slowest.finished = (slowest.round, 1.0)
    assert policy.hurry(table, slowest, 1.0) == []
    assert policy.decide(table, fast, 0, 1.0) == Decision(TRAIN, 25)
    assert policy.decide(table, fast, 0, 1.475) == Decision(SYNC, 2)


def test_a_bound_on_the_steps_does_not_keep_the_slowest_from_hurrying_others():
    policy = policy_for(RunConfig(max_steps=50))
    table = table_of(policy, [(0.01, 5), (2.0, 1)])
    table.records["w1"].ready = table.records["w1"].arrived = True
    table.records["w1"].finished = (table.records["w1"].round, 1.0)
    assert policy.hurry(table, table.records["w1"], 1.0) == [table.records["w0"]]
    assert policy.measures_delivery


def test_others_than_the_slowest_arriving_hurry_nobody():
    policy = AdaptiveEsync()
    table = table_of(policy, [(0.01, 5), (0.02, 3), (2.0, 0)])
    table.records["w0"].ready = table.records["w0"].arrived = True
    table.records["w2"].ready, table.records["w2"].goal = True, 1
    assert policy.hurry(table, table.records["w0"], 1.0) == []
    assert PaperEsync().hurry(table, table.records["w2"], 1.0) == []


def test_jitter_becomes_the_margin():
    def fits_after(steps):
        policy = AdaptiveEsync()
        table = policy.table()
        for rank, own in enumerate((steps, [8.0] * len(steps))):
            record = table.add(f"w{rank}", rank, 0.0)
            table.activate(record)
            for step, step_s in enumerate(own):
                table.progress(record, 0, step, step_s, 0.0)
        table.records["w1"].since = 0.0
        return policy.decide(table, table.records["w0"], 0, 0.0).lease

    assert fits_after([0.5, 0.5, 0.5, 0.5, 0.5]) == 8
    assert fits_after([0.5, 0.25, 0.75, 0.25, 0.5]) < 8


@pytest.mark.parametrize("slowest_s", [1e12, 1e300])
@pytest.mark.parametrize("own_s", [1e-9, 1e-300])
def test_absurd_step_times_never_fail_a_decision_and_its_lease_fits_a_message(slowest_s, own_s):
    policy = AdaptiveEsync()
    table = table_of(policy, [(own_s, 3), (slowest_s, 0)])
    decision = policy.decide(table, table.records["w0"], 1, 0.0)
    assert decision.action == TRAIN
    assert 0 < decision.lease < 2**53


# Estimates


def test_one_stall_does_not_make_a_fast_worker_the_straggler_but_does_as_published():
    def slowest_after_a_stall(policy):
        table = table_of(policy, [(0.03, 0), (1.0, 0)])
        for step, step_s in enumerate((0.03, 0.03, 9.0), start=1):
            table.progress(table.records["w0"], 3, step, step_s, step)
        return table.slowest().worker

    assert slowest_after_a_stall(AdaptiveEsync()) == "w1"
    assert slowest_after_a_stall(PaperEsync()) == "w0"


@given(seconds, seconds)
def test_a_lasting_change_counts_from_its_second_measurement_on(before, after):
    estimate = MedianOfThree()
    for _ in range(3):
        estimate.observe(before)
    assert estimate.value == before
    estimate.observe(after)
    assert estimate.value == before
    estimate.observe(after)
    assert estimate.value == after


@given(st.lists(seconds, min_size=1, max_size=20))
def test_estimates_stay_within_what_was_measured(measured):
    robust, last = MedianOfThree(), Latest()
    for step_s in measured:
        robust.observe(step_s)
        last.observe(step_s)
    assert robust.value == sorted(measured[-3:])[(len(measured[-3:]) - 1) // 2]
    assert 0 <= robust.jitter <= max(measured) / 2
    assert last.value == measured[-1]


def test_a_steady_pace_has_no_jitter_and_a_stall_counts_for_half_a_step_at_most():
    estimate = MedianOfThree()
    for _ in range(10):
        estimate.observe(2.0)
    assert estimate.jitter == 0.0
    estimate.observe(1000.0)
    assert estimate.jitter == pytest.approx(1.0 / 4)


# Whole rounds


def cluster(policy, paces, *, delay_s=0.0, deliveries=None, **options):
    run = RunConfig(mode="esync", policy=policy, workers=len(paces), **options)
    made = Cluster(run, delay_s)
    for i, pace in enumerate(paces):
        made.join(f"w{i}", pace, delivery_s=deliveries[i] if deliveries else 0.0)
    return made


paces = st.lists(st.floats(0.02, 3.0), min_size=1, max_size=6)


@settings(max_examples=60)
@given(paces, policies, st.sampled_from([0.0, 0.001, 0.02]))
def test_at_constant_pace_nobody_waits_a_step_of_its_own_plus_epsilon(steps_s, policy, delay_s):
    """The bound that holds: whoever waits could not have fitted in another step.

    Delays add the way of the slowest worker's answer and of its update; the answers themselves, where they block,
    lengthen each step.
    """
    epsilon = PAPER_EPSILON_S if policy == "paper" else 0.0
    rounds = cluster(policy, steps_s, delay_s=delay_s).run(8, 1e4)
    slowest = max(steps_s)
    for row in rounds[3:]:
        for i, step_s in enumerate(steps_s):
            assert row.waits[f"w{i}"] <= step_s + epsilon + 4 * delay_s + CLOSE
            if step_s == slowest:
                assert row.waits[f"w{i}"] <= min(steps_s) + 4 * delay_s + CLOSE
    for before, after in pairwise(rounds[3:]):
        assert after.at - before.at <= slowest + 6 * delay_s + CLOSE


@settings(max_examples=40)
@given(st.lists(st.tuples(st.floats(0.02, 3.0), st.floats(0.0, 2.0)), min_size=2, max_size=5))
def test_the_time_that_an_update_needs_is_part_of_a_worker_s_pace(workers):
    """Rounds last as long as the longest step and delivery; the others stop when the slowest has finished its step."""
    steps_s, deliveries = [c for c, _ in workers], [d for _, d in workers]
    slowest_delivery = max(workers, key=sum)[1]
    rounds = cluster("adaptive", steps_s, deliveries=deliveries).run(12, 1e4)
    longest = max(c + d for c, d in workers)
    for row in rounds[6:]:
        for i, step_s in enumerate(steps_s):
            assert row.waits[f"w{i}"] <= max(step_s, slowest_delivery) + CLOSE
    assert rounds[-1].at - rounds[-2].at == pytest.approx(longest)


def test_a_wait_may_be_longer_than_the_fastest_device_s_step():
    """The published bound, "nobody waits longer than the fastest device's step", does not hold literally.

    A device of 1.0 s fits one step into the 1.5 s of the slowest, and waits for 0.5 s: more than the 0.03 s of the
    fastest, less than a step of its own.
    """
    row = cluster("adaptive", [0.03, 1.0, 1.5]).run(6, 1e3)[-1]
    assert row.steps == {"w0": 50, "w1": 1, "w2": 1}
    assert row.waits["w1"] == pytest.approx(0.5)
    assert row.waits["w1"] > 0.03
    assert row.waits["w0"] == pytest.approx(0.0, abs=0.03)
    assert row.waits["w2"] == pytest.approx(0.0)


def test_as_published_the_margin_of_half_a_second_is_waited_for():
    row = cluster("paper", [0.03, 1.5]).run(6, 1e3)[-1]
    assert row.steps == {"w0": 33, "w1": 1}
    assert row.waits["w0"] == pytest.approx(1.5 - 33 * 0.03)


def test_two_equally_slow_workers_do_one_step_each():
    for policy in ("adaptive", "paper"):
        for row in cluster(policy, [1.0, 1.0]).run(8, 1e3)[3:]:
            assert row.steps == {"w0": 1, "w1": 1}


def test_a_fast_worker_asks_a_few_times_a_round_not_at_each_step():
    leased = cluster("adaptive", [0.01, 1.0]).run(8, 1e3)[-1]
    assert leased.steps["w0"] >= 99
    assert 5 <= leased.queries["w0"] <= 11
    published = cluster("paper", [0.01, 1.5]).run(8, 1e3)[-1]
    assert published.queries["w0"] >= 99


def test_a_fast_worker_s_queries_grow_with_the_logarithm_of_its_steps():
    queries = [
        cluster("adaptive", [1 / steps, 1.0]).run(6, 1e3)[-1].queries["w0"]
        for steps in (50, 400, 3200)
    ]
    assert queries[1] - queries[0] <= 4
    assert queries[2] - queries[1] <= 4


def test_after_a_stall_the_fast_worker_keeps_its_many_steps_but_not_as_published():
    def steps_around_a_stall(policy):
        stalled = []

        def fast(n):
            if n == 400:
                stalled.append(len(made.rounds))
                return 4.0
            return 0.01

        made = cluster(policy, [fast, 1.0], epsilon_s=0.0)
        rounds = made.run(10, 1e3)
        return [(row.slowest, row.steps["w0"]) for row in rounds[stalled[0] :]]

    for slowest, _ in (adaptive := steps_around_a_stall("adaptive")):
        assert slowest == "w1"
    assert all(steps >= 98 for _, steps in adaptive[1:])
    paper = steps_around_a_stall("paper")
    assert paper[0][0] == "w0"


def test_a_worker_that_turns_slow_in_mid_lease_is_fetched_by_the_slowest_s_arrival():
    turned = []

    def fast(n):
        if len(made.rounds) >= 5 and made.now > made.rounds[-1].at + 0.3:
            turned.append(n)
            return 1.0
        return 0.01

    made = cluster("adaptive", [fast, 1.0])
    rounds = made.run(8, 1e3)
    assert turned
    for before, after in pairwise(rounds[4:]):
        assert after.at - before.at <= 2.0 + CLOSE


@settings(max_examples=60)
@given(st.lists(st.lists(seconds, min_size=1, max_size=8), min_size=1, max_size=5), policies)
def test_every_round_ends_however_the_paces_change(patterns, policy):
    """Each worker's steps cycle through drawn durations: constant, jittered, or changing from round to round."""
    paces = [lambda n, own=own: own[n % len(own)] for own in patterns]
    rounds = cluster(policy, paces).run(10, 1e4)
    assert [row.version for row in rounds] == list(range(1, 11))
    for row in rounds:
        assert set(row.steps) == {f"w{i}" for i in range(len(paces))}
        assert all(steps >= 1 for steps in row.steps.values())


@settings(max_examples=60)
@given(st.lists(st.lists(seconds, min_size=12, max_size=12), min_size=2, max_size=5), policies)
def test_every_round_ends_when_paces_change_between_rounds(patterns, policy):
    paces = [lambda n, own=own: own[len(made.rounds) % len(own)] for own in patterns]
    made = cluster(policy, paces)
    rounds = made.run(12, 1e4)
    longest = max(max(own) for own in patterns)
    for before, after in pairwise(rounds[2:]):
        assert after.at - before.at <= (len(paces) + 2) * longest + CLOSE


comings = st.lists(
    st.tuples(st.floats(0.02, 3.0), st.floats(0.0, 40.0), st.floats(0.1, 40.0)), max_size=4
)


@settings(max_examples=80)
@given(paces, comings, st.data(), policies, st.sampled_from([0.0, 0.003]))
def test_every_round_ends_while_workers_come_go_and_return(steps_s, late, data, policy, delay_s):
    """The worker w0 lives through it; every other one may die at any moment, and may come back under its name."""
    made = cluster(policy, steps_s, delay_s=delay_s, heartbeat_s=2.0)
    for i in range(1, len(steps_s)):
        if data.draw(st.booleans()):
            death = data.draw(st.floats(0.05, 40.0))
            made.kill(f"w{i}", death)
            if data.draw(st.booleans()):
                made.join(f"w{i}", data.draw(seconds), at=death + data.draw(st.floats(0.01, 10.0)))
    for i, (step_s, joins, lives) in enumerate(late):
        made.join(f"late{i}", step_s, at=joins + 0.05)
        made.kill(f"late{i}", at=joins + 0.05 + lives)
    rounds = made.run(25, 1e4)
    assert [row.version for row in rounds] == list(range(1, 26))
    assert all("w0" in row.waits for row in rounds)


@settings(max_examples=30)
@given(paces, st.data())
def test_every_round_of_fixed_steps_ends_while_workers_come_and_go(steps_s, data):
    count = data.draw(st.integers(1, 4))
    made = Cluster(
        RunConfig(mode="sync", workers=len(steps_s), heartbeat_s=2.0), policy=FixedSteps(count)
    )
    for i, step_s in enumerate(steps_s):
        made.join(f"w{i}", step_s)
        if i and data.draw(st.booleans()):
            made.kill(f"w{i}", data.draw(st.floats(0.05, 20.0)))
    made.join("late", 1.0, at=data.draw(st.floats(0.1, 10.0)))
    for row in made.run(15, 1e4):
        assert set(row.steps.values()) == {count}


@settings(max_examples=30)
@given(paces, policies, st.integers(1, 20))
def test_nobody_does_more_steps_a_round_than_the_run_allows(steps_s, policy, most):
    steps = [
        steps
        for row in cluster(policy, steps_s, max_steps=most).run(8, 1e4)
        for steps in row.steps.values()
    ]
    assert min(steps) >= 1
    assert max(steps) <= most


def test_a_bound_on_the_steps_is_reached_where_more_would_fit():
    for policy in ("adaptive", "paper"):
        row = cluster(policy, [0.01, 1.0], max_steps=20, epsilon_s=0.0).run(6, 1e3)[-1]
        assert row.steps == {"w0": 20, "w1": 1}


def test_a_joiner_takes_part_and_the_round_waits_for_it():
    for policy in ("adaptive", "paper"):
        made = cluster(policy, [0.1, 1.0])
        made.join("late", 0.5, at=4.25)
        rounds = made.run(12, 1e3)
        with_it = [row.version for row in rounds if "late" in row.waits]
        assert with_it[-1] == 12
        assert with_it == list(range(with_it[0], 13))
        assert rounds[with_it[0] - 1].at < 4.25 + 3


def test_a_dead_worker_costs_its_round_the_heartbeat_time_and_no_other_round_anything():
    made = cluster("adaptive", [0.1, 1.0, 1.2], heartbeat_s=4.0)
    made.kill("w2", at=10.0)
    rounds = made.run(20, 1e3)
    lengths = {b.version: b.at - a.at for a, b in pairwise(rounds[2:])}
    assert sum(length > 1.2 + CLOSE for length in lengths.values()) == 1
    assert max(lengths.values()) <= 1.2 + 4.0 + 2 * 1.0 + CLOSE
    assert lengths[20] == pytest.approx(1.0)


def test_a_slowest_worker_that_dies_before_its_first_report_does_not_keep_the_first_round_open():
    for policy in ("adaptive", "paper"):
        made = cluster(policy, [0.1, 0.4, 50.0], heartbeat_s=2.0)
        made.kill("w2", at=1.0)
        rounds = made.run(5, 100.0)
        assert set(rounds[-1].waits) == {"w0", "w1"}
        assert rounds[0].at < 1.0 + 2.0 * 1.25 + 2 * 0.4 + CLOSE


def test_without_a_barrier_nobody_waits():
    made = Cluster(RunConfig(mode="async", workers=2))
    made.join("w0", 0.125)
    made.join("w1", 1.0)
    rounds = made.run(90, 1e3)
    assert all(wait == 0 for row in rounds for wait in row.waits.values())
    assert rounds[-1].at == pytest.approx(10.0)
    assert sum("w1" in row.waits for row in rounds) == 10


def test_the_driver_reports_a_cluster_that_hangs():
    class Never(FixedSteps):
        def decide(self, table, record, ahead, now):
            return Decision(TRAIN, ahead + 1)

    made = Cluster(RunConfig(mode="sync"), policy=Never())
    made.join("w0", 1.0)
    with pytest.raises(AssertionError, match="round 0 does not end"):
        made.run(1, 50.0)
