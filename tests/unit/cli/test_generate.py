import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from tests.rollouts import assert_same_bits
from tests.unit.cli.invoking import assert_one_line_error, run_cli

from flowroll import SamplingParams
from flowroll.cli import generate as generate_module
from flowroll.engine import Engine
from flowroll.wire.files import load_rollout

SMALL = ("--prompt", "a red fox", "--width", 64, "--height", 64, "--num-inference-steps", 2)


def generate(*words, **options):
    return run_cli("generate", *words, **options)


@pytest.fixture
def folder(tmp_path):
    """What looks like a checkpoint from outside, and cannot be loaded."""
    (tmp_path / "model_index.json").write_text("{}")
    return tmp_path


def files_in(folder):
    return sorted(path.name for path in folder.iterdir())


def test_plain_generation_writes_the_engines_picture(z_image_checkpoint, tmp_path):
    result = generate(z_image_checkpoint, *SMALL, "--seed", 7, "--out", tmp_path)
    assert result.exit_code == 0, result.output
    assert files_in(tmp_path) == ["sample-000-seed-7.png"]
    with Engine(z_image_checkpoint) as engine:
        [expected] = engine.generate(prompt="a red fox", width=64, height=64, num_inference_steps=2, seed=7)
    pixels = torch.frombuffer(bytearray(Image.open(tmp_path / "sample-000-seed-7.png").tobytes()), dtype=torch.uint8)
    wanted = (expected.image[:, 0].permute(1, 2, 0) * 255).round().to(torch.uint8)
    assert torch.equal(pixels.view(64, 64, 3), wanted)


def test_every_flag_reaches_the_rollout(qwen_checkpoint, tmp_path):
    words = (
        *("--prompt", "a red fox", "--negative-prompt", "blur", "--seeds", "7,9", "--generator-device", "cpu"),
        *("--width", 64, "--height", 80, "--num-inference-steps", 3, "--num-outputs-per-prompt", 2),
        *("--guidance-scale", 2.5, "--true-cfg-scale", 3, "--sigmas", "1,0.7,0.4,0", "--rollout", "--sde-type", "cps"),
        *("--noise-level", 0.3, "--log-prob-no-const", "--debug-mode", "--return-denoising-env", "--return-dit-trajectory"),
        *("--sde-step-indices", "0,1", "--return-step-indices", "0,3", "--suppress-logs", "--request-id", "mine"),
    )
    params = SamplingParams(
        prompt="a red fox",
        negative_prompt="blur",
        seeds=(7, 9),
        generator_device="cpu",
        width=64,
        height=80,
        num_inference_steps=3,
        num_outputs_per_prompt=2,
        guidance_scale=2.5,
        true_cfg_scale=3,
        sigmas=(1, 0.7, 0.4, 0),
        rollout=True,
        sde_type="cps",
        noise_level=0.3,
        log_prob_no_const=True,
        debug_mode=True,
        return_denoising_env=True,
        return_dit_trajectory=True,
        sde_step_indices=(0, 1),
        return_step_indices=(0, 3),
        suppress_logs=True,
        request_id="mine",
    )
    result = generate(qwen_checkpoint, *words, "--out", tmp_path)
    assert result.exit_code == 0, result.output
    names = ["sample-000-seed-7", "sample-001-seed-9"]
    assert files_in(tmp_path) == [name + suffix for name in names for suffix in (".png", ".safetensors")]
    with Engine(qwen_checkpoint) as engine:
        expected = engine.rollout(params)
    for name, rollout in zip(names, expected, strict=True):
        saved = load_rollout(tmp_path / f"{name}.safetensors")
        assert saved.request_id == "mine"
        assert_same_bits(saved, rollout)


@pytest.mark.parametrize("columns", [40, 80, 200])
def test_the_table_names_every_sample_and_file_so_that_it_can_be_copied(columns, z_image_checkpoint, tmp_path):
    result = generate(z_image_checkpoint, *SMALL, "--seeds", "3,4", "--rollout", "--out", tmp_path, columns=columns)
    for index, seed in enumerate((3, 4)):
        assert f"  {tmp_path}/sample-{index:03d}-seed-{seed}.safetensors" in result.stdout
    assert "64 x 64" in result.stdout
    assert max(map(len, result.stdout.splitlines())) < 200


def test_the_variant_decides_the_defaults(z_image_checkpoint, tmp_path):
    words = ("--prompt", "p", "--width", 64, "--height", 64, "--rollout", "--no-debug-mode", "--seed", 1, "--out", tmp_path)
    assert generate(z_image_checkpoint, "--variant", "turbo", *words).exit_code == 0
    record = load_rollout(tmp_path / "sample-000-seed-1.safetensors").sampling
    assert (record.variant, record.num_inference_steps, record.guidance_rule) == ("turbo", 9, "none")


