"""Goodput under faults: the share of a fault-free run's samples per second that is left.

Each fault is injected into a run of real processes on this machine, beside a twin of the same seed and length without
it. Every local step adds 1 to the model, so that in the end the model itself tells whether an update was lost or
counted twice: it has to be what the logs of steps and of versions say. Counted are also rounds that had to be done
again, and the seconds from a fault to the next version.

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
from safetensors.numpy import load_file

from esync import messages, threads, transport

console = Console(width=150)
ENVIRONMENT = {
    **os.environ,
    "JAX_PLATFORMS": "cpu",
    **threads.variables(1),
    "PYTHONUNBUFFERED": "1",
}
STEP_S = (0.05, 0.05, 0.05, 0.08, 0.08, 0.1, 0.2, 0.3)
"""Emulated seconds of a local step, by rank; the last one is the slowest worker's."""
BAD_DELAY_S, BAD_LIFE_S = 0.02, 20.0
"""What the bad way does: seconds each way at least, and how long a connection lasts, in the mean."""
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
    given_up: int
    missing: float
    recover_s: list[float] = field(default_factory=list)


class Network:
    """A network namespace, connected to this one by a pair of virtual devices; needs the rights to make it.

    Raises:
        subprocess.CalledProcessError: this process may not.
    """

    OURS, THEIRS = "10.213.77.1", "10.213.77.2"
    BAD = "10.213.77.5"
    """Theirs too: by it they reach us the worse way, if there is one."""

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
                ("addr", "add", f"{self.BAD}/32", "dev", "lo"),
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
        bad: the way from there is slow, and connections do not last.
    """

    def __init__(
        self, directory: Path, workers: int, seed: int, network: Network | None, bad: bool
    ) -> None:
        self.directory = directory
        self.seed = seed
        self.network = network
        self.host = "0.0.0.0" if network else "127.0.0.1"
        self.injected: list[float] = []
        self.state = self._state(f"tcp://{self.host}:*", workers)
        bound = self._await("state", "state server at ").split(": ")[0]
        self.endpoint = bound.replace("0.0.0.0", "127.0.0.1")
        self.ps = self._ps()
        self.way: subprocess.Popen[bytes] | None = None
        self.there = network.OURS if network else ""
        if network and bad:
            self.there = network.BAD
            self.way = self._bad_way(network)
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
                cwd=Path(__file__).parent,
            )

    def _state(self, bind: str, workers: int, *more: str) -> subprocess.Popen[bytes]:
        options = ["--bind", bind, "--workers", str(workers), "--run-dir", str(self.directory)]
        options += ["--model", "own", "--batch-size", "16"]
        options += ["--seed", str(self.seed), "--evaluate-every", "0"]
        options += ["--insecure"] if self.network else []
        return self._start("state", "esync.state.cli", *options, *more)

    def _ps(self, *more: str) -> subprocess.Popen[bytes]:
        options = ["--connect", self.endpoint, "--run-dir", str(self.directory), "--name", "ps"]
        options += ["--bind", self.host, *(["--insecure"] if self.network else [])]
        return self._start("ps", "esync.ps.cli", *options, "--checkpoint", "2", *more)

    def _bad_way(self, network: Network) -> subprocess.Popen[bytes]:
        deadline = time.monotonic() + 30
        while not (welcomed := self.events("ps", "welcome")):
            assert time.monotonic() < deadline, "the parameter server does not begin"
            time.sleep(0.05)
        told = welcomed[-1]["endpoints"]
        ports = [x.rpartition(":")[2] for x in (self.endpoint, told["push"], told["model"])]
        options = [network.BAD, network.OURS, str(BAD_DELAY_S), str(BAD_LIFE_S), str(self.seed)]
        way = self._start("way", "inside.bad_network", *options, *ports, inside=True)
        self._await("way", "carrying")
        return way

    def worker(self, rank: int) -> subprocess.Popen[bytes]:
        name, step_s = f"w{rank}", str(STEP_S[rank % len(STEP_S)])
        log = str(self.directory / f"{name}.jsonl")
        inside = self.network is not None and rank < 2
        endpoint = self.endpoint.replace("127.0.0.1", self.there) if inside else self.endpoint
        options = [endpoint, name, str(rank), step_s, log]
        return self._start(name, "inside.counting_worker", *options, inside=inside)

    def start_again(self, role: str) -> None:
        """Start a server that was killed, which goes on where the run was."""
        if role == "state":
            bind = self.endpoint.replace("127.0.0.1", self.host)
            self.state = self._state(bind, len(self.workers), "--resume")
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
        for process in (self.state, self.ps, *self.workers.values(), self.way):
            if process is None:
                continue
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
def cluster(
    workers: int, seed: int, *, apart: bool = False, bad: bool = False
) -> Iterator[Cluster]:
    """A run; with the first two workers in a network of their own if they are `apart`, or reached the `bad` way."""
    with tempfile.TemporaryDirectory() as folder:
        made, network = None, Network() if apart else None
        try:
            made = Cluster(Path(folder), workers, seed, network, bad)
            yield made
        finally:
            if made is not None:
                made.kill()
            if network is not None:
                network.close()


# The faults: each hurts a cluster for some seconds

Fault = Callable[[Cluster, float, int, random.Random], None]
"""(cluster, for so many seconds, so often, what is drawn)."""


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


def server_kills(role: str) -> Fault:
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
    """10 MB/s of random frames at each socket, from a stranger and from a guest who has been told the token."""
    context: zmq.Context[Any] = zmq.Context()
    endpoints = _overheard(context, made.endpoint)
    sockets = []
    for kind, endpoint, token in (
        (zmq.DEALER, made.endpoint, ""),
        (zmq.PUSH, endpoints["push"], ""),
        (zmq.XSUB, endpoints["model"], ""),
        (zmq.PUSH, endpoints["push"], endpoints["token"]),
        (zmq.XSUB, endpoints["model"], endpoints["token"]),
    ):
        socket = context.socket(kind)
        socket.linger = 0
        socket.setsockopt(zmq.SNDHWM, 100)
        if token:
            socket.setsockopt(zmq.PLAIN_PASSWORD, token.encode())
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


def _overheard(context: zmq.Context[Any], state: str) -> dict[str, Any]:
    """What a guest is told of the parameter server: one who joins and does not stay."""
    with transport.dealer(context, "guest", state) as socket:
        socket.send(messages.encode(messages.Join("guest", "evaluator", life="1")))
        if not socket.poll(10_000):
            raise RuntimeError(f"{state} does not answer")
        welcome = messages.decode(socket.recv())
        socket.send(messages.encode(messages.Leave("guest", "seen enough")))
    assert isinstance(welcome, messages.Welcome), welcome
    return dict(welcome.endpoints[0])


def cut(made: Cluster, seconds: float, times: int, rng: random.Random) -> None:
    """The network of two workers is gone for two thirds of the time."""
    assert made.network is not None
    made.hurt()
    made.network.up(False)
    time.sleep(seconds * 2 / 3)
    made.network.up(True)
    time.sleep(seconds / 3)


def bad_way(made: Cluster, seconds: float, times: int, rng: random.Random) -> None:
    """The connections of two workers are slow, and are reset again and again."""
    made.hurt()
    time.sleep(seconds)


APART = ("cut", "way")
"""The faults that need a network of its own for two workers."""
FAULTS: dict[str, tuple[Fault, int, float]] = {
    "worker": (worker_kills, 20, 400.0),
    "ps": (server_kills("ps"), 5, 100.0),
    "state": (server_kills("state"), 5, 100.0),
    "stop": (stopped_worker, 1, 60.0),
    "garbage": (garbage, 1, 30.0),
    "cut": (cut, 1, 90.0),
    "way": (bad_way, 1, 60.0),
}
"""Name -> what it does, how often, and for how many seconds."""
QUICK = {
    "worker": (3, 30.0),
    "ps": (2, 20.0),
    "state": (2, 20.0),
    "stop": (1, 20.0),
    "garbage": (1, 10.0),
    "cut": (1, 30.0),
    "way": (1, 20.0),
}


# What came of it


def steps_of(made: Cluster) -> dict[tuple[str, int], dict[str, Any]]:
    """(worker, round) -> the last that it wrote of its steps in that round, which may have been done again."""
    return {
        (f"w{rank}", row["round"]): row
        for rank in made.workers
        for row in made.events(f"w{rank}", "step")
    }


def versions_of(made: Cluster) -> dict[int, dict[str, Any]]:
    """Version -> when it was published and whose updates are in it; of those that were made again the last one."""
    return {row["round"]: row for row in made.events("ps", "round")}


def samples_of(made: Cluster, begin: float, end: float) -> float:
    """Samples that are in the versions of that time."""
    steps, total = steps_of(made), 0
    for version, row in versions_of(made).items():
        if begin <= row["t"] < end:
            total += sum(steps[worker, version - 1]["steps"] for worker in row["early_s"])
    return total * 16.0


def missing(made: Cluster) -> float:
    """By how many local steps the final model differs from what the logs say is in it: 0, or updates were lost or
    counted twice. A version is the one before it plus the mean of its members' steps."""
    steps, expected = steps_of(made), 0.0
    versions = versions_of(made)
    for version, row in versions.items():
        if version > 0:
            own = [steps[worker, version - 1]["steps"] for worker in row["early_s"]]
            expected += sum(own) / len(own)
    model = load_file(made.directory / "model.safetensors")
    (found,) = (float(x[0]) for x in model.values())
    return found - expected


