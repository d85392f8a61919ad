"""Memory of a device that processes share, on the stand-in for CuPy: the calls and their order, not CUDA. What only
a GPU can show is in test_gpu.py."""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import subprocess
import sys
import types

import jax.numpy as jnp
import numpy as np
import pytest

from esync import device_memory
from esync.device_memory import (
    ALIGNED,
    PAGE,
    DeviceMemoryError,
    DeviceRegion,
    from_jax,
    size_of,
    to_jax,
    unsupported,
)
from esync.errors import EsyncError
from esync.tensors import DELTA, VALUE, Layout, Leaf
from tests.cupy_stand_in import Gpu, stand_in

LAYOUT = Layout((Leaf(DELTA, "w", (100,), "float32"), Leaf(VALUE, "s", (50,), "float32")))


class Process:
    """Within `with`, this process is another one: with a CuPy and memory of its own, on the same GPU."""

    def __init__(self, monkeypatch, gpu):
        self.monkeypatch, self.cupy, self.offered = monkeypatch, stand_in(gpu), set()

    def __enter__(self):
        with contextlib.ExitStack() as stack:
            patch = stack.enter_context(self.monkeypatch.context())
            patch.setitem(sys.modules, "cupy", self.cupy)
            patch.setattr(device_memory, "_offered", self.offered)
            self.stack = stack.pop_all()
        return self.cupy

    def __exit__(self, *args):
        self.stack.close()


@pytest.fixture
def gpu():
    return Gpu()


@pytest.fixture
def owner(monkeypatch, gpu):
    return Process(monkeypatch, gpu)


@pytest.fixture
def reader(monkeypatch, gpu):
    return Process(monkeypatch, gpu)


def loaded(cupy, values, device=0):
    """An array on a device whose values are there."""
    values = np.asarray(values)
    with cupy.cuda.Device(device):
        array = cupy.empty(values.shape, values.dtype)
    array.now()[...] = values
    return array


def vector(seed):
    return np.random.default_rng(seed).normal(size=LAYOUT.size).astype(np.float32)


def test_what_one_process_writes_another_reads_at_once(owner, reader):
    with owner as cupy:
        mine = DeviceRegion.create(LAYOUT, 2, 1)
        offer = mine.offer()
    with reader:
        theirs = DeviceRegion.open(LAYOUT, 2, offer)
        assert theirs.index == 1
    with owner as cupy:
        mine.write(1, 0, loaded(cupy, vector(1), 1))
        mine.write(0, 0, loaded(cupy, vector(0), 1))
        mine.write(0, 30, loaded(cupy, np.zeros((2, 5), np.float32), 1))
    expected = vector(0)
    expected[30:40] = 0
    with reader:
        np.testing.assert_array_equal(theirs.whole(1).get(), vector(1))
        np.testing.assert_array_equal(theirs.whole(0).get(), expected)
        chunks = [theirs.chunk(0, i).get() for i in range(len(LAYOUT.chunks))]
        np.testing.assert_array_equal(np.concatenate(chunks), expected)


def test_write_returns_when_the_values_are_there(owner, reader):
    """The stand-in's streams do nothing before they must."""
    with owner as cupy:
        mine = DeviceRegion.create(LAYOUT, 1)
        mine.write(0, 0, loaded(cupy, vector(1)))
        np.testing.assert_array_equal(mine.whole(0).now(), vector(1))


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"boot": "another"}, "another machine"),
        ({"boot": ""}, "another machine"),
        (
            {"device": "00" * 16},
            r"on the CUDA device 00+, and this process has .*CUDA_VISIBLE_DEVICES",
        ),
        ({"handle": bytes(64)}, "does not open the handle: cudaErrorInvalidResourceHandle"),
        ({"handle": bytes(63)}, "a handle has 64 bytes, this one 63"),
        ({"size": 8}, f"it has 8 bytes, not {PAGE}"),
    ],
)
def test_what_cannot_be_opened_is_refused_and_it_is_said_why(owner, reader, change, why):
    with owner:
        mine = DeviceRegion.create(LAYOUT, 1)
        offer = dataclasses.replace(mine.offer(), **change)
    with reader as cupy, pytest.raises(DeviceMemoryError, match=why):
        DeviceRegion.open(LAYOUT, 1, offer)
    assert not cupy.opened


