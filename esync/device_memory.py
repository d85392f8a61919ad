"""Memory of a CUDA device that processes of one machine share: what `esync.shared_memory` is for the host's.

Its owner allocates it and offers it by a handle that CUDA makes of it (CUDA IPC); whoever is offered it and has the
same device opens it. Both can read and write: CUDA has no mapping for reading only. What a chunk holds the memory does
not say itself: that goes beside it, as a message or as the stamps of a `shared_memory.Region`.

Neither process waits for the other's streams. So `write` returns when the values are there, and only then its reader
may be told; and the reader tells its owner when it has done with them. The owner keeps the memory until every reader
has closed it: what they see of memory that is freed before is not defined.

CuPy and JAX are imported when they are needed: without CuPy this module says that it is not supported, and why.
"""

from __future__ import annotations

import sys
import weakref
from dataclasses import dataclass
from typing import Any

import numpy as np

from esync.messages import Offer
from esync.shared_memory import PAGE as HOST_PAGE
from esync.shared_memory import Region, SharedMemoryError, boot_id
from esync.tensors import Layout, Vector

Array = Any
"""A CuPy array of float32."""
HANDLE_BYTES = 64
PAGE = 1 << 21
"""An allocation is whole pages of CUDA's: with a handle to part of one all of the page would be shared."""
ALIGNED = 512
"""Slots begin at multiples of so many bytes, as CUDA's own allocations do."""
CUDA_MEMORY = 2
"""The device type of CUDA memory in DLPack."""
READ_ONLY = 8
"""CUDA's flag for memory of the host that is mapped for reading only."""

_offered: set[bytes] = set()  # by this process: CUDA opens a handle in other processes only


class DeviceMemoryError(SharedMemoryError):
    """Memory of a device that was offered and cannot be used: the exchange goes through the host instead."""


def unsupported() -> str:
    """Why processes cannot share a device's memory here, and what to do; empty where they can."""
    if sys.platform != "linux":
        return "CUDA shares memory between processes on Linux only"
    try:
        import cupy
    except ImportError:
        return "CuPy is not installed: pip install 'esync[cuda12]'"
    except Exception as error:  # it makes its cache's directory, for one
        return f"CuPy cannot be imported: {error}. If it has no directory to write to, set CUPY_CACHE_DIR"
    try:
        if cupy.cuda.runtime.getDeviceCount() == 0:
            return "this machine has no CUDA device"
    except Exception as error:
        return f"no CUDA device: {error}. Check nvidia-smi"
    return ""


def _cupy() -> Any:
    why = unsupported()
    if why:
        raise DeviceMemoryError(why)
    import cupy

    return cupy


@dataclass(frozen=True, slots=True)
class DeviceOffer:
    """What another process needs to open the memory.

    Attributes:
        boot: which machine, since its last start.
        device: the device's UUID in hexadecimal; its index may be another one in another process.
        handle: CUDA's, of the whole allocation. 64 bytes
        size: bytes of the allocation.
    """

    boot: str
    device: str
    handle: bytes
    size: int


class _Allocation:
    """Memory on a device until its end: `end(address)` is called then, with nothing on the device in progress."""

    def __init__(self, cupy: Any, index: int, address: int, end: Any) -> None:
        self.address = address
        weakref.finalize(self, _end, cupy, index, address, end)


def _end(cupy: Any, index: int, address: int, end: Any) -> None:
    try:
        with cupy.cuda.Device(index):
            cupy.cuda.runtime.deviceSynchronize()
            end(address)
    except cupy.cuda.runtime.CUDARuntimeError:
        pass  # the device, or the process, is going down: so is the memory


