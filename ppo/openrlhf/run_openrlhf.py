r"""PPO on GPUs with OpenRLHF 0.11.2: checks, the exact command, start, resume, and a plain model at the end.

In:  a policy, a reward (model, several with weights, Python function, or a server's address) and prompt sets.
Out: model, tokenizer, chat template and generation config in the folder `output_dir`, beside it its manifest
and
     `output_dir.work/`: prompts, log, TensorBoard's files, and while it runs the checkpoints.

    python ppo/openrlhf/run_openrlhf.py runs/ppo_llama3_8b/iter1/train.yaml --dry_run true

Environment `ppo_train`. It follows the GPUs there are; what cannot fit is refused with what would. A stopped
run continues from its last checkpoint when the same command is started again. W&B: export WANDB_API_KEY and
give --report_to wandb.
"""

import dataclasses
import os
import shlex
import shutil
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # run from any folder

from common import locks
from common.cli import UserError, parse, run
from common.devices import prepare_threads, visible_gpus
from common.manifest import beside, difference, fingerprint, read_manifest, versions, with_date, write_json
from common.models import check_model, check_policy, read_json
from common.progress import duration
from dpo_iteration import memory
from ppo.openrlhf import preflight, process
from ppo.openrlhf.arguments import Arguments, arguments, check, reward_arguments, shaping  # noqa: F401 (arguments: for ppo/run.py)
from ppo.openrlhf.command import MODULE, Paths, Reward, accumulation, flags, words
from ppo.openrlhf.placement import place
from ppo.openrlhf.reward import CONFIG

SCRIPT = "ppo/openrlhf/run_openrlhf.py"


def work_folder(args):
    return beside(args.output_dir, ".work")


def is_complete(args, settings, inputs):
    """Whether the model is there, from these settings and inputs; refuse what was made, or half made, from
    others.

    Raises:
        UserError: the output or checkpoints are of other settings or of nobody knows what.
    """
    folder, work = Path(args.output_dir), work_folder(args)
    if folder.exists() and not folder.is_dir():
        raise UserError(f"--output_dir {folder} is a file, a folder was expected")
    if args.overwrite:
        return False
    manifest = read_manifest(folder)
    there = folder.is_dir() and any(folder.iterdir())
    stale = (work / "checkpoints" / "_actor").is_dir()
    if manifest is None and (there or stale):
        what = folder if there else work / "checkpoints" / "_actor"
        raise UserError(
            f"{what} has no manifest, so it is not known how it was made; move it away or give --overwrite "
            "true"
        )
    if manifest is None:
        return False
    complete = (
        manifest.get("complete") and (folder / "config.json").is_file() and any(folder.glob("*.safetensors"))
    )
    changed = difference(manifest, settings, inputs) if complete or stale else None
    if changed:
        state = "complete" if complete else "half done"
        raise UserError(
            f"{folder} is {state} with other settings: {changed}; choose another --output_dir or give "
            "--overwrite true"
        )
    return bool(complete)


def shapes_of(args, reward):
    """Role → Shape (or None) of the models that OpenRLHF holds; estimates where a config is out of reach;
    None: size not known.
    """

    def shape(name, billions):
        if Path(name).is_dir():
            return memory.shape_of(name, trust_remote_code=args.trust_remote_code)
        return memory.shape_like(billions) if billions else None

    policy = shape(args.model_name_or_path, args.model_size_b)
    if policy is None:
        return None
    model = (
        shape(args.reward_name_or_path[0], args.reward_size_b or args.model_size_b)
        if args.reward_name_or_path
        else None
    )
    critic = args.critic_name_or_path or (args.reward_name_or_path or [args.model_name_or_path])[0]
    value = (
        policy
        if critic == args.model_name_or_path
        else shape(critic, args.reward_size_b or args.model_size_b)
    )
    return {
        "actor": policy,
        "ref": policy if args.kl_coef else None,
        "critic": value or policy,
        "reward": model if reward == "local" else None,
        "server": model if reward == "server" else None,
    }


