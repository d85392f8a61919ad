"""Reports: the table, the curves, the pages with their figures, the command, and following a run."""

from __future__ import annotations

import io
import json
import re
import sys
import xml.etree.ElementTree as ElementTree

import numpy as np
import pytest
from click.testing import CliRunner
from rich.console import Console

from esync.errors import ConfigError, DataError
from esync.report import cli, watch
from esync.report.compare import UNEQUAL, advice, sections, speed_up, title
from esync.report.logs import LogReader
from esync.report.page import inline_svg
from esync.report.runs import build, entries, load, with_distinct_names
from esync.report.series import bytes_at, mean_and_band, panels
from esync.report.write import write
from tests.test_report_logs import rows_of_a_run, summary_of, write_rows, write_run


def table(*summaries):
    """label -> cells"""
    return {row.label: row.cells for group in sections(list(summaries)) for row in group}


def named(name, **fields):
    return {"name": name, **summary_of(**fields)}


def report(*arguments):
    """(exit status, output) of esync-report."""
    result = CliRunner().invoke(cli.main, [str(argument) for argument in arguments])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result.exit_code, result.output


@pytest.fixture
def figures(monkeypatch):
    """The drawing, quick because its pictures are coarse."""
    from esync.report import figures

    monkeypatch.setattr(figures, "DPI", 20)
    return figures


# The table


def test_the_table_tells_time_speed_traffic_and_computing_of_each_run():
    slow = named("slow", wall_s=9.0, samples_per_s=100.4, final_accuracy=None)
    slow["time_to"] = {"0.7": 5.0, "0.8": None, "0.85": None, "0.9": None}
    assert table(named("quick"), slow) == {
        "time to accuracy 0.70": ["1.2 s", "5.0 s"],
        "time to accuracy 0.80": ["2.8 s", "> 9 s"],
        "time to accuracy 0.85": ["4.2 s", "> 9 s"],
        "speed-up to 0.70": ["4.0x", "1x"],
        "speed-up to 0.80": ["> 3.3x", "1x"],
        "speed-up to 0.85": ["> 2.1x", "1x"],
        "final accuracy": ["0.9000", ""],
        "samples per second": ["171", "100"],
        "rounds": ["3", "3"],
        "seconds": ["4.5", "9.0"],
        "MB moved": ["9.0", "9.0"],
        "computing: fast, cpu 250 ms": ["50%", "50%"],
        "computing: slow, cpu 1000 ms": ["67%", "67%"],
    }


def unequal(steps, **fields):
    """A run with a worker `fast` that was there for 10 s and made so many steps, and a `slow` one with two stays, of 8
    s together, and four steps."""
    stays = [
        ("fast", steps, 0.0, 10.0),
        ("slow", 1, 0.0, 5.0),
        ("slow", 3, 7.0, 10.0),
        ("late", 1, 9.0, 9.0),
    ]
    keys = "name", "steps", "joined_s", "left_s"
    run = {"weights": "equal", **fields.pop("run", {})}
    workers = [dict(zip(keys, stay, strict=True)) for stay in stays]
    told = {"mode": "esync", "split": "iid", "run": run, "workers": workers, "wall_s": 10.0}
    return {**told, **fields}


def test_where_one_worker_steps_far_more_often_another_weighting_is_advised():
    said = advice(unequal(5 * UNEQUAL + 5))
    assert "fast made 21 local steps for each of slow's" in said
    assert "--weights samples, or go without slow" in said
    there = unequal(5 * UNEQUAL + 5)
    there["workers"][0]["left_s"] = None  # as it is until a worker has left
    assert advice(there) == said
    for other in (
        unequal(5 * UNEQUAL - 5),
        unequal(500, split="by-class"),
        unequal(500, run={"weights": "samples"}),
        unequal(500, mode="async"),
        {**unequal(500), "workers": []},
    ):
        assert advice(other) == ""


def test_a_target_that_was_reached_at_once_has_no_speed_up():
    at_once, never = named("a"), named("b")
    at_once["time_to"] = {"0.7": 0.0}
    never["time_to"] = {"0.7": None}
    assert speed_up(at_once, never, "0.7") == speed_up(at_once, named("c"), "0.7") == ""


