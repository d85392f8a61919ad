"""Arithmetic on the CPU, and the calls that the GPU's makes."""

from __future__ import annotations

import re
import sys
import threading

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from esync import device_memory, tensors
from esync.config import RunConfig
from esync.errors import DeviceError
from esync.messages import INITIAL
from esync.ps.aggregation import Contribution, Mean
from esync.ps.backend import MOST, CupyBackend, NumpyBackend, backend_for
from esync.ps.kernels import FLAGS
from esync.ps.staging import BUFFERS
from esync.tensors import DELTA, VALUE, Layout, Leaf
from tests.cupy_stand_in import stand_in

numbers = st.floats(-100, 100, width=32)
vectors = arrays(np.float32, 5, elements=numbers)
scalars = st.sampled_from([0.0, 1.0, -1.0, 0.5, 3.0])


SUMS, COPIES = 0, 1
SCHEDULES = {
    "all late": lambda stream: 0.0,
    "sums late": lambda stream: float(stream != SUMS),
    "copies late": lambda stream: float(stream != COPIES),
    "all at once": lambda stream: 1.0,
    "any": lambda stream: 0.5,
}
"""Name -> what the stand-in's streams do before they must; the backend's are numbered as it makes them."""


@pytest.fixture
def cupy(monkeypatch):
    module = stand_in()
    monkeypatch.setitem(sys.modules, "cupy", module)
    return module


def frame(x):
    return np.frombuffer(np.asarray(x, np.float32).tobytes(), np.float32)


@pytest.fixture(params=["cpu", "cuda"])
def backend(request, monkeypatch):
    if request.param == "cuda":
        monkeypatch.setitem(sys.modules, "cupy", stand_in())
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
    """Runs CupyBackend's own code on a stand-in for CuPy made of NumPy: this checks which calls it makes, in which
    order and with which operands, not CUDA."""
    gpu, cpu = CupyBackend(1), NumpyBackend()
    assert gpu.name == "cuda:1"
    random = np.random.default_rng(0)
    frames = [frame(random.normal(size=9)) for _ in range(3)]
    a, b, c = (gpu.load(x) for x in frames)
    x, y, z = (cpu.load(x) for x in frames)

    def same(there, here, **close):
        np.testing.assert_allclose(gpu.host(there), here, **(close or {"rtol": 1e-6, "atol": 1e-6}))

    same(a, x, rtol=0)
    same(gpu.scaled(a, 3.0), cpu.scaled(x, 3.0))
    same(gpu.blend(a, 0.5, b, -2.0), cpu.blend(x, 0.5, y, -2.0))
    same(gpu.blend(a, 1.0, b, 2.0), cpu.blend(x, 1.0, y, 2.0))
    same(gpu.compensated(a, b, c, 0.4, 0.7), cpu.compensated(x, y, z, 0.4, 0.7))
    same(gpu.filled(a, 0.3), cpu.filled(x, 0.3), rtol=0)
    same(gpu.blend_square(a, 0.9, b, -2.0), cpu.blend_square(x, 0.9, y, -2.0))
    v, w = gpu.blend_square(c, 0.0, c, 1.0), cpu.blend_square(z, 0.0, z, 1.0)
    same(gpu.adaptive(a, b, v, 0.7, 0.1), cpu.adaptive(x, y, w, 0.7, 0.1))
    total, expected = gpu.scaled(a, 1.0), cpu.scaled(x, 1.0)
    for weight in (1.0, 2.5):
        gpu.add_scaled(total, b, weight)
        cpu.add_scaled(expected, y, weight)
    same(total, expected)
    assert gpu.blend(a, 2.0, total, 3.0, total) is total
    same(total, cpu.blend(x, 2.0, expected, 3.0, expected))
    assert gpu.scaled(total, 0.5, total) is total
    same(total, cpu.scaled(expected, 0.5))
    same(a, x, rtol=0)


@pytest.mark.parametrize("count", [1, 2, 3, MOST, MOST + 1, 3 * MOST])
def test_a_weighted_sum_is_what_its_terms_one_after_the_other_are(backend, count):
    random = np.random.default_rng(count)
    frames = [frame(random.normal(size=7)) for _ in range(count)]
    weights = [float(x) for x in random.normal(size=count)]
    xs = [backend.load(x) for x in frames]
    expected = sum(w * x.astype(np.float64) for w, x in zip(weights, frames, strict=True))
    near = {"rtol": 1e-4, "atol": 1e-5}
    np.testing.assert_allclose(backend.host(backend.weighted_sum(xs, weights)), expected, **near)
    for x, sent in zip(xs, frames, strict=True):
        np.testing.assert_array_equal(backend.host(x), sent)
    out = backend.filled(xs[0], 9.0)
    assert backend.weighted_sum(xs, weights, out) is out
    np.testing.assert_allclose(backend.host(out), expected, **near)
    xs[0] = backend.scaled(xs[0], 1.0)
    assert backend.weighted_sum(xs, weights, xs[0]) is xs[0]
    np.testing.assert_allclose(backend.host(xs[0]), expected, **near)


