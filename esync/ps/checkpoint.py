"""The model as a file that anything can read, and checkpoints from which a parameter server goes on.

The model is safetensors with one named tensor per leaf, in float32. Where several parameter servers share it each
writes its shard to a file of its own, with leaves that are cut under `path[start:stop]`; `join` makes one file of them.

A checkpoint is safetensors too, with one tensor per chunk of everything that the next version depends on. Its name ends
with its checksum; it is written under another name and renamed, so it is there whole or not at all.
"""

from __future__ import annotations

import bisect
import hashlib
import json
import logging
import os
import threading
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from esync.errors import EsyncError, ModelError
from esync.ps.aggregation import LOST, NEXT, OUTER_STATE
from esync.ps.backend import Array, Backend
from esync.tensors import CHUNK_MIB, Layout, Leaf, Pieces, Vector

log = logging.getLogger("esync.ps")
MODEL = "model.safetensors"
CHECKPOINTS = "checkpoints"
"""The directory of a run that holds them."""
FORMAT = 1
ABOUT = "esync"
"""The key of a file's metadata under which stands what we say of it, as JSON."""


def model_name(shard: int, shards: int) -> str:
    """The name of the file that holds a shard of the model, or the whole of it."""
    return MODEL if shards == 1 else f"model-{shard + 1}-of-{shards}.safetensors"


def save_model(
    path: Path,
    whole: Layout,
    chunks: list[Array],
    backend: Backend,
    *,
    version: int,
    shard: int = 0,
) -> None:
    """Write a shard's leaves under their paths; the file appears whole or not at all.

    Args:
        whole: the model's layout, with its number of shards.
        chunks: of this shard.
    """
    layout = whole.shard(shard)
    model = Pieces([backend.host(chunk) for chunk in chunks])
    tensors, at = {}, 0
    for leaf in layout.leaves:
        tensors[leaf.path] = model.whole(at, leaf.size).reshape(leaf.shape)
        at += leaf.size
    about: dict[str, Any] = {"version": version, "digest": whole.digest}
    if whole.shards > 1:
        about |= {"shard": shard, "shards": whole.shards, **whole.to_wire()}
    _save(path, tensors, about)


def join(directory: Path) -> Path | None:
    """Make `model.safetensors` of the shards' files in a directory and remove those; None if there are none.

    Raises:
        EsyncError: a shard is missing, or they are not of one model.
    """
    paths = sorted(directory.glob("model-*-of-*.safetensors"))
    if not paths:
        return None
    tensors: dict[str, np.ndarray[Any, Any]] = {}
    abouts = []
    for path in paths:
        try:
            with safe_open(path, framework="np") as file:
                abouts.append(_shard_of(file.metadata()[ABOUT]))
                tensors |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
            raise EsyncError(f"{path} is not a shard of a model: {error}") from error
    shards = abouts[0]["shards"]
    if shards != len(abouts) or {about["shard"] for about in abouts} != set(range(len(abouts))):
        raise EsyncError(f"{directory} has {len(paths)} shards of a model that has {shards}")
    if len({about["digest"] for about in abouts}) > 1:
        raise EsyncError(f"the shards in {directory} are not of one model")
    layout = Layout.from_wire(abouts[0])
    whole = {leaf.path: _joined(leaf, tensors) for leaf in layout.leaves}
    versions = [about["version"] for about in abouts]
    about = {"version": min(versions), "digest": layout.digest}
    if len(set(versions)) > 1:  # a run that was ended in the middle of a round
        about["versions"] = versions
    _save(directory / MODEL, whole, about)
    for path in paths:
        path.unlink()
    return directory / MODEL


def _shard_of(text: str) -> dict[str, Any]:
    """What a shard's file says of itself.

    Raises:
        KeyError, TypeError, ValueError: it is none.
    """
    about = json.loads(text)
    if not all(type(about[key]) is int for key in ("version", "shard", "shards")):
        raise TypeError("version, shard and shards are numbers")
    return dict(about) | {"digest": str(about["digest"])}


def _joined(leaf: Leaf, tensors: dict[str, np.ndarray[Any, Any]]) -> np.ndarray[Any, Any]:
    """A leaf, of its parts if it was cut."""
    if leaf.path in tensors:
        return tensors[leaf.path]
    parts = []
    at = 0
    for name, array in sorted(tensors.items(), key=lambda item: _start_of(item[0])):
        if name == f"{leaf.path}[{at}:{at + array.size}]":
            parts.append(array)
            at += array.size
    if at != leaf.size:
        raise ModelError(f"the shards hold {at} of the {leaf.size} elements of {leaf.path}")
    return np.concatenate(parts).reshape(leaf.shape)


