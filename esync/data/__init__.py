"""The data sets that esync reads, by name. NumPy only: no process needs JAX to read its data."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from esync.data import cifar10, digits, fashion_mnist
from esync.data.dataset import Dataset
from esync.data.files import Say, say_on_stderr
from esync.errors import DataError, unknown

__all__ = ["Dataset", "find", "load", "names"]


class Reader(NamedTuple):
    """How one data set is read, and where from."""

    load: Callable[[str | Path | None, bool, Say], Dataset]
    find: Callable[[str | Path | None], Path | None]


_reading = threading.Lock()
# A new data set is one more line.
READERS = {
    cifar10.NAME: Reader(cifar10.load, cifar10.find),
    digits.NAME: Reader(digits.load, digits.find),
    fashion_mnist.NAME: Reader(fashion_mnist.load, fashion_mnist.find),
}


def names() -> list[str]:
    """The names that `load` knows, sorted."""
    return sorted(READERS)


def load(
    name: str,
    data_dir: str | Path | None = None,
    *,
    download: bool = True,
    say: Say = say_on_stderr,
) -> Dataset:
    """Read the data set `name` into memory.

    The search is that of `esync.data.files`. If `data_dir` is given, the files must be there (or
    in its subdirectory `name`). Otherwise, if they are nowhere and `download` is true, they are
    downloaded into the cache, with lines of progress to `say` (standard error by default).

    Threads read one after the other: NumPy parses the header of a .npz with `ast`, which in CPython 3.11 fails now and
    then with a SystemError if several threads do it at once (python/cpython#106905).

    Raises DataError, which says what to do, if the name is unknown, a file is missing, truncated
    or fails its checksum, or the download fails.
    """
    with _reading:
        return _reader(name).load(data_dir, download, say)


def find(name: str, data_dir: str | Path | None = None) -> Path | None:
    """Where `load` would read `name` from without downloading, or None if it would have to.

    Raises DataError if the name is unknown.
    """
    return _reader(name).find(data_dir)


def _reader(name: str) -> Reader:
    if name not in READERS:
        raise DataError(unknown("data set", name, READERS))
    return READERS[name]
