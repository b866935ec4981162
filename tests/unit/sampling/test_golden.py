"""The samplers agree with independent public implementations, step by step."""

import pytest
import torch
from tests.unit.sampling.golden import VECTOR_FILES, Golden

from flowroll.sampling import ode, transition
from flowroll.sampling.dynamics import DYNAMICS, transitions
from flowroll.sampling.transition import NO_CONST, LogProbForm

STOCHASTIC = [
    ("flow_sde_eta0.7", "sde", "flow_grpo"),
    ("flow_sde_eta1.2", "sde", "flow_grpo"),
    ("cps_eta0.8", "cps", "flow_cps"),
    ("dance_eta0.3", "dance", "dance_grpo"),
    ("ddim_flow_eta1", "ddim_flow", "diffusion_nft"),
]
# The vectors' README allows 2e-6, and 5e-6 for dance. The std is held to 5e-7 of itself.
TOLERANCE = 1e-6
ABOVE_ONE = ["qwen-image_T4_seed3.safetensors", "z-image_T9_seed1.safetensors"]


def form_of(sde_type: str) -> LogProbForm:
    return DYNAMICS[sde_type].log_prob_form


def test_every_stochastic_dynamics_has_golden_vectors() -> None:
    assert {row[1] for row in STOCHASTIC} == {name for name, found in DYNAMICS.items() if found.is_stochastic}


def worst(a: torch.Tensor, b: torch.Tensor) -> float:
    return (a - b).abs().max().item()


@pytest.mark.parametrize("name", VECTOR_FILES)
@pytest.mark.parametrize(("prefix", "sde_type", "reference"), STOCHASTIC)
def test_every_step_matches_the_reference(name: str, prefix: str, sde_type: str, reference: str) -> None:
    check_every_step(Golden.load(name), prefix, sde_type, reference)


@pytest.mark.parametrize("name", ABOVE_ONE)
def test_cps_above_one_matches_the_reference(name: str) -> None:
    check_every_step(Golden.above_one(name), "cps_eta1.3", "cps", "flow_cps")


def check_every_step(golden: Golden, prefix: str, sde_type: str, reference: str) -> None:
    chosen = transitions(golden["sigmas"], sde_type=sde_type, noise_level=golden.noise_levels[prefix])
    assert golden["latents"].shape[1] > 1
    for step, this in enumerate(chosen):
        mean = transition.mean(this, golden["latents"][step], golden["velocity"][step])
        noise = golden["noise"][step] if this.is_stochastic else None
        next_latents = transition.sample(this, mean, noise)
        log_prob = transition.log_prob(this, next_latents, mean, form=form_of(sde_type))
        recorded = golden[f"{prefix}/log_prob_mean.{reference}"][step]
        reference_std = golden[f"{prefix}/std.{reference}"][step].item()
        assert worst(mean, golden[f"{prefix}/mean.{reference}"][step]) < TOLERANCE
        assert worst(next_latents, golden[f"{prefix}/next_latents.{reference}"][step]) < TOLERANCE
        assert abs(this.std - reference_std) <= 5e-7 * reference_std
        # Without a std, DDIM's reference divides by 0.
        assert worst(log_prob, torch.where(recorded.isnan(), 0, recorded)) < TOLERANCE
        assert not recorded.isnan().any() or not this.is_stochastic


@pytest.mark.parametrize("name", VECTOR_FILES)
@pytest.mark.parametrize(("prefix", "sde_type", "reference"), [row for row in STOCHASTIC if row[1] != "ddim_flow"])
def test_a_stored_next_state_is_scored_as_by_the_reference(name: str, prefix: str, sde_type: str, reference: str) -> None:
    golden = Golden.load(name)
    chosen = transitions(golden["sigmas"], sde_type=sde_type, noise_level=golden.noise_levels[prefix])
    for step, this in enumerate(chosen):
        mean = transition.mean(this, golden["latents"][step], golden["velocity"][step])
        stored = golden[f"{prefix}/next_latents.{reference}"][step]
        log_prob = transition.log_prob(this, stored, mean, form=form_of(sde_type))
        assert worst(log_prob, golden[f"{prefix}/log_prob_score.{reference}"][step]) < 2e-6


@pytest.mark.parametrize("name", VECTOR_FILES)
@pytest.mark.parametrize("prefix", ["flow_sde_eta0.7", "flow_sde_eta1.2"])
def test_the_form_without_constants_is_the_wire_convention(name: str, prefix: str) -> None:
    golden = Golden.load(name)
    for step, this in enumerate(transitions(golden["sigmas"], sde_type="sde", noise_level=golden.noise_levels[prefix])):
        mean = transition.mean(this, golden["latents"][step], golden["velocity"][step])
        next_latents = transition.sample(this, mean, golden["noise"][step])
        log_prob = transition.log_prob(this, next_latents, mean, form=NO_CONST)
        assert worst(log_prob, golden[f"{prefix}/log_prob_unscaled.sglang"][step]) < 2e-6


@pytest.mark.parametrize("name", VECTOR_FILES)
@pytest.mark.parametrize(("prefix", "sde_type", "reference"), STOCHASTIC)
def test_the_whole_chain_ends_where_the_reference_ends(name: str, prefix: str, sde_type: str, reference: str) -> None:
    golden = Golden.load(name)
    latents = golden["latents"][0]
    log_probs = []
    for step, this in enumerate(transitions(golden["sigmas"], sde_type=sde_type, noise_level=golden.noise_levels[prefix])):
        mean = transition.mean(this, latents, golden["velocity"][step])
        latents = transition.sample(this, mean, golden["noise"][step] if this.is_stochastic else None)
        log_probs.append(transition.log_prob(this, latents, mean, form=form_of(sde_type)))
    assert worst(latents, golden[f"{prefix}/chain_final.{reference}"]) < 5e-6
    recorded = golden[f"{prefix}/chain_log_prob_mean.{reference}"]
    assert worst(torch.stack(log_probs), torch.where(recorded.isnan(), 0, recorded)) < 2e-6
    assert recorded.isnan().sum() in (0, recorded.shape[1])


@pytest.mark.parametrize("name", VECTOR_FILES)
def test_ode_steps_are_the_schedulers_bits(name: str) -> None:
    golden = Golden.load(name)
    sigmas = golden["sigmas"]
    for step in range(golden.num_steps):
        dt = sigmas[step + 1] - sigmas[step]
        latents, velocity = golden["latents"][step], golden["velocity"][step]
        assert torch.equal(ode.step(latents, velocity, dt), golden["ode/next_latents_bf16.diffusers"][step])
        assert torch.equal(ode.step(latents, velocity.float(), dt), golden["ode/next_latents.diffusers"][step])
    latents = golden["latents"][0]
    for step in range(golden.num_steps):
        latents = ode.step(latents, golden["velocity"][step].float(), sigmas[step + 1] - sigmas[step])
    assert worst(latents, golden["ode/chain_final.diffusers"]) < 5e-6
