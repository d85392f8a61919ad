"""Whole rounds: real servers, real sockets, real threads; tiny models in NumPy."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgpack
import numpy as np
import pytest
import zmq
from safetensors.numpy import load_file

from esync import messages, tensors, transport
from esync.config import RunConfig
from esync.errors import ModelError, ProtocolError
from esync.messages import Error, Status, Update
from esync.messaging import MessageServer
from esync.ps.aggregation import Published
from esync.ps.server import NewVersion, ParameterServer
from esync.worker import link
from esync.worker.client import Worker
from tests.cluster import Cluster, Thread

START = np.arange(6, dtype=np.float32)


def quadratic(target: float, lr: float = 0.1, step_s: float = 0.0) -> Any:
    """A loop that pulls every parameter towards `target` by plain gradient descent; returns the final model."""

    def loop(worker: Worker) -> Any:
        params = worker.start({"w": START})
        while not worker.stopped:
            worker.pause(step_s)
            params = {"w": params["w"] - np.float32(lr) * (params["w"] - np.float32(target))}
            params = worker.step(params, loss=float(np.mean((params["w"] - target) ** 2)))
        return params["w"]

    return loop


@pytest.mark.parametrize("kind", ["inproc", "ipc", "tcp"])
@pytest.mark.parametrize("mode", ["sync", "esync"])
def test_workers_with_different_data_meet_in_the_middle(
    mode: str, kind: str, tmp_path: Path
) -> None:
    with Cluster(RunConfig(mode=mode, workers=2, rounds=60), kind, tmp_path) as cluster:
        threads = [cluster.train(f"w{i}", quadratic(float(i), step_s=0.002)) for i in range(2)]
        finals = [thread.result() for thread in threads]
        summary = cluster.finish()
    assert summary["rounds"] == 60
    assert summary["ended"] == "60 rounds"
    np.testing.assert_array_equal(finals[0], finals[1])
    if mode == "sync":
        np.testing.assert_allclose(finals[0], 0.5, atol=0.02)
    else:  # unequal numbers of local steps weigh the two targets unequally
        assert np.all((finals[0] > 0) & (finals[0] < 1))
    assert {row["name"] for row in summary["workers"]} == {"w0", "w1"}
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["rounds"] == 60
    saved = load_file(tmp_path / "run" / "model.safetensors")
    np.testing.assert_array_equal(saved["params/w"], finals[0])


def test_sync_is_the_mean_of_the_updates_round_by_round() -> None:
    with Cluster(RunConfig(mode="sync", workers=3, rounds=5)) as cluster:
        threads = [cluster.train(f"w{i}", quadratic(float(i)), rank=i) for i in range(3)]
        finals = [thread.result() for thread in threads]
        cluster.finish()
    expected = START.astype(np.float64)
    for _ in range(5):
        expected -= np.mean([0.1 * (expected - target) for target in range(3)], axis=0)
    np.testing.assert_allclose(finals[0], expected, rtol=1e-5)


def test_global_learning_rate_scales_the_mean_delta() -> None:
    config = RunConfig(mode="sync", workers=1, rounds=3, global_lr=0.5)
    with Cluster(config) as cluster:
        final = cluster.train("w0", quadratic(0.0)).result()
        cluster.finish()
    np.testing.assert_allclose(final, START * 0.95**3, rtol=1e-5)


def test_a_slow_worker_lets_a_fast_one_take_many_steps() -> None:
    with Cluster(RunConfig(mode="esync", workers=2, rounds=6)) as cluster:
        cluster.train("fast", quadratic(0.0, lr=0.01, step_s=0.005))
        cluster.train("slow", quadratic(0.0, lr=0.01, step_s=0.2))
        summary = cluster.finish()
    steps = {row["name"]: row["steps"] for row in summary["workers"]}
    assert steps["slow"] <= 8
    assert steps["fast"] > 10 * steps["slow"]


def test_the_published_policy_runs_over_the_same_sockets() -> None:
    config = RunConfig(mode="esync", policy="paper", epsilon_s=0.01, workers=2, rounds=4)
    with Cluster(config) as cluster:
        cluster.train("fast", quadratic(0.0, lr=0.01, step_s=0.005))
        cluster.train("slow", quadratic(0.0, lr=0.01, step_s=0.1))
        summary = cluster.finish()
    steps = {row["name"]: row["steps"] for row in summary["workers"]}
    assert steps["fast"] > 3 * steps["slow"]
    assert all(row["query_s"] > 0 for row in summary["workers"])


def test_a_version_that_is_made_while_the_run_ends_is_in_the_log(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    post = MessageServer.post_threadsafe

    def late(server: MessageServer, event: object) -> None:
        if isinstance(event, NewVersion) and event.version > 0:
            time.sleep(
                0.3
            )  # the control side hears of it when it waits for the tensor thread to end
        post(server, event)

    monkeypatch.setattr(MessageServer, "post_threadsafe", late)
    with Cluster(RunConfig(mode="sync", workers=1), "inproc", tmp_path) as cluster:
        thread = cluster.train("w0", quadratic(0.0))
        _until(lambda: cluster.state.handlers.history.version >= 2)
        cluster.state.stop("seen enough")
        thread.result()
        summary = cluster.finish()
        assert cluster.ps.thread is not None
        version = cluster.ps.thread.version
    for role in ("ps", "state"):
        rows = map(json.loads, (tmp_path / "run" / f"{role}.jsonl").read_text().splitlines())
        assert max(row["round"] for row in rows if row["event"] == "round") == version, role
    assert summary["rounds"] == version


@pytest.mark.parametrize("stop_s", [0.0, 0.003, 0.006, 0.009])
def test_what_workers_end_with_is_what_is_saved(stop_s: float, tmp_path: Path) -> None:
    """Whenever the run is stopped: what is on its way then makes a version, or does not."""
    with Cluster(RunConfig(mode="sync", workers=2), "tcp", tmp_path) as cluster:
        threads = [
            cluster.train(f"w{i}", quadratic(float(i), lr=0.01, step_s=0.003)) for i in range(2)
        ]
        _until(lambda: cluster.state.handlers.history.version >= 5)
        time.sleep(stop_s)
        cluster.state.stop("seen enough")
        finals = [thread.result() for thread in threads]
        summary = cluster.finish()
    saved = load_file(tmp_path / "run" / "model.safetensors")["params/w"]
    for final in finals:
        np.testing.assert_array_equal(final, saved)
    assert cluster.ps.thread is not None
    assert summary["rounds"] == cluster.ps.thread.version


@pytest.mark.parametrize("interrupted", [False, True], ids=["the run", "its parameter server"])
def test_a_run_that_was_stopped_in_the_middle_of_a_version_is_gone_on_with_in_the_middle(
    interrupted: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Or the outer optimiser would step twice on what was made of that version."""
    monkeypatch.setattr(tensors, "CHUNK_ELEMENTS", 7)
    send = link.Link._send_chunk

    def in_part(self: Any, channel: Any, item: Any, chunk: int) -> None:
        if chunk < 4 or item.rounds[channel.shard] < 3:
            send(self, channel, item, chunk)

    def loop(worker: Worker) -> Any:
        params = worker.start({"w": np.ones(40, np.float32)})
        while not worker.stopped:
            params = worker.step({"w": params["w"] * np.float32(0.9)})
        return params["w"]

    config = RunConfig(mode="sync", workers=2, outer="momentum", chunk_mib=2, rounds=7)
    with Cluster(config, "tcp") as cluster:
        whole = [cluster.train(f"w{i}", loop) for i in range(2)]
        expected = whole[0].result()
        cluster.finish()
    monkeypatch.setattr(link.Link, "_send_chunk", in_part)
    with Cluster(config, "tcp", tmp_path) as cluster:
        threads = [cluster.train(f"w{i}", loop) for i in range(2)]
        _until(lambda: _made(cluster.ps) == (3, 4))
        cluster.ps.stop() if interrupted else cluster.state.stop("seen enough")
        finals = [thread.result() for thread in threads]
        summary = cluster.finish()
    assert summary["rounds"] == 3
    assert len(set(np.concatenate(finals).tolist())) == 1
    monkeypatch.setattr(link.Link, "_send_chunk", send)
    with Cluster(config, "tcp", tmp_path, resume=True) as cluster:
        threads = [cluster.train(f"w{i}", loop) for i in range(2)]
        finals = [thread.result() for thread in threads]
        cluster.finish()
    for final in finals:
        np.testing.assert_array_equal(final, expected)


