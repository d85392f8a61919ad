"""A pytree as one flat float32 vector: its layout, its digest, and its chunks.

The vector has two parts. *Deltas*: leaves that are averaged as the difference from the global model.
*Values*: leaves that are averaged as they are (BatchNorm's running statistics, its gamma and beta). A chunk
never spans both. Nothing here imports a framework: the parameter server uses this module too.
"""

from __future__ import annotations

import bisect
import hashlib
import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np

from esync.errors import ModelError

Vector = np.ndarray[tuple[int], np.dtype[np.float32]]
Parts = Sequence[Vector]
"""A vector in pieces, as it arrives; one piece is one too."""
CHUNK_MIB = 2
"""MiB of float32 in a chunk where nothing else is said; a run says it (`RunConfig.mib_per_chunk`)."""
CHUNK_ELEMENTS = CHUNK_MIB << 18
"""Elements in such a chunk."""
MAX_ELEMENTS = 1 << 40
MAX_LEAVES, MAX_AXES, MAX_PATH, MAX_DTYPE = 50_000, 64, 1024, 40
"""Of a layout that comes in a message: leaves, axes of one, and characters of its path and of its dtype."""

DELTA = "delta"
VALUE = "value"


@dataclass(frozen=True, slots=True)
class Leaf:
    """One array of the model: how it is averaged, where it stands in the tree, and its shape."""

    kind: str
    path: str
    shape: tuple[int, ...]
    dtype: str

    @property
    def size(self) -> int:
        return math.prod(self.shape)


@dataclass(frozen=True, slots=True)
class Chunk:
    """Elements `start` to `stop` of the flat vector, all of one kind."""

    start: int
    stop: int
    kind: str

    @property
    def size(self) -> int:
        return self.stop - self.start


