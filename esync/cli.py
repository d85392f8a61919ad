"""What the console commands share: options made from configuration classes, logging, errors, Ctrl-C."""

from __future__ import annotations

import asyncio
import ctypes
import dataclasses
import logging
import math
import os
import re
import signal
import sys
import time
from collections.abc import Callable, Collection, Coroutine, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any, TypeVar

import click

from esync import config, transport
from esync.errors import EsyncError
from esync.version import VERSION

AGAIN_S = 0.05
"""So soon an interrupt is raised again that came where Python ignores exceptions."""
TWICE_S = 1.0
"""A signal that comes so soon after another is the same one."""
F = TypeVar("F", bound=Callable[..., Any])


def flag_of(field: str) -> str:
    """The option for a configuration field: `duration_s` -> `--duration`."""
    return "--" + field.removesuffix("_s").replace("_", "-")


def options_of(cls: type, *, skip: tuple[str, ...] = ()) -> Callable[[F], F]:
    """A decorator that adds an option for every field of a configuration class.

    An option that is not given is None: then the file's value counts, or the default.
    """

    def add(command: F) -> F:
        for item in reversed(dataclasses.fields(cls)):
            if item.name in skip:
                continue
            kind = config.option_type(cls, item.name)
            choices = item.metadata["choices"]
            text = f"{item.metadata['help']}  [default: {_say(item)}]"
            flag = flag_of(item.name)
            if kind is bool:
                flag = f"{flag}/--no-{flag[2:]}"
            command = click.option(
                flag,
                item.name,
                type=_type_of(kind, choices, item.metadata["words"]),
                default=None,
                help=text,
            )(command)
        return command

    return add


def _type_of(kind: type, choices: Collection[str] | None, words: dict[str, Any]) -> Any:
    if choices:
        return click.Choice(tuple(choices))
    if words:
        return _WordOr(kind, words)
    return None if kind is bool else kind


class _WordOr(click.ParamType):  # type: ignore[type-arg]  # generic in newer click only
    """A number, or a word that stands for one."""

    def __init__(self, kind: type, words: dict[str, Any]) -> None:
        self.words = words
        self.number = click.types.convert_type(kind)
        self.name = "|".join([*words, self.number.name])

    def convert(self, value: Any, param: Any, ctx: Any) -> Any:
        return self.words[value] if value in self.words else self.number.convert(value, param, ctx)


def _say(item: dataclasses.Field[Any]) -> str:
    """A field's default in words."""
    words = {value: word for word, value in item.metadata["words"].items()}
    return str(words.get(item.default, item.default)) or "none"


def given(values: dict[str, Any], cls: type) -> dict[str, Any]:
    """The options of `cls` that were given on the command line."""
    names = {item.name for item in dataclasses.fields(cls)}
    return {k: v for k, v in values.items() if k in names and v is not None}


def run_options(command: F) -> F:
    """Options that every role has."""
    for option in (
        click.option("--config", "file", type=click.Path(), help="Cluster file (TOML) to read."),
        click.option(
            "--run-dir", type=click.Path(file_okay=False), help="Write the log and results here."
        ),
        click.option("-v", "--verbose", is_flag=True, help="Log more."),
        click.version_option(VERSION, prog_name="esync"),
    ):
        command = option(command)
    return command


def join_options(command: F) -> F:
    """Options of the roles that join a state server."""
    for option in (
        click.option(
            "--connect",
            metavar="ENDPOINT",
            help=f"The state server.  [default: the file's, or {transport.DEFAULT_STATE}]",
        ),
        click.option(
            "--wait",
            type=float,
            default=60.0,
            show_default=True,
            help="Seconds to wait for the state server.",
        ),
    ):
        command = option(command)
    return command


def tables(file: str | None) -> dict[str, Any]:
    """The tables of `--config`; none without it."""
    return config.read(file) if file else {}


def state_endpoint(connect: str | None, raw: dict[str, Any]) -> str:
    """Which state server to join."""
    return transport.check_endpoint(
        connect or raw.get("state", {}).get("bind", transport.DEFAULT_STATE)
    )


def say(text: str) -> None:
    """A line for the user."""
    click.echo(text, err=False)
    sys.stdout.flush()


