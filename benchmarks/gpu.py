"""Averaging on an NVIDIA GPU: how near it comes to the device's memory and to the bus.

    python benchmarks/gpu.py --quick
    python benchmarks/gpu.py --workers 8 --mb 100 --json gpu.json

- Memory: a copy of 1 GB, by CUDA and by a kernel, bytes read and written per second. What follows is a share of the
  faster one's.
- Averaging what is on the device already, chunk by chunk, through the backend and the aggregation that the parameter
  server uses, with chunks of several sizes: one worker after the other, as what came over sockets is added up, and
  several chunks at a time, all workers' in one pass, as what lies in workers' memory of the device is; and the kernels
  of the latter alone.
- The same from memory of the host, as chunks arrive from a socket, and as they lie in workers' shared memory: a share
  of what the bus moves.
- A JAX array handed to another process: through memory of the device (CUDA IPC), and through the host.
- Agreement with NumPy.

Needs a GPU, CuPy and JAX for CUDA: pip install 'esync[cuda12]'. Ends with 2 where there is none.
"""

from __future__ import annotations

import dataclasses
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from typing import Any

import click
import measure
import msgpack
import numpy as np
from data_plane import child
from rich.console import Console
from rich.table import Table

from esync import device_memory, shared_memory, tensors
from esync.config import RunConfig
from esync.device_memory import DeviceMemoryError, DeviceOffer, DeviceRegion
from esync.messages import INITIAL, Offer
from esync.ps.aggregation import Contribution, Mean
from esync.ps.backend import Array, Backend, CupyBackend, NumpyBackend
from esync.ps.server import RECV_BURST
from esync.tensors import DELTA, Layout, Leaf, Vector

TARGET = 0.6
"""The share of the memory's bandwidth that averaging is to reach."""
WARM_UP = 3
MIB = 1 << 20
CHUNKS_MIB = (2, 8, 32)
PATIENCE_S = 120.0


@dataclass
class Row:
    """One measurement.

    Attributes:
        seconds: of each round.
        moved: bytes per round that the figure in GB/s is of; `of` says which.
        bound: bytes per second that `share` is of.
    """

    name: str
    seconds: list[float]
    moved: float
    of: str
    bound: float | None = None
    notes: dict[str, Any] = field(default_factory=dict)

    @property
    def median_s(self) -> float:
        return statistics.median(self.seconds)

    @property
    def per_s(self) -> float:
        return self.moved / self.median_s

    @property
    def share(self) -> float | None:
        return self.per_s / self.bound if self.bound else None


def timed(work: Callable[[], object], done: Callable[[], object], rounds: int) -> list[float]:
    """Seconds of each call until `done` returns, without the first ones."""
    seconds = []
    for _ in range(rounds + WARM_UP):
        done()
        began = time.perf_counter()
        work()
        done()
        seconds.append(time.perf_counter() - began)
    return seconds[WARM_UP:]


# Floors


def memory(cupy: Any, mb: float, rounds: int) -> tuple[Row, Row]:
    """A copy by CUDA, and one by a kernel of the backend: what the device's memory gives is the faster one's."""
    backend = CupyBackend()
    x = cupy.full(int(mb * 1e6 / 4), 1.0, np.float32)
    y = cupy.empty(x.size, np.float32)
    done = cupy.cuda.runtime.deviceSynchronize
    by_cuda = timed(lambda: y.data.copy_from_device_async(x.data, x.nbytes), done, rounds)
    by_kernel = timed(lambda: backend.copied(x, y), done, rounds)
    return (
        Row(f"memory: a copy of {mb:g} MB by CUDA", by_cuda, 2 * x.nbytes, "read and written"),
        Row(
            f"memory: a copy of {mb:g} MB by a kernel", by_kernel, 2 * x.nbytes, "read and written"
        ),
    )


def bus(cupy: Any, mb: float, rounds: int) -> tuple[Row, Row]:
    """From pinned memory to the device, and back."""
    size = int(mb * 1e6 / 4)
    here = np.ndarray((size,), np.float32, cupy.cuda.alloc_pinned_memory(size * 4))
    here[:] = 1.0
    there = cupy.empty(size, np.float32)
    done = cupy.cuda.runtime.deviceSynchronize
    up = timed(lambda: there.set(here), done, rounds)
    down = timed(lambda: there.get(out=here, blocking=False), done, rounds)
    return (
        Row(f"bus: {mb:g} MB of pinned memory to the device", up, here.nbytes, "moved"),
        Row(f"bus: {mb:g} MB to pinned memory", down, here.nbytes, "moved"),
    )


