"""A process of another system: it talks with the benchmark in lines of JSON and never outlives it.

This and the other files of this folder run in the environment of that system, where esync is not installed:
they import the standard library and that system alone. The folder is one of its own because a script's folder
comes first where Python looks for modules, and benchmarks/hivemind.py is not the package hivemind.
"""

from __future__ import annotations

import json
import os
import platform
import signal
import threading
from importlib import metadata
from pathlib import Path
from queue import SimpleQueue
from typing import Any

Message = dict[str, Any]
TICKS = os.sysconf("SC_CLK_TCK")


class Script:
    """The benchmark that started this process: what it says comes on stdin, the answers go to stdout.

    Whatever else is printed goes to stderr. When stdin ends, so does this process, and with it the processes
    that it has started.
    """

    def __init__(self) -> None:
        # Not sys.stdin: forked processes close that one, and would wait for the thread that reads it.
        self._lines = os.fdopen(os.dup(0))
        self._answers = os.fdopen(os.dup(1), "w", buffering=1)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.dup2(2, 1)
        self._said: SimpleQueue[Message] = SimpleQueue()
        threading.Thread(target=self._listen, daemon=True).start()

    def hear(self) -> Message:
        """The next message, as long as it may take."""
        return self._said.get()

    def say(self, message: Message) -> None:
        self._answers.write(json.dumps(message) + "\n")

    def _listen(self) -> None:
        for line in self._lines:
            self._said.put(json.loads(line))
        if os.getpgrp() == os.getpid():
            os.killpg(0, signal.SIGKILL)
        os._exit(0)


def usage() -> Message:
    """Memory and processor time so far of this process and those that it has started.

    `peak_mb` adds up the most that each process had resident: pages that several processes share count for each.
    `pss_mb` is what is resident now, each shared page divided among those that share it. `cpu_s` leaves out
    processes that have ended.
    """
    processes = _processes()
    return {
        "peak_mb": sum(_kib(at / "status", "VmHWM") for at in processes) * 1024 / 1e6,
        "pss_mb": sum(_kib(at / "smaps_rollup", "Pss") for at in processes) * 1024 / 1e6,
        "cpu_s": sum(_cpu_s(at) for at in processes),
        "processes": len(processes),
    }


def cpu_s() -> float:
    """As `usage` has it, and quick to take."""
    return sum(_cpu_s(at) for at in _processes())


def _processes() -> list[Path]:
    return [at for at in Path("/proc").iterdir() if at.name.isdigit() and _is_ours(at)]


def _is_ours(at: Path) -> bool:
    try:
        return os.getpgid(int(at.name)) == os.getpgrp()
    except ProcessLookupError:
        return False


def _kib(file: Path, key: str) -> int:
    try:
        lines = file.read_text().splitlines()
    except OSError:
        return 0  # it has just ended
    return next((int(line.split()[1]) for line in lines if line.startswith(key + ":")), 0)


def _cpu_s(at: Path) -> float:
    try:
        fields = (at / "stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0.0
    return (int(fields[11]) + int(fields[12])) / TICKS


def loopback_bytes() -> int:
    """Bytes that this machine has sent to itself since it started, headers and everybody's traffic included."""
    for line in Path("/proc/net/dev").read_text().splitlines():
        name, _, counters = line.partition(":")
        if name.strip() == "lo":
            return int(counters.split()[8])
    raise RuntimeError("/proc/net/dev names no interface lo: bring the loopback interface up")


def versions(*packages: str) -> dict[str, str]:
    """Of Python and of these packages, in this environment."""
    return {"python": platform.python_version(), **{p: metadata.version(p) for p in packages}}