def keep_memory(*, one_arena: bool = False) -> None:
    """Have this process keep the memory that messages free: a model's worth is freed and taken again in each round, and
    to get it back from the system page by page costs more than to fill it. Only with glibc; else nothing happens.

    Args:
        one_arena: what one thread has freed another may take: where few threads pass large messages on, a tenth less
            memory.
    """
    trim_threshold, top_pad, mmap_threshold, arena_max = -1, -2, -3, -8  # malloc.h
    heap = 64 << 20  # an arena's, which is kept when empty if the padding is no less
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return
    mallopt(mmap_threshold, 32 << 20)
    mallopt(trim_threshold, 1 << 30)
    mallopt(top_pad, heap)
    if one_arena:
        mallopt(arena_max, 1)


def start_logging(verbose: bool) -> None:
    """Log to standard error."""
    logging.basicConfig(
        level=logging.DEBUG if verbose else logging.WARNING,
        format="%(asctime)s %(levelname)s %(name)s: %(message)s",
    )
    for name in ("jax", "absl", "asyncio"):
        logging.getLogger(name).setLevel(logging.WARNING)


def results_options(command: F) -> F:
    """Options of the commands that make `runs/NAME`."""
    for option in (
        click.version_option(VERSION, prog_name="esync"),
        click.option(
            "--name",
            help="Results go to runs/NAME.  [default: the file's name and the mode, with -2, -3, ... if there is one]",
        ),
        click.option(
            "--runs",
            type=click.Path(file_okay=False),
            default="runs",
            show_default=True,
            help="Where results go.",
        ),
        click.option("--force", is_flag=True, help="Replace runs/NAME if it is there."),
    ):
        command = option(command)
    return command


def _name_of(ctx: click.Context) -> str:
    """What the user has typed, or would have: `esync-keys init`; roles are started as `python -m esync.ps.cli`."""
    return re.sub(r"^python.* -m esync\.(\w+)(\.cli)?", r"esync-\1", ctx.command_path)


class Command(click.Command):
    """A command whose `EsyncError`s become one line and exit status 1, and whose Ctrl-C is quiet."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except EsyncError as error:
            click.echo(f"{_name_of(ctx)}: error: {error}", err=True)
            ctx.exit(1)
        except KeyboardInterrupt:
            ctx.exit(0)


def interrupt_on_sigterm() -> None:
    """Make SIGTERM end a role like Ctrl-C does: leave, flush, exit. Either is heard also where Python ignores what is
    raised, such as in the callbacks of its garbage collector, which JAX has."""

    last = -math.inf

    def raise_interrupt(number: int, frame: FrameType | None) -> None:
        nonlocal last
        now = time.monotonic()
        if number == signal.SIGALRM or now - last > TWICE_S:
            last = now
            raise KeyboardInterrupt

    def ignored(what: sys.UnraisableHookArgs) -> None:
        if issubclass(what.exc_type, KeyboardInterrupt):
            signal.setitimer(signal.ITIMER_REAL, AGAIN_S)
        else:
            sys.__unraisablehook__(what)

    for number in (signal.SIGTERM, signal.SIGALRM, signal.SIGHUP):  # SIGHUP: the terminal is gone
        signal.signal(number, raise_interrupt)
    sys.unraisablehook = ignored


@contextmanager
def ended_at_once() -> Iterator[None]:
    """While a large library is imported Ctrl-C ends the process: there is nothing to leave yet, and code in C++ that is
    interrupted aborts with pages of text."""
    before = signal.getsignal(signal.SIGINT)
    if before is signal.SIG_IGN:  # of a job in the background
        yield
        return
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def serve(main: Coroutine[Any, Any, Any], stop: Callable[[], bool | None]) -> None:
    """Run a server's coroutine. Ctrl-C or SIGTERM calls `stop`; from the second on it ends the process, if there was
    nothing more to stop. (Not one that comes at once: `timeout` and others signal a process and its group.)"""

    asked_at: float | None = None

    def on_signal() -> None:
        nonlocal asked_at
        before, now = asked_at, time.monotonic()
        if before is not None and now - before <= TWICE_S:
            return
        asked_at = now
        if not stop() and before is not None:
            os._exit(1)

    async def run() -> None:
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, on_signal)
        await main
        for number in (signal.SIGINT, signal.SIGTERM):  # also while the process ends
            loop.remove_signal_handler(number)
            signal.signal(number, lambda number, frame: on_signal())

    transport.allow_many_connections()
    transport.run(run())
