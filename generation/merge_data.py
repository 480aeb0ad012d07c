r"""Merge the shards of a generation: PREFIX0.jsonl … PREFIX{N-1}.jsonl become one file.

In:  the shards that `get_hf2.py` wrote, their manifests and lists of skipped prompts.
Out: `--output_dir`, JSON Lines whatever its extension, in the order of the prompt file or shuffled; beside it
     the merged list of skipped prompts and a manifest that stands for the whole.

    python generation/merge_data.py --base_path ./data/gen_data --num_datasets 8 \
        --output_dir ./data/gen_data.jsonl

Nothing is written unless every shard is complete and as it was made, all were made with the same settings,
and together they answer or list every prompt once. Shards without a manifest (other tools' files) are merged
too, with a note.
"""

import codecs
import contextlib
import dataclasses
import json
import os
import random
import sys
import time
from pathlib import Path
from typing import BinaryIO

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run from any folder

from common import locks
from common.cli import UserError, arg, parse, run
from common.files import in_time
from common.manifest import beside, fingerprint, read_manifest, same_content, write_json, writing
from common.tokens import DATE
from generation.sampling import SHARD


@dataclasses.dataclass(kw_only=True)
class Arguments:
    base_path: str = arg(help="the shards' prefix: `./data/gen_data` for ./data/gen_data0.jsonl and so on")
    output_dir: str = arg(help="the merged file")
    num_datasets: int = arg(help="number of shards")
    shuffle_seed: int | None = arg(None, "shuffle by this seed; None: the prompt file's order")
    overwrite: bool = arg(False, "replace the merged file where there is one")


def find_shards(base_path: str, count: int) -> list[Path]:
    """The paths of all shards; a UserError lists those that are missing or unfinished."""
    if count < 1:
        raise UserError(f"--num_datasets {count}: at least 1 was expected")
    paths = [Path(f"{base_path}{i}.jsonl") for i in range(count)]
    in_time(lambda: all(path.is_file() for path in paths))  # each machine has written its own
    absent = {i: path for i, path in enumerate(paths) if not path.is_file()}
    if absent:
        begun = [path for path in absent.values() if Path(f"{path}.partial").exists()]
        told = [f"{path} is {'not finished' if path in begun else 'missing'}" for path in absent.values()]
        todo = f"run the command of shard {', '.join(map(str, absent))} again (get_hf2.py --local_index …)"
        raise UserError(f"{', '.join(told)}: {todo}, it continues")
    if Path(f"{base_path}{count}.jsonl").is_file():
        print(f"note: {base_path}{count}.jsonl is there too and is not merged; --num_datasets is {count}")
    return paths


def is_dated(path: Path) -> bool:
    """Whether the prompts of a shard may hold a date, as its first record says."""
    with open(path, encoding="utf-8", errors="replace") as file:
        return f'"{DATE}"' in file.readline()


def common_manifest(paths: list[Path]) -> tuple[dict, list[dict | None]]:
    """Check the shards' manifests against one another and add them up.

    Returns:
        (manifest parts for the merged file, list of each shard's manifest or None).

    Raises:
        UserError: settings, inputs or positions disagree, or prompts are missing from the sum.
    """
    manifests = [read_manifest(path) for path in paths]
    known = [(path, m) for path, m in zip(paths, manifests) if m is not None]
    if len(known) < len(paths):
        bare = ", ".join(str(path) for path, m in zip(paths, manifests) if m is None)
        print(f"note: no manifest beside {bare}: merged as found, without checking how it was made")
    if not known:
        return {"settings": {}, "inputs": {}, "counts": {}, "seconds": 0.0, "versions": {}}, manifests
    first_path, first = known[0]
    for i, (path, m) in enumerate(zip(paths, manifests)):
        if m is not None:
            check_place(path, m, i, len(paths))
            check_alike(first_path, first, path, m)
    counts = {"prompts": first["counts"]["prompts"]}
    counts |= {key: sum(m["counts"][key] for _, m in known) for key in ("records", "skipped")}
    if worked := [m["counts"]["engine_seconds"] for _, m in known if "engine_seconds" in m["counts"]]:
        # Shards run side by side: the longest one's seconds pass on the clock, their sum is paid for.
        counts |= {"engine_seconds": max(worked), "engine_seconds_sum": round(sum(worked), 1)}
    if len(known) == len(paths) and counts["records"] + counts["skipped"] != counts["prompts"]:
        raise UserError(
            f"the shards hold {counts['records']} records and skipped {counts['skipped']}, of "
            f"{counts['prompts']} prompts; one of them is damaged, generate it again"
        )
    if any(m.get("versions") != first.get("versions") for _, m in known):
        print("note: the shards were made with different package versions; the manifest has the first's")
    return {
        "settings": {k: v for k, v in first["settings"].items() if k not in SHARD},
        "inputs": first["inputs"],
        "counts": counts,
        "seconds": max(m.get("seconds", 0.0) for _, m in known),
        "versions": first.get("versions", {}),
    }, manifests


