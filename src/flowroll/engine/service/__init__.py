"""An engine as a server uses it: in the server's process, or in another process behind the same interface."""

from flowroll.engine.service.client import CallFuture, EngineClient, InProcessEngine
from flowroll.engine.service.process import EngineOptions, EngineProcess
from flowroll.engine.service.service import EngineService, RequestKind, bucket_bytes, bucket_tensors
from flowroll.engine.service.status import (
    EngineFacts,
    EngineStatus,
    Evidence,
    OpenedUpdate,
    SentNames,
    UpdateProgress,
)
from flowroll.parallel.shared_memory import SharedMemory

__all__ = [
    "CallFuture",
    "EngineClient",
    "EngineFacts",
    "EngineOptions",
    "EngineProcess",
    "EngineService",
    "EngineStatus",
    "Evidence",
    "InProcessEngine",
    "OpenedUpdate",
    "RequestKind",
    "SentNames",
    "SharedMemory",
    "UpdateProgress",
    "bucket_bytes",
    "bucket_tensors",
]
