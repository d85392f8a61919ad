"""Pacing policies: who trains on and who synchronises. Pure decisions on the state table, with `now` as an argument.

A worker asks after local step `record.step`; with `ahead` = 1 its next step is already running. The answer is counted
from `record.step`: see `Decision`.
"""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Callable
from dataclasses import dataclass

from esync.algorithms import algorithm
from esync.config import RunConfig
from esync.emulation import cost_of
from esync.state.database import Latest, MedianOfThree, Record, Table

TRAIN = "train"
SYNC = "sync"
STOP = "stop"
PAPER_EPSILON_S = 0.5
"""Epsilon of the 2019 implementation."""
REMEMBERED = 1000
"""Workers that have left whose pace is remembered, at least."""
FEW_STEPS = 3
"""When no more steps than these fit, they are decided at once."""
MOST_MIN_STEPS = 64
"""`min_steps = auto` goes no further."""
MOST_STEPS = 1_000_000
"""More are never said to fit, however absurd the times that somebody reports."""
ROUNDING = 1e-6
"""Steps that fit but for this much do."""


@dataclass(frozen=True, slots=True)
class Decision:
    """`train`: run up to `lease` more steps, then have a new answer. `sync`: run exactly `lease` more steps,
    then synchronise. A step already running counts. Of each hidden layer's units the share `width` is trained."""

    action: str
    lease: int
    width: float = 1.0


class Policy:
    """Decides for one worker at a time.

    Attributes:
        measures_delivery: the table is to be told how long updates take to arrive.
    """

    measures_delivery = False

    def table(self) -> Table:
        """An empty table with the estimators that the policy wants."""
        return Table()

    def decide(self, table: Table, record: Record, ahead: int, now: float) -> Decision | None:
        """What `record`'s worker does next; None: it has to wait, and is decided again when somebody else arrives
        or leaves. A `sync` is remembered in the record."""
        raise NotImplementedError

    def hurry(self, table: Table, record: Record, now: float) -> list[Record]:
        """Now that `record`'s worker, which was the slowest or is, has arrived at the barrier: who else is to come
        at once, without asking."""
        return []

    def participants(self, table: Table, round: int) -> list[Record] | None:
        """Who takes part in the round that begins; None: everybody, those who join later too."""
        return None


class FixedSteps(Policy):
    """The same number of local steps for everybody: SSGD and ASGD (1), local SGD and FedAsync (more)."""

    def __init__(self, steps: int = 1) -> None:
        self.steps = steps

    def decide(self, table: Table, record: Record, ahead: int, now: float) -> Decision | None:
        record.ready = True
        return Decision(SYNC, max(ahead, self.steps - record.step))


class BoundedStaleness(FixedSteps):
    """Stale synchronous parallel (Ho et al. 2013): nobody begins a round who has finished more than `bound` rounds
    more than the slowest.

    A round here is what is called a clock there.
    """

    def __init__(self, bound: int, steps: int = 1) -> None:
        super().__init__(steps)
        self.bound = bound

    def decide(self, table: Table, record: Record, ahead: int, now: float) -> Decision | None:
        if record.step == 0 and record.clock - table.behind() > self.bound:
            return None
        return super().decide(table, record, ahead, now)


class DrawnSteps(FixedSteps):
    """Federated averaging (McMahan et al. 2017): a round draws a share of the workers, at least one.

    Args:
        share: of the workers.
        seed: of the draws, together with the round's number.
    """

    def __init__(self, steps: int, share: float = 1.0, seed: int = 0) -> None:
        super().__init__(steps)
        self.share, self.seed = share, seed

    def participants(self, table: Table, round: int) -> list[Record] | None:
        if self.share >= 1:
            return None
        return self._draw(table.active(), round)

    def _draw(self, workers: list[Record], round: int) -> list[Record]:
        workers = sorted(workers, key=lambda record: record.rank)
        count = math.ceil(self.share * len(workers) - 1e-9)  # 0.07 * 100 is a little more than 7
        return random.Random(f"{self.seed} {round}").sample(
            workers, max(min(1, len(workers)), count)
        )


