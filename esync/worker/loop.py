"""What `esync-worker` does: an image classifier trained through `esync.Worker`, like any other loop."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import Any

import jax

from esync import data
from esync.config import OWN, RunConfig, WorkerConfig
from esync.emulation import StepTimes, cost_of
from esync.errors import ConfigError
from esync.journal import Journal
from esync.models import subnetwork
from esync.worker.client import Worker
from esync.worker.pytree import Tree
from esync.worker.step import (
    EVALUATION_BATCH,
    Classifier,
    classifier,
    device_for,
    draw_sub_network,
    on_device,
    random_key,
    test_accuracy,
)


def train(
    worker: Worker, config: WorkerConfig, journal: Journal, say: Callable[[str], None]
) -> None:
    """Train until the run is over.

    Raises:
        DataError, ModelError, DeviceError: the run's data, model or device cannot be had here.
    """
    run = worker.config
    _refuse_own(run)
    device = device_for(config.device)
    with jax.default_device(device):
        dataset = data.load(run.dataset, run.data_dir or None, say=say)
        model = classifier(run, dataset)
        images, labels = on_device(dataset.train_images, dataset.train_labels, device)
        batches = worker.indices(dataset.train_labels)
        key = jax.random.fold_in(random_key(run.seed), worker.rank)
        # Committed to the device, as the cluster's model will be: or the step would be compiled twice.
        params, stats = jax.device_put((model.params, model.stats), device)
        opt_state = jax.device_put(model.init_optimizer(params), device)
        pace = Pace(config, run.seed, worker.rank)

        say(f"compiling {run.model} for {run.dataset} ({dataset.source})")
        index = next(batches)
        warm = model.step(params, stats, opt_state, images, labels, index, key, 0, params)
        jax.block_until_ready(warm)

        worker.on_round(lambda row: journal.write("round", **row))
        params, stats = worker.start(params, stats)
        journal.write("start", rank=worker.rank, device=str(device))
        if not worker.stopped:
            say(f"training from version {worker.round}")
        parts = Parts(run, dataset, worker.rank)
        part, round = None, -1
        while not worker.stopped:
            if worker.round != round:
                round, anchor = worker.round, params
                part = parts.draw(params, stats, worker.width, (images, labels, index, key, 0))
            pace.begin()
            batch = images, labels, index, key, worker.totals.steps
            if part is None:
                params, stats, opt_state, loss = model.step(
                    params, stats, opt_state, *batch, anchor
                )
            else:
                params, stats, loss = part.step(params, stats, batch)
            jax.block_until_ready(params)
            pace.stretch(worker)
            params, stats = worker.step(params, stats, loss=loss)
            index = next(batches, index)


def evaluate(worker: Worker, device: Any, journal: Journal, say: Callable[[str], None]) -> None:
    """Evaluate the newest model on the test set, again and again; the training never waits for it.

    Args:
        device: of JAX; None: its first.
    """
    try:
        os.nice(10)  # on a shared machine the training comes first
    except OSError:
        pass
    run = worker.config
    with jax.default_device(device):
        dataset = data.load(run.dataset, run.data_dir or None, say=say)
        model = classifier(run, dataset)
        test = on_device(dataset.test_images, dataset.test_labels, device or jax.devices()[0])
        # Compiled before the run starts, on a part of the test set: on a slow machine the whole takes long.
        test_accuracy(model, model.params, model.stats, [x[:EVALUATION_BATCH] for x in test])
        for version, params, stats in worker.watch(model.params, model.stats):
            began = time.perf_counter()
            accuracy, loss = test_accuracy(model, params, stats, test)
            seconds = time.perf_counter() - began
            worker.report_accuracy(version, accuracy, loss, seconds)
            journal.write("accuracy", round=version, accuracy=accuracy, loss=loss, eval_s=seconds)


def _refuse_own(run: RunConfig) -> None:
    if run.model == OWN:
        raise ConfigError(
            'this run has model = "own": its workers are programs that use esync.Worker, not esync-worker. '
            "Start yours, or give each of [[workers]] a command"
        )


class Part:
    """The sub-network that a worker trains in one round (mode feddrop), with an optimiser of its own.

    Args:
        model: a network of its width.
        params: the whole model that it is a part of.
        number: of the worker's rounds; each trains another part.
    """

    def __init__(self, model: Classifier, params: Tree, seed: int, rank: int, number: int) -> None:
        self._model = model
        self._selection, self._params = draw_sub_network(model, params, seed, rank, number)
        self._anchor = self._params
        self._state = model.init_optimizer(self._params)

    def step(self, params: Tree, stats: Tree, batch: tuple[Any, ...]) -> tuple[Tree, Tree, Any]:
        """One local step: (the whole model with the part in it, statistics, loss)."""
        self._params, stats, self._state, loss = self._model.step(
            self._params, stats, self._state, *batch, self._anchor
        )
        return subnetwork.insert(params, self._selection, self._params), stats, loss


class Parts:
    """Draws a worker's parts, and compiles each width's network once."""

    def __init__(self, run: RunConfig, dataset: data.Dataset, rank: int) -> None:
        self._run, self._dataset, self._rank = run, dataset, rank
        self._models: dict[float, Classifier] = {}
        self._rounds = 0

    def draw(self, params: Tree, stats: Tree, width: float, batch: tuple[Any, ...]) -> Part | None:
        """The part of a round; None if it trains the whole model. `batch` is what a new width is compiled with: not
        within a step that may be stretched."""
        self._rounds += 1
        if width >= 1.0:
            return None
        drawn = self._run.seed, self._rank, self._rounds
        if width not in self._models:
            self._models[width] = classifier(self._run, self._dataset, width=width)
            warm = Part(self._models[width], params, *drawn)
            jax.block_until_ready(warm.step(params, stats, batch))
        return Part(self._models[width], params, *drawn)


class Pace:
    """Makes this machine look slower than it is, by sleeping: `--step-time`, `--slowdown`, `--jitter` and so on."""

    def __init__(self, config: WorkerConfig, seed: int = 0, rank: int = 0) -> None:
        self._step_time_s = config.step_time_s
        self._slowdown = config.slowdown
        self._times = StepTimes(config, seed, rank)
        self._started: float | None = None
        self._began = 0.0

    def begin(self) -> None:
        """A local step begins."""
        self._began = time.perf_counter()
        if self._started is None:
            self._started = self._began

    def stretch(self, worker: Any) -> None:
        """Sleep for what is missing to the emulated duration, or until the run is over."""
        spent = time.perf_counter() - self._began
        base = max(self._step_time_s * cost_of(worker.width), spent * self._slowdown)
        wanted = self._times.next(self._began - (self._started or 0.0), base)
        if wanted > spent:
            worker.pause(wanted - spent)
