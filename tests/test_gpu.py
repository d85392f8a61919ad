"""On a real GPU: averaging, memory that processes share, and runs through it. Skipped where there is none."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from esync.compression import is_finite
from esync.config import RunConfig
from esync.device_memory import DeviceOffer, DeviceRegion, from_jax, pinned, to_jax, unsupported
from esync.ps.backend import CupyBackend, NumpyBackend
from esync.ps.kernels import FLAGS, MOST
from esync.ps.staging import BUFFERS
from esync.shared_memory import Region
from esync.tensors import CHUNK_ELEMENTS, DELTA, Layout, Leaf
from tests.cluster import Cluster

ROOT = Path(__file__).resolve().parent.parent
WHY = unsupported()
needs_gpu = pytest.mark.skipif(bool(WHY), reason=f"needs an NVIDIA GPU and its driver: {WHY}")
LAYOUT = Layout((Leaf(DELTA, "w", (3 * CHUNK_ELEMENTS + 5,), "float32"),))


def vector(seed, size=LAYOUT.size):
    return np.random.default_rng(seed).standard_normal(size, np.float32)


@needs_gpu
def test_every_operation_is_numpy_s_to_the_bit():
    gpu, cpu = CupyBackend(), NumpyBackend()
    x = [vector(seed, CHUNK_ELEMENTS) for seed in range(MOST + 3)]
    a, b, c = (gpu.load(v) for v in x[:3])
    for there, here in (
        (gpu.scaled(a, 0.3), cpu.scaled(x[0], 0.3)),
        (gpu.blend(a, 0.3, b, 0.7), cpu.blend(x[0], 0.3, x[1], 0.7)),
        (gpu.blend_square(a, 0.3, b, 0.7), cpu.blend_square(x[0], 0.3, x[1], 0.7)),
        (
            gpu.compensated(a, b, c, 0.3, 0.7),
            cpu.compensated(x[0], x[1], x[2], 0.3, 0.7),
        ),
        (
            gpu.adaptive(a, b, gpu.blend_square(c, 0.0, c, 1.0), 0.3, 0.1),
            cpu.adaptive(x[0], x[1], x[2] * x[2], 0.3, 0.1),
        ),
        (
            gpu.weighted_sum([gpu.load(v) for v in x], [0.1] * len(x)),
            cpu.weighted_sum(x, [0.1] * len(x)),
        ),
        (gpu.filled(a, 0.3), cpu.filled(x[0], 0.3)),
        *(
            (
                gpu.stepped(a, 0.3, [gpu.load(v) for v in x[:n]], [0.7] * n)[0],
                cpu.stepped(x[0], 0.3, x[:n], [0.7] * n)[0],
            )
            for n in (1, 3, MOST, len(x))
        ),
    ):
        np.testing.assert_array_equal(gpu.host(there), here)
    for there, here in zip((a, b, c), x[:3], strict=True):
        np.testing.assert_array_equal(gpu.host(there), here)


@needs_gpu
@pytest.mark.parametrize("count", [1, 3, 7, MOST, MOST + 2])
def test_one_kernel_makes_what_several_make_to_the_bit(count):
    gpu, scale = CupyBackend(), 0.7 / count
    base, *xs = (gpu.load(vector(seed, CHUNK_ELEMENTS)) for seed in range(count + 1))
    weights = [1.0 + 0.3 * i for i in range(count)]
    total = gpu.scaled(xs[0], weights[0])
    for x, weight in zip(xs[1:], weights[1:], strict=True):
        gpu.add_scaled(total, x, weight)
    apart = gpu.host(gpu.blend(base, 1.0, total, scale))
    np.testing.assert_array_equal(gpu.host(gpu.stepped(base, scale, xs, weights)[0]), apart)
    np.testing.assert_array_equal(gpu.host(gpu.weighted_sum(xs, weights)), gpu.host(total))


@needs_gpu
def test_of_several_vectors_the_bad_ones_are_found():
    gpu = CupyBackend()
    xs = [vector(seed, 2000) for seed in range(FLAGS + 3)]
    for bad in (0, 64, FLAGS - 1, FLAGS, FLAGS + 2):
        xs[bad][bad] = np.nan
    finite = [bool(is_finite(x)) for x in xs]
    there = [gpu.load(x) for x in xs]
    assert gpu.are_finite(there) == finite
    steps = [gpu.stepped(there[1], 0.5, [there[2], x], [0.5, 2.0])[1] for x in there]
    assert gpu.are_finite(steps) == finite
    for _ in range(5):  # flags go from one to the next
        steps = [gpu.stepped(there[1], 0.5, [there[2], x], [0.5, 2.0])[1] for x in there[:9]]
        assert gpu.are_finite(steps) == finite[:9]


@needs_gpu
def test_sums_are_right_while_chunks_keep_coming():
    """Rings of buffers go round often; every chunk is another one, and integers add up exactly."""
    gpu = CupyBackend()
    source = np.zeros(CHUNK_ELEMENTS, np.float32)
    total, kept = gpu.scaled(gpu.load(source), 1.0), []
    for i in range(50 * BUFFERS):
        source[:] = i
        x = gpu.load(source)
        gpu.add_scaled(total, x, 1.0)
        if i % 20 == 0:
            kept.append((i, x))
    count = 50 * BUFFERS
    np.testing.assert_array_equal(gpu.host(total), np.full_like(source, count * (count - 1) // 2))
    for i, x in kept:
        np.testing.assert_array_equal(gpu.host(x), np.full_like(source, i))


@needs_gpu
def test_a_device_reads_and_writes_shared_memory_by_itself():
    size = 3 * CHUNK_ELEMENTS + 17
    layout = Layout((Leaf(DELTA, "w", (size,), "float32"),))
    gpu, mine = CupyBackend(), Region.create(layout, 2)
    theirs = Region.open(layout, 2, mine.offer("w", "x"))  # for reading only
    for region in (theirs, mine):
        assert pinned(region, 0, waits=False).pin is not None
    for round in range(5):
        mine.whole(0)[:] = x = vector(round, size)
        there = [gpu.load(theirs.chunk(0, i), pinned=True) for i in range(len(layout.chunks))]
        doubled = [gpu.scaled(x, 2.0) for x in there]
        assert all(gpu.are_finite(doubled))
        mine.whole(0)[:] = np.nan  # it has been read
        for i, y in enumerate(doubled):
            gpu.put(y, mine.chunk(1, i), pinned=True)
        gpu.wait()
        np.testing.assert_array_equal(theirs.whole(1), 2 * x)
    theirs.pin = mine.pin = None
    np.testing.assert_array_equal(theirs.whole(1), 2 * x)
    assert pinned(theirs, 0).pin is not None, "it was pinned still"


@needs_gpu
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("at", [0, CHUNK_ELEMENTS // 2, CHUNK_ELEMENTS - 1])
def test_one_bad_element_of_a_whole_chunk_is_found(bad, at):
    gpu, x = CupyBackend(), vector(0, CHUNK_ELEMENTS)
    assert gpu.is_finite(gpu.load(x))
    x[at] = bad
    assert not is_finite(x)
    assert not gpu.is_finite(gpu.load(x))
    assert gpu.is_finite(gpu.load(np.full(CHUNK_ELEMENTS, 3e38, np.float32)))


READER = """
import json, sys
import numpy as np
from esync.device_memory import DeviceOffer, DeviceRegion
from tests.test_gpu import LAYOUT, vector
said = json.loads(sys.stdin.readline())
region = DeviceRegion.open(LAYOUT, 2, DeviceOffer(handle=bytes.fromhex(said.pop("handle")), **said))
print("opened", flush=True)
sys.stdin.readline()
print(all(np.array_equal(region.whole(slot).get(), vector(slot)) for slot in range(2)), flush=True)
region.close()
"""


@needs_gpu
def test_another_process_reads_what_is_written_to_a_device():
    import cupy

    mine = DeviceRegion.create(LAYOUT, 2)
    offer = mine.offer()
    said = {"boot": offer.boot, "device": offer.device, "size": offer.size}
    with subprocess.Popen(
        [sys.executable, "-c", READER],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=ROOT,
    ) as reader:
        print(json.dumps({**said, "handle": offer.handle.hex()}), file=reader.stdin, flush=True)
        assert reader.stdout.readline() == "opened\n"
        for slot in range(2):
            x = cupy.asarray(vector(slot))
            cupy.cuda.get_current_stream().synchronize()
            mine.write(slot, 0, x)
        print("look", file=reader.stdin, flush=True)
        assert reader.stdout.readline() == "True\n"
    assert reader.returncode == 0
    mine.close()


OWNER = """
import json, sys
import cupy
from esync.device_memory import DeviceRegion, put
from tests.test_gpu import LAYOUT, vector
region = DeviceRegion.create(LAYOUT, 1)
put(vector(0), region.whole(0))
offer = region.offer()
said = {"boot": offer.boot, "device": offer.device, "size": offer.size, "handle": offer.handle.hex()}
print(json.dumps(said), flush=True)
sys.stdin.readline()
"""


@needs_gpu
def test_who_has_opened_memory_reads_it_when_its_owner_was_killed():
    """CUDA does not say so. If it is not so, a worker that is killed while its update is added up may take the
    parameter server with it."""
    with subprocess.Popen(
        [sys.executable, "-c", OWNER],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=ROOT,
    ) as owner:
        said = json.loads(owner.stdout.readline())
        handle = bytes.fromhex(said.pop("handle"))
        region = DeviceRegion.open(LAYOUT, 1, DeviceOffer(handle=handle, **said))
        owner.kill()
    gpu = CupyBackend()
    np.testing.assert_array_equal(gpu.host(gpu.scaled(region.whole(0), 2.0)), 2 * vector(0))
    region.close()


def learned_from_workers_on_the_host(device, **options):
    """The final model of a run whose workers have NumPy's arrays and whose parameter servers average on the device."""
    config = RunConfig(workers=3, rounds=30, **options)

    def learn(worker):
        params = worker.start({"w": np.zeros(LAYOUT.size, np.float32)})
        target = vector(int(worker.name[1:]))
        while not worker.stopped:
            params = worker.step({"w": params["w"] - np.float32(0.3) * (params["w"] - target)})
        return params["w"]

    with Cluster(config, "tcp", device=device) as cluster:
        threads = [cluster.train(f"w{rank}", learn, rank=rank) for rank in range(3)]
        finals = [thread.result() for thread in threads]
        cluster.finish()
        assert cluster.refused() == {}
    for final in finals[1:]:
        np.testing.assert_array_equal(final, finals[0])
    return finals[0]


