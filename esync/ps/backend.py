"""Where chunks are added up: NumPy, or CuPy on a GPU, behind one interface.

An array of a backend is immutable once it has been published: new values are new arrays. That is what lets
ZeroMQ send a model without a copy while the next one is already being made.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np

from esync.compression import is_finite, squared_norm
from esync.errors import DeviceError
from esync.ps.kernels import MOST, Kernels, Look
from esync.ps.staging import Staging
from esync.tensors import Vector

Array = Any
"""A one-dimensional float32 array of the backend."""


class Backend(Protocol):
    """Arithmetic on float32 vectors of one device."""

    name: str
    cuda: int | None
    """The CUDA device on which its arrays are, as this process counts; None: they are NumPy's."""
    at_once: int
    """How many bytes of vectors it pays to look at together; 0: each while it is in the cache."""

    def load(self, x: Array, *, pinned: bool = False) -> Array:
        """A vector in host memory as one of this backend; on the CPU without a copy, as what is one already is.

        A GPU does not look at it again, unless it is in memory that is `pinned` (`device_memory.pinned`): then until it
        is known whether what came of it is finite.
        """

    def put(self, x: Array, out: Vector, *, pinned: bool = False) -> None:
        """Copy a vector into memory of the host; it is there after `wait`."""

    def copied(self, x: Array, out: Array | None = None) -> Array:
        """A copy: a new vector, or `out`."""

    def wait(self) -> None:
        """Return when all that was asked for until now is done, so that another process may read it."""

    def is_finite(self, x: Array) -> bool:
        """Whether no element is NaN or infinite."""

    def are_finite(self, xs: Sequence[Array | Look]) -> list[bool]:
        """`is_finite` of each: of a vector, or of what `stepped` made."""

    def squared_norm(self, x: Array) -> float:
        """The sum of the squares, in float64; NaN or infinite if an element is."""

    def filled(self, x: Array, value: float) -> Array:
        """A new vector as long as `x`, `value` everywhere."""

    def scaled(self, x: Array, weight: float, out: Array | None = None) -> Array:
        """`weight * x`: the start of a sum. A new vector, or `out`."""

    def add_scaled(self, total: Array, x: Array, weight: float) -> None:
        """`total += weight * x`, in place."""

    def blend(
        self, a: Array, alpha: float, b: Array, beta: float, out: Array | None = None
    ) -> Array:
        """`alpha * a + beta * b`. A new vector, or `out`, which may be b."""

    def weighted_sum(
        self, xs: Sequence[Array], weights: Sequence[float], out: Array | None = None
    ) -> Array:
        """`sum_i(weights[i] * xs[i])`, from left to right. A new vector, or `out`, which may be the first of `xs`.

        What `scaled` and `add_scaled` do with one vector after the other; a GPU does it in one pass over memory.
        """

    def stepped(
        self,
        base: Array,
        scale: float,
        xs: Sequence[Array],
        weights: Sequence[float],
        out: Array | None = None,
    ) -> tuple[Array, Array | Look]:
        """`base + scale * sum_i(weights[i] * xs[i])`: what `weighted_sum` and `blend` do one after the other, to the
        bit; a GPU in one pass, in which it looks at the result, too. A new vector, or `out`; and what to ask
        `are_finite` of it."""

    def blend_square(self, a: Array, alpha: float, b: Array, beta: float) -> Array:
        """A new vector `alpha * a + beta * (b * b)`: a mean of squares that moves on."""

    def compensated(
        self, base: Array, delta: Array, drift: Array, strength: float, scale: float
    ) -> Array:
        """A new vector `base + scale * (delta - strength * (delta * delta * drift))`: DC-ASGD's step."""

    def adaptive(self, base: Array, m: Array, v: Array, scale: float, epsilon: float) -> Array:
        """A new vector `base + scale * (m / (sqrt(v) + epsilon))`: Adam's step."""

    def host(self, x: Array) -> Vector:
        """The vector in host memory; on the CPU without a copy."""


_overflow_is_checked_later = np.errstate(over="ignore", invalid="ignore", divide="ignore")


