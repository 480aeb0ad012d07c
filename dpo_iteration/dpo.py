"""The DPO trainer: TRL's, fed with packed rows that share their prompts, on the losses of losses.py.

TRL 1.16 is pinned exactly because `_prepare_dataset`, `_precompute_ref_logps`, `_compute_loss` and
`_total_train_tokens` are private, as are the two functions of `without_reference`. What losses.py does not
have (losses that depend on which pairs share a pass, f-divergences, WPO, LD-DPO, the auxiliary loss of
mixtures of experts) is TRL's own computation, padded.
"""

import dataclasses
import math
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING
from unittest.mock import patch

import torch
from datasets import Dataset
from torch.utils.data import DataLoader
from transformers import PrinterCallback, TrainerCallback, TrainerState
from transformers.trainer_utils import EvalLoopOutput
from trl import DPOConfig, DPOTrainer
from trl.trainer import dpo_trainer

from common import trackers
from common.cli import UserError, one_line
from common.progress import Progress, duration
from common.shared_prompts import only_wanted, prepare
from common.training import say, step_of
from dpo_iteration import adapters, models, trl_arguments
from dpo_iteration.arguments import OURS, Arguments, unit
from dpo_iteration.losses import (
    Pairs,
    Settings,
    implicit_rewards,
    needs_mismatched,
    needs_rejected,
    pair_losses,
)
from dpo_iteration.output import in_words
from dpo_iteration.packing import NUMBERS, PaddedCollator, Rows, Scored, collate_packed, score
from dpo_iteration.rounding import check_packing

if TYPE_CHECKING:
    from dpo_iteration.run_dpo import Data

OF_PAIRS = (
    "loss",
    "rewards/chosen",
    "rewards/rejected",
    "rewards/accuracies",
    "rewards/margins",
    "logps/chosen",
    "logps/rejected",
    "tokens/chosen",
    "tokens/rejected",
    "kl",
)
OF_TOKENS = ("logits/chosen", "logits/rejected", "mean_token_accuracy", "entropy")


def make_config(args: Arguments, accumulation: int, has_eval: bool) -> DPOConfig:
    """TRL's DPOConfig: those of our own arguments that bear its names, what we decide, then what was given.

    Raises:
        UserError: TRL refuses the settings.
    """
    # A mixed precision of the launcher's configuration would win over bf16 of ours.
    os.environ["ACCELERATE_MIXED_PRECISION"] = "bf16" if args.bf16 else "no"
    ours = {field.name for field in OURS} & DPOConfig.__dataclass_fields__.keys()
    values = {name: getattr(args, name) for name in ours} | {
        "gradient_accumulation_steps": accumulation,
        "eval_strategy": "steps" if has_eval and args.eval_steps else "no",
        "eval_steps": args.eval_steps or None,
        "save_strategy": "steps" if args.save_steps else "no",
        "save_steps": args.save_steps or 500,
        "use_cpu": not torch.cuda.is_available(),
        "dataloader_pin_memory": torch.cuda.is_available(),
        "disable_tqdm": True,
        "logging_nan_inf_filter": False,
        "precompute_ref_log_probs": True,
        "report_to": trackers.chosen(args.report_to) or "none",
        "project": trackers.name_project(args.report_to, args.project),
    }
    with trl_refuses(TypeError, RuntimeError):
        return DPOConfig(**values | trl_arguments.given(args))


@contextmanager
def trl_refuses(*kinds: type[Exception]) -> Iterator[None]:
    """What TRL says of settings that it refuses, in one line; `kinds`: further classes of such errors."""
    try:
        yield
    except (ValueError, ImportError, *kinds) as error:
        raise UserError(f"TRL refuses the settings: {one_line(error, 400)}") from None


def build_trainer(args: Arguments, policy: torch.nn.Module, data: "Data") -> "IterativeDPOTrainer":
    """The trainer of a loaded policy. `data`: run_dpo.Data, whose rows have the reference's values."""
    datasets = {split: Dataset.from_list(ids) if ids else None for split, ids in data.rows.items()}
    with trl_refuses(NotImplementedError):
        trainer = IterativeDPOTrainer(
            model=policy,
            args=data.config,
            processing_class=data.template.tokenizer,
            train_dataset=datasets["train"],
            eval_dataset=datasets["eval"],
            peft_config=adapters.lora_config(args),
            rows=data.rows,
            steps=data.steps["train"],
            eval_steps=data.steps["eval"],
            sharing=data.sharing,
            settings=loss_settings(args),
        )
    trainer.plain_log = PlainLog(data.per_step, unit(args))
    trainer.add_callback(trainer.plain_log)
    trainer.remove_callback(PrinterCallback)
    adapters.keep_fp32(trainer)
    models.check_master_weights(trainer)
    return trainer


