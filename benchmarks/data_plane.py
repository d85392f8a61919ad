"""One synchronisation of a vector between workers: esync's lanes beside gloo, a bare-ZeroMQ floor and a memcpy floor.

Every worker sends a vector of float32, the mean is formed, every worker has the new model; again and again, with
nothing done in between. The state server, the parameter server and the workers are processes of their own on this
machine, and so are gloo's ranks. What is timed is from one synchronisation's end to the next, at the worker of rank 0.

    python benchmarks/data_plane.py --quick
    python benchmarks/data_plane.py --workers 4 --mb 45 --rounds 40 --json data_plane.json

gloo needs PyTorch (pip install torch); without it its rows are left out, and said to be. The lane "gpu", all on one
NVIDIA GPU, needs that, CuPy and JAX for CUDA (pip install 'esync[cuda12]'); it is left out where they are not there.
"""

from __future__ import annotations

import importlib.util
import json
import multiprocessing
import os
import socket
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import click
import measure
import numpy as np
import zmq
from inside.role import loopback_bytes
from rich.console import Console
from rich.table import Table

from esync import cli, device_memory, keys

WARM_UP = 3
"""Synchronisations that are not counted: memory is touched for the first time in them."""
CHUNK = 1 << 20
"""Bytes of a message of bare ZeroMQ, which is fastest with these."""
SEALED, CURVE = "tcp, sealed", "tcp, CURVE"
GPU = "gpu"
LANES = ("tcp", "ipc", "shared memory", SEALED, CURVE, GPU)
CONTEXT = multiprocessing.get_context("spawn")


@dataclass
class Row:
    """One measurement.

    Attributes:
        seconds: of each synchronisation.
        wire_mb: MB that crossed the loopback interface, of whatever program, per synchronisation.
        server_cpu_s: CPU seconds of the parameter server per synchronisation.
        server_mb, worker_mb: peak resident memory; `server_grown_mb`: that beyond what the server had before the model.
    """

    system: str
    workers: int
    mb: float
    seconds: list[float]
    wire_mb: float | None = None
    server_cpu_s: float | None = None
    server_mb: float | None = None
    server_grown_mb: float | None = None
    worker_mb: float | None = None
    notes: dict[str, Any] = field(default_factory=dict)

    @property
    def median_s(self) -> float:
        return statistics.median(self.seconds)

    @property
    def p99_s(self) -> float:
        return float(np.quantile(self.seconds, 0.99))


def memory_mb(pid: int, what: str) -> float:
    """`VmHWM` (peak) or `VmRSS` of a process in MB."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith(what + ":"):
            return int(line.split()[1]) * 1024 / 1e6
    raise RuntimeError(f"/proc/{pid}/status has no {what}")


def cpu_s(pid: int) -> float:
    """CPU seconds of a process so far."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def page_faults(pid: int) -> int:
    """Minor page faults of a process so far."""
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[7])


@contextmanager
def child(target: Callable[..., None], *args: Any) -> Iterator[tuple[Connection, int]]:
    """`target(pipe, *args)` in a process of its own; gives the pipe's other end and the process id. It ends with the
    block, whatever happens in it, and with this process."""
    ours, theirs = CONTEXT.Pipe()
    process = CONTEXT.Process(target=_until_told, args=(target, theirs, *args), daemon=True)
    process.start()
    theirs.close()
    try:
        assert process.pid is not None
        yield ours, process.pid
    finally:
        ours.close()
        process.join(5)
        if process.is_alive():
            process.kill()
            process.join()


def _until_told(target: Callable[..., None], pipe: Connection, *args: Any) -> None:
    try:
        target(pipe, *args)
        pipe.recv()  # the parent looks at this process before it lets go of the pipe
    except (EOFError, KeyboardInterrupt):
        pass


def result_of(pipe: Connection, who: str, patience_s: float = 120.0) -> Any:
    """What a child sends next.

    Raises:
        RuntimeError: it ended instead, or took too long.
    """
    try:
        if pipe.poll(patience_s):
            return pipe.recv()
    except (EOFError, OSError):
        pass
    raise RuntimeError(f"{who} ended, or was silent for {patience_s:g} s; see its error above")


def intervals(ends: list[float]) -> list[float]:
    """Seconds from each end to the next, without the warm-up."""
    return [b - a for a, b in zip(ends[WARM_UP:], ends[WARM_UP + 1 :], strict=False)]


# esync


