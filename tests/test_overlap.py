"""Overlapped synchronisation: workers train on while their updates and models travel; real servers and threads.

Each worker's local step adds a constant to its parameters, so that whatever the timing, the sequence of global models
follows from how many steps each update was made of: `w[v+1] = w[v] + mean_i(constant_i * steps_i[v])`.
"""

from __future__ import annotations

import math
import threading
import time
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from esync import messages
from esync.config import RunConfig
from esync.messages import Leave, Update
from esync.ps.aggregation import Mean, Published
from esync.state.database import Record, Table
from esync.state.policy import SYNC, Decision, FixedSteps, Policy
from esync.worker.client import Worker
from esync.worker.pytree import Packer
from tests.cluster import Cluster

START = np.zeros(4, np.float32)
Hook = Callable[[Worker], None]


def constant(rank: int) -> np.float32:
    """What a local step of this worker adds: sums and means of few of them are exact."""
    return np.float32(2.0 ** -(rank + 1))


class Trainer:
    """A training loop whose steps add a constant, and what it saw.

    Attributes:
        during: called in the middle of each step.
        rounds: the worker's rows, one per round that it pushed or missed.
        models: version -> the model from which the worker's updates were computed.
    """

    def __init__(self, during: Hook = lambda worker: worker.pause(0.002)) -> None:
        self.during = during
        self.rounds: list[dict[str, Any]] = []
        self.models: dict[int, Any] = {}
        self.steps = 0
        self.rank = -1

    def __call__(self, worker: Worker) -> Any:
        self.rank = worker.rank
        worker.on_round(self.rounds.append)
        params = worker.start({"w": START})
        while not worker.stopped:
            self._look(worker)
            self.during(worker)
            params = worker.step({"w": params["w"] + constant(worker.rank)})
            self.steps += 1
        return params["w"]

    def _look(self, worker: Worker) -> None:
        if worker._base is not None and worker._basis is not None:
            base = np.concatenate(worker._base)[: START.size]
            if worker._basis.intact():  # a server that does not wait for us may have overwritten it
                self.models.setdefault(worker._base_round, base)


def expected_models(trainers: list[Trainer], versions: int) -> list[Any]:
    """The recurrence from the rows of all workers: versions 0 to `versions`, which the state server knows of, and
    those for which all of them have pushed since."""
    steps: dict[int, dict[int, int]] = defaultdict(dict)
    for trainer in trainers:
        for row in trainer.rounds:
            if not row["late"]:
                assert trainer.rank not in steps[row["round"]], "one update a round"
                steps[row["round"]][trainer.rank] = row["steps"]
    models = [START.astype(np.float64)]
    while len(models) <= versions or len(steps[len(models) - 1]) == len(trainers):
        made_of = steps[len(models) - 1]
        models.append(models[-1] + np.mean([float(constant(r)) * n for r, n in made_of.items()]))
    return models


def run(
    trainers: list[Trainer],
    *,
    policy: Policy | None = None,
    prepare: Callable[[Cluster], None] = lambda cluster: None,
    kind: str = "inproc",
    **config: Any,
) -> tuple[dict[str, Any], list[Any]]:
    """A run of these loops with overlap; checks what has to hold whatever happened. Returns the summary and the
    global models, by the recurrence."""
    config = {"workers": len(trainers), "overlap": True, **config}
    with Cluster(RunConfig(**config), kind) as cluster:
        if policy is not None:
            cluster.state.handlers.policy = policy
        prepare(cluster)
        threads = [
            cluster.train(f"w{rank}", trainer, rank=rank) for rank, trainer in enumerate(trainers)
        ]
        finals = [thread.result() for thread in threads]
        summary = cluster.finish()
        refused = cluster.refused()
    rounds = summary["rounds"]
    models = expected_models(trainers, rounds)
    for trainer in trainers:
        for version, model in trainer.models.items():
            np.testing.assert_allclose(model, models[version], rtol=1e-6)
    last = [models[rounds]]
    if not summary["ended"].endswith("rounds"):
        last = models[rounds - 1 :]  # another may come out while the run is being ended
    for final in finals:
        assert any(np.allclose(final, model, rtol=1e-6) for model in last)
    assert refused == {}
    return summary, models


