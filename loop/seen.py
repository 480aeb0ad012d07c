"""Wait until this machine sees what another one has made; for runs on several machines.

    python loop/seen.py FILE…             what the driver sees, asked by a task on its machine (loop/task.sh)
    python loop/seen.py --made OUTPUT…    what a command was to make, asked by the driver (loop/launch.sh)

All machines share a file system, but each remembers for a while that a name was not there, or what was in a
folder. So nothing that one machine reads of another's is opened before this has seen it.
"""

import os
import sys
from collections.abc import Iterable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common.cli import UserError, run
from common.files import UNSEEN, in_time
from common.manifest import beside, fingerprint, read_manifest


def unseen(paths: Iterable[Path]) -> list[Path]:
    """Those that are not found by their name, or are not in the list of their folder: a machine may remember
    either.
    """
    listed, found = {}, []
    for path in paths:
        folder, there = path.parent, path.exists()
        if there and folder not in listed:
            try:
                listed[folder] = {"", "..", *os.listdir(folder)}
            except PermissionError:  # it may be passed through
                listed[folder] = None
        if not there or listed[folder] is not None and path.name not in listed[folder]:
            found.append(path)
    return found


def with_its_own(output: Path) -> list[Path]:
    """An output, and what its folder lists of the same name: manifest, skipped, summary."""
    own = beside(output, ".")
    return [output, *(file for file in output.parent.glob("*") if file.name.startswith(own.name))]


def is_whole(output: Path) -> bool:
    """Whether an output has the size that its manifest tells; one without a manifest has any."""
    try:
        manifest = read_manifest(output)
        now = fingerprint(output, checksum=False)
    except (UserError, OSError):  # a part of it, or a file that is just removed
        return False
    if manifest is None:
        return True
    return bool(manifest.get("complete")) and now.get("size") == manifest.get("output", now).get("size")


def main():
    made, paths = sys.argv[1] == "--made", [Path(path) for path in sys.argv[1:] if path != "--made"]

    def absent() -> list[Path]:
        return unseen(file for path in paths for file in with_its_own(path)) if made else unseen(paths)

    in_time(lambda: not absent() and (not made or all(map(is_whole, paths))))
    if missing := absent():
        raise UserError(
            f"{os.uname().nodename} does not see {missing[0]}, which another machine has made, in {UNSEEN} "
            "s: all machines must share the file system of the run"
        )


if __name__ == "__main__":
    run(main)
