"""`esync-status`: the live table of any run, on the command line."""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import click
from rich.console import Console

from esync import cli, transport
from esync.errors import ConfigError, DataError, EsyncError, TransportError
from esync.keys import load_client
from esync.report.compare import read_summary
from esync.run import view
from esync.run_dir import ENDPOINT
from esync.status.inquiry import Inquiry
from esync.version import VERSION

REFRESH_S = 0.25
PIPED_WIDTH = 160
"""Columns of a table that is not shown on a terminal."""


@click.command(cls=cli.Command, context_settings={"max_content_width": 100})
@click.argument("endpoint", default="")
@click.option(
    "--keys",
    type=click.Path(),
    help=f"With servers that have keys: a file NAME.key, or the servers' directory.  [default: ${transport.KEYS}]",
)
@click.option("--watch", is_flag=True, help="Go on until the run ends, or Ctrl-C.")
@click.option(
    "--json", "as_json", is_flag=True, help="As JSON; with --watch an object a line, each second."
)
@click.option(
    "--wait",
    type=click.FloatRange(0),
    default=5.0,
    show_default=True,
    help="Seconds to wait for the state server.",
)
@click.version_option(VERSION, prog_name="esync")
def main(endpoint: str, keys: str | None, watch: bool, as_json: bool, wait: float) -> None:
    """Show who is in a run, and how it gets on.

    ENDPOINT is the state server's, or the directory of a run on this machine (runs/NAME); by default $ESYNC_STATE,
    or else tcp://127.0.0.1:10010.

    \b
    Example:
      esync-status tcp://head:10010 --watch
    """
    where = _endpoint(endpoint)
    keys = keys or os.environ.get(transport.KEYS)
    own = load_client(keys) if keys else None
    cli.interrupt_on_sigterm()
    with closing(Inquiry(where, "status", own)) as inquiry:
        try:
            inquiry.first(wait)
        except TransportError as error:
            if ended := _how_it_ended(endpoint):
                raise EsyncError(ended) from error
            raise
        if as_json:
            _show_json(inquiry, watch, wait)
        elif watch:
            _show_live(inquiry, wait)
        else:
            _console().print(view.live_table(inquiry.table, inquiry.waiting_for))


def _endpoint(given: str) -> str:
    """The state server's endpoint: as given, as a run's directory has it, or the default."""
    given = given or os.environ.get(transport.STATE) or transport.DEFAULT_STATE
    if "://" not in given and Path(given).is_dir():
        try:
            given = (Path(given) / ENDPOINT).read_text(encoding="utf-8").strip()
        except OSError as error:
            raise ConfigError(f"{given} is no run's directory: it has no endpoint in it") from error
    return transport.resolved(transport.check_endpoint(given), transport.DEFAULT_STATE)


def _how_it_ended(directory: str) -> str:
    """How the run in a directory ended, in words; empty if it has not, or nobody knows."""
    if not directory:
        return ""
    try:
        ended = read_summary(Path(directory) / "summary.json")["ended"]
    except (DataError, OSError):
        return ""
    return f"the run in {directory} has ended: {ended}. esync-report {directory} sums it up"


def _show_json(inquiry: Inquiry, watch: bool, wait_s: float) -> None:
    def show() -> None:
        whole = {**inquiry.table, "waiting_for": inquiry.waiting_for}
        click.echo(json.dumps(whole, indent=None if watch else 2))

    if watch:
        _watch(inquiry, show, wait_s, every_s=1.0)
    else:
        show()


def _show_live(inquiry: Inquiry, wait_s: float) -> None:
    console = _console()
    with (
        contextlib.suppress(KeyboardInterrupt),
        view.shown(console, live=console.is_terminal) as show,
    ):
        _watch(inquiry, lambda: show(inquiry.table, inquiry.waiting_for), wait_s)
    console.print(view.live_table(inquiry.table, inquiry.waiting_for))


def _watch(
    inquiry: Inquiry, show: Callable[[], Any], wait_s: float, every_s: float = REFRESH_S
) -> None:
    """Show the table until the run has ended.

    Raises:
        TransportError: the state server went without having said that the run ends.
    """
    heard = shown = time.monotonic()
    show()
    while True:
        time.sleep(REFRESH_S)
        now = time.monotonic()
        if inquiry.ask():
            heard = now
            if now - shown >= every_s:
                shown = now
                show()
        elif inquiry.table["stopped"] and (inquiry.is_lost or now - heard > wait_s):
            show()
            return
        elif now - heard > wait_s:
            raise TransportError(
                f"the state server at {inquiry.endpoint} is gone: no answer for {wait_s:g} s"
            )


def _console() -> Console:
    console = Console()
    return console if console.is_terminal else Console(width=PIPED_WIDTH)


if __name__ == "__main__":
    main()
