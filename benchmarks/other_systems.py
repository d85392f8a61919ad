"""What the benchmarks of other systems share: an environment for each, its processes, options and results.

A system is installed from public packages into an environment of its own in this clone, and used again the next
time. Its processes run there (their side of the talk is `inside/role.py`); this one runs where esync is.
"""

from __future__ import annotations

import json
import os
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from types import TracebackType
from typing import Any, NoReturn

import click
import measure
from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).resolve().parents[1]
INSIDE = Path(__file__).resolve().with_name("inside")
HOST = "127.0.0.1"
MB = 1_000_000
TOLERANCE = 1e-5
"""How far a mean of numbers around one may be off in float32."""

Message = dict[str, Any]


@dataclass(frozen=True)
class System:
    """Another system: its name, its packages as pip takes them, and what its processes find in their environment."""

    name: str
    packages: tuple[str, ...]
    variables: tuple[tuple[str, str], ...] = ()
    advice: str = ""
    """What to do when it cannot be installed."""


@dataclass(frozen=True)
class Exchange:
    """What is measured: so many workers, each with a float32 vector of so many MB (10^6 bytes), so many times.

    One more exchange comes first and does not count.
    """

    workers: int
    mb: float
    rounds: int

    @property
    def size(self) -> int:
        """Numbers in a vector."""
        return max(1, round(self.mb * MB / 4))


# The environment


def environment(system: System) -> Path:
    """The Python of this system's environment, which is made if it is not there or holds other packages.

    Raises:
        click.ClickException: a package could not be installed.
    """
    place = ROOT / f".venv-{system.name}"
    python = place / "bin" / "python"
    mark = place / "installed.txt"
    wanted = "\n".join(system.packages) + "\n"
    if python.exists() and mark.exists() and mark.read_text() == wanted:
        return python
    click.echo(
        f"Installing {', '.join(system.packages)} with pip into {place.name}; this is done once."
    )
    shutil.rmtree(place, ignore_errors=True)
    _install(system, [sys.executable, "-m", "venv", str(place)])
    _install(system, [str(python), "-m", "pip", "install", "--no-input", "-q", *system.packages])
    mark.write_text(wanted)
    return python