def until(worker: Worker, condition: Callable[[], Any], what: str) -> None:
    """Wait inside a worker's step for what another thread brings about."""
    deadline = time.monotonic() + 20
    with worker._changed:
        while not condition():
            assert time.monotonic() < deadline, f"never: {what}"
            worker._changed.wait(0.05)


def version_of(worker: Worker) -> int:
    """The newest version that a worker has received."""
    model = worker._shared.model
    assert model is not None
    return model.version


def is_away(worker: Worker) -> bool:
    session = worker._shared.session
    assert session is not None
    return session.away


@pytest.mark.parametrize("kind", ["inproc", "tcp"])
def test_every_step_of_unequal_workers_counts_once_and_all_end_on_one_model(kind: str) -> None:
    trainers = [
        Trainer(lambda worker: worker.pause(0.003)),
        Trainer(lambda worker: worker.pause(0.005)),
        Trainer(lambda worker: worker.pause(0.04)),
    ]
    summary, models = run(trainers, rounds=12, kind=kind)
    assert len(models) >= 13
    by_name = {row["name"]: row["steps"] for row in summary["workers"]}
    for rank, trainer in enumerate(trainers):
        pushed = sum(row["steps"] for row in trainer.rounds)
        assert [row["round"] for row in trainer.rounds] == list(range(12))
        assert all(row["steps"] >= 1 for row in trainer.rounds)
        assert pushed <= by_name[f"w{rank}"], "the steps after the last push are in no update"
    assert by_name["w0"] > 3 * by_name["w2"]


def test_a_worker_trains_on_for_as_long_as_the_others_take() -> None:
    """Without overlap this hangs: the second worker's first step waits for eleven steps of the first."""
    enough = threading.Event()

    def first(worker: Worker) -> None:
        if trainers[0].steps == 10:
            assert is_away(worker)
            enough.set()
        worker.pause(0.002)

    trainers = [Trainer(first), Trainer(lambda worker: enough.wait(20) and None)]
    run(trainers, policy=FixedSteps(2), rounds=4)
    assert trainers[0].rounds[0]["steps"] == 2
    assert trainers[0].rounds[1]["steps"] >= 9, "the steps of the wait are in the next update"


def test_the_round_that_is_trained_begins_when_its_model_is_taken_up() -> None:
    """The link is in the new round in the middle of a step; the training loop is not."""
    seen = []

    def during(worker: Worker) -> None:
        session = worker._shared.session
        assert session is not None
        if session.away and not seen:
            before = worker.round
            until(worker, lambda: session.round > before, "a new round")
            seen.append((before, worker.round))

    trainers = [Trainer(during), Trainer()]
    run(trainers, rounds=4)
    ((before, in_the_step),) = seen
    assert in_the_step == before


class AtOnce(FixedSteps):
    """Synchronise after the steps that are finished; one that is running does not count."""

    def decide(self, table: Table, record: Record, ahead: int, now: float) -> Decision | None:
        record.ready = True
        return Decision(SYNC, max(0, self.steps - record.step))


