"""Pacing of the other algorithms: who is held back, who is drawn, and whose network is narrowed."""

from __future__ import annotations

import math
from collections import Counter
from itertools import pairwise

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from esync.config import RunConfig
from esync.state.database import Latest, MedianOfThree, Table
from esync.state.policy import (
    MOST_MIN_STEPS,
    SYNC,
    TRAIN,
    AdaptiveEsync,
    AtMost,
    BoundedStaleness,
    Decision,
    DrawnSteps,
    SubNetworks,
    Tiers,
    policy_for,
)
from tests.virtual import Cluster


def table_of(*rows, estimate=Latest):
    """Active workers w0, w1, ... in round 0, each with the seconds of a local step (0: not measured yet)."""
    table = Table(estimate)
    for rank, step_s in enumerate(rows):
        table.activate(table.add(f"w{rank}", rank, 0.0))
        if step_s:
            table.progress(table.records[f"w{rank}"], 0, 1, step_s, 0.0)
    return table


def names(records):
    return [record.worker for record in records]


def asks(policy, table, worker, step=0, ahead=0):
    """What a worker that asks at the beginning of a round (or later in it) is told."""
    record = table.records[worker]
    record.step = step
    return policy.decide(table, record, ahead, 0.0)


# Stale synchronous parallel


@given(st.integers(0, 5), st.lists(st.integers(0, 9), min_size=1, max_size=6), st.integers(1, 20))
def test_nobody_begins_a_round_more_than_the_bound_ahead_of_the_slowest(bound, clocks, steps):
    policy = BoundedStaleness(bound, steps)
    table = table_of(*clocks)
    for record, clock in zip(table.active(), clocks, strict=True):
        record.clock = clock
    for record in table.active():
        decision = asks(policy, table, record.worker)
        if record.clock - min(clocks) > bound:
            assert decision is None
        else:
            assert decision == Decision(SYNC, steps)


@pytest.mark.parametrize("bound", [0, 1, 3])
def test_the_fastest_gets_exactly_the_bound_ahead_and_then_waits(bound):
    policy, table = BoundedStaleness(bound), table_of(1.0, 1.0)
    begun = 0
    while asks(policy, table, "w0"):
        begun += 1
        table.records["w0"].clock += 1
    assert begun == bound + 1
    table.records["w1"].clock += 1
    assert asks(policy, table, "w0") == Decision(SYNC, 1)


def test_without_staleness_a_round_begins_when_everybody_has_finished_the_last():
    policy, table = BoundedStaleness(0), table_of(1.0, 1.0, 1.0)
    for worker in ("w2", "w0"):
        table.records[worker].clock += 1
        assert asks(policy, table, worker) is None
    table.records["w1"].clock += 1
    for worker in ("w0", "w1", "w2"):
        assert asks(policy, table, worker) == Decision(SYNC, 1)


def test_a_worker_in_the_middle_of_a_round_is_never_held():
    policy, table = BoundedStaleness(0, steps=5), table_of(1.0, 1.0)
    table.records["w0"].clock = 3
    assert asks(policy, table, "w0", step=2) == Decision(SYNC, 3)


def test_when_the_slowest_leaves_the_next_slowest_counts():
    policy, table = BoundedStaleness(1), table_of(1.0, 1.0, 1.0)
    for worker, clock in (("w0", 5), ("w1", 4), ("w2", 1)):
        table.records[worker].clock = clock
    assert asks(policy, table, "w0") is None
    table.remove("w2")
    assert asks(policy, table, "w0") == Decision(SYNC, 1)


def test_a_joiner_begins_at_the_clock_of_the_slowest():
    policy, table = BoundedStaleness(1), table_of(1.0, 1.0)
    table.records["w0"].clock, table.records["w1"].clock = 8, 7
    late = table.add("late", 2, 0.0)
    table.activate(late)
    assert late.clock == 7
    assert asks(policy, table, "late") == Decision(SYNC, 1)
    table.records["w0"].clock = 9
    assert asks(policy, table, "w0") is None, "the joiner is waited for like everybody"


