"""POST /rollout/score: the log-probs that were recorded, from the bytes of a rollout alone."""

import asyncio
import json
import re
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import msgspec
import pytest
import torch
from tests.guiding import PicturedEngine, in_words_of
from tests.pairs import DTYPES, paired
from tests.serving.servers import WAIT_S, Background, error_of, serving, until

from flowroll import Rollout, replay
from flowroll.client import AsyncClient, Client
from flowroll.engine import Limits
from flowroll.engine.service import EngineService
from flowroll.engine.weights.versions import VersionState
from flowroll.errors import InvalidRequestError, OutdatedWeightsError, PayloadTooLargeError
from flowroll.families import FAMILIES
from flowroll.replay.remote import score_params
from flowroll.types import RecordedSteps, ScoreAnswer, ScoreParams
from flowroll.wire.codec import encode
from flowroll.wire.scoring import decode_score_answer, encode_score_request

REQUEST: dict[str, Any] = {
    "prompt": "a red apple",
    "height": 64,
    "width": 64,
    "num_inference_steps": 3,
    "seed": 5,
    "return_denoising_env": True,
    "return_dit_trajectory": True,
}
KINDS: tuple[dict[str, Any], ...] = (
    {"sde_type": "sde", "guidance_scale": 3.0, "num_outputs_per_prompt": 2},
    {"sde_type": "cps", "guidance_scale": 0.0},
    {"sde_type": "cps", "guidance_scale": 3.0, "sde_step_indices": (0, 1), "prompt": "many small green pears in a bowl"},
    {"sde_type": "sde", "guidance_scale": 0.0, "sde_step_indices": (1,), "width": 96, "log_prob_no_const": True},
    {"sde_type": "ode", "guidance_scale": 3.0},
    {"sde_type": "dance_sde", "guidance_scale": 3.0},
    {"sde_type": "sde", "sigmas": (1.0, 0.999995, 0.5, 0.0), "sde_step_indices": (0, 2)},
)
MEDIA = {"json": "application/json", "msgpack": "application/msgpack"}


class Served:
    """An engine behind a server, and rollouts of every kind that it made."""

    def __init__(self, service: EngineService, http: httpx.Client) -> None:
        self.service, self.engine, self.http = service, service.engine, http
        requests = [in_words_of(self.engine.info.family, {"guidance_scale": 4.0, **REQUEST, **kind}) for kind in KINDS]
        self.rollouts = [rollout for request in requests for rollout in self.engine.rollout(**request)]

    def client(self, wire_format: Any = "msgpack") -> Client:
        return Client(str(self.http.base_url), wire_format=wire_format)

    def post(self, body: Any, wire_format: str = "json", **headers: str) -> httpx.Response:
        encoded = msgspec.json.encode(body) if wire_format == "json" else msgspec.msgpack.encode(body)
        return self.http.post("/rollout/score", content=encoded, headers={"content-type": MEDIA[wire_format], **headers})

    def sent(self, rollout: int = 0, dialect: Any = "native") -> dict[str, Any]:
        """A good request in JSON for one rollout, to be spoilt."""
        params = score_params([self.rollouts[rollout]], [0, 2], log_probs_only=False)
        return json.loads(b"".join(encode_score_request(params, wire_format="json", dialect=dialect).chunks()))


@pytest.fixture(scope="module")
def served_of(checkpoints: dict[str, Path]) -> Iterator[Callable[[str, str], Served]]:
    found: dict[tuple[str, str], Served] = {}
    with ExitStack() as stack:

        def get(family: str, dtype: str) -> Served:
            if (family, dtype) not in found:
                limits = Limits(max_pixels=512 * 512, max_scores=30)
                engine = stack.enter_context(PicturedEngine(checkpoints[family], dtype=dtype, device="cpu", limits=limits))
                service = stack.enter_context(EngineService(engine, max_queue=4))
                found[family, dtype] = Served(service, stack.enter_context(serving(service)))
            return found[family, dtype]

        yield get


@pytest.fixture(scope="module")
def served(served_of: Callable[[str, str], Served]) -> Served:
    return served_of("z_image", "bfloat16")


