"""Whether what a run has made so far was made from today's settings and inputs."""

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from common.cli import UserError
from common.manifest import read_manifest, same_content
from common.run_folder import RunFolder

if TYPE_CHECKING:
    from loop.plan import Plan

# Files of a run, and the settings that they depend on, besides what they were made from.
SAMPLED = ("model_name_or_path", "seed", "date")
TRAINED = ("training_args", "ppo", "online", "evaluate_every", "reference", "train_on")
DEPENDS = {
    "iter*/heldout_*.generated.jsonl": (*SAMPLED, "heldout_prompts", "heldout"),
    "iter*/generated*.jsonl": (*SAMPLED, "generation"),
    "iter*/*rewarded.jsonl": ("reward_name_or_path", "annotation"),
    "iter*/*judged.jsonl": ("eval_reward_model", "eval_annotation"),
    "iter*/model": ("model_name_or_path", "seed", *TRAINED),
}
ANEW = (
    "Start another run with --run_dir, or delete what is to be made anew (this output and what comes "
    "after it)"
)


def outputs(folder: RunFolder, pattern: str) -> list[Path]:
    """The complete outputs of a pattern; weights that were pruned are still there by their manifest."""
    found = []
    for manifest in sorted(folder.path.glob(f"{pattern.removesuffix('.jsonl')}.manifest.json")):
        output = manifest.with_name(manifest.name.removesuffix(".manifest.json"))
        output = output if "." not in pattern else output.with_name(output.name + ".jsonl")
        held = read_manifest(output)
        if held and held.get("complete") and (output.exists() or Path(f"{output}.pruned").exists()):
            found.append(output)
    return found


def refuse(plan: "Plan", now: dict) -> list[str]:
    """Refuse settings that differ from those that what is there was made with, and inputs that have changed
    since.

    Args:
        plan: the Plan. now: its resolved settings.

    Returns:
        In what the settings differ from the run's before otherwise, a line each.

    Raises:
        UserError: names the output, and the setting or the input.
    """
    for pattern, keys in DEPENDS.items():
        for output in outputs(plan.folder, pattern):
            if not plan.before:
                raise UserError(
                    f"{plan.folder.settings} is empty or gone, so nobody can tell what {output} was made "
                    f"with: put it back. {ANEW}"
                )
            for key in keys:
                for differs in differences(plan, now, key, partial(same_files, output)):
                    raise UserError(f"{output} was made with other settings: {differs}. {ANEW}")
            refuse_inputs(output)
    refuse_prompts(plan)
    found = [line for key in now if key in plan.before for line in differences(plan, now, key)]
    return [f"{line}; this holds for what is made from here on" for line in found]


def differences(
    plan: "Plan", now: dict, key: str, same: Callable[[object, object], bool] | None = None
) -> Iterator[str]:
    """In what a setting, or the keys of a section, differ from the run's before, in words.

    Args:
        same: whether two values come to the same; only keys that shape an output are looked at then.
    """
    old, new = plan.before.get(key), now.get(key)
    pairs = {key: (old, new)}
    if isinstance(old, dict) and isinstance(new, dict):
        shaping, defaults = old.keys() & new.keys(), {}  # what only one of them has, another version wrote
        if same:  # an argument that came later had its default's effect before
            defaults = plan.shaping(key)
            shaping = {*defaults, "chat_template", "reward_function"}  # files: by their content
        pairs = {
            f"{key}.{name}": (old.get(name, defaults.get(name)), new.get(name))
            for name in old | new
            if name in shaping
        }
    for name, (old, new) in pairs.items():
        if old != new and not (same and same(old, new)):
            yield f"{name} was {old!r} and is now {new!r}"


def same_files(output: Path, old: object, new: object) -> bool:
    """Whether another path leads to what the output was made from."""
    olds, news = ([value] if isinstance(value, str) else value or [] for value in (old, new))
    if not isinstance(olds, list) or not isinstance(news, list) or len(olds) != len(news):
        return False
    if not all(isinstance(name, str) for name in [*olds, *news]):
        return False
    held = {entry["path"]: entry for entry in read_manifest(output)["inputs"].values()}
    return all(
        was == name or (was in held and Path(name).exists() and same_content(held[was], name))
        for was, name in zip(olds, news)
    )


def refuse_inputs(output: Path):
    """Refuse an output one of whose inputs is not what it was made from any more."""
    for key, entry in read_manifest(output)["inputs"].items():
        path = entry["path"]
        # Weights that were pruned cannot be compared; the stage that wrote them has been.
        if not Path(f"{path}.pruned").exists() and not same_content(entry, path):
            raise UserError(f"{output} was made from other data: {key} ({path}) has changed since. {ANEW}")


def refuse_prompts(plan: "Plan"):
    """Refuse other prompts for an iteration whose responses are there."""
    for i in range(1, plan.settings.iterations + 1):
        for path in outputs(plan.folder, f"iter{i}/generated*.jsonl"):
            entry, name = read_manifest(path)["inputs"].get("dataset_name_or_path", {}), plan.prompts(i)
            if entry.get("path") != name and not (Path(name).exists() and same_content(entry, name)):
                raise UserError(
                    f"{path} was made with other settings: prompts was {entry.get('path')!r} and is now "
                    f"{name!r}. {ANEW}"
                )
