"""What a rollout returns is what the loop used."""

import math
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from tests.driving import generate_here, rollout_here
from tests.guiding import guided, in_words_of_pipeline
from tests.pairs import DTYPES, dealt, paired
from tests.rollouts import tensors_of
from torch.utils._python_dispatch import TorchDispatchMode

from flowroll import DebugTensors, Rollout, Trajectory
from flowroll.engine import Engine
from flowroll.engine.runner.texts import EncodedTexts
from flowroll.errors import EngineError, InvalidRequestError
from flowroll.families import FAMILIES, Guidance, StepInput
from flowroll.sampling import ode, transition
from flowroll.sampling.dynamics import DYNAMICS, transitions

ALL = {"debug_mode": True, "return_denoising_env": True, "return_dit_trajectory": True}
REQUEST = {"prompt": "a yellow dining table", "height": 64, "width": 64, "num_inference_steps": 4, "seed": 21}
NAMES = tuple(FAMILIES)
# Both branches of FLUX.2 have as many tokens, and of Qwen-Image's texts any lengths do: they share a forward here that the
# pipeline runs twice. One branch is compared.
ALIKE: dict[str, dict[str, Any]] = {"flux2": {"guidance_scale": 1.0}, "qwen_image": {"true_cfg_scale": 1.0}}
# Operations of a whole request beyond the pipeline's: on the sigma grid, views of a constant, and a sum over each of four
# tensors (both embeddings, the final latents, the picture; for SD3 and FLUX.1 the pooled ones too, for FLUX.1 ids and scale),
# which shows whether they are finite. For Qwen-Image-Edit the first input is joined to the reference's latents once more, for
# the batch key, and an empty tensor stands in for the sample's latents while the reference is encoded.
EXTRA_OPS: dict[str, Counter[str]] = {
    "qwen_image": Counter(mul=2, add=2, rsub=2, arange=1, div=1, copy_=1, reciprocal=1, sum=3, _local_scalar_dense=3),
    "z_image": Counter(mul=2, add=1, _to_copy=1, sum=4, _local_scalar_dense=4),
    "sd3": Counter(mul=5, add=3, div=4, arange=1, cat=1, copy_=1, _to_copy=1, sum=6, _local_scalar_dense=5),
    "flux2": Counter(mul=1, add=1, copy_=2, reciprocal=1, zeros_like=1, constant_pad_nd=1, sum=3, _local_scalar_dense=3),
    "flux": Counter(mul=2, _to_copy=2, arange=1, reciprocal=1, zeros_like=1, stack=1, sum=7, _local_scalar_dense=7),
    "qwen_image_edit": Counter(
        mul=2, add=2, rsub=2, arange=1, copy_=1, reciprocal=1, div=1, _to_copy=1, cat=1, empty=1, sum=4, _local_scalar_dense=4
    ),
    "qwen_image_21": Counter(mul=2, add=2, arange=2, copy_=1, ge=1, reciprocal=1, sum=3, _local_scalar_dense=3),
}


def parts(rollout: Rollout, device: str = "cpu") -> tuple[DebugTensors, Trajectory]:
    """The debug tensors and the trajectory; what is recomputed from them has to be on the device that made them."""
    assert rollout.debug_tensors is not None and rollout.dit_trajectory is not None
    return moved(rollout.debug_tensors, device), moved(rollout.dit_trajectory, device)


def moved(part: Any, device: str) -> Any:
    fields = {name: getattr(part, name) for name in part.__dataclass_fields__}
    return type(part)(
        **{name: value.to(device) if isinstance(value, torch.Tensor) else value for name, value in fields.items()}
    )


