"""Arguments of run_online.py: what there is, what cannot work, what shapes the model.

Nothing heavy is imported.
"""

import dataclasses
import hashlib
from pathlib import Path

from annotate_data import arguments as annotation
from annotate_data.functions import EXAMPLE
from common.cli import UserError, arg, count, read_section, shaping_values
from common.functions import function_file
from common.manifest import difference, read_manifest, with_date
from common.models import check_policy
from common.training import Training, step_of, world_size
from dpo_iteration import arguments as dpo
from dpo_iteration import checks
from generation import gen_hf, get_hf2, mixture, sampling

MEMORY = Path("/dev/shm")  # a file system in memory, on Linux
OWN = {  # keys of run_dpo.py that follow from a key of run_online.py, which is to be given in their place
    "num_train_epochs": "online.rounds",
    "max_steps": "online.rounds and online.sync_every",
    "global_batch_size": "online.prompts_per_round and online.sync_every",
    "gradient_accumulation_steps": "per_device_train_batch_size",
    "logging_steps": "online.sync_every",
    "save_steps": "online.save_every",
    "eval_steps": "evaluate_every",
    "eval_fraction": "heldout_prompts",
    "reference_cache": "nothing: each round has new pairs",
}
# How a round's file of prompts is read: what the sets themselves ask for was applied when they were read.
OF_PROMPTS = {"dataset_key": "prompt", "dataset_split": "train", "system_prompt": None}


@dataclasses.dataclass(kw_only=True)
class Arguments(gen_hf.ClientArguments):
    model_name_or_path: str = arg(
        help="policy to start from, and the reference: hub name or folder", shapes=False
    )
    reward_name_or_path: list[str] | None = arg(
        None,
        "reward models: hub names or folders; none where annotation.reward_function scores",
        shapes=False,
    )
    dataset_name_or_path: list[str] = arg(help="prompt sets, as generation reads them", shapes=False)
    generation: str = arg(help="FILE.yaml:SECTION of generation/gen_hf.py", metavar="YAML", shapes=False)
    annotation: str = arg(
        help="FILE.yaml:SECTION of annotate_data/get_rewards.py", metavar="YAML", shapes=False
    )
    training_args: str = arg(
        help="FILE.yaml:SECTION of dpo_iteration/run_dpo.py", metavar="YAML", shapes=False
    )
    output_dir: str = arg(help="folder of the policy after `until_round` rounds", shapes=False)
    rounds_dir: str = arg(
        help="folder of the rounds, their data and checkpoints, for all policies of a run", shapes=False
    )
    rounds: int = arg(150, "rounds in all; the learning rate's schedule goes over all of them")
    until_round: int | None = arg(None, "stop after so many rounds, for now; None: after all", shapes=False)
    prompts_per_round: int = arg(320, "prompts that a round answers; at most so many pairs are trained on")
    sync_every: int = arg(10, "optimizer steps of a round, over which its pairs are laid out")
    staleness: int = arg(
        0,
        "0: a round trains on answers of the policy as it is, and waits for them; 1: of the policy one round "
        "before, and the next round is sampled meanwhile",
        [0, 1],
    )
    heldout_prompts: str | None = arg(
        None,
        "prompts that the servers answer when the policy is there, sampled and greedy: "
        "heldout_sampled.generated.jsonl and heldout_greedy.generated.jsonl beside output_dir",
        shapes=False,
    )
    heldout: str | None = arg(
        None, "FILE.yaml:SECTION of generation/gen_hf.py for these", metavar="YAML", shapes=False
    )
    share_gpus: bool = arg(
        False,
        "the servers are on the GPUs that train, and sleep while the trainer is at work; register_server.sh "
        "must start them with engine_args='{\"enable_sleep_mode\": true}'",
        shapes=False,
    )
    save_every: int = arg(10, "rounds between checkpoints", shapes=False)
    seed: int = arg(42, "seed of sampling, of the order of prompts and pairs")


@dataclasses.dataclass
class Parts:
    """The arguments of what an online run is made of, with what the run decides filled in.

    heldout: of each kind of held-out answers, none without held-out prompts.
    server_dtype: in which the servers compute, as generation's YAML says it.
    """

    sampling: gen_hf.Arguments
    heldout: list[gen_hf.Arguments]
    scoring: annotation.Arguments
    training: dpo.Arguments
    server_dtype: str


