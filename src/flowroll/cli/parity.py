"""`flowroll parity` compares parallel layouts with one rank, bit for bit."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from flowroll.cli.options import Device, Dtype, Model, Variant, quiet_model_libraries
from flowroll.cli.sampling_flags import read_file
from flowroll.errors import InvalidRequestError
from flowroll.sampling.dynamics import DYNAMICS

# The settings of SGLang-Diffusion's published comparison (pull request 22604), so that the tables can be read side by side.
_PROMPT = (
    "A fluffy silver-gray cat rests on a light surface indoors, wearing small round sunglasses with gold frames and dark "
    "blue lenses."
)
_NOISE_LEVEL = 0.5
_DEFAULT = "the family's"


def parity(
    model: Model,
    layouts: Annotated[
        str, typer.Option(help="Layouts to compare: products of spN, cfg2 and tpN; single is one rank again.")
    ] = "sp2,cfg2,tp2",
    modes: Annotated[str, typer.Option(help=f"Dynamics to compare: {', '.join(DYNAMICS)}.")] = "sde,cps,ode",
    prompt: Annotated[str, typer.Option(help="Text to draw.")] = _PROMPT,
    seed: Annotated[int, typer.Option(help="Seed of the first sample.")] = 42,
    num_outputs: Annotated[int, typer.Option(help="Number of samples.")] = 1,
    rollout_noise_level: Annotated[
        float | None,
        typer.Option(help="Noise level of the stochastic dynamics. In short: --noise-level.", show_default=f"{_NOISE_LEVEL}"),
    ] = None,
    noise_level: Annotated[float | None, typer.Option(hidden=True)] = None,
    size: Annotated[str | None, typer.Option(metavar="WxH|N", help="Size in pixels.", show_default=_DEFAULT)] = None,
    steps: Annotated[int | None, typer.Option(help="Number of denoising steps.", show_default=_DEFAULT)] = None,
    guidance_scale: Annotated[float | None, typer.Option(help="Guidance scale.", show_default=_DEFAULT)] = None,
    true_cfg_scale: Annotated[
        float | None, typer.Option(help="Scale of classifier-free guidance, where there are two.", show_default=_DEFAULT)
    ] = None,
    negative_prompt: Annotated[
        str | None, typer.Option(help="Text of the unconditional branch.", show_default=_DEFAULT)
    ] = None,
    images: Annotated[
        list[str] | None,
        typer.Option(parser=read_file, metavar="FILE", help="A reference image; may be given several times."),
    ] = None,
    variant: Variant = None,
    dtype: Dtype = "auto",
    device: Device = "auto",
    threads: Annotated[
        int | None, typer.Option(help="CPU threads of each rank.", show_default="the cores, shared by the most ranks")
    ] = None,
    rank_timeout_s: Annotated[float, typer.Option(help="Seconds for which ranks wait for each other.")] = 60.0,
    out: Annotated[Path, typer.Option(dir_okay=False, help="Write the report to this file, as Markdown.")] = Path(
        "flowroll-parity.md"
    ),
    json: Annotated[Path | None, typer.Option(dir_okay=False, help="Also write every figure to this file, as JSON.")] = None,
) -> None:
    """Check that parallel layouts give the bits of one rank.

    Runs one rank and then every layout, each in processes of its own, with the same prompt and seeds, and compares every tensor
    that a rollout returns. Exit status 1 if one is not equal, or if a layout fails.
    """
    from flowroll.types import SamplingParams

    width, height = (None, None) if size is None else _parse_size(size)
    if rollout_noise_level is None and noise_level is None:
        rollout_noise_level = _NOISE_LEVEL
    levels: dict[str, Any] = {"rollout_noise_level": rollout_noise_level, "noise_level": noise_level}
    params = SamplingParams(
        prompt=prompt,
        seed=seed,
        width=width,
        height=height,
        num_inference_steps=steps,
        num_outputs_per_prompt=num_outputs,
        guidance_scale=guidance_scale,
        true_cfg_scale=true_cfg_scale,
        negative_prompt=negative_prompt,
        images=tuple(images) if images else None,  # type: ignore[arg-type]
        **{name: level for name, level in levels.items() if level is not None},
    )
    # What can be refused is refused before the model libraries are loaded.
    quiet_model_libraries()
    from flowroll.parity.plan import plan_parity
    from flowroll.parity.report import summary, to_json, to_markdown
    from flowroll.parity.run import LayoutParity, run_parity

    places = {"variant": variant, "dtype": dtype, "device": device, "threads": threads, "rank_timeout_s": rank_timeout_s}
    plan = plan_parity(model, params, layouts=layouts, modes=modes, **places)  # type: ignore[arg-type]

    def show(layout: LayoutParity) -> None:
        result = "exact" if layout.is_exact else f"failed: {layout.error}" if layout.error else "not exact"
        typer.echo(f"{layout.layout} {result}", err=True)

    report = run_parity(plan, on_layout=show)
    for file, text in ((out, to_markdown(report)), (json, to_json(report))):
        if file is not None:
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(text, encoding="utf-8")
    typer.echo(f"{summary(report)}\n\nreport: {out}")
    raise typer.Exit(0 if report.is_exact else 1)


def _parse_size(text: str) -> tuple[int, int]:
    """Reads width and height in pixels from `WxH`, or from one number for a square."""
    width, _, height = text.strip().partition("x")
    if not (width.isdecimal() and (height.isdecimal() or "x" not in text) and len(text) < 16):
        raise InvalidRequestError(
            f"size must be WIDTHxHEIGHT or one number of pixels, got {text!r}; write e.g. 1024x768 or 1024.", field="size"
        )
    return int(width), int(height or width)