def test_unset_flags_never_enter_sampling_params(monkeypatch, folder):
    received = []

    def spy(**values):
        received.append(values)
        return SamplingParams(**values)

    monkeypatch.setattr(generate_module, "SamplingParams", spy)
    generate(folder, "--prompt", "p")
    generate(folder, "--prompt", "p", "--rollout")
    assert received == [{"prompt": "p", "rollout": False}, {"prompt": "p", "rollout": True}]


def test_the_wires_names_are_flags_too(qwen_checkpoint, tmp_path):
    words = ("--prompt", "p", "--seed", 7, "--width", 64, "--height", 64, "--num-inference-steps", 2, "--rollout")
    chosen = ("--rollout-sde-type", "dance_sde", "--rollout-noise-level", 0.3, "--rollout-return-dit-trajectory")
    result = generate(qwen_checkpoint, *words, *chosen, "--num-frames", 1, "--fps", 24, "--out", tmp_path)
    assert result.exit_code == 0, result.output
    options = {"sde_type": "dance", "noise_level": 0.3, "return_dit_trajectory": True, "seed": 7}
    with Engine(qwen_checkpoint) as engine:
        [expected] = engine.rollout(prompt="p", width=64, height=64, num_inference_steps=2, **options)
    saved = load_rollout(tmp_path / "sample-000-seed-7.safetensors")
    assert_same_bits(saved, expected)
    assert saved.sampling.sde_type == "dance"


@pytest.mark.parametrize("flag", ["--return-denoising-env", "--rollout-return-denoising-env"])
def test_an_environment_without_rollout_is_a_usage_error_under_either_name(flag, folder):
    result = generate(folder, "--prompt", "p", flag)
    assert result.exit_code == 2
    assert f"{flag} must come with --rollout" in " ".join(result.stderr.split())


@pytest.mark.parametrize("switch", [(), ("--no-rollout",)])
def test_a_rollout_flag_without_rollout_is_a_usage_error(switch, folder):
    result = generate(folder, "--prompt", "p", "--sde-type", "cps", *switch)
    assert result.exit_code == 2
    assert "--sde-type must come with --rollout" in " ".join(result.stderr.split())


def test_embeddings_come_from_a_file(z_image_checkpoint, tmp_path):
    with Engine(z_image_checkpoint) as engine:
        options = {"width": 64, "height": 64, "num_inference_steps": 2, "seed": 7}
        [by_text] = engine.rollout(prompt="a red fox", **options, return_denoising_env=True, return_dit_trajectory=True)
    env = by_text.denoising_env
    names = {"prompt_embeds": env.pos_cond_kwargs, "negative_prompt_embeds": env.neg_cond_kwargs}
    save_file({name: branch["cap_feats"] for name, branch in names.items()}, tmp_path / "prompt.safetensors")
    result = generate(z_image_checkpoint, *SMALL[2:], "--embeds", tmp_path / "prompt.safetensors", "--seed", 7, "--rollout",
                      "--return-denoising-env", "--return-dit-trajectory", "--out", tmp_path)  # fmt: skip
    assert result.exit_code == 0, result.output
    saved = load_rollout(tmp_path / "sample-000-seed-7.safetensors")
    assert saved.sampling.prompt_embeds_sha256 and torch.equal(saved.image, by_text.image)
    result = run_cli("verify", "--model", z_image_checkpoint, tmp_path / "sample-000-seed-7.safetensors")
    assert result.exit_code == 0, result.output


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"cap_feats": torch.ones(2, 3)}, "--embeds must hold some of prompt_embeds"),
        (None, "--embeds must be a safetensors file"),
    ],
)
def test_another_file_of_embeddings_is_a_usage_error(tensors, message, folder, tmp_path):
    file = tmp_path / "prompt.safetensors"
    file.write_bytes(b"no tensors") if tensors is None else save_file(tensors, file)
    result = generate(folder, "--embeds", file)
    assert result.exit_code == 2
    assert message in " ".join(result.stderr.split())


def test_a_folder_that_is_no_checkpoint_is_one_clear_line(tmp_path):
    assert_one_line_error(generate(tmp_path / "nowhere", "--prompt", "p"), "must be a diffusers checkpoint folder")


def test_a_bad_value_is_refused_before_the_model_is_loaded(folder):
    assert_one_line_error(generate(folder, "--prompt", "p", "--seed", -1), "seed must be >= 0, got -1")


def test_a_size_off_the_grid_is_one_clear_line_that_offers_others(qwen_checkpoint, tmp_path):
    result = generate(qwen_checkpoint, "--prompt", "p", "--height", 100, "--out", tmp_path / "out")
    assert_one_line_error(result, "height must be a multiple of 16 for qwen_image, got 100; use 96 or 112.")
    assert not (tmp_path / "out").exists()


def test_out_must_not_be_a_file(tmp_path):
    (tmp_path / "file").touch()
    result = generate(folder, "--prompt", "p", "--out", tmp_path / "file")
    assert result.exit_code == 2
    assert "--out" in result.stderr
