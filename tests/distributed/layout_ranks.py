"""One rank of a job that runs every case with one layout.

Rank 0 writes every rollout to a folder; the others follow it. The engines of all checkpoints and dtypes are opened one after
the other.
"""

import json
import os
from collections.abc import Sequence
from pathlib import Path

import torch
from tests.distributed.cases import CASES, DTYPES

from flowroll.engine import Engine, follow
from flowroll.types import Layout
from flowroll.wire.files import save_rollout


def run_cases(layout_name: str, device: str, out: Path, folders: Sequence[Path]) -> None:
    torch.set_num_threads(1)
    layout = Layout.parse(layout_name)
    for folder in folders:
        for dtype in DTYPES:
            options = {"dtype": dtype, "device": device, "layout": layout, "rank_timeout_s": 60.0}
            if os.environ["RANK"] != "0":
                follow(folder, **options)
                continue
            with Engine(folder, **options) as engine:
                target = out / folder.name / dtype
                target.mkdir(parents=True)
                for number, request in enumerate(CASES.values()):
                    for index, rollout in enumerate(engine.rollout(**request)):
                        save_rollout(target / f"{number}-{index}.safetensors", rollout)
                facts = {
                    "received": engine.received_bytes,
                    "bytes": engine.info.transformer_bytes,
                    "all": engine.info.parameters,
                }
                (target / "facts.json").write_text(json.dumps(facts))
