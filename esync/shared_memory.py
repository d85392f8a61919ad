"""Memory that two processes of one machine share: a model's chunks, each with a stamp that says what it holds.

The memory has no name (memfd): its owner offers it by process id and descriptor, whoever is offered it maps it for
reading through /proc, and when the last process that has it mapped is gone, however it went, so is the memory. It is
sealed against shrinking, so that a reader can never touch what is not there any more.

A chunk's stamp is `WRITING` while its owner writes to it. Who reads a chunk looks at the stamp before and after: if it
is the expected one both times, what was read between is what the stamp says.
"""

from __future__ import annotations

import copy
import ctypes
import mmap
import os
import secrets
import sys
import weakref
from pathlib import Path
from typing import Any

import numpy as np

from esync.errors import EsyncError
from esync.messages import Offer
from esync.tensors import Chunk, Layout, Vector

if sys.platform == "linux":
    import fcntl

SUPPORTED = sys.platform == "linux" and hasattr(os, "memfd_create")
WRITING = -2
NAME = "esync"
MODEL_SLOTS = 2
"""Of the parameter server's memory: version v is in slot v % 2, while v + 1 is made in the other one."""
UPDATE_SLOTS = 1
"""Of a worker's memory: an update is not touched until the next round."""
PAGE = 4096
TOKEN_BYTES = 16
ODD = 4
"""Vectors begin so many bytes off a page: JAX copies what is not aligned at once, but would keep what is."""


class SharedMemoryError(EsyncError):
    """Memory that was offered and cannot be used: the exchange goes over the sockets instead."""