@pytest.mark.parametrize("where", ["before", "after"])
def test_a_model_that_arrives_between_two_steps_is_taken_up_before_anything_is_pushed(
    monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    """And the answer for its round, which may be to synchronise at once, is there as well."""
    decide, caught = Worker._decide, []

    def slow_decide(worker: Worker, loss: Any) -> Any:
        session = worker._shared.session
        assert session is not None

        def answered() -> bool:
            new = not session.away and session._sync_at is not None
            return new or session.final is not None

        def arrives() -> None:
            if session.away and worker.name == "w0" and session.step > 1:
                caught.append(session.round)
                until(worker, answered, "an answer")

        if where == "before":
            arrives()
        action = decide(worker, loss)
        if where == "after":
            arrives()
        return action

    monkeypatch.setattr(Worker, "_decide", slow_decide)
    trainers = [Trainer(), Trainer(lambda worker: worker.pause(0.01))]
    run(trainers, policy=AtOnce(2), rounds=8)
    assert len(caught) > 2


def test_an_update_that_is_lost_on_the_way_is_pushed_again_while_training_goes_on() -> None:
    lost = []

    def prepare(cluster: Cluster) -> None:
        def lossy(frames: Any) -> None:
            message = messages.decode(frames[0])
            if (
                isinstance(message, Update)
                and (message.worker, message.round) == ("w0", 2)
                and not lost
            ):
                lost.append(message)
            else:
                handle(frames)

        _until(lambda: cluster.ps.thread is not None)
        assert cluster.ps.thread is not None
        handle = cluster.ps.thread.handle
        cluster.ps.thread.handle = lossy  # type: ignore[method-assign]

    trainers = [Trainer(), Trainer()]
    run(trainers, prepare=prepare, rounds=5)
    assert lost
    assert trainers[0].rounds[3]["steps"] > 50, "a second without the model is a second of training"


def test_a_model_that_is_lost_on_the_way_is_fetched_while_training_goes_on() -> None:
    lost = []

    def prepare(cluster: Cluster) -> None:
        def lossy(worker: str, event: Published) -> None:
            if event.version == 3 and worker not in lost:
                lost.append(worker)
            else:
                send(worker, event)

        _until(lambda: cluster.ps.thread is not None)
        assert cluster.ps.thread is not None
        send = cluster.ps.thread._send_chunk
        cluster.ps.thread._send_chunk = lossy  # type: ignore[method-assign]

    trainers = [Trainer(), Trainer()]
    run(trainers, prepare=prepare, rounds=5)
    assert lost
    assert all(trainer.rounds[3]["steps"] > 50 for trainer in trainers)


def leave_and_miss(worker: Worker, versions: int) -> None:
    """As if evicted: the others go on without this worker, which notices nothing until it is told."""
    missed, left_at = version_of(worker) + versions, -math.inf

    def gone_on() -> bool:
        nonlocal left_at
        if time.monotonic() - left_at > 2.0:  # once more: it may have been told, and have joined
            left_at = time.monotonic()
            worker._link.inbox.put(Leave(worker.name, "evicted"))
        return version_of(worker) >= missed

    until(worker, gone_on, f"version {missed}")


def until_it_takes_part_again(trainer: Trainer, clusters: list[Cluster]) -> None:
    """End the run when a worker has pushed three updates in a row after it missed a round."""
    rows = [row["late"] for row in trainer.rounds]
    if any(rows) and not any(rows[-3:]):
        clusters[0].state.stop("seen enough")


@pytest.mark.parametrize(("away", "versions"), [(False, 1), (False, 3), (True, 3)])
def test_a_worker_that_others_go_on_without_gives_up_its_round_and_takes_part_again(
    away: bool, versions: int
) -> None:
    """Also when several versions come out during one of its steps, and when its update was on the way."""
    missed: list[int] = []
    clusters: list[Cluster] = []

    def during(worker: Worker) -> None:
        if worker.round >= 3 and not missed and is_away(worker) == away:
            if away:  # its update counts if it is there before the others go on without it
                until(worker, lambda: arrived(worker) or not is_away(worker), "its update")
            if is_away(worker) == away:
                missed.append(worker.round)
                leave_and_miss(worker, versions)
        until_it_takes_part_again(trainers[0], clusters)
        worker.pause(0.002)

    def arrived(worker: Worker) -> bool:
        server = clusters[0].ps.thread
        assert server is not None
        assert isinstance(server.aggregation, Mean)
        return worker.name in server.aggregation._arrived[0]

    # Slow, so that there is time to be away in; then fast, since who was evicted is soon told and waited for again.
    other = Trainer(lambda worker: worker.pause(0.01 if away and not missed else 0.002))
    trainers = [Trainer(during), other]
    run(trainers, policy=FixedSteps(2), prepare=clusters.append, duration_s=60.0)
    rows = [row["late"] for row in trainers[0].rounds]
    assert rows.index(True) == missed[0] + away, "until then it was in every round"


def test_a_round_that_ends_while_its_update_is_packed_is_given_up(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pack, workers, missed = Packer.pack, [], []
    clusters: list[Cluster] = []

    def during(worker: Worker) -> None:
        workers.append(worker)
        until_it_takes_part_again(trainers[0], clusters)
        worker.pause(0.002)

    def slow_pack(packer: Packer, *trees: Any, out: Any = None) -> Any:
        if workers and workers[0]._packer is packer and workers[0].round == 3 and not missed:
            missed.append(3)
            leave_and_miss(workers[0], 1)
        return pack(packer, *trees, out=out) if len(trees) < 4 else pack(packer, *trees)

    monkeypatch.setattr(Packer, "pack", slow_pack)
    trainers = [Trainer(during), Trainer()]
    run(trainers, policy=FixedSteps(2), prepare=clusters.append, duration_s=60.0)
    assert [row["late"] for row in trainers[0].rounds].index(True) == 3


def test_a_worker_that_dies_while_away_is_missed_and_its_update_counts() -> None:
    """It has pushed the update of round 2; then it falls silent."""

    def dying(worker: Worker) -> Any:
        params = worker.start({"w": START})
        while worker.round < 2 or not is_away(worker):
            worker.pause(0.002)
            params = worker.step({"w": params["w"] + constant(1)})
        until(
            worker, lambda: worker._shared.update and worker._shared.update.rounds == (2,), "a push"
        )
        worker._link.inbox.put(None)
        worker._link.join()

    survivor = Trainer()
    with Cluster(RunConfig(overlap=True, workers=2, rounds=12, heartbeat_s=0.8)) as cluster:
        threads = [cluster.train("w0", survivor, rank=0), cluster.train("w1", dying, rank=1)]
        for thread in threads:
            thread.result()
        summary = cluster.finish()
    assert summary["rounds"] == 12
    gone = next(row for row in summary["workers"] if row["name"] == "w1")
    assert "evicted" in gone["left_why"]
    alone = {row["round"]: row["steps"] for row in survivor.rounds}
    for version in range(4, 11):  # the rounds after the eviction are the survivor's alone
        step = float(constant(0)) * alone[version]
        np.testing.assert_allclose(survivor.models[version + 1], survivor.models[version] + step)


@pytest.mark.parametrize("attempt", range(3))
def test_the_end_may_come_at_any_time_and_nobody_keeps_a_model_of_its_own(attempt: int) -> None:
    trainers = [Trainer(lambda worker: worker.pause(0.001 * (1 + attempt))), Trainer()]
    run(trainers, duration_s=0.3 + 0.01 * attempt)


def test_the_end_comes_in_the_middle_of_a_step_that_was_begun_while_away() -> None:
    pushed, ended = threading.Event(), []

    def first(worker: Worker) -> None:
        if len(trainers[0].rounds) == 4:
            assert is_away(worker)
            pushed.set()
            until(worker, lambda: worker._over(), "the end")
            ended.append(trainers[0].steps)

    def second(worker: Worker) -> None:
        if len(trainers[1].rounds) == 3:
            assert pushed.wait(20)

    trainers = [Trainer(first), Trainer(second)]
    summary, _ = run(trainers, rounds=4)
    assert ended
    totals = {row["name"]: row["steps"] for row in summary["workers"]}
    assert totals["w0"] == ended[0], "what was still running when the run ended does not count"


def test_no_round_has_more_steps_than_allowed_although_training_goes_on() -> None:
    trainers = [Trainer(lambda worker: worker.pause(0.002)), Trainer(lambda w: w.pause(0.05))]
    run(trainers, rounds=8, max_steps=5)
    steps = [row["steps"] for trainer in trainers for row in trainer.rounds]
    assert max(steps) == 5


def test_a_joiner_takes_part_in_overlapped_rounds() -> None:
    late = Trainer()
    with Cluster(RunConfig(overlap=True, workers=2, rounds=40)) as cluster:
        trainers = [Trainer(lambda worker: worker.pause(0.01)) for _ in range(2)]
        threads = [cluster.train(f"w{i}", x, rank=i) for i, x in enumerate(trainers)]
        _until(lambda: cluster.state.handlers.history.version >= 3)
        threads.append(cluster.train("w2", late, rank=2))
        finals = [thread.result() for thread in threads]
        summary = cluster.finish()
    models = expected_models([*trainers, late], summary["rounds"])
    assert min(late.models) >= 3
    assert len(late.rounds) > 5
    for final in finals:
        np.testing.assert_allclose(final, models[summary["rounds"]], rtol=1e-5)


# Taking up a model


def test_the_merge_is_the_new_model_and_the_progress_since_the_push() -> None:
    """BatchNorm's gamma, which is averaged as a value, is a parameter; its statistics are the new model's."""
    random = np.random.default_rng(3)

    def tree() -> tuple[Any, Any]:
        params = {
            "BatchNorm_0": {"scale": random.normal(size=2).astype(np.float32)},
            "Dense_0": {"kernel": random.normal(size=(2, 3)).astype(np.float32)},
        }
        return params, {"batch_stats": {"mean": random.normal(size=2).astype(np.float32)}}

    pushed, now, model = tree(), tree(), tree()
    packer = Packer(*pushed)
    params, stats, base = packer.merge([packer.pack(*model)], *now, packer.pack(*pushed))
    for layer, leaf in (("BatchNorm_0", "scale"), ("Dense_0", "kernel")):
        progress = now[0][layer][leaf] - pushed[0][layer][leaf]
        np.testing.assert_allclose(params[layer][leaf], model[0][layer][leaf] + progress, rtol=1e-6)
    np.testing.assert_array_equal(stats["batch_stats"]["mean"], model[1]["batch_stats"]["mean"])
    update_params, update_stats, _ = packer.unpack([packer.pack(params, stats, base)])
    progress = now[0]["Dense_0"]["kernel"] - pushed[0]["Dense_0"]["kernel"]
    np.testing.assert_allclose(update_params["Dense_0"]["kernel"], progress, atol=1e-6)
    scale, mean = params["BatchNorm_0"]["scale"], model[1]["batch_stats"]["mean"]
    np.testing.assert_allclose(update_params["BatchNorm_0"]["scale"], scale, rtol=1e-6)
    np.testing.assert_array_equal(update_stats["batch_stats"]["mean"], mean)


def test_statistics_are_the_new_model_s_after_it_was_taken_up_and_each_worker_s_own_count() -> None:
    """Each worker's own are its rank's; the new model's are their mean. The slow worker pushes at the end of each step,
    right after it took up a model."""
    seen: dict[int, set[float]] = {0: set(), 1: set()}

    def loop(worker: Worker) -> Any:
        own = np.float32(worker.rank + 1)
        params, stats = worker.start({"w": START}, {"mean": np.zeros(3, np.float32)})
        round = worker.round
        while not worker.stopped:
            worker.pause(0.002 + 0.01 * worker.rank)
            params, stats = worker.step({"w": params["w"] + own}, {"mean": stats["mean"] * 0 + own})
            if worker.round != round and not worker.stopped:
                round = worker.round
                seen[worker.rank] |= set(stats["mean"].tolist())
        return stats["mean"]

    with Cluster(RunConfig(overlap=True, workers=2, rounds=8)) as cluster:
        threads = [cluster.train(f"w{i}", loop, rank=i) for i in range(2)]
        finals = [thread.result() for thread in threads]
        cluster.finish()
    assert seen == {0: {1.5}, 1: {1.5}}
    np.testing.assert_allclose(finals, 1.5)


def _until(condition: Callable[[], Any], timeout_s: float = 20.0) -> None:
    """Wait for something that another thread brings about."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.005)
