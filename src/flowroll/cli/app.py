"""The command group: which commands there are, and how an error ends one."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.console import Console
from typer.core import TyperGroup

from flowroll.cli.bench import bench
from flowroll.cli.generate import generate
from flowroll.cli.inspect import inspect
from flowroll.cli.options import quiet_model_libraries
from flowroll.cli.parity import parity
from flowroll.cli.rollout import rollout
from flowroll.cli.sampling_flags import with_sampling_flags
from flowroll.cli.serve import serve
from flowroll.cli.top import top
from flowroll.cli.verify import verify
from flowroll.errors import FlowrollError


class Commands(TyperGroup):
    """Ends a command that the user got wrong with one line on stderr and status 1."""

    def invoke(self, ctx: Any) -> Any:
        """Runs the command."""
        try:
            return super().invoke(ctx)
        except FlowrollError as error:
            message = error.message
        except BrokenPipeError:
            # The reader of our output has left; typer ends that quietly.
            raise
        except OSError as error:
            message = f"every path must be usable, got {error}; choose another one."
        Console(stderr=True).print(f"Error: {message}", markup=False, highlight=False, soft_wrap=True)
        raise typer.Exit(1)


app = typer.Typer(
    name="flowroll",
    cls=Commands,
    help="Rollout engine for RL post-training of flow-matching text-to-image models.",
    no_args_is_help=True,
    add_completion=False,
    # The plain layout never cuts a flag's name short.
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)
app.command()(serve)
# The weights of a command are those that it loads.
app.command()(with_sampling_flags(generate, without={"min_weight_version", "lora_name"}))
# Every prompt is a request of its own, with its own id.
app.command()(with_sampling_flags(rollout, without={"prompt", "request_id", "min_weight_version", "lora_name"}))
app.command()(inspect)
app.command()(parity)
app.command()(verify)
app.command()(top)
app.add_typer(bench, name="bench")


@app.command("make-checkpoint")
def make_checkpoint_command(
    family: Annotated[Literal["qwen_image", "z_image"], typer.Argument(metavar="FAMILY", help="qwen_image or z_image.")],
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="Where to save.")],
    seed: Annotated[int, typer.Option(min=0, help="Same seed, same bytes.")] = 0,
    size: Annotated[Literal["tiny", "mid"], typer.Option(help="tiny, or mid: about 100 million parameters.")] = "tiny",
) -> None:
    """Make a checkpoint folder with random weights, offline."""
    quiet_model_libraries()
    from flowroll.testing import make_checkpoint

    folder = make_checkpoint(family, directory, seed=seed, size=size)
    Console().print(f"{family} checkpoint in {folder}", markup=False, soft_wrap=True)
