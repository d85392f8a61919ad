"""CURVE keys: the servers' pair, a pair for each worker, and the list of those who are let in.

`esync-keys` makes a directory on the servers' machine:

    keys/server.key     secret: the key pair of the state server and of the parameter server
    keys/server.pub     its public half, which `esync-keys add` writes into new workers' files
    keys/NAME.key       secret: NAME's key pair and the servers' public key; the one file that NAME needs
    keys/allowed.toml   who may connect (name -> public key), and whose key was revoked (public key -> name)

Keys are written in Z85, 40 characters of ASCII, as ZeroMQ takes them. All files but `server.pub` are TOML.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import os
import re
import secrets
import threading
import tomllib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import tomli_w
import zmq

from esync.errors import KeysError, unknown

log = logging.getLogger("esync.keys")
SERVER = "server"
"""The name of the servers' own key pair. It may speak for every id."""
RESERVED = (SERVER, "state", "ps")
"""Names that are not a worker's."""
ALLOWED = "allowed.toml"
MAX_NAME = 48
"""Longest name of a key, in characters: an id made of it (`NAME-7`) has to fit into 64."""
REMEMBERED = 1000
"""Refused keys that are told apart; what others knock with is counted together."""
_Z85 = re.compile(r"[0-9a-zA-Z.\-:+=^!/*?&<>()\[\]{}@%$#]{40}")
_HEADER = "# Who may connect. Running servers read this file again when it changes.\n"
_numbers = itertools.count()


@dataclass(frozen=True)
class ClientKeys:
    """What a worker needs in order to connect: its own pair, and which servers it trusts."""

    name: str
    public: str
    secret: str = field(repr=False)
    server: str


@dataclass(frozen=True)
class ServerKeys:
    """What a server needs in order to be connected to: its pair, and who is let in."""

    public: str
    secret: str = field(repr=False)
    allowed: AllowList

    def client(self) -> ClientKeys:
        """The same pair for a socket that connects to another server of the run."""
        return ClientKeys(SERVER, self.public, self.secret, self.public)


class AllowList:
    """`allowed.toml`, read again whenever it has changed; the credentials provider of the ZAP authenticator.

    A revocation counts from the next connection on, and for messages that are checked with `name_of` from the next
    `refresh` on. While the file is missing or damaged, what it said before stays in force, and an error is logged.
    Safe to use from several threads.

    Args:
        path: the file.
        server: the servers' own public key, which is let in without being listed.

    Attributes:
        domain: the ZAP domain of sockets that let in whom this list names.
        refusals: refused connections.
        refused: the same by public key, for the first `REMEMBERED` of them.

    Raises:
        KeysError: the file is missing or damaged.
    """

    def __init__(self, path: str | Path, server: str) -> None:
        self.path = Path(path)
        self.domain = f"esync-{next(_numbers)}"
        self.refusals = 0
        self.refused: dict[str, int] = {}
        self._server = server
        self._lock = threading.Lock()
        self._stamp = _stamp(self.path)
        self._take(_Listed.read(self.path))

    def _take(self, listed: _Listed) -> None:
        self._listed = listed
        self._name_of = {key: name for name, key in listed.allowed.items()} | {self._server: SERVER}

    def refresh(self) -> None:
        """Read the file again if it has changed since it was last looked at."""
        with self._lock:
            stamp = _stamp(self.path)
            if stamp == self._stamp:
                return
            self._stamp = stamp
            try:
                self._take(_Listed.read(self.path))
            except KeysError as error:
                log.error("%s. What it said before stays in force", error)

    def name_of(self, public: str) -> str | None:
        """Whose key this is; None if it is not let in."""
        return self._name_of.get(public)

    def owner(self, worker: str) -> str | None:
        """Whose key speaks for the id `worker`: the one named like it, or like what comes before one of its hyphens.

        `old-1` belongs to the key `old-1` if there is one, else to `old`.
        """
        name, dash = worker, "-"
        while dash:
            if name in self._listed.allowed:
                return name
            name, dash, _ = name.rpartition("-")
        return None

    def callback(self, domain: str, key: bytes) -> bool:
        """Whether a connection with this public key is let in; called by the authenticator, in its thread."""
        try:
            self.refresh()
            public = key.decode("ascii")
            if public in self._name_of:
                return True
            self._count(public)
        except Exception:  # would end the authenticator, and with it all new connections
            log.exception("a key could not be checked, and was refused")
        return False

    def _count(self, public: str) -> None:
        with self._lock:
            self.refusals += 1
            if public in self.refused:
                self.refused[public] += 1
                return
            if len(self.refused) == REMEMBERED:
                return
            self.refused[public] = 1
        name = self._listed.revoked.get(public)
        whose = f"{public}, which is not in {self.path}"
        if name is not None:
            whose = f"{name!r}, which was revoked ({public})"
        log.warning("refused a connection with the key %s", whose)


