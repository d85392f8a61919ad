"""Arithmetic on the CPU, and the calls that the GPU's makes."""

from __future__ import annotations

import ctypes
import sys
import types

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from esync.errors import DeviceError
from esync.ps.backend import CupyBackend, NumpyBackend, backend_for

numbers = st.floats(-100, 100, width=32)
vectors = arrays(np.float32, 5, elements=numbers)
scalars = st.sampled_from([0.0, 1.0, -1.0, 0.5, 3.0])


class FakeArray(np.ndarray):
    """Device memory: filled by `set` only, like CuPy's."""

    def set(self, source):
        assert isinstance(source, np.ndarray)
        assert source.dtype == self.dtype
        self[...] = source


def fake_cupy(devices=2):
    """A module with the parts of CuPy that the backend calls, on NumPy: kernels evaluate their expressions."""
    cupy = types.ModuleType("cupy")
    cupy.used = []
    cupy.multiply = np.multiply
    cupy.pinned = []

    class Device:
        def __init__(self, index):
            self.index = index

        def use(self):
            cupy.used.append(self.index)

    class ElementwiseKernel:
        def __init__(self, inputs, outputs, operation, name):
            assert name.startswith("esync_")
            self.names = [each.split() for each in inputs.split(", ")]
            (self.output,) = [each.split() for each in outputs.split(", ")]
            self.operation = operation

        def __call__(self, *values):
            values = list(values)
            target = values.pop() if len(values) > len(self.names) else None
            scope = {}
            for (kind, name), value in zip(self.names, values, strict=True):
                assert kind == "float32"
                assert value.dtype == np.float32, name
                scope[name] = value
            if target is None:
                shape = np.broadcast_shapes(*(np.shape(value) for value in values))
                target = np.empty(shape, np.float32).view(FakeArray)
            scope[self.output[1]] = target.copy()
            exec(self.operation, {"sqrt": np.sqrt}, scope)
            target[...] = scope[self.output[1]]
            return target

    def alloc_pinned_memory(size):
        cupy.pinned.append(size)
        return (ctypes.c_byte * max(512, size))()  # CuPy's pool rounds up too

    cupy.ElementwiseKernel = ElementwiseKernel
    cupy.empty = lambda size, dtype: np.full(size, np.nan, dtype).view(FakeArray)
    cupy.full = lambda size, value, dtype: np.full(size, value, dtype).view(FakeArray)
    cupy.asnumpy = lambda x: np.array(x)
    cupy.isfinite = np.isfinite
    cupy.cuda = types.SimpleNamespace(
        Device=Device,
        runtime=types.SimpleNamespace(getDeviceCount=lambda: devices),
        alloc_pinned_memory=alloc_pinned_memory,
    )
    return cupy


@pytest.fixture
def cupy(monkeypatch):
    module = fake_cupy()
    monkeypatch.setitem(sys.modules, "cupy", module)
    return module


def frame(x):
    return np.frombuffer(np.asarray(x, np.float32).tobytes(), np.float32)


@pytest.fixture(params=["cpu", "cuda"])
def backend(request, monkeypatch):
    if request.param == "cuda":
        monkeypatch.setitem(sys.modules, "cupy", fake_cupy())
    return backend_for(request.param)


def test_what_is_loaded_is_what_is_sent(backend):
    x = backend.load(frame([1.0, -2.5, 3e38]))
    assert bytes(backend.host(x)) == bytes(frame([1.0, -2.5, 3e38]))
    assert backend.host(x).nbytes == 12


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("at", [0, 3, 6])
def test_one_bad_element_is_found_wherever_it_is(backend, bad, at):
    x = np.ones(7, np.float32)
    assert backend.is_finite(backend.load(frame(x)))
    x[at] = bad
    assert not backend.is_finite(backend.load(frame(x)))


def test_a_sum_that_overflows_is_no_bad_element(backend):
    assert backend.is_finite(backend.load(frame([3e38, 3e38, 3e38])))
    assert not backend.is_finite(backend.load(frame([3e38, 3e38, np.nan])))
    assert not backend.is_finite(backend.load(frame([np.inf, -np.inf])))


def test_on_the_cpu_nothing_is_copied_in_or_out_and_a_frame_is_never_written_to():
    backend, source = NumpyBackend(), frame([1.0, 2.0])
    x = backend.load(source)
    assert np.shares_memory(x, source)
    assert np.shares_memory(backend.host(x), x)
    with pytest.raises(ValueError, match="read-only"):
        x[0] = 5.0


@given(vectors, vectors, vectors, scalars, scalars)
def test_the_operations_are_what_they_say(a, b, c, alpha, beta):
    backend = NumpyBackend()
    exact = [x.astype(np.float64) for x in (a, b, c)]
    near = {"rtol": 1e-4, "atol": 1e-2}
    np.testing.assert_allclose(backend.scaled(a, alpha), alpha * exact[0], **near)
    np.testing.assert_allclose(
        backend.blend(a, alpha, b, beta), alpha * exact[0] + beta * exact[1], **near
    )
    total = a.copy()
    backend.add_scaled(total, b, beta)
    np.testing.assert_allclose(total, exact[0] + beta * exact[1], **near)
    compensated = exact[0] + beta * (exact[1] - 0.01 * exact[1] ** 2 * exact[2])
    np.testing.assert_allclose(backend.compensated(a, b, c, 0.01, beta), compensated, **near)
    np.testing.assert_array_equal(backend.filled(a, alpha), [alpha] * 5)
    squares = alpha * exact[0] + beta * exact[1] ** 2
    np.testing.assert_allclose(backend.blend_square(a, alpha, b, beta), squares, **near)
    adapted = exact[0] + beta * exact[1] / (np.sqrt(np.abs(exact[2])) + 0.1)
    np.testing.assert_allclose(backend.adaptive(a, b, np.abs(c), beta, 0.1), adapted, **near)


