r"""Find the prompts that also stand in evaluation sets, and write the others: what a policy was trained on
says little of it.

In:  prompts, and evaluation sets: files, data sets' folders or hub names (`NAME:CONFIG`).
Out: for each evaluation set the number of prompts that overlap with it; with `--output_dir` a file of the
     other prompts, with the list of those that were left out beside it.

    python evaluation/find_overlap.py --dataset_name_or_path mine/prompts.jsonl \
        --evaluation_sets mine/alpaca_eval.json openai/gsm8k:main --output_dir mine/clean.jsonl

A prompt overlaps where one of its user turns equals a text of the set (`exact`), or has 13 words in a row
in common with one, as in GPT-3's check (arXiv 2005.14165, appendix C). Case, punctuation, white space and the
forms that Unicode takes as compatible do not count. A turn or a text of fewer than 13 words can only be
equal. A word is a run of letters and digits; in scripts that put no spaces between words, a letter.

Of a data set the split `test` is read, or else `eval` or `validation`; of a record the first of the columns
that are read as prompts, `instruction`, `question`, `turns`, `problem` or `text`.
"""

import functools
import itertools
import re
import sys
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run from any folder

from common import manifest, records, tables
from common.cli import UserError, arg, count, existing_file, parse, run, shaping_values
from common.records import BadRecord, PromptArguments

if TYPE_CHECKING:
    import regex

SCRIPT = "evaluation/find_overlap.py"
WORDS = 13  # in a row that make an overlap
SPLITS = ("test", "eval", "validation")  # of which the first is read
COLUMNS = (*records.PROMPT_KEYS, "instruction", "question", "turns", "problem", "text")
UNSPACED = ("Han", "Hiragana", "Katakana", "Thai", "Lao", "Khmer", "Myanmar")  # scripts
ASCII = re.compile(r"[a-z0-9]+")


@dataclass(kw_only=True)
class Arguments:
    dataset_name_or_path: str = arg(help="prompts, as generation/get_hf2.py reads them")
    evaluation_sets: list[str] = arg(help="files, folders or hub names (NAME:CONFIG)", metavar="NAME_OR_PATH")
    output_dir: str | None = arg(None, "file of the prompts that do not overlap, .jsonl", shapes=False)
    dataset_key: str | None = arg(None, PromptArguments.__dataclass_fields__["dataset_key"].metadata["help"])
    dataset_split: str = arg("train", "split of a data set of prompts; a file has none")
    overwrite: bool = arg(False, "replace a file that is there", shapes=False)


# ---- Texts -------------------------------------------------------------------------------------------------


@functools.cache
def word_pattern() -> "regex.Pattern":
    """A word of any script: a run of letters, their marks and digits, or one letter where a script puts no
    spaces between words.
    """
    import regex

    unspaced = "".join(f"\\p{{{name}}}" for name in UNSPACED)
    return regex.compile(f"(?V1)[{unspaced}]\\p{{M}}*|[[\\p{{L}}\\p{{M}}\\p{{N}}]--[{unspaced}]]+")


def words_of(text: str) -> list[str]:
    """The words of a text, without case and punctuation, in Unicode's compatible form."""
    if text.isascii():
        return ASCII.findall(text.lower())
    return word_pattern().findall(unicodedata.normalize("NFKC", text).casefold())


def normalised(words: list[str], text: str) -> str:
    """What two texts must have in common to be equal: their words; of one without words (signs) itself."""
    return " ".join(words) or text.strip()


def grams(words: list[str]) -> Iterator[int]:
    """Hashes (64 bits) of each 13 words in a row."""
    text, ends = " ".join(words), list(itertools.accumulate(len(word) + 1 for word in words))
    return (hash(text[start : end - 1]) for start, end in zip([0, *ends], ends[WORDS - 1 :]))


def user_texts(value: object) -> list[str]:
    """The texts of an evaluation record's column: of a string itself, of a list its strings, and of messages,
    ours or ShareGPT's, the user's.
    """
    if isinstance(value, str):
        return [value]
    found = []
    for turn in value if isinstance(value, list) else ():
        if isinstance(turn, dict) and turn.get("role", turn.get("from", "user")) in ("user", "human"):
            turn = turn.get("content", turn.get("value"))
        if isinstance(turn, str):
            found.append(turn)
    return found


# ---- Overlap -----------------------------------------------------------------------------------------------


@dataclass
class EvaluationSet:
    """The texts of an evaluation set.

    Attributes:
        texts: normalised. grams: hashes of 13 words in a row.
    """

    name: str
    texts: set[str] = field(default_factory=set)
    grams: set[int] = field(default_factory=set)

    def add(self, text: str):
        words = words_of(text)
        if whole := normalised(words, text):
            self.texts.add(whole)
        self.grams.update(grams(words))


def read_evaluation_set(name: str) -> EvaluationSet:
    """An evaluation set; see the head of this file for its split and column.

    Raises:
        UserError: it cannot be read, no split is one to evaluate on, or a record has no text.
    """
    split, base = "train", Path(tables.split_config(name)[0])  # a file has no other
    if records.is_local(name) and not base.exists():
        existing_file(name, "evaluation set")
    if base.is_dir() or not records.is_local(name):
        there = tables.splits_of(name)
        split = next((one for one in SPLITS if one in there), there[0] if len(there) == 1 else None)
        if split is None:
            raise UserError(
                f"evaluation set {name} has the splits {', '.join(there)}, none of which is "
                f"{', '.join(SPLITS)}: save the one that is meant to a .jsonl file"
            )
    found, column = EvaluationSet(name), None
    for number, record in enumerate(records.read_records(name, split), 1):
        if isinstance(record, BadRecord):
            raise record
        column = column or next((key for key in COLUMNS if user_texts(record.get(key))), None)
        texts = user_texts(record.get(column))
        if not texts:
            raise UserError(
                f"{name} record {number} has no text in {column or ' or '.join(COLUMNS)}; its fields are "
                f"{', '.join(map(str, record))}: save the texts to a .jsonl file with a column `prompt`"
            )
        for text in texts:
            found.add(text)
    return found


