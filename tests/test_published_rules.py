"""Every published update rule against its formula, written down anew in a few lines of float64.

The recurrences here share nothing with the code: each is the paper's, in the paper's terms, on whole vectors.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest

from esync import tensors
from esync.config import RunConfig
from esync.messages import INITIAL
from esync.ps.aggregation import Contribution, FedAsync, Immediate, Mean
from esync.ps.backend import NumpyBackend
from esync.tensors import DELTA, VALUE, Layout, Leaf

DELTAS, VALUES = 11, 6
WORKERS, ROUNDS = 4, 10
LR = 0.1


@pytest.fixture(autouse=True)
def _several_chunks(monkeypatch):
    monkeypatch.setattr(tensors, "CHUNK_ELEMENTS", 4)  # deltas 4 + 4 + 3, values 4 + 2


@dataclass
class Work:
    """What one worker did in one round: a pseudo-gradient of its parameters, and its BatchNorm values."""

    gradient: np.ndarray
    values: np.ndarray
    steps: int
    samples: int

    @property
    def delta(self):
        return -LR * self.gradient


def works(count, seed):
    random = np.random.default_rng(seed)
    return [
        Work(
            random.normal(size=DELTAS),
            random.normal(size=VALUES),
            int(random.integers(1, 50)),
            int(random.integers(1, 1000)),
        )
        for _ in range(count)
    ]


def start():
    random = np.random.default_rng(99)
    return random.normal(size=DELTAS), random.normal(size=VALUES)


class Server:
    """The code under test: whole updates in, the model's two parts out."""

    def __init__(self, kind, **config):
        layout = Layout(
            (Leaf(DELTA, "w", (DELTAS,), "float32"), Leaf(VALUE, "s", (VALUES,), "float32"))
        )
        assert len(layout.chunks) == 5
        self.aggregation = kind(layout, NumpyBackend(), RunConfig(lr=LR, **config))
        self._push("0", INITIAL, np.concatenate(start()), 0, 1)
        self.aggregation.set_members({str(i): i for i in range(WORKERS)})

    def _push(self, worker, round, flat, steps, samples):
        for i, chunk in enumerate(self.aggregation.layout.chunks):
            data = flat[chunk.start : chunk.stop].astype(np.float32)
            self.aggregation.receive(Contribution(worker, round, i, data, steps, samples))

    def push(self, worker, round, work):
        flat = np.concatenate([work.delta, work.values])
        self._push(str(worker), round, flat, work.steps, work.samples)

    def check(self, version, w, values):
        assert self.aggregation.version == version
        model = np.concatenate(self.aggregation.chunks)
        np.testing.assert_allclose(model[:DELTAS], w, rtol=2e-5, atol=2e-5)
        np.testing.assert_allclose(model[DELTAS:], values, rtol=2e-5, atol=2e-5)


def barrier(rule, values_rule=None, **config):
    """Rounds of the mean, against `rule`: (w, everybody's work of a round) -> w."""
    server, (w, _) = Server(Mean, **config), start()
    for round in range(ROUNDS):
        row = works(WORKERS, [1, round])
        for worker in np.random.default_rng(round).permutation(WORKERS):
            server.push(worker, round, row[worker])
        w = rule(w, row)
        values = values_rule(row) if values_rule else sum(x.values for x in row) / WORKERS
        server.check(round + 1, w, values)


def arrivals(server, rule, values_rule):
    """Updates in random order, each from the model that its worker had, against
    `rule`: (w, the worker's model, work, staleness) -> w, and the like for values."""
    w, values = start()
    had = {worker: (0, w) for worker in range(WORKERS)}
    order = np.random.default_rng(5).integers(0, WORKERS, 4 * ROUNDS)
    assert set(order) == set(range(WORKERS))
    largest = 0
    for n, worker in enumerate(order):
        (work,) = works(1, [2, n])
        version, its_model = had[worker]
        staleness = n - version  # so many updates came between
        largest = max(largest, staleness)
        w = rule(w, its_model, work, staleness)
        values = values_rule(values, work, staleness)
        server.push(worker, version, work)
        server.check(n + 1, w, values)
        had[worker] = (n + 1, w)
    assert largest > 6


# Barriers: the weights


def test_ssgd():
    """Chen et al. 2016: `w <- w - lr / p * sum_i g_i`."""
    barrier(lambda w, row: w - LR / WORKERS * sum(x.gradient for x in row))


def test_esync_with_a_global_learning_rate():
    """Li et al. 2019: `w <- w + global_lr / p * sum_i (w_i - w)`."""

    def rule(w, row):
        local = [w - LR * x.gradient for x in row]
        return w + 0.7 / WORKERS * sum(w_i - w for w_i in local)

    barrier(rule, global_lr=0.7)


def test_fedavg():
    """McMahan et al. 2017, algorithm 1: `w <- sum_k n_k / n * w_k`."""

    def rule(w, row):
        n = sum(x.samples for x in row)
        return sum(x.samples / n * (w - LR * x.gradient) for x in row)

    def values_rule(row):
        return np.average([x.values for x in row], axis=0, weights=[x.samples for x in row])

    barrier(rule, values_rule, weights="samples")


@pytest.mark.parametrize("global_lr", [1.0, 0.7])
def test_fednova(global_lr):
    """Wang et al. 2020: `w <- w - tau_eff * sum_i p_i * lr * d_i`, d_i = G_i a_i / |a_i| with a_i = (1, ..., 1), so
    that lr * d_i is the mean change of a step; tau_eff = sum_i p_i tau_i; p_i = 1/p."""

    def rule(w, row):
        p = 1 / WORKERS
        tau_eff = sum(p * x.steps for x in row)
        return w - global_lr * tau_eff * sum(p * LR * (x.gradient / x.steps) for x in row)

    barrier(rule, weights="fednova", global_lr=global_lr)


