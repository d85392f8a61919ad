"""Which training samples belong to which worker.

Each worker computes the split for itself, so it must come out the same on machines with different
versions of NumPy. That is why the permutations are drawn from `RandomState` over MT19937, whose
streams NumPy has promised never to change (NEP 19), and why a digest of the split is recorded.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from esync.errors import ConfigError, ModelError, unknown

Part = npt.NDArray[np.int32]


def split(labels: npt.NDArray[np.integer[Any]], parts: int, kind: str, seed: int) -> list[Part]:
    """Index arrays, int32, one for each of `parts`: disjoint, together all of `labels`, shape (N,).

    The sizes differ by one at most. The kinds are

    - `iid`: a random permutation of the samples, cut into parts;
    - `by-class`: the samples sorted by class, cut into parts, each part then permuted. With as many
      parts as classes of equal size, each part is one class: the hardest case for averaging.

    The split depends on `labels`, `parts`, `kind` and `seed` (0 or more) and nothing else.

    Raises ConfigError for an unknown kind, a negative seed, less than one part, or more parts than
    samples.
    """
    if kind not in _SPLITS:
        raise ConfigError(unknown("split", kind, _SPLITS))
    if seed < 0:
        raise ConfigError(f"the seed of a split must be 0 or more, not {seed}.")
    if not 1 <= parts <= len(labels):
        raise ConfigError(
            f"cannot split {len(labels)} samples into {parts} parts: "
            f"expected from 1 to {len(labels)} parts."
        )
    return _SPLITS[kind](labels, parts, seed)


def batches(own: Part, size: int, seed: int, rank: int) -> Iterator[Part]:
    """A worker's batches without end: epoch after epoch of its samples `own`, each in an order of its own.

    Yields index arrays, int32, shape (size,); what is left of an epoch is dropped.

    Raises ModelError if `own` has less than `size` samples, or `size` is less than one.
    """
    check_size(own, size)
    random = np.random.default_rng([seed, rank])
    while True:
        shuffled = random.permutation(own)
        for at in range(0, len(shuffled) - size + 1, size):
            yield shuffled[at : at + size]


def check_size(own: Part, size: int) -> None:
    """Raises ModelError if `own` has less than `size` samples, or `size` is less than one."""
    if size < 1:
        raise ModelError(f"a batch has at least one sample, not {size}")
    if len(own) < size:
        raise ModelError(
            f"a batch has {size} samples, this worker's share only {len(own)}; lower batch_size"
        )


def digest(parts: Sequence[Part]) -> str:
    """16 hexadecimal digits of the SHA-256 of a split: the sizes and indices, in their order."""
    sha256 = hashlib.sha256()
    for part in parts:
        sha256.update(len(part).to_bytes(8, "little"))
        sha256.update(part.astype("<i4").tobytes())
    return sha256.hexdigest()[:16]


def _iid(labels: npt.NDArray[np.integer[Any]], parts: int, seed: int) -> list[Part]:
    return np.array_split(_random(seed).permutation(len(labels)).astype(np.int32), parts)


def _by_class(labels: npt.NDArray[np.integer[Any]], parts: int, seed: int) -> list[Part]:
    by_class = np.argsort(labels, kind="stable").astype(np.int32)
    return [
        _random(seed, i).permutation(part) for i, part in enumerate(np.array_split(by_class, parts))
    ]


def _random(*seeds: int) -> np.random.RandomState:
    return np.random.RandomState(np.random.MT19937(np.random.SeedSequence(seeds)))


_SPLITS: dict[str, Callable[[npt.NDArray[np.integer[Any]], int, int], list[Part]]] = {
    "iid": _iid,
    "by-class": _by_class,
}
KINDS = tuple(_SPLITS)
