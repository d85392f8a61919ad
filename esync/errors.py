"""The errors that esync raises on purpose; each says what happened, where, and what to do."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class EsyncError(Exception):
    """Base of every error that a user can meet and mend."""


class ConfigError(EsyncError):
    """A configuration (file or flag) that cannot be run as it stands."""


class DataError(EsyncError):
    """A data set that is missing, damaged, or not what it says it is."""


class ModelError(EsyncError):
    """A model that is unknown, or does not fit the data or the run."""


class TransportError(EsyncError):
    """An endpoint that cannot be bound or reached."""


class KeysError(EsyncError):
    """Keys that are missing, damaged, or open to others."""


class DeviceError(EsyncError):
    """A device that was asked for and is not there."""


class ProtocolError(EsyncError):
    """A peer answered with an error; `code` is the machine-readable reason."""

    def __init__(self, code: str, text: str) -> None:
        super().__init__(text)
        self.code = code
        self.text = text


def unknown(kind: str, name: str, known: Iterable[str]) -> str:
    """A sentence for a name that is not in `known`, with the closest match first."""
    names = sorted(known)
    close = difflib.get_close_matches(name, names, n=1)
    hint = f" Did you mean {close[0]!r}?" if close else ""
    return f"unknown {kind} {name!r}.{hint} Known: {', '.join(names) or 'none'}."
