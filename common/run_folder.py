"""The names of the files of a run, for all who read or write them.

    RUN/loop.yaml                     every setting, resolved
    RUN/stages.jsonl                  what has finished: {"policy", "step", "seconds", "finished"} a line
    RUN/metrics.json, .csv            a row for each policy
    RUN/best, best.json               link to the model of the policy to keep, and why it is that one
    RUN/report/index.html             the page
    RUN/online/                       of run_online.sh: its rounds, checkpoints, and rounds.jsonl, their log
    RUN/iterI/generated.jsonl         responses of policy I-1, which policy I is trained on
    RUN/iterI/generated.NAME.jsonl    those of one model of a mixture, until all are joined
    RUN/iterI/rewarded.jsonl          the same with rewards
    RUN/iterI/pairs.jsonl             what was chosen of them
    RUN/iterI/model                   policy I; policy 0 is the start
    RUN/iterI/heldout_KIND.*.jsonl    held-out answers of policy I (KINDS): generated, rewarded, judged
    RUN/iterI/divergence.jsonl        KL of its sampled answers to the start, and divergence.json their mean
    RUN/iterI/metrics.json            figures of policy I
    RUN/iterI/logs/                   what the commands said, and beside X.log the progress in X.progress.json

A turn of the loop is a policy: its steps are in STEPS. run_loop.sh writes the same names out, and a test
holds them together. Only the standard library is imported.
"""

import json
import math
from collections.abc import Container
from pathlib import Path

STEPS = ("sample", "annotate", "measure", "train")  # of policy I; the last one makes policy I+1
KINDS = ("sampled", "greedy")  # of held-out answers
LOGS = {  # step → first words of its logs' names
    "sample": ("sample", "servers", "client"),
    "annotate": ("annotate",),
    "measure": ("judge", "divergence", "metrics"),
    "train": ("train",),
}


def read_object(path: str | Path, missing: list | None = None, what: str = "") -> dict:
    """The JSON object in a file, `{}` where it is not there; a damaged one is named in `missing`."""
    try:
        value = json.loads(Path(path).read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except (ValueError, OSError, RecursionError):
        value = None
    if isinstance(value, dict):
        return value
    if missing is not None:
        missing.append(f"{what or path} cannot be read")
    return {}


def is_ppo(settings: Container[str]) -> bool:
    """Whether loop.yaml's settings are those of run_ppo.sh."""
    return "ppo" in settings or "backend" in settings


def start_of(settings: dict) -> str:
    """The start by loop.yaml's settings, a hub name or a folder; empty where they do not say. A relative path
    of a run is from the project's folder, wherever a script is started.
    """
    name = str(settings.get("model_name_or_path") or "")
    inside = Path(__file__).resolve().parents[1] / name
    return str(inside) if name and not Path(name).exists() and inside.is_dir() else name


def kind_of(settings: Container[str]) -> str:
    """Which driver loop.yaml's settings, or their keys, are of: ppo, online, or dpo for run_loop.sh."""
    return "ppo" if is_ppo(settings) else "online" if "online" in settings else "dpo"


def is_evaluated(settings: dict) -> bool:
    """Whether the run's policies are measured: not with `heldout_prompts: null`."""
    return settings.get("heldout_prompts", "") is not None


def written_at(path: Path) -> float | None:
    """When a file was written, seconds since 1970; None where it is gone: a run at work renames and removes
    what we have just listed.
    """
    try:
        return path.stat().st_mtime
    except OSError:
        return None


def progress_of(log: Path) -> Path:
    """The progress of the command that a log is of: `sample.0.log` → `sample.0.progress.json`."""
    return log.with_suffix(".progress.json")


def warnings_of(page: Path) -> Path:
    """The warnings that a page shows, as JSON, for who does not look at pages."""
    return page.with_name(f"{page.stem}.warnings.json")


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
    def trackers(self) -> Path:
        """What each experiment tracker was told."""
        return self.path / "trackers.json"

    @property
    def best(self) -> Path:
        """A link to the model of the policy to keep."""
        return self.path / "best"

    @property
    def choice(self) -> Path:
        """Which policy that is, and why."""
        return self.path / "best.json"

    @property
    def page(self) -> Path:
        return self.path / "report" / "index.html"

    @property
    def online(self) -> Path:
        """The rounds and checkpoints of run_online.sh."""
        return self.path / "online"

    @property
    def rounds_log(self) -> Path:
        return self.online / "rounds.jsonl"

    def iteration(self, i: int) -> Path:
        return self.path / f"iter{i}"

    def iterations(self) -> list[int]:
        """I of the folders iterI that there are, in order."""
        return sorted(
            int(path.name[4:])
            for path in self.path.glob("iter*")
            if path.name[4:].isdigit() and path.is_dir()
        )

    def finished_steps(self) -> list[dict]:
        """The lines of stages.jsonl; one that a kill has torn, or that is damaged, is passed over."""
        found = []
        try:
            lines = self.stages.read_text(encoding="utf-8", errors="replace").splitlines()
        except OSError:
            return found
        for line in lines:
            try:
                value = json.loads(line)
                whole = isinstance(value["policy"], int) and value["step"] in STEPS
                if whole and math.isfinite(value["seconds"]):
                    found.append(value)
            except (ValueError, KeyError, TypeError, OverflowError, RecursionError):
                continue
        return found

    def seconds(self) -> dict[int, dict[str, float]]:
        """{policy: {step: seconds}}, over all starts; a policy's `train` is the one that made it."""
        found = {}
        for entry in self.finished_steps():
            own = found.setdefault(entry["policy"] + (entry["step"] == "train"), {})
            own[entry["step"]] = own.get(entry["step"], 0) + entry["seconds"]
        return found

    def last_written(self) -> float | None:
        """When a log, a partial output or the list of steps was written last, seconds since 1970."""
        patterns = ("logs/*", "*.partial", "shards/*.partial", "metrics.json", "model.log.jsonl")
        paths = [
            self.stages,
            self.rounds_log,
            *(path for pattern in patterns for path in self.path.glob(f"iter*/{pattern}")),
        ]
        return max((time for path in paths if (time := written_at(path)) is not None), default=None)

    def logs(self, i: int) -> Path:
        return self.iteration(i) / "logs"

    def step_logs(self, policy: int, step: str) -> list[Path]:
        """The logs of a policy's step; those of training are in the folder of what it makes."""
        logs = self.logs(policy + (step == "train")).glob("*.log")
        return sorted(path for path in logs if path.name.split(".")[0] in LOGS[step])

    def generated(self, i: int) -> Path:
        return self.iteration(i) / "generated.jsonl"

    def rewarded(self, i: int) -> Path:
        return self.iteration(i) / "rewarded.jsonl"

    def pairs(self, i: int) -> Path:
        return self.iteration(i) / "pairs.jsonl"

    def model(self, i: int) -> Path:
        return self.iteration(i) / "model"

    def trainer_state(self, i: int) -> Path:
        """The log of a training by DPO: what TRL writes, beside the model; while it trains, of the last
        checkpoint.
        """
        whole = self.iteration(i) / "model.trainer_state.json"
        if whole.is_file():
            return whole
        checkpoints = self.model(i).glob("checkpoint-*/trainer_state.json")
        return max(checkpoints, key=lambda path: written_at(path) or 0, default=whole)

    def model_manifest(self, i: int) -> Path:
        return self.iteration(i) / "model.manifest.json"

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
