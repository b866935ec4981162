"""flowroll as an engine of UniRL: its own types, verifier, noise recipe and replay, on tiny checkpoints.

It runs where unirl is importable (the wheel unpacked on PYTHONPATH, with Ray).
"""

import socket
import types
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import SD3Transformer2DModel
from tests.adapters import policy
from tests.pickling import pushed, trainer
from tests.serving.servers import serving
from torch.distributed import TCPStore  # type: ignore[attr-defined]

from flowroll import Client, replay
from flowroll.engine import Engine
from flowroll.engine.service import EngineService
from flowroll.errors import InvalidRequestError
from flowroll.parallel.broadcasting import BroadcastGroup

pytest.importorskip("ray", reason="ray is not installed")
pytest.importorskip("unirl", reason="unirl is not installed")

from unirl.rollout.engine.base import BaseRolloutEngine
from unirl.rollout.engine.sigma_verify import verify_engine_used_sigmas
from unirl.sde.kernels import CPSSDEStrategy, DanceSDEStrategy, FlowSDEStrategy
from unirl.sde.noise import derive_denoise_step_seed
from unirl.sde.runtime import get_sigma_schedule
from unirl.types.noise_recipe import NoiseRecipe
from unirl.types.primitives import Texts
from unirl.types.sample import Part, Sample
from unirl.types.sampling import DiffusionSamplingParams

from flowroll.integrations.unirl import FlowrollEngineConfig, FlowrollRolloutEngine
from flowroll.integrations.unirl.samples import fold_seed, pack_latents, unpack_latents

PROMPTS = ["a red circle", "a blue square"]
STRATEGIES = {"flow": FlowSDEStrategy(), "cps": CPSSDEStrategy(), "dance": DanceSDEStrategy()}


@pytest.fixture(scope="module")
def checkpoint(checkpoints: dict[str, Path]) -> Path:
    return checkpoints["sd3"]


@pytest.fixture(scope="module")
def server(checkpoint: Path) -> Iterator[Any]:
    with (
        Engine(checkpoint, device="cpu") as engine,
        EngineService(engine, max_queue=8) as service,
        serving(service, allow_pickle_weights=True) as client,
    ):
        yield client


@pytest.fixture
def engine_of(server: Any) -> Iterator[Any]:
    made: list[FlowrollRolloutEngine] = []

    def make(strategy: str | None = "flow") -> FlowrollRolloutEngine:
        config = FlowrollEngineConfig(url=str(server.base_url))
        made.append(config.make_engine(strategy=STRATEGIES.get(strategy or ""), device=torch.device("cpu"), rank=0))
        return made[-1]

    yield make
    for engine in made:
        engine.shutdown()


def request(**changes: Any) -> Sample:
    """Two prompts with two samples each."""
    params: dict[str, Any] = {
        "samples_per_prompt": 2,
        "num_inference_steps": 4,
        "guidance_scale": 4.0,
        "height": 64,
        "width": 64,
        "seed": 42,
        "eta": 0.7,
        "sigmas": get_sigma_schedule(4, 3.0),
        "init_noise_latent_shape": [16, 8, 8],
        **changes,
    }
    root = Part.input(["p0", "p1"], primitives={"text": Texts(texts=PROMPTS)})
    return Sample(parts=[root]).fork(2, sampling_params=DiffusionSamplingParams(**params))


def replayed(checkpoint: Path, sample: Sample, strategy: str, steps: list[int] | None = None, transformer: Any = None) -> Any:
    """UniRL's own replay of the last part, with the transformer of the checkpoint."""
    stages = pytest.importorskip("unirl.models.sd3.diffusion", reason="unirl's models cannot be imported")
    from unirl.models.sd3.conditions import SD3Conditions

    if transformer is None:
        transformer = SD3Transformer2DModel.from_pretrained(checkpoint / "transformer")
        replay.align_weights(transformer)
    bundle = types.SimpleNamespace(transformer=transformer, device=torch.device("cpu"))
    stage = stages.SD3DiffusionStage(
        model=bundle,
        step=stages.SD3DiffusionStep(),
        strategy=STRATEGIES[strategy],
        autocast_precision="fp32",
        trajectory_precision="fp32",
    )
    part = sample.parts[-1]
    conditions = SD3Conditions(text=part.conditions["text"], negative_text=part.conditions.get("negative_text"))
    with torch.no_grad():
        return stage.replay(conditions, segment=part.segment, params=part.sampling_params, step_indices=steps)


