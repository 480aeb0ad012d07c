"""Arguments from a YAML file and the command line, and errors that a person can act on.

A script declares its arguments as a dataclass and calls `parse`. Values come from the dataclass defaults,
then from an optional positional YAML file (or one section of it, `FILE.yaml:SECTION`), then from `--key
value`; the last one wins. An unknown key is an error that names the nearest known one. `run` turns a
`UserError` into one line on stderr and exit status 2.

A class whose mappings are another script's arguments says so by `sections`: their keys and values are looked
at where they are read, so that a message names the place where they were written. What is wrong is left out
of them and stands in `problems` of the instance, to be told with all else.

Only the standard library is imported here (and PyYAML, where a YAML file is given), so that `--help` and a
wrong argument are answered before anything heavy is loaded.
"""

import argparse
import dataclasses
import difflib
import errno
import json
import os
import re
import signal
import sys
import time
import types
import typing
from collections.abc import Callable, Hashable, Iterable
from pathlib import Path

from common import packages

ERROR_SECONDS = 15  # that other ranks wait for rank 0 to print the error
NO_ROOM = (errno.EFBIG, errno.ENOSPC, errno.EDQUOT)


class UserError(Exception):
    """What is wrong and what to do, in one line; shown without a traceback."""


class UserErrors(UserError):
    """Several of them, a line each."""

    def __init__(self, problems):
        super().__init__("\nerror: ".join(problems))
        self.problems = problems


def refuse(problems: list[str]) -> None:
    """Raise what is wrong, all at once; nothing where there is nothing."""
    if problems:
        raise UserErrors(problems) if len(problems) > 1 else UserError(problems[0])


