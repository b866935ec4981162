"""The routes about LoRA adapters, and those about policies: copies, moving averages, ends."""

from __future__ import annotations

from collections.abc import Callable

from fastapi import APIRouter, Request
from starlette.concurrency import run_in_threadpool

from flowroll.engine.adapters.files import AdapterFiles, find_adapter
from flowroll.engine.adapters.pushed import PUSHED_ADAPTER
from flowroll.engine.service import CallFuture, EngineService
from flowroll.serving.config import ServerConfig
from flowroll.serving.errors import COMMON_RESPONSES, DISK_RESPONSES, WEIGHTS_RESPONSES
from flowroll.serving.openapi import request_body, safetensors_body
from flowroll.serving.parsing import accept_control
from flowroll.serving.paths import allowed_path, check_inside
from flowroll.serving.state import ADAPTER_BODIES, AppState
from flowroll.serving.uploads import AdapterStream, read_adapter
from flowroll.types import AdapterChange, check_lora_name
from flowroll.wire.control import ErrorBody
from flowroll.wire.names import (
    ADAPTER_FROM_TENSORS_ROUTE,
    ADAPTERS_ROUTE,
    COPY_POLICY_ROUTE,
    DROP_POLICY_ROUTE,
    EMA_POLICY_ROUTE,
    LOAD_ADAPTER_ROUTE,
    POLICIES_ROUTE,
    UNLOAD_ADAPTER_ROUTE,
)
from flowroll.wire.policies import (
    AveragePolicyRequest,
    CopyPolicyRequest,
    DropPolicyRequest,
    PoliciesObject,
    PolicyChangeObject,
)
from flowroll.wire.schema import parse
from flowroll.wire.weights import (
    AdapterChangeObject,
    AdapterFromTensorsRequest,
    LoadAdapterRequest,
    LoraAdaptersObject,
    UnloadAdapterRequest,
)


