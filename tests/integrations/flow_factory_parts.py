"""What a configuration of Flow-Factory names by dotted paths: a reward and a logger. Imported by Flow-Factory alone."""

from typing import Any

import numpy
import torch
from flow_factory.logger.abc import Logger  # type: ignore[import-not-found,unused-ignore]
from flow_factory.rewards.abc import PointwiseRewardModel, RewardModelOutput  # type: ignore[import-not-found,unused-ignore]

# What trainers have logged, in its order.
LOGGED: list[dict[str, Any]] = []


class Redness(PointwiseRewardModel):
    """The mean of the red of a picture."""

    required_fields = ("prompt", "image")

    def __call__(self, prompt: list[str], image: list[Any], **_: Any) -> RewardModelOutput:
        red = [float(numpy.asarray(one)[..., 0].mean()) / 255 for one in image]
        return RewardModelOutput(rewards=torch.tensor(red), extra_info={})


class Log(Logger):
    """Keeps what is logged."""

    def _init_platform(self) -> None:
        pass

    def _convert_to_platform(self, item: Any, **_: Any) -> Any:
        return item

    def _log_impl(self, data: dict[str, Any], step: int) -> None:
        pass

    def log_data(self, data: dict[str, Any], step: int, keys: str | None = None) -> None:
        LOGGED.append(data)
