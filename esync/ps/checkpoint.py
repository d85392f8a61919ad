"""The model as a file that anything can read: safetensors, one named tensor per leaf, in float32.

Where several parameter servers share the model each writes its shard to a file of its own, with leaves that are cut
under `path[start:stop]`; `join` makes the one file of them.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from esync.errors import EsyncError, ModelError
from esync.ps.backend import Array, Backend
from esync.tensors import Layout, Leaf, Pieces

MODEL = "model.safetensors"
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
                abouts.append(json.loads(file.metadata()[ABOUT]))
                tensors |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
            raise EsyncError(f"{path} is not a shard of a model: {error}") from error
    shards = abouts[0].get("shards")
    if {about.get("shard") for about in abouts} != set(range(shards or 0)):
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
