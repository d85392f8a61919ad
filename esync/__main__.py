"""`esync ROLE ...`: every console command under one name, as `python -m esync` and in the container image."""

from __future__ import annotations

import importlib

import click

from esync.version import VERSION

COMMANDS = {
    "state": "The state server: says who trains on and who synchronises.",
    "ps": "The parameter server: averages.",
    "worker": "A worker, or with --evaluate an evaluator.",
    "run": "All roles of a cluster file on this machine.",
    "sim": "A cluster file in virtual time, with real gradients.",
    "status": "The live table of any run.",
    "report": "Finished runs side by side.",
    "keys": "The keys of a cluster: made, listed, revoked.",
}


class Roles(click.Group):
    """Imports a command's module when it is used: the servers need no JAX."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        if name not in COMMANDS:
            return None
        command: click.Command = importlib.import_module(f"esync.{name}.cli").main
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))


@click.group(cls=Roles)
@click.version_option(VERSION, prog_name="esync")
def main() -> None:
    """Train one model on machines of very different speed, together."""


if __name__ == "__main__":
    main(prog_name="esync")
