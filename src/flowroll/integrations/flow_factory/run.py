"""One call of an adapter's `inference`: its requests, and its steps as they are answered from the rollouts."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from flowroll.types import Rollout, SamplingParams
from flowroll.types.rules import require

_DYNAMICS: Mapping[str, str] = {"Flow-SDE": "sde", "Dance-SDE": "dance", "CPS": "cps", "ODE": "ode"}
# What a step's callbacks may ask for, with the field of a request that returns it.
_RETURNED: Mapping[str, str] = {"noise_pred": "velocity", "next_latents_mean": "mean", "std_dev_t": "std"}


class Run:
    """One call of `inference`: its trajectories, and which step comes next.

    Args:
        adapter: The adapter.
        keys: What the call's callbacks ask for.
        own_forward: The adapter's own `forward`, of which the log-probs are then; None: they are the engine's.
    """

    def __init__(self, adapter: Any, keys: Sequence[str], own_forward: Callable[..., Any] | None) -> None:
        self._adapter, self._keys = adapter, tuple(key for key in keys if key in _RETURNED)
        self._own_forward = own_forward
        self._step = 0
        self.rollouts: list[Rollout] = []

    def step(self, values: Mapping[str, Any]) -> Any:
        """Answers the call of `forward` for the next step, in the way of the scheduler."""
        if not self.rollouts:
            self.rollouts = self._adapter.flowroll_backend.rollouts(self._requests(values))
        step, self._step = self._step, self._step + 1
        device = values["latents"].device
        trajectories = [one.dit_trajectory for one in self.rollouts if one.dit_trajectory is not None]
        assert len(trajectories) == len(values["latents"])
        # One for each sample, in as many dimensions as the latents have.
        shape = (len(trajectories), *[1] * trajectories[0].latents[0].ndim)
        dt = (trajectories[0].sigmas[step + 1] - trajectories[0].sigmas[step]).expand(shape)
        made: dict[str, Any] = {
            "next_latents": torch.stack([one.latents[step + 1].float() for one in trajectories]).to(device),
            "dt": dt.to(device),
        }
        if values.get("compute_log_prob"):
            rows = [one.log_probs[step] for one in self.rollouts if one.log_probs is not None]
            made["log_prob"] = torch.stack(rows).to(device)
        for key in self._keys:
            field = _RETURNED[key]
            rows = [one.step_tensors.tensors[field][step] for one in self.rollouts if one.step_tensors is not None]
            stacked = torch.stack(rows).to(device)
            made[key] = self._std_dev(stacked.reshape(shape), made["dt"]) if key == "std_dev_t" else stacked
        if "log_prob" in made and self._own_forward is not None:
            wanted = ["log_prob", *self._keys]
            own = self._own_forward(**{**values, "next_latents": made["next_latents"], "return_kwargs": wanted})
            made.update({name: getattr(own, name) for name in wanted})
        scheduler = importlib.import_module("flow_factory.scheduler")
        return scheduler.SDESchedulerOutput(**made)

    def _std_dev(self, std: Tensor, dt: Tensor) -> Tensor:
        """Returns what Flow-Factory has as `std_dev_t`: without the square root of the step's length, but for CPS."""
        return std if self._adapter.scheduler.dynamics_type == "CPS" else std / torch.sqrt(-dt)

    def images(self) -> Tensor:
        """Returns the pictures, float32 in [0, 1], [batch, colors, height, width]."""
        pictures = [one.image[:, 0] for one in self.rollouts if isinstance(one.image, Tensor)]
        return torch.stack(pictures).to(self._adapter.device)

    def _requests(self, values: Mapping[str, Any]) -> list[SamplingParams]:
        """Makes a request for each sample of the batch, which begins with the adapter's own x_T and embeddings."""
        scheduler, latents = self._adapter.scheduler, values["latents"]
        for name, usual in (("cfg_normalization", False), ("cfg_truncation", 1.0)):
            given = values.get(name, usual)
            require(given == usual, name, f"be {usual} for flowroll", given, "leave it at its default")
        height, width = self._adapter.flowroll_size
        common = {
            "height": height,
            "width": width,
            "sigmas": tuple(scheduler.sigmas.tolist()),
            **dynamics_fields(scheduler),
            **self._adapter.flowroll_policy_fields(),
            "rollout_return_dit_trajectory": True,
            "return_fields": tuple(_RETURNED[key] for key in self._keys) or None,
        }
        # Of torch's own generator, from which Flow-Factory's scheduler draws its noise.
        seeds = torch.randint(2**32, (len(latents),)).tolist()
        dtype = self._adapter.flowroll_backend.dtype
        return [
            SamplingParams(**common, **prompt_fields(values, index, dtype), latents=_start(latents[index]), seed=seeds[index])
            for index in range(len(latents))
        ]


def dynamics_fields(scheduler: Any) -> dict[str, Any]:
    """Returns the dynamics and the noise level of each step, as the scheduler has them for its seed."""
    kind = scheduler.dynamics_type
    known = ", ".join(_DYNAMICS)
    require(kind in _DYNAMICS, "dynamics_type", f"be one of {known}", kind, "choose one of these")
    if scheduler.is_eval or kind == "ODE":
        return {"rollout_sde_type": "ode", "rollout_noise_level": 0}
    levels = scheduler.get_noise_levels().double().tolist()
    # In the scheduler's own number, of which its tensor holds float32.
    exact = tuple(float(scheduler.noise_level) if level else 0 for level in levels)
    return {
        "rollout_sde_type": _DYNAMICS[kind],
        "rollout_noise_levels": exact,
        "rollout_log_prob_no_const": kind == "CPS",
    }


def _start(latents: Tensor) -> Tensor:
    """Returns x_T on the CPU; what Flow-Factory stores in float16 is given in float32."""
    given = latents.detach().cpu()
    return given.float() if given.dtype == torch.float16 else given


def prompt_fields(values: Mapping[str, Any], index: int, dtype: torch.dtype) -> dict[str, Any]:
    """Returns the embeddings of one sample, without padding and in the engine's dtype, and the guidance scale.

    Flow-Factory's preprocessed embeddings are float32, whatever they were computed in.
    """
    found: dict[str, Any] = {}
    for prefix in ("", "negative_"):
        embeds = values.get(f"{prefix}prompt_embeds")
        if embeds is None:
            continue
        row, mask = embeds[index], values.get(f"{prefix}prompt_embeds_mask")
        found[f"{prefix}prompt_embeds"] = (row if mask is None else row[mask[index].bool()]).detach().to("cpu", dtype)
        pooled = values.get(f"{prefix}pooled_prompt_embeds")
        if pooled is not None:
            found[f"{prefix}pooled_prompt_embeds"] = pooled[index].detach().to("cpu", dtype)
    scale = values.get("guidance_scale")
    scale = scale[index] if isinstance(scale, list | tuple | Tensor) and len(torch.as_tensor(scale).shape) else scale
    return _guided(found, None if scale is None else float(scale), embeds_scale="img_ids" in values)


def _guided(found: dict[str, Any], scale: float | None, *, embeds_scale: bool) -> dict[str, Any]:
    """Adds the guidance scale; without a negative prompt there is no guidance, but for a model that is given the scale."""
    if embeds_scale:
        return {**found, "guidance_scale": scale}
    if "negative_prompt_embeds" not in found:
        return {**found, "guidance_scale": 0.0}
    return {**found, "guidance_scale": scale}
