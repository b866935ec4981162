import dataclasses

import pytest
from tests.unit.cli.invoking import assert_one_line_error, run_cli

from flowroll import save_rollouts
from flowroll.cli.verify import drawn
from flowroll.engine import Engine
from flowroll.testing import make_checkpoint
from flowroll.wire.files import load_rollout, save_rollout

REQUEST = {"prompt": "a red fox", "height": 64, "width": 64, "num_inference_steps": 2, "seed": 7}


@pytest.fixture(scope="module")
def files(qwen_checkpoint, tmp_path_factory):
    folder = tmp_path_factory.mktemp("rollouts")
    with Engine(qwen_checkpoint, dtype="bfloat16") as engine:
        group = engine.rollout(
            **REQUEST,
            num_outputs_per_prompt=2,
            return_denoising_env=True,
            return_dit_trajectory=True,
            debug_mode=True,
            guidance_scale=3,
        )
    for index, rollout in enumerate(group):
        save_rollout(folder / f"{index}.safetensors", rollout)
    return [folder / "0.safetensors", folder / "1.safetensors"]


def saved(files, tmp_path, **parts):
    rollout = load_rollout(files[0])
    new = {part: dataclasses.replace(getattr(rollout, part), **fields) for part, fields in parts.items()}
    save_rollout(tmp_path / "changed.safetensors", dataclasses.replace(rollout, **new))
    return tmp_path / "changed.safetensors"


def test_the_checkpoint_that_made_them_verifies(files, qwen_checkpoint):
    result = run_cli("verify", "--model", qwen_checkpoint, *files)
    assert result.exit_code == 0, result.output
    assert "exact: the ratio is 1 at all 4 steps of 2 rollout(s)" in result.stdout
    lines = [line.split() for line in result.stdout.splitlines()]
    for step in ("0", "1"):
        assert [step, "2", "yes", "0", "0", "0"] in lines


def test_a_store_and_a_folder_verify_as_their_files_do(files, qwen_checkpoint, tmp_path):
    rollouts = [load_rollout(file) for file in files]
    changed = dataclasses.replace(rollouts[0].sampling, guidance_scale=5)
    save_rollouts(tmp_path / "store", [*rollouts, dataclasses.replace(rollouts[0], sampling=changed)])
    result = run_cli("verify", tmp_path / "store", files[0].parent, "--model", qwen_checkpoint)
    assert result.exit_code == 1
    assert "the recorded velocities fit 3 (rollout 2)" in result.stdout and "at all" not in result.stdout
    assert f"rollout 2: {tmp_path / 'store'}:000000-002" in result.stdout and f"rollout 3: {files[0]}" in result.stdout
    assert run_cli("verify", files[0].parent, "--model", qwen_checkpoint).exit_code == 0


def test_a_share_of_a_store_is_replayed_and_its_groups_are_looked_over(files, qwen_checkpoint, tmp_path):
    rollouts = [load_rollout(files[0])] * 3 + [dataclasses.replace(load_rollout(files[1]), weight_version="9")]
    save_rollouts(tmp_path / "store", rollouts, rewards=[1, 1, 1, 1])
    result = run_cli("verify", tmp_path / "store", "--model", qwen_checkpoint, "--sample", "50%")
    assert result.exit_code == 0 and "the ratio is 1 at all 4 steps of 2 rollout(s)" in result.stdout, result.output
    assert (
        f"request {rollouts[0].request_id} (4 samples): The samples were made with weights of 2 versions: 0, 9."
        in result.stdout
    )
    assert "All 4 rewards are 1, so every advantage is 0." in result.stdout
    for text in ("0", "0%", "101%", "nan%", "some", "1.5"):
        assert_one_line_error(
            run_cli("verify", tmp_path / "store", "--model", qwen_checkpoint, "--sample", text),
            "sample must be a number or a share",
        )


def test_a_drawn_share_is_the_same_each_time_and_never_empty():
    items = list(range(1000))
    assert drawn(items, "1%") == drawn(items, "1%") == sorted(drawn(items, "1%")) and len(drawn(items, "1%")) == 10
    assert len(drawn(items, "20")) == 20 and drawn(items, "5000") == drawn(items, "100%") == items
    assert len(drawn(items[:3], "0.1%")) == 1


def test_another_checkpoint_does_not(files, tmp_path):
    other = make_checkpoint("qwen_image", tmp_path / "other", seed=1)
    result = run_cli("verify", "--model", other, *files)
    assert result.exit_code == 1
    assert "not exact: 2 of 2 rollout(s) differ" in result.stdout
    assert "other weights" in result.stdout and "another env" in result.stdout


def test_one_changed_file_is_named_among_the_others(files, qwen_checkpoint, tmp_path):
    result = run_cli("verify", "--model", qwen_checkpoint, files[1], saved(files, tmp_path, sampling={"guidance_scale": 5}))
    assert result.exit_code == 1
    assert "another guidance scale: the record says 5, the recorded velocities fit 3 (rollout 1)" in result.stdout
    assert f"rollout 1: {tmp_path / 'changed.safetensors'}" in result.stdout


def test_an_env_of_another_text_is_named(files, qwen_checkpoint, tmp_path):
    result = run_cli("verify", "--model", qwen_checkpoint, saved(files, tmp_path, sampling={"negative_prompt": "blur"}))
    # The env is the one that was used, so the ratio is 1: the record's text alone is wrong, and nothing depends on it.
    assert result.exit_code == 0
    rollout = load_rollout(files[0])
    swapped = {"neg_cond_kwargs": rollout.denoising_env.pos_cond_kwargs}
    result = run_cli("verify", "--model", qwen_checkpoint, saved(files, tmp_path, denoising_env=swapped))
    assert result.exit_code == 1
    assert "the negative prompt's branch is not the one that the rollout was made with" in result.stdout
    assert "other weights" not in result.stdout


def test_a_checkpoint_of_another_family_is_one_clear_line(files, z_image_checkpoint):
    assert_one_line_error(run_cli("verify", "--model", z_image_checkpoint, *files), "family qwen_image, got z_image")


def test_files_of_two_dtypes_are_one_clear_line(files, qwen_checkpoint, tmp_path):
    other = saved(files, tmp_path, sampling={"model_dtype": "torch.float32"})
    assert_one_line_error(run_cli("verify", "--model", qwen_checkpoint, files[0], other), "files must be of one dtype")


def test_a_rollout_without_env_is_one_clear_line(files, qwen_checkpoint, tmp_path):
    rollout = dataclasses.replace(load_rollout(files[0]), denoising_env=None)
    save_rollout(tmp_path / "bare.safetensors", rollout)
    result = run_cli("verify", "--model", qwen_checkpoint, tmp_path / "bare.safetensors")
    assert_one_line_error(result, "roll out with return_denoising_env=True")
