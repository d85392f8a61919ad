"""Several parameter servers that share one model."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import load_file

from esync import shared_memory, tensors
from esync.config import PsConfig, RunConfig, ps_names
from esync.config import cluster as cluster_of
from esync.errors import ConfigError, EsyncError, ModelError, ProtocolError
from esync.messages import INITIAL, Model
from esync.ps import checkpoint
from esync.ps.aggregation import Contribution, Mean
from esync.ps.backend import NumpyBackend
from esync.ps.server import ParameterServer
from esync.shared_memory import Region
from esync.tensors import DELTA, VALUE, Layout, Leaf
from esync.transport import run as run_loop
from esync.worker.assembly import Shards
from tests.cluster import Cluster

# Layouts


def layouts():
    leaf = st.builds(
        lambda kind, shape: (kind, tuple(shape)),
        st.sampled_from([DELTA, VALUE]),
        st.lists(st.integers(0, 9), max_size=3),
    )

    def build(rows):
        rows = sorted(rows, key=lambda row: row[0] != DELTA)
        leaves = (Leaf(kind, f"leaf{i}", shape, "float32") for i, (kind, shape) in enumerate(rows))
        return Layout(tuple(leaves))

    return st.lists(leaf, min_size=1, max_size=5).map(build).filter(lambda layout: layout.size)


@given(layouts(), st.integers(1, 7), st.integers(2, 50), st.integers(1, 5))
def test_shards_are_stretches_of_the_vector_and_layouts_of_their_own(layout, shards, chunk, mib):
    before, tensors.CHUNK_ELEMENTS = tensors.CHUNK_ELEMENTS, chunk
    try:
        if shards > layout.size:
            with pytest.raises(ModelError, match="cannot be shared"):
                layout.cut(shards, mib)
            return
        whole = Layout(layout.leaves).cut(shards, mib)
        assert all(0 < at.size <= chunk * mib // 2 for at in whole.chunks)
        at, chunks = 0, []
        for k in range(shards):
            part, mine = whole.shard(k), [whole.chunks[i] for i in whole.of_shard(k)]
            assert [(c.start + at, c.stop + at, c.kind) for c in part.chunks] == [
                (c.start, c.stop, c.kind) for c in mine
            ]
            assert Layout.from_wire(part.to_wire()).cut(1, mib) == part, "it can travel"
            at += part.size
            chunks += mine
            assert abs(part.size - whole.size / shards) < 1
        assert tuple(chunks) == whole.chunks
        assert at == whole.size
        assert [c.stop for c in chunks] == [c.start for c in chunks[1:]] + [whole.size]
        digests = {whole.shard(k).digest for k in range(shards)}
        assert len(digests) == shards, "a chunk for another server is refused"
    finally:
        tensors.CHUNK_ELEMENTS = before


# The worker's view


def test_a_model_is_newer_when_every_shard_of_it_is():
    layout = Layout((Leaf(DELTA, "w", (6,), "float32"),)).cut(2)
    shards = Shards(layout)

    def arrives(shard, version, life="x"):
        assembly = shards.assemblies[shard]
        header = Model(life, version, 0, assembly.layout.digest)
        data = np.full(3, version, np.float32)
        assert assembly.add(header, memoryview(data.tobytes()))

    assert shards.newest is None
    arrives(0, 0)
    assert (shards.newest, shards.newer, shards.version) == (None, False, -1)
    arrives(1, 0)
    assert shards.newer
    shards.begin(shards.newest)
    arrives(1, 1)
    arrives(1, 2)
    assert not shards.newer
    assert (shards.version, shards.newest.versions) == (0, (0, 2))
    np.testing.assert_array_equal(np.concatenate(shards.newest.parts), [0, 0, 0, 2, 2, 2])
    assert shards.newest is shards.newest
    arrives(0, 1)
    assert shards.newer
    shards.begin(shards.newest)
    assert shards.awaited == (1, 2)
    arrives(1, 1, "another life of the server")
    assert not shards.newer, "the other one has nothing new"
    assert shards.awaited == (1, -1)
    arrives(0, 2)
    assert shards.newer, "also if its versions are older ones"


@pytest.mark.parametrize("barrier", [True, False])
def test_a_model_of_two_rounds_at_once_is_followed_by_all_of_the_later_one(barrier):
    """Else a worker that nobody waited for, and that is now, waits for the round after the one that waits for it."""
    layout = Layout((Leaf(DELTA, "w", (6,), "float32"),)).cut(2)
    shards = Shards(layout, barrier=barrier)

    def arrive(*versions):
        for assembly, version in zip(shards.assemblies, versions, strict=True):
            header = Model("x", version, 0, assembly.layout.digest)
            assembly.add(header, memoryview(np.zeros(3, np.float32).tobytes()))

    arrive(0, 0)
    shards.begin(shards.newest)
    arrive(2, 1)
    assert shards.newer
    shards.begin(shards.newest)
    assert not shards.newer
    arrive(2, 2)
    assert shards.newer is barrier
    shards.begin(shards.newest)
    arrive(3, 2)
    assert not shards.newer, "its own round has not ended in every shard"
    arrive(3, 3)
    assert shards.newer
    shards.begin(shards.newest)
    arrive(8, 4)  # a server has gone on from an older version: they differ from now on
    shards.begin(shards.newest)
    arrive(8, 5)
    assert not shards.newer
    arrive(9, 5)
    assert shards.newer


# Runs


def learner(target, size=1000):
    def train(worker):
        start = np.linspace(-1, 1, size, dtype=np.float32)
        params = worker.start({"w": start, "b": np.zeros((3, 5), np.float32)})
        while not worker.stopped:
            step = {k: np.float32(0.2) * (x - target) for k, x in params.items()}
            params = worker.step({k: params[k] - step[k] for k in params})
        return params

    return train


def final_of(ps, kind="inproc", directory=None, **config):
    """The final model of a run, the same for all workers, and its summary."""
    run = RunConfig(workers=2, ps=ps, **{"rounds": 12, **config})
    with Cluster(run, kind, directory) as cluster:
        threads = [cluster.train(f"w{i}", learner(np.float32(i)), rank=i) for i in range(2)]
        finals = [thread.result() for thread in threads]
        summary = cluster.finish()
        for server in cluster.servers:
            assert server.thread is not None
            assert server.thread.aggregation is not None
            assert server.thread.aggregation.version == run.rounds
        assert cluster.refused() == {}
    return finals, summary


@pytest.mark.parametrize("kind", ["inproc", "tcp"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"outer": "nesterov"},
        {"shared_memory": False},
        {"shared_memory": False, "outer": "nesterov"},
        # (What goes through shared memory is not compressed, and with which update that begins is a matter of time.)
        {"shared_memory": False, "compression": "bf16"},
    ],
)
def test_many_servers_make_the_model_that_one_makes(options, kind):
    one, _ = final_of(1, mode="sync", **options)
    for ps in (2, 3):
        many, summary = final_of(ps, kind, mode="sync", **options)
        assert summary["rounds"] == 12
        for final in many:
            for key in final:
                np.testing.assert_array_equal(final[key], one[0][key])


@pytest.mark.parametrize(
    "options",
    [
        {"mode": "esync"},
        {"mode": "esync", "overlap": True},
        {"mode": "esync", "slowest_first": True},
        {"mode": "esync", "compression": "int8"},
        {"mode": "esync", "compression": "topk", "topk": 0.5},
        {"mode": "fedavg", "participation": 0.5},
        {"mode": "async", "rounds": 200},
        {"mode": "ssp", "rounds": 200},
        {"mode": "fedasync", "rounds": 200},
    ],
    ids=lambda options: "-".join(str(x) for x in options.values()),
)
def test_every_kind_of_mode_ends_and_learns_with_two_servers(options):
    rounds = max(40, options.get("rounds", 0))
    finals, summary = final_of(2, **{**options, "rounds": rounds})
    assert summary["rounds"] == rounds
    for final in finals:
        for value in final.values():
            assert np.all(np.abs(value - 0.5) < 0.51), "between the two targets"


def test_bytes_and_versions_are_those_of_all_servers():
    (_, one), (_, two) = (final_of(ps, mode="sync", shared_memory=False) for ps in (1, 2))
    assert one["bytes_up"] == two["bytes_up"] > 0
    assert one["bytes_down"] == two["bytes_down"] > 0


def test_a_worker_that_dies_between_two_servers_stops_neither(monkeypatch):
    """Its update of round 3 reaches the first server only."""
    config = RunConfig(mode="sync", workers=2, ps=2, rounds=20, heartbeat_s=1.0)
    with Cluster(config, "tcp") as cluster:

        def dies(worker):
            params = worker.start({"w": np.zeros(1000, np.float32)})
            while worker.round < 3:
                params = worker.step({"w": params["w"] + np.float32(2)})
            channel = worker._link._channels[1]
            channel.push_chunk = lambda *args, **options: None
            worker._link._beat = lambda: None  # nor is it heard of any more
            try:
                worker.step({"w": params["w"] + np.float32(2)})
            except EsyncError:
                pass

        def lives(worker):
            params = worker.start({"w": np.zeros(1000, np.float32)})
            while not worker.stopped:
                params = worker.step({"w": params["w"] + np.float32(1)})
            return params["w"]

        thread = cluster.train("lives", lives, rank=0)
        cluster.train("dies", dies, rank=1)
        final = thread.result()
        cluster.state.stop("over")
        cluster.finish()
    # Three rounds of both, one of which the first half has both and the second half one, then 16 of one.
    np.testing.assert_allclose(final[:500], 4 * 1.5 + 16, rtol=1e-6)
    np.testing.assert_allclose(final[500:], 3 * 1.5 + 17, rtol=1e-6)


def test_a_third_server_of_two_is_refused():
    with Cluster(RunConfig(mode="sync", workers=1, ps=2, rounds=1)) as cluster:
        while len(cluster.state.handlers.servers) != 2:
            time.sleep(0.01)
        third = ParameterServer(
            cluster.endpoint, PsConfig(bind="inproc://third"), context=cluster.context, name="third"
        )
        with pytest.raises(ProtocolError, match="has 2 parameter servers already"):
            run_loop(third.run())
        cluster.train("w0", learner(np.float32(1))).result()
        cluster.finish()


def test_a_model_smaller_than_its_servers_are_many_is_refused():
    with Cluster(RunConfig(mode="sync", workers=1, ps=3, rounds=1)) as cluster:

        def tiny(worker):
            worker.start({"w": np.zeros(2, np.float32)})

        with pytest.raises(EsyncError, match="2 elements cannot be shared by 3 parameter servers"):
            cluster.train("w0", tiny).result()
        cluster.state.stop("over")
        cluster.finish()


def test_fixed_ports_fit_one_server_only():
    raw = {"run": {"ps": 2}, "ps": {"push_port": 5000}, "workers": [{}]}
    with pytest.raises(ConfigError, match="cannot have the same ports"):
        cluster_of(raw)
    with pytest.raises(ConfigError, match="'ps1' is the name of another role"):
        cluster_of({"run": {"ps": 2}, "workers": [{"name": "ps1"}]}).each_worker()
    assert ps_names(3) == ["ps", "ps1", "ps2"]


# The final model


def save(directory, whole, flat, version=7):
    for k in range(whole.shards):
        parts = [flat[whole.chunks[i].start : whole.chunks[i].stop] for i in whole.of_shard(k)]
        path = directory / checkpoint.model_name(k, whole.shards)
        version_of = version if isinstance(version, int) else version[k]
        checkpoint.save_model(path, whole, parts, NumpyBackend(), version=version_of, shard=k)


@pytest.mark.parametrize("shards", [1, 2, 3, 5])
def test_the_shards_files_make_one_with_every_leaf_under_its_name(tmp_path, monkeypatch, shards):
    monkeypatch.setattr(tensors, "CHUNK_ELEMENTS", 4)
    leaves = (
        Leaf(DELTA, "a/kernel", (3, 7), "float32"),
        Leaf(DELTA, "a/bias", (2,), "float32"),
        Leaf(VALUE, "s", (11,), "float32"),
    )
    whole = Layout(leaves).cut(shards)
    flat = np.arange(whole.size, dtype=np.float32)
    save(tmp_path, whole, flat)
    assert checkpoint.join(tmp_path) == (None if shards == 1 else tmp_path / checkpoint.MODEL)
    assert os.listdir(tmp_path) == [checkpoint.MODEL]
    found = load_file(tmp_path / checkpoint.MODEL)
    assert {k: v.shape for k, v in found.items()} == {leaf.path: leaf.shape for leaf in leaves}
    np.testing.assert_array_equal(found["a/kernel"], flat[:21].reshape(3, 7))
    np.testing.assert_array_equal(found["s"], flat[23:])


def test_shards_that_do_not_belong_together_are_not_joined(tmp_path):
    whole = Layout((Leaf(DELTA, "w", (10,), "float32"),)).cut(2)
    other = Layout((Leaf(DELTA, "v", (10,), "float32"),)).cut(2)
    flat = np.zeros(10, np.float32)
    save(tmp_path, whole, flat)
    (tmp_path / "model-2-of-2.safetensors").unlink()
    with pytest.raises(EsyncError, match="has 1 shards of a model that has 2"):
        checkpoint.join(tmp_path)
    save(tmp_path, other, flat)
    first = (tmp_path / "model-1-of-2.safetensors").read_bytes()
    save(tmp_path, whole, flat)
    (tmp_path / "model-1-of-2.safetensors").write_bytes(first)
    with pytest.raises(EsyncError, match="not of one model"):
        checkpoint.join(tmp_path)
    (tmp_path / "model-1-of-2.safetensors").write_bytes(b"garbage")
    with pytest.raises(EsyncError, match="is not a shard"):
        checkpoint.join(tmp_path)
    assert len(os.listdir(tmp_path)) == 2, "and nothing is lost"


def test_esync_run_with_two_servers_leaves_one_model_which_is_what_one_server_makes(tmp_path):
    (tmp_path / "c.toml").write_text(
        '[run]\nmode = "sync"\nmodel = "mlp"\ndataset = "digits"\nrounds = 6\nseed = 3\n'
        '[state]\nbind = "tcp://127.0.0.1:*"\n'
        "[[workers]]\ncount = 2\n"
    )
    found = []
    for ps in (1, 2):
        command = [sys.executable, "-m", "esync.run.cli", "c.toml", "--ps", str(ps), "--plain"]
        done = subprocess.run(
            [*command, "--name", f"run{ps}"],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        directory = tmp_path / "runs" / f"run{ps}"
        assert [p.name for p in directory.glob("*.safetensors")] == ["model.safetensors"]
        assert json.loads((directory / "summary.json").read_text())["rounds"] == 6
        found.append(load_file(directory / "model.safetensors"))
    assert found[0].keys() == found[1].keys()
    for name in found[0]:
        np.testing.assert_array_equal(found[0][name], found[1][name])


# More than 2 GB


BIG = 600_000_000
"""Elements: 2.4 GB, more than 2**31 bytes."""


def test_a_model_of_more_than_2_gb_is_laid_out_and_put_together():
    layout = Layout((Leaf(DELTA, "w", (BIG // 1000, 1000), "float32"),)).cut(2)
    assert layout.chunks[-1].stop == BIG
    shards = Shards(layout)
    one = np.ones(tensors.CHUNK_ELEMENTS, np.float32)
    for assembly in shards.assemblies:
        for i, chunk in enumerate(assembly.layout.chunks):  # the same memory for all of them
            header = Model("x", 0, i, assembly.layout.digest)
            assembly.add(header, memoryview(one[: chunk.size]).cast("B"))
    assert shards.newer
    assert sum(part.size for part in shards.newest.parts) == BIG
    pieces = tensors.Pieces(shards.newest.parts)
    np.testing.assert_array_equal(pieces.whole(BIG - 5, 5), np.ones(5))


@pytest.mark.skipif(not shared_memory.SUPPORTED, reason="this system has no memfd: it takes Linux")
def test_chunks_beyond_2_gb_in_shared_memory_are_the_right_ones():
    """The memory is sparse: only what is touched takes any."""
    layout = Layout((Leaf(DELTA, "w", (BIG,), "float32"),)).cut(2)
    mine = Region.create(layout, 2)
    theirs = Region.open(layout, 2, mine.offer("w", "x"))
    last = len(layout.chunks) - 1
    for slot in (0, 1):
        mine.begin(slot, last)[-3:] = [slot, 2, 3]
        mine.finish(slot, last, 8 + slot)
    part = theirs.part(layout.of_shard(1))
    at = last - layout.of_shard(1).start
    for slot in (0, 1):
        assert part.stamps[slot, at] == 8 + slot
        np.testing.assert_array_equal(part.chunk(slot, at)[-3:], [slot, 2, 3])
        assert theirs.whole(slot).nbytes == BIG * 4


def test_a_server_averages_chunks_beyond_2_gb():
    layout = Layout((Leaf(DELTA, "w", (BIG,), "float32"),))
    server = Mean(layout, NumpyBackend(), RunConfig())
    zeros = np.zeros(tensors.CHUNK_ELEMENTS, np.float32)
    count = len(layout.chunks)
    server.chunks = [zeros[: chunk.size] for chunk in layout.chunks]  # the same memory for all
    server.version = 0
    server.set_members({"a": 0, "b": 1})
    last = layout.chunks[-1].size
    for worker, value in (("a", 1), ("b", 3)):
        data = np.full(last, value, np.float32)
        events = server.receive(Contribution(worker, 0, count - 1, data))
    (published,) = events
    assert published.chunk == count - 1
    np.testing.assert_array_equal(published.data, np.full(last, 2))
    assert server.missing("a", 0) == list(range(count - 1))
    assert server.missing("c", INITIAL) == []
