"""Both clients against a handler in this process: what they send, what they return, what they raise."""

import asyncio
import contextlib
import dataclasses
import inspect
import json
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from tests.factories import assert_same_answer, make_image, make_rollout

from flowroll import SamplingParams, errors
from flowroll.client import AsyncClient, Client, calls
from flowroll.errors import (
    EngineError,
    FlowrollError,
    InvalidRequestError,
    QueueFullError,
    ServerConnectionError,
    ShuttingDownError,
    UnauthorizedError,
)
from flowroll.types import ALIASES, ROLLOUT_FIELDS, StepOptions, WeightUpdate
from flowroll.types.params import TENSORS
from flowroll.wire.codec import encode_images, encode_rollouts
from flowroll.wire.control import AbortRequest
from flowroll.wire.schema import GenerateRequest, RolloutRequest, parse, parse_json_body
from flowroll.wire.validation import parse_msgpack_body

URL = "http://server.test:30000"
Handler = Callable[[httpx.Request], httpx.Response]
KINDS = ("sync", "async")


def ask(kind: str, transport: Any, method: str, *args: Any, options: dict[str, Any] | None = None, **values: Any) -> Any:
    """Calls one method of the client of this kind, over a transport or to a URL."""
    url, mock = (transport, None) if isinstance(transport, str) else (URL, httpx.MockTransport(transport))
    if kind == "sync":
        with Client(url, transport=mock, **(options or {})) as client:
            return getattr(client, method)(*args, **values)

    async def run() -> Any:
        async with AsyncClient(url, transport=mock, **(options or {})) as client:
            return await getattr(client, method)(*args, **values)

    return asyncio.run(run())


def sent_by(kind: str, method: str, *args: Any, options: dict[str, Any] | None = None, **values: Any) -> httpx.Request:
    """The request that a call sends."""
    seen: list[httpx.Request] = []

    def handler(request: httpx.Request) -> httpx.Response:
        seen.append(request)
        return httpx.Response(200, json=[], headers={"content-type": "application/json"})

    # An empty list is no answer to most of them.
    with contextlib.suppress(ServerConnectionError):
        ask(kind, handler, method, *args, options=options, **values)
    (request,) = seen
    return request


def answering(status: int, body: Any, **headers: str) -> Handler:
    def handler(request: httpx.Request) -> httpx.Response:
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        return httpx.Response(status, content=content, headers={"content-type": "application/json", **headers})

    return handler


