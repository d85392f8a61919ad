"""Between a pytree of arrays and the flat float32 vector that travels.

Trees of JAX arrays are packed and unpacked on their device by compiled functions; trees of NumPy arrays in NumPy.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from esync.errors import ModelError
from esync.tensors import DELTA, VALUE, Layout, Vector, layout_of

Tree = Any


def is_batch_norm(path: str) -> bool:
    """Whether a parameter is BatchNorm's gamma or beta, which ESync averages as values (Li et al. 2019)."""
    return any(part.startswith("BatchNorm") for part in path.split("/"))


def path_name(path: tuple[Any, ...]) -> str:
    """A leaf's place in its tree, like `dense/kernel`."""
    parts = []
    for key in path:
        for attribute in ("key", "idx", "name"):
            if hasattr(key, attribute):
                parts.append(str(getattr(key, attribute)))
                break
        else:
            parts.append(str(key))
    return "/".join(parts)


class Packer:
    """Packs trees that look like the given ones.

    Args:
        params: averaged as deltas, except where `as_value` says otherwise.
        stats: averaged as values; None if there are none.
        as_value: of a parameter's path.

    Raises:
        ModelError: a leaf that cannot be averaged.
    """

    def __init__(
        self, params: Tree, stats: Tree = None, as_value: Callable[[str], bool] = is_batch_norm
    ) -> None:
        leaves = []
        flat, treedef = jax.tree_util.tree_flatten_with_path((params, stats))
        self._treedef: Any = treedef
        for (top, *path), array in flat:
            name = path_name(tuple(path))
            group = "params" if top.idx == 0 else "stats"
            kind = VALUE if group == "stats" or as_value(name) else DELTA
            leaves.append((kind, f"{group}/{name}" if name else group, array))
        self.layout: Layout = layout_of(leaves)
        # The layout puts deltas first; `_order[i]` is the tree's index of the layout's leaf i.
        self._order = sorted(range(len(leaves)), key=lambda i: leaves[i][0] != DELTA)
        stats_leaves = [leaf.path.split("/")[0] == "stats" for leaf in self.layout.leaves]
        self._trained = np.repeat(
            np.array([not is_stats for is_stats in stats_leaves], np.float32),
            [leaf.size for leaf in self.layout.leaves],
        )
        self._on_host = all(isinstance(array, (np.ndarray, np.generic)) for _, _, array in leaves)
        self._device = None if self._on_host else _device_of(flat)
        if self._on_host:
            self._pack, self._unpack = self._pack_with(np), self._unpack_with(np)
        else:
            self._pack = jax.jit(self._pack_with(jnp))
            self._unpack = jax.jit(self._unpack_with(jnp))

    def _pack_with(self, xp: Any) -> Callable[[list[Any], Any], Any]:
        order = self._order

        def pack(leaves: list[Any], base: Any) -> Any:
            parts = [xp.ravel(xp.asarray(leaves[i])).astype(xp.float32) for i in order]
            return xp.concatenate(parts) - base

        return pack

    def _unpack_with(self, xp: Any) -> Callable[[Any], tuple[list[Any], Any]]:
        order, layout = self._order, self.layout
        pack = self._pack_with(xp)

        def unpack(flat: Any) -> tuple[list[Any], Any]:
            leaves: list[Any] = [None] * len(order)
            at = 0
            for i, leaf in zip(order, layout.leaves, strict=True):
                part = flat[at : at + leaf.size].reshape(leaf.shape)
                leaves[i] = xp.array(part, dtype=leaf.dtype)
                at += leaf.size
            # From the leaves, not from `flat`: what rounding to their dtype loses is no progress of this worker.
            held = pack(leaves, xp.float32(0))
            base = xp.where(xp.arange(layout.size) < layout.deltas, held, xp.float32(0))
            return leaves, base

        return unpack

    def pack(self, params: Tree, stats: Tree = None, base: Any = 0.0) -> Vector:
        """The tree as a vector, less `base`. shape=(layout.size,); the result is not to be written to."""
        leaves, treedef = jax.tree_util.tree_flatten((params, stats))
        if treedef != self._treedef:
            raise ModelError(
                f"the tree given to step is not the one given to start: {treedef} instead of {self._treedef}"
            )
        if self._on_host:
            return np.asarray(
                self._pack(leaves, np.float32(0) if base is None else base), np.float32
            )
        return np.asarray(self._pack(leaves, jnp.asarray(base, jnp.float32)))

    def unpack(self, flat: Vector) -> tuple[Tree, Tree, Any]:
        """(params, stats, base) of a model: `base` is what `pack` subtracts to make its next update, zero where
        values are averaged. `flat` must not be written to afterwards."""
        x = flat if self._on_host else jax.device_put(flat, self._device)
        leaves, base = self._unpack(x)
        params, stats = jax.tree_util.tree_unflatten(self._treedef, leaves)
        return params, stats, base

    def merge(
        self, flat: Vector, params: Tree, stats: Tree, pushed: Vector
    ) -> tuple[Tree, Tree, Any]:
        """`unpack(flat)`, with the progress that `params` made since they were `pushed` added to it.

        Statistics are the new model's: a difference of two variances is not one.
        """
        progress = self.pack(params, stats) - pushed
        params, stats, _ = self.unpack(flat + progress * self._trained)
        return params, stats, self.unpack(flat)[2]


def _device_of(flat: list[tuple[Any, Any]]) -> Any:
    for _, array in flat:
        if isinstance(array, jax.Array):
            return next(iter(array.devices()))
    return None
