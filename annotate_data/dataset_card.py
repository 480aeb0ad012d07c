"""The card (README.md) of a run's answers and pairs: columns, lineage, settings, counts, what was left out.

Its metadata name the files of each configuration and split, as the hub and `datasets` read them. Nothing of
this machine is in it: local folders are cut to their last part, and what looks like a token is hidden.
"""

import inspect
import json
import re
from collections import Counter
from dataclasses import dataclass, field, fields
from pathlib import Path

from annotate_data.arguments import Arguments as RewardArguments
from common.cli import count
from common.hide import hidden, without_folders
from common.jsonl import BadRecord, jsonl_records
from common.manifest import beside, generation_manifest
from dpo_iteration import card
from dpo_iteration.pairs import make_pairs, select_pairs
from generation import get_hf2

REASONS = 20  # kinds of skipped records that are told, the most frequent first
COLUMNS = {
    "id": "of the prompt: a hash of its messages, the same in both configurations",
    "iteration": "I: these are the answers that policy I was trained on",
    "policy": "which answered, where `response_sources` names no other `model`: the start, or the policy "
    "that an earlier iteration made",
    "prompt": "messages; `tools`, where there is such a column: JSON schemas as JSON text",
    "responses": "all K texts",
    "rewards": "K numbers, null where not finite; `reward_parts`: those of each scorer, before weighting",
    "finish_reasons, num_tokens": "K each: `stop` or `length`, and tokens of the policy's tokenizer",
    "response_sources": "how each response was sampled, where there are several ways: JSON text",
    "chosen, rejected": "messages; `chosen_index` and `rejected_index` say which of the responses",
    "score_chosen, score_rejected": "their rewards; `margin`: by how much the scores differ that chose them",
}
TITLES = ["iteration", "answered by", "prompts", "answers", "pairs: train", "pairs: test"]  # of the counts
PAIRS = "`prompt`, `chosen`, `rejected`: as TRL's DPOTrainer takes them"
# The same where only the chosen response was trained on.
ALONE = {
    "completion": "messages: the response that was trained on; `chosen_index` says which of the K it is",
    "score_chosen": "its reward; `margin`: by how much it scores above the worst of the prompt's responses",
}
PAIRS_ALONE = "`prompt`, `completion`: as TRL's SFTTrainer takes them"


@dataclass
class Part:
    """One iteration: its files, and how much of them is in the data set."""

    iteration: int
    policy: str
    rewarded: Path
    pairs: Path | None  # None until its training has begun
    prompts: int = 0
    answers: int = 0
    pair_counts: dict[str, int] = field(default_factory=dict)  # split → pairs
    others: list[str] = field(default_factory=list)  # policies that a mixture's parts are of, too

    def is_own(self, record: dict) -> bool:
        """Whether a pair, or a prompt without one, is of this iteration's answers, by its `source`."""
        source = record.get("source")
        return not source or Path(source).parts[-2:] == self.rewarded.parts[-2:]


def short(name: str) -> str:
    """A hub name as it is, a local one's last part."""
    return name if card.on_hub(name) else without_folders(name) if "://" in name else Path(name).name


def policy_name(start: str, iteration: int) -> str:
    """What the policy is called whose answers iteration `iteration` is trained on."""
    return short(start) if iteration == 1 else f"iter{iteration - 1}"


def others_of(start: str, iteration: int, rewarded: Path) -> list[str]:
    """What the policies are called that answered too: other models of a mixture, by their names in the
    generation's manifest.
    """
    called = {"previous": policy_name(start, max(iteration - 1, 1)), "start": policy_name(start, 1)}
    inputs = (generation_manifest(rewarded) or {"inputs": {}})["inputs"]
    names = [key.partition(" of ")[2] for key in inputs if not key.startswith("parts of ")]
    return list(dict.fromkeys(called[name] for name in names if name in called))


def settings_shown(settings: dict) -> dict:
    """{section: {key: value}} of RUN/loop.yaml that shaped how answers were sampled and rewarded, and pairs
    chosen of them.
    """
    choice = {
        "loss_type",
        *inspect.signature(make_pairs).parameters,
        *inspect.signature(select_pairs).parameters,
    }
    shapes = {"run": {"model_name_or_path", "reference", "train_on", "seed"}}
    shapes |= {"generation": shaping(get_hf2.Arguments), "annotation": shaping(RewardArguments)}
    shapes |= {"training_args": choice}
    sections = {"run": settings} | {name: settings.get(name) or {} for name in shapes if name != "run"}
    return {
        name: {k: v for k, v in section.items() if k in shapes[name] and v not in (None, [], {}, "")}
        for name, section in sections.items()
    }


def shaping(arguments: type) -> set[str]:
    """Names of a script's arguments that shape what it writes."""
    return {one.name for one in fields(arguments) if one.metadata["shapes"]}


def skipped(parts: list[Part]) -> Counter:
    """Why prompts gave no answers, or no pair, with the number of each; numbers in a reason are left out, as
    they tell single prompts apart.
    """
    found = Counter()
    for part in parts:
        for path in (part.rewarded.with_name("generated.jsonl"), part.pairs):
            listed = path and beside(path, ".skipped.jsonl")
            for record in jsonl_records(listed) if listed and listed.is_file() else ():
                if not isinstance(record, BadRecord) and part.is_own(record):
                    reason = str(without_folders(hidden(record.get("reason"))))
                    found[re.sub(r"\d+(\.\d+)?(e-?\d+)?", "N", reason)[:120]] += 1
    return found


