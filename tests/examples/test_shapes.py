"""The world of coloured shapes: its pictures, its reward, and the policies that are shipped."""

import pytest
import torch
from examples.shapes.reward import reward
from examples.shapes.world import COLOURS, GROUND, PLACES, SCENES, SHAPES, SIZE, Scene, coverage, draw, scene_of

from flowroll.checkpoints import SHAPES_FAMILIES, shapes_checkpoint
from flowroll.engine import Engine

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


@pytest.mark.parametrize("family", SHAPES_FAMILIES)
def test_the_shipped_policy_draws_what_the_prompt_says(family):
    with Engine(shapes_checkpoint(family)) as engine:
        assert engine.info.variant == "shapes"
        rewards = [reward(engine.generate(prompt=scene.prompt, seed=1)[0].image, scene.prompt) for scene in SCENES[::9]]
    # A picture of another scene has a reward of about 0.
    assert sum(rewards) / len(rewards) > 0.6, rewards


def test_the_shipped_policies_are_small():
    folders = [shapes_checkpoint(family) for family in SHAPES_FAMILIES]
    assert sum(file.stat().st_size for folder in folders for file in folder.rglob("*") if file.is_file()) <= 8 * 10**6
