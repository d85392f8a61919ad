"""The virtual evaluator: it costs no virtual time."""

from __future__ import annotations

import math
from collections.abc import Callable
from concurrent.futures import Future

from esync.config import RunConfig
from esync.messages import Report
from esync.sim.events import Events
from esync.sim.trainee import Chunks

EVALUATOR = "evaluator"
MANY = 8
"""More evaluations than so many are not under way at a time: each holds a model."""


class Evaluator:
    """Has versions of the model evaluated, and reports the results.

    Where the run does not end at an accuracy the results are not waited for, but reported when there are many.

    Args:
        evaluate: a model -> its accuracy and loss, when they are computed.
        known: the newest version that the state server knows of.
        report: hands a report to it.
    """

    def __init__(
        self,
        config: RunConfig,
        events: Events,
        evaluate: Callable[[Chunks], Future[tuple[float, float]]],
        known: Callable[[], int],
        report: Callable[[Report], None],
    ) -> None:
        self._config, self._events = config, events
        self._evaluate, self._known, self._report = evaluate, known, report
        self._under_way: list[tuple[int, Future[tuple[float, float]]]] = []
        self._evaluated_at = -math.inf
        self._last = 0

    def published(self, version: int, chunks: Chunks) -> None:
        """A version is out."""
        every = self._config.evaluate_every_s
        due = self._events.now - self._evaluated_at >= every > 0
        if due or self._config.rounds == version:
            self._evaluated_at = self._events.now
            self._submit(version, chunks)

    def finish(self, version: int, chunks: Chunks) -> None:
        """The run is over, with this version."""
        if version > self._last:
            self._submit(version, chunks)
        self._collect(version)

    def heard(self) -> None:
        """The state server was told of a version."""
        if self._config.target_accuracy or len(self._under_way) > MANY:
            self._collect(self._known())

    def _submit(self, version: int, chunks: Chunks) -> None:
        self._under_way.append((version, self._evaluate(chunks)))
        self._last = version

    def _collect(self, newest: int) -> None:
        while self._under_way and self._under_way[0][0] <= newest:
            version, evaluation = self._under_way[0]
            accuracy, loss = evaluation.result()  # Ctrl-C comes here: nothing may be lost by it
            del self._under_way[0]
            self._report(Report(EVALUATOR, version, 0, "eval", loss=loss, accuracy=accuracy))
