"""Arguments from a YAML file and the command line, and errors that a person can act on.

A script declares its arguments as a dataclass and calls `parse`. Values come from the dataclass defaults,
then from an optional positional YAML file, then from `--key value`; the last one wins. An unknown key is an
error that names the nearest known one. `run` turns a `UserError` into one line on stderr and exit status 2.

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
import importlib.util
import json
import os
import re
import signal
import sys
import time
import types
import typing
from collections.abc import Hashable
from pathlib import Path

# What a script may miss when it is started in another environment than its own.
PACKAGES = (
    "accelerate",
    "aiohttp",
    "datasets",
    "deepspeed",
    "jinja2",
    "numpy",
    "plotly",
    "rich",
    "torch",
    "transformers",
    "trl",
    "vllm",
    "yaml",
)
# What some models and settings need beside the requirements: a module → its name for pip.
OPTIONAL = {
    "PIL": "pillow",
    "bitsandbytes": "bitsandbytes",
    "einops": "einops",
    "flash_attn": "flash-attn",
    "google.protobuf": "protobuf",
    "kernels": "kernels",
    "mistral_common": "mistral-common",
    "peft": "peft",
    "sentencepiece": "sentencepiece",
    "tiktoken": "tiktoken",
    "timm": "timm",
    "torchvision": "torchvision",
    "trackio": "trackio",
    "wandb": "wandb",
}
ERROR_SECONDS = 15  # that other ranks give rank 0 to tell the error
NO_ROOM = (errno.EFBIG, errno.ENOSPC, errno.EDQUOT)


class UserError(Exception):
    """What is wrong and what to do, in one line; shown without a traceback."""


class UserErrors(UserError):
    """Several of them, a line each."""

    def __init__(self, problems):
        super().__init__("\nerror: ".join(problems))
        self.problems = problems


def refuse(problems):
    """Raise what is wrong, all at once; nothing where there is nothing."""
    if problems:
        raise UserErrors(problems) if len(problems) > 1 else UserError(problems[0])


def arg(default=dataclasses.MISSING, help="", choices=None, metavar=None, shapes=True):
    """A dataclass field with its help text; without a default it is required. Lists and dicts may be
    defaults.

    Args:
        metavar: names the value in `--help` where its type and key do not tell (see `_metavar`).
        shapes: whether the argument shapes what the script writes. Those that do not (where things go, how fast,
            what is logged) may change between two starts of the same output; see `shaping_values`.
    """
    metadata = {"help": help, "choices": choices, "metavar": metavar, "shapes": shapes}
    if isinstance(default, (list, dict)):
        return dataclasses.field(default_factory=lambda: type(default)(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def shaping_values(args) -> dict:
    """{name: value} of the arguments that shape an output, as a manifest holds them."""
    return {f.name: getattr(args, f.name) for f in dataclasses.fields(args) if f.metadata.get("shapes", True)}


def count(number, one, many=None):
    """`1 response`, `2 responses`, `0 processes`."""
    if many is None:
        many = f"{one}es" if one.endswith(("s", "x", "ch", "sh")) else f"{one}s"
    return f"{number} {one if number == 1 else many}"


def nearest(word, known, lead=""):
    """`, did you mean …?` for the nearest known word, whatever its case, or the empty string; `lead` is put
    in front of it.
    """
    names = {name.casefold(): name for name in known}
    close = difflib.get_close_matches(word.casefold(), list(names), n=1, cutoff=0.5)
    return f", did you mean {lead + names[close[0]]!r}?" if close else ""


def existing_file(path, what="file", besides=()):
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

    def files(folder):
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


def check_model(name, what="--model_name_or_path"):
    """Refuse a local model folder that is not there, is no model or is none as a whole, before anything heavy
    is imported.
    """
    path = Path(name)
    if path.is_dir():
        if (path / "adapter_config.json").is_file():
            refuse_adapter(path, f"{what} {name}")
        if not (path / "config.json").is_file():
            raise UserError(f"{what} {name} is a folder without config.json, so it is no model folder")
        check_weights(path, f"{what} {name}")
    elif name.startswith((".", "/", "~")) or name.count("/") != 1 or path.exists():
        raise UserError(f"{what} {name}: no such folder, and not a hub name of the form owner/model")
    elif path.parent.is_dir():
        near = ", ".join(sorted(f.name for f in path.parent.iterdir() if f.is_dir())[:5])
        raise UserError(
            f"{what} {name}: no such folder in {path.parent}/" + (f"; there is {near}" if near else "")
        )


def check_policy(name, what="--model_name_or_path"):
    """Refuse as `check_model` does, and a local model whose config says that it writes no text: a reward
    model, an encoder.
    """
    check_model(name, what)
    path = Path(name) / "config.json"
    config = read_json(path) if path.is_file() else {}
    kinds = [str(kind) for kind in config.get("architectures") or []]
    # LlamaForSequenceClassification, LlamaForRewardModelWithGating, BertForMaskedLM; MistralModel, which has
    # no head. Code that comes with a model (auto_map) may call its classes what it likes.
    silent = [
        k
        for k in kinds
        if re.search(r"For(?!CausalLM|ConditionalGeneration)[A-Z]", k) or re.search(r"(?<!LMHead)Model$", k)
    ]
    if kinds and silent == kinds and "AutoModelForCausalLM" not in (config.get("auto_map") or {}):
        raise UserError(
            f"{what} {name} is a {silent[0]}, which writes no text: give a causal language model (a reward "
            "model goes to reward_name_or_path)"
        )


def refuse_adapter(path, named):
    """An adapter's folder is called that.

    With a whole model beside it, transformers would load the adapter and vLLM the model.
    """
    if any(path.glob("model*.safetensors")):
        raise UserError(
            f"{named} holds a whole model and an adapter, and it is not known which is meant: move its "
            "adapter_* files elsewhere"
        )
    base = read_json(path / "adapter_config.json").get("base_model_name_or_path") or "its base model"
    merged = (
        path.absolute().parent
    )  # of a model that was trained here, the adapter is kept in OUTPUT_DIR/adapter
    if path.name == "adapter" and (merged / "config.json").is_file():
        raise UserError(f"{named} is an adapter (LoRA), no model: give {merged}, into which it is merged")
    raise UserError(
        f"{named} is an adapter (LoRA), no model: merge it into {base} first (peft: "
        "PeftModel.from_pretrained(base, adapter)"
        ".merge_and_unload(), then save_pretrained of it and of the tokenizer), and give that folder"
    )


def check_weights(path, named):
    """Refuse a model's folder whose weights are lacking or have not been fetched, where that can be seen by
    what is there instead.
    """
    if (path / "model.safetensors").is_file():
        files = [path / "model.safetensors"]
    else:
        index = next(
            (
                f
                for f in (path / "model.safetensors.index.json", path / "pytorch_model.bin.index.json")
                if f.is_file()
            ),
            None,
        )
        shards = sorted(set((read_json(index).get("weight_map") or {}).values())) if index else []
        lacking = [shard for shard in shards if not (path / shard).is_file()]
        if lacking:
            raise UserError(
                f"{named} lacks {len(lacking)} of the {len(shards)} files of its weights, {lacking[0]} for "
                "one: fetch or save it again"
            )
        files = [path / shard for shard in shards] or [
            *path.glob("*.safetensors"),
            *path.glob("pytorch_model.bin"),
        ]
    if not files and any(path.glob("global_step*")):
        how = f"make some of its DeepSpeed states: python {path / 'zero_to_fp32.py'} {path} {path}"
        raise UserError(f"{named} is a checkpoint without whole weights; {how}")
    if not files and any(path.glob("pytorch_model_fsdp_0")):
        how = f"make some of its FSDP states: accelerate merge-weights {path / 'pytorch_model_fsdp_0'} {path}"
        raise UserError(f"{named} is a checkpoint without whole weights; {how}")
    for file in files:
        if file.stat().st_size < 1024 and file.read_bytes().startswith(b"version https://git-lfs"):
            raise UserError(
                f"{named}: {file.name} is a note of git-lfs in place of the weights: run `git lfs pull` in "
                "that folder"
            )


def read_json(path):
    """The mapping in a JSON file of a model folder; anything else is an error."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        values = None
    if not isinstance(values, dict):
        raise UserError(f"{path} is damaged: a JSON object was expected; fetch or save the model again")
    return values


