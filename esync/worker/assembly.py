"""Chunks of a model, put together to whole versions."""

from __future__ import annotations

import weakref
from dataclasses import dataclass
from typing import Any

import numpy as np

from esync.compression import Decoder, Encoding, Plain
from esync.device_memory import DeviceMemoryError, on_host
from esync.messages import MessageError, Model
from esync.shared_memory import MODEL_SLOTS, Region
from esync.tensors import Layout, Vector


@dataclass(frozen=True, slots=True)
class Newest:
    """A complete version.

    Attributes:
        parts: its chunks, where they arrived; not to be written to. Those in shared memory are the server's own,
            which will be overwritten. If all lie in a device's memory, one part with all of them, a CuPy array.
        life: the incarnation of the parameter server whose version it is.
        region, slot: the shared memory in which some of them lie: those in `shared`. shape=(chunks,), dtype=bool
    """

    version: int
    parts: tuple[Vector, ...]
    life: str = ""
    region: Region | None = None
    slot: int = -1
    shared: np.ndarray[Any, np.dtype[np.bool_]] | None = None

    def intact(self) -> bool:
        """Whether what was read of `parts` until now is this version."""
        if self.region is None:
            return True
        return bool((self.region.stamps[self.slot][self.shared] == self.version).all())


@dataclass(frozen=True, slots=True)
class Whole:
    """The model: of each shard the latest complete version. Without a barrier, or in the moment in which a round ends,
    these need not be the same."""

    shards: tuple[Newest, ...]

    @property
    def versions(self) -> tuple[int, ...]:
        return tuple(shard.version for shard in self.shards)

    @property
    def lives(self) -> tuple[str, ...]:
        return tuple(shard.life for shard in self.shards)

    @property
    def version(self) -> int:
        """The version that all shards have reached."""
        return min(self.versions)

    @property
    def parts(self) -> tuple[Vector, ...]:
        """The chunks of all shards, in order."""
        return tuple(part for shard in self.shards for part in shard.parts)

    @property
    def is_shared(self) -> bool:
        """Whether some of it lies in memory that will be overwritten."""
        return any(shard.region is not None for shard in self.shards)

    def intact(self) -> bool:
        """Whether what was read of `parts` until now is these versions."""
        return all(shard.intact() for shard in self.shards)


class Vectors:
    """Vectors of one size, whose memory is used again when nobody refers to them, or to a part of them, any more.

    Fresh memory of this size costs as much again as filling it: the system hands it out page by page.
    """

    def __init__(self, size: int) -> None:
        self._size = size
        self._free: list[bytearray] = []

    def take(self) -> Vector:
        """A vector with whatever was in it."""
        memory = self._free.pop() if self._free else bytearray(self._size * 4)
        vector: Vector = np.frombuffer(memory, np.float32)
        # Parts of an array on foreign memory refer to that array, not to the memory: it goes when all of them have.
        weakref.finalize(vector, self._free.append, memory).atexit = False
        return vector