def test_a_speed_up_against_a_run_that_ended_sooner_is_not_known():
    base = named("base", wall_s=2.0)
    base["time_to"] = {"0.7": None, "0.8": None}
    assert speed_up(named("a"), base, "0.7") == "> 1.6x"
    assert speed_up(named("a"), base, "0.8") == ""


def test_a_title_says_the_algorithm_and_what_is_unusual():
    assert title(named("a")) == "a\nesync"
    assert title(named("a", policy="paper")) == "a\nesync (as published)"
    assert title(named("a", run={"overlap": True})) == "a\nesync (overlap)"
    assert title(named("a", run={"mode": "async", "dcasgd": True})) == "a\nasync (dcasgd)"
    assert title(named("a", virtual=True, ended="unfinished")) == (
        "a\nesync\nvirtual time\nunfinished"
    )


def test_many_workers_are_told_by_least_mean_and_most():
    many = [{"name": f"w{n}", "device": "cpu", "compute_ratio": n / 100} for n in range(50, 80)]
    found = table(named("a", workers=many))
    assert [label for label in found if "computing" in label] == [
        "computing: mean of the workers",
        "computing: least of the workers",
        "computing: most of the workers",
    ]
    assert found["computing: mean of the workers"] == ["64%"]
    assert found["computing: most of the workers"] == ["79%"]


# Seeds


def seeds(tmp_path):
    """Three runs that differ in their seed, and one that differs in its mode too."""
    runs = [
        load(write_run(tmp_path / f"s{n}", run={"seed": n}, final_accuracy=0.8 + n / 100))
        for n in range(3)
    ]
    runs[1].summary["time_to"]["0.85"] = None
    return [*runs, load(write_run(tmp_path / "other", run={"seed": 3, "mode": "sync"}))]


def test_by_seed_runs_that_differ_in_nothing_else_are_one_column_with_mean_and_range(tmp_path):
    runs = seeds(tmp_path)
    assert [len(entry.runs) for entry in entries(runs)] == [1, 1, 1, 1]
    three, one = entries(runs, by_seed=True)
    assert (three.label, one.label) == ("s0, esync, 3 seeds", "other, sync")
    assert title(three.summary) == "s0\nesync\nmean of 3 seeds"
    found = table(three.summary, one.summary)
    assert found["speed-up to 0.80"] == ["1.0x", "1x"]
    assert "speed-up to 0.85" not in found
    assert found["final accuracy"] == ["0.8100 (0.8000 to 0.8200)", "0.9000"]
    assert found["time to accuracy 0.70"] == ["1.2 s", "1.2 s"]
    assert found["time to accuracy 0.85"] == ["> 4 s (2 of 3 sooner)", "4.2 s"]


def test_a_mean_is_taken_over_the_range_that_all_curves_have():
    one = np.array([0.0, 2.0, 4.0]), np.array([0.0, 2.0, 4.0])
    other = np.array([1.0, 3.0]), np.array([3.0, 5.0])
    x, mean, low, high = mean_and_band([one, other])
    assert x.tolist() == [1.0, 2.0, 3.0]
    assert low.tolist() == [1.0, 2.0, 3.0]
    assert high.tolist() == [3.0, 4.0, 5.0]
    assert mean.tolist() == [2.0, 3.0, 4.0]


# Curves


def test_curves_are_over_time_rounds_and_bytes(tmp_path):
    run = load(write_run(tmp_path / "a"))
    shown = panels(entries([run]))
    assert [(panel.xlabel, panel.ylabel) for panel in shown] == [
        ("time (s)", "test accuracy"),
        ("rounds", "test accuracy"),
        ("MB moved", "test accuracy"),
        ("time (s)", "test loss"),
    ]
    assert [panel.curves[0].x.tolist() for panel in shown] == [
        [1.25, 2.75, 4.25],
        [1.0, 2.0, 3.0],
        [3.0, 6.0, 9.0],
        [1.25, 2.75, 4.25],
    ]
    assert shown[0].curves[0].y.tolist() == pytest.approx([0.7, 0.8, 0.9])
    assert shown[3].curves[0].y.tolist() == pytest.approx([0.9, 0.8, 0.7])