def choose_reward(args, tokenizer, notes):
    """(`local`, `server`, `function` or `url`, whether the first reward model has the policy's tokens).

    Raises:
        UserError: OpenRLHF's own was asked for and cannot read the policy's tokens.
    """
    from ppo.openrlhf.prompts import load_tokenizer

    models = args.reward_name_or_path or []
    why = None
    if models and tokenizer is not None:
        other = load_tokenizer(models[0], args.trust_remote_code, args.reward_chat_template)
        why = preflight.differs(tokenizer, other)
        config = Path(models[0]) / "config.json"
        if (
            why is None
            and config.is_file()
            and "SequenceClassification"
            not in str(read_json(config).get("architectures", "SequenceClassification"))
        ):
            why = "it is no classifier with one label"
        if why is None and preflight.has_value_head(models[0], args.value_head) is False:
            why = f"it has no weights {args.value_head}.weight (value_head)"
    if args.reward_url:
        return "url", bool(models) and why is None
    if not models:
        return "function", False
    if len(models) > 1 or args.reward_function or args.reward_weights or args.reward_backend == "server":
        return "server", why is None
    if why and args.reward_backend == "local":
        raise UserError(
            f"reward_backend local: {models[0]} cannot be used so: {why}; take reward_backend server, which "
            "has its own tokenizer"
        )
    if why and args.ray_address:
        raise UserError(
            f"OpenRLHF's own reward model cannot be {models[0]}: {why}; start ppo/openrlhf/serve_reward.py --host … "
            "by hand and give reward_url"
        )
    if why:
        notes.append(f"the reward model runs in our server: {why}")
        return "server", False
    return "local", True


def try_place(args, kind, gpus, a_node, size, flash, notes):
    """(Placement, GPUs set aside for our reward server)."""
    shapes = shapes_of(args, kind)
    if shapes is None:
        raise UserError(
            f"model_name_or_path {args.model_name_or_path}: its size is not known here; give --model_size_b"
        )
    own = shapes.pop("server")
    machine = preflight.machine_memory(args)
    asides = [0] if own is None else [args.reward_gpus] if args.reward_gpus is not None else [0, 1]
    problem = None
    for aside in asides:
        counts = [gpus - aside] + ([n for n in (32, 16, 8, 4, 2, 1) if n < gpus - aside] if aside else [])
        for count in counts:
            if count < 1:
                problem = problem or UserError(
                    "reward_gpus 1 leaves no GPU to train on; give 0, or more GPUs"
                )
                continue
            beside_it = 0 if own is None or aside else 2 * own.parameters + 2 * memory.GIB
            try:
                placement, more = place(
                    args, shapes, count, min(a_node, count), size, flash, beside_it, machine
                )
            except UserError as error:
                problem = problem or error
                continue
            notes += more
            if own is not None:
                where = (
                    f"one GPU of its own, {gpus - aside - count} stay idle"
                    if aside
                    else "one of the GPUs that train"
                )
                notes.append(f"our reward server takes {where}")
            return placement, aside
    raise problem


@dataclasses.dataclass
class Plan:
    """A run worked out: what is started, and what was found on the way."""

    placement: object
    kind: str
    same_tokens: bool
    aside: int
    notes: list
    tokenizer: object
    prompts: int = 0  # known once they are read


def plan(args):
    """Look at GPUs, models and reward, and decide where all goes; nothing is written.

    Raises:
        UserError: what cannot work, with what would.
    """
    from ppo.openrlhf.prompts import load_tokenizer

    notes, tokenizer = [], None
    check_policy(args.model_name_or_path, "model_name_or_path")
    for name in args.reward_name_or_path or []:
        check_model(name, "reward_name_or_path")
    if not args.dry_run:
        if not args.ignore_versions:
            preflight.check_versions()
        preflight.check_writable(work_folder(args))
        notes += preflight.check_ray(args)
        if args.reward_url:
            preflight.check_address(args.reward_url)
    gpus, a_node, size = preflight.count_gpus(args)
    if not args.dry_run:
        preflight.check_cores(args, gpus)
    prepare_threads()
    try:
        tokenizer = load_tokenizer(args.model_name_or_path, args.trust_remote_code, args.chat_template)
        kind, same = choose_reward(args, tokenizer, notes)
    except UserError:
        if not args.dry_run or (
            Path(args.model_name_or_path).is_dir()
            and all(Path(name).is_dir() for name in args.reward_name_or_path or [])
        ):
            raise
        kind, same = choose_reward(args, None, notes)
        notes.append(
            "tokenizers on the hub are not at hand: that policy and reward model share tokens and template "
            "is assumed"
        )
    flash = preflight.installed("flash-attn") is not None or args.dry_run
    placement, aside = try_place(args, kind, gpus, a_node, size, flash, notes)
    return Plan(placement, kind, same, aside, notes + preflight.notes_on_machine(placement), tokenizer)


