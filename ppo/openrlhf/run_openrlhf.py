r"""PPO on GPUs with OpenRLHF 0.11.2: checks, the exact command, start, resume, and a plain model at the end.

In:  a policy, a reward (model, several with weights, Python function, or a server's address) and prompt sets.
Out: model, tokenizer, chat template and generation config in the folder `output_dir`; next to it its manifest
     and `output_dir.work/`: prompts, log, TensorBoard's files, and while it runs the checkpoints.

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
from common.manifest import beside, read_manifest, versions, with_date, write_json, write_yaml
from common.models import read_json
from common.progress import duration
from common.training import Training
from ppo.openrlhf import preflight, process
from ppo.openrlhf.arguments import Arguments, arguments, check, reward_arguments, shaping  # noqa: F401
from ppo.openrlhf.command import MODULE, Paths, Reward, flags, words
from ppo.openrlhf.plan import Plan, describe, plan
from ppo.openrlhf.reward import CONFIG


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


def command_of(
    args: Arguments, found: Plan, url: str | None, prompts: int, resume: bool
) -> tuple[list[str], Paths]:
    """(arguments of python, Paths). `url` of the reward server; `prompts`: how many are in the file."""
    work, start = work_folder(args), args.critic_name_or_path
    if start is None and found.same_tokens:
        start = args.reward_name_or_path[0]
    paths = Paths(
        policy=str(work / "policy"),
        # The name of the policy tells OpenRLHF to make a new value head.
        critic=str(work / "policy") if start in (None, args.model_name_or_path) else start,
        prompts=str(work / "prompts.jsonl"),
        checkpoints=str(work / "checkpoints"),
        model=str(work / "model"),
        tensorboard=str(work / "tensorboard"),
    )
    if found.kind == "local":
        reward = Reward("local", model=args.reward_name_or_path[0])
    else:
        function = str(Path(__file__).with_name("reward.py").resolve())
        reward = Reward("server", url=function if found.kind == "function" else url)
    for value in (paths.prompts, reward.url or ""):
        if "," in value or "@" in Path(value).name:
            raise UserError(f"{value}: OpenRLHF splits names at commas; choose an output_dir without")
    return ["-m", MODULE, *words(flags(args, found.placement, reward, paths, prompts, resume))], paths


def show(command: list[str], environment: dict) -> str:
    """The command, a flag a line, as bash takes it."""
    lines, line = [], [shlex.quote(word) for word in command[:3]]
    for word in command[3:]:
        if word.startswith("--"):
            lines.append(line)
            line = []
        line.append(shlex.quote(word))
    head = " ".join(f"{key}={shlex.quote(value)}" for key, value in environment.items())
    return (f"{head} \\\n" if head else "") + " \\\n  ".join(" ".join(words) for words in [*lines, line])


def environment(args: Arguments, found: Plan) -> dict:
    """Variables that the command needs on top of those that are there; no secrets."""
    # The sampler that vLLM would compile at its start is one that seeded requests never use. DeepSpeed
    # refuses to compile its optimizer where the toolkit is of another minor version than torch's, which does
    # no harm.
    needed = {"VLLM_USE_FLASHINFER_SAMPLER": "0", "DS_SKIP_CUDA_CHECK": "1"}
    needed = {key: value for key, value in needed.items() if key not in os.environ}
    gpus, used = visible_gpus(), found.placement.all_gpus
    if args.ray_address:
        needed["RAY_ADDRESS"] = args.ray_address
    elif used < len(gpus):
        needed["CUDA_VISIBLE_DEVICES"] = ",".join(gpus[:used])
    if found.kind == "function":
        needed[CONFIG] = str(work_folder(args) / "reward.yaml")
    return needed


def prepare(args: Arguments, found: Plan, training: Training) -> tuple[dict, str | None]:
    """Write prompts, policy folder and an unfinished manifest; returns (counts, tag to resume from)."""
    from ppo.openrlhf.prompts import prepare_policy, write_prompts

    work, before, resume = work_folder(args), read_manifest(args.output_dir), None
    if args.overwrite:
        for name in ("checkpoints", "model", "model_critic", "tensorboard"):
            shutil.rmtree(work / name, ignore_errors=True)
    else:
        resume = process.checkpoint_to_resume(work / "checkpoints")
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
    counts = write_prompts(args, found.tokenizer, work / "prompts.jsonl")
    prepare_policy(args, found.tokenizer, work / "policy")
    training.begin(counts=counts, seconds=before.get("seconds", 0.0) if resume and before else 0.0)
    return counts, resume


def start(args: Arguments, found: Plan, training: Training):
    """Write, start, wait, place. The output is locked."""
    began = time.time()
    counts, resume = prepare(args, found, training)
    args = dataclasses.replace(args, num_episodes=counts["episodes"])
    work, gpus = work_folder(args), visible_gpus()
    rewards = {}
    if found.kind in ("server", "function"):
        given = vars(reward_arguments(args, str(work / "policy")))
        rewards = {key: value for key, value in given.items() if value is not None}
    with process.stopped_by_signals():
        if found.kind == "server":
            with process.reward_server(rewards, work, gpus[-1] if gpus else None) as url:
                paths = launch(args, found, url, counts["prompts"], resume)
        else:
            if found.kind == "function":
                write_yaml(work / "reward.yaml", rewards)
            paths = launch(args, found, args.reward_url, counts["prompts"], resume)
    place_model(args, paths)
    finish(args, paths, training, time.time() - began)


def launch(args: Arguments, found: Plan, url: str | None, prompts: int, resume: str | None) -> Paths:
    """Run OpenRLHF to its end."""
    command, paths = command_of(args, found, url, prompts, resume is not None)
    more = environment(args, found)
    if resume:
        print(f"continuing from {resume}", flush=True)
    print(show(["python", *command], more), flush=True)
    log = work_folder(args) / "openrlhf.log"
    process.run_openrlhf([sys.executable, *command], log, dict(os.environ) | more)
    return paths


def merge_adapter(args: Arguments, paths: Paths):
    """Put a plain model in place of the adapter that OpenRLHF left, which is kept as `model_adapter`."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(
        paths.policy, trust_remote_code=args.trust_remote_code, dtype=torch.bfloat16
    )
    model = PeftModel.from_pretrained(base, paths.model, torch_device="cpu").merge_and_unload()
    shutil.move(paths.model, f"{paths.model}_adapter")
    model.save_pretrained(paths.model)


