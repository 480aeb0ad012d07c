"""What each round of online training was like: ROUNDS/rounds.jsonl, a line for each that was learned from.

round          from 0 on
version        rounds that the weights had learned from which sampled its answers; staleness: how many less
               than the policy that was trained on them
prompts, pairs, ties      prompts answered, pairs trained on, prompts whose answers all had one reward
reward, best, length      mean reward, mean reward of a prompt's best answer, mean tokens of an answer
kl, kl_se, kl_per_token   KL to the start in nats a response, by two answers to each of up to 64 prompts, its
               standard error over prompts, and nats a token (rounds_kl.py); left out where no loss looks
               at the reference, and where answers are not sampled at temperature 1 from all tokens
loss, accuracy, margin, learning_rate     of its optimizer steps, as run_dpo.py logs them; with loss kto
               kto_kl, its own estimate
seconds        all, and of that: sampling (the servers at work, perhaps on the next round), waiting (the
               trainer, for them), sending, scoring, reference, kl, training
"""

import contextlib
import json
import time
from collections.abc import Iterator
from pathlib import Path

from common import records
from common.manifest import write_jsonl

LOGGED = {  # of the trainer → in the log
    "loss": "loss",
    "rewards/accuracies": "accuracy",
    "rewards/margins": "margin",
    "kl": "kto_kl",
    "learning_rate": "learning_rate",
}
BEFORE = (
    "sending",
    "waiting",
    "scoring",
    "reference",
    "kl",
)  # parts of a round; what is left of it is training


class Log:
    """The log of a run, on rank 0; the others keep the same figures and write nothing.

    Args:
        path: rounds.jsonl. writes: whether this is rank 0.
    """

    def __init__(self, path: str | Path, writes: bool):
        self.path, self.writes, self.entry, self.started = Path(path), writes, {}, 0.0

    def begin(self, number: int, version: int, staleness: int):
        """A round begins: what an earlier start that was killed has logged of it, and of later ones, goes."""
        self.started = time.monotonic()
        self.entry = {"round": number, "version": version, "staleness": staleness, "seconds": {}}
        if self.writes and self.path.exists():
            write_jsonl(self.path, [line for line in read_log(self.path) if line["round"] < number])

    def add(self, **figures: object):
        self.entry |= figures

    def spent(self, what: str, seconds: float):
        """Add to the seconds of a part of the round."""
        own = self.entry.setdefault("seconds", {})  # a start whose rounds are all done has none
        own[what] = round(own.get(what, 0.0) + seconds, 3)

    @contextlib.contextmanager
    def timed(self, what: str) -> Iterator[None]:
        started = time.monotonic()
        yield
        self.spent(what, time.monotonic() - started)

    def end(self, logs: dict):
        """The round's steps are done; `logs`: what the trainer says of them."""
        self.add(**{ours: logs[theirs] for theirs, ours in LOGGED.items() if theirs in logs})
        taken, own = time.monotonic() - self.started, self.entry["seconds"]
        self.spent("training", taken - sum(own.get(part, 0.0) for part in BEFORE))
        self.spent("all", taken)
        if self.writes:
            with open(self.path, "a", encoding="utf-8", newline="\n") as file:
                file.write(records.dumps(self.entry) + "\n")


def read_log(path: str | Path) -> list[dict]:
    """The entries of a rounds.jsonl, in order; none without a file, and not one that a kill has torn."""
    found = []
    with contextlib.suppress(OSError):
        for line in Path(path).read_text(encoding="utf-8", errors="replace").split("\n"):
            with contextlib.suppress(ValueError, RecursionError):
                entry = json.loads(line)
                if isinstance(entry, dict) and isinstance(entry.get("round"), int):
                    found.append(entry)
    return found
