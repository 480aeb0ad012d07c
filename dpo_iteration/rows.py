"""Pairs as token ids: the chat template, what is cut and how, and a look at what the loss will see."""

from collections import Counter

from common import chat
from common.cli import UserError

SIDES = ("chosen", "rejected")


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

    def encode(self, messages, generation_prompt, tools=None):
        return chat.encode(self.tokenizer, messages, generation_prompt, self.template_kwargs, tools)

    def __call__(self, pair):
        """(row or None, reason or None): a pair whose sides are empty or equal as tokens teaches nothing."""
        try:
            prompt = self.encode(pair["prompt"], True, pair.get("tools"))
            full = {side: self.encode(pair["prompt"] + pair[side], False, pair.get("tools")) for side in SIDES}
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