def build_router(state: AppState) -> APIRouter:
    """Returns the routes about adapters and policies."""
    router = APIRouter(tags=["weights"])
    engine = state.engine

    @router.post(
        LOAD_ADAPTER_ROUTE,
        summary="Load a LoRA adapter",
        description="As peft saves it. One that has the name is replaced at once. Read and checked while requests run, put in "
        "place between two of them; on any error everything is as it was.",
        responses=DISK_RESPONSES,
        openapi_extra=request_body(LoadAdapterRequest),
    )
    async def load_lora_adapter(request: Request) -> AdapterChangeObject:
        accepted = await accept_control(request, state, LoadAdapterRequest)
        files = await run_in_threadpool(_find, accepted, state.config)
        change = await _change(
            lambda: engine.call(
                EngineService.load_adapter,
                files,
                accepted.lora_name,
                merged=accepted.merged,
                weight_version=accepted.weight_version,
                mode=accepted.mode,
            )
        )
        return AdapterChangeObject.of(change, "loaded")

    @router.post(
        ADAPTER_FROM_TENSORS_ROUTE,
        summary="Load a LoRA adapter from one body",
        description="A safetensors file with the adapter's tensors, and its adapter_config.json as text in the file's "
        "metadata, as `adapter_config`; `lora_name`, `merged`, `weight_version` and `mode` are in the query.",
        responses={
            **WEIGHTS_RESPONSES,
            415: {"model": ErrorBody, "description": "The body is not sent as application/octet-stream"},
        },
        openapi_extra=safetensors_body(AdapterFromTensorsRequest),
    )
    async def load_lora_adapter_from_tensors(request: Request) -> AdapterChangeObject:
        query = parse(AdapterFromTensorsRequest, dict(request.query_params))
        # The bound is the adapters' own, with room for a header.
        max_bytes = state.config.adapter_limits.max_adapter_bytes + state.config.max_body_bytes
        merged = query.merged == "true"
        stream = AdapterStream(engine, query.lora_name, merged=merged)
        # One at a time is read into memory. A lock of its own: a slow body holds up other bodies, and no update of weights.
        async with state.turn(ADAPTER_BODIES):
            await read_adapter(request, stream, max_bytes=max_bytes, idle_s=state.config.weights_idle_s)
            change = await _change(
                lambda: engine.call(
                    EngineService.load_adapter,
                    stream.files,
                    query.lora_name,
                    merged=merged,
                    weight_version=query.weight_version,
                    mode=query.mode,
                )
            )
        return AdapterChangeObject.of(change, "loaded")

    async def _change(call: Callable[[], CallFuture[AdapterChange]]) -> AdapterChange:
        change = await state.change_policy(call)
        if change.lora_name == PUSHED_ADAPTER:
            state.pushes.replaced(PUSHED_ADAPTER)
        return change

    @router.post(
        UNLOAD_ADAPTER_ROUTE,
        summary="Unload a LoRA adapter",
        description="The requests that run finish first, or are done again (`mode`); those that wait for it end in an error.",
        responses=WEIGHTS_RESPONSES,
        openapi_extra=request_body(UnloadAdapterRequest),
    )
    async def unload_lora_adapter(request: Request) -> AdapterChangeObject:
        accepted = await accept_control(request, state, UnloadAdapterRequest)
        name, version, mode = accepted.lora_name, accepted.weight_version, accepted.mode

        change = await _change(lambda: engine.call(EngineService.unload_adapter, name, weight_version=version, mode=mode))
        return AdapterChangeObject.of(change, "unloaded")

    @router.get(ADAPTERS_ROUTE, summary="The loaded LoRA adapters", responses=COMMON_RESPONSES)
    async def lora_adapters() -> LoraAdaptersObject:
        adapters = await engine.call(EngineService.lora_adapters)
        return LoraAdaptersObject(adapters=list(adapters))

    @router.post(
        COPY_POLICY_ROUTE,
        summary="Make a policy as a copy",
        description="Of the weights that the engine was last given, or of another policy or adapter; one that has the name is "
        "replaced. Requests choose it by `policy`. No weights are sent.",
        responses=WEIGHTS_RESPONSES,
        openapi_extra=request_body(CopyPolicyRequest),
    )
    async def copy_policy(name: str, request: Request) -> PolicyChangeObject:
        accepted = await accept_control(request, state, CopyPolicyRequest, is_optional=True)
        check_lora_name(name, "name")
        source, mode = accepted.source, accepted.mode
        change = await state.change_policy(lambda: engine.call(EngineService.copy_policy, name, source=source, mode=mode))
        return PolicyChangeObject.of(change)

    @router.post(
        EMA_POLICY_ROUTE,
        summary="Move a policy towards another one",
        description="An exponential moving average, computed on the engine in float32. What there is not yet begins as a copy.",
        responses=WEIGHTS_RESPONSES,
        openapi_extra=request_body(AveragePolicyRequest),
    )
    async def average_policy(name: str, request: Request) -> PolicyChangeObject:
        accepted = await accept_control(request, state, AveragePolicyRequest)
        check_lora_name(name, "name")
        source, mode, decay = accepted.source, accepted.mode, accepted.decay
        change = await state.change_policy(
            lambda: engine.call(EngineService.average_policy, name, decay=decay, source=source, mode=mode)
        )
        return PolicyChangeObject.of(change)

    @router.post(
        DROP_POLICY_ROUTE,
        summary="Forget a policy",
        description="Requests that wait for it end in an error.",
        responses=WEIGHTS_RESPONSES,
        openapi_extra=request_body(DropPolicyRequest),
    )
    async def drop_policy(name: str, request: Request) -> PolicyChangeObject:
        accepted = await accept_control(request, state, DropPolicyRequest, is_optional=True)
        check_lora_name(name, "name")
        mode = accepted.mode
        change = await state.change_policy(lambda: engine.call(EngineService.drop_policy, name, mode=mode))
        return PolicyChangeObject.of(change)

    @router.get(POLICIES_ROUTE, summary="The policies beside the default", responses=COMMON_RESPONSES)
    async def policies() -> PoliciesObject:
        return PoliciesObject(policies=list(await engine.call(EngineService.policies)))

    return router


def _find(accepted: LoadAdapterRequest, config: ServerConfig) -> AdapterFiles:
    """Returns the files that are to be read; all of them lie where the client may have them read."""
    files = find_adapter(allowed_path(accepted.lora_path, config.weights_roots, "lora_path"))
    check_inside([files.config, files.weights], config.weights_roots, "lora_path")
    return files
