"""Arguments from a YAML file and the command line, and errors that a person can act on.

A script declares its arguments as a dataclass and calls `parse`. Values come from the dataclass defaults, then from
an optional positional YAML file, then from `--key value`; the last one wins. An unknown key is an error that names
the nearest known one. `run` turns a `UserError` into one line on stderr and exit status 2.

Only the standard library is imported here (and PyYAML, where a YAML file is given), so that `--help` and a wrong
argument are answered before anything heavy is loaded.
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
from pathlib import Path

# What a script may miss when it is started in another environment than its own.
PACKAGES = (
    "accelerate", "aiohttp", "datasets", "deepspeed", "jinja2", "numpy", "plotly", "rich", "torch", "transformers", "trl", "vllm", "yaml"
)  # fmt: skip
# What some models and settings need beside the requirements: a module → its name for pip.
OPTIONAL = {
    "PIL": "pillow", "bitsandbytes": "bitsandbytes", "einops": "einops", "flash_attn": "flash-attn", "google.protobuf": "protobuf",
    "kernels": "kernels", "mistral_common": "mistral-common", "peft": "peft", "sentencepiece": "sentencepiece", "tiktoken": "tiktoken",
    "timm": "timm", "torchvision": "torchvision", "trackio": "trackio", "wandb": "wandb",
}  # fmt: skip
ERROR_SECONDS = 15  # that other ranks give rank 0 to tell the error
NO_ROOM = (errno.EFBIG, errno.ENOSPC, errno.EDQUOT)


class UserError(Exception):
    """What is wrong and what to do, in one line; shown without a traceback."""


def arg(default=dataclasses.MISSING, help="", choices=None):
    """A dataclass field with its help text; without a default it is required. Lists and dicts may be defaults."""
    metadata = {"help": help, "choices": choices}
    if isinstance(default, (list, dict)):
        return dataclasses.field(default_factory=lambda: type(default)(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def nearest(word, known):
    """`, did you mean …?` for the nearest known word, or the empty string."""
    close = difflib.get_close_matches(word, list(known), n=1, cutoff=0.5)
    return f", did you mean {close[0]!r}?" if close else ""


def existing_file(path, what="file"):
    """`path` as a Path if it is a file; otherwise an error that offers the nearest existing one."""
    path = Path(path)
    if path.is_file():
        return path
    if path.is_dir():
        raise UserError(f"{what} {path} is a folder, a file was expected")
    folders = {path.parent}
    if path.parent.parent.is_dir():  # ./config/x.yaml for ./configs/x.yaml
        folders |= {f for f in path.parent.parent.iterdir() if f.is_dir()}
    candidates = {str(f): f for folder in folders if folder.is_dir() for f in folder.iterdir() if f.is_file()}
    same = [c for c, f in sorted(candidates.items()) if f.name == path.name or f.stem == path.stem]
    near = same or difflib.get_close_matches(str(path), list(candidates), n=1, cutoff=0.6)
    raise UserError(f"no such {what}: {path}" + (f"; there is {near[0]}" if near else ""))


def check_model(name, what="--model_name_or_path"):
    """Refuse a local model folder that is not there, is no model or is none as a whole, before anything heavy is imported."""
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
        raise UserError(f"{what} {name}: no such folder in {path.parent}/" + (f"; there is {near}" if near else ""))


def refuse_adapter(path, named):
    """An adapter's folder is called that. With a whole model beside it, transformers would load the adapter and vLLM the model."""
    if any(path.glob("model*.safetensors")):
        raise UserError(f"{named} holds a whole model and an adapter, and it is not known which is meant: move its adapter_* files elsewhere")
    base = read_json(path / "adapter_config.json").get("base_model_name_or_path") or "its base model"
    merged = path.absolute().parent  # of a model that was trained here, the adapter is kept in OUTPUT_DIR/adapter
    if path.name == "adapter" and (merged / "config.json").is_file():
        raise UserError(f"{named} is an adapter (LoRA), no model: give {merged}, into which it is merged")
    raise UserError(f"{named} is an adapter (LoRA), no model: merge it into {base} first (peft: PeftModel.from_pretrained(base, adapter)"
                    ".merge_and_unload(), then save_pretrained of it and of the tokenizer), and give that folder")  # fmt: skip


