"""Every algorithm on the papers' cluster, in virtual time with real gradients, beside the published figures.

The cluster is `clusters/paper-2019.toml`: four GPUs and two CPUs fifty times slower. Each algorithm trains on
Fashion-MNIST split at random and by class; SSGD is given five times as long as the others.

    python benchmarks/paper.py --quick
    python benchmarks/paper.py --model cnn --seeds 3 --page docs/results/paper-2019.md
"""

from __future__ import annotations

import json
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from statistics import mean
from typing import Any

import click
import measure
from rich.console import Console
from rich.table import Table

from esync import config
from esync.sim.cli import simulate

HERE = Path(__file__).resolve().parent.parent
CLUSTER = "clusters/paper-2019.toml"
SPLITS = ("iid", "by-class")
SSGD, PUBLISHED = "SSGD", "ESync as published"
SSGD_TIMES = 5
"""SSGD trains so many times as long as the others."""
EVALUATE_S = 5.0
"""Virtual seconds between evaluations at least: most rounds take longer, and then each is evaluated."""
LAST = 0.05
"""The accuracy at the end is the mean over this share of the run: from one version to the next it swings by 0.02."""
ALGORITHMS: dict[str, dict[str, Any]] = {
    SSGD: {"mode": "sync"},
    "ASGD": {"mode": "async"},
    "DC-ASGD": {"mode": "async", "dcasgd": True},
    "SSP": {"mode": "ssp"},
    "FedAvg, 20 steps": {"mode": "fedavg"},
    "FedAsync, constant": {"mode": "fedasync", "staleness_weight": "constant"},
    "FedAsync, hinge": {"mode": "fedasync", "staleness_weight": "hinge"},
    "FedAsync, polynomial": {"mode": "fedasync", "staleness_weight": "polynomial"},
    "TiFL": {"mode": "tifl"},
    "FedDrop": {"mode": "feddrop"},
    "one GPU alone": {"mode": "local"},
    PUBLISHED: {"preset": "paper"},
    "ESync": {"mode": "esync"},
    "ESync, overlap": {"mode": "esync", "overlap": True},
    "ESync, preset fast": {"preset": "fast"},
    "ESync, preset skewed": {"preset": "skewed"},
}
IID_ONLY = ("ESync, overlap", "ESync, preset fast", "one GPU alone")
"""What esync refuses on the split by class; and one worker has all classes however they are split."""
HEADLINE = (SSGD, PUBLISHED, "ESync, preset fast", "ESync, preset skewed")
"""What is repeated with other seeds."""
PAPER = {
    SSGD: {"samples/s": 47, "computing, GPU": 0.005, "computing, CPU": 0.40, "by class": 0.73},
    "ASGD": {"samples/s": 120, "computing, GPU": 0.02, "computing, CPU": 0.55, "by class": 0.69},
    "DC-ASGD": {"samples/s": 105, "by class": 0.73},
    PUBLISHED: {
        "samples/s": 1560,
        "computing, GPU": 0.40,
        "computing, CPU": 0.40,
        "speed-up": 7,
        "by class": 0.78,
    },
}
"""Li et al. 2019, ResNet-18 on Fashion-MNIST, lr 0.0005; by class after 120 minutes; read off the charts."""


def train(
    name: str, split: str, seed: int, seconds: float, model: str, runs: Path
) -> dict[str, Any]:
    """One run; its figures."""
    options = {
        **ALGORITHMS[name],
        "model": model,
        "split": split,
        "seed": seed,
        "duration_s": seconds * (SSGD_TIMES if name == SSGD else 1),
        "evaluate_every_s": EVALUATE_S,
    }
    cluster = config.cluster(config.read(HERE / CLUSTER), options)
    directory = runs / f"{name}, {split}, {seed}".replace(", ", "-").replace(" ", "-")
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir(parents=True)
    began = time.monotonic()
    summary = simulate(cluster, directory, say=lambda text: None)
    return {
        "name": name,
        "split": split,
        "seed": seed,
        "directory": str(directory),
        "real_s": time.monotonic() - began,
        **figures(summary, seconds),
    }


def figures(summary: dict[str, Any], seconds: float) -> dict[str, Any]:
    """What is compared of one run; `accuracy_then` is that after `seconds`, however long the run is."""
    accuracy = summary["accuracy"]
    gpus = [w["compute_ratio"] for w in summary["workers"] if w["name"].startswith("gpu")]
    cpus = [w["compute_ratio"] for w in summary["workers"] if w["name"].startswith("cpu")]
    return {
        "time_to": {f"{x:.2f}": time_to(accuracy, x) for x in (0.70, 0.80, 0.83, 0.85, 0.87)},
        "accuracy": accuracy_at(accuracy, summary["wall_s"]),
        "accuracy_then": accuracy_at(accuracy, seconds),
        "final_accuracy": summary["final_accuracy"],
        "samples_per_s": summary["samples_per_s"],
        "gpu_ratio": mean(gpus),
        "cpu_ratio": mean(cpus) if cpus else None,
        "mb_per_s": (summary["bytes_up"] + summary["bytes_down"]) / 1e6 / summary["wall_s"],
        "rounds": summary["rounds"],
        "wall_s": summary["wall_s"],
    }


