"""What every transition promises, whatever the sampler."""

import math

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from flowroll.errors import InvalidRequestError
from flowroll.sampling import ode, transition
from flowroll.sampling.dynamics import DYNAMICS, NAMES, dynamics_named, transitions
from flowroll.sampling.schedule import ScheduleConfig, linspace_float64, shifted_schedule
from flowroll.sampling.transition import GAUSSIAN, NO_CONST, LogProbForm

SIGMAS = torch.tensor([1.0, 0.75, 0.4, 0.0])


STOCHASTIC = [name for name, found in DYNAMICS.items() if found.is_stochastic]
FORMS = [
    LogProbForm(reduce=reduce, constants=constants, inverse_variance=scaled)
    for reduce in ("mean", "sum")
    for constants in (True, False)
    for scaled in (True, False)
]
NOT_ONE = [1.0, 0.999995, 0.5, 0.0]


@pytest.mark.parametrize("sde_type", STOCHASTIC)
def test_a_bf16_model_output_gives_float32_statistics(sde_type: str) -> None:
    latents, velocity = torch.randn(2, 6, 4, dtype=torch.bfloat16), torch.randn(2, 6, 4, dtype=torch.bfloat16)
    for this in transitions(SIGMAS, sde_type=sde_type, noise_level=0.8):
        mean = transition.mean(this, latents, velocity)
        next_latents = transition.sample(this, mean, torch.randn(2, 6, 4) if this.is_stochastic else None)
        log_prob = transition.log_prob(this, next_latents, mean)
        assert mean.dtype == next_latents.dtype == log_prob.dtype == torch.float32
        # float32 in fact: neither factor was applied in bf16
        exact = latents.double() * this.on_latents + velocity.double() * this.on_velocity
        assert (mean.double() - exact).abs().max() < 1e-6


def test_an_ode_step_leaves_dtypes_alone() -> None:
    latents, velocity = torch.randn(6, 4, dtype=torch.bfloat16), torch.randn(6, 4, dtype=torch.bfloat16)
    assert ode.step(latents, velocity, torch.tensor(-0.1)).dtype == torch.bfloat16
    assert ode.step(latents.float(), velocity.float(), torch.tensor(-0.1)).dtype == torch.float32


@pytest.mark.parametrize("sde_type", DYNAMICS)
def test_steps_without_density_score_exactly_zero(sde_type: str) -> None:
    for this in transitions(SIGMAS, sde_type=sde_type, noise_level=0.8, sde_step_indices=(1,)):
        if this.is_stochastic:
            continue
        mean = torch.randn(2, 6, 4)
        for form in FORMS:
            assert transition.log_prob(this, mean, mean, form=form).tolist() == [0.0, 0.0]


def test_only_the_last_cps_step_is_deterministic() -> None:
    assert [this.is_stochastic for this in transitions(SIGMAS, sde_type="cps", noise_level=0.8)] == [True, True, False]
    assert [this.is_stochastic for this in transitions(SIGMAS, sde_type="sde", noise_level=0.8)] == [True, True, True]
    assert not any(this.is_stochastic for this in transitions(SIGMAS, sde_type="ode", noise_level=0.8))
    assert not any(this.is_stochastic for this in transitions(SIGMAS, sde_type="sde", noise_level=0))


def test_a_window_leaves_the_other_steps_to_the_ode() -> None:
    chosen = transitions(SIGMAS, sde_type="sde", noise_level=0.7, sde_step_indices=(1,))
    assert [this.dynamics for this in chosen] == ["ode", "sde", "ode"]
    assert chosen[1] == transitions(SIGMAS, sde_type="sde", noise_level=0.7)[1]


def test_the_log_prob_is_the_normal_density() -> None:
    this = transitions(SIGMAS, sde_type="sde", noise_level=0.7)[1]
    mean, next_latents = torch.randn(3, 5, 7), torch.randn(3, 5, 7)
    expected = torch.distributions.Normal(mean.double(), this.std).log_prob(next_latents.double()).mean(dim=(1, 2))
    torch.testing.assert_close(transition.log_prob(this, next_latents, mean).double(), expected, rtol=1e-6, atol=1e-6)


def test_a_row_scores_the_same_alone_and_in_a_batch() -> None:
    this = transitions(SIGMAS, sde_type="sde", noise_level=0.7)[0]
    mean, next_latents = torch.randn(5, 4095, 64), torch.randn(5, 4095, 64)
    threads = torch.get_num_threads()
    torch.set_num_threads(2)  # with one thread a reduction over the batch happens to sum in the same order
    try:
        together = transition.log_prob(this, next_latents, mean)
        for row in range(5):
            alone = transition.log_prob(this, next_latents[row : row + 1].clone(), mean[row : row + 1].clone())
            assert torch.equal(alone[0], together[row])
    finally:
        torch.set_num_threads(threads)


