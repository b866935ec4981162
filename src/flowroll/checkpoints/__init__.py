"""The small checkpoints that flowroll ships: policies that draw one coloured shape where the prompt says, 64 x 64 pixels.

`python -m flowroll.examples.shapes.train` made them. A prompt reads "a red circle at the top left": red, green, blue, yellow,
pink or white; circle, square or triangle; at the top left, top right, bottom left or bottom right, or in the center.
"""

from __future__ import annotations

from pathlib import Path

from flowroll.errors import CheckpointError

_PREFIX = "shapes-"
_FOLDER = Path(__file__).parent
_INDEX = "model_index.json"
# The families that one is shipped for.
SHAPES_FAMILIES = tuple(sorted(path.name.removeprefix(_PREFIX) for path in _FOLDER.glob(f"{_PREFIX}*")))
SHAPES = tuple(_PREFIX + family for family in SHAPES_FAMILIES)


def shapes_checkpoint(family: str) -> Path:
    """Returns the folder of a family's shipped checkpoint.

    Args:
        family: One of `SHAPES_FAMILIES`.

    Raises:
        CheckpointError: flowroll ships no checkpoint for this family.
    """
    name = _PREFIX + family
    if name not in SHAPES:
        raise CheckpointError(f"family must be one of {', '.join(SHAPES_FAMILIES)}, got {family}; choose one.")
    return _FOLDER / name


def resolve(model: str | Path) -> Path:
    """Returns the folder that MODEL names: a path, or the name of a shipped checkpoint where no such path exists."""
    path = Path(model)
    return _FOLDER / str(model) if str(model) in SHAPES and not path.exists() else path


def find_checkpoint(model: str | Path) -> Path:
    """Resolves MODEL as `resolve` does, and refuses what is no checkpoint folder at all; the engine checks the files.

    Raises:
        CheckpointError: The folder does not exist, or it has no model_index.json.
    """
    folder = resolve(model)
    if not folder.exists():
        raise CheckpointError(
            f"{folder} must be a diffusers checkpoint folder, got no such folder; check the path, or use one that flowroll "
            f"ships: {', '.join(SHAPES)}."
        )
    if not (folder / _INDEX).is_file():
        raise CheckpointError(
            f"{folder} must be a diffusers checkpoint folder, got no {_INDEX}; give the folder that holds {_INDEX}."
        )
    return folder
