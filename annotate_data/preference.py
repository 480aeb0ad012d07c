r"""Pair-preference models: which of two responses is better (RLHFlow/pair-preference-model-LLaMA3-8B).

Such a model (arXiv 2405.07863) is a causal language model that was trained to answer "A" or "B". What it
reads is one user turn in its own chat template, without BOS and without a generation prompt:

    [CONTEXT] {context} [RESPONSE A] {a} [RESPONSE B] {b} \n

where the context is a newline, then `\n<turn> user\n {content}` or `\n<turn> assistant\n {content}` for each
turn, then a newline. (The published template looks as if each turn had two newlines; jinja's trimming leaves
one, in training too.) With l_A and l_B the logits behind the last token, P(A is better) = softmax(l_A, l_B).
Both orders are averaged, so that the place of a response does not count.
"""

import functools
import json
import math
from array import array
from collections.abc import Iterator

from annotate_data.backbone import Backbone, BadRecord
from annotate_data.ranking import rank
from common.cli import UserError
from common.messages import CALLS, text_of

TOGETHER = 2048  # sequences that are in memory at once


def context_of(messages: list[dict]) -> str:
    """The conversation as the model reads it; tool calls are written as JSON behind a turn's text.

    Any turn but the assistant's is written as a user's, since the model was trained on no other.
    """
    context = "\n"
    for message in messages:
        calls = [json.dumps(message[key], ensure_ascii=False) for key in CALLS if message.get(key)]
        text = " ".join(filter(None, [text_of(message), *calls]))
        context += f"\n<turn> {'assistant' if message['role'] == 'assistant' else 'user'}\n {text}"
    return context + "\n"


def together(questions: list[tuple]) -> list[list[tuple]]:
    """Groups of a record's questions, (…, first response, token ids), that are computed together.

    That are those that share the context, or the first response too, whichever takes fewer tokens.
    """
    from common.shared_prompts import packed_tokens

    by_first = {}
    for question in questions:
        by_first.setdefault(question[-2], []).append(question)

    def tokens(groups: list) -> int:
        return sum(packed_tokens([ids for *_, ids in group]) for group in groups)

    return min([questions], list(by_first.values()), key=tokens)


class PairPreference(Backbone):
    """Ranks the K responses of a record by a pair-preference model; rewards are in [0, 1].

    A pair that is too long loses the beginning of its context; one whose responses alone are too long is not
    compared.

    Args:
        ranking: `round_robin` or `tournament`, see `annotate_data/ranking.py`.
        save_pair_probabilities: also give `pairs`, the K×K win probabilities.

    Raises:
        UserError: as `Backbone`; "A" and "B" are not one token each.
    """

    compares = True

    def __init__(self, name, ranking="round_robin", save_pair_probabilities=False, **options):
        super().__init__(name, **options)
        self.ranking, self.save_pairs = ranking, save_pair_probabilities
        letters = [self.tokenizer(letter, add_special_tokens=False)["input_ids"] for letter in "AB"]
        if any(len(ids) != 1 for ids in letters) or letters[0] == letters[1]:
            what = 'its tokenizer has no single tokens for "A" and "B"'
            raise UserError(f"{name}: {what}, so it is no pair-preference model")
        self.letters = [ids[0] for ids in letters]

    def check(self, messages: list[dict], tools: list[dict] | None = None) -> None:
        """Refuse a chat template that takes no user turn; the prompt's own turns are mere text here."""
        self.ids("", "a", "b")

    def left_out(self, messages: list[dict], tools: list[dict] | None = None) -> list[str]:
        """The definitions of tools, for which its format has no place."""
        return ["tools"] if tools else []

    def load(self):
        import transformers

        self.load_weights(transformers.AutoModelForCausalLM)
        head = self.model.get_output_embeddings()
        self.head = head.weight[self.letters].detach().float()  # [2, hidden]
        self.bias = None if getattr(head, "bias", None) is None else head.bias[self.letters].detach().float()

    def unload(self):
        self.head = self.bias = None
        super().unload()

    def ids(self, context: str, a: str, b: str) -> array:
        """Token ids of the question whether `a` or `b` is the better answer."""
        question = f"[CONTEXT] {context} [RESPONSE A] {a} [RESPONSE B] {b} \n"
        text = self.render([{"role": "user", "content": question}])
        text = text.removeprefix(self.tokenizer.bos_token or "")
        return array("i", self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])

    def encode_pair(self, messages: list[dict], a: str, b: str) -> tuple:
        """Token ids in both orders, and whether the context was cut; (None, None, True) where none fits."""
        context, cut = context_of(messages), False
        while True:
            orders = self.ids(context, a, b), self.ids(context, b, a)
            over = max(map(len, orders)) - self.max_length
            if over <= 0:
                return *orders, cut
            if not context:
                return None, None, True
            tokens = len(self.tokenizer(context, add_special_tokens=False, verbose=False)["input_ids"])
            context, cut = context[math.ceil(over * len(context) / max(1, tokens)) :], True

    def score(self, records: list[dict]) -> Iterator[tuple[int, dict]]:
        largest = max((len(record["responses"]) for record in records), default=1)
        step = max(1, TOGETHER // max(1, largest * (largest - 1)))
        for at in range(0, len(records), step):
            some, cuts = records[at : at + step], [0] * step
            compare = functools.partial(self._compare, some, cuts, at)
            ranked = rank([len(record["responses"]) for record in some], self.ranking, compare)
            for n, (rewards, matrix) in enumerate(ranked):
                more = {"pairs": matrix} if self.save_pairs else {}
                yield at + n, {"rewards": rewards, "cut": cuts[n]} | more

    def _compare(self, records, cuts, start, asked):
        """Probabilities for (record, i, j); counts cut sequences in `cuts`. Equal texts are a tie, unread."""
        questions, answers = {}, [None] * len(asked)  # record → [(which of `asked`, first response, ids)]
        for at, (n, i, j) in enumerate(asked):
            a, b = records[n]["responses"][i], records[n]["responses"][j]
            if a == b:
                answers[at] = 0.5
                continue
            try:
                forth, back, cut = self.encode_pair(records[n]["prompt"], a, b)
            except UserError as error:
                raise BadRecord(start + n, str(error)) from None
            cuts[n] += 2 * cut
            if forth:
                questions.setdefault(n, []).extend([(at, i, forth), (at, j, back)])
        groups = [group for found in questions.values() for group in together(found)]
        first_wins = {}  # (which of `asked`, first response) → P(the first is better)
        last = [[[len(ids) - 1] for *_, ids in group] for group in groups]
        for g, states in self.hidden_states([[ids for *_, ids in group] for group in groups], last):
            for (at, first, _), p in zip(groups[g], self._a_wins(states[:, 0]), strict=True):
                first_wins[at, first] = p
        for at, (_, i, j) in enumerate(asked):
            if (at, i) in first_wins:
                p = (first_wins[at, i] + 1 - first_wins[at, j]) / 2
                answers[at] = p if math.isfinite(p) else None
        return answers

    def _a_wins(self, states):
        """P(A is better) of hidden states [n, hidden], in fp32 from the head on."""
        import torch

        logits = torch.nn.functional.linear(states, self.head, self.bias)
        config = self.config.get_text_config()
        logits *= getattr(config, "logit_scale", None) or 1
        logits /= getattr(config, "logits_scaling", None) or 1
        if softcap := getattr(config, "final_logit_softcapping", None):
            logits = softcap * torch.tanh(logits / softcap)
        return torch.softmax(logits, dim=1)[:, 0].tolist()
