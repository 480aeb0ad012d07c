"""run_dpo.py as a person starts it, on micro models: one process, ZeRO-2 and ZeRO-3 with two, stopped and
continued.
"""

import json
import math
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import micro
import pytest
import torch
import training
from training import ROOT, argv, furthest, launch, logged, read_json, read_jsonl, start, weights
from transformers import AutoModelForCausalLM, AutoTokenizer

from common.cli import UserError
from dpo_iteration.models import check_models

LN_2 = pytest.approx(math.log(2), abs=1e-6)  # policy and reference agree to the last bit


def loads_and_answers(folder, dtype):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model, loading = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True, dtype="auto")
    assert not loading["missing_keys"] and not loading["unexpected_keys"] and model.dtype == dtype
    turns = [{"role": "user", "content": "Hi"}]
    ids = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_tensors="pt")["input_ids"]
    assert model.generate(ids, max_new_tokens=3, do_sample=False).shape[1] > ids.shape[1]
    return model, tokenizer


SINGLE = "--max_steps 4 --eval_fraction 0.25 --save_steps 4 --keep_checkpoints --report_to tensorboard wandb"


@pytest.fixture(scope="module")
def single(work):
    """One process, bf16, everything on: evaluation, checkpoints kept, tensorboard and wandb (offline)."""
    (work / "policy" / "preprocessor_config.json").write_text("{}")
    quiet = {"WANDB_MODE": "offline", "WANDB_DIR": str(work), "WANDB_SILENT": "true"}
    return start(*argv(work, "single", SINGLE), **quiet)


def test_the_model_is_whole(work, single):
    _, tokenizer = loads_and_answers(work / "single", torch.bfloat16)
    assert tokenizer.chat_template == AutoTokenizer.from_pretrained(work / "policy").chat_template
    made, start = work / "single", work / "policy"
    assert read_json(made / "generation_config.json") == read_json(start / "generation_config.json")
    before, after = (read_json(folder / "config.json") for folder in (start, made))
    assert {k: v for k, v in after.items() if before.get(k) != v} == {"dtype": "bfloat16"}
    assert (work / "single" / "preprocessor_config.json").is_file()
    others = ("train", "optimizer", "scheduler", "all_results", "rng")
    assert not [f for f in (work / "single").iterdir() if f.name.startswith(others)]


def test_step_zero_loss_is_ln_2_and_each_step_is_logged(work, single):
    log = logged(work / "single")
    assert [entry["step"] for entry in log] == [1, 2, 3, 4]
    assert log[0]["loss"] == LN_2 and log[0]["rewards/margins"] == 0
    lines = [line for line in single.stdout.splitlines() if line.startswith("train: step ")]
    assert len(lines) == 4 and "step 1/4, loss 0.6931" in lines[0] and "pairs/s" in lines[0]
    assert "\r" not in single.stdout
    assert list((work / "single").rglob("events.out.tfevents.*"))
    assert list((work / "wandb").glob("offline-run-*"))


def test_fp32_weights_move_at_a_tiny_learning_rate_under_bf16(work, single):
    source, trained = weights(work / "policy"), weights(work / "single" / "checkpoint-4")
    assert {weight.dtype for weight in trained.values()} == {torch.float32}
    assert 1e-8 < furthest(trained, source) < 1e-5  # four steps of at most 5e-7 each
    rounded = {name: weight.bfloat16() for name, weight in source.items()}
    assert furthest(rounded, source) > furthest(trained, source)  # bf16 could not hold such steps


