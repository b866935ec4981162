"""POST /rollout/generate and /rollout/score."""

from __future__ import annotations

from fastapi import APIRouter, Request, Response

from flowroll.serving.errors import WORK_RESPONSES
from flowroll.serving.negotiation import choose_dialect, choose_wire_format
from flowroll.serving.openapi import MSGPACK_CONTENT, request_body, tensor_answer
from flowroll.serving.parsing import accept_request, accept_score_request
from flowroll.serving.responses import stream
from flowroll.serving.state import AppState
from flowroll.wire.codec import encode_rollouts
from flowroll.wire.messages import WireSample, WireScoreAnswer, WireScoreRequest
from flowroll.wire.names import ROLLOUT_ROUTE, SCORE_ROUTE
from flowroll.wire.schema import RolloutRequest
from flowroll.wire.scoring import encode_score_answer


def build_router(state: AppState) -> APIRouter:
    """Returns the routes of rollouts."""
    router = APIRouter(tags=["rollout"])

    @router.post(
        ROLLOUT_ROUTE,
        summary="Roll out a prompt",
        description="Images with the log-prob of every stochastic step and, as asked for, all that replays them.",
        response_class=Response,
        responses={
            **WORK_RESPONSES,
            200: tensor_answer(WireSample, "One object per sample", is_list=True),
        },
        openapi_extra=request_body(RolloutRequest, **MSGPACK_CONTENT),
    )
    async def generate_rollouts(request: Request) -> Response:
        wire_format = choose_wire_format(request.headers, state.config)
        dialect = choose_dialect(request.headers, state.config)
        plan = (await accept_request(request, state, RolloutRequest))[1]
        rollouts = await state.run(request, plan, "rollout")
        body = await state.serialise(request, encode_rollouts, rollouts, wire_format=wire_format, dialect=dialect)
        return stream(request, body)

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
        return stream(request, await state.serialise(request, encode_score_answer, answer, wire_format=wire_format))

    return router