@pytest.mark.parametrize("count", [1, 2, MOST, MOST + 1, 3 * MOST])
def test_a_step_is_what_a_sum_and_a_blend_are_to_the_bit(backend, count):
    random = np.random.default_rng(count)
    base, *xs = (backend.load(frame(random.normal(size=7))) for _ in range(count + 1))
    weights = [float(x) for x in random.normal(size=count)]
    total = backend.weighted_sum(xs, weights)
    expected = backend.host(backend.blend(base, 1.0, total, 0.7)).copy()
    made, look = backend.stepped(base, 0.7, xs, weights)
    np.testing.assert_array_equal(backend.host(made), expected)
    out = backend.filled(base, 9.0)
    into, another = backend.stepped(base, 0.7, xs, weights, out)
    assert into is out
    np.testing.assert_array_equal(backend.host(out), expected)
    assert backend.are_finite([look, another, out]) == [True, True, True]


@pytest.mark.parametrize("count", [1, MOST, MOST + 1])
@pytest.mark.parametrize("bad", [np.nan, np.inf, 3e38])
def test_whether_a_step_is_finite_is_known_of_what_it_makes(backend, count, bad):
    base, good = (backend.load(frame(np.ones(7))) for _ in range(2))
    worse = backend.load(frame([1, 1, 1, 1, 1, 1, bad]))
    looks = [
        backend.stepped(base, 1.0, [*[good] * (count - 1), x], [10.0] * count)[1]
        for x in (good, worse, good, worse, good)
    ]
    assert backend.are_finite([*looks, good]) == [True, False, True, False, True, True]
    assert backend.are_finite(looks[1:3]) == [False, True]  # as often as one likes


# The GPU's calls on the stand-in: what waits for what, and what is used again. Not CUDA.


def busy(gpu):
    """More sums than there are buffers: true if every one of them is right."""
    random = np.random.default_rng(1)
    kept_frames = [frame(random.normal(size=6)) for _ in range(BUFFERS + 2)]
    kept = [gpu.load(x) for x in kept_frames]
    total, expected = gpu.scaled(gpu.load(kept_frames[0]), 1.0), kept_frames[0].copy()
    for _ in range(5 * BUFFERS):
        x = frame(random.normal(size=6))
        gpu.add_scaled(total, gpu.load(x), 0.5)
        expected += np.float32(0.5) * x
    results = [gpu.host(total), *(gpu.host(x) for x in kept)]
    return all(
        np.allclose(there, here, rtol=1e-5, atol=1e-5)
        for there, here in zip(results, [expected, *kept_frames], strict=True)
    )


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("seed", range(5))
def test_whichever_stream_is_late_every_sum_is_right(monkeypatch, schedule, seed):
    cupy = stand_in(seed=seed)
    monkeypatch.setitem(sys.modules, "cupy", cupy)
    cupy.schedule.hurry = SCHEDULES[schedule]
    assert busy(CupyBackend())
    assert cupy.schedule.pageable == 0


def forget(cupy, what, stream):
    """Have the stand-in forget a wait: by a stream, or by the host for a stream."""
    kind = cupy.cuda.Stream if what == "wait_event" else cupy.cuda.Event
    wait = getattr(kind, what)

    def wait_unless(self, *event):
        number = self.number if event else self.stream and self.stream.number
        if number != stream:
            wait(self, *event)

    setattr(kind, what, wait_unless)


@pytest.mark.parametrize(
    ("what", "stream", "schedule"),
    [
        ("wait_event", SUMS, "copies late"),
        ("wait_event", COPIES, "sums late"),
        ("synchronize", SUMS, "all late"),
        ("synchronize", COPIES, "all late"),
    ],
    ids=["sums-copies", "copies-sums", "host-result", "host-pinned"],
)
def test_each_wait_that_is_left_out_is_noticed_above(cupy, what, stream, schedule):
    cupy.schedule.hurry = SCHEDULES[schedule]
    forget(cupy, what, stream)
    assert not busy(CupyBackend())


