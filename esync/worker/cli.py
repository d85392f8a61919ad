"""`esync-worker`: a worker, or an evaluator, on the command line."""

from __future__ import annotations

import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from esync import cli, config, threads
from esync.config import WorkerConfig
from esync.errors import ConfigError
from esync.journal import Journal
from esync.keys import SERVER, load_client
from esync.run_dir import make_directory


@click.command(cls=cli.Command, context_settings={"max_content_width": 100})
@cli.options_of(WorkerConfig, skip=config.FILE_ONLY)
@click.option("--rank", type=int, help="The rank asked for.  [default: given on joining]")
@click.option(
    "--evaluate", is_flag=True, help="Do not train: evaluate each new model on the test set."
)
@cli.join_options
@cli.run_options
def main(
    file: str | None,
    run_dir: str | None,
    verbose: bool,
    connect: str | None,
    wait: float,
    rank: int | None,
    evaluate: bool,
    **values: Any,
) -> None:
    """Train with the others, at this machine's own speed.

    Needs the state server's address; everything else (model, data set, learning rate, the parameter server) it
    learns from there. With --config and --name, device and emulated speed are those of that worker in the file.
    """
    cli.start_logging(verbose)
    cli.keep_memory()
    raw = cli.tables(file)
    options = cli.given(values, WorkerConfig)
    row = _row_of(raw, options.get("name", "")) if raw and not evaluate else {}
    settings = config.build(WorkerConfig, {**row, **options}, "workers")
    directory = make_directory(run_dir)
    endpoint = cli.state_endpoint(connect, raw)
    if settings.threads:
        os.environ.update(threads.variables(settings.threads))
    with cli.ended_at_once():
        from esync.worker import loop  # JAX takes a second to import: not for --help
        from esync.worker.client import Worker
        from esync.worker.step import device_for
    cli.interrupt_on_sigterm()

    # An evaluator that is not told where to be is where JAX would be.
    device = None if evaluate and "device" not in options else device_for(settings.device)
    role = "evaluator" if evaluate else "worker"
    name = settings.name
    if evaluate and not name:
        own = load_client(settings.keys).name if settings.keys else SERVER
        name = "evaluator" if own == SERVER else f"{own}-evaluator"
    with Worker(
        endpoint,
        name=name,
        rank=rank,
        device=_label(settings),
        role=role,
        keys=settings.keys,
        wait_s=wait,
        say=cli.say,
    ) as worker:
        journal = Journal(_log(directory, worker.name), worker.name)
        rank_text = "" if evaluate else f" with rank {worker.rank}"
        cli.say(f"{worker.name} joined {endpoint} as {role}{rank_text}")
        try:
            if evaluate:
                loop.evaluate(worker, device, journal, cli.say)
            else:
                loop.train(worker, settings, journal, cli.say)
                steps = worker.totals.steps
                cli.say(f"the run is over at version {worker.round}: {steps} local steps here")
        finally:
            journal.write("end", totals=worker.totals.to_wire())
            journal.close()


def _row_of(raw: dict[str, Any], name: str) -> dict[str, Any]:
    """The settings of the worker of that name in a cluster file."""
    rows = config.cluster(raw).each_worker()
    for row in rows:
        if row.name == name:
            return {k: v for k, v in asdict(row).items() if k not in config.FILE_ONLY}
    if not name:
        return {}
    raise ConfigError(
        f"the file has no worker named {name!r}; it has {', '.join(row.name for row in rows)}"
    )


def _label(settings: WorkerConfig) -> str:
    """The device as people see it in tables."""
    if settings.step_time_s:
        return f"{settings.device} {settings.step_time_s * 1000:g} ms"
    if settings.slowdown > 1:
        return f"{settings.device} /{settings.slowdown:g}"
    return settings.device


def _log(directory: Path | None, name: str) -> Path | None:
    safe = "".join(c if c.isalnum() or c in "-_." else "_" for c in name)
    return directory / f"{safe}.jsonl" if directory else None


if __name__ == "__main__":
    main()
