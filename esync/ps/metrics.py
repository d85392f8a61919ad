"""A parameter server's metrics and health, read off the objects that it keeps anyway (docs/operations.md has the list).

`collect` runs in a thread of the metrics page while the tensor thread changes what it reads: it takes copies.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import TYPE_CHECKING

from prometheus_client.core import InfoMetricFamily, Metric

from esync.messaging import MessageServer
from esync.metrics import Health, by_reason, counter, gauge
from esync.version import VERSION

if TYPE_CHECKING:
    from esync.ps.server import TensorThread

PATIENCE_S = 30.0
"""A tensor thread that gave no sign of life for so long stands still: it looks up after 32 chunks, or a second."""


def health(thread: TensorThread | None, state: str) -> Health:
    """What the parameter server is at, or why it does not work; on the event loop.

    Args:
        thread: None until it has joined the run.
        state: the state server's endpoint.
    """
    if thread is None:
        return Health(True, f"waiting for the state server at {state}")
    if not thread.is_alive():
        return Health(False, "the tensor thread has ended")
    quiet_s = time.monotonic() - thread.alive_at
    if quiet_s > PATIENCE_S:
        return Health(False, f"the tensor thread stands still since {quiet_s:.0f} s")
    if thread.version < 0:
        return Health(True, "waiting for the initial model")
    count = thread.numbers().members
    workers = f"{count} worker{'s' if count != 1 else ''}"
    return Health(True, f"running: version {thread.version}, {workers}")


def collect(
    thread: TensorThread | None, server: MessageServer, device: str, refused_connections: int
) -> Iterator[Metric]:
    """Everything about one parameter server.

    Args:
        thread: None until it has joined the run.
        server: of its control channel.
        refused_connections: of keys that are not let in, or with another token.
    """
    info = InfoMetricFamily("esync_ps", "This parameter server.")
    shard = str(thread.shard) if thread is not None else ""
    info.add_metric((), {"version": VERSION, "device": device, "shard": shard})
    yield info
    refused = by_reason(server.counters, "control")
    if thread is not None:
        yield from _tensors(thread)
        refused |= by_reason(thread.counters, "data")
    yield counter(
        "esync_ps_refused_messages",
        "Messages that were refused, or came too late to change anything.",
        refused,
        *("channel", "reason"),
    )
    yield counter(
        "esync_ps_refused_connections",
        "Connections refused by their key, or their token.",
        refused_connections,
    )
    yield counter(
        "esync_ps_unsent_messages", "Messages for the state server that did not go.", server.unsent
    )
    yield gauge(
        "esync_ps_queue_messages", "Messages that wait on the control channel.", server.queued
    )


def _tensors(thread: TensorThread) -> Iterator[Metric]:
    numbers = thread.numbers()
    yield gauge("esync_ps_version", "The newest version; -1: none yet.", thread.version)
    yield gauge(
        "esync_ps_checkpoint_version", "Of the newest checkpoint; -1: none.", numbers.checkpoint
    )
    moved: dict[tuple[str, ...], float] = {
        ("up",): thread.bytes_up,
        ("down",): thread.bytes_down,
    }
    yield counter(
        "esync_ps_bytes", "Tensor bytes from (up) and to (down) the workers.", moved, "direction"
    )
    yield counter(
        "esync_ps_shared_memory_bytes",
        "Of these, in both directions, what went through shared memory.",
        thread.bytes_shared,
    )
    yield counter(
        "esync_ps_wanted_chunks", "Chunks of updates that were asked for again.", thread.wanted
    )
    yield gauge("esync_ps_expected_workers", "Workers that a round waits for.", numbers.members)
    yield gauge("esync_ps_subscribers", "Workers and evaluators connected.", numbers.subscribers)
    yield gauge(
        "esync_ps_shared_memory_workers",
        "Workers whose updates come through shared memory.",
        numbers.in_shared_memory,
    )
    yield gauge(
        "esync_ps_stuck_subscribers", "Subscribers that take nothing for long.", numbers.stuck
    )
    yield gauge(
        "esync_ps_waiting_chunks", "Chunks that wait for their connection.", numbers.waiting_chunks
    )
    yield gauge(
        "esync_ps_sending_bytes",
        "Bytes that were sent and are not known to have arrived.",
        numbers.bytes_on_the_way,
    )
    yield gauge(
        "esync_ps_tensor_thread_quiet_seconds",
        "Since when the tensor thread gave no sign of life; about a second while nothing comes.",
        max(0.0, time.monotonic() - thread.alive_at),
    )
