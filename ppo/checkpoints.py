"""What train_ppo.py keeps on disk while it trains: the lock of its output, and checkpoints from which a killed run continues."""

import fcntl
import json
import os
import pickle
import shutil
from pathlib import Path

from common.cli import UserError
from common.manifest import beside, write_json
from dpo_iteration.output import checkpoints, is_main, remove_checkpoints, say


def lock_output(args):
    """The open lock file of the output, which rank 0 holds until the end."""
    folder = Path(args.output_dir)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = open(beside(folder, ".lock"), "w")
    except OSError as error:
        raise UserError(f"cannot write {folder}: {error.strerror}; give another --output_dir") from None
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        raise UserError(f"another process is training into {folder}; wait for it or stop it first") from None
    return lock


def save(ppo):
    """Write all that a later start needs, beside its place, and rename. No random state is among it: seeds go by rollout.

    Args:
        ppo: train_ppo.PPO; `learners` (models, optimizers, schedules), `done` (rollouts) and `kl_coef` are its state.
    """
    import torch

    folder, new = Path(ppo.args.output_dir), Path(ppo.args.output_dir, ".saving")
    if is_main():
        shutil.rmtree(new, ignore_errors=True)
        new.mkdir()
        state = {name: [part.state_dict() for part in learner] for name, learner in ppo.learners.items()}
        torch.save(state, new / "state.pt")
        write_json(new / "trainer_state.json", {"rollout": ppo.done, "kl_coef": ppo.kl_coef})
        for path in new.iterdir():
            with open(path, "rb") as file:
                os.fsync(file.fileno())
        place = folder / f"checkpoint-{ppo.done}"
        shutil.rmtree(place, ignore_errors=True)  # one that could not be read
        os.rename(new, place)
        remove_checkpoints(checkpoints(folder)[: -ppo.args.save_total_limit])
    ppo.accelerator.wait_for_everyone()


def restore(ppo):
    """Go on from the last checkpoint that can be read, if there is one.

    Raises:
        UserError: there are some, and none can be read: to begin anew is for the user to say.
    """
    import torch

    saved, reason = checkpoints(ppo.args.output_dir), None
    for folder in reversed(saved):
        try:
            told = json.loads((folder / "trainer_state.json").read_text(encoding="utf-8"))
            state = torch.load(folder / "state.pt", map_location="cpu", weights_only=True)
            done, kl_coef = told["rollout"], told["kl_coef"]
            parts = [(part, values) for name, learner in ppo.learners.items() for part, values in zip(learner, state[name], strict=True)]
        except (OSError, EOFError, KeyError, ValueError, RuntimeError, pickle.UnpicklingError) as error:
            reason = f"{folder} cannot be read ({type(error).__name__}: {' '.join(str(error).split())[:120]})"
            say(f"note: {reason}")
            continue
        say(f"continuing from {folder}")
        ppo.done, ppo.kl_coef = done, kl_coef
        for part, values in parts:
            part.load_state_dict(values)
        return
    if saved:
        raise UserError(f"{reason}, nor is there an older one that can; mend it, or begin anew with --overwrite true")


def read_log(path, rollouts):
    """The log's entries of the first `rollouts` rollouts, up to a line that was torn (a machine that lost its power)."""
    entries = []
    for line in path.read_text(encoding="utf-8", errors="replace").split("\n")[:rollouts] if path.exists() else []:
        try:
            entries.append(json.loads(line))
        except ValueError:
            break
    return entries
