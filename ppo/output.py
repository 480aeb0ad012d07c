"""What train_ppo.py writes: checkpoints from which a killed run continues, a log, and the model.

The manifest and what counts as complete are those of common/training.py.
"""

import json
import os
import pickle
import shutil
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

from common import trackers
from common.cli import UserError, one_line
from common.manifest import beside, write_json, write_jsonl
from common.progress import Progress, duration
from common.records import as_json, dumps, finite
from common.training import Training, checkpoints, is_main, remove_checkpoints, say, world_size
from dpo_iteration.saved import check_saved, copy_companions

if TYPE_CHECKING:
    from ppo.train_ppo import PPO


def begin(ppo: "PPO", training: Training):
    """Write an unfinished manifest and the prompts left out, and go on from the last checkpoint if there is
    one. `ppo`: train_ppo.PPO, here and below.
    """
    if is_main():
        training.begin()
        write_jsonl(beside(training.folder, ".skipped.jsonl"), ppo.skipped)
    ppo.accelerator.wait_for_everyone()
    restore(ppo)


def save(ppo: "PPO"):
    """Write a checkpoint: `learners`, `done` and `kl_coef` of `ppo`. It is renamed into place when whole.

    It holds no random state: seeds go by rollout.
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


def restore(ppo: "PPO"):
    """Go on from the last checkpoint that can be read, if there is one.

    Raises:
        UserError: there are some, and none can be read: to start again is for the user to say.
    """
    import torch

    saved, reason = checkpoints(ppo.args.output_dir), None
    noted = [path.parent for path in Path(ppo.args.output_dir).glob("checkpoint-*/trainer_state.json")]
    if noted and not saved:  # they were renamed into place whole: something has damaged them since
        reason = f"{noted[0]} cannot be read (its trainer_state.json is damaged)"
    for folder in reversed(saved):
        try:
            told = json.loads((folder / "trainer_state.json").read_text(encoding="utf-8"))
            state = torch.load(folder / "state.pt", map_location="cpu", weights_only=True)
            done, kl_coef = told["rollout"], told["kl_coef"]
            parts = [
                (part, values)
                for name, learner in ppo.learners.items()
                for part, values in zip(learner, state[name], strict=True)
            ]
        except (OSError, EOFError, KeyError, ValueError, RuntimeError, pickle.UnpicklingError) as error:
            reason = f"{folder} cannot be read ({one_line(error, 120)})"
            say(f"note: {reason}")
            continue
        say(f"continuing from {folder}")
        ppo.done, ppo.kl_coef = done, kl_coef
        for part, values in parts:
            part.load_state_dict(values)
        return
    if reason:
        raise UserError(
            f"{reason}, nor is there an older one that can; mend it, or start again with overwrite true"
        )


def read_log(path: Path, rollouts: int) -> list[dict]:
    """The log's entries of the first `rollouts` rollouts, up to a line that was torn (by a loss of power)."""
    entries = []
    if path.exists():
        for line in path.read_text(encoding="utf-8", errors="replace").split("\n")[:rollouts]:
            try:
                entries.append(json.loads(line))
            except ValueError:
                break
    return entries


class Log:
    """One line of figures for each rollout: in the log file, to the trackers, and on the terminal.

    Args:
        settings: what trackers show as the run's configuration.
    """

    def __init__(self, ppo, settings: dict):
        self.ppo, args, self.path = ppo, ppo.args, beside(ppo.args.output_dir, ".log.jsonl")
        self.entries = read_log(self.path, ppo.done)
        names = trackers.chosen(args.report_to) if is_main() else []
        if is_main():
            write_jsonl(self.path, self.entries)  # what came after the checkpoint comes again
        shown = {key: str(value) for key, value in settings.items()}
        self.trackers = [
            trackers.Figures(name, args.output_dir, shown, args.project, args.run_name) for name in names
        ]
        shows = is_main() and sys.stderr.isatty()
        self.progress = Progress(ppo.rollouts, "ppo", "rollouts", done=ppo.done, enabled=shows)

    def add(self, figures: dict, seconds: dict):
        """The figures of the rollout that was just learned from, and the seconds of its parts."""
        ppo, number, progress = self.ppo, self.ppo.done, self.progress
        episode = number * ppo.args.rollout_batch_size / len(ppo.prompts)
        self.entries.append({"step": number, "episode": episode, **figures, "seconds": seconds})
        if is_main():
            with open(self.path, "a", encoding="utf-8") as file:
                file.write(dumps(as_json(self.entries[-1])) + "\n")
        for tracker in self.trackers:
            tracker.log(figures | {f"seconds/{key}": value for key, value in seconds.items()}, number)
        note = (
            f"reward {figures['reward']:.3f}, kl {figures['kl']:.2f}, entropy {figures['entropy']:.2f}, "
            f"length {figures['response_length']:.1f}, cut {figures['truncated_fraction']:.2f}, "
            f"clipped {figures['clip_fraction']:.3f}"
        )
        if "explained_variance" in figures:
            note += f", explained {figures['explained_variance']:.2f}"
        progress.update(1, note)
        if progress.bar is None and (number % ppo.args.logging_steps == 0 or number == ppo.rollouts):
            pace = (time.monotonic() - progress.start) / (number - progress.first)
            say(
                f"ppo: rollout {number}/{ppo.rollouts}, {note}, {figures['tokens_per_second']:.0f} tokens/s, "
                f"{duration(pace * (ppo.rollouts - number))} left"
            )

    def close(self):
        self.progress.close()
        for tracker in self.trackers:
            tracker.close()


def finish(ppo: "PPO", training: Training, entries: list[dict], seconds: dict):
    """Rank 0: save the policy as a plain model folder, with what came with it, and complete the manifest.

    Args:
        entries: those of the log.
        seconds: `start`, from the script's start to the first rollout, and `all`.
    """
    import torch

    if not is_main():
        return
    args, folder = ppo.args, training.folder
    if ppo.accelerator.mixed_precision == "bf16":
        ppo.policy.to(torch.bfloat16)
    ppo.policy.save_pretrained(folder)
    write_json(folder / "generation_config.json", ppo.generation_config)
    ppo.tokenizer.save_pretrained(folder)
    copy_companions(args.model_name_or_path, folder)
    check_saved(folder, args.trust_remote_code)
    counts = {"prompts": len(ppo.prompts), "skipped": len(ppo.skipped), "rollouts": ppo.done}
    counts["responses"] = ppo.done * args.rollout_batch_size * args.samples_per_prompt
    metrics = {key: value for key, value in (entries or [{}])[-1].items() if finite(value)}
    training.finish(
        args.keep_checkpoints,
        counts=counts,
        metrics=metrics,
        num_processes=world_size(),
        seconds={key: round(value, 1) for key, value in seconds.items()},
    )
    say(
        f"read {len(ppo.prompts)} prompts, skipped {len(ppo.skipped)}, sampled {counts['responses']} "
        f"responses in {ppo.done} rollouts"
    )
    if entries:
        say(
            f"reward {entries[0]['reward']:.3f} → {metrics['reward']:.3f}, {metrics['kl']:.2f} nats per "
            "response off the reference"
        )
    say(f"trained {folder} in {duration(seconds['all'])}")