def test_of_a_worker_that_came_back_the_time_of_all_its_stays_counts():
    row = {"name": "fast", "device": "cpu", "steps": 1, "samples": 1, "eval_s": 9.0}
    first = {**row, "compute_s": 6.0, "query_s": 1.0, "sync_s": 1.0, "compute_ratio": 0.75}
    second = {**row, "compute_s": 0.0, "query_s": 1.0, "sync_s": 3.0, "compute_ratio": 0.0}
    shown = table(named("a", workers=[first, second]), named("b", workers=[first]))
    assert shown["computing: fast, cpu"] == ["50%", "75%"]


def test_a_report_in_the_place_of_another_leaves_no_timelines_of_that(tmp_path):
    columns = [entries([load(write_run(tmp_path / name))]) for name in ("one", "two")]
    for column in columns:
        write(column, tmp_path / "report")
    left = {path.name for path in (tmp_path / "report").glob("timeline-*")}
    assert left == {"timeline-two.svg", "timeline-two.png"}


def test_bytes_are_those_of_the_log_or_else_in_proportion_to_the_rounds(tmp_path):
    versions = np.array([0.0, 1.0, 3.0])
    counted = load(write_run(tmp_path / "counted", bytes_up=0, bytes_down=0))
    assert bytes_at(counted, versions).tolist() == [3e6, 3e6, 9e6]
    old = load(write_run(tmp_path / "old", counted=False, bytes_up=1000, bytes_down=2000))
    assert bytes_at(old, versions).tolist() == [0.0, 1000.0, 3000.0]
    cut = load(write_run(tmp_path / "cut", counted=False, finished=False))
    assert bytes_at(cut, versions) is None
    assert [panel.xlabel for panel in panels(entries([cut]))] == ["time (s)", "rounds", "time (s)"]


def test_bytes_are_of_all_parameter_servers_and_of_a_version_that_was_made_again_the_last(tmp_path):
    one = load(write_run(tmp_path / "one"))
    rows = [row for row in rows_of_a_run() if row["role"] == "server"]
    write_rows(tmp_path / "one" / "second.jsonl", [{**row, "role": "second"} for row in rows])
    again = {**rows[1], "t": rows[2]["t"] + 1.0, "bytes_up": 4_000_000}
    write_rows(tmp_path / "one" / "third.jsonl", [again])
    two = load(tmp_path / "one")
    versions = np.array([1.0, 2.0, 3.0])
    assert bytes_at(one, versions).tolist() == [3e6, 6e6, 9e6]
    assert bytes_at(two, versions).tolist() == [6e6, 14e6, 18e6]