def boot_id() -> str:
    """This machine, since its last start; empty where there is no telling."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return ""


class Region:
    """The chunks of `slots` models.

    Attributes:
        stamps: shape=(slots, chunks), dtype=int64.
        device: the memory in which the chunks lie, if that is a device's (`esync.device_memory.DeviceRegion`): they are
            CuPy arrays then. None: they lie beside their stamps.
        pin: keeps its memory pinned for a device (`esync.device_memory.pinned`); None: it is not.
    """

    device: Any = None
    pin: Any = None

    def __init__(self, layout: Layout, slots: int, memory: mmap.mmap, fd: int = -1) -> None:
        self.layout = layout
        self._chunks: tuple[Chunk, ...] = layout.chunks
        self._kept: Region | None = None
        self._token, self._fd = memory[:TOKEN_BYTES].hex(), fd
        count = len(layout.chunks)
        self.stamps: np.ndarray[Any, np.dtype[np.int64]] = np.frombuffer(
            memory, np.int64, slots * count, PAGE
        ).reshape(slots, count)
        start, size = _starts(layout, slots)
        self._slots: list[Vector] = [
            np.frombuffer(memory, np.float32, layout.size, start + slot * size + ODD)
            for slot in range(slots)
        ]

    @classmethod
    def create(cls, layout: Layout, slots: int) -> Region:
        """New memory, this process's own.

        Raises:
            SharedMemoryError: the system does not give it.
        """
        if not SUPPORTED:
            raise SharedMemoryError("this system has no anonymous shared memory")
        fd = -1
        try:
            fd = os.memfd_create(NAME, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
            os.ftruncate(fd, _bytes(layout, slots))
            fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW)
            memory = mmap.mmap(fd, _bytes(layout, slots))
        except OSError as error:
            if fd >= 0:
                os.close(fd)
            raise SharedMemoryError(f"no shared memory: {error}") from error
        memory[:TOKEN_BYTES] = secrets.token_bytes(TOKEN_BYTES)
        memory[TOKEN_BYTES] = layout.chunk_mib
        region = cls(layout, slots, memory, fd)
        weakref.finalize(region, os.close, fd)
        region.stamps[:] = WRITING
        return region

    def offer(self, worker: str, incarnation: str) -> Offer:
        """The message by which the owner offers its memory to a process of this machine."""
        offer = Offer(worker, boot_id(), os.getpid(), self._fd, self._token, incarnation)
        if self.device is not None and self._fd >= 0:
            there = self.device.offer()
            offer.device, offer.handle, offer.size = there.device, there.handle, there.size
        return offer

    @classmethod
    def open(cls, layout: Layout, slots: int, offer: Offer) -> Region:
        """Map another process's memory for reading.

        Raises:
            SharedMemoryError: it is on another machine, or not what it is said to be.
        """
        if not SUPPORTED or not offer.boot or offer.boot != boot_id():
            raise SharedMemoryError("it is another machine's")
        path = f"/proc/{offer.pid}/fd/{offer.fd}"
        try:
            if not os.readlink(path).startswith(f"/memfd:{NAME}"):
                raise SharedMemoryError(f"{path} is no memory of esync's")
            fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            try:
                if not fcntl.fcntl(fd, fcntl.F_GET_SEALS) & fcntl.F_SEAL_SHRINK:
                    raise SharedMemoryError(f"{path} may shrink")
                size = os.fstat(fd).st_size
                if size != _bytes(layout, slots):
                    raise SharedMemoryError(f"{path} has {size} bytes, not {_bytes(layout, slots)}")
                memory = mmap.mmap(fd, size, prot=mmap.PROT_READ)
            finally:
                os.close(fd)
        except OSError as error:
            raise SharedMemoryError(f"cannot open {path}: {error.strerror}") from error
        if memory[:TOKEN_BYTES].hex() != offer.token:
            raise SharedMemoryError(f"{path} begins with another token")
        if memory[TOKEN_BYTES] != layout.chunk_mib:
            raise SharedMemoryError(
                f"{path} has chunks of {memory[TOKEN_BYTES]} MiB, not {layout.chunk_mib}"
            )
        return cls(layout, slots, memory)

    def on(self, device: Any) -> Region:
        """The same stamps, for chunks that lie in a device's memory (an `esync.device_memory.DeviceRegion`)."""
        there = copy.copy(self)
        there.device, there._kept = device, self
        there._slots = [device.whole(slot) for slot in range(len(self._slots))]
        return there

    def part(self, chunks: range) -> Region:
        """The same memory, of which only these chunks are seen, counted from the first of them."""
        narrow = copy.copy(self)
        narrow._chunks = self._chunks[chunks.start : chunks.stop]
        narrow.stamps = self.stamps[:, chunks.start : chunks.stop]
        narrow._kept = self  # its memory is not closed before
        return narrow

    def whole(self, slot: int) -> Vector:
        """A slot's vector. shape=(layout.size,)"""
        return self._slots[slot]

    def chunk(self, slot: int, chunk: int) -> Vector:
        """One chunk of it."""
        at = self._chunks[chunk]
        return self._slots[slot][at.start : at.stop]

    def extent(self, slot: int) -> Vector:
        """From the first to the last of the chunks that are seen."""
        return self._slots[slot][self._chunks[0].start : self._chunks[-1].stop]

    def lends(self, slot: int, chunk: int, x: Any) -> bool:
        """Whether a vector is this chunk itself, and not a copy."""
        mine: Any = self.chunk(slot, chunk)
        if self.device is None:
            return np.shares_memory(x, mine)
        return bool(x.data.ptr == mine.data.ptr)

    def begin(self, slot: int, chunk: int) -> Vector:
        """The owner writes to a chunk from now on."""
        self.stamps[slot, chunk] = WRITING
        return self.chunk(slot, chunk)

    def finish(self, slot: int, chunk: int, stamp: int) -> None:
        """The owner has written what `stamp` says."""
        self.stamps[slot, chunk] = stamp

    def holds(self, slot: int, stamp: int) -> bool:
        """Whether a slot is wholly what `stamp` says."""
        return bool((self.stamps[slot] == stamp).all())


def _starts(layout: Layout, slots: int) -> tuple[int, int]:
    """Where the first slot begins, and how long a slot is, in bytes."""
    stamps = slots * len(layout.chunks) * ctypes.sizeof(ctypes.c_int64)
    return PAGE + _pages(stamps), _pages(layout.size * 4 + ODD)


def _bytes(layout: Layout, slots: int) -> int:
    start, size = _starts(layout, slots)
    return start + slots * size


def _pages(size: int) -> int:
    return -(-size // PAGE) * PAGE
