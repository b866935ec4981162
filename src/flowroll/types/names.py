"""Short names for the fields of a dataclass, which its constructor accepts and its instances have as attributes.

Owns the rule for two names of one value: either name may be given, but not both.
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
        field: The name of the field.
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
    """Returns the field of every alias that a class declares."""
    return {name: value.field for name, value in vars(cls).items() if isinstance(value, Alias)}


def by_field(values: Mapping[str, Any], aliases: Mapping[str, str]) -> dict[str, Any]:
    """Returns values by the names of the fields.

    Args:
        values: The values by either name.
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
    """Lets a keyword-only dataclass be constructed by its aliases too; an error uses the name that was given."""
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