def test_the_log_prob_is_differentiable_in_the_velocity() -> None:
    this = transitions(SIGMAS, sde_type="sde", noise_level=0.7)[1]
    latents, velocity = torch.randn(2, 6, 4), torch.randn(2, 6, 4, requires_grad=True)
    next_latents = transition.sample(this, transition.mean(this, latents, velocity.detach()), torch.randn(2, 6, 4))
    mean = transition.mean(this, latents, velocity)
    transition.log_prob(this, next_latents, mean).sum().backward()
    expected = (next_latents - mean.detach()) / this.std**2 * this.on_velocity / 24
    torch.testing.assert_close(velocity.grad, expected)


@given(
    sde_type=st.sampled_from(sorted(DYNAMICS)),
    noise=st.one_of(st.sampled_from([0, 1e-4, 1, math.nextafter(2, 0), 10]), st.floats(1e-4, 10)),
    gaps=st.lists(st.floats(1e-6, 1), min_size=1, max_size=20),
    top=st.sampled_from([1.0, 0.999995, 0.99, 0.3]),
)
@settings(max_examples=300, deadline=None)
def test_nothing_valid_gives_nan_or_infinity(sde_type: str, noise: float, gaps: list[float], top: float) -> None:
    if not DYNAMICS[sde_type].admits(noise):
        noise = math.nextafter(DYNAMICS[sde_type].noise_level_max, 0)
    total = sum(gaps)
    gaps = [max(gap / total * top, 1e-6) for gap in gaps]
    levels = [sum(gaps[step:]) for step in range(len(gaps))]
    sigmas = torch.tensor([*(level / max(1.0, levels[0]) for level in levels), 0.0])
    # Flow-SDE refuses a later sigma of about 1; see below.
    assume(sde_type != "sde" or not torch.isclose(sigmas[1:], torch.ones(1)).any())
    generator = torch.Generator().manual_seed(0)
    for this in transitions(sigmas, sde_type=sde_type, noise_level=noise):
        factors = (this.on_latents, this.on_velocity, this.on_previous, this.std)
        assert all(math.isfinite(value) for value in factors) and this.std >= 0
        latents, velocity, drawn, previous = torch.randn(4, 1, 8, generator=generator).unbind(0)
        mean = transition.mean(this, latents, velocity, previous)
        next_latents = transition.sample(this, mean, drawn if this.is_stochastic else None)
        for form in FORMS:
            assert transition.log_prob(this, next_latents[None], mean[None], form=form).isfinite().all()


def test_a_grid_that_starts_just_below_one_stays_tame() -> None:
    # With `s == 1` in place of isclose, the std of the first step was 62.6 and its mean in the thousands.
    sigmas = torch.tensor([1 - 5e-6, 0.96, 0.9, 0.0])
    assert transitions(sigmas, sde_type="sde", noise_level=0.7)[0].std == pytest.approx(0.7, abs=0.01)


@pytest.mark.parametrize("options", [{}, {"noise_level": 0}, {"sde_step_indices": ()}])
def test_unknown_dynamics_are_refused_whatever_else_is_asked(options: dict) -> None:
    # They silently became ODE steps.
    with pytest.raises(InvalidRequestError, match=f"sde_type must be one of {', '.join(DYNAMICS)}, got 'flow-sde'"):
        transitions(SIGMAS, **{"sde_type": "flow-sde", "noise_level": 0.7, **options})
    with pytest.raises(InvalidRequestError, match="sde_type must be one of"):
        transitions(SIGMAS, sde_type="flow-sde", noise_level=0.7, sde_step_indices=(0,))


def test_an_alias_is_the_same_dynamics() -> None:
    assert set(NAMES) == set(DYNAMICS) | {"dance_sde"}
    assert dynamics_named("dance_sde") is DYNAMICS["dance"]
    dance = transitions(SIGMAS, sde_type="dance", noise_level=0.7)
    assert transitions(SIGMAS, sde_type="dance_sde", noise_level=0.7) == dance
    assert [this.dynamics for this in dance] == ["dance"] * 3 and all(this.is_stochastic for this in dance)


def test_only_the_first_step_of_flow_sde_may_start_at_one() -> None:
    # The second step took the second sigma too, which was its own: its std was 221.
    with pytest.raises(InvalidRequestError, match=r"sigmas must stay .* below 1 .*, got 0.999994993 at step 1; remove it"):
        transitions(torch.tensor(NOT_ONE), sde_type="sde", noise_level=0.7)
    first = transitions(torch.tensor(NOT_ONE), sde_type="sde", noise_level=0.7, sde_step_indices=(0,))
    assert first[0].std == pytest.approx(0.7, abs=0.01) and first[1].dynamics == "ode"
    for sde_type in ("cps", "dance", "ode"):
        assert max(this.std for this in transitions(torch.tensor(NOT_ONE), sde_type=sde_type, noise_level=0.7)) < 1


