"""Sealed messages of the data channel: AES-256-GCM under keys derived from one key of the run.

A run has a random key, which its members are told over encrypted connections. Every sender derives a key of its own
from it, by HKDF-SHA256 (RFC 5869) over its identity and a random life, and numbers what it seals under that key: the
number is the nonce (RFC 5116, section 3.2: a counter, under a key that nobody else encrypts with). A sealed message is

    format (1 byte), length of the identity (1), identity, life (16), number (4) | ciphertext, tag (16)

and its first part and the frames that it is *about* are authenticated with it. A life ends after 2^20 messages, and
the next one begins under a key of its own.

A seal says that a member of the run made this message, for these frames, and that nobody else has read it. It does
not say when: a message that is sent again opens again. That rounds, versions and incarnations are not taken twice is
the protocol's task.
"""

from __future__ import annotations

import secrets
import threading
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from esync.messages import MessageError

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer

KEY_BYTES = 32
TAG_BYTES = 16
LIFE_BYTES = 16
NUMBER_BYTES = 4
NONCE_BYTES = 12
FORMAT = 1
MAX_IDENTITY_BYTES = 255
MAX_OVERHEAD_BYTES = 2 + MAX_IDENTITY_BYTES + LIFE_BYTES + NUMBER_BYTES + TAG_BYTES
"""By how much a sealed message is longer than its payload, at most."""
MESSAGES_PER_LIFE = 1 << 20
"""Messages sealed under one key. In chunks of 4 MiB that is 2^38 blocks; the chance that GCM is told from a random
function by them is below 2^-52 (2^42 blocks in the largest chunks, and 2^-44)."""
TO_SERVER, TO_WORKERS = b"to the parameter server", b"to workers"
"""What every message of the data channel is about besides its frames."""
_INFO = b"esync seal 1 "
_INTO = hasattr(
    AESGCM, "encrypt_into"
)  # newer versions of cryptography write where they are told to


def new_key() -> bytes:
    """A key for a run."""
    return secrets.token_bytes(KEY_BYTES)


class Sealer:
    """Seals one sender's messages; safe to use from several threads.

    Args:
        run_key: the run's key, `KEY_BYTES` long.
        identity: the sender's id, at most 255 bytes of UTF-8.

    Raises:
        ValueError: one of the two has another length.
    """

    def __init__(self, run_key: bytes, identity: str) -> None:
        self._run_key = _checked(run_key)
        name = identity.encode()
        if len(name) > MAX_IDENTITY_BYTES:
            raise ValueError(
                f"the identity {identity!r:.80} has {len(name)} bytes, at most {MAX_IDENTITY_BYTES} fit"
            )
        self._name = bytes((FORMAT, len(name))) + name
        self._lock = threading.Lock()
        self._begin()

    def _begin(self) -> None:
        self._head = self._name + secrets.token_bytes(LIFE_BYTES)
        self._cipher = _subkey(self._run_key, self._head)
        self._number = 0

    def seal(self, payload: ReadableBuffer, *about: ReadableBuffer) -> memoryview:
        """`payload`, C-contiguous and perhaps empty, encrypted and authenticated together with the frames `about`.

        Those are copied and should be small. They travel beside the sealed message, in clear; what travels not at all,
        such as what the message is for, can be among them too.
        """
        with self._lock:
            if self._number == MESSAGES_PER_LIFE:
                self._begin()
            head, cipher, number = self._head, self._cipher, self._number
            self._number += 1
        prefix = head + number.to_bytes(NUMBER_BYTES, "big")
        data = _bytes_of(payload)
        sealed = np.empty(len(prefix) + len(data) + TAG_BYTES, np.uint8).data
        sealed[: len(prefix)] = prefix
        body = sealed[len(prefix) :]
        if _INTO:
            cipher.encrypt_into(_nonce(prefix), data, _authenticated(prefix, about), body)
        else:
            body[:] = cipher.encrypt(_nonce(prefix), data, _authenticated(prefix, about))
        return sealed


