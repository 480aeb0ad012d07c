"""What a run's settings hold and others are not to see: passwords and tokens, hidden before a page or a
tracker shows them, and the folders of this machine, shortened before anything is published.
"""

import re
from pathlib import Path

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


PATH = re.compile(  # an address of the web, which stays, or else a path from a root, a home or a folder here
    r"(?P<web>(?!file:)\b\w+://[^\s'\"]+)|(?<![\w./~])(?:file://|~|\.{1,2})?/(?:[^\s/'\",;]+/)*(?P<last>[^\s/'\",;]*)"
)


def without_folders(value: object) -> object:
    """Settings, or a text, whose paths of this machine are cut to their last part, in lists and dicts too."""
    if isinstance(value, dict):
        return {without_folders(name): without_folders(one) for name, one in value.items()}
    if isinstance(value, list):
        return [without_folders(one) for one in value]
    if not isinstance(value, str) or "/" not in value:
        return value
    if len(value) < 1000 and "\n" not in value and is_here(value):
        return Path(value).name
    return PATH.sub(lambda found: found["web"] or found["last"], value)


def is_here(name: str) -> bool:
    """Whether a name is that of a file or folder here; `FILE.py:FUNCTION` counts, too."""
    return Path(name).exists() or Path(name.rpartition(":")[0] or "-").exists()
