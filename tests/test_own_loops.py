"""What loops of people's own do with `esync.Worker`, and what it says where they err."""

from __future__ import annotations

import ast
import inspect
import textwrap
import threading
from collections.abc import Iterator

import jax.numpy as jnp
import numpy as np
import pytest

from esync.config import RunConfig
from esync.errors import EsyncError, ModelError
from esync.ps.checkpoint import Writer
from esync.ps.server import TensorThread
from esync.worker.client import Worker
from esync.worker.link import Link
from tests.cluster import Cluster, Thread

START = {"w": np.arange(6, dtype=np.float32)}


@pytest.fixture
def cluster() -> Iterator[Cluster]:
    with Cluster(RunConfig(mode="sync", workers=1, rounds=1000)) as running:
        yield running


@pytest.fixture
def worker(cluster: Cluster) -> Iterator[Worker]:
    with cluster.worker("w") as joined:
        yield joined


@pytest.mark.parametrize("samples", [7, np.int64(7), np.array(7), jnp.array(7)])
def test_samples_may_be_a_number_of_any_type(worker: Worker, samples: object) -> None:
    params = worker.start(START)
    for _ in range(3):
        params = worker.step(params, samples=samples)  # type: ignore[arg-type]
    assert worker.totals.samples == 21
    assert worker.round >= 2


@pytest.mark.parametrize("samples", [-1, 2.5, "x", 2**60, np.array([7, 7])])
def test_other_samples_are_refused_and_the_worker_goes_on(worker: Worker, samples: object) -> None:
    params = worker.start(START)
    with pytest.raises(ModelError, match="samples is a whole number from 0 on, not "):
        worker.step(params, samples=samples)  # type: ignore[arg-type]
    for _ in range(3):
        params = worker.step(params)
    assert worker.totals.steps == 3


@pytest.mark.parametrize("loss", ["x", np.zeros(3), object()])
def test_a_loss_that_is_no_number_is_refused(worker: Worker, loss: object) -> None:
    params = worker.start(START)
    with pytest.raises(ModelError, match="loss is one number, not "):
        worker.step(params, loss=loss)


def test_a_loss_of_pytorch_is_taken_without_its_gradient(worker: Worker) -> None:
    class Tensor:
        """What PyTorch's does."""

        def __float__(self) -> float:
            raise AssertionError("it warns of its gradient")

        def detach(self) -> float:
            return 0.5

    worker.step(worker.start(START), loss=Tensor())


@pytest.mark.parametrize(
    "call",
    [
        lambda worker, params: worker.step(params),
        lambda worker, params: worker.exchange(np.zeros(6, np.float32)),
    ],
)
def test_a_worker_that_was_closed_says_so(cluster: Cluster, call: object) -> None:
    worker = cluster.worker("w")
    params = worker.start(START)
    params = worker.step(params)
    worker.close()
    thread = Thread(lambda: call(worker, params), "call")  # type: ignore[operator]
    thread.start()
    with pytest.raises(EsyncError, match="it was closed"):
        thread.result(10)


def test_start_after_close_says_so(cluster: Cluster) -> None:
    worker = cluster.worker("w")
    worker.close()
    thread = Thread(lambda: worker.start(START), "call")
    thread.start()
    with pytest.raises(EsyncError, match="this worker has left the run: it was closed"):
        thread.result(10)


@pytest.mark.parametrize("bad", [np.nan, 1e300])
def test_a_model_that_cannot_be_sent_is_refused_by_the_name_of_its_leaf(
    worker: Worker, bad: float, recwarn: pytest.WarningsRecorder
) -> None:
    tree = {"a": np.zeros(3), "b": np.array([1.0, bad])}
    with pytest.raises(ModelError, match="beyond float32 in params/b"):
        worker.start(tree)
    assert not recwarn.list
    with pytest.raises(EsyncError, match="call start before step"):
        worker.step(tree)
    worker.step(worker.start(START))  # nothing has begun: another may


def test_a_number_among_arrays_of_numpy_leaves_them_numpy_s(worker: Worker) -> None:
    params = worker.start({"w": np.zeros(3), "scale": 1.5, "half": np.zeros(2, np.float16)})
    params = worker.step({**params, "scale": params["scale"] + 1})
    assert params["w"].dtype == np.float64
    assert params["half"].dtype == np.float16
    assert isinstance(params["scale"], np.ndarray)
    assert float(params["scale"]) == 2.5
    params["w"] += 1  # in place


@pytest.mark.parametrize("thread", [Link, TensorThread, Writer])
def test_a_thread_s_own_attributes_are_not_python_s(thread: type[threading.Thread]) -> None:
    """Python 3.14 keeps a context in each thread: a worker that kept ZeroMQ's there did not start."""
    names = {"_context", *vars(threading.Thread())}
    source = ast.parse(textwrap.dedent(inspect.getsource(thread)))
    own = {
        node.attr
        for node in ast.walk(source)
        if isinstance(node, ast.Attribute)
        and isinstance(node.ctx, ast.Store)
        and isinstance(node.value, ast.Name)
        and node.value.id == "self"
    }
    assert len(own) > 2
    assert not own & names
