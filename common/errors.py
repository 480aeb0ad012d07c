"""Errors that a person can act on, and how a script ends: `run` turns a `UserError` into one line on stderr
and exit status 2. The standard library suffices.
"""

import errno
import os
import re
import signal
import sys
import time
from collections.abc import Callable

from common import packages

ERROR_SECONDS = 15  # that other ranks wait for rank 0 to print the error
NO_ROOM = (errno.EFBIG, errno.ENOSPC, errno.EDQUOT)
# The same in the words of libraries that wrap what the system says (safetensors, torch.save).
NO_ROOM_TEXTS = (
    r"os error (27|28|122)\b|No space left on device|File too large|PytorchStreamWriter failed writing file"
    r"|unexpected pos \d+ vs"
)


class UserError(Exception):
    """What is wrong and what to do, a line for each of `problems`; shown without a traceback."""

    def __init__(self, *problems):
        super().__init__("\nerror: ".join(problems))
        self.problems = list(problems)


def refuse(problems: list[str]) -> None:
    """Raise what is wrong, all at once; nothing where there is nothing."""
    if problems:
        raise UserError(*problems)


def one_line(error: BaseException, limit: int = 300) -> str:
    """An error of a library in one line: its kind, and the beginning of what it says."""
    text = " ".join(str(error).split())[:limit]
    # transformers points at a report above, which the scripts do not show
    if "ignore_mismatched_sizes" in text:
        text = "its weights have other shapes than its config.json says"
    return f"{type(error).__name__}: {text}"


def count(number: int, one: str, many: str | None = None) -> str:
    """`1 response`, `2 responses`, `0 processes`."""
    if many is None:
        many = f"{one}es" if one.endswith(("s", "x", "ch", "sh")) else f"{one}s"
    return f"{number} {one if number == 1 else many}"


def no_room(error: BaseException) -> str | None:
    """What could not be read or written, in words; None for an error that is none of the file system's."""
    if isinstance(error, OSError) and error.errno is not None and (error.filename or error.errno in NO_ROOM):
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    text = " ".join(str(error).split())
    if re.search(NO_ROOM_TEXTS, text):
        return f"the disk is full or a size limit is reached ({type(error).__name__}: {text[:200]})"
    return None


def _line(error):
    """What a person is told of a UserError or an ImportError; None for one that is a bug."""
    missing = packages.missing_packages(error)
    lacks = f"; {sys.executable} lacks a package: {missing}" if missing else ""
    module = error.name or "" if isinstance(error, ModuleNotFoundError) else ""
    if module.partition(".")[0] in packages.REQUIRED:
        return (
            f"{sys.executable} has no package {module}: switch to the script's environment first "
            "(source envs.sh; use_env vllm to generate and annotate, rlhflow to train and report)"
        )
    if isinstance(error, UserError):
        return str(error) + ("" if "pip install" in str(error) else lacks)
    return " ".join(str(error).split())[:300] + lacks if missing else None


def run(main: Callable) -> None:
    """Call `main()` and exit: 0 when it returns, 2 with one line for a UserError, 130 for Ctrl-C.

    Under a launcher rank 0 prints the line (every rank meets the same error). The launcher ends all ranks as
    soon as one has ended, so the others wait for it; one that is still there after ERROR_SECONDS has an error
    of its own, and tells it.
    """
    rank_zero = os.environ.get("RANK", "0") == "0"
    if hasattr(sys.stdout, "reconfigure"):  # as stderr: a file's name or a log may hold what is no text
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        main()
    except (UserError, ImportError) as error:
        line = _line(error)
        if line is None:
            raise
        if not rank_zero:
            time.sleep(ERROR_SECONDS)
        print(f"error: {line}", file=sys.stderr, flush=True)
        sys.exit(2)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(128 + signal.SIGPIPE)
    except Exception as error:
        where = no_room(error)
        if where is None:
            raise
        # By any rank: only the one that writes there meets it.
        hint = "what is on disk is kept, start the same command again after mending it"
        print(f"error: {where}; {hint}", file=sys.stderr, flush=True)
        sys.exit(2)
    except KeyboardInterrupt:
        if rank_zero:
            print("stopped; start the same command again to continue", file=sys.stderr, flush=True)
        sys.exit(130)
