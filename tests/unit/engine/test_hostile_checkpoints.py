"""Checkpoints and files that are made to run code, to loop for ever, to fill the memory, or to serve NaN."""

import json
import os
import shutil
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.adapters import policy, saved
from tests.weights import WEIGHTS, change, edit_config

from flowroll.engine import Engine, templates
from flowroll.engine.checkpoint import examine_checkpoint
from flowroll.engine.weights.files import MAX_JSON_BYTES, read_json
from flowroll.errors import CheckpointError, FlowrollError, WeightsRejectedError

LOOP = "{% for a in range(99999) %}{% for b in range(99999) %}{% set c = a %}{% endfor %}{% endfor %}"
CODE = """
from pathlib import Path
from transformers import PreTrainedTokenizerFast
Path(r"{marker}").touch()
class Tokenizer(PreTrainedTokenizerFast): pass
"""


@pytest.fixture
def folder(z_image_checkpoint: Path, tmp_path: Path) -> Path:
    shutil.copytree(z_image_checkpoint, tmp_path / "model")
    return tmp_path / "model"


def edit(path: Path, **values: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def give_tokenizer_of_its_own(folder: Path, marker: Path) -> None:
    """Gives the folder a tokenizer that is code; the code makes `marker` if it runs."""
    (folder / "tokenizer" / "own.py").write_text(CODE.format(marker=marker))
    edit(
        folder / "tokenizer" / "tokenizer_config.json",
        auto_map={"AutoTokenizer": [None, "own.Tokenizer"]},
        tokenizer_class="Tokenizer",
    )
    edit(folder / "model_index.json", tokenizer=["transformers", "AutoTokenizer"])


def test_no_code_of_the_folder_runs_whatever_is_on_standard_input(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    marker = tmp_path / "it ran"
    give_tokenizer_of_its_own(folder, marker)
    (folder / "text_encoder" / "own.py").write_text(CODE.format(marker=marker))
    edit(
        folder / "text_encoder" / "config.json",
        auto_map={"AutoModel": "own.Model", "AutoConfig": "own.Config"},
        model_type="own",
    )
    edit(folder / "model_index.json", text_encoder=["transformers", "AutoModel"])
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    with pytest.raises(FlowrollError):
        Engine(folder, device="cpu")
    assert not marker.exists()


def test_a_tokenizer_that_needs_code_of_its_folder_is_refused(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    marker = tmp_path / "it ran"
    give_tokenizer_of_its_own(folder, marker)
    asked: list[object] = []
    monkeypatch.setattr("builtins.input", lambda *_: asked.append(1) or "y")
    with pytest.raises(CheckpointError, match="contains custom code"):
        Engine(folder, device="cpu")
    assert not marker.exists() and not asked


def test_a_chat_template_that_does_not_end_is_refused_and_stopped(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for path in (folder / "tokenizer").glob("chat_template*"):
        path.unlink()
    edit(folder / "tokenizer" / "tokenizer_config.json", chat_template=LOOP)
    monkeypatch.setattr(templates, "_MOST_S", 0.3)
    with pytest.raises(CheckpointError, match=r"tokenizer must render its chat template within 0.3 s, got no end"):
        Engine(folder, device="cpu")
    deadline_s = time.monotonic() + 20
    while any(thread.name == "flowroll-template" for thread in threading.enumerate()):
        assert time.monotonic() < deadline_s
        time.sleep(0.01)


@pytest.mark.parametrize(
    ("component", "values"),
    [
        ("transformer", {"n_layers": 10**9}),
        ("text_encoder", {"num_hidden_layers": 10**9}),
        ("text_encoder", {"text_config": {"num_hidden_layers": 10**9}}),
        ("vae", {"layers_per_block": 10**9}),
        ("vae", {"block_out_channels": [8] * 100_000}),
    ],
)
def test_absurd_numbers_of_layers_are_refused_before_any_is_built(folder: Path, component: str, values: dict[str, Any]) -> None:
    edit_config(folder / component, **values)
    started_s = time.monotonic()
    with pytest.raises(CheckpointError, match="must describe the model of the files beside it"):
        examine_checkpoint(folder, variant=None)
    assert time.monotonic() - started_s < 5


def test_json_files_are_read_with_a_bound(tmp_path: Path) -> None:
    path = tmp_path / "index.json"
    path.write_text(json.dumps({"a": 1}))
    assert read_json(path, "x") == {"a": 1}
    # Sparse: 6 GB that take no room on the disk, and 6 GB of memory where they are read.
    os.truncate(path, 6 * 10**9)
    with pytest.raises(CheckpointError, match=f"must have at most {MAX_JSON_BYTES} bytes, got more"):
        read_json(path, "x")
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(CheckpointError, match=r"got no index\.json"):
        read_json(path, "x")


@pytest.fixture(scope="module")
def engine(z_image_checkpoint: Path) -> Any:
    with Engine(z_image_checkpoint, device="cpu") as engine:
        yield engine


NOT_FINITE = {"NaN": torch.nan, "infinity": torch.inf, "a float64 beyond float32": 1e300}


@pytest.mark.parametrize("value", NOT_FINITE.values(), ids=NOT_FINITE)
def test_weights_that_are_not_finite_are_refused_from_disk_and_from_tensors(value: float, engine: Engine, folder: Path) -> None:
    before = engine.weights_checksum()
    spoilt: dict[str, Any] = {}

    def spoil(tensors: dict[str, Any]) -> dict[str, Any]:
        name = sorted(tensors)[0]
        spoilt.update(tensors)
        spoilt[name] = tensors[name].double()
        spoilt[name].view(-1)[-1] = value
        return spoilt

    change(folder / "transformer", spoil)
    for update in (lambda: engine.update_weights_from_disk(folder), lambda: engine.update_weights_from_tensors(spoilt)):
        with pytest.raises(WeightsRejectedError, match="must hold finite weights, got NaN or infinity in"):
            update()
    assert engine.weights_checksum() == before and engine.weight_version == "0"


def test_an_adapter_of_nan_is_refused(engine: Engine, tmp_path: Path) -> None:
    model = policy(engine._model.transformer)
    with torch.no_grad():
        next(weight for name, weight in model.named_parameters() if "lora_B" in name).view(-1)[0] = torch.nan
    with pytest.raises(WeightsRejectedError, match="must hold finite numbers, got NaN or infinity in"):
        engine.load_lora_adapter(saved(model, tmp_path / "adapter"), name="p")
    assert not engine.lora_adapters()


def test_a_start_on_weights_that_are_not_finite_is_refused(folder: Path) -> None:
    change(folder / "transformer", lambda tensors: {**tensors, "x_pad_token": tensors["x_pad_token"] * torch.inf})
    with pytest.raises(CheckpointError, match="must hold finite weights, got NaN or infinity in x_pad_token"):
        Engine(folder, device="cpu")


def test_a_big_file_beside_the_weights_is_refused_by_an_update(engine: Engine, folder: Path) -> None:
    os.truncate(folder / "transformer" / "config.json", 6 * 10**9)
    assert (folder / "transformer" / WEIGHTS).is_file()
    with pytest.raises(WeightsRejectedError, match="must have at most"):
        engine.update_weights_from_disk(folder)
