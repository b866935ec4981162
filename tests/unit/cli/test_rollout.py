import errno
import json
import os
import signal
import socket
import subprocess
import sys
import time

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from tests.blocking import BEYOND_THE_CLIENT, cli_without
from tests.factories import make_rollout
from tests.rollouts import assert_same_bits
from tests.serving.servers import HookedEngine, serving
from tests.unit.cli.invoking import assert_one_line_error, run_cli

from flowroll import Client, load_rollouts
from flowroll.cli.rewards import rewards_of
from flowroll.cli.run import identified
from flowroll.client import AsyncClient
from flowroll.engine.service import EngineService
from flowroll.errors import QueueFullError, ServerConnectionError
from flowroll.store import RolloutStore
from flowroll.types import SamplingParams

SMALL = ("--width", 64, "--height", 64, "--num-inference-steps", 2)
PROMPTS = ("a red fox", "三只猫", "a blue cow")
# Nothing is asked of a server, and one prompt follows the other.
ALONE = ("--url", "http://127.0.0.1:9", "--concurrency", 1)


@pytest.fixture(scope="module")
def engine(qwen_checkpoint):
    with HookedEngine(qwen_checkpoint, device="cpu") as engine:
        yield engine


@pytest.fixture(scope="module")
def service(engine):
    with EngineService(engine, max_queue=4) as service:
        yield service


@pytest.fixture(scope="module")
def url(service):
    with serving(service) as client:
        yield str(client.base_url)