def esync_state(pipe: Connection, run: dict[str, Any], bind: str, directory: str = "") -> None:
    from esync import keys, transport
    from esync.config import RunConfig
    from esync.state.server import StateServer

    own = keys.load_server(directory) if directory else None
    server = StateServer(RunConfig(**run), bind, keys=own)
    pipe.send(server.endpoint)
    transport.run(server.run())


def esync_ps(pipe: Connection, state: str, options: dict[str, Any]) -> None:
    from esync import transport
    from esync.config import PsConfig
    from esync.ps.server import ParameterServer

    cli.keep_memory(one_arena=True)  # as esync-ps does
    shard = options.pop("shard", 0)
    server = ParameterServer(state, PsConfig(**options), name=f"ps{shard}", shard=shard)
    pipe.send("ready")
    transport.run(server.run())


def esync_worker(
    pipe: Connection,
    state: str,
    rank: int,
    elements: int,
    rounds: int,
    directory: str,
    on_gpu: bool,
) -> None:
    import jax.numpy as jnp

    from esync.worker.client import Worker

    cli.keep_memory()  # as esync-worker does
    update: Any = np.random.default_rng(rank).normal(size=elements).astype(np.float32)
    zeros: Any = np.zeros(elements, np.float32)
    if on_gpu:
        update, zeros = device_memory.from_jax(jnp.asarray(update)), jnp.asarray(zeros)
    with Worker(state, name=f"w{rank}", rank=rank, keys=directory) as worker:
        worker.start({"w": zeros})
        pipe.send("started")
        pipe.recv()
        ends = []
        for _ in range(rounds + WARM_UP + 1):
            parts = worker.exchange(update)
            ends.append(time.perf_counter())
        if on_gpu and isinstance(parts[0], np.ndarray):
            raise RuntimeError("models did not come through the GPU's memory")
        pipe.send((ends, float(parts[0][0]), worker.totals.to_wire()))
        pipe.recv()


def esync(lane: str, workers: int, mb: float, rounds: int, **run: Any) -> Row:
    """esync itself, over one of its lanes."""
    elements = int(mb * 1e6 / 4)
    settings = {"mode": "esync", "model": "own", "workers": workers, **run}
    settings["shared_memory"] = lane in ("shared memory", GPU)
    with ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory())
        tcp = lane != "ipc"
        bind = "tcp://127.0.0.1:*" if tcp else f"ipc://{folder}/state"
        directory = ""
        if lane in (SEALED, CURVE):
            directory = f"{folder}/keys"
            keys.make(directory, [])
        state, _ = stack.enter_context(child(esync_state, settings, bind, directory))
        endpoint = result_of(state, "the state server")
        servers = []
        for shard in range(settings.get("ps", 1)):
            options = {"bind": "127.0.0.1" if tcp else f"ipc://{folder}/ps{shard}", "shard": shard}
            options |= {"keys": directory, "curve": lane == CURVE}
            options |= {"device": "cuda" if lane == GPU else "cpu"}
            servers.append(stack.enter_context(child(esync_ps, endpoint, options)))
        for pipe, _ in servers:
            result_of(pipe, "a parameter server")
        ps_pid = servers[0][1]
        before_mb = memory_mb(ps_pid, "VmRSS")
        trainers = [
            stack.enter_context(
                child(esync_worker, endpoint, rank, elements, rounds, directory, lane == GPU)
            )
            for rank in range(workers)
        ]
        for rank, (pipe, _) in enumerate(trainers):
            result_of(pipe, f"worker {rank}")
        cpu, wire = cpu_s(ps_pid), loopback_bytes()
        faults = [page_faults(pid) for pid in (ps_pid, trainers[0][1])]
        for pipe, _ in trainers:
            pipe.send("go")
        results = [result_of(pipe, f"worker {rank}") for rank, (pipe, _) in enumerate(trainers)]
        cpu = (cpu_s(ps_pid) - cpu) / (rounds + WARM_UP + 1)
        wire = loopback_bytes() - wire
        peak = memory_mb(ps_pid, "VmHWM")
        faults = [
            (page_faults(pid) - before) // (rounds + WARM_UP + 1)
            for pid, before in zip((ps_pid, trainers[0][1]), faults, strict=True)
        ]
        assert len({value for _, value, _ in results}) == 1, "the workers' models differ"
        name = f"esync, {lane}" + "".join(f", {_say(key, value)}" for key, value in run.items())
        return Row(
            name,
            workers,
            mb,
            intervals(results[0][0]),
            wire_mb=wire / (rounds + WARM_UP + 1) / 1e6,
            server_cpu_s=cpu,
            server_mb=peak,
            server_grown_mb=peak - before_mb,
            worker_mb=max(memory_mb(pid, "VmHWM") for _, pid in trainers),
            notes={"page_faults": dict(zip(("server", "worker"), faults, strict=True))},
        )