def test_the_async_client_decodes_off_the_event_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    threads: dict[str, int] = {}
    loop_ticked = threading.Event()

    def decode(body: bytearray, content_type: str) -> list[Any]:
        threads["decoding"] = threading.get_ident()
        # Waits for the loop, which it would hold up if it ran there.
        assert loop_ticked.wait(10)
        return []

    monkeypatch.setattr(calls, "decode_rollouts", decode)

    async def tick() -> None:
        threads["loop"] = threading.get_ident()
        while "decoding" not in threads:
            await asyncio.sleep(0.001)
        loop_ticked.set()

    async def run() -> None:
        async with AsyncClient(URL, transport=httpx.MockTransport(answering(200, []))) as client:
            await asyncio.gather(client.rollout(prompt="a cat"), tick())

    # No sample is no answer, which does not matter here.
    with pytest.raises(ServerConnectionError, match="number of samples"):
        asyncio.run(run())
    assert threads["decoding"] != threads["loop"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("wire_format", ["json", "msgpack"])
@pytest.mark.parametrize("dialect", ["native", "sglang"])
def test_rollouts_arrive_equal_in_every_field(kind: str, wire_format: Any, dialect: Any) -> None:
    group = [make_rollout(seed=seed) for seed in (1, 2)]

    def handler(request: httpx.Request) -> httpx.Response:
        assert (request.method, request.url.path) == ("POST", "/rollout/generate")
        assert request.headers["accept"] == f"application/{wire_format}"
        assert request.headers["content-type"] == "application/json"
        body = encode_rollouts(group, wire_format=wire_format, dialect=dialect)
        return httpx.Response(200, content=b"".join(body.chunks()), headers={"content-type": body.content_type})

    asked = {"prompt": group[0].prompt, "seeds": [1, 2]}
    found = ask(kind, handler, "rollout", **asked, options={"wire_format": wire_format})
    assert_same_answer(group, found)


@pytest.mark.parametrize("kind", KINDS)
def test_images_arrive_equal_in_every_field(kind: str) -> None:
    def handler(request: httpx.Request) -> httpx.Response:
        assert (request.method, request.url.path) == ("POST", "/generate")
        body = encode_images([make_image()], wire_format="msgpack")
        return httpx.Response(200, content=b"".join(body.chunks()), headers={"content-type": body.content_type})

    assert_same_answer([make_image()], ask(kind, handler, "generate", prompt=make_image().prompt))


def test_large_tensors_of_an_answer_are_writable() -> None:
    rollout = make_rollout(height=512, width=512)
    body = encode_rollouts([rollout], wire_format="msgpack")
    handler = answering(200, b"".join(body.chunks()), **{"content-type": body.content_type})
    (found,) = ask("sync", handler, "rollout", prompt=rollout.prompt)
    found.image.zero_()
    assert torch.equal(found.debug_tensors.model_output, rollout.debug_tensors.model_output)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("values", "body"),
    [
        ({"prompt": ""}, {"prompt": "", "rollout_debug_mode": False}),
        ({"prompt": "x", "rollout": False}, {"prompt": "x", "rollout": False, "rollout_debug_mode": False}),
        ({"prompt": "x", "seed": None}, {"prompt": "x", "seed": None, "rollout_debug_mode": False}),
        (
            {"prompt": "x", "sde_type": "cps", "noise_level": 0.5, "sde_step_indices": [0, 1]},
            {
                "prompt": "x",
                "rollout_debug_mode": False,
                "rollout_sde_type": "cps",
                "rollout_noise_level": 0.5,
                "rollout_sde_step_indices": [0, 1],
            },
        ),
        (
            {"prompt": "x", "rollout_sde_type": "dance_sde", "rollout_debug_mode": True},
            {"prompt": "x", "rollout_sde_type": "dance_sde", "rollout_debug_mode": True},
        ),
        (
            {"prompt": "x", "sigmas": (1.0, 0.5, 0.0), "seeds": [3, 4], "request_id": "r"},
            {
                "prompt": "x",
                "rollout_debug_mode": False,
                "extra_sampling_params": {"sigmas": [1.0, 0.5, 0.0]},
                "seeds": [3, 4],
                "request_id": "r",
            },
        ),
    ],
)
def test_what_was_given_is_sent_by_its_wire_name_and_always_the_debug_mode(kind: str, values: Any, body: Any) -> None:
    assert json.loads(sent_by(kind, "rollout", **values).content) == body


def test_sampling_params_are_sent_without_their_defaults() -> None:
    params = SamplingParams(prompt="x", seed=0, noise_level=0.7, debug_mode=False, sigmas=(1.0, 0.0))
    assert json.loads(sent_by("sync", "rollout", params).content) == {
        "prompt": "x",
        "seed": 0,
        "rollout_debug_mode": False,
        "extra_sampling_params": {"sigmas": [1.0, 0.0]},
    }


