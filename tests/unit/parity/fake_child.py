"""Stands for a layout's process where no model is needed: writes made-up rollouts, or dies in the way of its layout."""

import json
import os
import signal
import sys
from pathlib import Path


def main() -> None:
    line = sys.stdin.readline()
    spec = json.loads(line)
    degrees = spec["layout"]
    if degrees["cfg_parallel"] and degrees["tp"] == 2:
        (Path(spec["folder"]) / "facts.json").write_text('{"error": "rank 1 must live, see /some/where/rank.py."}')
        sys.exit("Traceback")
    if degrees["tp"] == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    if degrees["tp"] == 4:
        sys.exit("no memory left in /some/where/cuda.cu")
    sys.path.insert(0, str(Path(__file__).parents[3]))
    write_results(line)


def write_results(line: str) -> None:
    from tests.factories import make_rollout

    from flowroll.parity.exchange import Facts, decode_spec, rollout_file, write_facts
    from flowroll.wire.files import save_rollout

    spec = decode_spec(line)
    folder, name = Path(spec.folder), spec.layout.name
    for mode in spec.requests:
        rollout = make_rollout(seed=3, steps=2)
        if name == "cfg2":
            rollout.image[0, 0, 0, 0] += 1
        save_rollout(rollout_file(folder, mode, 3), rollout)
    received = {mode: {"sp": 0 if name == "sp3" else 600, "cfg": 80, "tp": 0} for mode in spec.requests}
    seeds = {mode: (3,) for mode in spec.requests}
    write_facts(folder, Facts(transformer_bytes=10, parameters=5, seeds=seeds, received_bytes=received, versions={"a": "1"}))
    if name == "sp3":
        rollout_file(folder, "ode", 3).write_bytes(b"torn")


if __name__ == "__main__":
    main()
