r"""Make a data set of a run's answers and pairs: a folder that `datasets.load_dataset` reads, or a data set
on the hub.

In:  a run's folder (run_loop.sh), finished or not: what is whole is taken.
Out: `--output_dir`, a folder as the hub has them, with a card; beside it a manifest. `--push_dataset NAME`
     uploads it, and may be given alone.

    python annotate_data/make_dataset.py --run runs/tiny --output_dir data/tiny
    python -c 'import datasets; print(datasets.load_dataset("data/tiny", "pairs"))'

Configuration `answers` has a row for each prompt of each iteration: all K responses with their rewards.
Configuration `pairs` has the pairs that training chose of them, those that it held out in the split `test`;
TRL's trainers take it as it is. Of a run with `loss_type: sft` it has the chosen responses alone, as
`completion`. Token ids, which are of one tokenizer, and other fields of the prompt files
are left out. Names of local folders are cut to their last part, and what looks like a token is hidden.
"""

import contextlib
import dataclasses
import itertools
import os
import shutil
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run from any folder

from annotate_data import dataset_card
from annotate_data.dataset_card import Part, others_of, policy_name
from common import cli, locks, manifest, records
from common.cli import UserError, arg, count, one_line
from common.hide import hidden, without_folders
from common.hub import make_repository
from common.records import BadRecord
from common.run_folder import RunFolder, is_ppo

if TYPE_CHECKING:
    from datasets import Features

SCRIPT = "annotate_data/make_dataset.py"
ROWS = 256  # that are held and written at once
SOURCES = "response_sources"
SPLITS = {"train": "train", "eval": "test"}  # of a pair → of the data set


@dataclasses.dataclass(kw_only=True)
class Arguments:
    run: str = arg(help="a run's folder", shapes=False)
    output_dir: str | None = arg(None, "folder to make", shapes=False)
    push_dataset: str | None = arg(
        None, "NAME or OWNER/NAME of a data set on the hub, which is made or replaced", shapes=False
    )
    hub_private_repo: bool = arg(True, "a data set that is made there is private", shapes=False)
    overwrite: bool = arg(False, "make a folder again that was made from other files", shapes=False)


def parts_of(run: RunFolder) -> list[Part]:
    """What there is of each iteration whose answers are whole.

    Raises:
        UserError: this is no run's folder, or there are no such answers.
    """
    if not run.settings.is_file():
        raise UserError(f"--run {run.path} is no run's folder: it has no {run.settings.name}")
    settings = cli.read_yaml(run.settings)
    if is_ppo(settings):
        raise UserError(f"--run {run.path} was trained by PPO, which keeps no rewarded answers")
    start = str(settings.get("model_name_or_path"))
    parts = [
        Part(
            i,
            policy_name(start, i),
            run.rewarded(i),
            run.pairs(i) if run.pairs(i).is_file() else None,
            others=others_of(start, i, run.rewarded(i)),
        )
        for i in run.iterations()
        if run.rewarded(i).is_file()
    ]
    if not parts:
        raise UserError(f"no iteration of {run.path} has rewarded answers yet")
    return parts


def answers_of(part: Part, left_out: Counter) -> Iterator[dict]:
    """The rewarded records of an iteration; those that cannot be read are counted in `left_out`."""
    for record in records.read_rewarded(part.rewarded, keep_bad=True):
        if isinstance(record, BadRecord):
            left_out["answers that cannot be read"] += 1
        else:
            yield record


def pairs_of(part: Part, left_out: Counter) -> Iterator[dict]:
    """The pairs of an iteration's own answers: with `train_on: all` others are in its file, too."""
    for pair in records.read_pairs(part.pairs) if part.pairs else ():
        if isinstance(pair, BadRecord):
            left_out["pairs that cannot be read"] += 1
        elif not part.is_own(pair):
            left_out["pairs that training took from elsewhere, or from an earlier iteration"] += 1
        else:
            yield pair


