"""The compiled local step against gradients worked out by hand, with and without FedProx's pull."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
import pytest

from esync import data
from esync.config import RunConfig, WorkerConfig
from esync.data import partition
from esync.errors import ModelError
from esync.journal import Journal
from esync.worker import client, loop
from esync.worker.client import Worker, _finite
from esync.worker.pytree import Packer
from esync.worker.step import classifier, random_key
from tests.cluster import Cluster

LR, BATCH = 0.05, 8
Layers = dict[str, dict[str, Any]]


def options(**more: Any) -> dict[str, Any]:
    return {"model": "mlp", "dataset": "digits", "lr": LR, "batch_size": BATCH, **more}


def as_float64(params: Any) -> Layers:
    return {
        name: {key: np.asarray(x, np.float64) for key, x in layer.items()}
        for name, layer in params.items()
    }


def gradient(params: Layers, index: Any) -> Layers:
    """Of the mean cross-entropy of three dense layers with ReLU between them, by the chain rule."""
    digits = data.load("digits")
    mean, std = np.float64(digits.mean[0]), np.float64(digits.std[0])
    x = (digits.train_images[index].reshape(len(index), -1) / 255.0 - mean) / std
    names = sorted(params)
    inputs = []
    for name in names:
        inputs.append(x)
        x = x @ params[name]["kernel"] + params[name]["bias"]
        if name != names[-1]:
            x = np.maximum(x, 0.0)
    chances = np.exp(x - x.max(axis=1, keepdims=True))
    chances /= chances.sum(axis=1, keepdims=True)
    back = (chances - np.eye(digits.classes)[digits.train_labels[index]]) / len(index)
    grads: Layers = {}
    for name, inner in zip(reversed(names), reversed(inputs), strict=True):
        grads[name] = {"kernel": inner.T @ back, "bias": back.sum(axis=0)}
        back = (back @ params[name]["kernel"].T) * (inner > 0)
    return grads


def by_hand(params: Layers, anchor: Layers, index: Any, mu: float) -> Layers:
    """`w <- w - lr * (grad f(w) + mu * (w - anchor))`: Li et al. 2020, a gradient step on their h."""
    grads = gradient(params, index)
    return {
        name: {
            key: w - LR * (grads[name][key] + mu * (w - anchor[name][key]))
            for key, w in layer.items()
        }
        for name, layer in params.items()
    }


def assert_close(params: Any, expected: Layers) -> None:
    for name, layer in expected.items():
        for key, wanted in layer.items():
            np.testing.assert_allclose(params[name][key], wanted, rtol=1e-4, atol=1e-5)


def step_of(model: Any, params: Any, anchor: Any, index: Any) -> Any:
    """The parameters after the compiled step."""
    digits = data.load("digits")
    arrays = digits.train_images, digits.train_labels
    state, key = model.init_optimizer(params), random_key(0)
    return model.step(params, {}, state, *arrays, index, key, 0, anchor)[0]


def elsewhere(params: Any) -> Any:
    """Another model of the same shapes."""
    random = np.random.default_rng(1)
    return jax.tree_util.tree_map(
        lambda x: x + random.normal(scale=0.1, size=x.shape).astype(np.float32), params
    )


@pytest.mark.parametrize("mu", [0.0, 0.3, 5.0])
def test_a_local_step_is_the_gradient_s_and_the_pull_s(mu: float) -> None:
    model = classifier(RunConfig(**options(proximal=mu)), data.load("digits"))
    anchor, index = elsewhere(model.params), np.arange(40, 40 + BATCH, dtype=np.int32)
    params = step_of(model, model.params, anchor, index)
    assert_close(params, by_hand(as_float64(model.params), as_float64(anchor), index, mu))


def test_at_the_global_model_nothing_pulls() -> None:
    digits, index = data.load("digits"), np.arange(BATCH, dtype=np.int32)
    pulled, free = (classifier(RunConfig(**options(proximal=mu)), digits) for mu in (5.0, 0.0))
    first = step_of(pulled, pulled.params, pulled.params, index)
    second = step_of(free, free.params, elsewhere(free.params), index)
    for x, y in zip(jax.tree.leaves(first), jax.tree.leaves(second), strict=True):
        np.testing.assert_array_equal(x, y)


@pytest.mark.parametrize("mu", [0.0, 2.0])
def test_a_worker_is_pulled_towards_the_model_with_which_its_round_began(mu: float) -> None:
    """Two rounds of three steps of one worker, whose model is the next global one; in a real run."""
    run = RunConfig(**options(mode="fedavg", local_steps=3, proximal=mu, workers=1, rounds=2))
    digits = data.load("digits")
    model = classifier(run, digits)

    def train(worker: Worker) -> None:
        loop.train(worker, WorkerConfig(), Journal(None, "w"), lambda text: None)

    with Cluster(run) as cluster:
        cluster.train("w", train).result()
        cluster.finish()
        server = cluster.ps.thread
        assert server is not None
        assert server.aggregation is not None
        final = np.concatenate(server.aggregation.chunks)
    own = partition.split(digits.train_labels, 1, "iid", run.seed)[0]
    batches = partition.batches(own, BATCH, run.seed, 0)
    params = as_float64(model.params)
    for _ in range(2):
        anchor = params
        for _ in range(3):
            params = by_hand(params, anchor, next(batches), mu)
    assert_close(Packer(model.params, model.stats).unpack([final])[0], params)


class Slow:
    """An array that is not ready yet."""

    def __init__(self) -> None:
        self.awaited = False

    def is_deleted(self) -> bool:
        return False

    def is_ready(self) -> bool:
        return self.awaited

    def block_until_ready(self) -> Slow:
        self.awaited = True
        return self


HERE = np.zeros(1, np.float32)


@pytest.mark.parametrize(
    "tree_of",
    [
        lambda slow: slow,
        lambda slow: {"frozen": HERE, "b": slow},
        lambda slow: {"b": slow, "frozen": HERE},
        lambda slow: {"a": {"x": HERE, "y": HERE}, "b": {"x": HERE, "y": slow}},
        lambda slow: {"a": {"x": slow, "y": HERE}, "b": {"x": HERE, "y": HERE}},
        lambda slow: {"a": [HERE, slow, HERE]},
        lambda slow: {"a": None, "b": slow, "c": {}},
        lambda slow: (HERE, (slow, np.float32(1.0))),
    ],
)
@pytest.mark.parametrize("kind", [jax.numpy.asarray, np.asarray])
def test_a_step_has_ended_when_its_arrays_are_there(
    tree_of: Any, kind: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    slow = Slow()
    monkeypatch.setattr(jax, "Array", (type(jax.numpy.asarray(HERE)), Slow))
    tree = jax.tree_util.tree_map(lambda leaf: leaf if leaf is slow else kind(leaf), tree_of(slow))
    client._wait_for(tree)
    assert slow.awaited


def test_not_all_arrays_are_asked_whether_they_are_there(monkeypatch: pytest.MonkeyPatch) -> None:
    slow = [Slow() for _ in range(100)]
    monkeypatch.setattr(jax, "Array", Slow)
    client._wait_for({f"layer{i}": {"w": leaf} for i, leaf in enumerate(slow)})
    assert [i for i, leaf in enumerate(slow) if leaf.awaited] == [0, 99]


def test_arrays_that_are_there_are_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    awaited: list[Any] = []
    monkeypatch.setattr(jax, "block_until_ready", awaited.append)
    client._wait_for({"a": jax.numpy.zeros(1), "b": {"c": jax.numpy.zeros(1)}})
    assert not awaited


def test_a_deleted_array_is_an_error_and_no_crash() -> None:
    gone = jax.numpy.zeros(1)
    gone.delete()
    with pytest.raises(RuntimeError, match="deleted"):
        client._wait_for({"w": gone})
    with pytest.raises(RuntimeError, match="deleted"):
        client._wait_for({"v": jax.numpy.zeros(1), "w": gone})


def test_arrays_that_cannot_be_asked_are_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    array, awaited = object(), []
    monkeypatch.setattr(jax, "Array", object)
    monkeypatch.setattr(jax, "block_until_ready", awaited.append)
    client._wait_for({"w": array})
    assert awaited == [(array, array)]


def test_a_loss_that_is_no_number_is_said_to_be_none() -> None:
    assert _finite(np.float32(2.0)) == 2.0
    assert _finite(np.array([np.inf])[0]) is None
    with pytest.raises(ModelError, match=r"loss is one number, not shape=\[2\]"):
        _finite(np.zeros(2))
