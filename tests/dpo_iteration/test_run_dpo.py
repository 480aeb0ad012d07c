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

import micro
import pytest
import torch
import training
from safetensors.torch import load_file
from training import ROOT, argv, read_json, read_jsonl, start
from transformers import AutoModelForCausalLM, AutoTokenizer


def steps(folder):
    return [entry for entry in read_json(f"{folder}.trainer_state.json")["log_history"] if "loss" in entry]


def moved(weights, source):
    """Largest change of any weight."""
    return max((weights[name].float() - source[name].float()).abs().max().item() for name in source)


def loads_and_answers(folder, dtype):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model, loading = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True, dtype="auto")
    assert not loading["missing_keys"] and not loading["unexpected_keys"] and model.dtype == dtype
    ids = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hi"}], add_generation_prompt=True, return_tensors="pt"
    )
    ids = ids["input_ids"] if hasattr(ids, "keys") else ids
    assert model.generate(ids, max_new_tokens=3, do_sample=False).shape[1] > ids.shape[1]
    return model, tokenizer


@pytest.fixture(scope="module")
def single(work):
    """One process, bf16, everything on: evaluation, checkpoints kept, tensorboard and wandb (offline)."""
    more = (
        "--max_steps 4 --eval_fraction 0.25 --save_steps 4 --keep_checkpoints --report_to tensorboard wandb"
    ).split()
    (work / "policy" / "preprocessor_config.json").write_text("{}")
    quiet = {"WANDB_MODE": "offline", "WANDB_DIR": str(work), "WANDB_SILENT": "true"}
    done = start(*argv(work, "single", *more), **quiet)
    assert done.returncode == 0, done.stdout + done.stderr
    return done, more


def test_the_model_is_whole(work, single):
    _, tokenizer = loads_and_answers(work / "single", torch.bfloat16)
    assert tokenizer.chat_template == AutoTokenizer.from_pretrained(work / "policy").chat_template
    assert read_json(work / "single" / "generation_config.json") == read_json(
        work / "policy" / "generation_config.json"
    )
    before, after = (read_json(work / name / "config.json") for name in ("policy", "single"))
    assert {k: v for k, v in after.items() if before.get(k) != v} == {"dtype": "bfloat16"}
    assert (work / "single" / "preprocessor_config.json").is_file()
    assert not [
        f
        for f in (work / "single").iterdir()
        if f.name.startswith(("train", "optimizer", "scheduler", "all_results", "rng"))
    ]


def test_step_zero_loss_is_ln_2_and_each_step_is_logged(work, single):
    done, _ = single
    logged = steps(work / "single")
    assert [entry["step"] for entry in logged] == [1, 2, 3, 4]
    assert logged[0]["loss"] == pytest.approx(
        math.log(2), abs=1e-6
    )  # policy and reference agree to the last bit
    assert logged[0]["rewards/margins"] == 0
    lines = [line for line in done.stdout.splitlines() if line.startswith("train: step ")]
    assert (
        len(lines) == 4
        and "step 1/4, loss 0.6931" in lines[0]
        and "pairs/s" in lines[0]
        and "\r" not in done.stdout
    )


def test_fp32_weights_move_at_a_tiny_learning_rate_under_bf16(work, single):
    source, trained = (
        load_file(work / name / "model.safetensors") for name in ("policy", "single/checkpoint-4")
    )
    assert {weight.dtype for weight in trained.values()} == {torch.float32}
    assert 1e-8 < moved(trained, source) < 1e-5  # four steps of at most 5e-7 each
    rounded = {name: weight.bfloat16() for name, weight in source.items()}
    assert moved(rounded, source) > moved(trained, source)  # bf16 could not hold such steps


