"""The index of a store of a million samples: opening, selecting, adding rewards, appending. `python -m benchmarks.store`.

The index is synthetic: 62,500 shards of 16 samples of 4,096 prompts and 500 versions, in the files that as many appends would
have left. The shards themselves are empty but for the last ones, which are appended for real.
"""

from __future__ import annotations

import argparse
import datetime
import random
import resource
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
from tests.factories import make_rollout

from benchmarks.measure import hardware
from flowroll.store import RolloutStore
from flowroll.store.index import MAX_ROWS, NOTES, SAMPLES

RESULTS = Path(__file__).parent / "results"
GROUP, PROMPTS, VERSIONS = 16, 4096, 500
FAN_IN = 16


def main() -> None:
    """Makes the store, measures and writes the result file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--samples", type=int, default=1_000_000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, default=None, help="result file")
    options = parser.parse_args()
    today = datetime.datetime.now(datetime.UTC)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "store"
        make(path, options.samples // GROUP)
        rows = measure(path, options.rounds)
        num_files = len(list((path / "index").iterdir())) + len(list((path / "notes").iterdir()))
        num_bytes = sum(file.stat().st_size for part in ("index", "notes") for file in (path / part).iterdir())
    peak_mib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    lines = [
        f"# A store of {options.samples:,} samples: its index, {today:%Y-%m-%d}",
        f"Command: `python -m benchmarks.store --samples {options.samples} --rounds {options.rounds}`. {hardware()}; "
        f"pyarrow {pa.__version__}.",
        f"{num_files} index files of {num_bytes / 2**20:.0f} MiB together; peak memory of the process {peak_mib:.0f} MiB.",
        "| operation | median ms | slowest ms |\n|---|---|---|\n"
        + "\n".join(f"| {name} | {statistics.median(values):.1f} | {max(values):.1f} |" for name, values in rows.items()),
        "Not claimed: reading or writing of large tensors, a network disk, a cold page cache.",
    ]
    out = options.out or RESULTS / f"store_cpu_{today:%Y%m}.md"
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text("\n\n".join(lines) + "\n", encoding="utf-8")
    print(out.read_text(encoding="utf-8"))


def make(path: Path, num_shards: int) -> None:
    """Makes the folder as that many appends would have left it, each sample with a reward that came later."""
    store = RolloutStore(path)
    for number in range(num_shards):
        (path / "shards" / f"{number:08d}.safetensors").touch()
    first = 0
    while first < num_shards:
        span = FAN_IN ** max(power for power in range(8) if first % FAN_IN**power == 0 and first + FAN_IN**power <= num_shards)
        keys = [number * MAX_ROWS + row for number in range(first, first + span) for row in range(GROUP)]
        store._index._write(first, first + span - 1, _samples(keys))
        values = [(key * 7919) % 1000 / 1000 for key in keys]
        later = {"key": keys, "name": ["reward"] * len(keys), "value": values, "text": [None] * len(keys)}
        store._notes._write(first, first + span - 1, pa.Table.from_pydict(later, schema=NOTES))
        first += span


def _samples(keys: list[int]) -> pa.Table:
    shards = [key // MAX_ROWS for key in keys]
    count = len(keys)
    columns = {
        "key": keys,
        "request_id": [f"{shard * 2654435761 % 2**32:08x}" for shard in shards],
        "prompt": [f"a photo of {shard % PROMPTS} red foxes in the snow, in the evening light, 35 mm film" for shard in shards],
        "seed": [key % 2**32 for key in keys],
        "weight_version": [str(shard * VERSIONS // 62_500) for shard in shards],
        **dict.fromkeys(("family",), ["qwen_image"] * count),
        **dict.fromkeys(("variant",), ["base"] * count),
        **dict.fromkeys(("sde_type",), ["sde"] * count),
        **dict.fromkeys(("noise_level",), [0.7] * count),
        **dict.fromkeys(("guidance_scale",), [4.0] * count),
        **dict.fromkeys(("num_inference_steps",), [20] * count),
        **dict.fromkeys(("height", "width"), [1024] * count),
        **dict.fromkeys(("image_format",), ["tensor"] * count),
        **dict.fromkeys(("lora", "policy", "note"), [None] * count),
        "mean_log_prob": [random.Random(key).random() for key in keys],
        "num_bytes": [66_000_000] * count,
        "written_at": [float(shard) for shard in shards],
        "rewards": [[]] * count,
    }
    return pa.Table.from_pydict(columns, schema=SAMPLES)


def measure(path: Path, rounds: int) -> dict[str, list[float]]:
    """Milliseconds of each operation in each round."""
    store = RolloutStore(path)
    prompt = f"a photo of {PROMPTS // 2} red foxes in the snow, in the evening light, 35 mm film"
    group = [make_rollout(family="z_image", height=64, width=64, steps=4, seed=seed) for seed in range(GROUP)]
    found = store.select()
    assert len(found) == len(store) and len(store.select(prompt=prompt)) > 0
    operations: dict[str, Callable[[], object]] = {
        "open for reading, and count": lambda: len(RolloutStore(path, read_only=True)),
        "open for writing": lambda: RolloutStore(path),
        "select all": store.select,
        "select by prompt": lambda: store.select(prompt=prompt),
        "select by version and reward": lambda: store.select(weight_version="250", min_reward=0.9),
        "select by part of a prompt": lambda: store.select(prompt_contains="2048 RED"),
        "the rewards of all": lambda: found.rewards(),
        "what the index says of the first 1,000": lambda: list(found[:1000].samples()),
        "append a group of 16 (64 x 64 pixels)": lambda: store.append(group),
        "add 16 rewards": lambda: store.add_rewards({f"{len(found) // GROUP:06d}-{row:03d}": 0.5 for row in range(GROUP)}),
    }
    times: dict[str, list[float]] = {}
    for name, act in operations.items():
        # Of appends so many that a file of the index is joined.
        count = rounds * (1 if not name.startswith(("append", "add")) else 2 * FAN_IN)
        times[name] = []
        for _ in range(count):
            started_s = time.perf_counter()
            act()
            times[name].append((time.perf_counter() - started_s) * 1000)
    return times


if __name__ == "__main__":
    main()
