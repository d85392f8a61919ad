"""The state server's metrics and health, read off the objects that it keeps anyway (docs/operations.md has the list).

`collect` runs in a thread of the metrics page while the event loop changes what it reads: it takes copies.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

from prometheus_client.core import InfoMetricFamily, Metric

from esync.messaging import MessageServer
from esync.metrics import Health, by_reason, counter, gauge
from esync.state.database import Record
from esync.state.handlers import Handlers
from esync.state.history import Passage, reason_class
from esync.version import VERSION

STATES = ("waiting", "running", "ended")
PHASES = ("compute", "query", "sync", "eval")


def health(handlers: Handlers) -> Health:
    """What the run is at; on the event loop."""
    if handlers.stopped is not None:
        return Health(True, f"ended: {handlers.stopped}")
    if waiting := handlers.waiting_for():
        return Health(True, f"waiting for {waiting}")
    if handlers.started is None:
        return Health(True, "waiting for the parameter server to know the workers")
    count = len(handlers.table.active())
    workers = f"{count} worker{'s' if count != 1 else ''}"
    return Health(True, f"running: round {handlers.history.version}, {workers}")


def collect(
    handlers: Handlers, server: MessageServer, refused_connections: int, now: float
) -> Iterator[Metric]:
    """Everything about the run.

    Args:
        refused_connections: of keys that are not let in.
        now: seconds on the handlers' clock.
    """
    records = list(dict(handlers.table.records).values())
    yield from _run(handlers, now)
    yield from _comings_and_goings(handlers, records)
    yield from _workers(handlers, records, now)
    history = handlers.history
    moved: dict[tuple[str, ...], float] = {
        ("up",): history.bytes_up,
        ("down",): history.bytes_down,
    }
    yield counter(
        "esync_bytes",
        "Tensor bytes to (up) and from (down) all parameter servers, as of the last round.",
        moved,
        "direction",
    )
    yield counter(
        "esync_refused_messages",
        "Messages that the state server refused.",
        by_reason(server.counters),
        "reason",
    )
    yield counter(
        "esync_refused_connections", "Connections refused by their key.", refused_connections
    )
    yield counter(
        "esync_unsent_messages",
        "Messages whose receiver was gone or did not take them.",
        server.unsent,
    )
    yield gauge("esync_queue_messages", "Messages that wait for the state server.", server.queued)


def _run(handlers: Handlers, now: float) -> Iterator[Metric]:
    config, history = handlers.config, handlers.history
    info = InfoMetricFamily("esync_run", "What is trained, and how.")
    about = {"mode": config.mode, "model": config.model, "dataset": config.dataset}
    info.add_metric((), {"version": VERSION, **about})
    yield info
    state = _state(handlers)
    yield gauge(
        "esync_run_state",
        "1 for what the run is at: waiting, running or ended.",
        {(name,): float(name == state) for name in STATES},
        "state",
    )
    yield gauge("esync_run_seconds", "Seconds since all workers were ready.", handlers.run_s(now))
    yield counter("esync_rounds", "Versions of the model that were published.", history.rounds)
    yield counter(
        "esync_rolled_back_rounds",
        "Of these, what was done again from a checkpoint.",
        history.rolled_back,
    )
    yield gauge("esync_version", "The newest version of the model.", history.version)
    yield counter("esync_steps", "Local steps of all workers.", history.total("steps"))
    yield counter("esync_samples", "Samples trained by all workers.", history.total("samples"))
    for row in history.accuracy[-1:]:
        yield gauge("esync_accuracy_ratio", "Test accuracy, newest version.", row["accuracy"])
        if row["loss"] is not None:
            yield gauge("esync_test_loss", "Loss on the test set, newest version.", row["loss"])
        yield gauge("esync_evaluated_round", "The version that was evaluated.", row["round"])


def _state(handlers: Handlers) -> str:
    if handlers.stopped is not None:
        return "ended"
    return "waiting" if handlers.started is None or handlers.waits else "running"


def _comings_and_goings(handlers: Handlers, records: list[Record]) -> Iterator[Metric]:
    members = Counter((record.role,) for record in records)
    roles: dict[tuple[str, ...], float] = {
        ("worker",): members["worker",],
        ("evaluator",): members["evaluator",],
        ("ps",): len(handlers.servers),
    }
    yield gauge("esync_members", "Who is in the run.", roles, "role")
    yield gauge(
        "esync_active_workers",
        "Workers that rounds are made with.",
        sum(record.active for record in records),
    )
    yield gauge(
        "esync_wanted_workers", "Workers with which the run starts.", handlers.config.workers
    )
    gone, stays = dict(handlers.history.gone), list(handlers.history.passages)
    joined: Counter[tuple[str, ...]] = Counter((stay.record.role,) for stay in stays)
    for (role, _), count in gone.items():
        joined[role,] += count
    yield counter("esync_joined", "Workers and evaluators that joined.", _rows(joined), "role")
    left: Counter[tuple[str, ...]] = Counter(
        (stay.record.role, reason_class(stay.reason)) for stay in stays if stay.left_s is not None
    )
    left.update(gone)
    yield counter("esync_left", "Workers and evaluators that left.", _rows(left), "role", "reason")


def _rows(counts: Counter[tuple[str, ...]]) -> dict[tuple[str, ...], float]:
    return {labels: float(count) for labels, count in counts.items()}


def _workers(handlers: Handlers, records: list[Record], now: float) -> Iterator[Metric]:
    """Of each worker that is in the run now; who comes and goes under ever new names leaves nothing behind."""
    stays: dict[str, list[Passage]] = {record.worker: [] for record in records}
    for stay in list(handlers.history.passages):
        if stay.record.worker in stays:
            stays[stay.record.worker].append(stay)

    def total(worker: str, key: str) -> float:
        return float(sum(stay.total(key) for stay in stays[worker]))

    trains = [record for record in records if record.role == "worker"]
    yield gauge(
        "esync_worker_info",
        "1 for each worker and evaluator.",
        {(r.worker, r.role, r.host, r.device): 1.0 for r in records},
        *("worker", "role", "host", "device"),
    )
    yield counter(
        "esync_worker_seconds",
        "Seconds by what a worker spent them on: compute, query, sync, eval.",
        {(r.worker, phase): total(r.worker, f"{phase}_s") for r in records for phase in PHASES},
        *("worker", "phase"),
    )
    yield counter(
        "esync_worker_steps",
        "Local steps.",
        {(r.worker,): total(r.worker, "steps") for r in trains},
        "worker",
    )
    yield counter(
        "esync_worker_samples",
        "Samples trained.",
        {(r.worker,): total(r.worker, "samples") for r in trains},
        "worker",
    )
    yield gauge(
        "esync_worker_round",
        "The round that a worker is in.",
        {(r.worker,): max(r.round, 0) for r in trains},
        "worker",
    )
    yield gauge(
        "esync_worker_step_seconds",
        "How long a worker's local step takes, as the pacing has it.",
        {(r.worker,): r.step_s.value for r in trains},
        "worker",
    )
    yield gauge(
        "esync_worker_silent_seconds",
        "Since when a worker was not heard of.",
        {(r.worker,): max(0.0, now - r.heard) for r in records},
        "worker",
    )
