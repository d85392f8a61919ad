"""Reading a run's logs; and the small run, exact to the millisecond, that the other tests of reports read too."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from esync.errors import DataError
from esync.report.logs import LogReader
from esync.report.runs import load, with_distinct_names

ROUND_S = 1.5


def rows_of_a_run(*, rounds: int = 3, zero: float = 1e9, counted: bool = True) -> list[dict]:
    """Two workers with a barrier. In a round that begins at 0, `fast` computes 3 steps until 0.75, asks until 0.8,
    sends until 0.9, waits until version is out at 1.25, and receives it until 1.5; `slow` computes one step until
    1.0, sends until 1.2, waits until 1.25, and receives until 1.5. The evaluator works from 1.35 to 1.75."""
    rows: list[dict] = []

    def write(t: float, role: str, event: str, **fields: Any) -> None:
        rows.append({"t": zero + t, "role": role, "event": event, **fields})

    for rank, name in enumerate(("fast", "slow")):
        write(-2.0, "state", "join", worker=name, kind="worker", rank=rank)
        write(-1.0, name, "start", rank=rank, device=f"{name} cpu")
    write(-2.0, "state", "join", worker="judge", kind="evaluator", rank=-1)
    write(0.0, "state", "start", workers=["fast", "slow"])
    fast = {"steps": 3, "samples": 192, "compute_s": 0.75, "query_s": 0.05, "sync_s": 0.7}
    slow = {"steps": 1, "samples": 64, "compute_s": 1.0, "query_s": 0.0, "sync_s": 0.5}
    for n in range(rounds):
        at, version = n * ROUND_S, n + 1
        sums = {"bytes_up": 1_000_000 * version, "bytes_down": 2_000_000 * version}
        early_s = {"fast": 0.35, "slow": 0.05}
        write(
            at + 1.25, "server", "round", round=version, early_s=early_s, **sums if counted else {}
        )
        write(at + 1.25, "state", "round", round=version, members=["fast", "slow"])
        write(at + 1.5, "fast", "round", round=n, **fast, loss=1 / version, late=False)
        write(at + 1.5, "slow", "round", round=n, **slow, loss=None, late=False)
        found = {"round": version, "accuracy": 0.6 + 0.1 * version, "loss": 1.0 - 0.1 * version}
        write(at + 1.75, "judge", "accuracy", **found, eval_s=0.4)
        write(at + 1.75, "state", "accuracy", **found, run_s=at + 1.25)
    return rows


def summary_of(rounds: int = 3, **fields: Any) -> dict[str, Any]:
    """The summary that belongs to it; `run` may be given in part."""
    run = {"mode": "esync", "seed": 0, **fields.pop("run", {})}
    made = {
        "mode": run["mode"],
        "policy": "adaptive",
        "model": "cnn",
        "dataset": "digits",
        "split": "iid",
        "seed": run["seed"],
        "ended": f"{rounds} rounds",
        "rounds": rounds,
        "wall_s": rounds * ROUND_S,
        "samples": 256 * rounds,
        "samples_per_s": 256 / ROUND_S,
        "bytes_up": 1_000_000 * rounds,
        "bytes_down": 2_000_000 * rounds,
        "workers": [
            {"name": "fast", "device": "cpu 250 ms", "compute_ratio": 0.5},
            {"name": "slow", "device": "cpu 1000 ms", "compute_ratio": 0.6667},
        ],
        "accuracy": [
            {
                "t": n * ROUND_S + 1.25,
                "round": n + 1,
                "accuracy": 0.7 + 0.1 * n,
                "loss": 0.9 - 0.1 * n,
            }
            for n in range(rounds)
        ],
        "final_accuracy": 0.6 + 0.1 * rounds,
        "time_to": {"0.7": 1.25, "0.8": 2.75, "0.85": 4.25, "0.9": None},
        "run": run,
    }
    return {**made, **fields}


def write_rows(path: Path, rows: list[dict]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def write_run(
    directory: Path,
    *,
    rounds: int = 3,
    zero: float = 1e9,
    counted: bool = True,
    finished: bool = True,
    **fields: Any,
) -> Path:
    """A run's directory: a log per role, and its summary if it is `finished`."""
    roles: dict[str, list[dict]] = {}
    for row in rows_of_a_run(rounds=rounds, zero=zero, counted=counted):
        roles.setdefault(row["role"], []).append(row)
    for role, rows in roles.items():
        write_rows(directory / f"{role}.jsonl", rows)
    if finished:
        (directory / "summary.json").write_text(json.dumps(summary_of(rounds, **fields)))
    return directory


