"""Compression of chunks: how a vector of float32 is encoded for the wire, and what is lost.

An update's deltas are encoded by the worker; what a round moves the model by is encoded by the parameter server, which
then moves its own model by exactly what was encoded: **a version is what its receivers decode**, so nothing drifts
apart, to the bit. Values (BatchNorm), the initial model and whole models for latecomers are never compressed.

Error bounds, for one element x of a chunk with largest magnitude M:

- `bf16`: rounds to nearest, off by at most |x| / 256 (8 significant bits; below 1e-38 by at most 1e-40).
- `int8`: 255 levels of M / 127; stochastic rounding (Alistarh et al. 2017, QSGD), so that the error is less than one
  level, M / 127, and zero on average.
- `topk`: the `topk` share of the chunk with the largest magnitudes, exactly; the rest is not lost but added to
  the next vector (error feedback; Stich et al. 2018).

Nothing here imports a framework: the parameter server uses this module too.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Protocol

import ml_dtypes
import numpy as np

from esync.messages import INITIAL, MessageError
from esync.tensors import DELTA, Layout, Vector

Payload = Any
"""An array of bytes to be sent."""

PLAIN = "f32"
"""The encoding of what is not compressed."""
BLOCK = 1 << 15
"""Elements that are worked on at a time: their temporaries stay in the cache."""
LEVELS = 127
TINY = 1e-37
"""A level below this counts as zero: its inverse is hardly a float32."""


class Encoding(Protocol):
    """How a vector of float32 becomes bytes, and back."""

    name: str
    feedback: bool
    """Whether what one vector lost is added to the next."""

    def size(self, elements: int) -> int:
        """Bytes of a vector of so many elements."""

    def growth(self, elements: int) -> float:
        """What encoding and decoding may multiply the L2 norm of a vector of so many elements by, at most; with
        feedback: of one of several whose norms have a common bound."""

    def encode(self, x: Vector, key: tuple[int, ...]) -> Payload:
        """The vector's bytes; `key` seeds what is random in them."""

    def decode(self, payload: memoryview, elements: int) -> Vector:
        """The vector in `payload`; only for a payload of the right `size`.

        Raises:
            MessageError: the payload is none that `encode` makes.
        """


class Plain:
    """float32, as it is; without a copy either way."""

    name, feedback = PLAIN, False

    def size(self, elements: int) -> int:
        return 4 * elements

    def growth(self, elements: int) -> float:
        return 1.0

    def encode(self, x: Vector, key: tuple[int, ...]) -> Payload:
        return x.view(np.uint8)

    def decode(self, payload: memoryview, elements: int) -> Vector:
        x = np.frombuffer(payload, np.float32)
        x.flags.writeable = False
        return x


class BFloat16:
    """The upper half of each float32, rounded to nearest, ties to even."""

    name, feedback = "bf16", False

    def size(self, elements: int) -> int:
        return 2 * elements

    def growth(self, elements: int) -> float:
        return 1 + 2**-8  # as each element

    def encode(self, x: Vector, key: tuple[int, ...]) -> Payload:
        return x.astype(ml_dtypes.bfloat16).view(np.uint8)

    def decode(self, payload: memoryview, elements: int) -> Vector:
        return np.frombuffer(payload, ml_dtypes.bfloat16).astype(np.float32)