def accuracy_at(accuracy: list[dict[str, Any]], seconds: float) -> float:
    """The mean over the last part of the run up to then; the last one if none was evaluated in it."""
    upto = [row for row in accuracy if row["t"] <= seconds + EVALUATE_S]
    last = [row["accuracy"] for row in upto if row["t"] >= seconds * (1 - LAST)]
    return mean(last) if last else float(upto[-1]["accuracy"])


def time_to(accuracy: list[dict[str, Any]], threshold: float) -> float | None:
    """The first second at which a version had this accuracy."""
    return next((row["t"] for row in accuracy if row["accuracy"] >= threshold), None)


def mean_time(rows: Iterable[dict[str, Any]], threshold: str) -> float | None:
    """The mean over seeds; None unless every seed got there."""
    times = [row["time_to"][threshold] for row in rows]
    return mean(times) if times and all(t is not None for t in times) else None


def of(rows: list[dict[str, Any]], name: str, split: str) -> list[dict[str, Any]]:
    """The runs of one algorithm on one split, all seeds."""
    return [row for row in rows if row["name"] == name and row["split"] == split]


# Tables, as lists of cells: for the terminal and for the page

Cells = list[list[str]]


def overview(rows: list[dict[str, Any]], split: str) -> Cells:
    """Every algorithm on one split (its first seed)."""
    table = [
        [
            "algorithm",
            "s to 0.80",
            "times sooner than SSGD",
            "s to 0.85",
            "accuracy at the end",
            "samples/s",
            "computing, GPU",
            "computing, CPU",
            "MB/s",
            "rounds",
        ]
    ]
    first = [row for row in rows if row["split"] == split and row["seed"] == rows[0]["seed"]]
    base = next((row["time_to"]["0.80"] for row in first if row["name"] == SSGD), None)
    for row in first:
        reached = row["time_to"]["0.80"]
        table.append(
            [
                row["name"],
                _seconds(reached, row["wall_s"]),
                f"{base / reached:.1f}" if base and reached else "",
                _seconds(row["time_to"]["0.85"], row["wall_s"]),
                f"{row['accuracy']:.3f}",
                f"{row['samples_per_s']:.0f}",
                f"{row['gpu_ratio']:.3f}",
                "" if row["cpu_ratio"] is None else f"{row['cpu_ratio']:.3f}",
                f"{row['mb_per_s']:.1f}",
                str(row["rounds"]),
            ]
        )
    return table


def headline(rows: list[dict[str, Any]], split: str, threshold: str) -> Cells:
    """The recommended settings against ESync as published and SSGD: means over the seeds."""
    table = [
        [
            "algorithm",
            f"s to {threshold}, mean",
            "of each seed",
            "times sooner than published",
            "than SSGD",
            "accuracy at the end, mean",
            "of each seed",
        ]
    ]
    times = {name: mean_time(of(rows, name, split), threshold) for name in HEADLINE}
    for name in HEADLINE:
        mine = of(rows, name, split)
        if not mine:
            continue
        table.append(
            [
                name,
                "" if times[name] is None else f"{times[name]:.0f}",
                ", ".join(_seconds(row["time_to"][threshold], row["wall_s"]) for row in mine),
                _sooner(times[PUBLISHED], times[name]),
                _sooner(times[SSGD], times[name]),
                f"{mean(row['accuracy'] for row in mine):.4f}",
                ", ".join(f"{row['accuracy']:.3f}" for row in mine),
            ]
        )
    return table


def beside_paper(rows: list[dict[str, Any]]) -> Cells:
    """What Li et al. 2019 measured, and what the virtual cluster gives."""
    table = [["", "published", "here"]]
    then = min(row["wall_s"] for row in rows)
    seed = rows[0]["seed"]
    for name, published in PAPER.items():
        found = {row["split"]: row for row in rows if (row["name"], row["seed"]) == (name, seed)}
        if "iid" not in found:
            continue
        base = next(
            (r["time_to"]["0.80"] for r in of(rows, SSGD, "iid") if r["seed"] == seed), None
        )
        iid = found["iid"]
        here = {
            "samples/s": f"{iid['samples_per_s']:.0f}",
            "computing, GPU": f"{iid['gpu_ratio']:.3f}",
            "computing, CPU": f"{iid['cpu_ratio']:.3f}",
            "speed-up": _sooner(base, iid["time_to"]["0.80"]) or "",
            "by class": f"{found['by-class']['accuracy_then']:.3f}" if "by-class" in found else "",
        }
        for what, value in published.items():
            label = (
                f"accuracy by class (there 7200 s, here {then:.0f})" if what == "by class" else what
            )
            label = "speed-up to accuracy 0.8, i.i.d." if what == "speed-up" else label
            table.append([f"{name}: {label}", str(value), here[what]])
    return table


def _seconds(value: float | None, wall_s: float) -> str:
    return f"{value:.0f}" if value is not None else f"> {wall_s:.0f}"