@needs_gpu
@pytest.mark.parametrize(
    "options",
    [
        *({"outer": outer} for outer in ("sgd", "momentum", "nesterov", "adam")),
        {"weights": "fednova", "ema": 0.9},
        {"shared_memory": False, "chunk_mib": 8},
        {"compression": "bf16", "ps": 2},
    ],
    ids=str,
)
def test_a_run_that_is_averaged_on_a_device_makes_numpy_s_model(options):
    there, here = (
        learned_from_workers_on_the_host(device, mode="sync", **options)
        for device in ("cuda", "cpu")
    )
    bound = (
        0.02 if "compression" in options else 1e-4
    )  # a difference in rounding can be one of bf16's
    np.testing.assert_allclose(there, here, rtol=bound, atol=bound)
    assert np.abs(here).mean() > 0.3, "it has learned"


WORKER = """
import hashlib, json, sys
import jax.numpy as jnp
import numpy as np
from esync.worker.client import Worker
from tests.test_gpu import LAYOUT
endpoint, rank = sys.argv[1], int(sys.argv[2])
with Worker(endpoint, name=f"w{rank}", rank=rank) as worker:
    sizes = [LAYOUT.size - 29 * 1000, *[1000] * 29]  # as a model has them
    params = worker.start({f"w{i}": jnp.zeros(size) for i, size in enumerate(sizes)})
    while not worker.stopped:
        params = worker.step({name: x - 0.2 * (x - rank) for name, x in params.items()})
    channels = worker._link._channels
    lanes = ["sockets" if not c.puts else "host" if c.whole.device is None else "device" for c in channels]
    for c in channels:  # what is shared through the host is pinned, on both sides
        for region in (c.whole, c.assembly._region) if c.puts and c.whole.device is None else ():
            assert region.pin is not None
    final = np.concatenate([np.asarray(x) for x in params.values()])
    print(json.dumps([lanes, hashlib.sha256(final.tobytes()).hexdigest(), float(final.mean())]))
"""


