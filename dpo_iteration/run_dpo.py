"""Train a policy by DPO, or a sister of it (`loss_type`), on pairs chosen from rewarded answers.

In:  rewarded records at `train_dir` (one file or several, as annotate_data/get_rewards.py writes them) or
     preferences (docs/formats.md has the layouts), and a policy.
Out: model, tokenizer, chat template, generation config and model card in the folder `output_dir`; next to it
     the pairs that were chosen (`.pairs.jsonl`), the prompts left out (`.pairs.skipped.jsonl`), what was
     logged (`.trainer_state.json`), and last a manifest (`.manifest.json`).

    accelerate launch --config_file ./configs/zero2.yaml dpo_iteration/run_dpo.py ./configs/training.yaml

Any other setting of TRL's DPOConfig may be given in the YAML or on the command line too. With `--save_steps
N` a killed run continues from its last checkpoint when the same command is started again. `--check true`
tells the memory it needs.
"""

import functools
import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run from any folder

from common.cli import UserError, count, one_line, parse, run
from common.devices import check_processes, check_torch, gpu_memory, prepare_threads, visible_gpus
from common.files import in_time
from common.manifest import with_date
from common.models import quiet_libraries
from common.training import Training, is_main, say, step_of, world_size
from dpo_iteration import fitting, hub, output
from dpo_iteration.arguments import Arguments, accumulation, halved, training_of, unit
from dpo_iteration.checks import check, check_paths
from dpo_iteration.losses import needs_rejected
from dpo_iteration.pairs import Selection, select_pairs
from dpo_iteration.saved import check_saved
from dpo_iteration.speed import of_training

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase
    from trl import DPOConfig

    from common.chat import ChatTemplate
    from dpo_iteration.dpo import IterativeDPOTrainer


@dataclass
class Data:
    """What a training starts from.

    Attributes:
        selection: the pairs, and what was left out.
        rows: {"train", "eval"}: the pairs as token ids, see rows.py.
        template: the policy's chat template and tokenizer.
        per_step: pairs of an optimizer step over all processes.
        sharing: whether rows are packed, chosen and rejected sharing their prompt.
        steps: {"train", "eval"}: the batches, see packing.py; None where TRL makes them.
        config: TRL's DPOConfig.
    """

    selection: Selection
    rows: dict
    template: "ChatTemplate"
    per_step: int
    sharing: bool
    steps: dict
    config: "DPOConfig"


def main():
    started = time.time()
    args = parse(Arguments, __doc__)
    check(args)
    args = with_date(args, args.output_dir)
    if args.check:
        gpus, memory_gib = args.num_gpus or len(visible_gpus()), args.gpu_memory_gib or gpu_memory()
        for line in fitting.report(args, gpus, memory_gib):
            say(f"check: {line}")
        return
    check_paths(args)
    check_processes()
    training = training_of(args)
    if training.is_complete():
        say(f"{args.output_dir} is complete, nothing to do")
        return
    prepare_threads()
    args = fitting.fit_to_memory(args)
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")  # TRL sends a ping from every start
    selection = choose_pairs(args)
    data = prepare(args, selection, training.settings["pairs_per_step"])
    with training.locked():
        begin(args, training, data)
        add_reference(args, data)
        referenced = time.time()
        trainer = load_policy(args, data)
        ready = time.time()
        metrics = train(trainer, args, training, data)
        metrics |= of_training(trainer, args, metrics["train_runtime"])
        seconds = {"start": ready - started, "reference": referenced - started}
        save(args, training, data, trainer, metrics, seconds | {"all": time.time() - started})
    end(args, trainer)