def assert_equal_scores(ours: replay.Scores, theirs: replay.Scores) -> None:
    assert ours.steps == theirs.steps
    for left, right in ((ours.log_probs, theirs.log_probs), (ours.stds, theirs.stds)):
        assert left.dtype == torch.float32 and torch.equal(left, right.detach())
    for lefts, rights in ((ours.means, theirs.means), (ours.velocities, theirs.velocities)):
        for left, right in zip(lefts, rights, strict=True):
            assert left.dtype == torch.float32 and torch.equal(left, right.detach())


@paired(family=tuple(FAMILIES), dtype=DTYPES, wire_format=("json", "msgpack"))
def test_scores_over_http_are_the_recorded_ones_those_of_replay_and_those_of_the_engine(
    served_of: Callable[[str, str], Served], family: str, dtype: str, wire_format: str
) -> None:
    served = served_of(family, dtype)
    with served.client(wire_format) as client:
        scores = client.score(served.rollouts)
        assert torch.equal(client.score(served.rollouts, log_probs_only=True).log_probs, scores.log_probs)
    assert scores.weight_version == served.engine.weight_version
    assert torch.equal(scores.log_probs, torch.stack([rollout.log_probs for rollout in served.rollouts]))
    assert_equal_scores(scores, replay.score(served.engine._model.transformer, served.rollouts))
    rollout = served.rollouts[0]
    latents = rollout.dit_trajectory.latents
    for step in range(3):
        alone = served.engine.score(
            latents=latents[step],
            next_latents=latents[step + 1],
            step=step,
            env=rollout.denoising_env,
            record=rollout.sampling,
            sde_step_indices=rollout.sde_step_indices,
        )
        assert torch.equal(alone.velocity, scores.velocities[0][step]) and torch.equal(alone.mean, scores.means[0][step])
        assert torch.equal(alone.log_prob, scores.log_probs[0, step]) and alone.std == scores.stds[0, step].item()


@pytest.mark.parametrize("family", FAMILIES)
def test_an_env_with_the_names_of_the_sglang_dialect_is_understood(
    served_of: Callable[[str, str], Served], family: str
) -> None:
    served = served_of(family, "bfloat16")
    body = served.sent(dialect="sglang")
    for branch in ("pos_cond_kwargs", "neg_cond_kwargs"):
        embeds = body["samples"][0]["denoising_env"][branch]["encoder_hidden_states"]
        assert isinstance(embeds, list) == FAMILIES[family].conditioning.embeds.is_listed_by_sglang
    answer = scored(served.post(body))
    assert torch.equal(answer.samples[0].log_probs, served.rollouts[0].log_probs[[0, 2]])


def scored(response: httpx.Response) -> ScoreAnswer:
    assert response.status_code == 200, response.text
    return decode_score_answer(bytearray(response.content), response.headers["content-type"])


def test_the_parts_of_a_rollout_can_be_sent_back_as_they_came(served: Served) -> None:
    body = {
        **{name: REQUEST[name] for name in ("prompt", "seed", "height", "width")},
        "rollout_return_denoising_env": True,
        "rollout_return_dit_trajectory": True,
        "extra_sampling_params": {"sigmas": [1.0, 0.4, 0.0]},
        "rollout_return_step_indices": [0],
    }
    first = served.http.post("/rollout/generate", json=body).json()[0]
    (second,) = served.http.post("/rollout/generate", json={**body, "rollout_return_step_indices": [1]}).json()
    sample = {
        "steps": [0],
        "latents": first["dit_trajectory"]["latents"],
        "next_latents": second["dit_trajectory"]["latents"],
        **{name: first[name] for name in ("denoising_env", "sampling", "sde_step_indices")},
    }
    response = served.post({"samples": [sample], "request_id": "mine", "suppress_logs": True})
    answer = scored(response)
    assert (answer.request_id, response.headers["x-request-id"]) == ("mine", "mine")
    log_probs = served.engine.rollout(**{**REQUEST, "num_inference_steps": None}, sigmas=(1.0, 0.4, 0.0))[0].log_probs
    assert torch.equal(answer.samples[0].log_probs, log_probs[:1])


def test_no_forward_is_run_where_only_log_probs_are_asked_of_a_step_without_density(served: Served) -> None:
    calls: list[int] = []
    window = next(rollout for rollout in served.rollouts if rollout.sde_step_indices == (1,))
    handle = served.engine._model.transformer.register_forward_hook(lambda *_: calls.append(1))
    try:
        with served.client() as client:
            scores = client.score([window], log_probs_only=True)
            assert torch.equal(scores.log_probs[0], window.log_probs) and len(calls) == 1
            assert scores.means == scores.velocities == ()
            client.score([window])
            assert len(calls) == 1 + 3
    finally:
        handle.remove()