def into_pinned(cupy: Any, mb: float, rounds: int) -> Row:
    """One thread that copies chunks into a pinned buffer, as `load` does."""
    size = tensors.CHUNK_ELEMENTS
    buffer = np.ndarray((size,), np.float32, cupy.cuda.alloc_pinned_memory(size * 4))
    chunks = [np.ones(size, np.float32) for _ in range(max(1, int(mb * 1e6 / 4 / size)))]

    def work() -> None:
        for chunk in chunks:
            np.copyto(buffer, chunk)

    seconds = timed(work, lambda: None, rounds)
    return Row("host: chunks into pinned memory", seconds, len(chunks) * buffer.nbytes, "copied")


def launch_s(backend: CupyBackend) -> float:
    """Seconds of the host per kernel: what a kernel must take for the device to be busy."""
    x = backend.load(np.ones(1, np.float32))
    total = backend.scaled(x, 1.0)
    count = 2000

    def work() -> None:
        for _ in range(count):
            backend.add_scaled(total, x, 1.0)

    return statistics.median(timed(work, lambda: backend.host(total), 5)) / count


# Averaging


@contextmanager
def chunks_of(mib: float) -> Iterator[None]:
    """Within the block, a model's chunks have so many MiB."""
    before = tensors.CHUNK_ELEMENTS
    tensors.CHUNK_ELEMENTS = int(mib * MIB / 4)
    try:
        yield
    finally:
        tensors.CHUNK_ELEMENTS = before


def layout_of(mb: float) -> Layout:
    return Layout((Leaf(DELTA, "w", (int(mb * 1e6 / 4),), "float32"),))


def vectors(mb: float, count: int) -> list[Vector]:
    """A model and updates to it."""
    random = np.random.default_rng(0)
    size = int(mb * 1e6 / 4)
    return [
        random.standard_normal(size, np.float32) * np.float32(0.01 if i else 1.0)
        for i in range(count)
    ]


def begun(backend: Backend, layout: Layout, workers: int, model: Vector) -> Mean:
    """The parameter server's aggregation with version 0."""
    mean = Mean(layout, backend, RunConfig(mode="esync", workers=workers))
    mean.set_members({f"w{rank}": rank for rank in range(workers)})
    for i, at in enumerate(layout.chunks):
        x = backend.load(model[at.start : at.stop])
        mean.receive(Contribution("w0", INITIAL, i, x))
    return mean


def one_round(mean: Mean, chunk_of: Callable[[int, int], Array], workers: int) -> None:
    """Every worker's chunk, one chunk after the other, as they come over sockets.

    Raises:
        RuntimeError: it was not a whole round.
    """
    version = mean.version
    for i in range(len(mean.layout.chunks)):
        for rank in range(workers):
            mean.receive(Contribution(f"w{rank}", version, i, chunk_of(rank, i)))
    if mean.version != version + 1:
        raise RuntimeError(f"a round went from version {version} to {mean.version}")


def one_shared_round(mean: Mean, updates: list[list[Array]]) -> None:
    """The same in bursts, as words come of chunks that lie in workers' memory of the device.

    Raises:
        RuntimeError: it was not a whole round.
    """
    version, taken = mean.version, 0
    for i in range(len(mean.layout.chunks)):
        for rank, update in enumerate(updates):
            mean.take(Contribution(f"w{rank}", version, i, update[i], lasts=True))
            taken += 1
            if taken % RECV_BURST == 0:
                mean.settle()
    mean.settle()
    if mean.version != version + 1:
        raise RuntimeError(f"a round went from version {version} to {mean.version}")


def passes(workers: int) -> int:
    """How often averaging of what came over sockets reads or writes a vector: two are added into a third, each further
    one to it, that to the model; and the result is looked at."""
    return 3 + 3 * (workers - 2) + 3 + 1


