"""The state server's cost: round trips of queries, next to an echo server that does nothing but send them back.

Both servers run in processes of their own, and one client process with a socket for each simulated worker asks
both in turn, a slice of time each, so that whatever else the machine does slows both. The workers of the state
server have really joined, and each answer is a decision of the default policy. Every worker has one query
under way at any time: at full load a round trip mostly waits for the other workers' turns. These ask more often than
any that train, so there is no limit to their rate here.

With `--flood` it measures instead what one peer that sends as fast as it can costs a worker with steps of 1 ms: slices
with and without the flood, in turn. The flood comes from a process of its own, and that takes a share of the cores.

    python benchmarks/state_server.py --quick
    python benchmarks/state_server.py --flood
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
FLOODS = ("queries of a worker", "noise of a stranger", "questions of a stranger")
"""What one peer floods the server with."""
ELSEWHERE = "noise, for an echo"
"""And a flood for another server: what the machine's cores alone cost."""
FLOODER, STRANGER = "flooder", "stranger"
STEP_S = 0.001
"""A local step of the worker beside it."""
BURST = 100
"""Messages that a flood sends before it looks whether it is to go on."""


# The servers


def serve_echo(ready: Any) -> None:
    """The least that a Python server can do: receive, send back."""
    socket = zmq.Context().socket(zmq.ROUTER)
    socket.bind(ENDPOINT)
    ready(socket.getsockopt_string(zmq.LAST_ENDPOINT).rstrip("\0"))
    while True:
        socket.send_multipart(socket.recv_multipart())


def serve_state(ready: Any, workers: int, limited: bool) -> None:
    """The state server as `esync-state` runs it; nothing ends the run."""
    run = RunConfig(workers=workers, heartbeat_s=3600.0)
    server = StateServer(run, ENDPOINT) if limited else StateServer(run, ENDPOINT, max_rate=0.0)
    ready(server.endpoint)
    transport.run(server.run())


def serve_flood(ready: Any, state: str, kind: str) -> None:
    """One peer that sends as fast as it can while it is told to, and reads no answer."""
    context: zmq.Context[Any] = zmq.Context()
    told = context.socket(zmq.REP)
    told.bind(ENDPOINT)
    name = FLOODER if kind == FLOODS[0] else STRANGER
    frame = {
        FLOODS[0]: messages.encode(Query(name, 0, 1, ahead=1, compute_s=1.0)),
        FLOODS[1]: b"\xc1" * 100,
        ELSEWHERE: b"\xc1" * 100,
        FLOODS[2]: messages.encode(messages.Status()),
    }[kind]
    ready(told.getsockopt_string(zmq.LAST_ENDPOINT).rstrip("\0"))
    flooding, sent, socket = False, 0, transport.dealer(context, name, state)
    while True:
        if not flooding or told.poll(0):
            flooding = told.recv() == b"flood"
            told.send(b"%d" % sent)
            sent = 0
            continue
        try:
            for _ in range(BURST):
                socket.send(frame, zmq.NOBLOCK)
                sent += 1
        except zmq.Again:
            socket.poll(1, zmq.POLLOUT)


# The load


class Worker:
    """One simulated worker: its socket, and the queries that it repeats.

    The first worker is the slowest. The others' steps take a fortieth to a quarter of its time, and all times
    scatter by two percent.
    """

    def __init__(self, context: zmq.Context[Any], endpoint: str, rank: int, name: str = "") -> None:
        self.name = name or f"worker-{rank:03d}"
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


