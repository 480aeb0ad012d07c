"""The kinds of reward models: what tells one, the class that scores with it, and its own arguments.

A new kind is a class as in reward_models.py, a Backbone with `load` and `score`, and an entry in `KINDS`.
"""

from dataclasses import dataclass
from pathlib import Path

from annotate_data.backbone import Backbone
from annotate_data.preference import PairPreference
from annotate_data.reward_models import ArmoRM, BradleyTerry
from common.cli import UserError


@dataclass(frozen=True)
class Kind:
    """A value of `--reward_type`.

    scorer: the class. architecture: how the architecture that a config names ends.
    names: where the config is any policy's, how the folder's name begins; any other must be asked for, since
        a policy that was given by mistake would yield plausible numbers.
    options: arguments of get_rewards.py that are handed to this kind alone.
    """

    scorer: type[Backbone]
    architecture: str
    names: tuple[str, ...] = ()
    options: tuple[str, ...] = ()


KINDS = {
    "bradley_terry": Kind(BradleyTerry, "ForSequenceClassification"),
    "armorm": Kind(ArmoRM, "LlamaForRewardModelWithGating"),
    "pair_preference": Kind(
        PairPreference,
        "ForCausalLM",
        names=("pair-preference-model",),  # as published
        options=("ranking", "save_pair_probabilities"),
    ),
}


def kind_of(config: dict, asked: str, name: str) -> str:
    """The kind of a reward model, one of `KINDS`.

    Args:
        config: mapping of its config.json.
        asked: `auto`, which goes by the architecture, or the kind that the user says it is.
        name: folder or hub name.

    Raises:
        UserError: no kind known here, or another one than was asked for; a classifier with several labels.
    """
    architecture = (config.get("architectures") or ["ForSequenceClassification"])[0]
    fitting = [kind for kind, about in KINDS.items() if architecture.endswith(about.architecture)]
    if not fitting:
        known = ", ".join(f"{kind} (…{about.architecture})" for kind, about in KINDS.items())
        raise UserError(
            f"{name} is not a reward model of a kind known here: its config says {architecture}; known are "
            f"{known}"
        )
    if asked not in ("auto", *fitting):
        told = " or ".join(fitting)
        raise UserError(f"{name} is a {architecture}, which is {told}, not --reward_type {asked}")
    if asked == "auto":
        plain = [kind for kind in fitting if not KINDS[kind].names]
        called = [kind for kind in fitting if Path(name).name.startswith(KINDS[kind].names or "/")]
        if not plain + called:
            raise UserError(
                f"{name} is a {architecture}, as a policy is, and no classifier with one label; if it is a "
                f"reward model of such a kind, say --reward_type {' or '.join(fitting)}"
            )
        [asked, *_] = plain + called
    labels = len(config["id2label"]) if config.get("id2label") else config.get("num_labels")
    if architecture.endswith("ForSequenceClassification") and labels not in (None, 1):
        raise UserError(f"{name} has num_labels = {labels}; a reward model has 1")
    return asked
