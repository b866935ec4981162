"""Encoding and decoding of one large answer, beside the usual way of doing it: time and memory.

`python -m benchmarks.wire`: a 50-step sample of 1024 x 1024 with everything recorded. The peer makes a safetensors blob of
every tensor with the library's own `save`, puts the blobs into the answer and encodes that; it decodes with msgspec and the
library's `load`. Warm: arms in turn in one process. Fresh: every measurement in a process of its own, in memory that
nobody touched.
"""

from __future__ import annotations

import argparse
import datetime
import gc
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import msgspec
import safetensors.torch
import torch
from tests.factories import make_rollout
from torch import Tensor

from benchmarks.measure import hardware, paired_times, ratio
from flowroll.types import Rollout
from flowroll.wire.codec import WireFormat, decode_rollouts, encode_rollouts
from flowroll.wire.dialects import rollout_to_wire

RESULTS = Path(__file__).parent / "results"
STEPS, SIZE, TEXT_TOKENS = 50, 1024, 40
FORMATS: tuple[WireFormat, ...] = ("msgpack", "json")
CONTENT_TYPES: Mapping[str, str] = {"msgpack": "application/msgpack", "json": "application/json"}
WAYS = ("flowroll", "peer")
MIB = 2**20


def main() -> None:
    """Measures, or, in a process of its own, takes one fresh measurement."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=15, help="warm rounds")
    parser.add_argument("--fresh", type=int, default=7, help="fresh processes an arm")
    parser.add_argument("--out", type=Path, default=None, help="result file")
    parser.add_argument("--arm", nargs=3, default=None, help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.arm:
        print(json.dumps(_fresh(*options.arm)))
        return
    today = datetime.datetime.now(datetime.UTC)
    out = options.out or RESULTS / f"wire_cpu_{today:%Y%m}.md"
    rollout = _sample()
    payload = _payload(rollout)
    lines = [
        f"# Bytes of one large answer, {today:%Y-%m-%d}",
        f"Command: `python -m benchmarks.wire --rounds {options.rounds} --fresh {options.fresh}`. {hardware()}; one thread. "
        f"{STEPS} steps, {SIZE} x {SIZE}, everything recorded: {payload / MIB:.0f} MiB of tensors.",
        "Time: CPU time; median of paired ratios to the peer with its 95 % interval (warm), ratio of medians (fresh). Memory: "
        "how far the peak of resident memory rises above what the tensors (encoding) or the body (decoding) take, as a share "
        "of the payload; of fresh processes. Encoding includes making every chunk that is sent.",
        "Not claimed: absolute times (the machine is shared).",
        _table(rollout, payload, options.rounds, options.fresh),
        "Aims: msgpack at most 1/2 of the usual way warm, 1/3 fresh; memory at most 10 % of the payload. In JSON a client must "
        "hold the tensors beside the text that it has received.",
    ]
    out.write_text("\n\n".join(lines) + "\n", encoding="utf-8")
    print(out.read_text(encoding="utf-8"))


def _table(rollout: Rollout, payload: int, rounds: int, fresh: int) -> str:
    lines = [
        "| direction | format | warm ratio | warm ms (ours, peer) | fresh ratio | fresh ms (ours, peer)"
        " | extra memory (ours, peer) |",
        "|---|---|---|---|---|---|---|",
    ]
    for direction in ("encode", "decode"):
        for wire_format in FORMATS:
            arms = {way: _action(direction, wire_format, way, rollout) for way in WAYS}
            times = paired_times(arms, rounds=rounds, warmup=2)
            warm = {way: statistics.median(times[way]) for way in WAYS}
            samples: dict[str, list[dict[str, float]]] = {way: [] for way in WAYS}
            for number in range(fresh):
                for way in WAYS if number % 2 else reversed(WAYS):
                    samples[way].append(_in_a_process(direction, wire_format, way))
            cold = {way: statistics.median(one["seconds"] for one in samples[way]) for way in WAYS}
            extra = {way: statistics.median(one["extra_bytes"] for one in samples[way]) / payload for way in WAYS}
            lines.append(
                f"| {direction} | {wire_format} | {ratio(times['flowroll'], times['peer'])} | {_ms(warm)} | "
                f"{cold['flowroll'] / cold['peer']:.3f} | {_ms(cold)} | {extra['flowroll']:.1%}, {extra['peer']:.1%} |"
            )
    return "\n".join(lines)


def _ms(seconds: Mapping[str, float]) -> str:
    return ", ".join(f"{seconds[way] * 1000:.1f}" for way in WAYS)


def _sample() -> Rollout:
    return make_rollout(steps=STEPS, height=SIZE, width=SIZE, text_tokens=TEXT_TOKENS)


def _payload(value: object) -> int:
    """Bytes of all tensors in the answer."""
    total = 0

    def add(tensor: object) -> None:
        nonlocal total
        assert isinstance(tensor, Tensor)
        total += tensor.nbytes

    msgspec.msgpack.encode(rollout_to_wire(value, "native"), enc_hook=add)  # type: ignore[arg-type]
    return total


def _action(direction: str, wire_format: WireFormat, way: str, rollout: Rollout) -> Callable[[], object]:
    """What is timed. A body to decode is made anew in each call of its maker, before: decoding takes it over."""
    if direction == "encode":
        return (lambda: _encode(rollout, wire_format)) if way == "flowroll" else (lambda: _peer_encode(rollout, wire_format))
    body = bytearray(b"".join(encode_rollouts([rollout], wire_format=wire_format).chunks()))
    if way == "flowroll":
        return lambda: decode_rollouts(body, CONTENT_TYPES[wire_format])
    return lambda: _peer_decode(body, wire_format)


def _encode(rollout: Rollout, wire_format: WireFormat) -> int:
    return sum(len(chunk) for chunk in encode_rollouts([rollout], wire_format=wire_format).chunks())


def _peer_encode(rollout: Rollout, wire_format: WireFormat) -> int:
    def blob(tensor: object) -> dict[str, Any]:
        assert isinstance(tensor, Tensor)
        data = safetensors.torch.save({"t": tensor.contiguous()})
        return {"__tensor__": True, "data": data, "shape": list(tensor.shape), "dtype": str(tensor.dtype)}

    # msgspec writes bytes as base64 text in JSON.
    dump: Callable[..., bytes] = msgspec.json.encode if wire_format == "json" else msgspec.msgpack.encode
    return len(dump([rollout_to_wire(rollout, "native")], enc_hook=blob))


def _peer_decode(body: bytearray, wire_format: WireFormat) -> object:
    import base64

    def tensors(value: Any) -> Any:
        if isinstance(value, dict):
            if value.get("__tensor__"):
                data = base64.b64decode(value["data"]) if wire_format == "json" else value["data"]
                return safetensors.torch.load(data)["t"]
            return {name: tensors(entry) for name, entry in value.items()}
        return [tensors(entry) for entry in value] if isinstance(value, list) else value

    return tensors(msgspec.json.decode(body) if wire_format == "json" else msgspec.msgpack.decode(body))


def _fresh(direction: str, wire_format: WireFormat, way: str) -> dict[str, float]:
    """Seconds and memory of the first time in this process."""
    small = _action(direction, wire_format, way, make_rollout(steps=2))
    small()  # imports and decoders
    action = _action(direction, wire_format, way, _sample())
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # the peak starts anew
    before = _status("VmRSS")
    started_s = time.process_time()
    result = action()
    seconds = time.process_time() - started_s
    del result
    return {"seconds": seconds, "extra_bytes": _status("VmHWM") - before}


def _status(name: str) -> int:
    """Of this process, in bytes."""
    line = next(line for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines() if line.startswith(name))
    return int(line.split()[1]) * 1024


def _in_a_process(direction: str, wire_format: str, way: str) -> dict[str, float]:
    command = [sys.executable, "-m", "benchmarks.wire", "--arm", direction, wire_format, way]
    answer = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    measured: dict[str, float] = json.loads(answer.splitlines()[-1])
    return measured


if __name__ == "__main__":
    main()
