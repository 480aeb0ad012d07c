"""A prompt and its responses as the policy's token ids: those that were sampled, else those of their text.

Text loses what was sampled: special tokens (channels, tool calls), the thought that a template strips from an
answered turn, the one of several tokenisations that the policy chose. So generation keeps the ids with the
text (`prompt_token_ids`, `response_token_ids`), and training and divergence go by them. Where ids do not
decode to the text they are another tokenizer's, or the text was edited: then the text counts.
"""

from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING

from common.chat import ChatTemplate

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PROMPT, RESPONSES, DATE = "prompt_token_ids", "response_token_ids", "prompt_date"  # fields of a record
STOPPED_BY = "stop_strings"  # a record's too: the stop string that ended each response, or null
BROKEN = "\ufffd"  # what a tokenizer writes for bytes that make no character


@dataclass
class Answer:
    """A response: its text; why it ended (`stop`, `length`), and how many and which tokens, where known."""

    text: str
    finish_reason: str | None = None
    num_tokens: int | None = None
    token_ids: list[int] | None = None
    stopped_by: str | None = None  # stop string, whose tokens are sampled, and which the text leaves out


def answers_of(record: dict) -> list[Answer]:
    """The Answers of a generated record."""
    count = len(record["responses"])
    found = (record.get(key) for key in ("finish_reasons", "num_tokens", RESPONSES, STOPPED_BY))
    told = (values if isinstance(values, list) and values else [None] * count for values in found)
    return [Answer(*values) for values in zip(record["responses"], *told, strict=True)]


def are_ids(value: object) -> bool:
    """Whether a JSON value is a list of token ids."""
    return isinstance(value, list) and all(type(i) is int and i >= 0 for i in value)


def common_prefix(ids: list[int], others: list[int]) -> int:
    """Number of leading tokens that two sequences share."""
    shorter = min(len(ids), len(others))
    return next((i for i in range(shorter) if ids[i] != others[i]), shorter)


def is_decoded(text: str, decoded: str) -> bool:
    """Whether an engine's text is what token ids decode to, but for white space and broken bytes.

    An engine decodes token by token and has written a character before bytes come that make none; decoded at
    once, a run of byte tokens with them may be nothing but U+FFFD. So that stands for any text.
    """
    text, decoded = ("".join(one.split()) for one in (text.replace(BROKEN, ""), decoded))
    first, *others = decoded.split(BROKEN)
    if not others:
        return text == decoded
    if not text.startswith(first):
        return False
    at = len(first)
    for part in others[:-1]:
        at = text.find(part, at) + len(part)
        if at < len(part):
            return False
    return text.endswith(others[-1]) and len(text) - len(others[-1]) >= at


def is_beginning(text: str, decoded: str) -> bool:
    """Whether token ids decode to a text that begins with `text`, but for white space and broken bytes."""
    text, decoded = ("".join(one.replace(BROKEN, "").split()) for one in (text, decoded))
    return decoded.startswith(text)


