"""Runs in chunks of another size: the same model, frames as large as they have to be and no larger, and other lives."""

from __future__ import annotations

import subprocess
import sys
import time

import numpy as np
import pytest
import zmq
from safetensors.numpy import load_file

from esync import keys as key_files
from esync import seal, shared_memory, tensors, transport
from esync.config import RunConfig
from esync.errors import EsyncError
from esync.ps.delivery import Delivery
from esync.shared_memory import Region, SharedMemoryError
from esync.tensors import DELTA, VALUE, Layout, Leaf
from tests.cluster import Cluster

takes_memfd = pytest.mark.skipif(
    not shared_memory.SUPPORTED, reason="this system has no memfd: it takes Linux"
)
MIB = 1 << 20
BIG = 5 * MIB + 3
"""Elements of which chunks of 8 MiB are three, and those of 2 MiB eleven."""


def learner(size, target, stats=1000):
    """A loop that goes half of the way to a target in each step."""

    def train(worker):
        params = {"w": np.linspace(-1, 1, size, dtype=np.float32)}
        params, values = worker.start(params, {"s": np.zeros(stats, np.float32)})
        while not worker.stopped:
            stepped = params["w"] + np.float32(0.5) * (np.float32(target) - params["w"])
            params, values = worker.step({"w": stepped}, {"s": values["s"] + np.float32(target)})
        return np.concatenate([params["w"], values["s"]])

    return train


def final_of(mib, kind="tcp", size=BIG, keys=None, curve=False, directory=None, **options):
    """(final model, the first parameter server's thread) of a run in chunks of so many MiB."""
    config = RunConfig(mode="sync", workers=2, rounds=3, chunk_mib=mib, **options)
    with Cluster(config, kind, directory, keys=keys, curve=curve) as cluster:
        threads = [cluster.train(f"w{i}", learner(size, i), rank=i) for i in range(2)]
        finals = [thread.result() for thread in threads]
        cluster.finish()
        assert not cluster.refused()
    np.testing.assert_array_equal(*finals)
    thread = cluster.ps.thread
    assert thread.layout.chunk_mib == config.mib_per_chunk
    return finals[0], thread


@pytest.fixture(scope="module")
def usual():
    """What a run in chunks of 2 MiB makes."""
    return final_of(2, shared_memory=False)[0]


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("tcp", {"shared_memory": False}),
        ("ipc", {"shared_memory": False}),
        ("inproc", {"shared_memory": False}),
        ("tcp", {"shared_memory": False, "ps": 2}),
        pytest.param(
            "tcp",
            {},
            marks=takes_memfd,
        ),
    ],
    ids=str,
)
def test_a_run_in_chunks_of_8_mib_makes_the_model_that_one_of_2_makes(
    kind, options, usual, tmp_path
):
    final, thread = final_of(8, kind, directory=tmp_path, **options)
    np.testing.assert_array_equal(final, usual)
    assert len(thread.whole.chunks) == (5 if "ps" in options else 4)
    assert (thread.bytes_shared > 0) == options.get("shared_memory", True)


@pytest.mark.parametrize("curve", [False, True])
def test_large_chunks_are_sealed_and_encrypted_too(curve, usual, tmp_path):
    key_files.make(tmp_path / "keys", [])
    options = {"shared_memory": False, "keys": tmp_path / "keys", "curve": curve}
    np.testing.assert_array_equal(final_of(8, **options)[0], usual)


@pytest.mark.parametrize("compression", ["bf16", "int8", "topk"])
def test_large_chunks_are_compressed_too(compression):
    final, thread = final_of(8, shared_memory=False, compression=compression, topk=0.4)
    assert np.isfinite(final).all()
    assert thread.version == 3


@pytest.mark.parametrize("mib", [2, 8])
def test_topk_of_half_or_more_is_everything_and_fits_into_a_sealed_frame(mib, usual, tmp_path):
    key_files.make(tmp_path / "keys", [])
    options = {"shared_memory": False, "keys": tmp_path / "keys"}
    np.testing.assert_array_equal(final_of(mib, compression="topk", topk=0.5, **options)[0], usual)


def test_a_chunk_that_is_longer_than_the_window_holds_nobody_up(monkeypatch):
    """As chunks of 64 MiB are: each goes when the one before has arrived, and none is taken for lost."""
    monkeypatch.setattr(tensors, "CHUNK_ELEMENTS", 1000)
    monkeypatch.setattr(transport, "HAVE_BYTES", 1000)
    is_busy, lost = Delivery.is_busy, []

    def watched(lines, worker, now):
        before = lines._lines.get(worker)
        busy = is_busy(lines, worker, now)
        lost.append(lines._lines.get(worker) is not before)
        return busy

    monkeypatch.setattr(Delivery, "is_busy", watched)
    config = RunConfig(mode="sync", workers=2, rounds=50, chunk_mib=64, shared_memory=False)
    with Cluster(config, "tcp") as cluster:
        while cluster.ps.thread is None:
            time.sleep(0.01)
        lines = cluster.ps.thread._delivery
        lines._window = 32_000
        threads = [cluster.train(f"w{i}", learner(100_000, i), rank=i) for i in range(2)]
        np.testing.assert_array_equal(*(thread.result() for thread in threads))
        cluster.finish()
        assert len(cluster.ps.thread.layout.chunks) == 5
        assert cluster.ps.thread.wanted == 0
    assert not any(lost)


