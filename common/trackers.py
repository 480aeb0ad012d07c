"""The experiment trackers, which are those of transformers: what there is, what is installed, projects and
names, rows of figures.

TRL's Trainer reports to them by itself. `Figures` does so for the small PPO, which has no Trainer, and
`log_rows` for the policies of a run, which are steps of no training. Only the standard library is imported
before that, so that a wrong name is refused at once.
"""

import importlib.util
import os
import secrets
import time
from pathlib import Path

from common.cli import UserError, nearest

# tracker → the modules it needs; transformers' list without kubeflow, which is no package but a job's
# environment
MODULES = {
    "wandb": ["wandb"],
    "tensorboard": ["tensorboard"],
    "trackio": ["trackio"],
    "mlflow": ["mlflow"],
    "comet_ml": ["comet_ml"],
    "clearml": ["clearml"],
    "swanlab": ["swanlab"],
    "neptune": ["neptune"],
    "dvclive": ["dvclive"],
    "azure_ml": ["azureml.core.run"],
    "dagshub": ["dagshub", "mlflow"],
    "flyte": ["flytekit"],
    "codecarbon": ["codecarbon"],
}
NO_FIGURES = ("flyte", "codecarbon")  # of a Trainer alone: they log no figures as they come
FIGURES = tuple(name for name in MODULES if name not in NO_FIGURES)
PACKAGES = {"azure_ml": "azureml-core", "comet_ml": "comet-ml"}  # where pip's name is another
PROJECT = "online-rlhf"
PROJECT_VARIABLES = {  # where transformers reads the project's name; trackio's is an argument there
    "wandb": "WANDB_PROJECT",
    "trackio": "TRACKIO_PROJECT",
    "mlflow": "MLFLOW_EXPERIMENT_NAME",
    "dagshub": "MLFLOW_EXPERIMENT_NAME",
    "comet_ml": "COMET_PROJECT_NAME",
    "clearml": "CLEARML_PROJECT",
    "swanlab": "SWANLAB_PROJECT",
    "neptune": "NEPTUNE_PROJECT",
}
RESUMED = {
    "comet_ml": {"COMET_EXPERIMENT_KEY": "{}"},
    "swanlab": {"SWANLAB_RUN_ID": "{}", "SWANLAB_RESUME": "allow"},
}


def is_installed(name: str) -> bool:
    """Whether the tracker's packages are there, by looking for them alone."""
    try:
        return all(importlib.util.find_spec(module) is not None for module in MODULES[name])
    except ModuleNotFoundError:  # the package around a module
        return False


def check(names: list[str] | None, called: str = "--report_to", known: tuple = tuple(MODULES)):
    """Refuse a tracker that is none of `known`, or is not installed here. `called` is the setting's name.

    Raises:
        UserError: names the tracker.
    """
    for name in names or ():
        if name == "none":
            continue
        if name not in known:
            raise UserError(
                f"{called} {name}: one of none, {', '.join(known)} was "
                f"expected{nearest(name, ['none', *known])}"
            )
        if not is_installed(name):
            package = " ".join(
                PACKAGES.get(module.partition(".")[0], module) for module in [name, *MODULES[name][1:]]
            )
            raise UserError(
                f"{called} {name}: it is not installed in this environment; pip install {package}, or "
                f"{called} none"
            )


def chosen(names: list[str] | None) -> list[str]:
    """The trackers of a `report_to`, each once, without `none`."""
    return [name for name in dict.fromkeys(names or ()) if name != "none"]


def name_project(names: list[str], project: str | None = None) -> str:
    """Tell the trackers' own variables the project: the one that is given, else what they say already, else
    PROJECT.

    Returns:
        the name for a tracker that takes it as an argument (trackio).
    """
    for name in {*names, "trackio"} & PROJECT_VARIABLES.keys():
        if project:
            os.environ[PROJECT_VARIABLES[name]] = project
        elif name != "neptune":  # its projects are of the form workspace/project: there is no other default
            os.environ.setdefault(PROJECT_VARIABLES[name], PROJECT)
    return os.environ[PROJECT_VARIABLES["trackio"]]