def resident(
    cupy: Any, data: list[Vector], mib: float, rounds: int, bandwidth: float
) -> Iterator[Row]:
    """Averaging what is on the device."""
    workers = len(data) - 1
    done = cupy.cuda.runtime.deviceSynchronize
    with chunks_of(mib):
        layout, backend = layout_of(data[0].nbytes / 1e6), CupyBackend()
        mean = begun(backend, layout, workers, data[0])
        updates = [[backend.load(x[at.start : at.stop]) for at in layout.chunks] for x in data[1:]]
        chunks = list(mean.chunks)
        for name, work, count, operands in (
            (
                "as over sockets",
                lambda: one_round(mean, lambda rank, i: updates[rank][i], workers),
                passes(workers),
                3,
            ),
            (
                "as in workers' memory of it",
                lambda: one_shared_round(mean, updates),
                workers + 2,
                workers + 2,
            ),
            (
                "kernels alone",
                lambda: _kernels_alone(backend, chunks, updates),
                workers + 2,
                workers + 2,
            ),
        ):
            seconds = timed(work, done, rounds)
            yield Row(
                f"on the device, {mib:g} MiB chunks, {name}",
                seconds,
                count * data[0].nbytes,
                "read and written",
                bandwidth,
                {"mib_per_launch": operands * mib, "averaged_gb_s": _averaged(data, seconds)},
            )


def _kernels_alone(backend: Backend, chunks: list[Array], updates: list[list[Array]]) -> None:
    """A round in which each chunk is one sum of the model and all updates, and nothing else."""
    weights = [1.0] * len(updates)
    for i, chunk in enumerate(chunks):
        deltas = [update[i] for update in updates]
        chunks[i], _ = backend.stepped(chunk, 1.0 / len(updates), deltas, weights)


def _averaged(data: list[Vector], seconds: list[float]) -> float:
    return sum(x.nbytes for x in data[1:]) / statistics.median(seconds) / 1e9


def from_host(cupy: Any, data: list[Vector], rounds: int, bus_per_s: float) -> Row:
    """Averaging what arrives in pageable memory of the host, with the chunks that the servers use."""
    layout, backend = layout_of(data[0].nbytes / 1e6), CupyBackend()
    chunks = [[x[at.start : at.stop] for at in layout.chunks] for x in data[1:]]
    seconds = _averaging(cupy, backend, data, rounds, lambda rank, i: backend.load(chunks[rank][i]))
    moved = sum(x.nbytes for x in data[1:])
    return Row("from the host, through pinned memory", seconds, moved, "of updates", bus_per_s)


def from_shared_memory(
    cupy: Any, data: list[Vector], rounds: int, bus_per_s: float
) -> Iterator[Row]:
    """Averaging what lies in workers' shared memory, mapped as the parameter server maps it, and pinned there."""
    layout, backend = layout_of(data[0].nbytes / 1e6), CupyBackend()
    owned, mapped, pinning = [], [], []
    for x in data[1:]:
        region = shared_memory.Region.create(layout, shared_memory.UPDATE_SLOTS)
        region.whole(0)[:] = x
        owned.append(region)
        offer = region.offer("w", "x")
        mapped.append(shared_memory.Region.open(layout, shared_memory.UPDATE_SLOTS, offer))
        began = time.perf_counter()
        device_memory.pinned(mapped[-1], backend.cuda, waits=False)
        pinning.append(time.perf_counter() - began)
        if mapped[-1].pin is None:
            raise RuntimeError("CUDA does not pin shared memory here")
    size = data[0].nbytes
    yield Row(f"pinning {size / 1e6:g} MB of a worker's shared memory", pinning, size, "pinned")
    seconds = _averaging(
        cupy,
        backend,
        data,
        rounds,
        lambda rank, i: backend.load(mapped[rank].chunk(0, i), pinned=True),
    )
    moved = sum(x.nbytes for x in data[1:])
    yield Row("from workers' shared memory", seconds, moved, "of updates", bus_per_s)


def _averaging(
    cupy: Any,
    backend: CupyBackend,
    data: list[Vector],
    rounds: int,
    chunk_of: Callable[[int, int], Array],
) -> list[float]:
    """Seconds of each round."""
    workers = len(data) - 1
    mean = begun(backend, layout_of(data[0].nbytes / 1e6), workers, data[0])
    return timed(
        lambda: one_round(mean, chunk_of, workers), cupy.cuda.runtime.deviceSynchronize, rounds
    )


