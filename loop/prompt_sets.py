"""The prompt sets of a run, read before it starts: what cannot be used, and what stands in two of them, or in
an evaluation set.
"""

import re
from array import array
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common.chat import NO_HEADER, ChatTemplate, TemplateArguments
from common.cli import UserError, existing_file
from common.models import has_template, read_json
from common.records import BadRecord, PromptArguments, is_local, read_prompts, record_id, with_system
from evaluation import find_overlap

if TYPE_CHECKING:
    from loop.check import Findings
    from loop.plan import Plan


FILES = ("tokenizer_config.json", "chat_template.json", "chat_template.jinja")  # the later, the stronger


class TemplateFiles:
    """What `ChatTemplate` needs of a tokenizer, from a local model folder without the seconds that loading
    one takes.
    """

    def __init__(self, folder):
        folder = Path(folder)
        config, in_json, jinja = (folder / name for name in FILES)
        config = read_json(config) if config.is_file() else {}
        tokens = {key: value for key, value in config.items() if key.endswith("_token")}
        tokens = {key: v.get("content") if isinstance(v, dict) else v for key, v in tokens.items()}
        self.tokens = {key: value for key, value in tokens.items() if isinstance(value, str)}
        self.name_or_path, self.chat_template = str(folder), config.get("chat_template")
        if in_json.is_file():
            self.chat_template = read_json(in_json).get("chat_template")
        if jinja.is_file():
            self.chat_template = jinja.read_text(encoding="utf-8")

    def apply_chat_template(self, messages: list[dict], tokenize: bool = False, **given: object) -> str:
        from transformers.utils.chat_template_utils import render_jinja_template

        given = self.tokens | given
        [text], _ = render_jinja_template([messages], chat_template=self.chat_template, **given)
        return text


def template_of(name: str, generation: dict) -> ChatTemplate | None:
    """The template that writes the prompts, or None where the model or several templates of it are out of
    reach.
    """
    if not Path(name).is_dir() or not (generation.get("chat_template") or has_template(name)):
        return None
    template = ChatTemplate(TemplateFiles(name), TemplateArguments.of(generation))
    return template if isinstance(template.tokenizer.chat_template, str) else None


def local_prompts(
    name: str,
    generation: dict,
    template: ChatTemplate | None = None,
    notes: list | None = None,
    others: Iterable[str] = (),
) -> array | None:
    """Hashes of a local prompt set's prompts, 8 bytes each; None for a set on the hub.

    Args:
        name: the set.
        generation: settings that say how its prompts are read and written.
        template: that must take them, or None.
        notes: list that gets a line where prompts cannot be used and will be skipped.
        others: the sets that have another part, which a wrong name is not meant for.

    Raises:
        UserError: the set cannot be read, none of its prompts can be used, or one cannot and `bad_prompts` is
            refuse.
    """
    if not is_local(name):
        return None
    if not Path(name).exists():
        existing_file(name, "prompt set", others)
    args = PromptArguments.of(generation | {"system_prompt": None})
    try:
        return _hashes(name, read_prompts(name, args, keep_bad=True), generation, template, notes)
    except UserError as error:  # a script's flags are keys of the section here
        raise UserError(re.sub(r"--(dataset_\w+)", r"--generation.\1", str(error))) from None


def _hashes(name, found, generation, template, notes):
    hashes, bad, first = array("Q"), 0, None
    for number, record in enumerate(found, 1):
        try:
            if isinstance(record, BadRecord):
                raise record
            if template is not None:
                messages = with_system(record["prompt"], generation.get("system_prompt"))
                try:
                    template.render(messages, True, record.get("tools"))
                except UserError as error:
                    raise UserError(f"{name} record {number}: {error}") from None
        except UserError as error:
            bad, first = bad + 1, first or error
            continue
        hashes.append(int(record_id(record["prompt"], tools=record.get("tools")), 16))
    if bad and (not hashes or generation.get("bad_prompts") == "refuse"):
        more = f"; {bad - 1} more prompts of {name} cannot be used" if bad > 1 else ""
        raise UserError(f"{first}{more}")
    if bad and notes is not None:
        notes.append(f"{bad} prompts of {name} cannot be used and will be skipped, the first: {first}")
    return hashes