@pytest.mark.parametrize(
    ("workers", "chunk_mib", "mib"), [(1, 0, 4), (4, 0, 4), (5, 0, 2), (1000, 0, 2), (5, 7, 7)]
)
def test_chunks_are_larger_where_workers_are_few_and_nothing_is_said(workers, chunk_mib, mib):
    config = RunConfig(workers=workers, chunk_mib=chunk_mib)
    assert config.mib_per_chunk == mib
    layout = config.cut(Layout((Leaf(DELTA, "w", (10 * MIB,), "float32"),)))
    assert {chunk.size for chunk in layout.chunks[:-1]} == {mib << 18}


@pytest.mark.parametrize(("mib", "times"), [(0, 0), (8, 1)])
def test_by_itself_no_run_binds_anew(mib, times, monkeypatch):
    """So nobody who has connected already is cut off, and nobody can take the address meanwhile."""
    unbound, unbind = [], zmq.Socket.unbind

    def counted(socket, endpoint):
        if endpoint.startswith("tcp://"):
            unbound.append(endpoint)
        unbind(socket, endpoint)

    monkeypatch.setattr(zmq.Socket, "unbind", counted)
    final_of(mib, size=1000)
    assert len(unbound) == times


# Frames


@pytest.mark.parametrize(("mib", "most"), [(1, 4), (2, 4), (4, 4), (5, 5), (8, 8), (64, 64)])
def test_a_frame_may_be_as_long_as_a_sealed_chunk_or_4_mib(mib, most):
    assert transport.max_chunk_bytes(mib) == most * MIB + seal.MAX_OVERHEAD_BYTES


@pytest.fixture
def context():
    context = zmq.Context()
    yield context
    context.term()


@pytest.mark.parametrize("kind", ["tcp", "ipc", "inproc"])
def test_a_bound_socket_takes_larger_frames_from_now_on(context, kind, tmp_path):
    wanted = {"tcp": "tcp://0.0.0.0:*", "ipc": f"ipc://{tmp_path}/s", "inproc": "inproc://s"}[kind]
    with transport.pull(context) as pull:
        bound = transport.bind(pull, wanted, insecure=True)
        with transport.push(context, bound.replace("0.0.0.0", "127.0.0.1")) as push:
            push.linger = 0
            push.send(b"who was connected comes back")
            assert pull.poll(5000)
            pull.recv()
            transport.take_frames_of(pull, bound, 8 * MIB)
            assert pull.getsockopt_string(zmq.LAST_ENDPOINT).rstrip("\0") == bound
            received = 0
            deadline = time.monotonic() + 10
            while not received and time.monotonic() < deadline:
                push.send(bytes(7 * MIB))  # one that is sent into a dying connection is lost
                received = len(pull.recv()) if pull.poll(500) else 0
            assert received == 7 * MIB


def test_an_address_that_somebody_else_has_taken_is_an_error(context, monkeypatch):
    monkeypatch.setattr(transport, "REBIND_S", 0.2)
    with transport.pull(context) as pull, transport.pull(context) as other:
        bound = transport.bind(pull, "tcp://127.0.0.1:*")
        taken = transport.bind(other, "tcp://127.0.0.1:*")
        pull.unbind(bound)
        monkeypatch.setattr(pull, "unbind", lambda endpoint: None)
        with pytest.raises(EsyncError, match=f"cannot bind {taken} again: Address already in use"):
            transport.take_frames_of(pull, taken, 16 * MIB)


@pytest.mark.parametrize("mib", [2, 8])
def test_a_frame_that_is_longer_than_that_ends_its_connection_and_nothing_else(mib):
    most = transport.max_chunk_bytes(mib)
    config = RunConfig(mode="sync", workers=1, rounds=10**6, chunk_mib=mib, shared_memory=False)
    with Cluster(config, "tcp") as cluster:
        thread = cluster.train("w0", learner(1000, 1))
        while cluster.state.handlers.history.version < 3:
            time.sleep(0.01)
        counters = cluster.ps.thread.counters
        stranger = cluster.intruder(zmq.PUSH, "push")
        stranger.send(b"\xc1" + bytes(most - 1))  # which is no msgpack
        _until(lambda: counters["not-msgpack"] == 1)
        with stranger.get_monitor_socket(zmq.EVENT_DISCONNECTED) as watch:
            stranger.send(b"\xc1" + bytes(most))
            assert watch.poll(10_000), "it is connected still"
            stranger.disable_monitor()
        stranger.close()
        version = cluster.state.handlers.history.version
        _until(lambda: cluster.state.handlers.history.version > version + 3)
        assert counters["not-msgpack"] == 1
        cluster.state.stop("seen enough")
        thread.result()
        cluster.finish()


def _until(condition):
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


# Other lives


