"""Arguments that one script takes over from another, so that both mean the same by a key."""

import dataclasses
from collections.abc import Container

from common.cli import arg


def inherit(cls: type, without: Container[str] = (), defaults: dict | None = None) -> type:
    """A dataclass of the fields of `cls`, to be the base of another script's arguments.

    Args:
        without: keys that are left out.
        defaults: key → default, where it is another one.
    """
    fields = []
    for field in dataclasses.fields(cls):
        default = field.default
        if field.default_factory is not dataclasses.MISSING:
            default = field.default_factory()
        if field.name not in without:
            default = (defaults or {}).get(field.name, default)
            fields.append((field.name, field.type, arg(default, **field.metadata)))
    return dataclasses.make_dataclass(f"Inherited{cls.__name__}", fields, kw_only=True)