def first_prompt(name: str, plan: "Plan") -> dict | None:
    """The first record of a local prompt set, None for a set on the hub."""
    generation = plan.settings.generation
    if name == plan.settings.heldout_prompts:
        generation = generation | plan.settings.heldout
    if not is_local(name):
        return None
    return next(read_prompts(name, PromptArguments.of(generation)), None)


def check_evaluation_sets(plan: "Plan", found: "Findings"):
    """Note how many training prompts overlap with the evaluation sets, and how they are left out.

    What is on the hub is looked at by a start, not by --check; where it cannot be reached, that is a note.
    """
    settings, unseen = plan.settings, []

    def reached(name: str, function: Callable, *args: object) -> Any:
        if is_local(name):
            return found.attempt(function, *args)
        if plan.planning:
            unseen.append(name)
            return None
        try:
            return function(*args)
        except UserError as error:
            found.notes.append(f"not compared for overlap: {error}")
            return None

    names = list(dict.fromkeys(settings.evaluation_sets or []))
    sets = [reached(name, find_overlap.read_evaluation_set, name) for name in names]
    sets = [one for one in sets if one]
    args = PromptArguments.of(settings.generation | {"system_prompt": None})
    for name in dict.fromkeys(settings.prompts) if sets and not found.problems else ():
        overlap = reached(name, find_overlap.find_overlap, name, args, sets)
        found.notes.extend(overlap.lines() if overlap else ())
        if overlap and overlap.left_out:
            given = [f"--{key} {value}" for key, value in of_prompts(args).items()]
            found.notes.append(
                f"to leave them out: python {' '.join([find_overlap.SCRIPT, *given])} --dataset_name_or_path "
                f"{name} --evaluation_sets {' '.join(names)} --output_dir X.jsonl, and name that in prompts"
            )
    if unseen:
        told = f"on the hub, not compared for overlap: {', '.join(unseen)}"
        found.notes.append(f"{told}; the start does it, and {find_overlap.SCRIPT}")


def of_prompts(args: PromptArguments) -> dict:
    """What is given of how evaluation/find_overlap.py is to read prompts."""
    default = PromptArguments()
    keys = ("dataset_key", "dataset_split")
    return {key: getattr(args, key) for key in keys if getattr(args, key) != getattr(default, key)}


def check_prompts(plan: "Plan", found: "Findings") -> dict:
    """Read the prompt sets and refuse an overlap with the held-out set.

    Returns:
        dict name → hashes of its prompts, None for a set on the hub; the held-out set, if any, is the last.
    """
    settings = plan.settings
    own = dict.fromkeys(settings.prompts, settings.generation)
    if settings.heldout_prompts is not None:  # the last, also where it is a training set too
        own[settings.heldout_prompts] = settings.generation | settings.heldout
    sets = {}
    for name, generation in own.items():
        template = found.attempt(template_of, settings.model_name_or_path, generation)
        others = own.keys() - {name}
        header = found.attempt(template.missing_header) if template else ""
        if header and (line := NO_HEADER.format(header)) not in found.notes:
            found.notes.append(line)
        sets[name] = found.attempt(local_prompts, name, generation, template, found.notes, others)
    heldout = set(sets.get(settings.heldout_prompts) or [])
    for name in dict.fromkeys(settings.prompts):
        both = sum(prompt in heldout for prompt in sets[name] or [])
        if both and not settings.allow_overlap:
            found.problems.append(
                f"{both} prompts of {name} also stand in the held-out set {settings.heldout_prompts}; take "
                "them out or give --allow_overlap true"
            )
    check_evaluation_sets(plan, found)
    unseen = [name for name, prompts in sets.items() if prompts is None]
    if unseen and not found.problems:
        found.notes.append(
            f"on the hub, not looked at: {', '.join(unseen)}: whether they are there, their columns, their "
            "number of prompts, and whether held-out prompts stand among the others"
        )
    return sets