def test_asynchronous_clients_score_too(served: Served) -> None:
    async def score() -> replay.Scores:
        async with AsyncClient(str(served.http.base_url)) as client:
            return await client.score(served.rollouts[:2], steps=torch.tensor([2, 0]))

    scores = asyncio.run(score())
    assert torch.equal(scores.log_probs, torch.stack([rollout.log_probs[[2, 0]] for rollout in served.rollouts[:2]]))


def test_a_step_may_be_scored_with_several_next_states(served: Served) -> None:
    rollout = served.rollouts[0]
    latents = rollout.dit_trajectory.latents
    other = latents[1] + 0.01
    sample = RecordedSteps(
        steps=(0, 0),
        latents=latents[[0, 0]],
        next_latents=torch.stack([other, latents[1]]),
        denoising_env=rollout.denoising_env,
        sampling=rollout.sampling,
    )
    (scores,) = served.engine.run_scores(ScoreParams(samples=(sample,))).samples
    assert scores.log_probs[1] == rollout.log_probs[0] != scores.log_probs[0]
    assert torch.equal(*scores.velocities)


@pytest.mark.parametrize("branch", ["pos_cond_kwargs", "neg_cond_kwargs"])
def test_an_env_without_what_the_forward_needs_is_refused_before_it_is_sent(
    served_of: Callable[[str, str], Served], branch: str
) -> None:
    served = served_of("qwen_image", "bfloat16")
    rollout = served.rollouts[0]
    kept = {key: value for key, value in getattr(rollout.denoising_env, branch).items() if key != "img_shapes"}
    lacking = replace(rollout, denoising_env=replace(rollout.denoising_env, **{branch: kept}))
    with served.client() as client, pytest.raises(InvalidRequestError, match=f"must hold img_shapes in {branch}"):
        client.score([lacking])
    with pytest.raises(InvalidRequestError, match=f"must hold img_shapes in {branch}"):
        replay.score(served.engine._model.transformer, [lacking])


