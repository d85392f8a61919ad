"""Real gradients for the virtual cluster: the same model, data and local step as in a real worker.

When a virtual worker's steps end is known before they have been computed. So they are computed when its update
is sent, all of a round's steps at once and several workers at a time, and waited for when the update arrives.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from esync import data
from esync.config import RunConfig
from esync.data import partition
from esync.models import subnetwork
from esync.sim.trainee import Chunks
from esync.tensors import Layout, Vector
from esync.worker.pytree import Packer, Tree, clip
from esync.worker.step import (
    Classifier,
    classifier,
    draw_sub_network,
    on_device,
    random_key,
    test_accuracy,
)

SMALL = 10_000_000
"""Pixels of a batch times parameters: below that a compiled loop is worth it even with convolutions."""
KEPT_MODELS = 4
"""So many models are kept unpacked: all workers of a round begin from the same one."""


class Learner:
    """What all virtual workers of a run share: the data set, the compiled steps, and the threads that compute.

    Args:
        config: the run.
        say: told what is being done.
    """

    def __init__(self, config: RunConfig, say: Callable[[str], None]) -> None:
        self.config = config
        self.dataset = data.load(config.dataset, config.data_dir or None, say=say)
        self.device = jax.devices()[0]
        self.model = classifier(config, self.dataset)
        self.train_set = on_device(
            self.dataset.train_images, self.dataset.train_labels, self.device
        )
        self._test_set = on_device(self.dataset.test_images, self.dataset.test_labels, self.device)
        self.packer = Packer(self.model.params, self.model.stats)
        self.parts = partition.split(
            self.dataset.train_labels, config.workers, config.split, config.seed
        )
        for own in self.parts:
            partition.check_size(own, config.batch_size)
        self.split_digest = partition.digest(self.parts)
        self.pool = ThreadPoolExecutor(os.cpu_count() or 1, thread_name_prefix="esync-sim-train")
        self._evaluations = ThreadPoolExecutor(1, thread_name_prefix="esync-sim-evaluate")
        self.steps = run_steps(self.model, self._loops(self.model))
        self._narrow: dict[float, tuple[Classifier, Callable[..., Any]]] = {}
        self._making_narrow = threading.Lock()
        self._unpacked: dict[tuple[int, ...], tuple[Chunks, Any]] = {}
        self._unpacking = threading.Lock()

    @property
    def layout(self) -> Layout:
        """The model's layout."""
        return self.packer.layout

    def initial(self) -> Vector:
        """The model that the run begins with."""
        return self.packer.pack(self.model.params, self.model.stats)

    def trainee(self, rank: int) -> LearningTrainee:
        """The model of the worker of a rank."""
        return LearningTrainee(self, rank)

    def evaluate(self, chunks: Chunks) -> Future[tuple[float, float]]:
        """(accuracy, mean loss) of a model on the test set."""
        return self._evaluations.submit(self._evaluate, chunks)

    def _evaluate(self, chunks: Chunks) -> tuple[float, float]:
        params, stats, _ = self.unpacked(chunks)
        return test_accuracy(self.model, params, stats, self._test_set)

    def unpacked(self, chunks: Chunks) -> Any:
        """(params, stats, base) of a model, as of `Packer.unpack`; not to be written to."""
        key = tuple(id(chunk) for chunk in chunks)
        with self._unpacking:
            if key not in self._unpacked:
                if len(self._unpacked) >= KEPT_MODELS:
                    del self._unpacked[next(iter(self._unpacked))]
                # With the chunks, so that their ids stay theirs.
                self._unpacked[key] = chunks, self.packer.unpack(chunks)
            return self._unpacked[key][1]

    def narrow(self, width: float) -> tuple[Classifier, Callable[..., Any]]:
        """The network of this width, and its steps."""
        with self._making_narrow:
            if width not in self._narrow:
                model = classifier(self.config, self.dataset, width=width)
                self._narrow[width] = model, run_steps(model, self._loops(model))
            return self._narrow[width]

    def end_training(self) -> None:
        """The run is over: updates that were sent and have not arrived are not computed any more."""
        self.pool.shutdown(wait=False, cancel_futures=True)

    def close(self) -> None:
        """End the threads, when they have finished what they are at."""
        self.end_training()
        self._evaluations.shutdown(wait=False, cancel_futures=True)

    def _loops(self, model: Classifier) -> bool:
        """Whether a round's steps are one compiled loop.

        XLA has no fast convolution inside a loop on CPUs (ten times slower, measured), so there such models are
        stepped one by one, unless a step is so small that calling it takes longer than the step.
        """
        if self.device.platform != "cpu":
            return True
        shape = self.dataset.train_images.shape[1:3]
        height, width = (self.config.image_size,) * 2 if self.config.image_size else shape
        if height * width * self.config.batch_size * self.layout.size <= SMALL:
            return True
        key, index = random_key(0), np.zeros(1, np.int32)
        state = model.init_optimizer(model.params)
        arguments = (model.params, model.stats, state, *self.train_set, index, key, 0, model.params)
        return "conv_general_dilated" not in str(jax.make_jaxpr(model.step)(*arguments))


