"""Arguments of a script from a YAML file and the command line.

A script declares its arguments as a dataclass and calls `parse`. Values come from the dataclass defaults,
then from an optional positional YAML file (or one section of it, `FILE.yaml:SECTION`), then from `--key
value`; the last one wins. An unknown key is an error that names the nearest known one.

Scripts take from here what they need of common/arguments.py, common/files.py and common/errors.py, too. Only
the standard library is imported (and PyYAML, where a YAML file is given), so that `--help` and a wrong
argument are answered before anything heavy is loaded.
"""

import argparse
import dataclasses
import re
import sys
import typing
from pathlib import Path

from common.arguments import (
    accepted,
    build,
    convert,
    is_required,
    known,
    meant,
    one_or_several,
    sections_of,
    unwrap,
)
from common.arguments import arg as arg
from common.arguments import shaping_defaults as shaping_defaults
from common.arguments import shaping_values as shaping_values
from common.errors import UserError, count, one_line, refuse, run  # noqa: F401
from common.files import existing_file, load_yaml, nearest, read_yaml  # noqa: F401

METAVARS = {bool: "true|false", int: "N", float: "X", dict: "JSON"}
ENDINGS = {  # of a text's key → what `--help` calls the text
    "_or_path|prompts": "NAME_OR_PATH",
    "_function": "FILE.py:NAME",
    "template|config|sampled|greedy": "FILE",
    "dir|path|cache|run|runs": "PATH",
    "_url": "URL",
    "command": "COMMAND",
    "_prompt": "TEXT",
}


class Parser(argparse.ArgumentParser):
    """What is wrong with the command line is a UserError."""

    def error(self, message: str):
        name, _, why = message.removeprefix("argument ").partition(": ")
        raise UserError(f"{name} needs a value" if why.startswith("expected") else f"{message}; see --help")


class _Help(argparse.RawDescriptionHelpFormatter):
    """The docstring as it is written, and lists as `NAME ...`."""

    def _format_args(self, action, default_metavar):
        if action.nargs in ("*", "+"):
            return f"{action.metavar} ..."
        return super()._format_args(action, default_metavar)


def parse(
    cls: type, description: str, argv: list[str] | None = None, yaml_positional: bool = True
) -> typing.Any:
    """An instance of the dataclass `cls` from defaults, YAML and command line.

    Args:
        cls: dataclass whose fields are made by `arg`.
        description: the script's docstring, shown by `--help`.
        argv: arguments, `sys.argv[1:]` if None.
        yaml_positional: whether a YAML file, or a section of one as `FILE.yaml:SECTION`, may be given as the
            first positional argument. A section may hold keys of `cls.shares_section`, another dataclass,
            which are passed over.

    Raises:
        UserError: unknown key, wrong type, value outside its choices, missing required key, unreadable YAML,
            unknown section.
    """
    config, values, dotted = _read_command_line(cls, description, argv, yaml_positional)
    mappings = _read_config(cls, config)
    if len(mappings) > 1:
        raise UserError(f"{config} names {len(mappings)} sections, this script takes one")
    return _settle(cls, *mappings[0], values, dotted)


def parse_jobs(cls, description: str, argv: list[str] | None = None) -> list:
    """As `parse`, for a script that does several jobs in one start: an instance of `cls` for each.

    `FILE.yaml:SECTION,SECTION` gives a section to each job, and the arguments that `cls.per_job` names take
    one value for all jobs or one per job on the command line.

    Raises:
        UserError: as `parse`, and where the numbers of values differ.
    """
    config, values, dotted = _read_command_line(cls, description, argv, True, cls.per_job)
    mappings = _read_config(cls, config)
    given = {f"--{name}": len(values[name]) for name in cls.per_job if name in values}
    given |= {str(config): len(mappings)}
    longest = max(given, key=given.get)
    for name, number in given.items():
        if number not in (1, given[longest]):
            how = f"{name} gives {number} and {longest} {given[longest]}"
            raise UserError(f"{how}: give one for all jobs, or one per job")
    jobs = []
    for k in range(given[longest]):
        own = {key: value[k % len(value)] if key in cls.per_job else value for key, value in values.items()}
        jobs.append(_settle(cls, *mappings[k % len(mappings)], own, dotted))
    return jobs


def read_section(cls: type, config: str, values: dict, without: typing.Iterable[str] = ()) -> typing.Any:
    """An instance of `cls` from a YAML file or a section of one, with `values` in place of some of its keys;
    those in `without` are passed over.

    Raises:
        UserError: as `parse`.
    """
    mappings = _read_config(cls, config)
    if len(mappings) > 1:
        raise UserError(f"{config} names {len(mappings)} sections, one was expected")
    [(place, mapping)] = mappings
    taken = {key: value for key, value in mapping.items() if key not in without}
    return build(cls, taken | values, place)