@dataclass
class Overlap:
    """Which prompts of a set overlap with evaluation sets.

    Attributes:
        prompts: number of prompts that were looked at. short: those of fewer than 13 words in every turn.
        kinds: name of an evaluation set → Counter of `exact` and `words`.
        left_out: id → reason, of each prompt that overlaps with any.
    """

    name: str
    prompts: int = 0
    short: int = 0
    kinds: dict[str, Counter] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)

    def lines(self) -> Iterator[str]:
        """What was found, a line for each evaluation set."""
        for name, kinds in self.kinds.items():
            told = [f"{kinds['exact']:,} exact"] if kinds["exact"] else []
            told += [f"{kinds['words']:,} by {WORDS} words"] if kinds["words"] else []
            of = f"{kinds.total():,} of {self.prompts:,} prompts of {self.name} overlap with {name}"
            yield of + (f": {', '.join(told)}" if told else "")


def find_overlap(name: str, args: PromptArguments | None, sets: Iterable[EvaluationSet]) -> Overlap:
    """Compare a set of prompts with evaluation sets; records that hold no prompt are passed over.

    Args:
        name, args: as `records.read_prompts` takes them.
    """
    sets = list(sets)
    found = Overlap(name, kinds={one.name: Counter() for one in sets})
    for record in records.read_prompts(name, args, keep_bad=True):
        if isinstance(record, BadRecord):
            continue
        turns = [(text, words_of(text)) for text in user_texts(record["prompt"])]
        found.prompts += 1
        found.short += all(len(words) < WORDS for _, words in turns)
        whole = {normalised(words, text) for text, words in turns}
        hashes = {key for _, words in turns for key in grams(words)}
        for one in sets:
            if not whole.isdisjoint(one.texts):
                kind, why = "exact", "exact"
            elif not hashes.isdisjoint(one.grams):
                kind, why = "words", f"{WORDS} words: {first_common(turns, one)}"
            else:
                continue
            found.kinds[one.name][kind] += 1
            found.left_out.setdefault(record["id"], f"overlaps with {one.name}: {why}")
    return found


def first_common(turns: list[tuple[str, list[str]]], one: EvaluationSet) -> str:
    """The first 13 words that turns have in common with an evaluation set."""
    return next(
        " ".join(words[k : k + WORDS])
        for _, words in turns
        for k, key in enumerate(grams(words))
        if key in one.grams
    )


# ---- The other prompts -------------------------------------------------------------------------------------


def write_others(args: Arguments, prompts: PromptArguments, found: Overlap):
    """Write the prompts that do not overlap, with their other fields, to `--output_dir`."""
    inputs = {"dataset_name_or_path": args.dataset_name_or_path}
    inputs |= {f"evaluation_sets.{k}": name for k, name in enumerate(args.evaluation_sets)}
    settings = shaping_values(args, ("dataset_name_or_path", "evaluation_sets"))
    settings |= {"evaluation_sets": len(args.evaluation_sets), "words": WORDS}
    output = manifest.Output(args.output_dir, SCRIPT, settings, inputs, args.overwrite)
    if output.complete:
        print(f"{args.output_dir} is complete, nothing to do")
        return
    counts = {"prompts": found.prompts, "written": 0, "skipped": 0}

    def others() -> Iterator[bytes]:
        for record in records.read_prompts(args.dataset_name_or_path, prompts, keep_bad=True):
            bad = isinstance(record, BadRecord)
            reason = str(record) if bad else found.left_out.get(record["id"])
            if reason:
                output.skip(record.id if bad else record["id"], reason)
                counts["skipped"] += 1
                continue
            counts["written"] += 1
            rest = {key: value for key, value in record.items() if key not in ("id", "source_id", "prompt")}
            own = {"id": record["source_id"]} if "source_id" in record else {}
            yield (records.dumps(own | {"prompt": record["prompt"]} | rest) + "\n").encode()

    output.finish_with(others(), counts)
    listed = manifest.beside(args.output_dir, ".skipped.jsonl")
    left = f"left out {counts['skipped']}" + (f", listed in {listed}" if counts["skipped"] else "")
    print(f"wrote {count(counts['written'], 'prompt')} to {args.output_dir}, {left}")


def main():
    args = parse(Arguments, __doc__)
    prompts = PromptArguments(dataset_key=args.dataset_key, dataset_split=args.dataset_split)
    if not args.evaluation_sets:
        raise UserError("--evaluation_sets needs at least one name")
    if args.output_dir and not args.output_dir.endswith(".jsonl"):
        raise UserError(f"--output_dir {args.output_dir}: a file that ends in .jsonl was expected")
    sets = [read_evaluation_set(name) for name in dict.fromkeys(args.evaluation_sets)]
    found = find_overlap(args.dataset_name_or_path, prompts, sets)
    for line in found.lines():
        print(line)
    if found.short:
        print(f"{found.short:,} have fewer than {WORDS} words a turn: only an equal text is an overlap there")
    if len(found.left_out) == found.prompts:
        raise UserError(f"every prompt of {args.dataset_name_or_path} overlaps, so none would be left")
    if args.output_dir:
        write_others(args, prompts, found)


if __name__ == "__main__":
    run(main)