def test_it_is_an_engine_of_unirl(engine_of: Any) -> None:
    engine = engine_of()
    assert isinstance(engine, BaseRolloutEngine) and engine.component_name() == "flowroll"
    assert engine.health_check() and not engine.is_offloaded


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_unirls_own_replay_gives_the_rollouts_log_probs(strategy: str, engine_of: Any, checkpoint: Path) -> None:
    """The ratio of UniRL's trainer is 1 to the rounding of its formula: it computes the forwards of all samples in one."""
    filled = engine_of(strategy).generate(request(eta=0.5))
    segment = filled.parts[-1].segment
    steps = segment.sde_indices.tolist()[: 3 if strategy == "cps" else 4]  # CPS ends without noise
    result = replayed(checkpoint, filled, strategy, steps)
    assert segment.sde_logp.shape == (4, 4) and segment.latents.shape == (4, 5, 16, 8, 8)
    ratio = (result.log_probs - segment.sde_logp[:, steps]).exp()
    torch.testing.assert_close(ratio, torch.ones_like(ratio), rtol=0, atol=2e-5)
    # What is compared is no constant: other latents have other log-probs.
    assert segment.sde_logp[:, steps].unique().numel() == segment.sde_logp[:, steps].numel()


def test_flowrolls_replay_of_the_same_request_is_exact(engine_of: Any, server: Any, checkpoint: Path) -> None:
    sample = request(samples_per_prompt=1)
    engine = engine_of()
    filled = engine.generate(sample)
    asked = engine._requests(sample)
    with Client(str(server.base_url)) as client:
        rollouts = [rollout for one in asked for rollout in client.rollout(**one)]
    transformer = SD3Transformer2DModel.from_pretrained(checkpoint / "transformer")
    replay.align_weights(transformer)
    segment = filled.parts[-1].segment
    for row, rollout in enumerate(rollouts):
        assert torch.equal(rollout.dit_trajectory.latents, segment.latents[row])
        assert torch.equal(rollout.log_probs, segment.sde_logp[row])
    for batch in replay.micro_batches(transformer, rollouts, micro_batch=4):
        assert (replay.ratio(batch.log_probs, batch.old_log_probs) == 1).all()


def test_the_drivers_sigmas_are_used_verbatim_and_echoed(engine_of: Any) -> None:
    sigmas = torch.tensor([0.97, 0.811, 0.4999, 0.123, 0.0])
    segment = engine_of().generate(request(sigmas=sigmas)).parts[-1].segment
    assert torch.equal(segment.sigmas, sigmas)
    verify_engine_used_sigmas(segment.sigmas, expected=sigmas, engine_name="flowroll")
    with pytest.raises(RuntimeError, match="mismatch"):
        verify_engine_used_sigmas(segment.sigmas, expected=sigmas.roll(1), engine_name="flowroll")


def test_without_sigmas_and_model_there_is_an_error(engine_of: Any) -> None:
    with pytest.raises(InvalidRequestError, match="sigmas must be pinned"):
        engine_of().generate(request(sigmas=None))


@pytest.mark.parametrize("share", [False, True])
def test_the_noise_recipe_is_realized_exactly(share: bool, engine_of: Any) -> None:
    sample = request(init_same_noise=share)
    start = NoiseRecipe.from_sample(sample).resolve()
    latents = engine_of().generate(sample).parts[-1].segment.latents_at(0)
    assert torch.equal(latents, start)
    assert torch.equal(latents[0], latents[1]) == share


def test_without_a_recipe_samples_that_share_noise_do_so(engine_of: Any) -> None:
    engine = engine_of()
    own, shared = (
        engine.generate(request(init_noise_latent_shape=None, init_same_noise=share)).parts[-1].segment.latents_at(0)
        for share in (False, True)
    )
    assert not torch.equal(own[0], own[1])
    assert torch.equal(shared[0], shared[1]) and not torch.equal(shared[0], shared[2])


def test_the_noise_of_steps_is_keyed_by_the_sample_alone(engine_of: Any) -> None:
    engine = engine_of()
    sample = request(init_same_noise=True)
    whole = engine.generate(sample).parts[-1]
    assert not torch.equal(whole.segment.latents[0, 1], whole.segment.latents[1, 1])
    gen = sample.parts[-1]
    part = sample.replace_frontier(gen.slice(1, 3))
    assert torch.equal(engine.generate(part).parts[-1].segment.latents, whole.segment.latents[1:3])
    for sample_id, notes in zip(whole.sample_ids, whole.metadata, strict=True):
        seed = derive_denoise_step_seed(42, 0, sample_id)
        assert notes["flowroll"]["unfolded_sde_seed"] == seed
        assert notes["flowroll"]["sde_seed"] == fold_seed(seed) == seed % 2**32