class Tiers(DrawnSteps):
    """TiFL (Chai et al. 2020): a round's workers are drawn from one tier of about equal speed, so that the fast ones do
    not wait for the slow ones in most rounds.

    The first round, in which everybody does one step, measures the speeds; who joins later does so in the next round.
    The tiers are equally likely at first; every `PATIENCE` rounds, if the tier drawn last has made no progress
    since, their chances follow anew from their losses, the highest loss first (algorithm 2 there goes by
    accuracies on the tiers' own test data, which workers do not have here: the training loss that they report
    takes their place). And each tier has credits, so that none is drawn for ever: half as many again as its even
    share of the rounds (there, the user says how many).

    Args:
        tiers: how many.
        rounds: of the run, for the credits (0: unknown, no limit).
    """

    PATIENCE = 5

    def __init__(
        self, steps: int, tiers: int, share: float = 1.0, seed: int = 0, rounds: int = 0
    ) -> None:
        super().__init__(steps, share, seed)
        self.tiers = tiers
        self._credits = [math.ceil(1.5 * rounds / tiers) if rounds else math.inf] * tiers
        self._chances = [1.0] * tiers
        self._drawn = 0  # the tier
        self._losses: list[float] = []  # of the tiers, at the last look
        self._look_at = 0
        self._charged = -1

    def participants(self, table: Table, round: int) -> list[Record] | None:
        workers = [record for record in table.active() if record.step_s.value]
        unmeasured = [record for record in table.active() if not record.step_s.value]
        if not workers:
            return unmeasured  # to measure how fast they are
        tiers = self.tiers_of(workers)
        possible = [
            bool(tier) and credit > 0 for tier, credit in zip(tiers, self._credits, strict=True)
        ]
        if not any(possible):
            possible = [bool(tier) for tier in tiers]
        if not any(possible):
            return []
        if round >= self._look_at:
            self._look(tiers, possible)
            self._look_at = round + self.PATIENCE
        chances = [c if can else 0.0 for c, can in zip(self._chances, possible, strict=True)]
        if not any(chances):
            chances = [float(can) for can in possible]
        draw = random.Random(f"{self.seed} tier {round}")
        self._drawn = draw.choices(range(self.tiers), chances)[0]
        if round > self._charged:  # a round may be drawn again, if everybody in it has left
            self._charged = round
            self._credits[self._drawn] -= 1
        return self._draw(tiers[self._drawn], round) + unmeasured

    def decide(self, table: Table, record: Record, ahead: int, now: float) -> Decision | None:
        if not record.step_s.value:
            return Decision(SYNC, max(ahead, 1 - record.step))  # to know how long a step takes
        return super().decide(table, record, ahead, now)

    def tiers_of(self, workers: list[Record]) -> list[list[Record]]:
        """The workers by speed, the fastest first, in tiers of sizes that differ by one at most."""
        by_speed = sorted(workers, key=lambda record: (record.step_s.value, record.rank))
        cuts = [i * len(by_speed) // self.tiers for i in range(self.tiers + 1)]
        return [by_speed[a:b] for a, b in itertools.pairwise(cuts)]

    def _look(self, tiers: list[list[Record]], possible: list[bool]) -> None:
        """Change the chances unless the tier drawn last has made progress since the last look."""
        losses = [_mean_loss(tier) for tier in tiers]
        if self._losses and math.inf > losses[self._drawn] >= self._losses[self._drawn]:
            self._chances = self._chances_by_loss(losses, possible)
        self._losses = losses

    def _chances_by_loss(self, losses: list[float], possible: list[bool]) -> list[float]:
        """(n - i) / (n (n - 1) / 2) for the i-th by falling loss of the n tiers that have credits, i = 1..n, as in
        algorithm 2 there."""
        numbers = sorted(
            (number for number in range(self.tiers) if possible[number]),
            key=lambda number: (losses[number], number),
            reverse=True,
        )
        n, chances = len(numbers), [0.0] * self.tiers
        for place, number in enumerate(numbers, start=1):
            chances[number] = (n - place) / (n * (n - 1) / 2) if n > 1 else 1.0
        return chances


def _mean_loss(tier: list[Record]) -> float:
    """Of those who have reported one; infinite if nobody has."""
    known = [record.loss for record in tier if record.loss is not None]
    return sum(known) / len(known) if known else math.inf


class SubNetworks(FixedSteps):
    """Federated dropout (Caldas et al. 2018) with a width for each device (Wen et al. 2022): who is slower than the
    median trains a narrower network, so that it takes about as long.

    In its first round a worker does one step of the whole model, which measures. Later a step of a narrower one counts
    if it says that the worker is faster than it was taken for.

    Args:
        narrowest: the smallest width.
    """

    WIDTHS = (1.0, 0.75, 0.5, 0.375, 0.25, 0.1875, 0.125)

    def __init__(self, steps: int, narrowest: float) -> None:
        super().__init__(steps)
        self.narrowest = narrowest
        self._whole_s: dict[str, float] = {}
        self._decided: dict[str, int] = {}  # worker -> the last round whose width it was told

    def table(self) -> Table:
        return Table(Latest)  # a median would mix the widths

    def decide(self, table: Table, record: Record, ahead: int, now: float) -> Decision | None:
        record.ready = True
        if record.step == 0 and self._decided.get(record.worker) != record.round:
            self._measure(table, record.round)
            self._decided[record.worker] = record.round
            record.width = self._width(table, record)
        steps = self.steps if record.worker in self._whole_s else 1
        return Decision(SYNC, max(ahead, steps - record.step), record.width)

    def _measure(self, table: Table, round: int) -> None:
        """Note how long a step of the whole model takes everybody, by the last round; who has asked in this one
        already was looked at then."""
        for other in table.active():
            if self._decided.get(other.worker) != round and other.step_s.value:
                whole_s = other.step_s.value / cost_of(other.width)
                known_s = self._whole_s.get(other.worker, math.inf)
                if other.width == 1.0 or whole_s < known_s:
                    self._whole_s[other.worker] = whole_s
        if len(self._decided) > 2 * len(table.records) + REMEMBERED:  # ids can be made up
            for known in (self._whole_s, self._decided):
                for worker in known.keys() - table.records.keys():
                    del known[worker]

    def _width(self, table: Table, record: Record) -> float:
        known = sorted(self._whole_s[r.worker] for r in table.active() if r.worker in self._whole_s)
        mine = self._whole_s.get(record.worker)
        if mine is None or not known:
            return 1.0
        wanted = known[(len(known) - 1) // 2] / mine
        fitting = [width for width in self.WIDTHS if cost_of(width) <= wanted]
        return max(self.narrowest, fitting[0] if fitting else self.WIDTHS[-1])


class PaperEsync(Policy):
    """ESync exactly as published (Li et al. 2019, algorithm of the state server).

    Args:
        epsilon_s: the published margin against boundary error, in seconds.
    """

    def __init__(self, epsilon_s: float = PAPER_EPSILON_S) -> None:
        self.epsilon_s = epsilon_s

    def table(self) -> Table:
        return Table(Latest, unmeasured_s=0.0)

    def decide(self, table: Table, record: Record, ahead: int, now: float) -> Decision | None:
        slowest = table.slowest()
        if slowest is None or record.step == 0 or slowest.round < record.round:
            return Decision(TRAIN, 1)
        rest = slowest.step_s.value - (now - slowest.since)
        if record is slowest or slowest.ready or record.step_s.value + self.epsilon_s > rest:
            record.ready = True
            return Decision(SYNC, 0)
        return Decision(TRAIN, 1)


class AdaptiveEsync(Policy):
    """ESync with robust estimates, answers ahead of time, leases, and a measured margin.

    The slowest worker arrives at the barrier at `since + step_s + delivery_s`. Another worker may run as many
    steps as end, with its own delivery and the margin, before that. While many fit it gets half of them as a
    lease, so that it asks again a few times as the barrier comes nearer, and after each change of the others'
    pace; when few are left it is told the step after which to synchronise.

    Args:
        epsilon_s: the margin in seconds; None measures it: the mean deviations of both workers' steps.
        min_steps: local steps of the slowest worker in a round; None: as many as take the time that it spends on a
            synchronisation, so that at least half of a round is training.
    """

    measures_delivery = True

    def __init__(self, epsilon_s: float | None = None, min_steps: int | None = 1) -> None:
        self.epsilon_s = epsilon_s
        self.min_steps = min_steps

    def table(self) -> Table:
        return Table(MedianOfThree)

    def decide(self, table: Table, record: Record, ahead: int, now: float) -> Decision | None:
        slowest = table.slowest()
        # A round has at least one step, and a step that is running is finished.
        at_least = max(ahead, 1 - record.step)
        if slowest is None or not record.step_s.value:
            return Decision(TRAIN, max(1, at_least))  # one step, to know how long it takes
        if record is slowest:
            lease = max(at_least, self._steps_of(slowest) - record.step)
            if lease <= max(at_least, FEW_STEPS):
                return self._sync(record, lease)
            return Decision(TRAIN, lease // 2)
        if not slowest.step_s.value:
            return Decision(TRAIN, ahead + 1)
        fits = self._fitting_steps(slowest, record, now)
        if fits <= max(at_least, FEW_STEPS):
            return self._sync(record, max(at_least, fits))
        return Decision(TRAIN, fits // 2)

    def _steps_of(self, slowest: Record) -> int:
        """How many local steps a round takes the slowest worker."""
        if self.min_steps is not None:
            return self.min_steps
        steps = (
            slowest.sync_s.value / slowest.step_s.value
        )  # infinite, if somebody reports absurd times
        return max(1, round(min(MOST_MIN_STEPS, steps)))

    def _fitting_steps(self, slowest: Record, record: Record, now: float) -> int:
        """How many of `record`'s steps, begun now, end before the slowest worker's update arrives."""
        if slowest.round != record.round:
            done = now + self._steps_of(slowest) * slowest.step_s.value  # it has not pulled yet
        elif slowest.arrived:
            done = slowest.finished[1]
        else:
            goal = slowest.goal if slowest.ready else max(self._steps_of(slowest), slowest.step + 1)
            steps = max(0, goal - slowest.step)
            done = slowest.since + steps * slowest.step_s.value
        epsilon = self.epsilon_s
        if epsilon is None:
            epsilon = slowest.step_s.jitter + record.step_s.jitter
        left = done + slowest.delivery_s.value - record.delivery_s.value - epsilon - now
        fit = left / record.step_s.value + ROUNDING  # five that fit exactly are not 4.999...
        return math.floor(max(0.0, min(fit, MOST_STEPS)))

    def hurry(self, table: Table, record: Record, now: float) -> list[Record]:
        """Somebody came sooner than expected: whoever has no time for another step does not use up its lease."""
        slowest = table.slowest()
        if slowest is None or not slowest.step_s.value:
            return []
        late = [
            other
            for other in table.active()
            if other.round == record.round
            and other.step_s.value
            and not other.arrived
            and not (other.ready and other.goal <= other.step + 1)
            and (other is slowest or not self._fitting_steps(slowest, other, now))
        ]
        for other in late:
            other.ready, other.goal = True, other.step
        return late

    @staticmethod
    def _sync(record: Record, lease: int) -> Decision:
        record.ready = True
        record.goal = record.step + lease
        return Decision(SYNC, lease)


class AtMost(Policy):
    """Another policy with a bound on the local steps of a round."""

    def __init__(self, policy: Policy, steps: int) -> None:
        self.policy, self.steps = policy, steps
        self.measures_delivery = policy.measures_delivery

    def table(self) -> Table:
        return self.policy.table()

    def decide(self, table: Table, record: Record, ahead: int, now: float) -> Decision | None:
        decision = self.policy.decide(table, record, ahead, now)
        if decision is None:
            return None
        most = max(ahead, self.steps - record.step)
        if decision.lease < most or (decision.action == SYNC and decision.lease == most):
            return decision
        record.ready = True
        record.goal = record.step + most
        return Decision(SYNC, most, decision.width)

    def hurry(self, table: Table, record: Record, now: float) -> list[Record]:
        return self.policy.hurry(table, record, now)

    def participants(self, table: Table, round: int) -> list[Record] | None:
        return self.policy.participants(table, round)


def urgent(table: Table) -> list[str]:
    """For whom a round waits: whose step takes more than half as long as the slowest's. Nobody, if that is everybody or
    not known yet."""
    active, slowest = table.active(), table.slowest()
    if slowest is None or not slowest.step_s.value:
        return []
    slow = [r.worker for r in active if r.step_s.value > slowest.step_s.value / 2]
    return slow if len(slow) < len(active) else []


def policy_for(config: RunConfig) -> Policy:
    """The policy of a run."""
    policy = POLICIES[algorithm(config.mode).pacing](config)
    return AtMost(policy, config.max_steps) if config.max_steps else policy


def _esync(config: RunConfig) -> Policy:
    epsilon_s = None if config.epsilon_s < 0 else config.epsilon_s
    if config.policy == "paper":
        return PaperEsync(PAPER_EPSILON_S if epsilon_s is None else epsilon_s)
    return AdaptiveEsync(epsilon_s, config.min_steps or None)


POLICIES: dict[str, Callable[[RunConfig], Policy]] = {
    "esync": _esync,
    "fixed": lambda run: FixedSteps(run.steps_per_round),
    "ssp": lambda run: BoundedStaleness(run.max_staleness, run.steps_per_round),
    "fedavg": lambda run: DrawnSteps(run.steps_per_round, run.participation, run.seed),
    "tifl": lambda run: Tiers(
        run.steps_per_round, run.tiers, run.participation, run.seed, run.rounds
    ),
    "feddrop": lambda run: SubNetworks(run.steps_per_round, run.min_width),
}
"""Pacing -> maker of its policy."""