# Barriers: the outer optimisers


def mean_delta(row):
    return sum(x.delta for x in row) / WORKERS


def test_outer_momentum():
    """FedAvgM (Hsu et al. 2019): `v <- beta * v + delta; w <- w - lr * v`, delta being minus the change."""
    velocity = np.zeros(DELTAS)

    def rule(w, row):
        nonlocal velocity
        velocity = 0.8 * velocity - mean_delta(row)
        return w - 0.5 * velocity

    barrier(rule, outer="momentum", outer_momentum=0.8, global_lr=0.5)


def test_outer_nesterov():
    """DiLoCo (Douillard et al. 2023) on torch.optim.SGD(nesterov=True): with g = -D,
    `b <- mu * b + g; w <- w - lr * (g + mu * b)`."""
    buffer = np.zeros(DELTAS)

    def rule(w, row):
        nonlocal buffer
        g = -mean_delta(row)
        buffer = 0.9 * buffer + g
        return w - 0.7 * (g + 0.9 * buffer)

    barrier(rule, outer="nesterov", global_lr=0.7)


def test_outer_nesterov_looks_ahead():
    """The same in Nesterov's own form, where the model is the point y ahead at which gradients are taken:
    `x' <- y + lr * D; y <- x' + mu * (x' - x)`."""
    x = start()[0]

    def rule(y, row):
        nonlocal x
        before, x = x, y + 0.7 * mean_delta(row)
        return x + 0.9 * (x - before)

    barrier(rule, outer="nesterov", global_lr=0.7)


@pytest.mark.parametrize("tau", [1e-3, 0.1])
def test_outer_adam(tau):
    """FedAdam (Reddi et al. 2021, algorithm 2), with v = tau^2 before the first round, and no bias correction."""
    m, v = np.zeros(DELTAS), np.full(DELTAS, tau**2)

    def rule(w, row):
        nonlocal m, v
        delta = mean_delta(row)
        m = 0.8 * m + 0.2 * delta
        v = 0.95 * v + 0.05 * delta**2
        return w + 0.03 * m / (np.sqrt(v) + tau)

    barrier(
        rule, outer="adam", outer_momentum=0.8, outer_beta2=0.95, outer_epsilon=tau, global_lr=0.03
    )


def test_an_outer_optimiser_takes_the_weighted_mean_for_its_gradient():
    velocity = np.zeros(DELTAS)

    def rule(w, row):
        nonlocal velocity
        tau_eff = np.mean([x.steps for x in row])
        velocity = 0.9 * velocity + tau_eff * np.mean([x.delta / x.steps for x in row], axis=0)
        return w + velocity

    barrier(rule, weights="fednova", outer="momentum")


# Without a barrier


def towards(values, work, staleness):
    return values + (work.values - values) / WORKERS


def test_asgd():
    """Dean et al. 2012: `w <- w - lr * g_i`, whatever model g_i was computed from."""
    server = Server(Immediate, mode="async")
    arrivals(server, lambda w, sent, x, staleness: w - LR * x.gradient, towards)


@pytest.mark.parametrize("strength", [0.04, 1.0])
def test_dc_asgd(strength):
    """Zheng et al. 2017, equation 10: `w <- w - lr * (g + lambda * g * g * (w - w_bak))`."""

    def rule(w, backup, x, staleness):
        g = x.gradient
        return w - LR * (g + strength * g * g * (w - backup))

    server = Server(Immediate, mode="async", dcasgd=True, dc_lambda=strength)
    arrivals(server, rule, towards)


def constant(staleness):
    return 1


def polynomial(staleness):
    return 1 / np.sqrt(staleness + 1)


def hinge(staleness):
    if staleness <= 4:
        return 1
    return 1 / (10 * (staleness - 4) + 1)


@pytest.mark.parametrize(("s", "a"), [(constant, 0.5), (polynomial, 0.5), (hinge, 10.0)])
def test_fedasync(s, a):
    """Xie et al. 2019, algorithm 1: `x <- (1 - alpha_t) * x + alpha_t * x_new`, `alpha_t = alpha * s(staleness)`, with
    the paper's a = 0.5 of the polynomial and a = 10, b = 4 of the hinge function."""

    def rule(w, sent, x, staleness):
        alpha = 0.6 * s(staleness)
        return (1 - alpha) * w + alpha * (sent - LR * x.gradient)

    def values_rule(values, x, staleness):
        alpha = 0.6 * s(staleness)
        return (1 - alpha) * values + alpha * x.values

    config = {"staleness_weight": s.__name__, "staleness_a": a, "staleness_b": 4}
    arrivals(Server(FedAsync, mode="fedasync", mixing=0.6, **config), rule, values_rule)


def test_the_average_of_versions_is_an_exponential_one_that_soon_forgets_the_initial_model():
    config = RunConfig(mode="sync", workers=1, ema=0.5)
    layout = Layout((Leaf(DELTA, "w", (3,), "float32"),))
    mean = Mean(layout, NumpyBackend(), config)
    first = np.float32([1, 2, 3])
    mean.receive(Contribution("a", INITIAL, 0, first))
    mean.set_members({"a": 0})
    np.testing.assert_array_equal(mean.averaged()[0], first)
    w = average = first.astype(np.float64)
    for round in range(8):
        delta = np.float32([0.1 * round, -1, round % 3])
        mean.receive(Contribution("a", round, 0, delta))
        w = w + delta
        keep = min(0.5, (round + 1) / (round + 3))
        average = keep * average + (1 - keep) * w
        np.testing.assert_allclose(mean.chunks[0], w, rtol=1e-6)
        np.testing.assert_allclose(mean.averaged()[0], average, rtol=1e-6)