def _read_command_line(cls, description, argv, yaml_positional, per_job=()):
    """(positional YAML or None, {key: converted value}, list of (mapping, key, value) of dotted keys).

    The value of a key in `per_job` is a list of values.
    """
    argv = sys.argv[1:] if argv is None else argv
    hints = typing.get_type_hints(cls)
    parser = Parser(description=description, formatter_class=_Help, allow_abbrev=False)
    if yaml_positional:
        shown = "YAML file with any of the keys below, or FILE.yaml:SECTION; the command line wins"
        parser.add_argument("config", nargs="?", help=shown)
    groups = {None: parser}
    for field in sorted(dataclasses.fields(cls), key=lambda field: field.metadata["group"] is not None):
        group, options = field.metadata["group"], _option(field, hints[field.name])
        if group not in groups:
            groups[group] = parser.add_argument_group(group)
        options |= {"nargs": "+"} if field.name in per_job else {}
        groups[group].add_argument(f"--{field.name}", **options)
    argv, dotted = _split_dotted(argv, [name for name in hints if unwrap(hints[name])[0] is dict])
    namespace, unknown = parser.parse_known_args(argv)
    if unknown:
        key = unknown[0].split("=")[0]
        if not key.startswith("--"):
            raise UserError(f"unexpected argument {key!r}; arguments are --key value, see --help")
        raise UserError(f"unknown argument {key}{meant(cls, key[2:], '--')}")
    values = vars(namespace)
    config = values.pop("config", None)
    for key, value in values.items():
        hint = list[hints[key]] if key in per_job else hints[key]
        value = value if one_or_several(hints[key]) else _listed(value)  # [a, b] is several of one job
        values[key] = convert(f"--{key}", value, hint)
    return config, values, dotted


def _option(field, hint):
    """How argparse is to show and read a field."""
    kind, item, _ = unwrap(hint)
    default = "" if is_required(field) else field.default
    if default is dataclasses.MISSING:
        default = field.default_factory()
    choices = field.metadata["choices"]
    shown = field.metadata["help"] + (f" ({', '.join(map(str, choices))})" if choices else "")
    shown += f" [{default}]" if default not in ("", None, [], {}) else ""
    called = field.metadata["metavar"] or _metavar(field.name, item or kind, choices)
    options = {"help": shown.replace("%", "%%"), "default": argparse.SUPPRESS, "metavar": called}
    if kind is bool:
        options |= {"nargs": "?", "const": True}
    elif kind is list:
        options |= {"nargs": "*"}
    return options


def _metavar(name, kind, choices):
    """What `--help` calls a value, by its type and, for text, by its key."""
    if kind in METAVARS:
        return METAVARS[kind]
    if choices and len(shown := "|".join(map(str, choices))) <= 40:
        return shown
    return next((called for ends, called in ENDINGS.items() if re.search(f"({ends})$", name)), "NAME")


def _read_config(cls, config):
    """[(place, mapping)] of a positional YAML: the file, or each section that `FILE.yaml:SECTION,…` names."""
    if config is None:
        return [(None, {})]
    path, colon, names = config.rpartition(":")
    if not colon or Path(config).exists():
        return [(config, read_yaml(config))]
    whole, found = read_yaml(path), []
    for name in names.split(","):
        if not isinstance(whole.get(name), dict):
            there = [str(key) for key, value in whole.items() if isinstance(value, dict)]
            others = f"its sections: {', '.join(there)}" if there else "it has none"
            raise UserError(f"{path} has no section {name!r}{nearest(name, there)}; {others}")
        found.append((f"{path}:{name}", _of_section(cls, whole[name])))
    return found


def _of_section(cls, mapping):
    """The keys of a section that are given to `cls`: not those of the class that it shares the section with,
    nor an empty value where `cls` needs one.
    """
    hints, others = typing.get_type_hints(cls), getattr(cls, "shares_section", None)
    passed_over = set(others.__dataclass_fields__) - set(hints) if others else set()
    return {
        key: value
        for key, value in mapping.items()
        if key not in passed_over and (value is not None or key not in hints or unwrap(hints[key])[2])
    }


def _settle(cls, place, mapping, values, dotted):
    """An instance of `cls`: the mapping of the YAML at `place`, then the command line's `values` and `dotted`
    keys.
    """
    hints, sections, problems = typing.get_type_hints(cls), sections_of(cls), []
    given = known(cls, mapping, place)
    merged = {key: convert(f"{key} in {place}", value, hints[key]) for key, value in given.items()}
    for name in sections.keys() & merged.keys():
        merged[name] = accepted(cls, name, merged[name], problems, place)
    merged |= values
    for name in sections.keys() & values.keys():  # JSON
        merged[name] = accepted(cls, name, merged[name], problems)
    for name, key, value in dotted:  # --generation.K 4
        own = accepted(cls, name, {key: value}, problems) if name in sections else {key: value}
        merged[name] = {**(merged.get(name) or {}), **own}
    made = build(cls, merged)
    if sections:
        made.problems = problems
    return made


def _split_dotted(argv, mappings):
    """Take `--mapping.key value` out of `argv`; returns what is left, and (mapping, key, value) of each."""
    rest, dotted, words = [], [], iter(argv)
    for word in words:
        match = re.fullmatch(r"--([A-Za-z_]+)\.([A-Za-z_]\w*)(?:=(.*))?", word, re.DOTALL)
        if match is None or match[1] not in mappings:
            rest.append(word)
            continue
        value = match[3] if match[3] is not None else next(words, None)
        if value is None:
            raise UserError(f"{word} needs a value")
        dotted.append((match[1], match[2], _scalar(value)))
    return rest, dotted


def _listed(value):
    """`['[a, b]']`, a list written as one word of YAML, as the list that it is."""
    if isinstance(value, list) and len(value) == 1 and value[0].startswith("[") and value[0].endswith("]"):
        inner = _scalar(value[0])
        return inner if isinstance(inner, list) else value
    return value


def _scalar(text):
    import yaml

    try:
        return load_yaml(text)
    except (yaml.YAMLError, UnicodeEncodeError):  # bytes that are no UTF-8 are text
        return text