def check_weights(path, named):
    """Refuse a model's folder whose weights are lacking or have not been fetched, where that can be seen by what is there instead."""
    if (path / "model.safetensors").is_file():
        files = [path / "model.safetensors"]
    else:
        index = next((f for f in (path / "model.safetensors.index.json", path / "pytorch_model.bin.index.json") if f.is_file()), None)
        shards = sorted(set((read_json(index).get("weight_map") or {}).values())) if index else []
        lacking = [shard for shard in shards if not (path / shard).is_file()]
        if lacking:
            raise UserError(f"{named} lacks {len(lacking)} of the {len(shards)} files of its weights, {lacking[0]} for one: fetch or save it again")
        files = [path / shard for shard in shards] or [*path.glob("*.safetensors"), *path.glob("pytorch_model.bin")]
    if not files and any(path.glob("global_step*")):
        how = f"make some of its DeepSpeed states: python {path / 'zero_to_fp32.py'} {path} {path}"
        raise UserError(f"{named} is a checkpoint without whole weights; {how}")
    if not files and any(path.glob("pytorch_model_fsdp_0")):
        how = f"make some of its FSDP states: accelerate merge-weights {path / 'pytorch_model_fsdp_0'} {path}"
        raise UserError(f"{named} is a checkpoint without whole weights; {how}")
    for file in files:
        if file.stat().st_size < 1024 and file.read_bytes().startswith(b"version https://git-lfs"):
            raise UserError(f"{named}: {file.name} is a note of git-lfs in place of the weights: run `git lfs pull` in that folder")


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
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from None
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise UserError(f"{path} must hold `key: value` lines, it holds a {type(values).__name__}")
    return values


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
            return {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}[str(value).lower()]
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
        wanted = {"dict": "a mapping (JSON on the command line)", "bool": "true or false", "int": "a whole number"}
        raise UserError(f"{name}: {value!r} is not {wanted.get(kind.__name__, f'a {kind.__name__}')}") from None


class _Parser(argparse.ArgumentParser):
    def error(self, message):
        raise UserError(f"{message}; see --help")


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
    parser = _Parser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    if yaml_positional:
        parser.add_argument("config", nargs="?", help="YAML file with any of the keys below; the command line wins")
    for name, field in fields.items():
        kind, item, _ = _unwrap(hints[name])
        default = field.default
        if default is dataclasses.MISSING:
            default = "" if field.default_factory is dataclasses.MISSING else field.default_factory()
        choices = f" ({', '.join(map(str, field.metadata['choices']))})" if field.metadata["choices"] else ""
        shown = field.metadata["help"] + choices + (f" [{default}]" if default not in ("", None, [], {}) else "")
        options = {"help": shown.replace("%", "%%"), "default": argparse.SUPPRESS, "metavar": name.split("_")[-1].upper()}
        if kind is bool:
            options |= {"nargs": "?", "const": True, "metavar": "true|false"}
        elif kind is list:
            options |= {"nargs": "*"}
        parser.add_argument(f"--{name}", **options)
    argv, dotted = _split_dotted(argv, [name for name, field in fields.items() if _unwrap(hints[name])[0] is dict])
    namespace, unknown = parser.parse_known_args(argv)
    if unknown:
        key = unknown[0].split("=")[0]
        if not key.startswith("--"):
            raise UserError(f"unexpected argument {key!r}; arguments are --key value, see --help")
        # A class with `sections` (name of a mapping → a dataclass) is told where else the key stands.
        inner = [f"--{name}.{key[2:]}" for name, kind in getattr(cls, "sections", {}).items() if key[2:] in kind.__dataclass_fields__]
        raise UserError(f"unknown argument {key}" + (f", did you mean {' or '.join(inner)}?" if inner else nearest(key, [f"--{name}" for name in fields])))
    values = vars(namespace)
    config = values.pop("config", None)
    merged = {}
    if config is not None:
        merged = {key: convert(f"{key} in {config}", value, hints[key]) for key, value in known(cls, read_yaml(config), config).items()}
    merged |= {key: convert(f"--{key}", _listed(value), hints[key]) for key, value in values.items()}
    for name, key, value in dotted:  # --generation.K 4
        merged[name] = {**merged.get(name, {}), key: value}
    return build(cls, merged)