class OpCounter(TorchDispatchMode):
    """Counts the operations that make new tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if not func.is_view:
            self.counts[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))


def ops_per_step(run: Callable[[int], object]) -> Counter[str]:
    counts = []
    for steps in (2, 3):
        with OpCounter() as counter:
            run(steps)
        counts.append(counter.counts)
    counts[1].subtract(counts[0])
    return +counts[1]


@paired(family=NAMES, dtype=DTYPES, sde_type=tuple(name for name, found in DYNAMICS.items() if found.is_stochastic))
def test_the_returned_tensors_reproduce_every_step(
    engine_of: Callable[[str, str], Engine], family: str, dtype: str, sde_type: str
) -> None:
    engine = engine_of(family, dtype)
    rollout = engine.rollout(**REQUEST, **ALL, sde_type=sde_type)[0]
    debug, trajectory = parts(rollout, engine.info.device)
    chosen = transitions(trajectory.sigmas, sde_type=sde_type, noise_level=0.7)
    assert trajectory.latents.dtype == torch.float32 and trajectory.latents.shape[0] == 5
    assert rollout.log_probs is not None and rollout.log_probs.dtype == torch.float32
    for step, this in enumerate(chosen):
        mean = transition.mean(this, trajectory.latents[step], debug.model_output[step])
        assert torch.equal(mean, debug.prev_sample_mean[step])
        noise = debug.variance_noise[step] if this.is_stochastic else None
        assert torch.equal(transition.sample(this, mean, noise), trajectory.latents[step + 1])
        score = transition.log_prob(this, trajectory.latents[step + 1][None], mean[None])[0]
        assert torch.equal(score.cpu(), rollout.log_probs[step])
        assert debug.noise_std_dev[step].item() == this.std
    assert rollout.sde_step_indices == tuple(step for step, this in enumerate(chosen) if this.is_stochastic)


@paired(name=NAMES, dtype=DTYPES, cfg=(True, False))
def test_the_environment_reproduces_every_velocity(
    engine_of: Callable[[str, str], Engine], pipeline_of: Callable[[str, str], Any], name: str, dtype: str, cfg: bool
) -> None:
    engine = engine_of(name, dtype)
    rollout = engine.rollout(**guided(name, 3.0 if cfg else 0.0, **REQUEST, **ALL))[0]
    debug, trajectory = parts(rollout, engine.info.device)
    record, family, transformer = rollout.sampling, FAMILIES[name], pipeline_of(name, dtype).transformer
    guidance = Guidance(rule=record.guidance_rule, scale=record.guidance_scale)
    model_dtype = getattr(torch, record.model_dtype.removeprefix("torch."))
    timesteps = family.model_timesteps(trajectory.timesteps, family.timestep_dtype(model_dtype))
    assert rollout.denoising_env is not None
    env = rollout.denoising_env.to(engine.info.device)
    assert (env.neg_cond_kwargs is not None) == cfg
    with torch.no_grad():
        for step in range(4):
            timestep = timesteps[step : step + 1]
            one = StepInput(latents=trajectory.latents[step], timestep=timestep, env=env, guidance=guidance, is_first=step == 0)
            velocity = family.velocity(transformer, one, model_dtype)
            assert torch.equal(velocity.float(), debug.model_output[step])


@pytest.mark.parametrize("name", NAMES)
def test_the_environment_has_the_declared_fields(engine_of: Callable[[str, str], Engine], name: str) -> None:
    family = FAMILIES[name]
    (rollout,) = engine_of(name, "float32").rollout(**guided(name, 3.0, **REQUEST, **ALL))
    env, embedded = rollout.denoising_env, rollout.sampling.embedded_guidance_scale
    assert env is not None
    assert set(env.image_kwargs) == {field.name for field in family.conditioning.in_place("image_kwargs")}
    assert (env.guidance, embedded) == ((4.5, 4.5) if name == "flux" else (None, None))
    for branch in (env.pos_cond_kwargs, env.neg_cond_kwargs):
        assert branch is not None
        fields = family.conditioning.in_place("pos_cond_kwargs")
        assert {field.name for field in fields if field.is_required} <= set(branch) <= {field.name for field in fields}
        embeds = branch[family.embeds_key]
        assert isinstance(embeds, torch.Tensor) and embeds.ndim == 2
        assert branch.get("txt_seq_lens", [embeds.shape[0]]) == [embeds.shape[0]]
        assert "encoder_hidden_states_mask" not in branch and "freqs_cis" not in branch


def test_the_samples_of_a_group_share_one_environment_and_requests_do_not(engine_of: Callable[[str, str], Engine]) -> None:
    engine = engine_of("qwen_image", "float32")
    group, other = (engine.rollout(**REQUEST, **ALL, num_outputs_per_prompt=2) for _ in range(2))
    assert group[0].denoising_env is group[1].denoising_env is not None
    assert other[0].denoising_env is not None
    pointers = [{tensor.data_ptr() for _, tensor in one[0].denoising_env.tensors()} for one in (group, other)]
    assert pointers[0].isdisjoint(pointers[1])


def test_a_recorded_tensor_has_memory_of_its_own(engine_of: Callable[[str, str], Engine]) -> None:
    """The forward of a group returns the velocities of all in one tensor; who keeps or pickles a rollout means it alone."""
    group = engine_of("qwen_image", "float32").rollout(
        **guided("qwen_image", 0.0, **REQUEST), **ALL, return_fields=("velocity", "x0"), num_outputs_per_prompt=3
    )
    for rollout in group:
        debug, trajectory = parts(rollout)
        assert rollout.step_tensors is not None and rollout.log_probs is not None
        kept = [rollout.log_probs, trajectory.latents, *rollout.step_tensors.tensors.values()]
        kept += [debug.model_output, debug.prev_sample_mean, debug.variance_noise]
        assert all(tensor.untyped_storage().nbytes() == tensor.nbytes for tensor in kept)


@pytest.mark.parametrize("name", NAMES)
def test_the_last_latents_are_the_ones_that_were_decoded(engine_of: Callable[[str, str], Engine], name: str) -> None:
    engine = engine_of(name, "bfloat16")
    rollout = engine.rollout(**REQUEST, **ALL)[0]
    _, trajectory = parts(rollout)
    assert trajectory.latent_step_indices == (0, 1, 2, 3, 4)
    assert torch.equal(engine.decode(trajectory.latents[-1], height=64, width=64), rollout.image)


@pytest.mark.parametrize("name", NAMES)
def test_latents_are_raw_not_the_models_input(engine_of: Callable[[str, str], Engine], name: str) -> None:
    _, trajectory = parts(engine_of(name, "bfloat16").rollout(**REQUEST, **ALL)[0])
    for latents in trajectory.latents[1:]:
        assert not torch.equal(latents, latents.to(torch.bfloat16).float())


@pytest.mark.parametrize("name", NAMES)
def test_a_bf16_ode_rollout_keeps_the_loops_dtypes(engine_of: Callable[[str, str], Engine], name: str) -> None:
    rollout = engine_of(name, "bfloat16").rollout(**REQUEST, **ALL, sde_type="ode")[0]
    debug, trajectory = parts(rollout)
    assert trajectory.latents.dtype == (FAMILIES[name].noise_dtype(torch.bfloat16))
    assert debug.model_output.dtype == debug.prev_sample_mean.dtype == torch.float32
    assert torch.equal(debug.prev_sample_mean, trajectory.latents[1:].float())
    assert not debug.variance_noise.any() and not debug.noise_std_dev.any()
    assert rollout.log_probs is not None and rollout.log_probs.tolist() == [0.0] * 4
    assert rollout.log_probs.dtype == torch.float32
    assert rollout.sde_step_indices == ()


@pytest.mark.parametrize("name", NAMES)
def test_each_step_of_a_window_follows_its_own_rule(engine_of: Callable[[str, str], Engine], name: str) -> None:
    engine = engine_of(name, "bfloat16")
    rollout = engine.rollout(**REQUEST, **ALL, sde_step_indices=(1, 2))[0]
    debug, trajectory = parts(rollout, engine.info.device)
    assert rollout.sde_step_indices == (1, 2) and trajectory.latents.dtype == torch.float32
    assert rollout.log_probs is not None
    assert [value == 0 for value in rollout.log_probs.tolist()] == [True, False, False, True]
    # The pair of Z-Image is guided in float32.
    velocity_dtype = torch.float32 if name == "z_image" else torch.bfloat16
    for step in (0, 3):
        dt = trajectory.sigmas[step + 1] - trajectory.sigmas[step]
        expected = ode.step(trajectory.latents[step], debug.model_output[step].to(velocity_dtype), dt)
        assert torch.equal(expected.float(), trajectory.latents[step + 1])


@pytest.mark.parametrize("name", NAMES)
def test_no_returned_tensor_aliases_another(engine_of: Callable[[str, str], Engine], name: str) -> None:
    group = engine_of(name, "float32").rollout(**REQUEST, **ALL, sde_type="ode", num_outputs_per_prompt=2)
    seen: list[tuple[int, int]] = []
    # The samples of a group have one environment.
    assert all(rollout.denoising_env is group[0].denoising_env for rollout in group)
    own = [group[0], *(replace(rollout, denoising_env=None) for rollout in group[1:])]
    for rollout in own:
        for _, tensor in tensors_of(rollout):
            start = tensor.data_ptr()
            end = start + tensor.numel() * tensor.element_size()
            assert all(end <= other_start or start >= other_end for other_start, other_end in seen)
            assert tensor.is_contiguous()
            seen.append((start, end))


def test_only_the_wanted_latents_are_returned(engine_of: Callable[[str, str], Engine]) -> None:
    engine = engine_of("z_image", "float32")
    _, full = parts(engine.rollout(**REQUEST, **ALL)[0])
    _, kept = parts(engine.rollout(**REQUEST, **ALL, return_step_indices=(4, 1))[0])
    assert kept.latent_step_indices == (1, 4)
    assert torch.equal(kept.latents, full.latents[[1, 4]])
    assert torch.equal(kept.sigmas, full.sigmas) and torch.equal(kept.timesteps, full.timesteps)
    _, none = parts(engine.rollout(**REQUEST, **ALL, return_step_indices=())[0])
    assert none.latents.shape == (0, *full.latents.shape[1:])


def test_the_dtype_of_the_latents_does_not_depend_on_which_are_returned(engine_of: Callable[[str, str], Engine]) -> None:
    engine = engine_of("qwen_image", "bfloat16")
    for options, dtype in (({"sde_step_indices": (0,)}, torch.float32), ({"sde_type": "ode"}, torch.bfloat16)):
        for kept in (None, (4,), ()):
            _, trajectory = parts(engine.rollout(**REQUEST, **ALL, **options, return_step_indices=kept)[0])
            assert trajectory.latents.dtype == dtype


def test_a_trajectory_that_would_leave_float32_is_refused(engine_of: Callable[[str, str], Engine]) -> None:
    # noise_level 10 over 50 steps multiplies the latents by up to 1e25; it used to come back as NaN with status 200.
    with pytest.raises(InvalidRequestError, match="within float32") as caught:
        engine_of("z_image", "float32").rollout(**{**REQUEST, "num_inference_steps": 50, "noise_level": 10})
    assert caught.value.field == "rollout_noise_level"


def test_a_trajectory_that_left_float32_is_an_error_not_a_sample(
    engine_of: Callable[[str, str], Engine], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = engine_of("z_image", "float32")
    weight = engine._model.transformer.all_final_layer["2-1"].linear.weight
    with monkeypatch.context() as patch:
        patch.setattr(weight, "data", torch.full_like(weight, float("nan")))
        with pytest.raises(EngineError, match="stay finite"):
            engine.rollout(**REQUEST)
    assert engine.rollout(**REQUEST)[0].log_probs is not None


@pytest.mark.parametrize("name", NAMES)
def test_plain_generation_runs_no_operation_that_the_pipeline_does_not(
    engine_of: Callable[[str, str], Engine], pipeline_of: Callable[[str, str], Any], name: str
) -> None:
    engine, pipeline = engine_of(name, "bfloat16"), pipeline_of(name, "bfloat16")
    size = {"prompt": "a bowl", "height": 64, "width": 64, **ALIKE.get(name, {})}
    asked = in_words_of_pipeline(pipeline, {**size, "negative_prompt": " "})
    theirs = ops_per_step(lambda steps: pipeline(**asked, num_inference_steps=steps, output_type="latent"))
    ours = ops_per_step(lambda steps: generate_here(engine, **size, num_inference_steps=steps))
    recorded = ops_per_step(lambda steps: rollout_here(engine, **size, num_inference_steps=steps, debug_mode=False))
    assert ours and ours - theirs == Counter()
    assert recorded - theirs != Counter()


@pytest.mark.parametrize("name", NAMES)
def test_plain_generation_allocates_nothing_that_the_pipeline_does_not(
    engine_of: Callable[[str, str], Engine],
    pipeline_of: Callable[[str, str], Any],
    name: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # A text that came before would not be encoded again.
    monkeypatch.setattr(EncodedTexts, "get", lambda *_: None)
    engine, pipeline = engine_of(name, "bfloat16"), pipeline_of(name, "bfloat16")
    size = {"prompt": "a bowl", "height": 64, "width": 64, "num_inference_steps": 3, **ALIKE.get(name, {})}
    negative = next(iter(FAMILIES[name].variants.values())).negative_prompt
    asked = in_words_of_pipeline(pipeline, {**size, "negative_prompt": negative})
    counts = []
    for run in (
        lambda: pipeline(**asked, output_type="pt"),
        lambda: generate_here(engine, **size),
        lambda: rollout_here(engine, **size, rollout=False),
    ):
        run()  # the models fill caches of their own
        with OpCounter() as counter:
            run()
        counts.append(counter.counts)
    theirs, plain, evaluation = counts
    assert plain == evaluation
    assert plain - theirs == EXTRA_OPS[name]


@pytest.mark.parametrize("options", [{"sde_type": "ode"}, {"noise_level": 0}, {"sde_step_indices": ()}, {"rollout": False}])
def test_deterministic_steps_draw_no_random_number(engine_of: Callable[[str, str], Engine], options: dict[str, Any]) -> None:
    engine = engine_of("qwen_image", "float32")
    # What is asked of the kernels at the first meeting of a shape draws numbers of its own.
    rollout_here(engine, **{**REQUEST, **options})
    rollout_here(engine, **REQUEST, sde_type="cps")
    with OpCounter() as counter:
        rollout_here(engine, **{**REQUEST, **options})
    draws = {name: count for name, count in counter.counts.items() if "rand" in name or "normal" in name}
    assert sum(draws.values()) == 1  # the initial noise alone
    with OpCounter() as counter:
        rollout_here(engine, **REQUEST, sde_type="cps")
    assert sum(count for name, count in counter.counts.items() if "rand" in name or "normal" in name) == 1 + 3


@dealt(
    name=NAMES,
    options=(
        {"sde_type": "cps", "noise_level": 1},
        {"sde_type": "cps", "noise_level": math.nextafter(2, 0)},
        *({"sde_type": "dance", "noise_level": level} for level in (1e-4, 2)),
        *({"sde_type": "dance", "num_inference_steps": steps} for steps in (1, 200)),
        {"sde_type": "cps", "noise_level": 1e-4},
        {"sde_type": "cps", "log_prob_no_const": True},
        {"sde_type": "cps", "noise_level": 0},
        {"sde_type": "sde", "noise_level": 10},
        {"sde_type": "sde", "noise_level": 1e-4},
        {"sde_type": "sde", "noise_level": 0, "log_prob_no_const": True},
        {"sde_type": "ode"},
        {"sde_type": "sde", "noise_level": 10, "num_inference_steps": 10},
        {"sde_type": "sde", "noise_level": 7, "num_inference_steps": 50},
        {"sde_type": "sde", "noise_level": 2, "guidance_scale": 1000},
        {"sde_type": "ode", "guidance_scale": 1000},
        {"sde_type": "sde", "num_inference_steps": 1},
        {"sde_type": "cps", "num_inference_steps": 1},
        {"sde_type": "ode", "num_inference_steps": 1},
        {"sde_type": "sde", "num_inference_steps": 200},
        {"sde_type": "cps", "num_inference_steps": 200},
        {"sde_type": "sde", "num_inference_steps": 200, "noise_level": 10},
        *(
            {"sigmas": (1.0, 0.999999, 0.5, 0.000001, 0.0), "num_inference_steps": None, **chosen}
            for chosen in ({"sde_type": "cps"}, {"sde_type": "dance"}, {"sde_step_indices": (0, 2, 3)})
        ),
        {"sigmas": (0.999995, 0.3, 0.0), "num_inference_steps": None, "noise_level": 10},
    ),
)
def test_nothing_valid_gives_nan_or_infinity(
    engine_of: Callable[[str, str], Engine], name: str, options: dict[str, Any]
) -> None:
    dtypes = ["bfloat16"] if options.get("num_inference_steps") == 200 else ["float32", "bfloat16"]
    for dtype in dtypes:
        rollout = engine_of(name, dtype).rollout(**{**REQUEST, **ALL, **options})[0]
        for field, tensor in tensors_of(rollout):
            assert tensor.float().isfinite().all(), field
        assert all(math.isfinite(value) for value in (*rollout.sampling.sigmas, *rollout.sampling.timesteps))
