"""A whole run inside the test's process: state server, parameter server and workers on threads, over any transport."""

from __future__ import annotations

import itertools
import threading
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import zmq

from esync import transport
from esync.config import PsConfig, RunConfig, ps_names
from esync.keys import load_server
from esync.ps.server import ParameterServer
from esync.state.server import StateServer
from esync.worker.client import Worker

_numbers = itertools.count()


class Thread(threading.Thread):
    """A thread whose result, or exception, is handed to whoever joins it."""

    def __init__(self, target: Callable[[], Any], name: str, others: Sequence[Thread] = ()) -> None:
        super().__init__(name=name, daemon=True)
        self._others = others
        self._target_function = target
        self.value: Any = None
        self.error: BaseException | None = None

    def run(self) -> None:
        try:
            self.value = self._target_function()
        except BaseException as error:
            self.error = error

    def result(self, timeout_s: float = 60.0) -> Any:
        self.join(timeout_s)
        if self.is_alive():
            failed = {t.name: repr(t.error) for t in self._others if t.error is not None}
            waits = f"; it may wait for those that failed: {failed}" if failed else ""
            raise AssertionError(f"{self.name} is still running after {timeout_s} s{waits}")
        if self.error is not None:
            raise self.error
        return self.value


class Cluster:
    """The servers of one run.

    Args:
        kind: `inproc`, `ipc` or `tcp`.
        keys: a directory that esync-keys made.
        curve: encrypt tensors by CURVE instead of sealing them.
        metrics: the ports of the state server's and of each parameter server's metrics.
        device: where the parameter servers average.
        resume: go on with the run in `directory`.
        say: told what the parameter servers have to say.
    """

    def __init__(
        self,
        config: RunConfig,
        kind: str = "inproc",
        directory: Path | None = None,
        *,
        keys: Path | None = None,
        curve: bool = False,
        metrics: Sequence[int] = (),
        device: str = "cpu",
        resume: bool = False,
        say: Callable[[str], None] = lambda text: None,
    ):
        self.context: zmq.Context[Any] = zmq.Context()
        number = next(_numbers)
        bind = {
            "inproc": f"inproc://state-{number}",
            "ipc": f"ipc://{directory}/state",
            "tcp": "tcp://127.0.0.1:*",
        }[kind]
        ps_bind = {
            "inproc": f"inproc://ps-{number}-",
            "ipc": f"ipc://{directory}/ps",
            "tcp": "127.0.0.1",
        }[kind]
        run_dir = directory / "run" if directory else None
        if run_dir:
            run_dir.mkdir(exist_ok=True)
        self.keys = keys
        server_keys = load_server(keys) if keys else None
        self.state = StateServer(
            config,
            bind,
            context=self.context,
            run_dir=run_dir,
            keys=server_keys,
            metrics_port=metrics[0] if metrics else 0,
            resume=resume,
        )
        ports = metrics[1:] or [0] * config.ps
        self.endpoint = self.state.endpoint
        self.servers = [
            ParameterServer(
                self.endpoint,
                PsConfig(
                    bind=ps_bind if kind == "tcp" else f"{ps_bind}{shard}",
                    curve=curve,
                    metrics_port=ports[shard],
                    device=device,
                ),
                keys=server_keys,
                context=self.context,
                run_dir=run_dir,
                name=name,
                shard=shard,
                resume=resume,
                say=say,
            )
            for shard, name in enumerate(ps_names(config.ps))
        ]
        self.ps = self.servers[0]
        self._state_thread = Thread(lambda: transport.run(self.state.run()), "state")
        self._ps_threads = [
            Thread(lambda ps=ps: transport.run(ps.run()), ps.name)  # type: ignore[misc]
            for ps in self.servers
        ]
        self.workers: list[Thread] = []
        self.summary: dict[str, Any] = {}

    def __enter__(self) -> Cluster:
        self._state_thread.start()
        for thread in self._ps_threads:
            thread.start()
        return self

    def worker(self, name: str, rank: int | None = None, **options: Any) -> Worker:
        if self.keys is not None:
            options.setdefault("keys", self.keys)
        return Worker(
            self.endpoint, name=name, rank=rank, context=self.context, wait_s=20, **options
        )

    def intruder(self, kind: int, what: str, **options: Any) -> zmq.Socket[bytes]:
        """A socket connected to the parameter server's `push` or `model`, by the token that members are told."""
        endpoints = self.ps.endpoints
        socket: zmq.Socket[bytes] = self.context.socket(kind)
        for name, value in ({"LINGER": 0} | options).items():
            socket.setsockopt(getattr(zmq, name), value)
        if endpoints["token"]:
            socket.setsockopt(zmq.PLAIN_PASSWORD, endpoints["token"].encode())
        socket.connect(endpoints[what])
        return socket

    def train(self, name: str, loop: Callable[[Worker], Any], rank: int | None = None) -> Thread:
        """Run `loop(worker)` in a thread; its result is the thread's."""

        def body() -> Any:
            with self.worker(name, rank) as worker:
                return loop(worker)

        thread = Thread(body, name, self.workers)
        self.workers.append(thread)
        thread.start()
        return thread

    def finish(self) -> dict[str, Any]:
        """Wait for the end of the run; returns its summary."""
        self.summary = self._state_thread.result()
        for thread in self._ps_threads:
            thread.result()
        return self.summary

    def refused(self) -> dict[str, int]:
        """What the parameter servers refused, and why, but for what comes from a chunk being asked for again."""
        counters: Counter[str] = Counter()
        for server in self.servers:
            assert server.thread is not None
            counters += server.thread.counters
            for again in ("late", "double") if server.thread.wanted else ():
                counters.pop(again, None)
        counters.pop("after-the-end", None)
        return dict(counters)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.state.stop("the test is over")
        for thread in (*self.workers, self._state_thread, *self._ps_threads):
            thread.join(30)
        alive = [t.name for t in (self._state_thread, *self._ps_threads) if t.is_alive()]
        if error is None:
            assert not alive, f"still running: {alive}"
            self.context.term()  # hangs, and so fails by its time limit, if a socket was left open
        else:
            self.context.destroy(0)
