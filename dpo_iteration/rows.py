"""Pairs as token ids: what was sampled, what is cut and how, and a look at what the loss will see."""

import json
from collections import Counter
from typing import TYPE_CHECKING

from common.chat import ChatTemplate
from common.cli import UserError
from common.manifest import generation_manifest
from common.progress import Progress
from common.tokens import Answer, Encoder, prompt_mismatch
from common.training import is_main
from dpo_iteration.arguments import Arguments
from dpo_iteration.losses import needs_mismatched
from dpo_iteration.pairs import Selection

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SIDES = ("chosen", "rejected")


class PairTokenizer:
    """Turns pair records into rows of token ids, and counts what it had to cut.

    A row holds the token ids that the policy read and sampled, where the record has them (common/tokens.py),
    after a prompt that this tokenizer's template must write in the same way. A record of texts alone is
    templated: with nothing to cut, that is TRL's own row of the conversational record up to the end of turn.
    Beyond that:

    - a response that ended at the generation's length limit (`finish_reason` "length") gets no end of turn:
      the policy never wrote one, and must not learn to stop in the middle of a sentence;
    - a prompt longer than `max_prompt_length` loses its oldest tokens but keeps its BOS, on which attention
      leans;
    - a response that does not fit into `max_length` is cut on the right and so loses its end of turn too.

    Args:
        template: the policy's.
        max_length, max_prompt_length: tokens.

    Attributes:
        counts: Counter of prompts and responses cut, of responses without an end of turn, and what
            common/tokens.py tells.
    """

    def __init__(self, template: ChatTemplate, max_length: int, max_prompt_length: int):
        self.tokenizer, self.encoder = template.tokenizer, Encoder(template)
        self.max_length, self.max_prompt_length = max_length, max_prompt_length
        self.counts = Counter()

    def __call__(self, pair):
        """(row or None, reason or None): a pair whose sides are empty or equal as tokens teaches nothing.

        A pair may have a chosen response alone; its row's `rejected_ids` are empty then.
        """
        sides = [side for side in SIDES if side in pair]
        answers = [
            Answer(
                pair[side][0]["content"],
                *(
                    pair.get(f"{side}_{key}")
                    for key in ("finish_reason", "num_tokens", "token_ids", "stop_string")
                ),
            )
            for side in sides
        ]
        try:
            prompt, responses, kept = self.encoder(pair, answers)
            if kept["as_sampled"]:
                self.check_prompt(pair)
        except UserError as error:
            raise UserError(f"{pair.get('source', 'pair')} record {pair['id']}: {error}") from None
        kept["responses_without_end_of_turn"] += sum(answer.finish_reason == "length" for answer in answers)
        if len(prompt) > self.max_prompt_length:
            bos = prompt[:1] if prompt[0] == self.tokenizer.bos_token_id else []
            prompt = bos + prompt[len(prompt) - self.max_prompt_length + len(bos) :]
            kept["prompts_cut"] += 1
        row = {"prompt_ids": prompt, "chosen_ids": [], "rejected_ids": []}
        for side, ids in zip(sides, responses, strict=True):
            if len(ids) > self.max_length - len(prompt):
                ids = ids[: self.max_length - len(prompt)]
                kept["responses_cut"] += 1
            row[f"{side}_ids"] = ids
        if not all(row[f"{side}_ids"] for side in sides):
            return None, "a response without tokens"
        if row["chosen_ids"] == row["rejected_ids"]:
            cut = kept["responses_cut"] > 0
            return None, "equal token ids (after truncation)" if cut else "equal token ids"
        self.counts += kept
        return row, None

    def check_prompt(self, pair: dict):
        """Refuse a pair whose prompt this template writes otherwise than the one that was sampled from."""
        found = prompt_mismatch(self.encoder, pair)
        if found is None:
            return
        made = generation_manifest(pair["source"]) if "source" in pair else None
        told = ""
        if made:
            template = made["inputs"].get("chat_template", {}).get("path", "of the model")
            variables = json.dumps(made["settings"].get("template_kwargs") or {})
            told = f" (chat_template {template}, template_kwargs {variables})"
        raise UserError(
            f"its answers were sampled behind a prompt with {found[0]}{told}, and here the chat template "
            f"writes {found[1]}: "
            "give the template of the sampling with --chat_template and --template_kwargs"
        )


