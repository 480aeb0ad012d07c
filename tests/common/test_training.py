"""The output of a training: is it finished, may it be continued, who works at it."""

import json
import logging

import pytest

from common.cli import UserError
from common.models import quiet_libraries
from common.training import Training, checkpoints, remove_checkpoints

SETTINGS = {"beta": 0.1}


@pytest.fixture
def made(tmp_path):
    """A function that gives a Training into `model`."""
    (tmp_path / "data.jsonl").write_text("{}\n")

    def training(settings=SETTINGS, **more):
        return Training(tmp_path / "model", "test", settings, {"train_dir": tmp_path / "data.jsonl"}, **more)

    return training


def save_checkpoint(training, step, state="{}"):
    folder = training.folder / f"checkpoint-{step}"
    folder.mkdir(parents=True)
    (folder / "trainer_state.json").write_text(state)


def save_model(training):
    training.folder.mkdir(exist_ok=True)
    for name in ("config.json", "model.safetensors"):
        (training.folder / name).write_text("{}")


def manifest(training):
    return json.loads(training.manifest_path.read_text())


def test_from_nothing_to_a_finished_model(made):
    training = made()
    assert not training.is_complete()
    with training.locked():
        training.begin(num_gpus=2)
        save_checkpoint(training, 2)
        assert manifest(training)["complete"] is False and not made().is_complete()
        save_model(training)
        training.finish(counts={"pairs": 3})
    told = manifest(training)
    assert told["complete"] and told["num_gpus"] == 2 and told["counts"] == {"pairs": 3}
    assert told["settings"] == SETTINGS and told["output"]["sha256"]
    assert made().is_complete() and not training.checkpoints()
    there = sorted(path.name for path in training.folder.parent.iterdir())
    assert there == ["data.jsonl", "model", "model.manifest.json"]


@pytest.mark.parametrize("finished", [True, False])
def test_what_is_made_from_other_settings_is_refused(made, finished):
    training = made()
    training.begin()
    save_checkpoint(training, 2)
    if finished:
        save_model(training)
        training.finish(keep_checkpoints=True)
    state = "complete" if finished else "half done"
    with pytest.raises(UserError, match=f"is {state} with other settings: beta was 0.1 and is now 0.2"):
        made({"beta": 0.2}).is_complete()
    training.inputs["train_dir"].write_text('{"a": 1}\n')
    with pytest.raises(UserError, match=r"data.jsonl\) has changed since"):
        made().is_complete()
    assert not made({"beta": 0.2}, overwrite=True).is_complete()


def test_a_checkpoint_may_be_bound_to_more_than_the_model(made):
    training = made(checkpoint_settings={"num_processes": 2})
    training.begin()
    save_checkpoint(training, 2)
    with pytest.raises(UserError, match="num_processes was 2 and is now 1"):
        made(checkpoint_settings={"num_processes": 1}).is_complete()
    save_model(training)
    training.finish()
    assert made(checkpoint_settings={"num_processes": 1}).is_complete()


def test_an_unfinished_model_without_checkpoints_starts_again(made):
    made().begin()
    save_model(made())
    assert not made({"beta": 0.2}).is_complete()


def test_what_nobody_knows_the_origin_of_is_refused(made):
    training = made()
    training.folder.mkdir()
    assert not training.is_complete()
    (training.folder / "thesis.tex").write_text("")
    with pytest.raises(UserError, match="has no manifest"):
        training.is_complete()
    remote = made(find_checkpoints=lambda: [training.folder.parent / "work" / "checkpoint"])
    (training.folder / "thesis.tex").unlink()
    with pytest.raises(UserError, match="work/checkpoint has no manifest"):
        remote.is_complete()


def test_a_file_in_its_place_is_refused(made):
    made().folder.write_text("")
    with pytest.raises(UserError, match="is a file, a folder was expected"):
        made().is_complete()


def test_whole_checkpoints_in_their_order(made):
    training = made()
    for step, state in ((10, "{}"), (2, "{}"), (11, '{"torn'), (12, "")):
        save_checkpoint(training, step, state)
    (training.folder / "checkpoint-13").mkdir()
    assert [path.name for path in training.checkpoints()] == ["checkpoint-2", "checkpoint-10"]
    remove_checkpoints(training.folder.glob("checkpoint-1*"))
    assert [path.name for path in checkpoints(training.folder)] == ["checkpoint-2"]


def test_what_means_nothing_to_a_user_is_not_said():
    quiet_libraries()
    logger = logging.getLogger("bitsandbytes.backends.cpu.ops")
    said = ["Failed to load CPU gemm_4bit_forward from kernels-community", "the disk is on fire"]
    records = [logger.makeRecord(logger.name, logging.WARNING, "", 0, text, (), None) for text in said]
    assert [record.msg for record in records if logger.filter(record)] == ["the disk is on fire"]
    assert not logging.getLogger("transformers.trainer_utils").isEnabledFor(logging.WARNING)


def test_two_processes_do_not_train_into_one_folder(made, monkeypatch):
    with made().locked():
        with pytest.raises(UserError, match="another process is training into"):
            made().locked().__enter__()
        monkeypatch.setenv("RANK", "1")
        with made().locked():  # of the same launch
            pass


def test_a_model_that_was_finished_meanwhile_is_not_trained_again(made):
    training = made()
    training.begin()
    save_model(training)
    training.finish()
    with pytest.raises(UserError, match="another process has finished"):
        training.locked().__enter__()
