"""Between a pytree of arrays and the flat float32 vector that travels.

Arrays in host memory, NumPy's and JAX's on a CPU, are read where they lie and copied once, into the vector or out of
it; arrays on an accelerator are packed and unpacked there. On a CUDA device the vector may stay there, too
(`esync.device_memory`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from esync import device_memory
from esync.compression import squared_norm
from esync.device_memory import Array, DeviceMemoryError
from esync.errors import ModelError
from esync.tensors import DELTA, VALUE, Layout, Leaf, Parts, Pieces, Vector, layout_of

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


def clip(update: Vector | Array, deltas: int, most: float) -> None:
    """Scale an update's deltas down to an L2 norm of `most` if theirs is larger, in place: `d * min(1, most / |d|)`
    (McMahan et al. 2018, Learning Differentially Private Recurrent Language Models). One that is not finite stays what
    it is, for the parameter server to refuse.

    Args:
        update: deltas, then values. A CuPy array will do.
        deltas: number of elements that are deltas.
    """
    mine = update[:deltas]
    host = mine if isinstance(mine, np.ndarray) else device_memory.on_host(mine)
    norm = math.sqrt(squared_norm(host))
    if most < norm < math.inf:
        if host is mine:
            mine *= np.float32(most / norm)
        else:
            device_memory.put(host * np.float32(most / norm), mine)


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
        self,
        params: Tree,
        stats: Tree = None,
        as_value: Callable[[str], bool] = is_batch_norm,
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
        ordered = sorted(
            zip(self._order, self.layout.leaves, strict=True), key=lambda pair: pair[0]
        )
        self._leaf_of = [leaf for _, leaf in ordered]  # in the tree's order
        arrays = [array for _, _, array in leaves]
        # A number is what NumPy makes of it, unless it is among JAX's arrays.
        self._numpy = all(isinstance(array, (np.ndarray, np.generic, float)) for array in arrays)
        self._device = None if self._numpy else _device_of(arrays)
        self._exact = all(leaf.dtype == "float32" for leaf in self.layout.leaves)
        in_host_memory = self._device is None or self._device.platform == "cpu"
        self._packing: _Packing = (_InHostMemory if in_host_memory else _OnDevice)(self)

    def places(self) -> Iterator[tuple[int, Leaf, int]]:
        """(index in the tree, leaf, where it begins in the vector), in the layout's order."""
        at = 0
        for i, leaf in zip(self._order, self.layout.leaves, strict=True):
            yield i, leaf, at
            at += leaf.size

    def pack(
        self, params: Tree, stats: Tree = None, base: Any = None, out: Vector | Array | None = None
    ) -> Vector | Array:
        """The tree as a vector, deltas less `base`. shape=(layout.size,); not to be written to. `out`: where to put
        it; that may be a CuPy array, where the tree is on its device. It is there on return."""
        return self._packing.pack(self._leaves(params, stats), base, out)

    def _leaves(self, params: Tree, stats: Tree) -> list[Any]:
        leaves, treedef = jax.tree_util.tree_flatten((params, stats))
        if treedef != self._treedef:
            raise ModelError(
                f"the tree given to step is not the one given to start: {treedef} instead of {self._treedef}"
            )
        for array, leaf in zip(leaves, self._leaf_of, strict=True):
            if np.shape(array) != leaf.shape:
                raise ModelError(
                    f"the leaf {leaf.path} given to step has shape {list(np.shape(array))}; given to start it had "
                    f"{list(leaf.shape)}"
                )
        return leaves

    def cuda(self) -> int | None:
        """The CUDA device on which the trees are, as this process counts; None if they are not on one, or if it cannot
        be shared (see `esync.device_memory.unsupported`)."""
        return self._packing.cuda()

    def snapshot(self, params: Tree, stats: Tree, last: Any = None) -> Any:
        """The tree as a vector that stays what it is, for `merge`. `last`: an earlier one, which is not needed any
        more."""
        return self._packing.snapshot(self._leaves(params, stats), last)

    def unpack(self, parts: Parts) -> tuple[Tree, Tree, Any]:
        """(params, stats, base) of a model: `base` is what `pack` subtracts to make its next update; it may be `parts`
        themselves. The trees share no memory with them."""
        leaves, base = self._packing.unpack(parts)
        params, stats = jax.tree_util.tree_unflatten(self._treedef, leaves)
        return params, stats, base

    def merge(self, parts: Parts, params: Tree, stats: Tree, pushed: Any) -> tuple[Tree, Tree, Any]:
        """`unpack(parts)`, with the progress that `params` made since they were `pushed`, a `snapshot`, added to it.

        Statistics are the new model's: a difference of two variances is not one.
        """
        leaves, base = self._packing.merge(parts, self._leaves(params, stats), pushed)
        params, stats = jax.tree_util.tree_unflatten(self._treedef, leaves)
        return params, stats, base

    def stats_begin(self) -> int:
        """Where the statistics begin in the vector: they are at its end."""
        for _, leaf, at in self.places():
            if leaf.path.split("/")[0] == "stats":
                return at
        return self.layout.size