# ---- Rows and their columns --------------------------------------------------------------------------------


@dataclasses.dataclass
class Columns:
    """What the columns have to hold, by a look at all records.

    Attributes:
        names: scorer → name of its field in `reward_parts`; empty without parts.
        rich: columns with messages that have more than role and content. present: optional columns.
        alone: whether pairs have a chosen response alone.
    """

    names: dict[str, str] = dataclasses.field(default_factory=dict)
    rich: set[str] = dataclasses.field(default_factory=set)
    present: set[str] = dataclasses.field(default_factory=set)
    alone: bool = False

    def look_at(self, record: dict):
        """Take note of what a record has."""
        for name in parts_by_scorer(record):
            if name not in self.names:
                public = without_folders(name)
                taken = public in self.names.values()
                self.names[name] = f"{public} ({len(self.names) + 1})" if taken else public
        for key in ("prompt", "chosen", "rejected"):
            if any(set(message) != {"role", "content"} for message in record.get(key, ())):
                self.rich.add(key)
        self.present |= {key for key in ("tools", SOURCES) if record.get(key)}
        self.alone |= "chosen" in record and "rejected" not in record

    def features(self, kind: str) -> "Features":
        """The columns of configuration `kind`."""
        from datasets import Features, Json, List, Value

        def messages(key: str) -> List:
            plain = {"role": Value("string"), "content": Value("string")}
            return List(Json() if key in self.rich else plain)

        number, text = Value("float64"), Value("string")
        columns = {"id": text, "iteration": Value("int32")}
        if kind == "answers":
            columns |= {"policy": text, "prompt": messages("prompt")}
            columns |= {"responses": List(text), "rewards": List(number)}
            columns |= {"finish_reasons": List(text), "num_tokens": List(Value("int32"))}
            if self.names:
                columns["reward_parts"] = {name: List(number) for name in self.names.values()}
            if SOURCES in self.present:
                columns[SOURCES] = List(text)
        elif self.alone:
            columns |= {"prompt": messages("prompt"), "completion": messages("chosen")}
            columns |= {"score_chosen": number, "margin": number, "chosen_index": Value("int32")}
        else:
            columns |= {side: messages(side) for side in ("prompt", "chosen", "rejected")}
            columns |= {"score_chosen": number, "score_rejected": number, "margin": number}
            columns |= {"chosen_index": Value("int32"), "rejected_index": Value("int32")}
        return Features(columns | ({"tools": text} if "tools" in self.present else {}))

    def answer(self, record: dict, part: Part) -> dict:
        """The row of a prompt's answers."""
        parts = parts_by_scorer(record)
        row = {"id": record["id"], "iteration": part.iteration, "policy": part.policy}
        row |= {"prompt": record["prompt"], "responses": record["responses"]}
        row |= {"rewards": numbers(record["rewards"])}
        row |= {key: record.get(key) for key in ("finish_reasons", "num_tokens")}
        row["reward_parts"] = {public: numbers(parts.get(name)) for name, public in self.names.items()}
        sources = without_folders(record.get(SOURCES)) or []
        row[SOURCES] = [one if isinstance(one, str) else records.dumps(one) for one in sources] or None
        return self._with_tools(row, record)

    def pair(self, pair: dict, part: Part) -> dict:
        """The row of a pair."""
        row = {"id": pair.get("id"), "iteration": part.iteration}
        row |= {key: pair.get(key) for key in ("prompt", "chosen", "rejected")}
        row["completion"] = pair["chosen"]
        scores = [pair.get(key) for key in ("chosen_reward", "rejected_reward", "margin")]
        row |= dict(zip(("score_chosen", "score_rejected", "margin"), numbers(scores), strict=True))
        row |= {key: pair.get(key) for key in ("chosen_index", "rejected_index")}
        return self._with_tools(row, pair)

    def _with_tools(self, row, record):
        """As JSON text, which TRL and we take: schemas have few fields in common."""
        return row | {"tools": records.dumps(record["tools"]) if record.get("tools") else None}


