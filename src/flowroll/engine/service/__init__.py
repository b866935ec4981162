"""An engine as a server uses it: in the server's process, or in a process of its own behind the same interface."""

from flowroll.engine.service.client import EngineClient, InProcessEngine
from flowroll.engine.service.process import EngineOptions, EngineProcess
from flowroll.engine.service.service import EngineService, RequestKind
from flowroll.engine.service.status import EngineFacts, EngineStatus, Evidence

__all__ = [
    "EngineClient",
    "EngineFacts",
    "EngineOptions",
    "EngineProcess",
    "EngineService",
    "EngineStatus",
    "Evidence",
    "InProcessEngine",
    "RequestKind",
]
