"""The kernels' own code, compiled for the CPU: what the stand-in for CuPy only reads as Python."""

from __future__ import annotations

import ctypes
import shutil
import subprocess

import numpy as np
import pytest

from esync.ps import kernels
from esync.ps.backend import NumpyBackend
from esync.ps.kernels import MOST, THREADS

COMPILER = shutil.which("g++") or shutil.which("clang++")
pytestmark = pytest.mark.skipif(COMPILER is None, reason="needs a C++ compiler: g++ or clang++")

DEVICE = """
#include <cmath>
using std::isfinite;
#define __global__
static struct { unsigned x; } blockIdx, blockDim, threadIdx;
"""
"""What CUDA's C++ has and C++ has not."""
LAUNCH = """
extern "C" void launch_{name}(unsigned blocks, unsigned threads, {inputs})
{{
    blockDim.x = threads;
    for (blockIdx.x = 0; blockIdx.x < blocks; blockIdx.x++)
        for (threadIdx.x = 0; threadIdx.x < threads; threadIdx.x++)
            {name}({names});
}}
"""
SIZE = 3 * THREADS + 5


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    """The kernels, each with what launches it; without multiplying and adding in one rounding, as for CUDA."""
    code = [DEVICE, kernels.CODE]
    for line in kernels.CODE.splitlines():
        if line.startswith('extern "C"'):
            name, inputs = line.removeprefix('extern "C" __global__ void ').rstrip(")").split("(")
            names = ", ".join(each.split()[-1].lstrip("*") for each in inputs.split(", "))
            code.append(LAUNCH.format(name=name, inputs=inputs, names=names))
    directory = tmp_path_factory.mktemp("kernels")
    (directory / "kernels.cpp").write_text("".join(code))
    subprocess.run(
        [
            str(COMPILER),
            *["-O1", "-Wall", "-Wdouble-promotion", "-Werror", "-ffp-contract=off"],
            *["-shared", "-fPIC", "-o", "kernels.so", "kernels.cpp"],
        ],
        check=True,
        cwd=directory,
        timeout=100,
    )
    return ctypes.CDLL(str(directory / "kernels.so"))


def vector(seed):
    return np.random.default_rng(seed).standard_normal(SIZE, np.float32)


def launched(library, name, vectors, numbers, blocks=-(-SIZE // THREADS)):
    """What the kernel makes, of as many threads as it is launched with; after it nothing may be written."""
    out = np.full(SIZE + THREADS, np.nan, np.float32)
    getattr(library, f"launch_{name}")(
        *[ctypes.c_uint(x) for x in (blocks, THREADS)],
        *[ctypes.c_void_p(x.ctypes.data) for x in vectors],
        *[ctypes.c_float(x) for x in numbers],
        ctypes.c_void_p(out.ctypes.data),
        ctypes.c_longlong(SIZE),
    )
    assert np.isnan(out[SIZE:]).all(), "written beyond the end"
    return out[:SIZE]


def test_kernels_make_numpy_s_vectors_to_the_bit(library):
    cpu = NumpyBackend()
    a, b, c = (vector(seed) for seed in range(3))
    for name, vectors, numbers, here in (
        ("fill", [a], [0.3], cpu.filled(a, 0.3)),
        ("adapt", [a, b, c * c], [0.3, 0.1], cpu.adaptive(a, b, c * c, 0.3, 0.1)),
        ("compensate", [a, b, c], [0.3, 0.7], cpu.compensated(a, b, c, 0.3, 0.7)),
        ("blend_square", [a, b], [0.3, 0.7], cpu.blend_square(a, 0.3, b, 0.7)),
    ):
        np.testing.assert_array_equal(launched(library, name, vectors, numbers), here, name)


@pytest.mark.parametrize("count", range(1, MOST + 1))
def test_sums_are_the_cpu_s_to_the_bit(library, count):
    cpu = NumpyBackend()
    base, *xs = (vector(seed) for seed in range(count + 1))
    ws = [1.0 + 0.3 * i for i in range(count)]
    np.testing.assert_array_equal(
        launched(library, f"add_{count}", xs, ws), cpu.weighted_sum(xs, ws)
    )
    np.testing.assert_array_equal(
        launched(library, f"step_{count}", [base, *xs], [0.7, *ws]), cpu.stepped(base, 0.7, xs, ws)
    )


def test_a_sum_may_be_made_where_an_operand_is(library):
    a, b = vector(0), vector(1)
    expected = NumpyBackend().blend(a, 0.3, b, 0.7)
    library.launch_add_2(
        *[ctypes.c_uint(x) for x in (-(-SIZE // THREADS), THREADS)],
        *[ctypes.c_void_p(x.ctypes.data) for x in (a, b)],
        *[ctypes.c_float(x) for x in (0.3, 0.7)],
        ctypes.c_void_p(a.ctypes.data),
        ctypes.c_longlong(SIZE),
    )
    np.testing.assert_array_equal(a, expected)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_one_bad_element_is_found_and_none_beyond_the_end(library, bad):
    def found(x):
        flag = ctypes.c_int(0)
        library.launch_find_bad(
            *[ctypes.c_uint(n) for n in (-(-SIZE // THREADS), THREADS)],
            ctypes.c_void_p(x.ctypes.data),
            ctypes.byref(flag),
            ctypes.c_longlong(SIZE),
        )
        return flag.value

    x = np.concatenate([vector(0), np.full(THREADS, bad, np.float32)])
    assert found(x) == 0
    for at in (0, SIZE // 2, SIZE - 1):
        good, x[at] = x[at], bad
        assert found(x) == 1
        x[at] = good
