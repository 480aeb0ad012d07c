"""The DPO trainer: TRL's, with our own tokenisation, conservative DPO, and plain log lines.

TRL 1.16 is pinned exactly because `_prepare_dataset` and the attributes `loss_types` and `label_smoothing` are private.
"""

import math
import sys
import time
from collections import Counter
from pathlib import Path

import datasets
from accelerate import PartialState
from transformers import TrainerCallback
from trl import DPOTrainer

from common import chat
from common.cli import UserError
from common.progress import Progress, duration

SIDES = ("chosen", "rejected")


class IterativeDPOTrainer(DPOTrainer):
    """DPOTrainer on rows that are tokenised already (`prompt_ids`, `chosen_ids`, `rejected_ids`: lists of token ids).

    `loss_type: sigmoid` with `label_smoothing` ε is conservative DPO (Mitchell 2023, "A note on DPO with noisy
    preferences"): -(1 - ε)·logσ(βΔ) - ε·logσ(-βΔ). TRL's sigmoid ignores ε. Its robust loss,
    [-(1 - ε′)·logσ(βΔ) + ε′·logσ(-βΔ)] / (1 - 2ε′), is the same function for ε′ = -ε / (1 - 2ε), ε < ½.
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        # After TRL's own checks, which call a negative ε′ a mistake; `self.args` keeps the user's names.
        if "sigmoid" in self.loss_types and self.label_smoothing:
            self.loss_types = ["robust" if name == "sigmoid" else name for name in self.loss_types]
            self.label_smoothing = robust_equivalent(self.label_smoothing)

    def _prepare_dataset(self, dataset, processing_class, args, dataset_name):
        """Rows as they are: TRL would tokenise again. Cached reference values need one file for all ranks."""
        if not args.precompute_ref_log_probs:
            return dataset
        folder, state = Path(args.output_dir) / ".precompute" / dataset_name, PartialState()
        if state.is_main_process:
            dataset.save_to_disk(str(folder))
        state.wait_for_everyone()
        return datasets.load_from_disk(str(folder))

    def create_model_card(self, *args, **kwargs):
        """None: ours is written at the end (card.py)."""


def robust_equivalent(label_smoothing):
    """ε′ with which TRL's robust loss is conservative DPO with ε = `label_smoothing`."""
    return -label_smoothing / (1 - 2 * label_smoothing)


def _common_prefix(ids, others):
    return next((i for i, pair in enumerate(zip(ids, others)) if pair[0] != pair[1]), min(len(ids), len(others)))


class PairTokenizer:
    """Turns pair records into rows of token ids by the chat template, and counts what it had to cut.

    With nothing to cut, a row is TRL's own of the conversational record: one BOS where the template writes one, and
    behind each response what the template writes there. Beyond that:

    - a response that ended at the generation's length limit (`finish_reason` "length") gets no end of turn: the policy
      never wrote one, and must not learn to stop in the middle of a sentence;
    - a prompt longer than `max_prompt_length` loses its oldest tokens but keeps its BOS, on which attention leans;
    - a response that does not fit into `max_length` is cut on the right and so loses its end of turn too.

    Args:
        tokenizer: the policy's, with its chat template.
        max_length, max_prompt_length: tokens.
        template_kwargs: dict given to the template.

    Attributes:
        counts: Counter of prompts and responses cut, and of responses without an end of turn.
    """

    def __init__(self, tokenizer, max_length, max_prompt_length, template_kwargs=None):
        self.tokenizer, self.template_kwargs = tokenizer, template_kwargs or {}
        self.max_length, self.max_prompt_length = max_length, max_prompt_length
        self.end_of_turn = chat.turn_suffix(tokenizer, self.template_kwargs)
        self.counts = Counter()

    def encode(self, messages, generation_prompt):
        return chat.encode(self.tokenizer, messages, generation_prompt, self.template_kwargs)

    def __call__(self, pair):
        """(row or None, reason or None): a pair whose sides are empty or equal as tokens teaches nothing."""
        try:
            prompt = self.encode(pair["prompt"], True)
            full = {side: self.encode(pair["prompt"] + pair[side], False) for side in SIDES}
        except UserError as error:
            raise UserError(f"{pair.get('source', 'pair')} record {pair['id']}: {error}") from None
        # As in TRL: where the template renders the prompt alone differently, the response begins where they part.
        start = min(_common_prefix(prompt, full[side]) for side in SIDES)
        kept = Counter({"prompts_rendered_otherwise": 1} if start < len(prompt) else {})
        prompt = prompt[:start]
        if len(prompt) > self.max_prompt_length:
            bos = prompt[:1] if prompt[0] == self.tokenizer.bos_token_id else []
            prompt = bos + prompt[len(prompt) - self.max_prompt_length + len(bos) :]
            kept["prompts_cut"] += 1
        row = {"prompt_ids": prompt}
        for side in SIDES:
            ids = full[side][start:]
            if pair.get(f"{side}_finish_reason") == "length":
                ids = self._without_end_of_turn(ids)
                kept["responses_without_end_of_turn"] += 1
            if len(ids) > self.max_length - len(prompt):
                ids = ids[: self.max_length - len(prompt)]
                kept["responses_cut"] += 1
            row[f"{side}_ids"] = ids
        if not row["chosen_ids"] or not row["rejected_ids"]:
            return None, "a response without tokens"
        if row["chosen_ids"] == row["rejected_ids"]:
            return None, "equal token ids (after truncation)"
        self.counts += kept
        return row, None

    def _without_end_of_turn(self, ids):
        end = len(ids) - len(self.end_of_turn)
        if ids[end:] != self.end_of_turn:
            raise UserError(
                "the chat template does not end a cut-off response the way it ends others, so its end of turn "
                "cannot be left out; leave such responses out with --drop_truncated"
            )
        return ids[:end]


def show_pair(tokenizer, row):
    """A row decoded, the tokens that the loss counts between ⟦ and ⟧, with the numbers of tokens and of BOS."""
    prompt = tokenizer.decode(row["prompt_ids"])
    bos = tokenizer.bos_token_id
    count = sum(token == bos for token in row["prompt_ids"]) if bos is not None else 0
    lines = [f"prompt, {len(row['prompt_ids'])} tokens, {count} BOS: {prompt}"]
    for side in SIDES:
        lines.append(f"{side}, {len(row[f'{side}_ids'])} tokens: ⟦{tokenizer.decode(row[f'{side}_ids'])}⟧")
    return "\n".join(lines)


def check_bos(tokenizer, row):
    """Refuse a template or tokenizer that begins a prompt with two BOS."""
    bos = tokenizer.bos_token_id
    if bos is not None and row["prompt_ids"][:2] == [bos, bos]:
        raise UserError(f"the prompt begins with two {tokenizer.bos_token}: the chat template writes one too many")


class PlainLog(TrainerCallback):
    """A progress bar on a terminal; in a log file one line for each logging step, with rate and time left."""

    def __init__(self, pairs_per_step):
        self.pairs_per_step, self.progress = pairs_per_step, None

    def on_train_begin(self, args, state, control, **kwargs):
        self.started, self.first = time.monotonic(), state.global_step
        terminal = state.is_world_process_zero and sys.stderr.isatty()
        self.progress = Progress(state.max_steps, "train", "steps", done=self.first, enabled=terminal)
        self.note = ""

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
