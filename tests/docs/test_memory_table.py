"""The memory table of the real models: its parameter counts are the published ones, and the page shows what the script says."""

import pytest
import torch
from tests.docs.blocks import ROOT
from tools.memory_table import GIB, MODELS, FusedAttention, Peak, measure, tables

# Billions, as the models' cards say: of the transformer, and of the text encoders together. Qwen-Image "20B", Qwen2.5-VL
# "8.29B"; Z-Image "6B", Qwen3-4B "4.0B"; Stable Diffusion 3.5 "8.1 billion" and "2.5 billion", CLIP L 0.123, CLIP G 0.695 and
# T5-XXL's encoder 4.76.
PUBLISHED = {
    "Qwen-Image": (20.4, 8.29),
    "Z-Image, Turbo": (6.15, 4.0),
    "SD3.5 large": (8.1, 5.58),
    "SD3.5 medium": (2.5, 5.58),
}


@pytest.mark.slow
def test_the_page_shows_what_the_script_computes() -> None:
    page = (ROOT / "docs/howto/real-models.md").read_text(encoding="utf-8")
    assert "\n".join(tables(1024)) in page


@pytest.mark.slow
@pytest.mark.parametrize("model", MODELS, ids=lambda model: model.name)
def test_the_parameters_are_those_that_are_published(model) -> None:
    found = measure(model, 256).parameters
    transformer, encoders = PUBLISHED[model.name]
    assert found["transformer"] / 1e9 == pytest.approx(transformer, rel=0.02)
    assert found["text encoders"] / 1e9 == pytest.approx(encoders, rel=0.02)


def test_the_peak_is_what_lives_at_the_same_time() -> None:
    with Peak() as peak:
        first = torch.empty(GIB // 4, dtype=torch.float32, device="meta")
        del first
        second = torch.empty(GIB // 8, dtype=torch.float32, device="meta")
        third = second.view(-1) + 1
        assert third.device.type == "meta"
    assert peak.peak == GIB and peak.live == GIB


def test_attention_leaves_its_output_alone() -> None:
    with FusedAttention(), Peak() as peak:
        query = torch.empty(1, 2, 1000, 8, device="meta")
        torch.nn.functional.scaled_dot_product_attention(query, query, query)
    assert peak.peak == 2 * query.nbytes