def check_place(path: Path, manifest: dict, i: int, count: int) -> None:
    """Refuse what is not finished, or is not shard `i` of `count`."""
    if not manifest.get("complete"):
        raise UserError(f"{path} is not finished, its manifest says; run the command of shard {i} again")
    place, world = (manifest["settings"].get(key) for key in SHARD)
    if (place, world) != (i, count):
        raise UserError(
            f"{path} was made with --local_index {place} --my_world_size {world}, as shard {i} of {count} it "
            f"cannot be merged: give --num_datasets {world}, or generate it again"
        )


def check_alike(first_path: Path, first: dict, path: Path, other: dict) -> None:
    """Refuse two shards whose manifests say that they were made differently."""
    for key in first["settings"] | other["settings"]:
        one, two = first["settings"].get(key), other["settings"].get(key)
        if key in SHARD or one == two:
            continue
        if key == "date" and not is_dated(path) and not is_dated(first_path):
            continue  # begun on two days, by a template that writes none
        raise UserError(f"{first_path} was made with {key} {one!r}, {path} with {two!r}; make one again")
    for key in first["inputs"] | other["inputs"]:
        one, two = first["inputs"].get(key, {}), other["inputs"].get(key, {})
        if one.get("sha256", one.get("path")) != two.get("sha256", two.get("path")):
            what = f"were made from different files: {key} had changed"
            raise UserError(f"{first_path} and {path} {what}; generate one again")
    if other["counts"]["prompts"] != first["counts"]["prompts"]:
        raise UserError(f"{first_path} and {path} disagree on the number of prompts; generate one again")


def check_records(paths: list[Path], manifests: list[dict | None]) -> list[tuple[int, int]]:
    """Read every record once; an `id` may occur only once.

    Returns:
        (shard, offset in its file) of each record, in the order of the prompt file.

    Raises:
        UserError: a line that is no JSON object, a file that is torn or shorter than its manifest says, a
            repeated id.
    """
    places, seen = [], {}
    for shard, (path, manifest) in enumerate(zip(paths, manifests)):
        before, offset = len(places), 0
        with open(path, "rb") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    name = json.dumps(parse_record(line, path, number).get("id"))
                    if name != "null" and name in seen:
                        where = f"{seen[name]} and in {path} line {number}"
                        raise UserError(f"id {json.loads(name)} is in {where}; is a shard there twice?")
                    seen[name] = path
                    places.append((shard, offset))
                offset += len(line)
        held, expected = len(places) - before, manifest and manifest["counts"]["records"]
        if expected not in (None, held):
            raise UserError(f"{path} holds {held} records, its manifest says {expected}; generate it again")
    return places


def parse_record(line: bytes, path: Path, number: int) -> dict:
    """The JSON object in a line of a shard."""
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        torn = "" if line.endswith(b"\n") else " (the file ends inside a record)"
        raise UserError(f"{path} line {number} is not valid JSON{torn}; generate this shard again") from None
    if not isinstance(record, dict):
        raise UserError(f"{path} line {number} is a {type(record).__name__}, a JSON object was expected")
    return record