def test_rows_are_told_apart_by_role_and_event_and_not_by_their_file(tmp_path):
    write_run(tmp_path / "many")
    write_rows(tmp_path / "one" / "virtual.jsonl", rows_of_a_run())
    many, one = (LogReader(tmp_path / name).read() for name in ("many", "one"))
    assert one == many
    assert set(one.rounds) == {"fast", "slow"}
    assert [row.round for row in one.rounds["fast"]] == [0, 1, 2]
    assert one.rounds["slow"][1].loss is None
    assert [row.version for row in one.published] == [1, 2, 3]
    assert one.published[1].early_s == {"fast": 0.35, "slow": 0.05}
    assert one.published[1].bytes_down == 4_000_000
    assert [row.version for row in one.evaluations["judge"]] == [1, 2, 3]
    assert [row.run_s for row in one.accuracy] == [1.25, 2.75, 4.25]
    assert one.joined == {"fast": "worker", "slow": "worker", "judge": "evaluator"}
    assert one.present == {"fast", "slow", "judge"}
    assert one.zero == 1e9


def test_a_log_is_read_on_from_where_it_was_and_a_half_written_line_waits_for_its_end(tmp_path):
    path = tmp_path / "fast.jsonl"
    rows = [json.dumps(row) for row in rows_of_a_run() if row["role"] == "fast"]
    path.write_text(rows[1] + "\n" + rows[2][:40])
    reader = LogReader(tmp_path)
    assert [row.round for row in reader.read().rounds["fast"]] == [0]
    with path.open("a") as file:
        file.write(rows[2][40:] + "\n" + rows[3])
    assert [row.round for row in reader.read().rounds["fast"]] == [0, 1, 2]
    assert [row.round for row in reader.read().rounds["fast"]] == [0, 1, 2]
    assert reader.log.skipped == 0


DAMAGED = {
    "no JSON": b"{half of a line",
    "bytes": b"\xff\xfe\x00",
    "no object": b"[1, 2]",
    "a word": b'"round"',
    "no time": b'{"role": "fast", "event": "round"}',
    "time is no number": b'{"t": "now", "role": "fast", "event": "end"}',
    "time is not finite": b'{"t": NaN, "role": "fast", "event": "end"}',
    "a part is missing": b'{"t": 1, "role": "fast", "event": "round", "compute_s": 1}',
    "early_s is no table": b'{"t": 1, "role": "ps", "event": "round", "round": 1, "early_s": [3]}',
}


@pytest.mark.parametrize("name", DAMAGED)
def test_a_damaged_line_is_counted_and_nothing_else_is_lost(tmp_path, name):
    write_run(tmp_path)
    path = tmp_path / "fast.jsonl"
    lines = path.read_bytes().splitlines()
    path.write_bytes(b"\n".join([*lines[:2], DAMAGED[name], b"", *lines[2:]]) + b"\n")
    log = LogReader(tmp_path).read()
    assert log.skipped == 1
    assert [row.round for row in log.rounds["fast"]] == [0, 1, 2]
    assert log.first == 1e9 - 2


def test_what_an_earlier_run_left_in_the_same_logs_does_not_count(tmp_path):
    earlier = rows_of_a_run(rounds=5)
    stop = {"t": 1e9 + 8, "role": "state", "event": "stop", "reason": "enough", "round": 5}
    write_rows(tmp_path / "all.jsonl", [*earlier, stop, *rows_of_a_run(zero=1e9 + 20)])
    log = LogReader(tmp_path).read()
    assert log.zero == 1e9 + 20
    assert {name: len(rows) for name, rows in log.rounds.items()} == {"fast": 3, "slow": 3}
    assert [row.version for row in log.published] == [1, 2, 3]
    assert len(log.accuracy) == len(log.evaluations["judge"]) == 3
    assert log.stops == []


def test_an_earlier_run_that_was_killed_does_not_count_either(tmp_path):
    write_rows(tmp_path / "all.jsonl", [*rows_of_a_run(), *rows_of_a_run(zero=1e9 + 20)])
    log = LogReader(tmp_path).read()
    assert [row.t for row in log.published] == [1e9 + 20 + t for t in (1.25, 2.75, 4.25)]


def test_a_run_without_a_summary_is_summed_up_from_its_logs(tmp_path):
    directory = write_run(tmp_path / "cut", finished=False)
    (directory / "cluster.toml").write_text('[run]\nmode = "sync"\nmodel = "cnn"\nseed = 4\n')
    run = load(directory)
    assert not run.finished
    assert not run.virtual
    summary = run.summary
    assert (summary["name"], summary["ended"]) == ("cut", "unfinished")
    assert (summary["mode"], summary["model"], summary["seed"]) == ("sync", "cnn", 4)
    assert summary["rounds"] == 3
    assert summary["wall_s"] == pytest.approx(4.75)  # the last evaluation
    assert summary["samples"] == 3 * 256
    assert summary["samples_per_s"] == pytest.approx(768 / 4.75)
    assert (summary["bytes_up"], summary["bytes_down"]) == (3_000_000, 6_000_000)
    assert summary["final_accuracy"] == pytest.approx(0.9)
    assert summary["time_to"] == {"0.7": 1.25, "0.8": 2.75, "0.85": 4.25, "0.9": 4.25}
    fast, slow = summary["workers"]
    assert (fast["name"], fast["device"], fast["steps"]) == ("fast", "fast cpu", 9)
    assert fast["compute_ratio"] == pytest.approx(0.5)
    assert slow["compute_ratio"] == pytest.approx(1.0 / 1.5)


