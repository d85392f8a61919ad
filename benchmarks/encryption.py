"""What encrypting the data channel costs: CURVE, where ZeroMQ's I/O threads do it, beside sealed chunks, where the
threads that send and receive do it.

A process sends a model in chunks of 2 MiB, as updates are sent, to another process over tcp on the loopback interface;
what is timed is from the first chunk's send to word from the receiver that it has the last. The ways take turns, round
by round. CPU seconds are those of a whole process, with its I/O threads. Ciphers alone are timed in one thread.

    python benchmarks/encryption.py --quick
    python benchmarks/encryption.py --json encryption.json
"""

from __future__ import annotations

import itertools
import json
import os
import statistics
import struct
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import click
import measure
import numpy as np
import zmq
from cryptography.hazmat.primitives.ciphers.aead import AESGCM, ChaCha20Poly1305
from rich.console import Console
from rich.table import Table

from esync import cli, keys, messages, transport
from esync.seal import Opener, Sealer, new_key
from esync.tensors import CHUNK_ELEMENTS

CHUNK_BYTES = 4 * CHUNK_ELEMENTS
HEADER = messages.encode(messages.Update("gpu", 1, 1, "0" * 16))
LOCAL = "tcp://127.0.0.1:*"
WARM_UP = 2
"""Rounds that are not counted."""
DONE = struct.Struct("d")
"""Word of the receiver: CPU seconds of its process so far."""


@dataclass(frozen=True)
class Way:
    """One way to send: `shards` connections, of a socket each at both ends, which chunks take in turn."""

    name: str
    curve: bool = False
    sealed: bool = False
    io_threads: int = 1
    shards: int = 1


WAYS = (
    Way("plain"),
    Way("plain, 2 I/O threads, 2 connections", io_threads=2, shards=2),
    Way("sealed (AES-256-GCM)", sealed=True),
    Way("CURVE", curve=True),
    Way("CURVE, 2 I/O threads", curve=True, io_threads=2),
    Way("CURVE, 2 I/O threads, 2 connections", curve=True, io_threads=2, shards=2),
    Way("CURVE, 4 I/O threads, 4 connections", curve=True, io_threads=4, shards=4),
)


def receive(
    ready: Callable[[Any], None], way: Way, chunks: int, directory: str, run_key: bytes
) -> None:
    """Receive `chunks` chunks and say so, again and again."""
    cli.keep_memory(one_arena=True)  # as esync-ps does
    context: zmq.Context[Any] = zmq.Context(io_threads=way.io_threads)
    pair = keys.load_server(directory) if way.curve else None
    pulls = [transport.pull(context, pair) for _ in range(way.shards)]
    word = context.socket(zmq.PUSH)
    endpoints = [transport.bind(socket, LOCAL) for socket in pulls]
    ready((endpoints, transport.bind(word, LOCAL)))
    opener = Opener(run_key)
    poller = zmq.Poller()
    for socket in pulls:
        poller.register(socket, zmq.POLLIN)
    for count in itertools.count(1):
        socket = pulls[0] if way.shards == 1 else poller.poll()[0][0]
        header, chunk = socket.recv_multipart(copy=False)
        got = opener.open(chunk.buffer, header.buffer) if way.sealed else chunk.buffer
        assert got.nbytes == CHUNK_BYTES
        if count % chunks == 0:
            word.send(DONE.pack(time.process_time()))


class Sender:
    """The sending end of one way; the receiving end is a process of its own."""

    def __init__(self, way: Way, chunks: list[Any], directory: str, stack: ExitStack) -> None:
        self.way = way
        self.chunks = chunks
        self.seconds: list[float] = []
        self.sender_cpu_s: list[float] = []
        self.receiver_cpu_s: list[float] = []
        run_key = new_key()
        arguments = (way, len(chunks), directory, run_key)
        endpoints, word = stack.enter_context(measure.process(receive, *arguments))
        context: zmq.Context[Any] = zmq.Context(io_threads=way.io_threads)
        stack.callback(context.destroy, linger=0)
        pair = keys.load_client(Path(directory) / "gpu.key") if way.curve else None
        self._pushes = [transport.push(context, endpoint, pair) for endpoint in endpoints]
        self._word: zmq.Socket[bytes] = context.socket(zmq.PULL)
        self._word.connect(word)
        self._sealer = Sealer(run_key, "gpu")
        self._receiver_cpu_s = 0.0

    def round(self) -> None:
        """Send every chunk once, and wait for word."""
        cpu_s, began = time.process_time(), time.perf_counter()
        for number, chunk in enumerate(self.chunks):
            data = self._sealer.seal(chunk, HEADER) if self.way.sealed else chunk
            push = self._pushes[number % self.way.shards]
            push.send(HEADER, zmq.SNDMORE)
            push.send(data, copy=False)
        if not self._word.poll(60_000):
            raise RuntimeError(f"{self.way.name}: no word from the receiver within 60 s")
        (receiver_cpu_s,) = DONE.unpack(self._word.recv())
        self.seconds.append(time.perf_counter() - began)
        self.sender_cpu_s.append(time.process_time() - cpu_s)
        self.receiver_cpu_s.append(receiver_cpu_s - self._receiver_cpu_s)
        self._receiver_cpu_s = receiver_cpu_s

    def row(self) -> dict[str, Any]:
        """Medians, in seconds per model."""
        return {
            **asdict(self.way),
            "median_s": statistics.median(self.seconds[WARM_UP:]),
            "seconds": self.seconds[WARM_UP:],
            "sender_cpu_s": statistics.median(self.sender_cpu_s[WARM_UP:]),
            "receiver_cpu_s": statistics.median(self.receiver_cpu_s[WARM_UP:]),
        }


