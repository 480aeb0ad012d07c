"""What a PPO training writes: model, log, manifest and checkpoints, and how one that was stopped goes on."""

import json
import math
import os
import random
import shutil
import signal
import sys
import time

import pytest
import torch
from small_ppo import argv, begin, equal
from training import read_json, read_jsonl, reset, weights
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from common import training
from common.cli import UserError
from ppo import train_ppo as ppo

RUN = {
    "num_episodes": 2,
    "kl_target": 0.05,
    "kl_horizon": 20,
    "ppo_epochs": 2,
    "save_steps": 1,
    "keep_checkpoints": True,
    "whiten_rewards": True,
    "missing_eos_penalty": 3,
    "report_to": ["tensorboard"],
}


def without_seconds(path):
    return [
        {k: v for k, v in entry.items() if not k.startswith(("seconds", "tokens_per"))}
        for entry in read_jsonl(path)
    ]


@pytest.fixture(scope="module")
def undisturbed(work):
    """A run from start to end, in this process."""
    reset()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["train_ppo.py", *argv(work, "undisturbed", **RUN)])
        ppo.main()
    return work / "undisturbed"


@pytest.fixture
def unfinished(work, undisturbed):
    """A function that copies the finished run as it was before its model was saved; returns its arguments."""

    def copy(name, **more):
        shutil.copytree(undisturbed, work / name)
        shutil.copy(work / "undisturbed.log.jsonl", work / f"{name}.log.jsonl")
        (work / name / "model.safetensors").unlink()
        manifest = read_json(work / "undisturbed.manifest.json") | {"complete": False}
        (work / f"{name}.manifest.json").write_text(json.dumps(manifest))
        return argv(work, name, **RUN | more)

    return copy


def test_what_a_run_leaves(work, undisturbed):
    model, start = AutoModelForCausalLM.from_pretrained(undisturbed), work / "policy"
    for name in ("generation_config.json", "config.json"):
        assert read_json(undisturbed / name) == read_json(start / name)
    templates = [AutoTokenizer.from_pretrained(folder).chat_template for folder in (undisturbed, start)]
    assert templates[0] == templates[1] and (undisturbed / "preprocessor_config.json").is_file()
    assert GenerationConfig.from_pretrained(undisturbed).eos_token_id == model.generation_config.eos_token_id
    before, after = weights(start), weights(undisturbed)
    assert set(after) == set(before) and "lm_head.weight" not in after  # a tied head is no weight of its own
    assert max((after[name] - before[name]).abs().max() for name in before) > 1e-3
    manifest = read_json(work / "undisturbed.manifest.json")
    assert manifest["complete"] and manifest["settings"]["clip"] == 0.2
    assert manifest["counts"] == {"prompts": 12, "skipped": 0, "rollouts": 6, "responses": 48}
    assert {"model_name_or_path", "dataset_name_or_path 1", "reward_function"} <= manifest["inputs"].keys()
    assert [f.name for f in sorted(undisturbed.glob("checkpoint-*"))] == ["checkpoint-5", "checkpoint-6"]
    assert list((undisturbed / "runs").rglob("events.out.tfevents.*"))
    assert not (work / "undisturbed.lock").exists()


def test_each_rollout_is_logged(work, undisturbed):
    log = read_jsonl(work / "undisturbed.log.jsonl")
    assert [entry["step"] for entry in log] == [1, 2, 3, 4, 5, 6] and log[-1]["episode"] == 2
    wanted = (
        "reward reward_less_kl kl entropy response_length truncated_fraction policy_loss value_loss "
        "clip_fraction approx_kl ratio explained_variance kl_coef policy_learning_rate critic_learning_rate "
        "policy_grad_norm critic_grad_norm tokens_per_second seconds"
    )
    assert all(set(wanted.split()) <= entry.keys() for entry in log)
    assert log[0]["kl"] == 0 and log[1]["kl"] != 0
    for old, new in zip(log, log[1:]):  # the controller of kl_target
        assert new["kl_coef"] == pytest.approx(ppo.steer(old["kl_coef"], old["kl"], 0.05, 20, 8), rel=1e-12)
    assert log[0]["policy_learning_rate"] > log[-1]["policy_learning_rate"]  # cosine
    assert 5.0 < log[0]["entropy"] < math.log(288) and 1 <= log[0]["response_length"] <= 6


def test_a_finished_run_is_left_alone_and_another_setting_is_refused(work, undisturbed, here, capsys):
    stamp = (undisturbed / "model.safetensors").stat().st_mtime_ns
    here(argv(work, "undisturbed", **RUN))
    assert "is complete, nothing to do" in capsys.readouterr().out
    assert (undisturbed / "model.safetensors").stat().st_mtime_ns == stamp
    here(argv(work, "undisturbed", **RUN, micro_batch_size=1))  # mere speed
    with pytest.raises(UserError, match="kl_horizon was 20 and is now 30.*--overwrite"):
        here(argv(work, "undisturbed", **RUN | {"kl_horizon": 30}))


