r"""Join the parts of a mixture that were sampled from several models: a record for each prompt, with all K
responses.

In:  for each model the file of its parts, as `get_hf2.py` (merged) or `gen_hf.py` wrote it with `--parts_of`.
Out: `--output_dir`, JSON Lines with the responses in the order of the parts, whatever that of the files; a
     list of the prompts that any of them skipped, and a manifest that names all models.

    python generation/join_parts.py --parts ./data/policy.jsonl ./data/previous.jsonl \
        --output_dir ./data/gen.jsonl

All must have been made for the same prompts with the same mixture, and their models write a prompt with the
same tokens.
"""

import dataclasses
import itertools
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run from any folder

from common import tokens
from common.cli import UserError, arg, parse, run
from common.jsonl import dumps, jsonl_records
from common.manifest import Output, beside, fingerprint, read_manifest
from common.records import PER_RESPONSE, read_generated
from generation import mixture
from generation.merge_data import check_unchanged
from generation.sampling import SHARD

OF_PROMPTS = {"dataset_name_or_path", "chat_template"}  # inputs that are not of a model
OF_A_FILE = ("parts_of", *SHARD)  # settings that say which of the answers are in a file
MAY_DIFFER = (*OF_A_FILE, "date")  # another date is told by the tokens, if the template writes it


@dataclasses.dataclass(kw_only=True)
class Arguments:
    parts: list[str] = arg(help="generated files, each of one model's parts of the same mixture")
    output_dir: str = arg(help="the file of all responses")
    overwrite: bool = arg(False, "replace that file where there is one")


@dataclasses.dataclass
class Sampled:
    """One model's file: its path, its manifest, and what the mixture calls the model."""

    path: Path
    manifest: dict
    names: list[str]


def read_files(paths: list[str]) -> list[Sampled]:
    """The files, checked against one another, in the order of the models that mixture.MODELS has.

    Raises:
        UserError: a file is not whole or was changed, settings or prompts differ, or a model's parts are
            missing or there twice.
    """
    found = []
    for path in map(Path, paths):
        held = read_manifest(path)
        if not path.is_file() or not held or not held.get("complete"):
            raise UserError(f"{path} is missing, not finished or has no manifest; start its command again")
        if held["settings"].get("mixture") is None:
            raise UserError(f"{path} is of no mixture; generate it with --mixture and --parts_of")
        if (shards := held["settings"].get("my_world_size", 1)) > 1:
            raise UserError(f"{path} is one of {shards} shards: merge them first (generation/merge_data.py)")
        found.append(Sampled(path, held, held["settings"].get("parts_of") or ["policy"]))
    found.sort(key=lambda one: mixture.MODELS.index(one.names[0]))
    for other in found[1:]:
        check_alike(found[0], other)
    names = [one.names for one in found]
    wanted = {
        part.model for part in mixture.parts_of(SimpleNamespace(**found[0].manifest["settings"]), names)
    }
    there = [name for one in names for name in one]
    for name in there:
        if there.count(name) > 1:
            raise UserError(f"several files hold the parts of {name}: give each model's once")
    if missing := [name for name in mixture.MODELS if name in wanted - {*there}]:
        raise UserError(f"no file holds the parts of {' and '.join(missing)}: generate them by --parts_of")
    marks = [fingerprint(one.path) for one in found]
    check_unchanged([one.path for one in found], marks, [one.manifest for one in found])
    return found


def check_alike(first: Sampled, other: Sampled) -> None:
    """Refuse two files that are not of the same prompts and mixture."""
    one, two = first.manifest["settings"], other.manifest["settings"]
    for key in one:
        if key in two and key not in MAY_DIFFER and one[key] != two[key]:
            what = f"{first.path} was made with {key} {one[key]!r}, {other.path} with {two[key]!r}"
            raise UserError(f"{what}; make one again")
    for key in OF_PROMPTS:
        one, two = (file.manifest["inputs"].get(key, {}) for file in (first, other))
        if one.get("sha256", one.get("path")) != two.get("sha256", two.get("path")):
            raise UserError(f"{first.path} and {other.path} were made from another {key}; make one again")


