"""POST /rollout/generate: the bits of the engine, in both formats and both dialects."""

import base64
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from tests.factories import assert_same_answer
from tests.guiding import pictured
from tests.rollouts import assert_same_bits
from tests.serving.servers import SMALL, error_of, serving

from flowroll import Rollout, SamplingParams, replay
from flowroll.client import Client
from flowroll.engine.service import EngineService
from flowroll.errors import InvalidRequestError
from flowroll.families import FAMILIES
from flowroll.sampling.dynamics import NAMES, dynamics_named
from flowroll.serving.routers import rollout as rollout_route
from flowroll.types import branch_digest
from flowroll.wire.body import EncodedBody
from flowroll.wire.codec import decode_rollouts, encode
from flowroll.wire.files import load_rollout, save_rollout

EVERYTHING = {
    **SMALL,
    "num_inference_steps": 3,
    "num_outputs_per_prompt": 2,
    "rollout_sde_step_indices": [0, 2],
    "rollout_return_step_indices": [0, 3],
    "rollout_return_denoising_env": True,
    "rollout_return_dit_trajectory": True,
}
EXPECTED = SamplingParams(
    prompt=SMALL["prompt"],
    seed=7,
    height=64,
    width=64,
    num_inference_steps=3,
    num_outputs_per_prompt=2,
    sde_step_indices=(0, 2),
    return_step_indices=(0, 3),
    return_denoising_env=True,
    return_dit_trajectory=True,
    debug_mode=True,
)


def post(client: httpx.Client, body: dict[str, Any], **headers: str) -> httpx.Response:
    return client.post("/rollout/generate", json=body, headers={name.replace("_", "-"): text for name, text in headers.items()})


def decoded(response: httpx.Response) -> list[Rollout]:
    assert response.status_code == 200, response.text
    return decode_rollouts(bytearray(response.content), response.headers["content-type"])


@pytest.mark.parametrize("dialect", ["native", "sglang"])
@pytest.mark.parametrize("media_type", ["application/json", "application/msgpack"])
@pytest.mark.parametrize("family", FAMILIES)
def test_rollouts_over_http_have_the_bits_of_the_engine(
    service_of: Callable[[str], EngineService], family: str, media_type: str, dialect: str
) -> None:
    served = service_of(family)
    with serving(served) as client:
        images = {name: [base64.b64encode(file).decode() for file in files] for name, files in pictured(family, {}).items()}
        response = post(client, {**EVERYTHING, **images}, accept=media_type, x_flowroll_dialect=dialect)
    assert response.headers["content-type"] == media_type
    assert int(response.headers["content-length"]) == len(response.content)
    expected = served.engine.rollout(EXPECTED)
    received = decoded(response)
    assert len(received) == len(expected) == 2
    for ours, theirs in zip(expected, received, strict=True):
        assert_same_bits(ours, theirs)
        assert (theirs.seed, theirs.prompt) == (ours.seed, ours.prompt)


@pytest.mark.parametrize("media_type", ["application/json", "application/msgpack"])
def test_chosen_fields_and_pictures_of_steps_travel(z_service: EngineService, media_type: str, tmp_path: Path) -> None:
    asked: Any = {"return_fields": ["x0", "std"], "decode_step_indices": [1], "image_format": "png"}
    with serving(z_service) as client:
        (received,) = decoded(post(client, {**SMALL, **asked}, accept=media_type))
    (ours,) = z_service.engine.rollout(SamplingParams(**SMALL, **asked, debug_mode=True))
    assert_same_answer(ours.step_tensors, received.step_tensors)
    assert_same_answer(ours.step_images, received.step_images)
    save_rollout(tmp_path / "one", received)
    assert_same_answer(received, load_rollout(tmp_path / "one"))


def test_token_ids_travel_and_have_the_bits_of_their_text(z_service: EngineService) -> None:
    tokenizer = z_service.engine._pipeline.tokenizer
    messages = [{"role": "user", "content": SMALL["prompt"]}]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True, enable_thinking=True)
    ids = [tokenizer(text).input_ids]
    body = {name: value for name, value in SMALL.items() if name != "prompt"}
    with serving(z_service) as client:
        (by_text,) = decoded(post(client, {**SMALL, "rollout_return_denoising_env": True, "rollout_debug_mode": False}))
        (by_ids,) = Client(str(client.base_url)).rollout(**body, prompt_token_ids=ids, return_denoising_env=True)
        nothing = post(client, body)
        (image,) = Client(str(client.base_url)).generate(**body, prompt_token_ids=ids)
    assert (by_ids.prompt, by_ids.sampling.prompt_token_ids) == (None, (tuple(ids[0]),))
    assert_same_bits(by_text, replace(by_ids, sampling=by_text.sampling))
    assert image.prompt is None
    assert nothing.status_code == 422 and nothing.json()["error"]["field"] == "prompt"