class Opener:
    """Opens what members of a run have sealed; safe to use from several threads.

    Args:
        run_key: the run's key, `KEY_BYTES` long.
        keep: senders' keys that are kept, those used last. A key is kept only once a message has opened under it.

    Raises:
        ValueError: the key has another length.
    """

    def __init__(self, run_key: bytes, *, keep: int = 1024) -> None:
        self._run_key = _checked(run_key)
        self._keep = keep
        self._lock = threading.Lock()
        self._ciphers: dict[bytes, AESGCM] = {}  # the one used last is last

    def open(self, sealed: ReadableBuffer, *about: ReadableBuffer) -> memoryview:
        """The payload of a sealed message, in memory of its own.

        Raises:
            MessageError: `bad-seal`: it was not sealed with this run's key, about these frames, or it was changed.
        """
        data = _bytes_of(sealed)
        prefix = _prefix_of(data)
        head = prefix[:-NUMBER_BYTES]
        with self._lock:
            cipher = self._ciphers.get(head)
        known = cipher is not None
        if cipher is None:
            cipher = _subkey(self._run_key, head)
        body = data[len(prefix) :]
        nonce, authenticated = _nonce(prefix), _authenticated(prefix, about)
        try:
            if _INTO:
                payload = np.empty(len(body) - TAG_BYTES, np.uint8).data
                cipher.decrypt_into(nonce, body, authenticated, payload)
            else:
                payload = memoryview(cipher.decrypt(nonce, body, authenticated))
        except InvalidTag as error:
            raise MessageError(
                "bad-seal",
                f"a message that says it is from {sender_of(data)!r} was not sealed with this run's key, "
                "or was changed on the way",
            ) from error
        self._used(head, cipher, known)
        return payload

    def _used(self, head: bytes, cipher: AESGCM, known: bool) -> None:
        with self._lock:
            if known and len(self._ciphers) < self._keep:
                return  # none is to be dropped yet: the order does not matter
            self._ciphers.pop(head, None)
            while len(self._ciphers) >= self._keep:
                del self._ciphers[next(iter(self._ciphers))]
            self._ciphers[head] = cipher


class Envelope:
    """The frames of a message of the data channel: a header, perhaps a payload, and with a key a seal on both.

    Sealed, a message always has a second frame, which authenticates the header too; without a key it is what it is.

    Args:
        run_key: empty for no seal.
        identity: of this process.

    Raises:
        MessageError: `bad-field`: that is no run's key. (It came in a message.)
    """

    def __init__(self, run_key: bytes, identity: str) -> None:
        if len(run_key) not in (0, KEY_BYTES):
            raise MessageError(
                "bad-field", f"a run's key has {KEY_BYTES} bytes, not {len(run_key)}"
            )
        self.key = run_key
        self._sealer = Sealer(run_key, identity) if run_key else None
        self._opener = Opener(run_key) if run_key else None

    @property
    def is_sealed(self) -> bool:
        return self._sealer is not None

    def pack(self, header: bytes, payload: Any = None, *about: ReadableBuffer) -> list[Any]:
        """The frames to send. `about`: what the receiver knows besides, such as the direction."""
        if self._sealer is not None:
            return [header, self._sealer.seal(b"" if payload is None else payload, header, *about)]
        return [header] if payload is None else [header, payload]

    def unpack(
        self, frames: Sequence[ReadableBuffer], *about: ReadableBuffer
    ) -> tuple[memoryview, list[memoryview], str]:
        """(header, the payload if there is one, who sealed it) of the frames that came.

        Raises:
            MessageError: `bad-seal`; or `bad-frames`: there are too few.
        """
        if self._opener is None:
            return memoryview(frames[0]), [memoryview(frame) for frame in frames[1:]], ""
        if len(frames) != 2:
            raise MessageError("bad-frames", f"a sealed message has 2 frames, not {len(frames)}")
        payload = self._opener.open(frames[1], frames[0], *about)
        return memoryview(frames[0]), [payload] if payload.nbytes else [], sender_of(frames[1])


def sender_of(sealed: ReadableBuffer) -> str:
    """Whose message it says it is; true, as far as members are honest, once it has been opened.

    Raises:
        MessageError: `bad-seal`: it is not a sealed message.
    """
    prefix = _prefix_of(_bytes_of(sealed))
    return prefix[2 : -LIFE_BYTES - NUMBER_BYTES].decode("utf-8", "replace")


def _checked(run_key: bytes) -> bytes:
    if len(run_key) != KEY_BYTES:
        raise ValueError(f"a run's key has {KEY_BYTES} bytes, this one {len(run_key)}")
    return bytes(run_key)


def _subkey(run_key: bytes, head: bytes) -> AESGCM:
    """The key of one life of one sender. (No salt: the run's key is random already, RFC 5869, section 3.1.)"""
    return AESGCM(HKDF(SHA256(), KEY_BYTES, salt=None, info=_INFO + head).derive(run_key))


def _bytes_of(buffer: ReadableBuffer) -> memoryview:
    view = memoryview(buffer)
    return view.cast("B") if view.nbytes else memoryview(b"")  # (a view of no elements has no cast)


def _prefix_of(data: memoryview) -> bytes:
    """The part of a sealed message that is in clear."""
    size = 2 + data[1] + LIFE_BYTES + NUMBER_BYTES if len(data) >= 2 else 0
    if not size or len(data) < size + TAG_BYTES or data[0] != FORMAT:
        raise MessageError("bad-seal", f"{len(data)} bytes that are not a sealed message")
    return bytes(data[:size])


def _nonce(prefix: bytes) -> bytes:
    return prefix[-NUMBER_BYTES:].rjust(NONCE_BYTES, b"\0")


def _authenticated(prefix: bytes, about: tuple[ReadableBuffer, ...]) -> bytes:
    """What is authenticated besides the payload; each part is preceded by its length, so that no two differ in where
    a frame ends alone."""
    parts = [prefix]
    for frame in about:
        part = bytes(frame)
        parts += (len(part).to_bytes(8, "big"), part)
    return b"".join(parts)
