"""Checkpoints: what is in them, that they are whole or passed over, and that a run goes on from them to the bit."""

from __future__ import annotations

import json
import os
import threading
import time

import numpy as np
import pytest
import zmq
from safetensors import safe_open
from safetensors.numpy import save_file

from esync import tensors
from esync.config import RunConfig
from esync.errors import ModelError
from esync.messages import INITIAL, Members
from esync.ps import checkpoint
from esync.ps.aggregation import AGGREGATIONS, NEXT, Contribution
from esync.ps.backend import NumpyBackend
from esync.ps.checkpoint import ABOUT, Checkpoints, Snapshot, Writer, _checksum, _read, cut_anew
from esync.ps.server import TensorThread
from esync.tensors import DELTA, VALUE, Layout, Leaf
from tests.fuzz.fakes import Socket


@pytest.fixture
def layout(monkeypatch):
    monkeypatch.setattr(tensors, "CHUNK_ELEMENTS", 40)
    return Layout((Leaf(DELTA, "w", (100,), "float32"), Leaf(VALUE, "s", (50,), "float32")))


def vector(seed):
    return np.random.default_rng(seed).normal(size=150).astype(np.float32)


def push(server, worker, round, flat):
    for i, at in enumerate(server.layout.chunks):
        server.receive(Contribution(worker, round, i, flat[at.start : at.stop], 2, 3))


def rounds(server, first, last, workers=("a", "b")):
    for round in range(first, last):
        for number, worker in enumerate(workers):
            push(server, worker, round, vector(10 * round + number))


def made(kind, layout, config):
    server = AGGREGATIONS[kind](layout, NumpyBackend(), config)
    push(server, "a", INITIAL, vector(0))
    server.set_members({"a": 0, "b": 1})
    return server


def snapshot_of(server, version=None, **changes):
    config = server.config.to_wire()
    about = {"members": ["a", "b"], "config": config, "shard": 0, "whole": server.layout}
    about |= {"version": server.version if version is None else version, **changes}
    return Snapshot(arrays=server.snapshot(), **about)


