"""Where chunks are added up: NumPy, or CuPy on a GPU, behind one interface.

An array of a backend is immutable once it has been published: new values are new arrays. That is what lets
ZeroMQ send a model without a copy while the next one is already being made.
"""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np

from esync.compression import is_finite
from esync.errors import DeviceError
from esync.tensors import Vector

Array = Any
"""A one-dimensional float32 array of the backend."""


class Backend(Protocol):
    """Arithmetic on float32 vectors of one device."""

    name: str
    in_host_memory: bool
    """Whether its arrays are NumPy's, so that it can write where others read."""

    def load(self, x: Vector) -> Array:
        """A vector in host memory as one of this backend; on the CPU without a copy."""

    def is_finite(self, x: Array) -> bool:
        """Whether no element is NaN or infinite."""

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

    def blend_square(self, a: Array, alpha: float, b: Array, beta: float) -> Array:
        """A new vector `alpha * a + beta * b * b`: a mean of squares that moves on."""

    def compensated(
        self, base: Array, delta: Array, drift: Array, strength: float, scale: float
    ) -> Array:
        """A new vector `base + scale * (delta - strength * delta * delta * drift)`: DC-ASGD's step."""

    def adaptive(self, base: Array, m: Array, v: Array, scale: float, epsilon: float) -> Array:
        """A new vector `base + scale * m / (sqrt(v) + epsilon)`: Adam's step."""

    def host(self, x: Array) -> Vector:
        """The vector in host memory; on the CPU without a copy."""


_overflow_is_checked_later = np.errstate(over="ignore", invalid="ignore", divide="ignore")


class NumpyBackend:
    """On the CPU."""

    name, in_host_memory = "cpu", True

    def load(self, x: Vector) -> Array:
        return x

    def is_finite(self, x: Array) -> bool:
        return is_finite(x)

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


class CupyBackend:
    """On a CUDA device: chunks go through pinned memory into device memory and are added up there.

    Raises:
        DeviceError: CuPy is not installed, or there is no such device.
    """

    in_host_memory = False

    def __init__(self, index: int = 0) -> None:
        try:
            import cupy
        except ImportError as error:
            raise DeviceError(
                "device cuda needs CuPy: pip install 'esync[cuda12]', or use --device cpu"
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
        self._cupy = cupy
        self._device = cupy.cuda.Device(index)
        self._device.use()
        self._pinned: Any = None
        self._axpy = cupy.ElementwiseKernel(
            "float32 x, float32 w", "float32 total", "total += w * x", "esync_axpy"
        )
        self._blend = cupy.ElementwiseKernel(
            "float32 a, float32 alpha, float32 b, float32 beta",
            "float32 out",
            "out = alpha * a + beta * b",
            "esync_blend",
        )
        self._blend_square = cupy.ElementwiseKernel(
            "float32 a, float32 alpha, float32 b, float32 beta",
            "float32 out",
            "out = alpha * a + beta * b * b",
            "esync_blend_square",
        )
        self._compensate = cupy.ElementwiseKernel(
            "float32 base, float32 delta, float32 drift, float32 strength, float32 scale",
            "float32 out",
            "out = base + scale * (delta - strength * delta * delta * drift)",
            "esync_compensate",
        )
        self._adapt = cupy.ElementwiseKernel(
            "float32 base, float32 m, float32 v, float32 scale, float32 epsilon",
            "float32 out",
            "out = base + scale * m / (sqrt(v) + epsilon)",
            "esync_adapt",
        )

    def load(self, x: Vector) -> Array:
        if self._pinned is None or self._pinned.size < x.size:
            memory = self._cupy.cuda.alloc_pinned_memory(x.nbytes)
            self._pinned = np.frombuffer(memory, np.float32, x.size)
        staging = self._pinned[: x.size]
        staging[:] = x
        loaded = self._cupy.empty(x.size, np.float32)
        loaded.set(staging)  # returns when the staging buffer may be used again
        return loaded

    def is_finite(self, x: Array) -> bool:
        return bool(self._cupy.isfinite(x).all())

    def filled(self, x: Array, value: float) -> Array:
        return self._cupy.full(x.size, value, np.float32)

    def scaled(self, x: Array, weight: float, out: Array | None = None) -> Array:
        return self._cupy.multiply(x, np.float32(weight), out=out)  # out may be x

    def add_scaled(self, total: Array, x: Array, weight: float) -> None:
        self._axpy(x, np.float32(weight), total)

    def blend(
        self, a: Array, alpha: float, b: Array, beta: float, out: Array | None = None
    ) -> Array:
        arguments = (a, np.float32(alpha), b, np.float32(beta))
        return self._blend(*arguments) if out is None else self._blend(*arguments, out)

    def blend_square(self, a: Array, alpha: float, b: Array, beta: float) -> Array:
        return self._blend_square(a, np.float32(alpha), b, np.float32(beta))

    def compensated(
        self, base: Array, delta: Array, drift: Array, strength: float, scale: float
    ) -> Array:
        return self._compensate(base, delta, drift, np.float32(strength), np.float32(scale))

    def adaptive(self, base: Array, m: Array, v: Array, scale: float, epsilon: float) -> Array:
        return self._adapt(base, m, v, np.float32(scale), np.float32(epsilon))

    def host(self, x: Array) -> Vector:
        return np.asarray(self._cupy.asnumpy(x))


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
