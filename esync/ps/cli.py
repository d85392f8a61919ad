"""`esync-ps`: the parameter server on the command line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from esync import cli, config
from esync.config import PsConfig
from esync.errors import ConfigError
from esync.ps import checkpoint
from esync.ps.server import ParameterServer
from esync.run_dir import make_directory


@click.command(cls=cli.Command, context_settings={"max_content_width": 100})
@cli.options_of(PsConfig)
@cli.join_options
@click.option("--name", default="", help="This server's id.  [default: host name and process id]")
@click.option(
    "--shard",
    type=click.IntRange(0),
    help="With run.ps above 1: which share of the model.  [default: the first that is free]",
)
@click.option(
    "--resume",
    is_flag=True,
    help="Go on from the newest checkpoint in --run-dir, if there is one.",
)
@click.option(
    "--join",
    "parts",
    type=click.Path(exists=True, file_okay=False),
    metavar="DIR",
    help="Serve nothing: make DIR/model.safetensors of the files model-K-of-N that N servers wrote.",
)
@cli.run_options
def main(
    file: str | None,
    run_dir: str | None,
    verbose: bool,
    connect: str | None,
    wait: float,
    name: str,
    shard: int | None,
    resume: bool,
    parts: str | None,
    **values: Any,
) -> None:
    """Average the workers' updates and give the result back to all of them.

    Needs the state server's address; workers learn from there where this server listens. With --run-dir the
    final model is written to model.safetensors.

    With `ps = N` in [run] there are N of these, on any machines: each keeps and averages one Nth of the model.
    """
    cli.start_logging(verbose)
    if parts is not None:
        path = checkpoint.join(Path(parts))
        if path is None:
            raise ConfigError(f"{parts} has no files model-K-of-N.safetensors")
        cli.say(f"model: {path}")
        return
    cli.keep_memory(one_arena=True)
    raw = cli.tables(file)
    own = dict(raw.get("ps", {}))
    own["keys"] = own.get("keys") or raw.get("state", {}).get("keys", "")
    ps = config.build(PsConfig, {**own, **cli.given(values, PsConfig)}, "ps")
    server = ParameterServer(
        cli.state_endpoint(connect, raw),
        ps,
        run_dir=make_directory(run_dir),
        wait_s=wait,
        name=name,
        shard=shard,
        resume=resume,
        say=cli.say,
    )
    cli.serve(server.run(), server.stop)


if __name__ == "__main__":
    main()