def to_host(data: list[Vector], rounds: int, bus_per_s: float) -> Iterator[Row]:
    """A model's chunks brought back, one after the other, as they are published."""
    layout, backend = layout_of(data[0].nbytes / 1e6), CupyBackend()
    chunks = [backend.load(data[0][at.start : at.stop]) for at in layout.chunks]
    region = device_memory.pinned(shared_memory.Region.create(layout, 1), backend.cuda)

    def brought() -> None:
        for chunk in chunks:
            backend.host(chunk)

    def put() -> None:
        for i, chunk in enumerate(chunks):
            backend.put(chunk, region.chunk(0, i), pinned=region.pin is not None)
        backend.wait()

    for name, work in (("to the host, chunk by chunk", brought), ("into shared memory", put)):
        seconds = timed(work, lambda: None, rounds)
        yield Row(name, seconds, data[0].nbytes, "moved", bus_per_s)


def disagreement(data: list[Vector]) -> float:
    """The largest difference from NumPy of one round's model, relative to the magnitudes that were added up."""
    workers, layout = len(data) - 1, layout_of(data[0].nbytes / 1e6)
    models = []
    for backend in (CupyBackend(), NumpyBackend()):
        mean = begun(backend, layout, workers, data[0])

        def chunk_of(rank: int, i: int, backend: Backend = backend) -> Array:
            at = layout.chunks[i]
            return backend.load(data[1 + rank][at.start : at.stop])

        one_round(mean, chunk_of, workers)
        models.append(np.concatenate([backend.host(x) for x in mean.chunks]))
    magnitude = np.abs(data[0]) + sum(np.abs(x) for x in data[1:]) / workers
    return float((np.abs(models[0].astype(np.float64) - models[1]) / magnitude).max())


# From process to process


def tell(pipe: Connection, **message: Any) -> None:
    pipe.send_bytes(msgpack.packb(message))


def told(pipe: Connection) -> dict[str, Any]:
    """The next message.

    Raises:
        RuntimeError: the other process ended, or was silent for too long.
    """
    try:
        if pipe.poll(PATIENCE_S):
            return dict(msgpack.unpackb(pipe.recv_bytes()))
    except (EOFError, OSError):
        pass
    raise RuntimeError("the other process ended, or was silent; see its error above")


def receiver(pipe: Connection, mb: float) -> None:
    """Makes JAX arrays of what it is told of, as a worker does with a model."""
    import jax

    layout = layout_of(mb)
    offers = told(pipe)
    host = shared_memory.Region.open(layout, 1, Offer(**offers["host"]))
    device = DeviceRegion.open(layout, 1, DeviceOffer(**offers["device"]))
    device_memory.pinned(host, device.index)
    tell(pipe, ready=True)
    while "path" in (message := told(pipe)):
        if message["path"] == "device":
            array = device_memory.to_jax(device.whole(0))
        else:
            array = jax.device_put(host.whole(0), jax.devices("gpu")[0]).block_until_ready()
        tell(pipe, made=True)
        told(pipe)
        tell(pipe, first=float(array[0]), last=float(array[-1]))
    device.close()
    tell(pipe, closed=True)


def hand_over(mb: float, rounds: int) -> Iterator[Row]:
    """A JAX array of this process, until it is one of another process on the same device."""
    import jax.numpy as jnp

    layout = layout_of(mb)
    host = shared_memory.Region.create(layout, 1)
    array = jnp.arange(layout.size, dtype=jnp.float32)
    index = device_memory.from_jax(array).device.id
    device_memory.pinned(host, index)
    device = DeviceRegion.create(layout, 1, index)
    with child(receiver, mb) as (pipe, _):
        offers = {"host": host.offer("w", "x"), "device": device.offer()}
        tell(pipe, **{name: dataclasses.asdict(offer) for name, offer in offers.items()})
        told(pipe)
        for path in ("device", "host"):
            seconds = []
            for _ in range(rounds + WARM_UP):
                array = (
                    array + 1.0
                ).block_until_ready()  # JAX keeps what it has copied to the host
                expected = {"first": float(array[0]), "last": float(array[-1])}
                began = time.perf_counter()
                if path == "device":
                    device.write(0, 0, device_memory.from_jax(array))
                else:
                    device_memory.put(device_memory.from_jax(array), host.whole(0))
                tell(pipe, path=path)
                told(pipe)
                seconds.append(time.perf_counter() - began)
                tell(pipe, check=True)
                if told(pipe) != expected:
                    raise RuntimeError(f"what arrived through the {path} is not what was sent")
            name = f"{mb:g} MB of JAX to another process, through the {path}"
            yield Row(name, seconds[WARM_UP:], layout.size * 4, "handed over")
        tell(pipe, end=True)
        told(pipe)
    device.close()


