"""The DPO trainer: TRL's, fed with packed rows that share their prompts, on the losses of losses.py.

TRL 1.16 is pinned exactly because `_prepare_dataset`, `_precompute_ref_logps`, `_compute_loss`,
`_total_train_tokens` and the name `hash_module` in its module are private. What losses.py does not have
(losses that depend on which pairs share a pass, f-divergences, WPO, LD-DPO, the auxiliary loss of mixtures of
experts) is TRL's own computation, padded.
"""

import math
import sys
import time
from contextlib import contextmanager

import torch
from torch.utils.data import DataLoader
from transformers import TrainerCallback
from trl import DPOTrainer
from trl.trainer import dpo_trainer

from common.cli import UserError
from common.progress import Progress, duration
from common.shared_prompts import only_wanted, prepare
from dpo_iteration.losses import Pairs, Settings, pair_losses
from dpo_iteration.packing import NUMBERS, PaddedCollator, Rows, check_packing, collate_packed, score

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
)
OF_TOKENS = ("logits/chosen", "logits/rejected", "mean_token_accuracy", "entropy")


class IterativeDPOTrainer(DPOTrainer):
    """DPOTrainer on rows that are tokenised already and have the reference's log-probabilities.

    Args:
        rows: {"train", "eval"}: lists of dicts with `prompt_ids`, `chosen_ids`, `rejected_ids` (token ids),
            `ref_chosen_logps`, `ref_rejected_logps`, and perhaps `margin` and `weight`.
        steps: Steps of the training rows, or None for TRL's own loss and batches.
        eval_steps: the same of the held-out rows.
        sharing: whether rows are packed.
        margin_scale: see losses.py.

    `loss_type: sigmoid` with `label_smoothing` is conservative DPO, which TRL's sigmoid is not.
    """

    def __init__(self, *args, rows, steps, eval_steps, sharing, margin_scale=0.0, **kwargs):
        self.rows, self.batching, self.sharing = rows, {"train": steps, "eval": eval_steps}, sharing
        self.checked, self.built = False, False
        self.sums = {"train": None, "eval": None}
        with without_hash():
            super().__init__(*args, **kwargs)
        self.built = True
        self.settings = Settings(self.beta, self.label_smoothing, margin_scale, self.args.discopop_tau)
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

    @property
    def is_fsdp_enabled(self):
        """Not while TRL's constructor asks, behind the Trainer's: under FSDP it would load a reference model
        all the same.
        """
        return self.fsdp and (self.built or not hasattr(self, "aux_loss_enabled"))

    @is_fsdp_enabled.setter
    def is_fsdp_enabled(self, value):
        self.fsdp = value

    def _prepare_dataset(self, dataset, processing_class, args, dataset_name):
        """Rows as they are: TRL would tokenise again."""
        return dataset

    def _precompute_ref_logps(self, dataset, name, batch_size):
        """The rows have them."""
        return dataset

    def create_model_card(self, *args, **kwargs):
        """None: ours is written at the end (card.py)."""

    def _save(self, output_dir=None, state_dict=None):
        """As the Trainer does, tied weights once: DeepSpeed and FSDP hand over copies of them, which pass for
        weights of their own.
        """
        for copied, source in getattr(
            self.accelerator.unwrap_model(self.model), "all_tied_weights_keys", {}
        ).items():
            if (
                state_dict
                and copied in state_dict
                and source in state_dict
                and state_dict[copied].equal(state_dict[source])
            ):
                state_dict[copied] = state_dict[source]  # transformers leaves out what is the same tensor
        super()._save(output_dir, state_dict)

    # Batches

    def loader(self, split):
        collate = collate_packed if self.sharing else PaddedCollator(self.processing_class.pad_token_id)
        args, steps = self.args, self.batching[split]
        return DataLoader(
            Rows(self.rows[split]),
            batch_sampler=steps,
            collate_fn=collate,
            num_workers=args.dataloader_num_workers,
        )

    def get_train_dataloader(self):
        return self.loader("train") if self.batching["train"] else super().get_train_dataloader()

    def get_eval_dataloader(self, eval_dataset=None):
        ours = self.batching["eval"] and (eval_dataset is None or eval_dataset is self.eval_dataset)
        return self.loader("eval") if ours else super().get_eval_dataloader(eval_dataset)

    def _prepare_inputs(self, inputs):
        """On the device, and numbers as they are: under DeepSpeed with bf16 the Trainer rounds every float of
        a batch to bf16,
        which moves a log-probability of -300 by up to 1."""
        exact = {key: inputs[key].to(self.args.device) for key in NUMBERS if key in inputs}
        exact |= {
            key: inputs.pop(key) for key in ("pairs",) if key in inputs
        }  # lists, which it would walk through
        return super()._prepare_inputs(inputs) | exact

    # The loss

    def _compute_loss(self, model, inputs, return_outputs):
        if "scale" not in inputs:
            return super()._compute_loss(model, inputs, return_outputs)
        if self.sharing and not self.checked:
            self.check_policy(model, inputs)
        scored = score(model, inputs)
        pairs = Pairs(
            scored.chosen,
            scored.rejected,
            inputs["ref_chosen_logps"],
            inputs["ref_rejected_logps"],
            scored.chosen_tokens,
            scored.rejected_tokens,
            inputs["margin"],
        )
        losses = pair_losses(pairs, self.loss_types, self.loss_weights, self.settings)
        self.count(scored, pairs, losses.detach(), inputs)
        loss = (losses * inputs["scale"]).sum()
        return (loss, scored.outputs) if return_outputs else loss

    def check_policy(self, model, inputs):
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
    def count(self, scored, pairs, losses, inputs):
        """Add up what TRL logs under the same names; means are taken over all pairs or tokens since the last
        log.
        """
        mode, real = "train" if self.model.training else "eval", (inputs["scale"] > 0).float()
        chosen, rejected = (self.beta * ratio for ratio in pairs.ratios)
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
        )
        outputs, mine, theirs = scored.outputs, scored.of_chosen, scored.of_rejected
        of_tokens = (
            (outputs.mean_logits * mine).sum(),
            (outputs.mean_logits * theirs).sum(),
            (outputs.is_top1 & mine).sum(),
            (outputs.entropy * mine).sum() + (outputs.entropy * theirs).sum(),
        )
        # In a row without a pair nothing counts. No value is read here: that would wait for the GPU at every
        # pass.
        values = (
            [(value * real).sum() for value in of_pairs]
            + [value * real.max() for value in (*of_tokens, inputs["tokens"])]
            + [real.sum()]
        )
        values = torch.stack([value.double() for value in values])
        self.sums[mode] = values if self.sums[mode] is None else self.sums[mode] + values

    def log(self, logs, start_time=None):
        mode = "train" if self.model.training else "eval"
        if self.sums[mode] is not None:
            *values, tokens, pairs = self.accelerator.reduce(self.sums[mode], "sum").tolist()
            self.sums[mode] = None
            logs.update(
                self.means(dict(zip(OF_PAIRS + OF_TOKENS, values, strict=True)), round(tokens), pairs, mode)
            )
        super().log(logs, start_time)

    def means(self, total, tokens, pairs, mode):
        """What is logged of sums over all processes."""
        chosen, rejected = total["tokens/chosen"], total["tokens/rejected"]
        over = dict(zip(OF_TOKENS, (chosen, rejected, chosen, chosen + rejected), strict=True))
        found = {name: value / max(over.get(name, pairs), 1.0) for name, value in total.items()}
        if mode == "train":
            self._total_train_tokens += tokens
            del found["loss"]  # the Trainer's own is the same mean
        found["num_tokens"] = self._total_train_tokens
        return found if mode == "train" else {f"eval_{name}": value for name, value in found.items()}