def check_unchanged(paths: list[Path], marks: list[dict], manifests: list[dict | None]) -> None:
    """Refuse a shard or a list of skipped prompts that is not what the manifest says.

    `marks` are the shards' fingerprints as they are now.
    """
    for path, mark, manifest in zip(paths, marks, manifests):
        if manifest is None:
            continue
        if manifest.get("output", mark).get("sha256") != mark["sha256"]:
            raise UserError(f"{path} was changed after it was made; generate it again with --overwrite")
        listed, count = beside(path, ".skipped.jsonl"), 0
        if listed.is_file():
            with open(listed, "rb") as file:
                count = sum(line.endswith(b"\n") for line in file)
        if count != manifest["counts"]["skipped"]:
            raise UserError(
                f"{listed} lists {count} skipped prompts, the manifest of {path} says "
                f"{manifest['counts']['skipped']}; generate it again"
            )


def write_merged(target: BinaryIO, paths: list[Path], places: list[tuple[int, int]]) -> None:
    """Copy the records at `places`, as `check_records` gives them, into `target`, one a line."""
    with contextlib.ExitStack() as stack:
        files = [stack.enter_context(open(path, "rb")) for path in paths]
        for shard, offset in places:
            files[shard].seek(offset)
            target.write(files[shard].readline().removeprefix(codecs.BOM_UTF8).rstrip(b"\r\n") + b"\n")
    target.flush()
    os.fsync(target.fileno())


def merge_skipped(output: Path, paths: list[Path]) -> None:
    """The shards' skipped files one after the other; no file where nothing was skipped."""
    listed = [beside(path, ".skipped.jsonl") for path in paths]
    text = b"".join(path.read_bytes() for path in listed if path.is_file())
    merged = beside(output, ".skipped.jsonl")
    if not text:
        merged.unlink(missing_ok=True)
        return
    temporary = Path(f"{merged}.tmp")
    temporary.write_bytes(text)
    os.replace(temporary, merged)


def is_done(output: Path, wanted: dict, overwrite: bool) -> bool:
    """Whether `output` is this very merge; any other file in its place is refused."""
    if overwrite or not output.exists():
        return False
    todo = "choose another name or give --overwrite"
    how = (read_manifest(output) or {}).get("merged")
    if how is None:
        raise UserError(f"{output} exists and is no merged file that is known here; {todo}")
    same = all(how[key] == wanted[key] for key in ("num_datasets", "shuffle_seed"))
    shards = zip(how["shards"], wanted["shards"])
    if not same or not all(same_content(old, new["path"]) for old, new in shards):
        raise UserError(f"{output} was merged from other shards or in another order; {todo}")
    return True


def main():
    args = parse(Arguments, __doc__)
    output, started = Path(args.output_dir), time.monotonic()
    paths = find_shards(args.base_path, args.num_datasets)
    if output.is_dir():
        raise UserError(f"--output_dir {output} is a folder: give a file's name, {output}/data.jsonl for one")
    if output.resolve() in {path.resolve() for path in paths}:
        raise UserError(f"--output_dir {output} is one of the shards; choose another name")
    parts, manifests = common_manifest(paths)
    how = {"num_datasets": args.num_datasets, "shuffle_seed": args.shuffle_seed}
    how["shards"] = [fingerprint(path) for path in paths]
    if is_done(output, how, args.overwrite):
        print(f"{output} is complete, nothing to do")
        return
    places = check_records(paths, manifests)
    check_unchanged(paths, how["shards"], manifests)
    if args.shuffle_seed is not None:
        random.Random(args.shuffle_seed).shuffle(places)
    output.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(f"{output}.tmp")
    with locks.hold(temporary, f"writing {output}"), writing(temporary), open(temporary, "wb") as target:
        write_merged(target, paths, places)
        output.unlink(missing_ok=True)  # from here on the old file's manifest would not fit it
        merge_skipped(output, paths)
        counts = parts["counts"] | {"records": len(places)}
        finished = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        mark = fingerprint(temporary) | {"path": str(output)}
        manifest = {"script": "generation/merge_data.py", "complete": True} | parts
        manifest |= {"counts": counts, "merged": how, "finished": finished, "output": mark}
        write_json(beside(output, ".manifest.json"), manifest)
        os.replace(temporary, output)
    done = f"merged {len(places)} records of {len(paths)} shards into {output}"
    print(f"{done}, skipped {counts.get('skipped', 0)}, {time.monotonic() - started:.1f}s")


if __name__ == "__main__":
    run(main)