def alone(chunks: list[Any], rounds: int) -> list[dict[str, Any]]:
    """Median seconds to seal, and to open, every chunk in one thread; and by the bare ciphers."""
    key = new_key()
    sealer, opener = Sealer(key, "gpu"), Opener(key)
    ways: list[tuple[str, Callable[[Any], Any], Callable[[Any], Any]]] = [
        ("seal", lambda x: sealer.seal(x, HEADER), lambda x: opener.open(x, HEADER))
    ]
    nonce = bytes(12)  # (one nonce again and again is good enough for timing, and for nothing else)
    for cipher in (AESGCM(key), ChaCha20Poly1305(key)):

        def encrypt(x: Any, cipher: Any = cipher) -> Any:
            return cipher.encrypt(nonce, x, HEADER)

        def decrypt(x: Any, cipher: Any = cipher) -> Any:
            return cipher.decrypt(nonce, x, HEADER)

        ways.append((type(cipher).__name__, encrypt, decrypt))
    rows = []
    for name, to, back in ways:
        there, again = [], []
        for _ in range(WARM_UP + rounds):
            began = time.perf_counter()
            sealed = [to(chunk) for chunk in chunks]
            middle = time.perf_counter()
            for data in sealed:
                back(data)
            there.append(middle - began)
            again.append(time.perf_counter() - middle)
        rows.append(
            {
                "name": name,
                "encrypt_s": statistics.median(there[WARM_UP:]),
                "decrypt_s": statistics.median(again[WARM_UP:]),
            }
        )
    return rows


def sent(ways: tuple[Way, ...], chunks: list[Any], rounds: int) -> list[dict[str, Any]]:
    """One row for each way; in every round each has its turn."""
    with ExitStack() as stack:
        directory = stack.enter_context(tempfile.TemporaryDirectory())
        keys.make(Path(directory) / "keys", ["gpu"])
        senders = [Sender(way, chunks, os.path.join(directory, "keys"), stack) for way in ways]
        for _ in range(WARM_UP + rounds):
            for sender in senders:
                sender.round()
        return [sender.row() for sender in senders]


@click.command()
@click.option("--quick", is_flag=True, help="8 MB, three rounds.")
@click.option("--mb", type=float, default=None, help="MB of float32 [45].")
@click.option("--rounds", type=click.IntRange(min=1), default=None, help="Counted rounds [21].")
@click.option("--json", "file", type=click.File("w", lazy=True), help="Write the figures here too.")
def main(quick: bool, mb: float | None, rounds: int | None, file: Any) -> None:
    """Seconds and CPU seconds to send a model in clear, under CURVE, and in sealed chunks."""
    cli.keep_memory()  # as esync-worker does
    mb, rounds = mb or (8.0 if quick else 45.0), rounds or (3 if quick else 21)
    random = np.random.default_rng(0)
    count = max(1, round(mb * 1e6 / CHUNK_BYTES))
    chunks = [random.normal(size=CHUNK_ELEMENTS).astype(np.float32).data for _ in range(count)]
    chunks = [chunk.cast("B") for chunk in chunks]
    total_mb = count * CHUNK_BYTES / 1e6
    ciphers = alone(chunks, rounds)
    rows = sent(WAYS, chunks, rounds)
    console = Console(width=None if Console().is_terminal else 120)
    console.print(_sent_table(rows, total_mb))
    console.print(_alone_table(ciphers, total_mb, rows[0]["median_s"]))
    if file:
        figures = {
            "environment": measure.environment(),
            "mb": total_mb,
            "sent": rows,
            "alone": ciphers,
        }
        json.dump(figures, file, indent=1)
        file.write("\n")


def _sent_table(rows: list[dict[str, Any]], mb: float) -> Table:
    table = Table(title=f"{mb:.0f} MB in chunks of 2 MiB, tcp on loopback", title_justify="left")
    for column in ("way", "ms", "times plain", "GB/s", "CPU ms sender", "CPU ms receiver"):
        table.add_column(column, justify="left" if column == "way" else "right")
    for row in rows:
        table.add_row(
            row["name"],
            f"{row['median_s'] * 1e3:.1f}",
            f"{row['median_s'] / rows[0]['median_s']:.2f}",
            f"{mb / 1e3 / row['median_s']:.2f}",
            f"{row['sender_cpu_s'] * 1e3:.0f}",
            f"{row['receiver_cpu_s'] * 1e3:.0f}",
        )
    return table


def _alone_table(rows: list[dict[str, Any]], mb: float, plain_s: float) -> Table:
    table = Table(title=f"{mb:.0f} MB, one thread, nothing sent", title_justify="left")
    for column in ("cipher", "encrypt ms", "decrypt ms", "GB/s", "both, times sending plain"):
        table.add_column(column, justify="left" if column == "cipher" else "right")
    for row in rows:
        both_s = row["encrypt_s"] + row["decrypt_s"]
        table.add_row(
            row["name"],
            f"{row['encrypt_s'] * 1e3:.1f}",
            f"{row['decrypt_s'] * 1e3:.1f}",
            f"{2 * mb / 1e3 / both_s:.1f}",
            f"{both_s / plain_s:.2f}",
        )
    return table


if __name__ == "__main__":
    main()
