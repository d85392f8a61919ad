"""Chunks of a model, put together to whole versions."""

from __future__ import annotations

import numpy as np

from esync.messages import MessageError, Model
from esync.tensors import Layout

Vector = np.ndarray[tuple[int], np.dtype[np.float32]]


class Assembly:
    """Collects chunks; `version` and `flat` are the latest complete model (-1 and None before the first).

    Another incarnation of the parameter server counts its versions afresh, and so does this.
    """

    def __init__(self, layout: Layout) -> None:
        self.layout = layout
        self.incarnation = ""
        self.version = -1
        self.flat: Vector | None = None
        self._partial: dict[int, tuple[Vector, set[int]]] = {}

    def add(self, header: Model, payload: memoryview) -> bool:
        """Take one chunk; True if it completed a version newer than any before.

        Raises:
            MessageError: the chunk does not fit the layout.
        """
        if header.digest != self.layout.digest:
            raise MessageError(
                "layout-mismatch",
                f"the server's model has the digest {header.digest:.32}, this one {self.layout.digest}",
            )
        if not 0 <= header.chunk < len(self.layout.chunks):
            raise MessageError("bad-chunk", f"there is no chunk {header.chunk}")
        chunk = self.layout.chunks[header.chunk]
        if payload.nbytes != chunk.size * 4:
            raise MessageError(
                "bad-length",
                f"chunk {header.chunk} has {chunk.size * 4} bytes, this one {payload.nbytes}",
            )
        self.served_by(header.incarnation)
        if header.version <= self.version:
            return False
        if header.version not in self._partial:
            self._partial[header.version] = (np.empty(self.layout.size, np.float32), set())
        flat, present = self._partial[header.version]
        flat[chunk.start : chunk.stop] = np.frombuffer(payload, np.float32)
        present.add(header.chunk)
        if len(present) < len(self.layout.chunks):
            return False
        self.version, self.flat = header.version, flat
        for version in [v for v in self._partial if v <= header.version]:
            del self._partial[version]
        return True

    def served_by(self, incarnation: str) -> None:
        """Which life of the parameter server speaks to us."""
        if incarnation != self.incarnation:
            self.incarnation, self.version = incarnation, -1
            self._partial.clear()

    def missing(self) -> tuple[int, list[int]]:
        """The newest incomplete version and the chunks that it lacks; (-1, []) if nothing is incomplete."""
        if not self._partial:
            return -1, []
        version = max(self._partial)
        present = self._partial[version][1]
        return version, [i for i in range(len(self.layout.chunks)) if i not in present]
