"""OpenRLHF's figures as the small PPO's log has them: a line for each rollout, and progress, while it runs.

OpenRLHF 0.11.2 writes them as TensorBoard's event files, under its own names, every two minutes or so. Those
that mean what ours mean get our names. Its KL is a mean over tokens, ours over responses: it has another one.
"""

import contextlib
from pathlib import Path

from common.cli import UserError
from common.manifest import write_jsonl
from common.progress import Progress
from common.records import as_json

# Ours → theirs, the first that is there. `score` is the reward before the penalty for cut-off responses, and
# lacks where OpenRLHF holds the reward model itself.
FIGURES = {
    "reward": ("score", "rollout/reward_mean"),
    "kl_per_token": ("kl",),
    "response_length": ("rollout/response_length_mean",),
    "truncated_fraction": ("rollout/truncated_rate",),
    "policy_loss": ("policy_loss",),
    "value_loss": ("critic_loss",),
    "clip_fraction": ("ppo_clip_ratio",),
    "approx_kl": ("ppo_kl",),
    "engine_kl": ("vllm_kl",),
    "policy_learning_rate": ("actor_lr",),
    "critic_learning_rate": ("critic_lr",),
    "policy_grad_norm": ("actor_grad_norm",),
    "critic_grad_norm": ("critic_grad_norm",),
}
SECONDS = {
    "generate": "timing/generation",
    "evaluate": "timing/make_experience",
    "learn": "timing/ppo_train",
    "send_weights": "timing/broadcast",
    "all": "timing/step_total",
}


def entry(step: int, told: dict[str, float]) -> dict:
    """A line of the log. `told`: OpenRLHF's figures of a rollout, by their names."""
    found = {"step": step}
    for ours, theirs in FIGURES.items():
        if there := [told[name] for name in theirs if name in told]:
            found[ours] = there[0]
    found["seconds"] = {ours: told[theirs] for ours, theirs in SECONDS.items() if theirs in told}
    tokens = told.get("rollout/num_samples", 0) * told.get("rollout/response_length_mean", 0)
    if tokens and (spent := found["seconds"].get("all")):
        found["tokens_per_second"] = tokens / spent
    return found


class Log:
    """The log of a run.

    Args:
        folder: of the event files. path: of the log.
        done: rollouts that this start goes on from; what was logged beyond them comes again.
        rollouts: how many there will be.
    """

    def __init__(self, folder: Path, path: Path, done: int, rollouts: int):
        self.folder, self.path, self.readers, self.told = folder, path, {}, {}
        self.read()
        self.told = {step: told for step, told in self.told.items() if step <= done}
        self.progress = Progress(rollouts, "ppo", "rollouts", done=done, enabled=False)
        self.write()

    @property
    def entries(self) -> list[dict]:
        return [as_json(entry(step, told)) for step, told in sorted(self.told.items())]

    def read(self) -> bool:
        """Read what was written since; whether anything was."""
        from tensorboard.backend.event_processing.event_file_loader import LegacyEventFileLoader

        more = False
        for path in sorted(self.folder.rglob("events.out.tfevents.*")):  # by the time of their start
            reader = self.readers.setdefault(path, LegacyEventFileLoader(str(path)))
            for event in reader.Load():
                for value in event.summary.value:
                    if value.HasField("simple_value"):
                        told = self.told.setdefault(event.step, {})
                        told[value.tag.removeprefix("train/")] = value.simple_value
                        more = True
        return more

    def update(self):
        """Take over what OpenRLHF has written since; a disk that is full is no reason to end its work."""
        with contextlib.suppress(UserError, OSError):
            if self.read():
                self.write()

    def write(self):
        write_jsonl(self.path, self.entries)
        self.progress.update(max(self.told, default=self.progress.first) - self.progress.count)
