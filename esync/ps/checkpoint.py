"""The model as a file that anything can read: safetensors, one named tensor per leaf."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from esync.ps.backend import Array, Backend
from esync.tensors import Layout


def save_model(
    path: Path, layout: Layout, chunks: list[Array], backend: Backend, *, version: int
) -> None:
    """Write the model's leaves under their paths, in float32; the file appears whole or not at all."""
    flat = np.concatenate([backend.host(chunk) for chunk in chunks])
    tensors, at = {}, 0
    for leaf in layout.leaves:
        tensors[leaf.path] = flat[at : at + leaf.size].reshape(leaf.shape)
        at += leaf.size
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    about = json.dumps({"version": version, "digest": layout.digest})
    save_file(tensors, part, metadata={"esync": about})  # one key: several come in any order
    part.replace(path)
