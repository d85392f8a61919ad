"""What the servers show to the outside: the page, the values on it, and whether a server does its work."""

from __future__ import annotations

import asyncio
import re
import socket
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
from prometheus_client.core import Metric
from prometheus_client.parser import text_string_to_metric_families

from esync import metrics
from esync.config import ClusterConfig, PsConfig, RunConfig, StateConfig, WorkerConfig
from esync.errors import ConfigError, TransportError
from esync.messages import Leave, Report
from esync.metrics import Health, MetricsPage, counter, gauge
from esync.ps import metrics as ps_metrics
from esync.ps.aggregation import Published
from esync.ps.delivery import STUCK_S, Delivery
from esync.run import launcher
from esync.state import metrics as state_metrics
from esync.state.handlers import GOODBYE_S
from esync.state.history import History, reason_class
from esync.version import VERSION
from tests.cluster import Cluster
from tests.test_handlers import Server

DOCS = Path(__file__).parent.parent / "docs" / "operations.md"
Values = dict[tuple[str, ...], float]


def get(page: str) -> tuple[int, str]:
    """The status and the text of a page."""
    try:
        with urllib.request.urlopen(page, timeout=20) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read().decode()


def values(text: str) -> Values:
    """(name, value of each label in alphabetical order of their names, ...) -> value."""
    found: Values = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            labels = [sample.labels[name] for name in sorted(sample.labels)]
            assert (sample.name, *labels) not in found, "one series came twice"
            found[sample.name, *labels] = sample.value
    return found


def read(families: Iterator[Metric]) -> Values:
    return {
        (sample.name, *(sample.labels[name] for name in sorted(sample.labels))): sample.value
        for family in families
        for sample in family.samples
    }


def free_ports(count: int) -> list[int]:
    probes = [socket.socket() for _ in range(count)]
    for probe in probes:
        probe.bind(("127.0.0.1", 0))
    ports: list[int] = [probe.getsockname()[1] for probe in probes]
    for probe in probes:
        probe.close()
    return ports


# The page


def page_of(look=lambda: Health(True, "well"), value=7.0):
    def collect():
        yield counter("esync_things", "Things.", {("a",): value}, "kind")
        yield gauge("esync_level", "A level.", 0.5)

    return MetricsPage("127.0.0.1", 0, collect, look)


async def asked(page: MetricsPage, path: str) -> tuple[int, str]:
    """What the page answers, while this event loop goes on."""
    return await asyncio.to_thread(get, page.url.removesuffix("/metrics") + path)


def shown(page: MetricsPage, *paths: str) -> list[tuple[int, str]]:
    async def run() -> list[tuple[int, str]]:
        with metrics.showing(page):
            return [await asked(page, path) for path in paths]

    return asyncio.run(run())


def test_a_page_has_metrics_and_health_and_nothing_else():
    (status, text), health, nowhere = shown(page_of(), "/metrics?x=1", "/healthz", "/etc/passwd")
    assert status == 200
    found = values(text)
    assert found["esync_things_total", "a"] == 7
    assert found["esync_level",] == 0.5
    assert found["process_resident_memory_bytes",] > 1e6
    assert health == (200, "well\n")
    assert nowhere[0] == 404


def test_who_does_not_work_answers_503_with_the_reason():
    page = page_of(lambda: Health(False, "the disk is full"))
    assert shown(page, "/healthz") == [(503, "the disk is full\n")]


def test_a_defect_in_looking_is_no_good_health(caplog):
    def look():
        raise ZeroDivisionError

    ((status, text),) = shown(page_of(look), "/healthz")
    assert (status, text) == (503, "nobody can tell; the server's log says why\n")
    assert "ZeroDivisionError" in caplog.text


def test_each_page_in_a_process_has_its_own_values():
    one, other = page_of(value=1.0), page_of(value=2.0)

    async def both() -> list[str]:
        with metrics.showing(one), metrics.showing(other):
            return [(await asked(page, "/metrics"))[1] for page in (one, other)]

    assert [values(text)["esync_things_total", "a"] for text in asyncio.run(both())] == [1, 2]