FULL = {
    "prompt": "猫",
    "negative_prompt": "dog",
    "seeds": (1, 2),
    "init_seed": 7,
    "generator_device": "cpu",
    "width": 64,
    "height": 32,
    "num_inference_steps": 2,
    "num_outputs_per_prompt": 2,
    "num_frames": 1,
    "fps": 24,
    "guidance_scale": 3.5,
    "true_cfg_scale": 2.5,
    "sigmas": (1.0, 0.25, 0.0),
    "suppress_logs": True,
    "request_id": "r",
    "min_weight_version": "7",
    "max_staleness": 1,
    "policy": "default",
    "lora_name": "old",
}
FULL_ROLLOUT = {
    "rollout": True,
    "sde_seed": (8, 9),
    "stop_step": 1,
    "fork": {0: 2},
    "image_format": "uint8",
    "sde_type": "cps",
    "noise_level": 0.25,
    "log_prob_no_const": True,
    "debug_mode": True,
    "return_denoising_env": True,
    "return_dit_trajectory": True,
    "return_step_indices": (2,),
    "return_fields": ("x0",),
    "decode_step_indices": (1,),
}
# One of these at a time.
STEPS = {
    "sde_step_indices": (0,),
    "rollout_steps": (StepOptions(noise_level=0.1), StepOptions(dynamics="ode")),
    "noise_levels": (0.5, 0),
}


@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize("positional", [True, False])
def test_the_server_reads_exactly_the_parameters_that_the_client_was_given(positional: bool, steps: str) -> None:
    # Other forms of what is sent here, and what goes with a tensor.
    others = {"seed", "prompt_token_ids", "negative_prompt_token_ids", "log_prob", *TENSORS, "start_step", "guidance_scales"}
    others |= {"images"}
    assert {ALIASES.get(name, name) for name in {**FULL_ROLLOUT, **STEPS}} == ROLLOUT_FIELDS - others
    assert {*FULL, *ROLLOUT_FIELDS, *others} == set(SamplingParams.__dataclass_fields__)
    fields = {**FULL, **FULL_ROLLOUT, steps: STEPS[steps]}
    params = SamplingParams(**fields)
    request = sent_by("sync", "rollout", params) if positional else sent_by("sync", "rollout", **fields)
    assert parse(RolloutRequest, parse_json_body(request.content)).to_params() == params
    plain = SamplingParams(**FULL, rollout=False)
    request = sent_by("sync", "generate", plain) if positional else sent_by("sync", "generate", **FULL)
    assert parse(GenerateRequest, parse_json_body(request.content)).to_params() == plain


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("wire_format", ["json", "msgpack"])
def test_latents_are_sent_in_the_clients_format(kind: str, wire_format: Any) -> None:
    embeds = {"prompt_embeds": torch.randn(2, 3), "prompt_embeds_mask": torch.tensor([True, False])}
    params = SamplingParams(**embeds, latents=torch.randn(4, 8).to(torch.bfloat16), start_step=2, sigmas=(1.0, 0.5, 0.0))
    request = sent_by(kind, "rollout", params, options={"wire_format": wire_format})
    assert request.headers["content-type"] == f"application/{wire_format}"
    sent = (
        parse_json_body(request.content) if wire_format == "json" else parse_msgpack_body(request.content, max_plain_bytes=4096)
    )
    assert parse(RolloutRequest, sent).to_params() == params


@pytest.mark.parametrize("method", ["rollout", "generate"])
@pytest.mark.parametrize("wire_format", ["json", "msgpack"])
def test_images_are_sent_in_the_clients_format(method: str, wire_format: Any) -> None:
    params = SamplingParams(prompt="a cat", images=[b"one", bytes(70_000)], rollout=method == "rollout")
    request = sent_by("sync", method, params, options={"wire_format": wire_format})
    assert request.headers["content-type"] == f"application/{wire_format}"
    read = parse_json_body if wire_format == "json" else parse_msgpack_body
    kind = RolloutRequest if method == "rollout" else GenerateRequest
    assert parse(kind, read(request.content, max_plain_bytes=4096)).to_params() == params


