"""What the exact layouts cost: bytes received a step, counted and by formula, and seconds a step beside diffusers' own layouts.

`python -m benchmarks.parallel`: two processes with one thread each over gloo. One step is one guided velocity (both branches).
"""

from __future__ import annotations

import argparse
import datetime
import functools
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from diffusers import ContextParallelConfig, ParallelConfig
from diffusers.hooks.context_parallel import apply_context_parallel
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh

from benchmarks.measure import hardware, ratio
from benchmarks.received import FORMULAS, received_bytes
from flowroll.engine.checkpoint import Checkpoint, examine_checkpoint
from flowroll.engine.loading import load_transformer
from flowroll.engine.outline import outline_model
from flowroll.exact import Alone, run_here, run_on_groups
from flowroll.families import Guidance, ModelSpec
from flowroll.families.base import StepInput
from flowroll.parallel.mesh import Mesh
from flowroll.parallel.rendezvous import join_store, serve_store
from flowroll.testing import make_checkpoint, random_input
from flowroll.types import DenoisingEnv, Layout

RESULTS = Path(__file__).parent / "results"
LAYOUTS = ("sp2", "cfg2", "tp2")
# Its ring attention has no CPU kernel ("Native attention does not support return_lse"); Z-Image and SD3 have no plan.
PEERS = {"diffusers, Ulysses 2": {"ulysses_degree": 2}}
# The feed-forward width of the mid-size Z-Image is odd, which no two ranks can share; this one's is not.
EVEN: Mapping[str, Any] = {"dim": 480, "axes_dims": [32, 44, 44]}
SIDE, TEXT = 512, 32
TOKENS = (SIDE // 16) ** 2
DTYPE = torch.float32


def main() -> None:
    """Measures every family that has a formula, and writes the result file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--size", choices=["tiny", "mid"], default="mid")
    parser.add_argument("--out", type=Path, default=None, help="result file")
    options = parser.parse_args()
    today = datetime.datetime.now(datetime.UTC)
    out = options.out or RESULTS / f"parallel_cpu_{today:%Y%m}.md"
    sections = [
        f"# The cost of the exact layouts, {today:%Y-%m-%d}",
        f"Command: `python -m benchmarks.parallel --rounds {options.rounds}`. {hardware()}; gloo over loopback, one thread, "
        f"float32, {SIDE}x{SIDE} ({TOKENS} image tokens), {TEXT} text tokens where the family does not fix their number, "
        f'guidance on, transformer size "{options.size}".',
        "Ratio: median of the paired ratios of wall time against one rank in the same round, with its 95 % interval. Largest "
        "difference: of the guided velocity, from one rank's.",
        "Not claimed: absolute times (the machine is shared, and loopback sockets are no NVLink), any figure for a GPU.",
    ]
    with tempfile.TemporaryDirectory() as folder:
        for family in FORMULAS:
            overrides = EVEN if (family, options.size) == ("z_image", "mid") else {}
            checkpoint = make_checkpoint(family, Path(folder) / family, size=options.size, **overrides)
            rows = [row for layout in LAYOUTS for row in measure(checkpoint, layout, options.rounds)]
            sections.append(table(family, rows))
    out.write_text("\n\n".join(sections) + "\n", encoding="utf-8")
    print(out.read_text(encoding="utf-8"))


def measure(folder: Path, layout: str, rounds: int) -> list[dict[str, Any]]:
    """One row per arm of a layout, from one job of two ranks."""
    store, port = serve_store()
    with tempfile.TemporaryDirectory() as place:
        result = Path(place) / "rows.json"
        mp.spawn(run_rank, args=(str(folder), layout, rounds, port, str(result)), nprocs=2)
        del store
        rows: list[dict[str, Any]] = json.loads(result.read_text())
    return rows


def run_rank(rank: int, folder: str, layout_name: str, rounds: int, port: int, result: str) -> None:
    """One rank: all arms once a round; rank 0 writes the rows."""
    torch.set_num_threads(1)
    layout = Layout.parse(layout_name)
    checkpoint = examine_checkpoint(Path(folder), variant=None)
    with (
        Mesh(layout, rank=rank, store=join_store(port), device=torch.device("cpu"), timeout_s=600, loopback=True) as mesh,
        torch.no_grad(),
    ):
        arms = build_arms(checkpoint, mesh, rank)
        velocities: dict[str, Tensor] = {}
        times: dict[str, list[float]] = {name: [] for name in arms}
        for number in range(-1, rounds):
            for name in arms if number % 2 else reversed(arms):
                dist.barrier()
                started = time.perf_counter()
                velocities[name] = arms[name]()
                dist.barrier()
                if number >= 0:
                    times[name].append(time.perf_counter() - started)
        if rank == 0:
            counted = sum(mesh.received_bytes.values()) // (rounds + 1)
            expected = received_bytes(checkpoint, layout, image=TOKENS, text=text_tokens(checkpoint), element_bytes=4)
            assert counted == expected, (counted, expected)
            Path(result).write_text(
                json.dumps([row(name, velocities, times, layout, counted) for name in arms if name != "one rank"])
            )


def build_arms(checkpoint: Checkpoint, mesh: Mesh, rank: int) -> Mapping[str, Callable[[], Tensor]]:
    """The steps to measure, by name. One rank is rank 0, while the other waits."""
    family = checkpoint.family
    generator = torch.Generator().manual_seed(0)
    env, latents = environment(checkpoint, generator)
    timestep = torch.tensor([0.62], dtype=family.timestep_dtype(DTYPE))
    guidance = Guidance(rule=family.guidance_rule, scale=4.0)

    def step(transformer: Any, run: Any = run_here) -> Tensor:
        one = StepInput(latents=latents, timestep=timestep, env=env, guidance=guidance, is_first=True)
        (velocity,) = Alone(family, DTYPE, run).velocities(transformer, [one])
        return velocity

    whole = load_transformer(checkpoint, DTYPE, None)
    shared = load_transformer(checkpoint, DTYPE, mesh)
    arms: dict[str, Callable[[], Tensor]] = {
        "one rank": lambda: step(whole) if rank == 0 else latents,
        f"flowroll, {mesh.layout.name}": lambda: step(shared, functools.partial(run_on_groups, mesh)),
    }
    if mesh.layout.name == "sp2" and hasattr(whole, "_cp_plan") and whole._cp_plan is not None:
        for name, degrees in PEERS.items():
            arms[name] = functools.partial(step, context_parallel(load_transformer(checkpoint, DTYPE, None), rank, degrees))
    return arms


def context_parallel(transformer: Any, rank: int, degrees: Mapping[str, int]) -> Any:
    """The transformer under diffusers' context parallelism; its hooks, unlike `enable_parallelism`, need no accelerator."""
    config = ContextParallelConfig(**degrees)
    config.setup(rank, 2, torch.device("cpu"), init_device_mesh("cpu", config.mesh_shape, mesh_dim_names=config.mesh_dim_names))
    for module in transformer.modules():
        if hasattr(getattr(module, "processor", None), "_parallel_config"):
            module.processor._parallel_config = ParallelConfig(context_parallel_config=config)
    apply_context_parallel(transformer, config, transformer._cp_plan)
    return transformer


def spec_of(checkpoint: Checkpoint) -> ModelSpec:
    """The checkpoint's facts, without its weights."""
    return outline_model(checkpoint, device=torch.device("cpu"), dtype=DTYPE).spec


def text_tokens(checkpoint: Checkpoint) -> int:
    """The number of tokens of each branch's text."""
    return spec_of(checkpoint).widths.get("text_tokens", TEXT)


def environment(checkpoint: Checkpoint, generator: torch.Generator) -> tuple[DenoisingEnv, Tensor]:
    """Random embeddings of both branches, and random latents."""
    spec = spec_of(checkpoint)
    size = {"height": SIDE, "width": SIDE, "texts": (TEXT, TEXT)}
    one = random_input(checkpoint.family, spec, **size, dtype=DTYPE, generator=generator)
    return one.env, one.latents


def row(
    name: str, velocities: Mapping[str, Tensor], times: Mapping[str, list[float]], layout: Layout, counted: int
) -> dict[str, Any]:
    """What one arm came to."""
    one = velocities["one rank"]
    ours = name.startswith("flowroll")
    return {
        "arm": name,
        "seconds": statistics.median(times[name]),
        "one": statistics.median(times["one rank"]),
        "ratio": str(ratio(times[name], times["one rank"])),
        "equal": torch.equal(velocities[name], one),
        "difference": (velocities[name] - one).abs().max().item(),
        "bytes": counted if ours else None,
    }


def table(family: str, rows: list[dict[str, Any]]) -> str:
    """The rows as Markdown."""
    lines = [
        f"## {family}",
        "",
        "| layout | s a step (median) | one rank, s | ratio to one rank | torch.equal | largest difference | MiB a step |",
        "|---|---|---|---|---|---|---|",
    ]
    for entry in rows:
        received = "-" if entry["bytes"] is None else f"{entry['bytes'] / 2**20:.2f}"
        equal = "yes" if entry["equal"] else "no"
        lines.append(
            f"| {entry['arm']} | {entry['seconds']:.3f} | {entry['one']:.3f} | {entry['ratio']} | {equal} "
            f"| {entry['difference']:.1e} | {received} |"
        )
    lines += ["", "Bytes counted = bytes by formula, asserted in every run."]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
