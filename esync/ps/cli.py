"""`esync-ps`: the parameter server on the command line."""

from __future__ import annotations

from typing import Any

import click

from esync import cli, config
from esync.config import PsConfig
from esync.ps.server import ParameterServer


@click.command(cls=cli.Command, context_settings={"max_content_width": 100})
@cli.options_of(PsConfig)
@cli.join_options
@click.option("--name", default="", help="This server's id.  [default: host name and process id]")
@cli.run_options
def main(
    file: str | None,
    run_dir: str | None,
    verbose: bool,
    connect: str | None,
    wait: float,
    name: str,
    **values: Any,
) -> None:
    """Average the workers' updates and give the result back to all of them.

    Needs the state server's address; workers learn from there where this server listens. With --run-dir the
    final model is written to model.safetensors.
    """
    cli.start_logging(verbose)
    cli.keep_memory()
    raw = cli.tables(file)
    ps = config.build(PsConfig, {**raw.get("ps", {}), **cli.given(values, PsConfig)}, "ps")
    server = ParameterServer(
        cli.state_endpoint(connect, raw),
        ps,
        run_dir=cli.make_directory(run_dir),
        wait_s=wait,
        name=name,
        say=cli.say,
    )
    cli.serve(server.run(), server.stop)


if __name__ == "__main__":
    main()
