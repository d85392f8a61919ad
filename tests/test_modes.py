"""Every mode, and every option that changes the arithmetic, in both worlds: real threads and sockets, and virtual time.

Short runs on the digits: they end as they should, and the model has learnt something by then.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
import pytest
from jax.experimental.compilation_cache import compilation_cache

from esync import algorithms, config, data
from esync.algorithms import ALGORITHMS, PRESETS, Algorithm
from esync.config import ClusterConfig, RunConfig, WorkerConfig
from esync.journal import Journal
from esync.ps import aggregation
from esync.ps.aggregation import AGGREGATIONS, Completed, Contribution, Event, Published
from esync.sim.cli import simulate
from esync.state import policy
from esync.state.database import Record, Table
from esync.state.policy import SYNC, Decision, Policy
from esync.worker import link, loop, step
from esync.worker.client import Worker
from esync.worker.pytree import Packer
from tests.cluster import Cluster

STEP_TIMES_S = (0.004, 0.004, 0.016)
"""Of the workers; a mode that has the slow one train half a network, or lets it wait, has a reason to."""
BASE: dict[str, Any] = {
    "model": "mlp",
    "dataset": "digits",
    "batch_size": 16,
    "lr": 0.1,
    "rounds": 10,
    "evaluate_every_s": 0.0,
}
RUNS: dict[str, dict[str, Any]] = {
    **{mode: {"mode": mode} for mode in ALGORITHMS},
    "esync as published": {"mode": "esync", "policy": "paper", "epsilon_s": 0.002},
    "esync, overlap": {"mode": "esync", "overlap": True},
    "esync, overlap, at most 3 steps": {"mode": "esync", "overlap": True, "max_steps": 3},
    "esync, min_steps auto": {"mode": "esync", "min_steps": 0},
    "esync, min_steps 3": {"mode": "esync", "min_steps": 3},
    "esync, fednova": {"mode": "esync", "weights": "fednova"},
    "esync, by samples": {"mode": "esync", "weights": "samples"},
    "esync, average of versions": {"mode": "esync", "ema": 0.8},
    "esync, proximal": {"mode": "esync", "proximal": 0.1},
    "sync, outer momentum": {"mode": "sync", "outer": "momentum", "global_lr": 0.3},
    "sync, outer nesterov": {"mode": "sync", "outer": "nesterov", "global_lr": 0.3},
    "sync, outer adam": {"mode": "sync", "outer": "adam", "global_lr": 0.01},
    "async, dcasgd": {"mode": "async", "dcasgd": True},
    "ssp, in step": {"mode": "ssp", "max_staleness": 0},
    "fedavg, drawn": {"mode": "fedavg", "participation": 0.5},
    "fedavg, proximal": {"mode": "fedavg", "proximal": 0.1},
    "tifl, two tiers": {"mode": "tifl", "tiers": 2, "participation": 0.5},
    **{
        f"fedasync, {weight}": {"mode": "fedasync", "staleness_weight": weight}
        for weight in ("constant", "hinge", "polynomial")
    },
    **{f"preset {name}": {"preset": name} for name in PRESETS},
}
ROUNDS = {"sync": 25, "async": 60, "ssp": 60, "fedasync": 20}
"""Where the ten of the others are too few to learn anything."""


def cluster_of(run: dict[str, Any]) -> ClusterConfig:
    """Two equal workers and a slow one (in mode local, the first alone), as a file would have them."""
    mode = run.get("mode", "esync")
    given = {**BASE, "rounds": ROUNDS.get(mode, BASE["rounds"]), **run}
    if mode in ALGORITHMS and ALGORITHMS[mode].local_steps > 1:
        given = {"local_steps": 6, **given}
    return config.cluster({"run": given, "workers": [{"step_time_s": s} for s in STEP_TIMES_S]})


@pytest.fixture(scope="module", autouse=True)
def _compile_once(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """What is compiled for one run or worker serves the others."""
    options = {
        "jax_compilation_cache_dir": str(tmp_path_factory.mktemp("compiled")),
        "jax_persistent_cache_min_compile_time_secs": 0.0,
        "jax_persistent_cache_min_entry_size_bytes": 0,
    }
    before = {name: getattr(jax.config, name) for name in options}
    for name, value in options.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()
    yield
    for name, value in before.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()


@pytest.fixture(scope="module")
def accuracy() -> Callable[[Any], float]:
    """A flat model's accuracy on the digits' test set."""
    digits = data.load("digits")
    model = step.classifier(config.cluster({"run": BASE}).run, digits)
    packer = Packer(model.params, model.stats)

    def accuracy_of(flat: Any) -> float:
        params, stats, _ = packer.unpack([flat])
        return step.test_accuracy(model, params, stats, (digits.test_images, digits.test_labels))[0]

    assert accuracy_of(packer.pack(model.params, model.stats)) < 0.25
    return accuracy_of


def real_run(cluster: ClusterConfig) -> tuple[dict[str, Any], Any]:
    """The summary of a run in threads, and its final model."""
    with Cluster(cluster.run) as servers:
        for rank, worker in enumerate(cluster.each_worker()):

            def train(joined: Worker, worker: WorkerConfig = worker) -> None:
                loop.train(joined, worker, Journal(None, worker.name), lambda text: None)

            servers.train(worker.name, train, rank)
        for thread in servers.workers:
            thread.result()
        summary = servers.finish()
        server = servers.ps.thread
        assert server is not None
        assert server.aggregation is not None
        assert servers.refused() == {}
        return summary, np.concatenate(server.aggregation.averaged())


def run_in(world: str, cluster: ClusterConfig, accuracy: Callable[[Any], float]) -> dict[str, Any]:
    """Run a cluster and check what holds for every run that is long enough to learn something; its summary."""
    if world == "real":
        summary, final = real_run(cluster)
        learnt = accuracy(final)
    else:
        summary = simulate(cluster, None, say=lambda text: None)
        learnt = summary["final_accuracy"]
    run = cluster.run
    assert summary["ended"] == f"{run.rounds} rounds"
    assert summary["rounds"] == run.rounds
    assert len(summary["workers"]) == run.workers
    assert all(row["left_why"] == "done" for row in summary["workers"])
    assert learnt > 0.5
    return summary


@pytest.mark.parametrize("world", ["real", "virtual"])
@pytest.mark.parametrize("name", list(RUNS))
def test_every_mode_ends_properly_and_learns(
    name: str, world: str, accuracy: Callable[[Any], float]
) -> None:
    summary = run_in(world, cluster_of(RUNS[name]), accuracy)
    steps = {row["name"]: row["steps"] for row in summary["workers"]}
    assert all(steps.values()), "everybody took part"


# One of your own


class Median(aggregation.Aggregation):
    """A barrier whose round adds the median of the deltas, element by element; values likewise."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self._expected: set[str] = set()
        self._arrived: list[dict[str, Any]] = [{} for _ in self.chunks]

    def set_members(self, ranks: Any) -> list[Event]:
        self._expected = set(ranks)
        return self._finish() if self.version >= 0 else []

    def _take(self, update: Contribution) -> list[Event]:
        self._arrived[update.chunk][update.worker] = np.array(update.data)
        return self._finish()

    def _finish(self) -> list[Event]:
        if not all(self._expected <= chunk.keys() and chunk for chunk in self._arrived):
            return []
        members = frozenset(self._arrived[0])
        for i, chunk in enumerate(self._arrived):
            median = np.median(list(chunk.values()), axis=0).astype(np.float32)
            is_delta = self.layout.chunks[i].kind == "delta"
            self.chunks[i] = self.chunks[i] + median if is_delta else median
        self.version += 1
        self._arrived = [{} for _ in self.chunks]
        events: list[Event] = [Published(self.version, i, x) for i, x in enumerate(self.chunks)]
        return [*events, Completed(self.version, members)]

    def _missing(self, worker: str, round: int) -> list[int]:
        if round != self.version:
            return []
        return [i for i, chunk in enumerate(self._arrived) if worker not in chunk]


