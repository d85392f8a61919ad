"""The state server: a bound ROUTER, the message server on it, and the handlers; single-process asyncio."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import zmq
from prometheus_client.core import Metric

from esync import seal, transport
from esync.config import RunConfig
from esync.errors import ConfigError
from esync.journal import Journal
from esync.keys import ServerKeys
from esync.limits import MAX_PEERS, RATE, Limits
from esync.messages import Message
from esync.messaging import MessageServer
from esync.metrics import MetricsPage, showing
from esync.run_dir import Place
from esync.state import metrics
from esync.state.admission import check_key
from esync.state.handlers import TICK_S, Handlers, StopRun, Tick

SAVED = "state.json"
"""The file in a run's directory from which another life of the state server goes on."""
SAVE_S, SAVE_SHARE = 1.0, 0.02
"""Seconds between two writings, at least; and what share of the time they may take, in a run with a long history."""


@dataclass(frozen=True)
class Saved:
    """How far a run had come.

    Attributes:
        state: what `Handlers.restore` goes on from.
    """

    state: dict[str, Any]
    version: int
    elapsed_s: float


def saved_in(run_dir: Path) -> Saved | None:
    """What the state server of an earlier life left in a run's directory; None if nothing.

    Raises:
        ConfigError: it cannot be read.
    """
    path = run_dir / SAVED
    try:
        state = json.loads(path.read_text(encoding="utf-8"))
        return Saved(state, int(state["history"]["version"]), float(state["elapsed_s"] or 0.0))
    except FileNotFoundError:
        return None
    except (KeyError, TypeError, ValueError, OSError) as error:
        raise ConfigError(f"{path} is not what a state server saved: {error!r}") from error