class Assembly:
    """Collects chunks; `newest` is the latest complete model (None before the first).

    Nothing is copied: a chunk stays in the message with which it came, or in the memory that the server shares. It may
    come as the difference from an earlier version; where that is not the latest complete one here, it is passed over,
    and asked for again with the others that are missing.

    Another incarnation of the parameter server counts its versions afresh, and so does this.

    Args:
        encoding: the run's compression of differences.
    """

    def __init__(self, layout: Layout, encoding: Encoding | None = None) -> None:
        self.layout = layout
        self.incarnation = ""
        self.newest: Newest | None = None
        self._decoder = Decoder(encoding or Plain(), layout)
        self._region: Region | None = None
        self._partial: dict[int, list[Vector | None]] = {}
        self._shared: dict[int, set[int]] = {}  # of those, which are in shared memory

    @property
    def version(self) -> int:
        """The latest complete version; -1 before the first."""
        return -1 if self.newest is None else self.newest.version

    def share(self, region: Region | None) -> None:
        """Where chunks without a payload lie from now on."""
        self._region = region
        for version, shared in self._shared.items():  # and not where they lay before
            for chunk in shared:
                self._partial[version][chunk] = None
        self._shared.clear()

    def add(self, header: Model, payload: memoryview | None) -> bool:
        """Take one chunk; True if it completed a version newer than any before.

        Raises:
            MessageError: the chunk does not fit the layout.
        """
        if header.digest != self.layout.digest:
            raise MessageError(
                "layout-mismatch",
                f"the server's model has the digest {header.digest:.32}, this one {self.layout.digest}",
            )
        if payload is None:
            slot = header.version % MODEL_SLOTS
            if not 0 <= header.chunk < len(self.layout.chunks) or header.slot != slot:
                raise MessageError(
                    "bad-chunk", f"there is no chunk {header.chunk} in slot {header.slot}"
                )
            part = None
        else:
            part = self._decoder.decode(header.encoding, header.chunk, payload)
        self.served_by(header.incarnation)
        if header.version <= self.version or header.base not in (-1, self.version):
            return False
        if part is None and self._region is not None:
            part = self._region.chunk(header.slot, header.chunk)
            self._shared.setdefault(header.version, set()).add(header.chunk)
        elif header.base >= 0 and self.newest is not None and part is not None:
            if self.newest.region is not None:
                return False  # it may be overwritten while it is read
            part = self.newest.parts[header.chunk] + part
        if part is None:
            return False
        parts = self._partial.setdefault(header.version, [None] * len(self.layout.chunks))
        if payload is not None:
            self._shared.get(header.version, set()).discard(header.chunk)
        parts[header.chunk] = part
        return self._complete(header.version, [x for x in parts if x is not None])

    def _complete(self, version: int, parts: list[Vector]) -> bool:
        """Whether these are all chunks of a version; then it is the newest."""
        if len(parts) < len(self.layout.chunks):
            return False
        shared, region = self._shared.get(version), self._region
        if shared and region is not None:
            mask = np.isin(np.arange(len(parts)), list(shared))
            slot = version % MODEL_SLOTS
            if region.device is not None:
                all_there = len(shared) == len(parts)
                parts = [region.whole(slot)] if all_there else [on_host(part) for part in parts]
            self.newest = Newest(version, tuple(parts), self.incarnation, region, slot, mask)
        else:
            self.newest = Newest(version, tuple(parts), self.incarnation)
        for old in [v for v in self._partial if v <= version]:
            del self._partial[old]
            self._shared.pop(old, None)
        return True

    def served_by(self, incarnation: str) -> None:
        """Which life of the parameter server speaks to us."""
        if incarnation != self.incarnation:
            self.incarnation, self._region = incarnation, None
            self.newest = None if self.newest is None else self._outliving(self.newest)
            self._partial.clear()
            self._shared.clear()

    def _outliving(self, newest: Newest) -> Newest | None:
        """What there is of a version whose server is gone: nobody writes to its memory any more, but that of a device
        may go with it."""
        try:
            parts = tuple(on_host(part) for part in newest.parts)
        except DeviceMemoryError:
            return None
        return Newest(-1, parts, newest.life) if newest.intact() else None

    def missing(self) -> tuple[int, list[int]]:
        """The newest incomplete version and the chunks that it lacks; (-1, []) if nothing is incomplete."""
        if not self._partial:
            return -1, []
        version = max(self._partial)
        return version, [i for i, part in enumerate(self._partial[version]) if part is None]


class Shards:
    """The model as its parameter servers have it: an assembly for each, and what is trained from.

    Args:
        barrier: a version is a round, which begins in all shards at about the same time.

    Attributes:
        begun: of each shard the version from which this worker's round began (-1: none yet).
        lives: of each shard the incarnation of the parameter server whose version that was.
        vectors: memory for updates.
    """

    def __init__(
        self, layout: Layout, encoding: Encoding | None = None, *, barrier: bool = False
    ) -> None:
        self.layout = layout
        self._barrier, self._uneven = barrier, False
        self.assemblies = [Assembly(layout.shard(k), encoding) for k in range(layout.shards)]
        self.begun = (-1,) * layout.shards
        self.lives = ("",) * layout.shards
        self.vectors = Vectors(layout.size)
        self._newest: Whole | None = None

    @property
    def versions(self) -> tuple[int, ...]:
        """The latest complete version of each shard; -1 before the first."""
        return tuple(assembly.version for assembly in self.assemblies)

    @property
    def version(self) -> int:
        """The version that all shards have reached; -1 before the first."""
        return min(self.versions)

    @property
    def awaited(self) -> tuple[int, ...]:
        """Of each shard the version than which the next one is newer: after another life of its parameter server began,
        any is."""
        return tuple(
            begun if assembly.incarnation in (life, "") else -1
            for begun, life, assembly in zip(self.begun, self.lives, self.assemblies, strict=True)
        )

    @property
    def newer(self) -> bool:
        """Whether there is a model newer than the one that is trained from, in every shard; or, if that was of two
        rounds at once, one that is all of the later."""
        # Asked after each local step: so without `versions` and `awaited`, which are slow.
        for assembly, begun, life in zip(self.assemblies, self.begun, self.lives, strict=True):
            if assembly.version <= (begun if assembly.incarnation in (life, "") else -1):
                return self._uneven and self._caught_up
        return True

    @property
    def _caught_up(self) -> bool:
        """Whether the shards that were a round behind are no longer. A worker that nobody waited for may begin from a
        model of which one shard had come to the next round, and the others had not: when they have, it is in that
        round, and may be waited for."""
        versions = self.versions
        return min(self.begun) < min(versions) == max(versions)

    def begin(self, whole: Whole) -> None:
        """A round begins from this model."""
        self.begun, self.lives = whole.versions, whole.lives
        self._uneven = self._barrier and len(set(self.begun)) > 1

    @property
    def newest(self) -> Whole | None:
        """The latest model; None before the first. The same object until there is another."""
        shards = []
        for assembly in self.assemblies:
            if assembly.newest is None:
                return None
            shards.append(assembly.newest)
        last = self._newest
        if last is None or any(a is not b for a, b in zip(last.shards, shards, strict=True)):
            self._newest = Whole(tuple(shards))
        return self._newest
