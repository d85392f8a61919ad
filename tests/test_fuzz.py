"""What a fuzzer found stays mended, and random input finds nothing; tests/fuzz has the targets and the fuzzer."""

from __future__ import annotations

import logging
import random

import pytest

from esync import messages, seal, tensors
from esync.compression import Int8
from esync.config import RunConfig
from esync.errors import ModelError
from esync.fault_log import FaultLog
from esync.messages import Error, MessageError
from esync.ps.aggregation import Mean
from esync.ps.server import TensorThread
from esync.seal import Opener
from esync.state.database import Table
from esync.state.handlers import WAITING_S, Handlers
from esync.state.policy import AdaptiveEsync
from esync.tensors import Layout
from esync.worker.assembly import Assembly
from tests.fuzz import targets
from tests.fuzz.__main__ import CASES, NAMES
from tests.fuzz.targets import LAYOUT, TARGETS, State, mutated, seeds, shown

INPUTS = {"codec": 3000, "seal": 2000, "layout": 2000, "compression": 3000, "codec-fields": 1000}
"""For each target, so that all take a few seconds; the others are slower."""
FEW = 250
KEPT = sorted(CASES.glob("*/*"))


@pytest.fixture(autouse=True)
def _quiet():
    """What is refused is logged, and these are thousands."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    yield
    logging.disable(before)


@pytest.mark.parametrize("path", KEPT, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_what_was_found_is_mended(path):
    TARGETS[path.parent.name](path.read_bytes())


def feed(name, inputs=None):
    """Feed a target; the same input each time."""
    pool, source = seeds(name), random.Random(name)
    for data in pool:
        TARGETS[name](data)
    for _ in range(inputs or INPUTS.get(name, FEW)):
        TARGETS[name](mutated(source, pool))


@pytest.mark.parametrize("name", TARGETS)
def test_random_input_finds_nothing(name):
    feed(name)


def test_the_fuzzer_knows_all_targets():
    assert tuple(TARGETS) == NAMES
    assert {path.parent.name for path in KEPT} <= set(NAMES)


def raising(error):
    def raises(*args, **options):
        raise error

    return raises


@pytest.mark.parametrize(
    ("name", "owner", "attribute", "planted"),
    [
        ("codec", messages, "_brief", raising(ValueError())),
        ("codec-fields", messages, "_say", raising(KeyError("x"))),
        ("state", Table, "progress", raising(ZeroDivisionError())),
        ("state", Handlers, "_welcome", raising(MessageError("bad-field", "planted"))),
        ("state", Handlers, "_rank_for", lambda self, message: 0),
        ("ps", Mean, "_are_finite", lambda self, steps: [True] * len(steps)),
        ("ps", TensorThread, "_knows", lambda self, worker: True),
        ("ps", Int8, "decode", raising(IndexError())),
        ("ps-control", TensorThread, "_set_members", raising(TypeError())),
        ("worker", Assembly, "_complete", lambda self, version, parts: False),
        ("seal", seal, "_authenticated", lambda prefix, about: prefix),
        ("seal", Opener, "open", lambda self, sealed, *about: memoryview(bytes(sealed))),
        ("layout", Layout, "cut", lambda self, shards: LAYOUT),
        ("compression", targets.Decoder, "decode", lambda self, name, chunk, payload: payload),
        ("checkpoint", targets.Checkpoints, "latest", raising(IndexError())),
        ("offer", targets.Region, "open", classmethod(lambda cls, *args: targets.region())),
        ("inquiry", targets.Inquiry, "_take", raising(KeyError())),
        ("config", targets.ps_server, "build", lambda cls, raw, where: cls(**raw)),
    ],
)
def test_a_planted_defect_is_found(monkeypatch, name, owner, attribute, planted):
    monkeypatch.setattr(owner, attribute, planted)
    with pytest.raises((AssertionError, LookupError, TypeError, ValueError, AttributeError)):
        feed(name, 1500)


# What was found, in few words


def test_the_size_of_a_shape_of_very_many_axes_is_not_multiplied(monkeypatch):
    monkeypatch.setattr(tensors.math, "prod", raising(AssertionError("it takes hours")))
    with pytest.raises(ModelError, match="too long a path, shape or dtype"):
        Layout.from_wire({"leaves": [["delta", "w", [127] * 1_000_000, "float32"]]})


def test_values_come_after_deltas_in_a_layout_too():
    leaves = [["value", "s", [2], "float32"], ["delta", "w", [3], "float32"]]
    with pytest.raises(ModelError, match="values before deltas"):
        Layout.from_wire({"leaves": leaves})


def test_who_is_neither_expected_nor_here_leaves_nothing_at_the_parameter_server():
    clock = targets.Clock()
    with targets.replaced(clock, targets.ps_server):
        tensors = targets.Tensors(RunConfig(mode="sync"), clock)
        thread = tensors.thread
        try:
            for i in range(100):
                tensors.push(f"stranger-{i}", messages.INITIAL, 0, bytes(12))
                tensors.gets([messages.encode(targets.Fetch(f"stranger-{i}", -1))])
            assert thread.aggregation is not None
            assert not thread.aggregation._initial
            assert not thread._arrival
            assert not thread._delivery._lines
            assert thread.counters == {"unknown-worker": 200}
        finally:
            thread.inbox.close()


def test_who_waits_for_a_parameter_server_and_asks_no_more_is_forgotten():
    server = State(RunConfig())
    for i in range(100):
        (answer,) = server.gets(targets.Join(f"w{i}", "worker"))
        assert answer == targets.Status(waiting_for="the parameter server")
    server.clock.now += WAITING_S / 2
    server.gets(targets.Join("w3", "worker"))
    server.clock.now += WAITING_S / 2 + 1
    server.wire.gets(targets.LOCAL, targets.Tick())
    assert list(server.handlers._waiting) == ["w3"]


def test_a_server_that_nobody_can_connect_to_is_refused():
    server = State(RunConfig())
    for port in ("*", "0", "65536"):
        endpoints = {**targets.ENDPOINTS, "push": f"tcp://host:{port}"}
        (answer,) = server.gets(targets.Join("ps", "ps", endpoints=endpoints))
        assert answer.code == "bad-field"


def test_a_step_that_takes_next_to_no_time_is_paced():
    """Seconds per step of 5e-324 have been reported: infinitely many fit into a synchronisation."""
    policy = AdaptiveEsync(None, None)
    record = policy.table().add("a", 0, 0.0)
    record.step_s.observe(5e-324)
    record.sync_s.observe(1.0)
    assert policy._steps_of(record) == 64


def test_a_welcome_with_a_key_that_is_none_changes_nothing():
    clock = targets.Clock()
    sockets = {"push": targets.connected, "sub": targets.connected}
    with targets.replaced(
        clock, targets.link_module, dealer=lambda *options: targets.Socket(), **sockets
    ):
        worker = targets.Worker("worker", b"")
        try:
            for changes in ({"key": b"short"}, {"endpoints": [3]}, {"endpoints": [{}]}):
                worker.welcomed(**changes)
                assert worker.link.shared.welcome is None
                assert not worker.link._channels
            worker.welcomed()
            assert len(worker.link._channels) == 1
        finally:
            worker.link.inbox.close()


def test_errors_with_made_up_codes_are_one_fault(caplog):
    server = State(RunConfig())
    server.handlers.faults = FaultLog(logging.getLogger("esync.state"))
    for i in range(2000):
        server.wire.gets(b"a", messages.encode(Error(f"code-{i}", "")))
    assert len(server.handlers.faults._faults) == 1


def test_what_a_worker_calls_its_device_is_shown_as_text():
    server = State(RunConfig())
    server.gets(targets.Join("ps", "ps", endpoints=targets.ENDPOINTS))
    server.gets(targets.Join("a", "worker", device="[/b]\x1b[2J[link=x]"))
    shown(server.handlers.status(), "")
