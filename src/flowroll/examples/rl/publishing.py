"""How the policy of a round reaches the server, over HTTP: all its weights or its LoRA adapter; and an old one beside it."""

from __future__ import annotations

import copy
from typing import Any, Protocol, runtime_checkable

import peft
import torch
from torch import nn

from flowroll.client import Client

# Attention and feed-forward of the families.
_TARGETS = ["to_q", "to_k", "to_v", "to_out.0", "w1", "w2", "w3", "net.0.proj", "net.2"]


@runtime_checkable
class Publisher(Protocol):
    """One way.

    Attributes:
        request: What a request says to have the policy that was published.
    """

    request: dict[str, Any]

    def publish(self, client: Client, policy: nn.Module, version: int) -> None:
        """Puts the policy in the place of the one before: all of it or nothing."""


class Weights:
    """All weights."""

    def __init__(self) -> None:
        self.request: dict[str, Any] = {}

    def publish(self, client: Client, policy: nn.Module, version: int) -> None:
        """See `Publisher`."""
        client.update_weights(policy.state_dict(), weight_version=str(version))


class Adapter:
    """The adapter alone, beside the server's weights; the name stays, what it stands for is replaced."""

    def __init__(self) -> None:
        self.request: dict[str, Any] = {"lora_name": "policy"}

    def publish(self, client: Client, policy: nn.Module, version: int) -> None:
        """See `Publisher`."""
        assert isinstance(policy, peft.PeftModel)
        client.load_lora_adapter_from_tensors(
            peft.get_peft_model_state_dict(policy),
            policy.peft_config["default"].to_dict(),
            name=self.request["lora_name"],
            weight_version=str(version),
        )


class OldPolicy:
    """A policy that follows the one that learns as a moving average: here, and on the server, to which it is not sent.

    Args:
        decay: Its own share after a round.

    Attributes:
        module: The average here; None before the first round.
    """

    name = "old"

    def __init__(self, decay: float) -> None:
        self._decay = decay
        self.module: nn.Module | None = None

    def begin(self, client: Client, source: str | None) -> None:
        """Makes the server's a copy of the policy that was published last."""
        client.copy_policy(self.name, source=source)

    def follow(self, client: Client, source: str | None) -> None:
        """Moves the server's towards the policy that was published last."""
        client.average_policy(self.name, decay=self._decay, source=source)

    def of(self, policy: nn.Module) -> nn.Module:
        """The average here; at first a copy of the policy."""
        if self.module is None:
            self.module = copy.deepcopy(policy).requires_grad_(False)
        return self.module

    @torch.no_grad()
    def move(self, policy: nn.Module) -> None:
        """Moves the average here, with the bits of the server's."""
        for old, new in zip(self.of(policy).parameters(), policy.parameters(), strict=True):
            old.mul_(self._decay).add_(new, alpha=1 - self._decay)


def publisher_of(lora_rank: int | None) -> Publisher:
    """The way for a policy with an adapter of this rank, or without one."""
    return Weights() if lora_rank is None else Adapter()


def with_adapter(policy: nn.Module, rank: int) -> peft.PeftModel:
    """The policy with a LoRA adapter, which alone is trained; it starts as the policy itself."""
    return peft.get_peft_model(policy, peft.LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=_TARGETS))
