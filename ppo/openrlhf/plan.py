"""What a run will do: who gives the rewards, and where all goes on the GPUs there are. Nothing is written."""

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from common.cli import UserError
from common.devices import prepare_threads
from common.models import check_model, check_policy, read_json
from dpo_iteration import memory
from ppo.openrlhf import preflight
from ppo.openrlhf.arguments import Arguments
from ppo.openrlhf.command import Placement, accumulation
from ppo.openrlhf.placement import place

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclasses.dataclass
class Plan:
    """A run worked out.

    `kind` of reward: local (OpenRLHF's own model), server (ours), function or url. `same_tokens`: whether the
    first reward model reads the policy's tokens. `tokenizer`: None where a dry run cannot reach it.
    """

    placement: Placement
    kind: str
    same_tokens: bool
    notes: list[str]
    tokenizer: object


def plan(args: Arguments) -> Plan:
    """Look at GPUs, models and reward, and decide where all goes.

    Raises:
        UserError: what cannot work, with what would.
    """
    notes = []
    check_policy(args.model_name_or_path, "model_name_or_path")
    for name in args.reward_name_or_path or []:
        check_model(name, "reward_name_or_path")
    if not args.dry_run and not args.ignore_versions:
        preflight.check_versions()
    gpus, a_node, size = preflight.count_gpus(args)
    if not args.dry_run:
        notes += preflight.check_ray(args)
        if args.reward_url:
            preflight.check_address(args.reward_url)
        preflight.check_cores(args, gpus)
    prepare_threads()
    tokenizer, kind, same = with_tokenizers(args, notes)
    flash = preflight.installed("flash-attn") is not None or args.dry_run
    placement = try_place(args, kind, (gpus, a_node, size), flash, notes)
    return Plan(placement, kind, same, notes + preflight.notes_on_machine(placement), tokenizer)


def with_tokenizers(args: Arguments, notes: list[str]) -> tuple[object, str, bool]:
    """(the policy's tokenizer, kind of reward, same tokens). A dry run does without those of hub models."""
    from ppo.openrlhf.prompts import load_tokenizer

    names = args.reward_name_or_path or []
    try:
        tokenizer = load_tokenizer(args.model_name_or_path, args.trust_remote_code, args.chat_template)
        return tokenizer, *choose_reward(args, tokenizer, notes)
    except UserError:
        if not args.dry_run or all(Path(name).is_dir() for name in [args.model_name_or_path, *names]):
            raise
    notes.append(
        "tokenizers on the hub are not at hand: that policy and reward model share tokens and template is "
        "assumed"
    )
    return None, *choose_reward(args, None, notes)


def why_not_local(args: Arguments, tokenizer: "PreTrainedTokenizerBase") -> str | None:
    """Why OpenRLHF cannot hold the first reward model itself, in words; None where it can."""
    from ppo.openrlhf.prompts import load_tokenizer

    name = args.reward_name_or_path[0]
    why = preflight.differs(
        tokenizer, load_tokenizer(name, args.trust_remote_code, args.reward_chat_template)
    )
    if why:
        return why
    config = Path(name) / "config.json"
    kinds = read_json(config).get("architectures") if config.is_file() else None
    if kinds and "SequenceClassification" not in str(kinds):
        return "it is no classifier with one label"
    if preflight.has_value_head(name, args.value_head) is False:
        return f"it has no weights {args.value_head}.weight (value_head)"
    return None


def choose_reward(
    args: Arguments, tokenizer: "PreTrainedTokenizerBase | None", notes: list[str]
) -> tuple[str, bool]:
    """(kind, same tokens) of Plan. `tokenizer` None: the same tokens are assumed.

    Raises:
        UserError: OpenRLHF's own was asked for and cannot read the policy's tokens.
    """
    names = args.reward_name_or_path or []
    why = why_not_local(args, tokenizer) if names and tokenizer is not None else None
    if args.reward_url:
        return "url", bool(names) and why is None
    if not names:
        return "function", False
    if len(names) > 1 or args.reward_function or args.reward_weights or args.reward_backend == "server":
        return "server", why is None
    if why is None:
        return "local", True
    if args.reward_backend == "local":
        raise UserError(
            f"reward_backend local: {names[0]} cannot be used so: {why}; take reward_backend server, which "
            "has its own tokenizer"
        )
    if args.ray_address:
        raise UserError(
            f"OpenRLHF's own reward model cannot be {names[0]}: {why}; start ppo/openrlhf/serve_reward.py "
            "--host … by hand and give reward_url"
        )
    notes.append(f"the reward model runs in our server: {why}")
    return "server", False


