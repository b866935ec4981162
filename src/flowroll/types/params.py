"""What a caller asks for: `SamplingParams`, and the rules that need no model."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from typing import Literal, TypeAlias, get_args

from flowroll.errors import InvalidRequestError
from flowroll.types.adapters import check_lora_name
from flowroll.types.weights import check_version

SdeType: TypeAlias = Literal["sde", "cps", "ode"]
GeneratorDevice: TypeAlias = Literal["cuda", "cpu"]
Number: TypeAlias = int | float

MAX_SEED = 2**32 - 1
MAX_PROMPT_CHARS = 100_000
MAX_REQUEST_ID_CHARS = 256
NOISE_LEVEL_MIN, NOISE_LEVEL_MAX, NOISE_LEVEL_MAX_CPS = 1e-4, 10.0, 1.0
MIN_SIGMA_GAP = 1e-6
# Far above any use; without a limit the guided velocity would overflow float32.
MAX_GUIDANCE_SCALE = 1000.0
# The fields that plain generation does not have.
ROLLOUT_FIELDS = frozenset(
    {
        "rollout",
        "sde_type",
        "noise_level",
        "log_prob_no_const",
        "debug_mode",
        "return_denoising_env",
        "return_dit_trajectory",
        "sde_step_indices",
        "return_step_indices",
    }
)
_FLAGS = ("rollout", "log_prob_no_const", "debug_mode", "return_denoising_env", "return_dit_trajectory", "suppress_logs")


def _require(ok: bool, field_name: str, rule: str, value: object, remedy: str) -> None:
    if not ok:
        raise InvalidRequestError(f"{field_name} must {rule}, got {_shown(value)}; {remedy}.", field=field_name)


def _shown(value: object) -> str:
    """The value, short."""
    try:
        shown = repr(value)
    except ValueError:  # Python refuses to print integers of several thousand digits, also inside a tuple.
        return "a huge integer"
    return shown if len(shown) <= 80 else shown[:77] + "..."


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_finite(value: object) -> bool:
    # math.isfinite would overflow for a huge integer.
    return _is_int(value) or (isinstance(value, float) and math.isfinite(value))


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """One request: a prompt and how to sample it. `None` means "the family's default".

    Rules that need no model are checked here; the rest (pixel grid, server limits) when the engine plans the request. A list
    where a tuple is expected becomes one.

    Attributes:
        prompt: The text; may be empty.
        negative_prompt: Text of the unconditional branch; used only when guidance runs.
        seed: Seed of the first sample, sample i uses `seed + i`; in [0, 2^32). None: the engine draws one.
        seeds: One seed per sample; excludes `seed` and sets the number of samples.
        generator_device: Where noise is drawn; "cuda" means the engine's own device.
        width: Pixels.
        height: Pixels.
        num_inference_steps: Number of transitions T.
        num_outputs_per_prompt: Number of samples K. None: 1, or the number of `seeds`.
        guidance_scale: Guidance scale, 0 to 1000, used if `true_cfg_scale` is None.
        true_cfg_scale: Guidance scale, 0 to 1000.
        sigmas: T + 1 noise levels used verbatim: in (0, 1], strictly decreasing by at least 1e-6, then a final 0.
        rollout: False: an evaluation, the image alone.
        sde_type: Dynamics of the stochastic steps.
        noise_level: 0 (every step is an ODE step), or 1e-4 to 10 (cps: to 1).
        log_prob_no_const: Log-probs are minus the mean of (next - mean)^2, without scale and constants.
        debug_mode: Return the per-step debug tensors.
        return_denoising_env: Return every transformer argument.
        return_dit_trajectory: Return latents, timesteps and sigmas.
        sde_step_indices: Steps that follow `sde_type`, the others are ODE steps. None: all.
        return_step_indices: Which of the T + 1 latents the trajectory holds. None: all.
        suppress_logs: Do not log this request.
        request_id: 1 to 256 characters, echoed; None: the engine makes one.
        min_weight_version: Refuse weights that are older than this version. Numbers compare as numbers, names by arrival.
        lora_name: The loaded adapter to run with. None: the one that a trainer has pushed in SGLang's
            mode "lora_merge", or the model as it is.

    Raises:
        InvalidRequestError: A value breaks its rule.
    """

    prompt: str
    negative_prompt: str | None = None
    seed: int | None = None
    seeds: tuple[int, ...] | None = None
    generator_device: GeneratorDevice = "cuda"
    width: int | None = None
    height: int | None = None
    num_inference_steps: int | None = None
    num_outputs_per_prompt: int | None = None
    guidance_scale: Number | None = None
    true_cfg_scale: Number | None = None
    sigmas: tuple[Number, ...] | None = None
    rollout: bool = True
    sde_type: SdeType = "sde"
    noise_level: Number = 0.7
    log_prob_no_const: bool = False
    debug_mode: bool = True
    return_denoising_env: bool = False
    return_dit_trajectory: bool = False
    sde_step_indices: tuple[int, ...] | None = None
    return_step_indices: tuple[int, ...] | None = None
    suppress_logs: bool = False
    request_id: str | None = None
    min_weight_version: str | None = None
    lora_name: str | None = None

    def __post_init__(self) -> None:
        self._check_text()
        self._check_flags()
        self._take_sequences()
        self._check_numbers()
        self._check_seeds()
        self._check_sigmas()
        self._check_rollout()

    def _check_text(self) -> None:
        for name in ("prompt", "negative_prompt", "request_id"):
            text = getattr(self, name)
            if text is None and name != "prompt":
                continue
            _require(isinstance(text, str), name, "be text", text, "send a string")
            most = MAX_REQUEST_ID_CHARS if name == "request_id" else MAX_PROMPT_CHARS
            _require(len(text) <= most, name, f"have at most {most} characters", len(text), "shorten it")
            valid = text.isascii() or not any("\ud800" <= c <= "\udfff" for c in text)
            _require(valid, name, "be valid Unicode", text, "remove the unpaired surrogates")
        if self.min_weight_version is not None:
            check_version(self.min_weight_version, "min_weight_version")
        if self.lora_name is not None:
            check_lora_name(self.lora_name)
        _require(self.request_id != "", "request_id", "not be empty", self.request_id, "leave it out for a generated one")

    def _check_flags(self) -> None:
        for name in _FLAGS:
            value = getattr(self, name)
            _require(isinstance(value, bool), name, "be True or False", value, "use a bool")

    def _take_sequences(self) -> None:
        """Refuses what is no sequence; a list becomes a tuple, so that nobody can change a checked request."""
        for name in ("seeds", "sigmas", "sde_step_indices", "return_step_indices"):
            value = getattr(self, name)
            _require(value is None or isinstance(value, (tuple, list)), name, "be a tuple", value, "put the values in a tuple")
            if isinstance(value, list):
                object.__setattr__(self, name, tuple(value))

    def _check_seeds(self) -> None:
        remedy = f"use an integer from 0 to {MAX_SEED}"
        if self.seed is not None:
            last = self.seed + (self.num_outputs_per_prompt or 1) - 1 if _is_int(self.seed) else self.seed
            _require(_is_int(self.seed) and self.seed >= 0, "seed", "be >= 0", self.seed, remedy)
            _require(last <= MAX_SEED, "seed", "leave every seed + i below 2^32", self.seed, "use a smaller seed")
        if self.seeds is None:
            return
        _require(self.seed is None, "seeds", "not be given together with seed", self.seeds, "send one of the two")
        _require(len(self.seeds) > 0, "seeds", "hold at least one seed", self.seeds, "send one seed per output")
        for value in self.seeds:
            _require(_is_int(value) and 0 <= value <= MAX_SEED, "seeds", "hold integers in [0, 2^32)", value, remedy)
        count = self.num_outputs_per_prompt
        agrees = count is None or count == len(self.seeds)
        _require(agrees, "seeds", f"hold num_outputs_per_prompt = {count} values", len(self.seeds), "send one seed per output")

    def _check_numbers(self) -> None:
        for name in ("width", "height", "num_inference_steps", "num_outputs_per_prompt"):
            value = getattr(self, name)
            _require(value is None or (_is_int(value) and value >= 1), name, "be an integer >= 1", value, "use 1 or more")
        for name in ("guidance_scale", "true_cfg_scale"):
            value = getattr(self, name)
            ok = value is None or (_is_finite(value) and 0 <= value <= MAX_GUIDANCE_SCALE)
            _require(ok, name, f"be a number from 0 to {MAX_GUIDANCE_SCALE:g}", value, "use 0 for no guidance")

    def _check_sigmas(self) -> None:
        if self.sigmas is None:
            return
        values = self.sigmas
        _require(len(values) >= 2, "sigmas", "hold T + 1 >= 2 values", values, "send one value per step and a final 0")
        _require(all(map(_is_finite, values)), "sigmas", "be finite numbers", values, "send plain numbers")
        _require(all(0 <= v <= 1 for v in values), "sigmas", "lie in [0, 1]", values, "scale the list to [0, 1]")
        _require(values[-1] == 0, "sigmas", "end at 0", values[-1], "append a final 0")
        gaps = [a - b for a, b in itertools.pairwise(values)]
        ok = min(gaps) >= MIN_SIGMA_GAP
        _require(ok, "sigmas", f"decrease by at least {MIN_SIGMA_GAP} at every step", min(gaps), "remove the repeated values")
        steps = self.num_inference_steps
        agrees = steps is None or steps == len(values) - 1
        _require(
            agrees, "sigmas", f"hold num_inference_steps + 1 = {(steps or 0) + 1} values", len(values), "omit one of the two"
        )

    def _check_rollout(self) -> None:
        choices = get_args(SdeType)
        _require(self.sde_type in choices, "sde_type", f"be one of {', '.join(choices)}", self.sde_type, "choose one of these")
        devices = get_args(GeneratorDevice)
        ok = self.generator_device in devices
        _require(ok, "generator_device", f"be one of {', '.join(devices)}", self.generator_device, "choose one of these")
        high = NOISE_LEVEL_MAX_CPS if self.sde_type == "cps" else NOISE_LEVEL_MAX
        level = self.noise_level
        ok = _is_finite(level) and (level == 0 or NOISE_LEVEL_MIN <= level <= high)
        rule = f"be 0 or from {NOISE_LEVEL_MIN} to {high:g} for {self.sde_type}"
        _require(ok, "noise_level", rule, level, "use 0 for a deterministic rollout")
        for name in ("sde_step_indices", "return_step_indices"):
            indices = getattr(self, name)
            if indices is None:
                continue
            whole = all(_is_int(i) and i >= 0 for i in indices)
            _require(whole, name, "hold integers >= 0", indices, "count steps from 0")
            _require(len(set(indices)) == len(indices), name, "hold each step once", indices, "remove the duplicates")