def place_model(args: Arguments, paths: Paths):
    """Make the folder that OpenRLHF left a plain model with our tokenizer and generation config, and rename
    it to `output_dir`.
    """
    from dpo_iteration.saved import check_saved, copy_companions, store_once

    made, target = Path(paths.model), Path(args.output_dir)
    if args.lora_r:
        merge_adapter(args, paths)
    if not (made / "config.json").is_file() or not any(made.glob("*.safetensors")):
        raise UserError(
            f"OpenRLHF ended and left no model in {made}; the log is {work_folder(args) / 'openrlhf.log'}"
        )
    config, before = read_json(made / "config.json"), read_json(Path(paths.policy) / "config.json")
    for key in ("use_cache", "pad_token_id", "eos_token_id"):  # what OpenRLHF sets for its own needs
        config.pop(key, None)
        if key in before:
            config[key] = before[key]
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


def finish(args: Arguments, paths: Paths, training: Training, seconds: float):
    """Complete the manifest and clear what a resume would have needed."""
    manifest = read_manifest(args.output_dir)
    counts, seconds = manifest["counts"], round(manifest["seconds"] + seconds, 1)
    more = {name: version for name in ("openrlhf", "ray") if (version := preflight.installed(name))}
    training.finish(seconds=seconds, versions=versions() | more)
    if not args.keep_checkpoints:
        shutil.rmtree(paths.checkpoints, ignore_errors=True)
    shutil.rmtree(paths.policy, ignore_errors=True)
    skipped = ", ".join(f"{n} {reason}" for reason, n in counts["skipped"].items()) or "0"
    print(
        f"read {counts['prompts']} prompts in {counts['rollouts']} rollouts, skipped {skipped}; trained "
        f"{args.output_dir} in {duration(seconds)}"
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
    url = args.reward_url or "http://127.0.0.1:PORT/get_reward"
    resume = (work_folder(args) / "checkpoints" / "_actor" / "latest").is_file()
    command, _ = command_of(args, found, url, prompts, resume)
    print(show(["python", *command], environment(args, found)))


def count_prompts(args: Arguments, found: Plan) -> tuple[int, int]:
    """(prompts, passes over them) of the run, counted as `prepare` will; 0 prompts where a set is out of
    reach on the hub.
    """
    from ppo.openrlhf.prompts import read_all, whole_rollouts

    if found.tokenizer is None:
        reason = "the policy's tokenizer is on the hub and out of reach"
    else:
        try:
            chosen, _, episodes = whole_rollouts(args, read_all(args, found.tokenizer)[0])
            return len(chosen), episodes
        except UserError as error:
            if all(Path(name).exists() for name in args.dataset_name_or_path):
                raise
            reason = str(error)
    print(f"ppo: prompts not looked at: {reason}", file=sys.stderr)
    if args.warmup_steps >= 1 or args.max_rollouts is not None:
        raise UserError(
            "warmup_steps of 1 or more and max_rollouts need the prompts, which are out of reach for this "
            "dry run"
        )
    return 0, args.num_episodes


def main():
    for word in map(str.lower, sys.argv[1:]):
        if "wandb" in word and "key" in word:
            raise UserError(
                "a W&B key does not belong among the arguments, where it is printed and kept: export "
                "WANDB_API_KEY and set report_to wandb"
            )
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
