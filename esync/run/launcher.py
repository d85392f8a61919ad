"""All roles of a cluster file as processes on this machine: started, watched, and ended together."""

from __future__ import annotations

import os
import shlex
import signal
import socket
import subprocess
import sys
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import tomli_w

from esync import threads
from esync.config import OWN, ClusterConfig, WorkerConfig, ps_names
from esync.errors import ConfigError, EsyncError
from esync.run_dir import endpoint_of
from esync.transport import KEYS, NAME, RANK, STATE

_PATH = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
"""`python` in a worker's command is the Python that runs this."""
STOP_S = 8.0
"""How long a role has to end by itself after SIGTERM."""


@dataclass
class Role:
    """One process.

    Attributes:
        name: what people call it: `state`, `ps` (and `ps1`, `ps2`, ...), `evaluator`, or a worker's name.
        command: what was run.
        log: the file with everything that it printed.
        host: the machine that it belongs on; empty: this one.
    """

    name: str
    command: list[str]
    environment: dict[str, str]
    log: Path
    host: str = ""
    process: subprocess.Popen[bytes] | None = field(default=None, repr=False)

    def start(self) -> None:
        with open(self.log, "ab") as out:
            try:
                self.process = subprocess.Popen(
                    self.command,
                    stdin=subprocess.DEVNULL,
                    stdout=out,
                    stderr=subprocess.STDOUT,
                    env={**os.environ, "PATH": _PATH, **self.environment},
                    start_new_session=True,  # Ctrl-C reaches the launcher alone, which ends the roles in order
                )
            except OSError as error:
                raise EsyncError(
                    f"cannot start {self.name}: {shlex.join(self.command)}: {error}"
                ) from error

    @property
    def status(self) -> int | None:
        """Exit status; None while it runs."""
        assert self.process is not None
        return self.process.poll()

    def why(self) -> str:
        """How it ended, with the last things that it said."""
        status = self.status
        if status is None:
            return "still running"
        ended = (
            f"killed by {signal.Signals(-status).name}" if status < 0 else f"exit status {status}"
        )
        lines = self.log.read_text(errors="replace").strip().splitlines()[-5:]
        return ended + "".join(f"\n    {line}" for line in lines)


def fixed_port(endpoint: str) -> str:
    """`endpoint` with a free port in the place of `*`, for commands that must know it beforehand."""
    host, _, port = endpoint.rpartition(":")
    if not endpoint.startswith("tcp://") or port != "*":
        return endpoint
    with socket.socket() as probe:
        probe.bind(("", 0))
        return f"{host}:{probe.getsockname()[1]}"


def write_config(cluster: ClusterConfig, path: Path) -> None:
    """The whole configuration, defaults included, as a cluster file that can be run again."""
    raw: dict[str, Any] = {
        "run": asdict(cluster.run),
        "state": asdict(cluster.state),
        "ps": asdict(cluster.ps),
        "network": asdict(cluster.network),
        "workers": [asdict(row) for row in cluster.workers],
    }
    path.write_text(tomli_w.dumps(raw), encoding="utf-8")