class Int8:
    """One float32, the level, then one signed byte an element: `floor(x / level + u)`, u drawn from [0, 1).

    u has 256 values, in the middle of as many equal parts of [0, 1): a byte of random bits an element is what keeps
    this faster than the wire, and the error's mean is off zero by at most level / 512.
    """

    name, feedback = "int8", False

    def size(self, elements: int) -> int:
        return 4 + elements

    def growth(self, elements: int) -> float:
        """An element x between two levels is rounded to either with a variance of at most `level * |x|`, so the square
        of the norm N grows by `level * sum |x| <= (M / 127) * sqrt(n) * N` on average. M of the largest element, and s
        of the others: `M * s <= N**2 / 2`. A sixteenth is for chance: the sum's standard deviation is below N**2 / 127,
        and the mean is off by less than that.
        """
        return math.sqrt(1 + math.sqrt(elements) / (2 * LEVELS)) * (1 + 2**-4)

    def encode(self, x: Vector, key: tuple[int, ...]) -> Payload:
        level = np.float32(max(float(np.max(x)), -float(np.min(x))) / LEVELS)
        if level < TINY:
            return np.zeros(4 + x.size, np.int8)
        out = np.empty(4 + x.size, np.int8)
        out[:4] = np.frombuffer(level.tobytes(), np.int8)
        random = np.random.Generator(np.random.SFC64(list(key)))
        bits = np.frombuffer(random.bytes(x.size), np.uint8)
        inverse = np.float32(1.0) / level
        scaled, u = np.empty(BLOCK, np.float32), np.empty(BLOCK, np.float32)
        for at in range(0, x.size, BLOCK):
            part = x[at : at + BLOCK]
            a, b = scaled[: part.size], u[: part.size]
            np.multiply(part, inverse, out=a)
            np.multiply(bits[at : at + BLOCK], np.float32(1 / 256), out=b)
            b += np.float32(1 / 512)
            a += b
            np.floor(a, out=a)
            np.clip(a, -LEVELS, LEVELS, out=out[4 + at : 4 + at + part.size], casting="unsafe")
        return out

    def decode(self, payload: memoryview, elements: int) -> Vector:
        level = np.frombuffer(payload, np.float32, 1)[0]
        with np.errstate(over="ignore", invalid="ignore"):
            x: Vector = np.frombuffer(payload, np.int8, offset=4) * level
        return x


class TopK:
    """The k elements of the largest magnitude: k indices (uint32), then k values (float32).

    Args:
        share: k is this share of the elements, rounded up.
    """

    name, feedback = "topk", True

    def __init__(self, share: float) -> None:
        self.share = share

    def count(self, elements: int) -> int:
        """k of a vector."""
        return min(elements, math.ceil(self.share * elements))

    def size(self, elements: int) -> int:
        return 8 * self.count(elements)

    def growth(self, elements: int) -> float:
        """What is lost of a vector is at most q = sqrt(1 - share) times its norm, so the norms of vectors that are no
        longer than 1, with what was lost before, stay below 1 + q + q**2 + ... = 1 / (1 - q)."""
        return 1 / (1 - math.sqrt(1 - self.share))

    def encode(self, x: Vector, key: tuple[int, ...]) -> Payload:
        indices = _largest(np.abs(x), self.count(x.size)).astype(np.uint32)
        return np.concatenate([indices.view(np.uint8), x[indices].view(np.uint8)])

    def decode(self, payload: memoryview, elements: int) -> Vector:
        k = len(payload) // 8
        indices = np.frombuffer(payload, np.uint32, k)
        if k and int(np.max(indices)) >= elements:
            raise MessageError(
                "bad-index", f"element {np.max(indices)} of a chunk that has {elements} elements"
            )
        x = np.zeros(elements, np.float32)
        x[indices] = np.frombuffer(payload, np.float32, k, offset=4 * k)
        return x


def _largest(magnitudes: Vector, k: int) -> np.ndarray[Any, Any]:
    """The indices of the k largest. Most elements are passed over by a threshold that a sample suggests: five
    times faster than partitioning all of them."""
    sample = magnitudes[::37]
    above = max(1, int(1.3 * len(sample) * k / len(magnitudes)) + 8)
    if above < len(sample):
        threshold = np.partition(sample, len(sample) - above)[len(sample) - above]
        candidates = np.flatnonzero(magnitudes > threshold)
        if len(candidates) >= k:
            part = magnitudes[candidates]
            return np.sort(candidates[np.argpartition(part, len(part) - k)[len(part) - k :]])
    return np.sort(np.argpartition(magnitudes, len(magnitudes) - k)[len(magnitudes) - k :])


COMPRESSIONS: dict[str, Callable[[float], Encoding]] = {
    "none": lambda topk: Plain(),
    "bf16": lambda topk: BFloat16(),
    "int8": lambda topk: Int8(),
    "topk": lambda topk: TopK(topk) if topk < 0.5 else Plain(),
}
"""Name in `[run]` -> encoding of deltas, given the share that `topk` keeps: from a half on, all elements without
indices are fewer bytes. So no whole chunk becomes longer than it was, which frames have to be long enough for."""