def memory_folder(rounds_dir: str | Path) -> Path:
    """Where a run's weights go in memory, a name of its own."""
    name = hashlib.sha256(str(Path(rounds_dir).absolute()).encode()).hexdigest()[:12]
    return MEMORY / f"rlhf-weights-{name}"


def last_round(args: Arguments) -> int:
    """Number of rounds after which this start stops."""
    return args.rounds if args.until_round is None else args.until_round


def check(args: Arguments):
    """Refuse numbers that cannot work.

    Raises:
        UserError: names the argument.
    """
    for key in ("rounds", "prompts_per_round", "sync_every", "save_every"):
        if getattr(args, key) < 1:
            raise UserError(f"--{key} {getattr(args, key)} must be at least 1")
    if not 1 <= last_round(args) <= args.rounds:
        raise UserError(f"--until_round {args.until_round}: there are {args.rounds} rounds")
    if args.share_gpus and args.staleness:
        raise UserError(
            f"--staleness {args.staleness}: servers and trainer take turns on shared GPUs, so nothing is "
            "sampled while it trains; give --staleness 0"
        )
    if set(args.hosts) != {"127.0.0.1"}:
        raise UserError(
            "--hosts: online training has its servers on this machine, since weights reach them by its file "
            "system and their routes for that must not be open to others"
        )
    if args.prompts_per_round < args.sync_every:
        raise UserError(
            f"--prompts_per_round {args.prompts_per_round} is less than --sync_every {args.sync_every}: a "
            "step needs a pair, so give more prompts or fewer steps"
        )
    if not args.dataset_name_or_path:
        raise UserError("--dataset_name_or_path names no prompt set")
    if (args.heldout_prompts is None) != (args.heldout is None):
        raise UserError(
            "--heldout_prompts and --heldout belong together: the prompts, and how they are answered"
        )


def read_parts(args: Arguments) -> Parts:
    """The sections, with what the run decides, checked as their scripts check them.

    Raises:
        UserError: what is wrong, and where it was written.
    """
    asked = {"dataset_name_or_path": args.dataset_name_or_path[0], "output_dir": args.rounds_dir}
    asked |= {"seed": args.seed}
    client = {key: getattr(args, key) for key in gen_hf.ClientArguments.__dataclass_fields__}
    served = asked | client | {"tokenizer": args.model_name_or_path}
    sampled = read_section(gen_hf.Arguments, args.generation, served)
    engine = {"model_name_or_path": args.model_name_or_path}
    server_dtype = read_section(get_hf2.Arguments, args.generation, asked | engine, without=client).dtype
    sampling.check_sampling(sampled)
    gen_hf.check(sampled)
    check_responses(sampled)
    sampled = with_date(sampled, Path(args.rounds_dir) / "round_000000" / "generated.jsonl")
    rewards = {"dataset_name_or_path": ["-"], "output_dir": ["-"], "K": sampled.K, "date": sampled.date}
    if args.reward_name_or_path:
        rewards["reward_name_or_path"] = args.reward_name_or_path
    scored = read_section(annotation.Arguments, args.annotation, rewards)
    annotation.check(scored)
    decided = {
        "model_name_or_path": args.model_name_or_path,
        "ref_model_name_or_path": args.model_name_or_path,
        "train_dir": [],
        "output_dir": args.output_dir,
        "seed": args.seed,
        "max_steps": last_round(args) * args.sync_every,
        "logging_steps": args.sync_every,
        "save_steps": 0,
        "eval_fraction": 0.0,
    }
    trained = read_section(dpo.Arguments, args.training_args, decided, without=OWN)
    # Not by what a GPU has free, as run_dpo.py does: reference and reward models are in it, too.
    trained.gradient_checkpointing = trained.gradient_checkpointing is not False
    check_training(trained)
    return Parts(sampled, read_heldout(args, served), scored, trained, server_dtype)


def read_heldout(args: Arguments, served: dict) -> list[gen_hf.Arguments]:
    """How the held-out prompts are answered, for each kind; `served`: what is told of the servers."""
    if args.heldout_prompts is None:
        return []
    found, folder = [], Path(args.output_dir).parent
    for kind, decided in sampling.HELDOUT.items():
        files = {"dataset_name_or_path": args.heldout_prompts}
        files |= {"output_dir": str(folder / f"heldout_{kind}.generated.jsonl")}
        found.append(read_section(gen_hf.Arguments, args.heldout, served | files | decided))
        sampling.check_sampling(found[-1])
    return found