@contextmanager
def without_hash():
    """Spare TRL the hash of all weights that names its own cache of reference values, which is not used
    here.
    """
    before, dpo_trainer.hash_module = dpo_trainer.hash_module, lambda module: ""
    try:
        yield
    finally:
        dpo_trainer.hash_module = before


def robust_equivalent(label_smoothing):
    """ε′ with which TRL's robust loss is conservative DPO with ε = `label_smoothing`.

    [-(1 - ε′)·logσ(βΔ) + ε′·logσ(-βΔ)] / (1 - 2ε′) with ε′ = -ε / (1 - 2ε), ε < ½.
    """
    return -label_smoothing / (1 - 2 * label_smoothing)


class PlainLog(TrainerCallback):
    """A progress bar on a terminal; in a log file one line for each logging step, with rate and time left."""

    def __init__(self, pairs_per_step):
        self.pairs_per_step, self.progress, self.stepped = pairs_per_step, None, False

    def on_train_begin(self, args, state, control, **kwargs):
        self.started, self.first = time.monotonic(), state.global_step
        terminal = state.is_world_process_zero and sys.stderr.isatty()
        self.progress = Progress(state.max_steps, "train", "steps", done=self.first, enabled=terminal)
        self.note = ""

    def on_step_begin(self, args, state, control, **kwargs):
        self.stepped = True  # a checkpoint, if any, is read by now

    def on_step_end(self, args, state, control, **kwargs):
        self.progress.update(1, self.note)

    def on_log(self, args, state, control, logs=None, **kwargs):
        if not math.isfinite(logs.get("loss", 0.0)):  # every rank sees the same mean, so that all stop
            raise UserError(f"the loss is {logs['loss']} at step {state.global_step}: lower --learning_rate")
        if not state.is_world_process_zero or "loss" not in logs:
            return
        done = state.global_step - self.first
        rate = done / max(time.monotonic() - self.started, 1e-9)
        self.note = (
            f"loss {logs['loss']:.4f}, accuracy {logs['rewards/accuracies']:.2f}, "
            f"margin {logs['rewards/margins']:.4f}, lr {logs['learning_rate']:.2e}"
        )
        if self.progress.bar is None:
            left = duration((state.max_steps - state.global_step) / rate) if rate else "?"
            speed = f"{rate * self.pairs_per_step:.1f} pairs/s, {left} left"
            print(f"train: step {state.global_step}/{state.max_steps}, {self.note}, {speed}", flush=True)

    def on_train_end(self, args, state, control, **kwargs):
        self.progress.close()