def parts_by_scorer(record: dict) -> dict[str, list]:
    """`reward_parts` of a record, {scorer: K rewards}; of another tool's field of that name what fits."""
    parts, size = record.get("reward_parts"), len(record.get("responses", ()))
    found = parts.items() if isinstance(parts, dict) else ()
    return {name: values for name, values in found if isinstance(values, list) and len(values) == size}


def numbers(values: list | None) -> list | None:
    """Rewards as a table holds them: what is not finite is null."""
    return None if values is None else [float(x) if records.finite(x) else None for x in values]


# ---- Files -------------------------------------------------------------------------------------------------


def write_table(path: Path, rows: Iterator[dict], features: "Features") -> int:
    """Write rows as a parquet file, a few at a time; without rows there is no file. Returns their number.

    Raises:
        UserError: a value is none of its column's kind.
    """
    from datasets.arrow_writer import ParquetWriter
    from pyarrow.lib import ArrowException

    first = next(rows, None)
    if first is None:
        return 0
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with ParquetWriter(path=str(path), features=features, writer_batch_size=ROWS) as writer:
            for row in itertools.chain([first], rows):
                writer.write(features.encode_example({key: row[key] for key in features}))
            written, _ = writer.finalize()
    except (ArrowException, ValueError, TypeError) as error:
        raise UserError(
            f"{'/'.join(path.parts[-2:])} of the data set cannot hold a value of iteration "
            f"{first['iteration']}: {one_line(error)}; repair the record"
        ) from None
    return written


def write_dataset(folder: Path, parts: list[Part], shown: dict) -> dict:
    """Write tables and card into an empty folder.

    Args:
        shown: settings of the run, for the card.

    Returns:
        Counts for the manifest.
    """
    columns, left_out, files = Columns(), Counter(), {"answers": {}, "pairs": {}}
    for part in parts:
        for record in itertools.chain(answers_of(part, left_out), pairs_of(part, Counter())):
            columns.look_at(record)
            part.answers += len(record.get("responses", ()))
    answers, pairs = columns.features("answers"), columns.features("pairs")
    for part in parts:
        name = f"answers/iter{part.iteration}.parquet"
        rows = (columns.answer(record, part) for record in answers_of(part, Counter()))
        part.prompts = write_table(folder / name, rows, answers)
        files["answers"].setdefault("train", []).extend([name] if part.prompts else [])
        for ours, split in SPLITS.items():
            name = f"pairs/{split}-iter{part.iteration}.parquet"
            counted = left_out if ours == "train" else Counter()  # once
            chosen = (p for p in pairs_of(part, counted) if (p.get("split") == "eval") == (ours == "eval"))
            part.pair_counts[split] = write_table(
                folder / name, (columns.pair(pair, part) for pair in chosen), pairs
            )
            if part.pair_counts[split]:
                files["pairs"].setdefault(split, []).append(name)
    if not any(part.prompts for part in parts):
        raise UserError(
            f"none of the answers in {', '.join(str(part.rewarded) for part in parts)} can be read"
        )
    card = dataset_card.make_card(parts, files, shown, left_out, columns.alone)
    manifest.write_text(folder / "README.md", card)
    pair_count = sum(sum(part.pair_counts.values()) for part in parts)
    answer_counts = {key: sum(getattr(part, key) for part in parts) for key in ("prompts", "answers")}
    return answer_counts | {"pairs": pair_count, "left_out": dict(left_out)}


