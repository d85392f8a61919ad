"""The wire: every message type with its fields, how it is encoded, and how it is checked on arrival.

A message is one frame of msgpack: a map with `v` (the protocol's version), `msg_type`, and the fields
of its type. The classes below are the only definition: their annotations are what `decode` checks.
`reset`, `report`, `query` and `response` are the four messages of the ESync paper.
"""

from __future__ import annotations

import dataclasses
import math
import re
import types
import typing
from dataclasses import dataclass
from typing import Any, ClassVar

import msgpack

from esync.errors import EsyncError
from esync.version import VERSION

PROTOCOL = 1
MAX_TEXT = 4096
"""Longest string in a message, in characters."""
MAX_BYTES = 64
"""Longest bytes in a message (tensors travel beside it)."""
MAX_ID = 64
"""Longest worker id, in characters."""
NO_SHARED_MEMORY = "no-shared-memory"
"""The code of an `error` after which an exchange goes over sockets."""
INITIAL = -1
"""The round of the update that brings the initial model."""


def check_worker_id(worker: str) -> None:
    """Ids become socket identities and subscription topics, so not every character will do.

    Raises:
        MessageError: it is not one.
    """
    if not re.fullmatch(r"[A-Za-z0-9_.@:+-]{1,64}", worker):
        raise MessageError(
            "bad-id",
            f"{worker!r:.80} cannot name a worker: 1 to {MAX_ID} letters, digits or any of _ . @ : + -",
        )


def peer_of(worker: str, life: str) -> str:
    """The identity of a worker or parameter server on the control channel. Of two processes with one name each has
    another, so neither takes the other's answers."""
    return f"{worker}\0{life}" if life else worker


def worker_of(peer: bytes) -> str:
    """Whose identity that is."""
    return peer.partition(b"\0")[0].decode("utf-8", "replace")


class MessageError(EsyncError):
    """A frame that is not a message: `code` is machine-readable, the text says what was wrong."""

    def __init__(self, code: str, text: str) -> None:
        super().__init__(text)
        self.code = code
        self.text = text


@dataclass(slots=True)
class Join:
    """Worker, evaluator or parameter server -> state server: register, or come back under the same id.

    A worker joins twice: first to be told the configuration, then with the `layout` of the model that
    it built from it, which says that it is able to take part.
    """

    TYPE: ClassVar[str] = "join"
    worker: str
    role: str
    version: str = VERSION
    rank: int | None = None
    host: str = ""
    device: str = ""
    layout: dict[str, Any] | None = None
    endpoints: dict[str, Any] | None = None
    life: str = ""  # random, one for each process: two live processes cannot share a name


@dataclass(slots=True)
class Welcome:
    """State server -> whoever joined: everything needed to take part."""

    TYPE: ClassVar[str] = "welcome"
    rank: int  # of a parameter server: which shard of the model is its
    shares: int
    config: dict[str, Any]
    endpoints: list[Any]  # of the parameter servers, in the order of their shards
    heartbeat_s: float
    version: str = VERSION
    key: bytes = b""  # by which the data channel is sealed (esync.seal); none: it is not


@dataclass(slots=True)
class Report:
    """Worker -> state server: status and progress; not answered.

    `compute_s` is the mean duration in seconds of the local steps finished since the last report or query
    (0: none finished), `totals` the worker's running totals (see `esync.worker.session.Totals`).
    """

    TYPE: ClassVar[str] = "report"
    worker: str
    round: int
    step: int
    phase: str
    compute_s: float = 0.0
    samples: int = 0
    loss: float | None = None
    accuracy: float | None = None
    totals: dict[str, Any] | None = None


@dataclass(slots=True)
class Query:
    """Worker -> state server: a report that wants an answer.

    `step` local steps of `round` are finished and `ahead` more (0 or 1) are already running, since `running_s`
    seconds.
    """

    TYPE: ClassVar[str] = "query"
    worker: str
    round: int
    step: int
    ahead: int = 0
    compute_s: float = 0.0
    samples: int = 0
    loss: float | None = None
    running_s: float = 0.0


@dataclass(slots=True)
class Response:
    """State server -> worker: what to do in `round`, counted from the `step` of the query.

    `train`: finish up to `step + lease` local steps, then have a new answer. `sync`: finish
    `step + lease` and synchronise. `stop`: the run is over; `round` is the final version. Of each hidden layer's
    units this round trains the share `width`.
    """

    TYPE: ClassVar[str] = "response"
    round: int
    step: int
    action: str
    lease: int = 0
    width: float = 1.0