@pytest.mark.parametrize("dcasgd", [False, True])
def test_async_workers_do_not_wait_for_each_other(dcasgd: bool) -> None:
    config = RunConfig(mode="async", workers=2, rounds=60, dcasgd=dcasgd, lr=0.1)
    with Cluster(config) as cluster:
        cluster.train("fast", quadratic(0.0, step_s=0.002))
        cluster.train("slow", quadratic(0.0, step_s=0.1))
        summary = cluster.finish()
    steps = {row["name"]: row["steps"] for row in summary["workers"]}
    assert steps["fast"] > 3 * steps["slow"]
    assert summary["rounds"] >= 60


def test_local_trains_alone_and_refuses_a_second_worker() -> None:
    with Cluster(RunConfig(mode="local", workers=1, rounds=3, local_steps=4)) as cluster:
        release = threading.Event()

        def loop(worker: Worker) -> Any:
            release.wait(20)
            return quadratic(0.0)(worker)

        only = cluster.train("only", loop)
        _until(lambda: "only" in cluster.state.handlers.table.records)
        with pytest.raises(ProtocolError, match="trains on one worker"):
            cluster.worker("second")
        release.set()
        final = only.result()
        summary = cluster.finish()
    np.testing.assert_allclose(final, START * 0.9**12, rtol=1e-5)
    assert summary["workers"][0]["steps"] >= 12  # and what it had begun when the run ended