class DeviceRegion:
    """The chunks of `slots` models, in the memory of a device.

    Attributes:
        index: the device, as CUDA counts them in this process.
    """

    def __init__(
        self, cupy: Any, layout: Layout, slots: int, index: int, allocation: _Allocation
    ) -> None:
        self.layout, self.index = layout, index
        self._cupy = cupy
        self._allocation: _Allocation | None = allocation
        memory = cupy.cuda.UnownedMemory(
            allocation.address, size_of(layout, slots), allocation, index
        )
        with cupy.cuda.Device(index):
            self._slots = [
                cupy.ndarray(
                    (layout.size,),
                    np.float32,
                    cupy.cuda.MemoryPointer(memory, slot * _slot_bytes(layout)),
                )
                for slot in range(slots)
            ]

    @classmethod
    def create(cls, layout: Layout, slots: int, index: int = 0) -> DeviceRegion:
        """New memory on a device, this process's own.

        Raises:
            DeviceMemoryError: it is not supported here, there is no such device, or it has not that much memory left.
        """
        cupy, size = _cupy(), size_of(layout, slots)
        runtime = cupy.cuda.runtime
        if not 0 <= index < runtime.getDeviceCount():
            raise DeviceMemoryError(
                f"there is no CUDA device {index}: this machine has {runtime.getDeviceCount()}"
            )
        try:
            with cupy.cuda.Device(index):
                address = runtime.malloc(size)  # not a pool's: a handle is of a whole allocation
        except runtime.CUDARuntimeError as error:
            raise DeviceMemoryError(
                f"CUDA device {index} does not give {size} bytes: {error}"
            ) from error
        return cls(cupy, layout, slots, index, _Allocation(cupy, index, address, runtime.free))

    def offer(self) -> DeviceOffer:
        """What the owner tells other processes of this machine.

        Raises:
            DeviceMemoryError: it is closed, or CUDA cannot share it.
        """
        if self._allocation is None:
            raise DeviceMemoryError("it is closed")
        runtime = self._cupy.cuda.runtime
        try:
            with self._cupy.cuda.Device(self.index):
                handle = bytes(runtime.ipcGetMemHandle(self._allocation.address))
        except runtime.CUDARuntimeError as error:
            raise DeviceMemoryError(
                f"CUDA device {self.index} does not share memory between processes: {error}"
            ) from error
        _offered.add(handle)
        size = size_of(self.layout, len(self._slots))
        return DeviceOffer(boot_id(), _uuid(self._cupy, self.index), handle, size)

    @classmethod
    def open(cls, layout: Layout, slots: int, offer: DeviceOffer) -> DeviceRegion:
        """The memory that another process offers.

        Raises:
            DeviceMemoryError: it is another machine's, another device's, or not what it is said to be.
        """
        if not offer.boot or offer.boot != boot_id():
            raise DeviceMemoryError("it is another machine's")
        if len(offer.handle) != HANDLE_BYTES:
            raise DeviceMemoryError(
                f"a handle has {HANDLE_BYTES} bytes, this one {len(offer.handle)}"
            )
        if offer.size != size_of(layout, slots):
            raise DeviceMemoryError(f"it has {offer.size} bytes, not {size_of(layout, slots)}")
        if offer.handle in _offered:
            raise DeviceMemoryError("it is this process's own")
        cupy = _cupy()
        runtime = cupy.cuda.runtime
        devices = [_uuid(cupy, i) for i in range(runtime.getDeviceCount())]
        if offer.device not in devices:
            raise DeviceMemoryError(
                f"it is on the CUDA device {offer.device}, and this process has {', '.join(devices)}; "
                "see CUDA_VISIBLE_DEVICES"
            )
        index = devices.index(offer.device)
        try:
            with cupy.cuda.Device(index):
                address = runtime.ipcOpenMemHandle(offer.handle)
        except runtime.CUDARuntimeError as error:
            raise DeviceMemoryError(
                f"CUDA device {index} does not open the handle: {error}"
            ) from error
        allocation = _Allocation(cupy, index, address, runtime.ipcCloseMemHandle)
        return cls(cupy, layout, slots, index, allocation)

    def whole(self, slot: int) -> Array:
        """A slot's vector, on the device. shape=(layout.size,)"""
        return self._slots[slot]

    def chunk(self, slot: int, chunk: int) -> Array:
        """One chunk of it."""
        at = self.layout.chunks[chunk]
        return self._slots[slot][at.start : at.stop]

    def write(self, slot: int, start: int, x: Array) -> None:
        """`put` an array into a slot, from element `start` on.

        Raises:
            DeviceMemoryError: it is not what `put` takes, or too long.
        """
        if start < 0 or start + x.size > self.layout.size:
            raise DeviceMemoryError(
                f"{x.size} elements from {start} on are more than the {self.layout.size} of a slot"
            )
        put(x, self._slots[slot][start : start + x.size])

    def close(self) -> None:
        """Let go of the memory: it is given back once nobody has a view of it any more. A second call does nothing."""
        self._slots, self._allocation = [], None


def shared(layout: Layout, slots: int, index: int) -> Region:
    """New memory on a device, this process's own, whose stamps are in memory of the host.

    Raises:
        SharedMemoryError: one of the two is not to be had, or CUDA cannot share it.
    """
    device = DeviceRegion.create(layout, slots, index)
    device.offer()
    return Region.create(layout, slots).on(device)


def opened(layout: Layout, slots: int, offer: Offer, index: int | None) -> Region:
    """The memory that another process of this machine offers, the host's or a device's.

    Args:
        index: the only device that will do, as CUDA counts them in this process; None: none will.

    Raises:
        SharedMemoryError: it is another machine's, another device's, or not what it is said to be.
    """
    region = Region.open(layout, slots, offer)
    if not offer.device:
        return region
    here = uuid_of(index)
    if offer.device != here:
        raise DeviceMemoryError(f"it is on the CUDA device {offer.device}, not on {here or 'none'}")
    there = DeviceOffer(offer.boot, offer.device, offer.handle, offer.size)
    return region.on(DeviceRegion.open(layout, slots, there))


def uuid_of(index: int | None) -> str:
    """What a device is called on all of the machine; empty for none, and where devices do not share memory."""
    return "" if index is None or unsupported() else _uuid(_cupy(), index)


class _Pin:
    """Memory of the host stays pinned, and mapped, as long as somebody has this."""


