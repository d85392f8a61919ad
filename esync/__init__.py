"""esync: train one model on machines of very different speed, together, with nobody waiting for the slowest.

`esync.Worker` is what a training loop needs; the servers are `esync.state.server.StateServer` and
`esync.ps.server.ParameterServer`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from esync.errors import EsyncError
from esync.version import VERSION as __version__

if TYPE_CHECKING:
    from esync.worker.client import Worker

__all__ = ["EsyncError", "Worker", "__version__"]


def __getattr__(name: str) -> Any:
    """`Worker` is imported when it is first used: the servers need no JAX."""
    if name == "Worker":
        from esync.worker.client import Worker

        return Worker
    raise AttributeError(f"module 'esync' has no attribute {name!r}")