class NumpyBackend:
    """On the CPU."""

    name = "cpu"
    cuda: int | None = None
    at_once = 0

    def load(self, x: Array, *, pinned: bool = False) -> Array:
        return x

    def put(self, x: Array, out: Vector, *, pinned: bool = False) -> None:
        np.copyto(out, x)

    def copied(self, x: Array, out: Array | None = None) -> Array:
        if out is None:
            return x.copy()
        np.copyto(out, x)
        return out

    def wait(self) -> None:
        pass

    def is_finite(self, x: Array) -> bool:
        return is_finite(x)

    def are_finite(self, xs: Sequence[Array]) -> list[bool]:
        return [is_finite(x) for x in xs]

    def squared_norm(self, x: Array) -> float:
        return squared_norm(x)

    def filled(self, x: Array, value: float) -> Array:
        return np.full(x.size, value, np.float32)

    @_overflow_is_checked_later
    def scaled(self, x: Array, weight: float, out: Array | None = None) -> Array:
        return np.multiply(x, np.float32(weight), out=out)

    @_overflow_is_checked_later
    def add_scaled(self, total: Array, x: Array, weight: float) -> None:
        if weight == 1.0:
            np.add(total, x, out=total)
        else:
            total += np.float32(weight) * x

    @_overflow_is_checked_later
    def blend(
        self, a: Array, alpha: float, b: Array, beta: float, out: Array | None = None
    ) -> Array:
        if alpha == beta == 1.0:
            return np.add(a, b, out=out)
        out = np.multiply(b, np.float32(beta), out=out)
        if alpha == 1.0:
            out += a
        elif alpha != 0.0:
            out += np.float32(alpha) * a
        return out

    def weighted_sum(
        self, xs: Sequence[Array], weights: Sequence[float], out: Array | None = None
    ) -> Array:
        if len(xs) == 1:
            return self.scaled(xs[0], weights[0], out)
        total = self.blend(xs[1], weights[1], xs[0], weights[0], out)
        for x, weight in zip(xs[2:], weights[2:], strict=True):
            self.add_scaled(total, x, weight)
        return total

    def stepped(
        self,
        base: Array,
        scale: float,
        xs: Sequence[Array],
        weights: Sequence[float],
        out: Array | None = None,
    ) -> tuple[Array, Array]:
        total = self.weighted_sum(xs, weights, out)
        made = self.blend(base, 1.0, total, scale, total)
        return made, made

    @_overflow_is_checked_later
    def blend_square(self, a: Array, alpha: float, b: Array, beta: float) -> Array:
        out = np.multiply(b, b)
        out *= np.float32(beta)
        out += np.float32(alpha) * a
        return out

    @_overflow_is_checked_later
    def compensated(
        self, base: Array, delta: Array, drift: Array, strength: float, scale: float
    ) -> Array:
        out = delta * delta
        out *= drift
        out *= np.float32(-strength)
        out += delta
        out *= np.float32(scale)
        out += base
        return out

    @_overflow_is_checked_later
    def adaptive(self, base: Array, m: Array, v: Array, scale: float, epsilon: float) -> Array:
        out = np.sqrt(v)
        out += np.float32(epsilon)
        np.divide(m, out, out=out)
        out *= np.float32(scale)
        out += base
        return out

    def host(self, x: Array) -> Vector:
        return np.asarray(x)


LOOK_BYTES = 128 << 20
"""What is looked at together is memory besides the model, so it is no more than this, which takes a GPU longer to make
than the host waits."""


