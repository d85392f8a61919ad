"""`esync-state`: the state server on the command line."""

from __future__ import annotations

from typing import Any

import click

from esync import cli, config, keys
from esync.config import RunConfig, StateConfig
from esync.run_dir import make_directory
from esync.state.server import StateServer


@click.command(cls=cli.Command, context_settings={"max_content_width": 100})
@cli.options_of(StateConfig)
@cli.options_of(RunConfig)
@cli.run_options
@click.option("--resume", is_flag=True, help="Go on with the run in --run-dir, if there is one.")
def main(file: str | None, run_dir: str | None, verbose: bool, resume: bool, **values: Any) -> None:
    """Pace one training run: tell each worker when to train on and when to synchronise.

    Everything that workers and the parameter server need to know is given here, and told to them when they
    join; they are started with this server's address alone. The order in which roles are started does not matter.

    \b
    Example, on three machines:
      head$  esync-keys init --workers gpu,old      (and copy keys/gpu.key to gpu, keys/old.key to old)
      head$  esync-state --keys keys --bind tcp://0.0.0.0:10010 --workers 2 --model resnet18-v1 --duration 600
      head$  esync-ps --keys keys --bind 0.0.0.0
      head$  esync-worker --keys keys --evaluate
      gpu$   esync-worker --keys gpu.key --connect tcp://head:10010 --device gpu:0
      old$   esync-worker --keys old.key --connect tcp://head:10010
    """
    cli.start_logging(verbose)
    raw = cli.tables(file)
    overrides = cli.given(values, RunConfig)
    run = config.cluster(raw, overrides).run
    config.check_names(run)
    state = config.build(
        StateConfig, {**raw.get("state", {}), **cli.given(values, StateConfig)}, "state"
    )
    config.check_room(run, state)
    server = StateServer(
        run,
        state.bind,
        insecure=state.insecure,
        run_dir=make_directory(run_dir),
        keys=keys.load_server(state.keys) if state.keys else None,
        resume=resume,
        max_peers=state.max_peers,
        max_rate=state.max_rate,
        metrics_port=state.metrics_port,
        metrics_bind=state.metrics_bind,
        say=cli.say,
    )
    cli.say(f"state server at {server.endpoint}: {run.mode}, {config.task(run.model, run.dataset)}")
    if server.page is not None:
        cli.say(f"metrics at {server.page.url}")
    cli.serve(server.run(), lambda: server.stop("interrupted"))
    summary = server.handlers.summary()
    accuracy = summary["final_accuracy"]
    cli.say(
        f"{summary['rounds']} rounds in {summary['wall_s']:.1f} s, {summary['samples_per_s']:.0f} samples/s, "
        + ("not evaluated" if accuracy is None else f"final accuracy {accuracy:.4f}")
        + (f"; summary in {run_dir}" if run_dir else "")
    )


if __name__ == "__main__":
    main()
