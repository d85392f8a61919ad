"""`esync-run`: a whole cluster on this machine, with a live table and a summary."""

from __future__ import annotations

import contextlib
import shlex
import signal
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import click
import zmq
from rich.console import Console

from esync import cli, config, messages, run_dir, transport
from esync.algorithms import algorithm
from esync.config import ClusterConfig, RunConfig
from esync.errors import ConfigError, EsyncError, ProtocolError
from esync.keys import ClientKeys, load_client
from esync.messages import Leave
from esync.ps import checkpoint
from esync.report.compare import advice, comparison, read_summary
from esync.run import launcher, view
from esync.run.launcher import Role
from esync.state.server import saved_in
from esync.status.inquiry import Inquiry

REFRESH_S = 0.25
GOODBYE_S = 1.0
"""How long a role has to end by itself once the state server has."""
GONE_S = 3.0
"""After so long without a worker a run whose workers have ended does, too."""
MOST_DEATHS, DEATHS_S = 5, 60.0
"""So many deaths of servers in so many seconds are no accident."""


@click.command(cls=cli.Command, context_settings={"max_content_width": 100})
@click.argument("file", type=click.Path())
@cli.results_options
@click.option(
    "--keep-going",
    is_flag=True,
    help="Go on without a worker that dies, and start a server that dies again, instead of ending the run.",
)
@click.option(
    "--resume",
    is_flag=True,
    help="Go on with an earlier run, from its last checkpoint: FILE is its runs/NAME/cluster.toml.",
)
@click.option("--plain", is_flag=True, help="Plain lines even on a terminal.")
@click.option(
    "--dry-run",
    is_flag=True,
    help="Make runs/NAME, print each role's name, host and command, tab-separated, and start nothing.",
)
@cli.options_of(RunConfig)
@click.option("-v", "--verbose", is_flag=True, help="Log more.")
def main(
    file: str,
    name: str | None,
    runs: str,
    force: bool,
    keep_going: bool,
    resume: bool,
    plain: bool,
    dry_run: bool,
    verbose: bool,
    **values: Any,
) -> None:
    """Start all roles of a cluster file on this machine, show how they train, and sum up.

    FILE has the tables [run], [state], [ps] and [[workers]]; options given here replace those of [run].
    runs/NAME gets the configuration (cluster.toml), a log per role (ROLE.jsonl, and ROLE.log with what it printed),
    summary.json and the final model.safetensors.

    \b
    Example:
      esync-run examples/clusters/demo.toml --mode sync --duration 60
    """
    cli.start_logging(verbose)
    cluster = config.cluster(config.read(file), cli.given(values, RunConfig))
    config.check_names(cluster.run)
    cluster.each_worker()
    if resume and (name or force):
        raise ConfigError(
            "--resume goes on in the run's own directory: leave out --name and --force"
        )
    state = cluster.state
    transport.check_open(state.bind, bool(state.keys or state.insecure))
    directory = (
        _earlier(file, cluster.run)
        if resume
        else run_dir.results_directory(file, name, runs, cluster.run.mode, force)
    )
    if dry_run:
        _print_commands(cluster, directory)
        return
    console = Console()
    dropped = sum(row.count for row in cluster.workers) - len(cluster.each_worker())
    if dropped:
        console.print(
            f"mode {cluster.run.mode}: only the first worker of {file} takes part, {dropped} do not"
        )
    if virtual := cluster.only_virtual():
        console.print(f"for esync-sim only, and ignored here: {', '.join(virtual)}", markup=False)
    if elsewhere := sorted({row.host for row in cluster.workers if row.host}):
        console.print(
            f"all roles start on this machine, also those for {', '.join(elsewhere)}: host is for bin/esync-tmux",
            markup=False,
        )
    cli.interrupt_on_sigterm()
    run = _Run(cluster, directory, console, keep_going=keep_going, resume=resume)
    failure: EsyncError | None = None
    interrupted = False
    try:
        run.go(live=console.is_terminal and not plain)
    except KeyboardInterrupt:
        interrupted = True
        console.print("interrupted: ending the run; Ctrl-C again does not wait for it")
        run.end()
    except EsyncError as error:
        failure = error
    finally:
        run.close()
    run.sum_up()
    if failure is not None:
        raise failure
    if interrupted:
        click.get_current_context().exit(130)