class StateServer:
    """Paces one run.

    Args:
        config: what every role is told in `welcome`.
        bind: endpoint to listen on; `endpoint` is what it became.
        run_dir: where `summary.json` and the log go; None writes neither.
        keys: encrypt, and let in the keys on their allow-list alone; None does neither. (Not on inproc://, which
            nobody outside of this process can reach.)
        resume: go on with the run in `run_dir`, if there is one.
        max_peers: ids that may be in the run.
        max_rate: messages a second of one of them, or of one stranger; 0: no limit.
        metrics_port, metrics_bind: where the metrics are; port 0: nowhere.

    Raises:
        ConfigError: there is another run in `run_dir`, which is not to be gone on with, or cannot be.
        TransportError: an endpoint cannot be bound.
    """

    def __init__(
        self,
        config: RunConfig,
        bind: str = transport.DEFAULT_STATE,
        *,
        insecure: bool = False,
        run_dir: str | Path | None = None,
        keys: ServerKeys | None = None,
        resume: bool = False,
        max_peers: int = MAX_PEERS,
        max_rate: float = RATE,
        metrics_port: int = 0,
        metrics_bind: str = "127.0.0.1",
        context: zmq.Context[Any] | None = None,
        say: Callable[[str], None] = lambda text: None,
    ) -> None:
        self._run_dir = Path(run_dir) if run_dir else None
        with ExitStack() as undone:
            self._place = Place(self._run_dir, os.getpid()) if self._run_dir else None
            if self._place is not None:
                undone.callback(self._place.close)
            if not resume:
                self._look_for_another()
            self._context = context or zmq.Context.instance()
            self._socket = transport.router(self._context, keys)
            undone.callback(self._socket.close, 0)
            self.endpoint = transport.bind(self._socket, bind, insecure=insecure)
            self.page = self._page(metrics_bind, metrics_port) if metrics_port else None
            undone.pop_all()
        self._journal = Journal(self._run_dir / "state.jsonl" if self._run_dir else None, "state")
        if self._place is not None:
            self._place.say(self.endpoint)
        self._allowed = keys.allowed if keys is not None else None
        checked = keys is not None and not self.endpoint.startswith("inproc://")
        self._server = MessageServer(
            self._socket,
            limits=Limits(max_rate),
            standing=lambda peer: self.handlers.standing(peer),
            check=self._check_key if checked else None,
        )
        self.handlers = Handlers(
            config,
            self._server.send,
            time.monotonic,
            journal=self._journal,
            say=say,
            on_stop=self._write_summary,
            finished=self._server.stop,
            run_key=seal.new_key() if checked else b"",
            max_peers=max_peers,
            reaches=self._server.reaches,
        )
        if resume:
            self._restore(say)
        for kind, handler in self.handlers.table_of_handlers().items():
            self._server.on(kind, handler)

    def stop(self, reason: str) -> bool:
        """End the run, or its wait for the last evaluation; from any thread. False if there is nothing to end."""
        self._server.post_threadsafe(StopRun(reason))
        return self.handlers.stopped is None or self.handlers.evaluates

    async def run(self) -> dict[str, Any]:
        """Serve until the run has ended and everybody has left; returns the summary."""
        ticker = asyncio.create_task(self._tick())
        try:
            with showing(self.page):
                await self._server.run()
        finally:
            ticker.cancel()
            self._save()
            summary = self._write_summary()
            self.handlers.faults.close()
            self._journal.close()
            self._socket.close()
            if self._place is not None:
                self._place.close()
        return summary

    def _look_for_another(self) -> None:
        """A run that would be written over."""
        earlier = saved_in(self._run_dir) if self._run_dir else None
        if earlier is not None and earlier.version > 0:  # else nothing was trained yet
            raise ConfigError(
                f"{self._run_dir} has a run at version {earlier.version}: go on with it (--resume), or choose another "
                "--run-dir"
            )

    def _restore(self, say: Callable[[str], None]) -> None:
        earlier = saved_in(self._run_dir) if self._run_dir else None
        if earlier is None:
            say("no run to go on with: it begins anew")
            return
        try:
            self.handlers.restore(earlier.state)
        except (KeyError, TypeError, ValueError) as error:
            text = f"{self._run_dir}/{SAVED} is not what a state server saved: {error!r}"
            raise ConfigError(text) from error

    def _save(self) -> None:
        """Have on disk what another life needs."""
        if self._run_dir is None:
            return
        path = self._run_dir / SAVED
        part = path.with_suffix(".part")
        try:
            part.write_text(json.dumps(self.handlers.saved()), encoding="utf-8")
            part.replace(path)
        except OSError as error:
            text = f"cannot write {path}: {error}"
            self.handlers.faults.say("the state server", "disk", text, level=logging.ERROR)

    def _page(self, host: str, port: int) -> MetricsPage:
        return MetricsPage(host, port, self._metrics, lambda: metrics.health(self.handlers))

    def _metrics(self) -> Iterator[Metric]:
        refusals = self._allowed.refusals if self._allowed is not None else 0
        return metrics.collect(self.handlers, self._server, refusals, time.monotonic())

    def _check_key(self, peer: bytes, message: Message, key: str) -> None:
        assert self._allowed is not None
        check_key(self._allowed, self.handlers.servers, peer, message, key)

    def _write_summary(self) -> dict[str, Any]:
        """When the run stops, and again when the last evaluation is in and everybody has left."""
        summary = self.handlers.summary()
        summary["refused"] = dict(self._server.counters)
        if self._allowed is not None and self._allowed.refusals:
            summary["refused"]["connection"] = self._allowed.refusals
        if self._run_dir:
            write_summary(self._run_dir / "summary.json", summary)
        return summary

    async def _tick(self) -> None:
        save_at = time.monotonic() + SAVE_S
        while True:
            before = time.monotonic()
            await asyncio.sleep(TICK_S)
            late_s = time.monotonic() - before - TICK_S
            if self._allowed is not None:
                self._allowed.refresh()  # so that a revoked key is not heard any more
            self._server.post(Tick(late_s if late_s > 1.0 else 0.0))
            if (began := time.monotonic()) >= save_at:
                self._save()
                ended = time.monotonic()
                save_at = ended + max(SAVE_S, (ended - began) / SAVE_SHARE)


def write_summary(path: Path, summary: dict[str, Any]) -> None:
    """Write a summary so that a reader sees all of it or nothing."""
    part = path.with_suffix(".part")
    part.write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
    part.replace(path)