OPTIONS = [
    {},
    {"outer": "nesterov"},
    {"outer": "adam", "ema": 0.9},
    {"outer": "momentum", "compression": "topk", "topk": 0.2},
    {"compression": "int8"},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_a_server_that_goes_on_from_a_checkpoint_makes_what_it_would_have_made(
    layout, tmp_path, options
):
    config = RunConfig(**options)
    whole, before = made("mean", layout, config), made("mean", layout, config)
    rounds(whole, 0, 9)
    rounds(before, 0, 4)
    Checkpoints(tmp_path, 3).write(snapshot_of(before))
    rounds(before, 4, 6)  # what comes later is not in it
    found = Checkpoints(tmp_path, 3).latest(pytest.fail)
    assert (found.version, found.shard, found.members) == (4, 0, ["a", "b"])
    assert found.config == config.to_wire()
    assert found.whole == layout
    after = AGGREGATIONS["mean"](layout, NumpyBackend(), config)
    after.set_members({"a": 0, "b": 1})
    after.restore(found.version, found.arrays)
    rounds(after, 4, 9)
    assert after.version == whole.version == 9
    np.testing.assert_array_equal(np.concatenate(after.chunks), np.concatenate(whole.chunks))
    np.testing.assert_array_equal(
        np.concatenate(after.averaged()), np.concatenate(whole.averaged())
    )


def test_a_run_that_goes_on_without_an_average_of_versions_has_none(layout):
    before = made("mean", layout, RunConfig(ema=0.9))
    rounds(before, 0, 3)
    after = AGGREGATIONS["mean"](layout, NumpyBackend(), RunConfig())
    after.restore(before.version, before.snapshot())
    assert after.averaged() is after.chunks


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_a_server_goes_on_in_the_middle_of_a_version(layout, tmp_path, options):
    config = RunConfig(**options)
    whole, before = made("mean", layout, config), made("mean", layout, config)
    rounds(whole, 0, 6)
    rounds(before, 0, 4)
    for chunk in (0, 2):
        at = layout.chunks[chunk]
        for number, worker in enumerate("ab"):
            data = vector(40 + number)[at.start : at.stop]
            before.receive(Contribution(worker, 4, chunk, data, 2, 3))
    Checkpoints(tmp_path, 3).write(snapshot_of(before))
    found = Checkpoints(tmp_path, 3).latest(pytest.fail)
    after = AGGREGATIONS["mean"](layout, NumpyBackend(), config)
    after.restore(found.version, found.arrays)
    assert after.set_members({"a": 0, "b": 1}) == []
    assert [(x.version, x.chunk) for x in after.in_progress()] == [(5, 0), (5, 2)]
    assert after.missing("a", 4) == [i for i in range(len(layout.chunks)) if i not in (0, 2)]
    rounds(after, 4, 6)
    assert after.version == whole.version == 6
    np.testing.assert_array_equal(np.concatenate(after.chunks), np.concatenate(whole.chunks))
    np.testing.assert_array_equal(
        np.concatenate(after.averaged()), np.concatenate(whole.averaged())
    )


@pytest.mark.parametrize(("before", "after"), [(2, 1), (1, 2), (2, 3), (3, 2), (1, 64)])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_a_server_goes_on_in_other_chunks(layout, tmp_path, options, before, after):
    config = RunConfig(**options)
    whole, first = (made("mean", layout.cut(1, mib), config) for mib in (after, before))
    rounds(first, 0, 4)
    rounds(whole, 0, 4)
    Checkpoints(tmp_path, 3).write(snapshot_of(first))
    found = cut_anew(Checkpoints(tmp_path, 3).latest(pytest.fail), after)
    assert found.whole == layout.cut(1, after)
    for name, chunks in first.snapshot().items():
        sizes = [at.size for at in found.whole.chunks]
        again = found.arrays[name]
        assert [
            size if x is None else x.size for x, size in zip(again, sizes, strict=True)
        ] == sizes
        np.testing.assert_array_equal(flat(again), flat(chunks))
    second = AGGREGATIONS["mean"](found.whole, NumpyBackend(), config)
    second.set_members({"a": 0, "b": 1})
    second.restore(found.version, found.arrays)
    rounds(second, 4, 9)
    assert second.version == 9
    if "compression" not in options:  # which depends on the chunk
        rounds(whole, 4, 9)
        np.testing.assert_array_equal(flat(second.chunks), flat(whole.chunks))
        np.testing.assert_array_equal(flat(second.averaged()), flat(whole.averaged()))


def flat(chunks):
    return np.concatenate([x for x in chunks if x is not None] or [np.zeros(0, np.float32)])


@pytest.mark.parametrize("shard", [0, 1])
def test_a_shard_goes_on_in_other_chunks(layout, shard):
    whole = layout.cut(2, 2)
    mine = [whole.chunks[i] for i in whole.of_shard(shard)]
    arrays = {"model": [vector(1)[at.start : at.stop] for at in mine]}
    found = cut_anew(Snapshot(3, whole, shard, arrays, [], {}), 1)
    sizes = [at.size for at in layout.cut(2, 1).shard(shard).chunks]
    assert [x.size for x in found.arrays["model"]] == sizes
    np.testing.assert_array_equal(flat(found.arrays["model"]), flat(arrays["model"]))


def test_what_is_there_of_a_part_of_a_chunk_only_is_not_cut_anew(layout):
    server = made("mean", layout, RunConfig(outer="adam"))
    rounds(server, 0, 1)
    snapshot = snapshot_of(server)
    snapshot.arrays["outer.v"][1] = None  # its first step overflowed, say
    assert cut_anew(snapshot, 2) is snapshot
    there = [x is not None for x in cut_anew(snapshot, 1).arrays["outer.v"]]
    assert there == [True, True, False, False, True, *[False] * 3]  # deltas, and values
    with pytest.raises(
        ModelError, match=r"has outer.v of some of its chunks only, .* chunk_mib = 2"
    ):
        cut_anew(snapshot, 3)


@pytest.mark.parametrize("outer", ["sgd", "momentum"])
def test_the_middle_of_a_version_is_cut_anew_where_that_is_made_once_more(layout, outer):
    server = made("mean", layout, RunConfig(outer=outer))
    rounds(server, 0, 1)
    for worker in "ab":
        at = layout.chunks[0]
        server.receive(Contribution(worker, 1, 0, vector(7)[: at.size], 2, 3))
    snapshot = snapshot_of(server)
    assert [x is not None for x in snapshot.arrays[NEXT]][:2] == [True, False]
    if outer == "sgd":
        assert NEXT not in cut_anew(snapshot, 3).arrays
    else:
        with pytest.raises(ModelError, match=r"has next of some .* middle .* chunk_mib = 2"):
            cut_anew(snapshot, 3)


def simple(version, value=0.0):
    layout = Layout((Leaf(DELTA, "w", (3,), "float32"),))
    return Snapshot(version, layout, 0, {"model": [np.full(3, value, np.float32)]}, [], {})


@pytest.mark.parametrize("keep", [1, 3])
def test_what_was_written_is_kept_also_beside_newer_ones_that_are_damaged(tmp_path, keep):
    checkpoints = Checkpoints(tmp_path, keep)
    for version in (10, 11, 12):
        checkpoints.write(simple(version))
    for path in checkpoints.paths():
        path.write_bytes(path.read_bytes()[:-3] + b"xyz")
    assert checkpoints.latest(lambda text: None) is None
    for version in (1, 2, 3):
        checkpoints.write(simple(version))
        passed_over = []
        assert checkpoints.latest(passed_over.append).version == version
        assert len(passed_over) == keep, "it is no loss that they are there"
    assert len(checkpoints.paths()) == keep + len(passed_over)


@pytest.mark.parametrize("keep", [1, 3])
def test_of_one_version_what_was_written_last_is_gone_on_from(tmp_path, keep):
    checkpoints = Checkpoints(tmp_path, keep)
    for number in range(20):
        path = checkpoints.write(simple(3, number))
        os.utime(path, ns=(0, number))  # clocks of file systems are coarse
        assert checkpoints.latest(pytest.fail).arrays["model"][0][0] == number


def test_a_checkpoint_that_is_still_being_written_at_the_end_is_whole(tmp_path, monkeypatch):
    """On a slow disk: two writers of one file destroyed each other's."""
    save, slow = checkpoint.save_file, threading.Event()
    begun = threading.Event()

    def slowly(arrays, path, metadata=None):
        begun.set()
        slow.wait(20)
        save(arrays, path, metadata=metadata)

    monkeypatch.setattr(checkpoint, "save_file", slowly)
    config = RunConfig(mode="sync", chunk_mib=2)
    whole = config.cut(Layout((Leaf(DELTA, "w", (3,), "float32"),)))
    sockets = Socket(zmq.PULL), Socket(zmq.XPUB)
    checkpoints = Checkpoints(tmp_path, 3)
    thread = TensorThread(
        *sockets, NumpyBackend(), config, lambda event: None, checkpoints=checkpoints
    )
    thread._writer.start()
    thread._set_members(Members(1, {"a": 0}, whole.to_wire()))
    data = np.ones(3, np.float32)
    thread.aggregation.receive(Contribution("a", INITIAL, 0, data))
    thread._write_checkpoint()
    assert begun.wait(20)
    thread.aggregation.receive(Contribution("a", 0, 0, data))
    threading.Timer(0.2, slow.set).start()
    thread.save_checkpoint()
    thread.inbox.close()
    versions = [_read(path).version for path in checkpoints.paths()]
    assert versions == [1, 0]


def test_a_writer_that_fails_says_so_and_writes_the_next(tmp_path, monkeypatch, caplog):
    def fail(snapshot):
        raise MemoryError

    checkpoints = Checkpoints(tmp_path, 3)
    writer = Writer(checkpoints)
    monkeypatch.setattr(checkpoints, "write", fail)
    writer.start()
    writer.put(simple(1))
    while not writer.is_free:
        time.sleep(0.01)
    monkeypatch.undo()
    writer.put(simple(2))
    writer.finish()
    assert "cannot write a checkpoint: MemoryError" in caplog.text
    assert writer.written == checkpoints.latest(pytest.fail).version == 2


def test_a_checkpoint_that_does_not_say_its_chunks_has_those_of_2_mib(layout, tmp_path):
    path = Checkpoints(tmp_path, 3).write(snapshot_of(made("mean", layout, RunConfig())))
    with safe_open(path, framework="np") as file:
        about = json.loads(file.metadata()[ABOUT])
        arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    assert about.pop("chunk_mib") == 2
    path.unlink()
    save_file(arrays, path, metadata={ABOUT: json.dumps(about)})
    path.rename(path.with_name(f"shard0-version0000000000-{_checksum(path)}.safetensors"))
    assert Checkpoints(tmp_path, 3).latest(pytest.fail).whole == layout


@pytest.mark.parametrize("kind", ["immediate", "fedasync"])
def test_without_a_barrier_too(layout, tmp_path, kind):
    config = RunConfig(mode={"immediate": "async"}.get(kind, kind))
    before = made(kind, layout, config)
    push(before, "a", 0, vector(1))
    Checkpoints(tmp_path, 1).write(snapshot_of(before))
    found = Checkpoints(tmp_path, 1).latest(pytest.fail)
    after = AGGREGATIONS[kind](layout, NumpyBackend(), config)
    after.restore(found.version, found.arrays)
    assert after.version == 1
    np.testing.assert_array_equal(np.concatenate(after.chunks), np.concatenate(before.chunks))


def test_the_last_ones_are_kept_and_the_newest_is_found(layout, tmp_path):
    server, checkpoints = made("mean", layout, RunConfig()), Checkpoints(tmp_path, 2)
    assert checkpoints.latest(pytest.fail) is None
    for version in (1, 9, 10, 100):
        checkpoints.write(snapshot_of(server, version))
    assert len(list(tmp_path.iterdir())) == 2
    assert checkpoints.latest(pytest.fail).version == 100
    other = Checkpoints(tmp_path, 2, shard=1)
    assert other.latest(pytest.fail) is None
    other.write(snapshot_of(server, 7, shard=1))
    assert checkpoints.latest(pytest.fail).version == 100
    assert other.latest(pytest.fail).version == 7


@pytest.mark.parametrize("damage", ["flipped", "cut", "emptied", "renamed"])
def test_a_damaged_one_is_passed_over_with_a_word(layout, tmp_path, damage):
    server, checkpoints = made("mean", layout, RunConfig()), Checkpoints(tmp_path, 3)
    for version in (1, 2):
        path = checkpoints.write(snapshot_of(server, version))
    data = bytearray(path.read_bytes())
    if damage == "flipped":
        data[-1] ^= 1
        path.write_bytes(data)
    elif damage == "cut":
        path.write_bytes(data[:-5])
    elif damage == "emptied":
        path.write_bytes(b"")
    else:
        path.rename(path.with_name(path.stem[:-16] + "0" * 16 + ".safetensors"))
    said = []
    assert checkpoints.latest(said.append).version == 1
    assert len(said) == 1
    assert "is damaged and passed over" in said[0]


def test_a_write_that_was_interrupted_leaves_the_earlier_one(layout, tmp_path, monkeypatch):
    server, checkpoints = made("mean", layout, RunConfig()), Checkpoints(tmp_path, 3)
    checkpoints.write(snapshot_of(server, 1))

    def dies(tensors, path, metadata):
        path.write_bytes(b"half of it")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "save_file", dies)
    with pytest.raises(OSError, match="No space"):
        checkpoints.write(snapshot_of(server, 2))
    assert checkpoints.latest(pytest.fail).version == 1


