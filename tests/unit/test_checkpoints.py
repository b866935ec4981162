from pathlib import Path

import pytest

from flowroll.checkpoints import SHAPES, resolve, shapes_checkpoint
from flowroll.errors import CheckpointError


def test_a_shipped_checkpoint_is_found_by_its_name():
    for name in SHAPES:
        assert resolve(name) == shapes_checkpoint(name.removeprefix("shapes-"))
        assert (resolve(name) / "model_index.json").is_file()


def test_a_folder_of_the_users_own_goes_first(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / SHAPES[0]).mkdir()
    assert resolve(SHAPES[0]) == Path(SHAPES[0])
    assert resolve("some/folder") == Path("some/folder")


def test_no_other_family_is_shipped():
    with pytest.raises(CheckpointError, match="qwen_image, sd3, z_image, got flux"):
        shapes_checkpoint("flux")
