"""The process of a rank that rank 0 starts on its own machine: `python -m flowroll.engine.runner`."""

from __future__ import annotations

import logging
import os
import time

import msgspec
import torch

from flowroll.engine.runner.rank_group import RankConfig
from flowroll.engine.runner.worker import run_worker
from flowroll.parallel.processes import read_configuration
from flowroll.parallel.rendezvous import join_store, rank_device

# How long the end of this process takes after that of rank 0, whose connections end a little earlier.
_ORPHAN_S = 0.5


def main() -> None:
    """Runs the worker until rank 0 stops it. The configuration is the first line of standard input."""
    config = msgspec.json.decode(read_configuration(), type=RankConfig)
    assert config.port is not None
    logging.basicConfig(level=logging.WARNING, format=f"%(asctime)s rank {config.rank} %(levelname)s %(name)s: %(message)s")
    torch.set_num_threads(config.num_threads)
    try:
        run_worker(config, join_store(config.port), rank_device(torch.device(config.device), config.rank))
    except Exception:
        # If rank 0 has ended, this process does not come back from here: that was no error of this rank.
        time.sleep(_ORPHAN_S)
        logging.getLogger(__name__).exception("this rank cannot go on")
        # `os._exit`, because an ordinary exit could wait for threads of a broken process group.
        os._exit(1)
    # Here too: an ordinary exit would wait for the thread that reads standard input.
    os._exit(0)


if __name__ == "__main__":
    main()