def choose_pairs(args: Arguments) -> Selection:
    """The pairs of all files, and what was left out."""

    @functools.cache
    def tokenizer() -> "PreTrainedTokenizerBase":  # for max_min_p, of answers without a number of tokens
        from dpo_iteration.models import load_template

        return load_template(args).tokenizer

    selection = select_pairs(
        args.train_dir,
        args.eval_fraction,
        args.seed,
        args.dataset_split,
        args.train_weights,
        choose_type=args.choose_type,
        length_penalty=args.length_penalty,
        length_penalty_unit=args.length_penalty_unit,
        min_margin=args.min_margin,
        drop_truncated=args.drop_truncated,
        drop_empty=args.drop_empty,
        count_tokens=lambda text: len(tokenizer()(text, add_special_tokens=False)["input_ids"]),
        pairs_per_prompt=args.pairs_per_prompt,
        rejected=needs_rejected(args.loss_type),
    )
    check_pairs(selection, args)
    return selection


def check_pairs(selection: Selection, args: Arguments):
    """Refuse too few pairs; every rank calls it alike, so that none waits for another."""
    world = world_size()
    reasons = ", ".join(f"{n} {reason}" for reason, n in selection.skipped_by_reason.items())
    read = f"{selection.counts['records']} records" + (f"; skipped: {reasons}" if reasons else "")
    if not selection.pairs:
        raise UserError(f"no {unit(args)}s in {' '.join(args.train_dir)} ({read})")
    training = sum(pair["split"] == "train" for pair in selection.pairs)
    if not training:
        raise UserError(
            f"all {len(selection.pairs)} {unit(args)}s are held out: lower --eval_fraction "
            f"{args.eval_fraction}"
        )
    if training < world:
        raise UserError(
            f"{count(training, f'training {unit(args)}')} for {count(world, 'process')} ({read}): give "
            f"--num_processes {training}"
        )


def prepare(args: Arguments, selection: Selection, pairs_per_step: int) -> Data:
    """Tokenise the pairs and lay them into batches; refuse what cannot be trained. Nothing is written yet."""
    check_torch()
    quiet_libraries()
    import torch

    from dpo_iteration import models, packing
    from dpo_iteration import rows as of_pairs
    from dpo_iteration.dpo import make_config

    if not torch.cuda.is_available():
        say("note: no GPU found, training on the CPU")
        models.prepare_cpu(args.cpu_threads)
    template = models.load_template(args)
    rows = of_pairs.tokenize(selection, template, args)
    check_pairs(selection, args)
    of_pairs.check_bos(template.tokenizer, rows["train"][0])
    models.check_models(args, template.tokenizer, rows)

    per_step = halved(pairs_per_step, len(rows["train"]), args, world_size())
    selection.counts["pairs_per_step"] = per_step
    if per_step < pairs_per_step:
        say(
            f"note: {len(rows['train'])} {unit(args)}s are few for steps of {pairs_per_step}: {per_step} per "
            "optimizer step"
        )
    sharing, steps = packing.batches(args, rows, per_step)
    own = steps["train"]
    hub.take_token(args)
    config = make_config(
        args, own.accumulation if own else accumulation(args, per_step, world_size()), bool(rows["eval"])
    )
    models.prepare_sharding(config)
    if args.eval_fraction and not rows["eval"]:
        say(
            f"note: no pair is held out by --eval_fraction {args.eval_fraction}, so there will be no "
            "evaluation"
        )
    if per_step > len(rows["train"]):
        say(
            "note: fewer pairs than an optimizer step takes, so a step is an epoch: lower --global_batch_size"
        )
    config.distributed_state.wait_for_everyone()  # every rank has seen what is there; now rank 0 may write
    return Data(selection, rows, template, per_step, sharing, steps, config)


def begin(args: Arguments, training: Training, data: Data):
    """Write what there is before training, and find the place on the hub where the model is to go."""
    if is_main():
        output.begin(training, args, data.selection)
        hub.reach(data.config)
    data.config.distributed_state.wait_for_everyone()


def add_reference(args: Arguments, data: Data):
    """Put the reference's log-probabilities into the rows. It is freed before the policy is loaded."""
    from dpo_iteration import reference

    reference.compute_reference(args, data.config, data.rows, data.sharing, data.template.tokenizer)


