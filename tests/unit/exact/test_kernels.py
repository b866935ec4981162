"""torch's settings: what one function puts them to, and who calls it."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from flowroll import replay
from flowroll.engine import Engine
from flowroll.engine.runner import worker
from flowroll.engine.runner.rank_group import RankConfig
from flowroll.exact import use_exact_kernels
from flowroll.exact.findings import Findings
from flowroll.testing import make_checkpoint
from flowroll.types import Layout

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)


@pytest.fixture(autouse=True)
def a_trainers_settings() -> Iterator[None]:
    """What trainers set for speed, before flowroll is called."""
    matmul, cuda, cudnn = torch.backends.cuda.matmul, torch.backends.cuda, torch.backends.cudnn
    before = matmul.allow_bf16_reduced_precision_reduction, matmul.allow_bf16_reduced_precision_reduction_split_k
    flags = cudnn.allow_tf32, cudnn.deterministic, cudnn.benchmark
    torch.set_float32_matmul_precision("high")
    matmul.allow_bf16_reduced_precision_reduction = (True, True)
    cudnn.allow_tf32, cudnn.deterministic, cudnn.benchmark = True, False, True
    cuda.enable_cudnn_sdp(True)
    yield
    torch.set_float32_matmul_precision("highest")
    matmul.allow_bf16_reduced_precision_reduction = before
    cudnn.allow_tf32, cudnn.deterministic, cudnn.benchmark = flags
    cuda.enable_cudnn_sdp(True)


def test_products_on_cuda_are_not_split_and_attention_has_one_kernel() -> None:
    """A build of torch without CUDA keeps the settings too, but for the choice of the product library."""
    kernels = use_exact_kernels(CUDA)
    matmul, cuda, cudnn = torch.backends.cuda.matmul, torch.backends.cuda, torch.backends.cudnn
    assert (matmul.allow_bf16_reduced_precision_reduction, matmul.allow_bf16_reduced_precision_reduction_split_k) == (
        False,
    ) * 2
    assert not matmul.allow_tf32
    assert (cudnn.allow_tf32, cudnn.deterministic, cudnn.benchmark) == (False, True, False)
    assert not cuda.cudnn_sdp_enabled() and cuda.flash_sdp_enabled() and cuda.mem_efficient_sdp_enabled()
    assert kernels.settings["split_k"] == "off"
    assert ("blas" in kernels.settings) == torch.cuda.is_available()


def test_the_name_is_that_of_hardware_versions_and_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    name = use_exact_kernels(CPU).name
    assert use_exact_kernels(CPU).name == name
    assert use_exact_kernels(CUDA).name != name
    monkeypatch.setenv("MKL_CBWR", "AVX2")
    assert use_exact_kernels(CPU).name != name


def test_an_engine_and_replay_put_a_trainers_settings_back(z_image_checkpoint: Path) -> None:
    with Engine(z_image_checkpoint, device="cpu") as engine:
        assert torch.get_float32_matmul_precision() == "highest"
        rollouts = engine.rollout(
            "a cat",
            seed=1,
            height=64,
            width=64,
            num_inference_steps=2,
            return_dit_trajectory=True,
            return_denoising_env=True,
        )
        torch.set_float32_matmul_precision("high")
        with torch.no_grad():
            found = replay.log_prob(engine._model.transformer, rollouts)
    assert torch.get_float32_matmul_precision() == "highest"
    assert torch.equal(found[0], rollouts[0].log_probs)


def test_a_rank_puts_them_back_before_it_loads(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_mesh(*_: object, **__: object) -> None:
        raise ConnectionError

    class NoChannel:
        def __init__(self, *_: object, **__: object) -> None: ...
        def __getattr__(self, name: str) -> Any:
            return lambda *_: None

    monkeypatch.setattr(worker, "Channel", NoChannel)
    monkeypatch.setattr(worker, "second_connection", lambda _: None)
    monkeypatch.setattr(worker, "PrefixStore", lambda *_: None)
    monkeypatch.setattr(worker, "Mesh", no_mesh)
    config = RankConfig(
        model="", variant="", dtype="float32", device="cpu", layout=Layout(sp=2), timeout_s=1.0, num_threads=1, rank=1
    )
    with pytest.raises(ConnectionError):
        worker.run_worker(config, None, CPU)  # type: ignore[arg-type]
    assert torch.get_float32_matmul_precision() == "highest"


def test_replay_names_other_kernels_than_the_engines(tmp_path: Path) -> None:
    """Weights that have hardly moved look like other kernels; where the certificates differ, the audit says so."""
    folder = make_checkpoint("z_image", tmp_path)
    request: dict[str, Any] = {"height": 64, "width": 64, "num_inference_steps": 2}
    with Engine(folder, device="cpu") as engine:
        (one,) = engine.rollout(
            "a cat", seed=1, return_dit_trajectory=True, return_denoising_env=True, rollout_debug_mode=True, **request
        )
        transformer = engine._model.transformer
        with torch.no_grad():
            weight = max(transformer.parameters(), key=torch.numel)
            weight.mul_(1 + 1e-6)
        assert one.provenance is not None
        elsewhere = replace(one, provenance=replace(one.provenance, certificate="elsewhere"))
        for rollout, is_named in ((one, False), (elsewhere, True)):
            (audited,) = replay.audit(transformer, [rollout]).rollouts
            (cause,) = audited.causes
            assert cause.kind == "kernels"
            assert ("certificate elsewhere" in cause.message) == is_named


def test_an_engine_names_its_certificate_in_every_record_and_keeps_it(z_image_checkpoint: Path, tmp_path: Path) -> None:
    request: dict[str, Any] = {"height": 64, "width": 64, "num_inference_steps": 1}
    with Engine(z_image_checkpoint, device="cpu", cache_dir=tmp_path) as engine:
        (one,) = engine.rollout("a cat", seed=1, **request)
        assert one.provenance is not None
        assert one.provenance.certificate == engine.info.certificate.name == use_exact_kernels(CPU).name
    later = Findings()
    assert later.load(tmp_path, use_exact_kernels(CPU), CPU)
    assert len(later) >= engine.info.certificate.num_asked > 0
