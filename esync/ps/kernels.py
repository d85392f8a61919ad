"""What a CUDA device does to float32 vectors: each kernel reads its operands once and writes its result once.

All of them are one module, compiled in 0.2 s before anything is averaged. CuPy's own ElementwiseKernel would say the
same in fewer words, but each is compiled when it is first called, in the middle of a round, and with many vectors it
takes the host twice as long to launch (of ten, 14 microseconds to 7).

They make what `NumpyBackend` makes, to the bit: operations are in its order, and compiled without multiplying and
adding in one rounding. (Numbers below 1e-38 are 0 here: CuPy has its kernels compiled so.)
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from esync.errors import DeviceError

Array = Any
"""A one-dimensional CuPy array without gaps, of float32 where nothing else is said."""
Launch = Callable[..., Array]
"""`launch(vectors, numbers, out=None)`: a new vector, or `out`, which may be one of the vectors."""
MOST = 16
"""Vectors that one kernel adds up."""
THREADS = 256
"""In a block; each makes one element."""

_LOOK = """
extern "C" __global__ void find_bad(const float* x, int* bad, long long size)
{
    const long long i = (long long)blockIdx.x * blockDim.x + threadIdx.x;
    if (i < size && !isfinite(x[i])) *bad = 1;
}
"""


class _Kernel(NamedTuple):
    """What makes a vector of others: the expression is that of each element, in CUDA's C++."""

    name: str
    vectors: Sequence[str]
    numbers: Sequence[str]
    expression: str

    @property
    def code(self) -> str:
        vectors = [f"const float* {x}" for x in self.vectors]
        numbers = [f"float {x}" for x in self.numbers]
        return f"""
extern "C" __global__ void {self.name}({", ".join(vectors + numbers)}, float* out, long long size)
{{
    const long long i = (long long)blockIdx.x * blockDim.x + threadIdx.x;
    if (i < size) out[i] = {self.expression};
}}
"""


def _kernels() -> Iterator[_Kernel]:
    yield _Kernel("fill", ["like"], ["value"], "value")
    squares = "alpha * a[i] + beta * (b[i] * b[i])"
    yield _Kernel("blend_square", ["a", "b"], ["alpha", "beta"], squares)
    dcasgd = "base[i] + scale * (delta[i] - strength * (delta[i] * delta[i] * drift[i]))"
    yield _Kernel("compensate", ["base", "delta", "drift"], ["strength", "scale"], dcasgd)
    adam = "base[i] + scale * (m[i] / (sqrtf(v[i]) + epsilon))"
    yield _Kernel("adapt", ["base", "m", "v"], ["scale", "epsilon"], adam)
    for n in range(1, MOST + 1):
        xs, ws = [f"x{k}" for k in range(n)], [f"w{k}" for k in range(n)]
        total = " + ".join(f"w{k} * x{k}[i]" for k in range(n))
        yield _Kernel(f"add_{n}", xs, ws, total)
        step = f"base[i] + scale * ({total})"
        yield _Kernel(f"step_{n}", ["base", *xs], ["scale", *ws], step)


KERNELS = tuple(_kernels())
CODE = _LOOK + "".join(kernel.code for kernel in KERNELS)
"""All of them, in CUDA's C++."""


class Kernels:
    """The kernels, on one stream of one device.

    Attributes:
        add: `add[n - 1]([x_1, ..., x_n], [w_1, ..., w_n])` is the sum of `w_i * x_i`, from left to right.
        step: `step[n - 1]([base, x_1, ..., x_n], [scale, w_1, ..., w_n])` is `base + scale * sum`.
        fill: `fill([like], [value])` is as long, `value` everywhere.
        blend_square, compensate, adapt: the `Backend`'s.

    Raises:
        DeviceError: they cannot be compiled here.
    """

    def __init__(self, cupy: Any, device: Any, stream: Any) -> None:
        self._cupy, self._device, self._stream = cupy, device, stream
        module = cupy.RawModule(code=CODE, options=("-fmad=false",))
        with device:
            try:
                module.compile()
                self._find_bad = module.get_function("find_bad")
                functions = {x.name: module.get_function(x.name) for x in KERNELS}
            except Exception as error:  # of many kinds, by what is missing
                what = str(error).partition("\n")[0].rstrip(":. ")
                raise DeviceError(
                    f"CUDA device {device.id} is there, but CuPy cannot compile for it: {what}. It needs the CUDA "
                    "toolkit (pip install 'esync[cuda12]' has it) and a directory to write to (CUPY_CACHE_DIR); "
                    "or use --device cpu"
                ) from error
        launch = {x.name: self._launch(x, functions[x.name]) for x in KERNELS}
        self.add = [launch[f"add_{n}"] for n in range(1, MOST + 1)]
        self.step = [launch[f"step_{n}"] for n in range(1, MOST + 1)]
        self.fill, self.blend_square = launch["fill"], launch["blend_square"]
        self.compensate, self.adapt = launch["compensate"], launch["adapt"]

    def find_bad(self, x: Array, bad: Array) -> None:
        """Set the first element of `bad`, of int32, to 1 if an element of `x` is NaN or infinite. To be called with the
        device and the stream entered: for many vectors once."""
        self._find_bad(_blocks(x.size), (THREADS,), (x, bad, x.size))

    def _launch(self, kernel: _Kernel, function: Any) -> Launch:
        """What launches it. It looks at the operands itself, since nothing on the device would."""
        counts = len(kernel.vectors), len(kernel.numbers)

        def launch(xs: Sequence[Array], ws: Sequence[float], out: Array | None = None) -> Array:
            if (len(xs), len(ws)) != counts:
                raise ValueError(f"{kernel.name} takes {counts} operands, not {len(xs), len(ws)}")
            size = xs[0].size
            with self._device, self._stream:  # also where a new vector's memory will be used again
                if out is None:
                    out = self._cupy.empty(size, np.float32)
                for x in (*xs, out):
                    if x.nbytes != 4 * size or isinstance(x, np.ndarray):
                        raise ValueError(
                            f"expected {size} elements of float32 on the device, not {x.size} of {x.dtype}"
                        )
                function(_blocks(size), (THREADS,), (*xs, *map(np.float32, ws), out, size))
            return out

        return launch


def _blocks(size: int) -> tuple[int]:
    """The grid that has a thread for each element."""
    return (-(-size // THREADS),)
