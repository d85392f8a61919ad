"""Goodput under faults: the share of a fault-free run's samples per second that is left.

Each fault is injected into a run of real processes on this machine, beside a twin of the same seed and length without
it. Counted are rounds that had to be done again, updates of finished rounds that are missing or counted twice (there
must be none), and the seconds from a fault to the next version.

    python benchmarks/faults.py --quick
    python benchmarks/faults.py --only worker --json faults.json
"""

from __future__ import annotations

import json
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import click
import measure
import zmq
from rich.console import Console
from rich.table import Table

console = Console(width=150)
ENVIRONMENT = {
    **os.environ,
    "JAX_PLATFORMS": "cpu",
    "XLA_FLAGS": "--xla_cpu_multi_thread_eigen=false",
    "OMP_NUM_THREADS": "1",
    "PYTHONUNBUFFERED": "1",
}
STEP_S = (0.05, 0.05, 0.05, 0.08, 0.08, 0.1, 0.2, 0.3)
"""Emulated seconds of a local step, by rank; the last one is the slowest worker's."""
SETTLE_S = 6.0
"""After the run's start, before the first fault."""


@dataclass
class Row:
    """One fault beside its twin."""

    fault: str
    times: int
    seconds: float
    goodput: float
    rounds: int
    redone: int
    lost: int
    doubled: int
    recover_s: list[float] = field(default_factory=list)


class Network:
    """A network namespace, connected to this one by a pair of virtual devices; needs the rights to make it.

    Raises:
        subprocess.CalledProcessError: this process may not.
    """

    OURS, THEIRS = "10.213.77.1", "10.213.77.2"

    def __init__(self) -> None:
        self.name = f"esync{os.getpid()}"
        self.device = f"es{os.getpid() % 10**6}"
        inside = f"{self.device}i"
        try:
            self._ip("netns", "add", self.name)
            self._ip("link", "add", self.device, "type", "veth", "peer", "name", inside)
            self._ip("link", "set", inside, "netns", self.name)
            self._ip("addr", "add", f"{self.OURS}/30", "dev", self.device)
            self._ip("link", "set", self.device, "up")
            for command in (
                ("addr", "add", f"{self.THEIRS}/30", "dev", inside),
                ("link", "set", inside, "up"),
                ("link", "set", "lo", "up"),
            ):
                self._ip("-n", self.name, *command)
        except BaseException:
            self.close()
            raise

    def _ip(self, *arguments: str) -> None:
        subprocess.run(["ip", *arguments], check=True, capture_output=True)

    def up(self, up: bool) -> None:
        """Connect it, or cut it off."""
        self._ip("link", "set", self.device, "up" if up else "down")

    def close(self) -> None:
        for arguments in (("link", "del", self.device), ("netns", "del", self.name)):
            subprocess.run(["ip", *arguments], check=False, capture_output=True)


