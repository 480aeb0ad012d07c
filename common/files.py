"""Files that a person names: what may have been meant where there is none, and YAML, whose mistakes are told
with their place.
"""

import difflib
import os
import time
from collections.abc import Callable, Hashable, Iterable
from pathlib import Path

from common.errors import UserError

# seconds for which an NFS client may not see what another machine has written: a name that it once missed
# stays missing for 30 to 60, and listing the folder or opening the file does not help
UNSEEN = 90


def nearest(word: str, known: Iterable[str], lead: str = "") -> str:
    """`, did you mean …?` for the nearest known word, whatever its case, or the empty string; `lead` is put
    in front of it.
    """
    names = {name.casefold(): name for name in known}
    close = difflib.get_close_matches(word.casefold(), list(names), n=1, cutoff=0.5)
    return f", did you mean {lead + names[close[0]]!r}?" if close else ""


def existing_file(path: str | Path, what: str = "file", besides: Iterable[str | Path] = ()) -> Path:
    """`path` as a Path if it is a file; otherwise an error that offers what may have been meant.

    That is a file of the same name in a folder beside, else one of a like name in its folder, else the
    folder's files of its kind. `besides` are files that cannot be meant: they have another part already.
    """
    path = Path(path)
    if path.is_file():
        return path
    if path.is_dir():
        raise UserError(f"{what} {path} is a folder, a file was expected")
    taken = {Path(name).resolve() for name in besides}
    around = sorted(path.parent.parent.iterdir()) if path.parent.parent.is_dir() else []
    # ./config/x.yaml for ./configs/x.yaml
    folders = [f for f in dict.fromkeys([path.parent, *around]) if f.is_dir()]
    files = [f for folder in folders for f in sorted(folder.iterdir()) if f.is_file()]
    files = [f for f in files if f.resolve() not in taken]
    named = sorted((f for f in files if f.stem == path.stem), key=lambda f: f.name != path.name)
    own = {f.stem: f for f in files if f.parent == path.parent and path.suffix in ("", f.suffix)}
    alike = difflib.get_close_matches(path.stem, list(own), n=1, cutoff=0.6)
    near = named[:1] or [own[stem] for stem in alike] or list(own.values())[:5]
    there = f"; there {'is' if len(near) == 1 else 'are'} {', '.join(map(str, near))}" if near else ""
    raise UserError(f"no such {what}: {path}{there}")


def in_time(there: Callable[[], bool]) -> bool:
    """Whether `there()` holds; where other machines work at the same files, whether it comes to hold within
    `UNSEEN` seconds.
    """
    several = int(os.environ.get("RLHF_MACHINES", "1")) > 1  # the loop's word, and torchrun's:
    several |= int(os.environ.get("WORLD_SIZE", "1")) > int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    until = time.monotonic() + (UNSEEN if several else 0)
    while not (found := there()) and time.monotonic() < until:
        time.sleep(1)
    return found


def read_yaml(path: str | Path, what: str = "YAML file") -> dict:
    """The mapping in a YAML file; anything else is an error with the place in the file."""
    import yaml

    path = existing_file(path, what)
    try:
        values = load_yaml(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from None
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise UserError(f"{path} must hold `key: value` lines, it holds a {type(values).__name__}")
    return values


def load_yaml(text: str) -> object:
    """As `yaml.safe_load`, but a key that is given twice is a YAMLError with both lines."""
    import yaml

    class Loader(getattr(yaml, "CSafeLoader", yaml.SafeLoader)):  # in C, where it was built
        def construct_mapping(self, node: yaml.Node, deep: bool = False) -> dict:
            seen = {}
            for key, _ in node.value if isinstance(node, yaml.MappingNode) else ():
                if key.tag == "tag:yaml.org,2002:merge":  # `<<: *defaults`: the mapping's own keys are to win
                    continue
                name, line = self.construct_object(key, deep=True), key.start_mark.line + 1
                if isinstance(name, Hashable):
                    if name in seen:
                        lines = f"in lines {seen[name]} and {line}"
                        raise yaml.YAMLError(f"{name!r} is given twice, {lines}: keep one of them")
                    seen[name] = line
            return super().construct_mapping(node, deep)

    return yaml.load(text, Loader)
