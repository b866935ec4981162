"""What a family declares about its conditioning, and everything that follows from the declaration alone.

Owns how an environment becomes the arguments of a forward, how forwards of several samples are joined and split, and which
environments are complete. Nothing here knows a particular model.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeAlias, cast

import torch
from torch import Tensor
from torch.nn.functional import pad

from flowroll.families.rotary import RotaryTable
from flowroll.types import DenoisingEnv, EnvValue
from flowroll.types.prompts import EMBEDS
from flowroll.types.results import replace_tensors
from flowroll.types.tensors import plain_tensor, tensor_bytes

# The keyword arguments of one forward, and what a forward returns: a batch, or a list of samples.
ForwardInput: TypeAlias = Mapping[str, Any]
Output: TypeAlias = "Tensor | list[Tensor]"
Branch: TypeAlias = Literal["positive", "negative"]

POSITIVE, NEGATIVE, IMAGES = "pos_cond_kwargs", "neg_cond_kwargs", "image_kwargs"
# Stand for the length of a text and for the number of image tokens, which are the only sizes in a tensor's shape that the
# checkpoint does not fix.
TOKENS, IMAGE_TOKENS = "tokens", "image_tokens"
# Stands for the number of tokens of all reference images.
REFERENCE_TOKENS = "reference_tokens"
# Stands for one entry for each text token and each group of 2 x 2 image tokens.
SLOTS = "slots"
# The field that says how many tokens a branch's text has.
LENGTHS = "txt_seq_lens"


@dataclass(frozen=True, slots=True, kw_only=True)
class Argument:
    """How one keyword argument of the transformer is collated.

    Attributes:
        name: The argument's name in the transformer.
        batch: How entries form a batch. "stack": the entries of the batch are stacked along a new first dimension; "list": they
            are the items of a list;
            "shared": all entries have the same value, which has no batch dimension.
        padded_to: The model pads the first dimension of an entry to a multiple of this many rows.
        may_be_padded: Whether rows may be added behind those of an entry: the model computes every row by itself, but for
            attention. Shared forwards verify it, and keep the added rows out of attention.
        is_transposed: Whether entries of two dimensions, which are stacked, lie column by column in memory.
    """

    name: str
    batch: Literal["stack", "list", "shared"] = "stack"
    padded_to: int = 1
    may_be_padded: bool = False
    is_transposed: bool = False

    def joined(self, entries: Sequence[Any]) -> Any:
        """Makes the argument of a forward from the entries of its batch; None if the entries have no value."""
        if entries[0] is None or self.batch == "shared":
            return entries[0]
        if self.batch == "list":
            return list(entries)
        if self.is_transposed:
            columns = [entry.T.contiguous()[None] for entry in entries]
            return (torch.cat(columns) if len(columns) > 1 else columns[0]).mT
        return torch.cat([entry[None] for entry in entries]) if len(entries) > 1 else entries[0][None]

    def collated(self, values: Sequence[Any]) -> Any:
        """Joins the arguments of several forwards into that of one."""
        if values[0] is None or self.batch == "shared":
            return values[0]
        if self.batch == "list":
            return [entry for value in values for entry in value]
        return torch.cat([value.mT for value in values]).mT if self.is_transposed else torch.cat(list(values))

    def key(self, value: Any, geometry: Hashable = None) -> Hashable:
        """Returns a key. Values with equal keys can be collated: all tensors inside the model then have the same shapes.

        Args:
            value: The argument of a forward.
            geometry: The geometry from which size fields were made; None: they may be anything.
        """
        if value is None:
            return None
        if self.batch == "stack":
            return tuple(value.shape)
        return tuple(map(self._entry_key, value)) if self.batch == "list" else _same_value(value)

    def _entry_key(self, entry: Any) -> Hashable:
        if isinstance(entry, Tensor):
            return -(-len(entry) // self.padded_to), tuple(entry.shape[1:])
        return _same_value(entry)


@dataclass(frozen=True, slots=True, kw_only=True)
class ConditioningField(Argument):
    """One conditioning argument of a family.

    Attributes:
        source: What the value depends on: the text ("prompt"), the sizes of the images and the number of tokens ("size"),
            reference images ("image") or the guidance scale ("scale"). The first two are in each branch of an environment, the
            third is in its `image_kwargs`, the fourth is its `guidance`.
        shape: The shape of the tensor without batch dimension: `TOKENS`, `IMAGE_TOKENS`, `REFERENCE_TOKENS`, `SLOTS`, names of
            `ModelSpec.widths`, numbers. None: plain values.
        dtype: The dtype of the tensor. "model": the transformer's; "float32"; "index": booleans or integers.
        is_passed: Whether a forward takes the value. False: it is metadata.
        is_required: Whether every forward needs the value.
        sglang_name: The field's name in SGLang-Diffusion; None: the same name.
        is_listed_by_sglang: Whether SGLang-Diffusion holds the tensor in a list of one.
        sent_as: The field of a request that gives the tensor in the place of a text, beside `prompt_embeds`, which gives the
            text embedding; None: no request gives it.
    """

    source: Literal["prompt", "size", "image", "scale"] = "prompt"
    shape: tuple[str | int, ...] | None = None
    dtype: Literal["model", "float32", "index"] = "model"
    is_passed: bool = True
    is_required: bool = True
    sglang_name: str | None = None
    is_listed_by_sglang: bool = False
    sent_as: str | None = None

    @property
    def is_tensor(self) -> bool:
        """Whether the field's value is a tensor."""
        return self.shape is not None

    def sizes(self, widths: Mapping[str, int]) -> list[int]:
        """Returns the shape of the field's tensor, given the sizes by name."""
        return [size if isinstance(size, int) else widths[size] for size in self.shape or ()]

    def key(self, value: Any, geometry: Hashable = None) -> Hashable:
        """Returns a key, as for any argument. A size field has the same numbers where its shape and the geometry are the same.

        So they need not be read, for which the host would have to wait for a device.
        """
        is_known = geometry is not None and self.source == "size" and self.batch == "shared"
        if is_known and isinstance(value, Tensor) and value.device.type != "cpu":
            return tuple(value.shape), geometry
        return Argument.key(self, value)

    def value(self, env: DenoisingEnv, branch: Branch) -> EnvValue | None:
        """Returns the field's value in one branch of an environment; None if there is none."""
        if self.source == "scale":
            return env.guidance
        values: Mapping[str, EnvValue] = getattr(env, self.place(branch)) or {}
        return values.get(self.name)

    def tensors(self, env: DenoisingEnv) -> list[Tensor]:
        """Returns its tensors in the branches of an environment that have one."""
        branches: tuple[Branch, ...] = ("positive", "negative")
        return [value for value in (self.value(env, branch) for branch in branches) if isinstance(value, Tensor)]

    def place(self, branch: Branch) -> str:
        """Returns the name of the part of an environment that holds the field for one branch."""
        if self.source in ("image", "scale"):
            return IMAGES if self.source == "image" else "guidance"
        return POSITIVE if branch == "positive" else NEGATIVE


