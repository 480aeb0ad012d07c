"""How a chat template writes messages: its arguments, token ids, stop tokens, literal special tokens.

All that writes a conversation as text goes through a `ChatTemplate`. An argument that changes what is written
is added to `TemplateArguments` and used in `ChatTemplate.render`: every script inherits the one and calls the
other. Nothing heavy is imported; a tokenizer is transformers' `PreTrainedTokenizerBase`, loaded elsewhere.
"""

import dataclasses
import datetime
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING

from common.cli import UserError, arg, existing_file
from common.messages import CALLS

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

NO_HEADER = (
    "the chat template ignores add_generation_prompt: it writes {0!r} in front of an answer and not behind a "
    "prompt, so the policy has to sample that first; give a template with --chat_template FILE"
)
GROUP = "the chat template"  # in --help
QUESTION, MARK = {"role": "user", "content": "a"}, "Zebra"
ROLES = ("system", "developer", "user", "assistant")  # of which a conversation without tools is made


def parse_date(text: str | None) -> datetime.date:
    """`YYYY-MM-DD`, or None for today, as a `datetime.date`."""
    try:
        return datetime.date.fromisoformat(text) if text else datetime.date.today()
    except (TypeError, ValueError):
        raise UserError(f"date {text!r}: a day as YYYY-MM-DD was expected") from None


def fixed_clock(date: str | None) -> Callable[[str], str]:
    """What a template calls as `strftime_now`: midnight of `date`, so that a run's prompts stay the same."""
    return datetime.datetime.combine(parse_date(date), datetime.time()).strftime


@dataclasses.dataclass(kw_only=True)
class TemplateArguments:
    """How a script's chat template is used."""

    chat_template: str | None = arg(
        None,
        "file with a jinja chat template to use instead of the model's own",
        shapes=False,  # by its content: it is an input of the manifest
        group=GROUP,
    )
    template_kwargs: dict = arg(
        {}, "variables for the template, JSON: '{\"enable_thinking\": false}'", group=GROUP
    )
    date: str | None = arg(
        None,
        "day for a template that writes today's, YYYY-MM-DD; None: that with which the answers were sampled, "
        "else of the first start",
        group=GROUP,
    )

    @classmethod
    def of(cls, values: Mapping) -> "TemplateArguments":
        """These arguments out of a mapping that holds others, too."""
        return cls(**{key: values[key] for key in cls.__dataclass_fields__.keys() & values.keys()})

    def check_template(self) -> None:
        """Refuse a file that is not there and a date that is none."""
        if self.chat_template:
            existing_file(self.chat_template, "chat template")
        parse_date(self.date)


