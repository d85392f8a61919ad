"""`esync.Worker`: the few calls by which any training loop takes part in a run.

with esync.Worker("tcp://head:10010") as worker:
    params = worker.start(params)
    for batch in worker.batches(dataset):
        params, opt_state, loss = train_step(params, opt_state, batch)
        params = worker.step(params, loss=loss)
"""

from __future__ import annotations

import logging
import math
import operator
import os
import secrets
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

import jax
import numpy as np
import zmq

from esync import messages, transport
from esync.algorithms import algorithm
from esync.compression import Compressor
from esync.config import RunConfig, build
from esync.data import partition
from esync.device_memory import Array, put
from esync.errors import EsyncError, ModelError
from esync.keys import SERVER, load_client
from esync.messages import INITIAL, Join, Report
from esync.tensors import Parts, Vector
from esync.worker.assembly import Shards, Whole
from esync.worker.channel import RETRY_S, Push
from esync.worker.link import Ask, Link
from esync.worker.pytree import Packer, Tree, clip, is_batch_norm
from esync.worker.session import Action, Session, Totals

log = logging.getLogger("esync.worker")
GOODBYE_S = 5.0
"""How long the end of a run waits for its final model."""
LAST_MODEL_S = 2.5
"""How long of that an evaluator that evaluates the final model alone waits for it, before it takes an earlier one."""
UNEVEN_S = 2.0
"""How long an evaluator tries to have the same version of all shards."""
MOST_SAMPLES = 2**40
"""Of a local step; what a step says is added up, and numbers in messages end at 2**53."""