# Metadata that a family may declare: the number of text tokens, in a list of one.
TEXT_LENGTHS = ConditioningField(name=LENGTHS, source="size", batch="list", is_passed=False, is_required=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class Conditioning:
    """Everything that a family declares about its forwards.

    Attributes:
        fields: The conditioning arguments. The first one is the text embedding.
        latents: The argument that takes the latents.
        timestep: The argument that takes the timesteps, one per entry of the batch.
        pair: The order of the branches that go through the model as one batch of two; None: each branch has a forward of its
            own, the conditional one first.
        table: What SGLang-Diffusion sends in place of position ids; None: it sends every field.
    """

    fields: tuple[ConditioningField, ...]
    latents: Argument
    timestep: str = "timestep"
    pair: tuple[Branch, Branch] | None = None
    table: RotaryTable | None = None

    @property
    def embeds(self) -> ConditioningField:
        """The field of the text embedding."""
        return self.fields[0]

    @property
    def prompt_fields(self) -> dict[str, ConditioningField]:
        """The fields that are made of a prompt, by the names that a request has for them."""
        return {EMBEDS: self.embeds, **{field.sent_as: field for field in self.fields if field.sent_as is not None}}

    def in_place(self, place: str) -> list[ConditioningField]:
        """Returns the fields of one part of an environment, e.g. "pos_cond_kwargs"."""
        return [field for field in self.fields if place in (field.place("positive"), field.place("negative"))]

    def fixed_inputs(self, env: DenoisingEnv, *, is_guided: bool) -> list[ForwardInput]:
        """Returns what the forwards of a step take beside latents and timestep: the same at every step of a sample.

        Args:
            env: The sample's environment.
            is_guided: Whether there is an unconditional branch.
        """
        passed = [field for field in self.fields if field.is_passed]
        return [
            {field.name: field.joined([_entry(field, env, branch) for branch in rows]) for field in passed}
            for rows in self._branches(is_guided=is_guided)
        ]

    def forward_inputs(
        self, latents: Tensor, timestep: Tensor, fixed: Sequence[ForwardInput], *, is_guided: bool
    ) -> list[ForwardInput]:
        """Returns the inputs of the forwards of one step of one sample.

        Args:
            latents: What the model takes for the sample's latents, in its dtype, without batch dimension.
            timestep: One entry.
            fixed: The inputs that `fixed_inputs` made.
            is_guided: Whether there is an unconditional branch.
        """
        found: list[ForwardInput] = []
        for rows, others in zip(self._branches(is_guided=is_guided), fixed, strict=True):
            varying = {
                self.latents.name: self.latents.joined([latents] * len(rows)),
                self.timestep: self._timesteps(timestep, len(rows)),
            }
            # A model may write into a list that it is given.
            found.append({**varying, **{name: list(one) if isinstance(one, list) else one for name, one in others.items()}})
        return found

    def _timesteps(self, timestep: Tensor, rows: int) -> Tensor:
        if self.pair is None:
            return timestep
        # As the pipelines do it.
        return timestep.repeat(rows) if self.latents.batch == "list" else timestep.expand(rows)

    def _branches(self, *, is_guided: bool) -> list[tuple[Branch, ...]]:
        """Returns the branches of each forward."""
        if not is_guided:
            return [("positive",)]
        return [("positive",), ("negative",)] if self.pair is None else [self.pair]

    def key(self, forward_input: ForwardInput, geometry: Hashable = None, *, any_length: bool = False) -> Hashable:
        """Returns a key; forward inputs with equal keys can be collated.

        Args:
            forward_input: The arguments of a forward.
            geometry: The geometry from which its size fields were made; None: they may be anything.
            any_length: Whether inputs with texts of other lengths have equal keys, where texts may be padded.
        """

        def of_argument(argument: Argument) -> Hashable:
            value = forward_input[argument.name]
            if any_length and argument.may_be_padded:
                return value.shape[0], *value.shape[2:]
            return argument.key(value, geometry)

        return tuple(map(of_argument, self._arguments()))

    def num_text_rows(self, forward_input: ForwardInput) -> int:
        """Returns the number of rows of a forward's text; 0 if it may not be padded."""
        return int(forward_input[self.embeds.name].shape[1]) if self.embeds.may_be_padded else 0

    def pad_text(self, forward_input: ForwardInput, num_rows: int) -> ForwardInput:
        """Returns a forward input whose text has so many rows, the last of which are zeros."""
        text: Tensor = forward_input[self.embeds.name]
        return {**forward_input, self.embeds.name: pad(text, (0, 0, 0, num_rows - text.shape[1]))}

    def collate(self, forward_inputs: Sequence[ForwardInput]) -> ForwardInput:
        """Joins several forward inputs of the same key into one, with the samples in this order."""
        return {
            argument.name: argument.collated([one[argument.name] for one in forward_inputs]) for argument in self._arguments()
        }

    def rows(self, forward_input: ForwardInput) -> int:
        """Returns the number of entries that a forward input has in the transformer's batch."""
        return len(forward_input[self.timestep])

    def contradiction(self, branch: Mapping[str, EnvValue]) -> str | None:
        """Says in words where a branch's stated number of tokens differs from its text embedding; None if it does not."""
        embeds, lengths = branch[self.embeds.name], branch.get(LENGTHS)
        if not isinstance(embeds, Tensor) or lengths is None or lengths == [len(embeds)]:
            return None
        return f"{LENGTHS} is {lengths}, {self.embeds.name} has {len(embeds)} tokens"

    def cast(self, env: DenoisingEnv, dtype: torch.dtype) -> DenoisingEnv:
        """Converts an environment for a transformer of another dtype."""
        kept = {field.name for field in self.fields if field.dtype != "model"}

        def branch(values: Mapping[str, EnvValue] | None) -> Any:
            def cast(tensor: Tensor) -> Tensor:
                return tensor.to(dtype) if tensor.is_floating_point() else tensor

            if values is None:
                return None
            return {key: value if key in kept else replace_tensors(value, cast) for key, value in values.items()}

        return replace(env, **{place: branch(getattr(env, place)) for place in (IMAGES, POSITIVE, NEGATIVE)})

    def missing(self, env: DenoisingEnv, *, is_guided: bool) -> Iterator[tuple[str, ConditioningField]]:
        """Yields the required fields that an environment lacks, each with the part that should hold it."""
        branches: tuple[Branch, ...] = ("positive", "negative") if is_guided else ("positive",)
        for branch in branches:
            for field in self.fields:
                value = field.value(env, branch)
                if field.is_required and (not isinstance(value, Tensor) if field.is_tensor else value is None):
                    yield field.place(branch), field

    def misfits(self, env: DenoisingEnv, *, is_guided: bool) -> Iterator[tuple[str, ConditioningField]]:
        """Yields the tensors with another number of text tokens than their branch's text embedding, each with its branch."""
        branches: tuple[Branch, ...] = ("positive", "negative") if is_guided else ("positive",)
        for branch in branches:
            embeds = self.embeds.value(env, branch)
            for field in self.fields:
                value, counted = field.value(env, branch), (field.shape or ("",))[0]
                if not isinstance(value, Tensor) or not isinstance(embeds, Tensor) or counted not in (TOKENS, SLOTS):
                    continue
                # An entry is true for a group of image tokens.
                count = len(value) if counted == TOKENS else int((value == 0).sum())
                if count != len(embeds):
                    yield field.place(branch), field

    def unequal(self, env: DenoisingEnv) -> ConditioningField | None:
        """Returns the first field of which a pair's branches have different shapes, though they are stacked."""
        for field in self.fields if self.pair else ():
            if field.batch == "stack" and len({value.shape for value in field.tensors(env)}) > 1:
                return field
        return None

    def _arguments(self) -> Iterator[Argument]:
        yield self.latents
        yield Argument(name=self.timestep)
        yield from (field for field in self.fields if field.is_passed)


def uncollate(output: Output, num_inputs: int) -> list[Output]:
    """Splits an output into one output per forward input that was collated."""
    rows = len(output) // num_inputs
    if isinstance(output, Tensor):
        return list(torch.split(output, rows))
    return [output[start : start + rows] for start in range(0, len(output), rows)]


def _entry(field: ConditioningField, env: DenoisingEnv, branch: Branch) -> Any:
    """Returns a field's value for one entry of the batch; plain values of list arguments are stored in a list of one."""
    value = field.value(env, branch)
    if value is None:
        assert not field.is_required, field.name
        return None
    return cast("Sequence[Any]", value)[0] if field.batch == "list" and not field.is_tensor else value


def _same_value(value: Any) -> Hashable:
    """Returns a key that only equal values share."""
    if isinstance(value, Tensor):
        # On another device, reading the numbers would make the host wait. There, only one and the same tensor is known to be
        # equal, and the samples of a request have one; see `ConditioningField.key` too. What is kept under a key depends on
        # shapes alone.
        same = bytes(tensor_bytes(plain_tensor(value))) if value.device.type == "cpu" else id(value)
        return tuple(value.shape), same
    return tuple(map(_same_value, value)) if isinstance(value, list | tuple) else cast(Hashable, value)