@dataclass(frozen=True)
class _Listed:
    """The contents of `allowed.toml`."""

    allowed: dict[str, str]
    revoked: dict[str, str]

    @classmethod
    def read(cls, path: Path) -> _Listed:
        raw = _parse(path, _read(path))
        for key in raw:
            if key not in ("allowed", "revoked"):
                raise KeysError(f"{path}: " + unknown("table", key, ("allowed", "revoked")))
        allowed, revoked = raw.get("allowed", {}), raw.get("revoked", {})
        if not isinstance(allowed, dict) or not isinstance(revoked, dict):
            raise KeysError(f"{path}: expected tables, written [allowed] and [revoked]")
        for name, key in allowed.items():
            try:
                check_name(name)
            except KeysError as error:
                raise KeysError(f"{path}: {error}") from error
            _check_key(key, f"{path}: [allowed] {name}")
            if key in revoked:
                raise KeysError(f"{path}: the key of {name} is both allowed and revoked")
        if len(set(allowed.values())) < len(allowed):
            twice = [n for n, key in allowed.items() if list(allowed.values()).count(key) > 1]
            raise KeysError(f"{path}: {' and '.join(twice)} have the same key; each needs its own")
        return cls(allowed, {key: str(name) for key, name in revoked.items()})

    def write(self, path: Path) -> None:
        tables = {"allowed": self.allowed, "revoked": self.revoked}
        _replace(path, _HEADER + tomli_w.dumps(tables).strip() + "\n", mode=0o644)


def load_server(directory: str | Path) -> ServerKeys:
    """The servers' keys and their allow-list.

    Raises:
        KeysError: a file is missing, damaged, or, though secret, can be read by others.
    """
    directory = Path(directory)
    if not directory.is_dir():
        raise KeysError(
            f"{directory} is not a directory of keys; make one with: esync-keys init {directory}"
        )
    public, secret = _pair(directory / "server.key")
    return ServerKeys(public, secret, AllowList(directory / ALLOWED, public))


def load_client(path: str | Path) -> ClientKeys:
    """The keys of one worker: the file NAME.key; or, on the servers' machine, the directory with the servers' keys.

    Raises:
        KeysError: a file is missing, damaged, or, though secret, can be read by others.
    """
    path = Path(path)
    if path.is_dir():
        return load_server(path).client()
    if path.suffix == ".pub":
        raise KeysError(f"{path} is a public key; a worker's is in NAME.key, as esync-keys made it")
    public, secret = _pair(path)
    raw = _read_secret(path)
    name, server = raw.get("name"), raw.get("server")
    if not isinstance(name, str) or not isinstance(server, str):
        raise KeysError(
            f"{path} is not a worker's key file: it lacks a name or the servers' public key. "
            "Copy NAME.key, as esync-keys made it, from the servers' machine"
        )
    check_name(name)
    _check_key(server, f"{path}: server")
    return ClientKeys(name, public, secret, server)


def check_name(name: str) -> None:
    """Raise KeysError unless `name` can name a worker's key: it becomes a file, and the beginning of ids."""
    if not re.fullmatch(rf"[A-Za-z0-9][A-Za-z0-9_.@:+-]{{0,{MAX_NAME - 1}}}", name):
        raise KeysError(
            f"{name!r:.80} cannot name a key: 1 to {MAX_NAME} letters, digits or any of _ . @ : + -, "
            "the first a letter or digit"
        )
    if name in RESERVED:
        raise KeysError(f"{name!r} is the name of a server; choose another")


def make(directory: str | Path, names: Sequence[str], *, force: bool = False) -> list[Path]:
    """Make the servers' keys, a key for each name, and the list that lets them in; the workers' files.

    With `force` what an earlier call left there is replaced; its keys are worth nothing any more.

    Raises:
        KeysError: there are keys already, a name does not fit, or a file cannot be written.
    """
    directory = Path(directory)
    for name in names:
        check_name(name)
        if names.count(name) > 1:
            raise KeysError(f"two keys are named {name!r}; names must differ")
    paths = [directory / f"{name}.key" for name in names]
    ours = [directory / "server.key", directory / "server.pub", directory / ALLOWED]
    there = [path for path in (*ours, *paths) if os.path.lexists(path)]
    if there and not force:
        raise KeysError(
            f"{there[0]} is there already; esync-keys add NAME adds a worker, and --force makes all "
            "keys anew: then every worker needs its new file"
        )
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise KeysError(f"cannot make the directory {directory}: {error.strerror}") from error
    public, secret = _new_pair()
    head = "The key pair of the state server and the parameter server; for their machines only."
    _write_secret(ours[0], head, {"public": public, "secret": secret}, force)
    _replace(ours[1], public + "\n", mode=0o644)
    allowed = {
        name: _write_client(path, name, public, force)
        for name, path in zip(names, paths, strict=True)
    }
    _Listed(allowed, {}).write(ours[2])
    return paths