class Worker:
    """Takes part in a run. Its methods are for one thread at a time, of the process that made it.

    Args:
        state: the state server's endpoint; everything else comes from there. Default: $ESYNC_STATE, else port
            10010 of this machine.
        name: this worker's id, unique in the run; a worker that comes back under its id keeps its rank.
            Default: $ESYNC_NAME, else the host's name and six digits by chance.
        rank: the rank asked for; given if it is free. Default: $ESYNC_RANK, else the lowest free one.
        keys: the file NAME.key that esync-keys made for this worker, if the servers have keys. Default: $ESYNC_KEYS.
            Its ids begin with NAME then, and so does the default.
        wait_s: how long to wait for the state server's first answer.
        say: called with lines for the user, such as what is being waited for.

    Raises:
        KeysError: the keys cannot be used.
        TransportError: no state server answered in time, or it does not let these keys in.
        ProtocolError: the state server refused; the text says why.
    """

    def __init__(
        self,
        state: str = "",
        *,
        name: str = "",
        rank: int | None = None,
        device: str = "",
        role: str = "worker",
        keys: str | Path = "",
        wait_s: float = 60.0,
        context: zmq.Context[Any] | None = None,
        say: Callable[[str], None] = lambda text: None,
    ) -> None:
        state = state or os.environ.get(transport.STATE) or transport.DEFAULT_STATE
        keys = keys or os.environ.get(transport.KEYS, "")
        own = load_client(keys) if keys else None
        host = transport.hostname() if own is None or own.name == SERVER else own.name
        self.name = name or os.environ.get(transport.NAME) or f"{host}-{secrets.token_hex(3)}"
        if rank is None and os.environ.get(transport.RANK, "").isdigit():
            rank = int(os.environ[transport.RANK])
        messages.check_worker_id(self.name)
        join = Join(
            self.name,
            role,
            rank=rank,
            host=transport.hostname(),
            device=device or _device_name(),
            life=secrets.token_hex(4),
        )
        self._link = Link(
            state,
            join,
            wait_s=wait_s,
            keys=own,
            context=context or zmq.Context.instance(),
            say=say,
        )
        self._shared = self._link.shared
        self._changed = self._link.shared.changed
        self._packer: Packer | None = None
        self._base: Any = None
        self._basis: Whole | None = None  # the version that it is part of
        self._base_round = -1
        self._first_round = 0
        self._pushed: Any = None
        self._split_digest = ""
        self._ended = False
        self._on_round: Callable[[dict[str, Any]], None] = lambda row: None
        self._marks = Totals()
        self._link.start()
        try:
            with self._changed:
                self._wait(lambda: self._shared.welcome is not None)
            welcome = self._shared.welcome
            assert welcome is not None
            self.rank = welcome.rank
            self.shares = welcome.shares
            self.config = build(RunConfig, welcome.config, "run")
        except BaseException:
            self._link.close("failed to join")
            raise

    # Life

    def __enter__(self) -> Worker:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        reason = "done" if error is None else f"{type(error).__name__}: {error}"[:500]
        self.close("interrupted" if kind is KeyboardInterrupt else reason)

    def close(self, reason: str = "done") -> None:
        """Leave the run; the others do not wait for this worker any more."""
        session = self._shared.session
        if session is not None:
            self._link.inbox.put(
                Report(
                    self.name,
                    session.round,
                    session.step,
                    "leaving",
                    totals=self._wire_totals(session),
                )
            )
        self._link.close(reason)

    @property
    def stopped(self) -> bool:
        """Whether the run is over, and the last `step` (or `start`) has returned the final model."""
        return self._ended

    @property
    def round(self) -> int:
        """The version of the model that is being trained (or was watched last); -1: none yet."""
        return self._base_round

    @property
    def width(self) -> float:
        """The share of each hidden layer's units that this worker trains in this round (mode feddrop)."""
        session = self._shared.session
        return 1.0 if session is None else session.width

    @property
    def totals(self) -> Totals:
        """What this worker did and how long it took."""
        session = self._shared.session
        return Totals() if session is None else session.totals

    def on_round(self, callback: Callable[[dict[str, Any]], None]) -> None:
        """Have `callback` called with a row of figures after each of this worker's rounds."""
        self._on_round = callback

    # Training

    def start(
        self,
        params: Tree,
        stats: Tree = None,
        *,
        as_value: Callable[[str], bool] = is_batch_norm,
    ) -> Any:
        """Take up the cluster's model; returns when the run starts.

        Args:
            params: any pytree of floating-point arrays. The worker of rank 0 brings the initial model,
                unless the parameter server has one.
            stats: a pytree that is averaged as values (BatchNorm statistics), if there is one.
            as_value: which paths of `params` are averaged as values too.

        Returns:
            params, or (params, stats) if stats were given.

        Raises:
            ProtocolError: this model is not the run's.
        """
        self._prepare(params, stats, as_value)
        config = self.config
        session = Session(self.name, nonblocking=config.nonblocking, most=config.max_steps)
        assert self._packer is not None
        with self._changed:
            self._shared.session = session
        params, stats = self._next_model(params, stats, session)
        self._first_round = session.round
        params, stats = self._await_leave(params, stats, session)
        self._shared.resumed = time.perf_counter()
        return params if stats is None else (params, stats)

    def _prepare(self, params: Tree, stats: Tree, as_value: Callable[[str], bool]) -> None:
        """Register the model's layout."""
        if self._packer is not None:
            raise EsyncError("start was called twice; a worker starts once")
        packer = Packer(params, stats, as_value)
        with np.errstate(over="ignore"):  # is looked for
            initial = packer.pack(params, stats)
        _check_finite(initial, packer)
        # Once through everything that a round needs, so that it is compiled before the run starts.
        packer.pack(*packer.unpack([initial]))
        if self.config.overlap:
            packer.merge([initial], params, stats, packer.snapshot(params, stats))
        self._packer = packer
        layout = self.config.cut(packer.layout)
        encoding = self.config.encoding
        model = Shards(layout, encoding, barrier=self._barrier())
        with self._changed:
            self._shared.model = model
            self._shared.compressors = [
                Compressor(encoding, assembly.layout, (self.config.seed, self.rank, shard))
                for shard, assembly in enumerate(model.assemblies)
            ]
            self._shared.cuda = self._packer.cuda
            self._shared.initial = Push(
                initial, (INITIAL,) * layout.shards, ("",) * layout.shards, 0, 0
            )
            self._shared.phase = "waiting"
        self._link.inbox.put(self._packer.layout)
        with self._changed:
            self._wait(lambda: self._shared.accepted)

    def step(
        self,
        params: Tree,
        stats: Tree = None,
        *,
        loss: Any = None,
        samples: int | None = None,
    ) -> Any:
        """Tell that one local step is done; trains on, or synchronises when it is time.

        Args:
            params, stats: the trees after the step, as in `start`.
            loss: the step's training loss, to be shown to people.
            samples: samples in the step (default: the run's batch size).

        Returns:
            The model to go on from: the same, or the new global one; with stats, the pair.

        Raises:
            ProtocolError: the run refused this worker, for one because its update held NaN.
        """
        shared = self._shared
        session = shared.session
        if session is None or self._packer is None:
            raise EsyncError("call start before step")
        count = self.config.batch_size if samples is None else _count(samples)
        _wait_for(params)
        with self._changed:
            if session.final is None:  # what was still running when the run ended does not count
                resumed = shared.resumed
                session.finished(0.0 if resumed is None else time.perf_counter() - resumed, count)
            shared.resumed = None
        try:
            action, own = self._decide(loss), stats
            if session.round != self._base_round:
                params, stats = self._merge(params, stats, session)
            if action is Action.SYNC and self.config.overlap:
                params, stats = self._push_and_go_on(params, stats, own, loss, session)
            elif action is Action.SYNC:
                params, stats = self._synchronise(params, stats, loss, session)
                if self.config.asks_first:
                    params, stats = self._await_leave(params, stats, session)
            elif action is Action.STOP:
                params, stats = self._final_model(params, stats, session)
        finally:  # also for who goes on after an error
            shared.resumed = time.perf_counter()
        return params if stats is None else (params, stats)

    def _decide(self, loss: Any) -> Action:
        """Ask when it is time, wait if the answer is needed now."""
        shared, session, model = self._shared, self._shared.session, self._shared.model
        assert session is not None
        assert model is not None
        began, away = None, session.away
        asked_at = (
            time.monotonic()
        )  # or before: what was asked while the last step ran may be lost too
        with self._changed:
            while True:
                if shared.error is not None:
                    raise shared.error
                if session.wants_query():
                    self._link.inbox.put(session.query(_finite(loss)))
                    asked_at = time.monotonic()
                action = session.action()
                over = model.newer and not session.away
                if over and action is not Action.STOP and (session.step or action is Action.WAIT):
                    action = Action.SYNC  # the round ended without us: take up the new model
                if action is not Action.WAIT:
                    break
                if began is None:
                    began = time.perf_counter()
                if not session.step and self._barrier():
                    shared.awaiting = model.awaited  # it may be over without us, and its model lost
                shared.phase = "query"
                self._changed.wait(RETRY_S / 2)
                if time.monotonic() - asked_at > RETRY_S:
                    session.ask_again()
            if began is not None and not session.away:
                shared.awaiting = None
            shared.phase = "train"
        if began is not None and session.step and not away:
            session.totals.query_s += time.perf_counter() - began
        elif began is not None and session.round > self._first_round:  # not the run's start
            session.totals.sync_s += time.perf_counter() - began
        return action

    def _await_leave(self, params: Tree, stats: Tree, session: Session) -> tuple[Tree, Tree]:
        """Wait until this worker may train: for the run's start, or for its turn."""
        while not self._ended:
            action = self._decide(None)
            if action is Action.TRAIN:
                break
            take_up = self._final_model if action is Action.STOP else self._next_model
            params, stats = take_up(params, stats, session)
        return params, stats

    def _synchronise(
        self, params: Tree, stats: Tree, loss: Any, session: Session
    ) -> tuple[Tree, Tree]:
        """Push the update of this round, unless the round is over, and take up the next model."""
        began = time.perf_counter()
        model = self._shared.model
        assert self._packer is not None
        assert model is not None
        round, steps = session.round, session.step
        with self._changed:
            late = model.newer
            report = session.synchronising(_finite(loss))
            report.totals = self._wire_totals(session)
            self._shared.phase = "sync"
        if not late:
            self._link.inbox.put(report)
            update = self._packer.pack(params, stats, self._base, self._link.buffer())
            self._clip(update)
            if self._basis is None or self._basis.intact():  # else the round is over without us
                self._push(Push(update, model.begun, model.lives, steps, session.samples))
        params, stats = self._next_model(params, stats, session)
        session.totals.sync_s += time.perf_counter() - began
        self._row(round, steps, session, report.loss, late)
        return params, stats

    def _push_and_go_on(
        self, params: Tree, stats: Tree, own: Tree, loss: Any, session: Session
    ) -> tuple[Tree, Tree]:
        """Push the update of this round and train on; its model is merged when it is there.

        Args:
            own: the statistics to push: this worker's, also if `stats` were taken from a model just now.
        """
        began = time.perf_counter()
        shared, packer, model = self._shared, self._packer, self._shared.model
        assert packer is not None
        assert model is not None
        update = packer.pack(params, own, self._base, self._link.buffer())
        self._clip(update)
        self._pushed = packer.snapshot(params, stats, self._pushed)
        overwritten = self._basis is not None and not self._basis.intact()
        with self._changed:
            round, steps, samples = session.round, session.step, session.samples
            late = overwritten or model.newer
            begun, lives = model.begun, model.lives
            if not late:
                report = session.synchronising(_finite(loss))
                report.totals = self._wire_totals(session)
                session.pushed()
                shared.awaiting = model.awaited
        if late:
            return self._synchronise(params, stats, loss, session)
        self._link.inbox.put(report)
        self._push(Push(update, begun, lives, steps, samples))
        session.totals.sync_s += time.perf_counter() - began
        self._row(round, steps, session, report.loss, late)
        return params, stats

    def _clip(self, update: Vector | Array) -> None:
        """Scale an update down to `clip_update`, if the run has it."""
        if self.config.clip_update:
            assert self._packer is not None
            clip(update, self._packer.layout.deltas, self.config.clip_update)

    def _push(self, push: Push) -> None:
        """Send an update. From now on what is asked for is its effect."""
        with self._changed:
            self._shared.update = push
        self._link.inbox.put(push)

    def _merge(self, params: Tree, stats: Tree, session: Session) -> tuple[Tree, Tree]:
        """A round began while a step was running: add the progress since the push to its model."""
        began = time.perf_counter()
        packer = self._packer
        assert packer is not None
        _, (params, stats, self._base) = self._read(
            lambda parts: packer.merge(parts, params, stats, self._pushed)
        )
        self._base_round = session.round
        session.totals.sync_s += time.perf_counter() - began
        return params, stats

    def _await_model(self, session: Session) -> bool:
        """Wait for a model newer than this round's; False if the run ended instead."""
        shared, model = self._shared, self._shared.model
        assert model is not None
        with self._changed:
            shared.awaiting = model.awaited
            self._wait(lambda: model.newer or session.final is not None)
            shared.awaiting = None
            return model.newer

    def exchange(self, update: Vector | Array) -> Parts:
        """Synchronise a vector at once: what `step` does when it is told to, without a tree and without a policy.

        For measurements, and for a model that is one vector anyway, after `start`.

        Args:
            update: deltas, then values. shape=(layout.size,); not to be written to until this returns. A CuPy array
                will do where models are on its device.

        Returns:
            The new global model in pieces, where they arrived: not to be written to, and as they are only until the
            next exchange (and only for a worker that the barrier waits for). The last one if the run is over. Where
            the parameter server has it on this worker's device, they are CuPy arrays.
        """
        session, model = self._shared.session, self._shared.model
        if session is None or model is None:
            raise EsyncError("call start before exchange")
        if not isinstance(update, np.ndarray) or self.config.clip_update:
            buffer = self._link.buffer()
            put(update, buffer)
            update = buffer
            self._clip(update)
        self._push(Push(update, model.begun, model.lives, 1, self.config.batch_size))
        goes_on = self._await_model(session)
        with self._changed:
            newest = model.newest
            assert newest is not None
            if goes_on:
                model.begin(newest)
                session.begin(newest.version)
                self._base_round = newest.version
            else:
                self._ended = True
        return newest.parts

    def _next_model(self, params: Tree, stats: Tree, session: Session) -> tuple[Tree, Tree]:
        """Wait for a model newer than this round's, and begin its round."""
        shared, packer = self._shared, self._packer
        assert packer is not None
        if not self._await_model(session):
            return self._final_model(params, stats, session)
        whole, (params, new_stats, self._base) = self._read(packer.unpack)
        assert shared.model is not None
        with self._changed:
            shared.model.begin(whole)
            session.begin(whole.version)
            self._base_round = whole.version
            shared.phase = "train"
            if session.wants_query():
                self._link.inbox.put(session.query())
        return params, None if stats is None else new_stats

    def _read(self, make: Callable[[Parts], Any]) -> tuple[Whole, Any]:
        """(model, what `make` makes of it) of the newest model that is not overwritten meanwhile."""
        model = self._shared.model
        assert model is not None
        while True:
            newest = model.newest
            assert newest is not None
            made = make(newest.parts)
            if newest.is_shared:
                jax.block_until_ready(made)
            if newest.intact():
                self._basis = newest
                return newest, made
            log.info("version %d was overwritten while it was read", newest.version)
            with self._changed:
                self._shared.awaiting = newest.versions
                self._wait(lambda: model.newest is not newest)  # noqa: B023
                self._shared.awaiting = None

    def _final_model(self, params: Tree, stats: Tree, session: Session) -> tuple[Tree, Tree]:
        """The model with which the run ended, if it arrives soon; else the last one that did."""
        model = self._shared.model
        assert model is not None
        assert self._packer is not None
        self._ended = True
        deadline = time.monotonic() + GOODBYE_S
        with self._changed:
            while self._barrier() and time.monotonic() < deadline:
                final = session.final if session.final is not None else -1
                if model.version >= final:
                    break
                self._shared.awaiting = (final - 1,) * model.layout.shards
                self._changed.wait(0.2)
            self._shared.awaiting = None
        if model.newest is None:
            return params, stats
        _, (params, new_stats, self._base) = self._read(self._packer.unpack)
        return params, None if stats is None else new_stats

    def _barrier(self) -> bool:
        """Whether versions are everybody's: without a barrier a worker does not wait for others' versions."""
        return algorithm(self.config.mode).barrier

    def _wire_totals(self, session: Session) -> dict[str, Any]:
        totals = session.totals.to_wire()
        if self._split_digest:
            totals["split_digest"] = self._split_digest
        return totals

    def _row(
        self, round: int, steps: int, session: Session, loss: float | None, late: bool
    ) -> None:
        self._on_round(
            {
                "round": round,
                "steps": steps,
                **session.totals.since(self._marks),
                "loss": loss,
                "late": late,
            }
        )
        self._marks = Totals(**session.totals.to_wire())

    def _wait(self, condition: Callable[[], bool]) -> None:
        """Wait under the lock; in slices, so that Ctrl-C is heard."""
        while not condition():
            if self._shared.error is not None:
                raise self._shared.error
            self._changed.wait(0.5)

    def pause(self, seconds: float) -> None:
        """Sleep, but no longer than until the run is over: what emulates a slow machine."""
        deadline = time.monotonic() + seconds
        with self._changed:
            while not self._over() and self._shared.error is None:
                left = deadline - time.monotonic()
                if left <= 0:
                    return
                self._changed.wait(min(left, 0.5))

    # Evaluating

    def watch(
        self,
        params: Tree,
        stats: Tree = None,
        *,
        as_value: Callable[[str], bool] = is_batch_norm,
    ) -> Iterator[tuple[int, Tree, Tree]]:
        """For an evaluator: (version, params, stats) of the newest model, again and again until the final one.

        Models that were published while the caller was busy are passed over; between two of them at least
        the run's `evaluate_every_s` go by (0: only the final one). Nobody waits for this.
        """
        self._prepare(params, stats, as_value)
        assert self._packer is not None
        model, session = self._shared.model, Session(self.name, nonblocking=True)
        assert model is not None
        with self._changed:
            self._shared.session = session
        every = self.config.evaluate_every_s
        self._shared.phase = "idle"
        if every == 0:
            with self._changed:
                self._wait(lambda: session.final is not None)
        while True:
            began = time.monotonic()
            newest = self._newer_model(model, session)
            if newest is None:
                return
            params, stats, _ = self._packer.unpack(newest.parts)
            self._base_round = session.round
            self._shared.phase = "eval"
            yield session.round, params, stats
            self._shared.phase = "idle"
            self.pause(began + every - time.monotonic())

    def _newer_model(self, model: Shards, session: Session) -> Whole | None:
        """A model that was not seen yet, or None once the final one was (or does not come)."""
        shared, asked_at, ended_at, newer_at = self._shared, 0.0, None, None
        every = self.config.evaluate_every_s
        with self._changed:
            while True:
                if shared.error is not None:
                    raise shared.error
                now, awaited = time.monotonic(), model.awaited
                final = session.final
                rest = (
                    final is not None and model.version >= final and model.versions != model.begun
                )
                early = every == 0 and final is not None and model.version < final
                if early and now - (ended_at or now) < LAST_MODEL_S:
                    assert final is not None
                    awaited = (final - 1,) * model.layout.shards
                elif model.newer or rest:
                    newer_at = newer_at or now
                    even = len(set(model.versions)) == 1 or not self._barrier()
                    if even or now - newer_at > UNEVEN_S:
                        break
                    awaited = (max(model.versions) - 1,) * model.layout.shards
                if session.final is not None:
                    ended_at = ended_at or now
                    if session.round >= session.final or now - ended_at > GOODBYE_S:
                        return None
                shared.awaiting = awaited
                if now - asked_at > RETRY_S / 2:
                    asked_at = now
                    self._link.inbox.put(Ask())
                self._changed.wait(RETRY_S / 4)
            shared.awaiting = None
            newest = model.newest
            assert newest is not None
            model.begin(newest)
            session.round = newest.version
            return newest

    def report_accuracy(
        self, version: int, accuracy: float, loss: float | None, seconds: float
    ) -> None:
        """For an evaluator: what a version's test accuracy and loss are, and how long finding out took."""
        session = self._shared.session
        assert session is not None
        session.totals.eval_s += seconds
        self._link.inbox.put(
            Report(
                self.name,
                version,
                0,
                "eval",
                loss=_finite(loss),
                accuracy=accuracy,
                totals=session.totals.to_wire(),
            )
        )

    def _over(self) -> bool:
        session = self._shared.session
        return session is not None and session.final is not None

    # Data

    def indices(self, labels: Any, batch_size: int | None = None) -> Iterator[Any]:
        """Index arrays of this worker's batches, epoch after epoch, until the run is over.

        Args:
            labels: one per sample; only the split `by-class` looks at their values.
            batch_size: default: the run's. shape of each array=(batch_size,), dtype int32
        """
        size = self.config.batch_size if batch_size is None else batch_size
        labels = np.asarray(labels)
        if self.config.split == "by-class" and labels.ndim != 1:
            raise ModelError(
                f"for split = by-class labels are one number per sample, not shape={list(labels.shape)}"
            )
        parts = partition.split(labels, self.shares, self.config.split, self.config.seed)
        self._split_digest = partition.digest(parts)
        own = parts[self.rank % self.shares]
        for batch in partition.batches(own, size, self.config.seed, self.rank):
            if self.stopped:
                return
            yield batch

    def batches(
        self, dataset: Any, batch_size: int | None = None, labels: Any = None
    ) -> Iterator[Any]:
        """This worker's batches of a pytree of arrays whose first axis counts samples, until the run is over.

        Args:
            dataset: for example `(images, labels)`.
            labels: one per sample, for the split `by-class` (default: the last array of the tree; a dictionary's keys
                are in alphabetical order).
        """
        arrays = jax.tree_util.tree_leaves(dataset)
        counts = {len(array) for array in (*arrays, *(() if labels is None else (labels,)))}
        if len(counts) != 1:
            raise ModelError(
                f"the arrays of a data set and its labels have one length, these have {sorted(counts)}"
            )
        for index in self.indices(arrays[-1] if labels is None else labels, batch_size):
            yield jax.tree_util.tree_map(lambda array: array[index], dataset)  # noqa: B023


