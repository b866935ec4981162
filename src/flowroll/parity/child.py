"""The process of one layout: `python -m flowroll.parity.child`. One engine runs every mode; rollouts go to files.

Its specification is the first line of standard input. When that input ends, because the harness has ended in whatever way,
this process ends too, and its ranks with it.
"""

from __future__ import annotations

import logging
import os
from dataclasses import replace
from pathlib import Path

import torch

from flowroll.engine import Engine
from flowroll.errors import FlowrollError
from flowroll.parallel.processes import read_configuration
from flowroll.parity.exchange import ChildSpec, Facts, decode_spec, rollout_file, write_facts
from flowroll.parity.machine import describe_machine, describe_versions
from flowroll.wire.files import save_rollout


def main() -> None:
    """Reads the specification, runs it, and ends with status 0, or 1 where it failed."""
    run_layout(decode_spec(read_configuration()))


def run_layout(spec: ChildSpec) -> None:
    """Runs every mode of one layout. An error becomes a fact, beside the modes that were done before it."""
    logging.basicConfig(level=logging.WARNING)
    torch.set_num_threads(spec.num_threads)
    facts = Facts()
    try:
        with Engine(
            spec.model,
            variant=spec.variant,
            dtype=spec.dtype,
            device=spec.device,
            layout=spec.layout,
            rank_timeout_s=spec.rank_timeout_s,
        ) as engine:
            facts = _start_facts(engine)
            for mode in spec.requests:
                facts = _run_mode(engine, spec, mode, facts)
                write_facts(Path(spec.folder), facts)
    except Exception as error:
        logging.getLogger(__name__).exception("this layout cannot go on")
        known = isinstance(error, FlowrollError)
        message = str(error) if known else f"{type(error).__name__}: {error}"
        write_facts(Path(spec.folder), replace(facts, error=message))
        # Not an exit: threads of a broken process group could keep the process.
        os._exit(1)


def _start_facts(engine: Engine) -> Facts:
    return Facts(
        parameters=engine.info.parameters,
        transformer_bytes=engine.info.transformer_bytes,
        versions=describe_versions(engine.info.versions),
        machine=describe_machine(torch.device(engine.info.device)),
    )


def _run_mode(engine: Engine, spec: ChildSpec, mode: str, facts: Facts) -> Facts:
    """Saves one mode's rollouts; returns the facts with what it took."""
    before = dict(engine.received_bytes)
    rollouts = engine.rollout(spec.requests[mode])
    received = {axis: count - before.get(axis, 0) for axis, count in engine.received_bytes.items()}
    for rollout in rollouts:
        save_rollout(rollout_file(Path(spec.folder), mode, rollout.seed), rollout)
    return replace(
        facts,
        received_bytes={**facts.received_bytes, mode: received},
        seeds={**facts.seeds, mode: tuple(rollout.seed for rollout in rollouts)},
    )


if __name__ == "__main__":
    main()