def test_an_event_loop_that_stands_still_is_said_by_a_page_that_does_not(monkeypatch):
    monkeypatch.setattr(metrics, "PATIENCE_S", 1.0)
    monkeypatch.setattr(metrics, "PULSE_S", 0.02)
    page = page_of()
    url = page.url.removesuffix("/metrics")

    async def run() -> None:
        with metrics.showing(page):
            assert (await asked(page, "/healthz")) == (200, "well\n")
            deadline = time.monotonic() + 20
            while (answer := get(f"{url}/healthz"))[0] == 200:  # on the loop itself, which so waits
                assert time.monotonic() < deadline
            assert answer[0] == 503
            assert re.match(r"the event loop stands still since \d s; before that: well", answer[1])
            assert get(f"{url}/metrics")[0] == 200
            for _ in range(3):
                await asyncio.sleep(0.02)
            assert (await asked(page, "/healthz")) == (200, "well\n")

    asyncio.run(run())


def test_a_server_that_ends_is_not_missed_on_its_event_loop(monkeypatch):
    monkeypatch.setattr(metrics, "PATIENCE_S", -1.0)
    monkeypatch.setattr(metrics, "PULSE_S", 0.001)
    page = page_of()

    async def run() -> None:
        with metrics.showing(page):
            assert (await asked(page, "/healthz"))[0] == 503
            page.ending("the model is being written")
            for _ in range(3):
                await asyncio.sleep(0.002)
            assert (await asked(page, "/healthz")) == (200, "the model is being written\n")

    asyncio.run(run())


def test_a_value_that_cannot_be_read_is_said_and_ends_nothing(caplog):
    def collect():
        raise ZeroDivisionError
        yield

    page = MetricsPage("127.0.0.1", 0, collect, lambda: Health(True, "well"))
    broken, health = shown(page, "/metrics", "/healthz")
    assert broken[0] == 500
    assert health[0] == 200
    assert "ZeroDivisionError" in caplog.text


def test_a_client_that_sends_nothing_keeps_nobody_from_asking():
    page = page_of()

    async def run() -> int:
        with metrics.showing(page):
            port = int(page.url.rpartition(":")[2].partition("/")[0])
            with socket.create_connection(("127.0.0.1", port)):
                return (await asked(page, "/healthz"))[0]

    assert asyncio.run(run()) == 200


def test_a_port_that_is_taken_is_said_with_what_to_do():
    page = page_of()
    port = int(page.url.rpartition(":")[2].partition("/")[0])
    try:
        with pytest.raises(TransportError, match=rf"127.0.0.1:{port}: .*in use.*--metrics-port"):
            MetricsPage("127.0.0.1", port, list, lambda: Health(True, ""))
    finally:
        page.close()


def test_after_a_page_was_closed_its_port_is_free():
    page = page_of()
    port = int(page.url.rpartition(":")[2].partition("/")[0])
    assert shown(page, "/healthz")[0][0] == 200
    again = MetricsPage("127.0.0.1", port, list, lambda: Health(True, ""))
    again.close()


# The state server


@dataclass
class Messages:
    """What is counted of a message server."""

    counters: dict[str, int] = field(default_factory=dict)
    unsent: int = 0
    queued: int = 0


class Run(Server):
    """A state server without a network: two workers, an evaluator and a parameter server have joined."""

    def __init__(self, **config):
        super().__init__(**{"workers": 2, **config})
        self.ps()
        self.member("fast")
        self.member("slow")

    def values(self):
        server = Messages({"bad-field": 3}, 5, 7)
        return read(state_metrics.collect(self.handlers, server, 2, self.now))

    def tick(self, seconds=0.0):
        self.handlers.servers["ps"].heard = self.now + seconds
        return super().tick(seconds)

    def reports(self, worker, **totals):
        self.gets(Report(worker, 0, 1, "train", totals=totals))