def load_policy(args: Arguments, data: Data) -> "IterativeDPOTrainer":
    """The trainer, with the policy and what came with it (`source`) and goes with the trained model."""
    from dpo_iteration import models
    from dpo_iteration.dpo import build_trainer

    policy = models.load_model(args.model_name_or_path, args, data.config, args.revision)
    source = models.Source.of(policy, data.template, args)
    trainer = build_trainer(args, policy, data)
    trainer.source = source
    return trainer


def agreed_checkpoints(training: Training) -> list[Path]:
    """Whole checkpoints as rank 0 sees them: another machine may see one less, or one more."""
    from accelerate.utils import broadcast_object_list

    [saved] = broadcast_object_list([training.checkpoints()], 0)
    if saved and not in_time((saved[-1] / "trainer_state.json").is_file):
        raise UserError(
            f"{saved[-1]} is not seen on {os.uname().nodename}: all machines must share the model's folder"
        )
    return saved


def continue_training(trainer: "IterativeDPOTrainer", saved: list[Path], for_room: str) -> dict:
    """Train, from the newest of the checkpoints `saved` if there is one; the Trainer's metrics.

    Args:
        for_room: what to do where a GPU's memory is full.

    Raises:
        UserError: that, or a checkpoint that cannot be read.
    """
    if saved:
        say(f"continuing from {saved[-1]}")
    try:
        return trainer.train(resume_from_checkpoint=str(saved[-1]) if saved else None).metrics
    except Exception as error:
        if type(error).__name__ == "OutOfMemoryError":
            raise UserError(f"the GPU's memory is full ({one_line(error, 120)}): {for_room}") from None
        if isinstance(error, UserError) or not saved or trainer.plain_log.stepped:
            raise
        raise UserError(
            f"cannot continue from {saved[-1]}: {one_line(error)}; delete that folder to continue from the "
            "one before it"
        ) from error


def train(trainer: "IterativeDPOTrainer", args: Arguments, training: Training, data: Data) -> dict:
    """Train, from the newest checkpoint if there is one, and evaluate; returns the metrics of the model."""
    from dpo_iteration.rows import show_pair

    rows = data.rows
    say(show_pair(data.template.tokenizer, rows["train"][0]))
    say(
        f"training on {len(rows['train'])} {unit(args)}s, {len(rows['eval'])} held out, {data.per_step} per "
        "optimizer step"
    )
    saved = agreed_checkpoints(training)
    room = "give gradient_checkpointing true, or a lower max_row_tokens or max_length"
    metrics = continue_training(trainer, saved, f"{room}; --check true says what fits")
    # The Trainer counts passes as if each had per_device_train_batch_size pairs.
    pairs = len(rows["train"])
    before = step_of(saved[-1]) / -(-pairs // data.per_step) if saved else 0.0
    speed = (trainer.state.epoch - before) * pairs / metrics["train_runtime"]
    metrics |= {"loss": metrics["train_loss"], "train_samples_per_second": speed}
    return metrics | trainer.figures()


def save(
    args: Arguments,
    training: Training,
    data: Data,
    trainer: "IterativeDPOTrainer",
    metrics: dict,
    seconds: dict,
):
    """Write the model with what came with the policy, and once it loads, complete the manifest."""
    trainer.source.save(trainer, args)
    if is_main():
        check_saved(args.output_dir, args.trust_remote_code)
        output.finish(training, args, data.selection, metrics, seconds)


def end(args: Arguments, trainer: "IterativeDPOTrainer"):
    """Push the model that is whole on disk, if asked to, and leave the other processes."""
    if is_main() and trainer.args.push_to_hub:
        hub.push(trainer, args.output_dir)
    trainer.args.distributed_state.destroy_process_group()


if __name__ == "__main__":
    run(main)
