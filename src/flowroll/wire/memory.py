"""The requests that release and take the memory of the weights, and their answers."""

from __future__ import annotations

from typing import Annotated, Literal, TypeAlias

from pydantic import BaseModel, ConfigDict, Field

from flowroll.wire.fields import Items, Rule
from flowroll.wire.schema import Strict

_Tags: TypeAlias = Annotated[
    Items[Literal["weights", "kv_cache", "cuda_graph"]] | None,
    Field(
        min_length=1,
        description="What is meant, as SGLang's clients send it. null: everything. Of the three there are only weights here; "
        "the others change nothing.",
        examples=[["weights"]],
    ),
    Rule(text='be null or a list of "weights", "kv_cache" and "cuda_graph"', remedy="leave it out for everything"),
]


class ResumeRequest(Strict):
    """Body of POST /resume_memory_occupation; it may be left out."""

    model_config = ConfigDict(json_schema_extra={"examples": [{}]})

    tags: _Tags = None

    @property
    def means_weights(self) -> bool:
        """Whether there is something to do."""
        return self.tags is None or "weights" in self.tags


class ReleaseRequest(ResumeRequest):
    """Body of POST /release_memory_occupation; it may be left out."""

    model_config = ConfigDict(json_schema_extra={"examples": [{"mode": "offload"}]})

    mode: Annotated[
        Literal["offload", "disk"],
        Field(
            description="offload: to pinned memory of the host; on a CPU the weights stay and nothing is released. disk: to a "
            "file without a name in the server's folder for temporary files."
        ),
        Rule(text='be "offload" or "disk"', remedy='leave it out for "offload"'),
    ] = "offload"


class MemoryObject(BaseModel):
    """Where the weights are."""

    success: Literal[True] = True
    is_asleep: bool = Field(description="Whether the memory of the weights is released.")
    mode: Literal["offload", "disk"] | None = Field(description="Where they are kept; null: in place.")
    num_bytes: int = Field(description="That moved, on rank 0; 0 where there was nothing to do.")
    seconds: float = Field(description="For which no request could run.")