def shapes_of(args: Arguments, kind: str) -> dict:
    """Role → Shape (or None) of the models that OpenRLHF holds, and of `server`, our reward server.

    Raises:
        UserError: the policy's size is not known.
    """
    reward_size = args.reward_size_b or args.model_size_b

    def shape(name: str, billions: float | None) -> memory.Shape | None:
        if Path(name).is_dir():
            return memory.shape_of(name, trust_remote_code=args.trust_remote_code)
        return memory.shape_like(billions) if billions else None

    policy = shape(args.model_name_or_path, args.model_size_b)
    if policy is None:
        raise UserError(
            f"model_name_or_path {args.model_name_or_path}: its size is not known here; set model_size_b"
        )
    rewards = args.reward_name_or_path or []
    model = shape(rewards[0], reward_size) if rewards else None
    start = args.critic_name_or_path or (rewards or [args.model_name_or_path])[0]
    value = policy if start == args.model_name_or_path else shape(start, reward_size)
    return {
        "actor": policy,
        "ref": policy if args.kl_coef else None,
        "critic": value or policy,
        "reward": model if kind == "local" else None,
        "server": model if kind == "server" else None,
    }


def try_place(args: Arguments, kind: str, gpus: tuple, flash: bool, notes: list[str]) -> Placement:
    """Where all goes, our reward server too: it shares a GPU, or has one set aside.

    With a GPU aside the others are used up to a power of two, as batches divide.

    Args:
        gpus: (how many, of a node, bytes of one or None).
    """
    number, a_node, size = gpus
    shapes, machine = shapes_of(args, kind), preflight.machine_memory(args)
    server, problem = shapes.pop("server"), None
    asides = [0] if server is None else [0, 1] if args.reward_gpus is None else [args.reward_gpus]
    if asides == [1] and number == 1:
        raise UserError("reward_gpus 1 leaves no GPU to train on; give 0, or more GPUs")
    for aside in asides:
        most = number - aside
        for count in [most, *(n for n in (32, 16, 8, 4, 2, 1) if aside and n < most)]:
            if count < 1:
                continue
            shared = 2 * server.parameters + 2 * memory.GIB if server and not aside else 0
            try:
                placement, more = place(args, shapes, count, min(a_node, count), size, flash, shared, machine)
            except UserError as error:
                problem = problem or error
                continue
            notes += more
            if server:
                apart = f"one GPU of its own, {most - count} stay idle"
                notes.append(f"our reward server takes {apart if aside else 'one of the GPUs that train'}")
            return placement
    raise problem


def describe(args: Arguments, found: Plan) -> Iterator[str]:
    """What was decided, for a reader: lines."""
    p, steps = found.placement, accumulation(args, found.placement)
    reward = {
        "local": "OpenRLHF's own reward model",
        "server": "our reward server",
        "function": "a function",
        "url": args.reward_url,
    }[found.kind]
    where = "all roles on all of them"
    if not p.colocate:
        where = f"{p.gpus} for the policy, {p.critic_gpus} for value and reward model"
    nodes = "one node" if p.nodes == 1 else f"{p.nodes} nodes"
    how = f"{steps} passes a step" if steps else f"packed to {p.max_tokens_per_gpu} tokens"
    yield (
        f"{p.all_gpus} GPUs on {nodes}, {where}; {p.engines} engines × {p.tensor_parallel} GPUs, "
        f"ZeRO-{p.zero_stage}, {how}; reward: {reward}"
    )
    yield from found.notes