def test_memory_of_one_s_own_is_not_opened_again(owner):
    with owner, pytest.raises(DeviceMemoryError, match="this process's own"):
        DeviceRegion.open(LAYOUT, 1, DeviceRegion.create(LAYOUT, 1).offer())


def test_a_device_that_is_not_visible_under_the_same_index_is_found(owner, reader, gpu):
    with owner:
        mine = DeviceRegion.create(LAYOUT, 1, 1)
        offer = mine.offer()
    with reader as cupy:
        cupy.cuda.runtime.getDeviceProperties = lambda i: {"uuid": gpu.uuids[1 - i]}
        for handle, (process, memory, _) in gpu.offered.items():
            gpu.offered[handle] = (process, memory, 0)  # as this process counts
        assert DeviceRegion.open(LAYOUT, 1, offer).index == 0


def test_the_owner_s_memory_is_given_back_once_nobody_has_a_view_of_it(owner):
    with owner as cupy:
        before = len(cupy.memories)
        mine = DeviceRegion.create(LAYOUT, 2)
        assert len(cupy.memories) == before + 1
        view = mine.chunk(0, 0)
        mine.close()
        mine.close()
        gc.collect()
        assert len(cupy.memories) == before + 1
        with pytest.raises(DeviceMemoryError, match="closed"):
            mine.offer()
        del view
        gc.collect()
        assert len(cupy.memories) == before
        mine = DeviceRegion.create(LAYOUT, 2)
        del mine
        gc.collect()
        assert len(cupy.memories) == before


def test_a_reader_closes_what_it_opened_once_and_the_owner_keeps_it(owner, reader):
    with owner as cupy:
        mine = DeviceRegion.create(LAYOUT, 1)
        mine.write(0, 0, loaded(cupy, vector(1)))
        offer = mine.offer()
    with reader as cupy:
        theirs = DeviceRegion.open(LAYOUT, 1, offer)
        assert len(cupy.opened) == 1
        theirs.close()
        del theirs
        gc.collect()
        assert not cupy.opened
    np.testing.assert_array_equal(mine.whole(0).now(), vector(1))


def test_what_is_still_being_read_when_memory_is_closed_is_read_to_the_end(owner):
    with owner as cupy:
        mine = DeviceRegion.create(LAYOUT, 1)
        mine.write(0, 0, loaded(cupy, vector(1)))
        copy = cupy.empty(LAYOUT.size, np.float32)
        copy.data.copy_from_device_async(mine.whole(0).data, copy.nbytes)
        copy.now()[:] = np.nan
        mine.close()
        del mine
        gc.collect()
        np.testing.assert_array_equal(copy.now(), vector(1))


@pytest.mark.parametrize(
    ("x", "device", "start", "why"),
    [
        (np.zeros(3), 0, 0, r"expected float32 without gaps, not float64 \(3,\)"),
        (np.zeros(3, np.float32), 1, 0, "the array is on CUDA device 1, the memory on 0"),
        (np.zeros(3, np.float32), 0, 148, "3 elements from 148 on are more than the 150 of a slot"),
        (np.zeros(3, np.float32), 0, -1, "3 elements from -1 on"),
    ],
)
def test_what_does_not_fit_is_not_written(owner, x, device, start, why):
    with owner as cupy:
        mine = DeviceRegion.create(LAYOUT, 1)
        with pytest.raises(DeviceMemoryError, match=why):
            mine.write(0, start, loaded(cupy, x, device))


def test_an_array_with_gaps_is_not_written(owner):
    with owner as cupy:
        mine, x = DeviceRegion.create(LAYOUT, 1), loaded(cupy, np.zeros(3, np.float32))
        x.flags.c_contiguous = False
        with pytest.raises(DeviceMemoryError, match="without gaps"):
            mine.write(0, 0, x)