def test_bytes_of_a_run_without_a_summary_are_those_of_all_its_parameter_servers(tmp_path):
    directory = write_run(tmp_path / "cut", finished=False)
    rows = [row for row in rows_of_a_run(rounds=2) if row["role"] == "server"]
    write_rows(directory / "second.jsonl", [{**row, "role": "second"} for row in rows])
    summary = load(directory).summary
    assert (summary["rounds"], summary["bytes_up"], summary["bytes_down"]) == (3, 5e6, 10e6)


def test_the_time_in_which_a_run_stood_still_is_not_the_run_s(tmp_path):
    """After 3 s it is gone on with, 100 s later; what is from the second between, belongs to the first part's end."""
    rows = rows_of_a_run(rounds=4)
    for row in rows:
        row["t"] += 100.0 if row["t"] > 1e9 + 4.0 else 0.0
    rows.append({"t": 1e9 + 103.0, "role": "state", "event": "goes_on", "run_s": 3.0})
    write_rows(tmp_path / "virtual.jsonl", sorted(rows, key=lambda row: row["t"]))
    log = LogReader(tmp_path).read()
    assert [log.run_s(1e9 + t) for t in (-1.0, 2.0, 3.5, 50.0, 103.0, 104.5)] == [
        -1,
        2,
        3,
        3,
        3,
        4.5,
    ]
    published = [log.run_s(row.t) for row in log.published]
    assert published == pytest.approx([1.25, 2.75, 4.25, 5.75])
    assert load(tmp_path).summary["wall_s"] == pytest.approx(6.25)


def test_a_run_that_has_not_started_has_done_nothing_yet(tmp_path):
    write_rows(tmp_path / "state.jsonl", rows_of_a_run()[:2])
    summary = load(tmp_path).summary
    assert (summary["rounds"], summary["wall_s"], summary["samples_per_s"]) == (0, 0.0, 0.0)
    assert summary["final_accuracy"] is None
    assert summary["bytes_up"] is None
    assert [row["name"] for row in summary["workers"]] == ["fast"]


def test_an_unfinished_run_that_starts_at_zero_is_in_virtual_time(tmp_path):
    assert load(write_run(tmp_path / "virtual", zero=0.0, finished=False)).virtual
    assert load(write_run(tmp_path / "said", virtual=True)).virtual
    assert not load(write_run(tmp_path / "real")).virtual


def test_a_summary_without_logs_is_a_run_too(tmp_path):
    (tmp_path / "summary.json").write_text(json.dumps(summary_of()))
    assert load(tmp_path).summary["rounds"] == 3
    assert load(tmp_path / "summary.json").directory == tmp_path


def test_what_is_no_run_is_refused_with_its_reason(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "summary.json").write_text("{")
    (tmp_path / "text").write_text("hello")
    with pytest.raises(DataError, match=r"cannot read .*nowhere: there is no such directory"):
        load(tmp_path / "nowhere")
    with pytest.raises(DataError, match=r"empty is not a run: it holds neither summary.json nor"):
        load(tmp_path / "empty")
    with pytest.raises(DataError, match=r"broken/summary.json is not a summary"):
        load(tmp_path / "broken")
    with pytest.raises(DataError, match=r"text is not a summary"):
        load(tmp_path / "text")


def test_runs_of_the_same_name_are_told_apart(tmp_path):
    paths = [tmp_path / "x" / "a", tmp_path / "y" / "a", tmp_path / "y" / "b"]
    runs = [load(write_run(path)) for path in [*paths, paths[2]]]
    named = with_distinct_names(runs)
    assert [run.name for run in named] == ["x/a", "y/a", "y/b", "y/b (2)"]
    assert [run.summary["name"] for run in named] == [run.name for run in named]


def test_a_run_that_had_stopped_when_it_was_cut_off_ends_with_that_and_with_its_last_rounds(
    tmp_path,
):
    directory = write_run(tmp_path / "cut", finished=False)
    rows = rows_of_a_run()
    totals = {"steps": 11, "samples": 704, "compute_s": 3.0, "query_s": 0.0, "sync_s": 3.0}
    rows += [
        {"t": 1e9, "role": "fast", "event": "start", "device": "cpu"},
        {"t": 1e9 + 4.5, "role": "state", "event": "stop", "reason": "enough", "round": 3},
        {"t": 1e9 + 4.6, "role": "fast", "event": "end", "totals": totals},
    ]
    for path in directory.glob("*.jsonl"):
        path.unlink()
    write_rows(directory / "all.jsonl", sorted(rows, key=lambda row: row["t"]))
    summary = load(directory).summary
    assert summary["wall_s"] == pytest.approx(4.5)
    fast = next(row for row in summary["workers"] if row["name"] == "fast")
    assert (fast["steps"], fast["samples"]) == (11, 704)
