import json
import shutil

import pytest
import torch

from flowroll.engine.checkpoint import examine_checkpoint
from flowroll.engine.loading import load_model
from flowroll.engine.outline import outline_model
from flowroll.errors import CheckpointError

CPU = torch.device("cpu")


@pytest.mark.parametrize("family", ["qwen", "z_image"])
def test_an_outline_has_the_facts_of_the_loaded_model_and_no_weights(family, request):
    checkpoint = examine_checkpoint(request.getfixturevalue(f"{family}_checkpoint"), variant=None)
    outline = outline_model(checkpoint, device=CPU, dtype=torch.float32)
    loaded, _ = load_model(checkpoint, device=CPU, dtype=torch.float32)
    for name in ("family", "variant", "spec", "schedule_config", "device", "dtype"):
        assert getattr(outline, name) == getattr(loaded, name), name
    assert {parameter.device.type for parameter in outline.transformer.parameters()} == {"meta"}


def test_a_configuration_that_describes_no_model_is_a_checkpoint_error(qwen_checkpoint, tmp_path):
    shutil.copytree(qwen_checkpoint, tmp_path / "copy")
    file = tmp_path / "copy" / "vae" / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "temperal_downsample": 3}))
    checkpoint = examine_checkpoint(tmp_path / "copy", variant=None)
    with pytest.raises(CheckpointError, match="must describe a QwenImagePipeline"):
        outline_model(checkpoint, device=CPU, dtype=torch.float32)