def test_what_is_written_and_said(work, single):
    pairs = read_jsonl(work / "single.pairs.jsonl")
    manifest = read_json(work / "single.manifest.json")
    counts, metrics = manifest["counts"], manifest["metrics"]
    split = [pair["split"] for pair in pairs]
    assert manifest["complete"] and counts["pairs"] == len(pairs) == 24
    assert counts["eval_pairs"] == split.count("eval") > 0
    assert counts["train_pairs"] == split.count("train") > 0
    passes = read_json(work / "single.trainer_state.json")["epoch"]
    speed = passes * split.count("train") / metrics["train_runtime"]
    assert metrics["train_samples_per_second"] == pytest.approx(speed)
    assert {"train_loss", "eval_loss", "eval_rewards/accuracies", "rewards/margins"} <= set(metrics)
    rewards = {row["id"]: row["rewards"] for row in read_jsonl(work / "rewarded.jsonl")}
    for pair in pairs:
        values = rewards[pair["id"]]
        assert (pair["chosen_reward"], pair["rejected_reward"]) == (max(values), min(values))
        assert pair["number"] == int(pair["id"][1:]) and pair["source"].endswith("rewarded.jsonl")
    cut = sum(pair[f"{side}_finish_reason"] == "length" for pair in pairs for side in ("chosen", "rejected"))
    assert counts["responses_without_end_of_turn"] == cut > 0
    said = ("read 24 records, wrote 24 pairs", "skipped 0", "1 BOS", "⟦", "held out: loss 0.69")
    assert [words for words in (*said, "no GPU found", "trained ") if words not in single.stdout] == []
    assert not list(work.glob("single*.lock")) and not list(work.glob("single*.tmp"))


def test_a_second_start_has_nothing_to_do_and_another_setting_is_refused(work, single, train):
    done = start(*argv(work, "single", SINGLE))
    assert "is complete, nothing to do" in done.stdout
    with pytest.raises(UserError, match="beta was 0.1 and is now 0.2; .*--overwrite"):
        train("single", SINGLE, "--beta 0.2")
    training.write_rewarded(work / "other.jsonl", seed=1)
    with pytest.raises(UserError, match=r"other.jsonl\) has changed"):
        train("single", SINGLE, f"--train_dir {work}/other.jsonl")


def test_zero2_on_two_processes(work, single):
    words = argv(work, "zero2", "--max_steps 3 --save_steps 3 --keep_checkpoints --eval_fraction 0.25")
    done = start(*words, launcher=launch("zero2"))
    typed = ["python", "-m", "accelerate.commands.launch", *launch("zero2"), "dpo_iteration/run_dpo.py"]
    assert shlex.join([*map(str, typed), *words]) in (work / "zero2" / "README.md").read_text()
    loads_and_answers(work / "zero2", torch.bfloat16)
    log = logged(work / "zero2")
    assert log[0]["loss"] == LN_2 and len(log) == 3
    # The same pairs whatever the number of processes; accumulation × processes of them a step, however they
    # are packed: the launcher's configuration does not change that.
    assert read_jsonl(work / "zero2.pairs.jsonl") == read_jsonl(work / "single.pairs.jsonl")
    in_epoch = math.ceil(read_json(work / "zero2.manifest.json")["counts"]["train_pairs"] / (2 * 2))
    assert read_json(work / "zero2.trainer_state.json")["epoch"] == pytest.approx(3 / in_epoch)
    # Said once, nothing compiled.
    assert done.stdout.count("no GPU found") == 1 and "shm_comm" not in done.stdout

    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    master = get_fp32_state_dict_from_zero_checkpoint(str(work / "zero2" / "checkpoint-3"))
    start_of_master = {name: weight.bfloat16() for name, weight in weights(work / "policy").items()}
    assert {weight.dtype for weight in master.values()} == {torch.float32}
    assert 1e-8 < furthest(master, start_of_master) < 1e-5


def test_zero3_on_two_processes_leaves_a_loadable_model(work):
    """And a tied one: the pieces come together as copies, the head's among them, which the start does not
    have.
    """
    before = weights(micro.make_policy(work / "tied", tie_word_embeddings=True))
    words = argv(work, "zero3", f"--model_name_or_path {work}/tied --max_steps 2 --learning_rate 1e-3")
    done = start(*words, launcher=launch("zero3"), script=ROOT / "tests" / "launched.py")
    sizes, kept = (
        list(map(int, re.findall(said, done.stdout)))
        for said in (r"reference has (\d+) bytes", r"of the reference (\d+) bytes are kept")
    )
    assert min(sizes) > 5e4 and kept == [0, 0]  # memory.py counts the larger of reference and policy
    model, _ = loads_and_answers(work / "zero3", torch.bfloat16)
    assert "lm_head.weight" not in before and furthest(weights(work / "zero3"), before) > 1e-4
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert logged(work / "zero3")[0]["loss"] == LN_2