def tokenize(selection: Selection, template: ChatTemplate, args: Arguments) -> dict:
    """{"train", "eval"}: the pairs as rows of token ids, with what `add_mismatched` adds where a loss asks.

    Pairs that teach nothing move to `selection.skipped`.
    """
    to_row = PairTokenizer(template, args.max_length, args.max_prompt_length)
    rows, kept = {"train": [], "eval": []}, []
    progress = Progress(len(selection.pairs), "tokenize", "pairs", enabled=is_main())
    for pair in selection.pairs:
        row, reason = to_row(pair)
        if row is None:
            selection.skip(pair, reason)
        else:
            more = {"loss_weight": pair["loss_weight"]} if "loss_weight" in pair else {}
            rows[pair["split"]].append(row | {"margin": float(pair["margin"])} | more)
            kept.append(pair)
        progress.update()
    progress.close()
    selection.pairs = kept
    selection.counts |= {"train_pairs": len(rows["train"]), "eval_pairs": len(rows["eval"]), **to_row.counts}
    if needs_mismatched(args.loss_type):
        add_mismatched(rows["train"], rows["train"], args.max_length)
        add_mismatched(rows["eval"], rows["eval"] + rows["train"], args.max_length)
    return rows


def add_mismatched(rows: list[dict], pool: list[dict], max_length: int):
    """Give each row under `mismatched` a row of its own prompt with the answers of the next pair of `pool`
    that has another one, cut to `max_length`.

    They stay the same in all epochs, so that the reference is computed once. TRL's KTOTrainer takes those of
    a batch's examples, in batches that stay the same.

    Args:
        pool: begins with `rows`.

    Raises:
        UserError: there is one prompt only.
    """
    for i, row in enumerate(rows):
        prompt, following = row["prompt_ids"], (pool[(i + k) % len(pool)] for k in range(1, len(pool)))
        other = next((other for other in following if other["prompt_ids"] != prompt), None)
        if other is None:
            raise UserError(
                "--loss_type kto wants answers to other prompts, and all pairs have the same one: give more "
                "prompts"
            )
        answers = {f"{side}_ids": other[f"{side}_ids"][: max_length - len(prompt)] for side in SIDES}
        row["mismatched"] = {"prompt_ids": prompt, **answers, "margin": 0.0}


def with_mismatched(rows: list[dict]) -> list[dict]:
    """The rows, and behind them those of their answers to other prompts: all that is computed of them."""
    return rows + [row["mismatched"] for row in rows if "mismatched" in row]


def show_pair(tokenizer: "PreTrainedTokenizerBase", row: dict) -> str:
    """A row decoded, the tokens that the loss counts between ⟦ and ⟧, with the numbers of tokens and of
    BOS.
    """
    prompt = tokenizer.decode(row["prompt_ids"])
    bos = tokenizer.bos_token_id
    count = sum(token == bos for token in row["prompt_ids"]) if bos is not None else 0
    lines = [f"prompt, {len(row['prompt_ids'])} tokens, {count} BOS: {prompt}"]
    for side in [side for side in SIDES if row[f"{side}_ids"]]:
        lines.append(f"{side}, {len(row[f'{side}_ids'])} tokens: ⟦{tokenizer.decode(row[f'{side}_ids'])}⟧")
    return "\n".join(lines)


def check_bos(tokenizer: "PreTrainedTokenizerBase", row: dict):
    """Refuse a template or tokenizer that begins a prompt with two BOS."""
    bos = tokenizer.bos_token_id
    if bos is not None and row["prompt_ids"][:2] == [bos, bos]:
        raise UserError(
            f"the prompt begins with two {tokenizer.bos_token}: the chat template writes one too many"
        )