def add(directory: str | Path, name: str, *, force: bool = False) -> Path:
    """Make a key for `name` and let it in; the file for that worker.

    With `force` it takes the place of the key that `name` had, which is revoked.

    Raises:
        KeysError: there is such a key already, the name does not fit, or a file cannot be read or written.
    """
    directory = Path(directory)
    check_name(name)
    server = _read(directory / "server.pub").decode("ascii", "replace").strip()
    _check_key(server, str(directory / "server.pub"))
    listed = _Listed.read(directory / ALLOWED)
    path = directory / f"{name}.key"
    if name in listed.allowed and not force:
        raise KeysError(
            f"{directory / ALLOWED} has a key for {name!r} already; --force makes a new one and revokes that one"
        )
    public = _write_client(path, name, server, force)
    revoked = dict(listed.revoked)
    if name in listed.allowed:
        revoked[listed.allowed[name]] = name
    _Listed({**listed.allowed, name: public}, revoked).write(directory / ALLOWED)
    return path


def revoke(directory: str | Path, name: str) -> None:
    """Let the key of `name` in no more, and remove its file here.

    Raises:
        KeysError: there is no such key, or a file cannot be read or written.
    """
    directory = Path(directory)
    listed = _Listed.read(directory / ALLOWED)
    if name not in listed.allowed:
        raise KeysError(f"{directory / ALLOWED}: " + unknown("key", name, listed.allowed))
    allowed = dict(listed.allowed)
    revoked = {**listed.revoked, allowed.pop(name): name}
    _Listed(allowed, revoked).write(directory / ALLOWED)
    with contextlib.suppress(OSError):  # it may have been moved to the worker's machine
        (directory / f"{name}.key").unlink()


def listed(directory: str | Path) -> list[tuple[str, str, bool]]:
    """(name, public key, whether it is let in) of every key in the list, the revoked ones last.

    Raises:
        KeysError: the list is missing or damaged.
    """
    table = _Listed.read(Path(directory) / ALLOWED)
    rows = [(name, key, True) for name, key in table.allowed.items()]
    return rows + [(name, key, False) for key, name in table.revoked.items()]


def _new_pair() -> tuple[str, str]:
    if not zmq.has("curve"):
        raise KeysError("this libzmq was built without CURVE; install pyzmq from a wheel")
    public, secret = zmq.curve_keypair()
    return public.decode("ascii"), secret.decode("ascii")


def _write_client(path: Path, name: str, server: str, force: bool) -> str:
    """Write a new key file; its public key."""
    public, secret = _new_pair()
    head = f"The key of {name}: copy this file to its machine, and keep it secret (chmod 600)."
    fields = {"name": name, "public": public, "secret": secret, "server": server}
    _write_secret(path, head, fields, force)
    return public


def _write_secret(path: Path, head: str, fields: dict[str, str], force: bool) -> None:
    text = f"# {head}\n" + tomli_w.dumps(fields)
    if force:
        _replace(path, text, mode=0o600)
        return
    try:
        _create(path, text, 0o600)
    except FileExistsError as error:
        raise KeysError(f"{path} is there already; --force replaces it") from error
    except OSError as error:
        raise KeysError(f"cannot write {path}: {error.strerror}") from error


def _replace(path: Path, text: str, mode: int) -> None:
    """Write a file so that a reader sees the old one or the new one."""
    part = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    try:
        _create(part, text, mode)
        part.replace(path)
    except OSError as error:
        with contextlib.suppress(OSError):
            part.unlink()
        raise KeysError(f"cannot write {path}: {error.strerror}") from error


def _create(path: Path, text: str, mode: int) -> None:
    """Write a file that is not there yet; nobody else can read it before `mode` says so."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
    try:
        with open(descriptor, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
    except BaseException:
        path.unlink()
        raise


def _pair(path: Path) -> tuple[str, str]:
    """(public, secret) of a key file."""
    raw = _read_secret(path)
    keys = [raw.get("public"), raw.get("secret")]
    for what, key in zip(("public", "secret"), keys, strict=True):
        _check_key(key, f"{path}: {what}")
    public, secret = map(str, keys)
    if zmq.curve_public(secret.encode()).decode() != public:
        raise KeysError(f"{path}: the public key is not that of the secret key")
    return public, secret


def _read_secret(path: Path) -> dict[str, Any]:
    return _parse(path, _read(path, check=_check_mode))


def _check_mode(path: Path, mode: int) -> None:
    if mode & 0o077:
        raise KeysError(
            f"{path} holds a secret and is open to others (mode {mode & 0o777:o}): chmod 600 {path}"
        )


def _read(path: Path, check: Callable[[Path, int], None] = lambda path, mode: None) -> bytes:
    try:
        with open(path, "rb") as file:
            check(path, os.fstat(file.fileno()).st_mode)
            return file.read()
    except OSError as error:
        raise KeysError(
            f"cannot read {path}: {error.strerror}; keys are made with esync-keys"
        ) from error


def _parse(path: Path, text: bytes) -> dict[str, Any]:
    try:
        return tomllib.loads(text.decode("utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise KeysError(f"{path} is not valid TOML: {error}") from error


def _check_key(key: object, where: str) -> None:
    if not isinstance(key, str) or not _Z85.fullmatch(key):
        raise KeysError(f"{where}: expected a key, 40 characters in Z85")


def _stamp(path: Path) -> tuple[int, ...]:
    """Differs when the file does."""
    try:
        status = os.stat(path)
    except OSError:
        return ()
    return status.st_mtime_ns, status.st_size, status.st_ino
