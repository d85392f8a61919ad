"""The state server's cost: round trips of queries, next to an echo server that does nothing but send them back.

Both servers run in processes of their own, and one client process with a socket for each simulated worker asks
both in turn, a slice of time each, so that whatever else the machine does slows both. The workers of the state
server have really joined, and each answer is a decision of the default policy. Every worker has one query
under way at any time: at full load a round trip mostly waits for the other workers' turns.

    python benchmarks/state_server.py --quick
"""

from __future__ import annotations

import json
import random
import resource
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import cycle
from statistics import median
from typing import Any

import click
import measure
import numpy as np
import zmq
from rich.console import Console
from rich.table import Table

from esync import messages, tensors, transport
from esync.config import RunConfig
from esync.messages import Join, Members, Message, Query, Response, Welcome
from esync.state.server import StateServer

CLIENTS = (1, 16, 256)
CYCLE = (8, 8)
"""Rounds, and local steps in each, that a worker's queries go through before they start over."""
TIMEOUT_MS = 10_000
ENDPOINT = "tcp://127.0.0.1:*"


# The servers


def serve_echo(ready: Any) -> None:
    """The least that a Python server can do: receive, send back."""
    socket = zmq.Context().socket(zmq.ROUTER)
    socket.bind(ENDPOINT)
    ready(socket.getsockopt_string(zmq.LAST_ENDPOINT).rstrip("\0"))
    while True:
        socket.send_multipart(socket.recv_multipart())


def serve_state(ready: Any, workers: int) -> None:
    """The state server as `esync-state` runs it; nothing ends the run."""
    server = StateServer(RunConfig(workers=workers, heartbeat_s=3600.0), ENDPOINT)
    ready(server.endpoint)
    transport.run(server.run())


# The load


class Worker:
    """One simulated worker: its socket, and the queries that it repeats.

    The first worker is the slowest. The others' steps take a fortieth to a quarter of its time, and all times
    scatter by two percent.
    """

    def __init__(self, context: zmq.Context[Any], endpoint: str, rank: int) -> None:
        self.name = f"worker-{rank:03d}"
        self.socket = transport.dealer(context, self.name, endpoint)
        self.socket.linger = 0
        self.socket.rcvtimeo = TIMEOUT_MS
        dice = random.Random(rank)
        step_s = dice.uniform(0.2, 2.0) if rank else 8.0
        rounds, steps = CYCLE
        self.queries = cycle(
            messages.encode(
                Query(
                    self.name,
                    round,
                    step,
                    ahead=1,
                    compute_s=step_s * dice.uniform(0.98, 1.02),
                    samples=64 * step,
                    loss=2.0 / step,
                )
            )
            for round in range(rounds)
            for step in range(1, steps + 1)
        )

    def ask(self, message: Message) -> None:
        self.socket.send(messages.encode(message))

    def await_a(self, kind: type) -> None:
        """Receive until an answer of this kind comes; what the server says meanwhile is passed over."""
        while True:
            answer = messages.decode(self.socket.recv())
            if isinstance(answer, kind):
                return
            if isinstance(answer, messages.Error):
                raise RuntimeError(f"{self.name} was refused: {answer.code}: {answer.text}")


def join(context: zmq.Context[Any], endpoint: str, workers: list[Worker]) -> zmq.Socket[bytes]:
    """Start the run: a stand-in for the parameter server joins (its socket is returned), then the workers."""
    ps = transport.dealer(context, "ps", endpoint)
    ps.linger = 0
    nowhere = {"push": "tcp://127.0.0.1:1", "model": "tcp://127.0.0.1:2"}
    ps.send(messages.encode(Join("ps", "ps", endpoints=nowhere)))
    layout = tensors.layout_of([(tensors.DELTA, "dense", np.zeros((10, 10), np.float32))])
    for worker in workers:
        worker.ask(Join(worker.name, "worker"))
        worker.await_a(Welcome)
        worker.ask(Join(worker.name, "worker", layout=layout.to_wire()))
        worker.await_a(Welcome)
    for worker in workers:
        worker.ask(Query(worker.name, 0, 0))
    expected = 0
    while expected < len(workers):
        announced = messages.decode(ps.recv())
        if isinstance(announced, Members):
            expected = len(announced.workers)
            ps.send(messages.encode(Members(announced.epoch, {})))
    for worker in workers:
        worker.await_a(Response)
    return ps


@dataclass
class Figures:
    """Round-trip times in microseconds, and round trips a second of all workers together."""

    p50_us: float
    p99_us: float
    per_s: float


