"""Between a pytree and the flat vector."""

from __future__ import annotations

from collections import namedtuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from esync.errors import ModelError
from esync.tensors import DELTA, VALUE
from esync.worker import pytree
from esync.worker.pytree import Packer, is_batch_norm, path_name

Pair = namedtuple("Pair", ["first", "second"])


def on_host(params):
    return jax.tree.map(np.asarray, params)


def on_device(params):
    return jax.tree.map(jnp.asarray, params)


PARAMS = {
    "BatchNorm_0": {"bias": np.full(2, 5.0, np.float32), "scale": np.full(2, 6.0, np.float32)},
    "dense": {"bias": np.float32(1.5), "kernel": np.arange(6, dtype=np.float32).reshape(2, 3)},
}
STATS = {"BatchNorm_0": {"mean": np.array([7.0, 8.0], np.float32)}}


@pytest.fixture(params=["numpy", "jax", "jax compiled"])
def place(request, monkeypatch):
    """Puts arrays where they are packed: `jax compiled` is what happens on an accelerator, on a CPU."""
    if request.param == "jax compiled":
        monkeypatch.setattr(pytree, "_InHostMemory", pytree._OnDevice)
    return on_host if request.param == "numpy" else on_device


def test_params_are_deltas_and_stats_are_values(place):
    layout = Packer(place({"w": np.ones(3)}), place({"s": np.ones(2)})).layout
    assert [(x.kind, x.path) for x in layout.leaves] == [(DELTA, "params/w"), (VALUE, "stats/s")]


def test_batch_norm_s_gamma_and_beta_are_values(place):
    layout = Packer(place(PARAMS), place(STATS)).layout
    assert [(x.kind, x.path) for x in layout.leaves] == [
        (DELTA, "params/dense/bias"),
        (DELTA, "params/dense/kernel"),
        (VALUE, "params/BatchNorm_0/bias"),
        (VALUE, "params/BatchNorm_0/scale"),
        (VALUE, "stats/BatchNorm_0/mean"),
    ]
    assert (layout.deltas, layout.values) == (7, 6)
    assert is_batch_norm("block/BatchNorm_3/scale")
    assert not is_batch_norm("block/Dense_0/BatchNormish_kernel".replace("BatchNormish", "norm"))


def test_the_caller_may_say_what_is_averaged_as_a_value(place):
    packer = Packer(place(PARAMS), as_value=lambda path: path == "dense/kernel")
    values = [x.path for x in packer.layout.leaves if x.kind == VALUE]
    assert values == ["params/dense/kernel"]


def test_the_vector_has_the_leaves_in_the_layout_s_order(place):
    flat = Packer(place(PARAMS), place(STATS)).pack(place(PARAMS), place(STATS))
    assert flat.dtype == np.float32
    np.testing.assert_array_equal(flat, [1.5, 0, 1, 2, 3, 4, 5, 5, 5, 6, 6, 7, 8])


def test_unpacking_gives_the_tree_back_in_its_own_shapes_and_types(place):
    params, stats = place(PARAMS), place(STATS)
    packer = Packer(params, stats)
    got_params, got_stats, _ = packer.unpack([packer.pack(params, stats)])
    for got, expected in ((got_params, params), (got_stats, stats)):
        assert jax.tree.structure(got) == jax.tree.structure(expected)
        for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
            np.testing.assert_array_equal(a, b)
            assert (a.dtype, a.shape) == (b.dtype, b.shape)
            assert isinstance(a, jax.Array) == isinstance(b, jax.Array)


def test_packing_what_was_unpacked_gives_the_vector_back(place):
    packer = Packer(place(PARAMS), place(STATS))
    flat = np.random.default_rng(0).normal(size=packer.layout.size).astype(np.float32)
    params, stats, _ = packer.unpack([flat])
    np.testing.assert_array_equal(packer.pack(params, stats), flat)


def test_an_update_is_local_less_global_for_deltas_and_local_for_values(place):
    packer = Packer(place(PARAMS), place(STATS))
    start = np.arange(packer.layout.size, dtype=np.float32)
    params, stats, base = packer.unpack([start])
    moved_params = jax.tree.map(lambda x: (x + 0.5).astype(x.dtype), params)
    moved_stats = jax.tree.map(lambda x: (x * 2).astype(x.dtype), stats)
    update = packer.pack(moved_params, moved_stats, base)
    deltas = packer.layout.deltas
    np.testing.assert_array_equal(update[:deltas], np.full(deltas, 0.5))
    np.testing.assert_array_equal(update[deltas : deltas + 4], start[deltas : deltas + 4] + 0.5)
    np.testing.assert_array_equal(update[deltas + 4 :], start[deltas + 4 :] * 2)


def test_bfloat16_travels_as_float32_and_comes_back_as_bfloat16(place):
    params = place(
        {"w": jnp.asarray([1.0, 1 / 3, -2.5], jnp.bfloat16), "b": np.ones(2, np.float16)}
    )
    packer = Packer(params)
    assert {x.path: x.dtype for x in packer.layout.leaves} == {
        "params/b": "float16",
        "params/w": "bfloat16",
    }
    flat = packer.pack(params)
    assert flat.dtype == np.float32
    got, stats, _ = packer.unpack([flat])
    assert stats is None
    assert got["w"].dtype == jnp.bfloat16
    assert got["b"].dtype == np.float16
    np.testing.assert_array_equal(
        np.asarray(got["w"], np.float32), np.asarray(params["w"], np.float32)
    )


def test_the_update_of_an_untouched_bfloat16_leaf_is_no_more_than_its_rounding(place):
    params = place({"w": jnp.zeros(3, jnp.bfloat16)})
    packer = Packer(params)
    unpacked, _, base = packer.unpack([np.full(3, 1 / 3, np.float32)])
    update = packer.pack(unpacked, None, base)
    assert np.abs(update).max() <= 1 / 3 / 256