def layout(monkeypatch):
    monkeypatch.setattr(tensors, "CHUNK_ELEMENTS", 8)
    return Layout((Leaf(DELTA, "w", (30,), "float32"), Leaf(VALUE, "s", (5,), "float32")))


def trained(backend, layout, **run):
    """A model after three rounds of three workers."""
    mean = Mean(layout, backend, RunConfig(mode="esync", weights="samples", **run))
    random = np.random.default_rng(2)

    def send(worker, round):
        for i, at in enumerate(layout.chunks):
            x = frame(random.normal(size=at.stop - at.start))
            mean.receive(
                Contribution(worker, round, i, backend.load(x), samples=1 + int(worker[1]))
            )

    send("w0", INITIAL)
    mean.set_members({f"w{rank}": rank for rank in range(3)})
    for round in range(3):
        for rank in range(3):
            send(f"w{rank}", round)
    assert mean.version == 3
    return np.concatenate([backend.host(x) for x in mean.chunks])


@pytest.mark.parametrize("outer", ["sgd", "momentum", "nesterov", "adam"])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_model_that_is_averaged_on_a_gpu_is_the_cpu_s(monkeypatch, cupy, schedule, outer):
    cupy.schedule.hurry = SCHEDULES[schedule]
    shape = layout(monkeypatch)
    there = trained(CupyBackend(), shape, outer=outer)
    here = trained(NumpyBackend(), shape, outer=outer)
    np.testing.assert_allclose(there, here, rtol=1e-5, atol=1e-5)


def test_the_gpu_is_the_same_one_in_whichever_thread_it_is_used(cupy):
    gpu, results = CupyBackend(1), []

    def work():
        x = gpu.load(frame([1.0, 2.0]))
        results.append((gpu.host(gpu.scaled(x, 2.0)), gpu.is_finite(x), x.device.id))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    ((doubled, finite, device),) = results
    np.testing.assert_array_equal(doubled, [2.0, 4.0])
    assert finite
    assert device == 1
    assert cupy.cuda.runtime.getDevice() == 0, "the caller's own device has changed"


def test_the_gpu_s_pinned_memory_is_taken_once_and_grows_only_when_it_must(cupy):
    gpu = CupyBackend()
    cupy.pinned.clear()
    for size in (3, 2) * 10:
        gpu.load(frame(np.arange(size)))
    assert cupy.pinned == [12, 8, 12, 8]
    for size in (2, 3) * 10:
        gpu.load(frame(np.arange(size)))
    assert cupy.pinned == [12, 8, 12, 8, 12, 12]
    assert cupy.schedule.pageable == 0


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_the_gpu_s_memory_for_what_is_loaded_is_used_again_once_nobody_has_it(cupy, schedule):
    cupy.schedule.hurry = SCHEDULES[schedule]
    gpu = CupyBackend()
    total = gpu.scaled(gpu.load(frame(np.zeros(5))), 1.0)
    kept, view = gpu.load(frame(np.arange(5))), gpu.load(frame(np.arange(5)))[1:3]
    before = len(cupy.memories)
    for _ in range(50):
        gpu.add_scaled(total, gpu.load(frame(np.ones(5))), 1.0)
    assert len(cupy.memories) <= before + BUFFERS
    np.testing.assert_array_equal(gpu.host(total), np.full(5, 50.0))
    np.testing.assert_array_equal(gpu.host(kept), np.arange(5))
    np.testing.assert_array_equal(gpu.host(view), [1, 2])


def test_what_came_back_from_the_gpu_is_not_written_to_again(cupy):
    gpu = CupyBackend()
    results = [gpu.host(gpu.load(frame([i, -i]))) for i in range(3 * BUFFERS)]
    np.testing.assert_array_equal(results, [[i, -i] for i in range(3 * BUFFERS)])


def test_a_chunk_that_is_looked_at_on_a_gpu_stays_there(cupy):
    gpu = CupyBackend()
    good, bad = gpu.load(frame(np.ones(1000))), gpu.load(frame([np.nan] * 1000))
    looked_at = [gpu.is_finite(x) for x in (good, bad, good, bad)]
    assert looked_at == [True, False, True, False]
    assert cupy.schedule.brought_back == []


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_look_that_nobody_waits_for_says_nothing_of_the_next(cupy, schedule):
    cupy.schedule.hurry = SCHEDULES[schedule]
    gpu = CupyBackend()
    base, good, bad = (gpu.load(frame([x] * 4)) for x in (1.0, 2.0, np.nan))
    before = len(cupy.pinned)
    for i in range(3 * FLAGS):
        gpu.stepped(base, 1.0, [bad if i % 2 else good], [1.0])  # dropped
    assert gpu.are_finite([good, bad, good]) == [True, False, True]
    assert len(cupy.pinned) <= before + 1
    kept = [gpu.stepped(base, 1.0, [x], [1.0])[1] for x in [good, bad] * FLAGS]
    assert gpu.are_finite(kept) == [True, False] * FLAGS