def _install(system: System, command: list[str]) -> None:
    done = subprocess.run(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    if done.returncode:
        said = [line for line in done.stdout.splitlines() if "WARNING" not in line]
        raise click.ClickException(
            f"could not install {' and '.join(system.packages)}, which this benchmark measures:"
            f" python {' '.join(command[1:4])} ended with {done.returncode} and said:\n"
            + "\n".join(f"  {line}" for line in said[-12:])
            + f"\n{system.advice or 'See that pip reaches a package index'}; then start this again."
        )


# Its processes


class Role:
    """A process of the other system, with the processes that it starts, all in a process group of their own.

    It runs a file of inside/, which is told `config` first. What it prints is kept, and shown if it fails.
    """

    def __init__(
        self, name: str, python: Path, file: str, variables: dict[str, str], config: Message
    ) -> None:
        self.name = name
        self._printed = tempfile.TemporaryFile("w+")  # noqa: SIM115
        self._rest = b""
        inherited = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONHOME")}
        self.process = subprocess.Popen(
            [str(python), str(INSIDE / file)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._printed,
            env=inherited | variables,
            start_new_session=True,
        )
        self.say(config)

    def say(self, message: Message) -> None:
        """Send it a message."""
        assert self.process.stdin
        try:
            self.process.stdin.write(json.dumps(message).encode() + b"\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            self.fail("ended before it was done")

    def heard(self, timeout_s: float) -> Message | None:
        """Its next message; None if that has not come after so long.

        Raises:
            click.ClickException: it ended.
        """
        assert self.process.stdout
        deadline = time.monotonic() + timeout_s
        while b"\n" not in self._rest:
            left_s = max(0.0, deadline - time.monotonic())
            if not select.select([self.process.stdout], [], [], left_s)[0]:
                return None
            came = os.read(self.process.stdout.fileno(), 65536)
            if not came:
                self.fail("ended before it was done")
            self._rest += came
        line, _, self._rest = self._rest.partition(b"\n")
        message: Message = json.loads(line)
        return message

    def running(self) -> bool:
        return self.process.poll() is None

    def fail(self, what: str) -> NoReturn:
        """Give up, with the last that it printed.

        Raises:
            click.ClickException: always.
        """
        with suppress(subprocess.TimeoutExpired):
            self.process.wait(0.5)
        code = "" if self.running() else f" (exit code {self.process.returncode})"
        self._printed.seek(0)
        last = self._printed.read().splitlines()[-25:]
        raise click.ClickException(
            f"{self.name} {what}{code}, where an answer was expected; its last lines should say why:\n"
            + "\n".join(f"  {line}" for line in last or ["(none)"])
        )

    def hang_up(self) -> None:
        """Close its stdin, at which it ends itself and all that it has started."""
        assert self.process.stdin
        with suppress(BrokenPipeError):
            self.process.stdin.close()

    def end(self) -> None:
        """Wait for that, and make sure of it."""
        with suppress(subprocess.TimeoutExpired):
            self.process.wait(5)
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        self._printed.close()


class Roles:
    """The processes of one measurement; all of them end with the block, however it ends."""

    def __init__(self, system: System, python: Path) -> None:
        self.system = system
        self.python = python
        self.started: list[Role] = []
        self._stack = ExitStack()
        self.scratch = ""

    def __enter__(self) -> Roles:
        self.scratch = self._stack.enter_context(
            tempfile.TemporaryDirectory(prefix="esync-", ignore_cleanup_errors=True)
        )
        return self

    def start(self, name: str, file: str, **config: Any) -> Role:
        """Start a process with this file of inside/."""
        variables = dict(self.system.variables) | {"TMPDIR": self.scratch, "HOME": self.scratch}
        role = Role(f"{self.system.name}'s {name}", self.python, file, variables, config)
        self.started.append(role)
        return role

    def hear(self, role: Role, timeout_s: float) -> Message:
        """The next message of this process, while all of them run.

        Raises:
            click.ClickException: one of them ended, or this one said nothing for so long.
        """
        deadline = time.monotonic() + timeout_s
        while (message := role.heard(min(1.0, timeout_s))) is None:
            for other in self.started:
                if not other.running():
                    other.fail("ended before it was done")
            if time.monotonic() > deadline:
                role.fail(f"said nothing for {timeout_s:g} s")
        return message

    def await_port(self, role: Role, port: int, timeout_s: float) -> None:
        """Wait until this process listens there.

        Raises:
            click.ClickException: it ended, or did not listen in time.
        """
        deadline = time.monotonic() + timeout_s
        while True:
            with suppress(OSError), socket.create_connection((HOST, port), 1):
                return
            if not role.running():
                role.fail("ended before it was done")
            if time.monotonic() > deadline:
                role.fail(f"did not listen on {HOST}:{port} within {timeout_s:g} s")
            time.sleep(0.1)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for role in self.started:
            role.hang_up()
        for role in self.started:
            role.end()
        self._stack.close()


@contextmanager
def ended_by_sigterm() -> Iterator[None]:
    """Within, a SIGTERM ends this process as Ctrl-C does: the blocks that it is in are left in order."""

    def leave(number: int, frame: Any) -> None:
        raise SystemExit(128 + number)

    before = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def free_port() -> int:
    """A port of the loopback interface that nobody listens on."""
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        port: int = probe.getsockname()[1]
        return port


# The result


def check(system: System, wrong_by: float) -> None:
    """Refuse figures of an exchange that did not form the mean.

    Raises:
        click.ClickException: a number of the mean is off by more than rounding explains.
    """
    if not wrong_by <= TOLERANCE:
        raise click.ClickException(
            f"{system.name}'s mean is off by {wrong_by:g}, expected at most {TOLERANCE:g}:"
            " what it did is not the exchange measured here, so there is no figure"
        )


def row(system: System, exchange: Exchange, seconds: list[float], **more: Any) -> Message:
    """One line of the result, as the JSON file has it; times in seconds of one exchange, sizes in MB (10^6 bytes)."""
    return {
        "system": system.name,
        "workers": exchange.workers,
        "mb": exchange.mb,
        "seconds": seconds,
        "median_s": median(seconds),
        "max_s": max(seconds),
        **more,
    }


FIGURES = {
    "median_s": ("seconds per exchange, median", "{:.3f}"),
    "max_s": ("seconds per exchange, longest", "{:.3f}"),
    "matchmaking_s": ("seconds to find the group before it, median", "{:.3f}"),
    "wire_mb": ("MB over loopback in an exchange, least (counts every program)", "{:.1f}"),
    "server_cpu_s": ("CPU seconds of the server per exchange", "{:.2f}"),
    "worker_cpu_s": ("CPU seconds of a worker per exchange", "{:.2f}"),
    "server_peak_mb": ("peak memory of the server, MB", "{:.0f}"),
    "worker_peak_mb": ("peak memory of a worker, MB", "{:.0f}"),
    "worker_pss_mb": ("a worker's memory at the end, shared pages divided, MB", "{:.0f}"),
}


def show(result: Message, cores: int) -> None:
    """Print one line of the result as a table."""
    versions = ", ".join(f"{name} {version}" for name, version in result["versions"].items())
    table = Table(
        title=f"{result['system']}: {result['workers']} workers exchange {result['mb']:g} MB each",
        caption=f"{len(result['seconds'])} exchanges on {cores} cores; {versions}",
    )
    table.add_column("figure")
    table.add_column("value", justify="right")
    for key, (title, form) in FIGURES.items():
        if result.get(key) is not None:
            table.add_row(title, form.format(result[key]))
    Console().print(table)


def command(
    system: System, exchange: Callable[[Roles, Exchange], Message], about: str
) -> click.Command:
    """The command line that all these benchmarks have; `exchange` measures, and gives a line of the result."""

    @click.command(help=about)
    @click.option("--workers", type=click.IntRange(2, 64), default=4, show_default=True)
    @click.option(
        "--mb",
        type=click.FloatRange(0.001, 2000),
        default=45.0,
        show_default=True,
        help="Size of a vector, in 10^6 bytes.",
    )
    @click.option(
        "--rounds", type=click.IntRange(min=1), help="Exchanges to measure [8; quick: 3]."
    )
    @click.option("--quick", is_flag=True, help="Within a minute, once installed: rough figures.")
    @click.option(
        "--json", "file", type=click.File("w", lazy=True), help="Write the figures here too."
    )
    def main(workers: int, mb: float, rounds: int | None, quick: bool, file: Any) -> None:
        measured = Exchange(workers, mb, rounds or (3 if quick else 8))
        with ended_by_sigterm():
            python = environment(system)
            with Roles(system, python) as roles:
                result = exchange(roles, measured)
        where = measure.environment()
        show(result, where["cores"])
        if file:
            json.dump({"environment": where, "rows": [result]}, file, indent=2)
            file.write("\n")

    return main
