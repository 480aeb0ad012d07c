"""The arguments of get_rewards.py: what shapes a reward, what is refused before anything is read."""

import math
from dataclasses import dataclass
from pathlib import Path

from annotate_data.functions import EXAMPLE
from annotate_data.kinds import KINDS, kind_of
from annotate_data.ranking import RANKINGS
from common import cli, functions, manifest
from common.chat import TemplateArguments
from common.cli import UserError, arg
from common.models import check_model, local_config

DEFAULT_MODEL = "sfairXC/FsfairX-LLaMA3-RM-v0.1"


@dataclass
class Arguments(TemplateArguments):
    dataset_name_or_path: list[str] = arg(help="generated JSON Lines file, or several")
    output_dir: list[str] = arg(help="rewarded file to write (a file name), one for each input", shapes=False)
    K: int | None = arg(
        None, help="responses a prompt, if it is to be checked against the data", shapes=False
    )
    reward_name_or_path: list[str] | None = arg(
        None, help=f"reward models, folder or hub name; without a function {DEFAULT_MODEL}"
    )
    reward_type: list[str] = arg(["auto"], help=f"auto or {', '.join(KINDS)}; for all models or for each")
    reward_function: str | None = arg(None, help="FILE.py:NAME, f(messages, response[, record]) → number")
    reward_weights: list[float] | None = arg(
        None, help="of a weighted sum: for each model, then the function"
    )
    ranking: str = arg("round_robin", "how a pair-preference model compares K responses", tuple(RANKINGS))
    save_pair_probabilities: bool = arg(False, help="keep a pair-preference model's K×K probabilities")
    max_length: int = arg(4096, help="tokens of a sequence, at most the model's limit; the left is cut")
    batch_tokens: int | None = arg(
        None,
        "tokens of a forward pass; None: 16384 on a GPU, 2048 without; halved when memory runs out",
        shapes=False,
    )
    share_prompts: bool = arg(
        True, help="compute a prompt once for its responses, where that works", shapes=False
    )
    chunk_records: int = arg(1024, help="records that are sorted and shared out together", shapes=False)
    dtype: str = arg(
        "auto", "auto is bfloat16 on a GPU, float32 without", ("auto", "float32", "bfloat16", "float16")
    )
    attn_implementation: str = arg("auto", help="auto: flash_attention_2 on a GPU that has it", shapes=False)
    revision: str | None = arg(None, help="branch, tag or commit of a hub model")
    trust_remote_code: bool = arg(False, help="run Python code that comes with the model", shapes=False)
    overwrite: bool = arg(False, help="discard what is there", shapes=False)


# What is handed to each reward model.
MODEL = ("max_length", "dtype", "revision", "trust_remote_code", "attn_implementation", "batch_tokens")
MODEL += ("share_prompts",)


def names(args: Arguments) -> list[str]:
    """Names of the reward models; none where a function alone scores."""
    return args.reward_name_or_path or ([] if args.reward_function else [DEFAULT_MODEL])


def types(args: Arguments) -> list[str]:
    """`--reward_type` of each model."""
    models = names(args)
    return args.reward_type * len(models) if len(args.reward_type) == 1 else args.reward_type


def dated(args: Arguments) -> Arguments:
    """`args` with a date: that of the first output's first start, else of its answers, else today's."""
    made = manifest.generation_manifest(args.dataset_name_or_path[0])
    return manifest.with_date(args, args.output_dir[0], made and made["settings"].get("date"))


def shaping(args: Arguments, source: str | Path) -> tuple[dict, dict]:
    """(settings, inputs) that shape the rewards of one input file; what its manifest holds."""
    inputs = {"dataset_name_or_path": str(source), "chat_template": args.chat_template}
    for n, name in enumerate(names(args), 1):
        inputs["reward_name_or_path" + (f" {n}" if n > 1 else "")] = name
    if args.reward_function:
        path, _ = functions.function_file(args.reward_function, "--reward_function", EXAMPLE)
        inputs["reward_function"] = str(path)
    return cli.shaping_values(args, ("dataset_name_or_path", "reward_name_or_path")), inputs


def check_options(args: Arguments, kinds: list[str]) -> None:
    """Refuse arguments of a kind of reward models where no such kind is among the `kinds`."""
    for kind, about in KINDS.items():
        for name in about.options if kind not in kinds else ():
            if getattr(args, name) != Arguments.__dataclass_fields__[name].default:
                raise UserError(f"--{name} is for {kind} reward models, and none is given")


def check(args: Arguments) -> None:
    """Refuse what is known to be wrong without reading data or loading a model.

    Raises:
        UserError: names the argument.
    """
    for name in ("K", "max_length", "batch_tokens", "chunk_records"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            raise UserError(f"--{name} must be at least 1")
    models, kinds = names(args), types(args)
    parts = [*models, *([args.reward_function] if args.reward_function else [])]
    told = ", ".join(parts)
    if len(set(parts)) < len(parts):
        raise UserError(f"a reward model is named twice: {told}; a weight of its own does the same")
    for kind in args.reward_type:
        if kind not in ("auto", *KINDS):
            known = f"auto, {', '.join(KINDS)}"
            raise UserError(f"--reward_type {kind} is not one of {known}{cli.nearest(kind, KINDS)}")
    if len(kinds) != len(models) and args.reward_type != ["auto"]:
        what = f"{len(args.reward_type)} in --reward_type for {len(models)} reward models"
        raise UserError(f"{what}: one for all or one each")
    weights = args.reward_weights
    if len(parts) > 1 and not weights:
        raise UserError(f"{len(parts)} scorers need --reward_weights, a number for each of {told}")
    if weights is not None and len(weights) != len(parts):
        raise UserError(f"{len(weights)} numbers in --reward_weights for {len(parts)} scorers ({told})")
    if weights is not None and not all(math.isfinite(w) and w for w in weights):
        shown = " ".join(map(str, weights))
        raise UserError(f"--reward_weights {shown}: finite numbers other than 0 were expected")
    if args.revision and len(models) > 1:
        raise UserError("--revision is for one reward model; give folders instead")
    if args.reward_function:
        functions.function_file(args.reward_function, "--reward_function", EXAMPLE)
    found = []
    for name, kind in zip(models, kinds, strict=True):
        check_model(name, "--reward_name_or_path")
        config = local_config(name)
        found += [] if config is None else [kind_of(config, kind, name)]
    if len(found) == len(models):  # none on the hub
        check_options(args, found)
    args.check_template()
