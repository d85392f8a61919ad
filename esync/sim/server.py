"""The virtual parameter server: what `esync.ps.server` does around an aggregation, as events."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from esync.algorithms import algorithm
from esync.compression import Compressor, Decoder
from esync.config import RunConfig
from esync.errors import EsyncError
from esync.journal import Journal, rounded
from esync.messages import INITIAL, Members, Message, Report, Reset
from esync.ps.aggregation import (
    AGGREGATIONS,
    TOO_LONG,
    Completed,
    Contribution,
    Doubted,
    Event,
    Refused,
)
from esync.ps.backend import NumpyBackend
from esync.ps.checkpoint import save_model
from esync.ps.turns import Turns
from esync.sim.device import Device, Push
from esync.sim.events import Events
from esync.sim.network import Network
from esync.sim.trainee import Chunks
from esync.tensors import Layout, Vector

PS = "ps"
TURN_S = 0.05
"""How often to look whether somebody's turn has come though the first ones say nothing."""


class Outside(Protocol):
    """What the parameter server is connected to."""

    config: RunConfig
    events: Events
    layout: Layout

    def to_state(self, sender: str, message: Message, *, routine: bool = False) -> None:
        """A message for the state server."""


class Server:
    """Averages, and sends the models.

    Args:
        initial: the model that the run begins with.
        on_version: called with each version.
    """

    def __init__(
        self,
        outside: Outside,
        initial: Vector,
        network: Network,
        journal: Journal,
        on_version: Callable[[int], None],
    ) -> None:
        config, layout = outside.config, outside.layout
        self._outside, self._events, self._network = outside, outside.events, network
        self._journal, self._on_version = journal, on_version
        self._whole_bytes = network.tensor_bytes or layout.size * 4
        compressor = Compressor(config.encoding, layout)
        self._delta_bytes = round(
            self._whole_bytes * compressor.encoded_bytes() / (layout.size * 4)
        )
        self._compressors: dict[Device, Compressor] = {}
        self._decoder = Decoder(config.encoding, layout)
        self._mode = algorithm(config.mode)
        self._subscribed: dict[str, Device] = {}
        self._sending: dict[
            str, bool
        ] = {}  # who is being sent a model, and whether another follows
        self._turns = Turns()
        self._bytes_up = self._bytes_down = 0
        self._arrived: dict[str, float] = {}
        ordered: dict[str, Any] = {"ordered": True} if self._mode.ordered else {}
        make = AGGREGATIONS[self._mode.aggregation]
        self._aggregation = make(layout, NumpyBackend(), config, **ordered)
        for contribution in self._contributions("initial", INITIAL, initial, 1, 1):
            self._aggregation.receive(contribution)

    @property
    def version(self) -> int:
        """The newest version."""
        return self._aggregation.version

    @property
    def chunks(self) -> Chunks:
        """Its chunks."""
        return list(self._aggregation.chunks)

    @property
    def averaged(self) -> Chunks:
        """The chunks that are evaluated and saved."""
        return list(self._aggregation.averaged())

    def save(self, path: Path) -> None:
        """Write the newest version to a file."""
        save_model(
            path, self._outside.layout, list(self.averaged), NumpyBackend(), version=self.version
        )

    def receive(self, message: object) -> None:
        """A message of the state server."""
        if isinstance(message, Members):
            self._turns.first = frozenset(message.first)
            self._emit(self._aggregation.set_members(message.workers))
            self._outside.to_state(PS, Members(message.epoch, {}))

    def subscribe(self, device: Device) -> None:
        """Send the current model, and from now on each new one."""
        self._subscribed[device.name] = device
        self._send_model(device)

    def push(self, update: Push) -> None:
        """An update leaves its worker."""
        self._network.send(
            update.device.name, "up", self._delta_bytes, lambda: self._update_arrives(update)
        )

    def _update_arrives(self, update: Push) -> None:
        if 0 < self._outside.config.rounds <= self.version:
            return  # the last version is the last
        device, name = update.device, update.device.name
        flat, device.loss = update.result.result()
        if not np.isfinite(flat).all():
            raise EsyncError(
                f"the update of {name} of round {update.round} holds NaN or infinity: the training diverged. "
                "Lower the learning rate"
            )
        if device.loss is not None and device.doing != "gone":
            loss = Report(name, update.round, update.steps, "pushed", loss=device.loss)
            self._outside.to_state(name, loss)
        self._bytes_up += self._delta_bytes
        self._arrived[name] = self._events.now
        flat = self._decoded(device, flat, update.round)
        for contribution in self._contributions(
            name, update.round, flat, update.steps, update.samples
        ):
            self._emit(self._aggregation.receive(contribution))

    def _decoded(self, device: Device, flat: Vector, round: int) -> Vector:
        """What is left of an update when it has been compressed and decoded."""
        config, layout = self._outside.config, self._outside.layout
        if config.compression == "none":
            return flat
        if device not in self._compressors:
            seed = config.seed, device.rank or 0
            self._compressors[device] = Compressor(config.encoding, layout, seed)
        parts = []
        for i, chunk in enumerate(layout.chunks):
            part = flat[chunk.start : chunk.stop]
            name, payload = self._compressors[device].encode(i, part, round)
            parts.append(self._decoder.decode(name, i, memoryview(payload)))
        return np.concatenate(parts)

    def _contributions(
        self, worker: str, round: int, flat: Vector, steps: int, samples: int
    ) -> list[Contribution]:
        return [
            Contribution(worker, round, i, flat[chunk.start : chunk.stop], steps, max(1, samples))
            for i, chunk in enumerate(self._outside.layout.chunks)
        ]

    def _emit(self, events: Sequence[Event]) -> None:
        for event in events:
            if isinstance(event, Completed):
                self._complete(event.version, event.members)
            elif isinstance(event, Refused) and event.reason == TOO_LONG:
                raise EsyncError(
                    f"an update of {event.worker} is longer than clip_update = {self._outside.config.clip_update:g}: "
                    "its trainee has to scale it down to that (esync.worker.pytree.clip)"
                )
            elif isinstance(event, Doubted):  # each update was looked at
                raise EsyncError(
                    "the sum of the updates is not finite: the training diverged. Lower the learning rate"
                )

    def _complete(self, version: int, members: frozenset[str]) -> None:
        now = self._events.now
        early_s = {name: now - self._arrived.get(name, now) for name in sorted(members)}
        receivers = self._present() if self._mode.barrier else sorted(members)
        if self._outside.config.slowest_first:
            self._turns.begin(version, receivers, now)
        self._send_models(receivers if self._turns.now is None else self._turns.now)
        if self._turns.waiting:
            self._events.at(now + TURN_S, self._look_at_turns)
        self._journal.write(
            "round",
            round=version,
            early_s={name: rounded(s) for name, s in early_s.items()},
            bytes_up=self._bytes_up,
            bytes_down=self._bytes_down,
        )
        self._outside.to_state(PS, Reset(PS, version, early_s, self._bytes_up, self._bytes_down))
        self._on_version(version)

    def _present(self) -> list[str]:
        return [name for name, device in self._subscribed.items() if device.doing != "gone"]

    def _send_models(self, names: Sequence[str]) -> None:
        for name in names:
            if self._subscribed[name].doing != "gone":
                self._send_model(self._subscribed[name])

    def _has(self, name: str, version: int) -> None:
        self._send_models(self._turns.have(name, version, self._events.now))

    def _look_at_turns(self) -> None:
        self._send_models(self._turns.look(self._present(), self._events.now))
        if self._turns.waiting:
            self._events.at(self._events.now + TURN_S, self._look_at_turns)

    def _send_model(self, device: Device) -> None:
        """Send the newest version, after the one that is under way: what comes in between is never sent."""
        if device.name in self._sending:
            self._sending[device.name] = True
            return
        self._sending[device.name] = False
        version, chunks = self.version, self.chunks
        self._aggregation.sent_to(device.name)
        moved = self._mode.barrier and device.newest[0] == version - 1
        size = self._delta_bytes if moved else self._whole_bytes
        self._bytes_down += size

        def arrives() -> None:
            device.model_arrives(version, chunks)
            if self._turns.waiting and device.doing != "gone":
                after_s = self._network.latency_s(device.name)
                self._events.at(self._events.now + after_s, lambda: self._has(device.name, version))

        def through() -> None:
            if self._sending.pop(device.name):
                self._send_models([device.name])  # it may be another under its name by now

        self._network.send(device.name, "down", size, arrives, through)