def read_yaml(path, what="YAML file"):
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


def load_yaml(text):
    """As `yaml.safe_load`, which takes a key's last value where it is given twice; here that is a YAMLError
    with both lines.
    """
    import yaml

    class Loader(yaml.SafeLoader):
        def construct_mapping(self, node, deep=False):
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


def convert(name, value, hint):
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
    def error(self, message):
        raise UserError(f"{message}; see --help")


class _Help(argparse.RawDescriptionHelpFormatter):
    """The docstring as it is written, and lists as `NAME ...`."""

    def _format_args(self, action, default_metavar):
        return (
            f"{action.metavar} ..." if action.nargs == "*" else super()._format_args(action, default_metavar)
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


def parse(cls, description, argv=None, yaml_positional=True):
    """An instance of the dataclass `cls` from defaults, YAML and command line.

    Args:
        cls: dataclass whose fields are made by `arg`.
        description: the script's docstring, shown by `--help`.
        argv: arguments, `sys.argv[1:]` if None.
        yaml_positional: whether a YAML file may be given as the first positional argument.

    Raises:
        UserError: unknown key, wrong type, value outside its choices, missing required key, unreadable YAML.
    """
    argv = sys.argv[1:] if argv is None else argv
    hints = typing.get_type_hints(cls)
    fields = {f.name: f for f in dataclasses.fields(cls)}
    parser = _Parser(description=description, formatter_class=_Help, allow_abbrev=False)
    if yaml_positional:
        parser.add_argument(
            "config", nargs="?", help="YAML file with any of the keys below; the command line wins"
        )
    for name, field in fields.items():
        kind, item, _ = _unwrap(hints[name])
        default = field.default
        if default is dataclasses.MISSING:
            default = "" if field.default_factory is dataclasses.MISSING else field.default_factory()
        choices = f" ({', '.join(map(str, field.metadata['choices']))})" if field.metadata["choices"] else ""
        shown = (
            field.metadata["help"] + choices + (f" [{default}]" if default not in ("", None, [], {}) else "")
        )
        options = {
            "help": shown.replace("%", "%%"),
            "default": argparse.SUPPRESS,
            "metavar": field.metadata["metavar"],
        }
        options["metavar"] = options["metavar"] or _metavar(
            name, item if kind is list else kind, field.metadata["choices"]
        )
        if kind is bool:
            options |= {"nargs": "?", "const": True}
        elif kind is list:
            options |= {"nargs": "*"}
        parser.add_argument(f"--{name}", **options)
    argv, dotted = _split_dotted(
        argv, [name for name, field in fields.items() if _unwrap(hints[name])[0] is dict]
    )
    namespace, unknown = parser.parse_known_args(argv)
    if unknown:
        key = unknown[0].split("=")[0]
        if not key.startswith("--"):
            raise UserError(f"unexpected argument {key!r}; arguments are --key value, see --help")
        raise UserError(f"unknown argument {key}{_meant(cls, key[2:], '--')}")
    values = vars(namespace)
    config = values.pop("config", None)
    merged, problems = {}, []
    if config is not None:
        merged = {
            key: convert(f"{key} in {config}", value, hints[key])
            for key, value in known(cls, read_yaml(config), config).items()
        }
        for name in _sections(cls).keys() & merged.keys():
            merged[name] = _right(
                cls,
                name,
                merged[name],
                problems,
                "{name}.{key} in " + str(config),
                "unknown key {key!r} in {name} of " + str(config),
            )
    merged |= {key: convert(f"--{key}", _listed(value), hints[key]) for key, value in values.items()}
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


def known(cls, values, where):
    """`values` if all its keys are fields of `cls`; an unknown one is an error that names the nearest."""
    fields = {f.name for f in dataclasses.fields(cls)}
    for key in values:
        if key not in fields:
            raise UserError(f"unknown key {key!r} in {where}{_meant(cls, str(key))}")
    return values


def build(cls, values, where=""):
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


def no_room(error):
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


def missing_packages(error):
    """What to install for an error, or one behind it, that is for want of a package; empty where it is not.

    Libraries tell it in many ways: by the module's name, or in words that name the package, in an error of
    their own.
    """
    known, others, seen = [], [], []
    while error is not None and error not in seen:
        seen.append(error)
        text, names = str(error), []
        if isinstance(error, ModuleNotFoundError) and error.name:
            names = [error.name]
        elif isinstance(error, ImportError) or (
            isinstance(error, (ValueError, RuntimeError)) and "install" in text
        ):
            words = re.search(
                r"packages that were not found in your environment: ([\w.\-, ]+?)\. ", text
            )  # of a model's own code
            names = (
                words[1].split(", ")
                if words
                else re.findall(r"(?:pip install |need to install )(?:-U )?`?([A-Za-z][\w.\-]*)", text)
            )
            said = text.lower().replace("-", "_").replace("flashattention2", "flash_attn")
            names += [
                name
                for name in OPTIONAL
                if re.search(rf"\b{re.escape(name.lower().rpartition('.')[2])}\b", said)
            ]
        for name in names:
            module = next(
                (
                    module
                    for module, pip in OPTIONAL.items()
                    if name in (module, pip) or name.startswith(module + ".")
                ),
                None,
            )
            if module is not None and not is_there(module):
                known.append(OPTIONAL[module])
            elif module is None and not is_there(name.partition(".")[0].replace("-", "_")):
                others.append(name)
        error = error.__cause__ or error.__context__
    if known:
        return f"pip install {' '.join(dict.fromkeys(known))}"
    return f"pip install what brings {', '.join(dict.fromkeys(others))}" if others else ""


def is_there(module):
    """Whether a module can be imported here, or is one of this project's."""
    try:
        return importlib.util.find_spec(module) is not None
    except (ImportError, ValueError):
        return False


def run(main):
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
        missing = missing_packages(error)
        if isinstance(error, ModuleNotFoundError) and (error.name or "").partition(".")[0] in PACKAGES:
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