def test_what_is_written_and_said(work, single):
    done, _ = single
    pairs = read_jsonl(work / "single.pairs.jsonl")
    manifest = read_json(work / "single.manifest.json")
    assert manifest["complete"] and manifest["counts"]["pairs"] == len(pairs) == 24
    split = [pair["split"] for pair in pairs]
    assert manifest["counts"]["eval_pairs"] == split.count("eval") > 0
    assert manifest["counts"]["train_pairs"] == split.count("train") > 0
    assert manifest["metrics"]["train_samples_per_second"] == pytest.approx(
        read_json(work / "single.trainer_state.json")["epoch"]
        * split.count("train")
        / manifest["metrics"]["train_runtime"]
    )
    assert manifest["settings"]["beta"] == 0.1 and manifest["settings"]["loss_type"] == ["sigmoid"]
    assert {"train_loss", "eval_loss", "eval_rewards/accuracies", "rewards/margins"} <= set(
        manifest["metrics"]
    )
    rewards = {row["id"]: row["rewards"] for row in read_jsonl(work / "rewarded.jsonl")}
    for pair in pairs:
        values = rewards[pair["id"]]
        assert (pair["chosen_reward"], pair["rejected_reward"]) == (max(values), min(values))
        assert pair["number"] == int(pair["id"][1:]) and pair["source"].endswith("rewarded.jsonl")
    cut = sum(pair[f"{side}_finish_reason"] == "length" for pair in pairs for side in ("chosen", "rejected"))
    assert manifest["counts"]["responses_without_end_of_turn"] == cut > 0
    for said in (
        "read 24 records, wrote 24 pairs",
        "skipped 0",
        "1 BOS",
        "⟦",
        "held out: loss 0.69",
        "no GPU found",
        "trained ",
    ):
        assert said in done.stdout, said
    assert not list(work.glob("single*.lock")) and not list(work.glob("single*.tmp"))


def test_trackers_wrote_something(work, single):
    assert list((work / "single").rglob("events.out.tfevents.*"))
    assert list((work / "wandb").glob("offline-run-*"))


def test_a_second_start_is_quick_and_another_setting_is_refused(work, single):
    _, more = single
    begun = time.monotonic()
    done = start(*argv(work, "single", *more))
    assert (
        done.returncode == 0 and "is complete, nothing to do" in done.stdout and time.monotonic() - begun < 5
    )
    done = start(*argv(work, "single", *more, "--beta", "0.2"))
    assert (
        done.returncode == 2 and "beta was 0.1 and is now 0.2" in done.stderr and "--overwrite" in done.stderr
    )
    training.write_rewarded(work / "other.jsonl", seed=1)
    done = start(*argv(work, "single", *more, "--train_dir", work / "other.jsonl"))
    assert done.returncode == 2 and "other.jsonl) has changed" in done.stderr


def launch(config, *more):
    return ["--config_file", ROOT / "configs" / f"{config}.yaml", "--num_processes", 2, *more]


def test_zero2_on_two_processes(work, single):
    more = "--max_steps 3 --save_steps 3 --keep_checkpoints --eval_fraction 0.25".split()
    words = argv(work, "zero2", *more)
    done = start(*words, launcher=launch("zero2"))
    assert done.returncode == 0, done.stdout + done.stderr
    typed = [
        "python",
        "-m",
        "accelerate.commands.launch",
        *map(str, launch("zero2")),
        "dpo_iteration/run_dpo.py",
        *map(str, words),
    ]
    assert shlex.join(typed) in (work / "zero2" / "README.md").read_text()
    loads_and_answers(work / "zero2", torch.bfloat16)
    logged = steps(work / "zero2")
    assert logged[0]["loss"] == pytest.approx(math.log(2), abs=1e-6) and len(logged) == 3
    pairs = [read_jsonl(work / f"{name}.pairs.jsonl") for name in ("single", "zero2")]
    assert pairs[0] == pairs[1]  # whatever the number of processes
    # Accumulation × processes pairs a step, however they are packed: the launcher's configuration does not
    # change that.
    in_epoch = math.ceil(read_json(work / "zero2.manifest.json")["counts"]["train_pairs"] / (2 * 2))
    assert read_json(work / "zero2.trainer_state.json")["epoch"] == pytest.approx(3 / in_epoch)
    assert (
        done.stdout.count("no GPU found") == 1 and "shm_comm" not in done.stdout
    )  # said once, nothing compiled

    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    master = get_fp32_state_dict_from_zero_checkpoint(str(work / "zero2" / "checkpoint-3"))
    start_of_master = {k: v.bfloat16() for k, v in load_file(work / "policy" / "model.safetensors").items()}
    assert {weight.dtype for weight in master.values()} == {torch.float32}
    assert 1e-8 < moved(master, start_of_master) < 1e-5