class Encoder:
    """Turns a record's prompt and some of its responses into token ids.

    Args:
        template: the policy's.

    Attributes:
        end_of_turn: the token that closes a turn of the template, or None.
    """

    def __init__(self, template: ChatTemplate):
        self.template, self.tokenizer = template, template.tokenizer
        self.end_of_turn = template.end_of_turn()
        self.size = max(self.tokenizer.get_vocab().values()) + 1

    def rendered(self, record: dict) -> list[int]:
        """The prompt's token ids as the template writes them."""
        return self._ids(self._render(record, record["prompt"], True))

    def are_sampled(self, record: dict, answers: list[Answer]) -> bool:
        """Whether the record has its prompt's and these answers' token ids, of this tokenizer."""
        prompt = record.get(PROMPT)
        if not are_ids(prompt) or not prompt or max(prompt) >= self.size:
            return False
        return all(are_ids(answer.token_ids) and self._is_text(answer) for answer in answers)

    def _is_text(self, answer):
        decoded = self._text(answer.token_ids)
        if is_decoded(answer.text, decoded):
            return True
        if answer.stopped_by:  # the last token may go beyond it
            return is_beginning(answer.text + answer.stopped_by, decoded)
        # The engine leaves the token that ended a response out of its text, be it a special token or a word.
        return answer.finish_reason != "length" and is_decoded(answer.text, self._text(answer.token_ids[:-1]))

    def _text(self, ids):
        # Sampled from embeddings beyond the tokenizer's vocabulary (for round numbers), a token is no text.
        known = [i for i in ids if i < self.size]
        return self.tokenizer.decode(known, skip_special_tokens=True, clean_up_tokenization_spaces=False)

    def __call__(self, record, answers):
        """(the prompt's ids, a list of each answer's, Counter).

        From text, an answer ends with the template's end of turn unless it was cut off (`finish_reason`
        "length"). Where the last tokens of the prompt merge with a response's first, the responses begin
        where the sequences part.

        The Counter has `as_sampled`, answers by their own token ids. It says of those made from text:

        - `other_ids`: they have token ids, which are not this text in this tokenizer;
        - `retokenised`: another number of tokens was sampled;
        - `written_otherwise`: the template would change them (strip a thought, insert a header);
        - `never_closed`: they ended, and the template closes no turn;
        - `prompts_merged`: prompts that share a token with a response.
        """
        if self.are_sampled(record, answers):
            sampled = [list(answer.token_ids) for answer in answers]
            return list(record[PROMPT]), sampled, Counter(as_sampled=len(answers))
        has_ids = are_ids(record.get(PROMPT))
        found = Counter(other_ids=sum(has_ids and are_ids(answer.token_ids) for answer in answers))
        before = self._render(record, record["prompt"], True)
        prompt, full = self._ids(before), []
        for answer in answers:
            text, same = self._continued(record, before, answer.text)
            full.append(self._ids(text))
            found["written_otherwise"] += not same
        start = min([common_prefix(prompt, ids) for ids in full], default=len(prompt))
        found["prompts_merged"] += start < len(prompt)
        responses = []
        for answer, ids in zip(answers, full, strict=True):
            end = [] if answer.finish_reason == "length" or self.end_of_turn is None else [self.end_of_turn]
            responses.append(ids[start:] + end)
            found["never_closed"] += answer.finish_reason != "length" and not end
            found["retokenised"] += answer.num_tokens is not None and answer.num_tokens != len(responses[-1])
        return prompt[:start], responses, +found

    def _render(self, record, messages, generation_prompt):
        return self.template.render(messages, generation_prompt, record.get("tools"), record.get(DATE))

    def _ids(self, text):
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    def _continued(self, record, before, text):
        """(the templated prompt and response, up to its end of turn; whether the template leaves it alone).

        The template may trim a response, or put a space in front, as it will in later turns; nothing else.
        """
        written = self._render(record, [*record["prompt"], {"role": "assistant", "content": text}], False)
        rest, core = written[len(before) :], text.strip()
        at = rest.find(core)
        if not written.startswith(before) or at < 0 or rest[:at].strip():
            return before + text, False
        end, behind = at + len(core), text[len(text.rstrip()) :] if core else ""
        end += len(behind) if rest[end:].startswith(behind) else 0
        return before + rest[:end], True


def shown_difference(
    tokenizer: "PreTrainedTokenizerBase", ids: list[int], others: list[int], width: int = 60
) -> tuple[str, ...]:
    """Two sequences of token ids as text, from shortly before they part."""
    start = max(0, common_prefix(ids, others) - 8)
    return tuple(repr(tokenizer.decode(one[start:])[:width]) for one in (ids, others))


def prompt_mismatch(encoder: Encoder, record: dict) -> tuple[str, ...] | None:
    """None, or (how the prompt was sampled, how the template writes it here) as text from where they part."""
    written = encoder.rendered(record)
    return None if written == record[PROMPT] else shown_difference(encoder.tokenizer, record[PROMPT], written)