def test_embeddings_travel_and_have_the_bits_of_their_text(z_service: EngineService) -> None:
    body = {name: value for name, value in SMALL.items() if name != "prompt"}
    with serving(z_service, max_body_bytes=40_000) as client:
        (by_text,) = Client(str(client.base_url)).rollout(**SMALL, return_denoising_env=True)
        assert by_text.denoising_env is not None
        embeds = by_text.denoising_env.pos_cond_kwargs["cap_feats"]
        # Larger than what the body may have beside it.
        long = embeds.repeat(400 // len(embeds), 1)
        assert long.nbytes > 64 * 1024
        found = []
        for wire_format in ("json", "msgpack"):
            trainer = Client(str(client.base_url), wire_format=wire_format)
            found += trainer.rollout(**body, prompt_embeds=embeds, return_denoising_env=True)
            assert trainer.generate(**body, prompt_embeds=long)[0].prompt is None
            with pytest.raises(InvalidRequestError) as caught:
                trainer.rollout(**body, prompt_embeds=embeds[:, 1:])
            assert caught.value.field == "prompt_embeds"
        half = encode({**body, "extra_sampling_params": {"prompt_embeds": embeds.bfloat16()}}, "json")
        wrong = client.post("/generate", content=b"".join(half.chunks()), headers={"content-type": "application/json"})
    assert wrong.status_code == 422 and error_of(wrong)["field"] == "extra_sampling_params.prompt_embeds"
    for one in found:
        assert (one.prompt, one.sampling.prompt_embeds_sha256) == (None, branch_digest({"cap_feats": embeds}))
        assert_same_bits(by_text, replace(one, sampling=by_text.sampling))


@pytest.mark.parametrize("media_type", ["application/json", "application/msgpack"])
@pytest.mark.parametrize("image_format", ["uint8", "png", "none"])
def test_every_form_of_the_picture_travels(z_service: EngineService, media_type: str, image_format: Any) -> None:
    with serving(z_service) as client:
        body = {**SMALL, "image_format": image_format, "rollout_debug_mode": False}
        response = post(client, body, accept=media_type)
        (named,) = Client(str(client.base_url)).rollout(**SMALL, image_format=image_format)
        refused = client.post("/generate", json={**SMALL, "image_format": image_format})
    (ours,) = z_service.engine.rollout(SamplingParams(**SMALL, image_format=image_format))
    assert_same_bits(ours, decoded(response)[0])
    assert_same_bits(ours, named)
    assert refused.status_code == 422 and "use POST /rollout/generate" in refused.json()["error"]["message"]


@pytest.mark.parametrize("name", NAMES)
def test_every_dynamics_travels_and_is_replayed_and_scored_exactly(z_service: EngineService, name: str) -> None:
    body = {**SMALL, "num_inference_steps": 3, "rollout_return_denoising_env": True, "rollout_return_dit_trajectory": True}
    with serving(z_service) as client:
        received = decoded(post(client, {**body, "rollout_sde_type": name}))
        scored = Client(str(client.base_url)).score(received)
    chosen = dynamics_named(name)
    recorded = torch.stack([rollout.log_probs for rollout in received])
    assert {rollout.sampling.sde_type for rollout in received} == {chosen.name}
    assert bool((recorded != 0).any()) == chosen.is_stochastic
    assert torch.equal(scored.log_probs, recorded)
    again = replay.log_prob(z_service.engine._pipeline.transformer, received)
    assert torch.equal(replay.ratio(again.cpu(), recorded), torch.ones_like(recorded))


@pytest.mark.parametrize("route", ["/rollout/generate", "/generate"])
@pytest.mark.parametrize("where", ["top", "extra"])
def test_one_frame_at_any_rate_is_an_image(server: httpx.Client, route: str, where: str) -> None:
    video = {"num_frames": 1, "fps": 24}
    body = {**SMALL, **video} if where == "top" else {**SMALL, "extra_sampling_params": video}
    assert server.post(route, json=body).status_code == 200
    assert server.post(route, json={**SMALL, "num_frames": None, "fps": None}).status_code == 200


def test_the_noise_level_of_cps_may_be_above_one(server: httpx.Client) -> None:
    body = {**SMALL, "rollout_sde_type": "cps", "rollout_noise_level": 1.3}
    (rollout,) = decoded(post(server, body))
    assert rollout.sampling.noise_level == 1.3 and rollout.log_probs[0] != 0


def test_dialect_of_the_server_holds_where_the_request_names_none(service: EngineService, server: httpx.Client) -> None:
    native = post(server, SMALL).json()[0]["rollout_debug_tensors"]
    with serving(service, wire_dialect="sglang") as client:
        sglang = post(client, SMALL).json()[0]["rollout_debug_tensors"]
        asked = post(client, SMALL, x_flowroll_dialect="native").json()[0]["rollout_debug_tensors"]
    assert "variance_noise" in native and "rollout_variance_noises" in sglang
    assert asked == native


def test_json_answers_any_type_unless_the_server_was_started_with_msgpack(service: EngineService, server: httpx.Client) -> None:
    assert post(server, SMALL, accept="*/*").headers["content-type"] == "application/json"
    with serving(service, wire_format="msgpack") as client:
        assert post(client, SMALL, accept="*/*").headers["content-type"] == "application/msgpack"
        assert post(client, SMALL, accept="application/json").headers["content-type"] == "application/json"


def test_answers_are_encoded_off_the_event_loop(server: httpx.Client, monkeypatch: pytest.MonkeyPatch) -> None:
    threads: dict[str, set[threading.Thread]] = {"loop": set(), "encoder": set(), "chunks": set()}
    choose, encode, chunks = rollout_route.choose_dialect, rollout_route.encode_rollouts, EncodedBody.chunks

    def recorded_choose(*args: Any) -> Any:
        # The route itself calls this one.
        threads["loop"].add(threading.current_thread())
        return choose(*args)

    def recorded_encode(*args: Any, **options: Any) -> EncodedBody:
        threads["encoder"].add(threading.current_thread())
        return encode(*args, **options)

    def recorded_chunks(body: EncodedBody) -> Iterator[bytes]:
        for chunk in chunks(body):
            threads["chunks"].add(threading.current_thread())
            yield chunk

    monkeypatch.setattr(rollout_route, "choose_dialect", recorded_choose)
    monkeypatch.setattr(rollout_route, "encode_rollouts", recorded_encode)
    monkeypatch.setattr(EncodedBody, "chunks", recorded_chunks)
    assert len(decoded(post(server, SMALL))) == 1
    assert all(threads.values()), threads
    assert not threads["loop"] & (threads["encoder"] | threads["chunks"])


def test_the_minimal_request_works_with_the_familys_defaults(z_service: EngineService) -> None:
    with serving(z_service, wire_format="msgpack") as client:
        (rollout,) = decoded(post(client, {"prompt": "a cat"}))
    assert rollout.image.shape == (3, 1, 1024, 1024)
    assert rollout.log_probs is not None and rollout.log_probs.shape == (9,)
    assert rollout.debug_tensors is not None


def test_an_omitted_seed_is_drawn_and_the_echoed_one_gives_the_same_rollout(server: httpx.Client) -> None:
    unseeded = {name: value for name, value in SMALL.items() if name != "seed"}
    (first,), (second,) = decoded(post(server, unseeded)), decoded(post(server, unseeded))
    assert first.seed != second.seed
    (again,) = decoded(post(server, {**unseeded, "seed": first.seed}))
    assert torch.equal(again.image, first.image)


def test_an_evaluation_returns_the_image_alone(server: httpx.Client) -> None:
    response = post(server, {**SMALL, "rollout": False})
    (sample,) = response.json()
    assert sample["rollout_log_probs"] is None and sample["rollout_debug_tensors"] is None
    (rollout,) = decoded(response)
    assert rollout.image.shape == (3, 1, 64, 64)


def test_explicit_sigmas_are_taken_verbatim(server: httpx.Client) -> None:
    body = {"prompt": "a cat", "height": 64, "width": 64, "extra_sampling_params": {"sigmas": [1.0, 0.5, 0.0]}}
    (rollout,) = decoded(post(server, body))
    assert rollout.sampling.sigmas == (1.0, 0.5, 0.0)


def test_the_callers_request_id_comes_back_in_body_and_header(server: httpx.Client) -> None:
    response = post(server, {**SMALL, "request_id": "step 12/é"})
    assert response.json()[0]["request_id"] == "step 12/é"
    assert response.headers["x-request-id"] == "step%2012/%C3%A9"


def test_a_made_request_id_is_the_same_in_body_and_header(server: httpx.Client) -> None:
    response = post(server, SMALL)
    assert response.json()[0]["request_id"] == response.headers["x-request-id"] != ""


@pytest.mark.parametrize("prompt", ["", "狐狸在雪地里 🦊 лиса", "fox " * 2500])
def test_prompts_of_any_length_and_script_are_rolled_out_and_echoed(server: httpx.Client, prompt: str) -> None:
    (rollout,) = decoded(post(server, {**SMALL, "prompt": prompt, "rollout_debug_mode": False}))
    assert rollout.prompt == prompt