def test_zero3_on_two_processes_leaves_a_loadable_model(work):
    """And a tied one: the pieces come together as copies, the head's among them, which the start does not
    have.
    """
    before = load_file(micro.make_policy(work / "tied", tie_word_embeddings=True) / "model.safetensors")
    more = ["--model_name_or_path", work / "tied", "--max_steps", "2", "--learning_rate", "1e-3"]
    done = start(
        *argv(work, "zero3", *more),
        launcher=launch("zero3"),
        script=ROOT / "tests" / "launched.py",
    )
    assert done.returncode == 0, done.stdout + done.stderr
    size, kept = (
        list(map(int, re.findall(said, done.stdout)))
        for said in (r"reference has (\d+) bytes", r"of the reference (\d+) bytes are kept")
    )
    assert min(size) > 5e4 and kept == [0, 0]  # memory.py counts the larger of reference and policy
    model, _ = loads_and_answers(work / "zero3", torch.bfloat16)
    after = load_file(work / "zero3" / "model.safetensors")
    assert set(after) == set(before) and "lm_head.weight" not in after and moved(after, before) > 1e-4
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert steps(work / "zero3")[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)


def test_an_error_under_two_processes_is_said_once_and_ends_both(work):
    training.write_rewarded(
        work / "system.jsonl", 4, prompt=[{"role": "tool", "content": "x"}, {"role": "user", "content": "y"}]
    )
    micro.make_policy(work / "gemma", "gemma", "gemma2")
    rows = [
        row | {"prompt": [{"role": "system", "content": "x"}, {"role": "user", "content": "y"}]}
        for row in read_jsonl(work / "system.jsonl")
    ]
    (work / "system.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    more = ["--model_name_or_path", work / "gemma", "--train_dir", work / "system.jsonl"]
    done = start(*argv(work, "refused", *more), launcher=launch("ddp"))
    assert done.returncode != 0
    said = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(said) == 1 and "System role not supported" in said[0] and "record r000" in said[0]
    assert not (work / "refused").exists() and not (work / "refused.manifest.json").exists()


LEARNING = (
    "--bf16 false --learning_rate 2e-3 --max_steps 12 --label_smoothing 0 --eval_fraction 0.25 --save_steps 4"
).split()


def test_a_killed_run_continues_and_ends_where_an_uninterrupted_one_does(work, here, capfd):
    here(argv(work, "whole", *LEARNING))
    capfd.readouterr()
    command = [sys.executable, training.SCRIPT, *argv(work, "killed", *LEARNING)]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=env) as process:
        for _ in range(6000):
            if (
                work / "killed" / "checkpoint-4" / "trainer_state.json"
            ).exists() or process.poll() is not None:
                break
            time.sleep(0.01)
        os.kill(process.pid, signal.SIGKILL)
    manifest = read_json(work / "killed.manifest.json")
    assert manifest["complete"] is False, "it ended before it was killed"
    refused = start(*argv(work, "killed", *LEARNING, "--seed", "1"))
    assert (
        refused.returncode == 2
        and "half done with other settings: seed was 42 and is now 1" in refused.stderr
    )
    here(argv(work, "killed", *LEARNING))
    said = capfd.readouterr().out
    assert "continuing from" in said and "train: step 12/12" in said and "train: step 4/12" not in said
    weights = [load_file(work / name / "model.safetensors") for name in ("whole", "killed")]
    assert moved(*weights) < 1e-6
    assert not list((work / "killed").glob("checkpoint-*")) and not (work / "killed.lock").exists()

    # And what it is all for: the policy has learnt which answers are better, on prompts that it has not seen.
    metrics = read_json(work / "whole.manifest.json")["metrics"]
    assert metrics["eval_rewards/accuracies"] == 1.0 and metrics["eval_rewards/margins"] > 0.1
    loads_and_answers(work / "whole", torch.float32)


