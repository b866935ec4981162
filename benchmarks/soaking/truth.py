"""The same request run alone, in this process, and the comparison with it."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from benchmarks.soaking.asks import Ask
from flowroll.engine import Engine
from flowroll.parity.compare import compare_rollouts
from flowroll.types import GeneratedImage, Rollout


class Truth:
    """Engines beside the server, one for each set of weights that it may have. One comparison at a time.

    Args:
        checkpoints: Folders by the first letter of the weights' version.
    """

    def __init__(self, checkpoints: Mapping[str, Path]) -> None:
        # The thread count shapes the bits of a CPU; the servers run with one thread.
        self._thread = ThreadPoolExecutor(1, initializer=torch.set_num_threads, initargs=(1,))
        self._engines = {letter: Engine(folder, device="cpu") for letter, folder in checkpoints.items()}

    def close(self) -> None:
        """Frees the models."""
        self._thread.shutdown()
        for engine in self._engines.values():
            engine.close()

    async def differences(self, ask: Ask, sample: Rollout | GeneratedImage) -> list[str]:
        """The tensors of a sample that are not those of the request run alone; none: every bit is equal."""
        return await asyncio.get_running_loop().run_in_executor(self._thread, self._differences, ask, sample)

    def _differences(self, ask: Ask, sample: Rollout | GeneratedImage) -> list[str]:
        engine = self._engines[sample.weight_version[0]]
        if isinstance(sample, Rollout):
            (alone,) = engine.rollout(**ask.alone(sample.seed))
            compared = compare_rollouts(sample.sampling.sde_type, [alone], [sample])
            return [entry.name for entry in compared if not entry.whole.equal]
        (image,) = engine.generate(**ask.alone(sample.seed))
        return [
            name
            for name in ("image", "latents")
            if not torch.equal(getattr(image, name), getattr(sample, name))
            or getattr(image, name).dtype != getattr(sample, name).dtype
        ]
