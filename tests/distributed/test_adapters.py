"""LoRA adapters on several ranks: every rank has them, or none; every tensor is that of one rank."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.adapters import policy, saved
from tests.guiding import PicturedEngine, guided
from tests.pairs import deal
from tests.rollouts import assert_same_bits
from tests.weights import REQUEST, with_other

from flowroll import Rollout
from flowroll.engine import Engine
from flowroll.errors import WeightsRejectedError
from flowroll.families import FAMILIES
from flowroll.types import Layout

LAYOUTS = {"sp2": Layout(sp=2), "tp2": Layout(tp=2), "cfg2": Layout(cfg_parallel=True)}
# Enough image tokens for two ranks: rows are shared from 64 a rank on.
ROLLOUT = {**REQUEST, "height": 192, "width": 192}
# With linears that regions hook: rows are narrowed and gathered there.
TARGETS = {
    "qwen_image": ["to_q", "to_out.0", "net.2", "img_mod.1", "img_in", "proj_out"],
    "qwen_image_edit": ["to_q", "to_out.0", "net.2", "img_mod.1", "img_in", "proj_out"],
    "z_image": ["to_q", "to_out.0", "w2", "0.adaLN_modulation.0"],
    "sd3": ["to_q", "to_out.0", "net.2", "norm1.linear", "context_embedder", "proj_out"],
    "qwen_image_21": ["to_q", "to_out.0", "img_mlp.out", "modulation.1", "img_in", "proj_out"],
    "flux": ["to_q", "to_out.0", "net.2", "norm1.linear", "proj_mlp", "x_embedder", "proj_out"],
    "flux2": ["to_q", "to_out.0", "to_qkv_mlp_proj", "linear_out", "modulation_img.linear", "x_embedder", "proj_out"],
}


@pytest.fixture(scope="module", params=deal(tuple(FAMILIES), tuple(LAYOUTS)), ids="-".join)
def row(request: pytest.FixtureRequest) -> tuple[str, str]:
    """A family and a layout."""
    return request.param


@pytest.fixture(scope="module")
def family(row: tuple[str, str]) -> str:
    return row[0]


@pytest.fixture(scope="module")
def adapters(family: str, checkpoints: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("adapters")
    with PicturedEngine(checkpoints[family], device="cpu") as engine:
        for seed, name in enumerate(("a", "b")):
            saved(policy(engine._model.transformer, seed, targets=TARGETS[family]), folder / name)
    with_other(checkpoints[family], folder / "other")
    return folder


def _load(engine: Engine, folder: Path) -> None:
    engine.load_lora_adapter(folder / "a", name="a")
    engine.load_lora_adapter(folder / "b", name="m", merged=True)


def _everything(engine: Engine, folder: Path) -> list[Rollout]:
    """Rollouts with and without adapters, also after the weights below were changed."""
    _load(engine, folder)
    request = guided(engine.info.family, 3.0, **ROLLOUT)
    found = [engine.rollout(**request, lora_name=name)[0] for name in (None, "a", "m")]
    engine.update_weights_from_disk(folder / "other")
    return found + [engine.rollout(**request, lora_name=name)[0] for name in ("a", "m")]


@pytest.fixture(scope="module")
def expected(family: str, checkpoints: dict[str, Path], adapters: Path) -> list[Rollout]:
    with PicturedEngine(checkpoints[family], device="cpu") as engine:
        return _everything(engine, adapters)


@pytest.fixture
def several(row: tuple[str, str], checkpoints: dict[str, Path]) -> Iterator[Engine]:
    family, layout = row
    with PicturedEngine(checkpoints[family], device="cpu", layout=LAYOUTS[layout], rank_timeout_s=30.0) as engine:
        yield engine


def test_several_ranks_have_the_bits_of_one(several: Engine, adapters: Path, expected: list[Rollout]) -> None:
    found = _everything(several, adapters)
    for rollout, wanted in zip(found, expected, strict=True):
        assert_same_bits(rollout, wanted)
    scored = several.score(
        latents=found[4].dit_trajectory.latents[0],
        next_latents=found[4].dit_trajectory.latents[1],
        step=0,
        env=found[4].denoising_env,
        record=found[4].sampling,
    )
    assert (scored.velocity == found[4].debug_tensors.model_output[0]).all()
    several.unload_lora_adapter("a")
    assert [adapter.name for adapter in several.lora_adapters()] == ["m"]
    assert_same_bits(several.rollout(**guided(several.info.family, 3.0, **ROLLOUT), lora_name="m")[0], expected[4])


@pytest.mark.slow
def test_an_adapter_that_another_rank_reads_otherwise_is_loaded_by_none(z_image_checkpoint: Path, tmp_path: Path) -> None:
    with Engine(z_image_checkpoint, device="cpu", layout=Layout(sp=2), rank_timeout_s=30.0) as engine:
        transformer = engine._model.transformer
        saved(policy(transformer, 1), tmp_path / "p")
        staged = engine.stage_lora_adapter(_files(tmp_path / "p"), name="p")
        saved(policy(transformer, 2), tmp_path / "p")
        with pytest.raises(WeightsRejectedError, match=r"rank 1: .* must hold the same adapter on every rank"):
            engine.commit_lora_adapter(staged)
        assert engine.lora_adapters() == () and engine.weight_version == "0"
        engine.load_lora_adapter(tmp_path / "p", name="p")
        assert engine.rollout(**REQUEST, lora_name="p")[0].sampling.lora.name == "p"


def _files(folder: Path) -> object:
    from flowroll.engine.adapters.files import find_adapter

    return find_adapter(folder)