def _wait_for(params: Tree) -> None:
    """Wait until a step is done, to time it. What it makes is ready together, so the first and the last array are
    looked at: one of them may be none of its results. To ask all takes longer than all else that `step` does, and so
    does to have JAX look for them: dictionaries are gone down here.
    """
    first = last = params
    while isinstance(first, dict) and first:
        first = next(iter(first.values()))
    while isinstance(last, dict) and last:
        last = next(reversed(last.values()))
    if not (isinstance(first, jax.Array) and isinstance(last, jax.Array)):
        jax.block_until_ready(params)
    elif not (_is_there(first) and _is_there(last)):
        jax.block_until_ready((first, last))  # lets go of the interpreter, which the link may take


def _is_there(array: Any) -> bool:
    """Whether an array is known to be ready; not if it is gone, which JAX does not look at (and reads anyway)."""
    try:
        return not array.is_deleted() and bool(array.is_ready())
    except AttributeError:  # of an array that is not one of memory
        return False


def _check_finite(initial: Vector | Array, packer: Packer) -> None:
    """Raise ModelError if the initial model cannot be sent, with the name of a leaf."""
    if np.isfinite(initial).all():
        return
    for _, leaf, at in packer.places():
        if not np.isfinite(initial[at : at + leaf.size]).all():
            raise ModelError(
                f"the initial model holds NaN, infinity or a number beyond float32 in {leaf.path}"
            )


def _finite(loss: Any) -> float | None:
    """A loss as a number for a message; a diverged one is not one."""
    if hasattr(loss, "detach"):
        loss = loss.detach()  # PyTorch warns of a number made of what has a gradient
    try:
        value = None if loss is None else float(loss)
    except (TypeError, ValueError) as error:
        shape = list(np.shape(loss))
        what = f"shape={shape}" if shape else f"{loss!r:.80}"
        raise ModelError(f"loss is one number, not {what}") from error
    return value if value is not None and math.isfinite(value) else None


def _count(samples: Any) -> int:
    """A number of samples, of whatever type numbers are."""
    try:
        count = operator.index(samples)
    except TypeError:
        count = -1
    if not 0 <= count < MOST_SAMPLES:
        raise ModelError(f"samples is a whole number from 0 on, not {samples!r:.80}")
    return count


def _device_name() -> str:
    device = jax.devices()[0]
    return str(device.platform if device.platform == "cpu" else device.device_kind)
