"""One rank of a job that runs every case with one layout: `python -m tests.distributed.layout_ranks LAYOUT DEVICE OUT
FOLDER...`.

Rank 0 writes every rollout to OUT; the others follow it. The engines of all checkpoints and dtypes are opened one after the
other.
"""

import json
import os
import sys
from pathlib import Path

import torch
from tests.distributed.cases import CASES, DTYPES

from flowroll.engine import Engine, follow
from flowroll.types import Layout
from flowroll.wire.files import save_rollout


def main(layout_name: str, device: str, out: str, *folders: str) -> None:
    torch.set_num_threads(1)
    layout = Layout.parse(layout_name)
    for folder in folders:
        for dtype in DTYPES:
            options = {"dtype": dtype, "device": device, "layout": layout, "rank_timeout_s": 60.0}
            if os.environ["RANK"] != "0":
                follow(folder, **options)
                continue
            with Engine(folder, **options) as engine:
                target = Path(out) / Path(folder).name / dtype
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


if __name__ == "__main__":
    main(*sys.argv[1:])
