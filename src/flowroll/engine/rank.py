"""The process of a follower that rank 0 starts on its own machine: `python -m flowroll.engine.rank`."""

from __future__ import annotations

import logging
import os

import msgspec
import torch

from flowroll.engine.follower import follow_rank_0
from flowroll.engine.ranks import RankConfig
from flowroll.parallel.processes import read_configuration
from flowroll.parallel.rendezvous import join_store, rank_device


def main() -> None:
    """Follows until rank 0 says stop; the configuration is the first line of standard input."""
    config = msgspec.json.decode(read_configuration(), type=RankConfig)
    assert config.port is not None
    logging.basicConfig(level=logging.WARNING, format=f"%(asctime)s rank {config.rank} %(levelname)s %(name)s: %(message)s")
    torch.set_num_threads(config.num_threads)
    try:
        follow_rank_0(config, join_store(config.port), rank_device(torch.device(config.device), config.rank))
    except Exception:
        logging.getLogger(__name__).exception("this rank cannot go on")
        # Not an exit: threads of a broken process group could keep the process.
        os._exit(1)


if __name__ == "__main__":
    main()
