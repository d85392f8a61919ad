"""The virtual network: every worker's link, and the parameter server's, which all of them share."""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Mapping

from esync.config import NetworkConfig, WorkerConfig
from esync.sim.events import Event, Events


class SharedLine:
    """One direction of a link on which all transfers that are under way get equal shares.

    Args:
        mbit: Mbit/s; 0 for no limit.
    """

    def __init__(self, mbit: float, events: Events) -> None:
        self._bytes_per_s = mbit * 1e6 / 8
        self._events = events
        # A transfer is through when every transfer under way since its start has had `size` bytes of service.
        self._service = 0.0
        self._looked_at = 0.0
        self._under_way: list[tuple[float, int, Event]] = []
        self._order = itertools.count()
        self._plan = 0

    def send(self, size: int, through: Event) -> None:
        """Send `size` bytes; `through` happens when the last of them has left the line."""
        if not self._bytes_per_s:
            through()
            return
        self._serve()
        heapq.heappush(self._under_way, (self._service + size, next(self._order), through))
        self._plan_next()

    def _serve(self) -> None:
        if self._under_way:
            share = self._bytes_per_s / len(self._under_way)
            self._service += (self._events.now - self._looked_at) * share
        self._looked_at = self._events.now

    def _plan_next(self) -> None:
        self._plan += 1
        if self._under_way:
            left = max(0.0, self._under_way[0][0] - self._service)
            when = self._events.now + left * len(self._under_way) / self._bytes_per_s
            plan = self._plan
            self._events.at(when, lambda: self._next_is_through(plan))

    def _next_is_through(self, plan: int) -> None:
        if plan != self._plan:
            return  # something was sent meanwhile: there is another plan
        self._serve()
        self._service = max(self._service, self._under_way[0][0])
        done = []
        while self._under_way and self._under_way[0][0] <= self._service + 1e-3:  # bytes
            done.append(heapq.heappop(self._under_way)[2])
        self._plan_next()
        for through in done:
            through()


class Line:
    """One direction of one worker's own link: what is sent waits until everything before it is through."""

    def __init__(self, mbit: float) -> None:
        self._bytes_per_s = mbit * 1e6 / 8
        self._free_at = 0.0

    def through(self, size: int, now: float) -> float:
        """When the last of `size` bytes that are sent `now` has left the line."""
        if not self._bytes_per_s:
            return now
        self._free_at = max(now, self._free_at) + size / self._bytes_per_s
        return self._free_at


class Network:
    """Arrivals of tensors, and delays of messages.

    A tensor is on the worker's line and the server's at the same time, so that the slower of the two decides; small
    messages never wait for it.

    Args:
        servers: parameter servers that share the model, each with a line like that; together they are one line as wide
            as all of them.

    Attributes:
        tensor_bytes: size of an update and of a model (0: their real size).
    """

    def __init__(
        self,
        config: NetworkConfig,
        workers: Mapping[str, WorkerConfig],
        events: Events,
        servers: int = 1,
    ) -> None:
        self.tensor_bytes = int(config.model_mb * 1e6)
        self._config, self._workers, self._events = config, workers, events
        self._server = {
            "up": SharedLine(config.up_mbit * servers, events),
            "down": SharedLine(config.down_mbit * servers, events),
        }
        self._own = {
            (name, way): Line(worker.bandwidth_mbit)
            for name, worker in workers.items()
            for way in ("up", "down")
        }

    def latency_s(self, name: str) -> float:
        """One-way delay between a worker and the servers; of another role the servers' own."""
        worker = self._workers.get(name)
        return self._config.latency_s + (worker.latency_s if worker else 0.0)

    def send(
        self, name: str, way: str, size: int, event: Event, through: Event | None = None
    ) -> None:
        """Have `event` happen when `size` bytes that leave now are there; `way` is `up` (to the server) or `down`.
        `through`: when the lines are free of them."""
        events, latency = self._events, self.latency_s(name)
        own = self._own[name, way].through(size, events.now) if (name, way) in self._own else 0.0

        def sent() -> None:
            at = max(events.now, own)
            events.at(at + latency, event)
            if through is not None:
                events.at(at, through)

        self._server[way].send(size, sent)
