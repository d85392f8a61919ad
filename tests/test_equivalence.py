"""With equal workers, one local step a round and plain SGD, the algorithms are one and the same."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from esync import data
from esync.config import RunConfig
from esync.worker.client import Worker
from esync.worker.step import classifier
from tests.cluster import Cluster

WORKERS, ROUNDS, BATCH = 3, 12, 16


def batch_of(round: int, rank: int) -> np.ndarray[Any, Any]:
    return np.random.default_rng([round, rank]).integers(0, 1437, BATCH).astype(np.int32)


@pytest.fixture(scope="module")
def setting() -> Any:
    digits = data.load("digits")
    config = RunConfig(dataset="digits", model="cnn", lr=0.1, batch_size=BATCH)
    model = classifier(config, digits)
    arrays = jnp.asarray(digits.train_images), jnp.asarray(digits.train_labels)
    return model, arrays


def single_process(setting: Any) -> Any:
    """p times the batch, one process, no esync."""
    model, (images, labels) = setting
    params, stats, state = model.params, model.stats, model.init_optimizer(model.params)
    key = jax.random.key(0)
    for round in range(ROUNDS):
        index = np.concatenate([batch_of(round, rank) for rank in range(WORKERS)])
        params, stats, state, _ = model.step(params, stats, state, images, labels, index, key, 0)
    return params


def distributed(setting: Any, config: RunConfig) -> tuple[Any, list[int]]:
    model, (images, labels) = setting

    def loop(worker: Worker) -> Any:
        params = worker.start(model.params)
        state, key = model.init_optimizer(params), jax.random.key(0)
        steps = []
        while not worker.stopped:
            at = worker.round
            index = batch_of(at, worker.rank)
            params, _, state, loss = model.step(params, {}, state, images, labels, index, key, 0)
            params = worker.step(params, loss=loss)
            steps.append(at)
        return params, [steps.count(round) for round in range(ROUNDS)]

    with Cluster(config) as cluster:
        threads = [cluster.train(f"w{i}", loop, rank=i) for i in range(WORKERS)]
        results = [thread.result() for thread in threads]
        cluster.finish()
    return results[0][0], [n for _, counts in results for n in counts]


def assert_equal_but_for_rounding(a: Any, b: Any) -> None:
    for x, y in zip(jax.tree_util.tree_leaves(a), jax.tree_util.tree_leaves(b), strict=True):
        np.testing.assert_allclose(x, y, rtol=2e-4, atol=2e-6)


def test_sync_equals_one_process_with_the_whole_batch(setting: Any) -> None:
    config = RunConfig(mode="sync", workers=WORKERS, rounds=ROUNDS, batch_size=BATCH)
    params, steps = distributed(setting, config)
    assert set(steps) == {1}
    assert_equal_but_for_rounding(params, single_process(setting))


@pytest.mark.parametrize("policy", ["paper", "adaptive"])
def test_esync_of_equal_workers_equals_one_process_with_the_whole_batch(
    setting: Any, policy: str
) -> None:
    config = RunConfig(
        mode="esync",
        policy=policy,
        max_steps=1,
        workers=WORKERS,
        rounds=ROUNDS,
        batch_size=BATCH,
    )
    params, steps = distributed(setting, config)
    assert set(steps) == {1}
    assert_equal_but_for_rounding(params, single_process(setting))


def test_a_run_with_the_same_seed_is_the_same_to_the_bit(setting: Any) -> None:
    config = RunConfig(mode="sync", workers=WORKERS, rounds=ROUNDS, batch_size=BATCH)
    first, _ = distributed(setting, config)
    second, _ = distributed(setting, config)
    for x, y in zip(
        jax.tree_util.tree_leaves(first), jax.tree_util.tree_leaves(second), strict=True
    ):
        assert np.asarray(x).tobytes() == np.asarray(y).tobytes()