def test_every_operation_on_a_gpu_is_one_kernel(cupy):
    gpu = CupyBackend()
    a, b, c = (gpu.load(frame(np.ones(4))) for _ in range(3))
    for operation in (
        lambda: gpu.scaled(a, 2.0),
        lambda: gpu.scaled(a, 2.0, b),
        lambda: gpu.add_scaled(a, b, 2.0),
        lambda: gpu.blend(a, 2.0, b, 3.0),
        lambda: gpu.blend(a, 2.0, b, 3.0, b),
        lambda: gpu.blend_square(a, 2.0, b, 3.0),
        lambda: gpu.compensated(a, b, c, 0.5, 0.5),
        lambda: gpu.adaptive(a, b, c, 0.5, 0.5),
        lambda: gpu.weighted_sum([a] * MOST, [1.0] * MOST),
        lambda: gpu.stepped(a, 0.5, [b] * MOST, [1.0] * MOST),
        lambda: gpu.filled(a, 2.0),
        lambda: gpu.is_finite(a),
        lambda: gpu.are_finite([gpu.stepped(a, 0.5, [b], [1.0])[1]]),
    ):
        before = cupy.schedule.kernels
        operation()
        assert cupy.schedule.kernels == before + 1


def test_what_nothing_on_the_device_would_look_at_is_looked_at_before(cupy):
    gpu = CupyBackend()
    four, five = (gpu.load(frame(np.ones(n))) for n in (4, 5))
    before = cupy.schedule.kernels
    for operation in (
        lambda: gpu.add_scaled(four, five, 1.0),
        lambda: gpu.add_scaled(five, four, 1.0),
        lambda: gpu.scaled(four, 1.0, five),
        lambda: gpu.weighted_sum([five, four], [1.0, 1.0]),
    ):
        with pytest.raises(
            ValueError,
            match=r"expected [45] elements of float32 on the device, not [45] of float32",
        ):
            operation()
    for other in (np.ones(4, np.float32), cupy.ndarray(4, np.float64), cupy.ndarray(4, np.float16)):
        with pytest.raises(ValueError, match=f"float32 on the device, not 4 of {other.dtype}"):
            gpu.add_scaled(four, other, 1.0)
    with pytest.raises(ValueError, match=r"add_2 takes \(2, 2\) operands, not \(2, 1\)"):
        gpu.weighted_sum([four, four], [1.0])
    assert cupy.schedule.kernels == before


def test_a_gpu_that_cannot_be_compiled_for_is_said_to_be_so(cupy, monkeypatch):
    def fail(self, *args):
        raise RuntimeError("libnvrtc.so.12: cannot open shared object file:\n  looked at ...")

    for step in ("compile", "get_function"):
        with monkeypatch.context() as patch:
            patch.setattr(cupy.RawModule, step, fail)
            with pytest.raises(DeviceError) as refused:
                backend_for("cuda")
        said = str(refused.value)
        assert re.search(r"device 0 .*libnvrtc.*'esync\[cuda12\]'.*or use --device cpu", said)
        assert "\n" not in said


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


def test_a_cupy_that_cannot_be_imported_is_said_to_be_so(monkeypatch, tmp_path):
    """It makes a directory for its kernels when it is imported."""
    (tmp_path / "cupy.py").write_text("open('/nowhere/cache')\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "cupy", raising=False)
    with pytest.raises(DeviceError, match=r"/nowhere/cache.*CUPY_CACHE_DIR; or use --device cpu"):
        backend_for("cuda")
    assert re.search(r"/nowhere/cache.*CUPY_CACHE_DIR", device_memory.unsupported())


@pytest.mark.parametrize("device", ["", "gpu", "cuda:x", "cuda:-1", "cpu:0", "CUDA"])
def test_a_device_that_is_spelled_otherwise_is_refused(device):
    with pytest.raises(DeviceError, match="expected cpu, cuda or cuda:N"):
        backend_for(device)


def test_the_cpu_needs_no_index():
    assert backend_for("cpu").name == "cpu"
