"""The whole API against what no client should send: drawn from its OpenAPI document, and valid requests spoilt in each place.

Whatever comes in, a route answers with a status below 500 that it documents, in a body of the documented form, without a
trace. `FLOWROLL_FUZZ_EXAMPLES` sets how many requests are drawn per route and mode (default 8); above 100, every spoilt
request is sent, not a sample of them.
"""

import copy
import itertools
import json
import os
import random
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import msgspec
import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis import GenerationMode
from schemathesis.specs.openapi import checks
from tests.serving.servers import SMALL, WAIT_S, error_of, serving
from tests.serving.test_openapi import ROUTES

from flowroll.engine import Engine, Limits
from flowroll.engine.service import EngineService

EXAMPLES = int(os.environ.get("FLOWROLL_FUZZ_EXAMPLES", "8"))
# Of the spoilt requests of a route, unless all are to be sent.
NUM_SPOILT = None if EXAMPLES > 100 else 60
CONFORMS = [
    checks.status_code_conformance,
    checks.content_type_conformance,
    checks.response_schema_conformance,
    checks.response_headers_conformance,
]
# As they stand in a body: text that Python's own writer would not write, too.
HOSTILE = (
    *("null", "true", "-1", "0", "-0.0", "1.5", "1e308", "-1e308", "1e999", "5e-324", "NaN", "Infinity", "-Infinity"),
    *(str(2**31), str(2**63), str(2**64), "-" + str(2**63), "9" * 400, "9" * 5000, "1" + "e" * 2, "01"),
    *(
        '""',
        '"x"',
        r'"\u0000"',
        r'"\ud800"',
        '"\\uD83D\\uDE00"',
        '"²"',
        '"' + "x" * 300_000 + '"',
        '"../../etc/passwd"',
        '"\n"',
    ),
    *(
        "[]",
        "[null]",
        "[[]]",
        "{}",
        '{"a": 1, "a": 2}',
        "[" * 300 + "]" * 300,
        "[" * 5000 + "]" * 5000,
        "[0,0,0,0]",
        "[1e308,0]",
    ),
    *('{"__tensor__": true, "data": "AAAA", "shape": [1], "dtype": "torch.float32"}', "[" + "7," * 9999 + "7]"),
)


# Part of a path that shows up nowhere else.
CANARY = "canary-7f3a"


