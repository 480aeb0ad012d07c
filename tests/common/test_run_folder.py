"""common/run_folder.py: names of a run's files, and what is read of them when they are damaged."""

import json
import os
from pathlib import Path

import pytest

from common.run_folder import RunFolder, is_evaluated, is_ppo, progress_of, read_object, start_of, warnings_of


@pytest.fixture
def run(tmp_path):
    return RunFolder(tmp_path / "run")


def test_the_steps_that_have_finished(run):
    assert run.finished_steps() == [] and run.seconds() == {} and run.iterations() == []
    entries = [(0, "sample", 5), (0, "train", 7), (0, "train", 2.5), (1, "measure", 1)]
    entries = [dict(zip(("policy", "step", "seconds"), entry)) for entry in entries]
    odd = [
        "[]",
        "3",
        '{"policy": "0", "step": "train", "seconds": 1}',
        '{"policy": 0, "step": "x", "seconds": 1}',
    ]
    odd += ['{"policy": 0, "step": "train", "seconds": NaN}', '{"policy": 0, "step": {}, "seconds": 1}']
    odd += ['{"policy": 0, "step": "train", "seconds": 1' + "0" * 400 + "}", '{"policy": 1, "st']
    run.path.mkdir()
    run.stages.write_text("".join(json.dumps(entry) + "\n" for entry in entries) + "\n".join(odd))
    assert run.finished_steps() == entries
    assert run.seconds() == {0: {"sample": 5}, 1: {"train": 9.5, "measure": 1}}


def test_logs_of_a_step(run):
    for name in ("sample.0", "sample.merge", "server_8000", "annotate", "judge", "train"):
        for i in (1, 2):
            run.logs(i).mkdir(parents=True, exist_ok=True)
            (run.logs(i) / f"{name}.log").touch()
            progress_of(run.logs(i) / f"{name}.log").touch()
    assert [path.name for path in run.step_logs(1, "sample")] == ["sample.0.log", "sample.merge.log"]
    assert run.step_logs(1, "measure") == [run.logs(1) / "judge.log"]
    assert run.step_logs(1, "train") == [run.logs(2) / "train.log"]
    assert (run.logs(1) / "sample.0.progress.json").exists() and run.iterations() == [1, 2]
    os.utime(run.logs(1) / "train.log", (4e9, 4e9))
    assert run.last_written() == 4e9


def test_the_log_of_a_training_is_the_last_checkpoints_until_it_is_whole(run):
    for n in (5, 10):
        path = run.model(1) / f"checkpoint-{n}/trainer_state.json"
        path.parent.mkdir(parents=True)
        path.touch()
        os.utime(path, (n, n))
    assert run.trainer_state(1) == run.model(1) / "checkpoint-10/trainer_state.json"
    (run.iteration(1) / "model.trainer_state.json").touch()
    assert run.trainer_state(1).parent == run.iteration(1)


def test_objects_and_settings(run, tmp_path):
    told = []
    (tmp_path / "x").write_text("[1]")
    assert read_object(tmp_path / "none", told) == {} and told == []
    assert read_object(tmp_path / "x", told, "the x") == {} and told == ["the x cannot be read"]
    assert is_evaluated({}) and not is_evaluated({"heldout_prompts": None})
    assert is_ppo({"ppo": {}}) and not is_ppo({"iterations": 3})
    assert (
        warnings_of(run.page).name == "index.warnings.json"
        and warnings_of(run.page).parent == run.page.parent
    )


def test_a_relative_start_is_from_the_projects_folder(tmp_path, monkeypatch):
    root = Path(__file__).resolve().parents[2]
    monkeypatch.chdir(tmp_path)
    assert start_of({"model_name_or_path": "tests/common"}) == str(root / "tests/common")
    assert start_of({"model_name_or_path": "owner/model"}) == "owner/model"
    assert start_of({"model_name_or_path": str(tmp_path)}) == str(tmp_path)
    assert start_of({}) == start_of({"model_name_or_path": None}) == ""
    (tmp_path / "tests/common").mkdir(parents=True)
    assert start_of({"model_name_or_path": "tests/common"}) == "tests/common"