def test_the_metrics_are_what_the_workers_report():
    run = Run()
    run.now += 10
    run.reports("fast", steps=40, samples=400, compute_s=8.0, query_s=0.5, sync_s=1.5)
    run.now += 2
    run.reports("slow", steps=5, samples=50, compute_s=9.0)
    found = run.values()
    assert found["esync_worker_seconds_total", "compute", "fast"] == 8.0
    assert found["esync_worker_seconds_total", "query", "fast"] == 0.5
    assert found["esync_worker_seconds_total", "sync", "fast"] == 1.5
    assert found["esync_worker_seconds_total", "compute", "slow"] == 9.0
    assert found["esync_worker_steps_total", "fast"] == 40
    assert found["esync_worker_samples_total", "slow"] == 50
    assert found["esync_steps_total",] == 45
    assert found["esync_samples_total",] == 450
    assert found["esync_worker_silent_seconds", "fast"] == 2
    assert found["esync_run_seconds",] == 12
    assert found["esync_members", "worker"] == 2
    assert found["esync_members", "ps"] == 1
    assert found["esync_active_workers",] == 2
    assert found["esync_refused_messages_total", "bad-field"] == 3
    assert found["esync_refused_connections_total",] == 2
    assert found["esync_unsent_messages_total",] == 5
    assert found["esync_queue_messages",] == 7


def test_comings_and_goings_are_told_apart_by_their_reason():
    run = Run(heartbeat_s=5.0)
    assert run.values()["esync_joined_total", "worker"] == 2
    run.now += 4
    run.reports("fast")
    run.tick(2)
    found = run.values()
    assert found["esync_left_total", "evicted", "worker"] == 1
    assert ("esync_worker_steps_total", "slow") not in found, "who is gone has no series"
    run.member("third", life="1")
    run.now += 4
    run.reports("fast")
    run.member("third", life="2")
    run.gets(Leave("third", "interrupted"))
    run.handlers.stop("enough")
    run.tick(GOODBYE_S + 1)
    found = run.values()
    assert found["esync_joined_total", "worker"] == 4
    assert {labels[1]: n for labels, n in found.items() if labels[0] == "esync_left_total"} == {
        "evicted": 2,  # slow, and fast, which says nothing any more
        "replaced": 1,
        "interrupted": 1,
    }


@pytest.mark.parametrize(
    ("reason", "word"),
    [
        ("done", "done"),
        ("never said goodbye", "no-goodbye"),
        ("RuntimeError: out of memory", "other"),
        ("left", "other"),
    ],
)
def test_reasons_are_few_words(reason, word):
    assert reason_class(reason) == word


def test_the_state_of_a_run_is_in_its_metrics_and_in_its_health():
    def states():
        run.tick()
        found = run.values()
        return [name for name in state_metrics.STATES if found["esync_run_state", name]]

    run = Server(workers=2)
    run.values = Run.values.__get__(run)
    assert state_metrics.health(run.handlers) == Health(True, "waiting for the parameter server")
    run.ps()
    run.member("fast")
    assert state_metrics.health(run.handlers) == Health(True, "waiting for 1 more worker")
    assert states() == ["waiting"]
    run.member("slow")
    assert state_metrics.health(run.handlers) == Health(True, "running: round 0, 2 workers")
    assert states() == ["running"]
    for worker in ("fast", "slow"):
        run.gets(Leave(worker, "done"))
    assert state_metrics.health(run.handlers).text == "waiting for a worker: none is left"
    assert states() == ["waiting"]
    run.handlers.stop("enough")
    assert state_metrics.health(run.handlers) == Health(True, "ended: enough")
    assert states() == ["ended"]


def test_a_worker_that_was_evicted_and_joins_again_counts_what_it_did_once():
    run = Run(heartbeat_s=5.0)
    run.member("third", life="1")
    run.reports("third", steps=100, samples=1000)
    run.tick(6)
    assert "third" not in run.handlers.table.records
    run.member("third", life="1")
    assert run.values()["esync_worker_steps_total", "third"] == 100
    run.reports("third", steps=130, samples=1300)
    found = run.values()
    assert found["esync_worker_steps_total", "third"] == 130
    assert found["esync_steps_total",] == 130
    rows = [row for row in run.handlers.summary()["workers"] if row["name"] == "third"]
    assert [row["steps"] for row in rows] == [100, 30]
    run.gets(Leave("third", "done"))
    run.member("third", life="2")
    run.reports("third", steps=7)
    assert run.values()["esync_worker_steps_total", "third"] == 137