@dataclass(slots=True)
class Reset:
    """Parameter server -> state server: version `round` of the model was published.

    `members` maps each worker whose update is in it to the seconds by which that update was earlier
    than this publication; `bytes_up` and `bytes_down` are running totals of tensor bytes.
    """

    TYPE: ClassVar[str] = "reset"
    worker: str
    round: int
    members: dict[str, Any]
    bytes_up: int = 0
    bytes_down: int = 0


@dataclass(slots=True)
class Lost:
    """Parameter server -> state server: the connection of the worker `peer` is gone. It may have died: if it is not
    heard of soon, it has."""

    TYPE: ClassVar[str] = "lost"
    worker: str
    peer: str


@dataclass(slots=True)
class Members:
    """State server -> parameter server: who is expected at the barrier (id -> rank). Sent back without workers
    once the parameter server goes by it: the run does not start before. `first` are the ids of those who are to be
    sent a new version before the others; after the version `last`, if one is named, none is made."""

    TYPE: ClassVar[str] = "members"
    epoch: int
    workers: dict[str, Any]
    layout: dict[str, Any] | None = None
    first: list[Any] = dataclasses.field(default_factory=list)
    last: int | None = None


@dataclass(slots=True)
class Leave:
    """Anyone -> state server: going away, and why. State server -> parameter server: the run is over."""

    TYPE: ClassVar[str] = "leave"
    worker: str
    reason: str = ""


@dataclass(slots=True)
class Status:
    """Anyone -> state server: show the table. The answer carries it in `table`; a joining role that has to
    wait is told in `waiting_for` what it waits for."""

    TYPE: ClassVar[str] = "status"
    table: dict[str, Any] | None = None
    waiting_for: str = ""


@dataclass(slots=True)
class Error:
    """Answer to a message that was refused."""

    TYPE: ClassVar[str] = "error"
    code: str
    text: str


@dataclass(slots=True)
class Update:
    """Worker -> parameter server, followed by one chunk of tensor data as a second frame, unless that lies in this
    `slot` of the memory that the worker offered.

    `round` is the version of the model that the update was computed from, or `INITIAL`.
    """

    TYPE: ClassVar[str] = "update"
    worker: str
    round: int
    chunk: int
    digest: str
    steps: int = 1
    samples: int = 1
    encoding: str = "f32"
    incarnation: str = ""
    slot: int = -1


@dataclass(slots=True)
class Fetch:
    """Worker -> parameter server: send me the model, if it is newer than `round`.

    `missing` names the chunks wanted of version `version` (empty: all of the latest); `pushed` is the round of
    the own update whose effect is awaited (-1: none).
    """

    TYPE: ClassVar[str] = "fetch"
    worker: str
    round: int
    pushed: int = -1
    version: int = -1
    missing: list[Any] = dataclasses.field(default_factory=list)
    evaluator: bool = False  # that is who asks


@dataclass(slots=True)
class Have:
    """Worker -> parameter server: everything up to this chunk of this version has arrived, and where `whole` is true
    the version is. It goes by a connection of its own: no update is in its way."""

    TYPE: ClassVar[str] = "have"
    worker: str
    version: int
    chunk: int
    whole: bool = False
    evaluator: bool = False  # that is who has it


@dataclass(slots=True)
class Offer:
    """Worker -> parameter server, and back: memory that a process of the same machine can map (see
    `esync.shared_memory`).

    `boot` says which machine, since its last start, that is; `pid` and `fd` whose memory, under which descriptor;
    `token` what it begins with, since process ids mean something else in another container. Where a `device` is given
    (its UUID) the chunks lie in memory of that, with this `handle` and so many bytes (see `esync.device_memory`), and
    what is mapped has their stamps only.
    """

    TYPE: ClassVar[str] = "offer"
    worker: str
    boot: str
    pid: int
    fd: int
    token: str
    incarnation: str
    device: str = ""
    handle: bytes = b""
    size: int = 0


@dataclass(slots=True)
class Model:
    """Parameter server -> workers, followed by one chunk of tensor data: of the model itself, or (`base` >= 0) the
    difference from version `base`. Where `slot` is given the chunk lies in the memory that the server offered."""

    TYPE: ClassVar[str] = "model"
    incarnation: str
    version: int
    chunk: int
    digest: str
    encoding: str = "f32"
    base: int = -1
    slot: int = -1


@dataclass(slots=True)
class Want:
    """Parameter server -> one worker: push these chunks of your update of `round` (again); -1 asks for
    the initial model."""

    TYPE: ClassVar[str] = "want"
    round: int
    chunks: list[Any]
    incarnation: str = ""


