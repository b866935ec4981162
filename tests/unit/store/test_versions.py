"""Files of every schema version that there has been stay readable; `python -m tests.unit.store.test_versions` made them."""

import hashlib
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.factories import make_rollout, raw_bytes

from flowroll import Rollout, load_rollouts, save_rollouts
from flowroll.errors import RolloutFileError
from flowroll.store import RolloutStore, rollout_store
from flowroll.types import SCHEMA_VERSION, results
from flowroll.types.shown import tensors_of

DATA = Path(__file__).parents[2] / "data"
# Of each version, what the tensors of its file and of the store's two samples hold.
DIGESTS: dict[int, tuple[str, str, str]] = {
    1: (
        "722714851bcd0b8af5af04c4d124bf566570a87e281c4410d1972a959185f33c",
        "722714851bcd0b8af5af04c4d124bf566570a87e281c4410d1972a959185f33c",
        "9427558add924fda6f864f052613216855f4a8e643b667b5286c5c296264788a",
    )
}
KINDS: tuple[dict[str, Any], ...] = ({"image_format": "png"}, {"seed": 3, "guided": False})


def digest(rollout: Rollout) -> str:
    """What every tensor of a rollout holds, and its picture."""
    found = hashlib.sha256(rollout.image if isinstance(rollout.image, bytes) else b"")
    for tensor in tensors_of(rollout):
        found.update(f"{tensor.dtype}{list(tensor.shape)}".encode() + raw_bytes(tensor))
    return found.hexdigest()


def made() -> list[Rollout]:
    """What the files hold."""
    size = {"height": 16, "width": 16, "steps": 2, "text_tokens": 2, "family": "z_image", "dtype": torch.float32}
    return [make_rollout(**{**size, **kind}) for kind in KINDS]


def assert_readable(version: int) -> None:
    (alone,), stored = load_rollouts(DATA / f"rollout-v{version}.safetensors"), load_rollouts(DATA / f"store-v{version}")
    assert tuple(map(digest, (alone, *stored))) == DIGESTS[version]
    assert (alone.seed, alone.prompt, alone.weight_version) == (0, 'a cat that says "π ≈ 3", 猫', "7")
    assert alone.sampling.schema_version == version and alone.sampling.num_inference_steps == 2
    first, second = RolloutStore(DATA / f"store-v{version}", read_only=True).select(min_reward=0).samples()
    assert (dict(first.rewards), first.notes, dict(second.rewards)) == ({"reward": 0.5}, ("kept",), {"reward": 2.0})


@pytest.mark.parametrize("version", range(1, SCHEMA_VERSION + 1))
def test_files_of_every_version_are_read(version: int, monkeypatch: pytest.MonkeyPatch) -> None:
    assert_readable(version)
    # By a later flowroll too.
    monkeypatch.setattr(results, "SCHEMA_VERSION", SCHEMA_VERSION + 1)
    monkeypatch.setattr(rollout_store, "STORE_VERSION", rollout_store.STORE_VERSION + 1)
    assert_readable(version)


def test_a_store_without_its_index_is_read_from_its_shards(tmp_path: Path) -> None:
    shutil.copytree(DATA / f"store-v{SCHEMA_VERSION}", tmp_path / "store")
    before = RolloutStore(tmp_path / "store", read_only=True).select().to_arrow()
    shutil.rmtree(tmp_path / "store" / "index")
    after = RolloutStore(tmp_path / "store", read_only=True).select().to_arrow()
    # The shards hold the grid; the index of that version has no column for it yet.
    column = after.column_names.index("sigmas")
    assert before.column("sigmas").null_count == len(before) and not after.column("sigmas").null_count
    assert after.set_column(column, before.field("sigmas"), before.column("sigmas")).equals(before)


def test_a_shard_of_a_later_version_is_refused(tmp_path: Path) -> None:
    shutil.copytree(DATA / f"store-v{SCHEMA_VERSION}", tmp_path / "store")
    (shard,) = (tmp_path / "store" / "shards").iterdir()
    shard.write_bytes(shard.read_bytes().replace(b'schema_version":"1"', b'schema_version":"9"'))
    with pytest.raises(RolloutFileError, match=r"flowroll.schema_version must be at most 1, got 9 in .*; read it with a later"):
        RolloutStore(tmp_path / "store", read_only=True).load("000000-000")


if __name__ == "__main__":
    rollouts = made()
    rollouts[0].save(DATA / f"rollout-v{SCHEMA_VERSION}.safetensors")
    ids = save_rollouts(DATA / f"store-v{SCHEMA_VERSION}", rollouts, rewards=[0.5, None])
    store = RolloutStore(DATA / f"store-v{SCHEMA_VERSION}")
    store.add_rewards({ids[1]: 2.0})
    store.add_notes({ids[0]: "kept"})
    (store.path / "lock").unlink()
    sys.stdout.write(f"{SCHEMA_VERSION}: {tuple(map(digest, (rollouts[0], *rollouts)))}\n")
