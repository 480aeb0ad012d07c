"""A model in training: who works at it, what a killed run goes on from, whether it is finished.

    OUTPUT_DIR/                        the model
    OUTPUT_DIR/checkpoint-N/           states to continue from; `trainer_state.json` is written last
    OUTPUT_DIR.manifest.json           what it is made from; `"complete": true` once the model is whole
    OUTPUT_DIR.lock                    held while a process trains into OUTPUT_DIR

DPO and both PPOs use it. Under a launcher, rank 0 writes and the others read.
"""

import contextlib
import json
import os
import shutil
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from common import locks
from common.cli import UserError
from common.manifest import beside, difference, fingerprint, read_manifest, versions, write_json


def world_size() -> int:
    """Number of processes that the launcher started."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_main() -> bool:
    """Whether this is rank 0, which writes and speaks for all."""
    return os.environ.get("RANK", "0") == "0"


def say(text: str):
    """Print on rank 0."""
    if is_main():
        print(text, flush=True)


def checkpoints(folder: str | Path) -> list[Path]:
    """Whole checkpoints, oldest first: `trainer_state.json` is written after weights and optimizer."""
    found = [f.parent for f in Path(folder).glob("checkpoint-*/trainer_state.json") if _is_whole(f)]
    return sorted(found, key=step_of)


def step_of(checkpoint: Path) -> int:
    """The step (of PPO: the rollout) after which a checkpoint was saved."""
    return int(checkpoint.name.split("-")[1])


def _is_whole(path: Path) -> bool:
    try:
        return isinstance(json.loads(path.read_text(encoding="utf-8")), dict)
    except ValueError:
        return False


def remove_checkpoints(folders: Iterable[Path]):
    """Remove checkpoints; one that is killed halfway does not look whole."""
    for folder in list(folders):
        (folder / "trainer_state.json").unlink(missing_ok=True)
        shutil.rmtree(folder)


@dataclass
class Training:
    """The output of a training.

    Args:
        folder: OUTPUT_DIR.
        script: its name, for the manifest.
        settings: JSON values that shape the model.
        inputs: name → path or hub name of what is read, or None.
        overwrite: start again, whatever is there.
        checkpoint_settings: JSON values that a checkpoint cannot be continued with others of (the number of
            processes, whose optimizer states it holds); a finished model does not depend on them.
        find_checkpoints: function that lists whole checkpoints, oldest first; None: those in `folder`.
        otherwise: what to do where other settings made what is there, for messages.
    """

    folder: str | Path
    script: str
    settings: dict
    inputs: dict
    overwrite: bool = False
    checkpoint_settings: dict | None = None
    find_checkpoints: Callable[[], list[Path]] | None = None
    otherwise: str = "choose another --output_dir or give --overwrite"

    def __post_init__(self):
        self.folder = Path(self.folder)

    def checkpoints(self) -> list[Path]:
        """Whole checkpoints, oldest first."""
        return self.find_checkpoints() if self.find_checkpoints else checkpoints(self.folder)

    def is_complete(self) -> bool:
        """Whether the model is there, made from these settings and inputs.

        Raises:
            UserError: a model or checkpoints are there that were made from others, or nobody knows how.
        """
        folder, saved = self.folder, self.checkpoints()
        if folder.exists() and not folder.is_dir():
            raise UserError(f"--output_dir {folder} is a file, a folder was expected")
        there = folder.is_dir() and any(folder.iterdir())
        if self.overwrite or not (there or saved):
            return False
        manifest = read_manifest(folder)
        if manifest is None:
            what = folder if there else saved[-1]
            raise UserError(
                f"{what} has no manifest, so it is not known how it was made; move it or give --overwrite"
            )
        has_weights = (folder / "config.json").is_file() and any(folder.glob("*.safetensors"))
        complete = bool(manifest.get("complete")) and has_weights
        if not complete and not saved:
            return False
        changed = difference(manifest, self.settings, self.inputs)
        if not changed and not complete:
            changed = self._changed_for_checkpoints(manifest)
        if changed:
            state = "complete" if complete else "half done"
            raise UserError(f"{folder} is {state} with other settings: {changed}; {self.otherwise}")
        return complete

    def _changed_for_checkpoints(self, manifest: dict) -> str | None:
        for key, now in (self.checkpoint_settings or {}).items():
            if (was := manifest.get(key, now)) != now:
                return f"{key} was {was} and is now {now}, and checkpoints cannot be converted"
        return None

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Keep other processes from training into the folder while the block runs. All ranks call it.

        The folder is made. A block that ends well removes the lock's file; after an error it stays and means
        nothing.

        Raises:
            UserError: another process trains into it, has finished it meanwhile, or it cannot be written.
        """
        if not is_main():
            yield
            return
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            lock = locks.hold(beside(self.folder, ".lock"), f"training into {self.folder}")
        except OSError as error:
            raise UserError(
                f"cannot write {self.folder}: {error.strerror}; give another --output_dir"
            ) from None
        with lock:
            if self.is_complete():
                raise UserError(f"another process has finished {self.folder}; there is nothing left to do")
            yield
            Path(lock.name).unlink(missing_ok=True)  # without locks another process may have ended, too

    def begin(self, **more: object):
        """Write the manifest of an unfinished model, and with `overwrite` remove the checkpoints. On rank 0.

        Args:
            more: further entries of the manifest.
        """
        if self.overwrite:
            remove_checkpoints(self.folder.glob("checkpoint-*"))
        marks = {key: fingerprint(name) for key, name in self.inputs.items() if name is not None}
        manifest = {"script": self.script, "complete": False, "settings": self.settings, "inputs": marks}
        write_json(self.manifest_path, manifest | (self.checkpoint_settings or {}) | more)

    def finish(self, keep_checkpoints: bool = False, **more: object):
        """Complete the manifest of the model that is now in the folder, then remove checkpoints. On rank 0.

        In this order: were they removed first, a kill in between would cost the whole run.

        Args:
            more: further entries of the manifest (counts, metrics, seconds).
        """
        done = {
            "complete": True,
            "finished": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "versions": versions(),
            "output": fingerprint(self.folder),
        }
        write_json(self.manifest_path, read_manifest(self.folder) | done | more)
        if not keep_checkpoints:
            remove_checkpoints(self.folder.glob("checkpoint-*"))

    @property
    def manifest_path(self) -> Path:
        return beside(self.folder, ".manifest.json")