def _say(option: str, value: Any) -> str:
    words = {"ps": "{} servers", "chunk_mib": "chunks of {} MiB"}
    return words.get(option, "{}").format(value)


LEAVES = 100
STEP_S = 0.002
"""What a local step is taken to cost: a busy processor."""
COMPILED, INTERPRETED = "compiled", "Python"
"""Steps: a compiled function of JAX, during which other threads of Python run; a loop that keeps them waiting."""
SITUATIONS = ("nothing to do", "a model arrives", "it pushes or merges")


def compiled_step() -> Callable[[], object]:
    """A step of JAX that takes about `STEP_S` when nothing else runs."""
    import jax
    import jax.numpy as jnp

    x = jnp.ones((64, 64), jnp.float32)

    def repeated(count: int) -> Callable[[], object]:
        work = jax.jit(
            lambda x: jax.lax.fori_loop(0, count, lambda i, y: jnp.tanh(0.01 * (y @ x)), x)
        )
        return lambda: work(x).block_until_ready()

    step = repeated(64)
    step()
    began = time.perf_counter()
    for _ in range(20):
        step()
    step = repeated(max(1, round(64 * STEP_S * 20 / (time.perf_counter() - began))))
    step()
    return step


def interpreted_step() -> None:
    until = time.perf_counter() + STEP_S
    while time.perf_counter() < until:
        pass


def stepping_worker(
    pipe: Connection, state: str, rank: int, elements: int, kind: str, seconds: float
) -> None:
    import jax.numpy as jnp

    from esync.worker.client import Worker

    local_step = compiled_step() if kind == COMPILED else interpreted_step
    sizes = [elements // LEAVES] * LEAVES
    tree = {f"layer{i}": jnp.zeros(size, jnp.float32) for i, size in enumerate(sizes)}
    quiet, arriving, busy = [], [], []
    with Worker(state, name=f"w{rank}", rank=rank) as worker:
        tree = worker.start(tree)
        model = worker._shared.model
        assert model is not None
        (assembly,) = model.assemblies
        until = time.perf_counter() + seconds
        while time.perf_counter() < until and not worker.stopped:
            local_step()
            before, synced = bool(assembly._partial), worker.totals.sync_s
            began = time.perf_counter()
            tree = worker.step(tree)
            took = time.perf_counter() - began
            if worker.totals.sync_s != synced:
                busy.append(took)
            elif before or assembly._partial:
                arriving.append(took)
            else:
                quiet.append(took)
        pipe.send((quiet, arriving, busy, worker.round))


def stepping(lane: str, kind: str, workers: int, mb: float, seconds: float) -> dict[str, Any]:
    """Seconds that `worker.step` takes of a tree of JAX arrays, with overlapped synchronisation and a kind of local
    step: when there is nothing to do, while a model arrives, and when it pushes or merges."""
    settings = {"mode": "esync", "overlap": True, "model": "own", "workers": workers}
    settings |= {"shared_memory": lane in ("shared memory", GPU), "duration_s": seconds + 60}
    with ExitStack() as stack:
        state, _ = stack.enter_context(child(esync_state, settings, "tcp://127.0.0.1:*"))
        endpoint = result_of(state, "the state server")
        options = {"device": "cuda" if lane == GPU else "cpu"}
        ps, _ = stack.enter_context(child(esync_ps, endpoint, options))
        result_of(ps, "the parameter server")
        elements = int(mb * 1e6 / 4)
        rows = [
            stack.enter_context(child(stepping_worker, endpoint, rank, elements, kind, seconds))
            for rank in range(workers)
        ]
        results = [result_of(pipe, f"worker {i}") for i, (pipe, _) in enumerate(rows)]
    row: dict[str, Any] = {"lane": lane, "step": kind, "workers": workers, "mb": mb}
    row["rounds"] = results[0][3]
    for i, name in enumerate(SITUATIONS):
        times = [seconds for result in results for seconds in result[i]]
        row[name] = {
            "calls": len(times),
            **({"median_us": float(np.median(times)) * 1e6} if times else {}),
            **({"p99_us": float(np.quantile(times, 0.99)) * 1e6} if times else {}),
        }
    return row


# gloo


def gloo_rank(
    pipe: Connection, rank: int, workers: int, port: int, elements: int, rounds: int
) -> None:
    import torch
    import torch.distributed as dist

    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), GLOO_SOCKET_IFNAME="lo")
    dist.init_process_group("gloo", rank=rank, world_size=workers)
    x = torch.randn(elements)
    dist.all_reduce(x)  # connects
    wire, ends = loopback_bytes(), []
    for _ in range(rounds + WARM_UP + 1):
        dist.all_reduce(x)
        ends.append(time.perf_counter())
    pipe.send((ends, torch.__version__, (loopback_bytes() - wire) / (rounds + WARM_UP + 1)))
    pipe.recv()
    dist.destroy_process_group()