class _Packing(Protocol):
    def __init__(self, packer: Packer) -> None: ...

    def cuda(self) -> int | None: ...

    def pack(self, leaves: list[Any], base: Any, out: Vector | Array | None) -> Vector | Array: ...

    def snapshot(self, leaves: list[Any], last: Any) -> Any: ...

    def unpack(self, parts: Parts) -> tuple[list[Any], Any]: ...

    def merge(self, parts: Parts, leaves: list[Any], pushed: Any) -> tuple[list[Any], Any]: ...


class _InHostMemory:
    """Reads the arrays where they lie, and copies once."""

    def __init__(self, packer: Packer) -> None:
        self._packer = packer

    def cuda(self) -> int | None:
        return None

    def pack(self, leaves: list[Any], base: Any, out: Vector | None) -> Vector:
        flat = np.empty(self._packer.layout.size, np.float32) if out is None else out
        before = Pieces(() if base is None else base)
        for i, leaf, at in self._packer.places():
            array = np.asarray(leaves[i]).reshape(-1)  # of a JAX array on a CPU: a view
            mine = flat[at : at + leaf.size]
            if base is None or leaf.kind != DELTA:
                mine[:] = array
                continue
            array = array.astype(np.float32, copy=False)
            for offset, part in before.of(at, leaf.size):
                own = slice(offset, offset + part.size)
                np.subtract(array[own], part, out=mine[own])
        return flat

    def unpack(self, parts: Parts) -> tuple[list[Any], Any]:
        packer = self._packer
        leaves: list[Any] = [None] * len(packer.layout.leaves)
        model, device = Pieces(parts), packer._device
        for i, leaf, at in packer.places():
            leaves[i] = (
                model.whole(at, leaf.size)
                .astype(leaf.dtype, copy=packer._numpy)
                .reshape(leaf.shape)
            )
        if not packer._numpy:
            leaves = [
                put if _address(put) != _address(leaf) else jax.device_put(leaf.copy(), device)
                for put, leaf in zip(jax.device_put(leaves, device), leaves, strict=True)
            ]
        return leaves, self._base(parts)

    def snapshot(self, leaves: list[Any], last: Any) -> Any:
        return self.pack(leaves, None, last)

    def merge(self, parts: Parts, leaves: list[Any], pushed: Any) -> tuple[list[Any], Any]:
        merged = self.pack(leaves, None, None)
        merged -= pushed
        merged[self._packer.stats_begin() :] = 0.0
        at = 0
        for part in parts:
            merged[at : at + part.size] += part
            at += part.size
        return self.unpack([merged])[0], self._base(parts)

    def _base(self, parts: Parts) -> Any:
        packer = self._packer
        if packer._exact:
            return parts
        # What rounding to a leaf's dtype loses is no progress of this worker.
        base = np.concatenate(parts)
        for _, leaf, at in packer.places():
            mine = base[at : at + leaf.size]
            mine[:] = mine.astype(leaf.dtype)
        return [base]