def versions_of(parts: list[Part]) -> str:
    """Packages that sampled, rewarded and chose, each with all its versions, as far as manifests tell."""
    found = {}
    files = [path for part in parts for path in (part.rewarded, part.rewarded.with_name("model"))]
    held = [card.manifest_of(str(path)) for path in files]
    held += card.generations([str(part.rewarded) for part in parts])
    for made in held:
        for package, version in (made.get("versions") or {}).items():
            found.setdefault(package, set()).add(str(version))
    told = (f"{package} {' and '.join(sorted(numbers))}" for package, numbers in sorted(found.items()))
    return ", ".join(told) or "not known (no manifest)"


def lineage(parts: list[Part], shown: dict) -> list[tuple]:
    """Rows of the card's table of origins."""
    files = [str(part.rewarded) for part in parts]
    named = {"rewards from": card.scorers(files), "prompts": card.prompts(files)}
    rows = [("start policy", short(str(shown["run"].get("model_name_or_path", "not known"))))]
    for what, names in named.items():
        rows.append((what, ", ".join(map(short, names)) or "not known (no manifest)"))
    prompts = card.system_prompts(files)
    return [*rows, ("system prompt", hidden("; ".join(prompts)) or "none")]


def by_iteration(parts: list[Part]) -> list[list]:
    """Rows of the card's table of counts."""
    return [
        [p.iteration, ", ".join([p.policy, *p.others]), p.prompts, p.answers]
        + [p.pair_counts.get(split) for split in ("train", "test")]
        for p in parts
    ]


def unfinished(parts: list[Part]) -> str:
    """A paragraph that names the iterations whose pairs are missing, or nothing."""
    waiting = [str(part.iteration) for part in parts if part.pairs is None]
    return f"Pairs of iteration {', '.join(waiting)} were not chosen yet.\n\n" if waiting else ""


def most_frequent(reasons: Counter) -> list[tuple]:
    """Rows of the card's table of what was left out."""
    told = reasons.most_common(REASONS)
    if len(reasons) > REASONS:
        told.append(("other reasons", reasons.total() - sum(n for _, n in told)))
    return told or [("nothing", 0)]


def settings_rows(shown: dict) -> list[tuple]:
    """Rows of the card's table of settings; the start policy stands in its lineage."""
    return [
        (section, key, f"`{json.dumps(value, ensure_ascii=False)}`")
        for section, values in shown.items()
        for key, value in values.items()
        if key != "model_name_or_path"
    ]


def metadata(files: dict[str, dict[str, list[str]]], prompts: int) -> str:
    """The card's YAML. `files`: configuration → split → paths."""
    from huggingface_hub import DatasetCardData

    configs = [
        {
            "config_name": name,
            "data_files": [{"split": split, "path": paths} for split, paths in splits.items()],
        }
        for name, splits in files.items()
        if splits
    ]
    bounds = {1e3: "n<1K", 1e4: "1K<n<10K", 1e5: "10K<n<100K", 1e6: "100K<n<1M", 1e9: "1M<n<1B"}
    size = next((name for bound, name in bounds.items() if prompts < bound), "n>1T")
    data = DatasetCardData(
        license="unknown",
        task_categories=["text-generation"],
        size_categories=[size],
        tags=["preference", "dpo", "online-rlhf"],
        configs=configs,
    )
    return data.to_yaml()


def columns(alone: bool) -> list[tuple]:
    """Rows of the card's table of columns; `alone`: see `make_card`."""
    kept = {key: what for key, what in COLUMNS.items() if not (alone and "rejected" in key)}
    return list((kept | (ALONE if alone else {})).items())


def make_card(
    parts: list[Part], files: dict[str, dict[str, list[str]]], shown: dict, left_out: Counter, alone: bool
) -> str:
    """The text of the card.

    Args:
        parts: with their counts. files: configuration → split → paths. shown: `settings_shown`, without what
            is hidden. left_out: reason → number of records of the run that are not in the data set.
        alone: whether pairs have a chosen response alone.
    """
    return f"""---
{metadata(files, sum(part.prompts for part in parts))}
---

# Answers and pairs of online RLHF

The answers of {count(len(parts), "policy", "policies")} in a run of online iterative RLHF
([arXiv 2405.07863](https://arxiv.org/abs/2405.07863)), with their rewards, and the pairs that the next policy
was trained on.

```python
from datasets import load_dataset

answers = load_dataset("NAME", "answers")  # NAME: of this data set on the hub, or of its folder
pairs = load_dataset("NAME", "pairs")  # {PAIRS_ALONE if alone else PAIRS}
```

Split `test` of the pairs was held out from training.

**Licence.** None was chosen here. The licences of the models that wrote and judged the answers, and of the
prompts, apply; they are named below.

## Lineage

{card.table(["", ""], lineage(parts, shown))}

## How much

{unfinished(parts)}{card.table(TITLES, by_iteration(parts))}

## Left out

Token ids and other fields of the prompt files are left out, and records for these reasons (N: a number):

{card.table(["reason", "records"], most_frequent(Counter(left_out) + skipped(parts)))}

## Columns

{card.table(["column", "what it is"], columns(alone))}

## Settings

{card.table(["", "setting", "value"], settings_rows(shown))}

## Versions

{versions_of(parts)}
"""