def test_scores_can_demand_a_version_of_the_weights(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    versions, rollouts = served.engine._weights.versions, served.rollouts[:1]
    monkeypatch.setattr(versions, "state", VersionState.first("7"))
    with served.client() as client:
        assert client.score(rollouts, min_weight_version="7").weight_version == "7"
        with pytest.raises(OutdatedWeightsError):
            client.score(rollouts, min_weight_version="8")
    body = {**served.sent(), "min_weight_version": "8"}
    assert (served.post(body).status_code, error_of(served.post(body))["field"]) == (409, "min_weight_version")
    # Older weights may come while a request waits.
    plan = served.engine.plan_score(score_params(rollouts, [0], log_probs_only=True, min_weight_version="7"))
    monkeypatch.setattr(versions, "state", VersionState.first("6"))
    with pytest.raises(OutdatedWeightsError):
        served.engine.run_scores(plan)


def test_what_cannot_be_replayed_is_refused_before_it_is_sent(served: Served) -> None:
    with served.client() as client:
        before = served.service.status().counts.accepted
        for change, words in (({"denoising_env": None}, "return_denoising_env=True"), ({"dit_trajectory": None}, "be there")):
            with pytest.raises(InvalidRequestError, match=words):
                client.score([replace(served.rollouts[0], **change)])
        with pytest.raises(InvalidRequestError, match=r"steps must lie in 0\.\.2, got 3"):
            client.score(served.rollouts, steps=[3])
        assert served.service.status().counts.accepted == before


def spoilt(body: dict[str, Any], path: str, value: Any) -> dict[str, Any]:
    """The request with the value at a dotted path of its first sample replaced; `...` removes it."""
    *parents, last = path.split(".")
    node = body["samples"][0]
    for name in parents:
        node = node[name]
    if value is ...:
        del node[last]
    else:
        node[last] = value
    return body


def tensor(*shape: int, dtype: torch.dtype = torch.bfloat16, fill: float = 0.0) -> dict[str, Any]:
    """The JSON of a tensor."""
    body = encode(torch.full(shape, fill, dtype=dtype), "json")
    return json.loads(b"".join(body.chunks()))


def blob_of(changes: dict[str, Any]) -> dict[str, Any]:
    return {**tensor(2, 16, 8, 8, dtype=torch.float32), **changes}


F32 = torch.float32
POS = "denoising_env.pos_cond_kwargs"
BAD: dict[str, tuple[str, Any, str, str]] = {
    "latents of another size": ("latents", tensor(2, 16, 8, 6, dtype=F32), "next_latents", "have the shape of latents"),
    "one state too few": ("latents", tensor(1, 16, 8, 8, dtype=F32), "latents", "first dimension is the 2 steps"),
    "no floats": ("next_latents", tensor(2, 16, 8, 8, dtype=torch.int32), "next_latents", "be floats"),
    "not finite": ("latents", tensor(2, 16, 8, 8, dtype=F32, fill=float("nan")), "latents", "be finite"),
    "beyond float32": ("latents", tensor(2, 16, 8, 8, dtype=F32, fill=3e38), "latents", "give finite velocities"),
    "no tensor": ("latents", [1, 2], "latents", "of the type object, got array"),
    "no latents": ("latents", ..., "latents", "be given, got nothing"),
    "a blob of nothing": ("latents", blob_of({"data": ""}), "latents", "be a tensor, got"),
    "no base64": ("latents", blob_of({"data": "%%"}), "latents.data", "base64"),
    "another shape than the blob's": ("latents", blob_of({"shape": [2]}), "latents", "of a tensor that says [2]"),
    "another dtype than the blob's": (
        "latents",
        blob_of({"dtype": "torch.int8"}),
        "latents",
        "says [2, 16, 8, 8] of torch.int8",
    ),
    "no mark": ("latents", blob_of({"__tensor__": False}), "latents.__tensor__", "be"),
    "no steps": ("steps", [], "steps", "hold at least one step"),
    "a step that is none": ("steps", ["x", 1], "steps[0]", "of the type int, got str"),
    "a step too far": ("steps", [0, 3], "steps", "lie in 0..2, got 3"),
    "a huge step": ("steps", [0, 10**18], "steps", "lie in 0..2"),
    "a stochastic step too far": ("sde_step_indices", [7], "sde_step_indices", "lie in 0..2, got 7"),
    "a misspelt field": ("latent", 1, "latent", "be a known field"),
    "a misspelt branch": ("denoising_env.neg_kwargs", {}, "denoising_env.neg_kwargs", "be a known field"),
    "no env": ("denoising_env", ..., "denoising_env", "be given"),
    "no embeds": (f"{POS}.cap_feats", ..., "denoising_env", "hold the tensor cap_feats in pos_cond_kwargs"),
    "no negative branch": ("denoising_env.neg_cond_kwargs", ..., "denoising_env", "hold neg_cond_kwargs"),
    "embeds of another width": (f"{POS}.cap_feats", tensor(4, 5), f"{POS}.cap_feats", "be a tensor [tokens, "),
    "embeds of another dtype": (f"{POS}.cap_feats", tensor(4, 64, dtype=F32), f"{POS}.cap_feats", "of torch.bfloat16, got"),
    "embeds of another length": (f"{POS}.txt_seq_lens", [99], f"{POS}.txt_seq_lens", "for these latents and tokens, got [99]"),
    "an unknown argument": (f"{POS}.colour", 1, f"{POS}.colour", "be one of cap_feats, txt_seq_lens"),
    "nothing deep in a list": (f"{POS}.txt_seq_lens", [[None]], "denoising_env", "NoneType where a tensor should be"),
    "image conditioning": ("denoising_env.image_kwargs", {"a": 1}, "denoising_env.image_kwargs", "be empty for z_image"),
    "guidance embeds": ("denoising_env.guidance", tensor(1), "denoising_env", "hold no guidance, as the record has"),
    "another family": ("sampling.family", "qwen_image", "sampling.family", "be z_image, which this engine has"),
    "another dtype": ("sampling.model_dtype", "torch.float32", "sampling.model_dtype", "start an engine in that dtype"),
    "another timestep": ("sampling.timestep_dtype", "x", "sampling.timestep_dtype", "be torch.float32"),
    "another schema": ("sampling.schema_version", 9, "sampling.schema_version", "got 9"),
    "another rule": ("sampling.guidance_rule", "cfg_zero", "sampling.guidance_rule", "got cfg_zero"),
    "a field of another version": ("sampling.eta", 1, "sampling.eta", "be a field of the record"),
    "a record without a field": ("sampling.sde_type", ..., "sampling.sde_type", "be given"),
    "unknown dynamics": ("sampling.sde_type", "flow-sde", "sampling.sde_type", "got"),
    "another number of sigmas": ("sampling.sigmas", [1.0, 0.0], "sampling", "timesteps and one sigma more"),
    "rising sigmas": ("sampling.sigmas", [0.1, 0.5, 0.2, 0.0], "sampling.sigmas", "decrease"),
    "a wild noise level": ("sampling.noise_level", 11, "sampling.noise_level", "be 0 or from"),
    "a wild guidance scale": ("sampling.guidance_scale", 1e9, "sampling.guidance_scale", "from 0 to 1000"),
    "a size off the grid": ("sampling.height", 60, "sampling.height", "use 48 or 64"),
    "no size": ("sampling.height", 0, "sampling.height", ">= 1"),
    "a size above the limit": ("sampling.width", 2**40, "sampling.height", "262144 pixels"),
    "another size": ("sampling.width", 96, "latents", "hold states of the shape [16, 8, 12] at 64 x 96, got [16, 8, 8]"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_value_is_a_422_that_names_its_place(served: Served, case: str) -> None:
    path, value, field, words = BAD[case]
    body = spoilt(served.sent(), path, value)
    if case == "beyond float32":
        body["samples"][0]["next_latents"] = value
    response = served.post(body)
    error = error_of(response)
    assert (response.status_code, error["code"]) == (422, "invalid_request"), error
    assert error["field"] == f"samples[0].{field}" or error["field"] == f"samples[0].{field}".replace(
        "samples[0]", "samples[...]"
    )
    assert error["message"].startswith(error["field"]) and words in error["message"], error


def test_the_second_sample_is_named_by_its_index(served: Served) -> None:
    body = served.sent()
    body["samples"].append(spoilt(served.sent(), "steps", [0, 3])["samples"][0])
    assert error_of(served.post(body))["field"] == "samples[1].steps"


@pytest.mark.parametrize(
    ("body", "field", "words"),
    [
        ({}, "samples", "be given"),
        ({"samples": []}, "samples", "hold at least one sample"),
        ({"samples": 3}, "samples", "of the type array, got int"),
        ({"samples": [], "policy": 3}, "policy", "of the type str"),
        ({"samples": [], "log_prob_only": True}, "log_prob_only", "be a known field"),
        ([], "body", "of the type object, got array"),
    ],
)
@pytest.mark.parametrize("wire_format", ["json", "msgpack"])
def test_a_request_without_samples_is_refused(served: Served, body: Any, field: str, words: str, wire_format: str) -> None:
    response = served.post(body, wire_format)
    error = error_of(response)
    assert (response.status_code, error["field"]) == (422, field) and words in error["message"]


def test_too_many_steps_too_large_answers_and_bodies_are_refused(served: Served) -> None:
    with served.client() as client:
        with pytest.raises(InvalidRequestError, match="samples must hold at most 30 steps in all, got 48") as caught:
            client.score([*served.rollouts, *served.rollouts])
        assert caught.value.field == "samples"
        assert len(client.score([served.rollouts[0]] * 10).log_probs) == 10
    with (
        serving(served.service, max_score_body_bytes=2000) as http,
        Client(str(http.base_url)) as client,
        pytest.raises(PayloadTooLargeError, match="at most 2000 bytes"),
    ):
        client.score(served.rollouts)


@pytest.mark.parametrize(
    ("content", "headers", "status"),
    [
        (b"{", {"content-type": "application/json"}, 400),
        (b"\xc1", {"content-type": "application/msgpack"}, 400),
        (b'{"samples":[{"sampling":{"a":' + b"[" * 20_000, {"content-type": "application/json"}, 400),
        (b"{}", {"content-type": "text/plain"}, 415),
        (b"{}", {"content-type": "application/json", "content-encoding": "gzip"}, 415),
        (b"{}", {"content-type": "application/json", "accept": "text/html"}, 406),
    ],
)
def test_a_body_of_another_kind_is_refused(served: Served, content: bytes, headers: dict[str, str], status: int) -> None:
    assert served.http.post("/rollout/score", content=content, headers=headers).status_code == status


def test_scores_are_counted_and_end_in_one_result_or_error(served: Served) -> None:
    def counted() -> float:
        (line,) = [
            line for line in served.http.get("/metrics").text.splitlines() if line.startswith("flowroll_scored_steps_total")
        ]
        return float(line.split()[1])

    before, stats = counted(), served.service.status().counts
    scored(served.post(served.sent()))
    assert error_of(served.post(spoilt(served.sent(), "latents", tensor(2, 16, 8, 8, dtype=F32, fill=3e38))))["field"]
    after = served.service.status().counts
    assert counted() == before + 2
    assert (after.completed - stats.completed, after.failed - stats.failed) == (1, 1)
    assert after.accepted == after.completed + after.failed


@contextmanager
def busy(served: Served) -> Iterator[Future[None]]:
    """The loop has a task in many pieces, behind which scores wait."""
    held = threading.Event()

    def pieces() -> Iterator[None]:
        while not held.wait(0.002):
            yield

    task = served.engine.scheduler.between_steps(pieces)
    try:
        yield task
    finally:
        held.set()


def score_counts(served: Served) -> dict[str, float]:
    """What /metrics tells of requests for scores; they balance."""
    lines = re.findall(
        r"^flowroll_(\w+_score_requests)(?:_total)?(?:{outcome=\"(\w+)\"})? (\S+)$", served.http.get("/metrics").text, re.M
    )
    counts = {outcome or name: float(value) for name, outcome, value in lines}
    total = counts["completed"] + counts["failed"] + counts["open_score_requests"]
    assert counts["accepted_score_requests"] == total
    return counts


def test_scores_that_miss_their_deadline_are_a_408_and_never_begun(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    begun, before = [], score_counts(served)
    monkeypatch.setattr(served.engine._log_probs, "answer", begun.append)
    with busy(served) as task:
        response = served.post(served.sent(), **{"x-flowroll-deadline-s": "0.05"})
        assert (response.status_code, error_of(response)["code"]) == (408, "deadline_exceeded")
        assert not task.done()
    served.engine.scheduler.between_steps(lambda: None).result(WAIT_S)
    after = score_counts(served)
    assert not begun and after["failed"] == before["failed"] + 1 and after["open_score_requests"] == 0
    refused = served.post(served.sent(), **{"x-flowroll-deadline-s": "0"})
    assert (refused.status_code, error_of(refused)["field"]) == (422, "x-flowroll-deadline-s")
    assert score_counts(served) == after


@pytest.mark.parametrize("body", [{"request_id": "mine"}, {"abort_all": True}], ids=["id", "all"])
def test_scores_that_are_aborted_are_a_499(served: Served, body: dict[str, Any]) -> None:
    with busy(served):
        waiting = Background(lambda: served.post({**served.sent(), "request_id": "mine"}))
        until(lambda: score_counts(served)["open_score_requests"] == 1)
        assert served.http.post("/abort_request", json={"request_id": "other"}).json() == {"num_aborted": 0}
        assert served.http.post("/abort_request", json=body).json() == {"num_aborted": 1}
        response = waiting.answer()
        assert (response.status_code, error_of(response)["code"]) == (499, "cancelled")
    scored(served.post(served.sent()))


def test_scores_of_a_client_that_goes_away_are_never_begun(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    begun, before = [], score_counts(served)
    with busy(served):
        monkeypatch.setattr(served.engine._log_probs, "answer", begun.append)
        with pytest.raises(httpx.ReadTimeout):
            served.http.post("/rollout/score", json=served.sent(), timeout=httpx.Timeout(WAIT_S, read=0.5))
        until(lambda: score_counts(served)["failed"] == before["failed"] + 1)
    served.engine.scheduler.between_steps(lambda: None).result(WAIT_S)
    assert not begun and score_counts(served)["open_score_requests"] == 0


def test_rollouts_and_scores_share_a_server(served: Served) -> None:
    again: list[Rollout] = []
    with served.client() as client:
        again += client.rollout(**{**REQUEST, **KINDS[0]})
        scores = client.score(again)
    assert torch.equal(scores.log_probs, torch.stack([rollout.log_probs for rollout in served.rollouts[:2]]))
