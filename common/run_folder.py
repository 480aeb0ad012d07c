"""The names of the files of a run, for all who read or write them.

    RUN/loop.yaml                     every setting, resolved
    RUN/stages.jsonl                  what has finished: {"policy", "step", "seconds", "finished"} a line
    RUN/metrics.json, .csv            a row for each policy
    RUN/report/index.html             the page
    RUN/iterI/generated.jsonl         responses of policy I-1, which policy I is trained on
    RUN/iterI/rewarded.jsonl          the same with rewards
    RUN/iterI/pairs.jsonl             what was chosen of them
    RUN/iterI/model                   policy I; policy 0 is the start
    RUN/iterI/heldout_KIND.*.jsonl    held-out answers of policy I, sampled and greedy: generated, rewarded, judged
    RUN/iterI/divergence.jsonl        KL of its sampled answers to the start, and divergence.json their mean
    RUN/iterI/metrics.json            figures of policy I
    RUN/iterI/logs/                   what the commands said

A turn of the loop is a policy: its steps are in STEPS. run_loop.sh writes the same names out, and a test holds
them together.
"""

from pathlib import Path

STEPS = ("sample", "annotate", "measure", "train")  # of policy I; the last one makes policy I+1
KINDS = ("sampled", "greedy")  # of held-out answers


class RunFolder:
    """Paths in the folder of a run."""

    def __init__(self, path: str | Path):
        self.path = Path(path)

    def __fspath__(self) -> str:
        return str(self.path)

    @property
    def settings(self) -> Path:
        return self.path / "loop.yaml"

    @property
    def stages(self) -> Path:
        return self.path / "stages.jsonl"

    @property
    def lock(self) -> Path:
        return self.path / ".lock"

    @property
    def metrics_table(self) -> Path:
        return self.path / "metrics.json"

    @property
    def page(self) -> Path:
        return self.path / "report" / "index.html"

    def iteration(self, i: int) -> Path:
        return self.path / f"iter{i}"

    def logs(self, i: int) -> Path:
        return self.iteration(i) / "logs"

    def generated(self, i: int) -> Path:
        return self.iteration(i) / "generated.jsonl"

    def rewarded(self, i: int) -> Path:
        return self.iteration(i) / "rewarded.jsonl"

    def pairs(self, i: int) -> Path:
        return self.iteration(i) / "pairs.jsonl"

    def model(self, i: int) -> Path:
        return self.iteration(i) / "model"

    def trainer_state(self, i: int) -> Path:
        """The log of a training by DPO: what TRL writes, beside the model."""
        return self.iteration(i) / "model.trainer_state.json"

    def ppo_log(self, i: int) -> Path:
        return self.iteration(i) / "model.log.jsonl"

    def pruned(self, i: int) -> Path:
        """The mark of weights that `keep_iterates` let go."""
        return self.iteration(i) / "model.pruned"

    def heldout(self, i: int, kind: str, what: str = "generated") -> Path:
        """`kind` of KINDS; `what`: generated, rewarded or judged (by the second reward model)."""
        return self.iteration(i) / f"heldout_{kind}.{what}.jsonl"

    def divergence(self, i: int) -> Path:
        return self.iteration(i) / "divergence.jsonl"

    def divergence_summary(self, i: int) -> Path:
        return self.iteration(i) / "divergence.json"

    def metrics(self, i: int) -> Path:
        return self.iteration(i) / "metrics.json"