def command_of(args, found, url, resume):
    """(arguments of python, Paths)."""
    work = work_folder(args).absolute()
    policy = str(work / "policy")
    critic = args.critic_name_or_path or (
        args.reward_name_or_path[0] if found.same_tokens and args.reward_name_or_path else policy
    )
    if critic == args.model_name_or_path:
        critic = policy  # the same name tells OpenRLHF to make a new value head
    paths = Paths(
        policy,
        critic,
        str(work / "prompts.jsonl"),
        str(work / "checkpoints"),
        str(work / "model"),
        str(work / "tensorboard"),
    )
    if found.kind == "function":
        url = str(Path(__file__).with_name("reward.py").resolve())
    reward = Reward(
        "local" if found.kind == "local" else "server",
        args.reward_name_or_path[0] if found.kind == "local" else None,
        url,
    )
    for value in (paths.prompts, url or ""):
        if "," in value or "@" in Path(value).name:
            raise UserError(f"{value}: OpenRLHF splits names at commas; choose an --output_dir without")
    return ["-m", MODULE, *words(flags(args, found.placement, reward, paths, found.prompts, resume))], paths


def show(command, environment):
    """The command, a flag a line, as bash takes it."""
    lines, line = [], [shlex.quote(word) for word in command[:3]]
    for word in command[3:]:
        if word.startswith("--"):
            lines.append(line)
            line = []
        line.append(shlex.quote(word))
    head = " ".join(f"{key}={shlex.quote(value)}" for key, value in environment.items())
    return (f"{head} \\\n" if head else "") + " \\\n  ".join(" ".join(words) for words in [*lines, line])


def prepare(args, found, settings, inputs):
    """Write prompts, policy folder and an unfinished manifest; returns (counts, tag to resume from or
    None).
    """
    from ppo.openrlhf.prompts import prepare_policy, write_prompts

    work, world = work_folder(args), found.placement.all_gpus
    manifest, resume = read_manifest(args.output_dir), None
    if args.overwrite:
        for name in ("checkpoints", "model", "model_critic", "tensorboard"):
            shutil.rmtree(work / name, ignore_errors=True)
    else:
        resume = process.checkpoint_to_resume(work / "checkpoints")
    if resume and manifest and manifest.get("num_gpus") != world:
        raise UserError(
            f"{args.output_dir} is half done on {manifest.get('num_gpus')} GPUs and {world} are used now: "
            "DeepSpeed's checkpoints are cut into as "
            f"many parts; give --num_gpus {manifest.get('num_gpus')} or --overwrite true"
        )
    if resume and manifest.get("zero_stage") != found.placement.zero_stage:
        stage = manifest.get("zero_stage")
        raise UserError(
            f"{args.output_dir} is half done with ZeRO-{stage}: give --zero_stage {stage} or --overwrite true"
        )
    if not resume:
        shutil.rmtree(
            work / "checkpoints", ignore_errors=True
        )  # without a whole checkpoint: OpenRLHF would stumble over it
    shutil.rmtree(work / "model", ignore_errors=True)
    counts = write_prompts(args, found.tokenizer, work / "prompts.jsonl")
    prepare_policy(args, found.tokenizer, work / "policy")
    marks = {key: fingerprint(name) for key, name in inputs.items() if name is not None}
    before = manifest.get("seconds", 0.0) if resume and manifest else 0.0
    write_json(
        beside(args.output_dir, ".manifest.json"),
        {
            "script": SCRIPT,
            "complete": False,
            "settings": settings,
            "inputs": marks,
            "num_gpus": world,
            "zero_stage": found.placement.zero_stage,
            "counts": counts,
            "seconds": before,
        },
    )
    return counts, resume