def test_runs_of_very_different_length_share_a_logarithmic_axis_that_leaves_out_zero(tmp_path):
    def accuracy(rounds):
        return [
            {"t": float(n), "round": n * rounds // 2, "accuracy": 0.5, "loss": None}
            for n in range(3)
        ]

    short = load(write_run(tmp_path / "short", accuracy=accuracy(10)))
    long = load(write_run(tmp_path / "long", accuracy=accuracy(1000), run={"mode": "async"}))
    over_time, over_rounds, *_ = panels(entries([short, long]))
    assert (over_time.wide, over_rounds.wide) == (False, True)
    assert over_rounds.xlabel == "rounds (updates where there is no barrier)"
    assert [curve.x.tolist() for curve in over_rounds.curves] == [[5, 10], [500, 1000]]
    assert not any(panel.ylabel == "test loss" for panel in panels(entries([short, long])))


# Pages and figures


def test_a_report_is_a_table_two_pages_and_the_figures(tmp_path, figures):
    for name, mode in (("a$x$ <b>", "esync"), ("_c|d", "async")):
        write_run(tmp_path / "runs" / name, run={"mode": mode}, virtual=True)
    status, output = report(tmp_path / "runs" / "a$x$ <b>", tmp_path / "runs" / "_c|d")
    assert status == 0, output
    out = tmp_path / "runs" / "report"
    assert f"report: {out / 'report.html'}" in output
    assert "speed-up to 0.70" in output
    stems = ["progress", "speed", "traffic", "computing", "timeline-a_x_b_", "timeline-_c_d"]
    expected = {f"{stem}.{kind}" for stem in stems for kind in ("svg", "png")}
    assert {path.name for path in out.iterdir()} == expected | {"report.html", "report.md"}

    text = (out / "report.md").read_text()
    assert r"# Report on a\$x\$ \<b\>, \_c\|d (virtual time)" in text
    assert "| time to accuracy 0.80 | 2.8 s | 2.8 s |" in text
    assert "Speed-ups are against the last column" in text
    for stem in stems:
        assert f"]({stem}.svg)" in text

    page = (out / "report.html").read_text()
    assert page.count("<svg") == len(stems)
    assert "<h1>Report on a$x$ &lt;b&gt;, _c|d (virtual time)</h1>" in page
    assert "<td>computing: fast, cpu 250 ms</td><td>50%</td>" in page
    assert "<b>" not in page
    assert "src=" not in page  # all in one file
    ids = re.findall(r'\bid="([^"]+)"', page)
    assert len(set(ids)) == len(ids)
    used = re.findall(r'href="#([^"]+)"|url\(#([^)]+)\)', page)
    assert {one or other for one, other in used} <= set(ids)

    words = {stem: _words((out / f"{stem}.svg").read_text()) for stem in stems}
    assert {"test accuracy", "virtual time (s)", "a$x$ <b>, esync, virtual time"} <= words[
        "progress"
    ]
    assert "samples per second of virtual time, all workers together" in words["speed"]
    assert {"MB per second of virtual time", "MB in all"} <= words["traffic"]
    assert {"share of time computing", "fast", "cpu 250 ms"} <= words["computing"]
    assert {"fast, cpu 250 ms", "waiting", "querying", "evaluating"} <= words["timeline-a_x_b_"]
    assert "waiting" not in words["timeline-_c_d"]  # no barrier
    assert {"computing", "synchronising"} <= words["timeline-_c_d"]


def _words(svg):
    """The texts in an SVG; they are text, not outlines."""
    root = ElementTree.fromstring(svg)
    texts = root.iter("{http://www.w3.org/2000/svg}text")
    return {"".join(text.itertext()).strip() for text in texts}


def test_a_report_says_that_the_last_evaluation_may_come(tmp_path):
    write_run(tmp_path / "it")
    late = "it has ended, and judge may still be evaluating its last version."
    assert late in report(tmp_path / "it", "--text")[1]
    with (tmp_path / "it" / "state.jsonl").open("a") as file:
        row = {"t": 1e9 + 9, "role": "state", "event": "leave", "worker": "judge", "reason": "done"}
        file.write(json.dumps(row) + "\n")
    assert "judge" not in report(tmp_path / "it", "--text")[1]


def test_a_report_on_an_unfinished_run_says_so(tmp_path, figures):
    write_run(tmp_path / "cut", finished=False, counted=False)
    with (tmp_path / "cut" / "fast.jsonl").open("a") as file:
        file.write("}{\n")
    status, output = report(tmp_path / "cut", "--out", tmp_path / "out", "--from", 0.5, "--to", 3)
    assert status == 0, output
    assert "unfinished" in output
    text = (tmp_path / "out" / "report.md").read_text()
    assert "cut is unfinished: running, or cut off" in text
    assert "unfinished: running, or cut off |" in text
    assert "1 lines of its logs are damaged" in text
    assert "its logs do not count bytes" in text
    assert "0.5 s to 3 s after the start" in text
    assert not (tmp_path / "out" / "traffic.svg").exists()


def test_seeds_and_many_workers_are_drawn_and_many_bars_become_a_picture(
    tmp_path, figures, monkeypatch
):
    monkeypatch.setattr(figures, "DRAWN", 10)
    workers = [{"name": f"w{n}", "device": "cpu", "compute_ratio": n / 30} for n in range(30)]
    paths = [
        write_run(
            tmp_path / f"s{seed}", run={"seed": seed}, workers=workers, samples_per_s=100 + seed
        )
        for seed in range(2)
    ]
    status, output = report(*paths, "--by-seed", "--out", tmp_path / "out")
    assert status == 0, output
    assert "100 (100 to 101)" in output
    out = tmp_path / "out"
    assert "<image" in (out / "timeline-s0.svg").read_text()
    assert not (out / "timeline-s1.svg").exists()
    assert "workers, in order of their share" in _words((out / "computing.svg").read_text())
    assert "s0, the first of s0, esync, 2 seeds" in (out / "report.md").read_text()


def test_the_same_runs_give_the_same_figures(tmp_path, figures):
    run = entries([load(write_run(tmp_path / "a"))])
    first = figures.save(figures.speed(run), tmp_path, "speed")
    assert figures.save(figures.speed(run), tmp_path, "speed") == first


def test_an_svg_in_a_page_has_ids_of_its_own():
    svg = (
        '<?xml version="1.0"?>\n<!DOCTYPE svg>\n<svg width="1"><metadata>who</metadata>'
        '<path id="m1"/><use xlink:href="#m1" clip-path="url(#m1)"/></svg>\n'
    )
    assert inline_svg(svg, "time line", 'a "b"') == (
        '<svg role="img" aria-label="a &quot;b&quot;" width="1"><path id="ptime-line-m1"/>'
        '<use xlink:href="#ptime-line-m1" clip-path="url(#ptime-line-m1)"/></svg>'
    )


# The command


def test_text_prints_the_table_writes_nothing_and_does_without_matplotlib(tmp_path, monkeypatch):
    for name in [name for name in sys.modules if name.startswith("esync.report.")]:
        if name.rpartition(".")[2] in ("figures", "write"):
            monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)  # importing it fails
    run = write_run(tmp_path / "runs" / "a")
    for option in ("--text", "--no-plots"):
        status, output = report(run, run / "summary.json", option)
        assert status == 0, output
        assert "samples per second" in output
        assert "runs/a (2)" in output
    assert list((tmp_path / "runs").iterdir()) == [run]