Message = (
    Join
    | Welcome
    | Report
    | Query
    | Response
    | Reset
    | Lost
    | Members
    | Leave
    | Status
    | Error
    | Update
    | Fetch
    | Have
    | Offer
    | Model
    | Want
)

_MISSING: Any = object()
_ACCEPTS: dict[Any, tuple[type, ...]] = {
    int: (int,),
    float: (float, int),
    bool: (bool,),
    str: (str,),
    bytes: (bytes,),
    dict: (dict,),
    list: (list,),
    types.NoneType: (types.NoneType,),
}


def _fields_of(cls: type) -> list[tuple[str, tuple[type, ...], Any, Any]]:
    """(name, accepted types, default, default factory) of every field, read off the annotations."""
    hints = typing.get_type_hints(cls)
    rows = []
    for field in dataclasses.fields(cls):
        hint = hints[field.name]
        options = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
        accepted: tuple[type, ...] = ()
        for option in options:
            accepted += _ACCEPTS[typing.get_origin(option) or option]
        default = _MISSING if field.default is dataclasses.MISSING else field.default
        factory = None if field.default_factory is dataclasses.MISSING else field.default_factory
        rows.append((field.name, accepted, default, factory))
    return rows


_CLASSES: dict[str, type] = {cls.TYPE: cls for cls in typing.get_args(Message)}
_FIELDS = {name: _fields_of(cls) for name, cls in _CLASSES.items()}
_NAMES = {cls: tuple(row[0] for row in _FIELDS[name]) for name, cls in _CLASSES.items()}


def encode(message: Message) -> bytes:
    """The frame for `message`; fields that are None are left out."""
    raw: dict[str, Any] = {"v": PROTOCOL, "msg_type": message.TYPE}
    for name in _NAMES[type(message)]:
        value = getattr(message, name)
        if value is not None:
            raw[name] = value
    frame: bytes = msgpack.packb(raw)
    return frame


def decode(frame: bytes | memoryview) -> Message:
    """The message in `frame`.

    Raises:
        MessageError: whatever is wrong with it; nothing else is ever raised, for any bytes.
    """
    try:
        raw = msgpack.unpackb(frame)
    except Exception as error:
        raise MessageError("not-msgpack", f"the frame is not msgpack: {_brief(error)}") from error
    if type(raw) is not dict:
        raise MessageError("not-a-map", f"a message is a map, this is a {type(raw).__name__}")
    if raw.get("v") != PROTOCOL or type(raw["v"]) is not int:
        raise MessageError(
            "version-mismatch",
            f"this side speaks protocol {PROTOCOL} (esync {VERSION}), the message has "
            f"v={_brief(raw.get('v'))}; run the same esync version everywhere",
        )
    kind = raw.get("msg_type")
    if type(kind) is not str or kind not in _FIELDS:
        raise MessageError("unknown-type", f"unknown msg_type {_brief(kind)}")
    values = []
    for name, accepted, default, factory in _FIELDS[kind]:
        value = raw.get(name, _MISSING)
        if value is _MISSING:
            value = factory() if factory is not None else default
            if value is _MISSING:
                raise MessageError("missing-field", f"{kind}: the field {name!r} is missing")
        elif type(value) not in accepted:
            raise MessageError(
                "bad-field", f"{kind}.{name}: expected {_say(accepted)}, got {_brief(value)}"
            )
        elif type(value) is float:
            if not math.isfinite(value):
                raise MessageError("bad-field", f"{kind}.{name}: {value} is not finite")
        elif type(value) is int:
            if not -1 <= value < 2**53:
                raise MessageError("bad-field", f"{kind}.{name}: {value} is out of range")
        elif type(value) is dict and not all(type(key) is str for key in value):
            raise MessageError("bad-field", f"{kind}.{name}: a map's keys are text")
        elif type(value) is bytes and len(value) > MAX_BYTES:
            raise MessageError("bad-field", f"{kind}.{name}: {len(value)} bytes are too many")
        elif type(value) is str and (
            len(value) > MAX_TEXT or (name == "worker" and not 0 < len(value) <= MAX_ID)
        ):
            raise MessageError(
                "bad-field", f"{kind}.{name}: a length of {len(value)} is out of range"
            )
        values.append(value)
    message: Message = _CLASSES[kind](*values)
    return message


def _brief(value: object) -> str:
    """A value as a few characters, whatever it is."""
    try:
        return repr(value)[:80]
    except RecursionError:
        return "something deeply nested"


def _say(accepted: tuple[type, ...]) -> str:
    return " or ".join(dict.fromkeys(t.__name__ for t in accepted))