def place_model(args, paths):
    """Make the folder that OpenRLHF left a plain model with our tokenizer and generation config, and rename
    it to `output_dir`.
    """
    from dpo_iteration.saved import check_saved, copy_companions, store_once

    made, target = Path(paths.model), Path(args.output_dir)
    if args.lora_r:
        from types import SimpleNamespace

        from dpo_iteration.adapters import merged

        source = SimpleNamespace(
            model_name_or_path=paths.policy,
            revision=None,
            trust_remote_code=args.trust_remote_code,
            bf16=True,
            model_init_kwargs=None,
        )
        model = merged(source, made)
        shutil.move(made, f"{made}_adapter")
        model.save_pretrained(made)
    if not (made / "config.json").is_file() or not any(made.glob("*.safetensors")):
        raise UserError(
            f"OpenRLHF ended and left no model in {made}; the log is {work_folder(args) / 'openrlhf.log'}"
        )
    config, start = read_json(made / "config.json"), read_json(Path(paths.policy) / "config.json")
    for key in ("use_cache", "pad_token_id", "eos_token_id"):  # what OpenRLHF sets for its own needs
        config.pop(key, None)
        if key in start:
            config[key] = start[key]
    write_json(made / "config.json", config)
    for file in Path(paths.policy).iterdir():
        if file.is_dir() and not file.is_symlink():  # additional_chat_templates
            shutil.copytree(file, made / file.name, dirs_exist_ok=True)
        elif not file.is_symlink():  # tokenizer, template, generation config
            shutil.copyfile(file, made / file.name)
    copy_companions(paths.policy, made)
    store_once(made, args.trust_remote_code)
    check_saved(made, args.trust_remote_code)
    if target.is_dir():
        shutil.rmtree(target)
    os.replace(made, target)


def finish(args, paths, counts, seconds):
    """Complete the manifest and clear what a resume would have needed."""
    manifest = read_manifest(args.output_dir)
    manifest |= {
        "complete": True,
        "counts": counts,
        "seconds": round(manifest["seconds"] + seconds, 1),
        "finished": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "output": fingerprint(args.output_dir),
        "versions": versions()
        | {name: found for name in ("openrlhf", "ray") if (found := preflight.installed(name))},
    }
    write_json(beside(args.output_dir, ".manifest.json"), manifest)
    if not args.keep_checkpoints:
        shutil.rmtree(paths.checkpoints, ignore_errors=True)
    shutil.rmtree(paths.policy, ignore_errors=True)
    skipped = ", ".join(f"{n} {reason}" for reason, n in counts["skipped"].items()) or "0"
    print(
        f"read {counts['prompts']} prompts in {counts['rollouts']} rollouts, skipped {skipped}; trained "
        f"{args.output_dir} in {duration(manifest['seconds'])}"
    )


def environment(args, found):
    """Variables that the command needs beside the environment that is there; no secrets."""
    gpus = visible_gpus()
    # The sampler that vLLM would compile at its start is one that seeded requests never use. DeepSpeed
    # refuses to compile its optimizer where the toolkit is of another minor version than torch's, which does
    # no harm.
    needed = {
        key: value
        for key, value in {"VLLM_USE_FLASHINFER_SAMPLER": "0", "DS_SKIP_CUDA_CHECK": "1"}.items()
        if key not in os.environ
    }
    if args.ray_address:
        needed["RAY_ADDRESS"] = args.ray_address
    if not args.ray_address and found.placement.all_gpus < len(gpus):
        needed["CUDA_VISIBLE_DEVICES"] = ",".join(gpus[: found.placement.all_gpus])
    if found.kind == "function":
        needed[CONFIG] = str((work_folder(args) / "reward.yaml").absolute())
    return needed


def locked(args):
    """The lock on the output, held while this process lives.

    Raises:
        UserError: another process has it.
    """
    return locks.hold(beside(args.output_dir, ".lock"), f"training into {args.output_dir}")