def test_a_window_keeps_the_states_that_replay_needs(engine_of: Any, checkpoint: Path) -> None:
    filled = engine_of().generate(request(sde_indices=[2, 1]))
    segment = filled.parts[-1].segment
    assert segment.indices.tolist() == [1, 2, 3, 4] and segment.sde_indices.tolist() == [1, 2]
    assert segment.sde_logp.shape == (4, 2)
    ratio = (replayed(checkpoint, filled, "flow").log_probs - segment.sde_logp).exp()
    torch.testing.assert_close(ratio, torch.ones_like(ratio), rtol=0, atol=2e-5)


def test_a_forward_process_has_no_log_probs(engine_of: Any) -> None:
    segment = engine_of(None).generate(request(sde_indices=[])).parts[-1].segment
    assert segment.sde_logp is None and segment.indices.tolist() == [4]


def test_pictures_and_versions_come_with_it(engine_of: Any) -> None:
    engine = engine_of()
    engine.set_version(7)
    part = engine.generate(request()).parts[-1]
    pictures = part.primitives["image"].to_list()
    assert len(pictures) == 4 and pictures[0].pixels.shape == (3, 64, 64)
    assert part.output_version == 7 and part.metadata[0]["flowroll"]["weight_version"] == "0"


@pytest.mark.parametrize(
    ("changes", "strategy", "message"),
    [
        ({"distilled_guidance_scale": 3.5}, "flow", "distilled_guidance_scale must be left out"),
        ({"sampler_kwargs": {"magic": 1}}, "flow", "sampler_kwargs must hold"),
        ({"sigmas": torch.tensor([1.0, 0.0])}, "flow", "sigmas must be 5 values"),
        ({}, None, "strategy must be one of"),
        ({"eta": 0.0}, "flow", "eta must be above 0"),
        ({"init_noise_latent_shape": [16, 64]}, "flow", "x_T must be"),
        ({"init_noise_latent_shape": [16, 4, 4]}, "flow", "latents must"),
    ],
)
def test_what_is_not_offered_is_refused(changes: dict[str, Any], strategy: str | None, message: str, engine_of: Any) -> None:
    with pytest.raises(InvalidRequestError, match=message):
        engine_of(strategy).generate(request(**changes))


def test_sleep_and_wake(engine_of: Any) -> None:
    engine = engine_of()
    before = engine.generate(request()).parts[-1].segment.latents
    engine.sleep()
    assert engine.is_offloaded
    engine.onload_weights()
    assert not engine.is_offloaded
    assert torch.equal(engine.generate(request()).parts[-1].segment.latents, before)


@pytest.fixture
def scaled(checkpoint: Path, server: Any) -> Iterator[dict[str, torch.Tensor]]:
    """Other weights; the server has its own again when the test ends."""
    own = SD3Transformer2DModel.from_pretrained(checkpoint / "transformer").state_dict()
    yield {name: tensor * 1.01 if tensor.is_floating_point() else tensor for name, tensor in own.items()}
    with Client(str(server.base_url)) as client:
        client.update_weights(own)


def expected_latents(checkpoint: Path, weights: dict[str, torch.Tensor], asked: list[dict[str, Any]]) -> torch.Tensor:
    with Engine(checkpoint, device="cpu") as engine:
        engine.update_weights_from_tensors(weights)
        found = [rollout for one in asked for rollout in engine.rollout(**one)]
    return torch.stack([rollout.dit_trajectory.latents for rollout in found])


def test_weights_of_the_tensor_sync_are_those_of_a_fresh_engine(
    engine_of: Any, checkpoint: Path, scaled: dict[str, torch.Tensor]
) -> None:
    engine, sample = engine_of(), request(samples_per_prompt=1)
    with trainer():
        for body, _ in pushed(scaled, version="unirl", bucket_bytes=1 << 20, num_ranks=1):
            engine.update_weights_from_tensor(
                serialized_named_tensors=body["serialized_named_tensors"],
                load_format=body["load_format"],
                target_modules=["transformer"],
            )
    expected = expected_latents(checkpoint, scaled, engine._requests(sample))
    assert torch.equal(engine.generate(sample).parts[-1].segment.latents, expected)


