"""Short names for the fields of a dataclass: accepted where it is made, readable on what was made.

Owns the rule for two names of one value: either may be given, both may not.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any, Generic, TypeVar, overload

from flowroll.errors import InvalidRequestError

T = TypeVar("T")
ClassT = TypeVar("ClassT", bound=type)


class Alias(Generic[T]):
    """A second name for a field; stands in the body of a dataclass that `accept_aliases` decorates.

    Args:
        field: Name of the field.
    """

    def __init__(self, field: str) -> None:
        self.field = field

    @overload
    def __get__(self, instance: None, owner: type) -> Alias[T]: ...
    @overload
    def __get__(self, instance: object, owner: type) -> T: ...
    def __get__(self, instance: object | None, owner: type) -> Alias[T] | T:
        if instance is None:
            return self
        value: T = getattr(instance, self.field)
        return value


def aliases_of(cls: type) -> dict[str, str]:
    """The field of every alias that a class declares."""
    return {name: value.field for name, value in vars(cls).items() if isinstance(value, Alias)}


def by_field(values: Mapping[str, Any], aliases: Mapping[str, str]) -> dict[str, Any]:
    """The values by the names of the fields.

    Args:
        values: By either name.
        aliases: The field of every alias.

    Raises:
        InvalidRequestError: One value was given by both names.
    """
    for name in values:
        if name in aliases and aliases[name] in values:
            raise InvalidRequestError(
                f"{aliases[name]} must be given once, got {name} beside it; remove one of the two.", field=aliases[name]
            )
    return {aliases.get(name, name): value for name, value in values.items()}


def accept_aliases(cls: ClassT) -> ClassT:
    """Lets a keyword-only dataclass be made by its aliases too; an error about a field has the name that was given."""
    aliases = aliases_of(cls)
    make = cls.__init__  # type: ignore[misc]

    @functools.wraps(make)
    def __init__(self: Any, **values: Any) -> None:
        fields = by_field(values, aliases)
        given = {aliases.get(name, name): name for name in values}
        try:
            make(self, **fields)
        except InvalidRequestError as error:
            name = given.get(error.field or "", error.field)
            if name == error.field or name is None:
                raise
            raise error.renamed(name) from None

    cls.__init__ = __init__  # type: ignore[misc]
    return cls