def test_a_run_that_dies_on_its_way_ends_with_the_same_weights(work, undisturbed, here, monkeypatch, capsys):
    """After its second checkpoint, with a rollout beyond it in the log."""
    saved, words = ppo.save, argv(work, "died", **RUN)

    def save(it):
        if it.done == 3:
            raise KeyboardInterrupt
        saved(it)

    with monkeypatch.context() as patch:
        patch.setattr(ppo, "save", save)
        with pytest.raises(KeyboardInterrupt):
            here(words)
    assert not (work / "died" / "model.safetensors").exists()
    here(words)
    assert f"continuing from {work / 'died' / 'checkpoint-2'}" in capsys.readouterr().out
    equal(weights(undisturbed), weights(work / "died"))
    assert without_seconds(work / "died.log.jsonl") == without_seconds(work / "undisturbed.log.jsonl")
    one, other = (
        torch.load(work / run / "checkpoint-6" / "state.pt", weights_only=True)
        for run in ("undisturbed", "died")
    )
    for name in ("policy", "critic"):
        equal(one[name][0], other[name][0])
        assert str(one[name][2]) == str(other[name][2])


def test_without_a_value_model_nothing_is_left_or_logged_of_one(work, here, capsys):
    words = argv(work, "group_norm", **RUN | {"report_to": ["none"]}, advantage_estimator="group_norm")
    here(words)
    said = capsys.readouterr().out
    assert "value model: from" not in said and "explained" not in said
    [*_, last] = read_jsonl(work / "group_norm.log.jsonl")
    assert last["step"] == 6 and not {"value_loss", "explained_variance", "critic_grad_norm"} & last.keys()
    state = torch.load(work / "group_norm" / "checkpoint-6" / "state.pt", weights_only=True)
    assert state.keys() == {"policy"}


def test_two_processes_train_what_one_does(work, undisturbed):
    launcher = "-m accelerate.commands.launch --config_file configs/ddp.yaml --num_processes 2"
    launcher = [*launcher.split(), "--main_process_port", "0"]
    process = begin(argv(work, "two", **RUN, micro_batch_size=1), launcher)
    said, _ = process.communicate(timeout=200)
    assert process.returncode == 0, said
    equal(weights(undisturbed), weights(work / "two"), atol=2e-5)
    logs = [without_seconds(work / f"{run}.log.jsonl") for run in ("undisturbed", "two")]
    for one, two in zip(*logs):
        assert one == pytest.approx(two, rel=2e-3, abs=1e-4)
    assert read_json(work / "two.manifest.json")["num_processes"] == 2


@pytest.mark.long
def test_a_run_killed_at_any_moment_ends_with_the_same_weights(work, undisturbed):
    """Twelve kills at random moments of work and of putting things in place, one run."""
    rng, words, kills = random.Random(0), argv(work, "often", **RUN), 0
    while kills < 12:
        process = begin(words)
        while "prompts," not in (line := process.stdout.readline()) and line:
            pass
        time.sleep(rng.random())
        os.killpg(process.pid, signal.SIGKILL)
        if process.wait() != -signal.SIGKILL:
            break
        kills += 1
    process = begin(words)
    said, _ = process.communicate(timeout=200)
    assert process.returncode == 0, said
    equal(weights(undisturbed), weights(work / "often"))
    assert without_seconds(work / "often.log.jsonl") == without_seconds(work / "undisturbed.log.jsonl")


DAMAGE = {
    "half a state": lambda folder: os.truncate(folder / "state.pt", 1000),
    "half a note": lambda folder: os.truncate(folder / "trainer_state.json", 5),
    "an empty note": lambda folder: (folder / "trainer_state.json").write_text("{}"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_checkpoint_gives_way_to_an_older_one(work, undisturbed, unfinished, here, capsys, damage):
    name = damage.replace(" ", "_")
    words, log = unfinished(name), work / f"{name}.log.jsonl"
    DAMAGE[damage](work / name / "checkpoint-6")
    torn = '\n{"step": 5, "rew'  # what a loss of power leaves
    log.write_text("\n".join(log.read_text().split("\n")[:4]) + torn)
    here(words)
    assert f"continuing from {work / name / 'checkpoint-5'}" in capsys.readouterr().out
    equal(weights(undisturbed), weights(work / name))
    assert [entry["step"] for entry in read_jsonl(log)] == [1, 2, 3, 4, 6]


def test_checkpoints_of_which_none_can_be_read_are_not_passed_over_in_silence(work, unfinished, here):
    words = unfinished("unreadable")
    for state in (work / "unreadable").glob("checkpoint-*/state.pt"):
        os.truncate(state, 1000)
    with pytest.raises(UserError, match="checkpoint-5 cannot be read .*nor is there an older .*overwrite"):
        here(words)
    for note in (work / "unreadable").glob("checkpoint-*/trainer_state.json"):
        os.truncate(note, 5)
    with pytest.raises(UserError, match="checkpoint-. cannot be read .*trainer_state.json is damaged"):
        here(words)


def test_checkpoints_stay_until_the_model_is_known_to_be_complete(
    work, unfinished, here, monkeypatch, capsys
):
    """A kill between the two would otherwise cost the whole run."""
    words, written = unfinished("late", keep_checkpoints=False), training.write_json

    def write(path, content):
        if content.get("complete"):
            raise KeyboardInterrupt
        written(path, content)

    with monkeypatch.context() as patch:
        patch.setattr(training, "write_json", write)
        with pytest.raises(KeyboardInterrupt):
            here(words)
    here(words)
    assert "continuing from" in capsys.readouterr().out and not list((work / "late").glob("checkpoint-*"))
