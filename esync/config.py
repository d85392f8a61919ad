"""The run's configuration: one definition for `cluster.toml`, the command line, and the `welcome` message.

A field's `metadata` carries its help, its choices and its bounds; the file, the flags and the checks are derived
from it.
"""

from __future__ import annotations

import dataclasses
import math
import tomllib
import types
import typing
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from esync import models
from esync.algorithms import ALGORITHMS, PRESETS, algorithm
from esync.compression import COMPRESSIONS, Encoding
from esync.errors import ConfigError, unknown
from esync.limits import MAX_PEERS, RATE
from esync.messages import MessageError, check_worker_id
from esync.tensors import CHUNK_MIB, Layout
from esync.transport import DEFAULT_STATE

C = TypeVar("C")
ROLES = ("state", "ps", "evaluator")
"""Names that are not a worker's."""
GPU_CHUNK_MIB = 32
"""MiB of a chunk where all is on one GPU: each costs the host as much time, and the device little (docs/gpu.md)."""
OWN = "own"
"""The model of a run whose workers bring a training loop of their own."""


def _option(
    default: Any,
    help: str,
    *,
    choices: Collection[str] | None = None,
    low: float | None = None,
    high: float | None = None,
    words: dict[str, Any] | None = None,
) -> Any:
    """`choices` are looked up when a value is checked: a table may have grown. `words`: what may be written instead
    of a value, and the value that it stands for."""
    return field(
        default=default,
        metadata={"help": help, "choices": choices, "low": low, "high": high, "words": words or {}},
    )


