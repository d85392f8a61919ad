"""Which versions the virtual evaluator takes, and when: those that a real one would that takes no time to evaluate."""

from __future__ import annotations

import pytest

from tests.virtual import Untrained, done, untrained

STEP_S = 2.0  # all workers are equal, so that a round takes a step


def evaluated(step_s: float = STEP_S, **run: object) -> tuple[list[int], dict[str, object]]:
    """The versions that were evaluated, and the summary."""
    file = {
        "run": {"mode": "sync", "rounds": 20, **run},
        "workers": [{"name": "worker", "count": 2, "step_time_s": step_s}],
    }
    cluster, _ = untrained(file)
    summary = cluster.run()
    return [row["round"] for row in summary["accuracy"]], summary


def test_each_version_where_rounds_are_longer_than_the_time_between_evaluations() -> None:
    assert evaluated(evaluate_every_s=1.9)[0] == list(range(1, 21))


@pytest.mark.parametrize(
    ("every_s", "versions"),
    [
        # Version n is out at 2 n seconds; the first is evaluated at once, then one is due each `every_s`.
        (5.1, [1, 3, 6, 8, 11, 13, 16, 18, 20]),
        (3.1, [1, 2, 4, 5, 7, 8, 10, 11, 13, 14, 16, 18, 19, 20]),
        (1000.0, [1, 20]),
    ],
)
def test_the_newest_version_is_taken_when_the_time_is_over(every_s, versions) -> None:
    """One that came meanwhile is not passed over until the next comes."""
    assert evaluated(evaluate_every_s=every_s)[0] == versions


def test_only_the_last_version_without_a_time_between_evaluations() -> None:
    assert evaluated(evaluate_every_s=0.0)[0] == [20]


def test_a_target_ends_a_run_when_its_version_is_evaluated(monkeypatch) -> None:
    monkeypatch.setattr(Untrained, "evaluate", lambda self, chunks: done((chunks[0][0] / 10, 1.0)))
    versions, summary = evaluated(evaluate_every_s=5.1, rounds=0, target_accuracy=0.5)
    assert versions == [1, 3, 6], "version n has an accuracy of n / 10"
    assert summary["wall_s"] == pytest.approx(12.2), "not when a version comes after that"


def test_what_came_since_the_last_is_evaluated_at_the_end() -> None:
    versions, _ = evaluated(20.0, rounds=0, duration_s=45, evaluate_every_s=30.0)
    assert versions == [1, 2], "of 20 s and 40 s; the second would be taken at 50 s"