def check_responses(args: sampling.SamplingArguments):
    """Refuse responses that are too few, or of other models than the policy."""
    if args.K < 2:
        raise UserError("generation.K 1 leaves no pairs to train on: 2 responses a prompt are the least")
    if others := [name for name in mixture.models_of(args) if name != "policy"]:
        raise UserError(
            f"generation.mixture has parts with model {' and '.join(others)}: an online run samples from the "
            "policy that it trains; leave model out"
        )


def check_training(args: dpo.Arguments):
    """Refuse what run_dpo.py does and an online run does not."""
    checks.check(args)
    why = dpo.reason_for_trl(args)
    if why:
        raise UserError(f"online training computes its losses itself, and cannot here: {why}")
    if args.dataloader_num_workers:
        raise UserError("--dataloader_num_workers: a round's pairs are made in the process that trains")
    if args.load_best_model_at_end:
        raise UserError("--load_best_model_at_end: `select` chooses among the policies that were measured")


def check_paths(args: Arguments, parts: Parts):
    """Refuse models and functions that are not there."""
    check_policy(args.model_name_or_path, "--model_name_or_path")
    parts.training.check_template()
    if parts.scoring.reward_function:
        function_file(parts.scoring.reward_function, "--reward_function", EXAMPLE, True)


def state_of(args: Arguments, parts: Parts) -> Training:
    """The training as a whole: its checkpoints are in the folder of rounds."""
    return Training(
        args.rounds_dir,
        "dpo_iteration/run_online.py",
        settings(args, parts),
        inputs(args),
        checkpoint_settings={"num_processes": world_size()},
        otherwise="choose another --rounds_dir, or delete it",
    )


def policy_of(args: Arguments, parts: Parts) -> Training:
    """The policy that this start makes."""
    own = settings(args, parts) | {"until_round": last_round(args)}
    return Training(
        args.output_dir,
        "dpo_iteration/run_online.py",
        own,
        inputs(args),
        find_checkpoints=list,  # none: they are the run's
        otherwise="choose another --output_dir, or delete it",
    )


def settings(args: Arguments, parts: Parts) -> dict:
    """What shapes the model, as its manifest holds it."""
    trained = dpo.training_of(parts.training).settings
    trained = {key: value for key, value in trained.items() if key not in (*OWN, "pairs_per_step")}
    apart = ("dataset_name_or_path", "iteration", "tokenizer", "reward_name_or_path", "K")
    return (
        shaping_values(args)
        | trained
        | {"generation": shaping_values(parts.sampling, (*apart[:-1], "local_index", "my_world_size"))}
        | {"annotation": shaping_values(parts.scoring, apart)}
    )


def inputs(args: Arguments) -> dict:
    found = {"model_name_or_path": args.model_name_or_path}
    found |= {f"dataset_name_or_path {i}": name for i, name in enumerate(args.dataset_name_or_path, 1)}
    return found | {
        f"reward_name_or_path {i}": name for i, name in enumerate(args.reward_name_or_path or [], 1)
    }


def refuse_changed(args: Arguments, state: Training):
    """Refuse to go on with rounds that were sampled with other settings; also before a first checkpoint.

    Raises:
        UserError: names the setting.
    """
    if not state.checkpoints() and not any(state.folder.glob("round_*")):
        return
    held = read_manifest(state.folder)
    if held is None:
        raise UserError(
            f"{state.folder} has no manifest, so it is not known how it was made; {state.otherwise}"
        )
    changed = difference(held, state.settings, state.inputs)
    if changed:
        raise UserError(f"{state.folder} is half done with other settings: {changed}; {state.otherwise}")


def refuse_going_back(args: Arguments, state: Training):
    """Refuse to make a policy of fewer rounds than the newest checkpoint has learned from."""
    saved = state.checkpoints()
    done = step_of(saved[-1]) // args.sync_every if saved else 0
    if done > last_round(args):
        raise UserError(
            f"{saved[-1]} has learned from {count(done, 'round')}, more than --until_round "
            f"{last_round(args)}: delete it to go back"
        )