def start(args, found, settings, inputs):
    """Write, start, wait, place."""
    began, lock = time.time(), locked(args)
    counts, resume = prepare(args, found, settings, inputs)
    args.num_episodes, found.prompts = counts["episodes"], counts["prompts"]
    work, env, gpus = work_folder(args), dict(os.environ) | environment(args, found), visible_gpus()
    rewards = reward_arguments(args, str(work / "policy")) if found.kind in ("server", "function") else None
    served = {key: value for key, value in vars(rewards).items() if value is not None} if rewards else {}
    with process.stopped_by_signals():
        if found.kind == "server":
            with process.reward_server(served, work, gpus[-1] if gpus else None) as url:
                paths = launch(args, found, url, resume, env)
        else:
            if found.kind == "function":
                from common.manifest import write_yaml

                write_yaml(work / "reward.yaml", served)
            paths = launch(args, found, args.reward_url, resume, env)
    place_model(args, paths)
    finish(args, paths, counts, time.time() - began)
    lock.close()
    os.unlink(lock.name)


def launch(args, found, url, resume, env):
    """Run OpenRLHF to its end; returns its Paths."""
    command, paths = command_of(args, found, url, resume is not None)
    if not args.ignore_versions:
        preflight.check_command(command[2:])
    if resume:
        print(f"continuing from {resume}", flush=True)
    print(show(["python", *command], environment(args, found)), flush=True)
    process.run_openrlhf([sys.executable, *command], work_folder(args) / "openrlhf.log", env)
    return paths


def describe(args, found):
    """What was decided, for a reader."""
    p = found.placement
    steps = accumulation(args, p)
    how = f"{steps} passes a step" if steps else f"packed to {p.max_tokens_per_gpu} tokens"
    where = (
        "all roles on all of them"
        if p.colocate
        else f"{p.gpus} for the policy, {p.critic_gpus} for value and reward model"
    )
    reward = {
        "local": "OpenRLHF's own reward model",
        "server": "our reward server",
        "function": "a function",
        "url": args.reward_url,
    }[found.kind]
    nodes = "one node" if p.nodes == 1 else f"{p.nodes} nodes"
    yield (
        f"{p.all_gpus} GPUs on {nodes}, {where}; {p.engines} engines × {p.tensor_parallel} GPUs, "
        f"ZeRO-{p.zero_stage}, {how}; reward: {reward}"
    )
    yield from found.notes


def main():
    for word in sys.argv[1:]:
        if "wandb" in word.lower() and "key" in word.lower() or "wandb_api_key" in word.lower():
            raise UserError(
                "a W&B key does not belong among the arguments, where it is printed and kept: export "
                "WANDB_API_KEY and say --report_to wandb"
            )
    args = parse(Arguments, __doc__)
    args = with_date(args, args.output_dir)
    check(args)
    settings, inputs = shaping(args)
    if is_complete(args, settings, inputs):
        print(f"{args.output_dir} is complete, nothing to do")
        return
    if args.dry_run:
        show_plan(args)
        return
    found = tell(args)
    start(args, found, settings, inputs)


def tell(args):
    """The Plan, told on stderr."""
    found = plan(args)
    for line in describe(args, found):
        print(f"ppo: {line}", file=sys.stderr, flush=True)
    return found


def show_plan(args):
    """Print the command that a start would run; `args.dry_run` is true."""
    found = tell(args)
    found.prompts = dry_prompts(args, found)
    url = args.reward_url or "http://127.0.0.1:PORT/get_reward"
    resume = (work_folder(args) / "checkpoints" / "_actor" / "latest").is_file()
    print(show(["python", *command_of(args, found, url, resume)[0]], environment(args, found)))


def dry_prompts(args, found):
    """Number of prompts of the run, counted as `prepare` will; None where a set is on the hub and out of
    reach.
    """
    from ppo.openrlhf.prompts import read_all, whole_rollouts

    try:
        chosen, _, args.num_episodes = whole_rollouts(args, read_all(args, found.tokenizer)[0])
    except (UserError, AttributeError) as error:
        if found.tokenizer is not None and all(Path(name).exists() for name in args.dataset_name_or_path):
            raise
        print(f"ppo: prompts not looked at: {error}", file=sys.stderr)
        if args.warmup_steps >= 1 or args.max_rollouts is not None:
            raise UserError(
                "warmup_steps of 1 or more and max_rollouts need the prompts, which are out of reach for "
                "this dry run"
            ) from None
        return 0
    return len(chosen)


if __name__ == "__main__":
    run(main)