@schemathesis.serializer("application/msgpack")
def _raw(_: Any, value: Any) -> Any:
    data = getattr(value, "data", value)
    return {"data": data if isinstance(data, bytes) else msgspec.msgpack.encode(data)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Holds a root for weights, and something beside it that nobody may read."""
    folder = tmp_path_factory.mktemp("disk")
    (folder / "root").mkdir()
    (folder / CANARY).mkdir()
    (folder / CANARY / "x.safetensors").write_bytes(b"secret")
    (folder / "root" / "link").symlink_to(folder / CANARY)
    return folder


@pytest.fixture(scope="module")
def server(qwen_checkpoint: Path, folder: Path) -> Iterator[httpx.Client]:
    """A server on which whatever is valid is cheap, too."""
    limits = Limits(max_pixels=64 * 64, max_steps=3, max_outputs=2)
    roots = (str(folder / "root"),)
    with (
        Engine(qwen_checkpoint, device="cpu", limits=limits) as engine,
        EngineService(engine, max_queue=4) as service,
        serving(service, weights_roots=roots, allow_pickle_weights=True) as client,
    ):
        yield client


@pytest.fixture(scope="module")
def schema(server: httpx.Client) -> Any:
    return schemathesis.openapi.from_url(f"{server.base_url}/openapi.json")


# No text or bytes can be wrong for these.
TAKE_ANYTHING = {"/weights/{update_id}/buckets", "/weights/{update_id}/abort", "/shutdown_weight_transfer_engine"}


# Nothing can be wrong in a request without parameters.
@pytest.mark.parametrize(
    ("path", "mode"),
    [
        (path, mode)
        for path, methods in ROUTES.items()
        for mode in GenerationMode
        if mode is GenerationMode.POSITIVE or ("post" in methods and path not in TAKE_ANYTHING)
    ],
)
def test_what_the_document_allows_and_what_it_forbids_gets_a_documented_answer(
    server: httpx.Client, schema: Any, path: str, mode: GenerationMode
) -> None:
    (method,) = ROUTES[path]
    operation = schema[path][method]

    @given(case=operation.as_strategy(generation_mode=mode))
    @settings(
        max_examples=EXAMPLES,
        deadline=None,
        derandomize=True,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    def run(case: Any) -> None:
        response = case.call(timeout=WAIT_S)
        check(response.status_code, response.text)
        case.validate_response(response, checks=CONFORMS)

    try:
        run()
    finally:
        restore(server)


def test_every_valid_request_is_spoilt_in_every_place(server: httpx.Client, bodies: dict[str, Any]) -> None:
    statuses: set[tuple[str, int]] = set()
    for path, body in bodies.items():
        for content in spoilt(body):
            answer = server.post(path, content=content, headers={"content-type": "application/json"})
            check(answer.status_code, answer.text, path, content[:2000])
            statuses.add((path, answer.status_code))
        restore(server)
    # The fuzzing has reached both the parser and the rules behind it.
    # Without a group, no request for an update from one is looked at.
    paths = bodies.keys() - {"/update_weights_from_distributed"}
    assert {(path, status) for path in paths for status in (400, 422)} <= statuses


def test_msgpack_that_is_cut_or_changed_in_any_byte_is_refused_or_scored(server: httpx.Client, bodies: dict[str, Any]) -> None:
    whole = as_msgpack(bodies["/rollout/score"])
    headers = {"content-type": "application/msgpack"}
    assert server.post("/rollout/score", content=whole, headers=headers).status_code == 200
    draw = random.Random(0)
    for number in range(5 * EXAMPLES):
        changed = bytearray(whole)
        for _ in range(draw.randint(1, 3)):
            changed[draw.randrange(len(changed))] = draw.choice([*range(256), *range(0xC0, 0x100)])
        if number % 4 == 0:
            del changed[draw.randrange(len(changed)) :]
        answer = server.post("/rollout/score", content=bytes(changed), headers=headers)
        check(answer.status_code, answer.text, bytes(changed))


def test_no_text_of_a_request_is_opened_as_a_path(server: httpx.Client, bodies: dict[str, Any], folder: Path) -> None:
    """Every value of every request, and all that Python opens or lists meanwhile; the one path is held to its root."""
    opened: list[str] = []
    watching = [True]

    def watch(event: str, arguments: tuple[Any, ...]) -> None:
        if watching[0] and event in ("open", "os.listdir", "os.scandir") and CANARY in str(arguments[0]):
            opened.append(f"{event} {arguments[0]}")

    # Hooks cannot be taken out again.
    sys.addaudithook(watch)
    (folder / CANARY / "x.safetensors").read_bytes()
    assert len(opened) == 1
    opened.clear()
    inside = folder / CANARY / "x.safetensors"
    names = (str(inside), f"file://{inside}", f"{folder}/root/../{CANARY}/x.safetensors", f"{folder}/root/link/x.safetensors")
    try:
        for path, body in bodies.items():
            turns = zip(places(body), itertools.cycle(names), strict=False)
            paths = [((field,), name) for field in ("model_path", "lora_path") if field in body for name in names]
            for place, name in itertools.chain(turns, paths):
                answer = server.post(path, json=replaced(body, place, name))
                check(answer.status_code, answer.text, path, place)
                if place in (("model_path",), ("lora_path",)):
                    assert answer.status_code == (422 if "file:" in name else 403), answer.text
                    assert "secret" not in answer.text
    finally:
        watching[0] = False
    assert not opened
    restore(server)


@pytest.fixture(scope="module")
def bodies(server: httpx.Client) -> dict[str, Any]:
    """A valid request of every route that has a body."""
    whole = {
        **SMALL,
        "negative_prompt": "grey",
        "num_outputs_per_prompt": 1,
        "true_cfg_scale": 2.0,
        "generator_device": "cpu",
        "request_id": "r",
        "rollout_sde_type": "sde",
        "rollout_noise_level": 0.7,
        "rollout_sde_step_indices": [0],
        "rollout_return_step_indices": [0, 2],
        "rollout_return_denoising_env": True,
        "rollout_return_dit_trajectory": True,
        "extra_sampling_params": {"sigmas": [1.0, 0.5, 0.0]},
    }
    (sample,) = server.post("/rollout/generate", json={**whole, "rollout_return_step_indices": None}).raise_for_status().json()
    latents = sample["dit_trajectory"]["latents"]
    steps = {"steps": [0], "latents": None, "next_latents": None, "denoising_env": sample["denoising_env"]}
    parts = {**steps, "sampling": sample["sampling"], "sde_step_indices": sample["sde_step_indices"]}
    parts["latents"], parts["next_latents"] = split(latents, 0), split(latents, 1)
    plain = {name: value for name, value in whole.items() if not name.startswith("rollout")}
    found = {
        "/rollout/generate": whole,
        "/rollout/score": {"samples": [parts], "log_probs_only": False, "suppress_logs": True, "request_id": "r"},
        "/generate": plain,
        "/v1/images/generations": {
            "prompt": "a cat",
            "n": 1,
            "size": "64x64",
            "num_inference_steps": 1,
            "seed": 3,
            "user": "u",
        },
        "/update_weights_from_disk": {"model_path": "/x", "module": "transformer", "weight_version": "7"},
        "/get_weights_checksum": {"module_names": ["vae"]},
        "/verify_weights": {"module": "vae", "expected": {"a": "b"}},
        "/abort_request": {"rid": "nobody"},
        "/pause_generation": {"mode": "finish"},
        "/weights/begin": {"module": "vae", "weight_version": "7", "partial": True},
        "/weights/{update_id}/commit": {"mode": "drain"},
        "/update_weights_from_tensor": {"serialized_named_tensors": ["gASV"], "load_format": "flattened_bucket"},
        "/update_weights_from_tensor_checker": {
            "target_module": "transformer",
            "expected_named_tensors_sha256": {"x_pad_token": "b"},
        },
        # Of another machine: the fuzz has the server connect to nobody.
        "/init_weights_update_group": {
            "master_address": "elsewhere",
            "master_port": 29600,
            "rank_offset": 1,
            "world_size": 2,
            "group_name": "g",
            "backend": "gloo",
        },
        "/update_weights_from_distributed": {"names": ["a"], "dtypes": ["float32"], "shapes": [[1, 2]], "group_name": "g"},
        "/destroy_weights_update_group": {"group_name": "g"},
        "/init_weight_transfer_engine": {
            "init_info": {"master_address": "elsewhere", "master_port": 29600, "rank_offset": 1, "world_size": 2}
        },
        "/start_weight_update": {"is_checkpoint_format": True},
        "/update_weights": {"update_info": {"names": ["a"], "dtype_names": ["float32"], "shapes": [[1, 2]]}},
        "/finish_weight_update": {"weight_version": "7"},
        "/abort_requests": {"request_ids": ["nobody"]},
        "/load_lora_adapter": {"lora_name": "a", "lora_path": "/x", "merged": False, "weight_version": "7", "mode": "drain"},
        "/unload_lora_adapter": {"lora_name": "a", "weight_version": "7", "mode": "drain"},
        "/policies/{name}/copy": {"source": "default", "mode": "drain"},
        "/policies/{name}/ema": {"decay": 0.5, "source": "default", "mode": "drain"},
        "/policies/{name}/drop": {"mode": "drain"},
        "/release_memory_occupation": {"mode": "disk", "tags": ["weights"]},
        "/resume_memory_occupation": {"tags": ["weights"]},
    }
    wanted = {path for path, methods in ROUTES.items() if "post" in methods}
    # Without a body of JSON, or with nothing in it.
    assert set(found) == wanted - TAKE_ANYTHING - {
        "/continue_generation",
        "/update_weights_from_safetensors",
        "/load_lora_adapter_from_tensors",
        "/v1/images/edits",
        "/pause",
        "/resume",
    }
    forbidden = ("/update_weights_from_disk", "/init_weights_update_group", "/load_lora_adapter")
    refused = {
        **dict.fromkeys(forbidden, 403),
        "/update_weights_from_tensor": 400,
        "/update_weights_from_tensor_checker": 400,
        "/verify_weights": 409,
        "/weights/{update_id}/commit": 404,
        "/update_weights_from_distributed": 404,
        "/init_weight_transfer_engine": 403,
        "/update_weights": 404,
        "/finish_weight_update": 404,
        "/destroy_weights_update_group": 404,
        "/unload_lora_adapter": 422,
    }
    for path, body in found.items():
        answer = server.post(path, json=body)
        assert answer.status_code == refused.get(path, 200), (path, answer.text)
        restore(server)
    return found


def restore(server: httpx.Client) -> None:
    """Undoes what a request may have done: sleep, a pause, an update that was begun."""
    server.post("/resume_memory_occupation")
    server.post("/continue_generation").raise_for_status()
    if (begun := server.post("/weights/begin")).status_code == 409:
        (update_id,) = re.findall(r"got ([0-9a-f]{16}) under way", begun.text)
    else:
        update_id = begun.json()["update_id"]
    server.post(f"/weights/{update_id}/abort").raise_for_status()


def check(status: int, text: str, *sent: object) -> None:
    """No answer is a defect of the server: the one status of 5xx is that of a server that stops, and this one does not."""
    assert status < 500 and "Traceback" not in text, (status, text[:2000], sent)
    # As SGLang's checker says that tensors differ.
    differs = status == 400 and text.startswith('{"success":false,"message":"Module ')
    if status >= 400 and not differs:
        error_of(httpx.Response(status, text=text))


def spoilt(body: Any) -> Iterator[bytes]:
    """The body with each of its values replaced by each hostile one, or left out; a sample, where one is enough."""
    changes = [*itertools.product(places(body), (*HOSTILE, None))]
    for place, value in changes if NUM_SPOILT is None else random.Random(1).sample(changes, min(NUM_SPOILT, len(changes))):
        changed = json.dumps(replaced(body, place, "@@", remove=value is None))
        yield changed.replace('"@@"', value or "").encode("utf-8", "surrogatepass")


def places(value: Any, above: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    if above:
        yield above
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in itertools.islice(inner, 60):
        yield from places(item, (*above, key))


def replaced(body: Any, place: tuple[Any, ...], value: Any, *, remove: bool = False) -> Any:
    changed = copy.deepcopy(body)
    owner = changed
    for key in place[:-1]:
        owner = owner[key]
    if remove:
        del owner[place[-1]]
    else:
        owner[place[-1]] = value
    return changed


def split(tensor: dict[str, Any], index: int) -> dict[str, Any]:
    """One state of a trajectory, as a tensor of its own."""
    import base64

    from flowroll.wire.codec import encode
    from flowroll.wire.safetensors import tensor_from_blob

    states = tensor_from_blob(bytearray(base64.b64decode(tensor["data"])))
    return json.loads(b"".join(encode([states[index : index + 1].clone()], "json").chunks()))[0]


def as_msgpack(value: Any) -> bytes:
    import base64

    def raw(item: Any) -> Any:
        if isinstance(item, dict):
            return {
                name: base64.b64decode(inner) if name == "data" and "__tensor__" in item else raw(inner)
                for name, inner in item.items()
            }
        return [raw(inner) for inner in item] if isinstance(item, list) else item

    return msgspec.msgpack.encode(raw(value))