def test_overwrite_starts_anew(work, here):
    few = "--bf16 false --max_steps 1".split()
    here(argv(work, "again", *few))
    here(argv(work, "again", *few, "--beta", "0.3", "--overwrite"))
    assert read_json(work / "again.manifest.json")["settings"]["beta"] == 0.3


@pytest.mark.parametrize(
    ("reference", "message"),
    [({"seed": 5}, None), ({"vocab_size": 260}, "token id"), ({"family": "phi"}, "different vocabularies")],
)
def test_another_reference(work, here, tmp_path, reference, message):
    from common.cli import UserError

    micro.make_policy(tmp_path / "reference", **reference)
    arguments = argv(
        work,
        tmp_path / "out",
        "--bf16",
        "false",
        "--max_steps",
        "1",
        "--ref_model_name_or_path",
        tmp_path / "reference",
    )
    if message:
        with pytest.raises(UserError, match=message):
            here(arguments)
    else:
        here(arguments)
        assert abs(steps(tmp_path / "out")[0]["loss"] - math.log(2)) > 1e-6  # another model than the policy


def test_refusals_that_need_the_model(work, here, tmp_path):
    from common.cli import UserError

    with pytest.raises(UserError, match="512 positions, a pair has"):
        training.write_rewarded(
            tmp_path / "long.jsonl", 4, prompt=[{"role": "user", "content": "long " * 200}]
        )
        here(argv(work, tmp_path / "out", "--train_dir", tmp_path / "long.jsonl"))
    with pytest.raises(UserError, match="the loss is nan at step"):
        here(argv(work, tmp_path / "nan", "--bf16", "false", "--learning_rate", "1e30", "--max_steps", "8"))
    assert read_json(tmp_path / "nan.manifest.json")["complete"] is False


def test_a_pair_may_be_as_long_as_stretched_positions(work, tmp_path):
    from types import SimpleNamespace

    from common.cli import UserError
    from dpo_iteration.models import check_models

    args = SimpleNamespace(
        model_name_or_path=str(tmp_path),
        ref_model_name_or_path=None,
        revision=None,
        trust_remote_code=False,
        model_init_kwargs=None,
    )
    rows = {"train": [{"prompt_ids": [1] * 900, "chosen_ids": [1] * 100, "rejected_ids": [1] * 124}]}
    for factor, fits in ((2.0, True), (1.9, False)):
        config = read_json(work / "policy" / "config.json") | {
            "rope_parameters": {"rope_type": "linear", "factor": factor, "rope_theta": 10000.0}
        }
        (tmp_path / "config.json").write_text(json.dumps(config))
        if fits:
            check_models(args, None, rows)
        else:
            with pytest.raises(UserError, match="972 positions, a pair has 1024 tokens"):
                check_models(args, None, rows)


def test_what_shapes_the_tokens_or_the_pass_is_an_input(work, here, tmp_path):
    """The text of a chat template, and what model_init_kwargs changes in the configuration."""
    from common.cli import UserError

    template = tmp_path / "t.jinja"
    template.write_text(micro.TEMPLATES["llama3"])
    few = ["--bf16", "false", "--max_steps", "2", "--chat_template", template]
    here(argv(work, "templated", *few))
    template.write_text(micro.TEMPLATES["llama3"].replace("user", "person") + "{# other #}")
    with pytest.raises(UserError, match="chat_template .* has changed since"):
        here(argv(work, "templated", *few))
    here(
        argv(
            work,
            tmp_path / "out",
            "--bf16",
            "false",
            "--max_steps",
            "1",
            "--reference_cache",
            work / "reference_logps",
            "--model_init_kwargs",
            '{"rms_norm_eps": 0.5}',
        )
    )
    assert steps(tmp_path / "out")[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)