def test_generate_leaves_a_rollout_field_for_the_server_to_refuse() -> None:
    assert "rollout_sde_type" in json.loads(sent_by("sync", "generate", prompt="x", sde_type="cps").content)
    assert "rollout" in json.loads(sent_by("sync", "generate", prompt="x", rollout=False).content)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({}, "prompt must be given"),
        ({"prompt": "x", "num_inference_step": 3}, "use num_inference_steps if that is meant"),
        ({"prompt": "x", "zzz": 3}, "zzz must be a field of SamplingParams"),
        ({"prompt": "x", "guidance_scale": float("nan")}, "guidance_scale must be a number"),
        ({"prompt": "x", "seed": -1}, "seed must be >= 0"),
        ({"prompt": "x", "sde_type": "cps", "rollout_sde_type": "cps"}, "rollout_sde_type must be given once, got sde_type"),
        ({"prompt": "x", "rollout": False, "return_denoising_env": True}, "return_denoising_env must be left out"),
        ({"prompt": "x", "num_frames": 5}, "num_frames must be None or 1"),
        ({"prompt": "x", "rollout_sde_typ": "cps"}, "use rollout_sde_type if that is meant"),
        ({"prompt": "\ud800"}, "prompt must be valid Unicode"),
    ],
)
def test_a_bad_value_is_refused_before_anything_is_sent(values: dict[str, Any], message: str) -> None:
    def unreachable(request: httpx.Request) -> httpx.Response:
        raise AssertionError("sent")

    for kind in KINDS:
        for method in ("rollout", "generate"):
            with pytest.raises(InvalidRequestError, match=message):
                ask(kind, unreachable, method, **values)


def test_params_and_fields_together_are_refused() -> None:
    with pytest.raises(InvalidRequestError, match="params must be given alone"):
        sent_by("sync", "rollout", SamplingParams(prompt="x"), seed=3)


@pytest.mark.parametrize("kind", KINDS)
def test_the_api_key_is_sent_as_a_bearer_token(kind: str) -> None:
    request = sent_by(kind, "rollout", prompt="x", options={"api_key": "s3cret"})
    assert request.headers["authorization"] == "Bearer s3cret"
    assert "authorization" not in sent_by(kind, "rollout", prompt="x").headers


@pytest.mark.parametrize("options", [{"api_key": "clé"}, {"api_key": "a\nb"}])
def test_a_key_that_http_cannot_carry_is_refused_without_showing_it(options: dict[str, Any]) -> None:
    for client in (Client, AsyncClient):
        with pytest.raises(InvalidRequestError, match="api_key must be printable ASCII") as caught:
            client(URL, **options)
        assert options["api_key"] not in caught.value.message


@pytest.mark.parametrize(
    "url", ["localhost:30000", "ftp://server", "", "http://", "http://a:b", "http://a:70000", "/tmp/socket"]
)
def test_a_base_url_that_is_none_is_refused(url: str) -> None:
    for client in (Client, AsyncClient):
        with pytest.raises(InvalidRequestError, match="base_url must "):
            client(url)


WIRE_ERRORS = [
    kind
    for _, kind in inspect.getmembers(errors, inspect.isclass)
    if issubclass(kind, FlowrollError) and "status" in vars(kind) and kind is not FlowrollError
]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("error", WIRE_ERRORS, ids=lambda error: error.__name__)
def test_the_class_that_the_server_raised_is_raised(kind: str, error: type[FlowrollError]) -> None:
    body = {"error": {"code": error.code, "message": "seed must be small, got 9; use 1.", "field": "seed"}}
    with pytest.raises(FlowrollError) as caught:
        ask(kind, answering(error.status, body), "rollout", prompt="x")
    assert type(caught.value) is error
    assert (caught.value.message, caught.value.field) == ("seed must be small, got 9; use 1.", "seed")