def test_an_integer_leaf_is_refused_with_its_path(place):
    with pytest.raises(ModelError, match="the leaf params/opt/count has dtype int32"):
        Packer(place({"w": np.ones(3), "opt": {"count": np.ones((), np.int32)}}))


def test_a_random_key_is_refused():
    with pytest.raises(ModelError, match="the leaf params/key has dtype uint32"):
        Packer({"w": jnp.ones(3), "key": jax.random.PRNGKey(0)})


@pytest.mark.parametrize("shape", [(), (1,), (3, 3), (3, 2), (1, 3), (6,)])
def test_a_leaf_of_another_shape_is_refused_by_its_name(place, shape):
    packer = Packer(place(PARAMS), place(STATS))
    dense = {**PARAMS["dense"], "kernel": np.zeros(shape, np.float32)}
    wrong = place({**PARAMS, "dense": dense})
    for use in (packer.pack, packer.snapshot):
        with pytest.raises(ModelError, match=r"leaf params/dense/kernel given to step has shape"):
            use(wrong, place(STATS))


def test_a_leaf_that_is_no_array_of_numpy_or_jax_is_named():
    class Tensor:
        shape, dtype = (2,), "torch.float32"

    with pytest.raises(
        ModelError, match=r"leaf params/w is a .*Tensor; leaves are arrays of NumPy"
    ):
        Packer({"w": Tensor()})


def test_a_tree_without_arrays_is_refused():
    with pytest.raises(ModelError, match="no parameters"):
        Packer({})


def test_a_single_array_and_odd_trees_are_trees_too(place):
    for params in (
        np.ones((2, 2), np.float32),
        [np.ones(1, np.float32), (np.zeros(2, np.float32),)],
        Pair(np.ones(1, np.float32), {"x": np.zeros((), np.float32)}),
    ):
        packer = Packer(place(params))
        got, _, _ = packer.unpack([packer.pack(place(params))])
        assert jax.tree.structure(got) == jax.tree.structure(place(params))
    paths = [x.path for x in Packer(place(Pair(np.ones(1), [np.ones(2)]))).layout.leaves]
    assert paths == ["params/first", "params/second/0"]
    assert [x.path for x in Packer(place(np.ones(2))).layout.leaves] == ["params"]


def test_trees_on_the_host_and_on_the_device_have_one_layout():
    layouts = [Packer(place(PARAMS), place(STATS)).layout for place in (on_host, on_device)]
    assert layouts[0].digest == layouts[1].digest


def test_another_tree_than_the_packer_s_is_refused(place):
    packer = Packer(place(PARAMS))
    with pytest.raises(ModelError, match="not the one given to start"):
        packer.pack(place({"other": np.ones(3)}))


@pytest.mark.parametrize("size", [1, 64, 100_000])
def test_an_unpacked_tree_shares_no_memory_with_the_model(place, size):
    packer = Packer(place({"w": np.zeros(size, np.float32)}))
    flat = np.ones(packer.layout.size, np.float32)
    params, _, _ = packer.unpack([flat])
    jax.block_until_ready(params)
    assert not np.shares_memory(np.asarray(params["w"]), flat)
    flat[:] = 5
    assert (np.asarray(params["w"]) == 1).all()


def test_a_model_in_pieces_is_the_same_as_in_one(place):
    packer = Packer(place(PARAMS), place(STATS))
    flat = np.arange(packer.layout.size, dtype=np.float32)
    whole = packer.unpack([flat])
    for cuts in ([1], [3, 4], list(range(1, flat.size))):
        parts = np.split(flat, cuts)
        params, stats, base = packer.unpack(parts)
        for a, b in zip(jax.tree.leaves((params, stats)), jax.tree.leaves(whole[:2]), strict=True):
            np.testing.assert_array_equal(a, b)
        moved = jax.tree.map(lambda x: (x + 1).astype(x.dtype), params)
        update = packer.pack(moved, stats, base)
        np.testing.assert_array_equal(update[: packer.layout.deltas], 1)


def test_an_update_is_put_where_it_is_wanted(place):
    packer = Packer(place(PARAMS), place(STATS))
    out = np.zeros(packer.layout.size, np.float32)
    params, stats, base = packer.unpack([np.arange(packer.layout.size, dtype=np.float32)])
    packed = packer.pack(params, stats, base, out)
    assert packed is out
    np.testing.assert_array_equal(out, packer.pack(params, stats, base))
    np.testing.assert_array_equal(out[: packer.layout.deltas], 0)


def test_merging_adds_the_progress_since_the_push_but_not_to_statistics(place):
    packer = Packer(place(PARAMS), place(STATS))
    size = packer.layout.size
    pushed = np.arange(size, dtype=np.float32)
    now, stats, _ = packer.unpack([pushed + np.float32(0.5)])
    model = np.full(size, 100, np.float32)
    params, stats, base = packer.merge([model[:5], model[5:]], now, stats, pushed)
    merged = packer.pack(params, stats)
    np.testing.assert_array_equal(merged[:11], 100.5)
    np.testing.assert_array_equal(merged[11:], 100)
    update = packer.pack(params, stats, base)
    np.testing.assert_array_equal(update[: packer.layout.deltas], 0.5)
    np.testing.assert_array_equal(model, 100)


def test_a_path_is_written_with_slashes():
    flat, _ = jax.tree_util.tree_flatten_with_path({"a": [1.0, Pair(2.0, 3.0)]})
    assert [path_name(path) for path, _ in flat] == ["a/0", "a/1/first", "a/1/second"]