def test_the_bound_and_the_steps_are_the_run_s():
    policy = policy_for(RunConfig(mode="ssp", max_staleness=7, local_steps=4))
    assert isinstance(policy, BoundedStaleness)
    assert (policy.bound, policy.steps) == (7, 4)
    assert policy_for(RunConfig(mode="ssp")).steps == 1


# Federated averaging


@given(st.integers(1, 100), st.integers(1, 100))
@example(7, 100)  # 0.07 * 100 is more than 7
@example(55, 100)
def test_a_round_draws_the_share_rounded_up(percent, workers):
    table = table_of(*[1.0] * workers)
    drawn = DrawnSteps(1, percent / 100, seed=1).participants(table, 3)
    if percent == 100:
        assert drawn is None, "everybody, and those who come later too"
    else:
        assert len(drawn) == -(-percent * workers // 100)
        assert len(set(names(drawn))) == len(drawn)
        assert set(names(drawn)) <= table.records.keys()


def test_a_share_of_nothing_draws_one():
    table = table_of(1.0, 1.0, 1.0)
    assert len(DrawnSteps(1, 0.0).participants(table, 0)) == 1
    assert DrawnSteps(1, 0.5).participants(table_of(), 0) == []


def test_the_draw_is_that_of_the_seed_and_the_round_whatever_the_order_of_joining():
    table, turned = table_of(*[1.0] * 20), Table()
    for rank in reversed(range(20)):
        turned.activate(turned.add(f"w{rank}", rank, 0.0))

    def draws(table, seed):
        policy = DrawnSteps(1, 0.25, seed)
        return [sorted(names(policy.participants(table, round))) for round in range(30)]

    assert draws(table, 7) == draws(turned, 7)
    assert draws(table, 7) != draws(table, 8)
    assert len({tuple(row) for row in draws(table, 7)}) > 20


def test_every_worker_is_drawn_about_equally_often():
    policy, table = DrawnSteps(1, 0.2, seed=3), table_of(*[1.0] * 10)
    count = Counter(
        name for round in range(1000) for name in names(policy.participants(table, round))
    )
    assert set(count) == table.records.keys()
    # 200 each; the standard deviation of a binomial count is 12.6.
    assert all(140 < times < 260 for times in count.values())


def test_only_those_who_are_here_are_drawn():
    policy, table = DrawnSteps(1, 0.5, seed=3), table_of(*[1.0] * 6)
    table.add("loading", 6, 0.0)
    for worker in ("w1", "w2"):
        table.remove(worker)
    drawn = {name for round in range(50) for name in names(policy.participants(table, round))}
    assert drawn == {"w0", "w3", "w4", "w5"}


def test_who_was_drawn_trains_the_fixed_number_of_steps():
    policy = policy_for(RunConfig(mode="fedavg", participation=0.5))
    table = table_of(1.0, 2.0)
    assert asks(policy, table, "w0") == Decision(SYNC, 20)
    assert policy.share == 0.5
    assert policy_for(RunConfig(mode="fedavg", local_steps=3)).steps == 3


# Tiers


def tier_of(policy, table, round):
    """The number of the tier that a round draws; it draws nobody of any other."""
    drawn = set(names(policy.participants(table, round)))
    (number,) = [
        i for i, tier in enumerate(policy.tiers_of(table.active())) if drawn & set(names(tier))
    ]
    assert drawn <= set(names(policy.tiers_of(table.active())[number]))
    return number


def report_losses(table, tiers, losses):
    for tier, loss in zip(tiers, losses, strict=True):
        for record in tier:
            record.loss = loss


def test_who_has_not_been_measured_takes_part_for_one_step():
    policy, table = Tiers(20, tiers=2), table_of(0.0, 0.0, 0.0)
    assert names(policy.participants(table, 0)) == ["w0", "w1", "w2"]
    table = table_of(0.1, 0.2, 0.0, 0.3, 0.4)
    drawn = policy.participants(table, 0)
    assert "w2" in names(drawn)
    assert len(drawn) == 3, "beside one tier of two"
    for worker in names(drawn):
        steps = 1 if worker == "w2" else 20
        assert asks(policy, table, worker) == Decision(SYNC, steps)
    table.progress(table.records["w2"], 0, 1, 0.4, 0.0)
    assert len(policy.participants(table, 1)) in (2, 3), "a tier"


def test_a_round_that_is_drawn_again_takes_no_second_credit():
    policy, table = Tiers(1, tiers=2, rounds=30), table_of(0.1, 0.2)
    for _ in range(4):
        policy.participants(table, 3)
    assert sum(policy._credits) == 2 * 23 - 1


def test_tiers_are_of_equal_size_and_the_fastest_first():
    table = table_of(0.9, 0.1, 0.5, 0.2, 0.4, 0.3, 0.6)
    tiers = Tiers(1, tiers=3).tiers_of(table.active())
    assert [names(tier) for tier in tiers] == [["w1", "w3"], ["w5", "w4"], ["w2", "w6", "w0"]]


@given(st.lists(st.floats(0.01, 9.0), max_size=12), st.integers(1, 6))
def test_tiers_part_the_workers_by_speed(speeds, count):
    table = table_of(*speeds)
    tiers = Tiers(1, tiers=count).tiers_of(table.active())
    assert len(tiers) == count
    everybody = [record for tier in tiers for record in tier]
    assert sorted(names(everybody)) == sorted(table.records)
    sizes = [len(tier) for tier in tiers]
    assert max(sizes) - min(sizes) <= 1
    for faster, slower in pairwise(everybody):
        assert faster.step_s.value <= slower.step_s.value


def test_a_round_draws_the_share_of_one_tier():
    policy, table = Tiers(1, tiers=2, share=0.5, seed=4), table_of(*[0.1] * 4, *[5.0] * 4)
    drawn = [set(names(policy.participants(table, round))) for round in range(20)]
    assert {len(workers) for workers in drawn} == {2}
    fast = {"w0", "w1", "w2", "w3"}
    assert {len(workers & fast) for workers in drawn} == {0, 2}, "never some of both"


def test_the_tiers_are_equally_likely_at_first():
    policy, table = Tiers(1, tiers=3, seed=1), table_of(0.1, 0.2, 0.3)
    policy.PATIENCE = 10**9
    count = Counter(tier_of(policy, table, round) for round in range(3000))
    # 1000 each; the standard deviation of a binomial count is 26.
    assert all(880 < count[tier] < 1120 for tier in range(3))


def test_they_stay_equally_likely_where_nobody_says_its_loss():
    policy, table = Tiers(1, tiers=2, seed=1), table_of(0.1, 0.2)
    count = Counter(tier_of(policy, table, round) for round in range(400))
    assert all(140 < count[tier] < 260 for tier in range(2))


def test_tiers_that_learn_badly_are_drawn_as_often_as_published():
    """Algorithm 2 there: the i-th of n tiers, the worst first, with probability (n - i) / (n (n - 1) / 2)."""
    policy, table = Tiers(1, tiers=4, seed=2), table_of(0.1, 0.2, 0.3, 0.4)
    tiers = policy.tiers_of(table.active())
    report_losses(table, tiers, [0.5, 2.0, 1.0, 0.1])
    policy.participants(table, 1)
    policy.PATIENCE = 10**9  # a look that finds no progress, and no further one
    count = Counter(tier_of(policy, table, round) for round in range(10, 6010))
    wanted = {1: 3 / 6, 2: 2 / 6, 0: 1 / 6}
    assert set(count) == set(wanted), "the tier of the smallest loss is not drawn at all"
    for tier, chance in wanted.items():
        deviation = math.sqrt(6000 * chance * (1 - chance))
        assert abs(count[tier] - 6000 * chance) < 5 * deviation


def test_the_chances_change_only_when_the_drawn_tier_has_made_no_progress():
    table = table_of(0.1, 0.2)

    def second_look(loss):
        policy = Tiers(1, tiers=2, seed=2)
        tiers = policy.tiers_of(table.active())
        report_losses(table, tiers, [1.0, 2.0])
        for round in range(1, 1 + policy.PATIENCE):
            last = tier_of(policy, table, round)
        tiers[last][0].loss = loss
        tiers[1 - last][0].loss = 3.0
        drawn = {tier_of(policy, table, round) for round in range(6, 6 + policy.PATIENCE - 1)}
        return drawn, 1 - last

    drawn, _ = second_look(0.5)
    assert drawn == {0, 1}, "still drawn by equal chances"
    drawn, worse = second_look(2.5)
    assert drawn == {worse}, "of two tiers the better one has the chance 0"


def test_no_tier_is_drawn_more_often_than_it_has_credits():
    rounds = 40
    policy, table = Tiers(1, tiers=2, seed=2, rounds=rounds), table_of(0.1, 0.2)
    report_losses(table, policy.tiers_of(table.active()), [0.1, 9.0])
    count = Counter(tier_of(policy, table, round) for round in range(1, rounds + 1))
    credits = math.ceil(1.5 * rounds / 2)
    assert count == {1: credits, 0: rounds - credits}


def test_a_tier_without_credits_does_not_count_as_one_of_n():
    policy, table = Tiers(1, tiers=4, seed=2, rounds=10_000), table_of(0.1, 0.2, 0.3, 0.4)
    tiers = policy.tiers_of(table.active())
    report_losses(table, tiers, [4.0, 3.0, 2.0, 1.0])
    policy._credits[1] = 0
    policy.participants(table, 1)
    policy.PATIENCE = 10**9
    count = Counter(tier_of(policy, table, round) for round in range(10, 3010))
    assert set(count) == {0, 2}
    assert abs(count[0] - 2000) < 150, "2/3 and 1/3, as of three tiers"


def test_a_run_without_a_number_of_rounds_has_no_limit_of_credits():
    policy, table = Tiers(1, tiers=2, seed=2), table_of(0.1, 0.2)
    report_losses(table, policy.tiers_of(table.active()), [0.1, 9.0])
    policy.participants(table, 1)
    assert Counter(tier_of(policy, table, round) for round in range(6, 400)) == {1: 394}


@given(
    st.lists(st.floats(0.0, 9.0), max_size=6),
    st.integers(1, 8),
    st.integers(0, 12),
    st.lists(st.one_of(st.none(), st.floats(0.0, 9.0)), min_size=6, max_size=6),
)
def test_every_round_of_tiers_draws_somebody_if_anybody_is_here(speeds, tiers, rounds, losses):
    """However few workers there are, and however many rounds more than were said."""
    policy, table = Tiers(1, tiers, share=0.3, rounds=rounds), table_of(*speeds)
    for record, loss in zip(table.active(), losses, strict=False):
        record.loss = loss
    for round in range(2 * rounds + 7):
        assert bool(policy.participants(table, round)) == bool(speeds)


def test_the_tiers_are_the_run_s():
    policy = policy_for(RunConfig(mode="tifl", tiers=5, participation=0.5, seed=9, rounds=20))
    assert isinstance(policy, Tiers)
    assert (policy.tiers, policy.share, policy.seed, policy.steps) == (5, 0.5, 9, 20)


# Sub-networks


def widths(policy, table, order=None):
    """What everybody is told who begins a round now, in this order; then all of them have trained it."""
    found = {}
    for worker in order or list(table.records):
        decision = asks(policy, table, worker)
        assert (decision.action, decision.lease) == (SYNC, policy.steps)
        found[worker] = decision.width
    return found


def test_the_first_round_trains_the_whole_model():
    policy, table = SubNetworks(20, 0.25), table_of(0.0, 0.0, 0.0)
    for record in table.active():
        assert policy.decide(table, record, 0, 0.0) == Decision(SYNC, 1, 1.0), "for one step"


def test_a_worker_that_has_become_faster_gets_its_width_back():
    policy, table = SubNetworks(20, 0.25), table_of(1.0, 1.0, 16.0)
    assert widths(policy, table) == {"w0": 1.0, "w1": 1.0, "w2": 0.25}
    for record in table.active():
        table.progress(record, 1, 0, record.width**2, 0.0)
    assert widths(policy, table) == {"w0": 1.0, "w1": 1.0, "w2": 1.0}


def test_a_narrow_network_that_is_slower_than_reckoned_makes_nobody_narrower():
    policy, table = SubNetworks(20, 0.1), table_of(1.0, 1.0, 4.0)
    assert widths(policy, table)["w2"] == 0.5
    table.progress(table.records["w2"], 1, 0, 3.0, 0.0)
    assert widths(policy, table)["w2"] == 0.5


def test_a_slow_worker_trains_what_takes_it_as_long_as_the_median():
    policy, table = SubNetworks(20, 0.1), table_of(1.0, 1.0, 4.0, 1.5, 0.1)
    told = widths(policy, table)
    assert told == {"w0": 1.0, "w1": 1.0, "w2": 0.5, "w3": 0.75, "w4": 1.0}


@pytest.mark.parametrize("order", [["w0", "w1", "w2"], ["w2", "w1", "w0"], ["w2", "w0", "w1"]])
def test_the_widths_do_not_depend_on_who_asks_first(order):
    policy, table = SubNetworks(20, 0.1), table_of(1.0, 1.0, 16.0)
    assert widths(policy, table, order) == {"w0": 1.0, "w1": 1.0, "w2": 0.25}


@given(st.lists(st.floats(0.01, 100.0), min_size=1, max_size=7), st.sampled_from([0.05, 0.25, 0.6]))
def test_no_network_is_narrower_than_allowed_or_slower_than_the_median_s(speeds, narrowest):
    policy, table = SubNetworks(1, narrowest), table_of(*speeds)
    median = sorted(speeds)[(len(speeds) - 1) // 2]
    for worker, width in widths(policy, table).items():
        seconds = table.records[worker].step_s.value
        assert narrowest <= width <= 1.0
        if seconds <= median:
            assert width == 1.0
        elif width > max(narrowest, SubNetworks.WIDTHS[-1]):
            assert seconds * width * width <= median * (1 + 1e-9)


def test_a_narrow_worker_that_got_no_faster_by_it_is_not_narrowed_further():
    """Only steps on the whole model say how long the whole model takes."""
    policy, table = SubNetworks(20, 0.05), table_of(1.0, 1.0, 4.0)
    for round in range(1, 6):
        assert widths(policy, table) == {"w0": 1.0, "w1": 1.0, "w2": 0.5}
        for worker, seconds in (("w0", 1.0), ("w1", 1.0), ("w2", 3.9)):
            table.progress(table.records[worker], round, 20, seconds, 0.0)


def test_a_question_that_is_repeated_gets_the_same_width():
    """And the steps on a narrow network are not taken for those on the whole one, to which it has come back."""
    policy = SubNetworks(20, 0.1)
    table = table_of(1.0, 4.0, estimate=MedianOfThree)
    assert widths(policy, table) == {"w0": 1.0, "w1": 0.5}
    for round in range(1, 4):
        table.progress(table.records["w0"], round, 20, 4.0, 0.0)  # slow now, too
        table.progress(table.records["w1"], round, 20, 1.0, 0.0)
    for _ in range(3):
        assert widths(policy, table, ["w1", "w0"]) == {"w0": 1.0, "w1": 1.0}


def test_a_joiner_begins_with_the_whole_model():
    policy, table = SubNetworks(20, 0.25), table_of(1.0, 1.0)
    widths(policy, table)
    table.activate(table.add("late", 2, 0.0))
    assert asks(policy, table, "late").width == 1.0
    table.progress(table.records["late"], 1, 20, 4.0, 0.0)
    assert asks(policy, table, "late").width == 0.5


def test_the_narrowest_is_the_run_s():
    policy = policy_for(RunConfig(mode="feddrop", min_width=0.4, local_steps=6))
    assert isinstance(policy, SubNetworks)
    assert (policy.narrowest, policy.steps) == (0.4, 6)


# More than one step of the slowest worker


def test_the_slowest_worker_trains_the_least_number_of_steps_and_no_more():
    policy = AdaptiveEsync(0.0, min_steps=3)
    table = table_of(0.1, 1.0)
    assert asks(policy, table, "w1") == Decision(SYNC, 3)
    assert asks(policy, table, "w1", step=1, ahead=1) == Decision(SYNC, 2)
    assert asks(policy, table, "w1", step=5, ahead=1) == Decision(SYNC, 1)


def test_many_steps_of_the_slowest_worker_are_leased_in_halves():
    policy, table = AdaptiveEsync(0.0, min_steps=20), table_of(0.1, 1.0)
    assert asks(policy, table, "w1", ahead=1) == Decision(TRAIN, 10)
    assert asks(policy, table, "w1", step=10, ahead=1) == Decision(TRAIN, 5)
    assert asks(policy, table, "w1", step=18, ahead=1) == Decision(SYNC, 2)


def test_the_others_fit_their_steps_before_the_last_step_of_the_slowest():
    table = table_of(0.125, 1.0)
    for record in table.active():
        record.round, record.step, record.since = 1, 0, 0.0
    for steps in (1, 2, 8):
        policy = AdaptiveEsync(0.0, min_steps=steps)
        assert asks(policy, table, "w0").lease == 8 * steps // 2
    table.records["w1"].ready, table.records["w1"].goal = True, 4  # it was told so before
    assert asks(AdaptiveEsync(0.0, min_steps=1), table, "w0").lease == 8 * 4 // 2


@pytest.mark.parametrize(
    ("sync_s", "steps"), [(0.0, 1), (0.4, 1), (2.0, 2), (7.4, 7), (1e9, MOST_MIN_STEPS)]
)
def test_by_itself_the_slowest_trains_as_long_as_a_synchronisation_takes(sync_s, steps):
    policy = policy_for(RunConfig(min_steps=0, epsilon_s=0.0))
    table = table_of(0.1, 1.0)
    slowest = table.records["w1"]
    if sync_s:
        slowest.sync_s.observe(sync_s)
    done = 0
    while (decision := asks(policy, table, "w1", step=done)).action == TRAIN:
        done += decision.lease
    assert done + decision.lease == steps


def test_how_many_is_the_run_s():
    assert policy_for(RunConfig()).min_steps == 1
    assert policy_for(RunConfig(min_steps=5)).min_steps == 5
    assert policy_for(RunConfig(min_steps=0)).min_steps is None


# A bound on the steps of a round


@pytest.mark.parametrize("mode", ["ssp", "fedavg", "tifl", "feddrop", "fedasync", "esync"])
def test_a_bound_on_the_steps_goes_with_every_policy(mode):
    options = {"min_steps": 50} if mode == "esync" else {"local_steps": 50}
    policy = policy_for(RunConfig(mode=mode, max_steps=7, **options))
    assert isinstance(policy, AtMost)
    table = table_of(1.0, 1.0)
    assert asks(policy, table, "w0") == Decision(SYNC, 7)
    assert asks(policy, table, "w0", step=5, ahead=1) == Decision(SYNC, 2)
    assert asks(policy, table, "w0", step=7, ahead=1) == Decision(SYNC, 1)
    assert table.records["w0"].ready
    assert table.records["w0"].goal == 8


def test_a_bound_on_the_steps_neither_frees_who_is_held_nor_widens_a_network():
    table = table_of(1.0, 1.0, 4.0)
    table.records["w0"].clock = 9
    assert asks(AtMost(BoundedStaleness(3, 20), 5), table, "w0") is None
    assert asks(AtMost(SubNetworks(20, 0.1), 5), table, "w2") == Decision(SYNC, 5, 0.5)


def test_a_bound_on_the_steps_leaves_the_draw_and_the_table_as_they_are():
    drawn = DrawnSteps(20, 0.5, seed=1)
    table = table_of(*[1.0] * 6)
    assert AtMost(drawn, 5).participants(table, 4) == drawn.participants(table, 4)
    assert AtMost(AdaptiveEsync(), 5).measures_delivery
    assert AtMost(drawn, 5).participants(table_of(), 4) == []
    assert AtMost(DrawnSteps(20), 5).participants(table, 4) is None


# Whole rounds, in virtual time

MODES = {
    "ssp": {"mode": "ssp", "max_staleness": 1},
    "ssp, in step": {"mode": "ssp", "max_staleness": 0},
    "fedavg": {"mode": "fedavg", "participation": 0.4, "local_steps": 2},
    "fedavg, one": {"mode": "fedavg", "participation": 0.0001, "local_steps": 1},
    "tifl": {"mode": "tifl", "tiers": 2, "participation": 0.5, "local_steps": 2},
    "feddrop": {"mode": "feddrop", "local_steps": 3},
    "overlap": {"mode": "esync", "overlap": True},
    "overlap, min_steps": {"mode": "esync", "overlap": True, "min_steps": 3},
    "overlap, auto": {"mode": "esync", "overlap": True, "min_steps": 0},
}


@settings(max_examples=40)
@given(st.data())
@pytest.mark.parametrize("name", list(MODES))
def test_every_round_ends_while_workers_come_go_and_return(name, data):
    """The worker w0 lives through it; any other may die at any moment, and may come back under its name."""
    seconds = st.floats(0.02, 3.0)
    count = data.draw(st.integers(1, 5))
    made = Cluster(
        RunConfig(workers=count, heartbeat_s=2.0, **MODES[name]),
        delay_s=data.draw(st.sampled_from([0.0, 0.003, 0.2])),
    )
    for i in range(count):
        made.join(f"w{i}", data.draw(seconds))
        if i and data.draw(st.booleans()):
            death = data.draw(st.floats(2.0, 40.0))  # when the run has begun
            made.kill(f"w{i}", death)
            if data.draw(st.booleans()):
                made.join(f"w{i}", data.draw(seconds), at=death + data.draw(st.floats(0.01, 10.0)))
    for i in range(data.draw(st.integers(0, 3))):
        joins = data.draw(st.floats(2.0, 40.0))
        made.join(f"late{i}", data.draw(seconds), at=joins)
        made.kill(f"late{i}", at=joins + data.draw(st.floats(0.1, 40.0)))
    rounds = made.run(25, 1e4)
    assert [row.version for row in rounds] == list(range(1, 26))


@settings(max_examples=30)
@given(st.lists(st.floats(0.02, 3.0), min_size=2, max_size=5), st.integers(0, 3), st.data())
def test_nobody_gets_further_ahead_than_the_bound_in_whole_runs(steps_s, bound, data):
    """Counted by the updates that the parameter server has applied: one of the slowest may be on its way."""
    made = Cluster(RunConfig(mode="ssp", max_staleness=bound, workers=len(steps_s)))
    for i, step_s in enumerate(steps_s):
        made.join(f"w{i}", step_s, delivery_s=data.draw(st.sampled_from([0.0, 0.5])))
    applied = Counter(dict.fromkeys((f"w{i}" for i in range(len(steps_s))), 0))
    for row in made.run(60, 1e4):
        applied.update(row.waits)
        assert max(applied.values()) - min(applied.values()) <= bound + 2


def test_a_round_waits_for_the_drawn_alone():
    made = Cluster(RunConfig(mode="fedavg", participation=0.5, local_steps=2, workers=4, seed=1))
    for i, step_s in enumerate((0.1, 0.1, 5.0, 5.0)):
        made.join(f"w{i}", step_s)
    rounds = made.run(30, 1e4)
    assert {len(row.waits) for row in rounds} == {2}
    assert {steps for row in rounds for steps in row.steps.values()} == {2}
    fast = [row for row in rounds if row.waits.keys() <= {"w0", "w1"}]
    assert fast, "a round of two fast ones takes no longer than they do"
    for row in fast:
        before = rounds[row.version - 2].at if row.version > 1 else 0.0
        assert row.at - before < 1.0


def test_rounds_of_the_fast_tier_are_fast():
    made = Cluster(RunConfig(mode="tifl", tiers=2, local_steps=2, workers=4))
    for i, step_s in enumerate((0.1, 0.1, 5.0, 5.0)):
        made.join(f"w{i}", step_s)
    rounds = made.run(30, 1e4)
    assert rounds[0].waits.keys() == {"w0", "w1", "w2", "w3"}
    assert {frozenset(row.waits) for row in rounds[1:]} == {
        frozenset({"w0", "w1"}),
        frozenset({"w2", "w3"}),
    }
    lengths = [after.at - before.at for before, after in pairwise(rounds)]
    for row, length in zip(rounds[1:], lengths, strict=True):
        assert (length < 1.0) == ("w0" in row.waits)
