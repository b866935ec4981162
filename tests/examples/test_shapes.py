"""The world of coloured shapes: its pictures, its reward, and the policies that are shipped."""

import pytest
import torch

from flowroll.checkpoints import SHAPES_FAMILIES, shapes_checkpoint
from flowroll.engine import Engine
from flowroll.examples.shapes.denoiser import velocities
from flowroll.examples.shapes.reward import reward
from flowroll.examples.shapes.train import STEPS
from flowroll.examples.shapes.world import COLOURS, GROUND, PLACES, SCENES, SHAPES, SIZE, Scene, coverage, draw, scene_of
from flowroll.families import FAMILIES, StepInput
from flowroll.testing import make_checkpoint

SCENE = Scene(colour="red", shape="circle", place="at the top left")


def test_every_scene_has_a_prompt_of_its_own():
    assert len({scene.prompt for scene in SCENES}) == len(SCENES) == len(COLOURS) * len(SHAPES) * len(PLACES)
    assert all(scene_of(scene.prompt) == scene for scene in SCENES)
    assert SCENE.prompt == "a red circle at the top left"


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("place", PLACES)
def test_a_shape_lies_at_its_place_and_inside_the_picture(shape, place):
    covered = coverage(Scene(colour="red", shape=shape, place=place))
    middles = torch.arange(SIZE) + 0.5
    column, row = ((covered.sum(dim=dim) * middles).sum() / covered.sum() for dim in (0, 1))
    # A triangle's mass lies below the middle of its height.
    assert abs(column - PLACES[place][0]) < 0.1 and abs(row - PLACES[place][1]) < 5
    assert 350 < covered.sum() < 520
    for edge in (covered[0], covered[-1], covered[:, 0], covered[:, -1]):
        assert edge.sum() == 0


def test_jitter_moves_the_shape_and_comes_from_the_generator():
    one, two = (draw(SCENE, torch.Generator().manual_seed(seed)) for seed in (1, 2))
    assert not torch.equal(one, two)
    assert torch.equal(one, draw(SCENE, torch.Generator().manual_seed(1)))
    assert float(one[:, 0, 0].max()) == pytest.approx(GROUND)


def test_the_reward_asks_for_colour_place_and_shape():
    picture = draw(SCENE)[:, None]
    right = reward(picture, SCENE.prompt)
    assert right > 0.9
    assert reward(picture, "a red circle at the top right") < 0.01
    assert reward(picture, "a green circle at the top left") < 0.05
    assert reward(picture, "a red square at the top left") < right - 0.05
    assert reward(torch.full((3, 1, SIZE, SIZE), GROUND), SCENE.prompt) < 0.05
    # No reward for painting everything.
    assert reward(torch.tensor(COLOURS["red"]).view(3, 1, 1, 1).expand(3, 1, SIZE, SIZE), SCENE.prompt) < 0.2


def test_a_prompt_of_another_world_has_no_reward():
    with pytest.raises(KeyError):
        reward(torch.zeros(3, 1, SIZE, SIZE), "a photo of a dog")


@pytest.mark.parametrize("name", STEPS)
def test_what_is_trained_are_the_velocities_of_the_family(name, tmp_path):
    family, noisy = FAMILIES[name], torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    sigmas, one_step = (
        torch.tensor([0.25, 0.875]),
        {"guidance_scale": 0.0, "num_inference_steps": 1, "return_denoising_env": True},
    )
    with Engine(make_checkpoint(name, tmp_path, size="shapes"), variant="shapes", device="cpu", dtype="float32") as engine:
        envs = [engine.rollout(prompt=scene.prompt, **one_step)[0].denoising_env for scene in (SCENES[0], SCENES[-2])]
        transformer, spec = engine._model.transformer, engine._model.spec
    shape = family.geometry(spec, height=64, width=64).noise_shape
    with torch.no_grad():
        found = velocities(transformer, family, noisy, sigmas, [env.pos_cond_kwargs for env in envs])
        for index, env in enumerate(envs):
            one = StepInput(
                latents=family.initial_latents(noisy[index].reshape(shape)),
                timestep=family.model_timesteps(1000 * sigmas[index : index + 1], torch.float32),
                env=env,
                guidance=family.guidance(0.0),
                is_first=True,
            )
            expected = family.velocity(transformer, one, torch.float32)
            assert torch.allclose(family.initial_latents(found[index].reshape(shape)), expected, atol=1e-4), (found, expected)


@pytest.mark.parametrize("family", SHAPES_FAMILIES)
def test_the_shipped_policy_draws_what_the_prompt_says(family):
    with Engine(shapes_checkpoint(family)) as engine:
        assert engine.info.variant == "shapes"
        rewards = [reward(engine.generate(prompt=scene.prompt, seed=1)[0].image, scene.prompt) for scene in SCENES[::9]]
    # A picture of another scene has a reward of about 0.
    assert sum(rewards) / len(rewards) > 0.6, rewards


def test_the_shipped_policies_are_small():
    folders = [shapes_checkpoint(family) for family in SHAPES_FAMILIES]
    assert sum(file.stat().st_size for folder in folders for file in folder.rglob("*") if file.is_file()) <= 10**7
