"""Chunks of a model, put together to whole versions."""

from __future__ import annotations

import weakref
from dataclasses import dataclass, field

import numpy as np

from esync.compression import Decoder, Encoding, Plain
from esync.messages import MessageError, Model
from esync.shared_memory import MODEL_SLOTS, Region
from esync.tensors import Layout, Vector


@dataclass(frozen=True, slots=True)
class Newest:
    """A complete version.

    Attributes:
        flat: the model, not to be written to; in shared memory the server's own, which will be overwritten.
        region, slot: the shared memory in which it lies.
    """

    version: int
    flat: Vector
    region: Region | None = None
    slot: int = -1

    def intact(self) -> bool:
        """Whether what was read of `flat` until now is this version."""
        return self.region is None or self.region.holds(self.slot, self.version)


@dataclass(slots=True)
class _Partial:
    """A version of which chunks are missing; `flat` is None as long as all of the others lie in shared memory."""

    flat: Vector | None = None
    present: set[int] = field(default_factory=set)


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

    A chunk may come as the difference from an earlier version; where that is not the latest complete one here, the
    chunk is passed over, and asked for again with the others that are missing.

    Another incarnation of the parameter server counts its versions afresh, and so does this.

    Args:
        encoding: the run's compression of differences.

    Attributes:
        vectors: memory for models and updates.
    """

    def __init__(self, layout: Layout, encoding: Encoding | None = None) -> None:
        self.layout = layout
        self.incarnation = ""
        self.newest: Newest | None = None
        self._decoder = Decoder(encoding or Plain(), layout)
        self.vectors = Vectors(layout.size)
        self._region: Region | None = None
        self._partial: dict[int, _Partial] = {}

    @property
    def version(self) -> int:
        """The latest complete version; -1 before the first."""
        return -1 if self.newest is None else self.newest.version

    @property
    def flat(self) -> Vector | None:
        """That version's model."""
        return None if self.newest is None else self.newest.flat

    def share(self, region: Region | None) -> None:
        """Where chunks without a payload lie from now on."""
        self._region = region

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
            return self._add_shared(header)
        part = self._decoder.decode(header.encoding, header.chunk, payload)
        self.served_by(header.incarnation)
        if header.version <= self.version or header.base not in (-1, self.version):
            return False
        before = self.newest
        if header.base >= 0 and (before is None or before.region is not None):
            return False  # it may be overwritten while it is read
        partial = self._partial.setdefault(header.version, _Partial())
        flat = self._own(partial, header.version)
        chunk = self.layout.chunks[header.chunk]
        own = slice(chunk.start, chunk.stop)
        if header.base >= 0 and before is not None:
            np.add(before.flat[own], part, out=flat[own])
        else:
            flat[own] = part
        return self._present(header)

    def _add_shared(self, header: Model) -> bool:
        """A chunk that lies in shared memory."""
        slot = header.version % MODEL_SLOTS
        if not 0 <= header.chunk < len(self.layout.chunks) or header.slot != slot:
            raise MessageError(
                "bad-chunk", f"there is no chunk {header.chunk} in slot {header.slot}"
            )
        self.served_by(header.incarnation)
        if self._region is None or header.version <= self.version:
            return False
        partial = self._partial.setdefault(header.version, _Partial())
        if partial.flat is not None and not self._copy(partial.flat, header.chunk, header.version):
            return False
        return self._present(header)

    def _own(self, partial: _Partial, version: int) -> Vector:
        """The version in memory of our own, since not all of its chunks are in shared memory."""
        if partial.flat is None:
            flat = partial.flat = self.vectors.take()
            partial.present = {i for i in partial.present if self._copy(flat, i, version)}
        return partial.flat

    def _copy(self, flat: Vector, chunk: int, version: int) -> bool:
        """Copy a chunk out of shared memory; False if it is not this version's any more."""
        region, slot, at = self._region, version % MODEL_SLOTS, self.layout.chunks[chunk]
        if region is None or region.stamps[slot, chunk] != version:
            return False
        flat[at.start : at.stop] = region.chunk(slot, chunk)
        return bool(region.stamps[slot, chunk] == version)

    def _present(self, header: Model) -> bool:
        """A chunk is there; True if it was the last one."""
        partial, version = self._partial[header.version], header.version
        partial.present.add(header.chunk)
        if len(partial.present) < len(self.layout.chunks):
            return False
        if partial.flat is not None:
            self.newest = Newest(version, partial.flat)
        else:
            assert self._region is not None
            self.newest = Newest(
                version, self._region.whole(header.slot), self._region, header.slot
            )
        for old in [v for v in self._partial if v <= version]:
            del self._partial[old]
        return True

    def served_by(self, incarnation: str) -> None:
        """Which life of the parameter server speaks to us."""
        if incarnation != self.incarnation:
            self.incarnation, self._region = incarnation, None
            if self.newest is not None:  # nobody writes to the memory of the one before any more
                self.newest = Newest(-1, self.newest.flat) if self.newest.intact() else None
            self._partial.clear()

    def missing(self) -> tuple[int, list[int]]:
        """The newest incomplete version and the chunks that it lacks; (-1, []) if nothing is incomplete."""
        if not self._partial:
            return -1, []
        version = max(self._partial)
        present = self._partial[version].present
        return version, [i for i in range(len(self.layout.chunks)) if i not in present]
