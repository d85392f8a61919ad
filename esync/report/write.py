"""Writes a report: draws the figures that the runs have data for, and the two pages around them."""

from __future__ import annotations

import re
from pathlib import Path

from esync.errors import ConfigError
from esync.report import figures
from esync.report.page import Picture, html_page, markdown, page
from esync.report.runs import Entry, Run
from esync.report.series import panels
from esync.report.timeline import Timeline, timeline

HTML, MARKDOWN = "report.html", "report.md"


def write(
    entries: list[Entry],
    directory: Path,
    *,
    begin_s: float | None = None,
    end_s: float | None = None,
) -> Path:
    """Write the report on `entries` into `directory`; what an earlier one left there is replaced.

    Args:
        begin_s, end_s: what the timelines show, in seconds since the run's start.

    Returns:
        the path of the HTML page.

    Raises:
        ConfigError: the directory or a file in it cannot be written, or the window ends before it begins.
    """
    shown, notes = _timelines(entries, begin_s, end_s)
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(
            f"cannot make the directory {directory}: {error.strerror}; choose another with --out"
        ) from error
    _remove_timelines(directory)
    pictures = _pictures(entries, shown, directory)
    made = page(entries, pictures, _notes(entries) + notes)
    _write(directory / MARKDOWN, markdown(made))
    _write(directory / HTML, html_page(made))
    return directory / HTML


def _write(path: Path, text: str) -> None:
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise ConfigError(
            f"cannot write {path}: {error.strerror}; choose another directory with --out"
        ) from error


def _remove_timelines(directory: Path) -> None:
    """An earlier report's may be of other runs."""
    if (directory / HTML).is_file():
        for path in (*directory.glob("timeline-*.svg"), *directory.glob("timeline-*.png")):
            path.unlink(missing_ok=True)


def _timelines(
    entries: list[Entry], begin_s: float | None, end_s: float | None
) -> tuple[list[Timeline], list[str]]:
    """The timelines (of several seeds, the first one's), and what is to be said of those that are missing."""
    shown, notes = [], []
    for entry in entries:
        run = entry.runs[0]
        label = entry.label if len(entry.runs) == 1 else f"{run.name}, the first of {entry.label}"
        made = timeline(run, label, begin_s, end_s)
        if made is not None:
            shown.append(made)
            continue
        between = "" if begin_s is None and end_s is None else " in that part of the run"
        notes.append(f"{run.name} has no timeline: its logs have no rounds of workers{between}.")
    return shown, notes


def _pictures(entries: list[Entry], shown: list[Timeline], directory: Path) -> list[Picture]:
    several = any(len(entry.runs) > 1 for entry in entries)
    mean = " Of several seeds the mean." if several else ""
    spread = " Of several seeds the mean, and from the least to the greatest." if several else ""
    drawn = []
    found = panels(entries)
    if found:
        caption = "An accuracy counts when its version of the model was published." + spread
        drawn.append(("progress", "Accuracy and loss", caption, figures.progress(found)))
    drawn.append(("speed", "Samples per second", spread.strip(), figures.speed(entries)))
    if figures.counted_bytes(entries):
        caption = "Tensors to and from the parameter server; evaluators' included." + mean
        drawn.append(("traffic", "Traffic", caption, figures.traffic(entries)))
    if any(entry.summary["workers"] for entry in entries):
        caption = "Computing / (computing + asking + synchronising and waiting)." + mean
        drawn.append(("computing", "Share of time computing", caption, figures.computing(entries)))
    stems: list[str] = []
    for item in shown:
        stem = "timeline-" + re.sub(r"[^A-Za-z0-9.+-]+", "_", item.title.partition(",")[0])
        stems.append(stem if stem not in stems else f"{stem}-{len(stems) + 1}")
        heading = f"Timeline of {item.title}"
        drawn.append((stems[-1], heading, _timeline_caption(item), figures.timeline(item)))
    return [
        Picture(stem, heading, caption, figures.save(figure, directory, stem))
        for stem, heading, caption, figure in drawn
    ]


def _timeline_caption(shown: Timeline) -> str:
    text = (
        f"{shown.begin_s:.3g} s to {shown.end_s:.3g} s after the start"
        + (f"; {shown.note}" if shown.note else "")
        + ". To the right: the share of this time that was spent computing. White lines part local steps, drawn "
        "equally long within a round; waiting is for the others or for one's turn; blank: nothing was logged."
    )
    if shown.boundaries:
        text += " Numbers above: the version that was published."
    return text


def _notes(entries: list[Entry]) -> list[str]:
    return [note for entry in entries for run in entry.runs for note in _notes_on(run)]


def _notes_on(run: Run) -> list[str]:
    notes = [run.note] if run.note else []
    counted = any(row.bytes_up is not None for row in run.log.published)
    if not counted and run.summary["accuracy"]:
        known = run.summary["bytes_up"] is not None
        how = "are taken in proportion to the rounds" if known else "are not known"
        notes.append(f"{run.name}: its logs do not count bytes; those moved by a round {how}.")
    if run.log.skipped:
        notes.append(f"{run.name}: {run.log.skipped} lines of its logs are damaged and left out.")
    return notes
