"""A run as a report sees it: its name, its summary and its log, from its directory."""

from __future__ import annotations

import dataclasses
import json
import re
import tomllib
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from esync.algorithms import ALGORITHMS, Algorithm
from esync.errors import DataError
from esync.report.compare import mode_text, read_summary
from esync.report.logs import Log, LogReader
from esync.report.unfinished import summary_so_far

UNIX = 1e8
"""A start before this many Unix seconds (1973) is one in virtual time."""


@dataclass(slots=True)
class Run:
    """One run.

    Attributes:
        name: what it is called; unique in a report.
        summary: the contents of `summary.json`, or the same from the logs if there is none.
        finished: whether there is a `summary.json`.
    """

    directory: Path
    name: str
    summary: dict[str, Any]
    log: Log
    finished: bool

    @property
    def config(self) -> dict[str, Any]:
        """The `[run]` configuration; empty if nobody wrote it down."""
        config: dict[str, Any] = self.summary.get("run", {})
        return config

    @property
    def algorithm(self) -> Algorithm:
        """How the run's mode works; a mode that is not known passes for one with a barrier."""
        return ALGORITHMS.get(str(self.summary["mode"]), ALGORITHMS["sync"])

    @property
    def virtual(self) -> bool:
        """Whether its times are virtual."""
        return bool(self.summary.get("virtual"))

    @property
    def note(self) -> str:
        """What its figures lack, in words; empty if that is nothing."""
        if not self.finished:
            return f"{self.name} is unfinished: running, or cut off. Its figures are what its logs tell so far."
        joined = self.log.joined
        judges = sorted(name for name in self.log.present if joined[name] == "evaluator")
        if judges and not self.virtual:
            return f"{self.name} has ended, and {', '.join(judges)} may still be evaluating its last version."
        return ""


@dataclass(slots=True)
class Entry:
    """One column of the table, one line in the figures: a run, or runs that differ in their seed alone."""

    label: str
    runs: list[Run]
    summary: dict[str, Any]


def load(directory: str | Path) -> Run:
    """Read a run's directory (or its `summary.json`).

    Raises:
        DataError: it is not there, or holds neither a summary nor logs.
    """
    path = Path(directory)
    if path.is_file():
        read_summary(path)  # says what is wrong with a file that is not a summary
        path = path.parent
    if not path.is_dir():
        raise DataError(
            f"cannot read {path}: there is no such directory. Give the directory of a run, such as runs/NAME"
        )
    return build(path, LogReader(path).read())


def build(directory: Path, log: Log) -> Run:
    """A run from its log, and from what else is in its directory.

    Raises:
        DataError: the directory holds neither a summary nor logs, or the summary is damaged.
    """
    name = directory.resolve().name
    if (directory / "summary.json").exists():
        return Run(directory, name, read_summary(directory), log, True)
    if not any(directory.glob("*.jsonl")):
        raise DataError(
            f"{directory} is not a run: it holds neither summary.json nor logs (*.jsonl). "
            "Give the directory of a run, such as runs/NAME"
        )
    summary: dict[str, Any] = {"name": name, **summary_so_far(log, _config(directory))}
    if log.starts and log.zero < UNIX:
        summary["virtual"] = True
    return Run(directory, name, summary, log, False)


def _config(directory: Path) -> dict[str, Any]:
    """`[run]` of the directory's cluster.toml, if it is there and readable."""
    try:
        raw = tomllib.loads((directory / "cluster.toml").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    run = raw.get("run", {})
    return run if isinstance(run, dict) else {}


def with_distinct_names(runs: list[Run]) -> list[Run]:
    """Runs whose directories are called the same get the parent's name too, or a number."""
    count = Counter(run.name for run in runs)
    long = ["/".join(run.directory.resolve().parts[-2:]).lstrip("/") for run in runs]
    names = [long[n] if count[run.name] > 1 else run.name for n, run in enumerate(runs)]
    made = []
    for n, run in enumerate(runs):
        earlier = names[:n].count(names[n])
        name = f"{names[n]} ({earlier + 1})" if earlier else names[n]
        made.append(dataclasses.replace(run, name=name, summary={**run.summary, "name": name}))
    return made


def entries(runs: list[Run], *, by_seed: bool = False) -> list[Entry]:
    """What is compared: every run, or, `by_seed`, the means of those that differ in `run.seed` alone."""
    groups: dict[Any, list[Run]] = {}
    for n, run in enumerate(runs):
        groups.setdefault(_all_but_the_seed(run) if by_seed else n, []).append(run)
    return [_entry(group) for group in groups.values()]


def _all_but_the_seed(run: Run) -> str:
    config = {key: value for key, value in run.config.items() if key != "seed"}
    workers = sorted((row["name"], row["device"]) for row in run.summary["workers"])
    return json.dumps([config, workers, run.virtual, run.finished], sort_keys=True)


def _entry(runs: list[Run]) -> Entry:
    first = runs[0].summary
    summary = first if len(runs) == 1 else mean_summary([run.summary for run in runs])
    mode = mode_text(first)
    name = str(first["name"])
    label = name if mode in re.split("[^a-z]", name) else f"{name}, {mode}"
    if len(runs) > 1:
        label += f", {len(runs)} seeds"
    if summary.get("virtual"):
        label += ", virtual time"
    if not all(run.finished for run in runs):
        label += ", unfinished"
    return Entry(label, runs, summary)


def mean_summary(summaries: list[dict[str, Any]]) -> dict[str, Any]:
    """The mean of several runs' summaries, which stay in it as `members`.

    A time to an accuracy that one of them did not reach is None, like a count that one of them lacks.
    """
    first = summaries[0]
    fields = ("samples_per_s", "rounds", "wall_s", "bytes_up", "bytes_down", "final_accuracy")
    return {
        **first,
        **{key: _mean([s[key] for s in summaries]) for key in fields},
        "time_to": {
            threshold: _mean([s["time_to"].get(threshold) for s in summaries])
            for threshold in first["time_to"]
        },
        "members": summaries,
    }


def _mean(values: list[Any]) -> float | None:
    return None if any(value is None for value in values) else fmean(values)