def gloo(workers: int, mb: float, rounds: int) -> Row:
    """gloo's all-reduce (a sum) of PyTorch tensors."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    elements = int(mb * 1e6 / 4)
    with ExitStack() as stack:
        ranks = [
            stack.enter_context(child(gloo_rank, rank, workers, port, elements, rounds))
            for rank in range(workers)
        ]
        results = [result_of(pipe, f"rank {i}") for i, (pipe, _) in enumerate(ranks)]
        peak = max(memory_mb(pid, "VmHWM") for _, pid in ranks)
        version = results[0][1]
        return Row(
            "gloo all-reduce",
            workers,
            mb,
            intervals(results[0][0]),
            wire_mb=results[0][2] / 1e6,
            worker_mb=peak,
            notes={"torch": version},
        )


# Floors


def bare_worker(pipe: Connection, push: str, model: str, size: int, rounds: int) -> None:
    context = zmq.Context()
    up, down = context.socket(zmq.PUSH), context.socket(zmq.SUB)
    up.connect(push)
    down.connect(model)
    down.subscribe(b"")
    data = memoryview(bytearray(size))
    down.recv()  # the server says hello until everybody has pushed
    up.send(b"")
    pipe.send("ready")
    pipe.recv()
    chunks = range(0, size, CHUNK)
    ends = []
    for _ in range(rounds + WARM_UP + 1):
        for at in chunks:
            up.send(data[at : at + CHUNK], copy=False)
        left = len(chunks)
        while left:
            frame = down.recv(copy=False)
            if len(frame.buffer):
                left -= 1
        ends.append(time.perf_counter())
    pipe.send(ends)
    pipe.recv()
    context.destroy(0)


def bare(kind: str, workers: int, mb: float, rounds: int, *, adds: bool = False) -> Row:
    """As much over the same sockets, with nothing looked at, and nothing added up unless it `adds`."""
    size = int(mb * 1e6) // 4 * 4
    with ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory())
        context = zmq.Context()
        stack.callback(context.destroy, 0)
        pull, pub = context.socket(zmq.PULL), context.socket(zmq.PUB)
        pull.setsockopt(zmq.RCVHWM, 8)
        pub.setsockopt(zmq.SNDHWM, 100_000)
        for s, name in ((pull, "push"), (pub, "model")):
            s.bind("tcp://127.0.0.1:*" if kind == "tcp" else f"ipc://{folder}/{name}")
        ends_at = [s.getsockopt_string(zmq.LAST_ENDPOINT) for s in (pull, pub)]
        rows = [
            stack.enter_context(child(bare_worker, *ends_at, size, rounds)) for _ in range(workers)
        ]
        here = 0
        while here < workers:
            pub.send(b"")
            if pull.poll(50):
                pull.recv()
                here += 1
        for i, (pipe, _) in enumerate(rows):
            result_of(pipe, f"bare worker {i}")
            pipe.send("go")
        model = np.zeros(size // 4, np.float32)
        chunks = [model[at : at + CHUNK // 4] for at in range(0, model.size, CHUNK // 4)]
        for _ in range(rounds + WARM_UP + 1):
            for i, chunk in enumerate(chunks):
                frames = [pull.recv(copy=False) for _ in range(1 if adds else workers)]
                if adds:
                    # (Near a round's end it may be another chunk's, of another size: the same work for nothing.)
                    total = _padded(frames[0], chunk.size)
                    for k in range(1, workers):
                        x = _padded(pull.recv(copy=False), chunk.size)
                        total = np.add(total, x, out=total if k > 1 else None)
                    total *= np.float32(1 / workers)
                    total += chunk
                    chunks[i] = total
                pub.send(chunks[i].data.cast("B"), copy=False)
        ends = [result_of(pipe, f"bare worker {i}") for i, (pipe, _) in enumerate(rows)]
        name = f"bare ZeroMQ, {kind}" + (", sums" if adds else "")
        return Row(name, workers, mb, intervals(ends[0]))


def _padded(frame: zmq.Frame, size: int) -> np.ndarray[Any, np.dtype[np.float32]]:
    """A chunk's elements, so many of them."""
    x = np.frombuffer(frame.buffer, np.float32)
    return x[:size] if x.size >= size else np.resize(x, size)