def test_a_report_lies_beside_the_first_run_and_is_not_taken_for_a_run(tmp_path, monkeypatch):
    run = write_run(tmp_path / "a")
    assert cli.beside(load(run)) == tmp_path / "report"
    monkeypatch.chdir(run)
    assert cli.beside(load(".")) == tmp_path / "report"
    former = tmp_path / "report"
    former.mkdir()
    (former / "report.html").write_text("")
    assert report(run, former, "--text")[0] == 0
    status, output = report(former)
    assert status == 1
    assert "report is a report, not a run" in output


def test_what_cannot_be_done_is_one_line_that_says_why(tmp_path):
    run = write_run(tmp_path / "a")
    (tmp_path / "file").write_text("")
    (tmp_path / "taken" / "progress.svg").mkdir(parents=True)
    cases = {
        "there is no such directory": [tmp_path / "nowhere"],
        "it holds neither summary.json nor logs": [run, tmp_path],
        "cannot make the directory": [run, "--out", tmp_path / "file"],
        "progress.svg: Is a directory": [run, "--out", tmp_path / "taken"],
        "expected a window that ends later": [run, "--from", 3, "--to", 3],
        "--watch follows one run, not 2": [run, run, "--watch"],
    }
    for text, arguments in cases.items():
        status, output = report(*arguments)
        assert status == 1, output
        assert output.splitlines()[-1].startswith("main: error: "), output
        assert text in output.splitlines()[-1]


# Following a run


