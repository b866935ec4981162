"""Adapters beside each other, under changing weights, and those that are refused."""

import json
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.adapters import policy, saved
from tests.guiding import PicturedEngine
from tests.rollouts import assert_same_bits
from tests.unit.engine.scheduler.hand import ALL, Hand
from tests.weights import REQUEST, with_other

from flowroll import Rollout, SamplingParams, replay
from flowroll.engine import AdapterLimits, Engine
from flowroll.engine.adapters.patterns import check_patterns
from flowroll.engine.weights.versions import VersionState
from flowroll.errors import InvalidRequestError, OutdatedWeightsError, WeightsRejectedError
from flowroll.families import FAMILIES

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"


@pytest.fixture(scope="module", params=list(FAMILIES))
def engine(request: pytest.FixtureRequest, checkpoints: dict[str, Path], tmp_path_factory: Any) -> Iterator[Engine]:
    """With the adapters "a", "b" and, merged, "m"."""
    folder = tmp_path_factory.mktemp("adapters")
    with PicturedEngine(checkpoints[request.param], device="cpu") as engine:
        for seed, name in enumerate("abm"):
            saved(policy(engine._model.transformer, seed), folder / name)
            engine.load_lora_adapter(folder / name, name=name, merged=name == "m")
        yield engine


@pytest.fixture(scope="module")
def z_image(z_image_checkpoint: Path) -> Iterator[Engine]:
    with Engine(z_image_checkpoint, device="cpu", adapter_limits=AdapterLimits(max_adapters=2)) as engine:
        yield engine


@pytest.fixture
def adapter(z_image: Engine, tmp_path: Path) -> Path:
    """An adapter's folder, to be spoilt."""
    return saved(policy(z_image._model.transformer), tmp_path / "adapter")