def _earlier(file: str, run: RunConfig) -> Path:
    """The directory of an earlier run, whose configuration this is, and of which there is something left to do.

    Raises:
        ConfigError: it is none, or it has ended.
    """
    path = Path(file)
    saved = saved_in(path.parent)
    if path.name != "cluster.toml" or saved is None:
        raise ConfigError(
            f"--resume: {file} is not an earlier run's; give its runs/NAME/cluster.toml"
        )
    run_dir.check_free(path.parent)
    earlier = config.cluster(config.read(file)).run
    for field in ("model", "dataset", "ps", "outer"):  # by which its checkpoints are what they are
        before, now = getattr(earlier, field), getattr(run, field)
        if before != now:
            raise ConfigError(
                f"--resume: the run in {path.parent} has {field} = {before}, and cannot go on with {now}"
            )
    for done, limit, option, unit in (
        (saved.elapsed_s, run.duration_s, "--duration", "seconds"),
        (saved.version, run.rounds, "--rounds", "rounds"),
    ):
        if limit and done >= limit:
            raise ConfigError(
                f"--resume: the run in {path.parent} has had its {limit:g} {unit} ({done:.0f}); to go on, give a "
                f"larger {option}"
            )
    return path.parent


def _print_commands(cluster: ClusterConfig, directory: Path) -> None:
    """One line per role: name, host (- for this machine), and the command, with tabs between them."""
    bind = launcher.fixed_port(cluster.state.bind)
    cluster = replace(cluster, state=replace(cluster.state, bind=bind))
    launcher.write_config(cluster, directory / run_dir.CONFIG)
    outside = next((row.host for row in cluster.each_worker() if row.host), "127.0.0.1")
    endpoint = transport.advertised(bind, f"tcp://{outside.rpartition('@')[2]}:1")
    endpoint = transport.resolved(endpoint, "tcp://127.0.0.1:1")
    for role in launcher.roles_of(cluster, directory, endpoint):
        variables = [f"{key}={value}" for key, value in role.environment.items()]
        click.echo(
            f"{role.name}\t{role.host or '-'}\t{shlex.join(['env', *variables, *role.command])}"
        )