def pinned(region: Region, index: int | None, *, waits: bool = True) -> Region:
    """The region, of which what lies in memory of the host is pinned for a device, if CUDA does that: the device copies
    from and to it by itself then, at the speed of the bus, where else a thread of the host copies along.

    Args:
        index: the device; None: there is none, and nothing happens.
        waits: whoever copies waits until that is done. Else who lets go of the region waits for the device.
    """
    if index is None or region.device is not None or unsupported():
        return region
    cupy, pin = _cupy(), _Pin()
    runtime = cupy.cuda.runtime
    try:
        with cupy.cuda.Device(index):
            for slot in range(len(region.stamps)):
                memory = region.extent(slot)
                first = memory.ctypes.data // HOST_PAGE * HOST_PAGE
                end = -(-(memory.ctypes.data + memory.nbytes) // HOST_PAGE) * HOST_PAGE
                flags = 0 if memory.flags.writeable else READ_ONLY
                runtime.hostRegister(first, end - first, flags)
                weakref.finalize(pin, _unpin, cupy, index, first, memory, waits)
    except runtime.CUDARuntimeError:
        return region
    region.pin = pin
    return region


def _unpin(cupy: Any, index: int, first: int, memory: Vector, waits: bool) -> None:
    """`memory` is this call's, so it is still mapped."""
    try:
        with cupy.cuda.Device(index):
            if not waits:
                cupy.cuda.runtime.deviceSynchronize()
            cupy.cuda.runtime.hostUnregister(first)
    except cupy.cuda.runtime.CUDARuntimeError:
        pass  # the device, or the process, is going down


def put(x: Array | Vector, target: Array | Vector) -> None:
    """Copy a vector into another as long, in whatever memory either lies. Returns when it is there.

    Args:
        x: float32 without gaps, with its values there already, as those of `from_jax` are; any shape.

    Raises:
        DeviceMemoryError: it is none of that, or on another device than `target`.
    """
    if isinstance(target, np.ndarray) and isinstance(x, np.ndarray):
        np.copyto(target, x)
        return
    if x.dtype != np.float32 or not x.flags.c_contiguous:
        raise DeviceMemoryError(f"expected float32 without gaps, not {x.dtype} {x.shape}")
    if isinstance(target, np.ndarray):
        _read(x.reshape(-1), target)
        return
    index = target.device.id
    if not isinstance(x, np.ndarray) and x.device.id != index:
        raise DeviceMemoryError(f"the array is on CUDA device {x.device.id}, the memory on {index}")
    cupy = _cupy()
    with cupy.cuda.Device(index):
        stream = cupy.cuda.Stream(non_blocking=True)
        if isinstance(x, np.ndarray):
            target.set(x, stream=stream)
        else:
            target.data.copy_from_device_async(x.data, x.nbytes, stream)
        stream.synchronize()


def on_host(x: Array | Vector) -> Vector:
    """A vector in memory of the host: itself, if it is NumPy's.

    Raises:
        DeviceMemoryError: CUDA does not read it.
    """
    if isinstance(x, np.ndarray):
        return x
    return _read(x, None)


def _read(x: Array, out: Vector | None) -> Vector:
    try:
        vector: Vector = x.get(out=out)
    except _cupy().cuda.runtime.CUDARuntimeError as error:
        raise DeviceMemoryError(f"the device's memory cannot be read: {error}") from error
    return vector


def from_jax(array: Any) -> Array:
    """A JAX array on a CUDA device as a CuPy array of the same memory, once its values are there; nothing is copied.

    It is for reading: a JAX array never changes. It keeps the memory alive, so do not donate the array meanwhile.

    Raises:
        DeviceMemoryError: CuPy is not there, or the array is not on one CUDA device.
    """
    cupy = _cupy()
    try:
        kind, _ = array.__dlpack_device__()
    except BufferError as error:
        raise DeviceMemoryError(f"the array is not on one device: {error}") from error
    if int(kind) != CUDA_MEMORY:
        raise DeviceMemoryError(f"the array is not on a CUDA device, but on {array.devices()}")
    return cupy.from_dlpack(array.block_until_ready())


def lent_to_jax(x: Array) -> Any:
    """A CuPy array as a JAX array of the same memory; nothing is copied.

    JAX takes for granted that an array never changes: have what is made of it ready before anybody writes there, and
    do not keep it. The memory begins where CUDA would begin an allocation, as a slot does: XLA reads several elements
    at a time.
    """
    from jax import dlpack

    return dlpack.from_dlpack(x)


def to_jax(x: Array) -> Any:
    """A JAX array of its own with what a CuPy array holds now, on the same device; one copy there, done on return."""
    import jax.numpy as jnp

    return jnp.array(lent_to_jax(x), copy=True).block_until_ready()


def size_of(layout: Layout, slots: int) -> int:
    """Bytes of the memory for so many models."""
    return -(-slots * _slot_bytes(layout) // PAGE) * PAGE


def _slot_bytes(layout: Layout) -> int:
    return -(-layout.size * 4 // ALIGNED) * ALIGNED


def _uuid(cupy: Any, index: int) -> str:
    return bytes(cupy.cuda.runtime.getDeviceProperties(index)["uuid"]).hex()
