"""What the tests of the plug-in for verl-omni share: recorded data of verl-omni, and prompts as its agent loop sends them."""

import json
from functools import cache
from pathlib import Path
from typing import Any

from flowroll.engine.facts import ModelFacts
from flowroll.integrations.verl_omni.mapping import PromptIds

RECORDED: dict[str, Any] = json.loads((Path(__file__).parents[2] / "data" / "verl_omni.json").read_text())


def sampling(name: str, **changes: Any) -> dict[str, Any]:
    """The first sampling parameters that verl-omni sent for a configuration, with changes."""
    return {**RECORDED["sampling_params"][name][0], **changes}


@cache
def _tokenizer(folder: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)


def prompt_of(folder: Path, facts: ModelFacts, text: str = "a red cat", negative: str | None = "blurry") -> PromptIds:
    """A prompt as token ids; those of Qwen-Image begin with the template, which the agent loop's chat template makes."""

    def ids(name: str, content: str) -> list[int]:
        return list(_tokenizer(folder / name)(content)["input_ids"])

    if facts.family.name == "sd3":
        both = [
            None if one is None else {"clip": ids("tokenizer", one), "t5": ids("tokenizer_3", one)} for one in (text, negative)
        ]
        return PromptIds(ids=[1], extra=both[0], negative_extra=both[1])
    template = list(facts.tokenizers[0].template)
    negative_ids = None if negative is None else template + ids("tokenizer", negative)
    return PromptIds(ids=template + ids("tokenizer", text), negative_ids=negative_ids)


def arguments_of(prompt: PromptIds) -> dict[str, Any]:
    """The keyword arguments by which the agent loop passes a prompt to the server."""
    return {
        "prompt_ids": prompt.ids,
        "negative_prompt_ids": prompt.negative_ids,
        "extra_prompt_ids": prompt.extra,
        "negative_extra_prompt_ids": prompt.negative_extra,
    }