class Cluster:
    """A run of real processes, which can be hurt.

    Args:
        network: where the first two workers run; None: on this machine, as all others.
    """

    def __init__(self, directory: Path, workers: int, seed: int, network: Network | None) -> None:
        self.directory = directory
        self.seed = seed
        self.network = network
        self.host = network.OURS if network else "127.0.0.1"
        self.injected: list[float] = []
        self.state = self._state(f"tcp://{self.host}:*", workers)
        self.endpoint = self._await("state", "state server at ").split(": ")[0]
        self.ps = self._ps()
        self.workers = {i: self.worker(i) for i in range(workers)}
        self._await("state", "the run starts", 120.0)

    def _start(
        self, name: str, module: str, *arguments: str, inside: bool = False
    ) -> subprocess.Popen[bytes]:
        within = ["ip", "netns", "exec", self.network.name] if inside and self.network else []
        with open(self.directory / f"{name}.out", "ab") as out:
            return subprocess.Popen(
                [*within, sys.executable, "-m", module, *arguments],
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.STDOUT,
                env=ENVIRONMENT,
            )

    def _state(self, bind: str, workers: int, *more: str) -> subprocess.Popen[bytes]:
        options = ["--bind", bind, "--workers", str(workers), "--run-dir", str(self.directory)]
        options += ["--model", "mlp", "--dataset", "digits", "--batch-size", "16"]
        options += ["--seed", str(self.seed), "--evaluate-every", "0"]
        options += ["--insecure"] if self.network else []
        return self._start("state", "esync.state.cli", *options, *more)

    def _ps(self, *more: str) -> subprocess.Popen[bytes]:
        options = ["--connect", self.endpoint, "--run-dir", str(self.directory), "--name", "ps"]
        options += ["--bind", self.host, *(["--insecure"] if self.network else [])]
        return self._start("ps", "esync.ps.cli", *options, "--checkpoint", "2", *more)

    def worker(self, rank: int) -> subprocess.Popen[bytes]:
        options = ["--connect", self.endpoint, "--run-dir", str(self.directory)]
        options += ["--name", f"w{rank}", "--rank", str(rank)]
        options += ["--step-time", str(STEP_S[rank % len(STEP_S)])]
        return self._start(f"w{rank}", "esync.worker.cli", *options, inside=rank < 2)

    def start_again(self, role: str) -> None:
        """Start a server that was killed, which goes on where the run was."""
        if role == "state":
            self.state = self._state(self.endpoint, len(self.workers), "--resume")
        else:
            self.ps = self._ps("--resume")

    def _await(self, name: str, text: str, patience_s: float = 60.0) -> str:
        """What a role prints after `text`, on that line."""
        deadline = time.monotonic() + patience_s
        path = self.directory / f"{name}.out"
        while time.monotonic() < deadline:
            if path.exists():
                for line in path.read_text(errors="replace").splitlines():
                    if text in line:
                        return line.partition(text)[2]
            time.sleep(0.05)
        raise RuntimeError(f"{name} did not print {text!r}; see {path}")

    def hurt(self) -> None:
        """Remember that a fault is being injected."""
        self.injected.append(time.time())

    def end(self) -> None:
        """End the run as Ctrl-C would."""
        processes = [self.state, self.ps, *self.workers.values()]
        for process in processes:
            process.send_signal(signal.SIGCONT)
        self.state.send_signal(signal.SIGTERM)
        deadline = time.monotonic() + 30
        for process in processes:
            try:
                process.wait(max(0.1, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                pass
        self.kill()

    def kill(self) -> None:
        for process in (self.state, self.ps, *self.workers.values()):
            if process.poll() is None:
                process.kill()
            process.wait()

    def events(self, role: str, event: str) -> list[dict[str, Any]]:
        path = self.directory / f"{role}.jsonl"
        lines = path.read_text(errors="replace").splitlines() if path.exists() else []
        rows = []
        for line in lines:
            try:
                rows.append(json.loads(line))
            except ValueError:  # cut off by kill -9
                continue
        return [row for row in rows if row.get("event") == event]


@contextmanager
def cluster(workers: int, seed: int, *, apart: bool = False) -> Iterator[Cluster]:
    """A run; with the first two workers in a network of their own if they are `apart`."""
    with tempfile.TemporaryDirectory() as folder:
        made, network = None, Network() if apart else None
        try:
            made = Cluster(Path(folder), workers, seed, network)
            yield made
        finally:
            if made is not None:
                made.kill()
            if network is not None:
                network.close()


# The faults: each hurts a cluster for some seconds


def nothing(made: Cluster, seconds: float, times: int, rng: random.Random) -> None:
    time.sleep(seconds)


def worker_kills(made: Cluster, seconds: float, times: int, rng: random.Random) -> None:
    """Kill -9 of a random worker, which is started again at once."""
    for _ in range(times):
        rank = rng.randrange(len(made.workers))
        made.hurt()
        made.workers[rank].kill()
        made.workers[rank].wait()
        made.workers[rank] = made.worker(rank)
        time.sleep(seconds / times)


def server_kills(role: str) -> Callable[[Cluster, float, int, random.Random], None]:
    def kills(made: Cluster, seconds: float, times: int, rng: random.Random) -> None:
        for _ in range(times):
            time.sleep(rng.uniform(0.3, 0.5) * seconds / times)
            made.hurt()
            began = time.monotonic()
            process = made.state if role == "state" else made.ps
            process.kill()
            process.wait()
            made.start_again(role)
            time.sleep(max(0.0, began + seconds / times * 0.5 - time.monotonic()))

    return kills


def stopped_worker(made: Cluster, seconds: float, times: int, rng: random.Random) -> None:
    """SIGSTOP of the slowest for half of the time."""
    made.hurt()
    slowest = made.workers[max(made.workers)]
    slowest.send_signal(signal.SIGSTOP)
    time.sleep(seconds / 2)
    slowest.send_signal(signal.SIGCONT)
    time.sleep(seconds / 2)


def garbage(made: Cluster, seconds: float, times: int, rng: random.Random) -> None:
    """10 MB/s of random frames at each socket."""
    context: zmq.Context[Any] = zmq.Context()
    endpoints = made.events("ps", "welcome")[-1]["endpoints"]
    sockets = []
    for kind, endpoint in (
        (zmq.DEALER, made.endpoint),
        (zmq.PUSH, endpoints["push"]),
        (zmq.XSUB, endpoints["model"]),
    ):
        socket = context.socket(kind)
        socket.linger = 0
        socket.setsockopt(zmq.SNDHWM, 100)
        socket.connect(endpoint)
        sockets.append(socket)
    made.hurt()
    began = time.monotonic()
    size, sent = 10_000, [0] * len(sockets)
    while (now := time.monotonic()) - began < seconds:
        for i, socket in enumerate(sockets):
            while sent[i] < 10e6 * (now - began):
                try:
                    socket.send(rng.randbytes(size), zmq.NOBLOCK)
                except zmq.Again:
                    break
                sent[i] += size
        time.sleep(0.01)
    console.print(f"  garbage sent: {', '.join(f'{n / 1e6:.0f} MB' for n in sent)}")
    context.destroy(linger=0)


def cut(made: Cluster, seconds: float, times: int, rng: random.Random) -> None:
    """The network of two workers is gone for two thirds of the time."""
    assert made.network is not None
    made.hurt()
    made.network.up(False)
    time.sleep(seconds * 2 / 3)
    made.network.up(True)
    time.sleep(seconds / 3)


FAULTS: dict[str, tuple[Callable[[Cluster, float, int, random.Random], None], int, float]] = {
    "worker": (worker_kills, 20, 400.0),
    "ps": (server_kills("ps"), 5, 100.0),
    "state": (server_kills("state"), 5, 100.0),
    "stop": (stopped_worker, 1, 60.0),
    "garbage": (garbage, 1, 30.0),
    "cut": (cut, 1, 90.0),
}
"""Name -> what it does, how often, and for how many seconds."""
QUICK = {
    "worker": (3, 30.0),
    "ps": (2, 20.0),
    "state": (2, 20.0),
    "stop": (1, 20.0),
    "garbage": (1, 10.0),
    "cut": (1, 30.0),
}


# What came of it


def samples_of(made: Cluster, begin: float, end: float) -> float:
    """Samples trained in that time, by the workers' logs."""
    total = 0.0
    for rank in made.workers:
        for row in made.events(f"w{rank}", "round"):
            if begin <= row["t"] < end:
                total += row["samples"]
    return total


def accounts(made: Cluster) -> tuple[int, int, int, int]:
    """(rounds, rounds done again, updates lost, updates doubled) of a whole run.

    An update is lost if its worker finished a round in time and is not among the members of the version that the
    round made; or doubled if it is there twice. Of versions that were made again the last one counts.
    """
    made_of: dict[int, list[str]] = {}
    for row in made.events("ps", "round"):
        made_of[row["round"]] = list(row["early_s"])
    redone = sum(row["lost"] for row in made.events("state", "rolled_back"))
    last: dict[tuple[str, int], dict[str, Any]] = {}
    for rank in made.workers:
        for row in made.events(f"w{rank}", "round"):
            last[f"w{rank}", row["round"]] = row
    lost = 0
    for (worker, round), row in last.items():
        if not row["late"] and round + 1 in made_of and worker not in made_of[round + 1]:
            lost += 1
    doubled = sum(n - 1 for members in made_of.values() for n in Counter(members).values())
    return max(made_of, default=0), redone, lost, doubled


def recoveries(made: Cluster) -> list[float]:
    """Seconds from each fault to the next version."""
    versions = sorted(row["t"] for row in made.events("ps", "round"))
    found = []
    for at in made.injected:
        later = [t for t in versions if t > at]
        if later:
            found.append(later[0] - at)
    return found


def compare(name: str, workers: int, times: int, seconds: float, seed: int) -> Row:
    """A run with the fault beside one without."""
    rates = []
    for hurt in (nothing, FAULTS[name][0]):
        with cluster(workers, seed, apart=name == "cut") as made:
            time.sleep(SETTLE_S)
            begin = time.time()
            hurt(made, seconds, times, random.Random(seed))
            end = time.time()
            time.sleep(3.0)  # rounds that have begun end
            rates.append(samples_of(made, begin, end) / (end - begin))
            made.end()
            rounds, redone, lost, doubled = accounts(made)
            recover = recoveries(made)
    goodput = rates[1] / rates[0]
    return Row(name, times, seconds, goodput, rounds, redone, lost, doubled, recover)


def show(rows: list[Row]) -> None:
    table = Table(title="goodput under faults", title_justify="left")
    columns = ("fault", "times", "seconds", "goodput", "rounds", "done again")
    columns += ("updates lost", "doubled", "recovers after s, median", "worst")
    for column in columns:
        table.add_column(column, justify="left" if column == "fault" else "right")
    for row in rows:
        recover = [f"{statistics.median(row.recover_s):.1f}", f"{max(row.recover_s):.1f}"]
        table.add_row(
            row.fault,
            str(row.times),
            f"{row.seconds:g}",
            f"{row.goodput:.3f}",
            str(row.rounds),
            str(row.redone),
            str(row.lost),
            str(row.doubled),
            *(recover if row.recover_s else ["", ""]),
        )
    console.print(table)


@click.command()
@click.option("--quick", is_flag=True, help="Four workers, few faults, short runs.")
@click.option("--only", multiple=True, type=click.Choice(list(FAULTS)), help="Only this fault.")
@click.option("--workers", type=click.IntRange(2), help="Workers.  [default: 8]")
@click.option("--seconds", type=float, help="Seconds under a fault, instead of its own.")
@click.option("--seed", default=0, show_default=True)
@click.option("--json", "file", type=click.File("w"), help="Write the figures here too.")
def main(
    quick: bool,
    only: tuple[str, ...],
    workers: int | None,
    seconds: float | None,
    seed: int,
    file: Any,
) -> None:
    """Kill, stop and flood the processes of a run, and see how much of it is left."""
    rows = []
    for name in only or FAULTS:
        times, length = QUICK[name] if quick else FAULTS[name][1:]
        count = workers or (4 if quick else 8)
        console.print(f"{name}: {times} in {seconds or length:g} s, {count} workers")
        try:
            rows.append(compare(name, count, times, seconds or length, seed))
        except (subprocess.CalledProcessError, FileNotFoundError) as error:
            if name != "cut":
                raise
            console.print(f"  left out: it takes the right to make network namespaces ({error})")
            continue
        show(rows[-1:])
    if len(rows) > 1:
        show(rows)
    if file:
        figures = [asdict(row) for row in rows]
        json.dump({"environment": measure.environment(), "rows": figures}, file, indent=1)
        file.write("\n")


if __name__ == "__main__":
    main()