@given(vectors, vectors, vectors)
def test_results_are_new_arrays_of_float32_and_the_operands_stay(a, b, c):
    backend = NumpyBackend()
    copies = [x.copy() for x in (a, b, c)]
    for result in (
        backend.scaled(a, 1.0),
        backend.blend(a, 1.0, b, 1.0),
        backend.blend(a, 0.0, b, 1.0),
        backend.blend(a, 0.5, b, 0.5),
        backend.compensated(a, b, c, 0.5, 1.0),
        backend.filled(a, 0.5),
        backend.blend_square(a, 0.5, b, 0.5),
        backend.adaptive(a, b, np.abs(c), 0.5, 0.1),
    ):
        assert result.dtype == np.float32
        assert not any(np.shares_memory(result, x) for x in (a, b, c))
    for x, copy in zip((a, b, c), copies, strict=True):
        np.testing.assert_array_equal(x, copy)


def test_the_gpu_s_calls_give_what_numpy_gives(cupy):
    """Runs CupyBackend's own code on a stand-in for CuPy made of NumPy: this checks which calls it makes and with
    which operands, not CUDA."""
    gpu, cpu = CupyBackend(1), NumpyBackend()
    assert gpu.name == "cuda:1"
    assert cupy.used == [1]
    random = np.random.default_rng(0)
    frames = [frame(random.normal(size=9)) for _ in range(3)]
    a, b, c = (gpu.load(x) for x in frames)
    x, y, z = (cpu.load(x) for x in frames)
    close = {"rtol": 1e-6, "atol": 1e-6}
    np.testing.assert_array_equal(a, x)
    np.testing.assert_allclose(gpu.scaled(a, 3.0), cpu.scaled(x, 3.0), **close)
    np.testing.assert_allclose(gpu.blend(a, 0.5, b, -2.0), cpu.blend(x, 0.5, y, -2.0), **close)
    np.testing.assert_allclose(gpu.blend(a, 1.0, b, 2.0), cpu.blend(x, 1.0, y, 2.0), **close)
    np.testing.assert_allclose(
        gpu.compensated(a, b, c, 0.4, 0.7), cpu.compensated(x, y, z, 0.4, 0.7), **close
    )
    np.testing.assert_array_equal(gpu.filled(a, 0.3), cpu.filled(x, 0.3))
    np.testing.assert_allclose(
        gpu.blend_square(a, 0.9, b, -2.0), cpu.blend_square(x, 0.9, y, -2.0), **close
    )
    v, w = gpu.blend_square(c, 0.0, c, 1.0), cpu.blend_square(z, 0.0, z, 1.0)
    np.testing.assert_allclose(
        gpu.adaptive(a, b, v, 0.7, 0.1), cpu.adaptive(x, y, w, 0.7, 0.1), **close
    )
    total, expected = gpu.scaled(a, 1.0), cpu.scaled(x, 1.0)
    for weight in (1.0, 2.5):
        gpu.add_scaled(total, b, weight)
        cpu.add_scaled(expected, y, weight)
    np.testing.assert_allclose(total, expected, **close)
    assert bytes(gpu.host(total)) == np.asarray(total).tobytes()
    np.testing.assert_array_equal(a, x)


def test_the_gpu_s_staging_memory_is_pinned_once_and_grows_only_when_it_must(cupy):
    """On the stand-in for CuPy, see above: the calls, not CUDA."""
    gpu = CupyBackend()
    first = gpu.load(frame([1.0, 2.0, 3.0]))
    second = gpu.load(frame([4.0, 5.0]))
    assert cupy.pinned == [12]
    np.testing.assert_array_equal(first, [1.0, 2.0, 3.0])
    np.testing.assert_array_equal(second, [4.0, 5.0])
    third = gpu.load(frame(np.arange(200.0)))
    assert cupy.pinned == [12, 800]
    np.testing.assert_array_equal(third, np.arange(200.0))


def test_a_gpu_that_is_not_there_is_said_to_be_so(cupy):
    with pytest.raises(DeviceError, match=r"no CUDA device 2: this machine has 2 \(0 to 1\)"):
        backend_for("cuda:2")


def test_a_driver_that_does_not_answer_is_said_to_be_so(cupy):
    def fail():
        raise RuntimeError("cudaErrorInsufficientDriver")

    cupy.cuda.runtime.getDeviceCount = fail
    with pytest.raises(DeviceError, match=r"cudaErrorInsufficientDriver.*nvidia-smi.*--device cpu"):
        backend_for("cuda")


def test_without_cupy_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "cupy", None)
    with pytest.raises(DeviceError, match=r"pip install 'esync\[cuda12\]', or use --device cpu"):
        backend_for("cuda")


@pytest.mark.parametrize("device", ["", "gpu", "cuda:x", "cuda:-1", "cpu:0", "CUDA"])
def test_a_device_that_is_spelled_otherwise_is_refused(device):
    with pytest.raises(DeviceError, match="expected cpu, cuda or cuda:N"):
        backend_for(device)


def test_the_cpu_needs_no_index():
    assert backend_for("cpu").name == "cpu"