def _sooner(base: float | None, mine: float | None) -> str:
    return f"{base / mine:.1f}" if base and mine else ""


def show(title: str, cells: Cells) -> None:
    """Print a table."""
    table = Table(title=title, title_justify="left")
    for column in cells[0]:
        table.add_column(column, justify="left" if column in ("", "algorithm") else "right")
    for row in cells[1:]:
        table.add_row(*row)
    Console(width=None if Console().is_terminal else 150).print(table)


def markdown(cells: Cells) -> str:
    """A table of a Markdown page."""
    lines = ["| " + " | ".join(cells[0]) + " |", "|" + "---|" * len(cells[0])]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in cells[1:]])


def tables(rows: list[dict[str, Any]]) -> list[tuple[str, Cells]]:
    """Every table with its title."""
    seconds = min(row["wall_s"] for row in rows)
    found = [
        (
            f"{split}: {seconds:.0f} virtual seconds, SSGD {SSGD_TIMES} times that",
            overview(rows, split),
        )
        for split in SPLITS
    ]
    for split, threshold in (("iid", "0.87"), ("by-class", "0.80")):
        found.append((f"{split}: the presets over seeds", headline(rows, split, threshold)))
    found.append(("Beside Li et al. 2019 (ResNet-18)", beside_paper(rows)))
    return found


def page(rows: list[dict[str, Any]], where: dict[str, Any], command: str, path: Path) -> None:
    """Write the page."""
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=HERE, capture_output=True, text=True
    ).stdout.strip()
    versions = ", ".join(f"{key} {value}" for key, value in where.items())
    text = [
        "# The papers' cluster, in virtual time",
        "",
        f"Written by `{command}` at commit `{commit}`; {versions}. "
        f"Seeds {', '.join(map(str, sorted({row['seed'] for row in rows})))}; where there is one figure, it is "
        f"the first seed's. Model `{rows[0]['model']}`, lr 0.05, batch 64. Accuracy at the end: mean over the last "
        f"{LAST:.0%} of the run. A time to an accuracy is that of the first evaluated version which has it; versions "
        f"are evaluated when they come, within {EVALUATE_S:g} s of the last evaluation the newest when these are over.",
    ]
    for title, cells in tables(rows):
        if len(cells) == 1:
            continue
        text += ["", f"## {title}", "", markdown(cells)]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(text) + "\n", encoding="utf-8")


@click.command()
@click.option("--quick", is_flag=True, help="Some minutes: mlp, 200 virtual seconds, one seed.")
@click.option("--model", default=None, help="Model to train [cnn; quick: mlp].")
@click.option("--seconds", type=float, default=None, help="Virtual seconds [1800; quick: 200].")
@click.option("--seeds", type=click.IntRange(min=1), default=None, help="Seeds [3; quick: 1].")
@click.option("--only", multiple=True, help="Only this algorithm (again and again for more).")
@click.option("--runs", default="runs/paper-2019", show_default=True, help="Where the runs go.")
@click.option("--page", "path", type=click.Path(), help="Write a Markdown page here.")
@click.option("--json", "file", type=click.File("w", lazy=True), help="Write the figures here too.")
def main(
    quick: bool,
    model: str | None,
    seconds: float | None,
    seeds: int | None,
    only: tuple[str, ...],
    runs: str,
    path: str | None,
    file: Any,
) -> None:
    """Every algorithm on the cluster of Li et al. 2019, i.i.d. and by class, in virtual time."""
    model = model or ("mlp" if quick else "cnn")
    seconds = seconds or (200.0 if quick else 1800.0)
    seeds = seeds or (1 if quick else 3)
    unknown = [name for name in only if name not in ALGORITHMS]
    if unknown:
        raise click.BadParameter(f"{unknown[0]!r}; there are: {', '.join(ALGORITHMS)}")
    plan = [
        (name, split, seed)
        for seed in range(seeds)
        for split in SPLITS
        for name in ALGORITHMS
        if (not only or name in only) and (seed == 0 or name in HEADLINE)
        if split == "iid" or name not in IID_ONLY
    ]
    rows: list[dict[str, Any]] = []
    console = Console(stderr=True)
    for number, (name, split, seed) in enumerate(plan, start=1):
        row = train(name, split, seed, seconds, model, Path(runs))
        rows.append({"model": model, **row})
        console.print(
            f"{number}/{len(plan)} {name}, {split}, seed {seed}: {row['accuracy']:.3f} at the end, "
            f"{_seconds(row['time_to']['0.80'], row['wall_s'])} s to 0.80 ({row['real_s']:.0f} s)",
            highlight=False,
        )
    for title, cells in tables(rows):
        if len(cells) > 1:
            show(title, cells)
    where = measure.environment()
    command = "python benchmarks/paper.py " + shlex.join(sys.argv[1:])
    if path:
        page(rows, where, command, Path(path))
    if file:
        json.dump({"environment": where, "command": command, "rows": rows}, file, indent=1)
        file.write("\n")


if __name__ == "__main__":
    main()
