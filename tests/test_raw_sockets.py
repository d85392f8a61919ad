"""What comes to the servers' ports by TCP and is no ZeroMQ, or hardly: a run goes on, and nothing is left behind."""

from __future__ import annotations

import gc
import os
import random
import socket
import struct
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from esync.config import RunConfig
from esync.messages import Query, Update, encode
from tests.cluster import Cluster, Thread

pytestmark = pytest.mark.skipif(
    not Path("/proc/self/statm").exists(),
    reason="there is no /proc that says what a process uses: it takes Linux",
)
ROUNDS = 60
ENOUGH = 40
"""Passes of strangers over all ports, of which the run sees each kind."""
GROWTH_BYTES = 16 << 20
"""Of resident memory, at most: much less than one of each of the frames that strangers announce."""
SIGNATURE = b"\xff" + bytes(8) + b"\x7f"


def greeting(mechanism: bytes = b"NULL") -> bytes:
    """The 64 bytes with which a ZMTP 3.0 connection begins (rfc.zeromq.org/spec/23)."""
    return SIGNATURE + b"\x03\x00" + mechanism.ljust(20, b"\0") + b"\0" + bytes(31)


def frame(flags: int, body: bytes, size: int | None = None) -> bytes:
    """A frame; `size` says another length than it has."""
    count = len(body) if size is None else size
    if count > 255:
        return bytes([flags | 2]) + struct.pack(">Q", count) + body
    return bytes([flags, count]) + body


def ready(kind: bytes, identity: bytes = b"") -> bytes:
    """The command that ends a NULL handshake."""
    body = b"\x05READY"
    for name, value in ((b"Socket-Type", kind), (b"Identity", identity)):
        body += bytes([len(name)]) + name + struct.pack(">I", len(value)) + value
    return frame(4, body)


def talks(source: random.Random) -> list[bytes]:
    """What one stranger of each kind says."""
    noise = source.randbytes(source.randint(1, 4000))
    kind = source.choice((b"DEALER", b"PUSH", b"SUB", b"XSUB", b"REQ", b"?"))
    opened = greeting() + ready(kind, source.choice((b"", b"w0", source.randbytes(9))))
    frames = [
        frame(source.randrange(8), source.randbytes(source.randint(0, 300))) for _ in range(20)
    ]
    return [
        b"",
        noise,
        b"GET / HTTP/1.1\r\n\r\n",
        SIGNATURE,
        greeting()[: source.randint(1, 63)],
        greeting(source.choice((b"PLAIN", b"CURVE", b"GSSAPI", b"\xff" * 20))) + noise,
        greeting() + frame(4, b"\x05READY" + noise),
        greeting() + frame(4, source.randbytes(50), 1 << 62),
        opened + b"".join(frames),
        opened + frame(0, noise, source.choice((1 << 63, 1 << 40, (1 << 64) - 1))),
        opened + frame(1, encode(Query("w0", 1, 1))) * 50,
        opened + frame(1, encode(Update("w0", 1, 0, "x"))) + frame(0, bytes(64)),
        opened + frame(0, b"\x01w/w0/") + frame(0, b"\x00w/w0/") + frame(4, b"\x09SUBSCRIBEw/"),
        opened + frame(0, b"\x81" * 3000),
        opened + frame(1, b"") * 1000 + frame(0, b""),
    ]


class Strangers:
    """Connections to ports by TCP."""

    def __init__(self, endpoints: list[str]) -> None:
        self.ports = [int(endpoint.rpartition(":")[2]) for endpoint in endpoints]
        self.silent: list[socket.socket] = []

    def connect(self, port: int) -> socket.socket:
        return socket.create_connection(("127.0.0.1", port), timeout=10)

    def say_all(self, source: random.Random) -> None:
        """One stranger of each kind to each port; the connection ends properly or is cut."""
        for port in self.ports:
            for said in talks(source):
                with self.connect(port) as stranger:
                    try:
                        stranger.sendall(said)
                        if source.random() < 0.5:  # else with what came unread, by a reset
                            stranger.shutdown(socket.SHUT_WR)
                            while stranger.recv(4096):
                                pass
                        elif source.random() < 0.5:
                            linger = struct.pack("ii", 1, 0)
                            stranger.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
                    except OSError:
                        pass  # it was shut out

    def stay_silent(self, count: int) -> None:
        for port in self.ports:
            self.silent += [self.connect(port) for _ in range(count)]

    def leave(self) -> None:
        for stranger in self.silent:
            stranger.close()
        self.silent.clear()


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


def resident_bytes() -> int:
    gc.collect()
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def until(condition: Any, what: str) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline, f"waited in vain for {what}"
        time.sleep(0.05)


@pytest.mark.parametrize("seed", [1, 2])
def test_a_run_goes_on_whatever_strangers_say_to_its_ports(seed):
    config = RunConfig(mode="sync", workers=2, rounds=ROUNDS, deadline_s=0)
    with Cluster(config, "tcp") as cluster:
        passes = threading.Event()
        goes_on = threading.Event()

        def train(worker):
            params = worker.start({"w": np.zeros(1000, np.float32)})
            while not worker.stopped:
                if worker.round == ROUNDS // 2:
                    goes_on.set()
                    assert passes.wait(90)  # in the middle of the run, whatever the machine's speed
                params = worker.step({"w": params["w"] + np.float32(1)})
            return worker.round, float(params["w"][0])

        workers = [cluster.train(f"w{rank}", train, rank=rank) for rank in range(2)]
        assert goes_on.wait(60)
        ends = cluster.ps.endpoints
        strangers = Strangers([cluster.endpoint, str(ends["push"]), str(ends["model"])])
        source = random.Random(seed)
        strangers.say_all(source)  # what a first connection costs, it costs once
        before, open_before = resident_bytes(), descriptors()

        try:
            strangers.stay_silent(20)
            for _ in range(ENOUGH):
                strangers.say_all(source)
            more = Thread(lambda: strangers.say_all(source), "strangers")
            more.start()
            passes.set()  # the other half of the run, while more come
            assert [thread.result(90) for thread in workers] == [(ROUNDS, float(ROUNDS))] * 2
            more.result(60)
            grown = resident_bytes() - before
        finally:
            passes.set()
            strangers.leave()
        assert grown < GROWTH_BYTES
        until(lambda: descriptors() <= open_before, "descriptors to come back")
        assert cluster.finish()["ended"] == f"{ROUNDS} rounds"
