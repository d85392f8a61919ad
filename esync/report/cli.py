"""`esync-report`: runs side by side."""

from __future__ import annotations

import click
from rich.console import Console

from esync import cli
from esync.report.compare import comparison, read_summary


@click.command(cls=cli.Command, context_settings={"max_content_width": 100})
@click.argument("runs", nargs=-1, required=True)
def main(runs: tuple[str, ...]) -> None:
    """Compare finished runs: time to each accuracy, speed, traffic, share of time computing.

    RUNS are directories such as runs/demo-esync. Speed-ups are against the last one.
    """
    summaries = [read_summary(run) for run in runs]
    console = Console(width=None if Console().is_terminal else 100)
    console.print(comparison(summaries))


if __name__ == "__main__":
    main()