# The table


def environment(cupy: Any) -> dict[str, Any]:
    """Versions and the device."""
    import jax

    runtime = cupy.cuda.runtime
    return {
        **measure.environment(),
        "gpu": runtime.getDeviceProperties(0)["name"].decode(),
        "driver": runtime.driverGetVersion(),
        "cuda": runtime.runtimeGetVersion(),
        "cupy": cupy.__version__,
        "jax": jax.__version__,
    }


def show(rows: list[Row], title: str) -> None:
    """Print a table."""
    table = Table(title=title, title_justify="left")
    for column in ("", "median ms", "GB/s", "of bytes", "share of the bound"):
        table.add_column(column, justify="left" if column in ("", "of bytes") else "right")
    for row in rows:
        table.add_row(
            row.name,
            f"{row.median_s * 1e3:.3f}",
            f"{row.per_s / 1e9:.1f}",
            row.of,
            "" if row.share is None else f"{row.share:.0%}",
        )
    Console(width=None if Console().is_terminal else 140).print(table)


@click.command()
@click.option("--quick", is_flag=True, help="20 MB, few rounds.")
@click.option("--workers", type=click.IntRange(min=2), default=8, show_default=True)
@click.option("--mb", type=float, default=None, help="MB of a model [100].")
@click.option("--rounds", type=click.IntRange(min=1), default=None, help="Counted rounds [30].")
@click.option("--json", "file", type=click.File("w", lazy=True), help="Write the figures here too.")
def main(quick: bool, workers: int, mb: float | None, rounds: int | None, file: Any) -> None:
    """Averaging on this machine's first GPU, beside what its memory and its bus give."""
    console = Console(stderr=True)
    why = device_memory.unsupported()
    if why:
        console.print(f"There is no NVIDIA GPU to measure: {why}", markup=False)
        sys.exit(2)
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # two processes share the GPU
    import cupy

    mb, rounds = mb or (20.0 if quick else 100.0), rounds or (5 if quick else 30)
    data = vectors(mb, workers + 1)
    console.print(f"{workers} x {mb:g} MB on {environment(cupy)['gpu']}", highlight=False)
    copies = memory(cupy, 200.0 if quick else 1000.0, rounds)
    bandwidth = max(row.per_s for row in copies)
    up, down = bus(cupy, 100.0 if quick else 400.0, rounds)
    rows = [*copies, up, down, into_pinned(cupy, mb, rounds)]
    for mib in CHUNKS_MIB:
        rows += resident(cupy, data, mib, rounds, bandwidth)
    rows.append(from_host(cupy, data, rounds, up.per_s))
    rows += from_shared_memory(cupy, data, rounds, up.per_s)
    rows += to_host(data, rounds, down.per_s)
    try:
        rows += hand_over(mb, rounds)
    except DeviceMemoryError as error:
        console.print(f"Handing over to another process is left out: {error}", markup=False)
    launch, off = launch_s(CupyBackend()), disagreement(data)
    needed = TARGET * bandwidth * launch
    show(rows, f"{workers} workers, {mb:g} MB")
    console.print(
        f"A launch takes the host {launch * 1e6:.1f} us: {TARGET:.0%} of the memory's bandwidth need "
        f"{needed / 1e6:.1f} MB read and written per launch.\n"
        f"Largest difference from NumPy: {off:.1e} of the magnitudes that were added up; "
        f"float32 rounds to {np.finfo(np.float32).eps / 2:.1e}.",
        highlight=False,
    )
    if file:
        figures = [
            {
                **dataclasses.asdict(row),
                "median_s": row.median_s,
                "per_s": row.per_s,
                "share": row.share,
            }
            for row in rows
        ]
        summary = {"launch_s": launch, "bytes_per_launch_needed": needed, "disagreement": off}
        report = {"environment": environment(cupy), "rows": figures, **summary}
        json.dump(report, file, indent=1)
        file.write("\n")


if __name__ == "__main__":
    main()