@pytest.fixture
def prompts(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text("\n".join(PROMPTS) + "\n", encoding="utf-8")
    return path


def rollout(*words):
    return run_cli("rollout", *words)


def by_prompt(out):
    """The rollouts of a store by prompt; those of several requests come in any order."""
    found = {}
    for one in load_rollouts(out):
        found.setdefault(one.prompt, []).append(one)
    return found


def manifest_of(out):
    return json.loads((out / "manifest.json").read_text(encoding="utf-8"))


def test_every_sample_of_every_prompt_is_in_the_store_with_its_picture_and_named_in_the_manifest(
    url, prompts, tmp_path, engine
):
    out = tmp_path / "deep" / "out"
    flags = ("--seed", 5, "--num-outputs-per-prompt", 2, "--return-dit-trajectory", "--return-denoising-env")
    result = rollout("--url", url, "--prompts", prompts, "--out", out, *SMALL, *flags)
    assert result.exit_code == 0, result.output
    assert "6 rollouts of 3 prompts" in result.stdout and "weights: 0" in result.stdout and "3/3" in result.stdout
    found, manifest = by_prompt(out), manifest_of(out)
    assert [entry["prompt"] for entry in manifest["prompts"]] == [*PROMPTS] and manifest["server"]["family"] == "qwen_image"
    for entry, prompt in zip(manifest["prompts"], PROMPTS, strict=True):
        expected = engine.rollout(
            prompt=prompt,
            seed=5,
            num_outputs_per_prompt=2,
            width=64,
            height=64,
            num_inference_steps=2,
            return_dit_trajectory=True,
            return_denoising_env=True,
        )
        assert expected[0].debug_tensors is None
        for saved, named, sample in zip(found[prompt], entry["samples"], expected, strict=True):
            assert_same_bits(saved, sample)
            assert (named["seed"], named["weight_version"], entry["error"]) == (sample.seed, "0", None)
            assert Image.open(out / named["picture"]).tobytes() == sample.pil().tobytes()
            assert_same_bits(RolloutStore(out).load(named["id"]), sample)


def test_the_client_extra_is_enough_to_roll_out_and_to_watch(url, prompts, tmp_path):
    out = tmp_path / "out"
    done = cli_without(BEYOND_THE_CLIENT, "rollout", "--url", url, "--prompts", prompts, "--out", out, *SMALL)
    assert done.returncode == 0, done.stderr
    assert len(load_rollouts(out)) == 3
    done = cli_without(BEYOND_THE_CLIENT, "top", "--url", url, "--once", "--interval-s", 0.1)
    assert done.returncode == 0, done.stderr
    load = ("--url", url, "--prompts", prompts, "--concurrency", 1, "--num-requests", 1, "--sizes", "64x64", "--steps", 2)
    done = cli_without(BEYOND_THE_CLIENT, "bench", "serve", *load, "--warmup", 0)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("flags", [("--rollout-sde-type", "dance_sde"), ("--sde-type", "dance")])
def test_the_dynamics_are_chosen_by_either_name(url, prompts, tmp_path, engine, flags):
    out = tmp_path / "out"
    result = rollout("--url", url, "--prompts", prompts, "--out", out, *SMALL, "--seed", 1, *flags, "--debug-mode", "--no-png")
    assert result.exit_code == 0, result.output
    size = {"width": 64, "height": 64, "num_inference_steps": 2}
    [expected] = engine.rollout(prompt=PROMPTS[0], seed=1, **size, sde_type="dance", debug_mode=True)
    assert_same_bits(by_prompt(out)[PROMPTS[0]][0], expected)
    assert not (out / "pictures").exists() and manifest_of(out)["prompts"][0]["samples"][0]["picture"] is None


def test_an_evaluation_that_asks_for_an_environment_is_refused(url, prompts, tmp_path):
    words = ("--url", url, "--prompts", prompts, "--out", tmp_path / "out", *SMALL, "--no-rollout")
    for flag, field in (("--return-denoising-env", "return_denoising_env"), ("--rollout-noise-level=1", "rollout_noise_level")):
        assert_one_line_error(rollout(*words, flag), f"{field} must be left out of an evaluation (rollout=False)")


def test_an_evaluation_is_saved_as_well(url, prompts, tmp_path):
    out = tmp_path / "out"
    assert rollout("--url", url, "--prompts", prompts, "--out", out, *SMALL, "--no-rollout", "--seed", 1).exit_code == 0
    assert load_rollouts(out)[0].log_probs is None


def test_a_line_of_a_jsonl_file_gives_fields_that_go_before_the_flags(url, tmp_path, engine):
    lines = tmp_path / "prompts.jsonl"
    lines.write_text(
        '{"prompt": "a red fox", "seeds": [7, 9], "sde_type": "cps", "noise_level": 0.3, "request_id": "mine"}\n'
        '{"prompt": "三只猫", "seed": 3}\n',
        encoding="utf-8",
    )
    out = tmp_path / "out"
    result = rollout("--url", url, "--prompts", lines, "--out", out, *SMALL, "--noise-level", 0.9)
    assert result.exit_code == 0, result.output
    found = by_prompt(out)
    (first, second), (third,) = found["a red fox"], found["三只猫"]
    size = {"width": 64, "height": 64, "num_inference_steps": 2}
    expected = engine.rollout("a red fox", seeds=(7, 9), sde_type="cps", noise_level=0.3, request_id="mine", **size)
    assert_same_bits(first, expected[0])
    assert_same_bits(second, expected[1])
    assert (first.request_id, third.prompt, third.sampling.noise_level) == ("mine", "三只猫", 0.9)
    assert_same_bits(third, engine.rollout("三只猫", seed=3, noise_level=0.9, **size)[0])


def test_a_bad_line_is_refused_before_anything_is_sent(tmp_path):
    lines = tmp_path / "prompts.jsonl"
    lines.write_text('{"prompt": "a"}\n{"prompt": "b", "noise_levle": 0.3}\n')
    words = (*ALONE, "--prompts", lines, "--out", tmp_path / "out")
    assert_one_line_error(rollout(*words), "line 2, is refused: noise_levle must be a field of SamplingParams")
    lines.write_text('{"prompt": "a", "request_id": "x"}\n{"prompt": "b", "request_id": "x"}\n')
    assert_one_line_error(rollout(*words), "request_id must be of one request, got x in 2 lines; leave it out")
    assert not (tmp_path / "out").exists()


def test_a_failed_prompt_is_reported_at_the_end_and_the_others_are_saved(url, prompts, tmp_path, engine, monkeypatch):
    def fail_at_the_second(plan):
        if plan.params.prompt == PROMPTS[1]:
            raise RuntimeError("out of luck")

    out = tmp_path / "out"
    words = ("--url", url, "--prompts", prompts, "--out", out, *SMALL, "--seed", 0)
    with monkeypatch.context() as patched:
        patched.setattr(engine, "hook", fail_at_the_second)
        result = rollout(*words)
    assert result.exit_code == 1
    assert set(by_prompt(out)) == {PROMPTS[0], PROMPTS[2]}
    assert "2 rollouts of 2 prompts" in result.stdout
    assert "1 of 3 prompts failed" in result.stderr
    assert "prompt 2: " in result.stderr
    assert "Traceback" not in result.output
    assert [bool(entry["error"]) for entry in manifest_of(out)["prompts"]] == [False, True, False]
    # What is there is not made again.
    before = load_rollouts(out).ids
    assert_one_line_error(rollout(*words), "out must be a new folder, got ")
    result = rollout(*words, "--resume")
    assert (
        result.exit_code == 0 and "1 rollouts of 1 prompts" in result.stdout and "2 prompts were there already" in result.stdout
    )
    found = load_rollouts(out)
    assert found.ids[:2] == before and len(found) == 3 and found[2].prompt == PROMPTS[1]
    assert [len(entry["samples"]) for entry in manifest_of(out)["prompts"]] == [1, 1, 1]
    assert "0 rollouts of 0 prompts" in rollout(*words, "--resume").stdout and len(load_rollouts(out)) == 3


def test_a_request_that_the_server_refuses_is_reported_with_its_reason(url, prompts, tmp_path):
    result = rollout("--url", url, "--prompts", prompts, "--out", tmp_path / "out", "--height", 100)
    assert result.exit_code == 1
    assert "3 of 3 prompts failed" in result.stderr
    assert "height must be a multiple of 16" in result.stderr


def test_a_server_that_is_not_there_is_reported(prompts, tmp_path):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        words = ("--url", f"http://127.0.0.1:{taken.getsockname()[1]}", "--prompts", prompts, "--out", tmp_path / "out", *SMALL)
        assert_one_line_error(rollout(*words), "the server at ")
        result = rollout(*words, "--concurrency", 1)
    assert result.exit_code == 1
    assert "1 of 3 prompts failed, 2 were not tried:" in result.stderr
    assert "prompt 1: the server at " in result.stderr


def test_a_server_that_dies_ends_the_command_and_what_was_saved_stays(prompts, tmp_path, monkeypatch):
    tried = []

    async def answer_once(client, params):
        tried.append(params.prompt)
        if len(tried) > 1:
            raise ServerConnectionError("the server is gone")
        return [make_rollout(seed=5, request_id=params.request_id)]

    monkeypatch.setattr(AsyncClient, "rollout", answer_once)
    out = tmp_path / "out"
    result = rollout(*ALONE, "--prompts", prompts, "--out", out)
    assert result.exit_code == 1
    assert tried == list(PROMPTS[:2])
    assert [one.seed for one in load_rollouts(out)] == [5]
    assert "1 rollouts of 1 prompts" in result.stdout
    assert "1 of 3 prompts failed, 1 were not tried:" in result.stderr
    assert "prompt 2: the server is gone" in result.stderr


def test_a_full_disk_ends_the_command_and_what_was_saved_stays(url, prompts, tmp_path, monkeypatch):
    out = tmp_path / "out"
    append = RolloutStore.append
    written = []

    def full_at_the_second(store, samples):
        written.append(samples)
        if len(written) == 2:
            with monkeypatch.context() as patched:
                patched.setattr(os, "fsync", full)
                return append(store, samples)
        return append(store, samples)

    def full(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(RolloutStore, "append", full_at_the_second)
    words = ("--url", url, "--concurrency", 1, "--prompts", prompts, "--out", out, *SMALL, "--seed", 5)
    result = rollout(*words, "--num-outputs-per-prompt", 2)
    assert result.exit_code == 1
    assert "prompt 2: path must be writable" in result.output and "1 were not tried" in result.output
    assert [(one.prompt, one.seed) for one in load_rollouts(out)] == [(PROMPTS[0], 5), (PROMPTS[0], 6)]


def test_the_api_key_is_sent(service, prompts, tmp_path):
    with serving(service, api_key="sesame") as client:
        words = ("--url", str(client.base_url), "--prompts", prompts, "--out", tmp_path / "out", *SMALL)
        assert_one_line_error(rollout(*words), "must carry the server's token")
        assert rollout(*words, "--api-key", "sesame").exit_code == 0


def test_a_bad_value_is_refused_before_anything_is_sent(prompts, tmp_path):
    words = (*ALONE, "--prompts", prompts, "--out", tmp_path / "out", "--noise-level", 99)
    assert_one_line_error(rollout(*words), "noise_level must be 0 or from")
    assert not (tmp_path / "out").exists()


def test_a_missing_prompt_file_is_a_usage_error(tmp_path):
    result = rollout(*ALONE, "--prompts", tmp_path / "none.txt", "--out", tmp_path / "out")
    assert result.exit_code == 2
    assert "--prompts" in result.stderr


def test_an_adapter_is_chosen_by_its_name(url, prompts, tmp_path):
    result = rollout("--url", url, "--prompts", prompts, "--out", tmp_path / "out", *SMALL, "--lora-name", "missing")
    assert result.exit_code == 1 and "3 of 3 prompts failed" in result.stderr and "missing" in result.stderr


class Answering:
    """What the server is in these tests: it answers with the picture that the seed draws, and counts."""

    def __init__(self, monkeypatch, *, info=None, refuse=0):
        self.most = self.now = self.refusals = 0
        self.params = []

        async def answer(client, params):
            import asyncio

            if self.refusals < refuse:
                self.refusals += 1
                raise QueueFullError("full", retry_after_s=0.01)
            self.params.append(params)
            self.now += 1
            self.most = max(self.most, self.now)
            await asyncio.sleep(0.05)
            self.now -= 1
            sizes = {"height": 16, "width": 16, "steps": 2}
            return [make_rollout(seed=len(self.params), request_id=params.request_id, prompt=params.prompt, **sizes)]

        async def server_info(client):
            return info or {}

        monkeypatch.setattr(AsyncClient, "rollout", answer)
        monkeypatch.setattr(AsyncClient, "server_info", server_info)


@pytest.mark.parametrize(
    ("words", "info", "most"),
    [
        ((), {"batching": {"max_batch_samples": 4}}, 5),
        (("--num-outputs-per-prompt", 4), {"batching": {"max_batch_samples": 4}}, 2),
        (("--num-outputs-per-prompt", 3), {"batching": {"max_batch_samples": 4}}, 3),
        ((), {"batching": {"max_batch_samples": 1000}}, 12),
        ((), {}, 2),
        (("--concurrency", 3), None, 3),
    ],
)
def test_as_many_requests_are_in_flight_as_the_server_can_batch(words, info, most, tmp_path, monkeypatch):
    (prompts := tmp_path / "prompts.txt").write_text("\n".join(f"prompt {number}" for number in range(12)))
    answering = Answering(monkeypatch, info=info)
    result = rollout("--prompts", prompts, "--out", tmp_path / "out", *words, "--no-png")
    assert result.exit_code == 0, result.output
    assert answering.most == most and len(load_rollouts(tmp_path / "out")) == 12


def test_a_full_queue_is_waited_for(prompts, tmp_path, monkeypatch):
    answering = Answering(monkeypatch, refuse=4)
    result = rollout("--prompts", prompts, "--out", tmp_path / "out")
    assert result.exit_code == 0, result.output
    assert answering.refusals == 4 and len(load_rollouts(tmp_path / "out")) == 3


REWARD = """
def brightness(picture, prompt):
    assert picture.dtype.is_floating_point and picture.shape == (3, 1, 16, 16) and prompt
    return picture.mean()

def picky(picture, prompt):
    if prompt == "a blue cow":
        raise ValueError("no cows")
    return 1.0

number = 3
"""


def test_a_reward_function_is_asked_and_one_that_fails_costs_the_reward_alone(prompts, tmp_path, monkeypatch):
    (module := tmp_path / "my_reward.py").write_text(REWARD)
    Answering(monkeypatch)
    out = tmp_path / "out"
    words = ("--prompts", prompts, "--out", out)
    failed = rollout(*words, "--reward", f"{module}:picky")
    assert failed.exit_code == 1
    assert "prompt 3: reward must return a number, got ValueError: no cows; correct the function." in failed.stderr
    assert "reward: mean 1.0000, from 1.0000 to 1.0000, of 2 samples" in failed.stdout
    assert sorted(map(str, load_rollouts(out).rewards())) == ["1.0", "1.0", "None"]
    (out / "pictures" / "000000-000.png").unlink()
    monkeypatch.setattr(AsyncClient, "rollout", None)
    monkeypatch.chdir(tmp_path)
    done = rollout(*words, "--resume", "--reward", "my_reward:brightness")
    assert done.exit_code == 0, done.output
    chosen = load_rollouts(out)
    cows = [(one, reward) for one, reward in zip(chosen, chosen.rewards(), strict=True) if one.prompt == "a blue cow"]
    [(cow, reward)] = cows
    assert reward == pytest.approx(cow.image.mean().item()) and len(list((out / "pictures").iterdir())) == 3
    sample = manifest_of(out)["prompts"][2]["samples"][0]
    assert sample["rewards"] == {"reward": reward} and (out / sample["picture"]).is_file()


@pytest.mark.parametrize("path", ["my_reward", "my_reward:none", "my_reward:number", "none.py:x", "not_there:x"])
def test_a_reward_that_cannot_be_called_is_refused_before_anything_is_sent(path, prompts, tmp_path, monkeypatch):
    (tmp_path / "my_reward.py").write_text(REWARD)
    monkeypatch.chdir(tmp_path)
    result = rollout(*ALONE, "--prompts", prompts, "--out", tmp_path / "out", "--reward", path)
    assert_one_line_error(result, "reward must ")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("image_format", ["uint8", "png"])
def test_a_reward_sees_the_same_picture_whatever_its_form(image_format):
    seen = []
    rewards_of(lambda picture, prompt: seen.append(picture) or 0.0, [make_rollout(image_format=image_format)])
    eight_bits = make_rollout(image_format="uint8").image
    assert torch.equal(seen[0], eight_bits.float() / 255)


def test_requests_are_known_again_by_what_they_ask_for():
    def ids(*requests):
        return [request.request_id for request in identified([SamplingParams(**request) for request in requests])]

    first = ids({"prompt": "a"}, {"prompt": "a"}, {"prompt": "a", "seed": 1}, {"prompt": "b", "request_id": "mine"})
    assert len(set(first)) == 4 and first[3] == "mine" and first[0].rpartition("-")[0] == first[1].rpartition("-")[0]
    assert ids({"prompt": "b"}, {"prompt": "a"}, {"prompt": "a", "suppress_logs": True})[1:] == first[:2]
    options = {"rollout_steps": ({"noise_level": 0.5}, {}), "log_prob": {"reduce": "sum"}, "fork": {0: 2}}
    assert len(set(ids({"prompt": "a", **options}, {"prompt": "a"}))) == 2
    states = torch.zeros(3), torch.ones(3), torch.ones(3, 1)
    assert len({one.rpartition("-")[0] for one in ids(*({"prompt": "a", "latents": state} for state in states))}) == 3


def test_trees_starts_and_stops_are_those_of_the_engine_and_are_made_once(url, tmp_path, engine):
    size = {"width": 64, "height": 64, "num_inference_steps": 5}
    kept = {"return_dit_trajectory": True, "return_denoising_env": True}
    [whole] = engine.rollout(prompt="a red fox", seed=4, **size, **kept)
    save_file({"latents": whole.dit_trajectory.latents[1].contiguous()}, tmp_path / "state.safetensors")
    (prompts := tmp_path / "prompts.txt").write_text("a red fox\n")
    own = {
        "rollout_steps": ({}, {"noise_level": 0.3}, {"dynamics": "cps", "noise_level": 0.5}, {"dynamics": "dpmpp2m"}, {}),
        "guidance_scales": (1, 4, 4, 2.5, 4),
        "log_prob": {"reduce": "sum", "constants": False},
        "return_fields": ("x0", "mean", "std"),
        "return_step_indices": (1, 2, 3, 4),
        "decode_step_indices": (2,),
        "fork": {1: 2, 2: 2},
        "start_step": 1,
        "stop_step": 4,
        "sde_seed": 8,
        "image_format": "uint8",
        "policy": "default",
    }
    words = ("--url", url, "--prompts", prompts, "--out", tmp_path / "out", "--width", 64, "--height", 64)
    words += ("--num-inference-steps", 5, "--return-dit-trajectory", "--return-denoising-env")
    words += ("--latents", tmp_path / "state.safetensors", "--start-step", 1, "--stop-step", 4, "--sde-seed", 8)
    words += ("--rollout-steps", json.dumps(own["rollout_steps"]), "--guidance-scales", "1,4,4,2.5,4")
    words += ("--log-prob", json.dumps(own["log_prob"]), "--return-fields", "x0,mean,std", "--return-step-indices", "1,2,3,4")
    words += ("--decode-step-indices", "2", "--fork", '{"1": 2, "2": 2}', "--image-format", "uint8", "--policy", "default")
    result = rollout(*words)
    assert result.exit_code == 0, result.output
    expected = engine.rollout(prompt="a red fox", latents=whole.dit_trajectory.latents[1], **size, **kept, **own)
    found = load_rollouts(tmp_path / "out")
    assert [one.sampling.branches[-1].id for one in expected] == ["0/0/0", "0/0/1", "0/1/0", "0/1/1"]
    for one, leaf in zip(found, expected, strict=True):
        assert_same_bits(one, leaf)
    assert len(list((tmp_path / "out/pictures").iterdir())) == 4
    # One command for whoever has the weights: the record is enough.
    result = run_cli("verify", tmp_path / "out", "--model", engine.info.model)
    assert result.exit_code == 0 and "4" in result.stdout, result.output
    assert "1 prompts were there already" in rollout(*words, "--resume").stdout
    assert len(load_rollouts(tmp_path / "out")) == 4


@pytest.mark.slow
def test_ctrl_c_ends_the_run_with_a_summary_and_resume_goes_on(url, tmp_path):
    (prompts := tmp_path / "prompts.txt").write_text("\n".join(f"prompt {number}" for number in range(40)))
    out = tmp_path / "out"
    words = ("--url", url, "--prompts", prompts, "--out", out, *SMALL, "--concurrency", 2, "--seed", 3)
    # A suite that was started in the background ignores the signal, and so would its children.
    code = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler); from flowroll.cli import app; app()"
    command = [sys.executable, "-c", code, "rollout", *map(str, words)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        end_s = time.monotonic() + 60
        while len(list((out / "shards").glob("*.safetensors")) if out.exists() else []) < 2:
            assert time.monotonic() < end_s and process.poll() is None
            time.sleep(0.01)
        process.send_signal(signal.SIGINT)
        stdout, stderr = process.communicate(timeout=60)
    made = len(load_rollouts(out))
    assert process.returncode == 130 and stderr == "" and 2 <= made < 40
    assert f"interrupted; --resume goes on: {made} rollouts of {made} prompts" in stdout and "weights: 0" in stdout
    assert sum(len(entry["samples"]) for entry in manifest_of(out)["prompts"]) == made
    prompts.write_text("\n".join(f"prompt {number}" for number in range(made + 2)))
    result = rollout(*words, "--resume")
    assert result.exit_code == 0, result.output
    assert sorted(one.prompt for one in load_rollouts(out)) == sorted({one.prompt for one in load_rollouts(out)})
    with Client(url) as client:
        assert client.health()