@dataclass(frozen=True)
class RunConfig:
    """`[run]`: what is trained and how; every role gets it from the state server."""

    preset: str = _option(
        "",
        "Options that belong together (docs/algorithms.md); what is set besides takes precedence.",
        choices=PRESETS,
    )
    mode: str = _option("esync", "Synchronisation algorithm.", choices=ALGORITHMS)
    policy: str = _option(
        "adaptive",
        "Pacing of mode esync: as published, or with the improvements of docs/algorithms.md.",
        choices=("adaptive", "paper"),
    )
    model: str = _option(
        "cnn", f"Model to train: {', '.join(models.names())}; or `own` for loops of your own."
    )
    image_size: int = _option(
        0, "Resize images to this many pixels a side (0: the model's own choice).", low=0, high=4096
    )
    dataset: str = _option("fashion-mnist", "Data set: fashion-mnist, cifar10 or digits.")
    data_dir: str = _option("", "Where the data set lies (default: searched, then downloaded).")
    split: str = _option("iid", "How samples are dealt to workers.", choices=("iid", "by-class"))
    workers: int = _option(
        1,
        "The run starts when so many workers are ready (with [[workers]] in the file: all of them).",
        low=1,
        high=100_000,
    )
    ps: int = _option(
        1, "Parameter servers; each keeps and averages its share of the model.", low=1, high=1000
    )
    batch_size: int = _option(64, "Samples in a local step.", low=1)
    optimizer: str = _option(
        "sgd", "The workers' own optimiser (Optax).", choices=("sgd", "momentum", "adam", "adamw")
    )
    lr: float = _option(0.05, "Local learning rate.", low=0)
    global_lr: float = _option(
        -1.0,
        "Global learning rate: the outer optimiser's step on the averaged delta (-1: 1, or 0.01 with outer adam).",
        low=-1,
        high=1e6,
    )
    outer: str = _option(
        "sgd",
        "Outer optimiser on the parameter server, with the averaged delta as its gradient.",
        choices=("sgd", "momentum", "nesterov", "adam"),
    )
    outer_momentum: float = _option(0.9, "Its momentum (adam: beta 1).", low=0, high=0.999999)
    outer_beta2: float = _option(0.99, "Outer adam: beta 2.", low=0, high=0.999999)
    outer_epsilon: float = _option(1e-3, "Outer adam: added to the root (FedOpt's tau).", low=0)
    ema: float = _option(
        0.0,
        "Evaluate and save an average of the versions, which keeps this share of itself in each "
        "round (0: the newest version itself).",
        low=0,
        high=0.9999,
    )
    weights: str = _option(
        "equal",
        "Weight of a worker's delta: equal, by its samples, or normalised by its steps (fednova).",
        choices=("equal", "samples", "fednova"),
    )
    proximal: float = _option(
        0.0, "Pull of a local step towards the global model (FedProx's mu).", low=0
    )
    overlap: bool = _option(
        False, "Mode esync: train on while synchronising, and add that progress to the new model."
    )
    slowest_first: bool = _option(
        False,
        "Send a new model to the slowest workers first, and to the others when those have it: for "
        "where the way from the parameter server is what takes the time.",
    )
    min_steps: int = _option(
        1,
        "Mode esync: local steps of the slowest worker a round; auto: as many as a synchronisation costs.",
        low=0,
        words={"auto": 0},
    )
    clip_update: float = _option(
        0.0,
        "Largest L2 norm of an update's deltas: workers scale theirs down to it, and the parameter server refuses "
        "what is longer (0: no limit; docs/algorithms.md).",
        low=0,
    )
    compression: str = _option(
        "none",
        "How deltas travel, both ways where there is a barrier (docs/algorithms.md).",
        choices=COMPRESSIONS,
    )
    topk: float = _option(
        0.01, "Compression topk: share of the elements that is sent.", low=0.000001, high=1
    )
    shared_memory: bool = _option(
        True,
        "Exchange with workers on the parameter server's own machine through shared memory.",
    )
    chunk_mib: int = _option(
        0,
        "MiB of a chunk, in which models and updates travel and are averaged; over sockets more costs memory. "
        "auto: 4 if the run starts with up to 4 workers, else 2; 32 where the cluster file has "
        "all on one GPU, with a barrier, shared memory and no compression.",
        low=0,
        high=64,
        words={"auto": 0},
    )
    dcasgd: bool = _option(False, "Mode async: compensate the delay (DC-ASGD; needs sgd).")
    dc_lambda: float = _option(0.04, "DC-ASGD's lambda.", low=0)
    local_steps: int = _option(
        0,
        "Local steps a round where their number is fixed (0: the mode's own: 1, 20 in fed..., 50 in local).",
        low=0,
    )
    max_staleness: int = _option(
        3,
        "Mode ssp: rounds that a worker may have finished more than the slowest when it begins one; its model may be "
        "a round older.",
        low=0,
    )
    participation: float = _option(
        1.0,
        "Modes fedavg and tifl: share of the workers (of the tier) that a round draws, rounded up.",
        low=0.0001,
        high=1,
    )
    tiers: int = _option(3, "Mode tifl: tiers of equal speed.", low=1)
    mixing: float = _option(
        0.6, "Mode fedasync: weight of a fresh model in the mixture (alpha).", low=0, high=1
    )
    staleness_weight: str = _option(
        "polynomial",
        "Mode fedasync: how that weight falls with staleness.",
        choices=("constant", "hinge", "polynomial"),
    )
    staleness_a: float = _option(
        0.0,
        "Mode fedasync: a of the hinge or polynomial function (0: as published, 10 or 0.5).",
        low=0,
    )
    staleness_b: int = _option(4, "Mode fedasync: b of the hinge function.", low=0)
    min_width: float = _option(
        0.25,
        "Mode feddrop: the narrowest sub-network, as a share of each layer's units.",
        low=0.01,
        high=1,
    )
    max_steps: int = _option(0, "At most so many local steps a round (0: no limit).", low=0)
    epsilon_s: float = _option(
        -1.0, "Margin of ESync's decision in seconds (-1: 0.5 as published, or measured).", low=-1
    )
    seed: int = _option(
        0, "Seed of the initial model, the split, and every worker's batches.", low=0
    )
    rounds: int = _option(0, "Stop after so many versions of the model (0: no limit).", low=0)
    duration_s: float = _option(0.0, "Stop after so many seconds (0: no limit).", low=0)
    target_accuracy: float = _option(
        0.0, "Stop at this test accuracy (0: no target).", low=0, high=1
    )
    evaluate_every_s: float = _option(
        1.0, "Seconds between evaluations on the test set (0: none but the last).", low=0
    )
    heartbeat_s: float = _option(
        10.0, "A worker that is silent for so long is evicted.", low=0.1, high=3600
    )
    min_workers: int = _option(
        1, "With fewer workers than this left, the run pauses until others come.", low=1
    )
    deadline_s: float = _option(
        300.0,
        "The longest that the others wait for a worker which is connected, does not arrive and says nothing; mostly "
        "much less: its earlier arrivals tell (0: as long as it is connected).",
        low=0,
    )
    deadline_floor_s: float = _option(5.0, "And the least that it waits.", low=0)
    ps_wait_s: float = _option(
        300.0,
        "A run whose parameter server is silent waits so long for it to come back.",
        low=0,
    )

    def __post_init__(self) -> None:
        check_fields(self, "run")
        algorithm(self.mode)
        if self.dcasgd and (self.mode != "async" or self.optimizer != "sgd"):
            raise ConfigError(
                'dcasgd compensates plain SGD updates in mode async; it needs mode = "async" and '
                f'optimizer = "sgd", not {self.mode!r} and {self.optimizer!r}'
            )
        if self.dcasgd and self.lr <= 0:
            raise ConfigError("dcasgd needs a learning rate above 0")
        if self.overlap and (self.mode != "esync" or self.policy != "adaptive"):
            raise ConfigError(
                'overlap needs mode = "esync" and policy = "adaptive", '
                f"not {self.mode!r} and {self.policy!r}"
            )
        if self.overlap and self.proximal:
            raise ConfigError(
                "proximal pulls towards the global model, which a worker that overlaps is ahead of; "
                "leave one of them out"
            )
        if self.overlap and self.split == "by-class":
            raise ConfigError(
                "overlap lets workers drift apart on split by-class: it learns slower there than "
                "without (docs/algorithms.md has the figures); leave it out, or use preset skewed"
            )
        if self.slowest_first and not algorithm(self.mode).barrier:
            raise ConfigError(
                f"slowest_first is about whom a round waits for; mode {self.mode} has no rounds"
            )
        if -1 < self.global_lr < 0:
            raise ConfigError(f"global_lr: {self.global_lr:g} is below 0; -1 is the default")
        if self.min_steps != 1 and (self.mode != "esync" or self.policy != "adaptive"):
            raise ConfigError(
                'min_steps needs mode = "esync" and policy = "adaptive", '
                f"not {self.mode!r} and {self.policy!r}"
            )
        if self.outer != "sgd" and algorithm(self.mode).aggregation != "mean":
            raise ConfigError(
                f"outer = {self.outer!r} works on the average of a round; mode {self.mode} has none"
            )
        if self.weights != "equal" and algorithm(self.mode).aggregation != "mean":
            raise ConfigError(
                f"weights = {self.weights!r} are of the deltas of a round; mode {self.mode} has none"
            )
        if self.clip_update and (self.weights == "fednova" or self.dcasgd):
            what = 'weights = "fednova"' if self.weights == "fednova" else "dcasgd"
            raise ConfigError(
                f"clip_update bounds what one worker's update does to the model, and {what} makes more of it than it "
                "is long; leave one of them out"
            )
        if self.participation < 1 and self.mode not in ("fedavg", "tifl"):
            raise ConfigError(
                f"participation is drawn in modes fedavg and tifl, not in {self.mode}"
            )
        if self.target_accuracy and not self.evaluate_every_s:
            raise ConfigError("target_accuracy needs evaluations: set evaluate_every_s above 0")
        if self.ema and algorithm(self.mode).aggregation != "mean":
            raise ConfigError(f"ema averages the versions of rounds; mode {self.mode} has none")
        if self.min_workers > self.workers:
            raise ConfigError(
                f"min_workers = {self.min_workers} are more than the workers = {self.workers} that the run begins with"
            )
        if algorithm(self.mode).single and self.workers != 1:
            raise ConfigError(
                f"mode {self.mode} trains on one worker; set workers = 1, not {self.workers}"
            )

    @property
    def steps_per_round(self) -> int:
        """Local steps a round for the modes whose number is fixed."""
        return self.local_steps or algorithm(self.mode).local_steps

    @property
    def outer_lr(self) -> float:
        """The global learning rate. Adam moves each number by about that much, whatever the deltas are."""
        if self.global_lr >= 0:
            return self.global_lr
        return 0.01 if self.outer == "adam" else 1.0

    @property
    def nonblocking(self) -> bool:
        """Whether workers ask while their next step already runs (ESync as published asks and waits)."""
        if self.mode == "esync":
            return self.policy != "paper"
        return not algorithm(self.mode).asks_first

    @property
    def asks_first(self) -> bool:
        """Whether workers wait for an answer before the first local step of each round."""
        return algorithm(self.mode).asks_first

    @property
    def mib_per_chunk(self) -> int:
        """MiB of a chunk, at most. The parameter server's memory grows by two chunks for each worker; the fewer they
        are, the larger their chunks may be. How many there will be is known from `workers` alone."""
        return self.chunk_mib or (2 * CHUNK_MIB if self.workers <= 4 else CHUNK_MIB)

    @property
    def pays_large_chunks(self) -> bool:
        """Whether workers on the parameter server's GPU gain by chunks of `GPU_CHUNK_MIB`: updates and models are both
        word of what lies in its memory then."""
        return self.shared_memory and self.compression == "none" and algorithm(self.mode).barrier

    def cut(self, layout: Layout) -> Layout:
        """A model's layout for this run's parameter servers and in its chunks.

        Raises:
            ModelError: the model has not as many elements as there are servers.
        """
        return layout.cut(self.ps, self.mib_per_chunk)

    @property
    def encoding(self) -> Encoding:
        """How deltas travel."""
        return COMPRESSIONS[self.compression](self.topk)

    def to_wire(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


@dataclass(frozen=True)
class StateConfig:
    """`[state]`: the state server."""

    bind: str = _option(DEFAULT_STATE, "Endpoint to listen on (port * picks a free one).")
    keys: str = _option(
        "", "Directory made by esync-keys: encrypt, and let in the keys of its list alone."
    )
    insecure: bool = _option(False, "Allow listening beyond this machine without keys.")
    max_peers: int = _option(
        MAX_PEERS, "Workers, evaluators and parameter servers that may be in the run.", low=2
    )
    max_rate: float = _option(
        RATE,
        "Messages a second of one worker, or of one stranger; what is beyond that is dropped (0: no limit).",
        low=0,
    )
    metrics_port: int = _option(
        0, "Port for Prometheus metrics and /healthz, over plain HTTP (0: none).", low=0, high=65535
    )
    metrics_bind: str = _option("127.0.0.1", "Address that they are shown at.")


@dataclass(frozen=True)
class PsConfig:
    """`[ps]`: the parameter server."""

    device: str = _option("cpu", "Where to average: cpu (NumPy), cuda or cuda:N (CuPy).")
    bind: str = _option("127.0.0.1", "Address to listen on, or ipc://PATH or inproc://NAME.")
    push_port: int = _option(0, "Port for updates (0: a free one).", low=0, high=65535)
    model_port: int = _option(0, "Port for models (0: a free one).", low=0, high=65535)
    checkpoint_s: float = _option(
        60.0,
        "With a run directory: seconds between two checkpoints (0: none); another one at the end.",
        low=0,
    )
    keep_checkpoints: int = _option(3, "So many are kept, the newest.", low=1)
    keys: str = _option(
        "",
        "Directory made by esync-keys: join with these keys, and seal the tensors (in a file: those of [state]).",
    )
    curve: bool = _option(
        False,
        "With keys: encrypt tensors by CURVE instead of sealing them. Slower, but strangers cannot even connect.",
    )
    insecure: bool = _option(False, "Allow listening beyond this machine without keys.")
    metrics_port: int = _option(
        0, "Port for Prometheus metrics and /healthz, over plain HTTP (0: none).", low=0, high=65535
    )
    metrics_bind: str = _option("127.0.0.1", "Address that they are shown at.")


@dataclass(frozen=True)
class WorkerConfig:
    """`[[workers]]`: one worker, or `count` equal ones."""

    name: str = _option("", "The worker's id (default: host name and six digits by chance).")
    count: int = _option(1, "How many of these (esync-run).", low=1, high=10_000)
    device: str = _option("cpu", "Where to train: cpu, gpu or gpu:N.")
    threads: int = _option(
        0,
        "Threads to compute with on a CPU (0: one if esync-run starts it here, else one for each core).",
        low=0,
    )
    keys: str = _option(
        "",
        "The file NAME.key that esync-keys made for this worker (with esync-run: that of [state]).",
    )
    step_time_s: float = _option(
        0.0, "Emulate a slow machine: stretch each local step to so many seconds.", low=0
    )
    slowdown: float = _option(
        1.0, "Emulate a slow machine: stretch each local step by this factor.", low=1
    )
    jitter: float = _option(
        0.0, "Emulate: spread of the step times (relative standard deviation).", low=0, high=2
    )
    stall_every: float = _option(
        0.0, "Emulate: a stall once in so many steps on average (0: none).", low=0
    )
    stall_s: float = _option(0.0, "Emulate: how long a stall takes.", low=0)
    slow_at_s: float = _option(
        0.0, "Emulate: from this second of the run on, steps take slow_factor times as long.", low=0
    )
    slow_factor: float = _option(1.0, "Emulate: see slow_at_s.", low=0.001)
    join_s: float = _option(0.0, "Join so many seconds after the others (esync-sim).", low=0)
    leave_s: float = _option(0.0, "Leave at this second (esync-sim; 0: stay).", low=0)
    latency_s: float = _option(0.0, "One-way delay of its messages (esync-sim).", low=0)
    bandwidth_mbit: float = _option(
        0.0, "Of its link, each way, in Mbit/s (esync-sim; 0: no limit).", low=0
    )
    host: str = _option("", "Machine to start on over ssh (bin/esync-tmux only).")
    command: str = _option(
        "", "Run this instead of esync-worker: a program that uses esync.Worker (esync-run)."
    )

    def __post_init__(self) -> None:
        check_fields(self, "workers")
        check_device(self.device)


@dataclass(frozen=True)
class NetworkConfig:
    """`[network]`: what the virtual cluster's parameter server is connected by."""

    up_mbit: float = _option(
        0.0, "Bandwidth towards the server, shared by all workers, in Mbit/s (0: no limit).", low=0
    )
    down_mbit: float = _option(
        0.0, "Bandwidth from the server, shared by all workers, in Mbit/s (0: no limit).", low=0
    )
    latency_s: float = _option(0.0, "One-way delay of every message.", low=0)
    model_mb: float = _option(
        0.0, "Pretended size of an update and of a model in MB (0: the real size).", low=0
    )


SIM_ONLY = ("join_s", "leave_s", "latency_s", "bandwidth_mbit")
"""Keys of `[[workers]]` that only the virtual cluster knows."""
FILE_ONLY = ("count", "host", "command", *SIM_ONLY)
"""Keys of `[[workers]]` that are no options of `esync-worker`."""


@dataclass(frozen=True)
class ClusterConfig:
    """A whole `cluster.toml`."""

    run: RunConfig
    state: StateConfig
    ps: PsConfig
    workers: tuple[WorkerConfig, ...]
    network: NetworkConfig = NetworkConfig()

    def __post_init__(self) -> None:
        if self.run.ps > 1 and (self.ps.push_port or self.ps.model_port):
            raise ConfigError(
                f"[ps] push_port and model_port: {self.run.ps} parameter servers cannot have the same ports; "
                "leave them at 0, or give each esync-ps its own on its command line"
            )

    def only_virtual(self) -> list[str]:
        """The keys set in this file that real processes know nothing of."""
        keys = {
            key
            for row in self.workers
            for key in SIM_ONLY
            if getattr(row, key) != getattr(WorkerConfig(), key)
        }
        return sorted(keys) + (["[network]"] if self.network != NetworkConfig() else [])

    def each_worker(self) -> list[WorkerConfig]:
        """Every single worker, named, in order of rank."""
        rows = []
        for number, group in enumerate(self.workers):
            base = group.name or f"worker{number}"
            for i in range(group.count):
                name = base if group.count == 1 else f"{base}-{i}"
                rows.append(dataclasses.replace(group, name=name, count=1))
        if algorithm(self.run.mode).single:
            rows = rows[:1]
        names = [row.name for row in rows]
        for name in names:
            try:
                check_worker_id(name)
            except MessageError as error:
                raise ConfigError(f"[[workers]] name: {error}") from error
            if name in ROLES or name in ps_names(self.run.ps):
                raise ConfigError(
                    f"[[workers]]: {name!r} is the name of another role; choose another"
                )
        if len(set(names)) < len(names):
            twice = next(name for name in names if names.count(name) > 1)
            raise ConfigError(f"[[workers]]: two workers are named {twice!r}; names must differ")
        return rows


def check_room(run: RunConfig, state: StateConfig) -> None:
    """Raise ConfigError if a run waits for more members than it lets in."""
    if run.workers + run.ps > state.max_peers:
        raise ConfigError(
            f"[state] max_peers = {state.max_peers} lets in fewer than the {run.workers} workers and {run.ps} "
            "parameter servers that the run starts with; set it to more than these, with room for evaluators"
        )


def ps_names(count: int) -> list[str]:
    """The names of so many parameter servers, in the order of their shards."""
    return ["ps", *(f"ps{shard}" for shard in range(1, count))]


def check_device(device: str) -> None:
    """Raise ConfigError unless `device` is spelled like one."""
    kind, _, index = device.partition(":")
    if kind not in ("cpu", "gpu") or (index and (kind == "cpu" or not index.isdecimal())):
        raise ConfigError(f"device {device!r}: expected cpu, gpu or gpu:N")


def check_fields(config: Any, where: str) -> None:
    """Check every field's type, choices and bounds.

    Raises:
        ConfigError: names the field, what came, and what was expected.
    """
    hints = typing.get_type_hints(type(config))
    for item in dataclasses.fields(config):
        value, hint = getattr(config, item.name), hints[item.name]
        name = f"{where}.{item.name}"
        accepted = (int, float) if hint is float else (hint,)
        if not isinstance(value, accepted) or (isinstance(value, bool) and hint is not bool):
            expected = " or ".join([hint.__name__, *map(repr, item.metadata["words"])])
            raise ConfigError(f"{name}: expected {expected}, got {value!r:.80}")
        choices = item.metadata.get("choices")
        if choices and value not in choices and value != item.default:
            raise ConfigError(f"{name}: " + unknown(item.name, str(value), choices))
        if isinstance(value, float) and not math.isfinite(value):
            raise ConfigError(f"{name}: {value} is not a finite number")
        low, high = item.metadata.get("low"), item.metadata.get("high")
        if low is not None and not value >= low:  # also refuses NaN
            raise ConfigError(f"{name}: {value} is below {low:g}")
        if high is not None and not value <= high:
            raise ConfigError(f"{name}: {value} is above {high:g}")


def build(cls: type[C], raw: Any, where: str) -> C:
    """An instance of a configuration class from a table of a file or a message.

    Raises:
        ConfigError: an unknown key (with the closest known one), or a value that does not fit.
    """
    if not isinstance(raw, dict):
        raise ConfigError(f"[{where}]: expected a table, got {raw!r:.80}")
    known = {item.name for item in dataclasses.fields(typing.cast(Any, cls))}
    for key in raw:
        if key not in known:
            raise ConfigError(f"[{where}]: " + unknown("key", f"{key!s:.80}", known))
    words = {
        item.name: item.metadata["words"] for item in dataclasses.fields(typing.cast(Any, cls))
    }
    config = cls(**{k: words[k].get(v, v) if isinstance(v, str) else v for k, v in raw.items()})
    check_fields(config, where)
    return config


def read(path: str | Path) -> dict[str, Any]:
    """The tables of a cluster file, not yet checked.

    Raises:
        ConfigError: no such file, or not TOML.
    """
    try:
        with open(path, "rb") as file:
            return tomllib.load(file)
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not valid TOML: {error}") from error


def cluster(raw: dict[str, Any], overrides: dict[str, Any] | None = None) -> ClusterConfig:
    """A checked cluster from a file's tables; `overrides` go into `[run]`.

    `run.workers` follows from `[[workers]]` unless it is given.
    """
    tables = ("run", "state", "ps", "workers", "network")
    for key in raw:
        if key not in tables:
            raise ConfigError(unknown("table", key, tables))
    groups = raw.get("workers", [{}])
    if not isinstance(groups, list) or not groups:
        raise ConfigError("[[workers]]: expected at least one table, written [[workers]]")
    workers = tuple(build(WorkerConfig, group, "workers") for group in groups)
    table = raw.get("run", {})
    if not isinstance(table, dict):
        raise ConfigError(f"[run]: expected a table, got {table!r:.80}")
    run: dict[str, Any] = {}
    overrides = overrides or {}
    for given in (table, overrides):  # each with its preset before what it sets besides
        preset = given.get("preset") if given is overrides or "preset" not in overrides else None
        options = PRESETS.get(preset, {}) if isinstance(preset, str) else {}
        run |= {**options, **given}
    chosen = {**table, **overrides}
    preset = run.get("preset")
    options = PRESETS.get(preset, {}) if isinstance(preset, str) else {}
    if (
        chosen.get("outer", options.get("outer")) != options.get("outer")
        and "global_lr" not in chosen
    ):
        run.pop("global_lr", None)  # it was the other optimiser's
    single = [name for name, entry in ALGORITHMS.items() if entry.single]
    if run.get("mode") in single:
        run["workers"] = 1
    run.setdefault("workers", sum(group.count for group in workers if not group.join_s))
    checked, ps = build(RunConfig, run, "run"), build(PsConfig, raw.get("ps", {}), "ps")
    if not checked.chunk_mib and checked.pays_large_chunks and _on_one_gpu(ps, workers):
        checked = dataclasses.replace(checked, chunk_mib=GPU_CHUNK_MIB)
    return ClusterConfig(
        run=checked,
        state=build(StateConfig, raw.get("state", {}), "state"),
        ps=ps,
        workers=workers,
        network=build(NetworkConfig, raw.get("network", {}), "network"),
    )


def _on_one_gpu(ps: PsConfig, workers: Sequence[WorkerConfig]) -> bool:
    """Whether all of a cluster trains and averages on the same device of one machine."""
    kind, _, index = ps.device.partition(":")
    same = {f"gpu:{index or 0}", *([] if index.strip("0") else ["gpu"])}
    return kind == "cuda" and all(each.device in same and not each.host for each in workers)


def option_type(cls: type, name: str) -> type:
    """The Python type of one field."""
    hint = typing.get_type_hints(cls)[name]
    if isinstance(hint, types.UnionType):
        raise TypeError(f"{name} has more than one type")
    return typing.cast(type, hint)


def task(model: str, dataset: str) -> str:
    """What is trained, in words."""
    return "own loop" if model == OWN else f"{model} on {dataset}"


def check_names(run: RunConfig) -> None:
    """Check the names that only the workers will look up, so that a slip is met where it was made.

    Raises:
        ConfigError: an unknown model or data set.
    """
    from esync import data

    if run.model == OWN:
        return
    if run.model not in models.names():
        raise ConfigError(unknown("model", run.model, models.names()))
    if run.dataset not in data.names():
        raise ConfigError(unknown("data set", run.dataset, data.names()))
    if run.mode == "feddrop" and run.model not in models.CHAINS:
        raise ConfigError(
            f"mode feddrop trains parts of a chain of layers: model {', '.join(models.CHAINS)}, not {run.model}"
        )
