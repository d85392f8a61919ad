"""A stand-in for CuPy, made of NumPy, whose streams do nothing before they must.

It has the parts of CuPy that esync calls, with their documented signatures. Kernels evaluate their expressions. What
is put on a stream stays there until somebody waits for it (`Event.synchronize`, a blocking `get`), or until the
stand-in thinks fit: `schedule.hurry(stream)` says how likely a stream is to do at once what it can do. So who forgets
to wait finds memory that has not been written to yet, or that has been overwritten already. Memory that was never
written to holds NaN.

Several processes on one GPU are several modules with one `Gpu`: each has its own addresses for its memory. Any thread
may use a module.
"""

from __future__ import annotations

import ctypes
import itertools
import random
import re
import secrets
import threading
import types
import weakref
from collections import deque

import numpy as np

HANDLE_BYTES = 64
READ_ONLY = 8
ALIGNED = 512


class CUDARuntimeError(RuntimeError):
    """As cupy.cuda.runtime.CUDARuntimeError."""


class Gpu:
    """A machine's devices: their memory, and what is offered of it to other processes."""

    def __init__(self, devices=2):
        self.uuids = [secrets.token_bytes(16) for _ in range(devices)]
        self.offered = {}


def allocation(size):
    memory = np.empty(size + ALIGNED, np.uint8)
    memory = memory[-memory.ctypes.data % ALIGNED :][:size]
    memory[: size // 4 * 4].view(np.float32)[:] = np.nan
    return memory


def structure_of(code):
    """C's structure `Operands`, as it is laid out in memory."""
    (inside,) = re.findall(r"struct Operands \{\n(.*?)\n\};", code, re.S)
    fields = []
    for line in inside.split("\n"):
        kind, name, count = re.fullmatch(r"(.*\S) (\w+)(?:\[(\d+)\])?;", line.strip()).groups()
        of = {"float": np.float32, "int": np.int32, "long long": np.int64}
        fields.append((name, np.uint64 if kind.endswith("*") else of[kind], int(count or 1)))
    return np.dtype([field if field[2] > 1 else field[:2] for field in fields], align=True)


class Schedule:
    """What became of the streams of one module.

    Attributes:
        hurry: stream (numbered as they are made) -> how likely it does what it can do at once; 0: not before it must.
        pageable: how many copies were from memory of the host that is not pinned: those are slow.
        brought_back: bytes of each copy to the host.
        kernels: how many were launched.
        waits: how often the host waited for an event.
    """

    def __init__(self, seed=0):
        self.random = random.Random(seed)
        self.lock = threading.RLock()
        self.hurry = lambda stream: 0.0
        self.streams = []
        self.pageable = 0
        self.kernels = self.waits = 0
        self.brought_back = []

    def settle(self):
        """Let streams do what they can and feel like doing."""
        moved = True
        while moved:
            moved = False
            for stream in self.streams:
                if stream.work and self.random.random() < self.hurry(stream.number):
                    moved |= stream.do_next()


def stand_in(gpu=None, seed=0):
    """A module `cupy`, as one process has it."""
    gpu = gpu or Gpu()
    cupy = types.ModuleType("cupy")
    cupy.schedule = schedule = Schedule(seed)
    cupy.gpu = gpu
    cupy.pinned = []
    cupy.registered = {}  # first address -> (one after the last, flags)
    memories = {}  # address -> weak reference to (memory, device)
    here = threading.local()
    addresses = itertools.count(1 << 40, 1 << 32)

    def current_device():
        return getattr(here, "device", 0)

    # Streams

    class Event:
        def __init__(self, block=False, disable_timing=False, interprocess=False):
            self.device = current_device()
            self.recorded = self.reached = 0
            self.stream = None

        @property
        def done(self):
            return self.reached >= self.recorded

        def record(self, stream=None):
            stream = stream or cupy.cuda.get_current_stream()
            assert stream.device_id == self.device, "event and stream are of two devices"
            self.recorded += 1
            self.stream = stream
            stream.put(lambda mark=self.recorded: setattr(self, "reached", mark))

        def synchronize(self):
            schedule.waits += 1
            self.bring_to(self.recorded)

        def bring_to(self, mark):
            with schedule.lock:
                while self.reached < mark:
                    assert self.stream.must_do_next(), "streams wait for each other"

    class Stream:
        def __init__(self, null=False, non_blocking=False, ptds=False, priority=None):
            self.device_id = current_device()
            self.work = deque()  # (what, event to wait for, its mark)
            self.number = len(schedule.streams)
            schedule.streams.append(self)

        def put(self, what, event=None, mark=0):
            with schedule.lock:
                self.work.append((what, event, mark))
                schedule.settle()

        def do_next(self):
            what, event, mark = self.work[0]
            if event is not None and event.reached < mark:
                return False
            self.work.popleft()
            what()
            return True

        def must_do_next(self):
            with schedule.lock:
                if not self.work:
                    return False
                _, event, mark = self.work[0]
                if event is not None:
                    event.bring_to(mark)
                return self.do_next()

        def wait_event(self, event):
            self.put(lambda: None, event, event.recorded)

        def record(self, event=None):
            event = event or Event()
            event.record(self)
            return event

        def synchronize(self):
            while self.work:
                self.must_do_next()

        def __enter__(self):
            assert self.device_id == current_device(), "the stream is another device's"
            self.stack().append(self)
            return self

        def __exit__(self, *args):
            assert self.stack().pop() is self

        @staticmethod
        def stack():
            if not hasattr(here, "streams"):
                here.streams = []
            return here.streams

    default = {}

    def get_current_stream():
        stack = Stream.stack()
        if stack and stack[-1].device_id == current_device():
            return stack[-1]
        if current_device() not in default:
            default[current_device()] = Stream()
        return default[current_device()]

    class Device:
        def __init__(self, device=None):
            self.id = current_device() if device is None else int(device)

        def __enter__(self):
            here.devices = [*getattr(here, "devices", []), current_device()]
            here.device = self.id
            return self

        def __exit__(self, *args):
            here.device = here.devices.pop()

        def use(self):
            here.device = self.id
            return self

    # Memory

    def take(memory, device):
        address = next(addresses)
        memories[address] = (memory, device)
        return address

    def give(address):
        del memories[address]

    def bytes_at(address, size, device=None):
        base = address >> 32 << 32
        if base not in memories:
            raise CUDARuntimeError("cudaErrorIllegalAddress")
        memory, there = memories[base]
        assert device in (None, there), "the array is another device's"
        at = address - base
        assert at + size <= memory.size, "beyond the allocation"
        return memory[at : at + size]

    class Memory:
        """cudaMalloc'd, until its end."""

        def __init__(self, size):
            self.size, self.device_id = size, current_device()
            self.ptr = take(allocation(size), self.device_id)
            weakref.finalize(self, give, self.ptr)

    pool = {}  # (stream, bytes) -> memory that was let go of

    class Pooled:
        """The pool's: what is let go of goes to who asks next on the same stream, done with or not."""

        def __init__(self, size):
            key = (get_current_stream().number, size)
            self.mem = pool[key].pop() if pool.get(key) else Memory(size)
            self.size, self.device_id, self.ptr = size, self.mem.device_id, self.mem.ptr
            weakref.finalize(self, pool.setdefault(key, []).append, self.mem)

    class UnownedMemory:
        def __init__(self, ptr, size, owner, device_id=-1):
            assert device_id >= 0
            self.ptr, self.size, self.device_id, self._owner = ptr, size, device_id, owner

    class MemoryPointer:
        def __init__(self, mem, offset):
            self.mem, self.ptr, self.device_id = mem, mem.ptr + offset, mem.device_id

        def bytes_of(self, size):
            return bytes_at(self.ptr, size)

        def copy_from_device_async(self, src, size, stream=None):
            target, source = self.bytes_of(size), src.bytes_of(size)
            (stream or get_current_stream()).put(lambda: np.copyto(target, source))

    pinned = []  # (first address, one after the last)

    def alloc_pinned_memory(size):
        cupy.pinned.append(size)
        memory = (ctypes.c_byte * max(512, size))()  # CuPy's pool rounds up too
        pinned.append((ctypes.addressof(memory), ctypes.addressof(memory) + len(memory)))
        return memory

    def host_register(ptr, size, flags):
        assert ptr % 4096 == size % 4096 == 0
        assert flags in (0, READ_ONLY)
        if ptr in cupy.registered:
            raise CUDARuntimeError("cudaErrorHostMemoryAlreadyRegistered")
        cupy.registered[ptr] = (ptr + size, flags)

    def host_unregister(ptr):
        end, _ = cupy.registered.pop(ptr)
        assert not any(ptr <= at < end for at in in_flight), "a copy is not done"

    in_flight = []  # addresses of the host's memory that a stream will read or write

    def later(stream, x, what):
        """Put a copy on a stream that reads or writes `x`, in memory of the host."""
        in_flight.append(x.ctypes.data)

        def run():
            in_flight.remove(x.ctypes.data)
            what()

        stream.put(run)

    def is_pinned(x, *, for_writing=False):
        """Whether a device can read a NumPy array by itself, or write to it."""
        at = x.ctypes.data
        registered = any(
            first <= at and at + x.nbytes <= end and not (for_writing and flags)
            for first, (end, flags) in cupy.registered.items()
        )
        return registered or any(first <= at < last for first, last in pinned)

    # Arrays

    class ndarray:
        def __init__(self, shape, dtype=float, memptr=None, strides=None, order="C"):
            self.shape = (shape,) if isinstance(shape, int) else tuple(shape)
            self.dtype = np.dtype(dtype)
            self.size = int(np.prod(self.shape))
            self.nbytes = self.size * self.dtype.itemsize
            self.data = memptr or MemoryPointer(Pooled(self.nbytes), 0)
            self.device = Device(self.data.device_id)
            self.flags = types.SimpleNamespace(c_contiguous=strides is None)

        def __array__(self, *args, **kwargs):
            raise TypeError("Implicit conversion to a NumPy array is not allowed.")

        def __getitem__(self, index):
            start, stop, step = index.indices(self.size)
            assert step == 1
            assert len(self.shape) == 1
            pointer = MemoryPointer(
                self.data.mem, self.data.ptr - self.data.mem.ptr + start * self.dtype.itemsize
            )
            return ndarray((max(0, stop - start),), self.dtype, pointer)

        def reshape(self, size):
            assert size == -1
            return ndarray((self.size,), self.dtype, self.data)

        def now(self):
            """The values, whatever has been done to them so far."""
            return self.data.bytes_of(self.nbytes).view(self.dtype).reshape(self.shape)

        def set(self, arr, stream=None):
            assert isinstance(arr, np.ndarray)
            assert (arr.dtype, arr.shape) == (self.dtype, self.shape)
            if not is_pinned(arr):
                schedule.pageable += 1
                arr = arr.copy()  # CUDA stages it itself
            target = self.now()
            later(stream or get_current_stream(), arr, lambda: np.copyto(target, arr))

        def get(self, stream=None, order="C", out=None, blocking=True):
            stream = stream or get_current_stream()
            out = np.full(self.shape, np.nan).astype(self.dtype) if out is None else out
            assert (out.dtype, out.shape) == (self.dtype, self.shape)
            source = self.now()
            schedule.brought_back.append(self.nbytes)
            later(stream, out, lambda: np.copyto(out, source))
            if blocking or not is_pinned(out, for_writing=True):
                stream.synchronize()
            return out

    class RawModule:
        def __init__(self, *, code, options=()):
            assert options == (
                "-fmad=false",
            )  # what is computed here is rounded after every operation
            self.operands = structure_of(code)
            self.functions = dict(
                re.findall(
                    r'extern "C" __global__ void (\w+)\(const Operands o\)\n\{\n(.*?)\n\}',
                    code,
                    re.S,
                )
            )
            self.compiled_on = None

        def compile(self):
            self.compiled_on = current_device()

        def get_function(self, name):
            assert self.compiled_on == current_device()
            return Function(self.operands, self.functions[name], self.compiled_on)

    class Function:
        """A kernel, given a thread for each element; like CUDA it believes whatever it is told."""

        def __init__(self, operands, body, device):
            self.operands, self.device = operands, device
            first, end, given, made, *rest = (line.strip() for line in body.split("\n"))
            assert [first, end, *rest] == [
                "const long long i = (long long)blockIdx.x * blockDim.x + threadIdx.x;",
                "if (i >= o.size) return;",
                "if (o.out) o.out[i] = made;",
                "if (o.flag && !isfinite(made)) *o.flag = o.mark;",
            ]
            self.given = re.findall(r"const float (\w+) = o\.([xw])\[(\d+)\](?:\[i\])?;", given)
            assert len(self.given) == given.count(";")
            (self.expression,) = re.fullmatch(r"const float made = (.*);", made).groups()

        def __call__(self, grid, block, args, *, shared_mem=0):
            assert self.device == current_device(), "the kernel is another device's"
            (by_value,) = args
            assert (by_value.size, by_value.itemsize) == (1, self.operands.itemsize)
            o = np.frombuffer(by_value.tobytes(), self.operands)[0]
            size = int(o["size"])
            assert block[0] <= 1024, "more threads than a block can have"
            assert size <= grid[0] * block[0] < size + block[0], "not a thread for each element"
            given = {
                name: on_device(o["x"][int(k)], size) if kind == "x" else o["w"][int(k)]
                for name, kind, k in self.given
            }  # a launch does not keep the arrays alive
            out = on_device(o["out"], size) if o["out"] else None
            flag = in_pinned_memory(o["flag"]) if o["flag"] else None
            schedule.kernels += 1

            def run():
                with np.errstate(all="ignore"):
                    made = eval(self.expression, {"sqrtf": np.sqrt}, given)
                if out is not None:
                    out[:] = made
                if flag is not None and not np.isfinite(made).all():
                    flag[0] = o["mark"]

            get_current_stream().put(run)

    def on_device(address, size):
        return bytes_at(int(address), 4 * size, current_device()).view(np.float32)

    def in_pinned_memory(address):
        flag = np.frombuffer((ctypes.c_int * 1).from_address(int(address)), np.int32)
        assert is_pinned(flag)
        return flag

    def from_dlpack(array):
        kind, device = array.__dlpack_device__()
        assert (kind, device) == (2, array.on_device.device.id)
        return array.__dlpack__(stream=1)

    # Processes

    def malloc(size):
        return take(allocation(size), current_device())

    def ipc_get(ptr):
        if ptr not in memories:
            raise CUDARuntimeError("cudaErrorInvalidValue: invalid argument")
        handle = secrets.token_bytes(HANDLE_BYTES)
        gpu.offered[handle] = (cupy, *memories[ptr])
        return handle

    opened = {}

    def ipc_open(handle, flags=1):
        if handle not in gpu.offered:
            raise CUDARuntimeError("cudaErrorInvalidResourceHandle: invalid resource handle")
        owner, memory, device = gpu.offered[handle]
        if owner is cupy or device != current_device():
            raise CUDARuntimeError("cudaErrorDeviceUninitialized: invalid device context")
        address = take(memory, device)
        opened[address] = handle
        return address

    def ipc_close(ptr):
        del opened[ptr]
        give(ptr)

    def device_synchronize():
        for stream in list(schedule.streams):
            stream.synchronize()

    cupy.memories, cupy.opened = memories, opened
    cupy.ndarray, cupy.RawModule = ndarray, RawModule
    cupy.empty = ndarray
    cupy.from_dlpack = from_dlpack
    cupy.cuda = types.SimpleNamespace(
        Device=Device,
        Event=Event,
        Memory=Memory,
        MemoryPointer=MemoryPointer,
        Stream=Stream,
        UnownedMemory=UnownedMemory,
        alloc_pinned_memory=alloc_pinned_memory,
        get_current_stream=get_current_stream,
        runtime=types.SimpleNamespace(
            CUDARuntimeError=CUDARuntimeError,
            deviceSynchronize=device_synchronize,
            free=give,
            getDevice=current_device,
            getDeviceCount=lambda: len(gpu.uuids),
            hostRegister=host_register,
            hostUnregister=host_unregister,
            getDeviceProperties=lambda i: {"name": b"stand-in", "uuid": gpu.uuids[i]},
            ipcCloseMemHandle=ipc_close,
            ipcGetMemHandle=ipc_get,
            ipcOpenMemHandle=ipc_open,
            malloc=malloc,
        ),
    )
    return cupy
