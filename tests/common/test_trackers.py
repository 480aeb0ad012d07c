"""common/trackers.py against transformers' own list, and what a tracker's own reader finds of the figures
that it was told.
"""

import os
import sys

import pytest
from transformers.integrations import integration_utils

from common import trackers
from common.cli import UserError


def test_the_trackers_are_those_of_transformers():
    assert set(trackers.MODULES) == set(integration_utils.INTEGRATION_TO_CALLBACK) - {"kubeflow"}
    here = set(integration_utils.get_available_reporting_integrations()) - {"kubeflow"}
    assert (
        {name for name in trackers.MODULES if trackers.is_installed(name)} == here >= {"tensorboard", "wandb"}
    )


def test_one_that_is_not_installed_and_one_that_there_is_not(tmp_path, monkeypatch):
    trackers.check(["none", "wandb", "tensorboard"])
    with pytest.raises(UserError, match="--report_to mlfow: one of none, wandb, .*did you mean 'mlflow'"):
        trackers.check(["mlfow"])
    told = "report_to azure_ml: it is not installed .*pip install azureml-core, or report_to none"
    with pytest.raises(UserError, match=told):
        trackers.check(["azure_ml"], "report_to")
    with pytest.raises(UserError, match="pip install dagshub mlflow"):
        trackers.check(["dagshub"])
    with pytest.raises(UserError, match="codecarbon: one of none"):
        trackers.check(["codecarbon"], known=trackers.FIGURES)
    for name in ("mlflow", "dagshub"):  # empty stand-ins: it is only looked whether they are there
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text("")
    monkeypatch.syspath_prepend(tmp_path)
    trackers.check(["mlflow", "dagshub"])
    assert "mlflow" not in sys.modules


def test_the_project_is_the_given_one_or_the_environments_or_ours(monkeypatch):
    for variable in trackers.PROJECT_VARIABLES.values():
        monkeypatch.setenv(variable, "")  # so that all of it is put back
        monkeypatch.delenv(variable)
    monkeypatch.setenv("WANDB_PROJECT", "theirs")
    assert trackers.name_project(["wandb", "mlflow", "neptune"]) == trackers.PROJECT
    assert os.environ["WANDB_PROJECT"] == "theirs"
    assert os.environ["MLFLOW_EXPERIMENT_NAME"] == trackers.PROJECT
    assert "NEPTUNE_PROJECT" not in os.environ and "COMET_PROJECT_NAME" not in os.environ
    assert trackers.name_project(["wandb", "neptune"], "mine/all") == "mine/all"
    assert os.environ["WANDB_PROJECT"] == os.environ["NEPTUNE_PROJECT"] == "mine/all"


def test_figures_arrive_by_the_callback_of_transformers(tmp_path, monkeypatch):
    """TensorBoard stands for all: the others' callbacks are called in the same way, and want accounts or are
    not installed.
    """
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.setenv("TRACKIO_PROJECT", "x")
    figures = trackers.Figures("tensorboard", tmp_path, {"seed": 7}, run_name="a")
    for step, value in ((0, 1.5), (1, 2.5)):
        figures.log({"reward": value, "seconds/all": 3}, step)
    figures.close()
    [folder] = {path.parent for path in tmp_path.rglob("events.out.tfevents.*")}
    events = EventAccumulator(str(folder))
    events.Reload()
    assert [(event.step, event.value) for event in events.Scalars("train/reward")] == [(0, 1.5), (1, 2.5)]
    assert events.Scalars("train/seconds/all")[0].value == 3
    assert b'"seed": 7' in events.Tensors("args/text_summary")[0].tensor_proto.string_val[0]
