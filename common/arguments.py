"""A script's arguments as a dataclass: fields with help, values in their types, and what a wrong key means.

A class whose mappings are another script's arguments says so by `sections`, {name: dataclass}. Their keys and
values are looked at where they are read, so that a message names the place where they were written. What is
wrong is left out of them and stands in `problems` of the instance, to be told with all else.
"""

import dataclasses
import difflib
import json
import types
import typing
from collections.abc import Iterable

from common.errors import UserError
from common.files import nearest


def arg(
    default: object = dataclasses.MISSING,
    help: str = "",
    choices: Iterable | None = None,
    metavar: str | None = None,
    shapes: bool = True,
    group: str | None = None,
) -> typing.Any:
    """A dataclass field with its help text; without a default it is required. Lists and dicts may be
    defaults.

    Args:
        metavar: names the value in `--help` where its type and key do not tell (common/cli.py).
        shapes: whether the argument shapes what the script writes. Those that do not (where things go, how
            fast, what is logged) may change between two starts of the same output; see `shaping_values`.
        group: heading in `--help` under which it stands with others, behind those that have none.
    """
    metadata = {"help": help, "choices": choices, "metavar": metavar, "shapes": shapes, "group": group}
    if isinstance(default, (list, dict)):
        return dataclasses.field(default_factory=lambda: type(default)(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def is_required(field: dataclasses.Field) -> bool:
    return field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING


def shaping_values(args: object, inputs: Iterable[str] = ()) -> dict:
    """{name: value} of the arguments that shape an output, as a manifest holds them.

    `inputs`: names of arguments to leave out, since the manifest holds what they name: files and models.
    """
    shaping = (f.name for f in dataclasses.fields(args) if f.metadata.get("shapes", True))
    return {name: getattr(args, name) for name in shaping if name not in inputs}


def shaping_defaults(cls: type) -> dict:
    """{name: default} of the same arguments, of their class; None of one that is required."""
    made = {}
    for field in dataclasses.fields(cls):
        if field.metadata.get("shapes", True):
            factory = field.default_factory
            default = field.default if factory is dataclasses.MISSING else factory()
            made[field.name] = None if default is dataclasses.MISSING else default
    return made


# ---- Values in their types ---------------------------------------------------------------------------------


def unwrap(hint: object) -> tuple[type, type | None, bool]:
    """(type, item type, may be None) of a type hint such as `list[int]` or `str | None`."""
    optional = False
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        members = [m for m in typing.get_args(hint) if m is not type(None)]
        optional = len(members) < len(typing.get_args(hint))
        hint = members[0]
    if typing.get_origin(hint) is list:
        return list, (typing.get_args(hint) or (str,))[0], optional
    return typing.get_origin(hint) or hint, None, optional


def one_or_several(hint: object) -> object | None:
    """`list[X]` of a hint `X | list[X]`, whose values are one X or several; None of any other hint."""
    members = typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else ()
    return members[1] if len(members) == 2 and members[1] == list[members[0]] else None


def _several(value):
    """A value of `X | list[X]`: a list of one is that one, and a text may list several: `1.0,0.7`."""
    if isinstance(value, str) and ("," in value or value.startswith("[")):
        value = [word.strip() for word in value.removeprefix("[").removesuffix("]").split(",")]
    return value[0] if isinstance(value, list) and len(value) == 1 else value


def _as_bool(value):
    words = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}
    return value if isinstance(value, bool) else words[str(value).lower()]


def _as_dict(value):
    value = json.loads(value) if isinstance(value, str) else value
    if not isinstance(value, dict):
        raise ValueError
    return value


def _as_number(kind, value):
    # PyYAML reads 5e-7 as a string
    if isinstance(value, bool) or (kind is int and isinstance(value, float) and value != int(value)):
        raise ValueError
    return kind(value)


def _as_text(value):
    if isinstance(value, (list, dict)):
        raise ValueError
    return str(value)


CONVERTED = {
    bool: (_as_bool, "true or false"),
    dict: (_as_dict, "a mapping (JSON on the command line)"),
    int: (lambda value: _as_number(int, value), "a whole number"),
    float: (lambda value: _as_number(float, value), "a number"),
    str: (_as_text, "a text"),
}


def convert(name: str, value: object, hint: object) -> object:
    """`value`, from YAML or the command line, as the type of its field; a UserError names the key."""
    if several := one_or_several(hint):
        value = _several(value)
        hint = several if isinstance(value, list) and value else hint
    kind, item, optional = unwrap(hint)
    if kind is list and optional and isinstance(value, list) and len(value) == 1:
        value = value[0]  # so that --key none is None
    if value is None or (isinstance(value, str) and value.lower() in ("none", "null") and optional):
        if optional:
            return None
        raise UserError(f"{name} needs a value")
    if kind is list:
        return [convert(name, v, item) for v in (value if isinstance(value, list) else [value])]
    function, wanted = CONVERTED[kind]
    try:
        return function(value)
    except (ValueError, KeyError, TypeError, OverflowError):
        raise UserError(f"{name}: {value!r} is not {wanted}") from None


def check_choice(cls: type, key: str, value: object, called: str) -> None:
    """Refuse a value that is none of the choices of its field."""
    choices = cls.__dataclass_fields__[key].metadata["choices"]
    if choices and value is not None and value not in choices:
        raise UserError(f"{called}: {value!r} is not one of {', '.join(map(str, choices))}")


def known(cls: type, values: dict, where: str) -> dict:
    """`values` if all its keys are fields of `cls`; an unknown one is an error that names the nearest."""
    for key in values:
        if key not in cls.__dataclass_fields__:
            raise UserError(f"unknown key {key!r} in {where}{meant(cls, str(key))}")
    return values


def build(cls: type, values: dict, where: str = "") -> typing.Any:
    """An instance of `cls` from a mapping, with types converted, choices and required keys checked.

    Raises:
        UserError: as `parse` of common/cli.py; `where` is added to each message.
    """
    hints, place = typing.get_type_hints(cls), f" in {where}" if where else ""
    given = known(cls, values, where or "the arguments")
    merged = {key: convert(f"{key}{place}", value, hints[key]) for key, value in given.items()}
    for field in dataclasses.fields(cls):
        if field.name in merged:
            check_choice(cls, field.name, merged[field.name], f"{field.name}{place}")
        elif is_required(field):
            raise UserError(f"missing --{field.name}{place}: {field.metadata['help']}")
    return cls(**merged)


# ---- Sections, and what a wrong key may mean ---------------------------------------------------------------


def sections_of(cls: type) -> dict[str, type]:
    """{name of a mapping: the dataclass of its keys}."""
    return getattr(cls, "sections", {})


def meant(cls: type, key: str, lead: str = "", section: str | None = None) -> str:
    """`, did you mean …?` for an unknown key: the same word in another case or another section, else the
    nearest one where it stood. A key of another driver's (`elsewhere` of the class: key → its command) is
    called that.

    Args:
        cls: the dataclass. section: name of its mapping in which the key stood. lead: `--` for a key of the
            command line.
    """
    sections, (head, _, tail) = sections_of(cls), key.partition(".")
    if section is None and head in getattr(cls, "elsewhere", {}):
        return f", which is a key of another kind of run: {cls.elsewhere[head]}"
    if section is None and tail:  # --generaton.K
        close = difflib.get_close_matches(head, list(sections), n=1, cutoff=0.5)
        return f", did you mean '{lead}{close[0]}.{tail}'?" if close else ""
    own = (sections[section] if section else cls).__dataclass_fields__
    if key.casefold() not in {name.casefold() for name in own}:
        places = {cls: ""}
        for name, kind in sections.items():
            places.setdefault(kind, f"{name}.")  # of two sections of one kind the first is meant
        decided = getattr(cls, "decided", {})  # not to be given there
        taken = {f"{name}.{given}" for name, keys in decided.items() for given in keys}
        found = [
            f"{place}{name}"
            for kind, place in places.items()
            for name in kind.__dataclass_fields__
            if name.casefold() == key.casefold() and f"{place}{name}" not in taken
        ]
        if found:
            return f", did you mean {' or '.join(lead + name for name in found)}?"
    flags = getattr(cls, "driver_flags", ()) if lead and section is None else ()
    return nearest(key, [*own, *flags], f"{lead}{section}." if lead and section else lead)


def accepted(cls: type, section: str, values: dict, problems: list[str], place: str | None = None) -> dict:
    """What a section's dataclass accepts of the mapping `values`; what is wrong with the rest goes to
    `problems`, with where it was written: in the YAML `place`, else on the command line.
    """
    kind, found = sections_of(cls)[section], {}
    hints = typing.get_type_hints(kind)
    for key, value in values.items():
        called = f"{section}.{key} in {place}" if place else f"--{section}.{key}"
        try:
            if key not in hints:
                what = f"key {str(key)!r} in {section} of {place}" if place else f"argument {called}"
                raise UserError(f"unknown {what}{meant(cls, str(key), '' if place else '--', section)}")
            check_choice(kind, key, convert(called, value, hints[key]), called)
            found[key] = value
        except UserError as error:
            problems.append(str(error))
    return found
