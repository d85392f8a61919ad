"""Whole runs with keys: what strangers send changes nothing, and what they see says nothing."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
import zmq

from esync import keys, messages
from esync.config import RunConfig
from esync.errors import EsyncError, TransportError
from esync.messages import Error, Fetch, Have, Model, Update
from esync.seal import TO_SERVER, TO_WORKERS, Envelope, new_key
from esync.worker.channel import Channel
from tests.cluster import Cluster

MARK = np.float32(1.2345678)


@pytest.fixture
def directory(tmp_path):
    keys.make(tmp_path / "keys", ["w", "gpu"])
    return tmp_path / "keys"


def learner(worker):
    params = worker.start({"w": np.full(5000, MARK)})
    while not worker.stopped:
        params = worker.step({"w": params["w"] * np.float32(0.5) + worker.rank})
    return params["w"]


def run_of(directory, **options):
    curve = options.pop("curve", False)
    config = RunConfig(**{"mode": "sync", "workers": 2, "rounds": 20, **options})
    with Cluster(config, "tcp", keys=directory, curve=curve) as cluster:
        threads = [cluster.train(f"w-{i}", learner, rank=i) for i in range(2)]
        finals = [thread.result() for thread in threads]
        cluster.finish()
        assert cluster.refused() == {}
    np.testing.assert_array_equal(finals[0], finals[1])
    return finals[0]


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("curve", [True, False])
@pytest.mark.parametrize("options", [{}, {"ps": 2}, {"compression": "bf16"}], ids=str)
def test_a_run_with_keys_makes_the_model_that_one_without_makes(directory, shared, curve, options):
    plain = run_of(None, shared_memory=shared, **options)
    np.testing.assert_array_equal(
        run_of(directory, shared_memory=shared, curve=curve, **options), plain
    )


@pytest.mark.parametrize("mode", ["esync", "async", "fedavg"])
def test_other_modes_run_with_keys(directory, mode):
    config = RunConfig(mode=mode, workers=2, rounds=30, slowest_first=mode == "esync")
    with Cluster(config, "tcp", keys=directory) as cluster:
        threads = [cluster.train(f"w-{i}", learner, rank=i) for i in range(2)]
        for thread in threads:
            thread.result()
        assert cluster.finish()["rounds"] == 30
        assert cluster.refused() == {}


def test_a_worker_with_a_key_of_its_own_takes_part_under_its_name(directory):
    config = RunConfig(mode="sync", workers=1, rounds=3)
    with Cluster(config, "tcp", keys=directory) as cluster:
        with cluster.worker("", keys=directory / "gpu.key") as worker:
            assert worker.name.startswith("gpu-")
            learner(worker)
        cluster.finish()


def test_a_worker_without_a_key_or_with_a_revoked_one_is_told_so(directory):
    config = RunConfig(mode="sync", workers=1, rounds=3)
    with Cluster(config, "tcp", keys=directory) as cluster:
        own = shutil.copy(directory / "gpu.key", directory / "copied.key")
        keys.revoke(directory, "gpu")
        with pytest.raises(TransportError, match=r"cannot join .*refused the key of 'gpu'"):
            cluster.worker("gpu", keys=own)
        with pytest.raises(TransportError, match=r"cannot join .* the server has keys"):
            cluster.worker("w", keys="")
        with pytest.raises(EsyncError, match="does not speak for 'other'"):
            cluster.worker("other", keys=directory / "w.key")
        cluster.train("w", learner).result()
        cluster.finish()


class Wire:
    """A sealed run in which w-0 stops after some rounds, for strangers to come."""

    def __init__(self, directory):
        config = RunConfig(mode="sync", workers=1, rounds=10**6, shared_memory=False)
        self.cluster = Cluster(config, "tcp", keys=directory)
        self.reached, self.go = threading.Event(), threading.Event()

    def __enter__(self):
        self.cluster.__enter__()
        self.thread = self.cluster.train("w-0", self.loop, rank=0)
        assert self.reached.wait(30)
        self.server = self.cluster.ps.thread
        self.layout = self.server.layout
        return self

    def loop(self, worker):
        params = worker.start({"w": np.full(5000, MARK)})
        while not worker.stopped:
            params = worker.step({"w": params["w"] + np.float32(1)})
            if worker.round == 5:
                self.reached.set()
                assert self.go.wait(30)
            if worker.round == 10:
                self.cluster.state.stop("seen enough")
        return params["w"]

    def connect(self, kind, what):
        return self.cluster.intruder(kind, what)

    def until(self, condition, what):
        deadline = time.monotonic() + 20
        while not condition():
            assert time.monotonic() < deadline, (what, self.server.counters)
            time.sleep(0.01)

    def __exit__(self, *error):
        if error[0] is None:
            self.go.set()
            final = self.thread.result()
            self.cluster.finish()
            # Each round adds one, whatever strangers did.
            assert np.all(np.abs(final - (MARK + np.round(final - MARK))) < 1e-3)
            assert np.ptp(final) == 0
        self.cluster.__exit__(*error)


def test_forged_updates_and_requests_are_counted_and_change_nothing(directory):
    with Wire(directory) as wire:
        chunk = np.full(5000, 1e6, np.float32)
        update = messages.encode(
            Update("w-0", 5, 0, wire.layout.digest, incarnation=wire.server.incarnation)
        )
        stranger, member = (
            Envelope(new_key(), "w-0"),
            Envelope(wire.cluster.state.handlers._run_key, "gpu"),
        )
        push = wire.connect(zmq.PUSH, "push")
        push.send_multipart([update, chunk])
        push.send_multipart([update])
        push.send_multipart(stranger.pack(update, chunk, TO_SERVER))
        push.send_multipart(member.pack(update, chunk, TO_WORKERS))
        changed = member.pack(update, chunk, TO_SERVER)
        push.send_multipart([changed[0].replace(b"w-0", b"w-1"), changed[1]])
        wire.until(lambda: wire.server.counters["bad-seal"] == 4, "bad seals")
        wire.until(lambda: wire.server.counters["bad-frames"] == 1, "one frame")
        push.send_multipart(member.pack(update, chunk, TO_SERVER))
        wire.until(lambda: wire.server.counters["wrong-sender"] == 1, "another's name")
        fetch = messages.encode(Fetch("w-0", -1))
        push.send_multipart([fetch])
        wire.until(lambda: wire.server.counters["bad-frames"] == 2, "a request without a seal")
        push.send_multipart(
            stranger.pack(messages.encode(Have("w-0", 5, 0, True)), None, TO_SERVER)
        )
        wire.until(
            lambda: wire.server.counters["bad-seal"] == 5, "a forged word of what has arrived"
        )
        push.close(0)


def test_an_update_that_is_sent_again_counts_once(directory):
    sent, pack = [], Envelope.pack

    def recording(self, header, payload=None, *about):
        frames = pack(self, header, payload, *about)
        if payload is not None and about == (TO_SERVER,):
            sent.append([bytes(frame) for frame in frames])
        return frames

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Envelope, "pack", recording)
        with Wire(directory) as wire:
            push = wire.connect(zmq.PUSH, "push")
            for frames in sent:
                push.send_multipart(frames)
            wire.until(
                lambda: wire.server.counters["late"] + wire.server.counters["double"] == len(sent),
                "refused",
            )
            push.close(0)


def test_who_listens_does_not_see_the_model(directory):
    with Wire(directory) as wire:
        stranger = wire.connect(zmq.XSUB, "model")
        stranger.send(b"\x01w/w-0/")
        assert stranger.poll(10_000), "the server takes it for the worker's new connection"
        seen = b"".join(stranger.recv_multipart())
        assert len(seen) > 5000 * 4
        current = wire.server.aggregation.chunks[0]
        assert current[0].tobytes() not in seen
        stranger.close(0)


def test_forged_models_and_errors_are_not_believed(directory):
    """Somebody has got between: what comes under the worker's topic is not the server's."""
    with Wire(directory) as wire:
        handlers = wire.cluster.state.handlers
        worker = next(iter(handlers.table.records))
        assert worker == "w-0"
        stranger = Envelope(new_key(), "ps")
        member = Envelope(handlers._run_key, "ps")
        header = Model(wire.server.incarnation, 99, 0, wire.layout.digest)
        model = messages.encode(header)
        error = messages.encode(Error("not-finite", "give up"))
        poison = np.full(5000, 1e6, np.float32)
        refused = []
        real = Channel._on_data

        def watched(self, frames):
            try:
                real(self, frames)
            except messages.MessageError as refusal:
                refused.append(refusal.code)
                raise

        topic, other = b"w/w-0/", b"w/w-1/"
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Channel, "_on_data", watched)
            forged = [
                [model, poison],
                stranger.pack(model, poison, TO_WORKERS),
                member.pack(model, poison, TO_SERVER),
                [error],
                stranger.pack(error, None, TO_WORKERS, topic),
                member.pack(error, None, TO_WORKERS, other),  # meant for another worker
            ]
            for frames in forged:
                wire.server._xpub.send_multipart([topic, *frames])
            wire.until(lambda: len(refused) == len(forged), "refused by the worker")
        assert set(refused) == {"bad-seal", "bad-frames"}


def test_keys_are_told_to_nobody_and_written_nowhere(directory, tmp_path):
    (tmp_path / "run").mkdir()
    config = RunConfig(mode="sync", workers=1, rounds=3)
    with Cluster(config, "tcp", tmp_path, keys=directory) as cluster:
        key = cluster.state.handlers._run_key
        assert len(key) == 32
        cluster.train("w", learner).result()
        cluster.finish()
    for path in (tmp_path / "run").rglob("*"):
        if path.is_file():
            assert key not in path.read_bytes()
            assert key.hex() not in path.read_text(errors="replace")


def test_without_keys_a_server_on_inproc_or_loopback_seals_nothing():
    with Cluster(RunConfig(mode="sync", workers=1, rounds=1)) as cluster:
        assert cluster.state.handlers._run_key == b""
        cluster.train("w", learner).result()
        cluster.finish()


@pytest.mark.parametrize("curve", [False, True])
def test_esync_run_with_keys(directory, tmp_path, curve):
    (tmp_path / "c.toml").write_text(
        f'[run]\nmode = "sync"\nmodel = "mlp"\ndataset = "digits"\nrounds = 5\n'
        f'[state]\nbind = "tcp://127.0.0.1:*"\nkeys = "{directory}"\n[ps]\ncurve = {str(curve).lower()}\n'
        "[[workers]]\ncount = 2\n"
    )
    done = subprocess.run(
        [sys.executable, "-m", "esync.run.cli", "c.toml", "--plain", "--name", "it"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    summary = json.loads((tmp_path / "runs" / "it" / "summary.json").read_text())
    assert summary["rounds"] == 5
    assert summary["refused"] == {}
    assert summary["final_accuracy"] is not None, "the evaluator took part"