class ChatTemplate:
    """The chat template of a tokenizer, used as a script's arguments say.

    Args:
        tokenizer: with the template in its `chat_template`; a file given by the arguments replaces it.
        args: the script's arguments, or None for the template as it is.

    Raises:
        UserError: the file is not there.
    """

    def __init__(self, tokenizer: "PreTrainedTokenizerBase", args: TemplateArguments | None = None):
        self.tokenizer, self.args = tokenizer, args or TemplateArguments()
        use_template(tokenizer, self.args.chat_template)

    def need(self) -> None:
        """Refuse a tokenizer that has no chat template: no prompt's fault."""
        name, templates = self.tokenizer.name_or_path, self.tokenizer.chat_template
        todo = "give one with --chat_template FILE"
        if not templates:
            raise UserError(f"the tokenizer of {name} has no chat template: {todo}")
        if isinstance(templates, dict) and "default" not in templates:
            raise UserError(
                f"{name} has the chat templates {', '.join(templates)} and none is the default: {todo}"
            )

    def render(
        self,
        messages: list[dict],
        generation_prompt: bool,
        tools: list[dict] | None = None,
        date: str | None = None,
    ) -> str:
        """The templated text.

        Args:
            messages: list of `{"role", "content", …}`.
            generation_prompt: whether the beginning of the assistant's turn is written behind them.
            tools: list of JSON schemas of functions that the assistant may call.
            date: the day that a template is given which asks for today's, YYYY-MM-DD; None is that of the
                arguments, else today.

        Raises:
            UserError: the tokenizer has no template, or the template refuses the messages (no system role,
                say).
        """
        self.need()
        given = {"strftime_now": fixed_clock(date or self.args.date)} | self.args.template_kwargs
        given |= {"tools": tools} if tools else {}
        try:
            return self.tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=generation_prompt, **given
            )
        except Exception as error:  # a template raises what it likes through jinja
            roles = ", ".join(message["role"] for message in messages)
            reason = " ".join(str(error).split())
            raise UserError(
                f"the chat template of {self.tokenizer.name_or_path} refuses the turns ({roles}): {reason}"
            ) from None

    def encode(
        self,
        messages: list[dict],
        generation_prompt: bool,
        tools: list[dict] | None = None,
        date: str | None = None,
    ) -> list[int]:
        """Token ids of the templated messages.

        The template writes BOS itself, so none is added: exactly what it says.
        """
        text = self.render(messages, generation_prompt, tools, date)
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    def writes_date(self) -> bool:
        """Whether it may ask for today's date; some do for a system turn or tools alone."""
        return "strftime_now" in str(self.tokenizer.chat_template)

    def left_out(
        self, messages: list[dict], generation_prompt: bool, tools: list[dict] | None = None
    ) -> list[str]:
        """What a template made without tools leaves out of a prompt, so that the model never sees it.

        In words: some of `tools`, `tool_calls`, `function_call`, `tool turns`.
        """
        parts = {"tools": (messages, None)} if tools else {}
        for key in CALLS:
            if any(message.get(key) for message in messages):
                parts[key] = ([{k: v for k, v in message.items() if k != key} for message in messages], tools)
        if any(message["role"] not in ROLES for message in messages):
            parts["tool turns"] = ([message for message in messages if message["role"] in ROLES], tools)
        whole, found = self.render(messages, generation_prompt, tools) if parts else "", []
        for part, (others, kept) in parts.items():
            try:
                if self.render(others, generation_prompt, kept) == whole:
                    found.append(part)
            except UserError:
                pass  # it is needed
        return found

    def _answered(self):
        """(turns of a question, these and the answer MARK as the template writes them)."""
        answer = {"role": "assistant", "content": MARK}
        system = {"role": "system", "content": "a"}  # some templates want one
        try:
            return [QUESTION], self.render([QUESTION, answer], False)
        except UserError as error:
            try:
                return [system, QUESTION], self.render([system, QUESTION, answer], False)
            except UserError:
                raise error from None

    def missing_header(self) -> str:
        """What a template writes in front of an assistant's text and not behind a prompt that asks for one.

        Empty for a sound template. Another one ignores `add_generation_prompt`: the policy would have to
        sample the header of its own turn.
        """
        try:
            turns, whole = self._answered()
            prompt = self.render(turns, True)
            silent = prompt == self.render(turns, False)
        except UserError:  # nobody asks it for these turns
            return ""
        if not silent or MARK not in whole or not whole.startswith(prompt):
            return ""
        return whole[len(prompt) : whole.rindex(MARK)].strip()

    def turn_suffix(self) -> list[int]:
        """Token ids that the template writes behind an assistant's text (Llama-3: `<|eot_id|>`)."""
        _, text = self._answered()
        if MARK not in text:
            raise UserError(
                f"the chat template of {self.tokenizer.name_or_path} leaves out the text of a turn (it may "
                "be for content in parts): give one for text with --chat_template FILE"
            )
        return self.tokenizer(text[text.rindex(MARK) + len(MARK) :], add_special_tokens=False)["input_ids"]

    def end_of_turn(self) -> int | None:
        """The token with which the template closes an assistant's turn; None where the next turn's role does.

        It is the last token that a policy samples; what the template writes behind it (ChatML's newline) is
        not. White space that is an added token (Gemma's line breaks) closes nothing: answers are full of it.
        """
        added = {i for i, token in self.tokenizer.added_tokens_decoder.items() if token.content.strip()}
        special = added.union(self.tokenizer.all_special_ids)
        return next((token for token in self.turn_suffix() if token in special), None)

    def stop_token_ids(
        self, generation_eos: int | list[int] | None = None, extra: Iterable[int] = ()
    ) -> list[int]:
        """Sorted ids that end a response: of generation config, tokenizer, template, and `extra`."""
        generation_eos = generation_eos if isinstance(generation_eos, (list, tuple)) else [generation_eos]
        found = (*generation_eos, self.tokenizer.eos_token_id, self.end_of_turn(), *extra)
        return sorted({int(token) for token in found if token is not None})


def use_template(tokenizer: "PreTrainedTokenizerBase", path: str | None) -> None:
    """Replace the tokenizer's chat template by the jinja text in the file `path` (None: leave it)."""
    if path:
        tokenizer.chat_template = existing_file(path, "chat template").read_text(encoding="utf-8")


def added_specials(tokenizer: "PreTrainedTokenizerBase") -> tuple[list[int], list[int]]:
    """(ids in front, ids behind) that the tokenizer adds to a text by itself: BOS or CLS, and EOS or SEP."""
    bare, whole = (tokenizer("a", add_special_tokens=added)["input_ids"] for added in (False, True))
    at = next((i for i in range(len(whole) - len(bare) + 1) if whole[i : i + len(bare)] == bare), 0)
    return whole[:at], whole[at + len(bare) :]


def encode_for_classifier(
    tokenizer: "PreTrainedTokenizerBase", text: str, added: tuple[list, list] | None = None
) -> list[int]:
    """Token ids of a templated text as a reward model reads it.

    They are what the template says, and what the tokenizer adds to a text by itself where the template did
    not write it. A second BOS in front is left out: some templates write one too many.

    Args:
        text: of `render`, with whatever BOS the template wrote.
        added: `added_specials(tokenizer)`, where it is known.
    """
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    front, behind = added or added_specials(tokenizer)
    written = "".join(tokenizer.convert_ids_to_tokens(front))
    if ids[: len(front)] != front and not text.lstrip().startswith(written):
        ids = front + ids
    if behind and ids[-len(behind) :] != behind:
        ids = ids + behind
    while len(ids) > 1 and ids[0] == ids[1] == tokenizer.bos_token_id:
        ids = ids[1:]
    return ids


def literal_specials(tokenizer: "PreTrainedTokenizerBase") -> list[str]:
    """The strings that tokenise as special tokens."""
    return [token for token in tokenizer.all_special_tokens if token.strip()]
