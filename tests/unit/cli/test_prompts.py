"""Files of prompts."""

import json
from dataclasses import fields

import pytest
import torch
from safetensors.torch import save_file

from flowroll import SamplingParams
from flowroll.cli.prompts import read_prompts, read_requests
from flowroll.errors import InvalidRequestError
from flowroll.types import ALIASES
from flowroll.types.params import TENSORS

# Whatever else splits lines, in Python and in other programs, between two letters.
SEPARATORS = ("\x0b", "\x0c", "\x1c", "\x1d", "\x1e", "\x85", "\u2028", "\u2029", "\r")


@pytest.fixture
def write(tmp_path):
    """Writes a file of these bytes or this text."""

    def write_file(content, name="prompts.txt"):
        (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
        return tmp_path / name

    return write_file


def as_tuples(values):
    return {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}


def test_prompts_are_lines_without_the_blank_ones(write):
    path = write('a cat\n\n  {"prompt": "kept as text"}  \n三只猫\n')
    assert read_prompts(path) == ["a cat", '{"prompt": "kept as text"}', "三只猫"]


def test_only_line_feeds_end_a_line(write):
    prompts = [f"a{separator}b" for separator in SEPARATORS]
    assert read_prompts(write("\n".join(prompts))) == prompts
    assert read_prompts(write("\r\n".join(prompts) + "\r\n")) == prompts
    lines = [json.dumps({"prompt": prompt}, ensure_ascii=False) for prompt in prompts]
    assert read_prompts(write("\r\n".join(lines), "prompts.jsonl")) == prompts


def test_separators_at_the_ends_of_a_prompt_stay(write):
    assert read_prompts(write("\u2028a\u2029\n\x0bb\x85\n")) == ["\u2028a\u2029", "\x0bb\x85"]


@pytest.mark.parametrize(("name", "text"), [("prompts.txt", "a cat\n"), ("prompts.jsonl", '{"prompt": "a cat"}\n')])
def test_a_byte_order_mark_is_not_part_of_the_first_prompt(write, name, text):
    assert read_prompts(write(b"\xef\xbb\xbf" + text.encode(), name)) == ["a cat"]


def test_a_jsonl_line_may_give_every_field(write):
    given = {
        "prompt": "a cat\nin two lines",
        "negative_prompt": "blur",
        "seeds": [7, 9],
        "init_seed": 3,
        "sde_seed": [1, 2],
        "stop_step": 2,
        "fork": {"1": 2},
        "generator_device": "cpu",
        "width": 64,
        "height": 80,
        "num_inference_steps": 3,
        "num_outputs_per_prompt": 2,
        "num_frames": 1,
        "fps": 24,
        "guidance_scale": 2.5,
        "true_cfg_scale": 3,
        "sigmas": [1, 0.7, 0.4, 0],
        "rollout": True,
        "sde_type": "cps",
        "noise_level": 0.3,
        "log_prob_no_const": True,
        "debug_mode": False,
        "return_denoising_env": True,
        "return_dit_trajectory": True,
        "rollout_steps": [{"dynamics": "ode"}, {"noise_level": 0.4}, {}],
        "prompt_token_ids": [[5, 6], [7]],
        "return_step_indices": [0, 3],
        "return_fields": ["x0", "std"],
        "decode_step_indices": [1],
        "image_format": "png",
        "suppress_logs": True,
        "request_id": "mine",
        "min_weight_version": "7",
        "max_staleness": 1,
        "policy": "default",
        "lora_name": "old",
    }
    # The first is `seeds` in another form, the others are `rollout_steps` in other forms, or go with a tensor.
    others = {"seed", "log_prob", "negative_prompt_token_ids", "rollout_sde_step_indices", "rollout_noise_levels"}
    others |= {*TENSORS, "start_step", "guidance_scales", "images"}
    assert {ALIASES.get(name, name) for name in given} == {field.name for field in fields(SamplingParams)} - others
    path = write(json.dumps(given) + '\n\n{"prompt": "", "seed": 4}', "prompts.JSONL")
    assert read_requests(path, {}) == [SamplingParams(**as_tuples(given)), SamplingParams(prompt="", seed=4)]


def test_images_are_files_beside_the_file_of_prompts(write, tmp_path):
    (tmp_path / "cat.png").write_bytes(b"a cat")
    path = write(f'{{"prompt": "a", "images": ["cat.png", "{tmp_path}/cat.png"]}}\n{{"prompt": "b"}}\n', "prompts.jsonl")
    assert [params.images for params in read_requests(path, {"images": [b"a dog"]})] == [(b"a cat",) * 2, (b"a dog",)]
    path = write('{"prompt": "a", "images": ["cat.png", "dog.png"]}', "prompts.jsonl")
    with pytest.raises(InvalidRequestError, match=r"line 1, is refused: images\[1\] must be the path of a file, got 'dog.png'"):
        read_requests(path, {})


def test_latents_are_a_file_beside_the_file_of_prompts(write, tmp_path):
    save_file({"latents": torch.ones(2, 3)}, tmp_path / "state.safetensors")
    path = write('{"prompt": "a", "latents": "state.safetensors", "start_step": 1}\n{"prompt": "b"}\n', "prompts.jsonl")
    first, second = read_requests(path, {})
    assert torch.equal(first.latents, torch.ones(2, 3)) and first.start_step == 1 and second.latents is None
    path = write('{"prompt": "a", "latents": "other.safetensors"}', "prompts.jsonl")
    with pytest.raises(InvalidRequestError, match=r"line 1, is refused: latents must name a safetensors file, got '.*other"):
        read_requests(path, {})


@pytest.mark.parametrize("line", ["noise_level", "rollout_noise_level"])
@pytest.mark.parametrize("flag", ["noise_level", "rollout_noise_level"])
def test_a_line_goes_before_the_flags_under_either_name(write, line, flag):
    path = write(f'{{"prompt": "a", "{line}": 0.3}}\n{{"prompt": "b"}}\n', "prompts.jsonl")
    assert [params.noise_level for params in read_requests(path, {flag: 0.9})] == [0.3, 0.9]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("not json", "must be JSON"),
        ("[" * 100_000, "must be JSON"),
        ("[1]", 'must hold a text under "prompt"'),
        ('{"text": "no prompt"}', 'must hold a text under "prompt"'),
        ('{"prompt": 3}', 'must hold a text under "prompt"'),
        ('{"prompt": "x", "tag": "y"}', "is refused: tag must be a field of SamplingParams"),
        ('{"prompt": "x", "seeed": 3}', "use seed if that is meant"),
        ('{"prompt": "x", "seed": 3, "seed": 4}', "must be JSON, got a name twice"),
        ('{"prompt": "x", "noise_level": 0.3, "rollout_noise_level": 0.3}', "must be given once"),
        ('{"prompt": "x", "seed": -3}', "is refused: seed must be"),
        ('{"prompt": "x", "sde_type": "cps", "sigmas": [1, 0]}', "num_inference_steps"),
    ],
)
def test_a_bad_line_of_a_jsonl_file_is_named(write, line, message):
    path = write('{"prompt": "fine"}\n\n' + line, "prompts.jsonl")
    with pytest.raises(InvalidRequestError, match="line 3, ") as caught:
        read_requests(path, {"num_inference_steps": 3})
    assert message in caught.value.message and len(caught.value.message) < 1100


def test_a_flags_own_mistake_is_no_lines(write):
    with pytest.raises(InvalidRequestError, match=r"^noise_level must"):
        read_requests(write("a cat\n"), {"noise_level": 99})


def test_a_command_that_takes_prompts_alone_refuses_other_fields(write):
    with pytest.raises(InvalidRequestError, match="line 2, must hold a prompt alone for this command, got seed"):
        read_prompts(write('{"prompt": "a"}\n{"prompt": "b", "seed": 3}\n', "prompts.jsonl"))


@pytest.mark.parametrize("name", ["prompts.txt", "prompts.jsonl"])
def test_a_file_without_prompts_is_refused(write, name):
    with pytest.raises(InvalidRequestError, match="must hold at least one prompt"):
        read_prompts(write("\ufeff\n \t\r\n", name))


def test_a_file_that_is_no_text_is_refused(write):
    with pytest.raises(InvalidRequestError, match="must be UTF-8"):
        read_prompts(write(b"\xff\xfe\x00"))
