r"""PPO on GPUs with OpenRLHF 0.11.2: checks, the exact command, start, resume, and a plain model at the end.

In:  a policy, a reward (model, several with weights, Python function, or a server's address) and prompt sets.
Out: model, tokenizer, chat template and generation config in the folder `output_dir`; next to it its
     manifest, a line of figures for each rollout (`.log.jsonl`) and `output_dir.work/`: prompts,
     TensorBoard's files, the reward server's log, and while it runs the checkpoints.

    python ppo/openrlhf/run_openrlhf.py runs/mine/loop.yaml:ppo --dry_run true \
        --model_name_or_path RLHFlow/LLaMA3-SFT --reward_name_or_path sfairXC/FsfairX-LLaMA3-RM-v0.1 \
        --dataset_name_or_path RLHFlow/iterative-prompt-v1-iter1-20K --output_dir runs/mine/iter1/model

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

from common.cli import UserError, parse, run
from common.devices import visible_gpus
from common.manifest import beside, read_manifest, versions, with_date, write_json
from common.models import read_json
from common.progress import duration
from common.records import finite
from common.training import Training
from ppo.openrlhf import process
from ppo.openrlhf.arguments import Arguments, arguments, check, reward_arguments, shaping  # noqa: F401
from ppo.openrlhf.command import MODULE, flags, words
from ppo.openrlhf.log import Log
from ppo.openrlhf.plan import Plan, cluster_address, describe, installed, plan


def work_folder(args: Arguments) -> Path:
    return beside(args.output_dir, ".work").absolute()


def training_of(args: Arguments) -> Training:
    """What output_dir is made from; its checkpoints are OpenRLHF's."""
    place = work_folder(args) / "checkpoints" / "_actor"
    return Training(
        args.output_dir,
        "ppo/openrlhf/run_openrlhf.py",
        *shaping(args),
        args.overwrite,
        find_checkpoints=lambda: [place] if place.is_dir() else [],
    )


def command_of(args: Arguments, found: Plan, url: str | None, prompts: int, resume: bool) -> list[str]:
    """Arguments of python. `url`: of the reward servers, with commas; `prompts`: how many are in the file."""
    return ["-m", MODULE, *words(flags(args, found, work_folder(args), url, prompts, resume))]


def show(command: list[str], environment: dict) -> str:
    """The command, a flag a line, as bash takes it."""
    given = "".join(f"{key}={shlex.quote(value)} " for key, value in environment.items())
    flags = "".join((" \\\n  " if word[:2] == "--" else " ") + shlex.quote(word) for word in command)
    return f"{given}\\\npython{flags}" if given else f"python{flags}"


def environment(args: Arguments, found: Plan) -> dict:
    """Variables that the command needs on top of those that are there; no secrets."""
    needed, gpus, used = process.variables(), visible_gpus(), found.placement.all_gpus
    if args.ray_address:
        needed["RAY_ADDRESS"] = "HEAD:PORT" if args.dry_run and args.own_cluster else cluster_address(args)
    elif used < len(gpus):
        needed["CUDA_VISIBLE_DEVICES"] = ",".join(gpus[:used])
    return needed


def prepare(args: Arguments, found: Plan, training: Training) -> tuple[dict, str | None]:
    """Write prompts, policy folder and an unfinished manifest; returns (counts, tag to resume from)."""
    from ppo.openrlhf.prompts import prepare_policy, write_prompts

    work, before, resume = work_folder(args), read_manifest(args.output_dir), None
    if args.overwrite:
        shutil.rmtree(work, ignore_errors=True)
    else:
        resume = process.checkpoint_to_resume(work / "checkpoints", args.learners)
    # DeepSpeed's checkpoints are cut into as many parts as there are GPUs.
    training.checkpoint_settings = {
        "num_gpus": found.placement.all_gpus,
        "zero_stage": found.placement.zero_stage,
    }
    if resume:
        training.is_complete()  # refuses other checkpoint_settings
    else:  # OpenRLHF would stumble over a folder without a whole checkpoint
        shutil.rmtree(work / "checkpoints", ignore_errors=True)
    shutil.rmtree(work / "model", ignore_errors=True)
    counts = write_prompts(args, found.template, work / "prompts.jsonl")
    prepare_policy(args, found.template, work / "policy")
    training.begin(counts=counts, seconds=before.get("seconds", 0.0) if resume and before else 0.0)
    return counts, resume


def start(args: Arguments, found: Plan, training: Training):
    """Write, start, wait, place. The output is locked."""
    began = time.time()
    counts, resume = prepare(args, found, training)
    args = dataclasses.replace(args, num_episodes=counts["episodes"])
    done = process.step(resume) if resume else 0
    log = Log(
        work_folder(args) / "tensorboard", beside(args.output_dir, ".log.jsonl"), done, counts["rollouts"]
    )
    work, gpus = work_folder(args), visible_gpus()
    with process.stopped_by_signals():
        if found.kind == "server":
            given = vars(reward_arguments(args, str(work / "policy")))
            rewards = {key: value for key, value in given.items() if value is not None}
            host = cluster_address(args).rpartition(":")[0] if args.own_cluster else "127.0.0.1"
            with process.reward_server(rewards, work, gpus[-1] if gpus else None, host) as url:
                launch(args, found, url, counts["prompts"], resume, log)
        else:
            launch(args, found, ",".join(args.reward_url or []), counts["prompts"], resume, log)
    place_model(args)
    finish(args, training, time.time() - began, log)


