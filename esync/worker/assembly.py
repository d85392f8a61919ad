"""Chunks of a model, put together to whole versions."""

from __future__ import annotations

import numpy as np

from esync.compression import Decoder, Encoding, Plain
from esync.messages import MessageError, Model
from esync.tensors import Layout, Vector


class Assembly:
    """Collects chunks; `version` and `flat` are the latest complete model (-1 and None before the first).

    A chunk may come as the difference from an earlier version; where that is not the latest complete one here, the
    chunk is passed over, and asked for again with the others that are missing.

    Another incarnation of the parameter server counts its versions afresh, and so does this.

    Args:
        encoding: the run's compression of differences.
    """

    def __init__(self, layout: Layout, encoding: Encoding | None = None) -> None:
        self.layout = layout
        self._decoder = Decoder(encoding or Plain(), layout)
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
        part = self._decoder.decode(header.encoding, header.chunk, payload)
        self.served_by(header.incarnation)
        if header.version <= self.version or header.base not in (-1, self.version):
            return False
        if header.version not in self._partial:
            self._partial[header.version] = (np.empty(self.layout.size, np.float32), set())
        flat, present = self._partial[header.version]
        chunk = self.layout.chunks[header.chunk]
        own = slice(chunk.start, chunk.stop)
        if header.base >= 0 and self.flat is not None:
            np.add(self.flat[own], part, out=flat[own])
        else:
            flat[own] = part
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