def run_steps(model: Classifier, loops: bool) -> Callable[..., Any]:
    """(params, stats, opt_state, images, labels, indices, key, first, anchor) -> (params, stats, opt_state, loss):
    as many local steps as `indices` has rows, the first of them being the worker's step number `first`."""

    @jax.jit
    def loop(
        params: Tree,
        stats: Tree,
        state: Tree,
        images: Any,
        labels: Any,
        rows: Any,
        count: Any,
        key: Any,
        first: Any,
        anchor: Tree,
    ) -> Any:
        def body(i: Any, carry: Any) -> Any:
            params, stats, state, _ = carry
            return model.step(params, stats, state, images, labels, rows[i], key, first + i, anchor)

        return jax.lax.fori_loop(0, count, body, (params, stats, state, jnp.float32(0)))

    def run(
        params: Tree,
        stats: Tree,
        state: Tree,
        images: Any,
        labels: Any,
        indices: list[Any],
        key: Any,
        first: int,
        anchor: Tree,
    ) -> Any:
        if loops:
            # As many rows as the next power of two, so that few shapes are compiled.
            length = max(8, 1 << (len(indices) - 1).bit_length())
            rows = np.zeros((length, len(indices[0])), np.int32)
            rows[: len(indices)] = indices
            count = np.int32(len(indices))
            return loop(
                params, stats, state, images, labels, rows, count, key, np.int32(first), anchor
            )
        loss = None
        for i, index in enumerate(indices):
            params, stats, state, loss = model.step(
                params, stats, state, images, labels, index, key, first + i, anchor
            )
        return params, stats, state, loss

    return run


class LearningTrainee:
    """A `Trainee` that really learns; its batches, dropout and optimiser are those of a real worker of its rank."""

    def __init__(self, learner: Learner, rank: int) -> None:
        config = learner.config
        self._learner = learner
        self._rank = rank
        own = learner.parts[rank % config.workers]
        self._batches = partition.batches(own, config.batch_size, config.seed, rank)
        self._key = jax.random.fold_in(random_key(config.seed), rank)
        self._state = learner.model.init_optimizer(learner.model.params)
        self._params: Tree = None
        self._stats: Tree = None
        self._anchor: Tree = None
        self._base: Any = None
        self._own_stats: Tree = None  # before the last merge, if nothing was trained since
        self._pushed: Any = None
        self._count = 0
        self._rounds = 0
        self._loss: Any = None
        self._todo: list[Callable[[], None]] = []
        self._steps = (0, 1.0)
        self._trained = False
        self._before: Future[Any] | None = None

    def adopt(self, chunks: Chunks) -> None:
        self._flush()
        if not self._trained:
            self._todo = []  # models that were not trained from
        self._todo.append(lambda: self._adopt(chunks))

    def train(self, steps: int, width: float) -> None:
        self._steps = self._steps[0] + steps, width

    def merge(self, chunks: Chunks) -> None:
        self._flush()
        self._todo.append(lambda: self._merge(chunks))

    def push(self, *, go_on: bool) -> Future[tuple[Vector, float | None]]:
        self._flush()
        todo, before = self._todo, self._before
        self._todo, self._trained = [], False

        def work() -> tuple[Vector, float | None]:
            if before is not None:
                before.result()  # submitted earlier, so it runs already or is done
            for do in todo:
                do()
            return self._push(go_on)

        self._before = self._learner.pool.submit(work)
        return self._before

    def _flush(self) -> None:
        steps, width = self._steps
        if steps:
            self._todo.append(lambda: self._train(steps, width))
            self._trained = True
        self._steps = 0, 1.0

    # In a thread of the pool

    def _adopt(self, chunks: Chunks) -> None:
        self._params, self._stats, self._base = self._learner.unpacked(chunks)
        self._anchor = self._params

    def _merge(self, chunks: Chunks) -> None:
        self._own_stats = self._stats
        self._params, self._stats, self._base = self._learner.packer.merge(
            chunks, self._params, self._stats, self._pushed
        )
        self._anchor = self._params

    def _train(self, steps: int, width: float) -> None:
        indices = [next(self._batches) for _ in range(steps)]
        self._rounds += 1
        self._own_stats = None
        if width < 1.0:
            self._train_narrow(indices, width)
        else:
            self._params, self._stats, self._state, self._loss = self._learner.steps(
                self._params,
                self._stats,
                self._state,
                *self._learner.train_set,
                indices,
                self._key,
                self._count,
                self._anchor,
            )
        self._count += steps

    def _train_narrow(self, indices: list[Any], width: float) -> None:
        """Local steps on a sub-network, with an optimiser of its own."""
        learner, seed = self._learner, self._learner.config.seed
        model, steps = learner.narrow(width)
        selection, params = draw_sub_network(model, self._params, seed, self._rank, self._rounds)
        state = model.init_optimizer(params)
        trained, self._stats, _, self._loss = steps(
            params,
            self._stats,
            state,
            *learner.train_set,
            indices,
            self._key,
            self._count,
            params,
        )
        self._params = subnetwork.insert(self._params, selection, trained)

    def _push(self, go_on: bool) -> tuple[Vector, float | None]:
        packer = self._learner.packer
        stats = self._stats if self._own_stats is None else self._own_stats
        out = np.empty(packer.layout.size, np.float32)  # what is given for none may be JAX's own
        update = packer.pack(self._params, stats, self._base, out)
        if most := self._learner.config.clip_update:
            clip(update, packer.layout.deltas, most)
        if go_on:
            self._pushed = packer.pack(self._params, self._stats)
        else:
            self._params = self._stats = self._base = self._anchor = None
        loss = None if self._loss is None else float(self._loss)
        return update, loss if loss is not None and np.isfinite(loss) else None
