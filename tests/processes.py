"""Real processes in tests: started by their console commands, and killed in the end."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from esync import threads

ROOT = Path(__file__).parent.parent
ENVIRONMENT = {
    **os.environ,
    "JAX_PLATFORMS": "cpu",
    **threads.variables(1),
    "PYTHONUNBUFFERED": "1",
}
QUICK = ["--dataset", "digits", "--batch-size", "16", "--lr", "0.1"]


class Processes:
    """Starts console commands; whatever still runs at the end of the test is killed."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.started: list[subprocess.Popen[bytes]] = []

    def start(self, name: str, module: str, *arguments: str) -> subprocess.Popen[bytes]:
        with open(self.directory / f"{name}.out", "ab") as out:
            process = subprocess.Popen(
                [sys.executable, "-m", module, *arguments],
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.STDOUT,
                env=ENVIRONMENT,
                cwd=ROOT,
            )
        self.started.append(process)
        return process

    def output(self, name: str) -> str:
        return (self.directory / f"{name}.out").read_text()

    def wait_for(self, name: str, text: str, timeout_s: float = 60.0) -> re.Match[str]:
        """Wait until a process has printed something."""
        return self.until(
            lambda: re.search(text, self.output(name)), f"{text!r} of {name}", timeout_s
        )

    def until(self, condition: Callable[[], Any], what: str, timeout_s: float = 60.0) -> Any:
        deadline = time.monotonic() + timeout_s
        while True:
            value = condition()
            if value:
                return value
            if time.monotonic() > deadline:
                outputs = {p.name: p.read_text()[-2000:] for p in self.directory.glob("*.out")}
                raise AssertionError(f"waited {timeout_s} s for {what}; outputs: {outputs}")
            time.sleep(0.05)

    def kill_all(self) -> None:
        for process in self.started:
            if process.poll() is None:
                process.kill()
            process.wait()
