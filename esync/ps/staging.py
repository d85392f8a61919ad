"""How vectors in host memory come onto a CUDA device and back, while the device adds up what came before.

Two streams: one copies, one does sums. A vector is copied into one of a few pinned buffers, since only from pinned
memory does a device read by itself, and from there by the copying stream into memory on the device; the
stream of the sums waits for that, the host does not. Three things are waited for before memory is used again:

- a pinned buffer, by the host, for the copy that reads it;
- memory of the device that a vector was loaded into, by the copying stream, for the sums that read it. Nobody has
  the vector any more by then, so every sum that ever reads it is on the stream already;
- what is brought back, by the host, for that one copy: what it was computed from comes before it on the stream.

Memory that other processes share with this one can be pinned where it is (`device_memory.pinned`): nothing is copied on
the host then.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from esync.tensors import Vector

BUFFERS = 4
"""Pinned buffers; and of each size so many on the device, before one is taken whose sums may not be done yet."""


@dataclass(slots=True)
class _Pinned:
    """A buffer in pinned memory, and the end of the copy that reads it."""

    copied: Any
    memory: Vector | None = None


@dataclass(slots=True)
class _Buffer:
    """Memory on the device, and the end of the sums that read it."""

    size: int
    memory: Any
    read: Any


@dataclass(slots=True)
class _Loan:
    """Who has a vector, has its buffer; when nobody has it any more the buffer goes back."""

    buffer: _Buffer
    back: deque[_Buffer] = field(repr=False)

    def __del__(self) -> None:
        self.back.append(self.buffer)


class Staging:
    """The way onto one device and back. For one thread at a time.

    Args:
        cupy: the module.
        device: a `cupy.cuda.Device`.
        sums: the stream on which whatever is loaded is read, and what is brought back was made.
    """

    def __init__(self, cupy: Any, device: Any, sums: Any) -> None:
        self._cupy, self._device, self._sums = cupy, device, sums
        with device:
            self._copies = cupy.cuda.Stream(non_blocking=True)
            self._pinned = deque(_Pinned(self._event()) for _ in range(BUFFERS))
            self._moved = self._event()
        self._returned: deque[_Buffer] = deque()  # from any thread: whichever lets go of a vector
        self._free: dict[int, deque[_Buffer]] = {}  # bytes -> buffers, the longest unused first

    def load(self, x: Vector, *, pinned: bool = False) -> Any:
        """The vector on the device. `x` is not looked at again; in pinned memory it is, until a sum with it is done."""
        if pinned:
            return self._copied(x, self._moved)
        buffer = self._pinned[0]
        self._pinned.rotate(-1)
        buffer.copied.synchronize()
        if buffer.memory is None or buffer.memory.size < x.size:
            buffer.memory = self._in_pinned_memory(x.size)
        staged = buffer.memory[: x.size]
        np.copyto(staged, x)
        return self._copied(staged, buffer.copied)

    def _copied(self, pinned: Vector, copied: Any) -> Any:
        """A vector in pinned memory on the device; the event `copied` is the end of the copy."""
        with self._device:
            buffer = self._buffer(pinned.nbytes)
            loaded = self._lend(buffer, pinned.size)
            self._copies.wait_event(buffer.read)
            loaded.set(pinned, stream=self._copies)
            copied.record(self._copies)
            self._sums.wait_event(copied)
        return loaded

    def host(self, x: Any) -> Vector:
        """The vector in pinned memory of its own, which CuPy's pool uses again when nobody has it any more."""
        brought = self._in_pinned_memory(x.size)
        with self._device:
            x.get(stream=self._sums, out=brought, blocking=False)
            self._moved.record(self._sums)
            self._moved.synchronize()
        return brought

    def put(self, x: Any, out: Vector, *, pinned: bool = False) -> None:
        """Copy a vector into memory of the host. It is there when the stream of the sums is done."""
        if pinned:
            with self._device:
                x.get(stream=self._sums, out=out, blocking=False)
        else:
            np.copyto(out, self.host(x))

    def _event(self) -> Any:
        return self._cupy.cuda.Event(disable_timing=True)

    def _in_pinned_memory(self, size: int) -> Vector:
        with self._device:
            memory = self._cupy.cuda.alloc_pinned_memory(size * 4)
        return np.ndarray((size,), np.float32, memory)

    def _buffer(self, size: int) -> _Buffer:
        """Memory of so many bytes that nobody has; what reads it still is before its event."""
        while self._returned:
            buffer = self._returned.popleft()
            buffer.read.record(self._sums)
            self._free.setdefault(buffer.size, deque()).append(buffer)
        free = self._free.get(size)
        if free and (len(free) >= BUFFERS or free[0].read.done):
            return free.popleft()
        # Not from CuPy's pool: what another stream has not done with yet might be in there.
        return _Buffer(size, self._cupy.cuda.Memory(size), self._event())

    def _lend(self, buffer: _Buffer, size: int) -> Any:
        """An array over a buffer that gives it back at its end, and that of all its views."""
        memory = self._cupy.cuda.UnownedMemory(
            buffer.memory.ptr, size * 4, _Loan(buffer, self._returned), self._device.id
        )
        pointer = self._cupy.cuda.MemoryPointer(memory, 0)
        return self._cupy.ndarray((size,), np.float32, pointer)
