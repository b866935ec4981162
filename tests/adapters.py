"""LoRA adapters on disk, made by peft itself, and the models of a trainer that has them."""

import copy
import shutil
from pathlib import Path
from typing import Any

import peft
import torch
from torch import nn

# Attention and feed-forward of both families; alpha over rank is no power of two, so that the scale is part of every bit.
TARGETS = ["to_q", "to_v", "to_out.0", "w1", "w3", "net.2", "0.adaLN_modulation.0", "img_mod.1"]


def policy(
    transformer: nn.Module, seed: int = 0, *, targets: Any = TARGETS, autocast: bool = False, **options: Any
) -> peft.PeftModel:
    """A trainer's peft model over a copy of the weights, after some training."""
    config = peft.LoraConfig(**{"r": 4, "lora_alpha": 6, "target_modules": targets, **options})
    model = peft.get_peft_model(copy.deepcopy(transformer), config, autocast_adapter_dtype=autocast)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator).mul(0.2).to(parameter.dtype))
    return model.eval()


def saved(model: peft.PeftModel, folder: Path) -> Path:
    """What the trainer saves, in place of what is there."""
    # peft cannot read its own model card.
    shutil.rmtree(folder, ignore_errors=True)
    model.save_pretrained(str(folder))
    return folder