def inputs_of(files: list[Sampled]) -> dict:
    """What the manifest says of models and data: the policy's as a generation does, and each other model's
    by its name: `model_name_or_path of previous`.
    """
    found = dict(files[0].manifest["inputs"])
    for other in files[1:]:
        for key, mark in other.manifest["inputs"].items():
            if key not in OF_PROMPTS:
                found[f"{key} of {other.names[0]}"] = mark
    return found


def skipped_by(files: list[Sampled]) -> dict[str, str]:
    """{id: reason} of the prompts that any of the models did not answer."""
    found = {}
    for path in (beside(one.path, ".skipped.jsonl") for one in files):
        for entry in jsonl_records(path, "list of skipped prompts") if path.is_file() else ():
            found.setdefault(entry["id"], entry["reason"])
    return found


def joined(files: list[Sampled], skipped: dict[str, str]) -> Iterator[dict]:
    """Yield the records of the prompts that all models answered, each with all responses.

    Raises:
        UserError: the files hold other prompts, or write one with other tokens.
    """
    settings = SimpleNamespace(**files[0].manifest["settings"])
    parts = [(part.model, part.K) for part in mixture.parts_of(settings, [one.names for one in files])]
    rows = [(row for row in read_generated(one.path) if row["id"] not in skipped) for one in files]
    for records in itertools.zip_longest(*rows, fillvalue={}):
        for one, record in zip(files, records):
            if record.get("id") != records[0].get("id"):
                raise UserError(f"{one.path} holds other prompts than {files[0].path}; generate one again")
            if record.get(tokens.PROMPT) != records[0].get(tokens.PROMPT):
                raise UserError(
                    f"{one.path} has other tokens than {files[0].path} for prompt {record['id']}: their "
                    "models have other tokenizers or chat templates, and cannot share a mixture"
                )
        yield join({one.names[0]: record for one, record in zip(files, records)}, parts)


def join(records: dict[str, dict], parts: list[tuple[str, int]]) -> dict:
    """The record of a prompt with the responses of all models.

    Args:
        records: model → its record. parts: (model, K) of each part, in order.
    """
    for model, record in records.items():
        asked = sum(K for name, K in parts if name == model)
        if len(record["responses"]) != asked:
            have = f"{len(record['responses'])} responses of {model}"
            raise UserError(
                f"prompt {record['id']} has {have}, its parts have K {asked}: generate them again"
            )
    held = [key for key in PER_RESPONSE if any(isinstance(one.get(key), list) for one in records.values())]
    lists, used = {key: [] for key in ("responses", *held)}, Counter()
    for model, K in parts:
        for key, values in lists.items():  # stop strings are there where one ended a response
            of_model = records[model].get(key) or [None] * len(records[model]["responses"])
            values += of_model[used[model] : used[model] + K]
        used[model] += K
    return next(iter(records.values())) | lists


def counted(files: list[Sampled], skipped: int) -> dict:
    """Counts for the manifest but for the records; models are sampled one after the other, so their seconds
    add up.
    """
    held = [one.manifest["counts"] for one in files]
    found = {"prompts": held[0]["prompts"], "skipped": skipped}
    for key in ("engine_seconds", "engine_seconds_sum"):
        if any(key in counts for counts in held):
            found[key] = round(sum(counts.get(key, counts.get("engine_seconds", 0.0)) for counts in held), 1)
    return found


def main():
    args = parse(Arguments, __doc__)
    files = read_files(args.parts)
    settings = {key: value for key, value in files[0].manifest["settings"].items() if key not in OF_A_FILE}
    read = {f"parts of {one.names[0]}": str(one.path) for one in files}
    output = Output(args.output_dir, "generation/join_parts.py", settings, read, args.overwrite)
    if output.complete:
        print(f"{args.output_dir} is complete, nothing to do")
        return
    output.manifest["inputs"] |= inputs_of(files)
    output.manifest["seconds"] = round(sum(one.manifest.get("seconds", 0.0) for one in files), 1)
    skipped, counts = skipped_by(files), {"records": 0}
    for prompt_id, reason in skipped.items():
        output.skip(prompt_id, reason)

    def lines():
        for record in joined(files, skipped):
            counts["records"] += 1
            yield (dumps(record) + "\n").encode("utf-8")
        counts.update(counted(files, len(skipped)))

    output.finish_with(lines(), counts)
    what = f"joined {counts['records']} records of {len(files)} models into {args.output_dir}"
    print(f"{what}, skipped {len(skipped)}")


if __name__ == "__main__":
    run(main)
