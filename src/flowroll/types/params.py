"""What a caller asks for: `SamplingParams`, and the rules that need no model."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, field, fields
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, cast, get_args

import torch
from torch import Tensor

from flowroll.errors import InvalidRequestError
from flowroll.sampling.base import Dynamics, StepRule
from flowroll.sampling.dynamics import DYNAMICS, NAMES, check_sigmas, dynamics_named
from flowroll.sampling.transition import GAUSSIAN, NO_CONST, LogProbForm
from flowroll.types.adapters import check_lora_name
from flowroll.types.forks import Fork, check_fork, plain_fork
from flowroll.types.images import checked_images
from flowroll.types.log_probs import as_log_prob_form
from flowroll.types.names import Alias, accept_aliases, aliases_of, by_field
from flowroll.types.plain import plain
from flowroll.types.policies import DEFAULT_POLICY
from flowroll.types.prompts import ALL_PROMPT_TENSORS, EMBEDS, check_embeds, check_token_ids
from flowroll.types.rules import is_finite as _is_finite
from flowroll.types.rules import is_int as _is_int
from flowroll.types.rules import require as _require
from flowroll.types.starts import check_seeds, check_start, count_samples
from flowroll.types.weights import check_version

# The names of the dynamics, aliases included. A type checker cannot read them from the registry; everything else can.
if TYPE_CHECKING:
    SdeType: TypeAlias = str
else:
    SdeType = Literal[NAMES]
GeneratorDevice: TypeAlias = Literal["cuda", "cpu"]
Number: TypeAlias = int | float
# What an answer holds for the picture: float32, eight bits, the bytes of a PNG file, or nothing.
ImageFormat: TypeAlias = Literal["tensor", "uint8", "png", "none"]
# What is known of a step: the clean prediction, the guided velocity, the mean and the std of the transition, and its noise.
StepField: TypeAlias = Literal["x0", "velocity", "mean", "std", "noise"]


@dataclass(frozen=True, slots=True, kw_only=True)
class StepOptions:
    """What a request says about one step.

    Attributes:
        dynamics: The dynamics of the step. None: that of the request.
        noise_level: The noise level of the step. None: that of the request.
    """

    dynamics: SdeType | None = None
    noise_level: Number | None = None


# The fields that are tensors.
TENSORS = (*ALL_PROMPT_TENSORS, "latents")
MAX_PROMPT_CHARS = 100_000
MAX_REQUEST_ID_CHARS = 256
MIN_SIGMA_GAP = 1e-6
# Far above any use; without a limit the guided velocity would overflow float32.
MAX_GUIDANCE_SCALE = 1000.0
_SEQUENCES = (
    "guidance_scales",
    "seeds",
    "sigmas",
    "rollout_sde_step_indices",
    "rollout_return_step_indices",
    "return_fields",
    "decode_step_indices",
    "rollout_steps",
    "rollout_noise_levels",
)
# The values that an evaluation may give besides the defaults, because they request nothing.
_NOTHING_ASKED: Mapping[str, object] = {"rollout_sde_type": "ode", "rollout_noise_level": 0}


def _dynamics(field_name: str, name: object, where: str = "") -> Dynamics:
    rule = f"be one of {', '.join(DYNAMICS)}{where}"
    _require(isinstance(name, str) and name in NAMES, field_name, rule, name, "choose one of these")
    assert isinstance(name, str)
    return dynamics_named(name)


def _check_noise_level(field_name: str, chosen: Dynamics, level: object, where: str = "") -> None:
    ok = _is_finite(level) and chosen.admits(cast(Number, level))
    rule = f"be 0 or from {chosen.noise_level_range} for {chosen.name}{where}"
    _require(ok, field_name, rule, level, "use 0 for a deterministic rollout")


def _step_options(given: object) -> object:
    """Returns the options of a step from a mapping of their names."""
    if isinstance(given, Mapping):
        known = [field.name for field in fields(StepOptions)]
        for name in given:
            _require(name in known, "rollout_steps", f"hold objects with {' and '.join(known)} alone", name, "remove that name")
        return StepOptions(**{name: plain(value) for name, value in given.items()})
    _require(isinstance(given, StepOptions), "rollout_steps", "hold objects with dynamics and noise_level", given, "use {}")
    return given


@accept_aliases
@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """One request: a prompt and how to sample it. `None` means "the family's default".

    Rules that need no model are checked here; the rest (pixel grid, server limits) when the engine plans the request. Numbers
    of numpy and torch are taken as Python's; a list, or a 1-D array or tensor, becomes a tuple. Every `rollout_...` field also
    has a short name without that prefix; both at once are refused. `rollout_steps` has none, since `steps` would be taken for
    their number.

    Attributes:
        prompt: The text; may be empty. It may be left out beside `prompt_token_ids`; given, it is then only repeated. Beside
            `prompt_embeds` it is left out.
        negative_prompt: Text of the unconditional branch; used only when guidance runs. None: the family's own.
        prompt_token_ids: The prompt as token ids, one list for each of the model's tokenizers, with the special tokens and the
            template that the pipeline adds to a text, without padding. The bits are those of the text. None: `prompt` is it.
        negative_prompt_token_ids: The same for the unconditional branch; excludes `negative_prompt`.
        prompt_embeds: The prompt as the text encoders' embedding [tokens, width], in the model's dtype, as the pipeline's
            `encode_prompt` returns it, with or without its first dimension of one; excludes `prompt` and `prompt_token_ids`.
            It is copied when the request is planned, and so are the next five.
        pooled_prompt_embeds: The pooled embedding [width] that goes with it, for a family that has one.
        prompt_embeds_mask: Which of its tokens are text: booleans, or integers 0 and 1, [tokens]. None: all of them.
        negative_prompt_embeds: `prompt_embeds` of the unconditional branch; excludes `negative_prompt` and its token ids.
        negative_pooled_prompt_embeds: `pooled_prompt_embeds` of the unconditional branch.
        negative_prompt_embeds_mask: `prompt_embeds_mask` of the unconditional branch.
        images: Reference images, for a model that edits them: PNG, JPEG or WebP files as bytes, or as base64, which becomes
            bytes. None: there are none.
        seed: Seed of the first sample, sample i uses `seed + i`; in [0, 2^32). None: the engine draws one.
        seeds: One seed per sample; excludes `seed` and sets the number of samples.
        init_seed: Seed of the initial noise: one for all samples, which then start from the same latents, or one per sample.
            None: the sample's own seed.
        sde_seed: Seed of the noise of the stochastic steps: one for all samples, or one per sample. None: the sample's own
            seed.
        latents: The state that the samples start from, in the place of initial noise: one for all samples, or with a first
            dimension one per sample, in the shape of a trajectory's states; float32 or the model's dtype. It is copied when the
            request is planned.
        start_step: The step before which `latents` is the state; the steps before it are not run. None: 0, initial noise.
        stop_step: The step before which the run ends; the state before it is the last one, and no picture is made of it unless
            `image_format` asks for one. None: the run goes to its end.
        fork: Steps at which samples fork, each with its number of children, e.g. {2: 4, 5: 2}. The children share all that came
            before, and go on with noise of their own from that step. The answer has one entry per leaf. None: no forks.
        generator_device: Where noise is drawn; "cuda" means the engine's own device.
        width: Pixels; a multiple of the family's pixel unit. None: the family's.
        height: Pixels; a multiple of the family's pixel unit. None: the family's.
        num_inference_steps: Number of transitions T. None: the family's.
        num_outputs_per_prompt: Number of samples K. None: 1, or the length of a list of seeds.
        num_frames: 1 or None: an image. Taken for clients that always send it.
        fps: Any number; an image has no use for it. Taken for clients that always send it.
        guidance_scale: Guidance scale, 0 to 1000, used if `true_cfg_scale` is None. None: the family's. Guidance runs above
            the scale that the family says: 1 for Qwen-Image, 0 for Z-Image. FLUX.1 dev is given this scale as an input.
        guidance_scales: One guidance scale a step, 0 to 1000, in place of `guidance_scale`; a step at whose scale no guidance
            runs takes one forward. None: the same for all steps. A model that takes the scale as an input is given these.
        true_cfg_scale: Guidance scale, 0 to 1000; wins over `guidance_scale`. FLUX.1 has both scales: this one is that of
            classifier-free guidance, which runs above 1 if there is a negative prompt. None: 1.
        sigmas: T + 1 noise levels used verbatim: in (0, 1], strictly decreasing by at least 1e-6, then a final 0.
        rollout: False: an evaluation, the image alone; it refuses what only a rollout can return or follow.
        rollout_sde_type: Dynamics of the stochastic steps.
        rollout_noise_level: 0 (every step is an ODE step), or a number within the limits of the dynamics.
        rollout_log_prob_no_const: Log-probs are minus the mean of (next - mean)^2, without scale and constants.
        log_prob: The form of the log-probs: a `LogProbForm`, or a mapping of its fields: the "mean" or the "sum" over elements
            (`reduce`), with or without `constants`, with or without the division by 2 std^2 (`inverse_variance`). Excludes
            `rollout_log_prob_no_const`, which is the mean without either. None: the mean with both.
        rollout_debug_mode: Return the per-step debug tensors, three times the size of the trajectory. Over HTTP the default is
            true, as in SGLang-Diffusion; `Client` always sends it.
        rollout_return_denoising_env: Return every transformer argument.
        rollout_return_dit_trajectory: Return latents, timesteps and sigmas.
        rollout_sde_step_indices: Steps that follow `rollout_sde_type`, the others are ODE steps. None: all.
        rollout_steps: One entry a step: a `StepOptions`, or a mapping of its fields. Excludes `rollout_sde_step_indices` and
            `rollout_noise_levels`. None: the same for all steps.
        rollout_noise_levels: One noise level a step; short for `rollout_steps` with noise levels alone. None: the same for all
            steps.
        rollout_return_step_indices: Which of the T + 1 latents the trajectory holds, and of which steps `return_fields` are.
            None: all.
        return_fields: What to return of each step that `rollout_return_step_indices` names, all by default: "x0" (the clean
            prediction x - s v), "velocity", "mean", "std" and "noise". None: nothing beside what `rollout_debug_mode` returns.
        decode_step_indices: The steps whose clean prediction is decoded to a picture, in `image_format`. None: none.
        image_format: What a rollout holds as its picture: "tensor" (float32 in [0, 1]), "uint8" (the eight bits that a PNG of
            it would hold), "png" (the bytes of that file), or "none": nothing is decoded, and the final latents are returned.
            None: "tensor", and "none" for a run that stops early.
        suppress_logs: Do not log this request.
        request_id: 1 to 256 characters, echoed; None: the engine makes one.
        min_weight_version: Refuse weights that are older than this version. Numbers compare as numbers, names by arrival.
        max_staleness: The number of versions by which the weights may be behind the newest ones, counted in the sequence of all
            versions. Older ones refuse the request, and a running sample is ended as soon as newer weights are ready and wait
            for it that would make it older than that. None: any age.
        policy: The policy to run with, beside which no adapter is named; also the name of an adapter. None or "default": the
            weights that the engine was last given.
        lora_name: The loaded adapter to run with. None: the one that a trainer has pushed in SGLang's
            mode "lora_merge", or the model as it is.

    Raises:
        InvalidRequestError: A value breaks its rule.
    """

    prompt: str | None = None
    negative_prompt: str | None = None
    prompt_token_ids: tuple[tuple[int, ...], ...] | None = None
    negative_prompt_token_ids: tuple[tuple[int, ...], ...] | None = None
    prompt_embeds: Tensor | None = field(default=None, hash=False)
    pooled_prompt_embeds: Tensor | None = field(default=None, hash=False)
    prompt_embeds_mask: Tensor | None = field(default=None, hash=False)
    negative_prompt_embeds: Tensor | None = field(default=None, hash=False)
    negative_pooled_prompt_embeds: Tensor | None = field(default=None, hash=False)
    negative_prompt_embeds_mask: Tensor | None = field(default=None, hash=False)
    images: tuple[bytes, ...] | None = field(default=None, repr=False)
    seed: int | None = None
    seeds: tuple[int, ...] | None = None
    init_seed: int | tuple[int, ...] | None = None
    sde_seed: int | tuple[int, ...] | None = None
    latents: Tensor | None = field(default=None, hash=False)
    start_step: int | None = None
    stop_step: int | None = None
    fork: Fork | Mapping[int, int] | None = None
    generator_device: GeneratorDevice = "cuda"
    width: int | None = None
    height: int | None = None
    num_inference_steps: int | None = None
    num_outputs_per_prompt: int | None = None
    num_frames: int | None = None
    fps: Number | None = None
    guidance_scale: Number | None = None
    guidance_scales: tuple[Number, ...] | None = None
    true_cfg_scale: Number | None = None
    sigmas: tuple[Number, ...] | None = None
    rollout: bool = True
    rollout_sde_type: SdeType = "sde"
    rollout_noise_level: Number = 0.7
    rollout_log_prob_no_const: bool = False
    log_prob: LogProbForm | None = None
    rollout_debug_mode: bool = False
    rollout_return_denoising_env: bool = False
    rollout_return_dit_trajectory: bool = False
    rollout_sde_step_indices: tuple[int, ...] | None = None
    rollout_steps: tuple[StepOptions, ...] | None = None
    rollout_noise_levels: tuple[Number, ...] | None = None
    rollout_return_step_indices: tuple[int, ...] | None = None
    return_fields: tuple[StepField, ...] | None = None
    decode_step_indices: tuple[int, ...] | None = None
    image_format: ImageFormat | None = None
    suppress_logs: bool = False
    request_id: str | None = None
    min_weight_version: str | None = None
    max_staleness: int | None = None
    policy: str | None = None
    lora_name: str | None = None

    sde_type = Alias[SdeType]("rollout_sde_type")
    noise_level = Alias[Number]("rollout_noise_level")
    log_prob_no_const = Alias[bool]("rollout_log_prob_no_const")
    debug_mode = Alias[bool]("rollout_debug_mode")
    return_denoising_env = Alias[bool]("rollout_return_denoising_env")
    return_dit_trajectory = Alias[bool]("rollout_return_dit_trajectory")
    sde_step_indices = Alias["tuple[int, ...] | None"]("rollout_sde_step_indices")
    noise_levels = Alias["tuple[Number, ...] | None"]("rollout_noise_levels")
    return_step_indices = Alias["tuple[int, ...] | None"]("rollout_return_step_indices")

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, SamplingParams):
            return NotImplemented
        return all(_is_same(getattr(self, name), getattr(other, name)) for name in self.__slots__)

    def __post_init__(self) -> None:
        self._take_plain()
        self._check_text()
        self._check_flags()
        self._check_sequences()
        self._check_numbers()
        check_seeds(self)
        check_start(self)
        check_fork(self.fork)
        self._check_sigmas()
        self._check_log_prob()
        self._check_rollout()
        self._check_dynamics()
        self._check_evaluation()

    @property
    def num_samples(self) -> int:
        """The number of samples that are started."""
        return count_samples({name: getattr(self, name) for name in self.__slots__})

    @property
    def step_rules(self) -> tuple[StepRule, ...] | None:
        """The rule of each step where the steps differ, with the request's defaults filled in; None where they do not."""
        if self.rollout_noise_levels is not None:
            return tuple(StepRule(dynamics=self.rollout_sde_type, noise_level=level) for level in self.rollout_noise_levels)
        if self.rollout_steps is None:
            return None
        return tuple(
            StepRule(
                dynamics=dynamics_named(step.dynamics or self.rollout_sde_type).name,
                noise_level=self.rollout_noise_level if step.noise_level is None else step.noise_level,
            )
            for step in self.rollout_steps
        )

    @property
    def log_prob_form(self) -> LogProbForm:
        """What counts as the log-prob of a step."""
        return self.log_prob or (NO_CONST if self.rollout_log_prob_no_const else GAUSSIAN)

    def _check_log_prob(self) -> None:
        if self.log_prob is None:
            return
        given = as_log_prob_form(self.log_prob)
        object.__setattr__(self, "log_prob", given)
        alone = not self.rollout_log_prob_no_const
        _require(alone, "log_prob", "be given without rollout_log_prob_no_const", "both", "send one of the two")

    def _check_text(self) -> None:
        for name in ("prompt", "negative_prompt", "request_id"):
            text = getattr(self, name)
            if text is None and (name != "prompt" or self._has("prompt_token_ids") or self._has(EMBEDS)):
                continue
            if text is None:
                message = (
                    "prompt must be given, got nothing; send one prompt as text, or its prompt_token_ids or prompt_embeds."
                )
                raise InvalidRequestError(message, field="prompt")
            _require(isinstance(text, str), name, "be text", text, "send a string")
            most = MAX_REQUEST_ID_CHARS if name == "request_id" else MAX_PROMPT_CHARS
            _require(len(text) <= most, name, f"have at most {most} characters", len(text), "shorten it")
            valid = text.isascii() or not any("\ud800" <= c <= "\udfff" for c in text)
            _require(valid, name, "be valid Unicode", text, "remove the unpaired surrogates")
        check_token_ids("prompt_token_ids", self.prompt_token_ids)
        check_token_ids("negative_prompt_token_ids", self.negative_prompt_token_ids)
        both = self._has("negative_prompt") and self._has("negative_prompt_token_ids")
        _require(not both, "negative_prompt_token_ids", "be given without negative_prompt", "both", "send one of the two")
        check_embeds(self)
        if self.min_weight_version is not None:
            check_version(self.min_weight_version, "min_weight_version")
        if self.policy is not None:
            check_lora_name(self.policy, "policy")
        if self.lora_name is not None:
            check_lora_name(self.lora_name)
            alone = self.policy in (None, DEFAULT_POLICY)
            _require(alone, "policy", "be given without lora_name", self.policy, "send one of the two")
        _require(self.request_id != "", "request_id", "not be empty", self.request_id, "leave it out for a generated one")

    def _check_flags(self) -> None:
        for name in _FLAGS:
            value = getattr(self, name)
            _require(isinstance(value, bool), name, "be True or False", value, "use a bool")

    def _take_plain(self) -> None:
        """Converts lists and arrays to tuples, so that a checked request cannot change, and other numbers to Python's."""
        object.__setattr__(self, "images", checked_images(self.images))
        for name in (name for name in self.__slots__ if name not in TENSORS):
            if (value := plain(given := getattr(self, name))) is not given:
                object.__setattr__(self, name, value)
        for name in ("prompt_token_ids", "negative_prompt_token_ids"):
            if isinstance(lists := getattr(self, name), tuple):
                object.__setattr__(self, name, tuple(map(plain, lists)))
        object.__setattr__(self, "fork", plain_fork(self.fork))
        if isinstance(self.rollout_steps, tuple):
            object.__setattr__(self, "rollout_steps", tuple(map(_step_options, self.rollout_steps)))

    def _check_sequences(self) -> None:
        for name in _SEQUENCES:
            value = getattr(self, name)
            _require(value is None or isinstance(value, tuple), name, "be a tuple", value, "put the values in a tuple")

    def _check_numbers(self) -> None:
        for name in ("width", "height", "num_inference_steps", "num_outputs_per_prompt"):
            value = getattr(self, name)
            _require(value is None or (_is_int(value) and value >= 1), name, "be an integer >= 1", value, "use 1 or more")
        most = self.max_staleness
        ok = most is None or (_is_int(most) and most >= 0)
        _require(ok, "max_staleness", "be an integer >= 0", most, "use 0 for the newest weights alone")
        self._check_guidance_scales()
        for name in ("guidance_scale", "true_cfg_scale"):
            value = getattr(self, name)
            ok = value is None or (_is_finite(value) and 0 <= value <= MAX_GUIDANCE_SCALE)
            _require(ok, name, f"be a number from 0 to {MAX_GUIDANCE_SCALE:g}", value, "use 0 for no guidance")
        frames, fps = self.num_frames, self.fps
        one = frames is None or (_is_int(frames) and frames == 1)
        _require(one, "num_frames", "be None or 1", frames, "leave it out, flowroll makes images")
        _require(fps is None or _is_finite(fps), "fps", "be None or a number", fps, "leave it out, an image has no use for it")

    @property
    def _num_steps(self) -> int | None:
        """The number of steps that the request says; None: the family's."""
        return len(self.sigmas) - 1 if self.sigmas is not None else self.num_inference_steps

    def _check_guidance_scales(self) -> None:
        name, scales = "guidance_scales", self.guidance_scales
        if scales is None:
            return
        _require(self.guidance_scale is None, name, "be given without guidance_scale", "both", "send one of the two")
        _require(len(scales) > 0, name, "hold one scale a step", scales, "leave it out for one scale of all steps")
        ok = all(_is_finite(scale) and 0 <= scale <= MAX_GUIDANCE_SCALE for scale in scales)
        _require(ok, name, f"hold numbers from 0 to {MAX_GUIDANCE_SCALE:g}", scales, "use 0 for no guidance")
        count = self._num_steps
        agrees = count is None or len(scales) == count
        _require(agrees, name, f"hold one scale for each of the {count} steps", len(scales), "send one scale a step")

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
        for name, known in (("generator_device", get_args(GeneratorDevice)), ("image_format", (None, *get_args(ImageFormat)))):
            value = getattr(self, name)
            _require(value in known, name, f"be one of {', '.join(filter(None, known))}", value, "choose one of these")
        known = get_args(StepField)
        for one in self.return_fields or ():
            _require(one in known, "return_fields", f"hold some of {', '.join(known)}", one, "choose of these")
        names = self.return_fields or ()
        _require(self.return_fields != (), "return_fields", "name a field", names, "leave it out for none")
        _require(len(set(names)) == len(names), "return_fields", "name each field once", names, "remove the duplicates")
        for name in ("rollout_sde_step_indices", "rollout_return_step_indices", "decode_step_indices"):
            indices = getattr(self, name)
            if indices is None:
                continue
            whole = all(_is_int(i) and i >= 0 for i in indices)
            _require(whole, name, "hold integers >= 0", indices, "count steps from 0")
            _require(len(set(indices)) == len(indices), name, "hold each step once", indices, "remove the duplicates")

    def _check_dynamics(self) -> None:
        name, level = self.rollout_sde_type, self.rollout_noise_level
        chosen = _dynamics("rollout_sde_type", name)
        object.__setattr__(self, "rollout_sde_type", chosen.name)
        _check_noise_level("rollout_noise_level", chosen, level)
        if chosen.needs_history:
            rule = f"be left out for {chosen.name}, which has no stochastic steps"
            indices = self.rollout_sde_step_indices
            _require(not indices, "rollout_sde_step_indices", rule, indices, "use rollout_steps to mix dynamics")
        self._check_steps(chosen)
        if self.rollout and self.sigmas is not None:
            grid = torch.tensor(self.sigmas, dtype=torch.float32)
            every = range(len(self.sigmas) - 1)
            wanted = every if self.rollout_sde_step_indices is None else set(self.rollout_sde_step_indices) & set(every)
            alike = StepRule(dynamics=chosen.name, noise_level=level)
            rules = self.step_rules
            check_sigmas(grid, dict.fromkeys(wanted, alike) if rules is None else dict(enumerate(rules)))

    def _check_steps(self, chosen: Dynamics) -> None:
        """Checks the options of single steps."""
        given = [name for name in ("rollout_steps", "rollout_noise_levels", "rollout_sde_step_indices") if self._has(name)]
        if len(given) > 1:
            _require(False, given[0], f"be given without {given[-1]}", "both", "send one of the two")
        for name, rows in (("rollout_steps", self.rollout_steps), ("rollout_noise_levels", self.rollout_noise_levels)):
            count = self._num_steps
            if rows is None:
                continue
            _require(len(rows) > 0, name, "hold one entry a step", rows, "leave it out where the steps are alike")
            agrees = count is None or len(rows) == count
            _require(agrees, name, f"hold one entry for each of the {count} steps", len(rows), "send one entry a step")
        for index, step in enumerate(self.rollout_steps or ()):
            own = chosen if step.dynamics is None else _dynamics("rollout_steps", step.dynamics, f" at step {index}")
            level = self.rollout_noise_level if step.noise_level is None else step.noise_level
            _check_noise_level("rollout_steps", own, level, f" at step {index}")
        for index, level in enumerate(self.rollout_noise_levels or ()):
            _check_noise_level("rollout_noise_levels", chosen, level, f" at step {index}")

    def _has(self, name: str) -> bool:
        return getattr(self, name) is not None

    def _check_evaluation(self) -> None:
        """Refuses values that have no effect without a rollout."""
        if self.rollout:
            return
        for name in ROLLOUT_FIELDS - {"rollout", "image_format"}:
            value = getattr(self, name)
            asks = value != DEFAULTS[name] and (name not in _NOTHING_ASKED or value != _NOTHING_ASKED[name])
            _require(not asks, name, "be left out of an evaluation (rollout=False)", value, "remove it, or set rollout=True")


def _is_same(one: object, other: object) -> bool:
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return one.dtype == other.dtype and torch.equal(one, other)
    return one is other or (not isinstance(one, Tensor) and not isinstance(other, Tensor) and one == other)


# The field for which each short name stands.
ALIASES: Mapping[str, str] = aliases_of(SamplingParams)
_FLAGS = tuple(field.name for field in fields(SamplingParams) if isinstance(field.default, bool))
# The fields that plain generation does not have.
ROLLOUT_FIELDS = frozenset(
    {
        "rollout",
        "rollout_steps",
        "sde_seed",
        "stop_step",
        "fork",
        "log_prob",
        "return_fields",
        "decode_step_indices",
        "image_format",
        *ALIASES.values(),
    }
)
DEFAULTS: Mapping[str, Any] = {field.name: field.default for field in fields(SamplingParams) if field.default is not MISSING}


def by_field_name(values: Mapping[str, Any]) -> dict[str, Any]:
    """Returns values of `SamplingParams` by the names of its fields, from values by either name.

    Raises:
        InvalidRequestError: One value was given by both names.
    """
    return by_field(values, ALIASES)