@pytest.mark.parametrize("sde_type", STOCHASTIC)
@pytest.mark.parametrize("sigmas", [(1.1, 0.5, 0), (0.5, 0.5, 0), (0.4, 0.5, 0), (1, math.nan, 0), (1, 0.5, -0.1), (1.0, 0, 0)])
def test_a_grid_that_no_step_can_follow_is_refused(sde_type: str, sigmas: tuple) -> None:
    grid = torch.tensor(sigmas)
    with pytest.raises(InvalidRequestError, match=r"sigmas must decrease at every step") as caught:
        transitions(grid, sde_type=sde_type, noise_level=0.7)
    assert caught.value.field == "sigmas"
    assert len(transitions(grid, sde_type=sde_type, noise_level=0)) == 2


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("shift", [0.33, 2.64, 4.86])
def test_a_grid_that_the_shift_rounds_above_one_is_as_good_as_one_from_one(name: str, shift: float) -> None:
    grid = shifted_schedule(ScheduleConfig(shift=shift), linspace_float64(4), num_tokens=16).sigmas
    from_one = torch.cat([torch.ones(1), grid[1:]])
    assert grid[0] > 1
    found, expected = (transitions(one, sde_type=name, noise_level=0.7) for one in (grid, from_one))
    for left, right in zip(found, expected, strict=True):
        assert left.is_stochastic == right.is_stochastic
        for field in ("on_latents", "on_velocity", "on_previous", "std"):
            assert getattr(left, field) == pytest.approx(getattr(right, field), abs=1e-5), field
    with pytest.raises(InvalidRequestError, match=r"got 1\.00000012 at step 1"):
        transitions(torch.cat([grid[:1] * 1.0000002, grid]), sde_type="cps", noise_level=0.7)


def test_a_noise_level_just_below_two_has_a_density_only_where_float32_holds_it() -> None:
    chosen = transitions(torch.tensor([1.0, 0.5, 1e-6, 0.0]), sde_type="cps", noise_level=math.nextafter(2, 0))
    assert [this.is_stochastic for this in chosen] == [True, False, False]
    mean = torch.randn(1, 8)
    for this in chosen:
        assert transition.log_prob(this, mean, mean).isfinite().all()


def test_history_is_declared_where_it_is_used() -> None:
    for name, found in DYNAMICS.items():
        grid = torch.tensor([1.0, 0.8, 0.6, 0.3, 0.0])
        used = any(this.needs_previous for this in transitions(grid, sde_type=name, noise_level=0.7))
        assert used == found.needs_history
    this = transition.Transition(dynamics="two steps", on_latents=0.5, on_velocity=0.25, std=0.0, on_previous=2.0)
    assert transition.mean(this, torch.ones(2), torch.ones(2), torch.ones(2)).tolist() == [2.75, 2.75]


@pytest.mark.parametrize("sde_type", STOCHASTIC)
def test_a_rollouts_stochastic_steps_give_its_transitions_back(sde_type: str) -> None:
    for chosen in (None, (0,), (1, 2), (0, 1), ()):
        made = transitions(SIGMAS, sde_type=sde_type, noise_level=0.7, sde_step_indices=chosen)
        listed = tuple(step for step, this in enumerate(made) if this.is_stochastic)
        found = transitions(SIGMAS, sde_type=sde_type, noise_level=0.7, sde_step_indices=listed)
        assert found == made


@pytest.mark.parametrize("form", FORMS)
def test_each_form_is_the_log_density_of_torch_without_what_it_leaves_out(form: LogProbForm) -> None:
    generator = torch.Generator().manual_seed(3)
    this = transitions(SIGMAS, sde_type="dance", noise_level=0.6)[1]
    latents, velocity, noise = (torch.randn(3, 5, 4, generator=generator) for _ in range(3))
    mean = transition.mean(this, latents, velocity)
    following = transition.sample(this, mean, noise)
    density = torch.distributions.Normal(mean.double(), this.std).log_prob(following.double())
    errors = -((following.double() - mean.double()) ** 2) / (2 * this.std**2)
    constants = density - errors
    expected = errors * (1 if form.inverse_variance else 2 * this.std**2) + (constants if form.constants else 0)
    expected = expected.flatten(1).sum(1) if form.reduce == "sum" else expected.flatten(1).mean(1)
    torch.testing.assert_close(transition.log_prob(this, following, mean, form=form).double(), expected, rtol=2e-6, atol=1e-6)


def test_the_usual_forms_are_two_of_them() -> None:
    assert LogProbForm() == GAUSSIAN == FORMS[0] and FORMS[3] == NO_CONST
