"""Outer optimisers: what one step on a round's averaged delta makes of the model, chunk by chunk.

The averaged delta D points where the loss falls: minus a gradient. With lr the global learning rate, every optimiser
maps (w, D, its state) to (w, its state); the state is a list of vectors under a name, one per chunk. All vectors
are new ones, or made of the round's sum: what was published, or read by `state`, is never written to again.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from esync.config import RunConfig
from esync.errors import ModelError
from esync.ps.backend import Array, Backend
from esync.ps.kernels import Look

State = dict[str, Array]
"""One chunk's state: name -> vector."""
SMALLEST_EPSILON = 1e-12
"""In place of an epsilon of 0: where no delta ever came, 0 / 0 would have to be 0."""


@dataclass(frozen=True, slots=True)
class Step:
    """What a step makes of a chunk.

    Attributes:
        value, state: its new value and the optimiser's new state; nobody has asked yet whether they are finite.
        looks: what to ask that of (`Backend.are_finite`).
    """

    value: Array
    state: State
    looks: list[Array | Look]


class Outer(ABC):
    """An outer optimiser and its state.

    Args:
        chunks: how many chunks the model has.
        initial: the state's names, and what its vectors hold before a chunk's first step.
    """

    def __init__(self, backend: Backend, config: RunConfig, chunks: int, **initial: float) -> None:
        self.backend = backend
        self.config = config
        self._initial = initial
        self._state: dict[str, list[Array]] = {name: [None] * chunks for name in initial}

    def step(self, chunk: int, value: Array, total: Array, scale: float) -> Step:
        """A step on a chunk, given its value and the averaged delta D = `scale * total`; uses `total` up. To be taken
        (`take`) if what it makes is finite; until then nothing has changed."""
        new, state = self._step(value, total, scale, self._state_of(chunk, value))
        return Step(new, state, [new, *state.values()])

    def step_on(
        self,
        chunk: int,
        value: Array,
        deltas: Sequence[Array],
        weights: Sequence[float],
        scale: float,
        out: Array | None = None,
    ) -> Step:
        """`step` where the total has not been formed yet: it is `sum_i(weights[i] * deltas[i])`. `out`: where to make
        the new value or what leads to it."""
        return self.step(chunk, value, self.backend.weighted_sum(deltas, weights, out), scale)

    def take(self, chunk: int, step: Step) -> None:
        """The chunk's step is taken: the next one begins from its state."""
        for name, x in step.state.items():
            self._state[name][chunk] = x

    def _state_of(self, chunk: int, value: Array) -> State:
        state: State = {}
        for name, initial in self._initial.items():
            kept = self._state[name][chunk]
            state[name] = self.backend.filled(value, initial) if kept is None else kept
        return state

    @abstractmethod
    def _step(self, value: Array, total: Array, scale: float, state: State) -> tuple[Array, State]:
        """The new value and the new state; changes nothing."""

    def state(self) -> dict[str, list[Array]]:
        """Name -> one vector per chunk; None for a chunk without a step yet (values never have one)."""
        return {name: list(chunks) for name, chunks in self._state.items()}

    def load(self, state: dict[str, list[Array]]) -> None:
        """Go on from what `state` returned.

        Raises:
            ModelError: it is another optimiser's, or another model's.
        """
        ours = {name: len(chunks) for name, chunks in self._state.items()}
        theirs = {name: len(chunks) for name, chunks in state.items()}
        if theirs != ours:
            raise ModelError(
                f"the state of the outer optimiser {self.config.outer} has the chunks {ours}, this one {theirs}. "
                "Go on with the model and the outer optimiser of the run that wrote it"
            )
        self._state = {name: list(chunks) for name, chunks in state.items()}


class Sgd(Outer):
    """`w += lr * D`: the mean itself, if lr is 1. It has no state."""

    def __init__(self, backend: Backend, config: RunConfig, chunks: int) -> None:
        super().__init__(backend, config, chunks)

    def _step(self, value: Array, total: Array, scale: float, state: State) -> tuple[Array, State]:
        new = self.backend.blend(value, 1.0, total, self.config.outer_lr * scale, total)
        return new, state

    def step_on(
        self,
        chunk: int,
        value: Array,
        deltas: Sequence[Array],
        weights: Sequence[float],
        scale: float,
        out: Array | None = None,
    ) -> Step:
        lr = self.config.outer_lr
        new, look = self.backend.stepped(value, lr * scale, deltas, weights, out)
        return Step(new, {}, [look])


class Momentum(Outer):
    """`m = mu * m + D; w += lr * m`: server momentum (FedAvgM, Hsu et al. 2019), m = 0 at first."""

    def __init__(self, backend: Backend, config: RunConfig, chunks: int) -> None:
        super().__init__(backend, config, chunks, m=0.0)

    def _step(self, value: Array, total: Array, scale: float, state: State) -> tuple[Array, State]:
        m = self.backend.blend(state["m"], self.config.outer_momentum, total, scale)
        return self.backend.blend(value, 1.0, m, self.config.outer_lr), {"m": m}


class Nesterov(Outer):
    """`m = mu * m + D; w += lr * (D + mu * m)`: DiLoCo's outer step (Douillard et al. 2023), Nesterov's momentum
    as PyTorch writes it; m = 0 at first."""

    def __init__(self, backend: Backend, config: RunConfig, chunks: int) -> None:
        super().__init__(backend, config, chunks, m=0.0)

    def _step(self, value: Array, total: Array, scale: float, state: State) -> tuple[Array, State]:
        lr, mu = self.config.outer_lr, self.config.outer_momentum
        m = self.backend.blend(state["m"], mu, total, scale)
        new = self.backend.blend(total, lr * scale, m, lr * mu)
        self.backend.add_scaled(new, value, 1.0)
        return new, {"m": m}


class Adam(Outer):
    """FedAdam (Reddi et al. 2021, algorithm 2): no bias correction; m = 0 and v = tau^2 at first.

    `m = b1 * m + (1 - b1) * D; v = b2 * v + (1 - b2) * D^2; w += lr * m / (sqrt(v) + tau)`. The algorithm asks for
    an initial v of at least tau^2; this is the least. b1 is `outer_momentum`, b2 `outer_beta2`, tau `outer_epsilon`.
    """

    def __init__(self, backend: Backend, config: RunConfig, chunks: int) -> None:
        self._tau = max(config.outer_epsilon, SMALLEST_EPSILON)
        super().__init__(backend, config, chunks, m=0.0, v=self._tau**2)

    def _step(self, value: Array, total: Array, scale: float, state: State) -> tuple[Array, State]:
        beta1, beta2 = self.config.outer_momentum, self.config.outer_beta2
        mean = self.backend.scaled(total, scale)
        m = self.backend.blend(state["m"], beta1, mean, 1.0 - beta1)
        v = self.backend.blend_square(state["v"], beta2, mean, 1.0 - beta2)
        new = self.backend.adaptive(value, m, v, self.config.outer_lr, self._tau)
        return new, {"m": m, "v": v}


OUTER: dict[str, Callable[[Backend, RunConfig, int], Outer]] = {
    "sgd": Sgd,
    "momentum": Momentum,
    "nesterov": Nesterov,
    "adam": Adam,
}
"""Name in `[run]` -> outer optimiser."""