def _start_of(name: str) -> int:
    """Where a part of a cut leaf begins, by its name."""
    start = name.rpartition("[")[2].partition(":")[0]
    return int(start) if start.isdigit() else 0


def _save(path: Path, tensors: dict[str, np.ndarray[Any, Any]], about: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    # One key of metadata: several come in any order.
    save_file(tensors, part, metadata={ABOUT: json.dumps(about)})
    part.replace(path)


@dataclass(frozen=True)
class Snapshot:
    """A parameter server at one version.

    Attributes:
        whole, shard: the model's layout, and which of its shards this is.
        arrays: what `Aggregation.snapshot` returned, in host memory.
        members: who was expected at the barrier.
        config: `[run]`.
        moved: bytes of tensors that have come and gone, in all of the run.
    """

    version: int
    whole: Layout
    shard: int
    arrays: dict[str, list[Vector | None]]
    members: list[str]
    config: dict[str, Any]
    moved: tuple[int, int] = (0, 0)


class Checkpoints:
    """The checkpoints of one shard in one directory.

    Args:
        keep: so many are kept, the newest.
    """

    def __init__(self, directory: Path, keep: int, shard: int = 0) -> None:
        self.directory = directory
        self.keep = keep
        self.shard = shard

    def paths(self) -> list[Path]:
        """All of them, the newest version first, and of one version what was written last: a run may be stopped in the
        middle of a version, gone on with, and stopped in the middle of the same."""
        found = self.directory.glob(f"shard{self.shard}-version*-*.safetensors")
        return sorted(found, key=lambda x: (_version_of(x), _written_at(x)), reverse=True)

    def write(self, snapshot: Snapshot) -> Path:
        """Write one, and remove those that are not kept any more.

        Raises:
            OSError: it could not be written; the earlier ones are still there.
        """
        self.directory.mkdir(parents=True, exist_ok=True)
        tensors = {
            f"{name}/{i}": np.ascontiguousarray(x)
            for name, chunks in snapshot.arrays.items()
            for i, x in enumerate(chunks)
            if x is not None
        }
        about = {
            "format": FORMAT,
            "version": snapshot.version,
            "shard": snapshot.shard,
            "shards": snapshot.whole.shards,
            "chunk_mib": snapshot.whole.chunk_mib,
            "counts": {name: len(chunks) for name, chunks in snapshot.arrays.items()},
            "members": snapshot.members,
            "config": snapshot.config,
            "moved": snapshot.moved,
            **snapshot.whole.to_wire(),
        }
        part = self.directory / f"shard{self.shard}.part"
        save_file(tensors, part, metadata={ABOUT: json.dumps(about)})
        name = f"shard{self.shard}-version{snapshot.version:010d}-{_checksum(part)}.safetensors"
        path = self.directory / name
        _sync(part)
        part.replace(path)
        _sync(self.directory)
        # (A newer one is damaged, or could not be read when the run was gone on with.)
        older = [x for x in self.paths() if x != path and _version_of(x) <= snapshot.version]
        for old in older[self.keep - 1 :]:
            old.unlink(missing_ok=True)
        return path

    def latest(self, say: Callable[[str], None]) -> Snapshot | None:
        """The newest one that is whole; None if there is none. Damaged ones are passed over, which `say` is told."""
        for path in self.paths():
            try:
                return _read(path)
            except (
                EsyncError,
                SafetensorError,
                OSError,
                LookupError,
                TypeError,
                ValueError,
            ) as error:
                say(f"{path} is damaged and passed over: {error}")
        return None


def _read(path: Path) -> Snapshot:
    if _checksum(path) != path.stem.rpartition("-")[2]:
        raise EsyncError("its contents do not have the checksum in its name")
    with safe_open(path, framework="np") as file:
        about = json.loads(file.metadata()[ABOUT])
        if about["format"] != FORMAT:
            raise EsyncError(f"it has format {about['format']}, this esync reads {FORMAT}")
        about.setdefault("chunk_mib", CHUNK_MIB)
        for name in ("version", "shard", "shards", "chunk_mib"):
            if type(about[name]) is not int or about[name] < 0:
                raise TypeError(f"its {name} is {about[name]!r:.40}")
        whole = Layout.from_wire(about).cut(about["shards"], about["chunk_mib"])
        if about["shard"] >= whole.shards > 1:
            raise ValueError(f"it is of shard {about['shard']} of {whole.shards}")
        counts = dict(about["counts"])
        if not all(type(n) is int and n <= len(whole.chunks) for n in counts.values()):
            raise ValueError("it has more chunks than its model")
        arrays: dict[str, list[Vector | None]] = {
            name: [None] * count for name, count in counts.items()
        }
        for name in file.keys():  # noqa: SIM118
            group, _, i = name.rpartition("/")
            arrays[group][int(i)] = x = file.get_tensor(name)
            if x.dtype != np.float32 or x.ndim != 1:
                raise TypeError(f"{name} is {x.dtype}{list(x.shape)}, not a vector of float32")
    up, down = (int(n) for n in about.get("moved", (0, 0)))
    return Snapshot(
        about["version"],
        whole,
        about["shard"],
        arrays,
        about["members"],
        about["config"],
        (up, down),
    )


def cut_anew(snapshot: Snapshot, chunk_mib: int) -> Snapshot:
    """The snapshot with its arrays in chunks of so many MiB.

    Raises:
        ModelError: they are not what its layout says, or an array has a part of such a chunk and not all of it.
    """
    before = snapshot.whole
    if chunk_mib == before.chunk_mib:
        return snapshot
    whole = before.cut(before.shards, chunk_mib)
    snapshot = _of_its_version_alone(snapshot)
    old, new = before.shard(snapshot.shard), whole.shard(snapshot.shard)
    starts = [at.start for at in old.chunks]
    arrays: dict[str, list[Vector | None]] = {}
    for name, chunks in snapshot.arrays.items():
        fits = len(chunks) == len(starts) and all(
            x is None or x.size == at.size for x, at in zip(chunks, old.chunks, strict=True)
        )
        if not fits:
            raise ModelError(f"the {name} that was saved is not of this model")
        arrays[name] = made = []
        for at in new.chunks:
            first = bisect.bisect_right(starts, at.start) - 1
            parts = chunks[first : bisect.bisect_left(starts, at.stop)]
            there = [x for x in parts if x is not None]
            if 0 < len(there) < len(parts):
                raise ModelError(
                    f"the checkpoint has {name} of some of its chunks only, being of the middle of a version, and "
                    f"cannot be cut into others: go on with chunk_mib = {before.chunk_mib}"
                )
            made.append(Pieces(there).whole(at.start - starts[first], at.size) if there else None)
    return replace(snapshot, whole=whole, arrays=arrays)


def _of_its_version_alone(snapshot: Snapshot) -> Snapshot:
    """Without what was made of the next version, where that can be made once more: nothing has stepped for it."""
    stepped = any(name == LOST or name.startswith(OUTER_STATE) for name in snapshot.arrays)
    if stepped:
        return snapshot
    return replace(snapshot, arrays={n: x for n, x in snapshot.arrays.items() if n != NEXT})


def _version_of(path: Path) -> int:
    """By a checkpoint's name; -1: it is none."""
    number = path.name.partition("-version")[2].partition("-")[0]
    return int(number) if number.isdecimal() else -1


def _written_at(path: Path) -> int:
    """In nanoseconds; 0 if it is gone."""
    try:
        return path.stat().st_mtime_ns
    except OSError:
        return 0


def _checksum(path: Path) -> str:
    """Eight bytes of BLAKE2b over a file, in hexadecimal."""
    digest = hashlib.blake2b(digest_size=8)
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _sync(path: Path) -> None:
    """Have a file, or a directory's entries, on the disk."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


class Writer(threading.Thread):
    """Writes checkpoints beside the rounds: one at a time, and none waits."""

    def __init__(self, checkpoints: Checkpoints) -> None:
        super().__init__(name="esync-checkpoints", daemon=True)
        self.checkpoints = checkpoints
        self._changed = threading.Condition()
        self._snapshot: Snapshot | None = None
        self._over = False
        self._failed = ""
        self.written = -1  # the last version

    @property
    def is_free(self) -> bool:
        """Whether it has nothing to write."""
        return self._snapshot is None

    def put(self, snapshot: Snapshot) -> None:
        """Write this; only when it is free."""
        with self._changed:
            self._snapshot = snapshot
            self._changed.notify()

    def finish(self) -> None:
        """End, when what it was given is written."""
        with self._changed:
            self._over = True
            self._changed.notify()
        if self.is_alive():
            self.join()

    def run(self) -> None:
        while True:
            with self._changed:
                while self._snapshot is None and not self._over:
                    self._changed.wait()
                snapshot = self._snapshot
            if snapshot is None:
                return
            try:
                self.checkpoints.write(snapshot)
                self.written, self._failed = snapshot.version, ""
            except Exception as error:  # the disk's, or no memory is left
                text = str(error) or type(error).__name__
                if text != self._failed:
                    log.error("cannot write a checkpoint: %s; the run goes on", text)
                self._failed = text
            with self._changed:
                self._snapshot = None