def run_of(device="cuda", **options):
    """(lane of each server, digest and mean of the model) of each worker at the end of a run of processes."""
    config = RunConfig(mode="sync", workers=3, rounds=60, **options)  # 1/3 is rounded
    with Cluster(config, "tcp", device=device) as cluster:
        workers = [
            subprocess.Popen(
                [sys.executable, "-c", WORKER, cluster.endpoint, str(rank)],
                stdout=subprocess.PIPE,
                text=True,
                cwd=ROOT,
                env=os.environ | {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"},
            )
            for rank in range(3)
        ]
        results = [json.loads(worker.communicate(timeout=100)[0]) for worker in workers]
        cluster.finish()
    return results


@needs_gpu
@pytest.mark.processes
@pytest.mark.parametrize("ps", [1, 2])
def test_a_run_through_device_memory_makes_the_model_that_one_over_sockets_does(ps):
    import jax

    if jax.default_backend() != "gpu":
        pytest.skip("JAX sees no GPU: pip install 'esync[cuda12]'")
    through, over = run_of(ps=ps), run_of(ps=ps, shared_memory=False)
    assert [lanes for lanes, _, _ in through] == [["device"] * ps] * 3
    assert [lanes for lanes, _, _ in over] == [["sockets"] * ps] * 3
    assert len({digest for _, digest, _ in (*through, *over)}) == 1
    assert abs(through[0][2] - 1.0) < 0.01


@needs_gpu
@pytest.mark.processes
def test_workers_on_a_gpu_share_the_host_s_memory_with_a_server_on_the_cpu():
    import jax

    if jax.default_backend() != "gpu":
        pytest.skip("JAX sees no GPU: pip install 'esync[cuda12]'")
    through = run_of(device="cpu")
    assert [lanes for lanes, _, _ in through] == [["host"]] * 3
    assert len({digest for _, digest, _ in through}) == 1
    assert abs(through[0][2] - 1.0) < 0.01


@needs_gpu
def test_a_jax_array_s_memory_is_cupy_s_too():
    import jax
    import jax.numpy as jnp

    if jax.default_backend() != "gpu":
        pytest.skip("JAX sees no GPU: pip install 'esync[cuda12]'")
    array = jnp.arange(1000, dtype=jnp.float32)
    lent = from_jax(array)
    assert lent.data.ptr == array.unsafe_buffer_pointer()
    np.testing.assert_array_equal(lent.get(), np.arange(1000))
    given = to_jax(lent)
    assert given.devices() == array.devices()
    assert given.unsafe_buffer_pointer() != array.unsafe_buffer_pointer()
    np.testing.assert_array_equal(given, np.arange(1000))


@pytest.mark.skipif(not WHY, reason="this machine has a GPU: run benchmarks/gpu.py")
def test_without_a_gpu_the_benchmark_says_so_and_measures_nothing():
    done = subprocess.run(
        [sys.executable, "benchmarks/gpu.py", "--quick"], capture_output=True, text=True, cwd=ROOT
    )
    assert done.returncode == 2
    assert "There is no NVIDIA GPU to measure" in done.stderr
    assert done.stdout == ""
