"""The model card (README.md of a trained model): what it was made from, how, and how well it went.

Metadata as the hub reads it: base model, held-out results, tags. Names of local folders stay out of it, since
the hub takes them for its own; they stand in the text.
"""

import contextlib
import re
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from common import records
from common.cli import UserError
from common.manifest import generation_manifest, read_manifest, versions
from common.preferences import REWARDED
from common.tables import split_config
from dpo_iteration.arguments import Arguments, unit
from dpo_iteration.losses import LOSSES, needs_reference, needs_rejected
from dpo_iteration.pairs import CHOOSE_TYPES

if TYPE_CHECKING:
    from huggingface_hub import ModelCard, ModelCardData

RESULTS = {"loss": "loss", "rewards/accuracies": "accuracy", "rewards/margins": "margin", "kl": "z0"}


def manifest_of(name: str) -> dict:
    """The manifest beside a local output, or {}: a card is no reason to fail."""
    try:
        return read_manifest(name) or {}
    except UserError:
        return {}


def on_hub(name: str) -> bool:
    """Whether a name is one of the hub's rather than a path (pruned models leave their manifests)."""
    return (
        bool(re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", name))
        and not Path(name).exists()
        and not manifest_of(name)
    )


def ancestry(name: str) -> list[str]:
    """The policies from the first one to `name`, each trained from the one before, by the manifests beside
    them.
    """
    chain = [name]
    while (made := manifest_of(chain[0])).get("script") == "dpo_iteration/run_dpo.py":
        before = made["inputs"]["model_name_or_path"]["path"]
        if before in chain:
            break
        chain.insert(0, before)
    return chain


def scorers(files: list[str]) -> list[str]:
    """Reward models and functions that the manifests of rewarded files name, each once."""
    inputs = [manifest_of(name).get("inputs", {}) for name in files]
    found = [mark["path"] for marks in inputs for key, mark in marks.items() if key.startswith("reward_")]
    return list(dict.fromkeys(found))


def generations(files: list[str]) -> Iterator[dict]:
    """The manifests of the generations behind rewarded files, where they are there and whole."""
    for name in files:
        with contextlib.suppress(UserError):
            made = generation_manifest(name)
            if made:
                yield made


def prompts(files: list[str]) -> list[str]:
    """Prompt sets that the answers in rewarded files were sampled for, each once, where manifests tell."""
    asked = (made["inputs"].get("dataset_name_or_path") for made in generations(files))
    return list(dict.fromkeys(mark["path"] for mark in asked if mark))


def answered_by(files: list[str]) -> list[str]:
    """Models that the answers in rewarded files were sampled from, each once, where manifests tell."""
    found = [
        mark["path"]
        for made in generations(files)
        for key, mark in made["inputs"].items()
        if key.partition(" of ")[0] in ("model_name_or_path", "model")  # an engine's, or the servers'
    ]
    return list(dict.fromkeys(found))


def system_prompts(files: list[str]) -> list[str]:
    """System prompts that generation put before the prompts behind rewarded files, each once."""
    found = [made["settings"].get("system_prompt") for made in generations(files)]
    return list(dict.fromkeys(filter(None, found)))


def sampling_stops(args: Arguments) -> list[int]:
    """Token ids that `--eos_ids` gave when this policy's responses were sampled, where manifests tell."""
    found = set()
    for made in generations(args.train_dir):
        # an engine's policy, or the servers'
        if args.model_name_or_path in [mark["path"] for mark in made["inputs"].values()]:
            found |= set(made["settings"].get("eos_ids") or [])
    return sorted(found)


def launcher(argv: list[str]) -> list[str]:
    """What was typed in front of a script and its arguments `argv`: [`accelerate`, `launch`, …], [`python`],
    ….

    A launcher does not tell its processes how it was called, so the command lines are read of this process
    and of those above it that were given the same script and arguments; the outermost is what was typed.
    """
    import psutil

    found = []
    with contextlib.suppress(psutil.Error):  # another user's, or gone
        for process in [psutil.Process(), *psutil.Process().parents()]:
            words = process.cmdline()
            before, script = words[: -len(argv)], words[-len(argv) :]
            if not before or script[1:] != argv[1:] or Path(script[0]).name != Path(argv[0]).name:
                break
            found = before
    if not found:
        return []
    name, *more = [re.sub(r"^python[\d.]*$", "python", Path(found[0]).name), *found[1:]]
    # Accelerate itself is a script that python runs.
    installed = name == "python" and more and Path(more[0]).parent.name == "bin"
    return [Path(more[0]).name, *more[1:]] if installed else [name, *more]


def command(argv: list[str], before: list[str] = ()) -> str:
    """The command line that can be shown: what stood `before` the script, the script by its short name,
    without the token.
    """
    words = [re.sub(r"^--hub_token=.*", "--hub_token=…", word) for word in argv[1:]]
    words = ["…" if before == "--hub_token" else word for before, word in zip(["", *words], words)]
    return (
        shlex.join([*before, f"dpo_iteration/{Path(argv[0]).name}", *words])
        .replace("'…'", "…")
        .replace("'--hub_token=…'", "--hub_token=…")
    )


def table(head: list, rows: list) -> str:
    """A Markdown table; values are shown as they are, without breaking the table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(
        "| " + " | ".join(str(cell).replace("|", "\\|").replace("\n", " ") for cell in line) + " |"
        for line in lines
    )


def held_out_results(args: Arguments, metrics: dict) -> list:
    """huggingface_hub's EvalResults of what was held out."""
    from huggingface_hub import EvalResult

    return [
        EvalResult(
            task_type="text-generation",
            dataset_type="preference-pairs",
            dataset_name=f"held-out {unit(args)}s",
            dataset_split="eval",
            metric_type=label,
            metric_name=f"held-out {label}",
            metric_value=round(metrics[f"eval_{key}"], 6),
        )
        for key, label in RESULTS.items()
        if records.finite(metrics.get(f"eval_{key}"))
    ]


def lineage(args: Arguments, chain: list[str], asked: list[str], read_as: dict[str, str]) -> list[tuple]:
    """Rows of the card's table of origins; `chain`: see `ancestry`, `asked`: see `prompts`, `read_as`: kinds
    of data by their names.
    """
    unknown = "not known (no manifest)" if is_online(read_as) else "the preference data"
    reference = args.ref_model_name_or_path or args.model_name_or_path
    if not needs_reference(args.loss_type):
        reference = "none: the loss looks at none"
    own = f"{args.chat_template}, saved with the model" if args.chat_template else "the base model's"
    return [
        ("base model", chain[0]),
        ("iteration", len(chain)),
        ("previous iterates", ", ".join(chain[1:]) or "none"),
        ("reference", reference),
        ("rewards from", ", ".join(scorers(args.train_dir)) or unknown),
        ("prompts", ", ".join(asked) or unknown),
        ("answers from", ", ".join(answered_by(args.train_dir)) or unknown),
        ("chat template", own),
        ("system prompt", "; ".join(system_prompts(args.train_dir)) or "none"),
    ]


def data_read(args: Arguments, counts: dict) -> list[tuple]:
    """Rows of the card's table of data."""

    def listed(by_reason: dict[str, int]) -> str:
        return ", ".join(f"{n} {reason}" for reason, n in by_reason.items()) or "none"

    weights = args.train_weights or [None] * len(args.train_dir)
    files = [
        f"{name} ({counts['read_as'][name]}" + (f", weight {weight:g})" if weight else ")")
        for name, weight in zip(args.train_dir, weights, strict=True)
    ]
    return [
        ("files", ", ".join(files)),
        ("records", counts["records"]),
        (f"{unit(args)}s trained on", counts["train_pairs"]),
        (f"{unit(args)}s held out", counts["eval_pairs"]),
        ("prompts skipped", listed(counts["skipped"])),
        ("responses left out", listed(counts["responses_left_out"])),
    ]


def results_of(metrics: dict) -> list[list[str]]:
    """Rows of the table of results: what it is, of the training pairs, of the held-out ones."""
    found = []
    for key, label in RESULTS.items():
        values = [metrics.get(f"{prefix}{key}") for prefix in ("", "eval_")]
        shown = [f"{value:.4f}" if records.finite(value) else "" for value in values]
        found += [[label, *shown]] if any(shown) else []
    return found


def is_online(read_as: dict[str, str]) -> bool:
    """Whether rewarded answers are among the data, and not preferences alone."""
    return REWARDED in read_as.values()


def objective(args: Arguments, read_as: dict[str, str]) -> str:
    """What was optimised, on what, in the words of the card's first sentence; `read_as`: see `lineage`."""
    offline = set(read_as.values()) != {REWARDED}
    answers = " and ".join(["rewarded answers"] * is_online(read_as) + ["preference data"] * offline)
    losses = " + ".join(f"`{name}`" for name in args.loss_type)
    if not needs_rejected(args.loss_type):
        which = "a random one" if CHOOSE_TYPES[args.choose_type].blind else "the best one"
        return (
            f"supervised fine-tuning (loss {losses}) on {which} of the answers to each prompt, from {answers}"
        )
    method = "direct preference optimization" if is_dpo(args) else "preference optimization"
    blind = ", drawn without a look at the rewards" if CHOOSE_TYPES[args.choose_type].blind else ""
    return f"{method} (loss {losses}) on pairs chosen from {answers}{blind}"


def method_tag(args: Arguments) -> str:
    """The hub's tag of the method: dpo, or a loss by its name that is no kind of DPO."""
    return "dpo" if is_dpo(args) else args.loss_type[0]


def is_dpo(args: Arguments) -> bool:
    """Whether any of the losses is a kind of DPO: one of TRL's DPOTrainer that looks at the reference."""
    return any(LOSSES[name].trl and LOSSES[name].reference for name in args.loss_type)


def metadata(
    args: Arguments, name: str, chain: list[str], asked: list[str], read_as: dict[str, str], metrics: dict
) -> "ModelCardData":
    """What the hub reads of the card of the model `name`; the others as of `lineage` and `make_card`."""
    from huggingface_hub import ModelCardData

    offline = [split_config(given)[0] for given, kind in read_as.items() if kind != REWARDED]
    return ModelCardData(
        model_name=name,
        library_name="transformers",
        pipeline_tag="text-generation",
        eval_results=held_out_results(args, metrics) or None,
        base_model=chain[0] if on_hub(chain[0]) else None,
        base_model_relation="finetune" if on_hub(chain[0]) else None,
        datasets=[given for given in dict.fromkeys([*asked, *offline]) if on_hub(given)] or None,
        tags=[
            method_tag(args),
            *(["online-rlhf"] if is_online(read_as) else []),
            "trl",
            *(["lora"] if args.use_peft else []),
        ],
    )


def make_card(args: Arguments, settings: dict, counts: dict, metrics: dict, processes: int) -> "ModelCard":
    """huggingface_hub's ModelCard of a run.

    Args:
        settings, counts: as in the model's manifest.
        metrics: of the Trainer; those of the held-out pairs begin with `eval_`.
        processes: number of training processes.
    """
    from huggingface_hub import ModelCard

    chain, asked = ancestry(args.model_name_or_path), prompts(args.train_dir)
    read_as = counts["read_as"]
    name = Path(args.output_dir).absolute().name
    data = metadata(args, name, chain, asked, read_as, metrics)
    paper = "[arXiv 2405.07863](https://arxiv.org/abs/2405.07863)"
    online = f",\none iteration of online RLHF ({paper})" if is_online(read_as) else ""
    whose = f" up to step {metrics['step']}, whose weights these are" if "step" in metrics else ""
    body = f"""# {name}

A policy trained by {objective(args, read_as)}{online}.

## Lineage

{table(["", ""], lineage(args, chain, asked, read_as))}

## Data

{table(["", ""], data_read(args, counts))}

## Results

Of the last log line while training{whose}, and of all held-out {unit(args)}s.

{table(["", "training", "held out"], results_of(metrics))}

## Settings

{table(["setting", "value"], [(key, f"`{value}`") for key, value in settings.items()])}

Trained by {processes} process{"es" if processes > 1 else ""}:

```sh
{command(sys.argv, launcher(sys.argv))}
```

## Versions

{", ".join(f"{package} {version}" for package, version in versions().items())}
"""
    return ModelCard(f"---\n{data.to_yaml()}\n---\n\n{body}")