def test_there_are_errors_to_raise() -> None:
    assert len({error.code for error in WIRE_ERRORS}) == len(WIRE_ERRORS) > 10


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("header", "seconds"),
    [("7", 7.0), ("0.5", 0.5), ("0", 0.0), ("Fri, 31 Dec 1999 23:59:59 GMT", 1.0), ("nan", 1.0), ("-3", 1.0)],
)
def test_a_full_queue_says_when_to_retry(kind: str, header: str, seconds: float) -> None:
    body = {"error": {"code": "queue_full", "message": "full", "field": None}}
    with pytest.raises(QueueFullError) as caught:
        ask(kind, answering(429, body, **{"retry-after": header}), "rollout", prompt="x")
    assert caught.value.retry_after_s == seconds


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("status", "body"),
    [
        (502, b"<html>Bad Gateway</html>"),
        (404, b'{"detail": "Not Found"}'),
        (500, b""),
        (500, b"\xff\xff"),
        (302, b""),
        (403, b'{"error": "no"}'),
        (500, b"[" * 100_000),
        (200, b"<html>Welcome</html>"),
        (200, b'{"error": null}'),
        (204, b""),
    ],
)
def test_an_answer_that_is_not_flowrolls_is_a_connection_error(kind: str, status: int, body: bytes) -> None:
    for method, values in (("rollout", {"prompt": "x"}), ("generate", {"prompt": "x"}), ("models", {})):
        with pytest.raises(ServerConnectionError) as caught:
            ask(kind, answering(status, body), method, **values)
        assert "; " in caught.value.message and len(caught.value.message) < 600


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("failure", "remedy"),
    [
        (httpx.ConnectError("refused"), "flowroll serve"),
        (httpx.ConnectTimeout(""), "flowroll serve"),
        (httpx.ReadTimeout("slow"), "timeout_s"),
        (httpx.PoolTimeout("busy"), "fewer requests at a time"),
        (httpx.RemoteProtocolError("broke off"), "server's log"),
        (httpx.ReadError("reset"), "server's log"),
    ],
)
def test_a_failing_transport_is_a_connection_error_with_a_remedy(kind: str, failure: Exception, remedy: str) -> None:
    def handler(request: httpx.Request) -> httpx.Response:
        raise failure

    with pytest.raises(ServerConnectionError, match=type(failure).__name__) as caught:
        ask(kind, handler, "rollout", prompt="x")
    assert remedy in caught.value.message and URL in caught.value.message


@pytest.fixture
def serve() -> Any:
    """Starts a real HTTP server on a free port that writes these bytes as its answer; gives its URL."""
    servers = []

    def start(raw: bytes) -> str:
        class Canned(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                self.rfile.read(int(self.headers["content-length"]))
                self.wfile.write(raw)
                self.close_connection = True

            def log_message(self, *args: Any) -> None:
                pass

        server = HTTPServer(("127.0.0.1", 0), Canned)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        servers.append(server)
        return f"http://127.0.0.1:{server.server_port}"

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


@pytest.mark.parametrize("kind", KINDS)
def test_an_answer_that_breaks_off_is_a_connection_error(kind: str, serve: Callable[[bytes], str]) -> None:
    body = b"".join(encode_rollouts([make_rollout()], wire_format="msgpack").chunks())
    head = b"HTTP/1.1 200 OK\r\ncontent-type: application/msgpack\r\ncontent-length: %d\r\n\r\n" % len(body)
    prompt = make_rollout().prompt
    assert_same_answer([make_rollout()], ask(kind, serve(head + body), "rollout", prompt=prompt))
    with pytest.raises(ServerConnectionError, match="RemoteProtocolError"):
        ask(kind, serve(head + body[:-10]), "rollout", prompt=prompt)


@pytest.mark.parametrize("kind", KINDS)
def test_nobody_listening_is_a_connection_error(kind: str) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{unused.getsockname()[1]}"
        with pytest.raises(ServerConnectionError, match="flowroll serve"):
            ask(kind, url, "health")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("method", "path", "body", "value"),
    [
        ("health", "/health", {"status": "ok"}, {"status": "ok"}),
        ("server_info", "/server_info", {"family": "qwen_image"}, {"family": "qwen_image"}),
        ("models", "/v1/models", {"object": "list", "data": [{"id": "m"}]}, [{"id": "m"}]),
        ("metrics", "/metrics", b"# HELP x\nx 1\n", "# HELP x\nx 1\n"),
        ("wait_ready", "/readiness", {"status": "ok"}, None),
    ],
)
def test_status_routes(kind: str, method: str, path: str, body: Any, value: Any) -> None:
    def handler(request: httpx.Request) -> httpx.Response:
        assert (request.method, request.url.path) == ("GET", path)
        return answering(200, body)(request)

    assert ask(kind, handler, method) == value