def launch(args: Arguments, found: Plan, url: str | None, prompts: int, resume: str | None, log: Log):
    """Run OpenRLHF to its end."""
    command, more = command_of(args, found, url, prompts, resume is not None), environment(args, found)
    if resume:
        print(f"continuing from {resume}", flush=True)
    print(show(command, more), flush=True)
    rewards = work_folder(args) / "reward.log" if found.kind == "server" else None
    process.run_openrlhf([sys.executable, *command], dict(os.environ) | more, rewards, log.update)


def place_model(args: Arguments):
    """Make the folder that OpenRLHF left a plain model with our tokenizer and generation config, and rename
    it to `output_dir`.
    """
    from dpo_iteration.saved import check_saved, copy_companions, store_once

    policy, made, target = work_folder(args) / "policy", work_folder(args) / "model", Path(args.output_dir)
    if not (made / "config.json").is_file() or not any(made.glob("*.safetensors")):
        raise UserError(f"OpenRLHF ended and left no model in {made}; what it printed above says why")
    config, before = read_json(made / "config.json"), read_json(policy / "config.json")
    for key in ("use_cache", "pad_token_id", "eos_token_id"):  # what OpenRLHF sets for its own needs
        config.pop(key, None)
        if key in before:
            config[key] = before[key]
    write_json(made / "config.json", config)
    for file in policy.iterdir():
        if file.is_dir() and not file.is_symlink():  # additional_chat_templates
            shutil.copytree(file, made / file.name, dirs_exist_ok=True)
        elif not file.is_symlink():  # tokenizer, template, generation config
            shutil.copyfile(file, made / file.name)
    copy_companions(policy, made)
    store_once(made, args.trust_remote_code)
    check_saved(made, args.trust_remote_code)
    if target.is_dir():
        shutil.rmtree(target)
    os.replace(made, target)


def finish(args: Arguments, training: Training, seconds: float, log: Log):
    """Complete the manifest and clear what a resume would have needed."""
    manifest, work = read_manifest(args.output_dir), work_folder(args)
    counts, seconds = manifest["counts"], round(manifest["seconds"] + seconds, 1)
    more = {name: version for name in ("openrlhf", "ray") if (version := installed(name))}
    log.progress.close()
    metrics = (log.entries or [{}])[-1]
    metrics = {key: value for key, value in metrics.items() if finite(value)}
    training.finish(metrics=metrics, seconds=seconds, versions=versions() | more)
    if not args.keep_checkpoints:
        shutil.rmtree(work / "checkpoints", ignore_errors=True)
    shutil.rmtree(work / "policy", ignore_errors=True)
    print(
        f"read {counts['prompts']} prompts in {counts['rollouts']} rollouts, skipped {counts['skipped']}; "
        f"trained {args.output_dir} in {duration(seconds)}"
    )


def told_plan(args: Arguments) -> Plan:
    """The Plan, described on stderr."""
    found = plan(args)
    for line in describe(args, found):
        print(f"ppo: {line}", file=sys.stderr, flush=True)
    return found


def show_plan(args: Arguments):
    """Print the command that a start would run. `args.dry_run` is true."""
    found = told_plan(args)
    prompts, episodes = count_prompts(args, found)
    args = dataclasses.replace(args, num_episodes=episodes)
    url = ",".join(args.reward_url or ["http://127.0.0.1:PORT/get_reward"])
    resume = (work_folder(args) / "checkpoints" / "_actor" / "latest").is_file()
    print(show(command_of(args, found, url, prompts, resume), environment(args, found)))


def count_prompts(args: Arguments, found: Plan) -> tuple[int, int]:
    """(prompts, passes over them) of the run, counted as `prepare` will; 0 prompts where a set is out of
    reach on the hub.
    """
    from ppo.openrlhf.prompts import whole_rollouts

    try:
        if found.template is None:
            raise UserError("the policy's tokenizer is on the hub and out of reach")
        chosen, episodes, _ = whole_rollouts(args, found.template)
        return len(chosen), episodes
    except UserError as error:
        here = found.template and all(Path(name).exists() for name in args.dataset_name_or_path)
        if here or args.warmup_steps >= 1 or args.max_rollouts is not None:  # which count prompts
            raise
        print(f"ppo: prompts not looked at: {error}", file=sys.stderr)
        return 0, args.num_episodes


def main():
    args = parse(Arguments, __doc__)
    args = with_date(args, args.output_dir)
    check(args)
    training = training_of(args)
    if training.is_complete():
        print(f"{args.output_dir} is complete, nothing to do")
    elif args.dry_run:
        show_plan(args)
    else:
        found = told_plan(args)
        with training.locked():
            start(args, found, training)


if __name__ == "__main__":
    run(main)