class _Run:
    """The processes of one run and what is shown of them."""

    def __init__(
        self,
        cluster: ClusterConfig,
        directory: Path,
        console: Console,
        *,
        keep_going: bool,
        resume: bool = False,
    ) -> None:
        self.cluster, self.directory, self.console = cluster, directory, console
        self.keep_going, self.resume = keep_going, resume
        self.roles: list[Role] = []
        self.endpoint = self._bound = ""
        self.lost: list[str] = []
        self._deaths: list[float] = []
        self._inquiry: Inquiry | None = None

    def go(self, *, live: bool) -> None:
        """Start everything and watch until it has ended.

        Raises:
            EsyncError: a role died; the text says which and why.
        """
        launcher.write_config(self.cluster, self.directory / run_dir.CONFIG)
        (self.directory / run_dir.ENDPOINT).unlink(missing_ok=True)
        state = self._roles("tcp://127.0.0.1:1")[0]
        self.roles = [state]
        state.start()
        endpoint = launcher.wait_for_endpoint(self.directory, state)
        if endpoint is None:
            if not self.resume:
                (self.directory / run_dir.CONFIG).unlink()  # the next run may have the name
            raise EsyncError(f"the state server did not start: {state.why()}")
        self._bound = endpoint
        self.endpoint = transport.resolved(endpoint, "tcp://127.0.0.1:1")
        others = self._roles(self.endpoint)[1:]
        for role in others:
            role.start()
            self.roles.append(role)
        self.console.print(
            f"{len(self.roles)} processes started; logs and results in {self.directory}"
        )
        self._inquiry = Inquiry(self.endpoint, "run", self._keys())
        with view.shown(self.console, live=live) as show:
            self._watch(self._inquiry, show)

    def _roles(self, endpoint: str) -> list[Role]:
        return launcher.roles_of(self.cluster, self.directory, endpoint, resume=self.resume)

    def _watch(self, inquiry: Inquiry, show: Callable[[dict[str, Any], str], None]) -> None:
        gone_at: float | None = None
        ending = False
        while self.roles[0].status != 0:  # the state server ends the run
            self._check()
            with contextlib.suppress(ProtocolError):  # a table that cannot be had ends no run
                if inquiry.ask():
                    show(inquiry.table, inquiry.waiting_for)
                    now = time.monotonic()
                    gone_at = (gone_at or now) if self._workers_are_gone(inquiry.table) else None
                    if gone_at is not None and now - gone_at > GONE_S and not ending:
                        ending = True
                        self.console.print("every worker has ended: ending the run")
                        launcher.terminate(self.roles[0])
            time.sleep(REFRESH_S)
        launcher.wait(self.roles, launcher.STOP_S)
        self._await_loops()
        self._check()
        for role in (r for r in self.roles if r.status is None):
            self.console.print(f"{role.name} does not end, and is ended; see {role.log}")

    def _await_loops(self) -> None:
        """The run is over. What loops of people's own still have to do takes as long as it does, also if one fails."""
        own = {row.name for row in self.cluster.each_worker() if row.command}
        told = False
        while running := [r.name for r in self.roles if r.name in own and r.status is None]:
            if not told:
                told = True
                self.console.print(
                    f"the run is over; waiting for {', '.join(running)} to end. Ctrl-C does not wait",
                    highlight=False,
                )
            time.sleep(REFRESH_S)

    def _check(self) -> None:
        """See whether a role died."""
        for role in list(self.roles):
            status = role.status
            if status is None or status == 0:
                continue
            text = f"{role.name} died: {role.why()}"
            worker = role.name not in ("state", *config.ps_names(self.cluster.run.ps))
            others = [r for r in self.roles if r is not role and r.status is None]
            goes_on = self.keep_going and worker and len(others) > 2
            if goes_on and role.name != "evaluator" and not self._has_begun():
                text += "\n    the run had not begun, which it does with all of its workers"
            elif goes_on:
                self.lost.append(role.name)
                self.roles.remove(role)
                self.console.print(f"{text}\n    the others go on", highlight=False)
                self._report_loss(role)
                continue
            if self.keep_going and not worker and self._start_again(role):
                self.console.print(f"{text}\n    it was started again", highlight=False)
                continue
            raise EsyncError(f"{text}\n  stopped the other roles; see {role.log}")

    def _has_begun(self) -> bool:
        """Whether the run is known to have begun, if need be from what was heard last."""
        if self._inquiry is None:
            return False
        with contextlib.suppress(ProtocolError):
            self._inquiry.ask()
        return bool(self._inquiry.table.get("started"))

    def _workers_are_gone(self, table: dict[str, Any]) -> bool:
        """Whether the run goes on though nobody trains any more, our workers having ended properly: their loops did."""
        names = {row.name for row in self.cluster.each_worker()}
        ended = all(role.status == 0 for role in self.roles if role.name in names)
        here = any(row["role"] == "worker" for row in table["workers"])  # or started by others
        return ended and not here and table["started"] and table["stopped"] is None

    def _start_again(self, role: Role) -> bool:
        """Start a server again, which goes on where the run was; False if it dies too often."""
        now = time.monotonic()
        self._deaths = [at for at in self._deaths if now - at < DEATHS_S] + [now]
        if len(self._deaths) > MOST_DEATHS:
            return False
        if "--resume" not in role.command:
            role.command.append("--resume")
            if role.name == "state":  # where all others look for it
                role.command += ["--bind", self._bound]
        role.start()
        return True

    def _keys(self) -> ClientKeys | None:
        keys = self.cluster.state.keys
        return load_client(keys) if keys else None

    def _report_loss(self, role: Role) -> None:
        """Tell the state server in the dead role's name, so that nobody waits for its heartbeats."""
        context: zmq.Context[Any] = zmq.Context.instance()
        with transport.dealer(context, role.name, self.endpoint, self._keys()) as socket:
            socket.send(messages.encode(Leave(role.name, role.why().splitlines()[0])))

    def end(self) -> None:
        """Ask the state server to end the run, and give everybody the time to leave."""
        if self.roles and self.roles[0].process is not None and self.roles[0].status is None:
            launcher.terminate(self.roles[0])
            try:
                launcher.wait(self.roles[:1], launcher.STOP_S)
                # Those that are still starting do not know of it.
                launcher.wait(self.roles, GOODBYE_S)
            except KeyboardInterrupt:
                launcher.kill(self.roles)

    def close(self) -> None:
        """Leave no process behind."""
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGALRM):
            signal.signal(number, signal.SIG_IGN)  # takes STOP_S at most
        launcher.stop(self.roles)
        if self._inquiry is not None:
            self._inquiry.close()

    def sum_up(self) -> None:
        """Print the summary; and make one model of the parts that several parameter servers have written."""
        try:
            checkpoint.join(self.directory)
        except EsyncError as error:
            self.console.print(f"no {checkpoint.MODEL}: {error}", highlight=False)
        path = self.directory / "summary.json"
        if not path.exists():
            return
        summary = read_summary(path)
        if not summary["rounds"]:
            self.console.print(f"nothing was trained; logs: {self.directory}", highlight=False)
            return
        self.console.print(
            f"{algorithm(summary['mode']).summary}\nended: {summary['ended']}", highlight=False
        )
        self.console.print(comparison([summary]))
        gone = [row for row in summary["workers"] if row["left_why"] not in ("done", "")]
        for row in gone:
            self.console.print(
                f"{row['name']} left after {row['left_s']:.1f} s: {row['left_why']}",
                highlight=False,
            )
        if said := advice(summary):
            self.console.print(said, highlight=False)
        if "evaluator" in self.lost:
            self.console.print("the evaluator died: the last accuracies are missing")
        self.console.print(f"results: {self.directory}", highlight=False)


if __name__ == "__main__":
    main()
