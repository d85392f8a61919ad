"""Faults that come again and again are said once, and then how often: a log that repeats itself is not read."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any

AGAIN = 10
"""A fault is said at its first time, at its tenth, and whenever that has doubled."""
REMEMBERED = 1000
"""Faults that are told apart; what others cause, since ids can be made up, is counted together."""
OTHERS = "others"


@dataclass(slots=True)
class _Fault:
    times: int = 0
    said: int = 0  # how often it had come when that was said
    due: int = 1
    level: int = logging.WARNING
    text: str = ""


class FaultLog:
    """The faults of one server or worker, told apart by whose they are and by their reason. For one thread.

    Args:
        log: where they are said.
    """

    def __init__(self, log: logging.Logger) -> None:
        self._log = log
        self._faults: dict[tuple[str, str], _Fault] = {}

    def say(
        self,
        peer: str | bytes,
        reason: str,
        text: str,
        *,
        level: int = logging.WARNING,
        exc_info: Any = None,
    ) -> None:
        """Something went wrong once more.

        Args:
            peer: whose fault it is.
            reason: one of few words; what may differ from time to time is in the text.
        """
        key = name_of(peer), reason
        if key not in self._faults and len(self._faults) >= REMEMBERED:
            known = (OTHERS, reason) in self._faults or len(self._faults) < 2 * REMEMBERED
            key = OTHERS, reason if known else OTHERS
        fault = self._faults.setdefault(key, _Fault())
        fault.times += 1
        fault.level, fault.text = level, text if text.isprintable() else repr(text)
        if fault.times >= fault.due:
            fault.due = max(AGAIN, 2 * fault.due)
            self._say(key[0], fault, exc_info)

    def over(self, peer: str | bytes, reason: str) -> None:
        """This fault is over: say how often it came, if that was not said, and take its next time for a first one."""
        if self._faults:
            name = name_of(peer)
            fault = self._faults.pop((name, reason), None)
            if fault is not None:
                self._rest(name, fault)

    def close(self) -> None:
        """The end: say how often what was said came after all."""
        for (name, _), fault in self._faults.items():
            self._rest(name, fault)
        self._faults.clear()

    def _rest(self, name: str, fault: _Fault) -> None:
        if fault.times > fault.said:
            self._say(name, fault, None)

    def _say(self, name: str, fault: _Fault, exc_info: Any) -> None:
        fault.said = fault.times
        often = f" ({fault.times} times so far)" if fault.times > 1 else ""
        self._log.log(fault.level, "%s: %s%s", name, fault.text, often, exc_info=exc_info)


def name_of(peer: str | bytes) -> str:
    """A peer's name for a log: short, on one line, whatever it calls itself."""
    text = peer.decode("utf-8", "replace") if isinstance(peer, bytes) else peer
    return text[:80] if text.isprintable() and text else repr(peer)[:80]