def test_an_error_under_two_processes_is_said_once_and_ends_both(work):
    turns = [{"role": "system", "content": "x"}, {"role": "user", "content": "y"}]
    rows = training.write_rewarded(work / "system.jsonl", 4)
    (work / "system.jsonl").write_text("".join(json.dumps(row | {"prompt": turns}) + "\n" for row in rows))
    micro.make_policy(work / "gemma", "gemma", "gemma2")
    more = f"--model_name_or_path {work}/gemma --train_dir {work}/system.jsonl"
    done = start(*argv(work, "refused", more), launcher=launch("ddp"), status=None)
    said = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert done.returncode and len(said) == 1
    assert "System role not supported" in said[0] and "record r000" in said[0]
    assert not (work / "refused").exists() and not (work / "refused.manifest.json").exists()


def test_a_killed_run_continues_and_ends_where_an_uninterrupted_one_does(work, train, capfd):
    learning = "--bf16 false --learning_rate 2e-3 --max_steps 12 --label_smoothing 0 --eval_fraction 0.25"
    learning += " --save_steps 4"
    train("whole", learning)
    killed, quiet = work / "killed", subprocess.DEVNULL
    command = [sys.executable, training.SCRIPT, *argv(work, "killed", learning)]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    with subprocess.Popen(command, stdout=quiet, stderr=quiet, env=env) as process:
        for _ in range(6000):
            if (killed / "checkpoint-4" / "trainer_state.json").exists() or process.poll() is not None:
                break
            time.sleep(0.01)
        os.kill(process.pid, signal.SIGKILL)
    assert read_json(f"{killed}.manifest.json")["complete"] is False, "it ended before it was killed"
    with pytest.raises(UserError, match="half done with other settings: seed was 42 and is now 1"):
        train("killed", learning, "--seed 1")
    capfd.readouterr()
    train("killed", learning)
    said = capfd.readouterr().out
    assert "continuing from" in said and "train: step 12/12" in said and "train: step 4/12" not in said
    assert furthest(weights(work / "whole"), weights(killed)) < 1e-6
    assert not list(killed.glob("checkpoint-*")) and not (work / "killed.lock").exists()

    # And what it is all for: the policy has learnt which answers are better, on prompts that it has not seen.
    metrics = read_json(work / "whole.manifest.json")["metrics"]
    assert metrics["eval_rewards/accuracies"] == 1.0 and metrics["eval_rewards/margins"] > 0.1
    loads_and_answers(work / "whole", torch.float32)


FEW = "--bf16 false --max_steps 1"


def test_another_reference_is_used_and_not_changed(work, train, tmp_path):
    before = weights(micro.make_policy(tmp_path / "reference", seed=5))
    train(tmp_path / "out", FEW, f"--ref_model_name_or_path {tmp_path}/reference")
    assert logged(tmp_path / "out")[0]["loss"] != LN_2 and logged(tmp_path / "out")[0]["rewards/margins"] != 0
    assert furthest(weights(tmp_path / "reference"), before) == 0


@pytest.mark.parametrize(
    ("reference", "message"),
    [({"vocab_size": 260}, "token id"), ({"family": "phi"}, "different vocabularies")],
)
def test_a_reference_of_other_tokens_is_refused(train, tmp_path, reference, message):
    micro.make_policy(tmp_path / "reference", **reference)
    with pytest.raises(UserError, match=message):
        train(tmp_path / "out", FEW, f"--ref_model_name_or_path {tmp_path}/reference")


def test_a_loss_that_is_no_number_ends_the_run(train, tmp_path):
    with pytest.raises(UserError, match="the loss is nan at step"):
        train(tmp_path / "nan", "--bf16 false --learning_rate 1e30 --max_steps 8")
    assert read_json(tmp_path / "nan.manifest.json")["complete"] is False


@pytest.mark.parametrize(("factor", "fits"), [(2.0, True), (1.9, False)])
def test_a_pair_may_be_as_long_as_stretched_positions(work, tmp_path, factor, fits):
    args = SimpleNamespace(
        model_name_or_path=str(tmp_path),
        ref_model_name_or_path=None,
        revision=None,
        trust_remote_code=False,
        model_init_kwargs=None,
    )
    rows = {"train": [{"prompt_ids": [1] * 900, "chosen_ids": [1] * 100, "rejected_ids": [1] * 124}]}
    rope = {"rope_type": "linear", "factor": factor, "rope_theta": 10000.0}
    config = read_json(work / "policy" / "config.json") | {"rope_parameters": rope}
    (tmp_path / "config.json").write_text(json.dumps(config))
    if fits:
        check_models(args, None, rows)
    else:
        with pytest.raises(UserError, match="972 positions, a pair has 1024 tokens"):
            check_models(args, None, rows)


