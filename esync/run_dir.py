"""A run's directory, and whose it is.

The state server says in the file `endpoint` where it listens, and holds a lock on the file
`lock`, with its process's number in it, for as long as it lives, however it ends. Where there are no such locks nobody
is kept out."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import IO

from esync.errors import ConfigError

ENDPOINT, LOCK, CONFIG = "endpoint", "lock", "cluster.toml"
"""The files' names."""
LEFT = ("*.log", ENDPOINT, LOCK)
"""What a run leaves that did not start."""
LEFT_UNTRAINED = (*LEFT, "*.jsonl", CONFIG, "state.json", "summary.json", "checkpoints")
"""What one leaves that ended before anything was trained."""


def make_directory(path: str | None) -> Path | None:
    """Make the run's directory.

    Raises:
        ConfigError: it cannot be made.
    """
    if path is None:
        return None
    try:
        Path(path).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"cannot make the directory {path}: {error.strerror}") from error
    return Path(path)


def results_directory(file: str, name: str | None, runs: str, mode: str, force: bool) -> Path:
    """Make the run's directory, with a cluster.toml by which it is taken; a name that was not given is made unique.

    Raises:
        ConfigError: there are results in it already, or it cannot be made.
    """
    base = name if name is not None else f"{Path(file).stem}-{mode}"
    if base in ("", ".", "..") or Path(base).name != base:
        raise ConfigError(
            f"--name {base!r}: expected the name of one directory; --runs says where it goes"
        )
    path, number = Path(runs) / base, 2
    while not _took(path, force):
        if name is not None:
            raise ConfigError(f"{path} has results already; choose another --name, or --force")
        path, number = Path(runs) / f"{base}-{number}", number + 1
    return path


def _took(path: Path, force: bool) -> bool:
    """Take a directory for a new run; False if there are results of another in it."""
    if path.exists() and any(path.iterdir()):
        if not _is_blank(path):
            if not force:
                return False
            check_free(path)
            if path.is_symlink() or not (path / CONFIG).is_file():
                raise ConfigError(
                    f"{path} does not look like a run; remove it yourself, or choose another --name"
                )
        shutil.rmtree(path)
    make_directory(str(path))
    try:
        (path / CONFIG).touch(exist_ok=False)
    except FileExistsError:  # another run took it at the same time
        return False
    except OSError as error:
        raise ConfigError(f"cannot write to {path}: {error.strerror}") from error
    return True


def _is_blank(directory: Path) -> bool:
    """Whether nothing came of the run in that directory, and there is nothing else in it."""
    if directory.is_symlink() or is_in_use(directory):
        return False
    names = list(directory.iterdir())
    if all(any(path.match(kind) for kind in LEFT) for path in names):
        return True
    try:
        summary = json.loads((directory / "summary.json").read_text(encoding="utf-8"))
        untrained = summary["rounds"] == 0
    except (OSError, ValueError, KeyError, TypeError):
        return False
    return untrained and all(any(path.match(kind) for kind in LEFT_UNTRAINED) for path in names)


class Place:
    """A directory that is one's own until `close`.

    Raises:
        ConfigError: it is another process's.
    """

    def __init__(self, directory: Path, pid: int) -> None:
        self._file = open(directory / LOCK, "a", encoding="utf-8")  # noqa: SIM115
        if not _locked(self._file):
            self._file.close()
            raise ConfigError(f"{directory} is in use: the state server of another run has it")
        self._file.truncate(0)
        self._file.write(f"{pid}\n")
        self._file.flush()
        self.directory = directory

    def say(self, endpoint: str) -> None:
        """Write down where the state server listens."""
        (self.directory / ENDPOINT).write_text(endpoint + "\n", encoding="utf-8")

    def close(self) -> None:
        """Let it go."""
        self._file.close()


def endpoint_of(directory: Path, pid: int) -> str:
    """Where the state server of that process listens; empty: it does not yet, or has not the directory."""
    try:
        if (directory / LOCK).read_text(encoding="utf-8").strip() == str(pid):
            return (directory / ENDPOINT).read_text(encoding="utf-8").strip()
    except OSError:
        pass
    return ""


def is_in_use(directory: Path) -> bool:
    """Whether the state server of a run in this directory lives, on this machine or (as a rule) on another."""
    try:
        with open(directory / LOCK, "r+", encoding="utf-8") as file:
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