def test_a_run_goes_on_from_a_checkpoint_in_other_chunks(tmp_path):
    """In 2, then 1, then 8 MiB: the same as in one go. (With two workers the first to come would begin.)"""
    size, said = 3 * MIB + 5, []
    options = {"mode": "sync", "workers": 1, "outer": "momentum", "shared_memory": False}

    def run(rounds, mib, resume):
        config = RunConfig(rounds=rounds, chunk_mib=mib, **options)
        where = tmp_path / ("once" if rounds == 6 and not resume else "pieces")
        where.mkdir(exist_ok=True)
        with Cluster(config, "tcp", where, resume=resume, say=said.append) as cluster:
            cluster.train("w0", learner(size, 1)).result()
            assert cluster.finish()["rounds"] == rounds
            assert cluster.ps.thread.layout.chunk_mib == mib
        return load_file(where / "run" / "model.safetensors")

    once = run(6, 2, resume=False)
    for rounds, mib in ((2, 2), (4, 1), (6, 8)):
        pieces = run(rounds, mib, resume=rounds > 2)
    versions = [text.split()[4] for text in said if "going on from version" in text]
    assert versions == ["2,", "4,"]
    for name in once:
        np.testing.assert_array_equal(once[name], pieces[name])


OWN_LOOP = """
import sys, numpy as np, esync
with esync.Worker(sys.argv[1], name=sys.argv[2], wait_s=60) as worker:
    params = worker.start({"w": np.zeros(int(sys.argv[3]), np.float32)})
    while not worker.stopped:
        worker.pause(0.05)
        params = worker.step({"w": params["w"] + np.float32(1)})
    assert (params["w"] == params["w"][0]).all()
    print("a whole model:", worker.round)
"""


@pytest.mark.processes
def test_large_frames_pass_after_either_server_was_killed_and_started_again(processes, tmp_path):
    run = tmp_path / "run"
    state_options = ["--run-dir", str(run), "--workers", "2", "--model", "own", "--mode", "sync"]
    state_options += ["--chunk-mib", "8", "--no-shared-memory", "--heartbeat", "3"]

    def state(bind, *more):
        return processes.start("state", "esync.state.cli", "--bind", bind, *state_options, *more)

    def rounds():
        log = run / "ps.jsonl"
        return log.read_text().count('"event": "round"') if log.exists() else 0

    def more_rounds():
        before = rounds()
        processes.until(lambda: rounds() > before + 5, "five more rounds", 40)

    states = [state("tcp://127.0.0.1:*")]
    endpoint = processes.wait_for("state", r"state server at (tcp://\S+):").group(1)
    ps_options = ["--connect", endpoint, "--run-dir", str(run), "--name", "ps"]
    ps_options += ["--checkpoint", "0.3"]
    ps = processes.start("ps", "esync.ps.cli", *ps_options)
    workers = []
    for i in range(2):
        with open(tmp_path / f"w{i}.out", "ab") as out:
            command = [sys.executable, "-c", OWN_LOOP, endpoint, f"w{i}", str(BIG)]
            workers.append(subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT))
    processes.started += workers
    more_rounds()
    processes.until(lambda: list((run / "checkpoints").glob("*.safetensors")), "a checkpoint")
    for _ in range(2):
        ps.kill()
        ps.wait()
        ps = processes.start("ps", "esync.ps.cli", *ps_options, "--resume")
        more_rounds()
        states[-1].kill()
        states[-1].wait()
        states.append(state(endpoint, "--resume"))
        more_rounds()
    states[-1].terminate()
    for process in (states[-1], ps, *workers):
        assert process.wait(30) == 0
    assert "a whole model" in processes.output("w0")


@pytest.mark.parametrize(("other", "theirs"), [({"chunk_mib": 8}, 8), ({"workers": 5}, 2)], ids=str)
def test_a_worker_ends_when_the_servers_come_back_with_other_chunks(other, theirs):
    config = RunConfig(mode="sync", workers=1, rounds=10**6, shared_memory=False)
    with Cluster(config, "tcp") as cluster:
        thread = cluster.train("w0", learner(1000, 1))
        while cluster.state.handlers.history.version < 3:
            time.sleep(0.01)
        handlers = cluster.state.handlers
        handlers.config = RunConfig(**{**config.to_wire(), **other})
        handlers._send(handlers.table.records["w0"].peer, handlers._welcome(0))
        what = f"came back with chunks of {theirs} MiB, they were of 4"
        with pytest.raises(EsyncError, match=what):
            thread.result()
        cluster.state.stop("seen enough")
        cluster.finish()


@takes_memfd
def test_shared_memory_in_other_chunks_is_not_mapped():
    """Of 4 MiB both are two chunks, of 2 + 2 and of 3 + 1 MiB, and as long."""
    layout = Layout((Leaf(DELTA, "w", (MIB,), "float32"), Leaf(VALUE, "s", (5,), "float32")))
    two, three = layout.cut(1, 2), layout.cut(1, 3)
    assert len(two.chunks) == len(three.chunks) == 3
    mine = Region.create(two, 1)
    Region.open(two, 1, mine.offer("w", "x"))
    with pytest.raises(SharedMemoryError, match="has chunks of 2 MiB, not 3"):
        Region.open(three, 1, mine.offer("w", "x"))
