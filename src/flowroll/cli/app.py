"""Holds the command group: which commands there are, and how an error ends one.

A command's module is imported when the command is run or asked for its help, so that `flowroll --help` is there at once, and a
command asks for no library that another one needs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from flowroll import __version__
from flowroll.errors import FlowrollError
from flowroll.extras import extra_for, missing_extra

# The plain layout never cuts a flag's name short. What is set for the group holds for its commands too.
PLAIN: Mapping[str, Any] = {
    "add_completion": False,
    "rich_markup_mode": None,
    "pretty_exceptions_enable": False,
    "context_settings": {"help_option_names": ["-h", "--help"]},
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """Describes one command of the group.

    Attributes:
        where: The module in this package, and the name in it of a function or a group.
        help: The first line of the command's help text.
        extra: The extra that installs the command's libraries.
    """

    where: str
    help: str
    extra: str

    def load(self, name: str) -> Any:
        """Imports the command.

        Raises:
            MissingExtraError: A library that the command needs is not installed.
        """
        module, _, attribute = self.where.partition(":")
        with extra_for(f"`flowroll {name}`", self.extra):
            found = getattr(import_module(f"flowroll.cli.{module}"), attribute)
        if not isinstance(found, typer.Typer):
            single = typer.Typer(**PLAIN)
            single.command(name)(found)
            found = single
        return typer.main.get_command(found)


COMMANDS: Mapping[str, Entry] = {
    "demo": Entry(
        where="demo:demo",
        help="Roll out the checkpoints that flowroll ships through a real server; pictures, plots and rollouts are kept.",
        extra="server",
    ),
    "serve": Entry(where="serve:serve", help="Serve a checkpoint over HTTP until SIGTERM or Ctrl-C.", extra="server"),
    "cluster": Entry(
        where="cluster:cluster",
        help="Serve several replicas of a checkpoint at one address, on Ray, until SIGTERM or Ctrl-C.",
        extra="ray",
    ),
    "generate": Entry(
        where="generate:generate", help="Make pictures, or with --rollout whole rollouts, of one prompt.", extra="engine"
    ),
    "rollout": Entry(where="rollout:rollout", help="Roll out every prompt of a file on a server.", extra="client"),
    "inspect": Entry(
        where="inspect:inspect", help="Print the tensors, the log-probs and the record of a saved rollout.", extra="client"
    ),
    "view": Entry(
        where="view:view",
        help="Show rollouts: groups at a glance, a sample through its steps, samples side by side.",
        extra="server",
    ),
    "parity": Entry(where="parity:parity", help="Check that parallel layouts give the bits of one rank.", extra="engine"),
    "verify": Entry(
        where="verify:verify", help="Replay saved rollouts with a checkpoint's weights, and say what differs.", extra="engine"
    ),
    "top": Entry(where="top:top", help="Watch a server's load, rates, time by stage and errors until Ctrl-C.", extra="client"),
    "bench": Entry(where="bench:bench", help="Measure a running server.", extra="client"),
    "make-checkpoint": Entry(
        where="make_checkpoint:make_checkpoint",
        help="Make a checkpoint folder with random weights, offline.",
        extra="engine",
    ),
}


class Commands(TyperGroup):
    """The command group; it ends a command that the user got wrong with one line on stderr and status 1."""

    def list_commands(self, ctx: Any) -> list[str]:
        """Returns the names of all commands."""
        return list(COMMANDS)

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        """Returns the command of this name, or None."""
        entry = COMMANDS.get(cmd_name)
        return None if entry is None else entry.load(cmd_name)

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        """Writes the list of commands without importing any."""
        with formatter.section("Commands"):
            formatter.write_dl([(name, entry.help) for name, entry in COMMANDS.items()])

    def invoke(self, ctx: Any) -> Any:
        """Runs the command."""
        try:
            return super().invoke(ctx)
        except FlowrollError as error:
            message = error.message
        except ImportError as error:
            name = ctx.invoked_subcommand or ""
            if name not in COMMANDS or (missing := missing_extra(f"`flowroll {name}`", COMMANDS[name].extra, error)) is None:
                raise
            message = missing.message
        except BrokenPipeError:
            # The reader of our output has left; typer ends that quietly.
            raise
        except OSError as error:
            message = f"every path must be usable, got {error}; choose another one."
        typer.echo(f"Error: {message}", err=True)
        raise typer.Exit(1)


app = typer.Typer(
    name="flowroll",
    cls=Commands,
    help="Rollout engine for RL post-training of flow-matching text-to-image models.",
    no_args_is_help=True,
    **PLAIN,
)


def _show_version(is_asked: bool) -> bool:
    if is_asked:
        typer.echo(f"flowroll {__version__}")
        raise typer.Exit
    return is_asked


@app.callback()
def _group(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version and end.")
    ] = False,
) -> None:
    """Rollout engine for RL post-training of flow-matching text-to-image models."""