def test_weights_of_the_group_sync_are_those_of_a_fresh_engine(
    engine_of: Any, checkpoint: Path, scaled: dict[str, torch.Tensor]
) -> None:
    """The trainer is rank 0, the server one member; buckets of names are announced, then broadcast one by one."""
    engine, sample = engine_of(), request(samples_per_prompt=1)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = int(free.getsockname()[1])
    place: dict[str, Any] = {"master_address": "127.0.0.1", "master_port": port, "world_size": 2, "backend": "gloo"}
    store = TCPStore("127.0.0.1", port, 2, True, wait_for_workers=False)
    with ThreadPoolExecutor(1) as thread:
        joining = thread.submit(engine.init_weights_update_group, rank_offset=1, group_name="unirl", **place)
        with BroadcastGroup(
            "unirl",
            rank=0,
            world_size=2,
            backend="gloo",
            address="127.0.0.1",
            port=port,
            device="cpu",
            timeout_s=20.0,
            store=store,
        ) as group:
            joining.result()
            items = list(scaled.items())
            for bucket in (items[::2], items[1::2]):
                receiving = thread.submit(
                    engine.update_weights_from_distributed,
                    names=[name for name, _ in bucket],
                    dtypes=[str(tensor.dtype).removeprefix("torch.") for _, tensor in bucket],
                    shapes=[list(tensor.shape) for _, tensor in bucket],
                    group_name="unirl",
                    target_modules=["transformer"],
                )
                for _, tensor in bucket:
                    group.broadcast(tensor)
                receiving.result()
            engine.destroy_weights_update_group(group_name="unirl")
    expected = expected_latents(checkpoint, scaled, engine._requests(sample))
    assert torch.equal(engine.generate(sample).parts[-1].segment.latents, expected)


def test_lora_tensors_of_unirl_are_the_adapter_of_later_rollouts(
    engine_of: Any, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    merge = pytest.importorskip("unirl.utils.peft_merge", reason="unirl's tools cannot be imported")
    # It gathers shards on a GPU; here there are none.
    monkeypatch.setattr(merge, "_to_full_tensor", lambda parameter, dtype: parameter.to(dtype))
    engine, sample = engine_of(), request(samples_per_prompt=1)
    plain = engine.generate(sample).parts[-1].segment
    model = policy(SD3Transformer2DModel.from_pretrained(checkpoint / "transformer"), targets=["to_q", "to_v"])
    tensors = merge.extract_lora_tensors(model, dtype=torch.bfloat16)
    engine.set_lora_from_tensors("actor", tensors, peft_config=model.peft_config["default"].to_dict())
    filled = engine.generate(sample)
    segment = filled.parts[-1].segment
    assert not torch.equal(segment.latents[:, -1], plain.latents[:, -1])
    # A trainer that is to replay it has its factors in the dtype in which they were sent.
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.to(torch.bfloat16)
    # The adapter is so strong that the rounding of a forward of all samples shows more.
    result = replayed(checkpoint, filled, "flow", transformer=model)
    ratio = (result.log_probs - segment.sde_logp).exp()
    torch.testing.assert_close(ratio, torch.ones_like(ratio), rtol=0, atol=5e-4)
    with Client(engine.cfg.url) as client:
        rollouts = [rollout for one in engine._requests(sample) for rollout in client.rollout(**one)]
    replay.align_weights(model)
    for batch in replay.micro_batches(model, rollouts, micro_batch=4):
        assert (replay.ratio(batch.log_probs, batch.old_log_probs) == 1).all()


def test_packed_latents_go_there_and_back() -> None:
    plain = torch.randn(2, 16, 8, 8)
    packed = pack_latents(plain, 64, 64, packed=True)
    assert packed.shape == (2, 16, 64)
    assert torch.equal(unpack_latents(packed[:, None], 64, 64)[:, 0], plain)
    theirs = pytest.importorskip("unirl.models.qwen_image.diffusion", reason="unirl's models cannot be imported")
    assert torch.equal(theirs._unpack_latents(packed, latent_h=8, latent_w=8).reshape(2, 16, 8, 8), plain)


def test_channels_of_other_engines_say_what_to_use(engine_of: Any) -> None:
    with pytest.raises(NotImplementedError, match="update_weights_from_tensor"):
        engine_of().update_weights_from_ipc()
    with pytest.raises(InvalidRequestError, match="peft_config"):
        engine_of().set_lora_from_tensors("a", {})