def test_a_device_that_does_not_give_the_memory_is_said_not_to(owner):
    with owner as cupy:
        with pytest.raises(DeviceMemoryError, match="no CUDA device 2: this machine has 2"):
            DeviceRegion.create(LAYOUT, 1, 2)

        def fail(*args):
            raise cupy.cuda.runtime.CUDARuntimeError("cudaErrorMemoryAllocation: out of memory")

        mine = DeviceRegion.create(LAYOUT, 1)
        cupy.cuda.runtime.malloc = cupy.cuda.runtime.ipcGetMemHandle = fail
        with pytest.raises(DeviceMemoryError, match=f"does not give {PAGE} bytes: .*out of memory"):
            DeviceRegion.create(LAYOUT, 1)
        with pytest.raises(DeviceMemoryError, match="does not share memory between processes"):
            mine.offer()


def test_an_allocation_is_whole_pages_and_slots_are_aligned(owner):
    assert size_of(LAYOUT, 1) == PAGE
    big = Layout((Leaf(DELTA, "w", (PAGE // 4 + 1,), "float32"),))
    assert size_of(big, 2) == 3 * PAGE
    with owner:
        mine = DeviceRegion.create(LAYOUT, 3)
        starts = [mine.whole(slot).data.ptr for slot in range(3)]
        assert [start - starts[0] for start in starts] == [0, 2 * ALIGNED, 4 * ALIGNED]


def test_a_jax_array_that_is_not_on_a_cuda_device_is_refused(owner):
    with owner, pytest.raises(DeviceMemoryError, match=r"not on a CUDA device, but on .*Cpu"):
        from_jax(jnp.ones(3))


def test_a_jax_array_of_several_devices_is_refused(owner):
    def several():
        raise BufferError("__dlpack__ only supported for unsharded arrays.")

    with owner, pytest.raises(DeviceMemoryError, match=r"not on one device: .*unsharded"):
        from_jax(types.SimpleNamespace(__dlpack_device__=several))


def test_a_jax_array_is_lent_once_it_is_there_and_not_copied(owner):
    with owner as cupy:
        there = loaded(cupy, vector(1))
        there.now()[:] = np.nan

        class Computing:
            """As a JAX array on a GPU: not there before somebody waits."""

            on_device = there

            def block_until_ready(self):
                there.now()[:] = vector(1)
                return self

            def __dlpack_device__(self):
                return 2, 0

            def __dlpack__(self, *, stream=None, max_version=None, dl_device=None, copy=None):
                assert not np.isnan(there.now()).any()
                return there

        lent = from_jax(Computing())
        assert lent.data.ptr == there.data.ptr


def test_what_is_given_to_jax_is_a_copy():
    """NumPy's arrays know DLPack too: this runs JAX's side of it."""
    source = vector(1)
    given = to_jax(source)
    expected, source[:] = source.copy(), 0
    np.testing.assert_array_equal(given, expected)


def test_without_cupy_it_is_said_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "cupy", None)
    assert "pip install 'esync[cuda12]'" in unsupported()
    for attempt in (
        lambda: DeviceRegion.create(LAYOUT, 1),
        lambda: from_jax(jnp.ones(3)),
    ):
        with pytest.raises(DeviceMemoryError, match="CuPy is not installed: pip install"):
            attempt()


def test_a_machine_without_a_device_or_a_driver_is_said_to_be_so(owner):
    with owner as cupy:
        assert unsupported() == ""
        cupy.cuda.runtime.getDeviceCount = lambda: 0
        assert unsupported() == "this machine has no CUDA device"

        def fail():
            raise cupy.cuda.runtime.CUDARuntimeError("cudaErrorInsufficientDriver")

        cupy.cuda.runtime.getDeviceCount = fail
        assert "cudaErrorInsufficientDriver. Check nvidia-smi" in unsupported()


def test_other_systems_are_said_not_to_share(monkeypatch):
    monkeypatch.setattr(sys, "platform", "darwin")
    assert "Linux only" in unsupported()


def test_a_device_memory_error_is_one_of_esync_s():
    assert issubclass(DeviceMemoryError, EsyncError)


def test_importing_it_imports_neither_cupy_nor_jax():
    code = "import sys, esync.device_memory; print({'cupy', 'jax'} & sys.modules.keys())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
