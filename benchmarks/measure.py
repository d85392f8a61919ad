"""What the benchmarks share: server processes that never outlive them, and where the figures come from."""

from __future__ import annotations

import multiprocessing
import os
import platform
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import metadata
from multiprocessing.connection import Connection
from typing import Any

import zmq


@contextmanager
def process(serve: Callable[..., None], *args: Any) -> Iterator[Any]:
    """Run `serve(ready, *args)` in a process of its own; gives what it passes to `ready`.

    The process ends with the block, and also if this one is killed: it watches a pipe between the two.

    Raises:
        RuntimeError: it ended, or took more than 30 seconds, before it was ready.
    """
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    child = context.Process(target=_serve, args=(theirs, serve, *args), daemon=True)
    child.start()
    theirs.close()
    try:
        try:
            if not ours.poll(30):
                raise EOFError
            first = ours.recv()
        except EOFError:
            raise RuntimeError(f"{serve.__name__} did not start; see its error above") from None
        yield first
    finally:
        ours.close()
        child.join(5)
        if child.is_alive():
            child.kill()
            child.join()


def _serve(pipe: Connection, serve: Callable[..., None], *args: Any) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    threading.Thread(target=_end_with, args=(pipe,), daemon=True).start()
    serve(pipe.send, *args)


def _end_with(pipe: Connection) -> None:
    try:
        pipe.recv()
    except (EOFError, OSError):
        pass
    os._exit(0)


def environment() -> dict[str, Any]:
    """Versions and cores: without them a figure says nothing."""
    return {
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "cores": len(os.sched_getaffinity(0)),
        "libzmq": zmq.zmq_version(),
        **{
            name: _version(name) for name in ("esync", "pyzmq", "msgpack", "uvloop", "cryptography")
        },
    }


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None
