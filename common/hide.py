"""Passwords and tokens in a run's settings: hidden before a page or a tracker shows them."""

import re

HIDDEN = "(hidden)"
# Whole words of a key; `pad_token` and `max_new_tokens` are none.
KEY = re.compile(
    r"(?i)^token$|(?:^|[_.-])(?:password|passwd|secret|credentials?|api_?key|access_?key"
    r"|(?:hf|hub|api|access|auth|bearer|github|wandb)_?token)$"
)
VALUE = re.compile(
    # of hubs and clouds, by how they begin
    r"\b(?:hf_|sk-|gh[opsur]_|github_pat_|glpat-|xox[abprs]-)[\w-]{16,}|\bAKIA[0-9A-Z]{16}\b"
    r"|(?<=://)[^/\s:@]+:[^/\s@]+(?=@)"  # https://name:password@host
    r"|(?i:(?<=token=)|(?<=password=)|(?<=secret=)|(?<=key=)|(?<=bearer ))[^\s;&|]+"  # export WANDB_API_KEY=…
)


def hidden(value: object, key: str = "") -> object:
    """Settings, or a text, without what looks like a password or token: by the name of its key, or by how it
    looks.
    """
    if isinstance(value, dict):
        return {name: hidden(one, str(name)) for name, one in value.items()}
    if isinstance(value, list):
        return [hidden(one, key) for one in value]
    if isinstance(value, str) and value:
        return HIDDEN if KEY.search(key) else VALUE.sub(HIDDEN, value)
    return value