def copying(pipe: Connection, size: int, workers: int, rounds: int) -> None:
    source = np.zeros(size // 4, np.float32) + 1
    target = np.empty_like(source)
    pipe.send("ready")
    pipe.recv()
    ends = []
    for _ in range(rounds + WARM_UP + 1):
        for _ in range(workers):
            np.copyto(target, source)
        ends.append(time.perf_counter())
    pipe.send(ends)


def memcpy(workers: int, mb: float, rounds: int) -> Row:
    """Every vector copied once on its way up and once on its way down, by two processes at the same time."""
    with ExitStack() as stack:
        both = [
            stack.enter_context(child(copying, int(mb * 1e6), workers, rounds)) for _ in range(2)
        ]
        for pipe, _ in both:
            result_of(pipe, "the copying process")
        for pipe, _ in both:
            pipe.send("go")
        ends = [result_of(pipe, "the copying process") for pipe, _ in both]
        return Row("memcpy", workers, mb, intervals(ends[0]))


# Tables


def show(rows: list[Row], baseline: str) -> None:
    """Print a table; ratios are to the baseline with as many workers and bytes."""
    table = Table(title="one synchronisation", title_justify="left")
    for column in (
        "system",
        "workers",
        "MB",
        "median ms",
        "p99 ms",
        f"x {baseline}",
        "MB on loopback",
        "server CPU ms",
        "server MB",
        "of it grown",
        "worker MB",
    ):
        table.add_column(column, justify="left" if column == "system" else "right")
    for row in rows:
        base = next(
            (
                r.median_s
                for r in rows
                if (r.system, r.workers, r.mb) == (baseline, row.workers, row.mb)
            ),
            None,
        )
        table.add_row(
            row.system,
            str(row.workers),
            f"{row.mb:g}",
            f"{row.median_s * 1e3:.1f}",
            f"{row.p99_s * 1e3:.1f}",
            f"{row.median_s / base:.2f}" if base else "",
            *(
                "" if x is None else f"{x:.0f}"
                for x in (
                    row.wire_mb,
                    None if row.server_cpu_s is None else row.server_cpu_s * 1e3,
                    row.server_mb,
                    row.server_grown_mb,
                    row.worker_mb,
                )
            ),
        )
    Console(width=None if Console().is_terminal else 160).print(table)


def show_steps(rows: list[dict[str, Any]]) -> None:
    """Print what `worker.step` takes."""
    table = Table(title="worker.step, microseconds", title_justify="left")
    for column in ("lane", "local step", "MB", "while", "calls", "median", "p99"):
        table.add_column(
            column, justify="right" if column in ("calls", "median", "p99") else "left"
        )
    for row in rows:
        for name in SITUATIONS:
            about = row[name]
            cells = (f"{about[x]:.0f}" if x in about else "" for x in ("median_us", "p99_us"))
            mb, calls = f"{row['mb']:g}", str(about["calls"])
            table.add_row(row["lane"], row["step"], mb, name, calls, *cells)
    Console(width=None if Console().is_terminal else 100).print(table)


@click.command()
@click.option("--quick", is_flag=True, help="Two workers, 4 MB, few rounds.")
@click.option("--workers", "counts", multiple=True, type=int, help="Workers [2, 4, 8].")
@click.option("--mb", "sizes", multiple=True, type=float, help="MB of a vector [1, 45, 240].")
@click.option("--rounds", type=click.IntRange(min=5), default=None, help="Counted rounds [30].")
@click.option("--lane", "lanes", multiple=True, type=click.Choice(LANES), help="Only this lane.")
@click.option("--compression", multiple=True, help="Also over tcp with this compression.")
@click.option(
    "--ps", type=click.IntRange(2), multiple=True, help="Also over tcp with so many servers."
)
@click.option(
    "--chunk-mib",
    "chunks_mib",
    type=click.IntRange(1, 64),
    multiple=True,
    help="Also over each lane in chunks of so many MiB.",
)
@click.option("--only-esync", is_flag=True, help="Leave out gloo and the floors.")
@click.option(
    "--step", is_flag=True, help="Only what worker.step takes when there is nothing to do."
)
@click.option("--repeat", default=1, show_default=True, help="Measure everything so many times.")
@click.option("--json", "file", type=click.File("w", lazy=True), help="Write the figures here too.")
def main(
    quick: bool,
    counts: tuple[int, ...],
    sizes: tuple[float, ...],
    rounds: int | None,
    lanes: tuple[str, ...],
    compression: tuple[str, ...],
    ps: tuple[int, ...],
    chunks_mib: tuple[int, ...],
    only_esync: bool,
    step: bool,
    repeat: int,
    file: Any,
) -> None:
    """Seconds per synchronisation over each lane, beside gloo and the floors, on this machine."""
    counts = counts or ((2,) if quick else (2, 4, 8))
    sizes = sizes or ((4.0,) if quick else (1.0, 45.0, 240.0))
    rounds = rounds or (10 if quick else 30)
    console = Console(stderr=True)
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # processes share the GPU
    cli.keep_memory(one_arena=True)  # as esync-ps does: the bare one's sums are made here
    no_gpu = device_memory.unsupported()
    if no_gpu and GPU in lanes:
        console.print(f"There is no lane {GPU} here: {no_gpu}", markup=False)
        sys.exit(2)
    if step:
        steps = [
            stepping(lane, kind, 2, 4.0 if quick else 45.0, 3.0 if quick else 15.0)
            for lane in lanes or ("tcp", "shared memory")
            for kind in (COMPILED, INTERPRETED)
        ]
        show_steps(steps)
        if file:
            json.dump({"environment": measure.environment(), "rows": steps}, file, indent=1)
            file.write("\n")
        return
    if no_gpu and not lanes:
        console.print(f"The lane {GPU} is left out: {no_gpu}", markup=False)
    has_torch = importlib.util.find_spec("torch") is not None
    if not has_torch and not only_esync:
        console.print("gloo is left out: it needs PyTorch (pip install torch)")
    rows: list[Row] = []
    for mb in sizes:
        for workers in counts:
            plan: list[Callable[[], Row]] = []
            for lane in lanes or (LANES[:-1] if no_gpu else LANES):
                plan.append(lambda lane=lane, n=workers, mb=mb: esync(lane, n, mb, rounds))  # type: ignore[misc]
                for mib in chunks_mib:
                    plan.append(
                        lambda lane=lane, n=workers, mb=mb, mib=mib: esync(  # type: ignore[misc]
                            lane, n, mb, rounds, chunk_mib=mib
                        )
                    )
            for name in compression:
                plan.append(
                    lambda name=name, n=workers, mb=mb: esync(  # type: ignore[misc]
                        "tcp", n, mb, rounds, compression=name
                    )
                )
            for count in ps:
                plan.append(
                    lambda count=count, n=workers, mb=mb: esync(  # type: ignore[misc]
                        "tcp", n, mb, rounds, ps=count
                    )
                )
            if not only_esync:
                if has_torch:
                    plan.append(lambda n=workers, mb=mb: gloo(n, mb, rounds))  # type: ignore[misc]
                for kind, adds in (("tcp", True), ("tcp", False), ("ipc", False)):
                    plan.append(
                        lambda kind=kind, adds=adds, n=workers, mb=mb: bare(  # type: ignore[misc]
                            kind, n, mb, rounds, adds=adds
                        )
                    )
                plan.append(lambda n=workers, mb=mb: memcpy(n, mb, rounds))  # type: ignore[misc]
            for one in plan * repeat:
                row = one()
                rows.append(row)
                console.print(
                    f"{row.system}, {workers} workers, {mb:g} MB: {row.median_s * 1e3:.1f} ms {row.notes or ''}",
                    highlight=False,
                )
    show(rows, "gloo all-reduce" if has_torch and not only_esync else rows[0].system)
    if file:
        figures = [{**asdict(row), "median_s": row.median_s, "p99_s": row.p99_s} for row in rows]
        json.dump({"environment": measure.environment(), "rows": figures}, file, indent=1)
        file.write("\n")


if __name__ == "__main__":
    main()