def loss_settings(args: Arguments | DPOConfig) -> Settings:
    """The settings of losses.py that `args` has and gives; the others are as they are there."""
    given = {field.name: getattr(args, field.name, None) for field in dataclasses.fields(Settings)}
    return Settings(**{name: value for name, value in given.items() if value is not None})


class IterativeDPOTrainer(DPOTrainer):
    """DPOTrainer on rows that are tokenised already and have the reference's log-probabilities.

    Args:
        rows: {"train", "eval"}: lists of dicts with `prompt_ids`, `chosen_ids`, `rejected_ids` (token ids),
            `ref_chosen_logps`, `ref_rejected_logps`, `margin`, and perhaps `loss_weight` and `mismatched`.
        steps: Steps of the training rows, or None for TRL's own loss and batches.
        eval_steps: the same of the held-out rows.
        sharing: whether rows are packed.
        settings: Settings of losses.py.

    `loss_type: sigmoid` with `label_smoothing` is conservative DPO, which TRL's sigmoid is not.
    """

    def __init__(self, *args, rows, steps, eval_steps, sharing, settings, **kwargs):
        self.rows, self.batching, self.sharing = rows, {"train": steps, "eval": eval_steps}, sharing
        self.settings, self.checked, self.sums = settings, False, {"train": None, "eval": None}
        self.kl = self.unmeasured = None  # see `estimate_kl`
        with without_reference():
            super().__init__(*args, **kwargs)
        if steps is None and "sigmoid" in self.loss_types and self.label_smoothing:
            # After TRL's own checks, which call a negative value a mistake; `self.args` keeps the user's
            # names.
            self.loss_types = ["robust" if name == "sigmoid" else name for name in self.loss_types]
            self.label_smoothing = robust_equivalent(self.label_smoothing)
        if sharing:
            base = self.accelerator.unwrap_model(self.model)
            base = base.get_base_model() if hasattr(base, "get_base_model") else base
            prepare(base)
            only_wanted(base.base_model)
            self.policy = base

    # What TRL would do once more

    def _prepare_dataset(self, dataset, processing_class, args, dataset_name):
        """Rows as they are: TRL would tokenise again."""
        return dataset

    def _precompute_ref_logps(self, dataset, name, batch_size):
        """The rows have them."""
        return dataset

    def create_model_card(self, *args: object, **kwargs: object):
        """None: ours is written at the end (card.py)."""

    def _save(self, output_dir=None, state_dict=None):
        """As the Trainer, but tied weights once: DeepSpeed and FSDP hand over copies of them, which pass for
        weights of their own.
        """
        weights = state_dict or {}
        tied = getattr(self.accelerator.unwrap_model(self.model), "all_tied_weights_keys", {})
        for copied, source in tied.items():
            if {copied, source} <= weights.keys() and weights[copied].equal(weights[source]):
                weights[copied] = weights[source]  # transformers leaves out what is the same tensor
        super()._save(output_dir, state_dict)

    # Batches

    @property
    def collate(self) -> Callable[[list[dict]], dict]:
        return collate_packed if self.sharing else PaddedCollator(self.processing_class.pad_token_id)

    def loader(self, split: str) -> DataLoader:
        args, steps = self.args, self.batching[split]
        return DataLoader(
            Rows(self.rows[split]),
            batch_sampler=steps,
            collate_fn=self.collate,
            num_workers=args.dataloader_num_workers,
        )

    def get_train_dataloader(self) -> DataLoader:
        return self.loader("train") if self.batching["train"] else super().get_train_dataloader()

    def get_eval_dataloader(self, eval_dataset: str | Dataset | None = None) -> DataLoader:
        ours = self.batching["eval"] and (eval_dataset is None or eval_dataset is self.eval_dataset)
        return self.loader("eval") if ours else super().get_eval_dataloader(eval_dataset)

    def _prepare_inputs(self, inputs):
        """On the device, numbers as they are.

        Under DeepSpeed with bf16 the Trainer rounds every float of a batch to bf16, which moves a
        log-probability of -300 by up to 1.
        """
        exact = {key: inputs[key].to(self.args.device) for key in NUMBERS if key in inputs}
        if "pairs" in inputs:  # lists, which the Trainer would walk through
            exact["pairs"] = inputs.pop("pairs")
        return super()._prepare_inputs(inputs) | exact

    # The KL of KTO

    def get_batch_samples(self, *given: object) -> tuple[list, object]:
        """The passes of an optimizer step, all of which have the same `kl`."""
        samples, count = super().get_batch_samples(*given)
        if needs_mismatched(self.loss_types):
            self.unmeasured = [sample["pairs"] for sample in samples]
        return samples, count

    def evaluation_loop(self, dataloader: DataLoader, *args: object, **kwargs: object) -> EvalLoopOutput:
        """The Trainer's, with one `kl` for all held-out pairs."""
        if needs_mismatched(self.loss_types):
            self.unmeasured = (batch["pairs"] for batch in dataloader)
        return super().evaluation_loop(dataloader, *args, **kwargs)

    @torch.no_grad()
    def estimate_kl(self, model: torch.nn.Module, passes: Iterable[list[dict]]) -> torch.Tensor:
        """KL of the policy to the reference, [] and at least 0: the mean log π/π_ref of the answers to other
        prompts that the pairs of `passes` have, over all processes.

        A pass of its own ahead of the step's others, without gradients. TRL's KTOTrainer takes the mean over
        the pairs that share a pass; so the step's would depend on how its pairs are laid out.
        """
        training, sums = model.training, torch.zeros(2, device=self.args.device)
        model.eval()
        for pairs in passes:
            rows = [row["mismatched"] | {"scale": row["scale"]} for row in pairs]
            inputs = self._prepare_inputs(self.collate(rows))
            scored, real = score(model, inputs), (inputs["scale"] > 0).float()
            ratios = scored.chosen - inputs["ref_chosen_logps"]
            ratios += scored.rejected - inputs["ref_rejected_logps"]
            sums += torch.stack([(ratios * real).sum(), 2 * real.sum()])
        model.train(training)
        total, count = self.accelerator.reduce(sums, "sum")
        return (total / count.clamp(min=1)).clamp(min=0)

    # The loss

    def _compute_loss(self, model, inputs, return_outputs):
        if "scale" not in inputs:
            return super()._compute_loss(model, inputs, return_outputs)
        if self.sharing and not self.checked:
            self.check_policy(model, inputs)
        if self.unmeasured is not None:
            self.kl, self.unmeasured = self.estimate_kl(model, self.unmeasured), None
        scored = score(model, inputs)
        pairs = Pairs(
            scored.chosen,
            scored.rejected,
            inputs["ref_chosen_logps"],
            inputs["ref_rejected_logps"],
            scored.chosen_tokens,
            scored.rejected_tokens,
            inputs["margin"],
            inputs.get("step_tokens"),
            self.kl,
        )
        losses = pair_losses(pairs, self.loss_types, self.loss_weights, self.settings)
        self.count(scored, pairs, losses.detach(), inputs)
        loss = (losses * inputs["scale"]).sum()
        return (loss, scored.outputs) if return_outputs else loss

    def check_policy(self, model: torch.nn.Module, inputs: dict):
        """Hold the first row against padded passes; dropout, which would differ from pass to pass, is off
        meanwhile.
        """
        self.checked, training = True, model.training
        model.eval()
        half = self.args.bf16 or self.policy.dtype != torch.float32
        check_packing(model, self.policy, inputs, self.processing_class.pad_token_id, half, "policy")
        model.train(training)

    # What is logged

    @torch.no_grad()
    def count(self, scored: Scored, pairs: Pairs, losses: torch.Tensor, inputs: dict):
        """Add up what TRL logs under the same names, as means over the pairs or tokens since the last log."""
        mode, real = "train" if self.model.training else "eval", (inputs["scale"] > 0).float()
        chosen, rejected = implicit_rewards(pairs, self.loss_types, self.beta)
        of_pairs = (
            losses,
            chosen,
            rejected,
            (chosen > rejected).float(),
            chosen - rejected,
            pairs.chosen,
            pairs.rejected,
            pairs.chosen_tokens,
            pairs.rejected_tokens,
            torch.zeros_like(losses) if pairs.kl is None else pairs.kl.expand_as(losses),
        )
        outputs, mine, theirs = scored.outputs, scored.of_chosen, scored.of_rejected
        of_tokens = (
            (outputs.mean_logits * mine).sum(),
            (outputs.mean_logits * theirs).sum(),
            (outputs.is_top1 & mine).sum(),
            (outputs.entropy * mine).sum() + (outputs.entropy * theirs).sum(),
        )
        # A row without a pair counts nothing. No value is read here: that would wait for the GPU every time.
        values = (
            [(value * real).sum() for value in of_pairs]
            + [value * real.max() for value in (*of_tokens, inputs["tokens"])]
            + [real.sum()]
        )
        values = torch.stack([value.double() for value in values])
        self.sums[mode] = values if self.sums[mode] is None else self.sums[mode] + values

    def log(self, logs: dict, start_time: float | None = None):
        mode = "train" if self.model.training else "eval"
        if self.sums[mode] is not None:
            *values, tokens, pairs = self.accelerator.reduce(self.sums[mode], "sum").tolist()
            self.sums[mode] = None
            logs.update(
                self.means(dict(zip(OF_PAIRS + OF_TOKENS, values, strict=True)), round(tokens), pairs, mode)
            )
        super().log(logs, start_time)

    def means(self, total: dict, tokens: int, pairs: float, mode: str) -> dict:
        """What is logged of sums over all processes."""
        chosen, rejected = total["tokens/chosen"], total["tokens/rejected"]
        over = dict(zip(OF_TOKENS, (chosen, rejected, chosen, chosen + rejected), strict=True))
        found = {name: value / max(over.get(name, pairs), 1.0) for name, value in total.items()}
        if mode == "train":
            self._total_train_tokens += tokens
            del found["loss"]  # the Trainer's own is the same mean
        if not needs_mismatched(self.loss_types):
            del found["kl"]
        if not needs_rejected(self.loss_types):  # there is nothing to compare with
            found = {key: found[key] for key in found if "rejected" not in key and "rewards/" not in key}
        found["num_tokens"] = self._total_train_tokens
        return found if mode == "train" else {f"eval_{name}": value for name, value in found.items()}

    @property
    def tokens(self) -> int:
        """Tokens that this start has trained on, over all processes; a prompt that is shared counts once."""
        return self._total_train_tokens

    def figures(self) -> dict:
        """Figures of the weights that are there to be saved, evaluated if they were not.

        They are those of the last step, or of the best checkpoint, which `load_best_model_at_end` has loaded.
        """
        state, step = self.state, self.state.global_step
        if self.args.load_best_model_at_end and state.best_model_checkpoint:
            # `best_global_step` may be one that was not saved.
            step = step_of(Path(state.best_model_checkpoint))
            say(
                f"the model is that of step {step} of {state.global_step}, the best by "
                f"{self.args.metric_for_best_model} of those saved"
            )
        so_far = [entry for entry in state.log_history if entry["step"] <= step]
        logged = [entry for entry in so_far if "loss" in entry]
        keys = ("loss", "rewards/accuracies", "rewards/margins", "kl")
        found = {"step": step} | {key: logged[-1][key] for key in keys if logged and key in logged[-1]}
        if self.eval_dataset is None:
            return found
        done = [entry for entry in so_far if "eval_loss" in entry and entry["step"] == step]
        if not done:
            return found | self.evaluate()
        return found | {key: value for key, value in done[-1].items() if key.startswith("eval_")}