def _split_dotted(argv, mappings):
    """Take `--mapping.key value` out of `argv`; returns what is left and the list of (mapping, key, value)."""
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
        return yaml.safe_load(text)
    except yaml.YAMLError:
        return text


def known(cls, values, where):
    """`values` if all its keys are fields of `cls`; an unknown one is an error that names the nearest."""
    fields = {f.name for f in dataclasses.fields(cls)}
    for key in values:
        if key not in fields:
            raise UserError(f"unknown key {key!r} in {where}{nearest(str(key), fields)}")
    return values


def build(cls, values, where=""):
    """An instance of `cls` from a mapping, with types converted, choices and required keys checked.

    Raises:
        UserError: as `parse`; `where` is added to each message.
    """
    hints, fields = typing.get_type_hints(cls), {f.name: f for f in dataclasses.fields(cls)}
    place = f" in {where}" if where else ""
    merged = {key: convert(f"{key}{place}", value, hints[key]) for key, value in known(cls, values, where or "the arguments").items()}
    required = dataclasses.MISSING
    for name, field in fields.items():
        if field.default is required and field.default_factory is required and name not in merged:
            raise UserError(f"missing --{name}{place}: {field.metadata['help']}")
        choices = field.metadata["choices"]
        if choices and name in merged and merged[name] not in choices:
            raise UserError(f"{name}{place}: {merged[name]!r} is not one of {', '.join(map(str, choices))}")
    return cls(**merged)


def no_room(error):
    """What could not be read or written, in words; None for an error that is none of the file system's.

    Libraries wrap what the system says (safetensors, torch.save), so their texts are looked at too.
    """
    if isinstance(error, OSError) and error.errno is not None and (error.filename or error.errno in NO_ROOM):
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    text = " ".join(str(error).split())
    if re.search(r"os error (27|28|122)\b|No space left on device|File too large|PytorchStreamWriter failed writing file|unexpected pos \d+ vs", text):
        return f"the disk is full or a size limit is reached ({type(error).__name__}: {text[:200]})"
    return None


def missing_packages(error):
    """What to install for an error, or one behind it, that is for want of a package; empty where it is not.

    Libraries tell it in many ways: by the module's name, or in words that name the package, in an error of their own.
    """
    known, others, seen = [], [], []
    while error is not None and error not in seen:
        seen.append(error)
        text, names = str(error), []
        if isinstance(error, ModuleNotFoundError) and error.name:
            names = [error.name]
        elif isinstance(error, ImportError) or (isinstance(error, (ValueError, RuntimeError)) and "install" in text):
            words = re.search(r"packages that were not found in your environment: ([\w.\-, ]+?)\. ", text)  # of a model's own code
            names = words[1].split(", ") if words else re.findall(r"(?:pip install |need to install )(?:-U )?`?([A-Za-z][\w.\-]*)", text)
            said = text.lower().replace("-", "_").replace("flashattention2", "flash_attn")
            names += [name for name in OPTIONAL if re.search(rf"\b{re.escape(name.lower().rpartition('.')[2])}\b", said)]
        for name in names:
            module = next((module for module, pip in OPTIONAL.items() if name in (module, pip) or name.startswith(module + ".")), None)
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

    Under a launcher rank 0 prints the line (every rank meets the same error). The launcher ends all ranks as soon as one has
    ended, so the others wait for it; one that is still there after ERROR_SECONDS has an error of its own, and tells it.
    """
    rank_zero = os.environ.get("RANK", "0") == "0"
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="backslashreplace")  # as stderr: a file's name or a log may hold what is no text
    try:
        main()
    except (UserError, ImportError) as error:
        missing = missing_packages(error)
        if isinstance(error, ModuleNotFoundError) and (error.name or "").partition(".")[0] in PACKAGES:
            line = (f"{sys.executable} has no package {error.name}: switch to the script's environment first "
                    "(source envs.sh; use_env vllm to generate and annotate, rlhflow to train and report)")  # fmt: skip
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
        print(f"error: {where}; what is on disk is kept, start the same command again after mending it", file=sys.stderr, flush=True)
        sys.exit(2)
    except KeyboardInterrupt:
        if rank_zero:
            print("stopped; start the same command again to continue", file=sys.stderr, flush=True)
        sys.exit(130)
