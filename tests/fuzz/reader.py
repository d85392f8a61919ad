"""Bytes read as choices: numbers, values of any type, messages, so that a fuzzer which changes bytes changes those."""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import msgpack

from esync import messages
from esync.messages import PROTOCOL

T = TypeVar("T")
CLASSES: tuple[type, ...] = typing.get_args(messages.Message)
NUMBERS = (
    0,
    1,
    2,
    3,
    7,
    -1,
    -2,
    64,
    127,
    255,
    1 << 31,
    1 << 40,
    (1 << 53) - 1,
    1 << 53,
    (1 << 64) - 1,
)
FLOATS = (
    *(0.0, 1.0, -1.0, 0.5, 1e-3, 3.25, 100.0, 1e9, 1e300, -1e300, 5e-324, 1.7976931348623157e308),
    *(float("inf"), float("-inf"), float("nan")),
)
TEXTS = (
    *(
        "",
        "a",
        "b",
        "ps",
        "w/",
        "e/a",
        "../x",
        "a\0b",
        "\x1b[31m",
        "[/b]",
        "[link=x]",
        "ü\u202e",
        "%s{}",
    ),
    *("x" * 64, "x" * 65, "x" * 4096, "x" * 4097),
)


class Reader:
    """Takes choices off the front of `data`; when that is used up every choice is the first."""

    def __init__(self, data: bytes) -> None:
        self._data, self._at = data, 0

    @property
    def more(self) -> bool:
        """Whether there is anything left."""
        return self._at < len(self._data)

    def byte(self) -> int:
        self._at += 1
        return self._data[self._at - 1] if self._at <= len(self._data) else 0

    def bytes(self, most: int) -> bytes:
        """A few bytes: as many as the next one says, at most `most`."""
        count = min(self.byte(), most)
        self._at += count
        return self._data[self._at - count : self._at]

    def rest(self) -> bytes:
        """Everything left."""
        at, self._at = self._at, len(self._data)
        return self._data[at:]

    def chance(self, share: float) -> bool:
        """True for that share of the values of a byte, those at the end: not when nothing is left."""
        return self.byte() >= 256 * (1 - share)

    def pick(self, options: Sequence[T]) -> T:
        return options[self.byte() % len(options)]

    def number(self) -> int:
        return self.pick(NUMBERS) if self.chance(0.5) else self.byte() % 8 - 1

    def real(self) -> float:
        return self.pick(FLOATS) if self.chance(0.5) else self.byte() / 16

    def text(self) -> str:
        if self.chance(0.5):
            return self.pick(TEXTS)
        return self.bytes(16).decode("utf-8", "replace")

    def value(self, depth: int = 0) -> Any:
        """Anything that msgpack has."""
        kind = self.byte() % (10 if depth < 3 else 7)
        if kind == 7:
            return [self.value(depth + 1) for _ in range(self.byte() % 4)]
        if kind == 8:
            return {self.key(): self.value(depth + 1) for _ in range(self.byte() % 4)}
        if kind == 9:
            return self.deep() if self.chance(0.1) else [self.value(3)] * self.byte()
        made: tuple[Callable[[], Any], ...] = (
            lambda: None,
            self.number,
            self.real,
            self.text,
            lambda: self.byte() > 127,
            lambda: self.bytes(70),
            lambda: msgpack.ExtType(self.byte() % 128, self.bytes(8)),
        )
        return made[kind]()

    def key(self) -> Any:
        return self.bytes(4) if self.chance(0.1) else self.text()

    def deep(self) -> Any:
        """A value nested as deep as msgpack takes it, or nearly."""
        value: Any = 0
        for _ in range(self.pick((100, 400, 500, 510))):
            value = [value]
        return value

    def message(
        self, likely: Callable[[str, str], Sequence[Any]], classes: Sequence[type] = CLASSES
    ) -> bytes:
        """The frame of a message: mostly of likely values (a function of message type and field), some of the right
        type and some of none."""
        cls: Any = self.pick(classes)
        raw: dict[str, Any] = {"v": PROTOCOL, "msg_type": cls.TYPE}
        hints = typing.get_type_hints(cls)
        for field in dataclasses.fields(cls):
            luck = self.byte()
            options = likely(cls.TYPE, field.name)
            if luck < 200 and options:
                raw[field.name] = self.pick(options)
            elif luck < 225:
                continue
            elif luck < 250:
                raw[field.name] = self.of_type(str(hints[field.name]))
            else:
                raw[field.name] = self.value()
        return pack(raw)

    def of_type(self, hint: str) -> Any:
        if "dict" in hint:
            return {self.key(): self.value(1) for _ in range(self.byte() % 4)}
        if "list" in hint:
            return [self.value(1) for _ in range(self.byte() % 4)]
        for name, make in (("int", self.number), ("float", self.real), ("str", self.text)):
            if name in hint:
                return make()
        return self.byte() > 127 if "bool" in hint else self.bytes(70)


def pack(value: Any) -> bytes:
    """As msgpack; nothing where it is nested too deeply for that."""
    try:
        frame: bytes = msgpack.packb(value)
    except ValueError:
        return b""
    return frame