def load(workers: list[Worker], seconds: float) -> Figures:
    """Keep one query of every worker under way for so long.

    The workers take turns: both servers answer first come, first served, so that the next worker's answer is
    the next to come.

    Raises:
        zmq.Again: an answer was missing for ten seconds.
        RuntimeError: a last answer is not one to a query.
    """
    turns = [(worker.socket, worker.queries) for worker in workers]
    asked = [0] * len(turns)
    times = []
    clock = time.perf_counter_ns
    for i, (socket, queries) in enumerate(turns):
        asked[i] = clock()
        socket.send(next(queries))
    begin = clock()
    end = begin + int(seconds * 1e9)
    now = begin
    while now < end:
        for i, (socket, queries) in enumerate(turns):
            socket.recv()
            now = clock()
            times.append(now - asked[i])
            asked[i] = now
            socket.send(next(queries))
    for worker in workers:
        answer = worker.socket.recv()
        if not isinstance(messages.decode(answer), Query | Response):
            raise RuntimeError(f"{worker.name} was not answered but got {answer!r:.200}")
    p50, p99 = np.percentile(times, (50, 99)) / 1e3
    return Figures(float(p50), float(p99), len(times) / (now - begin) * 1e9)


@contextmanager
def connected(count: int) -> Iterator[tuple[list[Worker], list[Worker]]]:
    """`count` workers of an echo server and as many of a state server, ready to be measured."""
    with (
        measure.process(serve_echo) as echo_at,
        measure.process(serve_state, count) as state_at,
    ):
        context: zmq.Context[Any] = zmq.Context()
        try:
            echo = [Worker(context, echo_at, rank) for rank in range(count)]
            state = [Worker(context, state_at, rank) for rank in range(count)]
            join(context, state_at, state)
            yield echo, state
        finally:
            context.destroy(linger=0)


# The comparison


def compare(count: int, seconds: float, repetitions: int) -> dict[str, Any]:
    """Medians over the repetitions; the ratios too are medians, of each repetition's own ratio."""
    with connected(count) as (echo, state):
        for workers in (echo, state):
            load(workers, min(seconds, 0.3))  # warm up
        pairs = [(load(echo, seconds), load(state, seconds)) for _ in range(repetitions)]
    return {
        "clients": count,
        "echo": asdict(_median([pair[0] for pair in pairs])),
        "esync": asdict(_median([pair[1] for pair in pairs])),
        "ratio": asdict(
            Figures(
                median(b.p50_us / a.p50_us for a, b in pairs),
                median(b.p99_us / a.p99_us for a, b in pairs),
                median(b.per_s / a.per_s for a, b in pairs),
            )
        ),
    }


def _median(rows: list[Figures]) -> Figures:
    return Figures(*(median(getattr(row, name) for row in rows) for name in asdict(rows[0])))


def show(rows: list[dict[str, Any]], caption: str) -> None:
    """Print the table: a line for each server, and one for their ratio."""
    table = Table(title="Query round trips: state server and bare echo", caption=caption)
    for column in ("workers", "server", "p50 µs", "p99 µs", "messages/s"):
        table.add_column(column, justify="left" if column == "server" else "right")
    for row in rows:
        for server in ("echo", "esync"):
            f = row[server]
            table.add_row(
                str(row["clients"]) if server == "echo" else "",
                server,
                f"{f['p50_us']:,.0f}",
                f"{f['p99_us']:,.0f}",
                f"{f['per_s']:,.0f}",
            )
        f = row["ratio"]
        cells = [f"{f[name]:.2f}" for name in ("p50_us", "p99_us", "per_s")]
        table.add_row("", "esync / echo", *cells, style="bold", end_section=True)
    Console().print(table)


def allow_sockets() -> None:
    """Raise the soft limit of open files: each worker has two sockets here, with two descriptors each."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = 8 * max(CLIENTS)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        limit = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (limit, hard))


@click.command()
@click.option("--quick", is_flag=True, help="A few seconds in all: rough figures.")
@click.option(
    "--seconds", type=click.FloatRange(min=0.05), help="Length of a slice [1; quick: 0.2]."
)
@click.option(
    "--repetitions", type=click.IntRange(min=1), help="Pairs of slices to measure [9; quick: 3]."
)
@click.option("--json", "file", type=click.File("w", lazy=True), help="Write the figures here too.")
def main(quick: bool, seconds: float | None, repetitions: int | None, file: Any) -> None:
    """Measure the state server's round trips with 1, 16 and 256 workers next to a bare ZeroMQ echo."""
    allow_sockets()
    seconds = seconds or (0.2 if quick else 1.0)
    repetitions = repetitions or (3 if quick else 9)
    rows = [compare(count, seconds, repetitions) for count in CLIENTS]
    where = measure.environment()
    show(
        rows,
        f"Medians of {repetitions} x {seconds:g} s; load and servers share {where['cores']} cores.",
    )
    if file:
        result = {
            "seconds": seconds,
            "repetitions": repetitions,
            "environment": where,
            "rows": rows,
        }
        json.dump(result, file, indent=2)
        file.write("\n")


if __name__ == "__main__":
    main()
