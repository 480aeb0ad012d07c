"""A lock on an output while a process works at it. `common/lock.sh` is the same for bash."""

import errno
import fcntl
import functools
import io
import os
import weakref
from pathlib import Path

from common.cli import UserError

BUSY = (errno.EWOULDBLOCK, errno.EAGAIN, errno.EACCES)
_held = weakref.WeakSet()


def _let_go():
    for file in _held:
        file.close()


# A forked process (vLLM's engine, a dataloader's worker) would hold the lock beyond the death of the one that
# took it.
os.register_at_fork(after_in_child=_let_go)


def hold(path: str | Path, doing: str, wait: bool = False) -> io.FileIO:
    """Open and lock `path`, a file that nothing is written to through the handle which is returned.

    The lock lasts until that handle is closed or forgotten, or this process ends. Some file systems refuse
    locks (Lustre mounted without `-o flock`, NFS without its lock service): that is no other process, so the
    work goes on with one note.

    Args:
        doing: what another process that has the lock is doing, for the error: `writing data.jsonl`.
        wait: until the other process has ended, in place of the error.

    Raises:
        UserError: another process has the lock.
        OSError: `path` cannot be opened.
    """
    file = open(path, "ab", buffering=0)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except OSError as error:
        if error.errno in BUSY:
            file.close()
            raise UserError(f"another process is {doing}; wait for it or stop it first") from None
        _note(str(Path(path).absolute().parent), error.strerror)
    _held.add(file)
    return file


@functools.cache
def _note(folder, reason):
    print(
        f"note: the file system of {folder} refuses locks ({reason}): nothing will stop a second process "
        "there",
        flush=True,
    )