def arg(
    default: object = dataclasses.MISSING,
    help: str = "",
    choices: Iterable | None = None,
    metavar: str | None = None,
    shapes: bool = True,
) -> typing.Any:
    """A dataclass field with its help text; without a default it is required. Lists and dicts may be
    defaults.

    Args:
        metavar: names the value in `--help` where its type and key do not tell (see `_metavar`).
        shapes: whether the argument shapes what the script writes. Those that do not (where things go, how
            fast, what is logged) may change between two starts of the same output; see `shaping_values`.
    """
    metadata = {"help": help, "choices": choices, "metavar": metavar, "shapes": shapes}
    if isinstance(default, (list, dict)):
        return dataclasses.field(default_factory=lambda: type(default)(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def shaping_values(args: object, inputs: Iterable[str] = ()) -> dict:
    """{name: value} of the arguments that shape an output, as a manifest holds them.

    `inputs`: names of arguments to leave out, since the manifest holds what they name: files and models.
    """
    shaping = (f.name for f in dataclasses.fields(args) if f.metadata.get("shapes", True))
    return {name: getattr(args, name) for name in shaping if name not in inputs}


def one_line(error: BaseException, limit: int = 300) -> str:
    """An error of a library in one line: its kind, and the beginning of what it says."""
    text = " ".join(str(error).split())[:limit]
    if (
        "ignore_mismatched_sizes" in text
    ):  # transformers points at a report above, which the scripts do not show
        text = "its weights have other shapes than its config.json says"
    return f"{type(error).__name__}: {text}"


def count(number: int, one: str, many: str | None = None) -> str:
    """`1 response`, `2 responses`, `0 processes`."""
    if many is None:
        many = f"{one}es" if one.endswith(("s", "x", "ch", "sh")) else f"{one}s"
    return f"{number} {one if number == 1 else many}"


def nearest(word: str, known: Iterable[str], lead: str = "") -> str:
    """`, did you mean …?` for the nearest known word, whatever its case, or the empty string; `lead` is put
    in front of it.
    """
    names = {name.casefold(): name for name in known}
    close = difflib.get_close_matches(word.casefold(), list(names), n=1, cutoff=0.5)
    return f", did you mean {lead + names[close[0]]!r}?" if close else ""


def existing_file(path: str | Path, what: str = "file", besides: Iterable[str | Path] = ()) -> Path:
    """`path` as a Path if it is a file; otherwise an error that offers what may have been meant.

    That is a file of the same name in a folder beside, else one of a like name in its folder, else the
    folder's files of its kind. `besides` are files that cannot be meant, since they have another part
    already.
    """
    path = Path(path)
    if path.is_file():
        return path
    if path.is_dir():
        raise UserError(f"{what} {path} is a folder, a file was expected")
    taken = {Path(name).resolve() for name in besides}

    def files(folder: Path) -> list[Path]:
        return (
            sorted(f for f in folder.iterdir() if f.is_file() and f.resolve() not in taken)
            if folder.is_dir()
            else []
        )

    around = [path.parent]
    if path.parent.parent.is_dir():  # ./config/x.yaml for ./configs/x.yaml
        around += sorted(f for f in path.parent.parent.iterdir() if f.is_dir())
    own = {f.stem: f for f in files(path.parent) if f.suffix == path.suffix or not path.suffix}
    named = [f for folder in around for f in files(folder) if f.stem == path.stem]
    near = (
        sorted(named, key=lambda f: f.name != path.name)[:1]
        or [own[stem] for stem in difflib.get_close_matches(path.stem, list(own), n=1, cutoff=0.6)]
        or list(own.values())[:5]
    )
    there = f"; there {'is' if len(near) == 1 else 'are'} {', '.join(map(str, near))}" if near else ""
    raise UserError(f"no such {what}: {path}{there}")


def read_yaml(path: str | Path, what: str = "YAML file") -> dict:
    """The mapping in a YAML file; anything else is an error with the place in the file."""
    import yaml

    path = existing_file(path, what)
    try:
        values = load_yaml(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from None
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise UserError(f"{path} must hold `key: value` lines, it holds a {type(values).__name__}")
    return values


def load_yaml(text: str) -> object:
    """As `yaml.safe_load`, but a key that is given twice is a YAMLError with both lines."""
    import yaml

    class Loader(yaml.SafeLoader):
        def construct_mapping(self, node: yaml.Node, deep: bool = False) -> dict:
            seen = {}
            for key, _ in node.value if isinstance(node, yaml.MappingNode) else ():
                if key.tag == "tag:yaml.org,2002:merge":  # `<<: *defaults`: the mapping's own keys are to win
                    continue
                name, line = self.construct_object(key, deep=True), key.start_mark.line + 1
                if isinstance(name, Hashable):
                    if name in seen:
                        raise yaml.YAMLError(
                            f"{name!r} is given twice, in lines {seen[name]} and {line}: keep one of them"
                        )
                    seen[name] = line
            return super().construct_mapping(node, deep)

    return yaml.load(text, Loader)


def _unwrap(hint):
    """(type, item type, may be None) of a type hint such as `list[int]` or `str | None`."""
    optional = False
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        members = [m for m in typing.get_args(hint) if m is not type(None)]
        optional = len(members) < len(typing.get_args(hint))
        hint = members[0]
    if typing.get_origin(hint) is list:
        return list, (typing.get_args(hint) or (str,))[0], optional
    return typing.get_origin(hint) or hint, None, optional


def convert(name: str, value: object, hint: object) -> object:
    """`value`, from YAML or the command line, as the type of its field; a UserError names the key."""
    kind, item, optional = _unwrap(hint)
    if kind is list and optional and isinstance(value, list) and len(value) == 1:
        value = value[0]  # so that --key none is None
    if value is None or (isinstance(value, str) and value.lower() in ("none", "null") and optional):
        if optional:
            return None
        raise UserError(f"{name} needs a value")
    if kind is list:
        return [convert(name, v, item) for v in (value if isinstance(value, list) else [value])]
    try:
        if kind is bool:
            if isinstance(value, bool):
                return value
            return {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}[
                str(value).lower()
            ]
        if kind is dict:
            value = json.loads(value) if isinstance(value, str) else value
            if not isinstance(value, dict):
                raise ValueError
            return value
        if kind is int:
            if isinstance(value, bool) or (isinstance(value, float) and value != int(value)):
                raise ValueError
            return int(value)
        if kind is float:
            if isinstance(value, bool):
                raise ValueError
            return float(value)  # PyYAML reads 5e-7 as a string
        if isinstance(value, (list, dict)):
            raise ValueError
        return str(value)
    except (ValueError, KeyError):
        wanted = {
            "dict": "a mapping (JSON on the command line)",
            "bool": "true or false",
            "int": "a whole number",
            "float": "a number",
            "str": "a text",
        }
        raise UserError(
            f"{name}: {value!r} is not {wanted.get(kind.__name__, f'a {kind.__name__}')}"
        ) from None


class _Parser(argparse.ArgumentParser):
    def error(self, message: str):
        raise UserError(f"{message}; see --help")


class _Help(argparse.RawDescriptionHelpFormatter):
    """The docstring as it is written, and lists as `NAME ...`."""

    def _format_args(self, action, default_metavar):
        return (
            f"{action.metavar} ..."
            if action.nargs in ("*", "+")
            else super()._format_args(action, default_metavar)
        )


def _metavar(name, kind, choices):
    """What `--help` calls a value, by its type and, for text, by its key."""
    if kind in (bool, int, float, dict):
        return {bool: "true|false", int: "N", float: "X", dict: "JSON"}[kind]
    if choices and len(shown := "|".join(map(str, choices))) <= 40:
        return shown
    ends = {
        "_or_path": "NAME_OR_PATH",
        "prompts": "NAME_OR_PATH",
        "_function": "FILE.py:NAME",
        "template": "FILE",
        "config": "FILE",
        "sampled": "FILE",
        "greedy": "FILE",
        "dir": "PATH",
        "path": "PATH",
        "cache": "PATH",
        "run": "PATH",
        "runs": "PATH",
        "_url": "URL",
        "command": "COMMAND",
        "_prompt": "TEXT",
    }
    return next((called for end, called in ends.items() if name.endswith(end)), "NAME")


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
            raise UserError(
                f"{name} gives {number} and {longest} {given[longest]}: give one for all jobs, or one per job"
            )
    jobs = []
    for k in range(given[longest]):
        own = {key: value[k % len(value)] if key in cls.per_job else value for key, value in values.items()}
        jobs.append(_settle(cls, *mappings[k % len(mappings)], own, dotted))
    return jobs


def _read_command_line(cls, description, argv, yaml_positional, per_job=()):
    """(positional YAML or None, {key: converted value}, list of (mapping, key, value) of dotted keys).

    The value of a key in `per_job` is a list of values.
    """
    argv = sys.argv[1:] if argv is None else argv
    hints = typing.get_type_hints(cls)
    parser = _Parser(description=description, formatter_class=_Help, allow_abbrev=False)
    if yaml_positional:
        parser.add_argument(
            "config",
            nargs="?",
            help="YAML file with any of the keys below, or FILE.yaml:SECTION; the command line wins",
        )
    for field in dataclasses.fields(cls):
        options = _option(field, hints[field.name])
        parser.add_argument(f"--{field.name}", **options | ({"nargs": "+"} if field.name in per_job else {}))
    argv, dotted = _split_dotted(argv, [name for name in hints if _unwrap(hints[name])[0] is dict])
    namespace, unknown = parser.parse_known_args(argv)
    if unknown:
        key = unknown[0].split("=")[0]
        if not key.startswith("--"):
            raise UserError(f"unexpected argument {key!r}; arguments are --key value, see --help")
        raise UserError(f"unknown argument {key}{_meant(cls, key[2:], '--')}")
    values = vars(namespace)
    config = values.pop("config", None)
    for key, value in values.items():
        if key in per_job:
            values[key] = [convert(f"--{key}", one, hints[key]) for one in _listed(value)]
        else:
            values[key] = convert(f"--{key}", _listed(value), hints[key])
    return config, values, dotted


def _option(field, hint):
    """How argparse is to show and read a field."""
    kind, item, _ = _unwrap(hint)
    default = field.default
    if default is dataclasses.MISSING:
        default = "" if field.default_factory is dataclasses.MISSING else field.default_factory()
    choices = field.metadata["choices"]
    shown = field.metadata["help"] + (f" ({', '.join(map(str, choices))})" if choices else "")
    shown += f" [{default}]" if default not in ("", None, [], {}) else ""
    called = field.metadata["metavar"] or _metavar(field.name, item if kind is list else kind, choices)
    options = {"help": shown.replace("%", "%%"), "default": argparse.SUPPRESS, "metavar": called}
    if kind is bool:
        options |= {"nargs": "?", "const": True}
    elif kind is list:
        options |= {"nargs": "*"}
    return options


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
            raise UserError(
                f"{path} has no section {name!r}{nearest(name, there)}; "
                + (f"its sections: {', '.join(there)}" if there else "it has none")
            )
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
        if key not in passed_over and (value is not None or key not in hints or _unwrap(hints[key])[2])
    }


def _settle(cls, place, mapping, values, dotted):
    """An instance of `cls`: the mapping of the YAML at `place`, then the command line's `values` and `dotted`
    keys.
    """
    hints, problems = typing.get_type_hints(cls), []
    merged = {
        key: convert(f"{key} in {place}", value, hints[key])
        for key, value in known(cls, mapping, place).items()
    }
    for name in _sections(cls).keys() & merged.keys():
        called = "{name}.{key} in " + str(place)
        unknown = "unknown key {key!r} in {name} of " + str(place)
        merged[name] = _right(cls, name, merged[name], problems, called, unknown)
    merged |= values
    for name in _sections(cls).keys() & values.keys():  # JSON
        merged[name] = _right(cls, name, merged[name], problems)
    for name, key, value in dotted:  # --generation.K 4
        given = _right(cls, name, {key: value}, problems) if name in _sections(cls) else {key: value}
        merged[name] = {**merged.get(name, {}), **given}
    made = build(cls, merged)
    if _sections(cls):
        made.problems = problems
    return made


def _sections(cls):
    """{name of a mapping: the dataclass of its keys, or a function that returns it} of a class that says so
    by `sections`.
    """
    return getattr(cls, "sections", {})


def _fields(kind):
    return (kind if isinstance(kind, type) else kind()).__dataclass_fields__


def _meant(cls, key, lead="", section=None):
    """`, did you mean …?` for an unknown key: the same word in another case or another section, else the
    nearest one where it stood. A key of another driver's (`elsewhere` of the class: key → its command) is
    called that.

    Args:
        cls: the dataclass. section: name of its mapping in which the key stood. lead: `--` for a key of the
            command line.
    """
    other = getattr(cls, "elsewhere", {}).get(key.partition(".")[0]) if section is None else None
    if other:
        return f", which is a key of another kind of run: {other}"
    head, dot, tail = key.partition(".")
    if dot and section is None:  # --generaton.K
        close = difflib.get_close_matches(head, list(_sections(cls)), n=1, cutoff=0.5)
        return f", did you mean '{lead}{close[0]}.{tail}'?" if close else ""
    prefix, own = (
        ("", cls.__dataclass_fields__)
        if section is None
        else (f"{section}.", _fields(_sections(cls)[section]))
    )
    if key.casefold() not in {name.casefold() for name in own}:
        places = {cls: ("", cls.__dataclass_fields__)}
        for name, kind in _sections(cls).items():
            places.setdefault(
                kind, (f"{name}.", _fields(kind))
            )  # of two sections of one kind the first is meant
        taken = {
            f"{name}.{given}" for name, keys in getattr(cls, "decided", {}).items() for given in keys
        }  # not to be given there
        found = [
            f"{place}{name}"
            for place, names in places.values()
            for name in names
            if name.casefold() == key.casefold()
        ]
        found = [lead + place for place in found if place not in taken]
        if found:
            return f", did you mean {' or '.join(found)}?"
    flags = getattr(cls, "driver_flags", ()) if lead and section is None else ()
    return nearest(key, [*own, *flags], f"{lead}{prefix if lead else ''}")


def _right(cls, name, values, problems, called="--{name}.{key}", unknown="unknown argument --{name}.{key}"):
    """What a section's dataclass would accept of the mapping `values`; of the rest it is said in `problems`
    where it was written.

    Args:
        name: of the section. called, unknown: patterns of what a key is called, and of what is said of an
            unknown one.
    """
    kind = _sections(cls)[name] if isinstance(_sections(cls)[name], type) else _sections(cls)[name]()
    hints, right = typing.get_type_hints(kind), {}
    for key, value in values.items():
        words = {"name": name, "key": str(key)}
        try:
            if key not in hints:
                raise UserError(
                    unknown.format(**words)
                    + _meant(cls, str(key), "--" if called.startswith("--") else "", name)
                )
            _check_choice(
                kind, key, convert(called.format(**words), value, hints[key]), called.format(**words)
            )
            right[key] = value
        except UserError as error:
            problems.append(str(error))
    return right


def _check_choice(kind, key, value, called):
    choices = kind.__dataclass_fields__[key].metadata["choices"]
    if choices and value not in choices:
        raise UserError(f"{called}: {value!r} is not one of {', '.join(map(str, choices))}")


def _split_dotted(argv, mappings):
    """Take `--mapping.key value` out of `argv`; returns what is left and the list of (mapping, key,
    value).
    """
    rest, dotted, i = [], [], 0
    while i < len(argv):
        match = re.fullmatch(r"--([A-Za-z_]+)\.([A-Za-z_]\w*)(?:=(.*))?", argv[i], re.DOTALL)
        if match is None or match[1] not in mappings:
            rest.append(argv[i])
            i += 1
            continue
        if match[3] is None and i + 1 == len(argv):
            raise UserError(f"{argv[i]} needs a value")
        value = match[3] if match[3] is not None else argv[i + 1]
        dotted.append((match[1], match[2], _scalar(value)))
        i += 1 if match[3] is not None else 2
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
    except yaml.YAMLError:
        return text


def known(cls, values: dict, where: str) -> dict:
    """`values` if all its keys are fields of `cls`; an unknown one is an error that names the nearest."""
    fields = {f.name for f in dataclasses.fields(cls)}
    for key in values:
        if key not in fields:
            raise UserError(f"unknown key {key!r} in {where}{_meant(cls, str(key))}")
    return values


def build(cls: type, values: dict, where: str = "") -> typing.Any:
    """An instance of `cls` from a mapping, with types converted, choices and required keys checked.

    Raises:
        UserError: as `parse`; `where` is added to each message.
    """
    hints, fields = typing.get_type_hints(cls), {f.name: f for f in dataclasses.fields(cls)}
    place = f" in {where}" if where else ""
    merged = {
        key: convert(f"{key}{place}", value, hints[key])
        for key, value in known(cls, values, where or "the arguments").items()
    }
    required = dataclasses.MISSING
    for name, field in fields.items():
        if field.default is required and field.default_factory is required and name not in merged:
            raise UserError(f"missing --{name}{place}: {field.metadata['help']}")
        if name in merged:
            _check_choice(cls, name, merged[name], f"{name}{place}")
    return cls(**merged)


def no_room(error: BaseException) -> str | None:
    """What could not be read or written, in words; None for an error that is none of the file system's.

    Libraries wrap what the system says (safetensors, torch.save), so their texts are looked at too.
    """
    if isinstance(error, OSError) and error.errno is not None and (error.filename or error.errno in NO_ROOM):
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    text = " ".join(str(error).split())
    if re.search(
        r"os error (27|28|122)\b|No space left on device|File too large|PytorchStreamWriter failed writing "
        r"file|unexpected pos \d+ vs",
        text,
    ):
        return f"the disk is full or a size limit is reached ({type(error).__name__}: {text[:200]})"
    return None


def run(main: Callable) -> None:
    """Call `main()` and exit: 0 when it returns, 2 with one line for a UserError, 130 for Ctrl-C.

    Under a launcher rank 0 prints the line (every rank meets the same error). The launcher ends all ranks as
    soon as one has ended, so the others wait for it; one that is still there after ERROR_SECONDS has an error
    of its own, and tells it.
    """
    rank_zero = os.environ.get("RANK", "0") == "0"
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(
            errors="backslashreplace"
        )  # as stderr: a file's name or a log may hold what is no text
    try:
        main()
    except (UserError, ImportError) as error:
        missing = packages.missing_packages(error)
        if (
            isinstance(error, ModuleNotFoundError)
            and (error.name or "").partition(".")[0] in packages.REQUIRED
        ):
            line = (
                f"{sys.executable} has no package {error.name}: switch to the script's environment first "
                "(source envs.sh; use_env vllm to generate and annotate, rlhflow to train and report)"
            )
        elif isinstance(error, UserError):
            line = str(error)
            if missing and "pip install" not in line:
                line += f"; {sys.executable} lacks a package: {missing}"
        elif missing:
            line = f"{' '.join(str(error).split())[:300]}; {sys.executable} lacks a package: {missing}"
        else:
            raise
        if not rank_zero:
            time.sleep(ERROR_SECONDS)
        print(f"error: {line}", file=sys.stderr, flush=True)
        sys.exit(2)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(128 + signal.SIGPIPE)
    except Exception as error:
        where = no_room(error)
        if where is None:
            raise
        # By any rank: only the one that writes there meets it.
        print(
            f"error: {where}; what is on disk is kept, start the same command again after mending it",
            file=sys.stderr,
            flush=True,
        )
        sys.exit(2)
    except KeyboardInterrupt:
        if rank_zero:
            print("stopped; start the same command again to continue", file=sys.stderr, flush=True)
        sys.exit(130)