@pytest.mark.parametrize("threads", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_samples_of_several_adapters_and_none_have_the_bits_that_they_have_alone(engine: Engine, threads: int) -> None:
    hand = Hand(engine, max_batch_samples=8)
    names = [None, "a", "b", "m", "a", None, "m", "b"]
    requests = [{**ALL, "seed": 10 + place, "lora_name": name} for place, name in enumerate(names)]
    torch.set_num_threads(threads)
    try:
        answers = hand.finish(*hand.begin(*requests))
        alone = [hand.alone(**fields) for fields in requests]
    finally:
        torch.set_num_threads(1)
    for name, (rollout,), (expected,) in zip(names, answers, alone, strict=True):
        assert_same_bits(rollout, expected)
        assert (rollout.sampling.lora.name if rollout.sampling.lora else None) == name
    # Those of one adapter share their forwards, those of several never do.
    assert hand.scheduler.load().batches == {2: 4 * 4}


@pytest.mark.parametrize("how", ["disk", "tensors"])
def test_new_weights_below_reach_every_adapter(how: str, checkpoints: dict[str, Path], engine: Engine, tmp_path: Path) -> None:
    family = engine.info.family
    other = with_other(checkpoints[family], tmp_path / "other")
    adapter = saved(policy(engine._model.transformer, 3), tmp_path / "adapter")
    with PicturedEngine(other, device="cpu") as fresh, PicturedEngine(checkpoints[family], device="cpu") as updated:
        for one, names in ((fresh, ["beside", "merged"]), (updated, ["beside", "merged"])):
            for name in names:
                one.load_lora_adapter(adapter, name=name, merged=name == "merged")
        staged = updated.stage_lora_adapter(_files(adapter), name="staged", merged=True)
        old = updated.rollout(**REQUEST, lora_name="merged")[0]
        if how == "disk":
            updated.update_weights_from_disk(other)
        else:
            updated.update_weights_from_tensors(fresh._model.transformer.state_dict())
        # Read under the old weights, put under the new.
        updated.commit_lora_adapter(staged)
        for name, twin in (("beside", "beside"), ("merged", "merged"), ("staged", "merged")):
            (new,), (expected,) = updated.rollout(**REQUEST, lora_name=name), fresh.rollout(**REQUEST, lora_name=twin)
            assert_same_bits(_without_adapter(new), _without_adapter(expected))
            assert not torch.equal(new.image, old.image)
        assert updated.weights_checksum() == fresh.weights_checksum()


def test_an_update_that_fails_at_its_end_leaves_merged_adapters(
    engine: Engine, checkpoints: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = with_other(checkpoints[engine.info.family], tmp_path / "other")
    (before,) = engine.rollout(**REQUEST, lora_name="m")

    def fail(state: VersionState, name: str) -> None:
        raise MemoryError("no memory left")

    with monkeypatch.context() as patch:
        patch.setattr(VersionState, "after", fail)
        with pytest.raises(MemoryError):
            engine.update_weights_from_disk(other)
    assert_same_bits(engine.rollout(**REQUEST, lora_name="m")[0], before)


def _files(folder: Path) -> Any:
    from flowroll.engine.adapters.files import find_adapter

    return find_adapter(folder)


def _without_adapter(rollout: Rollout) -> Rollout:
    return replace(rollout, sampling=replace(rollout.sampling, lora=None))


def test_an_adapter_is_replaced_at_once_and_every_change_has_a_version(z_image: Engine, tmp_path: Path) -> None:
    transformer = z_image._model.transformer
    first, second = (saved(policy(transformer, seed), tmp_path / str(seed)) for seed in (1, 2))
    start = int(z_image.weight_version)
    loaded = z_image.load_lora_adapter(first, name="p")
    assert (loaded.previous_version, loaded.weight_version) == (str(start), str(start + 1))
    (old,) = z_image.rollout(**REQUEST, lora_name="p")
    swapped = z_image.load_lora_adapter(second, name="p", weight_version="120")
    assert [adapter.version for adapter in z_image.lora_adapters()] == ["120"]
    (new,) = z_image.rollout(**REQUEST, lora_name="p", min_weight_version="120")
    assert (old.weight_version, new.weight_version) == (str(start + 1), "120")
    assert (old.sampling.lora.version, new.sampling.lora.version) == (str(start + 1), "120")
    assert old.sampling.lora.sha256 != new.sampling.lora.sha256 == swapped.adapter.sha256
    assert not torch.equal(old.image, new.image)
    with pytest.raises(OutdatedWeightsError):
        z_image.rollout(**REQUEST, lora_name="p", min_weight_version="121")
    plan = z_image.plan(SamplingParams(**REQUEST, lora_name="p"))
    gone = z_image.unload_lora_adapter("p")
    assert (gone.previous_version, gone.weight_version, gone.adapter) == ("120", "121", None)
    for call in (
        lambda: z_image.plan(SamplingParams(**REQUEST, lora_name="p")),
        lambda: z_image.rollout(**REQUEST, lora_name="p"),
        lambda: z_image.rollout(plan),  # it waited while the adapter went
        lambda: z_image.unload_lora_adapter("p"),
    ):
        with pytest.raises(InvalidRequestError, match="lora_name must be a loaded adapter, of which there is none, got p"):
            call()
    assert z_image.weight_version == "121"


def _edit_config(**values: Any) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        config = json.loads((folder / CONFIG).read_text())
        (folder / CONFIG).write_text(json.dumps(config | values))

    return edit


def _edit_tensors(edit: Callable[[dict[str, torch.Tensor]], Any]) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        tensors = load_file(folder / TENSORS)
        edit(tensors)
        save_file(tensors, folder / TENSORS)

    return change


def _pickled(folder: Path) -> None:
    torch.save(load_file(folder / TENSORS), folder / "adapter_model.bin")
    (folder / TENSORS).unlink()


PLACE = "base_model.model.layers.0.attention.to_q.lora_A.weight"
SPOILT: dict[str, tuple[Callable[[Path], Any], str]] = {
    "another kind": (_edit_config(peft_type="LOHA"), 'peft_type must be LORA, got "LOHA"'),
    "dora": (_edit_config(use_dora=True), "use_dora must be false, got true"),
    "biases": (_edit_config(bias="all"), 'bias must be "none", got "all"'),
    "whole modules": (_edit_config(modules_to_save=["proj"]), "modules_to_save must be null"),
    "an option of a later peft": (_edit_config(use_magic=True), "use_magic must be known to the engine's peft, got true"),
    "a start that changes the weights": (_edit_config(init_lora_weights="pissa"), "init_lora_weights must leave"),
    "no rank": (_edit_config(r=0), "r must be an integer from 1 to 4096, got 0"),
    "a rank of a layer": (_edit_config(rank_pattern={"to_q": "9"}), 'r must be an integer from 1 to 4096, got "9"'),
    "no number for alpha": (_edit_config(lora_alpha=float("nan")), "lora_alpha must be a finite number of at most .*, got NaN"),
    "an alpha beyond floats": (_edit_config(lora_alpha=10**400), "lora_alpha must be a finite number of at most 1e"),
    "an alpha of a layer beyond floats": (_edit_config(alpha_pattern={"to_q": -(10**400)}), "finite number of at most 1e"),
    "layers beyond everything": (_edit_config(layers_to_transform=[10**400]), "must fit ZImageTransformer2DModel"),
    "other ranks": (_edit_config(r=8), r"lora_A.weight as \[8, "),
    "no targets": (_edit_config(target_modules=[]), "target_modules must name linears"),
    "targets that are not there": (_edit_config(target_modules=["nowhere"]), "must fit ZImageTransformer2DModel"),
    "targets that are no linears": (_edit_config(target_modules=["attention_norm1"]), "must fit ZImageTransformer2DModel"),
    "a broken pattern": (_edit_config(target_modules="("), r"must hold regular expressions, got \("),
    "fewer targets than tensors": (_edit_config(target_modules=["to_q"]), "configuration names alone, got others: "),
    "a missing factor": (_edit_tensors(lambda tensors: tensors.pop(PLACE)), "got none for layers.0.attention.to_q.lora_A"),
    "an unknown tensor": (_edit_tensors(lambda tensors: tensors.update(x=torch.zeros(1))), "got others: x;"),
    "a tensor twice": (
        _edit_tensors(lambda tensors: tensors.update({PLACE.removeprefix("base_model.model."): tensors[PLACE].clone()})),
        "every tensor once",
    ),
    "integers": (_edit_tensors(lambda tensors: tensors.update({PLACE: tensors[PLACE].int()})), "F32, F16, BF16, got I32"),
    "no finite numbers": (_edit_tensors(lambda tensors: tensors[PLACE].fill_(torch.inf)), "finite numbers"),
    "a pickle": (_pickled, "must hold adapter_model.safetensors, got adapter_model.bin"),
    "no configuration": (lambda folder: (folder / CONFIG).unlink(), "must hold adapter_config.json, got none"),
    "a broken configuration": (lambda folder: (folder / CONFIG).write_text("[1"), "must be JSON"),
    "a cut file": (lambda folder: (folder / TENSORS).write_bytes((folder / TENSORS).read_bytes()[:-4]), "truncated"),
}


@pytest.mark.parametrize("fault", SPOILT)
@pytest.mark.parametrize("merged", [False, True])
def test_a_refused_adapter_leaves_everything(fault: str, merged: bool, z_image: Engine, adapter: Path, tmp_path: Path) -> None:
    shutil.copytree(adapter, tmp_path / "good")
    z_image.load_lora_adapter(tmp_path / "good", name="p", merged=merged)
    before = z_image.weight_version, z_image.lora_adapters()
    spoil, words = SPOILT[fault]
    spoil(adapter)
    with pytest.raises(WeightsRejectedError, match=words) as refused:
        z_image.load_lora_adapter(adapter, name="p", weight_version="never")
    assert refused.value.field == "lora_path"
    assert (z_image.weight_version, z_image.lora_adapters()) == before
    z_image.unload_lora_adapter("p")


def test_there_is_room_for_so_many_adapters_and_bytes(z_image: Engine, z_image_checkpoint: Path, adapter: Path) -> None:
    z_image.load_lora_adapter(adapter, name="p")
    second, third = (z_image.stage_lora_adapter(_files(adapter), name=name) for name in ("q", "r"))
    z_image.commit_lora_adapter(second)
    # There was room when it was read.
    with pytest.raises(WeightsRejectedError, match="got 3 with"):
        z_image.commit_lora_adapter(third)
    with pytest.raises(WeightsRejectedError, match=r"at most 2 with .* got 3 with"):
        z_image.load_lora_adapter(adapter, name="r")
    # One that takes another's place needs no more room.
    z_image.load_lora_adapter(adapter, name="q")
    size = z_image.lora_adapters()[0].num_bytes
    for name in ("p", "q"):
        z_image.unload_lora_adapter(name)
    with Engine(z_image_checkpoint, device="cpu", adapter_limits=AdapterLimits(max_adapter_bytes=size)) as small:
        small.load_lora_adapter(adapter, name="p")
        for options in ({"name": "q"}, {"name": "p", "merged": True}):
            with pytest.raises(WeightsRejectedError, match=f"with {size} bytes together"):
                small.load_lora_adapter(adapter, **options)
    with Engine(z_image_checkpoint, device="cpu", adapter_limits=AdapterLimits(max_adapter_bytes=size - 1)) as smaller:
        file, rule = adapter / TENSORS, f"must have at most {size - 1} bytes of tensors, got {size}"
        with pytest.raises(WeightsRejectedError, match=f"^{re.escape(str(file))} {rule}"):
            smaller.load_lora_adapter(adapter, name="p")
        # Files in memory have no names that would say anything.
        config = json.loads((adapter / CONFIG).read_text())
        with pytest.raises(WeightsRejectedError, match=f"^the body {rule}"):
            smaller.load_lora_adapter_from_tensors(load_file(file), config, name="p")


_SLOW = (
    r"([\w.]+)+!",
    r"(\w+\.?){9}!",
    r"(?:\w+)*!",
    r"(\w)\1",
    ".*.*.*.*.*!",
    "a?" * 30 + "a" * 30,
    "(.|.)" * 30 + "!",
    "((((.|.|.|.)|.)|.)(.|.|.|.))(.|.|.|.)(.|.|.|.)(.|.|.|.)(.|.|.|.)(.|.|.|.)(.|.|.|.)(.|.|.|.)(.|.|.|.)(.|.|.|.|.|.|.|.)!",
)


@pytest.mark.parametrize("key", ["target_modules", "exclude_modules", "layers_pattern", "rank_pattern", "alpha_pattern"])
def test_a_pattern_that_could_take_forever_is_refused(key: str) -> None:
    def config(value: Any) -> dict[str, Any]:
        if key in ("rank_pattern", "alpha_pattern"):
            value = dict.fromkeys([value] if isinstance(value, str) else value, 4)
        return {"target_modules": ["to_q"], key: value}

    for pattern in _SLOW:
        with pytest.raises(
            WeightsRejectedError, match=f"{key} must hold patterns that are quickly tried, .*list the modules by name"
        ):
            check_patterns(config(pattern))
    with pytest.raises(WeightsRejectedError, match="at most 1000 characters, got 1001"):
        check_patterns(config("a" * 1001))
    with pytest.raises(WeightsRejectedError, match="must hold regular expressions"):
        check_patterns(config("a{99999999999999}"))
    with pytest.raises(WeightsRejectedError, match=r"must hold at most|list of at most"):
        check_patterns(config([f"layers.{place}.to_q" for place in range(4097)]))
    if key in ("rank_pattern", "alpha_pattern"):
        with pytest.raises(WeightsRejectedError, match="and 16 that are more, got 17"):
            check_patterns(config([f"layers.{place}.*" for place in range(17)]))
    # What peft's documentation and its save_pretrained have.
    for pattern in (
        r".*\.(to_q|to_k|to_v|to_out\.0)",
        ".*decoder.*(SelfAttention|EncDecAttention).*(q|v)$",
        "all-linear",
        r"layers\.\d+\.to_q",
    ):
        check_patterns(config(pattern))
    if key != "layers_pattern":
        check_patterns(config([f"transformer_blocks.{place}.attn.to_q" for place in range(1000)]))


def test_patterns_are_slow_together_as_well(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each of them took 0.1 s for every linear, and there were up to 80: hours for a large model."""
    slow = ["(.|.|.)" * 9 + "!" + "a" * number for number in range(16)]
    config = {"target_modules": ["to_q"], "rank_pattern": dict.fromkeys(slow[:1], 4)}
    with pytest.raises(WeightsRejectedError, match="patterns must be quickly tried, got ones that are slow together"):
        check_patterns({**config, "rank_pattern": dict.fromkeys(slow, 4)})
    quick = ["(.|.)" * 6 + "!" + "a" * number for number in range(16)]
    check_patterns({**config, "rank_pattern": dict.fromkeys(quick, 4)})


def test_what_overflows_in_peft_is_the_adapters_fault(z_image: Engine, adapter: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # As a pattern of a{99999999999999} does that no check has seen.
    monkeypatch.setattr("flowroll.engine.adapters.config.check_patterns", lambda config: None)
    _edit_config(target_modules="a{99999999999999}")(adapter)
    with pytest.raises(WeightsRejectedError, match="must fit ZImageTransformer2DModel, got the repetition number"):
        z_image.load_lora_adapter(adapter, name="p")


def test_a_slow_pattern_does_not_reach_peft(z_image: Engine, adapter: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("flowroll.engine.adapters.adapter_set._inject", None)
    _edit_config(target_modules=_SLOW[0])(adapter)
    with pytest.raises(WeightsRejectedError, match="quickly tried"):
        z_image.load_lora_adapter(adapter, name="p")


@pytest.mark.parametrize(
    "options",
    [
        {"use_rslora": True},
        {"rank_pattern": {"to_q": 2}, "alpha_pattern": {"layers.0.attention.to_v": 3.5}},
        {"layers_to_transform": [0], "layers_pattern": "layers"},
        {"targets": r".*layers\.\d+\.attention\.to_(q|k)"},
        {"targets": "all-linear", "r": 1},
    ],
)
def test_what_shapes_an_adapter_is_followed(options: dict[str, Any], z_image: Engine, tmp_path: Path) -> None:
    trainer = policy(z_image._model.transformer, **options)
    z_image.load_lora_adapter(saved(trainer, tmp_path / "adapter"), name="p")
    group = z_image.rollout(**REQUEST, lora_name="p")
    scores = replay.score(trainer, group)
    assert torch.equal(scores.velocities[0], group[0].debug_tensors.model_output)
    z_image.unload_lora_adapter("p")


def test_without_peft_the_remedy_is_named(z_image: Engine, adapter: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "peft", None)
    with pytest.raises(WeightsRejectedError, match=r"pip install 'flowroll\[lora\]'"):
        z_image.load_lora_adapter(adapter, name="p")