def is_finite(x: Vector) -> bool:
    """Whether no element is NaN or infinite."""
    with np.errstate(over="ignore", invalid="ignore"):
        # einsum sums in one pass and without a temporary: NaN and infinity survive. Finite numbers may overflow.
        return math.isfinite(np.einsum("i->", x)) or bool(np.isfinite(x).all())


def squared_norm(x: Vector) -> float:
    """The square of the L2 norm, summed in float64."""
    total = 0.0
    for at in range(0, x.size, BLOCK):
        part = x[at : at + BLOCK].astype(np.float64)
        total += float(part @ part)
    return total


class Compressor:
    """One sender's encoder: which chunks are compressed, and what earlier ones lost.

    Args:
        encoding: of the chunks of deltas.
        seed: of this sender's random bits.
    """

    def __init__(self, encoding: Encoding, layout: Layout, seed: tuple[int, ...] = ()) -> None:
        self.encoding = encoding
        self._layout, self._seed = layout, seed
        self._plain = Plain()
        self._lost: dict[int, Vector] = {}

    @property
    def compresses(self) -> bool:
        """Whether any chunk becomes shorter."""
        return self.encoding.name != PLAIN

    def encode(self, chunk: int, x: Vector, round: int) -> tuple[str, Payload]:
        """(the encoding's name, the bytes to send) of a chunk of deltas or values.

        A vector that is not finite goes as it is, for the receiver to see and refuse.
        """
        encoding = self.encoding
        kind = self._layout.chunks[chunk].kind
        if not self.compresses or kind != DELTA or round == INITIAL:
            return PLAIN, self._plain.encode(x, ())
        if encoding.feedback and chunk in self._lost:
            x = x + self._lost[chunk]
        if not is_finite(x):
            return PLAIN, self._plain.encode(x, ())
        payload = encoding.encode(x, (*self._seed, round + 1, chunk))
        if encoding.feedback:
            self._lost[chunk] = x - encoding.decode(memoryview(payload), x.size)
        return encoding.name, payload

    def forget(self, chunk: int) -> None:
        """What a chunk lost is not to be made up for any more."""
        self._lost.pop(chunk, None)

    def lost(self) -> dict[int, Vector]:
        """What chunks lost and have not made up for yet."""
        return dict(self._lost)

    def load(self, lost: dict[int, Vector]) -> None:
        """Go on from what `lost` returned; it is given up if this encoding makes up for nothing."""
        self._lost = dict(lost) if self.encoding.feedback else {}

    def encoded_bytes(self) -> int:
        """Bytes of a whole model's chunks."""
        return sum(
            self.encoding.size(c.size) if c.kind == DELTA else 4 * c.size
            for c in self._layout.chunks
        )


class Decoder:
    """Decodes a sender's chunks; knows the run's encoding and the plain one.

    Args:
        encoding: the run's.
    """

    def __init__(self, encoding: Encoding, layout: Layout) -> None:
        self._encodings = {PLAIN: Plain(), encoding.name: encoding}
        self._layout = layout

    def decode(self, name: str, chunk: int, payload: memoryview) -> Vector:
        """The chunk's vector, read-only where it is not a new one.

        Raises:
            MessageError: an encoding that is not the run's, no such chunk, or a wrong length.
        """
        if name not in self._encodings:
            known = " or ".join(self._encodings)
            raise MessageError("bad-encoding", f"the encoding is {name!r:.40}, in this run {known}")
        if not 0 <= chunk < len(self._layout.chunks):
            raise MessageError("bad-chunk", f"there is no chunk {chunk}")
        about, encoding = self._layout.chunks[chunk], self._encodings[name]
        if name != PLAIN and about.kind != DELTA:
            raise MessageError("bad-encoding", f"chunk {chunk} holds values: they come as {PLAIN}")
        expected = encoding.size(about.size)
        if payload.nbytes != expected:
            raise MessageError(
                "bad-length",
                f"chunk {chunk} has {expected} bytes as {name}, this one {payload.nbytes}",
            )
        return encoding.decode(payload, about.size)