def without_reference() -> AbstractContextManager:
    """A context in which TRL's constructor makes nothing for a reference, whose values the rows have already.

    Under FSDP it would load a reference model all the same, and everywhere it would hash all weights to
    name a cache of its own. Both are functions of its module; `patch` raises if TRL has renamed them.
    """
    unused = {"create_model_from_path": lambda *args, **kwargs: None, "hash_module": lambda module: ""}
    return patch.multiple(dpo_trainer, **unused)


def robust_equivalent(label_smoothing: float) -> float:
    """ε′ with which TRL's robust loss is conservative DPO with ε = `label_smoothing`.

    [-(1 - ε′)·logσ(βΔ) + ε′·logσ(-βΔ)] / (1 - 2ε′) with ε′ = -ε / (1 - 2ε), ε < ½.
    """
    return -label_smoothing / (1 - 2 * label_smoothing)


class PlainLog(TrainerCallback):
    """A progress bar on a terminal; in a log file one line for each logging step, with rate and time left."""

    def __init__(self, pairs_per_step, unit):
        self.pairs_per_step, self.unit, self.progress, self.stepped = pairs_per_step, unit, None, False

    def on_train_begin(self, args: object, state: TrainerState, control: object, **_: object):
        self.started, self.first, self.note = time.monotonic(), state.global_step, ""
        terminal = state.is_world_process_zero and sys.stderr.isatty()
        self.progress = Progress(state.max_steps, "train", "steps", done=self.first, enabled=terminal)

    def on_step_begin(self, *_: object, **__: object):
        self.stepped = True  # a checkpoint, if any, is read by now

    def on_step_end(self, *_: object, **__: object):
        self.progress.update(1, self.note)

    def on_log(self, args: object, state: TrainerState, control: object, logs: dict, **_: object):
        if not math.isfinite(logs.get("loss", 0.0)):  # every rank sees the same mean, so that all stop
            raise UserError(f"the loss is {logs['loss']} at step {state.global_step}: lower --learning_rate")
        if not state.is_world_process_zero or "loss" not in logs:
            return
        done = state.global_step - self.first
        rate = done / max(time.monotonic() - self.started, 1e-9)
        self.note = f"{in_words(logs)}, lr {logs['learning_rate']:.2e}"
        if self.progress.bar is None:
            left = duration((state.max_steps - state.global_step) / rate) if rate else "?"
            speed = f"{rate * self.pairs_per_step:.1f} {self.unit}s/s, {left} left"
            print(f"train: step {state.global_step}/{state.max_steps}, {self.note}, {speed}", flush=True)

    def on_train_end(self, *_: object, **__: object):
        self.progress.close()