def test_a_model_of_several_chunks_and_of_values_travels_whole(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(tensors, "CHUNK_ELEMENTS", 7)
    start = {"dense": np.arange(40, dtype=np.float32).reshape(5, 8)}
    stats = {"mean": np.zeros(9, np.float32)}

    def loop(worker: Worker) -> Any:
        params, values = worker.start(start, stats)
        while not worker.stopped:
            params = {"dense": params["dense"] + np.float32(worker.rank)}
            values = {"mean": values["mean"] * 0 + np.float32(worker.rank + 1)}
            params, values = worker.step(params, values)
        return params["dense"], values["mean"]

    with Cluster(RunConfig(mode="sync", workers=3, rounds=4, chunk_mib=2)) as cluster:
        threads = [cluster.train(f"w{i}", loop, rank=i) for i in range(3)]
        for thread in threads:
            params, values = thread.result()
            np.testing.assert_allclose(params, start["dense"] + 4)  # 4 rounds of mean(0, 1, 2)
            np.testing.assert_allclose(values, 2.0)
        cluster.finish()


def test_a_worker_that_joins_late_takes_part_from_the_current_model() -> None:
    with Cluster(RunConfig(mode="sync", workers=1, rounds=40)) as cluster:
        cluster.train("early", quadratic(0.0, step_s=0.02))
        _until(lambda: cluster.state.handlers.history.version >= 5)
        seen = []

        def loop(worker: Worker) -> Any:
            params = worker.start({"w": np.full(6, 99, np.float32)})
            seen.append((worker.round, params["w"].copy()))
            while not worker.stopped:
                worker.pause(0.02)
                params = worker.step(params)

        cluster.train("late", loop).result()
        summary = cluster.finish()
    assert seen[0][0] >= 5
    assert np.all(seen[0][1] < 99), "the late worker must start from the cluster's model"
    late = next(row for row in summary["workers"] if row["name"] == "late")
    assert late["steps"] > 5
    assert late["joined_s"] > 0


def test_a_worker_that_vanishes_is_evicted_and_the_round_goes_on() -> None:
    config = RunConfig(mode="sync", workers=2, rounds=10, heartbeat_s=0.6)
    with Cluster(config) as cluster:
        vanished = threading.Event()

        def vanishing(worker: Worker) -> None:
            params = worker.start({"w": START})
            for _ in range(3):
                params = worker.step(params)
            worker._link.inbox.put(None)  # as if killed: no goodbye, no more heartbeats
            worker._link.join()
            vanished.set()

        cluster.train("vanishes", vanishing)
        final = cluster.train("stays", quadratic(0.0)).result()
        summary = cluster.finish()
    assert vanished.is_set()
    assert summary["rounds"] == 10
    gone = next(row for row in summary["workers"] if row["name"] == "vanishes")
    assert "evicted" in gone["left_why"]
    assert np.isfinite(final).all()


def test_a_worker_that_comes_back_under_its_name_keeps_its_rank() -> None:
    with Cluster(RunConfig(mode="sync", workers=2, rounds=200)) as cluster:
        cluster.train("other", quadratic(0.0, step_s=0.01), rank=0)

        def few_steps(worker: Worker) -> int:
            params = worker.start({"w": START})
            for _ in range(3):
                params = worker.step(params)
            return worker.rank

        assert cluster.train("guest", few_steps, rank=1).result() == 1
        assert cluster.train("guest", few_steps).result() == 1
        cluster.state.stop("seen enough")
        summary = cluster.finish()
    assert [row["name"] for row in summary["workers"]].count("guest") == 2


def test_a_second_worker_of_a_living_ones_name_is_refused_and_the_first_is_not_disturbed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(link, "NAME_TAKEN_S", 1.5)
    config = RunConfig(mode="sync", workers=1, heartbeat_s=1.0)
    with Cluster(
        config, "tcp"
    ) as cluster:  # where the newer connection of an identity takes it over
        first = cluster.train("gpu", quadratic(0.0, step_s=0.01))
        _until(lambda: cluster.state.handlers.history.version > 0)
        with pytest.raises(ProtocolError, match="choose another --name"):
            cluster.worker("gpu")
        before = cluster.state.handlers.history.version
        _until(lambda: cluster.state.handlers.history.version > before + 10)
        cluster.state.stop("seen enough")
        first.result()
        summary = cluster.finish()
    (stay,) = summary["workers"]
    assert stay["left_why"] == "done"
    assert "unknown-worker" not in summary["refused"], "its questions were never another's"


def test_a_model_of_another_shape_is_refused_by_the_name_of_its_leaf() -> None:
    with Cluster(RunConfig(mode="sync", workers=1, rounds=1000)) as cluster:
        cluster.train("right", quadratic(0.0, step_s=0.01))
        _until(lambda: cluster.state.handlers.layout is not None)
        with (
            cluster.worker("wrong") as worker,
            pytest.raises(ProtocolError, match=r"leaf params/w is float32\[7\].*\[6\]"),
        ):
            worker.start({"w": np.zeros(7, np.float32)})
        cluster.state.stop("seen enough")
        assert cluster.finish()["ended"] == "seen enough"


def test_an_update_with_nan_costs_its_sender_an_error_and_the_model_nothing() -> None:
    with Cluster(RunConfig(mode="sync", workers=2, rounds=8)) as cluster:

        def diverging(worker: Worker) -> None:
            params = worker.start({"w": START})
            params = worker.step(params)
            worker.step({"w": params["w"] * np.float32("nan")})

        bad = cluster.train("diverges", diverging)
        final = cluster.train("sound", quadratic(0.0)).result()
        with pytest.raises(ProtocolError, match="NaN"):
            bad.result()
        summary = cluster.finish()
    assert np.isfinite(final).all()
    assert summary["rounds"] == 8


@pytest.mark.parametrize(
    "frames",
    [
        [b"garbage"],
        [b""],
        [messages.encode(Status())],
        [messages.encode(Update("w", 0, 0, "no such digest")), b"1234"],
        [messages.encode(Update("w", 0, 0, "no such digest"))],
        [b"a", b"b", b"c"],
    ],
)
def test_garbage_on_the_data_channel_changes_nothing(frames: list[bytes]) -> None:
    with Cluster(RunConfig(mode="sync", workers=1, rounds=30)) as cluster:
        thread = cluster.train("w0", quadratic(0.0, step_s=0.01))
        _until(lambda: cluster.state.handlers.history.version >= 2)
        with cluster.intruder(zmq.PUSH, "push", LINGER=2000) as stranger:
            stranger.send_multipart(frames)
            final = thread.result()
        cluster.finish()
        assert cluster.ps.thread is not None
        assert sum(cluster.ps.thread.counters.values()) == 1
    np.testing.assert_allclose(final, START * np.float32(0.9) ** 30, rtol=1e-4)


def test_garbage_on_the_control_channel_is_answered_with_an_error() -> None:
    with Cluster(RunConfig(mode="sync", workers=1, rounds=30)) as cluster:
        thread = cluster.train("w0", quadratic(0.0, step_s=0.01))
        with cluster.context.socket(zmq.DEALER) as stranger:
            stranger.connect(cluster.endpoint)
            for frames in ([b"garbage"], [b"", b"two frames"], [b"\xc1"], [b"\x80"]):
                stranger.send_multipart(frames)
                assert stranger.poll(5000), "no answer"
                assert isinstance(messages.decode(stranger.recv()), Error)
        thread.result()
        summary = cluster.finish()
    assert summary["rounds"] == 30
    assert sum(summary["refused"].values()) == 4


def test_lost_model_chunks_are_asked_for_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """The parameter server 'loses' every third version, once for each worker."""
    with Cluster(RunConfig(mode="sync", workers=2, rounds=9)) as cluster:
        threads = [cluster.train(f"w{i}", quadratic(float(i))) for i in range(2)]
        _until(lambda: cluster.ps.thread is not None)
        server = cluster.ps.thread
        assert server is not None
        send = server._send_chunk
        lost: list[tuple[str, int]] = []

        def lossy(worker: str, event: Published) -> None:
            if event.version % 3 == 0 and event.version and (worker, event.version) not in lost:
                lost.append((worker, event.version))
            else:
                send(worker, event)

        monkeypatch.setattr(server, "_send_chunk", lossy)
        finals = [thread.result() for thread in threads]
        cluster.finish()
    assert lost
    np.testing.assert_array_equal(finals[0], finals[1])


def test_sync_is_repeatable_bit_for_bit_whatever_the_order_of_arrival() -> None:
    def once(delays: tuple[float, ...]) -> Any:
        def loop(worker: Worker) -> Any:
            random = np.random.default_rng(worker.rank)
            params = worker.start({"w": START})
            while not worker.stopped:
                worker.pause(delays[worker.rank])
                noise = random.normal(size=6).astype(np.float32)
                params = worker.step({"w": params["w"] - np.float32(0.1) * noise})
            return params["w"]

        with Cluster(RunConfig(mode="sync", workers=3, rounds=10)) as cluster:
            threads = [cluster.train(f"w{i}", loop, rank=i) for i in range(3)]
            final = threads[0].result()
            cluster.finish()
        return final

    a = once((0.0, 0.004, 0.008))
    b = once((0.008, 0.004, 0.0))
    assert a.tobytes() == b.tobytes()


def test_an_evaluator_sees_models_and_its_accuracies_are_in_the_summary() -> None:
    config = RunConfig(mode="esync", workers=1, duration_s=1.5, evaluate_every_s=0.1)
    with Cluster(config) as cluster:
        cluster.train("w0", quadratic(0.0, lr=0.02, step_s=0.01))
        phases: set[str] = set()

        def evaluate() -> list[int]:
            versions = []
            with cluster.worker("evaluator", role="evaluator") as worker:
                pause = worker.pause

                def look_and_pause(seconds: float) -> None:
                    phases.add(worker._shared.phase)
                    pause(seconds)

                worker.pause = look_and_pause  # type: ignore[method-assign]
                for version, params, _ in worker.watch({"w": START}):
                    versions.append(version)
                    phases.add(worker._shared.phase)
                    worker.report_accuracy(version, 1 / (1 + float(params["w"][5])), 0.5, 0.01)
            return versions

        versions = evaluate()
        summary = cluster.finish()
    assert len(versions) > 3
    assert versions == sorted(set(versions))
    assert [row["round"] for row in summary["accuracy"]] == versions
    assert versions[-1] == summary["rounds"], "the final model is evaluated"
    assert phases == {"eval", "idle"}
    assert summary["final_accuracy"] > summary["accuracy"][0]["accuracy"]


def test_an_evaluator_of_the_final_model_alone_looks_at_no_other_though_it_came_late() -> None:
    config = RunConfig(mode="sync", workers=1, evaluate_every_s=0.0)
    with Cluster(config) as cluster:
        cluster.train("w0", quadratic(0.0, step_s=0.01))
        _until(lambda: cluster.state.handlers.history.version >= 3)
        versions: list[int] = []

        def watch() -> None:
            with cluster.worker("evaluator", role="evaluator") as worker:
                assert worker._shared.model is None
                for version, _, _ in worker.watch({"w": START}):
                    versions.append(version)

        thread = Thread(watch, "evaluator")
        thread.start()
        assert cluster.ps.thread is not None
        _until(lambda: cluster.ps.thread._subscribers.keys() == {"w0", "e/evaluator"})
        before = cluster.state.handlers.history.version
        _until(lambda: cluster.state.handlers.history.version >= before + 3)
        cluster.state.stop("seen enough")
        thread.result()
        summary = cluster.finish()
    assert versions == [summary["rounds"]]


@pytest.mark.parametrize(
    ("given", "why"),
    [
        ({"labels": np.zeros((20, 3))}, r"one number per sample, not shape=\[20, 3\]"),
        ({"labels": np.zeros(30)}, r"have one length, these have \[20, 30\]"),
        ({"labels": np.zeros(20), "batch_size": 0}, "at least one sample"),
    ],
)
def test_labels_and_batches_that_do_not_fit_the_data_are_refused(
    given: dict[str, Any], why: str
) -> None:
    with (
        Cluster(RunConfig(mode="sync", workers=1, split="by-class")) as cluster,
        cluster.worker("w0") as worker,
        pytest.raises(ModelError, match=why),
    ):
        next(worker.batches({"x": np.zeros((20, 4))}, **given))


def test_with_ema_evaluators_and_the_saved_model_get_the_average_and_workers_the_versions(
    tmp_path: Path,
) -> None:
    rounds, keep = 12, 0.5
    config = RunConfig(mode="sync", workers=1, rounds=rounds, evaluate_every_s=0.001, ema=keep)
    seen: dict[int, Any] = {}
    with Cluster(config, "tcp", tmp_path) as cluster:
        worker = cluster.train("w", quadratic(5.0, step_s=0.02))

        def evaluate() -> None:
            with cluster.worker("evaluator", role="evaluator") as evaluator:
                for version, params, _ in evaluator.watch({"w": START}):
                    seen[version] = np.array(params["w"])
                    evaluator.report_accuracy(version, 0.5, 0.5, 0.01)

        evaluate()
        final = worker.result()
        cluster.finish()
    w = average = START.astype(np.float64)
    averages = {0: average}
    for version in range(1, rounds + 1):
        w = w - 0.1 * (w - 5.0)
        share = min(keep, version / (version + 2))
        averages[version] = average = share * average + (1 - share) * w
    np.testing.assert_allclose(final, w, rtol=1e-5)
    assert seen[rounds] is not None
    for version, found in seen.items():
        np.testing.assert_allclose(found, averages[version], rtol=1e-5)
    saved = load_file(tmp_path / "run" / "model.safetensors")
    np.testing.assert_allclose(saved["params/w"], averages[rounds], rtol=1e-5)


@pytest.mark.parametrize("role", ["worker", "ps"])
def test_a_state_server_of_another_version_is_recognised(role: str) -> None:
    context: zmq.Context[Any] = zmq.Context()
    with transport.router(context) as router:
        endpoint = transport.bind(router, "tcp://127.0.0.1:*")

        def answer() -> None:
            assert router.poll(10_000)
            peer, _ = router.recv_multipart()
            router.send_multipart([peer, msgpack.packb({"v": 2, "msg_type": "welcome"})])

        answering = Thread(answer, "answering")
        answering.start()
        join: dict[str, Callable[[], Any]] = {
            "worker": lambda: Worker(endpoint, name="w", context=context, wait_s=20),
            "ps": lambda: transport.run(ParameterServer(endpoint, context=context).run()),
        }
        with pytest.raises(ProtocolError, match="run the same esync version everywhere"):
            join[role]()
        answering.result()
    context.term()


def _made(ps: ParameterServer) -> tuple[int, int]:
    """The version, and how many chunks of the next one are final."""
    aggregation = ps.thread.aggregation if ps.thread is not None else None
    return (-1, 0) if aggregation is None else (aggregation.version, len(aggregation.in_progress()))


def _until(condition: Any, timeout_s: float = 20.0) -> None:
    """Wait for something that another thread brings about."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.005)