class Figures:
    """Rows of figures to one tracker, by the callback that transformers has for it.

    Args:
        name: one of FIGURES. folder: where it may write.
        settings: what the tracker shows as the run's configuration.
        project, run_name: their names; see `name_project`.
        state: a dict that is kept from one start to the next, so that trackers that can continue a run do so.
    """

    def __init__(self, name, folder, settings, project=None, run_name=None, state=None):
        from transformers import TrainerControl, TrainerState
        from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

        self.name, self.kept = name, {} if state is None else state
        if name in RESUMED:
            self.kept.setdefault("id", secrets.token_hex(16))
            os.environ.update(
                {variable: value.format(self.kept["id"]) for variable, value in RESUMED[name].items()}
            )
        if name == "mlflow" and "id" in self.kept:
            os.environ["MLFLOW_RUN_ID"] = self.kept["id"]
        if name == "clearml" and run_name:
            os.environ.setdefault("CLEARML_TASK", run_name)
        self.args = _arguments(str(folder), name_project([name], project), run_name, settings)
        self.state, self.control = TrainerState(is_world_process_zero=True), TrainerControl()
        self.callback = INTEGRATION_TO_CALLBACK[name]()
        self.callback.on_train_begin(self.args, self.state, self.control, model=None)
        if name == "mlflow":
            import mlflow

            self.kept["id"] = mlflow.active_run().info.run_id

    def log(self, row: dict, step: int):
        """`row`: name → finite number."""
        self.state.global_step = step
        self.callback.on_log(self.args, self.state, self.control, logs=dict(row), model=None)

    def close(self):
        self.callback.on_train_end(self.args, self.state, self.control, model=None)
        if self.name == "wandb":  # its callback leaves that to the end of the process
            self.callback._wandb.finish()


def _arguments(folder, project, run_name, settings):
    """What a callback asks a Trainer's arguments for: names, and our settings in place of the Trainer's
    own.
    """
    from transformers import TrainingArguments

    class Arguments(TrainingArguments):
        def __init__(self):  # not the parent's, which would set up devices
            self.output_dir, self.project, self.run_name = folder, project, run_name

        def to_dict(self) -> dict:
            return dict(settings)

        to_sanitized_dict = to_dict

    return Arguments()


def log_rows(name: str, rows: list, folder: Path, settings: dict, names: dict, state: dict):
    """Tell one tracker rows of figures, in a run of its own that later calls take up again where it can be.

    Args:
        name: one of FIGURES.
        rows: list of (step, {name: finite number}).
        folder: where it may write. settings: what it shows as the run's configuration.
        names: {"project", "run_name"}; see `name_project`.
        state: a dict that is kept from one call to the next.

    Raises:
        what the tracker raises: no network, no login, not installed.
    """
    log = OWN_WAY.get(name, _log_by_callback)
    log(name, rows, folder, settings, names["project"], names["run_name"], state)


def _log_to_wandb(name, rows, folder, settings, project, run_name, state):
    import wandb

    name_project([name], project)
    state.setdefault("id", secrets.token_hex(4))
    run = wandb.init(
        project=os.environ[PROJECT_VARIABLES[name]],
        id=state["id"],
        resume="allow",
        name=run_name,
        dir=str(folder),
        config=settings,
        settings=wandb.Settings(init_timeout=60, console="off", silent=True),
    )
    for step, row in rows:
        run.log(row, step=step)
    run.finish()


def _log_to_tensorboard(name, rows, folder, settings, project, run_name, state):
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(str(folder / name)) as writer:
        for step, row in rows:
            for key, value in row.items():
                writer.add_scalar(key, value, step)


def _log_to_trackio(name, rows, folder, settings, project, run_name, state):
    import trackio

    state.setdefault("name", f"{run_name}-{int(time.time())}")
    trackio.init(project=name_project([name], project), name=state["name"], resume="allow", config=settings)
    for step, row in rows:
        trackio.log(row, step=step)
    trackio.finish()


def _log_by_callback(name, rows, folder, settings, project, run_name, state):
    figures = Figures(name, folder, settings, project, run_name, state)
    for step, row in rows:
        figures.log(row, step)
    figures.close()


# Those whose callback would call a figure `train/…`, or begin another run at each start.
OWN_WAY = {"wandb": _log_to_wandb, "tensorboard": _log_to_tensorboard, "trackio": _log_to_trackio}
