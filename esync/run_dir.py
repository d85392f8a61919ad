"""Whose a run's directory is: the state server says in the file `endpoint` where it listens, and holds a lock on that
for as long as it lives, however it ends. Where there are no such locks nobody is kept out."""

from __future__ import annotations

from pathlib import Path
from typing import IO

from esync.errors import ConfigError

ENDPOINT = "endpoint"
"""The file's name."""


class Place:
    """A directory that is one's own until `close`.

    Raises:
        ConfigError: it is another process's.
    """

    def __init__(self, directory: Path) -> None:
        self._file = open(directory / ENDPOINT, "a", encoding="utf-8")  # noqa: SIM115
        if not _locked(self._file):
            self._file.close()
            raise ConfigError(f"{directory} is in use: the state server of another run has it")

    def say(self, endpoint: str) -> None:
        """Write down where the state server listens."""
        self._file.truncate(0)
        self._file.write(endpoint + "\n")
        self._file.flush()

    def close(self) -> None:
        """Let it go."""
        self._file.close()


def is_in_use(directory: Path) -> bool:
    """Whether the state server of a run in this directory lives, on this machine or (as a rule) on another."""
    try:
        with open(directory / ENDPOINT, "r+", encoding="utf-8") as file:
            return not _locked(file)
    except OSError:  # it has none
        return False


def check_free(directory: Path) -> None:
    """Raise ConfigError if it is in use."""
    if is_in_use(directory):
        raise ConfigError(f"{directory} is in use: the state server of a run in it is running")


def _locked(file: IO[str]) -> bool:
    """Lock a file, until it is closed; False if somebody else has."""
    try:
        import fcntl
    except ImportError:  # not a Unix
        return True
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # a file system that has no locks
        return True
    return True
