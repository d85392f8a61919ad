"""`esync-report`: runs side by side, as a table, as pages with figures, or live."""

from __future__ import annotations

from pathlib import Path

import click
from rich.console import Console

from esync import cli
from esync.errors import ConfigError, DataError
from esync.report.compare import comparison
from esync.report.runs import Run, entries, load, with_distinct_names
from esync.version import VERSION


@click.command(cls=cli.Command, context_settings={"max_content_width": 100})
@click.argument("runs", nargs=-1, required=True)
@click.option(
    "--out",
    type=click.Path(file_okay=True),
    help="Where the pages and figures go.  [default: `report` beside the first run]",
)
@click.option(
    "--no-plots", "--text", "text_only", is_flag=True, help="Print the table; write nothing."
)
@click.option(
    "--from",
    "begin_s",
    type=click.FloatRange(0),
    help="Timelines begin so many seconds into the run.",
)
@click.option(
    "--to",
    "end_s",
    type=click.FloatRange(0),
    help="And end there.  [default: a few rounds in the middle]",
)
@click.option(
    "--by-seed", is_flag=True, help="Show the mean of runs that differ in nothing but their seed."
)
@click.option(
    "--watch", is_flag=True, help="Follow one run by its logs until it ends; then report."
)
@click.version_option(VERSION, prog_name="esync")
def main(
    runs: tuple[str, ...],
    out: str | None,
    text_only: bool,
    begin_s: float | None,
    end_s: float | None,
    by_seed: bool,
    watch: bool,
) -> None:
    """Compare runs: time to each accuracy, speed, traffic, share of time computing.

    RUNS are directories such as runs/demo-esync; a run that goes on is reported as far as it is. Speed-ups are
    against the last one. Writes report.html, report.md and the figures (SVG and PNG): accuracy over time, rounds
    and bytes, speed, traffic, computing time, and a timeline of each run.

    \b
    Example:
      esync-report runs/demo-esync runs/demo-sync --out report
    """
    if begin_s is not None and end_s is not None and end_s <= begin_s:
        raise ConfigError(f"--from {begin_s:g} --to {end_s:g}: expected a window that ends later")
    console = Console(width=None if Console().is_terminal else 100)
    found = _watched(runs, console) if watch else [load(run) for run in _no_reports(runs)]
    if not found:
        return
    columns = entries(with_distinct_names(found), by_seed=by_seed)
    console.print(comparison([entry.summary for entry in columns]))
    for run in found:
        if run.note:
            console.print(run.note, highlight=False, markup=False)
    if text_only:
        return
    from esync.report.write import write  # matplotlib takes a second to import: not for the table

    directory = Path(out) if out is not None else beside(found[0])
    path = write(columns, directory, begin_s=begin_s, end_s=end_s)
    console.print(f"report: {path}", highlight=False, soft_wrap=True)


def beside(run: Run) -> Path:
    """Where a report goes unless it is told: `report` in the directory that the run lies in."""
    path = run.directory
    parent = path.resolve().parent if path.name in ("", "..") else path.parent
    return parent / "report"


def _no_reports(runs: tuple[str, ...]) -> list[str]:
    """RUNS without former reports: those lie among the runs, and `runs/*` names them too."""
    kept = [run for run in runs if not _is_report(Path(run))]
    if not kept:
        raise DataError(f"{runs[0]} is a report, not a run. Give the directory of a run")
    return kept


def _is_report(path: Path) -> bool:
    has_run = (path / "summary.json").exists() or any(path.glob("*.jsonl"))
    return (path / "report.html").is_file() and not has_run


def _watched(runs: tuple[str, ...], console: Console) -> list[Run]:
    if len(runs) != 1:
        raise ConfigError(f"--watch follows one run, not {len(runs)}")
    from esync.report.watch import follow

    run = follow(Path(runs[0]), console)
    return [] if run is None else [run]


if __name__ == "__main__":
    main()