class Restless(dict):
    """A dict that changes whenever somebody looks through it, as if by another thread; not while it is copied."""

    def items(self):
        return self._changing(super().items())

    def values(self):
        return self._changing(super().values())

    def _changing(self, view):
        for row in view:
            super().pop(next(iter(self)))
            yield row


def test_rounds_that_are_done_again_are_rounds_and_what_an_earlier_process_did_is_not():
    history = History()
    history.published(30, 1.0, 0, 0)
    history.restore(history.saved(), 1.0)
    assert history.rounds == 0
    history.published(35, 2.0, 0, 0)
    history.roll_back(25)  # the checkpoint of a parameter server that died, too
    history.published(28, 3.0, 0, 0)
    assert (history.version, history.rounds, history.rolled_back) == (28, 8, 10)


def test_metrics_can_be_read_while_workers_come_and_go():
    run = Run()
    run.reports("fast", steps=40)
    expected = run.values()
    with pytest.raises(RuntimeError):
        list(Restless(run.handlers.table.records).values())
    run.handlers.table.records = Restless(run.handlers.table.records)
    counters = Restless({"bad-field": 3})
    found = read(state_metrics.collect(run.handlers, Messages(counters, 5, 7), 2, run.now))
    assert found == expected
    line = Delivery()
    for worker in ("fast", "slow"):
        line.put(worker, Published(1, 0, np.zeros(1, np.float32)), 0.0)
    line._lines = Restless(line._lines)
    assert line.numbers(0.0) == (0, 2, 0)


def test_a_subscriber_that_takes_nothing_for_long_is_stuck():
    line, event = Delivery(), Published(1, 0, np.zeros(1, np.float32))
    for worker in ("fast", "slow"):
        line.put(worker, event, 0.0)
        line.sent(worker, next(line.next(worker)), 4, 0.0)
    assert line.numbers(STUCK_S) == (0, 0, 8)
    line.have("fast", 1, 0, STUCK_S)
    assert line.numbers(STUCK_S + 1) == (1, 0, 4)


# Whole runs


class Watched:
    """A run of one worker whose servers show metrics; it stays in round 20 until `go`."""

    def __init__(self, servers: int = 1, **options):
        ports = free_ports(1 + servers)
        self.urls = [f"http://127.0.0.1:{port}" for port in ports]
        config = RunConfig(mode="sync", workers=1, ps=servers, rounds=30, **options)
        self.cluster = Cluster(config, "tcp", metrics=ports)
        self.reached, self.go = threading.Event(), threading.Event()

    def __enter__(self):
        self.cluster.__enter__()
        self.thread = self.cluster.train("w0", self.loop)
        assert self.reached.wait(30), self.thread.error
        return self

    def loop(self, worker):
        params = worker.start({"w": np.zeros(5000, np.float32)})
        while not worker.stopped:
            if worker.round == 20:
                self.reached.set()
                assert self.go.wait(30)
            params = worker.step({"w": params["w"] + np.float32(1)})

    def values(self, server: int) -> Values:
        status, text = get(f"{self.urls[server]}/metrics")
        assert status == 200
        return values(text)

    def wait_for(self, server: int, status: int, text: str) -> None:
        """Wait until /healthz says so; it is looked at twice a second."""
        deadline = time.monotonic() + 20
        while (answer := get(f"{self.urls[server]}/healthz")) != (status, f"{text}\n"):
            assert time.monotonic() < deadline, answer
            time.sleep(0.02)

    def __exit__(self, *error):
        self.go.set()
        if error[0] is None:
            self.thread.result()
            self.cluster.finish()
        self.cluster.__exit__(*error)


