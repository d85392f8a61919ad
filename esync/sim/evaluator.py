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
        newest: the newest version and its chunks.
        known: the newest version that the state server knows of.
        report: hands a report to it.
    """

    def __init__(
        self,
        config: RunConfig,
        events: Events,
        evaluate: Callable[[Chunks], Future[tuple[float, float]]],
        newest: Callable[[], tuple[int, Chunks]],
        known: Callable[[], int],
        report: Callable[[Report], None],
    ) -> None:
        self._config, self._events = config, events
        self._evaluate, self._newest = evaluate, newest
        self._known, self._report = known, report
        self._under_way: list[tuple[int, Future[tuple[float, float]]]] = []
        self._evaluated_at = -math.inf
        self._last = 0
        self._waits = False

    def published(self, version: int) -> None:
        """A version is out. It, or the newest by then, is evaluated `evaluate_every_s` after the last."""
        every = self._config.evaluate_every_s
        if self._config.rounds == version:
            self._submit()
        elif every > 0 and not self._waits:
            self._waits = True
            due = self._evaluated_at + every
            if due <= self._events.now:
                self._look()
            else:
                self._events.at(due, self._look, routine=True)

    def _look(self) -> None:
        self._waits = False
        self._submit()
        self.heard()  # the state server may know of this version already

    def finish(self, version: int) -> None:
        """The run is over, with this version."""
        self._submit()
        self._collect(version)

    def heard(self) -> None:
        """The state server was told of a version."""
        if self._config.target_accuracy or len(self._under_way) > MANY:
            self._collect(self._known())

    def _submit(self) -> None:
        version, chunks = self._newest()
        if version > self._last:
            self._last, self._evaluated_at = version, self._events.now
            self._under_way.append((version, self._evaluate(chunks)))

    def _collect(self, newest: int) -> None:
        while self._under_way and self._under_way[0][0] <= newest:
            version, evaluation = self._under_way[0]
            accuracy, loss = evaluation.result()  # Ctrl-C comes here: nothing may be lost by it
            del self._under_way[0]
            self._report(Report(EVALUATOR, version, 0, "eval", loss=loss, accuracy=accuracy))