def test_what_shapes_the_tokens_or_the_pass_is_an_input(work, train, tmp_path):
    """The text of a chat template, and what model_init_kwargs changes in the configuration."""
    template = tmp_path / "t.jinja"
    template.write_text(micro.TEMPLATES["llama3"])
    train("templated", FEW, f"--chat_template {template}")
    template.write_text(micro.TEMPLATES["llama3"].replace("user", "person") + "{# other #}")
    with pytest.raises(UserError, match="chat_template .* has changed since"):
        train("templated", FEW, f"--chat_template {template}")
    cache = f"--reference_cache {work}/reference_logps"
    train(tmp_path / "out", FEW, cache, '--model_init_kwargs {"rms_norm_eps":0.5}')
    assert logged(tmp_path / "out")[0]["loss"] == LN_2


def test_checkpoints_that_are_torn_or_damaged(work, train, capsys):
    """What does not look whole is passed over; what cannot be read is named, with what to do."""
    more = "--bf16 false --max_steps 6 --save_steps 2 --keep_checkpoints --learning_rate 2e-3"
    model = train("torn", more)
    whole = weights(model)
    (model / "model.safetensors").unlink()  # as if it had been killed at its last checkpoint
    (model / "checkpoint-6" / "trainer_state.json").write_text('{"epoch": 0.')
    capsys.readouterr()
    train("torn", more)
    assert "continuing from" in capsys.readouterr().out and furthest(weights(model), whole) < 1e-6

    (model / "model.safetensors").unlink()
    (model / "checkpoint-6" / "optimizer.pt").write_bytes(b"damaged")
    with pytest.raises(UserError, match="cannot continue from .*checkpoint-6: .*; delete that folder"):
        train("torn", more)
    shutil.rmtree(model / "checkpoint-6")
    train("torn", more, "--logging_first_step true --dataloader_num_workers 1")  # neither shapes the weights
    assert "checkpoint-4" in capsys.readouterr().out and (model / "model.safetensors").exists()


@pytest.mark.parametrize("save_steps", [1, 2])
def test_the_figures_are_those_of_the_weights_that_are_saved(work, train, capsys, save_steps):
    """The highest loss is called the best: that of step 1.

    Where only every second step is saved, it is gone, and the last step's weights stay.
    """
    model = train(
        f"best{save_steps}",
        "--bf16 false --max_steps 4 --eval_fraction 0.25 --eval_steps 1 --learning_rate 2e-3 "
        f"--save_steps {save_steps} --save_total_limit 9 --keep_checkpoints --logging_first_step true "
        "--load_best_model_at_end true --metric_for_best_model eval_loss --greater_is_better true",
    )
    history = read_json(f"{model}.trainer_state.json")["log_history"]
    metrics, step = read_json(f"{model}.manifest.json")["metrics"], {1: 1, 2: 4}[save_steps]
    checkpoints = {int(f.name.split("-")[1]): weights(f) for f in model.glob("checkpoint-*")}
    assert len(checkpoints) == 4 // save_steps
    assert [n for n, kept in checkpoints.items() if furthest(weights(model), kept) == 0] == [step]
    # Each step is evaluated once, the last one too.
    assert [entry["step"] for entry in history if "eval_loss" in entry] == [1, 2, 3, 4]
    for loss, margins in (("loss", "rewards/margins"), ("eval_loss", "eval_rewards/margins")):
        [entry] = [entry for entry in history if loss in entry and entry["step"] == step]
        assert (metrics[loss], metrics[margins]) == (entry[loss], entry[margins])
    assert metrics["step"] == step
    said, text = capsys.readouterr().out, (model / "README.md").read_text()
    assert ("the model is that of step 1 of 4" in said) == (step == 1)
    assert f"held out: loss {metrics['eval_loss']:.4f}" in said
    assert f"| {metrics['eval_loss']:.4f} |" in text and f"up to step {step}," in text
