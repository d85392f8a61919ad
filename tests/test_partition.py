"""How samples are divided among workers."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from esync.data.partition import KINDS, batches, digest, split
from esync.errors import ConfigError, ModelError

kinds = st.sampled_from(KINDS)
seeds = st.integers(0, 2**40)


@st.composite
def labels_and_parts(draw):
    labels = draw(st.lists(st.integers(0, 9), min_size=1, max_size=200))
    return np.array(labels, np.int32), draw(st.integers(1, len(labels)))


@given(labels_and_parts(), kinds, seeds)
def test_every_sample_belongs_to_exactly_one_worker(labels_parts, kind, seed):
    labels, count = labels_parts
    parts = split(labels, count, kind, seed)
    assert len(parts) == count
    assert all(part.dtype == np.int32 for part in parts)
    assert sorted(np.concatenate(parts)) == list(range(len(labels)))


@pytest.mark.parametrize("size", [0, -1])
def test_a_batch_has_at_least_one_sample(size):
    with pytest.raises(ModelError, match="at least one sample"):
        next(batches(np.arange(9, dtype=np.int32), size, 0, 0))


@given(labels_and_parts(), kinds, seeds)
def test_the_shares_differ_by_one_sample_at_most(labels_parts, kind, seed):
    sizes = [len(part) for part in split(*labels_parts, kind, seed)]
    assert max(sizes) - min(sizes) <= 1


@given(labels_and_parts(), kinds, seeds)
def test_the_same_seed_gives_the_same_split(labels_parts, kind, seed):
    assert digest(split(*labels_parts, kind, seed)) == digest(split(*labels_parts, kind, seed))


@given(labels_and_parts(), seeds)
def test_by_class_no_worker_has_a_class_below_those_of_the_worker_before(labels_parts, seed):
    labels, count = labels_parts
    parts = split(labels, count, "by-class", seed)
    for left, right in pairwise(parts):
        assert labels[left].max() <= labels[right].min()


def test_by_class_with_as_many_workers_as_classes_each_has_one_class():
    labels = np.tile(np.arange(10), 20)
    for i, part in enumerate(split(labels, 10, "by-class", 0)):
        assert set(labels[part]) == {i}


@pytest.mark.parametrize("kind", KINDS)
def test_another_seed_gives_another_order(kind):
    labels = np.arange(100) % 10
    assert digest(split(labels, 4, kind, 0)) != digest(split(labels, 4, kind, 1))


def test_iid_every_worker_sees_every_class():
    labels = np.repeat(np.arange(10), 100)
    for part in split(labels, 5, "iid", 3):
        assert set(labels[part]) == set(range(10))


# Recorded once. If these change, workers with different versions of NumPy no longer agree on who
# has which samples.
@pytest.mark.parametrize(
    ("kind", "recorded"), [("iid", "1f6b38110dccc3ca"), ("by-class", "b4be99fe0c07236a")]
)
def test_the_split_is_the_same_with_every_version_of_numpy(kind, recorded):
    assert digest(split(np.arange(1000) % 10, 6, kind, 42)) == recorded


def test_the_digest_tells_where_one_part_ends_and_the_next_begins():
    samples = np.arange(4, dtype=np.int32)
    assert digest([samples[:2], samples[2:]]) != digest([samples[:3], samples[3:]])


def test_an_unknown_kind_is_refused_with_the_nearest_name():
    with pytest.raises(ConfigError, match=r"unknown split 'byclass'. Did you mean 'by-class'\?"):
        split(np.zeros(4, np.int32), 2, "byclass", 0)


@pytest.mark.parametrize("parts", [-1, 0, 5])
def test_an_impossible_number_of_parts_is_refused(parts):
    with pytest.raises(ConfigError, match=f"cannot split 4 samples into {parts} parts"):
        split(np.zeros(4, np.int32), parts, "iid", 0)


def test_a_negative_seed_is_refused():
    with pytest.raises(ConfigError, match="seed"):
        split(np.zeros(4, np.int32), 2, "iid", -1)