def load(workers: list[Worker], seconds: float, step_s: float = 0.0) -> Figures:
    """Keep one query of every worker under way for so long, each `step_s` after the last one's answer.

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
            if step_s:
                time.sleep(step_s)
                now = clock()
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
        measure.process(serve_state, count, False) as state_at,
    ):
        context: zmq.Context[Any] = zmq.Context()
        context.set(zmq.MAX_SOCKETS, 8 * count + 64)  # each worker's have one more to watch them by
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
        "ratio": asdict(_ratio(pairs)),
    }


def flooded(kind: str, seconds: float, repetitions: int) -> dict[str, Any]:
    """Medians over the repetitions of slices with and without a flood; the ratios are of each pair's own."""
    with (
        measure.process(serve_echo) as echo_at,
        measure.process(serve_state, 2, True) as state_at,
    ):
        context: zmq.Context[Any] = zmq.Context()
        try:
            worker, flooder = (Worker(context, state_at, r, n) for r, n in ((0, ""), (1, FLOODER)))
            join(context, state_at, [worker, flooder])
            flooder.socket.close(0)  # its process goes on under its name
            target = echo_at if kind == ELSEWHERE else state_at
            with measure.process(serve_flood, target, kind) as flood_at:
                tell = context.socket(zmq.REQ)
                tell.connect(flood_at)
                load([worker], min(seconds, 0.3))  # warm up
                pairs, sent = [], 0
                for _ in range(repetitions):
                    quiet = load([worker], seconds, STEP_S)
                    tell.send(b"flood")
                    tell.recv()
                    pairs.append((quiet, load([worker], seconds, STEP_S)))
                    tell.send(b"stop")
                    sent += int(tell.recv())
                    load([worker], min(seconds, 0.3))  # what is left of it
        finally:
            context.destroy(linger=0)
    return {
        "flood": kind,
        "sent_per_s": sent / (seconds * repetitions),
        "quiet": asdict(_median([pair[0] for pair in pairs])),
        "flooded": asdict(_median([pair[1] for pair in pairs])),
        "ratio": asdict(_ratio(pairs)),
    }


def _ratio(pairs: list[tuple[Figures, Figures]]) -> Figures:
    """Medians of each pair's own ratio."""
    names = asdict(pairs[0][0])
    return Figures(*(median(getattr(b, n) / getattr(a, n) for a, b in pairs) for n in names))


def _median(rows: list[Figures]) -> Figures:
    return Figures(*(median(getattr(row, name) for row in rows) for name in asdict(rows[0])))


def show(rows: list[dict[str, Any]], title: str, caption: str, about: str, two: list[str]) -> None:
    """Print the table: a line for each of the `two`, and one for their ratio."""
    table = Table(title=title, caption=caption)
    for column in (about, "", "p50 µs", "p99 µs", "messages/s"):
        table.add_column(column, justify="left" if not column else "right")
    for row in rows:
        for name in two:
            f = row[name]
            table.add_row(
                str(row[about]) if name == two[0] else "",
                name,
                f"{f['p50_us']:,.0f}",
                f"{f['p99_us']:,.0f}",
                f"{f['per_s']:,.0f}",
            )
        f = row["ratio"]
        cells = [f"{f[name]:.2f}" for name in ("p50_us", "p99_us", "per_s")]
        table.add_row("", f"{two[1]} / {two[0]}", *cells, style="bold", end_section=True)
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
@click.option("--flood", is_flag=True, help="What a flood from one peer costs another worker.")
@click.option("--json", "file", type=click.File("w", lazy=True), help="Write the figures here too.")
def main(
    quick: bool, seconds: float | None, repetitions: int | None, flood: bool, file: Any
) -> None:
    """Measure the state server's round trips with 1, 16 and 256 workers next to a bare ZeroMQ echo."""
    allow_sockets()
    seconds = seconds or (0.2 if quick else 1.0)
    repetitions = repetitions or (3 if quick else 9)
    where = measure.environment()
    caption = (
        f"Medians of {repetitions} x {seconds:g} s; load and servers share {where['cores']} cores."
    )
    if flood:
        rows = [flooded(kind, seconds, repetitions) for kind in (*FLOODS, ELSEWHERE)]
        show(rows, "Query round trips: under a flood", caption, "flood", ["quiet", "flooded"])
    else:
        rows = [compare(count, seconds, repetitions) for count in CLIENTS]
        title = "Query round trips: state server and bare echo"
        show(rows, title, caption, "clients", ["echo", "esync"])
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