@pytest.mark.parametrize("kind", KINDS)
def test_a_request_is_aborted_by_its_id(kind: str) -> None:
    def handler(request: httpx.Request) -> httpx.Response:
        assert (request.method, request.url.path) == ("POST", "/abort_request")
        assert json.loads(request.content)["request_id"] == "r-1"
        return answering(200, {"num_aborted": 2})(request)

    assert ask(kind, handler, "abort_request", "r-1") == 2


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("body", [{"request_id": "r-1"}, AbortRequest(request_id="r-1")])
def test_an_object_is_posted_to_any_route(kind: str, body: Any) -> None:
    def handler(request: httpx.Request) -> httpx.Response:
        assert (request.method, request.url.path) == ("POST", "/some/route")
        assert json.loads(request.content)["request_id"] == "r-1"
        return answering(200, {"status": "done"})(request)

    assert ask(kind, handler, "post_object", "/some/route", body) == {"status": "done"}
    with pytest.raises(InvalidRequestError, match="the request must hold plain values"):
        ask(kind, handler, "post_object", "/some/route", {"x": object()})


@pytest.mark.parametrize("kind", KINDS)
def test_an_unhealthy_server_raises(kind: str) -> None:
    body = {"error": {"code": "engine_error", "message": "dead", "field": None}}
    with pytest.raises(EngineError, match="dead"):
        ask(kind, answering(503, body), "health")


UPDATED = WeightUpdate(
    module="vae", weight_version="8", previous_version="7", num_tensors=3, num_bytes=12, read_s=0.5, paused_s=0.1
)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("method", "arguments", "options", "path", "sent", "body", "value"),
    [
        (
            "update_weights_from_disk",
            [Path("/w/8")],
            {"module": "vae", "weight_version": "8"},
            "/update_weights_from_disk",
            {"model_path": "/w/8", "module": "vae", "weight_version": "8"},
            {"success": True, "message": "done", **dataclasses.asdict(UPDATED)},
            UPDATED,
        ),
        (
            "weights_checksum",
            ["vae"],
            {},
            "/get_weights_checksum",
            {"module_names": ["vae"]},
            {"vae": "ab"},
            "ab",
        ),
        (
            "verify_weights",
            [{"a.weight": "ab"}],
            {},
            "/verify_weights",
            {"expected": {"a.weight": "ab"}},
            {"success": True, "message": "", "module": "transformer", "weight_version": "7", "num_tensors": 1},
            1,
        ),
    ],
)
def test_weights_routes(
    kind: str, method: str, arguments: list[Any], options: dict[str, Any], path: str, sent: Any, body: Any, value: Any
) -> None:
    def handler(request: httpx.Request) -> httpx.Response:
        assert (request.method, request.url.path, json.loads(request.content)) == ("POST", path, sent)
        return answering(200, body)(request)

    assert ask(kind, handler, method, *arguments, **options) == value
    with pytest.raises(ServerConnectionError, match="the answer must"):
        ask(kind, answering(200, {}), method, *arguments, **options)


