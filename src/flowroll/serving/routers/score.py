"""POST /rollout/score."""

from __future__ import annotations

from fastapi import APIRouter, Request, Response

from flowroll.serving.errors import WORK_RESPONSES
from flowroll.serving.negotiation import choose_wire_format
from flowroll.serving.openapi import MSGPACK_CONTENT, request_body, tensor_answer
from flowroll.serving.parsing import accept_score_request
from flowroll.serving.responses import stream
from flowroll.serving.state import AppState
from flowroll.wire.messages import WireScoreAnswer, WireScoreRequest
from flowroll.wire.names import SCORE_ROUTE
from flowroll.wire.scoring import encode_score_answer


def build_router(state: AppState) -> APIRouter:
    """Returns the score route."""
    router = APIRouter(tags=["rollout"])

    @router.post(
        SCORE_ROUTE,
        summary="Score recorded steps",
        description="Log-probs, means and velocities of steps that were rolled out before, under the weights in memory. "
        "Nothing is kept: send the parts of a rollout back as they came, tensors included, in either dialect.",
        response_class=Response,
        responses={
            **WORK_RESPONSES,
            415: {**WORK_RESPONSES[415], "description": "The body is sent neither as JSON nor as msgpack"},
            200: tensor_answer(WireScoreAnswer, "The scores"),
        },
        openapi_extra=request_body(WireScoreRequest, **MSGPACK_CONTENT),
    )
    async def score_steps(request: Request) -> Response:
        wire_format = choose_wire_format(request.headers, state.config)
        answer = await state.score(request, await accept_score_request(request, state))
        return stream(await state.serialise(request, encode_score_answer, answer, wire_format=wire_format))

    return router