class MoreEachRound(Policy):
    """One local step in the first round, two in the second, and so on."""

    def decide(self, table: Table, record: Record, ahead: int, now: float) -> Decision | None:
        record.ready = True
        return Decision(SYNC, max(ahead, record.round + 1 - record.step))


@pytest.mark.parametrize("world", ["real", "virtual"])
def test_an_algorithm_of_one_s_own_is_an_entry_in_each_table(
    world: str, accuracy: Callable[[Any], float], monkeypatch: pytest.MonkeyPatch
) -> None:
    entry = Algorithm(pacing="growing", aggregation="median", summary="for this test")
    monkeypatch.setitem(algorithms.ALGORITHMS, "mine", entry)
    monkeypatch.setitem(policy.POLICIES, "growing", lambda run: MoreEachRound())
    monkeypatch.setitem(AGGREGATIONS, "median", Median)
    summary = run_in(world, cluster_of({"mode": "mine", "rounds": 8}), accuracy)
    assert summary["mode"] == "mine"
    for row in summary["workers"]:
        assert 36 <= row["steps"] <= 36 + 1, "1 + 2 + ... + 8, and one begun when the run ended"


# Workers that are held


def few_steps(worker: Worker) -> Any:
    """A loop that pulls its parameters towards its rank."""
    params = worker.start({"w": np.zeros(3, np.float32)})
    while not worker.stopped:
        worker.pause(0.001)
        params = worker.step({"w": params["w"] + 0.1 * (worker.rank - params["w"])})
    return params["w"]


