"""A role's log as JSON lines: one object per event, with `t` (Unix seconds), `role`, `event` and its fields."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import IO, Any


class Journal:
    """Appends events to `path`; without a path it drops them.

    Every line is flushed, so that what a killed process did up to then can be read.
    """

    def __init__(self, path: str | Path | None, role: str) -> None:
        self.role = role
        self._file: IO[str] | None = None
        if path:
            Path(path).parent.mkdir(parents=True, exist_ok=True)
            self._file = open(path, "a", encoding="utf-8")  # noqa: SIM115 - lives as long as the role

    def write(self, event: str, **fields: Any) -> None:
        """One line; `fields` must be plain JSON values."""
        if self._file is not None:
            line = {"t": round(time.time(), 6), "role": self.role, "event": event, **fields}
            self._file.write(json.dumps(line) + "\n")
            self._file.flush()

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None
