"""What a chat template does to messages: token ids, stop tokens, literal special tokens.

Every function takes a loaded tokenizer (transformers' `PreTrainedTokenizerBase`), so nothing heavy is
imported here.
"""

import datetime
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

from common.cli import UserError
from common.messages import CALLS

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

NO_HEADER = (
    "the chat template ignores add_generation_prompt: it writes {0!r} in front of an answer and not behind a "
    "prompt, so the policy has to sample that first; give a template with --chat_template FILE"
)
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


def need_template(tokenizer: "PreTrainedTokenizerBase") -> None:
    """Refuse a tokenizer that has no chat template: no prompt's fault."""
    name, templates = tokenizer.name_or_path, tokenizer.chat_template
    todo = "give one with --chat_template FILE"
    if not templates:
        raise UserError(f"the tokenizer of {name} has no chat template: {todo}")
    if isinstance(templates, dict) and "default" not in templates:
        raise UserError(
            f"{name} has the chat templates {', '.join(templates)} and none is the default: {todo}"
        )


def render(
    tokenizer: "PreTrainedTokenizerBase",
    messages: list[dict],
    generation_prompt: bool,
    template_kwargs: dict | None = None,
    tools: list[dict] | None = None,
    date: str | None = None,
) -> str:
    """The templated text.

    Args:
        messages: list of `{"role", "content", …}`.
        generation_prompt: whether the beginning of the assistant's turn is written behind them.
        template_kwargs: variables for the template.
        tools: list of JSON schemas of functions that the assistant may call.
        date: the day that a template is given which asks for today's, YYYY-MM-DD; None is today.

    Raises:
        UserError: the tokenizer has no template, or the template refuses the messages (no system role, say).
    """
    need_template(tokenizer)
    given = {"strftime_now": fixed_clock(date)} | (template_kwargs or {})
    given |= {"tools": tools} if tools else {}
    try:
        return tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=generation_prompt, **given
        )
    except Exception as error:  # a template raises what it likes through jinja
        roles = ", ".join(message["role"] for message in messages)
        reason = " ".join(str(error).split())
        raise UserError(
            f"the chat template of {tokenizer.name_or_path} refuses the turns ({roles}): {reason}"
        ) from None


def encode(
    tokenizer: "PreTrainedTokenizerBase",
    messages: list[dict],
    generation_prompt: bool,
    template_kwargs: dict | None = None,
    tools: list[dict] | None = None,
    date: str | None = None,
) -> list[int]:
    """Token ids of the templated messages.

    The template writes BOS itself, so none is added: exactly what it says.
    """
    text = render(tokenizer, messages, generation_prompt, template_kwargs, tools, date)
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def writes_date(tokenizer: "PreTrainedTokenizerBase") -> bool:
    """Whether the template may ask for today's date; some do for a system turn or tools alone."""
    return "strftime_now" in str(tokenizer.chat_template)


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


def left_out(
    tokenizer: "PreTrainedTokenizerBase",
    messages: list[dict],
    generation_prompt: bool,
    template_kwargs: dict | None = None,
    tools: list[dict] | None = None,
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
    whole, found = render(tokenizer, messages, generation_prompt, template_kwargs, tools) if parts else "", []
    for part, (others, kept) in parts.items():
        try:
            if render(tokenizer, others, generation_prompt, template_kwargs, kept) == whole:
                found.append(part)
        except UserError:
            pass  # it is needed
    return found


def use_template(tokenizer: "PreTrainedTokenizerBase", path: str | None) -> None:
    """Replace the tokenizer's chat template by the jinja text in the file `path` (None: leave it)."""
    if path:
        from common.cli import existing_file

        tokenizer.chat_template = existing_file(path, "chat template").read_text(encoding="utf-8")


QUESTION, MARK = {"role": "user", "content": "a"}, "Zebra"


def _answered(tokenizer, template_kwargs):
    """(turns of a question, these and the answer MARK as the template writes them)."""
    answer = {"role": "assistant", "content": MARK}
    system = {"role": "system", "content": "a"}  # some templates want one
    try:
        return [QUESTION], render(tokenizer, [QUESTION, answer], False, template_kwargs)
    except UserError as error:
        try:
            return [system, QUESTION], render(tokenizer, [system, QUESTION, answer], False, template_kwargs)
        except UserError:
            raise error from None


def missing_header(tokenizer: "PreTrainedTokenizerBase", template_kwargs: dict | None = None) -> str:
    """What a template writes in front of an assistant's text and not behind a prompt that asks for one.

    Empty for a sound template. Another one ignores `add_generation_prompt`: the policy would have to sample
    the header of its own turn.
    """
    try:
        turns, whole = _answered(tokenizer, template_kwargs)
        prompt = render(tokenizer, turns, True, template_kwargs)
        silent = prompt == render(tokenizer, turns, False, template_kwargs)
    except UserError:  # nobody asks it for these turns
        return ""
    if not silent or MARK not in whole or not whole.startswith(prompt):
        return ""
    return whole[len(prompt) : whole.rindex(MARK)].strip()


def turn_suffix(tokenizer: "PreTrainedTokenizerBase", template_kwargs: dict | None = None) -> list[int]:
    """Token ids that the template writes behind an assistant's text (Llama-3: `<|eot_id|>`)."""
    _, text = _answered(tokenizer, template_kwargs)
    if MARK not in text:
        raise UserError(
            f"the chat template of {tokenizer.name_or_path} leaves out the text of a turn (it may be for "
            "content in parts): give one for text with --chat_template FILE"
        )
    return tokenizer(text[text.rindex(MARK) + len(MARK) :], add_special_tokens=False)["input_ids"]


def end_of_turn(tokenizer: "PreTrainedTokenizerBase", template_kwargs: dict | None = None) -> int | None:
    """The token with which the template closes an assistant's turn; None where the next turn's role does.

    It is the last token that a policy samples; what the template writes behind it (ChatML's newline) is not.
    White space that is an added token (Gemma's line breaks) closes nothing: answers are full of it.
    """
    added = {i for i, token in tokenizer.added_tokens_decoder.items() if token.content.strip()}
    special = added.union(tokenizer.all_special_ids)
    return next((token for token in turn_suffix(tokenizer, template_kwargs) if token in special), None)


def stop_token_ids(
    tokenizer: "PreTrainedTokenizerBase",
    generation_eos: int | list[int] | None = None,
    extra: Iterable[int] = (),
    template_kwargs: dict | None = None,
) -> list[int]:
    """Sorted ids that end a response: of generation config, tokenizer, the template's turn, and `extra`."""
    generation_eos = generation_eos if isinstance(generation_eos, (list, tuple)) else [generation_eos]
    found = (*generation_eos, tokenizer.eos_token_id, end_of_turn(tokenizer, template_kwargs), *extra)
    return sorted({int(token) for token in found if token is not None})


def literal_specials(tokenizer: "PreTrainedTokenizerBase") -> list[str]:
    """The strings that tokenise as special tokens."""
    return [token for token in tokenizer.all_special_tokens if token.strip()]
