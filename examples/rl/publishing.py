"""How the policy of a round reaches the server, over HTTP: all of its weights, or its LoRA adapter."""

from __future__ import annotations

from typing import Any, ClassVar, Protocol

import peft
from torch import nn

from flowroll.client import Client

# Attention and feed-forward of both families.
_TARGETS = ["to_q", "to_k", "to_v", "to_out.0", "w1", "w2", "w3", "net.0.proj", "net.2"]


class Publisher(Protocol):
    """One way.

    Attributes:
        request: What a request says to have the policy that was published.
    """

    request: ClassVar[dict[str, Any]]

    def publish(self, client: Client, policy: nn.Module) -> None:
        """Puts the policy in the place of the one before: all of it or nothing."""


class Weights:
    """All weights."""

    request: ClassVar[dict[str, Any]] = {}

    def publish(self, client: Client, policy: nn.Module) -> None:
        """See `Publisher`."""
        client.update_weights(policy.state_dict())


class Adapter:
    """The adapter alone, beside the server's weights; the name stays, what it stands for is replaced."""

    request: ClassVar[dict[str, Any]] = {"lora_name": "policy"}

    def publish(self, client: Client, policy: nn.Module) -> None:
        """See `Publisher`."""
        assert isinstance(policy, peft.PeftModel)
        config = policy.peft_config["default"].to_dict()
        client.load_lora_adapter_from_tensors(peft.get_peft_model_state_dict(policy), config, name=self.request["lora_name"])


def with_adapter(policy: nn.Module, rank: int) -> peft.PeftModel:
    """The policy with a LoRA adapter, which alone is trained; it starts as the policy itself."""
    return peft.get_peft_model(policy, peft.LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=_TARGETS))  # type: ignore[arg-type]
