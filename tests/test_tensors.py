"""The flat vector: layouts, their digests, and chunks."""

from __future__ import annotations

import math

import ml_dtypes
import msgpack
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from esync import tensors
from esync.errors import ModelError
from esync.tensors import DELTA, VALUE, Chunk, Layout, Leaf, layout_of

kinds = st.sampled_from([DELTA, VALUE])
shapes = st.lists(st.integers(0, 4), max_size=3).map(tuple)
leaf = st.builds(Leaf, kinds, st.text(max_size=5), shapes, st.sampled_from(["float32", "bfloat16"]))
layouts = st.lists(leaf, min_size=1, max_size=6).map(
    lambda x: Layout(tuple(sorted(x, key=lambda leaf: leaf.kind != DELTA)))
)
with_elements = layouts.filter(lambda layout: layout.size > 0)
TWO = layout_of([(DELTA, "w", np.ones((2, 3))), (VALUE, "s", np.ones(4, np.float32))])


@pytest.fixture
def small_chunks(monkeypatch):
    monkeypatch.setattr(tensors, "CHUNK_ELEMENTS", 7)


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("deltas", [0, 1, 6, 7, 8, 14, 20])
@pytest.mark.parametrize("values", [0, 1, 7, 15])
def test_chunks_cover_every_element_once_in_order_and_never_span_two_kinds(deltas, values):
    layout = Layout(
        (Leaf(DELTA, "w", (deltas,), "float32"), Leaf(VALUE, "s", (values,), "float32"))
    )
    assert [n for chunk in layout.chunks for n in range(chunk.start, chunk.stop)] == list(
        range(layout.size)
    )
    for chunk in layout.chunks:
        assert 0 < chunk.size <= 7
        assert (chunk.start < deltas) == (chunk.stop <= deltas) == (chunk.kind == DELTA)
    assert len(layout.chunks) == math.ceil(deltas / 7) + math.ceil(values / 7)


def test_a_chunk_of_real_size_is_two_mebibytes():
    layout = Layout((Leaf(DELTA, "w", (1000, 1000), "float32"),))
    assert layout.chunks[0] == Chunk(0, 1 << 19, DELTA)
    assert layout.chunks[0].size * 4 == 2 << 20
    assert layout.chunks[-1].stop == 1_000_000


@pytest.mark.parametrize("mib", [1, 2, 3, 8, 64])
def test_a_chunk_has_as_many_mebibytes_as_the_run_says(mib):
    leaves = (Leaf(DELTA, "w", (40 << 18,), "float32"), Leaf(VALUE, "s", (5 << 18,), "float32"))
    layout = Layout(leaves).cut(1, mib)
    assert sum(chunk.size for chunk in layout.chunks) == layout.size
    assert [chunk.start for chunk in layout.chunks[1:]] == [x.stop for x in layout.chunks[:-1]]
    assert max(chunk.size for chunk in layout.chunks) == min(mib, 40) << 18
    assert len(layout.chunks) == -(-40 // mib) + -(-5 // mib)
    assert layout.digest == Layout(leaves).digest


def test_a_chunk_of_nothing_is_refused():
    with pytest.raises(ModelError, match="1 MiB at least, not 0"):
        TWO.cut(1, 0)


def test_deltas_come_first_and_otherwise_the_order_is_kept():
    layout = layout_of(
        [(VALUE, "a", np.ones(1)), (DELTA, "b", np.ones(2)), (VALUE, "c", 1.5), (DELTA, "d", 2.5)]
    )
    assert [leaf.path for leaf in layout.leaves] == ["b", "d", "a", "c"]
    assert (layout.deltas, layout.values, layout.size) == (3, 2, 5)
    assert layout.leaves[1].shape == ()


@given(st.lists(leaf, min_size=1, max_size=6, unique_by=lambda x: x.path), st.data())
def test_the_digest_changes_with_any_change_of_any_leaf(leaves, data):
    before = Layout(tuple(leaves)).digest
    at = data.draw(st.integers(0, len(leaves) - 1))
    old = leaves[at]
    changed = [
        Leaf(VALUE if old.kind == DELTA else DELTA, old.path, old.shape, old.dtype),
        Leaf(old.kind, old.path + "x", old.shape, old.dtype),
        Leaf(old.kind, old.path, (*old.shape, 1), old.dtype),
        Leaf(old.kind, old.path, old.shape, "float16"),
    ]
    digests = [Layout((*leaves[:at], new, *leaves[at + 1 :])).digest for new in changed]
    digests.append(Layout((*leaves[:at], *leaves[at + 1 :])).digest)
    digests.append(Layout((*leaves, Leaf(DELTA, "one more", (), "float32"))).digest)
    if len(leaves) > 1:
        digests.append(Layout((*leaves[1:], leaves[0])).digest)
    assert before not in digests
    assert Layout(tuple(leaves)).digest == before
    assert len(before) == 16


@given(with_elements)
def test_a_layout_travels_and_comes_out_the_same(layout):
    raw = msgpack.unpackb(msgpack.packb(layout.to_wire()))
    assert Layout.from_wire(raw) == layout
    assert Layout.from_wire(raw).digest == layout.digest


anything = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**63) | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=6), inner),
    max_leaves=8,
)