class CupyBackend:
    """On a CUDA device: chunks go through pinned memory into device memory (`esync.ps.staging`) and are added up there.

    Every operation is one kernel (`esync.ps.kernels`). They run one after the other on a stream of their own; nothing
    waits for them but `host`, `is_finite` and `are_finite`. Any thread may call, one at a time.

    Raises:
        DeviceError: CuPy is not installed or lacks what it needs, or there is no such device.
    """

    def __init__(self, index: int = 0) -> None:
        try:
            import cupy
        except ImportError as error:
            raise DeviceError(
                "device cuda needs CuPy: pip install 'esync[cuda12]', or use --device cpu"
            ) from error
        except Exception as error:  # it makes its cache's directory, for one
            raise DeviceError(
                f"CuPy cannot be imported: {error}. If it has no directory to write to, set CUPY_CACHE_DIR; or use "
                "--device cpu"
            ) from error
        try:
            count = int(cupy.cuda.runtime.getDeviceCount())
        except Exception as error:
            raise DeviceError(
                f"no CUDA device: {error}. Check nvidia-smi, or use --device cpu"
            ) from error
        if index >= count:
            raise DeviceError(
                f"there is no CUDA device {index}: this machine has {count} (0 to {count - 1})"
            )
        self.name = f"cuda:{index}"
        self.cuda: int | None = index
        self.at_once = LOOK_BYTES
        self._device = cupy.cuda.Device(index)
        with self._device:
            self._sums = cupy.cuda.Stream(non_blocking=True)
            self._done = cupy.cuda.Event(disable_timing=True)
        self._staging = Staging(cupy, self._device, self._sums)
        self._kernels = Kernels(cupy, self._device, self._sums)

    def load(self, x: Array, *, pinned: bool = False) -> Array:
        return self._staging.load(x, pinned=pinned) if isinstance(x, np.ndarray) else x

    def put(self, x: Array, out: Vector, *, pinned: bool = False) -> None:
        self._staging.put(x, out, pinned=pinned)

    def copied(self, x: Array, out: Array | None = None) -> Array:
        return self._kernels.add[0]([x], [1.0], out)

    def wait(self) -> None:
        with self._device:
            self._done.record(self._sums)
            self._done.synchronize()

    def is_finite(self, x: Array) -> bool:
        return self.are_finite([x])[0]

    def are_finite(self, xs: Sequence[Array | Look]) -> list[bool]:
        looks = [x if isinstance(x, Look) else self._kernels.look(x) for x in xs]
        self.wait()
        return [look.is_finite for look in looks]

    def squared_norm(self, x: Array) -> float:
        return squared_norm(self.host(x))

    def filled(self, x: Array, value: float) -> Array:
        return self._kernels.fill([x], [value])

    def scaled(self, x: Array, weight: float, out: Array | None = None) -> Array:
        return self._kernels.add[0]([x], [weight], out)

    def add_scaled(self, total: Array, x: Array, weight: float) -> None:
        self._kernels.add[1]([total, x], [1.0, weight], total)

    def blend(
        self, a: Array, alpha: float, b: Array, beta: float, out: Array | None = None
    ) -> Array:
        return self._kernels.add[1]([a, b], [alpha, beta], out)

    def weighted_sum(
        self, xs: Sequence[Array], weights: Sequence[float], out: Array | None = None
    ) -> Array:
        while len(xs) > MOST:
            out = self._kernels.add[-1](xs[:MOST], weights[:MOST], out)
            xs, weights = [out, *xs[MOST:]], [1.0, *weights[MOST:]]
        return self._kernels.add[len(xs) - 1](xs, weights, out)

    def stepped(
        self,
        base: Array,
        scale: float,
        xs: Sequence[Array],
        weights: Sequence[float],
        out: Array | None = None,
    ) -> tuple[Array, Look]:
        look = self._kernels.new_look()
        if len(xs) > MOST:
            out = self.weighted_sum(xs, weights, out)
            xs, weights = [out], [1.0]
        return self._kernels.step[len(xs) - 1]([base, *xs], [scale, *weights], out, look), look

    def blend_square(self, a: Array, alpha: float, b: Array, beta: float) -> Array:
        return self._kernels.blend_square([a, b], [alpha, beta])

    def compensated(
        self, base: Array, delta: Array, drift: Array, strength: float, scale: float
    ) -> Array:
        return self._kernels.compensate([base, delta, drift], [strength, scale])

    def adaptive(self, base: Array, m: Array, v: Array, scale: float, epsilon: float) -> Array:
        return self._kernels.adapt([base, m, v], [scale, epsilon])

    def host(self, x: Array) -> Vector:
        return self._staging.host(x)


def backend_for(device: str) -> Backend:
    """The backend of a `--device` option: cpu, cuda or cuda:N.

    Raises:
        DeviceError: there is no such device here.
    """
    kind, _, index = device.partition(":")
    if device == "cpu":
        return NumpyBackend()
    if kind == "cuda" and (not index or index.isdigit()):
        return CupyBackend(int(index or 0))
    raise DeviceError(f"device {device!r}: expected cpu, cuda or cuda:N")