def test_a_torn_checkpoint_is_not_continued_from(work, here, capfd):
    more = "--bf16 false --max_steps 6 --save_steps 2 --keep_checkpoints --learning_rate 2e-3".split()
    here(argv(work, "torn", *more))
    whole = load_file(work / "torn" / "model.safetensors")
    (work / "torn" / "model.safetensors").unlink()  # as if it had been killed at its last checkpoint
    (work / "torn" / "checkpoint-6" / "trainer_state.json").write_text('{"epoch": 0.')
    capfd.readouterr()
    here(argv(work, "torn", *more))
    assert (
        "continuing from" in capfd.readouterr().out
        and moved(load_file(work / "torn" / "model.safetensors"), whole) < 1e-6
    )


def test_a_checkpoint_that_cannot_be_read_says_which_and_what_to_do(work, here, capfd):
    more = "--bf16 false --max_steps 6 --save_steps 2 --keep_checkpoints --learning_rate 2e-3".split()
    here(argv(work, "damaged", *more))
    (work / "damaged" / "model.safetensors").unlink()
    (work / "damaged" / "checkpoint-6" / "optimizer.pt").write_bytes(b"damaged")
    done = start(*argv(work, "damaged", *more))  # its lock ends with its process
    assert done.returncode == 2 and re.search(
        r"error: cannot continue from .*checkpoint-6: .*; delete that folder", done.stderr
    )
    shutil.rmtree(work / "damaged" / "checkpoint-6")
    here(
        argv(work, "damaged", *more, "--logging_first_step", "true", "--dataloader_num_workers", "1")
    )  # neither shapes the weights
    assert "checkpoint-4" in capfd.readouterr().out and (work / "damaged" / "model.safetensors").exists()


def test_the_last_step_is_evaluated_once(work, here):
    more = "--bf16 false --max_steps 2 --eval_fraction 0.25 --eval_steps 1 --logging_first_step true"
    here(argv(work, "once", *more.split()))
    evaluated = [
        entry["step"]
        for entry in read_json(work / "once.trainer_state.json")["log_history"]
        if "eval_loss" in entry
    ]
    assert evaluated == [1, 2] and math.isfinite(
        read_json(work / "once.manifest.json")["metrics"]["eval_loss"]
    )


@pytest.mark.parametrize("save_steps", [1, 2])
def test_the_figures_are_those_of_the_weights_that_are_saved(work, here, capfd, save_steps):
    """The highest loss is called the best: that of step 1.

    Where only every second step is saved, it is gone, and the last step's weights stay.
    """
    more = (
        f"--bf16 false --max_steps 4 --eval_fraction 0.25 --eval_steps 1 --save_steps {save_steps} "
        "--save_total_limit 9 --learning_rate 2e-3"
    )
    best, name = (
        "--load_best_model_at_end true --metric_for_best_model eval_loss --greater_is_better true",
        f"best{save_steps}",
    )
    here(argv(work, name, *more.split(), *best.split(), "--keep_checkpoints"))
    history, metrics = (
        read_json(work / f"{name}.trainer_state.json")["log_history"],
        read_json(work / f"{name}.manifest.json")["metrics"],
    )
    step = {1: 1, 2: 4}[save_steps]
    weights = load_file(work / name / "model.safetensors")
    at = {
        int(f.name.split("-")[1]): moved(weights, load_file(f / "model.safetensors"))
        for f in (work / name).glob("checkpoint-*")
    }
    assert [number for number, distance in at.items() if distance == 0] == [step] and len(
        at
    ) == 4 // save_steps
    [evaluated] = [entry for entry in history if "eval_loss" in entry and entry["step"] == step]
    [logged] = [entry for entry in history if "loss" in entry and entry["step"] == step]
    assert (
        metrics["step"] == step
        and metrics["eval_loss"] == evaluated["eval_loss"]
        and metrics["loss"] == logged["loss"]
    )
    assert (
        metrics["eval_rewards/margins"] == evaluated["eval_rewards/margins"]
        and metrics["rewards/margins"] == logged["rewards/margins"]
    )
    said, text = capfd.readouterr().out, (work / name / "README.md").read_text()
    assert ("the model is that of step 1 of 4" in said) == (
        step == 1
    ) and f"held out: loss {evaluated['eval_loss']:.4f}" in said
    assert f"| {evaluated['eval_loss']:.4f} |" in text and f"up to step {step}," in text