@pytest.mark.parametrize("kind", KINDS)
def test_wait_ready_waits_through_refusals_and_a_server_that_is_not_ready_yet(kind: str) -> None:
    answers = iter(("refused", "draining", "ready"))
    draining = {"error": {"code": "shutting_down", "message": "not yet", "field": None}}

    def handler(request: httpx.Request) -> httpx.Response:
        match next(answers):
            case "refused":
                raise httpx.ConnectError("refused")
            case "draining":
                return answering(503, draining)(request)
        return answering(200, {"status": "ok"})(request)

    ask(kind, handler, "wait_ready", 10)
    assert next(answers, None) is None


@pytest.mark.parametrize("kind", KINDS)
def test_wait_ready_gives_up_in_time_and_says_why(kind: str) -> None:
    def handler(request: httpx.Request) -> httpx.Response:
        assert request.extensions["timeout"]["read"] <= 5
        raise httpx.ConnectError("nobody there")

    started = time.monotonic()
    with pytest.raises(ServerConnectionError, match=r"ready within 0.5 s, got \(.*nobody there.*\); "):
        ask(kind, handler, "wait_ready", 0.5)
    assert time.monotonic() - started < 3


@pytest.mark.parametrize("kind", KINDS)
def test_wait_ready_does_not_wait_out_a_wrong_key(kind: str) -> None:
    body = {"error": {"code": "unauthorized", "message": "no token", "field": None}}
    with pytest.raises(UnauthorizedError):
        ask(kind, answering(401, body), "wait_ready", 60)


@pytest.mark.parametrize("kind", KINDS)
def test_the_timeout_is_the_callers(kind: str) -> None:
    timeout = sent_by(kind, "rollout", prompt="x", options={"timeout_s": 1234}).extensions["timeout"]
    assert (timeout["read"], timeout["connect"]) == (1234, 10)
    assert sent_by(kind, "rollout", prompt="x", options={"timeout_s": 3}).extensions["timeout"]["connect"] == 3


def test_requests_of_one_async_client_run_at_the_same_time() -> None:
    waiting = 0

    async def handler(request: httpx.Request) -> httpx.Response:
        nonlocal waiting
        waiting += 1
        while waiting < 3:
            await asyncio.sleep(0.001)
        return httpx.Response(200, json={}, headers={"content-type": "application/json"})

    async def run() -> list[Any]:
        async with AsyncClient(URL, transport=httpx.MockTransport(handler)) as client:
            calls = (client.health() for index in range(3))
            return await asyncio.wait_for(asyncio.gather(*calls), timeout=10)

    assert asyncio.run(run()) == [{}, {}, {}]


def test_both_clients_have_the_same_methods_and_parameters() -> None:
    def surface(kind: type) -> dict[str, Any]:
        members = inspect.getmembers(kind, inspect.isfunction)
        return {name: list(inspect.signature(member).parameters) for name, member in members if not name.startswith("_")}

    assert surface(Client) == surface(AsyncClient)


def test_shutting_down_is_not_mistaken_for_a_lost_connection() -> None:
    body = {"error": {"code": "shutting_down", "message": "bye", "field": None}}
    with pytest.raises(ShuttingDownError):
        ask("sync", answering(503, body), "rollout", prompt="x")


def test_importing_the_client_needs_no_model_library_no_pydantic_and_no_web_framework() -> None:
    program = "import sys, flowroll.client, flowroll.wire.files; print(*sorted({name.split('.')[0] for name in sys.modules}))"
    loaded = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout.split()
    assert {"torch", "httpx", "msgspec", "flowroll"} <= set(loaded)
    unwanted = {"pydantic", "pydantic_core", "diffusers", "transformers", "fastapi", "starlette", "uvicorn", "typer"}
    assert not unwanted & set(loaded)


@pytest.mark.parametrize("kind", KINDS)
def test_a_redirect_is_not_taken_for_metrics(kind: str) -> None:
    with pytest.raises(ServerConnectionError, match="HTTP 302"):
        ask(kind, answering(302, b""), "metrics")
