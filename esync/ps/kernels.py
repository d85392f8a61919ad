"""What a CUDA device does to float32 vectors: each kernel reads its operands once and writes its result once.

All of them are one module, compiled in 0.2 s before anything is averaged. CuPy's own ElementwiseKernel would say the
same in fewer words, but each is compiled when it is first called, in the middle of a round. A kernel takes what it
needs as one structure: CuPy turns each argument into what CUDA takes, and with one for each of ten vectors and their
weights that takes the host longer than everything else.

They make what `NumpyBackend` makes, to the bit: operations are in its order, and compiled without multiplying and
adding in one rounding. (Numbers below 1e-38 are 0 here: CuPy has its kernels compiled so.)

While it makes a vector a kernel can look whether that is finite (`Look`): nobody has to read it for that again.
"""

from __future__ import annotations

import struct
from array import array
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from esync.errors import DeviceError

Array = Any
"""A one-dimensional CuPy array without gaps, of float32 where nothing else is said."""
Launch = Callable[..., Array]
"""`launch(vectors, numbers, out=None, look=None)`: a new vector, or `out`, which may be one of the vectors."""
MOST = 16
"""Vectors that one kernel adds up."""
THREADS = 256
"""In a block; each makes one element."""
FLAGS = 1024
"""Looks that memory is taken for at once."""

_OPERANDS = f"""
struct Operands {{
    const float* x[{MOST + 1}];
    float w[{MOST + 1}];
    float* out;
    long long size;
    int* flag;
    int mark;
}};
"""
_STRUCTURE = struct.Struct(f"@{8 * (MOST + 1)}s{4 * (MOST + 1)}sPqPi0q")
"""The same as C, and CUDA, lay it out; `x` and `w` as bytes."""
OPERANDS_BYTES = _STRUCTURE.size


class _Kernel(NamedTuple):
    """What makes a vector of others: the expression is that of each element, in CUDA's C++, made of `vectors` and
    `numbers`."""

    name: str
    vectors: Sequence[str]
    numbers: Sequence[str]
    expression: str

    @property
    def code(self) -> str:
        elements = [
            f"const float {x} = o.x[{k}][i];"
            for k, x in enumerate(self.vectors)
            if x in self.expression  # of the others only the length matters
        ]
        numbers = [f"const float {x} = o.w[{k}];" for k, x in enumerate(self.numbers)]
        return f"""
extern "C" __global__ void {self.name}(const Operands o)
{{
    const long long i = (long long)blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= o.size) return;
    {" ".join(elements + numbers)}
    const float made = {self.expression};
    if (o.out) o.out[i] = made;
    if (o.flag && !isfinite(made)) *o.flag = o.mark;
}}
"""


def _kernels() -> Iterator[_Kernel]:
    yield _Kernel("look", ["x"], [], "x")
    yield _Kernel("fill", ["like"], ["value"], "value")
    yield _Kernel("blend_square", ["a", "b"], ["alpha", "beta"], "alpha * a + beta * (b * b)")
    dcasgd = "base + scale * (delta - strength * (delta * delta * drift))"
    yield _Kernel("compensate", ["base", "delta", "drift"], ["strength", "scale"], dcasgd)
    adam = "base + scale * (m / (sqrtf(v) + epsilon))"
    yield _Kernel("adapt", ["base", "m", "v"], ["scale", "epsilon"], adam)
    for n in range(1, MOST + 1):
        xs, ws = [f"x{k}" for k in range(n)], [f"w{k}" for k in range(n)]
        total = " + ".join(f"w{k} * x{k}" for k in range(n))
        yield _Kernel(f"add_{n}", xs, ws, total)
        yield _Kernel(f"step_{n}", ["base", *xs], ["scale", *ws], f"base + scale * ({total})")


KERNELS = tuple(_kernels())
CODE = _OPERANDS + "".join(kernel.code for kernel in KERNELS)
"""All of them, in CUDA's C++."""


def write_operands(
    memory: bytearray,
    vectors: Sequence[int],
    numbers: Sequence[float],
    out: int,
    size: int,
    flag: int,
    mark: int,
) -> None:
    """What a kernel takes, into memory of `OPERANDS_BYTES`.

    Args:
        vectors, out, flag: addresses; where `out` or `flag` is 0, nothing is written.
        numbers: float32 from here on; what is too large for that is infinite.
        size: elements of each vector.
        mark: what an element that is not finite leaves in the flag.
    """
    x, w = array("Q", vectors).tobytes(), array("f", numbers).tobytes()
    _STRUCTURE.pack_into(memory, 0, x, w, out, size, flag, mark)