def make(args: Arguments, parts: list[Part], shown: dict):
    """Make `--output_dir`, whole or not at all.

    Raises:
        UserError: another thing is there, and `--overwrite` was not given, or another process makes it.
    """
    folder = Path(args.output_dir)
    if folder.name in ("", ".."):
        raise UserError(f"--output_dir {folder} is there already: name a folder in it")
    inputs = {f"rewarded.{part.iteration}": part.rewarded for part in parts}
    inputs |= {f"pairs.{part.iteration}": part.pairs for part in parts if part.pairs}
    settings = {"iterations": [part.iteration for part in parts]}
    settings |= {"pairs": [part.iteration for part in parts if part.pairs], "shown": shown}
    folder.parent.mkdir(parents=True, exist_ok=True)
    lock = Path(f"{folder}.partial")
    with locks.hold(lock, f"writing {folder}"):
        try:
            _make(args, folder, parts, shown, settings, inputs)
        finally:
            lock.unlink(missing_ok=True)


def _make(args, folder, parts, shown, settings, inputs):
    """`make`, while no other process does."""
    held = manifest.read_manifest(folder)
    if folder.exists() and not (held and held.get("script") == SCRIPT):
        raise UserError(f"{folder} is there and was not made by this script: give another --output_dir")
    changed = manifest.difference(held, settings, inputs) if folder.exists() else None
    if changed and not args.overwrite:
        raise UserError(
            f"{folder} was made otherwise: {changed}; give another --output_dir, or --overwrite true"
        )
    if folder.exists() and not changed:
        print(f"{folder} is complete, nothing to do")
        return
    new = Path(f"{folder}.tmp")
    shutil.rmtree(new, ignore_errors=True)  # of a start that was killed
    new.mkdir()
    try:
        counts = write_dataset(new, parts, shown)
        if folder.exists():
            shutil.rmtree(folder)
        marks = {key: manifest.fingerprint(path) for key, path in inputs.items()}
        made = {"script": SCRIPT, "complete": True, "settings": settings, "inputs": marks}
        made |= {"counts": counts, "versions": manifest.versions()}
        manifest.write_json(manifest.beside(folder, ".manifest.json"), made)
        os.replace(new, folder)
    finally:
        shutil.rmtree(new, ignore_errors=True)
    tell(counts, folder)


def tell(counts: dict, where: object):
    """Say what was written."""
    told = f"{count(counts['answers'], 'answer')} to {count(counts['prompts'], 'prompt')} and "
    print(f"wrote {told}{count(counts['pairs'], 'pair')} to {where}")
    for reason, n in counts["left_out"].items():
        print(f"note: left out: {n} {reason}")
    if not counts["pairs"]:
        print("note: there are no pairs yet: training has not begun")


def push(name: str, folder: Path, kept: bool):
    """Upload the folder in place of what is there.

    Raises:
        UserError: it did not work; a folder that is `kept` is complete, and the line has the command to do it
            later.
    """
    from huggingface_hub import upload_folder

    try:
        done = upload_folder(
            repo_id=name,
            folder_path=folder,
            repo_type="dataset",
            commit_message="Answers and pairs of a run",
            delete_patterns=["answers/*", "pairs/*"],  # iterations that were there before
        )
    except Exception as error:
        later = f"hf upload {name} {folder} --repo-type dataset" if kept else "start the same command again"
        raise UserError(f"the data set was not pushed to {name}: {one_line(error)}; later: {later}") from None
    print(f"pushed to {done.commit_url}", flush=True)


def main():
    args = cli.parse(Arguments, __doc__)
    if not args.output_dir and not args.push_dataset:
        raise UserError("give --output_dir FOLDER, --push_dataset NAME, or both")
    run = RunFolder(args.run)
    parts = parts_of(run)
    shown = without_folders(hidden(dataset_card.settings_shown(cli.read_yaml(run.settings))))
    if args.push_dataset:
        make_repository(args.push_dataset, args.hub_private_repo, "--push_dataset", "dataset")
    with contextlib.ExitStack() as stack:
        if args.output_dir:
            make(args, parts, shown)
            folder = Path(args.output_dir)
        else:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            tell(write_dataset(folder, parts, shown), args.push_dataset)
        if args.push_dataset:
            push(args.push_dataset, folder, bool(args.output_dir))


if __name__ == "__main__":
    cli.run(main)
