"""Refusing values that would spoil a whole batch."""

from __future__ import annotations

from torch import Tensor

from flowroll.errors import InvalidRequestError

_MOST_SHOWN = 20
LOOK = "look at these pairs in replay.audit, or lower the learning rate"


def check_finite(subject: str, values: Tensor, unit: str, remedy: str) -> None:
    """Refuses values of which one is NaN or infinite; `unit` is what the first dimension counts."""
    refuse_where(~values.isfinite(), subject, "be finite", values, unit, remedy)


def check_means(subject: str, values: Tensor) -> None:
    """Refuses means of next latents that are not finite."""
    check_finite(subject, values, "pair", LOOK)


def check_stds(stds: Tensor) -> None:
    """Refuses the stds of deterministic steps, which have no density."""
    remedy = "take the pairs of sde_step_indices"
    refuse_where(~(stds > 0) | stds.isinf(), "stds", "be finite and above 0", stds, "pair", remedy)


def check_weights(weights: Tensor | None) -> None:
    """Refuses weights of pairs that are not finite."""
    if weights is not None:
        check_finite("weights", weights, "pair", "leave these pairs out")


def check_some(subject: str, values: Tensor) -> None:
    """Refuses a batch without pairs, whose mean would be NaN."""
    if values.numel() == 0:
        raise InvalidRequestError(f"{subject} must be of at least one pair, got none; skip this batch.", field=subject)


def check_positive(field: str, bound: float) -> None:
    """Refuses a bound that is not above 0; infinity is none at all."""
    if not bound > 0:
        raise InvalidRequestError(f"{field} must be above 0, got {bound}; leave it out.", field=field)


def check_choice(field: str, chosen: str, choices: tuple[str, ...]) -> None:
    """Refuses a word that is none of the choices."""
    if chosen not in choices:
        names = f"{', '.join(choices[:-1])} or {choices[-1]}"
        raise InvalidRequestError(f"{field} must be {names}, got {chosen!r}; choose one of these.", field=field)


def refuse_where(is_wrong: Tensor, subject: str, rule: str, values: Tensor, unit: str, remedy: str) -> None:
    """Refuses values, and says of which samples or pairs the wrong ones are: by number, or by row and column of a ratio."""
    if not is_wrong.any():
        return
    # Of latents, the pair alone tells.
    places = [tuple(place) for place in (is_wrong.flatten(1).any(1) if is_wrong.ndim > 2 else is_wrong).nonzero().tolist()]
    shown = ", ".join(str(place[0] if len(place) == 1 else place) for place in places[:_MOST_SHOWN])
    more = f" and {len(places) - _MOST_SHOWN} more" if len(places) > _MOST_SHOWN else ""
    where = f" at {unit}{'s' if len(places) > 1 else ''} {shown}{more}" if places[0] else ""
    raise InvalidRequestError(f"{subject} must {rule}, got {values[is_wrong][0].item()}{where}; {remedy}.", field=subject)
