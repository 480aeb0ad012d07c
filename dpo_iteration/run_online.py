r"""Train a policy online: vLLM servers sample by its newest weights while it learns.

In:  a policy, prompt sets, what scores a response, and servers of the policy that take new weights.
Out: after `until_round` rounds the model in the folder `output_dir`, as run_dpo.py leaves one, and beside it
     its answers to `heldout_prompts`, as get_hf2.py leaves them; in `rounds_dir` what each round sampled,
     was rewarded and trained on (dpo_iteration/rounds.py), checkpoints, and `rounds.jsonl`, a line for
     each round (dpo_iteration/rounds_log.py).

    accelerate launch --config_file ./configs/zero2.yaml dpo_iteration/run_online.py RUN/loop.yaml:online \
        --generation RUN/loop.yaml:generation --annotation RUN/loop.yaml:annotation \
        --training_args RUN/loop.yaml:training_args --model_name_or_path RLHFlow/LLaMA3-SFT \
        --reward_name_or_path sfairXC/FsfairX-LLaMA3-RM-v0.1 --ports 8000 8001 8002 8003 \
        --dataset_name_or_path RLHFlow/iterative-prompt-v1-iter1-20K \
        --rounds_dir ./data/online --output_dir ./models/online

A round: the next prompts are answered K times by the servers, scored, pairs chosen, the start's
log-probabilities computed, `sync_every` optimizer steps taken, the weights sent. Optimizer and schedule go on
over all rounds; every loss and choice of pairs is that of run_dpo.py. The same command continues a killed
run. The servers are started by `VLLM_SERVER_DEV_MODE=1 bash generation/register_server.sh MODEL`, and
`bash run_online.sh` does all of it, evaluation too.
"""

import os
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run from any folder

from common.cli import parse, run
from common.devices import check_processes, check_torch, prepare_threads
from common.models import quiet_libraries
from common.preferences import REWARDED
from common.training import Training, is_main, remove_checkpoints, say, world_size
from dpo_iteration import card
from dpo_iteration.online_arguments import (
    Arguments,
    Parts,
    check,
    check_paths,
    last_round,
    policy_of,
    read_parts,
    refuse_changed,
    refuse_going_back,
    state_of,
)
from dpo_iteration.run_dpo import agreed_checkpoints, continue_training
from dpo_iteration.saved import check_saved
from generation.gen_hf import servers_of
from generation.live_servers import sleep

if TYPE_CHECKING:
    from dpo_iteration.online import Online


def main():
    started = time.time()
    args = parse(Arguments, __doc__)
    check(args)
    parts = read_parts(args)
    check_paths(args, parts)
    check_processes()
    policy, state = policy_of(args, parts), state_of(args, parts)
    if policy.is_complete():
        say(f"{args.output_dir} is complete, nothing to do")
        return
    state.is_complete()  # refuses checkpoints of other settings
    refuse_changed(args, state)
    refuse_going_back(args, state)
    prepare_threads()
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")  # TRL sends a ping from every start
    with state.locked():
        online = load(args, parts)
        try:
            begin(online, policy, state)
            metrics = train(online, state)
            save(online, policy, state, metrics, time.time() - started)
        finally:  # the servers hold them in their own memory
            online.live.remove()
    online.trainer.args.distributed_state.destroy_process_group()


def load(args: Arguments, parts: Parts) -> "Online":
    """Everything that stays in memory: scorers, reference, policy."""
    check_torch()
    quiet_libraries()
    if args.share_gpus:  # they may be awake: of this start, or of one that was killed while they sampled
        sleep(servers_of(args))
    import torch

    from dpo_iteration.models import prepare_cpu

    if not torch.cuda.is_available():
        say("note: no GPU found, training on the CPU")
        prepare_cpu(parts.training.cpu_threads)
    from dpo_iteration.online import Online

    return Online(args, parts)


def begin(online: "Online", policy: Training, state: Training):
    """Write what there is before training: the manifests of what is unfinished."""
    online.trainer.accelerator.wait_for_everyone()  # every rank has seen what is there; now rank 0 may write
    if is_main():
        if not state.checkpoints():
            state.begin()
        policy.folder.parent.mkdir(parents=True, exist_ok=True)
        policy.begin()
    online.trainer.accelerator.wait_for_everyone()


def train(online: "Online", state: Training) -> dict:
    """Train up to the last round of this start, from the newest checkpoint if there is one; the figures."""
    args, saved = online.args, agreed_checkpoints(state)
    say(
        f"rounds of {args.prompts_per_round} prompts and {args.sync_every} optimizer steps, up to round "
        f"{last_round(args)} of {args.rounds}, staleness {args.staleness}"
    )
    there = "policy, reference and reward models are in it"
    room = f"{there}: take configs/zero3.yaml, a lower max_row_tokens or max_length"
    metrics = continue_training(online.trainer, saved, room)
    return metrics | {"loss": metrics["train_loss"]} | online.trainer.figures()


def save(online: "Online", policy: Training, state: Training, metrics: dict, seconds: float):
    """Write the policy with what came with it; once it loads, complete its manifest and have the held-out
    prompts answered by it.
    """
    trainer, dpo = online.trainer, online.dpo
    online.send_policy()
    trainer.args.output_dir = dpo.output_dir
    trainer.source.save(trainer, dpo)
    if is_main():
        finish(online, policy, state, metrics, seconds)
    trainer.accelerator.wait_for_everyone()
    online.answer_heldout()


def finish(online: "Online", policy: Training, state: Training, metrics: dict, seconds: float):
    """Complete the manifest of a policy that loads. On rank 0."""
    from dpo_iteration.rounds import RoundFolder
    from dpo_iteration.rounds_log import read_log

    args, dpo = online.args, online.dpo
    check_saved(dpo.output_dir, dpo.trust_remote_code)
    entries = read_log(online.log.path)
    total = {key: sum(entry.get(key, 0) for entry in entries) for key in ("prompts", "pairs", "ties")}
    counts = {"rounds": last_round(args), "records": total["prompts"], "train_pairs": total["pairs"]}
    counts |= {"eval_pairs": 0, "skipped": {"equal rewards": total["ties"]}, "responses_left_out": {}}
    dpo.train_dir = [str(RoundFolder(args, last_round(args) - 1).rewarded)]  # names what scored
    counts["read_as"] = {dpo.train_dir[0]: REWARDED}
    metrics = {key: value for key, value in metrics.items() if isinstance(value, (int, float))}
    card.make_card(dpo, policy.settings, counts, metrics, world_size()).save(policy.folder / "README.md")
    policy.finish(
        counts=counts | {"pairs": total["pairs"]}, metrics=metrics, seconds={"all": round(seconds, 1)}
    )
    if last_round(args) == args.rounds and not dpo.keep_checkpoints:
        remove_checkpoints(state.folder.glob("checkpoint-*"))
    print(
        f"read {total['prompts']} prompts, trained on {total['pairs']} pairs of {last_round(args)} rounds, "
        f"wrote {dpo.output_dir}",
        flush=True,
    )


if __name__ == "__main__":
    run(main)
