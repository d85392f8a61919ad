"""What a server shows to the outside: Prometheus metrics at /metrics, and at /healthz whether it does its work.

Read-only and over plain HTTP, in a thread of its own: a scrape delays neither the event loop nor a tensor, and is
answered while the event loop stands still, which is what /healthz is there to say. Nothing is counted for it: the
values are read when somebody asks, off what the server keeps anyway. That happens in another thread than the
server's, so whoever reads there copies a dict or a list in one step (`dict(table)`) before looking into it.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
import socketserver
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.process_collector import ProcessCollector
from prometheus_client.registry import Collector

from esync.errors import TransportError

log = logging.getLogger("esync.metrics")
PULSE_S = 0.5
"""Seconds between two signs of life of the event loop."""
PATIENCE_S = 15.0
"""An event loop that gave no sign of life for so long stands still."""
REQUEST_S = 10.0
"""How long a client has for its request."""
STOP_S = 0.1
"""The page is gone so long after it was closed, at the latest."""


@dataclass(frozen=True, slots=True)
class Health:
    """Whether a server does its work, and in words what it is at, or why not."""

    ok: bool
    text: str


class MetricsPage(Collector):
    """The page of one server, with a registry of its own: several servers fit into one process.

    Args:
        host, port: where to listen (port 0: a free one; host `*`: on all addresses).
        collect: reads the metrics; called in the page's threads.
        look: says how the server is; called on the event loop, twice a second.

    Attributes:
        url: where the metrics are.

    Raises:
        TransportError: nothing can listen there.
    """

    def __init__(
        self,
        host: str,
        port: int,
        collect: Callable[[], Iterable[Metric]],
        look: Callable[[], Health],
    ) -> None:
        self._collect, self._look = collect, look
        self._registry = CollectorRegistry()
        self._registry.register(self)
        ProcessCollector(registry=self._registry)
        self._health = Health(False, "the server has not started yet")
        self._seen_at: float | None = None
        self._ending = False
        self._pulse: asyncio.Task[None] | None = None
        try:
            self._http = _Server(host, port, self)
        except OSError as error:
            raise TransportError(
                f"cannot show metrics at {host}:{port}: {error.strerror or error}. Each server on a machine needs "
                "a port of its own: choose another --metrics-port"
            ) from error
        self.url = f"http://{self._http.address}/metrics"
        self._thread = threading.Thread(
            target=self._http.serve_forever, args=(STOP_S,), name="esync-metrics", daemon=True
        )

    def start(self) -> None:
        """Answer from now on; on the event loop that is to be watched."""
        self._beat()
        self._pulse = asyncio.get_running_loop().create_task(self._go_on_beating())
        self._thread.start()

    def ending(self, text: str) -> None:
        """From now on the server only ends; that may hold up the event loop, and nobody is to kill it for that."""
        self._health, self._ending = Health(True, text), True

    def close(self) -> None:
        """Answer no more."""
        if self._pulse is not None:
            self._pulse.cancel()
            self._http.shutdown()
            self._thread.join()
        self._http.server_close()

    async def _go_on_beating(self) -> None:
        while True:
            await asyncio.sleep(PULSE_S)
            if self._ending:
                return
            self._beat()

    def _beat(self) -> None:
        """A sign of life of the event loop."""
        try:
            self._health = self._look()
        except Exception:
            log.exception("nobody can tell how the server is")
            self._health = Health(False, "nobody can tell; the server's log says why")
        self._seen_at = time.monotonic()

    def collect(self) -> Iterable[Metric]:
        return self._collect()

    def metrics(self) -> bytes:
        """All metrics in Prometheus' text format."""
        return generate_latest(self._registry)

    def health(self) -> Health:
        """How the server is, or how long nobody could know."""
        quiet_s = 0.0 if self._seen_at is None else time.monotonic() - self._seen_at
        if quiet_s > PATIENCE_S and not self._ending:
            return Health(
                False,
                f"the event loop stands still since {quiet_s:.0f} s; before that: {self._health.text}",
            )
        return self._health


class _Server(ThreadingHTTPServer):
    """Listens for requests, each of which has a thread."""

    daemon_threads = True

    def __init__(self, host: str, port: int, page: MetricsPage) -> None:
        self.page = page
        if ":" in host:
            self.address_family = socket.AF_INET6
        super().__init__(("" if host == "*" else host, port), _Request)

    def server_bind(self) -> None:
        socketserver.TCPServer.server_bind(self)  # HTTPServer's own asks the DNS for our name
        host, port = self.server_address[:2]
        self.server_name, self.server_port = str(host), int(port)

    @property
    def address(self) -> str:
        host = f"[{self.server_name}]" if ":" in self.server_name else self.server_name
        return f"{host}:{self.server_port}"

    def handle_error(self, request: Any, client_address: Any) -> None:
        log.debug("a request from %s failed", client_address, exc_info=True)


class _Request(BaseHTTPRequestHandler):
    """GET or HEAD of one of two pages."""

    timeout = REQUEST_S
    server_version, sys_version = "esync", ""  # which Python this is nobody needs to know
    server: _Server

    def do_GET(self) -> None:
        page = self.server.page
        path = self.path.partition("?")[0]
        kind = "text/plain; charset=utf-8"
        if path == "/healthz":
            health = page.health()
            self._answer(200 if health.ok else 503, kind, f"{health.text}\n".encode())
        elif path == "/metrics":
            try:
                status, kind, body = 200, CONTENT_TYPE_LATEST, page.metrics()
            except Exception:
                log.exception("the metrics could not be read")
                status, body = 500, b"the metrics could not be read; the server's log says why\n"
            self._answer(status, kind, body)
        else:
            self._answer(404, kind, b"here are /metrics and /healthz\n")

    do_HEAD = do_GET

    def _answer(self, status: int, kind: str, body: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        log.debug(format, *args)


@contextlib.contextmanager
def showing(page: MetricsPage | None) -> Iterator[None]:
    """Have a server's page, if it has one, there for as long as the server runs."""
    if page is None:
        yield
        return
    page.start()
    try:
        yield
    finally:
        page.close()


def counter(
    name: str, help: str, rows: float | dict[tuple[str, ...], float], *labels: str
) -> Metric:
    """A running total, named without its `_total`: one value, or one for each combination of labels."""
    family = CounterMetricFamily(name, help, labels=labels)
    return _filled(family, rows)


def gauge(name: str, help: str, rows: float | dict[tuple[str, ...], float], *labels: str) -> Metric:
    """What goes up and down: one value, or one for each combination of labels."""
    return _filled(GaugeMetricFamily(name, help, labels=labels), rows)


def _filled(
    family: CounterMetricFamily | GaugeMetricFamily, rows: float | dict[tuple[str, ...], float]
) -> Metric:
    if not isinstance(rows, dict):
        rows = {(): rows}
    for labels, value in rows.items():
        family.add_metric(labels, value)
    return family


def by_reason(counts: dict[str, int], *before: str) -> dict[tuple[str, ...], float]:
    """A server's counter, which it may be changing, as rows of labels; `before` are the labels before the reason."""
    return {(*before, reason): count for reason, count in dict(counts).items()}