def given_up(made: Cluster) -> int:
    """Updates that were made and are not in their version: their workers were dead, cut off or late by then."""
    versions = versions_of(made)
    pushed = [
        (f"w{rank}", row["round"])
        for rank in made.workers
        for row in made.events(f"w{rank}", "round")
        if not row["late"]
    ]
    return sum(
        round + 1 in versions and worker not in versions[round + 1]["early_s"]
        for worker, round in set(pushed)
    )


def recoveries(made: Cluster) -> list[float]:
    """Seconds from each fault to the next version that the state server heard of."""
    versions = sorted(row["t"] for row in made.events("state", "round"))
    found = []
    for at in made.injected:
        later = [t for t in versions if t > at]
        if later:
            found.append(later[0] - at)
    return found


def run_with(
    name: str, workers: int, times: int, seconds: float, seed: int, *, twin: bool = False
) -> tuple[float, dict[str, Any]]:
    """(samples per second, what else came of it) of a run with a fault, or of its `twin` without."""
    hurt = nothing if twin else FAULTS[name][0]
    bad = name == "way" and not twin
    with cluster(workers, seed, apart=name in APART, bad=bad) as made:
        time.sleep(min(SETTLE_S, seconds / 4))
        begin = time.time()
        hurt(made, seconds, times, random.Random(seed))
        end = time.time()
        time.sleep(1.5)  # rounds that have begun end
        made.end()
        return samples_of(made, begin, end) / (end - begin), {
            "rounds": max(versions_of(made)),
            "redone": sum(row["lost"] for row in made.events("state", "rolled_back")),
            "given_up": given_up(made),
            "missing": missing(made),
            "recover_s": recoveries(made),
        }


def compare(name: str, workers: int, times: int, seconds: float, seed: int) -> Row:
    """A run with the fault beside one without."""
    about = name, workers, times, seconds, seed
    twin, _ = run_with(*about, twin=True)
    rate, counts = run_with(*about)
    return Row(name, times, seconds, rate / twin, **counts)


def show(rows: list[Row]) -> None:
    table = Table(title="goodput under faults", title_justify="left")
    columns = ("fault", "times", "seconds", "goodput", "rounds", "done again")
    columns += ("updates given up", "steps missing", "recovers after s, median", "worst")
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
            str(row.given_up),
            f"{abs(row.missing):.3f}",
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
            if name not in APART:
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
