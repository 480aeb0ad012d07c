"""What a chat template does to messages: token ids, stop tokens, literal special tokens.

Every function takes a loaded tokenizer (transformers' `PreTrainedTokenizerBase`), so nothing heavy is imported here.
"""

from common.cli import UserError
from common.messages import CALLS

ROLES = ("system", "developer", "user", "assistant")  # of which a conversation without tools is made


def need_template(tokenizer):
    """Refuse a tokenizer that has no chat template: no prompt's fault."""
    if tokenizer.chat_template is None:
        raise UserError(f"the tokenizer of {tokenizer.name_or_path} has no chat template: give one with --chat_template FILE")


def render(tokenizer, messages, generation_prompt, template_kwargs=None, tools=None):
    """The templated text. `messages` is a list of `{"role", "content", …}`, `tools` a list of JSON schemas.

    Raises:
        UserError: the tokenizer has no template, or the template refuses the messages (no system role, say).
    """
    need_template(tokenizer)
    given = (template_kwargs or {}) | ({"tools": tools} if tools else {})
    try:
        return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=generation_prompt, **given)
    except Exception as error:  # a template raises what it likes through jinja
        roles = ", ".join(message["role"] for message in messages)
        reason = " ".join(str(error).split())
        raise UserError(f"the chat template of {tokenizer.name_or_path} refuses the turns ({roles}): {reason}") from None


def encode(tokenizer, messages, generation_prompt, template_kwargs=None, tools=None):
    """Token ids of the templated messages. The template writes BOS itself, so none is added: exactly what it says."""
    text = render(tokenizer, messages, generation_prompt, template_kwargs, tools)
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def left_out(tokenizer, messages, generation_prompt, template_kwargs=None, tools=None):
    """What the template leaves out of a prompt's tools, in words: some of `tools`, `tool_calls`, `function_call`, `tool turns`.

    A template that was made without tools takes no notice of them, and the model is asked about calls that it never sees.
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


def use_template(tokenizer, path):
    """Replace the tokenizer's chat template by the jinja text in the file `path` (None: leave it)."""
    if path:
        from common.cli import existing_file

        tokenizer.chat_template = existing_file(path, "chat template").read_text(encoding="utf-8")


def turn_suffix(tokenizer, template_kwargs=None):
    """Token ids that the template writes behind an assistant's text (Llama-3: `<|eot_id|>`; ChatML: `<|im_end|>\\n`)."""
    mark = "Zebra"
    text = render(tokenizer, [{"role": "user", "content": "a"}, {"role": "assistant", "content": mark}], False, template_kwargs)
    return tokenizer(text[text.rindex(mark) + len(mark) :], add_special_tokens=False)["input_ids"]


def stop_token_ids(tokenizer, generation_eos=None, extra=()):
    """Sorted ids that end a response: the generation config's, the tokenizer's EOS, the template's end of turn, `extra`."""
    generation_eos = generation_eos if isinstance(generation_eos, (list, tuple)) else [generation_eos]
    suffix = turn_suffix(tokenizer)
    special = set(tokenizer.all_special_ids)
    end_of_turn = [token for token in suffix[:1] if token in special or token in tokenizer.added_tokens_decoder]
    return sorted({int(t) for t in [*generation_eos, tokenizer.eos_token_id, *end_of_turn, *extra] if t is not None})


def literal_specials(tokenizer):
    """The strings that tokenise as special tokens; a user's message that holds one is counted, never searched for."""
    return [token for token in tokenizer.all_special_tokens if token.strip()]