def test_a_held_worker_that_missed_a_model_fetches_it_and_takes_part_when_it_is_drawn(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """No model that is sent to everybody arrives."""
    monkeypatch.setattr(link, "RETRY_S", 0.2)
    run = RunConfig(mode="fedavg", participation=0.5, local_steps=2, workers=2, rounds=5)
    with Cluster(run) as cluster:
        _until(lambda: cluster.ps.thread is not None)
        server = cluster.ps.thread
        assert server is not None
        publish = server._publish

        def lossy(event: Published) -> None:  # it has been placed where shared memory is
            if event.worker is not None or event.version == 0:
                publish(event)

        server._publish = lossy  # type: ignore[method-assign]
        threads = [cluster.train(f"w{i}", few_steps, rank=i) for i in range(2)]
        finals = [thread.result() for thread in threads]
        summary = cluster.finish()
    assert summary["rounds"] == 5
    assert all(row["steps"] >= 2 for row in summary["workers"]), "each was drawn"
    np.testing.assert_array_equal(finals[0], finals[1])


@pytest.mark.parametrize("mode", ["fedavg", "ssp", "tifl", "feddrop"])
def test_a_run_that_is_ended_while_workers_are_held_ends_for_all_of_them(
    mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In every mode that holds workers; the final model is taken up once."""
    taken: list[str] = []
    final_model = Worker._final_model

    def counted(worker: Worker, *arguments: Any) -> Any:
        taken.append(worker.name)
        return final_model(worker, *arguments)

    monkeypatch.setattr(Worker, "_final_model", counted)
    share = 0.4 if mode in ("fedavg", "tifl") else 1.0
    run = RunConfig(mode=mode, participation=share, max_staleness=1, tiers=2, workers=3)

    def slow(worker: Worker) -> Any:
        worker.on_round(lambda row: worker.pause(60))
        return few_steps(worker)

    with Cluster(run) as cluster:
        for name, body in (("a", few_steps), ("b", few_steps), ("slow", slow)):
            cluster.train(name, body)
        handlers = cluster.state.handlers

        def at_the_barrier() -> bool:
            records = handlers.table.records
            return handlers.history.version > 0 and all(records[name].arrived for name in "ab")

        # In mode feddrop nobody is held: everybody takes part.
        _until(at_the_barrier if mode == "feddrop" else lambda: handlers._held)
        cluster.state.stop("seen enough")
        for thread in cluster.workers:
            thread.result()
        cluster.finish()
    assert sorted(taken) == ["a", "b", "slow"]


def test_a_worker_that_is_held_when_the_one_it_waits_for_dies_goes_on() -> None:
    run = RunConfig(mode="ssp", max_staleness=0, workers=2, rounds=12, heartbeat_s=0.6)

    def vanishing(worker: Worker) -> None:
        params = worker.start({"w": np.zeros(3, np.float32)})
        for _ in range(3):
            params = worker.step(params)
        _until(lambda: "stays" in cluster.state.handlers._held)
        worker._link.inbox.put(None)  # as if killed
        worker._link.join()

    with Cluster(run) as cluster:
        cluster.train("vanishes", vanishing)
        cluster.train("stays", few_steps).result()
        summary = cluster.finish()
    assert summary["rounds"] == 12
    steps = {row["name"]: row["steps"] for row in summary["workers"]}
    assert steps["stays"] >= 8


def test_the_round_of_an_evaluator_is_the_version_that_it_watched_last() -> None:
    with Cluster(RunConfig(mode="sync", rounds=20, evaluate_every_s=0.01)) as cluster:
        cluster.train("w", few_steps)
        with cluster.worker("evaluator", role="evaluator") as worker:
            assert worker.round == -1
            rounds = [
                (version, worker.round)
                for version, _, _ in worker.watch({"w": np.zeros(3, np.float32)})
            ]
        cluster.finish()
    assert rounds[-1] == (20, 20)
    assert all(version == round for version, round in rounds)


def _until(condition: Callable[[], Any], timeout_s: float = 20.0) -> None:
    """Wait for something that another thread brings about."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.005)