def _address(array: Any) -> int:
    """Where an array lies in host memory. JAX uses NumPy's as it is where that is aligned, and copies it else."""
    if isinstance(array, jax.Array):
        return int(array.unsafe_buffer_pointer())
    return int(array.__array_interface__["data"][0])


class _OnDevice:
    """Packs and unpacks where the arrays are, with compiled functions."""

    def __init__(self, packer: Packer) -> None:
        self._packer = packer
        self._pack, self._unpack = jax.jit(self._packed), jax.jit(self._unpacked)
        self._merge = jax.jit(self._merged)
        try:
            one = jax.device_put(np.zeros(1, np.float32), packer._device)
            self._cuda: int | None = int(device_memory.from_jax(one).device.id)
        except DeviceMemoryError:
            self._cuda = None

    def cuda(self) -> int | None:
        return self._cuda

    def pack(self, leaves: list[Any], base: Any, out: Vector | Array | None) -> Vector | Array:
        flat = self._pack(leaves, jnp.float32(0) if base is None else base)
        if out is None:
            return np.asarray(flat)
        if isinstance(out, np.ndarray) and self._cuda is None:
            out[:] = np.asarray(flat)
        else:
            device_memory.put(device_memory.from_jax(flat), out)
        return out

    def snapshot(self, leaves: list[Any], last: Any) -> Any:
        return self._pack(leaves, jnp.float32(0))

    def unpack(self, parts: Parts) -> tuple[list[Any], Any]:
        leaves, base = self._unpack(self._there(parts))
        return leaves, base

    def merge(self, parts: Parts, leaves: list[Any], pushed: Any) -> tuple[list[Any], Any]:
        leaves, base = self._merge(self._there(parts), leaves, pushed)
        return leaves, base

    def _there(self, parts: Parts) -> Any:
        """The parts as arrays of JAX's own. No program but that of one copy may see another process's memory: XLA
        replays larger ones as a CUDA graph, which fails with memory of another mapping (docs/results/gpu.md)."""
        own = device_memory.to_jax
        arrays = [part if isinstance(part, np.ndarray) else own(part) for part in parts]
        return jax.device_put(arrays, self._packer._device)

    def _packed(self, leaves: list[Any], base: Any) -> Any:
        order = self._packer._order
        parts = [jnp.ravel(jnp.asarray(leaves[i])).astype(jnp.float32) for i in order]
        return jnp.concatenate(parts) - base

    def _unpacked(self, parts: Any) -> tuple[list[Any], Any]:
        layout = self._packer.layout
        flat = jnp.concatenate(parts)
        leaves: list[Any] = [None] * len(layout.leaves)
        for i, leaf, at in self._packer.places():
            part = flat[at : at + leaf.size].reshape(leaf.shape)
            leaves[i] = jnp.array(part, dtype=leaf.dtype)
        # From the leaves, not from `flat`: what rounding to their dtype loses is no progress of this worker.
        held = self._packed(leaves, jnp.float32(0))
        base = jnp.where(jnp.arange(layout.size) < layout.deltas, held, jnp.float32(0))
        return leaves, base

    def _merged(self, parts: Any, leaves: list[Any], pushed: Any) -> tuple[list[Any], Any]:
        packer = self._packer
        moved = self._packed(leaves, jnp.float32(0)) - pushed
        moved = jnp.where(
            jnp.arange(packer.layout.size) < packer.stats_begin(), moved, jnp.float32(0)
        )
        merged = jnp.concatenate(parts) + moved
        return self._unpacked([merged])[0], self._unpacked(parts)[1]


def _device_of(arrays: list[Any]) -> Any:
    for array in arrays:
        if isinstance(array, jax.Array):
            return next(iter(array.devices()))
    return None
