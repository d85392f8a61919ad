"""`python -m tests.fuzz`: the targets under a coverage-guided fuzzer."""

from __future__ import annotations

import importlib.util
import json
import logging
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import click

CASES = Path(__file__).parent / "cases"
NAMES = (
    *(
        "codec",
        "codec-fields",
        "state",
        "ps",
        "ps-control",
        "worker",
        "seal",
        "layout",
        "compression",
    ),
    *("checkpoint", "offer", "inquiry", "config"),
)
"""As in `targets`, which the fuzzer has to import itself, so that it sees what is covered."""
MOST_BYTES = 2048
"""Of an input."""
RSS_LIMIT_MB = 2048
TIMEOUT_S = 20
"""An input that takes longer is a finding."""
WARM = 2000
"""Inputs after which memory is looked at for the first time."""
EVERY_S = 2.0
"""Seconds between two lines of figures."""
SAYS = "figures "


@click.command()
@click.argument("target", type=click.Choice([*NAMES, "all"]))
@click.option(
    "--runs", type=click.IntRange(0), default=0, help="Inputs for each target (0: no limit)."
)
@click.option(
    "--seconds",
    type=click.IntRange(0),
    default=60,
    show_default=True,
    help="Seconds for each target (0: no limit).",
)
@click.option(
    "--corpus",
    type=click.Path(file_okay=False, path_type=Path),
    help="Directory that keeps, for each target, inputs that reached something new; the next run begins with them.",
)
@click.option("--inside", is_flag=True, hidden=True)
def main(target: str, runs: int, seconds: int, corpus: Path | None, inside: bool) -> None:
    """Feed TARGET, or all of them in turn, with inputs that a fuzzer makes up to reach new code of esync.

    An input that raises is written to tests/fuzz/cases/TARGET/ and ends that target. tests/test_fuzz.py replays it
    from then on: mend the defect, give the file a name that says what it was, and keep it. Each target runs in a
    process of its own. What is shown: inputs, seconds, inputs a second, and by how much the process's memory has
    grown since its first 2000 inputs.

    \b
    Examples:
      python -m tests.fuzz codec --runs 1000000 --seconds 0
      python -m tests.fuzz all --seconds 300 --corpus /tmp/corpus
    """
    if importlib.util.find_spec("atheris") is None:
        raise click.ClickException(
            "atheris is not installed; pip install -e '.[fuzz]' (it has wheels for Linux on x86-64). "
            "Without it, pytest tests/test_fuzz.py runs the targets on random input"
        )
    if not runs and not seconds:
        raise click.UsageError("one of --runs and --seconds has to be a limit")
    if inside:
        assert corpus is not None
        _fuzz(target, runs, seconds, corpus)
    failed = []
    for name in NAMES if target == "all" else (target,):
        if not _supervised(name, runs, seconds, corpus):
            failed.append(name)
    if failed:
        raise click.ClickException(f"findings in {', '.join(failed)}; see {CASES}")


def _supervised(name: str, runs: int, seconds: int, corpus: Path | None) -> bool:
    """Run a target in a process of its own and show how it gets on; False if it found something."""
    with tempfile.TemporaryDirectory(prefix="esync-fuzz-") as scratch:
        kept = (corpus or Path(scratch)) / name
        kept.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-m", "tests.fuzz", name, "--inside", "--corpus", str(kept)]
        command += ["--runs", str(runs), "--seconds", str(seconds)]
        last: dict[str, Any] = {}
        tail: list[str] = []
        with subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            env={**os.environ, "TMPDIR": scratch},
        ) as process:
            assert process.stdout is not None
            for line in process.stdout:
                if line.startswith(SAYS):
                    last = json.loads(line.removeprefix(SAYS))
                    _show(name, last, end="")
                elif not line.startswith("#"):  # each new input that it keeps
                    tail = [*tail[-30:], line]
    _show(name, last, end="\n")
    if process.returncode:
        click.echo("".join(tail), err=True)
    return not process.returncode


def _show(name: str, figures: dict[str, Any], end: str) -> None:
    terminal = sys.stdout.isatty()
    if not figures or (not terminal and not end):
        return
    rate = figures["inputs"] / max(figures["seconds"], 0.001)
    text = (
        f"{name}: {figures['inputs']} inputs in {figures['seconds']:.0f} s ({rate:.0f}/s), "
        f"memory {figures['rss_mb']:.0f} MB, {figures['grown_mb']:+.1f} MB since the first {WARM}"
    )
    click.echo(f"\r{text}\033[K" if terminal else text, nl=bool(end))


def _fuzz(name: str, runs: int, seconds: int, corpus: Path) -> None:
    """Fuzz in this process; does not return."""
    import atheris

    with atheris.instrument_imports(include=["esync"]):
        from tests.fuzz import targets
    assert tuple(targets.TARGETS) == NAMES
    for number, seed in enumerate(targets.seeds(name)):
        (corpus / f"seed-{number}").write_bytes(seed)
    cases = CASES / name
    cases.mkdir(parents=True, exist_ok=True)
    logging.disable(logging.CRITICAL)  # what is refused is logged
    counted = _Counted(targets.TARGETS[name])
    options = [f"-runs={runs or -1}", f"-max_total_time={seconds}", f"-max_len={MOST_BYTES}"]
    options += [
        f"-rss_limit_mb={RSS_LIMIT_MB}",
        f"-timeout={TIMEOUT_S}",
        f"-artifact_prefix={cases}/",
    ]
    atheris.Setup([name, *options, str(corpus), str(cases)], counted)
    atheris.Fuzz()


class _Counted:
    """A target that says how it gets on."""

    def __init__(self, target: Any) -> None:
        self._target = target
        self._inputs, self._began, self._said = 0, time.monotonic(), 0.0
        self._warm_mb = 0.0

    def __call__(self, data: bytes) -> None:
        try:
            self._target(data)
        finally:
            self._inputs += 1
            now = time.monotonic()
            if self._inputs == WARM:
                self._warm_mb = rss_mb()
            if now - self._said > EVERY_S or self._inputs % 10_000 == 0:
                self._said = now
                rss = rss_mb()
                grown = rss - self._warm_mb if self._warm_mb else 0.0
                figures = {"inputs": self._inputs, "seconds": now - self._began}
                print(SAYS + json.dumps(figures | {"rss_mb": rss, "grown_mb": grown}), flush=True)


def rss_mb() -> float:
    """This process's resident memory."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096 / 1e6


if __name__ == "__main__":
    main()