class _Flag(NamedTuple):
    """Four bytes of pinned memory of the host, which the device writes to by itself. shape=(1,), dtype=int32."""

    address: int
    value: np.ndarray[Any, np.dtype[np.int32]]


class Look:
    """Whether all that one launch made was finite: known when the stream is past it.

    What is not finite leaves this look's mark in its flag. The next who gets the flag has another mark and is behind on
    the stream. So a flag needs no clearing, and goes back as soon as nobody asks any more.
    """

    __slots__ = ("_free", "flag", "mark")

    def __init__(self, free: deque[_Flag], mark: int) -> None:
        self.flag, self.mark = free.popleft(), mark
        self._free = free

    @property
    def is_finite(self) -> bool:
        return int(self.flag.value[0]) != self.mark

    def __del__(self) -> None:
        self._free.append(self.flag)


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
        self._free: deque[_Flag] = deque()
        self._mark = 0
        self._operands = bytearray(OPERANDS_BYTES)
        # CuPy gives a kernel by value what an array of one element holds.
        self._arguments = (np.frombuffer(self._operands, np.dtype((np.void, OPERANDS_BYTES))),)
        module = cupy.RawModule(code=CODE, options=("-fmad=false",))
        with device:
            try:
                module.compile()
                functions = {x.name: module.get_function(x.name) for x in KERNELS}
            except Exception as error:  # of many kinds, by what is missing
                what = str(error).partition("\n")[0].rstrip(":. ")
                raise DeviceError(
                    f"CUDA device {device.id} is there, but CuPy cannot compile for it: {what}. It needs the CUDA "
                    "toolkit (pip install 'esync[cuda12]' has it) and a directory to write to (CUPY_CACHE_DIR); "
                    "or use --device cpu"
                ) from error
        self._look = functions["look"]
        launch = {x.name: self._launch(x, functions[x.name]) for x in KERNELS}
        self.add = [launch[f"add_{n}"] for n in range(1, MOST + 1)]
        self.step = [launch[f"step_{n}"] for n in range(1, MOST + 1)]
        self.fill, self.blend_square = launch["fill"], launch["blend_square"]
        self.compensate, self.adapt = launch["compensate"], launch["adapt"]

    def new_look(self) -> Look:
        """For one launch."""
        if not self._free:
            with self._device:
                pinned = self._cupy.cuda.alloc_pinned_memory(4 * FLAGS)
            flags = np.ndarray((FLAGS,), np.int32, pinned)
            flags[:] = 0
            begin = flags.ctypes.data
            self._free.extend(_Flag(begin + 4 * i, flags[i : i + 1]) for i in range(FLAGS))
        self._mark = self._mark % (2**31 - 1) + 1
        return Look(self._free, self._mark)

    def look(self, x: Array) -> Look:
        """Look at a vector that has been made."""
        look = self.new_look()
        with self._device, self._stream:
            self._start(self._look, [x], [], None, x.size, look)
        return look

    def _launch(self, kernel: _Kernel, function: Any) -> Launch:
        """What launches it."""
        counts = len(kernel.vectors), len(kernel.numbers)

        def launch(
            xs: Sequence[Array],
            ws: Sequence[float],
            out: Array | None = None,
            look: Look | None = None,
        ) -> Array:
            if (len(xs), len(ws)) != counts:
                raise ValueError(f"{kernel.name} takes {counts} operands, not {len(xs), len(ws)}")
            size = xs[0].size
            with self._device, self._stream:  # also where a new vector's memory will be used again
                if out is None:
                    out = self._cupy.empty(size, np.float32)
                self._start(function, xs, ws, out, size, look)
            return out

        return launch

    def _start(
        self,
        function: Any,
        xs: Sequence[Array],
        ws: Sequence[float],
        out: Array | None,
        size: int,
        look: Look | None,
    ) -> None:
        """With the device and the stream entered; the operands are checked here, since nothing on the device would."""
        for x in xs if out is None else (*xs, out):
            if x.nbytes != 4 * size or isinstance(x, np.ndarray):
                raise ValueError(
                    f"expected {size} elements of float32 on the device, not {x.size} of {x.dtype}"
                )
        write_operands(
            self._operands,
            [x.data.ptr for x in xs],
            ws,
            0 if out is None else out.data.ptr,
            size,
            0 if look is None else look.flag.address,
            0 if look is None else look.mark,
        )
        function((-(-size // THREADS),), (THREADS,), self._arguments)
