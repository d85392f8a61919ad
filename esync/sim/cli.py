"""`esync-sim`: a cluster file in virtual time, with real gradients."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from rich.console import Console

from esync import cli, config, run_dir
from esync.algorithms import algorithm
from esync.config import OWN, ClusterConfig, RunConfig
from esync.errors import ConfigError, EsyncError
from esync.report.compare import advice, comparison, read_summary
from esync.run import launcher

if TYPE_CHECKING:
    from esync.sim.cluster import Cluster

INTERRUPTED = "interrupted"
"""Why a run ended by Ctrl-C ended."""
PROGRESS_S = 5.0
"""Real seconds between two lines of progress."""


@click.command(cls=cli.Command, context_settings={"max_content_width": 100})
@click.argument("file", type=click.Path())
@cli.results_options
@cli.options_of(RunConfig)
@click.option("-q", "--quiet", is_flag=True, help="No progress.")
@click.option("-v", "--verbose", is_flag=True, help="Log more.")
def main(
    file: str,
    name: str | None,
    runs: str,
    force: bool,
    quiet: bool,
    verbose: bool,
    **values: Any,
) -> None:
    """Train a cluster file in virtual time: real gradients, no waiting, the same result each time.

    FILE is as for esync-run; each of [[workers]] needs a step_time_s, and may have jitter, stalls, a slowdown in
    mid-run, a time to join and to leave, and a link; [network] has the parameter server's link. What the virtual
    cluster takes for granted is in docs/virtual-cluster.md. Results are those of esync-run, in virtual seconds.

    \b
    Example:
      esync-sim clusters/paper-2019.toml --mode sync --duration 1800
    """
    cli.start_logging(verbose)
    cluster = config.cluster(config.read(file), cli.given(values, RunConfig))
    check(cluster)
    directory = run_dir.results_directory(file, name, runs, cluster.run.mode, force)
    cli.interrupt_on_sigterm()
    ended = ""
    try:
        ended = simulate(cluster, directory, say=lambda text: None if quiet else cli.say(text))[
            "ended"
        ]
    except KeyboardInterrupt:
        ended = INTERRUPTED  # the second time
    finally:
        _sum_up(cluster.run.mode, directory)
    if ended == INTERRUPTED:
        sys.stdout.flush()
        os._exit(130)  # without waiting for what threads still compute


def _sum_up(mode: str, directory: Path) -> None:
    if (directory / "summary.json").exists():
        console = Console(width=None if Console().is_terminal else 100)
        summary = read_summary(directory)
        console.print(f"{algorithm(mode).summary}\nended: {summary['ended']}")
        console.print(comparison([summary]))
        if said := advice(summary):
            console.print(said, highlight=False)
        console.print(f"virtual time; results: {directory}", highlight=False)


def check(cluster: ClusterConfig) -> None:
    """See whether this cluster can run in virtual time.

    Raises:
        ConfigError: it cannot; the text says why.
    """
    run, workers = cluster.run, cluster.each_worker()
    config.check_names(run)
    if run.model == OWN:
        raise ConfigError('esync-sim trains the models of esync, not a loop of your own ("own")')
    for worker in workers:
        if not worker.step_time_s:
            raise ConfigError(
                f"[[workers]] {worker.name}: the virtual cluster needs its step_time_s "
                "(seconds of a local step)"
            )
        if worker.slowdown != 1:
            raise ConfigError(
                f"[[workers]] {worker.name}: slowdown stretches real steps; give the virtual cluster a "
                "longer step_time_s instead"
            )
        if 0 < worker.leave_s <= worker.join_s:
            raise ConfigError(
                f"[[workers]] {worker.name}: leave_s ({worker.leave_s:g}) comes after join_s "
                f"({worker.join_s:g})"
            )
    present = sum(not worker.join_s for worker in workers)
    if run.workers > present:
        raise ConfigError(
            f"the run starts with {run.workers} workers, but only {present} are there from the beginning; "
            "lower run.workers, or take out a join_s"
        )
    if not (run.rounds or run.duration_s or run.target_accuracy):
        raise ConfigError(
            "say when to stop: --rounds, --duration (virtual seconds) or --target-accuracy"
        )


def simulate(
    cluster: ClusterConfig, directory: Path | None, *, say: Callable[[str], None]
) -> dict[str, Any]:
    """Run a cluster in virtual time, until its end or Ctrl-C.

    Args:
        directory: for the configuration, the log, the summary and the final model.
        say: told how it goes.

    Returns:
        The summary.

    Raises:
        EsyncError: it cannot go on; what there is by then is in `directory`.
    """
    from esync.sim.cluster import virtual_cluster  # JAX takes a second to import: not for --help
    from esync.sim.learner import Learner

    if directory is not None:
        launcher.write_config(cluster, directory / run_dir.CONFIG)
    count = len(cluster.each_worker())
    say(f"virtual cluster of {count} workers: {cluster.run.mode}, {cluster.run.model}")
    learner = Learner(cluster.run, say)
    log = directory / "events.jsonl" if directory else None
    virtual = virtual_cluster(cluster, learner, log=log)
    failure: EsyncError | None = None
    began = time.monotonic()
    try:
        _advance(virtual, say)
    except KeyboardInterrupt:
        say("interrupted: summing up; Ctrl-C again does not wait for it")
        virtual.state.stop(INTERRUPTED)
    except EsyncError as error:
        failure = error
        virtual.state.stop(str(error))
    learner.end_training()
    summary = virtual.finish()
    summary["run"]["ps"] = cluster.run.ps  # there they are one
    learner.close()
    if directory is not None:
        text = json.dumps(summary, indent=1)
        (directory / "summary.json").write_text(text + "\n", encoding="utf-8")
        virtual.server.save(directory / "model.safetensors")
    if failure is not None:
        raise failure
    say(f"{summary['wall_s']:.0f} virtual seconds in {time.monotonic() - began:.0f} s")
    return summary


def _advance(virtual: Cluster, say: Callable[[str], None]) -> None:
    """Go on until the run has ended, with a line of progress now and then."""
    began = told = time.monotonic()
    while virtual.state.stopped is None:
        virtual.step()
        now = time.monotonic()
        if now - told > PROGRESS_S:
            told = now
            say(_progress(virtual.state.status(), now - began))


def _progress(status: dict[str, Any], real_s: float) -> str:
    accuracy = "" if status["accuracy"] is None else f", accuracy {status['accuracy']:.4f}"
    limit = f" of {status['duration_s']:.0f}" if status["duration_s"] else ""
    rounds = f" of {status['rounds']}" if status["rounds"] else ""
    return (
        f"{status['elapsed_s']:.0f}{limit} virtual s in {real_s:.0f} s: "
        f"round {status['round']}{rounds}{accuracy}"
    )


if __name__ == "__main__":
    main()
