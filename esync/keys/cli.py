"""`esync-keys`: makes, lists and revokes the keys of a cluster."""

from __future__ import annotations

import click
from rich.console import Console
from rich.table import Table
from rich.text import Text

from esync import cli, keys
from esync.cli import F
from esync.version import VERSION

SETTINGS = {"max_content_width": 100}


def _directory(command: F) -> F:
    return click.option(
        "--keys", "directory", default="keys", show_default=True, help="Directory of the keys."
    )(command)


@click.group(context_settings=SETTINGS)
@click.version_option(VERSION, prog_name="esync")
def main() -> None:
    """Make the keys with which servers and workers encrypt, and know each other.

    \b
    Example:
      head$  esync-keys init --workers gpu,old
      head$  scp keys/gpu.key gpu:
      head$  esync-state --keys keys --bind tcp://0.0.0.0:10010 ...
      gpu$   esync-worker --keys gpu.key --connect tcp://head:10010
    """


@main.command(cls=cli.Command)
@click.argument("directory", default="keys", metavar="[DIR]")
@click.option("--workers", help="Names of the workers, with commas between them.")
@click.option(
    "--count", type=click.IntRange(1, 10_000), help="So many workers: worker0, worker1, ..."
)
@click.option("--force", is_flag=True, help="Replace the keys that are there.")
def init(directory: str, workers: str | None, count: int | None, force: bool) -> None:
    """Make the servers' keys in DIR, a key for each worker, and the list of those who may connect."""
    if workers is not None and count is not None:
        raise click.UsageError("--workers and --count exclude each other")
    names = [name.strip() for name in workers.split(",")] if workers is not None else []
    names += [f"worker{number}" for number in range(count or 0)]
    paths = keys.make(directory, names, force=force)
    cli.say(f"servers: start esync-state and esync-ps with --keys {directory}")
    for path in paths:
        cli.say(f"worker {path.stem}: copy {path} to its machine, and start it with --keys")
    if not paths:
        cli.say(f"no workers yet: esync-keys add NAME --keys {directory}")


@main.command(cls=cli.Command)
@click.argument("name")
@_directory
@click.option("--force", is_flag=True, help="Replace the key that NAME has, and revoke that one.")
def add(name: str, directory: str, force: bool) -> None:
    """Make a key for the worker NAME and let it in; running servers know it at once."""
    path = keys.add(directory, name, force=force)
    cli.say(f"worker {name}: copy {path} to its machine, and start it with --keys")


@main.command(cls=cli.Command)
@click.argument("name")
@_directory
def revoke(name: str, directory: str) -> None:
    """Let the key of NAME in no more, and remove its file here; running servers know it at once."""
    keys.revoke(directory, name)
    cli.say(f"{name} is not let in any more; what it knows of the present run it keeps")


@main.command("list", cls=cli.Command)
@_directory
def list_(directory: str) -> None:
    """Show whose key may connect."""
    table = Table()
    for column in ("name", "public key", "may connect"):
        table.add_column(column, no_wrap=True)
    for name, public, may in keys.listed(directory):
        table.add_row(name, Text(public), "yes" if may else "no, revoked")
    Console(width=None if Console().is_terminal else 120).print(table)


if __name__ == "__main__":
    main()