@pytest.mark.parametrize(
    "arrays",
    [
        {"model": [np.zeros(40, np.float32)]},
        {"model": [np.zeros(3, np.float32)] * 5},
        {"model": [None] * 5},
    ],
)
def test_what_is_not_of_this_model_is_refused(layout, arrays):
    server = AGGREGATIONS["mean"](layout, NumpyBackend(), RunConfig())
    with pytest.raises(ModelError, match="not of this model"):
        server.restore(3, arrays)
    assert server.version == -1
    other = AGGREGATIONS["mean"](layout.cut(1, 1), NumpyBackend(), RunConfig())
    with pytest.raises(ModelError, match="not of this model"):
        other.restore(3, cut_anew(Snapshot(3, layout, 0, arrays, [], {}), 1).arrays)


def test_another_outer_optimiser_s_state_is_refused(layout):
    momentum = made("mean", layout, RunConfig(outer="momentum"))
    rounds(momentum, 0, 1)
    server = AGGREGATIONS["mean"](layout, NumpyBackend(), RunConfig(outer="adam"))
    with pytest.raises(ModelError, match="outer optimiser"):
        server.restore(1, momentum.snapshot())


def test_the_writer_takes_one_at_a_time_and_ends_with_it_written(layout, tmp_path, monkeypatch):
    server = made("mean", layout, RunConfig())
    began, go = threading.Event(), threading.Event()
    save = checkpoint.save_file

    def slow(*args, **options):
        began.set()
        assert go.wait(10)
        save(*args, **options)

    monkeypatch.setattr(checkpoint, "save_file", slow)
    writer = Writer(Checkpoints(tmp_path, 3))
    writer.start()
    assert writer.is_free
    writer.put(snapshot_of(server, 1))
    assert began.wait(10)
    assert not writer.is_free
    assert writer.written == -1
    go.set()
    writer.finish()
    assert writer.written == 1
    assert Checkpoints(tmp_path, 3).latest(pytest.fail).version == 1


def test_a_disk_that_is_full_stops_nothing(layout, tmp_path, monkeypatch, caplog):
    server, times = made("mean", layout, RunConfig()), []

    def full(*args, **options):
        times.append(1)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "save_file", full)
    writer = Writer(Checkpoints(tmp_path, 3))
    writer.start()
    for version in (1, 2):
        while not writer.is_free:
            pass
        writer.put(snapshot_of(server, version))
    writer.finish()
    assert len(times) == 2
    assert caplog.text.count("No space left") == 1, "said once"
