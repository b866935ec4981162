"""The requests that steer generation, and their answers."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from flowroll.errors import InvalidRequestError
from flowroll.types import MAX_REQUEST_ID_CHARS
from flowroll.wire import fields
from flowroll.wire.fields import Rule
from flowroll.wire.schema import Strict


class AbortRequest(Strict):
    """Body of POST /abort_request: one id, or all."""

    model_config = ConfigDict(json_schema_extra={"examples": [{"request_id": "step-12-prompt-3"}, {"abort_all": True}]})

    request_id: fields.RequestId = None
    rid: Annotated[
        str | None,
        Field(
            max_length=MAX_REQUEST_ID_CHARS,
            description="The same as `request_id`, as SGLang's clients send it; empty: none.",
            examples=["step-12-prompt-3"],
        ),
        Rule(text=f"be null or a string of at most {MAX_REQUEST_ID_CHARS} characters", remedy="send the request's id"),
    ] = None
    abort_all: Annotated[
        bool,
        Field(description="Whether every request ends.", examples=[True]),
        Rule(text="be true or false", remedy="leave it out to abort one id"),
    ] = False

    @model_validator(mode="after")
    def _check_one(self) -> AbortRequest:
        named = [name for name in ("request_id", "rid") if getattr(self, name)]
        if len(named) + self.abort_all != 1:
            raise InvalidRequestError(
                f"request_id must be given, or abort_all be true, but not both, got {len(named) + self.abort_all} of them; "
                "say which request is meant.",
                field="request_id",
            )
        return self

    @property
    def meant(self) -> str | None:
        """The id; None: all."""
        return self.request_id or self.rid or None


class PauseRequest(Strict):
    """Body of POST /pause_generation."""

    model_config = ConfigDict(json_schema_extra={"examples": [{"mode": "freeze"}]})

    mode: Annotated[
        Literal["finish", "freeze"],
        Field(
            description="What becomes of the requests that run: they finish, or stand still at their next step.",
            examples=["freeze"],
        ),
        Rule(text='be "finish" or "freeze"', remedy='leave it out for "finish"'),
    ] = "finish"


class ContinueRequest(Strict):
    """Body of POST /continue_generation: an empty object."""

    model_config = ConfigDict(json_schema_extra={"examples": [{}]})


class AbortedObject(BaseModel):
    """What was aborted. Each of these requests ends in a 499."""

    num_aborted: int = Field(description="Requests that waited or ran under this id.", examples=[1])


class GenerationObject(BaseModel):
    """How generation stands."""

    is_paused: bool = Field(description="Whether new requests are refused.")
    num_running: int = Field(description="Requests that were taken up and have not ended.")
    num_waiting: int = Field(description="Requests that wait; they keep their places.")