@settings(max_examples=200)
@given(st.dictionaries(st.sampled_from(["leaves", "leaf"]), anything) | anything)
def test_garbage_is_a_layout_or_a_model_error(raw):
    try:
        layout = Layout.from_wire(raw)
    except ModelError:
        return
    assert layout.size > 0


@settings(max_examples=200)
@given(with_elements, st.data())
def test_a_damaged_layout_is_a_layout_or_a_model_error(layout, data):
    raw = layout.to_wire()
    row = raw["leaves"][data.draw(st.integers(0, len(raw["leaves"]) - 1))]
    row[data.draw(st.integers(0, 3))] = data.draw(anything)
    try:
        layout = Layout.from_wire(raw)
    except ModelError:
        return
    assert layout.size > 0
    assert len(layout.digest) == 16


@pytest.mark.parametrize(
    "leaves",
    [
        [],
        [["delta", "w", [0], "float32"]],
        [["delta", "w", [-1], "float32"]],
        [["delta", "w", [1.0], "float32"]],
        [["delta", "w", [True], "float32"]],
        [["delta", "w", [1 << 40], "float32"]],
        [["delta", "w", [1 << 30, 1 << 30], "float32"]],
        [["delta", "w", "4", "float32"]],
        [["delta", "w", 4, "float32"]],
        [["delta", 3, [4], "float32"]],
        [["gradient", "w", [4], "float32"]],
        [[["delta"], "w", [4], "float32"]],
        [["delta", "w", [4]]],
        ["wxyz"],
        None,
        7,
    ],
)
def test_a_layout_that_is_none_is_refused(leaves):
    with pytest.raises(ModelError, match="not a model's layout"):
        Layout.from_wire({"leaves": leaves})


@pytest.mark.parametrize(
    "array",
    [
        np.ones(2, np.int32),
        np.ones(2, bool),
        np.ones(2, np.complex64),
        np.ones(2, np.uint8),
        3,
        np.array(["a"]),
    ],
)
def test_a_leaf_that_cannot_be_averaged_is_named_with_its_path(array):
    with pytest.raises(ModelError, match=r"the leaf opt/count has dtype .* Keep counters"):
        layout_of([(DELTA, "w", np.ones(3)), (DELTA, "opt/count", array)])


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64, ml_dtypes.bfloat16])
def test_every_floating_point_type_can_be_averaged(dtype):
    layout = layout_of([(DELTA, "w", np.ones((2, 2), dtype))])
    assert layout.leaves == (Leaf(DELTA, "w", (2, 2), np.dtype(dtype).name),)


@pytest.mark.parametrize("leaves", [[], [(DELTA, "w", np.ones((0, 3)))]])
def test_a_model_without_parameters_is_refused(leaves):
    with pytest.raises(ModelError, match="no parameters"):
        layout_of(leaves)


def test_a_difference_names_the_leaf_and_both_sides():
    wider = layout_of([(DELTA, "w", np.ones((2, 4))), (VALUE, "s", np.ones(4, np.float32))])
    text = wider.difference(TWO)
    assert "w is float64[2, 4]" in text
    assert "float64[2, 3]" in text
    fewer = layout_of([(DELTA, "w", np.ones((2, 3)))])
    assert fewer.difference(TWO) == "the run's model has a leaf s, this one has not"
    assert TWO.difference(fewer) == "the leaf s [4] is not in the run's model"
    other_kind = layout_of([(DELTA, "w", np.ones((2, 3))), (DELTA, "s", np.ones(4, np.float32))])
    assert "averaged as delta, in the run's model float32[4] averaged as value" in (
        other_kind.difference(TWO)
    )
    assert "order" in Layout(TWO.leaves[::-1]).difference(TWO)