@dataclass(frozen=True)
class Layout:
    """The leaves in the order in which they stand in the flat vector: all deltas, then all values.

    Attributes:
        shards: the vector is cut into so many stretches of nearly equal length, one for each parameter server; a chunk
            never spans two of them.
        chunk_mib: MiB of float32 in a chunk, at most. Not part of the digest: all roles have it from the run.
    """

    leaves: tuple[Leaf, ...]
    shards: int = 1
    chunk_mib: int = CHUNK_MIB

    @cached_property
    def deltas(self) -> int:
        """Number of elements averaged as deltas."""
        return sum(leaf.size for leaf in self.leaves if leaf.kind == DELTA)

    @cached_property
    def values(self) -> int:
        """Number of elements averaged as values."""
        return sum(leaf.size for leaf in self.leaves if leaf.kind == VALUE)

    @property
    def size(self) -> int:
        """Number of elements of the flat vector."""
        return self.deltas + self.values

    @cached_property
    def digest(self) -> str:
        """Eight bytes of SHA-256 over every leaf's kind, path, shape and dtype, in hexadecimal."""
        text = "\n".join(f"{x.kind} {x.path} {x.shape} {x.dtype}" for x in self.leaves)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    @cached_property
    def chunks(self) -> tuple[Chunk, ...]:
        """The chunks, in order; every element is in exactly one."""
        rows = []
        most = CHUNK_ELEMENTS * self.chunk_mib // CHUNK_MIB
        for begin, end in self._stretches():
            for start, stop, kind in (
                (begin, min(end, self.deltas), DELTA),
                (max(begin, self.deltas), end, VALUE),
            ):
                for at in range(start, stop, most):
                    rows.append(Chunk(at, min(at + most, stop), kind))
        return tuple(rows)

    def _stretches(self) -> list[tuple[int, int]]:
        """Where each shard begins and ends."""
        cuts = [self.size * k // self.shards for k in range(self.shards + 1)]
        return list(itertools.pairwise(cuts))

    def cut(self, shards: int, chunk_mib: int = CHUNK_MIB) -> Layout:
        """The same leaves, for so many parameter servers and in chunks of so many MiB.

        Raises:
            ModelError: there are not as many elements, no server, or nothing in a chunk.
        """
        if not 0 < shards <= self.size:
            raise ModelError(f"{self.size} elements cannot be shared by {shards} parameter servers")
        if chunk_mib < 1:
            raise ModelError(f"a chunk has 1 MiB at least, not {chunk_mib}")
        return replace(self, shards=shards, chunk_mib=chunk_mib)

    def of_shard(self, shard: int) -> range:
        """Which of the chunks are in a shard."""
        begin, end = self._stretches()[shard]
        inside = [i for i, chunk in enumerate(self.chunks) if begin <= chunk.start < end]
        return range(inside[0], inside[-1] + 1)

    def shard(self, shard: int) -> Layout:
        """A shard as a layout of its own: its chunks are those of `of_shard`, in order.

        A leaf that is cut becomes a leaf `path[start:stop]` of one axis.
        """
        if self.shards == 1:
            return self
        begin, end = self._stretches()[shard]
        rows, at = [], 0
        for leaf in self.leaves:
            start, stop = max(begin - at, 0), min(end - at, leaf.size)
            if start == 0 and stop == leaf.size:
                rows.append(leaf)
            elif start < stop:
                rows.append(
                    Leaf(leaf.kind, f"{leaf.path}[{start}:{stop}]", (stop - start,), leaf.dtype)
                )
            at += leaf.size
        return Layout(tuple(rows), chunk_mib=self.chunk_mib)

    def to_wire(self) -> dict[str, Any]:
        """As plain lists and strings, for a message."""
        return {"leaves": [[x.kind, x.path, list(x.shape), x.dtype] for x in self.leaves]}

    @staticmethod
    def from_wire(raw: dict[str, Any]) -> Layout:
        """The layout in a message.

        Raises:
            ModelError: it is not one.
        """
        try:
            leaves = []
            if len(raw["leaves"]) > MAX_LEAVES:
                raise ValueError(f"{len(raw['leaves'])} leaves are more than {MAX_LEAVES}")
            for kind, path, shape, dtype in raw["leaves"]:
                if (
                    kind not in (DELTA, VALUE)
                    or not isinstance(path, str)
                    or type(dtype) is not str
                ):
                    raise ValueError(f"{kind!r:.40} {path!r:.80}")
                if max(len(path) / MAX_PATH, len(shape) / MAX_AXES, len(dtype) / MAX_DTYPE) > 1:
                    raise ValueError(f"the leaf {path!r:.80} has too long a path, shape or dtype")
                if not all(type(n) is int and 0 <= n < MAX_ELEMENTS for n in shape):
                    raise ValueError(f"shape {shape!r:.80}")
                leaves.append(Leaf(kind, path, tuple(shape), dtype))
            if leaves != sorted(leaves, key=lambda leaf: leaf.kind != DELTA):
                raise ValueError("values before deltas")
            layout = Layout(tuple(leaves))
            if not 0 < layout.size <= MAX_ELEMENTS:
                raise ValueError(f"{layout.size} elements")
        except (KeyError, TypeError, ValueError, RecursionError) as error:
            raise ModelError(f"not a model's layout: {error!s:.200}") from error
        return layout

    def difference(self, other: Layout) -> str:
        """The first thing in which `other` (the run's) differs from this one (a newcomer's), in words."""
        theirs = {leaf.path: leaf for leaf in other.leaves}
        for leaf in self.leaves:
            run = theirs.pop(leaf.path, None)
            if run is None:
                return f"the leaf {leaf.path} {list(leaf.shape)} is not in the run's model"
            if run != leaf:
                return (
                    f"the leaf {leaf.path} is {leaf.dtype}{list(leaf.shape)} averaged as {leaf.kind}, "
                    f"in the run's model {run.dtype}{list(run.shape)} averaged as {run.kind}"
                )
        for path in theirs:
            return f"the run's model has a leaf {path}, this one has not"
        return "the leaves come in another order"


class Pieces:
    """Looks up where in its parts a stretch of a vector lies."""

    def __init__(self, parts: Parts) -> None:
        self._parts = parts
        self._ends = list(itertools.accumulate(part.size for part in parts))

    def whole(self, start: int, size: int) -> Vector:
        """That stretch in one piece: itself if it is, else a copy."""
        found = [part for _, part in self.of(start, size)]
        return found[0] if len(found) == 1 else np.concatenate([*found, np.zeros(0, np.float32)])

    def of(self, start: int, size: int) -> Iterator[tuple[int, Vector]]:
        """(offset in the stretch, view) of each piece of the `size` elements from `start` on."""
        at = start
        while at < start + size:
            k = bisect.bisect_right(self._ends, at)
            part = self._parts[k]
            begin = self._ends[k] - part.size
            stop = min(start + size, self._ends[k])
            yield at - start, part[at - begin : stop - begin]
            at = stop


def layout_of(leaves: list[tuple[str, str, Any]]) -> Layout:
    """The layout of (kind, path, array) triples; within a kind the order is kept.

    Raises:
        ModelError: a leaf that cannot be averaged, or nothing to average.
    """
    rows = []
    for kind, path, array in leaves:
        shape = np.shape(array)
        try:
            dtype = np.dtype(getattr(array, "dtype", type(array)))
        except TypeError as error:
            kind = f"{type(array).__module__}.{type(array).__name__}"
            raise ModelError(
                f"the leaf {path} is a {kind}; leaves are arrays of NumPy or JAX"
            ) from error
        if dtype.kind != "f" and dtype.name != "bfloat16":
            raise ModelError(
                f"the leaf {path} has dtype {dtype.name}; only floating-point leaves can be averaged. "
                "Keep counters and random keys out of the tree given to esync"
            )
        rows.append(Leaf(kind, path, tuple(int(n) for n in shape), dtype.name))
    if sum(row.size for row in rows) == 0:
        raise ModelError("the model has no parameters")
    rows.sort(key=lambda row: row.kind != DELTA)
    return Layout(tuple(rows))
