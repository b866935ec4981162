"""GET /policies, and POST /policies/{name}/copy, /ema and /drop."""

from __future__ import annotations

from fastapi import APIRouter, Request

from flowroll.engine.service import EngineService
from flowroll.serving.errors import COMMON_RESPONSES, WEIGHTS_RESPONSES
from flowroll.serving.openapi import request_body
from flowroll.serving.parsing import accept_control
from flowroll.serving.state import AppState
from flowroll.types import check_lora_name
from flowroll.wire.names import COPY_POLICY_ROUTE, DROP_POLICY_ROUTE, EMA_POLICY_ROUTE, POLICIES_ROUTE
from flowroll.wire.policies import (
    AveragePolicyRequest,
    CopyPolicyRequest,
    DropPolicyRequest,
    PoliciesObject,
    PolicyChangeObject,
)


def build_router(state: AppState) -> APIRouter:
    """Returns the routes about policies."""
    router = APIRouter(tags=["weights"])
    engine = state.engine

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
