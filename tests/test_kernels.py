"""The kernels' own code, compiled for the CPU: what the stand-in for CuPy only reads as Python."""

from __future__ import annotations

import ctypes
import shutil
import subprocess

import numpy as np
import pytest

from esync.ps import kernels
from esync.ps.backend import NumpyBackend
from esync.ps.kernels import MOST, OPERANDS_BYTES, THREADS, write_operands

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
extern "C" void launch_{name}(unsigned blocks, unsigned threads, const Operands* operands)
{{
    blockDim.x = threads;
    for (blockIdx.x = 0; blockIdx.x < blocks; blockIdx.x++)
        for (threadIdx.x = 0; threadIdx.x < threads; threadIdx.x++)
            {name}(*operands);
}}
"""
SIZE = 3 * THREADS + 5


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    """The kernels, each with what launches it; without multiplying and adding in one rounding, as for CUDA."""
    code = [DEVICE, kernels.CODE, *(LAUNCH.format(name=x.name) for x in kernels.KERNELS)]
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


def launched(library, name, vectors, numbers, out=None):
    """(what the kernel makes, whether it finds it finite). After it nothing may be written."""
    made = np.full(SIZE + THREADS, np.nan, np.float32) if out is None else out
    flag = np.zeros(2, np.int32)
    operands = bytearray(OPERANDS_BYTES)
    addresses = [x.ctypes.data for x in (*vectors, made, flag)]
    write_operands(operands, addresses[:-2], numbers, addresses[-2], SIZE, addresses[-1], 7)
    getattr(library, f"launch_{name}")(
        *[ctypes.c_uint(x) for x in (-(-SIZE // THREADS), THREADS)],
        (ctypes.c_char * OPERANDS_BYTES).from_buffer(operands),
    )
    assert np.isnan(made[SIZE:]).all(), "written beyond the end"
    assert flag.tolist() in ([0, 0], [7, 0])
    return made[:SIZE], flag[0] == 0


def test_kernels_make_numpy_s_vectors_to_the_bit(library):
    cpu = NumpyBackend()
    a, b, c = (vector(seed) for seed in range(3))
    for name, vectors, numbers, here in (
        ("fill", [a], [0.3], cpu.filled(a, 0.3)),
        ("adapt", [a, b, c * c], [0.3, 0.1], cpu.adaptive(a, b, c * c, 0.3, 0.1)),
        ("compensate", [a, b, c], [0.3, 0.7], cpu.compensated(a, b, c, 0.3, 0.7)),
        ("blend_square", [a, b], [0.3, 0.7], cpu.blend_square(a, 0.3, b, 0.7)),
    ):
        made, finite = launched(library, name, vectors, numbers)
        np.testing.assert_array_equal(made, here, name)
        assert finite


@pytest.mark.parametrize("count", range(1, MOST + 1))
def test_sums_are_the_cpu_s_to_the_bit(library, count):
    cpu = NumpyBackend()
    base, *xs = (vector(seed) for seed in range(count + 1))
    ws = [1.0 + 0.3 * i for i in range(count)]
    made, _ = launched(library, f"add_{count}", xs, ws)
    np.testing.assert_array_equal(made, cpu.weighted_sum(xs, ws))
    made, _ = launched(library, f"step_{count}", [base, *xs], [0.7, *ws])
    np.testing.assert_array_equal(made, cpu.stepped(base, 0.7, xs, ws)[0])


def test_a_sum_may_be_made_where_an_operand_is(library):
    a, b = np.concatenate([vector(0), np.full(THREADS, np.nan, np.float32)]), vector(1)
    expected = NumpyBackend().blend(a[:SIZE], 0.3, b, 0.7)
    made, _ = launched(library, "add_2", [a, b], [0.3, 0.7], out=a)
    np.testing.assert_array_equal(made, expected)
    np.testing.assert_array_equal(a[:SIZE], expected)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_one_bad_element_is_found_and_none_beyond_the_end(library, bad):
    x = np.concatenate([vector(0), np.full(THREADS, bad, np.float32)])
    base = vector(1)
    for name, vectors, numbers in (
        ("look", [x], []),
        ("add_1", [x], [1.0]),
        ("step_1", [base, x], [1.0, 1.0]),
    ):
        assert launched(library, name, vectors, numbers)[1]
        for at in (0, SIZE // 2, SIZE - 1):
            good, x[at] = x[at], bad
            assert not launched(library, name, vectors, numbers)[1]
            x[at] = good


def test_a_number_that_float32_does_not_hold_is_infinite_as_numpy_s_is(library):
    made, finite = launched(library, "fill", [vector(0)], [1e39])
    assert np.isinf(made).all()
    assert not finite


def test_a_look_writes_nothing_where_there_is_nowhere_to_write(library):
    x = np.full(SIZE, np.nan, np.float32)
    operands = bytearray(OPERANDS_BYTES)
    write_operands(operands, [x.ctypes.data], [], 0, SIZE, 0, 7)
    library.launch_look(
        *[ctypes.c_uint(n) for n in (-(-SIZE // THREADS), THREADS)],
        (ctypes.c_char * OPERANDS_BYTES).from_buffer(operands),
    )  # else it ends here
