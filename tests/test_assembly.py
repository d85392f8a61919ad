"""Chunks of a model, put together."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from esync import tensors
from esync.messages import MessageError, Model
from esync.tensors import DELTA, VALUE, Layout, Leaf
from esync.worker.assembly import Assembly

SIZE, CHUNKS = 9, 4


@pytest.fixture
def assembly(monkeypatch):
    monkeypatch.setattr(tensors, "CHUNK_ELEMENTS", 3)
    made = Assembly(Layout((Leaf(DELTA, "w", (5,), "float32"), Leaf(VALUE, "s", (4,), "float32"))))
    assert len(made.layout.chunks) == CHUNKS
    return made


def model(version):
    return np.arange(SIZE, dtype=np.float32) + 100 * version


def add(assembly, version, chunk, incarnation="first"):
    at = assembly.layout.chunks[chunk]
    header = Model(incarnation, version, chunk, assembly.layout.digest)
    payload = model(version)[at.start : at.stop].tobytes()
    return assembly.add(header, memoryview(payload))


def flat(assembly):
    """The newest model; a part of it if that is all, and no copy."""
    (*others, last) = assembly.newest.parts
    return np.concatenate([*others, last])


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.permutations(range(CHUNKS)), st.integers(0, CHUNKS - 1))
def test_a_version_is_complete_with_its_last_chunk_in_any_order(assembly, order, twice):
    made = Assembly(assembly.layout)
    results = []
    for chunk in order:
        results.append(add(made, 3, chunk))
        if chunk == twice and not results[-1]:
            assert not add(made, 3, chunk)
    assert results == [False] * (CHUNKS - 1) + [True]
    assert made.version == 3
    np.testing.assert_array_equal(flat(made), model(3))
    assert flat(made).dtype == np.float32
    assert made.missing() == (-1, [])


def test_before_the_first_version_there_is_no_model(assembly):
    assert assembly.version == -1
    assert assembly.newest is None
    assert assembly.missing() == (-1, [])
    add(assembly, 0, 2)
    assert assembly.newest is None


def test_versions_may_overlap_and_a_newer_one_ends_an_older(assembly):
    add(assembly, 1, 0)
    for chunk in range(CHUNKS):
        add(assembly, 2, chunk)
    assert assembly.version == 2
    assert assembly.missing() == (-1, [])
    for chunk in range(CHUNKS):
        assert not add(assembly, 1, chunk)
    assert assembly.version == 2
    np.testing.assert_array_equal(flat(assembly), model(2))


def test_an_older_version_completes_while_a_newer_one_is_on_its_way(assembly):
    add(assembly, 2, 1)
    results = [add(assembly, 1, chunk) for chunk in range(CHUNKS)]
    assert results[-1]
    assert assembly.version == 1
    assert assembly.missing() == (2, [0, 2, 3])


def test_a_complete_model_is_never_written_to_again(assembly):
    for chunk in range(CHUNKS):
        add(assembly, 1, chunk)
    first, copy = flat(assembly), flat(assembly).copy()
    for version in (1, 2):
        for chunk in range(CHUNKS):
            add(assembly, version, chunk)
    np.testing.assert_array_equal(first, copy)
    assert assembly.version == 2


def test_missing_names_what_the_newest_incomplete_version_lacks(assembly):
    add(assembly, 4, 0)
    add(assembly, 5, 3)
    assert assembly.missing() == (5, [0, 1, 2])


def test_another_incarnation_counts_afresh(assembly):
    for chunk in range(CHUNKS):
        add(assembly, 7, chunk)
    add(assembly, 8, 0)
    add(assembly, 0, 0, "second")
    assert assembly.version == -1
    assert assembly.incarnation == "second"
    assert assembly.missing() == (0, [1, 2, 3])
    np.testing.assert_array_equal(flat(assembly), model(7))
    assert [add(assembly, 0, chunk, "second") for chunk in (1, 2, 3)] == [False, False, True]
    np.testing.assert_array_equal(flat(assembly), model(0))


def test_hearing_from_the_same_incarnation_keeps_what_is_there(assembly):
    add(assembly, 1, 0)
    assembly.served_by("first")
    assert assembly.missing() == (1, [1, 2, 3])
    assembly.served_by("second")
    assert assembly.missing() == (-1, [])


def test_what_does_not_fit_the_layout_is_refused_and_changes_nothing(assembly):
    add(assembly, 1, 0)
    digest, chunk = assembly.layout.digest, memoryview(b"\0" * 12)
    for header, payload, code in (
        (Model("second", 9, 1, "0" * 16), chunk, "layout-mismatch"),
        (Model("second", 9, CHUNKS, digest), chunk, "bad-chunk"),
        (Model("second", 9, -1, digest), chunk, "bad-chunk"),
        (Model("second", 9, 0, digest), memoryview(b""), "bad-length"),
        (Model("second", 9, 0, digest), memoryview(b"\0" * 11), "bad-length"),
        (Model("second", 9, 0, digest), memoryview(b"\0" * 16), "bad-length"),
        (Model("second", 9, 1, digest), memoryview(b"\0" * 12), "bad-length"),
    ):
        with pytest.raises(MessageError) as caught:
            assembly.add(header, payload)
        assert caught.value.code == code
    assert assembly.incarnation == "first"
    assert assembly.missing() == (1, [1, 2, 3])
