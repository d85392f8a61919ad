"""What a virtual cluster trains, as the cluster sees it."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future
from typing import Any, Protocol

from esync.tensors import Layout, Vector

Chunks = Sequence[Any]
"""A model as the parameter server keeps it."""


class Trainee(Protocol):
    """One virtual worker's model. The calls say what happens to it, in order; nothing need be computed before
    `push`."""

    def adopt(self, chunks: Chunks) -> None:
        """It begins from this model."""

    def train(self, steps: int, width: float) -> None:
        """Local steps on a network of this width."""

    def push(self, *, go_on: bool) -> Future[tuple[Vector, float | None]]:
        """The update since `adopt` or `merge`, and the last step's loss; `go_on`: it trains on from where it is."""

    def merge(self, chunks: Chunks) -> None:
        """This model takes the place of the one before, with the progress since `push` added to it."""


class Lessons(Protocol):
    """What all virtual workers of a run share."""

    split_digest: str

    @property
    def layout(self) -> Layout:
        """The model's layout."""

    def initial(self) -> Vector:
        """The model that the run begins with."""

    def trainee(self, rank: int) -> Trainee:
        """The model of the worker of a rank."""

    def evaluate(self, chunks: Chunks) -> Future[tuple[float, float]]:
        """(accuracy, mean loss) of a model on the test set."""