class Growing:
    """A run that goes on whenever somebody waits for it."""

    def __init__(self, directory, *, looks=3):
        self.directory = directory
        self.rows = rows_of_a_run()
        self.looks = looks
        self.slept = 0
        directory.mkdir()

    def sleep(self, seconds):
        assert seconds == watch.EVERY_S
        self.slept += 1
        shown = self.rows[: len(self.rows) * self.slept // self.looks]
        write_rows(self.directory / "all.jsonl", shown)
        if self.slept == self.looks:
            summary = self.directory / "summary.json"
            summary.write_text(json.dumps(summary_of(ended="3 rounds")))
            for name in ("fast", "slow", "judge"):
                row = {"t": 1e9 + 6, "role": "state", "event": "leave", "worker": name}
                shown = [*shown, row]
            write_rows(self.directory / "all.jsonl", shown)


def console(*, terminal=False):
    return Console(file=io.StringIO(), width=120, force_terminal=terminal)


@pytest.mark.parametrize("terminal", [False, True])
def test_a_run_is_followed_from_before_its_first_line_to_its_end(tmp_path, terminal):
    growing = Growing(tmp_path / "a")
    shown = console(terminal=terminal)
    run = watch.follow(growing.directory, shown, sleep=growing.sleep)
    assert run is not None
    assert run.finished
    assert growing.slept == 3
    text = shown.file.getvalue()
    assert "round 1  0:01" in text or "round 1  0:02" in text
    assert "round 3" in text
    assert "accuracy 0.9000 (round 3)" in text
    assert "ended: 3 rounds" in text
    if not terminal:
        assert len(text.splitlines()) == 3


def test_the_live_table_has_a_row_for_each_worker(tmp_path):
    run = load(write_run(tmp_path / "a", finished=False))
    shown = console()
    shown.print(watch.live_table(run))
    lines = [line.split() for line in shown.file.getvalue().splitlines()]
    assert lines[1] == [
        "worker",
        "device",
        "rounds",
        "steps",
        "samples",
        "s/step",
        "computing",
        "loss",
    ]
    assert lines[2] == ["fast", "fast", "cpu", "3", "9", "576", "0.250", "50%", "0.333"]
    assert lines[3] == ["slow", "slow", "cpu", "3", "3", "192", "1.000", "67%"]


def test_ctrl_c_ends_the_watching_and_reports_what_is_there(tmp_path):
    write_run(tmp_path / "a", finished=False)

    def interrupted(seconds):
        raise KeyboardInterrupt

    shown = console()
    run = watch.follow(tmp_path / "a", shown, sleep=interrupted)
    assert run is not None
    assert not run.finished
    assert "no longer watching" in shown.file.getvalue()
    (tmp_path / "nothing yet").mkdir()
    assert watch.follow(tmp_path / "nothing yet", shown, sleep=interrupted) is None
    with pytest.raises(DataError, match="there is no such directory"):
        watch.follow(tmp_path / "nowhere", shown, sleep=interrupted)


def test_a_run_is_over_when_it_has_a_summary_and_everybody_left_or_nothing_happens(tmp_path):
    directory = write_run(tmp_path / "a", finished=False)
    log = LogReader(directory).read()
    assert not watch.over(directory, log, quiet=99)
    write_run(tmp_path / "a")
    assert not watch.over(directory, log, quiet=0)  # the last evaluation may be still going on
    assert watch.over(directory, log, quiet=watch.QUIET_LOOKS)
    log.left |= {"fast", "slow", "judge"}
    assert watch.over(directory, log, quiet=0)


def test_watch_reports_when_the_run_has_ended(tmp_path, monkeypatch):
    growing = Growing(tmp_path / "a", looks=1)
    follow = watch.follow
    monkeypatch.setattr(
        watch, "follow", lambda path, console: follow(path, console, sleep=growing.sleep)
    )
    status, output = report(tmp_path / "a", "--watch", "--text")
    assert status == 0, output
    assert "ended: 3 rounds" in output
    assert "time to accuracy 0.70" in output


def test_a_headline_tells_a_run_that_waits_from_one_that_ends(tmp_path):
    directory = tmp_path / "a"
    write_rows(directory / "state.jsonl", rows_of_a_run()[:2])
    assert watch.headline(build(directory, LogReader(directory).read())).endswith("not started yet")
    stop = {"t": 1e9 + 9, "role": "state", "event": "stop", "reason": "enough", "round": 3}
    write_rows(directory / "state.jsonl", [*rows_of_a_run(), stop])
    assert watch.headline(build(directory, LogReader(directory).read())).endswith("ending: enough")


def test_distinct_names_reach_the_table(tmp_path):
    runs = with_distinct_names([load(write_run(tmp_path / x / "a")) for x in "xy"])
    assert [title(run.summary).splitlines()[0] for run in runs] == ["x/a", "y/a"]


def test_a_figure_that_cannot_be_written_is_said_to_be(tmp_path, figures):
    run = entries([load(write_run(tmp_path / "a"))])
    with pytest.raises(ConfigError, match=r"cannot write .*nowhere/speed.svg: No such file"):
        figures.save(figures.speed(run), tmp_path / "nowhere", "speed")