def test_the_servers_of_a_run_show_what_they_do():
    with Watched(servers=2) as run:
        run.wait_for(0, 200, "running: round 20, 1 worker")
        run.wait_for(1, 200, "running: version 20, 1 worker")
        run.wait_for(2, 200, "running: version 20, 1 worker")
        state, ps, ps1 = (run.values(server) for server in range(3))
    assert state["esync_rounds_total",] == 20
    for shard, server in enumerate((ps, ps1)):
        assert server["esync_ps_info", "cpu", str(shard), VERSION] == 1
        assert server["esync_ps_version",] == 20
        assert server["esync_ps_expected_workers",] == 1
        assert server["esync_ps_subscribers",] == 1
        assert server["esync_ps_shared_memory_workers",] == 1
        assert server["esync_ps_stuck_subscribers",] == 0
        assert server["esync_ps_shared_memory_bytes_total",] > 0
    up = ps["esync_ps_bytes_total", "up"] + ps1["esync_ps_bytes_total", "up"]
    assert up == state["esync_bytes_total", "up"] == 21 * 4 * 5000  # with the initial model
    for url in run.urls:
        with pytest.raises(urllib.error.URLError):
            get(f"{url}/healthz")  # who is gone shows nothing


def test_a_tensor_thread_that_has_ended_is_unhealthy():
    with Watched() as run:
        thread = run.cluster.ps.thread
        thread.inbox.put(None)
        run.wait_for(1, 503, "the tensor thread has ended")
        run.wait_for(0, 200, "running: round 20, 1 worker")
        run.cluster.state.stop("seen enough")


def test_a_tensor_thread_that_stands_still_is_unhealthy(monkeypatch):
    monkeypatch.setattr(ps_metrics, "PATIENCE_S", -1.0)  # nobody is that quick
    with Watched() as run:
        run.wait_for(1, 503, "the tensor thread stands still since 0 s")


def test_a_parameter_server_that_waits_is_healthy():
    assert ps_metrics.health(None, "tcp://head:1") == Health(
        True, "waiting for the state server at tcp://head:1"
    )


def test_what_the_page_shows_and_what_is_written_about_it_are_the_same_metrics():
    with Watched() as run:
        run.cluster.ps.thread.counters["late"] += 1
        run.cluster.state.handlers.history.evaluated(1, 0.5, 1.0, 1.0)
        run.cluster.state.handlers.history.passages[0].left_s = 1.0
        names = {labels[0] for server in (0, 1) for labels in run.values(server)}
    ours = {name for name in names if name.startswith("esync_")} | {
        "esync_refused_messages_total"  # none was
    }
    written = set(re.findall(r"`(esync_[a-z_]+)", DOCS.read_text(encoding="utf-8")))
    assert ours == written


# Ports


def cluster(state=0, ps=0, servers=1) -> ClusterConfig:
    return ClusterConfig(
        RunConfig(ps=servers),
        StateConfig(metrics_port=state),
        PsConfig(metrics_port=ps),
        (WorkerConfig(name="w"),),
    )


def test_several_parameter_servers_of_a_machine_show_metrics_at_ports_in_a_row(tmp_path):
    assert launcher.metrics_ports(cluster()) == [0]
    assert launcher.metrics_ports(cluster(servers=3)) == [0, 0, 0]
    assert launcher.metrics_ports(cluster(state=9100, ps=9101, servers=3)) == [9101, 9102, 9103]
    roles = launcher.roles_of(cluster(ps=9101, servers=2), tmp_path, "tcp://127.0.0.1:1")
    options = [" ".join(role.command) for role in roles if role.name.startswith("ps")]
    assert "--metrics-port" not in options[0]  # that is in the file
    assert options[1].endswith("--metrics-port 9102")


def test_ports_that_two_servers_would_share_are_refused():
    with pytest.raises(ConfigError, match=r"\[state\] metrics_port = 9100: .* take port 9100"):
        launcher.metrics_ports(cluster(state=9100, ps=9100))
    with pytest.raises(ConfigError, match="take the ports 9100 to 9102; choose another"):
        launcher.metrics_ports(cluster(state=9102, ps=9100, servers=3))
    with pytest.raises(ConfigError, match="need ports up to 65536"):
        launcher.metrics_ports(cluster(ps=65534, servers=3))