def roles_of(
    cluster: ClusterConfig, directory: Path, endpoint: str, *, resume: bool = False
) -> list[Role]:
    """The processes that train this cluster, the state server first.

    A worker with a host gets a command that needs no file of this machine.

    Args:
        directory: holds `cluster.toml` and receives every role's output.
        endpoint: where the state server listens, or will.
        resume: the servers go on with the run in `directory`.
    """
    common = ["--run-dir", str(directory)]
    again = ["--resume"] if resume else []
    file = ["--config", str(directory / "cluster.toml")]
    joins = ["--connect", endpoint]
    keys = cluster.state.keys  # the servers', which may speak for everybody on this machine
    keyed = ["--keys", keys] if keys else []
    rows: list[tuple[str, list[str], dict[str, str]]] = [
        ("state", ["esync.state.cli", *file, *common, *again], {}),
    ]
    names = ps_names(cluster.run.ps)
    ports = metrics_ports(cluster)
    for shard, name in enumerate(names):
        arguments = ["esync.ps.cli", *file, *joins, *common, "--name", name, "--shard", str(shard)]
        arguments += [*again, *([] if cluster.ps.keys else keyed)]
        if len(names) > 1 and cluster.ps.bind.startswith(("ipc://", "inproc://")):
            arguments += ["--bind", f"{cluster.ps.bind}-{shard}"]
        arguments += ["--metrics-port", str(ports[shard])] if shard and ports[shard] else []
        rows.append((name, arguments, {}))
    workers = cluster.each_worker()
    for rank, row in enumerate(workers):
        arguments = ["esync.worker.cli", *file, *joins, *common]
        arguments += [] if row.keys or row.host else keyed
        arguments += ["--name", row.name, "--rank", str(rank)]
        environment = environment_of(row.device, row.threads or (0 if row.host else 1))
        if row.command:
            environment |= {STATE: endpoint, NAME: row.name, RANK: str(rank)}
            environment |= {KEYS: row.keys or keys} if row.keys or keys else {}
        rows.append((row.name, arguments, environment))
    if cluster.run.model != OWN:
        evaluator = ["esync.worker.cli", "--evaluate", "--name", "evaluator", *joins, *common]
        gpus = (row for row in workers if row.device != "cpu" and not row.host)
        where = next(
            gpus, WorkerConfig()
        )  # a CPU takes minutes for what a GPU evaluates in a second
        evaluator += [*keyed, "--device", where.device]
        rows.append(("evaluator", evaluator, environment_of(where.device)))  # what training leaves
    by_name = {row.name: row for row in workers}
    roles = []
    for name, arguments, env in rows:
        worker = by_name.get(name, WorkerConfig())
        command = [sys.executable, "-m", *arguments]
        if worker.command:
            command = shlex.split(worker.command)
        elif worker.host:
            command = ["esync-worker", *joins, "--name", name, "--rank", arguments[-1]]
            command += ["--device", worker.device, "--step-time", str(worker.step_time_s)]
            command += ["--slowdown", str(worker.slowdown), "--threads", str(worker.threads)]
            command += ["--keys", worker.keys] if worker.keys else []
        roles.append(Role(name, command, env, directory / f"{name}.log", worker.host))
    return roles


def metrics_ports(cluster: ClusterConfig) -> list[int]:
    """Where each parameter server of this machine shows its metrics: at the port that [ps] names, and those after it.

    Raises:
        ConfigError: the state server has one of them, or there are not so many.
    """
    first, count = cluster.ps.metrics_port, cluster.run.ps
    if not first:
        return [0] * count
    ports = list(range(first, first + count))
    if ports[-1] > 65535:
        raise ConfigError(
            f"[ps] metrics_port = {first}: {count} parameter servers need ports up to {ports[-1]}; choose a lower one"
        )
    if cluster.state.metrics_port in ports:
        what = f"the ports {first} to {ports[-1]}" if count > 1 else f"port {first}"
        raise ConfigError(
            f"[state] metrics_port = {cluster.state.metrics_port}: the metrics of [ps] take {what}; choose another"
        )
    return ports


def environment_of(device: str, count: int = 0) -> dict[str, str]:
    """Variables that let several processes share a machine: so many threads to compute with on a CPU (0: one for each
    core), no grabbing of GPU memory."""
    if device == "cpu":
        return {"JAX_PLATFORMS": "cpu", **(threads.variables(count) if count else {})}
    return {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}


def wait_for_endpoint(directory: Path, state: Role, timeout_s: float = 30.0) -> str | None:
    """Where the state server came to listen; None if it ended instead."""
    assert state.process is not None
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        if text := endpoint_of(directory, state.process.pid):
            return text
        if state.status is not None:
            return None
        time.sleep(0.05)
    return None


def wait(roles: list[Role], seconds: float) -> None:
    """Give roles so long to end."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline and any(role.status is None for role in roles):
        time.sleep(0.05)


def stop(roles: list[Role]) -> None:
    """End every role that still runs: SIGTERM, patience, SIGKILL."""
    running = [role for role in roles if role.process is not None and role.status is None]
    for role in running:
        _signal(role, signal.SIGTERM)
    deadline = time.monotonic() + STOP_S
    for role in running:
        assert role.process is not None
        try:
            role.process.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            _signal(role, signal.SIGKILL)
            role.process.wait()


def terminate(role: Role) -> None:
    """Have a role that runs end by itself."""
    _signal(role, signal.SIGTERM)


def kill(roles: list[Role]) -> None:
    """End every role that still runs at once."""
    for role in roles:
        if role.process is not None and role.status is None:
            _signal(role, signal.SIGKILL)


def _signal(role: Role, number: int) -> None:
    assert role.process is not None
    try:
        role.process.send_signal(number)
    except ProcessLookupError:
        pass
